//! Bounded waits: nothing in a test waits for ever, and a wait that ends in vain says what it waited for.

use std::{future::Future, time::Duration};

use tokio::time::{Instant, sleep, timeout};

/// Long enough for anything that should happen at once, on a machine under load.
pub const SOON: Duration = Duration::from_secs(10);

/// Awaits `future` for at most [`SOON`].
///
/// # Panics
/// When the time is up.
pub async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    within(SOON, what, future).await
}

/// Awaits `future` for at most `limit`.
///
/// # Panics
/// When the time is up.
pub async fn within<T>(limit: Duration, what: &str, future: impl Future<Output = T>) -> T {
    timeout(limit, future)
        .await
        .unwrap_or_else(|_| panic!("not within {limit:?}: {what}"))
}

/// Asks `probe` again and again until it yields a value. For state that announces no change, such as a process's descriptors.
///
/// # Panics
/// When there is none after `limit`.
pub async fn until<T>(limit: Duration, what: &str, mut probe: impl AsyncFnMut() -> Option<T>) -> T {
    let end = Instant::now() + limit;
    loop {
        if let Some(value) = probe().await {
            return value;
        }
        assert!(Instant::now() < end, "not within {limit:?}: {what}");
        sleep(Duration::from_millis(20)).await;
    }
}

/// How much longer than needed a test has a server stay away: nothing, unless `CULVERT_TEST_OUTAGE_SECONDS` says so, for
/// who wants to see it.
///
/// # Panics
/// When that is no number.
#[must_use]
#[expect(
    clippy::disallowed_methods,
    reason = "test runs are steered by the environment"
)]
pub fn outage() -> Duration {
    let seconds = std::env::var("CULVERT_TEST_OUTAGE_SECONDS");
    Duration::from_secs(seconds.map_or(0, |text| text.parse().unwrap()))
}
