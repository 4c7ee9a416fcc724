//! What a connection lacks of the mesh, asked of a control plane that tells only what it is asked for.

use std::{net::IpAddr, sync::Arc, time::Duration};

use tokio::time::Instant;
use xds_client::{Answer, Demand};

use super::Pod;
use crate::mesh::{Destination, Workload};

/// The questions of one connection. They share one limit: who waits is an application.
#[derive(Debug)]
pub(super) struct Inquiry<'a> {
    demand: &'a Demand,
    limit: Duration,
    /// When the first question was asked.
    began: Option<Instant>,
    asked: Vec<Destination>,
}

impl<'a> Inquiry<'a> {
    fn new(demand: &'a Demand, limit: Duration) -> Self {
        Self {
            demand,
            limit,
            began: None,
            asked: Vec::new(),
        }
    }

    /// Asks for `missing` unless this connection has asked for it before. Whether it is worth looking again: after any
    /// answer it is, since what is there now may have come just before the question.
    async fn ask(&mut self, missing: Destination) -> bool {
        if self.asked.contains(&missing) || self.asked.len() >= MAX_QUESTIONS {
            return false;
        }
        let began = *self.began.get_or_insert_with(Instant::now);
        let left = self.limit.saturating_sub(began.elapsed());
        let name = missing.to_string();
        let answer = self.demand.fetch(&name, left).await;
        if answer == Answer::Unanswered {
            tracing::debug!(
                name,
                limit = ?self.limit,
                "the control plane does not say in time whether there is such a resource"
            );
        }
        self.asked.push(missing);
        true
    }
}

impl Pod {
    /// Decides by `decide` and, where resources are looked up on demand, again with what `missing` names of the
    /// decision, until nothing is missing or no answer comes in time. Otherwise it decides once.
    pub(super) async fn decided<T>(
        &self,
        mut decide: impl FnMut() -> T,
        missing: impl Fn(&T) -> Option<Destination>,
    ) -> T {
        let decision = decide();
        let Some(demand) = &self.shared().demand else {
            return decision;
        };
        let limit = self.settings().sockets.connect_timeout / 2;
        answered(Inquiry::new(demand, limit), decision, decide, missing).await
    }

    /// The workload behind a peer's address. It decides nothing, it only names the peer in reports: a control plane
    /// that does not answer holds the connection up no longer than a tenth of the time a connect may take.
    pub(super) async fn peer(&self, ip: IpAddr) -> Option<Arc<Workload>> {
        let look = || self.known_peer(ip);
        let known = look();
        let (None, Some(demand)) = (&known, &self.shared().demand) else {
            return known;
        };
        let limit = self.settings().sockets.connect_timeout / 10;
        let missing = |known: &Option<_>| {
            known.is_none().then(|| Destination::Address {
                network: Arc::clone(&self.settings().network),
                ip: ip.to_canonical(),
            })
        };
        answered(Inquiry::new(demand, limit), known, look, missing).await
    }
}

async fn answered<T>(
    mut inquiry: Inquiry<'_>,
    mut decision: T,
    mut decide: impl FnMut() -> T,
    missing: impl Fn(&T) -> Option<Destination>,
) -> T {
    while let Some(missing) = missing(&decision) {
        if !inquiry.ask(missing).await {
            break;
        }
        decision = decide();
    }
    decision
}

/// A destination, its waypoint and the gateway to it are three. A service with many waypoints may be decided about
/// differently each time.
const MAX_QUESTIONS: usize = 8;

#[cfg(test)]
mod tests;
