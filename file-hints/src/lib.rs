//! When a file is worth another look.
//!
//! A file that may change at any time, in place, by renaming or by swapping a symbolic link, is looked at when the kernel says that
//! something happened around it (`inotify`), so that nobody has to wake up to find that nothing did. Those events do not see every way
//! in which a mounted file can change: it is looked at every ten seconds besides, and every second where there are no events to be
//! had. All files are due at the same moment, which costs an idle process one wake-up.
#![forbid(unsafe_code)]

use std::{
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use tokio::{
    net::unix::pipe::Receiver,
    time::{sleep, timeout},
};

/// Says when to look at one path.
#[derive(Debug)]
pub struct Hints {
    path: PathBuf,
    began: bool,
    seen: Option<Stamp>,
    /// `None` without events: before the first hint, or because the kernel grants no more of them.
    events: Option<Events>,
}

impl Hints {
    /// For the file that `path` leads to, whether there is one or not. Watching begins with the first [`Self::next`].
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            began: false,
            seen: None,
            events: None,
        }
    }

    /// The path that was given.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Ready when the path is to be looked at: at once when asked for the first time, and then a moment after something has
    /// happened around it. Often nothing has changed.
    ///
    /// # Cancel safety
    /// Nothing is lost: the next call is ready at once if something happened.
    pub async fn next(&mut self) {
        if !self.began {
            self.began = true;
            self.watch();
            return;
        }
        loop {
            let happened = match &self.events {
                Some(events) => timeout(until_next(RARELY), events.some()).await.is_ok(),
                None => {
                    sleep(until_next(OFTEN)).await;
                    false
                }
            };
            if happened {
                // Whoever is at work on the file gets a moment to finish.
                sleep(SETTLE).await;
            }
            if self.watch() || happened {
                return;
            }
        }
    }

    /// Watches what the path leads to now, and tells whether that may be something else than before.
    fn watch(&mut self) -> bool {
        let mut events = self.events.take().or_else(|| Events::new().ok());
        let followed = events.as_mut().map(|events| events.follow(&self.path));
        self.events = events.filter(|_| matches!(followed, Some(Ok(()))));
        // Only now: what changes later makes an event.
        let before = std::mem::replace(&mut self.seen, Stamp::of(&self.path));
        self.seen != before || self.seen.is_some_and(Stamp::is_fresh)
    }
}

/// What a change of a file shows in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    fn of(path: &Path) -> Option<Self> {
        let it = std::fs::metadata(path).ok()?;
        Some(Self {
            device: it.dev(),
            inode: it.ino(),
            size: it.size(),
            modified: (it.mtime(), it.mtime_nsec()),
            changed: (it.ctime(), it.ctime_nsec()),
        })
    }

    /// Time stamps are coarse: what was written a moment ago may be written again without a visible difference.
    fn is_fresh(self) -> bool {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let now = now.unwrap_or_default().as_secs();
        u64::try_from(self.changed.0).is_ok_and(|changed| now <= changed.saturating_add(2))
    }
}

/// What the kernel tells about some places of the file system.
#[derive(Debug)]
struct Events {
    /// No pipe, but read as one.
    queue: Receiver,
    watched: Vec<i32>,
}

impl Events {
    fn new() -> io::Result<Self> {
        let queue = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        Ok(Self {
            queue: Receiver::from_owned_fd_unchecked(queue)?,
            watched: Vec::new(),
        })
    }

    /// Ready while there are events.
    async fn some(&self) {
        // An error cannot be waited out; the caller looks, and comes back.
        let _ready = self.queue.readable().await;
    }

    /// Forgets what has happened, and watches what `path` leads through now.
    fn follow(&mut self, path: &Path) -> io::Result<()> {
        self.forget()?;
        let mut watched = Vec::new();
        let mut at = path.to_owned();
        for _ in 0..MOST_LINKS {
            let above = at.ancestors().skip(1);
            // Where a directory is missing, the nearest one above it tells when it comes.
            let found = above.map(or_here).find_map(|it| self.watch(it, AROUND));
            watched.extend(found);
            match (std::fs::read_link(&at), at.parent()) {
                (Ok(target), Some(directory)) => at = directory.join(target),
                _ => break,
            }
        }
        // A file that is mounted by itself has its directory elsewhere.
        watched.extend(self.watch(path, ITSELF));
        for gone in self.watched.iter().filter(|it| !watched.contains(it)) {
            // Fails for what the kernel has let go of by itself.
            let _ = inotify::remove_watch(&self.queue, *gone);
        }
        self.watched = watched;
        if self.watched.is_empty() {
            return Err(io::ErrorKind::NotFound.into());
        }
        Ok(())
    }

    fn forget(&self) -> io::Result<()> {
        let mut events = [0; 4096];
        loop {
            match self.queue.try_read(&mut events) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }

    fn watch(&self, path: &Path, what: WatchFlags) -> Option<i32> {
        inotify::add_watch(&self.queue, path, what).ok()
    }
}

/// The parent of a relative path of one component is no path.
fn or_here(path: &Path) -> &Path {
    if path.as_os_str().is_empty() {
        Path::new(".")
    } else {
        path
    }
}

/// The time until the next multiple of `interval` by the clock on the wall, the same for all who wait.
fn until_next(interval: Duration) -> Duration {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let since = now.unwrap_or_default().as_millis() % interval.as_millis();
    interval.saturating_sub(Duration::from_millis(u64::try_from(since).unwrap_or(0)))
}

/// Entries of a directory: made, renamed, removed, written.
const AROUND: WatchFlags = WatchFlags::CREATE
    .union(WatchFlags::MOVED_FROM)
    .union(WatchFlags::MOVED_TO)
    .union(WatchFlags::DELETE)
    .union(WatchFlags::CLOSE_WRITE)
    .union(GONE);
/// The file: written, or another one.
const ITSELF: WatchFlags = WatchFlags::CLOSE_WRITE
    .union(WatchFlags::ATTRIB)
    .union(GONE);
const GONE: WatchFlags = WatchFlags::DELETE_SELF.union(WatchFlags::MOVE_SELF);
/// Links that the kernel follows, too.
const MOST_LINKS: usize = 40;
/// How often to look for what events do not tell.
const RARELY: Duration = Duration::from_secs(10);
/// How often to look without events.
const OFTEN: Duration = Duration::from_secs(1);
/// From an event to the hint.
const SETTLE: Duration = Duration::from_millis(20);

#[cfg(test)]
mod tests;
