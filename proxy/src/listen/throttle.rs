//! At most one log line per second and place.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

/// Lets one caller through per second; put one in a `static` beside the log line.
#[derive(Debug)]
pub(super) struct Throttle(Mutex<Option<Instant>>);

impl Throttle {
    pub(super) const fn new() -> Self {
        Self(Mutex::new(None))
    }

    /// Whether a line may be written now.
    pub(super) fn admits(&self) -> bool {
        let now = Instant::now();
        let mut last = self.0.lock();
        let quiet = last.is_none_or(|last| now.duration_since(last) >= Duration::from_secs(1));
        if quiet {
            *last = Some(now);
        }
        quiet
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn admits_one_line_per_second() {
        let throttle = Throttle::new();
        assert!(throttle.admits());
        assert!(!throttle.admits());
        tokio::time::advance(Duration::from_millis(999)).await;
        assert!(!throttle.admits());
        tokio::time::advance(Duration::from_millis(1)).await;
        assert!(throttle.admits());
    }
}
