//! Where the threads of this process spend their time, as the kernel's sampler sees them.
//!
//! The kernel copies registers and the top of the stack at each tick of a thread's processor time; frames are found from
//! those copies, by the unwind tables of the program. So no signal interrupts anybody, and nothing is written to a file.

use std::{collections::HashMap, fs, io, os::fd::AsFd, time::Duration};

use framehop::{CacheNative, MayAllocateDuringUnwind, UnwindRegsNative, Unwinder, UnwinderNative};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    unistd::gettid,
};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{
    image::Image,
    pprof::{Frame, Stacks},
    sys::{Attributes, Ring, open},
};

/// How long, and how often.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted {
    pub(super) length: Duration,
    /// Samples for each second of a thread's processor time.
    pub(super) frequency: u64,
}

/// Samples all threads but the own one until the time is over, or `stop` fires. Blocks.
///
/// # Errors
/// What the kernel says, mostly that sampling is not permitted.
pub(super) fn sample(
    wanted: Wanted,
    images: &[Image],
    stop: &CancellationToken,
) -> io::Result<Stacks> {
    let mut sampler = Sampler::new(wanted.frequency, images)?;
    // From here, since reading the program's tables takes a while where the processor is busy.
    let end = Instant::now() + wanted.length;
    while Instant::now() < end && !stop.is_cancelled() {
        sampler.follow_threads()?;
        sampler.wait()?;
        sampler.take();
    }
    sampler.take();
    Ok(sampler.stacks)
}

struct Sampler {
    attributes: Attributes,
    rings: HashMap<i32, Ring>,
    records: Vec<u8>,
    unwinding: Unwinding,
    stacks: Stacks,
}

impl Sampler {
    fn new(frequency: u64, images: &[Image]) -> io::Result<Self> {
        let mut unwinder = UnwinderNative::new();
        for module in images.iter().filter_map(Image::module) {
            unwinder.add_module(module);
        }
        let mut sampler = Self {
            attributes: Attributes {
                kind: SOFTWARE,
                size: u32::try_from(size_of::<Attributes>()).unwrap_or(0),
                config: CPU_CLOCK,
                sample_frequency: frequency,
                sample_type: SAMPLE_TID | SAMPLE_REGS_USER | SAMPLE_STACK_USER,
                flags: BY_FREQUENCY | BY_WATERMARK,
                wakeup: WAKEUP_BYTES,
                sample_regs_user: REGISTERS,
                sample_stack_user: STACK_BYTES,
                ..Attributes::default()
            },
            rings: HashMap::new(),
            records: Vec::new(),
            unwinding: Unwinding {
                unwinder,
                cache: CacheNative::new(),
            },
            stacks: Stacks::default(),
        };
        // Where only time in user space may be sampled, that is better than nothing.
        if open(&sampler.attributes, gettid().as_raw()).is_err() {
            sampler.attributes.flags |= EXCLUDE_KERNEL;
        }
        sampler.follow_threads()?;
        Ok(sampler)
    }

