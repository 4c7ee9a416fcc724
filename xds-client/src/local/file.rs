//! A file that may change at any time, in place, by renaming or by swapping a symbolic link.

use std::{
    fs::Metadata,
    hash::{DefaultHasher, Hash, Hasher},
    os::unix::fs::MetadataExt,
    path::PathBuf,
    time::{Duration, SystemTime},
};

use super::{Document, LocalError, parse};

/// A mesh description in a file.
///
/// The file is looked at once in a while, not watched by events: these do not see every way in which a mounted file can
/// change. A look costs one `stat`, and a read only when that tells something new.
#[derive(Debug)]
pub struct LocalFile {
    path: PathBuf,
    interval: Duration,
    /// The file as it was at the last look, if a later change is sure to show in it.
    settled: Option<Stamp>,
    /// What the last look told: a hash of the content, or the failure to read it.
    told: Option<Outcome>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Content(u64),
    Failure(std::io::ErrorKind),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl LocalFile {
    /// Follows the file at `path`, looking at it once a second.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self::with_interval(path, Duration::from_secs(1))
    }

    /// Follows the file at `path`, looking at it once per `interval`.
    #[must_use]
    pub fn with_interval(path: impl Into<PathBuf>, interval: Duration) -> Self {
        Self {
            path: path.into(),
            interval,
            settled: None,
            told: None,
        }
    }

    /// Reads the file as it is now.
    ///
    /// # Errors
    /// If it cannot be read or is no mesh description.
    ///
    /// # Cancel safety
    /// Nothing is lost.
    pub async fn load(&mut self) -> Result<Document, LocalError> {
        let (text, stamp) = self.read().await;
        self.tell(text, stamp)
    }

    /// Waits until the content differs from what was told last, and tells it. A content that is no mesh description, or
    /// a file that cannot be read, is told once as an error; call again to go on waiting for a better one.
    ///
    /// # Errors
    /// If the new content is no mesh description, or the file can no longer be read.
    ///
    /// # Cancel safety
    /// Nothing is lost: the next call finds the change again.
    pub async fn changed(&mut self) -> Result<Document, LocalError> {
        loop {
            tokio::time::sleep(self.interval).await;
            let now = tokio::fs::metadata(&self.path).await;
            if self.settled.is_some() && now.ok().as_ref().map(Stamp::of) == self.settled {
                continue;
            }
            let (text, stamp) = self.read().await;
            if Some(outcome(&text)) != self.told {
                return self.tell(text, stamp);
            }
            self.settled = stamp;
        }
    }

    async fn read(&self) -> (std::io::Result<String>, Option<Stamp>) {
        // The stamp is taken first: a change while reading then shows at the next look.
        let metadata = tokio::fs::metadata(&self.path).await;
        let stamp = metadata.ok().filter(is_settled).as_ref().map(Stamp::of);
        (tokio::fs::read_to_string(&self.path).await, stamp)
    }

    fn tell(
        &mut self,
        text: std::io::Result<String>,
        stamp: Option<Stamp>,
    ) -> Result<Document, LocalError> {
        self.told = Some(outcome(&text));
        self.settled = stamp;
        let text = text.map_err(|source| LocalError::Read {
            path: self.path.clone(),
            source,
        })?;
        parse(&text)
    }
}

fn outcome(text: &std::io::Result<String>) -> Outcome {
    match text {
        Ok(text) => {
            let mut hasher = DefaultHasher::new();
            text.hash(&mut hasher);
            Outcome::Content(hasher.finish())
        }
        Err(error) => Outcome::Failure(error.kind()),
    }
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
