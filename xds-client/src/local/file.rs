//! The mesh description as a file that may change at any time.

use std::{io, path::PathBuf};

use super::{Document, LocalError, links::Links, read};
use crate::watch::FileWatch;

/// A mesh description in a file.
#[derive(Debug)]
pub struct LocalFile {
    path: PathBuf,
    watch: FileWatch,
    /// What services listed as their endpoints when the file could be used last.
    links: Links,
}

impl LocalFile {
    /// Follows the file at `path`.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            watch: FileWatch::default(),
            links: Links::default(),
        }
    }

    /// Reads the file as it is now. An empty one describes a mesh of nothing.
    ///
    /// # Errors
    /// If it cannot be read or is no mesh description.
    ///
    /// # Cancel safety
    /// Nothing is lost.
    pub async fn load(&mut self) -> Result<Document, LocalError> {
        let content = self.watch.read(&self.path).await;
        Ok(self.document(content)?.unwrap_or_default())
    }

    /// Waits until the content differs from what was told last and is not being written, and tells it. A content that is no
    /// mesh description, or a file that cannot be read, is told once as an error; call again to go on waiting for a better one.
    ///
    /// # Errors
    /// If the new content is no mesh description or empty, or the file can no longer be read.
    ///
    /// # Cancel safety
    /// Nothing is lost: the next call finds the change again.
    pub async fn changed(&mut self) -> Result<Document, LocalError> {
        let look = self.watch.changed(&self.path).await;
        let content = self.watch.tell(look);
        self.document(content)?.ok_or_else(|| LocalError::Empty {
            path: self.path.clone(),
        })
    }

    fn document(&mut self, content: io::Result<Vec<u8>>) -> Result<Option<Document>, LocalError> {
        let text = content.and_then(|content| {
            String::from_utf8(content)
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
        });
        let text = text.map_err(|source| LocalError::Read {
            path: self.path.clone(),
            source,
        })?;
        let Some((document, links)) = read(&text, &self.links)? else {
            return Ok(None);
        };
        self.links = links;
        Ok(Some(document))
    }
}
