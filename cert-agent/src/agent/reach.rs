//! What is known of whether the authority can be reached.

use std::time::Duration;

use tokio::time::Instant;

/// When the authority last answered, and who of those that lack a certificate asks next whether it is back: one every few
/// seconds, however many they are.
#[derive(Debug, Default)]
pub(crate) struct Reach {
    answered: Option<Instant>,
    last_turn: Option<Instant>,
}

impl Reach {
    /// Notes that a certificate came; tells when one came before.
    pub(crate) fn answer(&mut self, now: Instant) -> Option<Instant> {
        self.last_turn = None;
        self.answered.replace(now)
    }

    /// The pause until the next free turn, which is taken, if that comes before the end of `pause`. Turns are apart by some
    /// seconds times `spread`.
    pub(crate) fn sooner(&mut self, pause: Duration, now: Instant, spread: f64) -> Duration {
        let after = self.last_turn.map_or(now, |last| last.max(now));
        let turn = after + INTERVAL.mul_f64(spread);
        if turn - now >= pause {
            return pause;
        }
        self.last_turn = Some(turn);
        turn - now
    }
}

const INTERVAL: Duration = Duration::from_secs(5);
