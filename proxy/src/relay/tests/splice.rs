//! What is spliced arrives as what is copied.

use std::{
    io::ErrorKind,
    task::{Context, Poll},
};

use proptest::prelude::*;
use socket2::SockRef;
use tokio::sync::oneshot;

use super::*;
use crate::relay::{Endpoint, Fault, Leave, Payload, pipe::Pipe};

/// A socket that does not tell that it is one: its bytes are copied.
struct Opaque(Socket);

impl Endpoint for Opaque {
    fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Fault>> {
        self.0.poll_readable(cx)
    }

    fn poll_take(
        &mut self,
        cx: &mut Context<'_>,
        appetite: &mut Appetite,
        buffers: &Buffers,
    ) -> Poll<Result<Option<Payload>, Fault>> {
        self.0.poll_take(cx, appetite, buffers)
    }

    fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Fault>> {
        self.0.poll_room(cx)
    }

    fn poll_put(
        &mut self,
        cx: &mut Context<'_>,
        payload: &mut Payload,
    ) -> Poll<Result<usize, Fault>> {
        self.0.poll_put(cx, payload)
    }

    fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Fault>> {
        self.0.poll_finish(cx)
    }

    fn release(&mut self, bytes: usize) {
        self.0.release(bytes);
    }

    fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<Fault> {
        self.0.poll_gone(cx)
    }

    fn poll_leave(
        &mut self,
        cx: &mut Context<'_>,
        leave: Leave,
        buffers: &Buffers,
        late: bool,
    ) -> Poll<()> {
        self.0.poll_leave(cx, leave, buffers, late)
    }
}

/// What two applications do with a flow.
#[derive(Debug, Clone)]
struct Script {
    client: Part,
    server: Part,
    end: How,
}

#[derive(Debug, Clone)]
struct Part {
    /// Sizes of its writes.
    writes: Vec<usize>,
    /// It reads this much at a time.
    reads: usize,
    /// Its socket's buffers, if they are small.
    room: Option<usize>,
}

/// How a flow ends, once all bytes are there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    /// Each side ends its direction as soon as it has written.
    HalfClose,
    /// The client resets.
    ClientResets,
    /// The server does.
    ServerResets,
}

/// What an application got, and whether that ended by a reset.
#[derive(Debug, PartialEq, Eq)]
struct Got {
    bytes: Vec<u8>,
    reset: bool,
}

/// What is to be the same, spliced or copied.
#[derive(Debug, PartialEq, Eq)]
struct Observed {
    client: Option<Got>,
    server: Option<Got>,
    ended_by: Option<Side>,
    ending: &'static str,
    received: u64,
    sent: u64,
}

impl Part {
    fn bytes(&self, seed: usize) -> Vec<u8> {
        let total = self.writes.iter().sum();
        (0..total).map(|i| byte(i, seed)).collect()
    }

    /// Writes its bytes, ends that direction if `closes`, and reads meanwhile until the end, or up to `until` bytes.
    async fn play(
        &self,
        socket: &mut TcpStream,
        seed: usize,
        closes: bool,
        until: Option<usize>,
    ) -> Got {
        let (mut read, mut write) = socket.split();
        let bytes = self.bytes(seed);
        let writing = async {
            let mut rest = &bytes[..];
            for size in &self.writes {
                let (now, later) = rest.split_at(*size);
                write.write_all(now).await.unwrap();
                rest = later;
                tokio::task::yield_now().await;
            }
            if closes {
                write.shutdown().await.unwrap();
            }
        };
        let reading = async {
            let (mut bytes, mut part) = (Vec::new(), vec![0; self.reads]);
            while until.is_none_or(|until| bytes.len() < until) {
                match read.read(&mut part).await {
                    Ok(0) => {
                        return Got {
                            bytes,
                            reset: false,
                        };
                    }
                    Ok(count) => bytes.extend_from_slice(&part[..count]),
                    Err(error) => {
                        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
                        return Got { bytes, reset: true };
                    }
                }
                tokio::task::yield_now().await;
            }
            Got {
                bytes,
                reset: false,
            }
        };
        tokio::join!(writing, reading).1
    }
}

/// The one that resets, after it has got and given everything.
async fn reset(
    mut socket: TcpStream,
    part: &Part,
    seed: usize,
    until: usize,
    given: oneshot::Receiver<()>,
) {
    part.play(&mut socket, seed, false, Some(until)).await;
    given.await.unwrap();
    SockRef::from(&socket)
        .set_linger(Some(Duration::ZERO))
        .unwrap();
}

