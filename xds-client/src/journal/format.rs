//! The bytes of a journal, and how they are read.
//!
//! ```text
//! journal      = "culvert\n" format:u32 length:u32 owner checksum:u32  transaction*
//! transaction  = 'T' kind:u8 extent:u8 0 time:u64 length:u64 checksum:u32  item*  checksum:u32
//! item         = tag:u8 length:u32 content
//! ```
//! Numbers are little-endian; `length` of a transaction counts its items, `time` is in seconds since 1970. Each checksum (CRC-32)
//! covers everything before it, so that a part that is missing, doubled or moved shows like one that has changed.
//!
//! What may be cut off is the end of a transaction that was being written. So a journal that ends early is read up to its last
//! whole transaction, and anything else that is wrong makes it unusable: what follows a bad place was in force, too, and what
//! comes before it is not what the mesh was.

use std::{
    io::{self, Read, Write},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use crc32fast::Hasher;

use crate::{Extent, Kind};

/// One entry of a transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Item<'a> {
    /// An encoded `Resource` that was put in force.
    Resource(&'a [u8]),
    /// The name of a resource that was refused: what was held under it stays.
    Refused(&'a str),
    /// A name that is gone.
    Removed(&'a str),
}

impl<'a> Item<'a> {
    fn parts(self) -> (u8, &'a [u8]) {
        match self {
            Self::Resource(encoded) => (RESOURCE, encoded),
            Self::Refused(name) => (REFUSED, name.as_bytes()),
            Self::Removed(name) => (REMOVED, name.as_bytes()),
        }
    }

    /// How many bytes it takes.
    pub(super) fn size(self) -> u64 {
        ITEM_HEADER + self.parts().1.len() as u64
    }
}

/// How a transaction begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Begin {
    pub(super) kind: Kind,
    pub(super) extent: Extent,
    pub(super) time: SystemTime,
    /// Bytes of its items.
    pub(super) length: u64,
}

/// Receives what a journal holds. Only whole transactions begin.
pub(super) trait Visitor {
    /// A transaction begins.
    fn begin(&mut self, begin: &Begin);
    /// Its next item, which begins at this place of the file.
    fn item(&mut self, at: u64, item: Item<'_>) -> Result<(), Unusable>;
    /// It is complete.
    fn commit(&mut self, begin: &Begin) -> Result<(), Unusable>;
}

/// How far a journal can be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Readable {
    /// Where the last whole transaction ends.
    pub(super) end: u64,
    /// The checksum up to there.
    pub(super) checksum: u32,
    /// When the last one was told.
    pub(super) told: Option<SystemTime>,
}

/// Why a journal is not used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Unusable {
    /// It cannot be read.
    #[error("it cannot be read")]
    Io(#[from] io::Error),
    /// Something else is in the file.
    #[error("it is no journal")]
    NoJournal,
    /// A later version of the program wrote it.
    #[error("its format is {0}, and this version knows {FORMAT}")]
    Format(u32),
    /// It tells of the mesh as another node sees it.
    #[error("it belongs to {0:?}")]
    Foreign(String),
    /// It is not what was written.
    #[error("it is damaged at byte {0}")]
    Damaged(u64),
    /// It ends before all there was to tell was told once.
    #[error("it is incomplete")]
    Incomplete,
    /// Others could have written it, or could read it.
    #[error("the file is not ours alone")]
    Exposed,
}

/// Reads `length` bytes of a journal of `owner`, and shows `visitor` all transactions that are whole.
///
/// # Errors
/// At the first fault but an early end; what was shown until then is not to be used.
pub(super) fn read(
    input: &mut dyn Read,
    length: u64,
    owner: &str,
    visitor: &mut dyn Visitor,
) -> Result<Readable, Unusable> {
    let mut source = Source {
        input,
        at: 0,
        left: length,
        checksum: Hasher::new(),
    };
    source.header(owner)?;
    let mut readable = Readable {
        end: source.at,
        checksum: source.checksum(),
        told: None,
    };
    let mut content = Vec::new();
    while let Some(begin) = source.begin()? {
        visitor.begin(&begin);
        let end = source.at + begin.length;
        while source.at < end {
            let at = source.at;
            let item = source.item(end, &mut content)?;
            visitor.item(at, item)?;
        }
        source.check()?;
        visitor.commit(&begin)?;
        readable = Readable {
            end: source.at,
            checksum: source.checksum(),
            told: Some(begin.time),
        };
    }
    Ok(readable)
}

struct Source<'a> {
    input: &'a mut dyn Read,
    at: u64,
    left: u64,
    checksum: Hasher,
}

impl Source<'_> {
    fn header(&mut self, owner: &str) -> Result<(), Unusable> {
        let short = |_| Unusable::NoJournal;
        let magic: [u8; MAGIC.len()] = self.bytes().map_err(short)?;
        if magic != MAGIC {
            return Err(Unusable::NoJournal);
        }
        let format = u32::from_le_bytes(self.bytes().map_err(short)?);
        if format != FORMAT {
            return Err(Unusable::Format(format));
        }
        let length = u32::from_le_bytes(self.bytes().map_err(short)?);
        let mut found = Vec::new();
        self.fill(length.into(), &mut found).map_err(short)?;
        self.check()?;
        if found == owner.as_bytes() {
            Ok(())
        } else {
            let found = String::from_utf8_lossy(&found);
            Err(Unusable::Foreign(found.into_owned()))
        }
    }

    /// The next transaction that is there as a whole.
    fn begin(&mut self) -> Result<Option<Begin>, Unusable> {
        if self.left < BEGIN {
            return Ok(None);
        }
        let damaged = Unusable::Damaged(self.at);
        let tags: [u8; 4] = self.bytes()?;
        let time = u64::from_le_bytes(self.bytes()?);
        let length = u64::from_le_bytes(self.bytes()?);
        self.check()?;
        let (kind, extent) = match tags {
            [TRANSACTION, kind, extent, 0] => (kind_of(kind), extent_of(extent)),
            _ => return Err(damaged),
        };
        let time = UNIX_EPOCH.checked_add(Duration::from_secs(time));
        let (Some(kind), Some(extent), Some(time)) = (kind, extent, time) else {
            return Err(damaged);
        };
        let whole = length
            .checked_add(CHECKSUM)
            .is_some_and(|all| all <= self.left);
        Ok(whole.then_some(Begin {
            kind,
            extent,
            time,
            length,
        }))
    }

    fn item<'c>(&mut self, end: u64, content: &'c mut Vec<u8>) -> Result<Item<'c>, Unusable> {
        let at = self.at;
        let damaged = || Unusable::Damaged(at);
        let [tag] = self.bytes()?;
        let length = u64::from(u32::from_le_bytes(self.bytes()?));
        if self.at.saturating_add(length) > end {
            return Err(damaged());
        }
        self.fill(length, content)?;
        let text = || std::str::from_utf8(content).map_err(|_| damaged());
        match tag {
            RESOURCE => Ok(Item::Resource(content)),
            REFUSED => Ok(Item::Refused(text()?)),
            REMOVED => Ok(Item::Removed(text()?)),
            _ => Err(damaged()),
        }
    }

    fn checksum(&self) -> u32 {
        self.checksum.clone().finalize()
    }

    /// Reads a checksum and compares it with that of everything before.
    fn check(&mut self) -> Result<(), Unusable> {
        let (at, expected) = (self.at, self.checksum());
        let mut found = [0; 4];
        self.exactly(&mut found)?;
        if u32::from_le_bytes(found) == expected {
            Ok(())
        } else {
            Err(Unusable::Damaged(at))
        }
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], Unusable> {
        let mut bytes = [0; N];
        self.exactly(&mut bytes)?;
        self.checksum.update(&bytes);
        Ok(bytes)
    }

    fn fill(&mut self, length: u64, into: &mut Vec<u8>) -> Result<(), Unusable> {
        let length = usize::try_from(length.min(self.left.saturating_add(1)));
        into.clear();
        into.resize(length.unwrap_or(usize::MAX), 0);
        self.exactly(into)?;
        self.checksum.update(into);
        Ok(())
    }

    fn exactly(&mut self, bytes: &mut [u8]) -> Result<(), Unusable> {
        let length = bytes.len() as u64;
        let left = self.left.checked_sub(length);
        self.left = left.ok_or(Unusable::Damaged(self.at))?;
        self.input.read_exact(bytes)?;
        self.at += length;
        Ok(())
    }
}

