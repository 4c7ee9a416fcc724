//! How much a peer may send before it is read: on each stream about what the way between us holds, on the connection
//! so much that stalled streams never use it up.
//!
//! A stream whose reader stalls holds up to a stream window of memory and of the connection's window. Announced is the
//! configured size, as peers expect; it is then cut down to [`START`] and grows again, up to what was configured, as far as
//! measurements ask for it: an answered PING tells how many bytes come in a round trip. Many streams get less each, and all get
//! less while memory is short.

use std::time::Duration;

use tokio::time::Instant;

use super::keepalive::Keepalive;
use crate::{
    budget::{Pressure, pressure},
    config,
};

/// A stream's window before anything was measured: four reads of the sender. One alone, though more than fast links within a
/// cluster hold (10 Gbit/s for 200 µs), makes it wait for us after each: a fifth of the throughput within a node.
const START: u32 = 1 << 20;

/// A stream's window is never cut below this, however many there are.
const SMALLEST: u32 = 64 << 10;

/// What the streams of one connection may hold together, unless that gives them less than [`SMALLEST`] each.
const SHARED: u32 = 16 << 20;

/// The largest connection window; a peer cannot make us hold more than this for one connection. Enough for streams that
/// were opened one after the other and each stalled with the window that it found.
const LARGEST: u32 = 128 << 20;

/// A connection whose windows can be changed.
pub(super) trait Adjust {
    /// Asks the peer for another window of all streams; tells whether it was asked, since one change has to be
    /// acknowledged before the next.
    fn set_stream_window(&mut self, size: u32) -> bool;
    /// Raises the window of the connection.
    fn set_connection_window(&mut self, size: u32);
}

macro_rules! adjust {
    ($connection:path) => {
        impl<T, B> Adjust for $connection
        where
            T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
            B: bytes::Buf,
        {
            fn set_stream_window(&mut self, size: u32) -> bool {
                self.set_initial_window_size(size).is_ok()
            }

            fn set_connection_window(&mut self, size: u32) {
                self.set_target_window_size(size);
            }
        }
    };
}

adjust!(h2::client::Connection<T, B>);
adjust!(h2::server::Connection<T, B>);

/// The windows of one connection.
pub(super) struct Window {
    /// What a stream was announced.
    stream: u32,
    /// What a stream may have at most.
    configured: u32,
    connection: u32,
    path: Path,
    pressure: Pressure,
}

impl Window {
    pub(super) fn new(config: &config::Tunnel) -> Self {
        Self {
            stream: config.stream_window,
            configured: config.stream_window,
            connection: config.connection_window,
            path: Path::new(config.stream_window),
            pressure: Pressure::Calm,
        }
    }

    /// Measures, and changes what has to change. `received` counts all bytes of the connection so far.
    pub(super) fn follow(
        &mut self,
        connection: &mut impl Adjust,
        keepalive: &mut Keepalive,
        (streams, received): (usize, u64),
    ) {
        if self.path.follow(received, keepalive.is_waiting()) {
            keepalive.ask();
        }
        self.pressure = pressure();
        let streams = u32::try_from(streams).unwrap_or(u32::MAX);
        let size = self.wanted(streams);
        if size != self.stream && connection.set_stream_window(size) {
            self.stream = size;
        }
        if let Some(size) = self.grow(streams) {
            connection.set_connection_window(size);
        }
    }

    /// The window of each of `streams` streams. Grows back only when it could do so with twice as many.
    fn wanted(&self, streams: u32) -> u32 {
        let fits = self.fitting(streams);
        if fits < self.stream {
            return fits;
        }
        self.fitting(streams.saturating_mul(2)).max(self.stream)
    }

    /// A power of two unless it is the configured one, so that changes stay rare.
    fn fitting(&self, streams: u32) -> u32 {
        // A quarter for each step: 256 KiB of one stream, 4 MiB of all, then the smallest.
        let cut = |size: u32| size >> (2 * self.pressure.steps());
        let share = (cut(SHARED) / streams.max(1)).max(SMALLEST);
        let size = match self.pressure {
            Pressure::Calm => self.path.window.min(share).max(1),
            Pressure::Tight | Pressure::Critical => {
                let own = cut(self.path.window.min(START)).max(SMALLEST);
                own.min(share).min(self.configured)
            }
        };
        if size < self.configured {
            1 << size.ilog2()
        } else {
            self.configured
        }
    }

    /// The new size of the connection's window, if `streams` open streams need more than there is. Doubles, so that the
    /// updates stay rare; never shrinks, because credit once given cannot be taken back.
    fn grow(&mut self, streams: u32) -> Option<u32> {
        let needed = streams.saturating_add(1).saturating_mul(self.configured);
        let enough = needed <= self.connection || self.connection >= LARGEST;
        if enough || self.pressure > Pressure::Calm {
            return None;
        }
        self.connection = needed.max(self.connection.saturating_mul(2)).min(LARGEST);
        Some(self.connection)
    }
}

/// The way from the peer, and what it holds.
struct Path {
    /// Twice the bytes that came in a round trip when most did, at least [`START`].
    window: u32,
    largest: u32,
    /// The most bytes per second so far.
    fastest: f64,
    running: Option<(Instant, u64)>,
    /// Bytes received when the last measurement ended, or was put off.
    since: u64,
    rest_until: Option<Instant>,
    rest: Duration,
}

