//! Flows whose progress the access log tells.

use std::time::Duration;

use parking_lot::Mutex;
use slab::Slab;

use super::Watch;
use crate::telemetry::Route;

/// Those that are open.
#[derive(Debug, Default)]
pub(in crate::telemetry) struct Lasting(Mutex<Slab<(Watch, Route)>>);

impl Lasting {
    /// Has the progress of a flow told until [`Self::leave`] is called with what this returns.
    pub(in crate::telemetry) fn enter(&self, flow: Watch, route: Route) -> usize {
        self.0.lock().insert((flow, route))
    }

    pub(in crate::telemetry) fn leave(&self, key: usize) {
        let _gone = self.0.lock().try_remove(key);
    }

    /// Those that have been open for `age`.
    pub(in crate::telemetry) fn older_than(&self, age: Duration) -> Vec<(Watch, Route)> {
        let flows = self.0.lock();
        let old = flows.iter().map(|(_, flow)| flow);
        old.filter(|(flow, _)| flow.opened().elapsed() >= age)
            .cloned()
            .collect()
    }
}