/// Writes a journal from its beginning on, or goes on with one.
#[derive(Debug)]
pub(super) struct Writer<W> {
    out: W,
    checksum: Hasher,
    length: u64,
}

impl<W: Write> Writer<W> {
    /// Begins a journal of `owner`.
    pub(super) fn begin(out: W, owner: &str) -> io::Result<Self> {
        let mut writer = Self {
            out,
            checksum: Hasher::new(),
            length: 0,
        };
        let length = u32::try_from(owner.len()).map_err(io::Error::other)?;
        writer.put(&MAGIC)?;
        writer.put(&FORMAT.to_le_bytes())?;
        writer.put(&length.to_le_bytes())?;
        writer.put(owner.as_bytes())?;
        writer.seal()?;
        Ok(writer)
    }

    /// Begins a transaction. Items of exactly `begin.length` bytes must follow, then [`Self::commit`].
    pub(super) fn transaction(&mut self, begin: &Begin) -> io::Result<()> {
        let time = begin.time.duration_since(UNIX_EPOCH).unwrap_or_default();
        let extent = match begin.extent {
            Extent::Changes => 0,
            Extent::Everything => 1,
        };
        self.put(&[TRANSACTION, begin.kind as u8, extent, 0])?;
        self.put(&time.as_secs().to_le_bytes())?;
        self.put(&begin.length.to_le_bytes())?;
        self.seal()
    }

