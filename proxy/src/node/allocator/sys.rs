//! The setting of jemalloc.

#![expect(unsafe_code, reason = "the allocator is spoken to through C")]

use std::{ffi::CStr, io, ptr};

use tikv_jemalloc_sys::mallctl;

/// Has the calling thread keep no block above `bytes` that it frees.
///
/// # Errors
/// When the allocator knows no such thing.
pub(super) fn keep_at_most(mut bytes: usize) -> io::Result<()> {
    // SAFETY: the setting is a `size_t`, which is read only, and the name ends with nought.
    let outcome = unsafe {
        mallctl(
            LARGEST_KEPT.as_ptr(),
            ptr::null_mut(),
            ptr::null_mut(),
            (&raw mut bytes).cast(),
            size_of::<usize>(),
        )
    };
    match outcome {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

const LARGEST_KEPT: &CStr = c"thread.tcache.max";
