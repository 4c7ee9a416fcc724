//! A file that may change at any time, in place, by renaming or by swapping a symbolic link.
//!
//! A look, which [`Hints`] ask for, costs one `stat`, and a read only if that tells something new.

use std::{
    fs::Metadata,
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use file_hints::Hints;
use tokio::io::AsyncReadExt as _;

/// Hands out the content of a file each time it differs.
#[derive(Debug)]
pub(crate) struct WatchedFile {
    hints: Hints,
    /// The file as it was at the last look, if a later change is sure to show in it.
    settled: Option<Stamp>,
    told: Option<Result<Vec<u8>, io::ErrorKind>>,
}

impl WatchedFile {
    pub(crate) fn new(path: PathBuf) -> Self {
        Self {
            hints: Hints::new(path),
            settled: None,
            told: None,
        }
    }

    pub(crate) fn path(&self) -> &Path {
        self.hints.path()
    }

    /// The content, as soon as it differs from what was told last: at once when asked for the first time. A failure
    /// to read it is told like a content, once.
    ///
    /// # Errors
    /// If the file cannot be read any longer.
    /// # Cancel safety
    /// Nothing is lost: the next call finds the change again.
    pub(crate) async fn changed(&mut self) -> io::Result<Vec<u8>> {
        loop {
            self.hints.next().await;
            let Some((stamp, content)) = self.look().await else {
                continue;
            };
            self.settled = stamp;
            let outcome = content.as_ref().map_err(io::Error::kind).cloned();
            if self.told.as_ref() != Some(&outcome) {
                self.told = Some(outcome);
                return content;
            }
        }
    }

    /// Reads the file unless it is known to be unchanged, or is being written at this moment.
    async fn look(&self) -> Option<(Option<Stamp>, io::Result<Vec<u8>>)> {
        let before = Stamp::at(self.path()).await;
        if self.settled.is_some() && before == self.settled {
            return None;
        }
        if self.told.is_some() {
            tokio::time::sleep(SETTLE).await;
            if Stamp::at(self.path()).await != before {
                return None;
            }
        }
        let content = read(self.path(), MAX_BYTES).await;
        Some((before.filter(Stamp::is_settled), content))
    }
}

/// The content of a file of at most `most` bytes.
///
/// # Errors
/// As [`tokio::fs::read`], and [`io::ErrorKind::FileTooLarge`] for a longer one, a device included.
pub(crate) async fn read(path: &Path, most: u64) -> io::Result<Vec<u8>> {
    let file = tokio::fs::File::open(path).await?;
    let usual = file.metadata().await?.len().min(most);
    let mut content = Vec::with_capacity(usize::try_from(usual).unwrap_or_default());
    file.take(most + 1).read_to_end(&mut content).await?;
    if u64::try_from(content.len()).is_ok_and(|length| length > most) {
        let text = format!("it has more than {most} bytes");
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, text));
    }
    Ok(content)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    async fn at(path: &Path) -> Option<Self> {
        let metadata = tokio::fs::metadata(path).await.ok()?;
        Some(Self::of(&metadata))
    }

    fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }

    /// Time stamps are coarse: what was written a moment ago may be written again without a visible difference.
    fn is_settled(&self) -> bool {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let now = now.unwrap_or_default().as_secs();
        u64::try_from(self.changed.0).is_ok_and(|changed| now > changed.saturating_add(2))
    }
}

/// More than a list of a million revoked certificates takes; what is longer is nothing that was meant.
const MAX_BYTES: u64 = 64 * 1024 * 1024;
/// A changed file must stay as it is for so long before it is read: a writer may be at work.
const SETTLE: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[tokio::test]
    async fn tells_swaps_of_links_and_failures_once() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        fs::create_dir(at("one")).unwrap();
        fs::create_dir(at("two")).unwrap();
        fs::write(at("one/file"), "first").unwrap();
        fs::write(at("two/file"), "second").unwrap();
        std::os::unix::fs::symlink("one", at("data")).unwrap();
        std::os::unix::fs::symlink("data/file", at("file")).unwrap();

        let mut file = WatchedFile::new(at("file"));
        assert_eq!(file.changed().await.unwrap(), b"first");
        std::os::unix::fs::symlink("two", at("next")).unwrap();
        fs::rename(at("next"), at("data")).unwrap();
        assert_eq!(file.changed().await.unwrap(), b"second");
        fs::remove_file(at("two/file")).unwrap();
        let gone = file.changed().await.unwrap_err();
        assert_eq!(gone.kind(), io::ErrorKind::NotFound);
        fs::write(at("two/file"), "third").unwrap();
        assert_eq!(file.changed().await.unwrap(), b"third");
    }

    #[tokio::test]
    async fn a_file_without_end_is_a_failure() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        let long = fs::File::create(&path).unwrap();
        long.set_len(MAX_BYTES + 1).unwrap();
        let mut file = WatchedFile::new(path.clone());
        let error = file.changed().await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::FileTooLarge);
        fs::write(&path, "short").unwrap();
        assert_eq!(file.changed().await.unwrap(), b"short");
    }

    #[tokio::test]
    async fn an_unchanged_content_is_not_told_again() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        fs::write(&path, "same").unwrap();
        let mut file = WatchedFile::new(path.clone());
        assert_eq!(file.changed().await.unwrap(), b"same");
        fs::write(&path, "same").unwrap();
        let again = tokio::time::timeout(Duration::from_millis(2500), file.changed()).await;
        assert!(again.is_err(), "told twice");
        fs::write(&path, "other").unwrap();
        assert_eq!(file.changed().await.unwrap(), b"other");
    }
}
