//! Endpoints that did not answer lately.
//!
//! One that refuses costs a flow next to nothing before another one is tried. One that is silent costs half of the time that
//! the flow has: so it gives way to others, where there are any, until a flow has found it alive.

use std::{sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::time::Instant;

use crate::mesh::Workload;

/// The silent endpoints of one pod; of many, those that were noted last.
#[derive(Debug, Default)]
pub(super) struct Silent(Mutex<Vec<Noted>>);

#[derive(Debug)]
struct Noted {
    endpoint: Arc<Workload>,
    at: Instant,
}

impl Silent {
    /// `endpoint` did not answer.
    pub(super) fn note(&self, endpoint: &Arc<Workload>) {
        let mut noted = self.0.lock();
        noted.retain(|one| one.endpoint.uid() != endpoint.uid());
        if noted.len() == MOST {
            noted.remove(0);
        }
        noted.push(Noted {
            endpoint: Arc::clone(endpoint),
            at: Instant::now(),
        });
    }

    /// `endpoint` answered.
    pub(super) fn forget(&self, endpoint: &Workload) {
        let mut noted = self.0.lock();
        if !noted.is_empty() {
            noted.retain(|one| one.endpoint.uid() != endpoint.uid());
        }
    }

    /// Those to be left out so that a flow does not wait for `endpoint`; none if it may have its turn. In each [`PAUSE`] one
    /// flow may, and finds out for the others.
    pub(super) fn instead_of(&self, endpoint: &Workload) -> Vec<Arc<Workload>> {
        let mut noted = self.0.lock();
        let Some(own) = noted
            .iter_mut()
            .find(|one| one.endpoint.uid() == endpoint.uid())
        else {
            return Vec::new();
        };
        if own.at.elapsed() >= PAUSE {
            own.at = Instant::now();
            return Vec::new();
        }
        noted.iter().map(|one| Arc::clone(&one.endpoint)).collect()
    }

    /// Those that have no turn now.
    pub(super) fn list(&self) -> Vec<Arc<Workload>> {
        let noted = self.0.lock();
        let quiet = noted.iter().filter(|one| one.at.elapsed() < PAUSE);
        quiet.map(|one| Arc::clone(&one.endpoint)).collect()
    }
}

/// How long an endpoint gives way before one flow tries it again.
const PAUSE: Duration = Duration::from_secs(30);

/// Endpoints that are noted.
const MOST: usize = 64;

#[cfg(test)]
mod tests {
    use xds_client::{
        local::Document,
        proto::workload::{self as wire, address::Type},
    };

    use super::*;
    use crate::mesh::{Mesh, View};

    fn workloads(count: usize) -> Vec<Arc<Workload>> {
        let mesh = Mesh::new(View {
            node_name: None,
            network: "".into(),
            cluster_id: "c".into(),
        });
        let addresses = (0..count).map(|index| wire::Address {
            r#type: Some(Type::Workload(wire::Workload {
                uid: format!("w{index:03}"),
                ..Default::default()
            })),
        });
        let document = Document {
            addresses: addresses.collect(),
            ..Default::default()
        };
        assert_eq!(mesh.load(&document).rejected, []);
        let state = mesh.read();
        (0..count)
            .map(|index| Arc::clone(state.workload(&format!("w{index:03}")).expect("told")))
            .collect()
    }

    #[tokio::test(start_paused = true)]
    async fn one_flow_in_a_while_finds_out() {
        let (silent, all) = (Silent::default(), workloads(2));
        let left_out = |index: usize| silent.instead_of(&all[index]).len();
        assert_eq!(left_out(0), 0);
        silent.note(&all[0]);
        assert_eq!((left_out(0), left_out(1)), (1, 0));
        assert_eq!(silent.list(), all[..1]);
        tokio::time::advance(PAUSE).await;
        assert_eq!(silent.list(), []);
        let turns = [left_out(0), left_out(0), left_out(0)];
        assert_eq!(turns, [0, 1, 1], "only the first has a turn");
        silent.forget(&all[0]);
        assert_eq!(left_out(0), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn of_many_the_last_are_noted_and_each_once() {
        let (silent, all) = (Silent::default(), workloads(MOST + 1));
        for endpoint in all.iter().chain(&all[MOST..]) {
            silent.note(endpoint);
        }
        assert_eq!(silent.list(), all[1..]);
    }
}
