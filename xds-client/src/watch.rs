//! A file that may change at any time, in place, by renaming or by swapping a symbolic link.
//!
//! A look, which [`Hints`] ask for, costs one `stat`, and a read only when that tells something new. News count once the file has
//! not changed for a moment: what is being written is neither what was nor what will be.

use std::{
    fs::Metadata,
    hash::{DefaultHasher, Hash, Hasher},
    io,
    os::unix::fs::MetadataExt,
    path::Path,
    time::{Duration, SystemTime},
};

use file_hints::Hints;
use parking_lot::Mutex;
use tokio::time::sleep;

/// What was told of a file, so that something else is recognised as a change. A failure to read is something, too.
#[derive(Debug, Default)]
pub(crate) struct FileWatch(Mutex<Seen>);

#[derive(Debug, Default)]
struct Seen {
    /// The file as it was at the last look, if a later change is sure to show in it.
    settled: Option<Stamp>,
    told: Option<Outcome>,
}

/// The file at one moment.
#[derive(Debug)]
pub(crate) struct Look {
    content: io::Result<Vec<u8>>,
    /// The file before it was read.
    stamp: Option<Stamp>,
    is_settled: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Content(u64),
    Failure(io::ErrorKind),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl FileWatch {
    /// Reads the file as it is now, and takes that as told.
    ///
    /// # Cancel safety
    /// Nothing is lost.
    pub(crate) async fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        self.tell(Look::at(path).await)
    }

    /// Waits until the file differs from what was told last, and is not being written. The result is not yet taken as told.
    ///
    /// # Cancel safety
    /// Nothing is lost: the next call finds the change again.
    pub(crate) async fn changed(&self, path: &Path) -> Look {
        let mut hints = Hints::new(path);
        loop {
            hints.next().await;
            if self.is_settled_at(stamp_of(path).await) {
                continue;
            }
            let mut look = Look::at(path).await;
            while self.is_news(&look) {
                sleep(SETTLE).await;
                if stamp_of(path).await == look.stamp {
                    return look;
                }
                look = Look::at(path).await;
            }
            self.0.lock().settled = look.settled();
        }
    }

    /// Whether the file is what was told last.
    ///
    /// # Cancel safety
    /// Nothing is lost.
    pub(crate) async fn is_told(&self, path: &Path) -> bool {
        let look = Look::at(path).await;
        !self.is_news(&look)
    }

    /// Takes what was found as told, and hands out the content.
    pub(crate) fn tell(&self, look: Look) -> io::Result<Vec<u8>> {
        *self.0.lock() = Seen {
            settled: look.settled(),
            told: Some(look.outcome()),
        };
        look.content
    }

    fn is_news(&self, look: &Look) -> bool {
        Some(look.outcome()) != self.0.lock().told
    }

    fn is_settled_at(&self, now: Option<Stamp>) -> bool {
        let settled = self.0.lock().settled;
        settled.is_some() && settled == now
    }
}

impl Look {
    async fn at(path: &Path) -> Self {
        // The stamp is taken first: a change while reading then shows at the next look.
        let metadata = tokio::fs::metadata(path).await.ok();
        Self {
            content: tokio::fs::read(path).await,
            stamp: metadata.as_ref().map(Stamp::of),
            is_settled: metadata.as_ref().is_some_and(is_settled),
        }
    }

    /// The file as it was, if a later change is sure to show in that.
    fn settled(&self) -> Option<Stamp> {
        self.stamp.filter(|_| self.is_settled)
    }

    fn outcome(&self) -> Outcome {
        match &self.content {
            Ok(content) => {
                let mut hasher = DefaultHasher::new();
                content.hash(&mut hasher);
                Outcome::Content(hasher.finish())
            }
            Err(error) => Outcome::Failure(error.kind()),
        }
    }
}

async fn stamp_of(path: &Path) -> Option<Stamp> {
    let metadata = tokio::fs::metadata(path).await;
    metadata.ok().as_ref().map(Stamp::of)
}

/// A file that was written a moment ago may be written again without a visible difference: time stamps are coarse.
fn is_settled(metadata: &Metadata) -> bool {
    let age = metadata
        .modified()
        .ok()
        .and_then(|modified| SystemTime::now().duration_since(modified).ok());
    age.is_some_and(|age| age > Duration::from_secs(2))
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

/// How long a file must stay as it is before it counts: whoever writes it gets that long to go on.
pub(crate) const SETTLE: Duration = Duration::from_millis(250);
