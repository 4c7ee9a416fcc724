//! Traffic that goes on whatever happens to certificates.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::{traffic, world::Pod};

/// A flow that lasts, and new ones all the time, to an application that echoes.
#[derive(Debug)]
pub struct Steady {
    flows: JoinSet<usize>,
    stop: CancellationToken,
}

impl Steady {
    /// Starts it.
    #[must_use]
    pub fn start(from: &Arc<Pod>, to: SocketAddr) -> Self {
        let (stop, mut flows) = (CancellationToken::new(), JoinSet::new());
        flows.spawn(one_flow(Arc::clone(from), to, stop.clone()));
        flows.spawn(many_flows(Arc::clone(from), to, stop.clone()));
        Self { flows, stop }
    }

    /// Ends it.
    ///
    /// # Panics
    /// When anything was lost.
    pub async fn end(self) {
        self.stop.cancel();
        for turns in self.flows.join_all().await {
            assert!(turns > 20, "{turns}");
        }
    }
}

async fn one_flow(from: Arc<Pod>, to: SocketAddr, stop: CancellationToken) -> usize {
    let mut flow = from.connect(to).await.unwrap();
    let mut turns = 0;
    while !stop.is_cancelled() {
        traffic::ping(&mut flow, b"still there?")
            .await
            .unwrap_or_else(|error| panic!("the lasting flow after {turns} turns: {error}"));
        turns += 1;
        tokio::time::sleep(TURN).await;
    }
    turns
}

async fn many_flows(from: Arc<Pod>, to: SocketAddr, stop: CancellationToken) -> usize {
    let mut turns = 0;
    while !stop.is_cancelled() {
        let answer = from.ask(to, b"another one").await;
        let answer = answer.unwrap_or_else(|error| panic!("flow {turns}: {error}"));
        assert_eq!(answer, b"another one", "flow {turns}");
        turns += 1;
        tokio::time::sleep(TURN).await;
    }
    turns
}

const TURN: Duration = Duration::from_millis(50);
