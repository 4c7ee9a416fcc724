//! Through a gateway, in memory.

use super::*;
use crate::{
    config,
    relay::Buffers,
    tunnel::{
        Incoming, Tls, accept,
        pool::tests::{Serving, World, echoing, key},
        serve,
        testing::{echo, finish, put, request, soon, spiffe, take},
    },
};
use cert_agent::Svid;
use std::{sync::atomic::Ordering::SeqCst, time::Duration};
use tokio_util::sync::CancellationToken;

/// A far end that grants each stream, and has somebody who owns `far` at the end of it.
fn gateway(far: Arc<Svid>) -> Serving {
    let behind = move |incoming: Incoming| {
        let config = far.server_config();
        async move {
            let Ok(stream) = incoming.responder.accept(None) else {
                return;
            };
            let (io, buffers) = (stream.buffered(Buffers::new()), Buffers::new());
            let accepted = accept(io, config, &buffers, Duration::from_secs(5)).await;
            if let Ok(tls) = accepted {
                serve_all(tls, echo).await;
            }
        }
    };
    let behind = Arc::new(behind);
    Arc::new(move |tls| {
        let behind = Arc::clone(&behind);
        Box::pin(async move { serve_all(tls, |incoming| behind(incoming)).await })
    })
}

async fn serve_all<T, H, F>(tls: Tls<T>, handler: H)
where
    T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
    H: Fn(Incoming) -> F,
    F: Future<Output = ()> + Send + 'static,
{
    let (config, stop) = (config::Tunnel::default(), CancellationToken::new());
    let _ = serve(tls, &config, stop, Cut::never(), handler).await;
}

/// A pool of `client` whose gateway leads to `other`.
async fn pool() -> Pool<World> {
    let mut world = World::new(echoing()).await;
    world.serving = gateway(Arc::clone(&world.svids[2]));
    world.pool()
}

async fn through(
    pool: &Pool<World>,
    gateway: &Key,
    far: &Arc<[SpiffeId]>,
) -> Result<Nested, ConnectError> {
    let request = request();
    soon(pool.connect_through(gateway, &request, far, &request)).await
}

fn far_end(name: &str) -> Arc<[SpiffeId]> {
    Arc::from([spiffe(name)])
}

#[tokio::test]
async fn streams_share_the_connection_to_the_gateway_and_nothing_inside() {
    let (pool, gateway, far) = (pool().await, key("client"), far_end("other"));
    let open = || through(&pool, &gateway, &far);
    let (one, two) = tokio::join!(open(), open());
    for nested in [one, two] {
        let Nested { mut answer, peer } = nested.unwrap();
        assert_eq!(peer, Some(spiffe("other")));
        let block = vec![3; 300 << 10];
        put(&mut answer.stream, block.clone()).await;
        finish(&mut answer.stream).await.unwrap();
        let mut got = Vec::new();
        while let Some(bytes) = soon(take(&mut answer.stream)).await.unwrap() {
            got.extend_from_slice(&bytes);
        }
        assert!(got == block);
    }
    assert_eq!(pool.dial.dials.load(SeqCst), 1);
    assert_eq!(pool.connections(), 1);
}

#[tokio::test]
async fn an_end_of_the_stream_ends_what_carried_it() {
    let (pool, gateway, far) = (pool().await, key("client"), far_end("other"));
    let nested = through(&pool, &gateway, &far).await.unwrap();
    assert!(!nested.answer.fate.is_cut());
    drop(nested);
    // The task of the connection inside ends, and with it the stream of the gateway.
    let ended = async {
        while pool.tasks.lock().len() > 1 {
            while pool.tasks.lock().try_join_next().is_some() {}
            tokio::task::yield_now().await;
        }
    };
    soon(ended).await;
    assert_eq!(pool.connections(), 1, "the connection to the gateway stays");
}

#[tokio::test]
async fn only_an_expected_far_end_will_do() {
    let (pool, gateway) = (pool().await, key("client"));
    for expected in [far_end("server"), Arc::from([])] {
        let error = through(&pool, &gateway, &expected).await.unwrap_err();
        assert!(matches!(error, ConnectError::Inner(_)), "{error}");
        let cause = std::error::Error::source(&error).unwrap().to_string();
        assert_eq!(cause, "io error: TLS handshake");
    }
    let mut wrong = gateway.clone();
    wrong.expected = far_end("other");
    let error = through(&pool, &wrong, &far_end("other")).await.unwrap_err();
    assert!(matches!(error, ConnectError::Open(_)), "{error}");
}
