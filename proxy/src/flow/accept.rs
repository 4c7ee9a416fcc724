//! The accept loop that all three listeners of a pod share.

use std::{net::SocketAddr, sync::Arc};

use tokio::{
    net::{TcpListener, TcpStream},
    task::{JoinError, JoinSet},
};

use super::{Pod, Stop};
use crate::{listen, telemetry::Reporter};

/// Accepts until `stop` asks it not to, runs `handle` for each connection in a task of its own,
/// and ends when all of them have, or at once when `stop` forces it.
pub(super) async fn serve<H, F>(
    pod: Arc<Pod>,
    listener: TcpListener,
    reporter: Reporter,
    stop: Stop,
    handle: H,
) where
    H: Fn(Arc<Pod>, TcpStream, SocketAddr) -> F,
    F: Future<Output = ()> + Send + 'static,
{
    let mut flows = JoinSet::new();
    loop {
        tokio::select! {
            biased; // stopping goes before accepting
            () = stop.accept.cancelled() => break,
            Some(end) = flows.join_next(), if !flows.is_empty() => tell_panic(end), // reap, or the set grows
            (socket, peer) = listen::accept(&listener) => {
                let counted = pod.shared().traffic.socket(reporter);
                let flow = handle(Arc::clone(&pod), socket, peer);
                flows.spawn(async move {
                    flow.await;
                    drop(counted);
                });
            }
        }
    }
    drop(listener);
    tokio::select! {
        biased;
        () = stop.force.cancelled() => {}
        () = finish(&mut flows) => {}
    }
    flows.shutdown().await;
}

async fn finish(flows: &mut JoinSet<()>) {
    while let Some(end) = flows.join_next().await {
        tell_panic(end);
    }
}

/// A panic ends its flow only, and is told.
pub(super) fn tell_panic(end: Result<(), JoinError>) {
    if let Err(error) = end
        && error.is_panic()
    {
        tracing::error!(
            error = &error as &dyn std::error::Error,
            "a flow ended by a panic"
        );
    }
}