    /// Begins with threads that are new, and forgets those that have ended.
    fn follow_threads(&mut self) -> io::Result<()> {
        let own = gettid().as_raw();
        let mut threads = Vec::new();
        for task in fs::read_dir("/proc/self/task")? {
            let name = task?.file_name();
            threads.extend(name.to_str().and_then(|name| name.parse::<i32>().ok()));
        }
        self.rings.retain(|thread, _| threads.contains(thread));
        for thread in threads {
            if thread == own || self.rings.contains_key(&thread) || self.rings.len() >= MOST_THREADS
            {
                continue;
            }
            match open(&self.attributes, thread) {
                Ok(events) => {
                    self.rings.insert(thread, Ring::of(events, RING_PAGES)?);
                }
                Err(error) if error.raw_os_error() == Some(nix::libc::ESRCH) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Until a ring is half full, or for a moment.
    fn wait(&self) -> io::Result<()> {
        let rings = self.rings.values();
        let mut waiting: Vec<_> = rings
            .map(|ring| PollFd::new(ring.as_fd(), PollFlags::POLLIN))
            .collect();
        match poll(&mut waiting, PollTimeout::from(PAUSE_MILLIS)) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn take(&mut self) {
        for ring in self.rings.values_mut() {
            self.records.clear();
            ring.drain(&mut self.records);
            let mut rest = self.records.as_slice();
            while let Some(record) = Record::next(&mut rest) {
                match record {
                    Record::Sample(sample) => self.stacks.count(self.unwinding.frames(&sample)),
                    Record::Lost(count) => self.stacks.lost += count,
                    Record::Other => {}
                }
            }
        }
    }
}

/// What the kernel tells.
enum Record<'a> {
    Sample(Sample<'a>),
    Lost(u64),
    Other,
}

/// A thread at one moment.
struct Sample<'a> {
    in_kernel: bool,
    /// By rising number of the register, as asked for.
    registers: [u64; REGISTERS.count_ones() as usize],
    stack: &'a [u8],
}

impl<'a> Record<'a> {
    /// The next one; `None` at the end, or if it is cut.
    fn next(rest: &mut &'a [u8]) -> Option<Self> {
        let header = number(&mut *rest)?.to_ne_bytes();
        let [k0, k1, k2, k3, m0, m1, s0, s1] = header;
        let kind = u32::from_ne_bytes([k0, k1, k2, k3]);
        let misc = u16::from_ne_bytes([m0, m1]);
        let length = usize::from(u16::from_ne_bytes([s0, s1]));
        let (body, after) = rest.split_at_checked(length.checked_sub(header.len())?)?;
        *rest = after;
        Some(match kind {
            RECORD_SAMPLE => Sample::of(misc, body).map_or(Self::Other, Self::Sample),
            RECORD_LOST => Self::Lost(body.last_chunk().copied().map_or(0, u64::from_ne_bytes)),
            _ => Self::Other,
        })
    }
}

impl<'a> Sample<'a> {
    /// `None` for a thread without a stack of its own.
    fn of(misc: u16, mut body: &'a [u8]) -> Option<Self> {
        let _ids = number(&mut body)?;
        let interface = number(&mut body)?;
        if interface == 0 {
            return None;
        }
        let mut registers = [0; _];
        for register in &mut registers {
            *register = number(&mut body)?;
        }
        let room = usize::try_from(number(&mut body)?).ok()?;
        let (stack, mut rest) = body.split_at_checked(room)?;
        let copied = if room == 0 { 0 } else { number(&mut rest)? };
        Some(Self {
            in_kernel: misc & MODE == MODE_KERNEL,
            registers,
            stack: stack.get(..usize::try_from(copied).ok()?)?,
        })
    }
}

fn number(from: &mut &[u8]) -> Option<u64> {
    let (number, rest) = from.split_first_chunk()?;
    *from = rest;
    Some(u64::from_ne_bytes(*number))
}

struct Unwinding {
    unwinder: UnwinderNative<Vec<u8>, MayAllocateDuringUnwind>,
    cache: CacheNative<MayAllocateDuringUnwind>,
}

impl Unwinding {
    /// Innermost first.
    fn frames(&mut self, sample: &Sample<'_>) -> Vec<Frame> {
        let (at, registers, bottom) = unwind_from(sample.registers);
        let mut word = |address: u64| {
            let offset = address.checked_sub(bottom).ok_or(())?;
            let offset = usize::try_from(offset).map_err(|_| ())?;
            let bytes = sample.stack.get(offset..).ok_or(())?;
            let word = bytes.first_chunk().ok_or(())?;
            Ok(u64::from_ne_bytes(*word))
        };
        let mut frames = Vec::new();
        if sample.in_kernel {
            frames.push(Frame::Kernel);
        }
        let mut all = self
            .unwinder
            .iter_frames(at, registers, &mut self.cache, &mut word);
        while let Ok(Some(frame)) = all.next() {
            frames.push(Frame::At(frame.address_for_lookup()));
            if frames.len() >= MOST_FRAMES {
                break;
            }
        }
        frames
    }
}

/// Where the thread is, what unwinding needs, and the stack pointer.
#[cfg(target_arch = "x86_64")]
fn unwind_from([frame, stack, at]: [u64; 3]) -> (u64, UnwindRegsNative, u64) {
    (at, UnwindRegsNative::new(at, stack, frame), stack)
}

/// Where the thread is, what unwinding needs, and the stack pointer.
#[cfg(target_arch = "aarch64")]
fn unwind_from([frame, link, stack, at]: [u64; 4]) -> (u64, UnwindRegsNative, u64) {
    (at, UnwindRegsNative::new(link, stack, frame), stack)
}

/// Frame pointer, stack pointer, instruction pointer.
#[cfg(target_arch = "x86_64")]
const REGISTERS: u64 = 1 << 6 | 1 << 7 | 1 << 8;
/// Frame pointer, link register, stack pointer, program counter.
#[cfg(target_arch = "aarch64")]
const REGISTERS: u64 = 1 << 29 | 1 << 30 | 1 << 31 | 1 << 32;

/// `PERF_TYPE_SOFTWARE` and `PERF_COUNT_SW_CPU_CLOCK`: there on virtual machines, too.
const SOFTWARE: u32 = 1;
const CPU_CLOCK: u64 = 0;
const SAMPLE_TID: u64 = 1 << 1;
const SAMPLE_REGS_USER: u64 = 1 << 12;
const SAMPLE_STACK_USER: u64 = 1 << 13;
const EXCLUDE_KERNEL: u64 = 1 << 5;
const BY_FREQUENCY: u64 = 1 << 10;
const BY_WATERMARK: u64 = 1 << 14;
const RECORD_LOST: u32 = 2;
const RECORD_SAMPLE: u32 = 9;
const MODE: u16 = 7;
const MODE_KERNEL: u16 = 1;
/// The top of a stack that is looked at. A record has a 16-bit length.
const STACK_BYTES: u32 = 24 << 10;
/// Pages of records for each thread: ten samples.
const RING_PAGES: usize = 64;
const WAKEUP_BYTES: u32 = 128 << 10;
/// Longest pause between two looks at the rings.
const PAUSE_MILLIS: u8 = 50;
const MOST_THREADS: usize = 256;
const MOST_FRAMES: usize = 200;

#[cfg(test)]
mod tests;
