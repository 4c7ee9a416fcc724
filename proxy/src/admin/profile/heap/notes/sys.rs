//! The switches of jemalloc.

#![expect(unsafe_code, reason = "the allocator is spoken to through C")]

use std::{
    ffi::{CStr, CString, c_char, c_int},
    io, ptr,
};

use tikv_jemalloc_sys::mallctl;

/// Whether notes are taken.
///
/// # Errors
/// When the process was not started with them.
pub(super) fn is_active() -> io::Result<bool> {
    let (mut active, mut length) = (false, size_of::<bool>());
    // SAFETY: the switch is a C `bool`, for which there is room, and the name ends with nought.
    let outcome = unsafe {
        mallctl(
            ACTIVE.as_ptr(),
            (&raw mut active).cast(),
            &raw mut length,
            ptr::null_mut(),
            0,
        )
    };
    done(outcome).map(|()| active)
}

/// Begins or ends to take notes.
///
/// # Errors
/// As [`is_active`].
pub(super) fn set_active(mut active: bool) -> io::Result<()> {
    // SAFETY: as above; it is read only.
    let outcome = unsafe {
        mallctl(
            ACTIVE.as_ptr(),
            ptr::null_mut(),
            ptr::null_mut(),
            (&raw mut active).cast(),
            size_of::<bool>(),
        )
    };
    done(outcome)
}

/// Writes all notes to a file.
///
/// # Errors
/// When it cannot be written.
pub(super) fn dump(path: &str) -> io::Result<()> {
    let path = CString::new(path)?;
    let mut place: *const c_char = path.as_ptr();
    // SAFETY: the value is a pointer to text that ends with nought and outlives the call, which does not keep it.
    let outcome = unsafe {
        mallctl(
            DUMP.as_ptr(),
            ptr::null_mut(),
            ptr::null_mut(),
            (&raw mut place).cast(),
            size_of::<*const c_char>(),
        )
    };
    done(outcome)
}

fn done(outcome: c_int) -> io::Result<()> {
    if outcome == 0 {
        return Ok(());
    }
    Err(io::Error::from_raw_os_error(outcome))
}

const ACTIVE: &CStr = c"prof.active";
const DUMP: &CStr = c"prof.dump";