impl Path {
    fn new(largest: u32) -> Self {
        Self {
            window: START.min(largest),
            largest,
            fastest: 0.0,
            running: None,
            since: 0,
            rest_until: None,
            rest: Duration::ZERO,
        }
    }

    /// Tells whether the peer is to be asked for a PONG, which ends the measurement that starts now; `waiting` for one.
    fn follow(&mut self, received: u64, waiting: bool) -> bool {
        if waiting {
            return false;
        }
        if let Some((began, before)) = self.running.take() {
            self.learn(received - before, began);
            self.since = received;
            return false;
        }
        // Nothing is to be learnt from a trickle, and a clock costs more than a comparison.
        if received - self.since < u64::from(self.window / 2) || self.window == self.largest {
            return false;
        }
        self.since = received;
        let now = Instant::now();
        if self.rest_until.is_some_and(|until| now < until) {
            return false;
        }
        self.running = Some((now, received));
        true
    }

    /// `bytes` came in the round trip since `began`.
    fn learn(&mut self, bytes: u64, began: Instant) {
        let now = Instant::now();
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        let rate = f64::from(bytes) / (now - began).as_secs_f64().max(1e-6);
        if bytes >= self.window / 3 * 2 && rate > self.fastest {
            self.fastest = rate;
            self.window = bytes
                .saturating_mul(2)
                .clamp(self.window, self.window.saturating_mul(4))
                .min(self.largest);
            self.rest = Duration::ZERO;
        } else {
            self.rest = (self.rest * 4).clamp(SHORTEST_REST, LONGEST_REST);
        }
        self.rest_until = Some(now + self.rest);
    }
}

/// How long a way that was found as it was before is left alone.
const SHORTEST_REST: Duration = Duration::from_millis(100);
const LONGEST_REST: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use super::*;

    fn window(configured: u32) -> Window {
        Window::new(&config::Tunnel {
            stream_window: configured,
            ..Default::default()
        })
    }

    #[test]
    fn many_streams_get_less_each_and_no_window_exceeds_the_configured_one() {
        let mut window = window(4 << 20);
        assert_eq!(window.wanted(1), START, "nothing is measured yet");
        window.path.window = 4 << 20;
        window.stream = START;
        for (streams, size) in [(1, 4096), (4, 2048), (8, 1024), (50, 256), (100, 128)] {
            assert_eq!(window.wanted(streams), size << 10, "{streams} streams");
        }
        window.stream = 4 << 20;
        for (streams, size) in [(4, 4096), (5, 2048), (50, 256), (200, 64), (9999, 64)] {
            assert_eq!(window.wanted(streams), size << 10, "{streams} streams");
        }
        for small in [1000, 65_535] {
            assert_eq!(self::window(small).wanted(1), small);
            assert_eq!(self::window(small).wanted(200), small);
        }
    }

    #[test]
    fn windows_shrink_while_memory_is_short_and_come_back() {
        let mut window = window(4 << 20);
        window.path.window = 4 << 20;
        for (pressure, sizes) in [
            (Pressure::Tight, [256, 256, 128, 64]),
            (Pressure::Critical, [64, 64, 64, 64]),
            (Pressure::Tight, [256, 256, 128, 64]),
            (Pressure::Calm, [4096, 1024, 512, 128]),
        ] {
            window.pressure = pressure;
            for (streams, size) in [1, 16, 32, 100].into_iter().zip(sizes) {
                window.stream = window.wanted(streams);
                assert_eq!(window.stream, size << 10, "{pressure:?}, {streams} streams");
            }
            assert_eq!(window.grow(100).is_some(), pressure == Pressure::Calm);
        }
        assert_eq!(self::window(1000).wanted(1), 1000);
    }

    #[test]
    fn the_connection_holds_what_streams_hold_that_stalled_one_after_the_other() {
        let mut window = window(4 << 20);
        window.path.window = 4 << 20;
        let (mut held, mut connection) = (0, 16 << 20);
        for streams in 1..=100 {
            assert!(held + SMALLEST <= connection, "{streams} streams");
            window.stream = window.wanted(streams);
            held += window.stream;
            connection = window.grow(streams).unwrap_or(connection);
        }
        assert!(held < connection, "{held} of {connection} bytes");
    }

    #[tokio::test(start_paused = true)]
    async fn a_fast_and_long_way_gets_a_large_window_and_a_short_one_does_not() {
        for (rate, round_trip, expected) in [
            (1_000_000_000_u64, Duration::from_micros(100), 1),
            (1_000_000_000, Duration::from_millis(2), 4),
            (50_000_000, Duration::from_millis(20), 2),
        ] {
            let mut path = Path::new(4 << 20);
            let (mut received, mut asked) = (0, 0);
            for _ in 0..1000 {
                // As much as the way holds, or the window lets through.
                let held = rate * u64::try_from(round_trip.as_micros()).unwrap() / 1_000_000;
                received += held.min(path.window.into());
                asked += u32::from(path.follow(received, false));
                tokio::time::advance(round_trip).await;
            }
            assert_eq!(path.window.next_power_of_two() / START, expected);
            assert!(asked < 100, "{asked} questions");
        }
    }
}
