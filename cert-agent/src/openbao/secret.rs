//! Files with secrets.

use std::{fmt::Display, path::Path};

use zeroize::Zeroizing;

use super::failure::{Failure, Step};
use crate::file;

/// The text of a file with a secret.
pub(super) async fn read(path: &Path) -> Result<Zeroizing<String>, Failure> {
    let unreadable =
        |error: &dyn Display| failed(format!("cannot read {}: {error}", path.display()));
    let bytes = file::read(path, MAX_SECRET).await;
    let text = String::from_utf8(bytes.map_err(|error| unreadable(&error))?);
    let text = text.map_err(|error| {
        let told = unreadable(&error.utf8_error());
        drop(Zeroizing::new(error.into_bytes()));
        told
    })?;
    let text = Zeroizing::new(text);
    if text.trim().is_empty() {
        return Err(failed(format!("{} is empty", path.display())));
    }
    Ok(text)
}

/// A login that came to nothing on this side.
pub(super) fn failed(reason: String) -> Failure {
    Failure::without_answer(Step::Login, reason)
}

const MAX_SECRET: u64 = 64 * 1024;