    /// An item.
    pub(super) fn item(&mut self, item: Item<'_>) -> io::Result<()> {
        let (tag, content) = item.parts();
        let length = u32::try_from(content.len()).map_err(io::Error::other)?;
        self.put(&[tag])?;
        self.put(&length.to_le_bytes())?;
        self.put(content)
    }

    /// Completes a transaction, as far as the operating system is concerned.
    pub(super) fn commit(&mut self) -> io::Result<()> {
        self.seal()?;
        self.out.flush()
    }

    pub(super) fn get_ref(&self) -> &W {
        &self.out
    }

    /// How far it is written.
    pub(super) fn readable(&self) -> Readable {
        Readable {
            end: self.length,
            checksum: self.checksum.clone().finalize(),
            told: None,
        }
    }

    fn seal(&mut self) -> io::Result<()> {
        let checksum = self.checksum.clone().finalize();
        self.length += CHECKSUM;
        self.out.write_all(&checksum.to_le_bytes())
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.checksum.update(bytes);
        self.length += bytes.len() as u64;
        self.out.write_all(bytes)
    }
}

fn kind_of(number: u8) -> Option<Kind> {
    Kind::ALL.into_iter().find(|kind| *kind as u8 == number)
}

fn extent_of(number: u8) -> Option<Extent> {
    match number {
        0 => Some(Extent::Changes),
        1 => Some(Extent::Everything),
        _ => None,
    }
}

const MAGIC: [u8; 8] = *b"culvert\n";
/// Grows when an older program could not read what a newer one writes.
const FORMAT: u32 = 1;
const TRANSACTION: u8 = b'T';
const RESOURCE: u8 = b'+';
const REFUSED: u8 = b'!';
const REMOVED: u8 = b'-';
const CHECKSUM: u64 = 4;
const BEGIN: u64 = 4 + 8 + 8 + CHECKSUM;
const ITEM_HEADER: u64 = 1 + 4;
