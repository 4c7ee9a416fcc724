//! What is allocated, by where it was: the allocator's own notes.
//!
//! They cost a little time and memory all the time, so they exist only in a build that asks for them, and in a process
//! that was started with them. Each note stands for as much as was allocated without one on the average.

use std::io;

use super::image::Image;

/// Begins or ends to take notes.
///
/// # Errors
/// [`HeapError`], as an I/O error.
pub(super) fn activate(active: bool) -> io::Result<()> {
    notes::activate(active)
}

/// All that was noted and is still allocated, compressed.
///
/// # Errors
/// [`HeapError`] or a failure to write, as an I/O error.
pub(super) fn profile(images: &[Image]) -> io::Result<Vec<u8>> {
    notes::profile(images)
}

/// Why there is no profile.
#[derive(Debug, thiserror::Error)]
enum HeapError {
    #[cfg(not(feature = "heap-profile"))]
    #[error(
        "heap profiling is not built in: build with --features heap-profile; the metrics culvert_memory_bytes and \
         process_resident_memory_bytes tell how much memory is used, and by whom"
    )]
    NotBuilt,
    #[cfg(feature = "heap-profile")]
    #[error(
        "heap profiling is not prepared: start the process with _RJEM_MALLOC_CONF=prof:true,prof_active:false"
    )]
    NotPrepared,
    #[cfg(feature = "heap-profile")]
    #[error(
        "heap profiling is not active: ask for /debug/pprof/heap/profiling?activate=true, and wait a while"
    )]
    NotActive,
}

impl From<HeapError> for io::Error {
    fn from(error: HeapError) -> Self {
        Self::other(error)
    }
}

#[cfg(not(feature = "heap-profile"))]
mod notes {
    use super::{HeapError, Image, io};

    pub(super) fn activate(_: bool) -> io::Result<()> {
        Err(HeapError::NotBuilt.into())
    }

    pub(super) fn profile(_: &[Image]) -> io::Result<Vec<u8>> {
        Err(HeapError::NotBuilt.into())
    }
}

#[cfg(feature = "heap-profile")]
mod notes;
