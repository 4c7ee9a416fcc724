//! Both roles over in-memory transports, and against raw peers.

mod raw;
mod relay;

use std::{future::poll_fn, time::Duration};

use h2::Reason;
use http::{HeaderValue, Method, StatusCode};
use tokio::{
    io::{AsyncWriteExt as _, duplex},
    sync::mpsc,
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use super::{
    ConnectError, Incoming, OpenError, Stream,
    client::handshake,
    flood::Watch,
    testing::{Tasks, client, connected, echo, finish, put, request, serve_in, soon, take},
    turn::turnwise,
};
use crate::{
    config,
    relay::{Buffers, Endpoint as _, Fault, Leave},
    telemetry,
};

#[tokio::test]
async fn bytes_go_both_ways_and_ends_are_separate() {
    let tasks = Tasks::default();
    let sender = connected(&tasks, &CancellationToken::new(), echo).await;
    let mut stream = sender.connect(&request()).await.unwrap().stream;
    put(&mut stream, "one").await;
    assert_eq!(take(&mut stream).await.unwrap().unwrap(), "one");
    put(&mut stream, "two").await;
    finish(&mut stream).await.unwrap();
    assert_eq!(take(&mut stream).await.unwrap().unwrap(), "two");
    assert!(take(&mut stream).await.unwrap().is_none());
}

#[tokio::test]
async fn a_request_carries_its_headers_and_the_answer_its_baggage() {
    let tasks = Tasks::default();
    let handler = |incoming: Incoming| async move {
        let connect = &incoming.connect;
        assert_eq!(connect.authority(), "10.0.0.5:80");
        let names = connect.headers().keys().map(http::HeaderName::as_str);
        let mut names: Vec<_> = names.collect();
        names.sort_unstable();
        assert_eq!(
            names,
            ["baggage", "forwarded", "traceparent", "x-forwarded-network"]
        );
        assert_eq!(connect.network(), Some("n1"));
        assert!(connect.trace().is_none());
        let baggage = HeaderValue::from_static("service.name=a");
        let _stream = incoming.responder.accept(Some(baggage)).unwrap();
    };
    let sender = connected(&tasks, &CancellationToken::new(), handler).await;
    let request = request().from_network(HeaderValue::from_static("n1"));
    let answer = sender.connect(&request).await.unwrap();
    assert_eq!(answer.headers["baggage"], "service.name=a");
    assert_eq!(answer.headers.len(), 1);
}

#[tokio::test]
async fn every_status_but_200_is_a_refusal() {
    for status in [204, 301, 400, 401, 403, 503] {
        let tasks = Tasks::default();
        let status = StatusCode::from_u16(status).unwrap();
        let refuse = move |incoming: Incoming| async move { incoming.responder.refuse(status) };
        let sender = connected(&tasks, &CancellationToken::new(), refuse).await;
        let error = sender.connect(&request()).await.unwrap_err();
        assert!(
            matches!(error, ConnectError::Refused(s) if s == status),
            "{error}"
        );
        assert_eq!(error.to_string(), format!("http status: {status}"));
        let reason = if status == StatusCode::UNAUTHORIZED {
            telemetry::Reason::DeniedByPeer
        } else {
            telemetry::Reason::HttpStatus
        };
        assert_eq!(error.reason(), reason);
    }
}

#[tokio::test]
async fn resets_of_the_peer_end_a_stream_as_their_code_says() {
    let cases = [
        (Reason::CANCEL, "closed by the peer"),
        (Reason::NO_ERROR, "closed by the peer"),
        (Reason::STREAM_CLOSED, "closed by the peer"),
        (Reason::CONNECT_ERROR, "reset by the peer"),
        (Reason::INTERNAL_ERROR, "h2 failed"),
    ];
    for (reason, meaning) in cases {
        let tasks = Tasks::default();
        let (near, far) = duplex(64 << 10);
        tasks.spawn(async move {
            let mut server = h2::server::handshake(far).await.unwrap();
            let (request, mut answer) = server.accept().await.unwrap().unwrap();
            let answer = answer.send_response(http::Response::new(()), false);
            let reset = async {
                // The client speaks once it has the answer, which a reset would overtake.
                request.into_body().data().await.unwrap().unwrap();
                answer.unwrap().send_reset(reason);
                std::future::pending::<()>().await;
            };
            tokio::select! {
                () = reset => {}
                _ = server.accept() => {}
            }
        });
        let sender = client(&tasks, near).await;
        let mut stream = soon(sender.connect(&request())).await.unwrap().stream;
        put(&mut stream, "go").await;
        let fault = soon(take(&mut stream)).await.unwrap_err();
        assert_eq!(fault.to_string(), meaning, "{reason:?}");
    }
}

#[tokio::test]
async fn a_dropped_stream_is_cancelled_and_the_connection_stays() {
    let tasks = Tasks::default();
    let (near, far) = duplex(64 << 10);
    let (seen_tx, mut seen_rx) = mpsc::channel(2);
    serve_in(&tasks, far, &CancellationToken::new(), move |incoming| {
        let seen = seen_tx.clone();
        async move {
            let mut stream = incoming.responder.accept(None).unwrap();
            let end = take(&mut stream).await.map(|_| ()).unwrap_err();
            seen.send(matches!(end, Fault::Gone)).await.unwrap();
        }
    });
    let sender = client(&tasks, near).await;
    for _ in 0..2 {
        drop(soon(sender.connect(&request())).await.unwrap());
        assert!(soon(seen_rx.recv()).await.unwrap());
    }
}

#[tokio::test]
async fn stalled_streams_do_not_stop_their_neighbour() {
    let tasks = Tasks::default();
    let stall = |incoming: Incoming| async move {
        let stalls = incoming.connect.authority().ends_with(":1");
        if stalls {
            let _held = incoming.responder.accept(None).unwrap();
            std::future::pending::<()>().await;
        } else {
            echo(incoming).await;
        }
    };
    let sender = connected(&tasks, &CancellationToken::new(), stall).await;
    let value = HeaderValue::from_static("");
    let stalling = super::Request::new("10.0.0.5:1", value.clone(), value.clone(), value).unwrap();
    let mut held = Vec::new();
    for _ in 0..99 {
        held.push(soon(sender.connect(&stalling)).await.unwrap().stream);
    }
    let fill = held.iter_mut().map(async |stream| {
        let mut sent = 0;
        let block = bytes::Bytes::from(vec![0; 64 << 10]);
        let filling = async {
            loop {
                put(stream, block.clone()).await;
                sent += block.len();
            }
        };
        tokio::time::timeout(Duration::from_secs(2), filling)
            .await
            .unwrap_err();
        sent
    });
    let sent: usize = futures_util::future::join_all(fill).await.iter().sum();
    assert!(sent < 99 << 20, "{sent} bytes are held for nobody");
    let mut stream = soon(sender.connect(&request())).await.unwrap().stream;
    for _ in 0..64 {
        put(&mut stream, vec![7; 32 << 10]).await;
        let mut got = 0;
        while got < 32 << 10 {
            got += soon(take(&mut stream)).await.unwrap().unwrap().len();
        }
    }
}

#[tokio::test]
async fn a_reader_of_small_messages_may_pause() {
    let tasks = Tasks::default();
    let handler = |incoming: Incoming| async move {
        if incoming.connect.authority() == "10.0.0.5:1" {
            let _held = incoming.responder.accept(None).unwrap();
            std::future::pending::<()>().await;
        } else {
            echo(incoming).await;
        }
    };
    let sender = connected(&tasks, &CancellationToken::new(), handler).await;
    let value = HeaderValue::from_static("");
    let paused = super::Request::new("10.0.0.5:1", value.clone(), value.clone(), value).unwrap();
    let mut paused = sender.connect(&paused).await.unwrap().stream;
    for _ in 0..50_000 {
        put(&mut paused, &b"twenty bytes of news"[..]).await;
    }
    let mut neighbour = soon(sender.connect(&request())).await.unwrap().stream;
    put(&mut neighbour, "here").await;
    assert_eq!(take(&mut neighbour).await.unwrap().unwrap(), "here");
}

#[tokio::test]
async fn what_was_put_arrives_though_nobody_wants_the_answer() {
    let tasks = Tasks::default();
    let (told, mut heard) = mpsc::channel(1);
    let handler = move |incoming: Incoming| {
        let told = told.clone();
        async move {
            let mut stream = incoming.responder.accept(None).unwrap();
            let (mut bytes, mut ended) = (0, false);
            while let Ok(more) = take(&mut stream).await {
                bytes += more.as_ref().map_or(0, bytes::Bytes::len);
                ended = more.is_none();
                if ended {
                    break;
                }
            }
            told.send((bytes, ended)).await.unwrap();
        }
    };
    let sender = connected(&tasks, &CancellationToken::new(), handler).await;
    let mut stream = sender.connect(&request()).await.unwrap().stream;
    put(&mut stream, vec![7; 60_000]).await;
    finish(&mut stream).await.unwrap();
    let buffers = Buffers::new();
    poll_fn(|cx| stream.poll_leave(cx, Leave::Early, &buffers, false)).await;
    drop(stream);
    assert_eq!(soon(heard.recv()).await, Some((60_000, true)));
}

#[tokio::test(start_paused = true)]
async fn the_end_of_a_connection_waits_a_little_for_its_peer() {
    for (closes, seconds) in [(true, 0), (false, 2)] {
        let (mut near, far) = duplex(64 << 10);
        let watch = Watch::new(0, &config::Tunnel::default());
        let (_io, turn) = turnwise(far, watch, None);
        near.write_all(&[7; 5000]).await.unwrap();
        if closes {
            near.shutdown().await.unwrap();
        }
        let began = Instant::now();
        turn.linger().await;
        assert_eq!(began.elapsed().as_secs(), seconds);
    }
}

#[tokio::test]
async fn a_drain_lets_open_streams_finish_and_takes_no_more() {
    let tasks = Tasks::default();
    let stop = CancellationToken::new();
    let sender = connected(&tasks, &stop, echo).await;
    let mut stream = sender.connect(&request()).await.unwrap().stream;
    put(&mut stream, "before").await;
    assert_eq!(take(&mut stream).await.unwrap().unwrap(), "before");
    stop.cancel();
    let refused = async {
        while sender.connect(&request()).await.is_ok() {
            tokio::task::yield_now().await;
        }
    };
    soon(refused).await;
    put(&mut stream, "after").await;
    finish(&mut stream).await.unwrap();
    assert_eq!(soon(take(&mut stream)).await.unwrap().unwrap(), "after");
    assert!(soon(take(&mut stream)).await.unwrap().is_none());
}

#[tokio::test(start_paused = true)]
async fn a_silent_server_ends_the_wait_for_settings_and_for_an_answer() {
    let (near, _far) = duplex(64 << 10);
    let config = config::Tunnel::default();
    let error = handshake(near, &config).await.unwrap_err();
    assert!(matches!(error, OpenError::SettingsTimeout(_)));
    assert!(error.to_string().starts_with("http2 handshake failed:"));

    let tasks = Tasks::default();
    let forever = |incoming: Incoming| async move {
        let _held = incoming;
        std::future::pending::<()>().await;
    };
    let sender = connected(&tasks, &CancellationToken::new(), forever).await;
    let start = Instant::now();
    let error = sender.connect(&request()).await.unwrap_err();
    assert!(matches!(error, ConnectError::AnswerTimeout(_)), "{error}");
    assert!(error.to_string().starts_with("h2 failed:"));
    assert_eq!(start.elapsed().as_secs(), config.answer_timeout.as_secs());
}

#[tokio::test(start_paused = true)]
async fn a_client_that_gives_up_is_noticed_before_the_answer() {
    let tasks = Tasks::default();
    let (gone_tx, mut gone_rx) = mpsc::channel(1);
    let wait = move |mut incoming: Incoming| {
        let gone = gone_tx.clone();
        async move {
            incoming.responder.gone().await;
            gone.send(()).await.unwrap();
        }
    };
    let sender = connected(&tasks, &CancellationToken::new(), wait).await;
    let request = request();
    let asking = tokio::time::timeout(Duration::from_secs(1), sender.connect(&request));
    asking.await.unwrap_err();
    soon(gone_rx.recv()).await.unwrap();
}

#[tokio::test]
async fn methods_and_authorities_are_checked_and_the_connection_stays() {
    let tasks = Tasks::default();
    let (near, far) = duplex(64 << 10);
    serve_in(&tasks, far, &CancellationToken::new(), echo);
    let (mut send, connection) = h2::client::handshake(near).await.unwrap();
    tasks.spawn(async move { drop(connection.await) });
    let mut status = async |method: Method, uri: &str| {
        let request = http::Request::builder().method(method).uri(uri);
        send = send.clone().ready().await.unwrap();
        let (answer, _stream) = send.send_request(request.body(()).unwrap(), false).unwrap();
        let answer = soon(answer).await.unwrap();
        (
            answer.status().as_u16(),
            answer.headers().len(),
            answer.body().is_end_stream(),
        )
    };
    assert_eq!(status(Method::GET, "http://a/").await, (400, 0, true));
    assert_eq!(status(Method::CONNECT, "10.0.0.5").await, (400, 0, true));
    assert_eq!(
        status(Method::CONNECT, "10.0.0.5:99999").await,
        (400, 0, true)
    );
    assert_eq!(
        status(Method::CONNECT, "10.0.0.5:80").await,
        (200, 0, false)
    );
}

#[tokio::test]
async fn a_header_list_beyond_the_limit_is_answered_431() {
    let tasks = Tasks::default();
    let (near, far) = duplex(256 << 10);
    serve_in(&tasks, far, &CancellationToken::new(), echo);
    let (mut send, connection) = h2::client::handshake(near).await.unwrap();
    tasks.spawn(async move { drop(connection.await) });
    for (bytes, status) in [(60_000, 200), (70_000, 431), (10, 200)] {
        let request = http::Request::connect("10.0.0.5:80").header("x", "y".repeat(bytes));
        send = send.ready().await.unwrap();
        let (answer, _stream) = send.send_request(request.body(()).unwrap(), false).unwrap();
        assert_eq!(
            soon(answer).await.unwrap().status(),
            status,
            "{bytes} bytes"
        );
    }
}

#[test]
fn a_stream_is_small() {
    assert!(size_of::<Stream>() <= 96, "{}", size_of::<Stream>());
}
