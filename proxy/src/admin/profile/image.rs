//! The program and its libraries: where they lie in memory, how their frames unwind, and what their functions are called.

use std::{
    fs::{self, File},
    io,
    ops::Range,
    path::{Path, PathBuf},
};

use framehop::{ExplicitModuleSectionInfo, Module};
use object::{
    Object, ObjectSection, ObjectSegment, ObjectSymbol, ReadCache, SegmentFlags, SymbolKind,
    elf::PF_X,
};

/// A file of which code is mapped.
#[derive(Debug)]
pub(super) struct Image {
    pub(super) path: PathBuf,
    /// Where its code is.
    pub(super) memory: Range<u64>,
    /// Where that begins in the file.
    pub(super) offset: u64,
}

/// All images of this process.
///
/// # Errors
/// When the kernel does not tell.
pub(super) fn images() -> io::Result<Vec<Image>> {
    let maps = fs::read_to_string("/proc/self/maps")?;
    Ok(maps.lines().filter_map(Image::of_line).collect())
}

impl Image {
    /// A line of `/proc/self/maps`, if it tells of code in a file.
    fn of_line(line: &str) -> Option<Self> {
        let mut fields = line.split_ascii_whitespace();
        let (begin, end) = fields.next()?.split_once('-')?;
        let executable = fields.next()?.as_bytes().get(2) == Some(&b'x');
        let hexadecimal = |text| u64::from_str_radix(text, 16).ok();
        let offset = hexadecimal(fields.next()?)?;
        let path = Path::new(fields.nth(2)?);
        (executable && path.is_absolute()).then_some(Self {
            path: path.to_owned(),
            memory: hexadecimal(begin)?..hexadecimal(end)?,
            offset,
        })
    }

    /// What unwinding needs of it; `None` if the file is gone or not what it was.
    pub(super) fn module(&self) -> Option<Module<Vec<u8>>> {
        let cache = self.read()?;
        let file = object::File::parse(&cache).ok()?;
        let bias = self.bias(&file)?;
        let section = |name| {
            let section = file.section_by_name(name)?;
            let begin = section.address();
            let place = begin..begin.checked_add(section.size())?;
            Some((place, section.data().ok()?.to_vec()))
        };
        let (eh_frame_svma, eh_frame) = section(".eh_frame").unzip();
        let (eh_frame_hdr_svma, eh_frame_hdr) = section(".eh_frame_hdr").unzip();
        let place = |name| section(name).map(|(place, _)| place);
        let sections = ExplicitModuleSectionInfo {
            text_svma: place(".text"),
            got_svma: place(".got"),
            eh_frame_svma,
            eh_frame,
            eh_frame_hdr_svma,
            eh_frame_hdr,
            ..ExplicitModuleSectionInfo::default()
        };
        let name = self.path.display().to_string();
        Some(Module::new(name, self.memory.clone(), bias, sections))
    }

    /// The names of the functions at these addresses of memory, in the same order.
    pub(super) fn names(&self, addresses: &[u64]) -> Vec<Option<String>> {
        self.try_names(addresses)
            .unwrap_or_else(|| addresses.iter().map(|_| None).collect())
    }

    fn try_names(&self, addresses: &[u64]) -> Option<Vec<Option<String>>> {
        let cache = self.read()?;
        let file = object::File::parse(&cache).ok()?;
        let bias = self.bias(&file)?;
        let all = file.symbols().chain(file.dynamic_symbols());
        let mut functions: Vec<(Range<u64>, &str)> = all
            .filter(|symbol| symbol.kind() == SymbolKind::Text && symbol.size() > 0)
            .filter_map(|symbol| {
                let begin = symbol.address();
                let end = begin.checked_add(symbol.size())?;
                Some((begin..end, symbol.name().ok()?))
            })
            .collect();
        functions.sort_unstable_by_key(|(place, _)| place.start);
        let name = |address: &u64| {
            let address = address.wrapping_sub(bias);
            let behind = functions.partition_point(|(place, _)| place.start <= address);
            let (place, name) = functions.get(behind.checked_sub(1)?)?;
            let name = format!("{:#}", rustc_demangle::demangle(name));
            place.contains(&address).then_some(name)
        };
        Some(addresses.iter().map(name).collect())
    }

    fn read(&self) -> Option<ReadCache<File>> {
        Some(ReadCache::new(File::open(&self.path).ok()?))
    }

    /// What is to be added to an address of the file to have it in memory.
    fn bias<'data>(&self, file: &impl Object<'data>) -> Option<u64> {
        file.segments().find_map(|segment| {
            let (offset, size) = segment.file_range();
            let SegmentFlags::Elf { p_flags } = segment.flags() else {
                return None;
            };
            // The mapping begins with the page in which the segment begins.
            let here = self.offset <= offset && offset < self.offset + PAGE
                || (offset..offset + size).contains(&self.offset);
            let begin = self.memory.start.wrapping_sub(self.offset);
            (p_flags & PF_X != 0 && here)
                .then(|| begin.wrapping_add(offset).wrapping_sub(segment.address()))
        })
    }
}

/// The largest pages that are in use.
const PAGE: u64 = 64 << 10;
