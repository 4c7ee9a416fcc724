//! Peers that keep a connection busy with frames that carry nothing.
//!
//! Each frame costs us work and the peer nine bytes. What the HTTP/2 library does not bound by itself is counted here, as the
//! bytes come in: SETTINGS, PING, PRIORITY, frames of unknown types, updates of windows without traffic, and resets of streams.

use std::time::Duration;

use tokio::time::Instant;

use super::frames::{CONTINUATION, DATA, Frames, HEADERS, RST_STREAM, WINDOW_UPDATE};
use crate::{config, telemetry::Limit};

/// Streams of a connection whose reset is remembered for a second: what a peer sends on them meanwhile is no offence.
pub(super) const KEPT_RESETS: usize = 200;

/// What a peer does too much of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Flood {
    /// It sends frames that carry nothing.
    ControlFrames,
    /// It opens streams and resets them.
    Resets,
}

impl Flood {
    /// The limit that was hit.
    #[must_use]
    pub const fn limit(self) -> Limit {
        match self {
            Self::ControlFrames => Limit::ControlFrames,
            Self::Resets => Limit::Resets,
        }
    }
}

impl std::fmt::Display for Flood {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::ControlFrames => "too many frames that carry nothing",
            Self::Resets => "too many streams were reset",
        })
    }
}

/// Follows the frames that a peer sends, without keeping them.
#[derive(Debug)]
pub(super) struct Watch {
    frames: Frames,
    control: Pace,
    resets: Pace,
    found: Option<Flood>,
}

impl Watch {
    /// Of a peer that sends so many bytes before its first frame.
    pub(super) fn new(before: usize, limits: &config::Tunnel) -> Self {
        Self {
            frames: Frames::after(before),
            control: Pace::new(limits.max_control_frames),
            resets: Pace::new(limits.max_resets),
            found: None,
        }
    }

    /// The first flood that was found.
    pub(super) const fn found(&self) -> Option<Flood> {
        self.found
    }

    /// Takes in what the peer sent; `sent` counts the bytes that it was sent so far.
    pub(super) fn follow(&mut self, mut bytes: &[u8], sent: u64) {
        while let Some(frame) = self.frames.next(&mut bytes) {
            self.frame(frame.kind, sent);
        }
    }

    fn frame(&mut self, kind: u8, sent: u64) {
        let found = match kind {
            // Empty DATA and CONTINUATION are the library's; how many streams there are at a time is bounded.
            DATA | HEADERS | CONTINUATION => None,
            RST_STREAM => self.resets.exceeds(0).then_some(Flood::Resets),
            // Each may answer something that we sent.
            WINDOW_UPDATE => {
                let exceeds = self.control.exceeds(sent / SENT_FOR_AN_UPDATE);
                exceeds.then_some(Flood::ControlFrames)
            }
            _ => self.control.exceeds(0).then_some(Flood::ControlFrames),
        };
        self.found = self.found.or(found);
    }
}

/// Counts what may happen so many times in [`SPAN`], and more often as long as it is earned.
#[derive(Debug)]
struct Pace {
    limit: u64,
    count: u64,
    /// What was earned when the span began.
    earned: u64,
    since: Instant,
}

impl Pace {
    fn new(per_second: u32) -> Self {
        Self {
            limit: u64::from(per_second) * SPAN.as_secs(),
            count: 0,
            earned: 0,
            since: Instant::now(),
        }
    }

    /// Whether it has now happened too often. Looks at the clock only where it might.
    fn exceeds(&mut self, earned: u64) -> bool {
        self.count += 1;
        if self.count <= self.limit + earned.saturating_sub(self.earned) {
            return false;
        }
        let now = Instant::now();
        if now - self.since < SPAN {
            return true;
        }
        (self.count, self.earned, self.since) = (1, earned.max(self.earned), now);
        false
    }
}

/// What bounds on events per second are averaged over, so that a burst is no flood.
const SPAN: Duration = Duration::from_secs(10);
/// For every so many bytes that a peer is sent it may update a window; ours and others' do so for a multiple of it.
const SENT_FOR_AN_UPDATE: u64 = 512;

#[cfg(test)]
mod tests;
