//! The switches of jemalloc.

#![expect(unsafe_code, reason = "the allocator is spoken to through C")]

use std::{
    ffi::{CStr, CString, c_char, c_int},
    io, ptr,
};

use tikv_jemalloc_sys::mallctl;

/// Whether the process was started with notes.
///
/// # Errors
/// When the allocator knows no such thing.
pub(super) fn is_prepared() -> io::Result<bool> {
    switch(PREPARED)
}

/// Whether notes are taken.
///
/// # Errors
/// As [`is_prepared`].
pub(super) fn is_active() -> io::Result<bool> {
    switch(ACTIVE)
}

fn switch(name: &CStr) -> io::Result<bool> {
    let (mut on, mut length) = (false, size_of::<bool>());
    // SAFETY: the switch is a C `bool`, for which there is room, and the name ends with nought.
    let outcome = unsafe {
        mallctl(
            name.as_ptr(),
            (&raw mut on).cast(),
            &raw mut length,
            ptr::null_mut(),
            0,
        )
    };
    done(outcome).map(|()| on)
}

/// Begins or ends to take notes.
///
/// # Errors
/// When the process was not started with them.
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

const PREPARED: &CStr = c"opt.prof";
const ACTIVE: &CStr = c"prof.active";
const DUMP: &CStr = c"prof.dump";
