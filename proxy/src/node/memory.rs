//! Watches over the memory budget, and lets go of what nobody needs at the moment.

use std::{sync::Arc, time::Duration};

use tokio::time::{Instant, sleep};

use crate::{
    budget::{Pressure, Relief, TAKING, Watch, pressure},
    flow::Shared,
    telemetry::resident_bytes,
};

/// Holds what is resident against `budget` bytes, for ever: often while memory is being taken, or short.
///
/// # Cancel safety
/// Nothing is lost.
pub(super) async fn watch(budget: u64, shared: Arc<Shared>) {
    let mut watch = Watch::new(budget);
    let mut relieved = Instant::now();
    loop {
        if pressure() == Pressure::Calm {
            TAKING.rest(LOOK, RARELY).await;
        } else {
            sleep(LOOK).await;
        }
        let Some(resident) = resident_bytes() else {
            continue;
        };
        let level = watch.look(resident);
        if level > Pressure::Calm && relieved.elapsed() >= RELIEF {
            relieved = Instant::now();
            shared.buffers.trim();
            let evicted = shared.traffic.shed(level == Pressure::Critical);
            Relief::SeriesEvicted.count(evicted);
        }
    }
}

/// How often it looks. A storm that takes 250 MiB in a second takes 50 MiB meanwhile.
const LOOK: Duration = Duration::from_millis(200);
/// How often it looks while no traffic takes memory.
const RARELY: Duration = Duration::from_mins(1);
/// How often idle things are let go of while memory is short.
const RELIEF: Duration = Duration::from_secs(1);
