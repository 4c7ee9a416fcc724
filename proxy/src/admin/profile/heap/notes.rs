//! The notes of jemalloc: switched on and off, and read.

mod sys;

use std::{
    fs::File,
    io::{Read as _, Seek as _, Write as _},
    os::fd::AsRawFd as _,
    str::FromStr,
};

use flate2::{Compression, write::GzEncoder};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::{HeapError, Image, io};
use crate::admin::profile::pprof::{Builder, Frame};

pub(super) fn activate(active: bool) -> io::Result<()> {
    if !sys::is_prepared()? {
        return Err(HeapError::NotPrepared.into());
    }
    sys::set_active(active)
}

pub(super) fn profile(images: &[Image]) -> io::Result<Vec<u8>> {
    if !sys::is_prepared()? {
        return Err(HeapError::NotPrepared.into());
    }
    if !sys::is_active()? {
        return Err(HeapError::NotActive.into());
    }
    let profile = of_dump(&dump()?, images)?;
    let mut compressed = GzEncoder::new(Vec::new(), Compression::fast());
    compressed.write_all(&profile)?;
    compressed.finish()
}

/// What jemalloc writes to a file: to one in memory, since the root file system may be read-only.
fn dump() -> io::Result<String> {
    let mut file = File::from(memfd_create("heap", MFdFlags::MFD_CLOEXEC)?);
    sys::dump(&format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    file.rewind()?;
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    Ok(text)
}

fn of_dump(dump: &str, images: &[Image]) -> io::Result<Vec<u8>> {
    let malformed = || io::Error::other("the allocator's notes are in another form than expected");
    let (head, stacks) = dump.split_once("\n@").ok_or_else(malformed)?;
    let interval = head
        .lines()
        .next()
        .and_then(|line| line.strip_prefix("heap_v2/")?.parse().ok())
        .ok_or_else(malformed)?;
    let mut builder = Builder::default();
    builder.values(&[("inuse_objects", "count"), ("inuse_space", "bytes")]);
    let stacks = stacks.split("\nMAPPED_LIBRARIES").next().unwrap_or(stacks);
    for stack in stacks.split("\n@") {
        let (frames, counts) = stack.split_once('\n').ok_or_else(malformed)?;
        let (objects, bytes) = all_threads(counts).ok_or_else(malformed)?;
        let frames: Vec<Frame> = frames.split_ascii_whitespace().filter_map(frame).collect();
        if objects > 0 {
            builder.sample(&frames, scaled(objects, bytes, interval));
        }
    }
    Ok(builder.build(images))
}

/// Return addresses; the call is before them.
fn frame(text: &str) -> Option<Frame> {
    let address = u64::from_str_radix(text.strip_prefix("0x")?, 16).ok()?;
    Some(Frame::At(address.saturating_sub(1)))
}

/// Objects and bytes of a line such as `t*: 4: 2097664 [0: 0]`.
fn all_threads(counts: &str) -> Option<(u32, u32)> {
    let line = counts
        .lines()
        .find_map(|line| line.trim().strip_prefix("t*:"))?;
    let mut numbers = line.split([':', '[', ' ']).filter(|text| !text.is_empty());
    let mut number = || numbers.next().and_then(|text| u64::from_str(text).ok());
    let bounded = |number: u64| u32::try_from(number).unwrap_or(u32::MAX);
    Some((bounded(number()?), bounded(number()?)))
}

/// What so many noted objects of so many bytes together stand for, if one of `interval` bytes is noted on the average.
#[expect(
    clippy::cast_possible_truncation,
    reason = "a conversion of floating point saturates, and memory is far below its bounds"
)]
fn scaled(objects: u32, bytes: u32, interval: u32) -> Vec<i64> {
    let (objects, bytes) = (f64::from(objects), f64::from(bytes));
    let noted = 1.0 - (-bytes / objects / f64::from(interval.max(1))).exp();
    vec![(objects / noted) as i64, (bytes / noted) as i64]
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;
    use crate::admin::profile::pprof::Profile;

    const DUMP: &str = "heap_v2/524288\n  t*: 3: 1572864 [0: 0]\n  t0: 3: 1572864 [0: 0]\n\
        @ 0x10 0x20\n  t*: 1: 1048576 [0: 0]\n  t0: 1: 1048576 [0: 0]\n\
        @ 0x10 0x30\n  t*: 2: 128 [0: 0]\n  t1: 2: 128 [0: 0]\n\
        @ 0x40\n  t*: 0: 0 [0: 0]\n\nMAPPED_LIBRARIES:\n00-01 r-xp 0 0 0 /bin/x\n";

    #[test]
    fn notes_become_stacks_with_what_they_stand_for() {
        let profile = Profile::decode(&*of_dump(DUMP, &[]).unwrap()).unwrap();
        let values: Vec<_> = profile.sample.iter().map(|one| &*one.value).collect();
        // A large object is nearly always noted, a small one hardly ever.
        assert_eq!(values, [[1, 1_212_696], [16_385, 1_048_640]]);
        let addresses: Vec<_> = profile.location.iter().map(|one| one.address).collect();
        assert_eq!(addresses.len(), 3);
        assert!([0xf, 0x1f, 0x2f].iter().all(|at| addresses.contains(at)));
        assert!(of_dump("", &[]).is_err());
        assert!(of_dump("heap_v2/1\n@ 0x1\nnothing", &[]).is_err());
    }
}
