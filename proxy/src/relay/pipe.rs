//! Pipes that flows share: bytes go through them from one socket to another without passing user space.

use std::{
    fmt, io,
    os::fd::{AsFd, OwnedFd},
    task::{Context, Poll, ready},
};

use nix::sys::resource::{Resource, getrlimit};
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};
use tokio::{io::Interest, net::TcpStream};

use super::Buffers;
use crate::telemetry::open_descriptors;

/// What a pipe holds, in bytes: the largest that the kernel gives. The less is moved at a time, the less is won: with 256 KiB,
/// half of what 1 MiB saves over copying. Without privileges, a user may have 64 of the first size.
const SIZES: [usize; 2] = [1 << 20, 256 << 10];

/// Pipes at one time, those included that wait for a sink with bytes inside. Of more flows in bulk than this, some copy.
const MOST: usize = 64;

/// Idle pipes that are kept; more are closed.
const KEEP: usize = 8;

/// Idle pipes, and how many there are in all.
#[derive(Default)]
pub(super) struct Pipes {
    idle: Vec<Ends>,
    taken: usize,
    /// The fewest idle pipes since the last [`Self::trim`]: nobody needed these.
    spare: usize,
}

struct Ends {
    read: OwnedFd,
    write: OwnedFd,
    size: usize,
}

impl Pipes {
    /// Pipes now with their takers.
    pub(super) fn taken(&self) -> usize {
        self.taken
    }

    /// Takes out the idle pipes that nobody needed since the last call, for the caller to drop.
    pub(super) fn trim(&mut self) -> impl Drop + use<> {
        let unneeded = self.spare.min(self.idle.len());
        let freed = self.idle.split_off(self.idle.len() - unneeded);
        self.spare = self.idle.len();
        freed
    }

    fn take(&mut self) -> Option<Ends> {
        let ends = match self.idle.pop() {
            Some(ends) => ends,
            None if self.taken < MOST => Ends::new()?,
            None => return None,
        };
        self.spare = self.spare.min(self.idle.len());
        self.taken += 1;
        Some(ends)
    }

    /// Ends a taking. Keeps `ends`, of an empty pipe, or gives them back to be closed.
    fn put_back(&mut self, ends: Option<Ends>) -> Option<Ends> {
        self.taken = self.taken.saturating_sub(1);
        if self.idle.len() >= KEEP {
            return ends;
        }
        self.idle.extend(ends);
        None
    }
}

impl Ends {
    /// A new pipe; `None` where descriptors are short, or the pages that the kernel allows this user.
    fn new() -> Option<Self> {
        // The last eighth of the descriptors is for what cannot do without.
        let (limit, _) = getrlimit(Resource::RLIMIT_NOFILE).ok()?;
        if open_descriptors().is_none_or(|open| open >= limit - limit / 8) {
            return None;
        }
        let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).ok()?;
        let mut sizes = SIZES.iter();
        let size = sizes.find_map(|size| fcntl_setpipe_size(&write, *size).ok())?;
        Some(Self { read, write, size })
    }
}

/// A pipe of one flow, with the bytes that its sink has not taken yet. Empty, it goes back to the pool when dropped;
/// otherwise it is closed, and its bytes are lost.
pub(super) struct Pipe {
    ends: Option<Ends>,
    holds: usize,
    home: Buffers,
}

impl Pipe {
    /// An empty pipe; `None` if there is none to be had now.
    pub(super) fn take(home: &Buffers) -> Option<Self> {
        let ends = home.pipes().lock().take()?;
        Some(Self {
            ends: Some(ends),
            holds: 0,
            home: home.clone(),
        })
    }

    pub(super) fn is_empty(&self) -> bool {
        self.holds == 0
    }

    /// Takes bytes from `source` into the empty pipe and tells how many. None says nothing of the socket: it may be at its end,
    /// dry, or have urgent data next, which only a read passes.
    pub(super) fn fill(&mut self, source: &TcpStream) -> io::Result<usize> {
        let Some(ends) = &self.ends else {
            return Ok(0);
        };
        self.holds = match transfer(source, &ends.write, ends.size) {
            Err(error) if is_transient(&error) => 0,
            moved => moved?,
        };
        Ok(self.holds)
    }

    /// Hands bytes of the pipe to `sink` and tells how many.
    pub(super) fn poll_drain(
        &mut self,
        cx: &mut Context<'_>,
        sink: &TcpStream,
    ) -> Poll<io::Result<usize>> {
        let Some(ends) = &self.ends else {
            return Poll::Ready(Ok(0));
        };
        loop {
            ready!(sink.poll_write_ready(cx))?;
            let drain = || transfer(&ends.read, sink, self.holds);
            match sink.try_io(Interest::WRITABLE, drain) {
                Err(error) if is_transient(&error) => {}
                Err(error) => return Poll::Ready(Err(error)),
                Ok(moved) => {
                    self.holds = self.holds.saturating_sub(moved);
                    return Poll::Ready(Ok(moved));
                }
            }
        }
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        // Closed or kept outside of the lock, if not put back.
        let ends = self.ends.take().filter(|_| self.is_empty());
        let surplus = self.home.pipes().lock().put_back(ends);
        drop(surplus);
    }
}

impl fmt::Debug for Pipe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pipe({} bytes)", self.holds)
    }
}

fn is_transient(error: &io::Error) -> bool {
    let kind = error.kind();
    kind == io::ErrorKind::WouldBlock || kind == io::ErrorKind::Interrupted
}

fn transfer(from: impl AsFd, to: impl AsFd, bytes: usize) -> io::Result<usize> {
    let flags = SpliceFlags::MOVE | SpliceFlags::NONBLOCK;
    Ok(splice(from, None, to, None, bytes, flags)?)
}

/// Whether the kernel, or who guards it, does not splice these sockets at all, which says nothing of the sockets.
pub(super) fn is_unsupported(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::InvalidInput
            | io::ErrorKind::PermissionDenied
            | io::ErrorKind::Unsupported
            | io::ErrorKind::OutOfMemory
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pipes_are_bounded_and_come_back() {
        let home = Buffers::new();
        let pipes: Vec<_> = std::iter::from_fn(|| Pipe::take(&home)).collect();
        assert_eq!((pipes.len(), home.pipes_taken()), (MOST, MOST));
        drop(pipes);
        assert_eq!(
            (home.pipes_taken(), home.pipes().lock().idle.len()),
            (0, KEEP)
        );
        assert!(Pipe::take(&home).is_some());
        home.trim(); // starts the count
        drop(Pipe::take(&home));
        home.trim();
        assert_eq!(home.pipes().lock().idle.len(), 1);
    }

    #[test]
    fn a_pipe_with_bytes_is_not_given_to_the_next() {
        let home = Buffers::new();
        let mut pipe = Pipe::take(&home).unwrap();
        pipe.holds = 1;
        drop(pipe);
        assert_eq!((home.pipes_taken(), home.pipes().lock().idle.len()), (0, 0));
    }
}
