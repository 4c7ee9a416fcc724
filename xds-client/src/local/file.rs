//! The mesh description as a file that may change at any time.

use std::{io, path::PathBuf};

use super::{Document, LocalError, parse};
use crate::watch::FileWatch;

/// A mesh description in a file.
#[derive(Debug)]
pub struct LocalFile {
    path: PathBuf,
    watch: FileWatch,
}

impl LocalFile {
    /// Follows the file at `path`.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            watch: FileWatch::default(),
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
        let content = self.watch.read(&self.path).await;
        self.document(content)
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
        let look = self.watch.changed(&self.path).await;
        self.document(self.watch.tell(look))
    }

    fn document(&self, content: io::Result<Vec<u8>>) -> Result<Document, LocalError> {
        let text = content.and_then(|content| {
            String::from_utf8(content)
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
        });
        let text = text.map_err(|source| LocalError::Read {
            path: self.path.clone(),
            source,
        })?;
        parse(&text)
    }
}
