//! The last descriptors of the process, which are not spent on traffic.
//!
//! No count is kept by hand, in which something that takes descriptors could be forgotten: they are counted by the kernel, once as
//! many were taken since it last did that they could be too many.

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd},
    sync::atomic::{AtomicI32, Ordering::Relaxed},
};

use nix::sys::resource::{Resource, getrlimit};

use crate::telemetry::open_descriptors;

/// What one socket counts for until descriptors are counted again: itself, and one that nobody notes, such as the end of a pipe.
const EACH: i32 = 2;

/// How far descriptors may be spent on traffic.
#[derive(Debug)]
pub struct Descriptors {
    /// With so many open, nothing is accepted.
    accepting: i32,
    /// With so many open, nothing is dialled either. What is accepted has first claim on those in between.
    dialling: i32,
    /// How many are open, at most: as many as were when they were counted last, and what was noted since, as if none had closed.
    open: AtomicI32,
    /// Sockets that are being connected: they are not noted yet.
    connecting: AtomicI32,
}

/// One socket that is being connected.
#[derive(Debug)]
pub struct Connecting<'a>(&'a AtomicI32);

impl Drop for Connecting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

impl Descriptors {
    /// Keeps `reserve` of what the process may have now; without it a sixteenth, at least 16 and at most 1024. Never more than
    /// half.
    #[must_use]
    pub fn new(reserve: Option<u16>) -> Self {
        let (limit, _) = getrlimit(Resource::RLIMIT_NOFILE).unwrap_or((1024, 1024));
        let limit = i32::try_from(limit).unwrap_or(i32::MAX);
        let reserve = reserve.map_or_else(|| (limit / 16).clamp(16, 1024), i32::from);
        let reserve = reserve.min(limit / 2);
        Self {
            accepting: limit - reserve,
            dialling: limit - reserve / 2,
            open: AtomicI32::new(0),
            connecting: AtomicI32::new(0),
        }
    }

    /// Whether nothing may be accepted now.
    pub fn is_short(&self) -> bool {
        self.reaches(self.accepting)
    }

    /// Whether what was accepted all the same has to go: nothing may be dialled for it.
    pub fn is_exhausted(&self) -> bool {
        self.reaches(self.dialling)
    }

    /// Lets a socket be connected, unless nothing may be dialled now. Hold it until the socket is [noted](Self::note).
    pub fn connect(&self) -> Option<Connecting<'_>> {
        self.connecting.fetch_add(1, Relaxed);
        let connecting = Connecting(&self.connecting);
        (!self.is_exhausted()).then_some(connecting)
    }

    /// Notes a new socket.
    pub fn note(&self, socket: &impl AsRawFd) {
        self.open.fetch_add(EACH, Relaxed);
        // The kernel gives the lowest free number: all below it are in use.
        self.open.fetch_max(socket.as_raw_fd() + 1, Relaxed);
    }

    fn reaches(&self, number: i32) -> bool {
        let connecting = self.connecting.load(Relaxed);
        if self.open.load(Relaxed).saturating_add(connecting) < number {
            return false;
        }
        // Many of them may have closed.
        let open = count();
        self.open.store(open, Relaxed);
        open >= number
    }
}

/// How many descriptors are open. Where nobody counts them, as many as are below the lowest free number.
fn count() -> i32 {
    open_descriptors()
        .and_then(|open| i32::try_from(open).ok())
        .or_else(|| {
            let next = io::stderr().as_fd().try_clone_to_owned().ok()?;
            Some(next.as_raw_fd())
        })
        .unwrap_or(i32::MAX / 2) // none is left for either
}

impl Default for Descriptors {
    fn default() -> Self {
        Self::new(None)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    fn descriptors(accepting: i32, dialling: i32) -> Descriptors {
        Descriptors {
            accepting,
            dialling,
            open: AtomicI32::new(0),
            connecting: AtomicI32::new(0),
        }
    }

    /// Opens files until `until` are open, and notes them. Other tests of this process open and close files too; a hundred more or
    /// less than a limit leaves them room.
    fn fill(descriptors: &Descriptors, until: i32) -> Vec<File> {
        let mut files = Vec::new();
        while count() < until {
            let file = File::open("/dev/null").unwrap();
            descriptors.note(&file);
            files.push(file);
        }
        files
    }

    #[test]
    fn too_many_are_short_until_some_are_closed() {
        let descriptors = descriptors(500, 700);
        let mut open = fill(&descriptors, 600);
        assert!(descriptors.is_short() && descriptors.connect().is_some());
        open.extend(fill(&descriptors, 800));
        assert!(descriptors.is_short() && descriptors.connect().is_none());
        open.truncate(300);
        assert!(!descriptors.is_short() && descriptors.connect().is_some());
    }

    #[test]
    fn what_ends_makes_room_for_itself_alone() {
        let descriptors = descriptors(500, 700);
        let mut open = fill(&descriptors, 600);
        for low in 0..50 {
            // The next one gets a low number, which tells nothing of those above.
            drop(open.remove(low));
            let next = File::open("/dev/null").unwrap();
            descriptors.note(&next);
            open.push(next);
            assert!(descriptors.is_short(), "after {low} of them");
        }
        // High numbers alone are no shortage.
        open.drain(..300);
        assert!(!descriptors.is_short());
    }

    #[test]
    fn what_nobody_notes_is_counted() {
        let descriptors = descriptors(400, 600);
        let mut open = Vec::new();
        let mut next = || {
            let file = File::open("/dev/null").unwrap();
            descriptors.note(&file);
            open.extend([file.try_clone().unwrap(), file]);
            !descriptors.is_short()
        };
        while next() {}
        assert!((400..500).contains(&count()), "{} are open", count());
    }

    #[test]
    fn what_is_being_connected_counts_before_it_is_open() {
        let descriptors = descriptors(0, 1000);
        descriptors.open.store(998, Relaxed);
        let one = descriptors.connect().unwrap();
        assert_eq!(descriptors.open.load(Relaxed), 998);
        // Nearer than that, they are counted.
        let two = descriptors.connect().unwrap();
        assert!(descriptors.open.load(Relaxed) < 998);
        drop((one, two));
        assert_eq!(descriptors.connecting.load(Relaxed), 0);
    }

    #[test]
    fn the_reserve_is_never_more_than_half() {
        let all = Descriptors::new(Some(u16::MAX));
        let (limit, _) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        assert!(u64::try_from(all.accepting).unwrap() >= limit.min(1 << 30) / 2);
    }
}
