//! The frames of an HTTP/2 connection as its bytes go by, and what the library refuses with them.

use std::collections::VecDeque;

use crate::telemetry::Limit;

/// Finds the heads of frames, however the bytes are cut, and passes over the rest.
#[derive(Debug)]
pub(super) struct Frames {
    /// Bytes to pass over before the next frame begins.
    skip: usize,
    /// What has come of the head, and of the code of a reset.
    head: [u8; HEAD + CODE],
    filled: usize,
    wanted: usize,
}

/// The head of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Frame {
    pub(super) kind: u8,
    flags: u8,
    stream: u32,
    /// Of a reset.
    code: Option<u32>,
}

impl Frames {
    /// After so many bytes that are no frames.
    pub(super) const fn after(skip: usize) -> Self {
        Self {
            skip,
            head: [0; HEAD + CODE],
            filled: 0,
            wanted: HEAD,
        }
    }

    /// The next frame of which `bytes` complete the head; takes them from `bytes` as far as it has seen them.
    pub(super) fn next(&mut self, bytes: &mut &[u8]) -> Option<Frame> {
        while !bytes.is_empty() {
            let passed = self.skip.min(bytes.len());
            self.skip -= passed;
            *bytes = bytes.get(passed..).unwrap_or_default();
            let wanted = self.head.get_mut(self.filled..self.wanted);
            let wanted = wanted.unwrap_or_default();
            let count = wanted.len().min(bytes.len());
            let (now, later) = bytes.split_at(count);
            for (to, from) in wanted.iter_mut().zip(now) {
                *to = *from;
            }
            self.filled += count;
            *bytes = later;
            if self.filled < self.wanted {
                continue;
            }
            let [high, middle, low, kind, flags, stream @ .., a, b, c, d] = self.head;
            let length = u32::from_be_bytes([0, high, middle, low]);
            let length = usize::try_from(length).unwrap_or(usize::MAX);
            if kind == RST_STREAM && length == CODE && self.wanted == HEAD {
                self.wanted += CODE;
                continue;
            }
            let code = (self.wanted > HEAD).then_some(u32::from_be_bytes([a, b, c, d]));
            self.skip = length - (self.wanted - HEAD);
            (self.filled, self.wanted) = (0, HEAD);
            return Some(Frame {
                kind,
                flags,
                stream: u32::from_be_bytes(stream),
                code,
            });
        }
        None
    }
}

/// Looks at what a server sends for what the library refuses by itself, without a word to its user: streams beyond the agreed
/// number, and requests whose header list is too long.
#[derive(Debug)]
pub(super) struct Refusals {
    frames: Frames,
    /// Streams that were answered and ended with one frame; the latest.
    answered: VecDeque<u32>,
    found: Vec<Limit>,
}

impl Refusals {
    pub(super) const fn new() -> Self {
        Self {
            frames: Frames::after(0),
            answered: VecDeque::new(),
            found: Vec::new(),
        }
    }

    /// Takes in what is sent.
    pub(super) fn follow(&mut self, mut bytes: &[u8]) {
        while let Some(frame) = self.frames.next(&mut bytes) {
            match (frame.kind, frame.code) {
                (HEADERS, _) if frame.flags & END_STREAM != 0 => {
                    if self.answered.len() == ANSWERED {
                        self.answered.pop_front();
                    }
                    self.answered.push_back(frame.stream);
                }
                (RST_STREAM, Some(REFUSED_STREAM)) => self.found.push(Limit::Streams),
                // Only status 431 is followed by that; a malformed request gets no answer before it.
                (RST_STREAM, Some(PROTOCOL_ERROR)) if self.answered.contains(&frame.stream) => {
                    self.found.push(Limit::HeaderBytes);
                }
                _ => {}
            }
        }
    }

    /// The limits that were hit since this was last asked.
    pub(super) fn found(&mut self) -> Vec<Limit> {
        std::mem::take(&mut self.found)
    }
}

/// Streams whose answer is remembered until their reset follows.
const ANSWERED: usize = 64;

/// Bytes of the head of a frame (RFC 9113 §4.1), and of all that a reset holds.
const HEAD: usize = 9;
const CODE: usize = 4;

pub(super) const DATA: u8 = 0;
pub(super) const HEADERS: u8 = 1;
pub(super) const RST_STREAM: u8 = 3;
pub(super) const WINDOW_UPDATE: u8 = 8;
pub(super) const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;
const PROTOCOL_ERROR: u32 = 1;
const REFUSED_STREAM: u32 = 7;
