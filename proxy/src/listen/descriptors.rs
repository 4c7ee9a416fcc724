//! The last descriptors of the process, which are not spent on traffic.
//!
//! The kernel gives each new descriptor the lowest free number, so that a number tells how many are in use at least: no count is
//! kept, and nothing that takes descriptors can be forgotten in it.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, RawFd},
    sync::atomic::{AtomicI32, Ordering::Relaxed},
};

use nix::sys::resource::{Resource, getrlimit};

/// How far descriptors may be spent on traffic.
#[derive(Debug)]
pub struct Descriptors {
    /// From this number on, nothing is accepted.
    accepting: RawFd,
    /// From this number on, nothing is dialled either. What is accepted has first claim on those in between.
    dialling: RawFd,
    /// The number that was given last.
    last: AtomicI32,
    /// Sockets that are being connected: their numbers are not noted yet.
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
        let limit = RawFd::try_from(limit).unwrap_or(RawFd::MAX);
        let reserve = reserve.map_or_else(|| (limit / 16).clamp(16, 1024), RawFd::from);
        let reserve = reserve.min(limit / 2);
        Self {
            accepting: limit - reserve,
            dialling: limit - reserve / 2,
            last: AtomicI32::new(0),
            connecting: AtomicI32::new(0),
        }
    }

    /// Whether nothing may be accepted now.
    pub fn is_short(&self) -> bool {
        self.reaches(self.accepting)
    }

    /// Lets a socket be connected, unless nothing may be dialled now. Hold it until the socket is [noted](Self::note).
    pub fn connect(&self) -> Option<Connecting<'_>> {
        self.connecting.fetch_add(1, Relaxed);
        let connecting = Connecting(&self.connecting);
        (!self.reaches(self.dialling)).then_some(connecting)
    }

    /// Notes the number that a new socket got.
    pub fn note(&self, socket: &impl AsRawFd) {
        self.last.store(socket.as_raw_fd(), Relaxed);
    }

    fn reaches(&self, number: RawFd) -> bool {
        if self.last.load(Relaxed) + self.connecting.load(Relaxed) < number {
            return false;
        }
        // It may be free again: what would one get now?
        let next = io::stderr().as_fd().try_clone_to_owned();
        let next = next.map_or(RawFd::MAX, |next| next.as_raw_fd());
        self.last.store(next, Relaxed);
        next >= number
    }
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

    #[test]
    fn a_number_in_the_reserve_is_short_until_it_is_free_again() {
        let descriptors = Descriptors {
            accepting: 600,
            dialling: 700,
            last: AtomicI32::new(0),
            connecting: AtomicI32::new(0),
        };
        let mut open = Vec::new();
        let mut fill = |until| {
            while open.last().map_or(0, AsRawFd::as_raw_fd) < until {
                open.push(File::open("/dev/null").unwrap());
            }
            descriptors.note(open.last().unwrap());
            open.split_off(open.len() / 2)
        };
        // Other tests of this process open and close files too; a hundred between the two leaves them room.
        let held = fill(650);
        assert!(descriptors.is_short() && descriptors.connect().is_some());
        drop(held);
        assert!(!descriptors.is_short());
        let held = fill(750);
        assert!(descriptors.is_short() && descriptors.connect().is_none());
        drop(held);
        assert!(descriptors.connect().is_some());
    }

    #[test]
    fn what_is_being_connected_counts_before_it_has_a_number() {
        let last = io::stderr().as_fd().try_clone_to_owned().unwrap();
        let descriptors = Descriptors {
            accepting: 0,
            // Whoever looks closely finds all of it taken.
            dialling: 3,
            last: AtomicI32::new(0),
            connecting: AtomicI32::new(0),
        };
        let (one, two) = (descriptors.connect(), descriptors.connect());
        assert!(one.is_some() && two.is_some());
        assert!(last.as_raw_fd() >= 3 && descriptors.connect().is_none());
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