/// The one that is reset.
async fn be_reset(
    mut socket: TcpStream,
    part: &Part,
    seed: usize,
    until: usize,
    given: oneshot::Sender<()>,
) -> Got {
    let first = part.play(&mut socket, seed, false, Some(until)).await;
    given.send(()).unwrap();
    let rest = Part {
        writes: Vec::new(),
        ..part.clone()
    }
    .play(&mut socket, seed, false, None)
    .await;
    assert!(rest.bytes.is_empty());
    Got {
        reset: rest.reset,
        ..first
    }
}

/// Both applications, to the end. One that resets has nothing to tell.
async fn play(
    script: &Script,
    mut client: TcpStream,
    mut server: TcpStream,
) -> (Option<Got>, Option<Got>) {
    let (given_tx, given) = oneshot::channel();
    let all = |part: &Part| part.writes.iter().sum::<usize>();
    let (of_client, of_server) = (all(&script.client), all(&script.server));
    match script.end {
        How::HalfClose => {
            let (client, server) = tokio::join!(
                script.client.play(&mut client, 1, true, None),
                script.server.play(&mut server, 2, true, None)
            );
            (Some(client), Some(server))
        }
        How::ClientResets => {
            let server = be_reset(server, &script.server, 2, of_client, given_tx);
            (
                None,
                Some(tokio::join!(reset(client, &script.client, 1, of_server, given), server).1),
            )
        }
        How::ServerResets => {
            let client = be_reset(client, &script.client, 1, of_server, given_tx);
            (
                Some(tokio::join!(reset(server, &script.server, 2, of_client, given), client).1),
                None,
            )
        }
    }
}

async fn perform<E: Endpoint + Unpin>(
    script: &Script,
    end: impl Fn(TcpStream) -> E,
) -> (Observed, u64) {
    let (client, downstream) = pair().await;
    let (upstream, server) = pair().await;
    for (part, sockets) in [
        (&script.client, [&client, &downstream]),
        (&script.server, [&server, &upstream]),
    ] {
        for socket in sockets.map(SockRef::from) {
            if let Some(room) = part.room {
                socket.set_recv_buffer_size(room).unwrap();
                socket.set_send_buffer_size(room).unwrap();
            }
        }
    }
    let (buffers, tally) = (Buffers::new(), Tally::default());
    let relaying = pump(end(downstream), end(upstream), &tally, &buffers);
    let playing = play(script, client, server);
    let both = async { tokio::join!(relaying, playing) };
    let (outcome, (client, server)) = tokio::time::timeout(Duration::from_secs(20), both)
        .await
        .expect("an end");
    assert_eq!((buffers.taken(), buffers.pipes_taken()), (0, 0));
    let observed = Observed {
        client,
        server,
        // Whose direction ends first is a race of two.
        ended_by: (script.end != How::HalfClose).then_some(outcome.ended_by),
        ending: match outcome.ending {
            Ending::Clean => "clean",
            Ending::Reset => "reset",
            Ending::Failed(_) => "failed",
        },
        received: tally.received.into_inner(),
        sent: tally.sent.into_inner(),
    };
    (observed, buffers.spliced_bytes())
}

fn parts() -> impl Strategy<Value = Part> {
    let size = prop_oneof![1..200_usize, 1..9_000_usize, 20_000..400_000_usize];
    let writes = prop::collection::vec(size, 0..8);
    let reads = prop_oneof![1 << 10..8_usize << 10, 32 << 10..256_usize << 10];
    let room = prop::option::weighted(0.3, 70_000..200_000_usize);
    (writes, reads, room).prop_map(|(writes, reads, room)| Part {
        writes,
        reads,
        room,
    })
}

