//! The connection window: large enough that stalled streams never use it up.

use crate::config;

/// The largest connection window; a peer cannot make us hold more than this for one connection.
const LARGEST: u32 = 128 << 20;

/// Grows the window of one connection with the number of its streams.
///
/// A stream whose reader stalls holds up to a stream window of the connection's. With a fixed
/// connection window of four stream windows, four such streams would stop all others.
pub(super) struct Window {
    stream: u32,
    connection: u32,
}

impl Window {
    pub(super) const fn new(config: &config::Tunnel) -> Self {
        Self {
            stream: config.stream_window,
            connection: config.connection_window,
        }
    }

    /// The new size, if `streams` open streams need more than there is. Doubles, so that the
    /// updates stay rare; never shrinks, because credit once given cannot be taken back.
    pub(super) fn grow(&mut self, streams: usize) -> Option<u32> {
        let streams = u32::try_from(streams).unwrap_or(u32::MAX);
        let needed = streams.saturating_add(1).saturating_mul(self.stream);
        if needed <= self.connection || self.connection >= LARGEST {
            return None;
        }
        self.connection = needed.max(self.connection.saturating_mul(2)).min(LARGEST);
        Some(self.connection)
    }
}
