//! The kernel's sampler of the own threads: `perf_event_open` and the ring in which its records come.

#![expect(unsafe_code, reason = "no safe crate samples the own process")]

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    ptr::{self, NonNull},
    sync::atomic::{
        AtomicU64,
        Ordering::{Acquire, Release},
    },
};

use nix::{
    libc,
    unistd::{SysconfVar, sysconf},
};

/// What to sample: the first 112 bytes of the kernel's `struct perf_event_attr` (`PERF_ATTR_SIZE_VER5`).
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Attributes {
    pub(super) kind: u32,
    pub(super) size: u32,
    pub(super) config: u64,
    pub(super) sample_frequency: u64,
    pub(super) sample_type: u64,
    pub(super) read_format: u64,
    pub(super) flags: u64,
    pub(super) wakeup: u32,
    pub(super) breakpoint: u32,
    pub(super) config1: u64,
    pub(super) config2: u64,
    pub(super) branch_sample_type: u64,
    pub(super) sample_regs_user: u64,
    pub(super) sample_stack_user: u32,
    pub(super) clock: i32,
    pub(super) sample_regs_intr: u64,
    pub(super) aux_watermark: u32,
    pub(super) sample_max_stack: u16,
    pub(super) reserved: u16,
}

const _: () = assert!(size_of::<Attributes>() == 112);

/// Starts to sample a thread of this process.
///
/// # Errors
/// What the kernel says: `EACCES` or `EPERM` without the privilege, `ESRCH` if the thread has ended.
pub(super) fn open(attributes: &Attributes, thread: i32) -> io::Result<OwnedFd> {
    const ANY_CPU: i32 = -1;
    const NO_GROUP: i32 = -1;
    const CLOSE_ON_EXEC: libc::c_ulong = 1 << 3;
    // SAFETY: the kernel reads `size` bytes of the attributes, which are there while they are borrowed, and keeps none.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_perf_event_open,
            ptr::from_ref(attributes),
            thread,
            ANY_CPU,
            NO_GROUP,
            CLOSE_ON_EXEC,
        )
    };
    let fd = i32::try_from(fd).unwrap_or(-1);
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor, which nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The records of one thread, on their way from the kernel.
#[derive(Debug)]
pub(super) struct Ring {
    events: OwnedFd,
    /// A page of the kernel's notes, then the records.
    memory: NonNull<u8>,
    page: usize,
    records: usize,
    read: u64,
}

impl Ring {
    /// Room for `pages` (a power of two) of records of what `events` samples.
    ///
    /// # Errors
    /// What the kernel says: `EPERM` where too much memory would be locked.
    pub(super) fn of(events: OwnedFd, pages: usize) -> io::Result<Self> {
        let page = sysconf(SysconfVar::PAGE_SIZE)?.unwrap_or(4096);
        let page = usize::try_from(page).map_err(io::Error::other)?;
        let records = pages * page;
        // SAFETY: the kernel chooses the place of a new mapping.
        let memory = unsafe {
            libc::mmap(
                ptr::null_mut(),
                page + records,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                events.as_raw_fd(),
                0,
            )
        };
        if memory == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let memory = NonNull::new(memory.cast()).ok_or_else(|| io::Error::other("no place"))?;
        Ok(Self {
            events,
            memory,
            page,
            records,
            read: 0,
        })
    }

    /// Takes all records that are there.
    pub(super) fn drain(&mut self, into: &mut Vec<u8>) {
        let written = self.note(WRITTEN).load(Acquire);
        let available = usize::try_from(written.wrapping_sub(self.read)).unwrap_or(0);
        let available = available.min(self.records);
        let begin = usize::try_from(self.read).unwrap_or(0) % self.records;
        let first = available.min(self.records - begin);
        self.copy(begin, first, into);
        self.copy(0, available - first, into);
        self.read = written;
        self.note(TAKEN).store(written, Release);
    }

    /// Copies `length` bytes of records from `begin` on.
    fn copy(&self, begin: usize, length: usize, into: &mut Vec<u8>) {
        debug_assert!(begin + length <= self.records);
        // SAFETY: `begin` lies in the records, which lie in the mapping behind its first page.
        let from = unsafe { self.memory.add(self.page + begin) };
        // SAFETY: so does the end, and the kernel writes nothing there before it is told that this was taken.
        let bytes = unsafe { std::slice::from_raw_parts(from.as_ptr(), length) };
        into.extend_from_slice(bytes);
    }

    /// A number that is shared with the kernel, in the first page.
    fn note(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: both offsets lie in the first page.
        let place = unsafe { self.memory.add(offset) }.cast();
        // SAFETY: aligned, since pages are and both offsets are; it lives as long as the mapping.
        unsafe { AtomicU64::from_ptr(place.as_ptr()) }
    }
}

impl AsFd for Ring {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: exactly what was mapped, and nothing borrows from it any longer.
        unsafe { libc::munmap(self.memory.as_ptr().cast(), self.page + self.records) };
    }
}

/// `data_head` and `data_tail` of `struct perf_event_mmap_page`.
const WRITTEN: usize = 1024;
const TAKEN: usize = 1032;
