//! When to try again: full jitter, so that the nodes of a cluster do not come back in step after a restart of the
//! control plane, which lets in so many a second.

use std::time::Duration;

/// Pauses between attempts, each drawn evenly from zero to a ceiling that doubles.
#[derive(Debug, Default)]
pub(super) struct Backoff {
    failures: u32,
}

impl Backoff {
    /// The pause after one more failure; `draw` is from 0 to 1.
    pub(super) fn pause(&mut self, draw: f64) -> Duration {
        let doubled = FIRST_CEILING.saturating_mul(1 << self.failures.min(16));
        self.failures = self.failures.saturating_add(1);
        doubled.min(CEILING).mul_f64(draw.clamp(0.0, 1.0))
    }

    /// How many failures there were since the last success.
    pub(super) fn failures(&self) -> u32 {
        self.failures
    }

    /// Starts over, after a stream that was of use.
    pub(super) fn reset(&mut self) {
        self.failures = 0;
    }
}

/// Short enough that a connection that was closed for its age is back within a second.
const FIRST_CEILING: Duration = Duration::from_millis(500);
const CEILING: Duration = Duration::from_secs(20);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ceilings_double_up_to_the_highest() {
        let mut backoff = Backoff::default();
        let pauses: Vec<_> = (0..7).map(|_| backoff.pause(1.0).as_millis()).collect();
        assert_eq!(pauses, [500, 1000, 2000, 4000, 8000, 16_000, 20_000]);
        backoff.failures = u32::MAX;
        assert_eq!(backoff.pause(1.0), CEILING);
        backoff.reset();
        assert_eq!(backoff.pause(0.5).as_millis(), 250);
        assert_eq!(backoff.pause(0.0), Duration::ZERO);
    }
}
