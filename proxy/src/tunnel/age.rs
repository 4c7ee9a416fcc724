//! How old a connection becomes: one that never ends would outlive the certificates it was opened with, and whatever they
//! were revoked for.

use std::{
    convert::Infallible,
    pin::pin,
    time::{Duration, SystemTime},
};

use cert_agent::peer_not_after;
use rustls::pki_types::CertificateDer;
use tokio::{
    select,
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;

use crate::config::MaxAge;

/// When a connection gets no more streams, if ever. Drawn at random from the last part of its life, so that what was opened
/// together is not opened anew together.
#[derive(Debug, Clone, Copy)]
pub struct Retirement(Option<Due>);

/// At the first of these: the clock of certificates may be set, and the other one stands still while the machine sleeps.
#[derive(Debug, Clone, Copy)]
struct Due {
    mono: Instant,
    wall: SystemTime,
}

impl Retirement {
    /// For a connection opened just now with a certificate that ends at `not_after`, to a peer that presented `peer`.
    #[must_use]
    pub fn new(age: MaxAge, not_after: SystemTime, peer: &[CertificateDer<'_>]) -> Self {
        let wall = SystemTime::now();
        let (from, to, life) = match age {
            MaxAge::Unlimited => return Self(None),
            MaxAge::For(age) => (0.9, 1.0, age),
            MaxAge::Certificate => {
                let peers = peer_not_after(peer).unwrap_or(not_after);
                let left = not_after.min(peers).duration_since(wall);
                (0.8, 0.95, left.unwrap_or_default())
            }
        };
        let part = from + (to - from) * rand::random::<f64>();
        let life = life.mul_f64(part).clamp(SHORTEST, LONGEST);
        Self(Some(Due {
            mono: Instant::now() + life,
            wall: wall + life,
        }))
    }

    /// Ready when the connection is to be retired.
    ///
    /// # Cancel safety
    /// Nothing is lost.
    pub async fn due(self) {
        let Some(Due { mono, wall }) = self.0 else {
            return std::future::pending().await;
        };
        loop {
            let now = (Instant::now(), SystemTime::now());
            let left = wall.duration_since(now.1).unwrap_or_default();
            let left = left.min(mono.saturating_duration_since(now.0));
            if left.is_zero() {
                return;
            }
            sleep(left.min(CLOCK_CHECK)).await;
        }
    }

    /// Runs `serving` to its end, and tells it through `retire` when its time has come.
    ///
    /// # Cancel safety
    /// Dropping the future drops `serving`.
    pub async fn retire<T>(
        self,
        retire: &CancellationToken,
        serving: impl Future<Output = T>,
    ) -> T {
        let telling = async {
            self.due().await;
            retire.cancel();
            std::future::pending::<Infallible>().await
        };
        let (mut serving, telling) = (pin!(serving), pin!(telling));
        select! {
            end = &mut serving => end,
            never = telling => match never {},
        }
    }
}

/// Certificates that are about to end must not make connections that nobody can use.
const SHORTEST: Duration = Duration::from_secs(1);
/// Keeps sums of times in their range.
const LONGEST: Duration = Duration::from_hours(24 * 365);
/// How often the clocks are looked at, at least.
const CLOCK_CHECK: Duration = Duration::from_mins(1);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tunnel::testing::{soon, svids};

    fn left(retirement: Retirement) -> Option<Duration> {
        let due = retirement.0?;
        Some(due.mono.saturating_duration_since(Instant::now()))
    }

    #[tokio::test]
    async fn comes_before_the_certificate_of_either_side_ends() {
        let svid = svids(&["peer"]).await.remove(0);
        let hours = |count| Duration::from_hours(count);
        for (own, range) in [
            (hours(10), hours(8) - CLOCK_CHECK..hours(10) - CLOCK_CHECK),
            // That of the peer ends in a day.
            (hours(1000), hours(19)..hours(23)),
            (Duration::from_millis(10), Duration::ZERO..SHORTEST * 2),
        ] {
            for _ in 0..20 {
                let own = SystemTime::now() + own;
                let age = Retirement::new(MaxAge::Certificate, own, svid.chain());
                let left = left(age).unwrap();
                assert!(range.contains(&left), "{left:?}");
            }
        }
        let never = Retirement::new(MaxAge::Unlimited, SystemTime::now(), svid.chain());
        assert_eq!(left(never), None);
    }

    #[tokio::test(start_paused = true)]
    async fn tells_when_the_time_has_come_and_lets_finish() {
        let age = Duration::from_mins(10);
        let retirement = Retirement::new(MaxAge::For(age), SystemTime::now(), &[]);
        let (began, retire) = (Instant::now(), CancellationToken::new());
        let serving = async {
            retire.cancelled().await;
            let told = began.elapsed();
            sleep(age).await;
            told
        };
        let told = retirement.retire(&retire, serving).await;
        assert!(told >= age * 9 / 10 && told <= age + SHORTEST, "{told:?}");
        assert!(began.elapsed() >= told + age);
        let soon_done = retirement.retire(&retire, std::future::ready(7));
        assert_eq!(soon(soon_done).await, 7);
    }
}
