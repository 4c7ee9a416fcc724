//! The settings and requests of jemalloc.

#![expect(unsafe_code, reason = "the allocator is spoken to through C")]

use std::{ffi::CStr, io, ptr};

use tikv_jemalloc_sys::mallctl;

/// Has the calling thread keep no block above `bytes` that it frees.
///
/// # Errors
/// When the allocator knows no such thing.
pub(super) fn keep_at_most(mut bytes: usize) -> io::Result<()> {
    // SAFETY: the setting is a `size_t`, which is read only, and the name ends with nought.
    outcome(unsafe {
        mallctl(
            LARGEST_KEPT.as_ptr(),
            ptr::null_mut(),
            ptr::null_mut(),
            (&raw mut bytes).cast(),
            size_of::<usize>(),
        )
    })
}

/// Has the calling thread give back all blocks that it keeps.
///
/// # Errors
/// When the allocator knows no such thing, or keeps nothing for this thread.
pub(super) fn flush() -> io::Result<()> {
    // SAFETY: the request takes and gives no value, and the name ends with nought.
    outcome(unsafe {
        mallctl(
            FLUSH.as_ptr(),
            ptr::null_mut(),
            ptr::null_mut(),
            ptr::null_mut(),
            0,
        )
    })
}

fn outcome(code: i32) -> io::Result<()> {
    match code {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

const LARGEST_KEPT: &CStr = c"thread.tcache.max";
const FLUSH: &CStr = c"thread.tcache.flush";