fn scripts() -> impl Strategy<Value = Script> {
    let end = prop_oneof![
        2 => Just(How::HalfClose),
        1 => Just(How::ClientResets),
        1 => Just(How::ServerResets),
    ];
    (parts(), parts(), end).prop_map(|(client, server, end)| Script {
        client,
        server,
        end,
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn what_is_spliced_arrives_as_what_is_copied(script in scripts()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (spliced, _) = runtime.block_on(perform(&script, Socket::new));
        let (copied, through_pipes) = runtime.block_on(perform(&script, |it| Opaque(Socket::new(it))));
        prop_assert_eq!(through_pipes, 0);
        prop_assert!(spliced == copied, "not as copied");
        if let Some(got) = &spliced.client {
            prop_assert!(got.bytes == script.server.bytes(2), "not as sent");
        }
        if let Some(got) = &spliced.server {
            prop_assert!(got.bytes == script.client.bytes(1), "not as sent");
        }
    }
}

/// Bytes enough for any flow to be spliced.
const BULK: usize = 4 << 20;

#[tokio::test]
async fn bulk_is_spliced_and_small_exchanges_are_not() {
    let buffers = Buffers::new();
    let (mut client, mut server, _tasks) = relayed(&buffers).await;
    for _ in 0..9 {
        client.write_all(&[1; 4 << 10]).await.unwrap();
        server.read_exact(&mut [0; 4 << 10]).await.unwrap();
    }
    assert_eq!(buffers.spliced_bytes(), 0);
    let mut got = vec![0; BULK];
    let bulk = vec![2; BULK];
    let (sent, read) = tokio::join!(client.write_all(&bulk), server.read_exact(&mut got));
    assert!(sent.is_ok() && read.is_ok());
    assert!(got == bulk);
    let spliced = buffers.spliced_bytes();
    assert!(spliced > u64::try_from(BULK / 2).unwrap(), "{spliced}");
    for _ in 0..9 {
        client.write_all(b"small").await.unwrap();
        server.read_exact(&mut [0; 5]).await.unwrap();
    }
    let small = buffers.spliced_bytes() - spliced;
    assert!(small <= 10, "{small}");
    while buffers.pipes_taken() + buffers.taken() > 0 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_sink_that_is_full_keeps_one_pipe_and_loses_nothing() {
    let buffers = Buffers::new();
    let (mut client, mut server, tasks) = relayed(&buffers).await;
    let bulk: Vec<u8> = (0..16 * BULK).map(|i| byte(i, 3)).collect();
    let mut sent = 0;
    // Until nothing goes any more, half a second long.
    while let Ok(wrote) =
        tokio::time::timeout(Duration::from_millis(500), client.write(&bulk[sent..])).await
    {
        sent += wrote.unwrap();
    }
    assert!(sent < bulk.len(), "back-pressure");
    assert!(buffers.spliced_bytes() > 0);
    assert!(buffers.pipes_taken() <= 1, "{buffers:?}");
    let mut got = Vec::new();
    let write_rest = async {
        client.write_all(&bulk[sent..]).await.unwrap();
        client.shutdown().await.unwrap();
    };
    let (read, ()) = tokio::join!(server.read_to_end(&mut got), write_rest);
    read.unwrap();
    assert!(got == bulk);
    drop(server);
    assert_eq!(outcome(tasks).await.1, u64::try_from(bulk.len()).unwrap());
    assert_eq!(buffers.pipes_taken(), 0);
}

#[tokio::test]
async fn a_sink_that_breaks_with_bytes_on_their_way_resets_the_source() {
    let buffers = Buffers::new();
    let (mut client, mut server, tasks) = relayed(&buffers).await;
    let writing = async move {
        let bulk = vec![1; BULK];
        loop {
            if let Err(error) = client.write_all(&bulk).await {
                return error.kind();
            }
        }
    };
    let reading = async {
        server.read_exact(&mut vec![0; BULK]).await.unwrap();
        SockRef::from(&server)
            .set_linger(Some(Duration::ZERO))
            .unwrap();
        drop(server);
    };
    assert_eq!(tokio::join!(writing, reading).0, ErrorKind::ConnectionReset);
    let (outcome, received, _) = outcome(tasks).await;
    assert!(matches!(outcome.ending, Ending::Reset), "{outcome:?}");
    assert_eq!(outcome.ended_by, Side::Upstream);
    assert!(received >= u64::try_from(BULK).unwrap());
    assert_eq!(buffers.pipes_taken(), 0);
}

#[tokio::test]
async fn urgent_data_is_no_end() {
    let buffers = Buffers::new();
    let (mut client, mut server, _tasks) = relayed(&buffers).await;
    let bulk = vec![1; BULK];
    let mut got = vec![0; BULK];
    for _ in 0..2 {
        let (sent, read) = tokio::join!(client.write_all(&bulk), server.read_exact(&mut got));
        assert!(sent.is_ok() && read.is_ok());
        SockRef::from(&client).send_out_of_band(b"!").unwrap();
        // It has come alone: the relay looks at it with nothing behind it.
        for _ in 0..200 {
            tokio::task::yield_now().await;
        }
    }
    client.write_all(b"end").await.unwrap();
    client.shutdown().await.unwrap();
    let mut rest = Vec::new();
    server.read_to_end(&mut rest).await.unwrap();
    assert_eq!(rest, b"end");
}

#[tokio::test]
async fn flows_copy_where_no_pipe_is_to_be_had() {
    let buffers = Buffers::new();
    let held: Vec<_> = std::iter::from_fn(|| Pipe::take(&buffers)).collect();
    let (mut client, mut server, _tasks) = relayed(&buffers).await;
    let bulk: Vec<u8> = (0..BULK).map(|i| byte(i, 4)).collect();
    let mut got = vec![0; BULK];
    let (sent, read) = tokio::join!(client.write_all(&bulk), server.read_exact(&mut got));
    assert!(sent.is_ok() && read.is_ok());
    assert!(got == bulk);
    assert_eq!(buffers.spliced_bytes(), 0);
    drop(held);
}
