//! Ends that no read and no write would tell of, and the way out.

use std::{
    future::poll_fn,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Buf as _;
use socket2::SockRef;
use tokio::sync::oneshot;

use super::*;
use crate::relay::{Endpoint, Fault, Leave, Payload, sys::unacknowledged};

/// A far end like a tunnel's stream, which a look alone tells nothing of. It says nothing: at once, if it is mute.
struct Far {
    is_mute: bool,
    gone: oneshot::Receiver<()>,
}

impl Endpoint for Far {
    fn poll_readable(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Fault>> {
        Poll::Ready(Ok(()))
    }

    fn poll_take(
        &mut self,
        _: &mut Context<'_>,
        _: &mut Appetite,
        _: &Buffers,
    ) -> Poll<Result<Option<Payload>, Fault>> {
        if self.is_mute {
            return Poll::Ready(Ok(None));
        }
        Poll::Pending
    }

    fn poll_room(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Fault>> {
        Poll::Ready(Ok(()))
    }

    fn poll_put(
        &mut self,
        _: &mut Context<'_>,
        payload: &mut Payload,
    ) -> Poll<Result<usize, Fault>> {
        Poll::Ready(Ok(std::mem::take(payload).remaining()))
    }

    fn poll_finish(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Fault>> {
        Poll::Ready(Ok(()))
    }

    fn release(&mut self, _: usize) {}

    fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<Fault> {
        let _ = ready!(Pin::new(&mut self.gone).poll(cx));
        Poll::Ready(Fault::Reset)
    }

    fn poll_leave(&mut self, _: &mut Context<'_>, _: Leave, _: &Buffers, _: bool) -> Poll<()> {
        Poll::Ready(())
    }
}

/// A client of a flow to a [`Far`] end, what makes that one go, and the outcome.
async fn to_far(is_mute: bool) -> (TcpStream, oneshot::Sender<()>, JoinSet<(Outcome, u64, u64)>) {
    let (client, downstream) = pair().await;
    let (go, gone) = oneshot::channel();
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let (tally, far) = (Tally::default(), Far { is_mute, gone });
        let outcome = pump(Socket::new(downstream), far, &tally, &Buffers::new()).await;
        (
            outcome,
            tally.received.into_inner(),
            tally.sent.into_inner(),
        )
    });
    (client, go, tasks)
}

fn reset(socket: TcpStream) {
    SockRef::from(&socket)
        .set_linger(Some(Duration::ZERO))
        .unwrap();
    drop(socket);
}

#[tokio::test]
async fn a_far_end_that_goes_after_its_last_word_is_noticed_behind_an_idle_client() {
    let (mut client, go, tasks) = to_far(true).await;
    assert_eq!(client.read(&mut [0; 1]).await.unwrap(), 0);
    go.send(()).unwrap();
    let (outcome, ..) = outcome(tasks).await;
    assert!(matches!(outcome.ending, Ending::Reset), "{outcome:?}");
    assert_eq!(outcome.ended_by, Side::Upstream);
}

#[tokio::test]
async fn a_client_that_goes_after_its_last_word_is_noticed_behind_an_idle_far_end() {
    let (mut client, _go, tasks) = to_far(false).await;
    client.shutdown().await.unwrap();
    reset(client);
    let (outcome, ..) = outcome(tasks).await;
    assert!(matches!(outcome.ending, Ending::Reset), "{outcome:?}");
    assert_eq!(outcome.ended_by, Side::Downstream);
}

#[tokio::test]
async fn a_server_that_goes_after_its_last_word_is_noticed_behind_an_idle_client() {
    let (mut client, mut server, tasks) = relayed(&Buffers::new()).await;
    server.shutdown().await.unwrap();
    assert_eq!(client.read(&mut [0; 1]).await.unwrap(), 0);
    reset(server);
    let (outcome, ..) = outcome(tasks).await;
    assert!(matches!(outcome.ending, Ending::Reset), "{outcome:?}");
    assert_eq!(outcome.ended_by, Side::Upstream);
}

/// A socket whose queue is full, what it holds, and the far end, which has read nothing.
async fn full() -> (Socket, usize, TcpStream) {
    let (near, far) = pair().await;
    let near = Socket::new(near);
    near.writable().await.unwrap();
    let mut put = 0;
    while let Ok(bytes) = near.try_write(&[7; 16 << 10]) {
        put += bytes;
    }
    assert!(unacknowledged(&*near).unwrap() > 0);
    (near, put, far)
}

async fn leave(socket: &mut Socket, late: bool) {
    let buffers = Buffers::new();
    let left = poll_fn(|cx| socket.poll_leave(cx, Leave::Reset, &buffers, late));
    tokio::time::timeout(Duration::from_secs(5), left)
        .await
        .expect("it leaves");
}

#[tokio::test]
async fn a_reset_comes_after_what_was_put_there() {
    let (mut near, put, mut far) = full().await;
    let leaving = async {
        leave(&mut near, false).await;
        drop(near);
    };
    let mut got = Vec::new();
    let ((), end) = tokio::join!(leaving, far.read_to_end(&mut got));
    assert_eq!(end.unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert_eq!(got.len(), put);
}

#[tokio::test]
async fn nobody_waits_for_a_far_end_that_is_gone_or_for_longer_than_allowed() {
    let (mut near, _, far) = full().await;
    let waits = leave(&mut near, false);
    tokio::select! {
        biased;
        () = waits => panic!("the far end has read nothing"),
        () = std::future::ready(()) => {}
    }
    leave(&mut near, true).await;
    reset(far);
    while near.take_error().unwrap().is_none() {
        tokio::task::yield_now().await;
    }
    leave(&mut near, false).await;
}
