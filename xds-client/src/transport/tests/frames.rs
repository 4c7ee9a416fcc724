//! The connection as the server sees it: bytes of HTTP/2, against a paused clock.

use std::sync::Arc;

use rustls::ServerConfig;
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use super::*;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const EMPTY_SETTINGS: &[u8] = &[0, 0, 0, SETTINGS, 0, 0, 0, 0, 0];
/// The header of a frame that holds the eight bytes of the question.
const PING_ANSWER: &[u8] = &[0, 0, 8, PING, 1, 0, 0, 0, 0];
const SETTINGS: u8 = 4;
const PING: u8 = 6;

async fn accept(config: ServerConfig, pipe: DuplexStream) -> TlsStream<DuplexStream> {
    let session = TlsAcceptor::from(Arc::new(config)).accept(pipe).await;
    session.unwrap()
}

/// The type of the next frame, and its payload.
async fn read_frame(session: &mut TlsStream<DuplexStream>) -> std::io::Result<(u8, Vec<u8>)> {
    let mut header = [0; 9];
    session.read_exact(&mut header).await?;
    let length = u32::from_be_bytes([0, header[0], header[1], header[2]]);
    let mut payload = vec![0; usize::try_from(length).unwrap()];
    session.read_exact(&mut payload).await?;
    Ok((header[3], payload))
}

fn world() -> (Target, ServerConfig) {
    let authority = Authority::new();
    let target = target("localhost", 1, Roots::Pem(authority.pem()));
    (target, authority.config("localhost"))
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_is_silent_after_tls_is_given_up() {
    let (target, config) = world();
    let silence = async |pipe: DuplexStream| {
        let mut session = accept(config, pipe).await;
        let _ = session.read_to_end(&mut Vec::new()).await;
    };
    assert_gave_up(through_pipe(&target, silence).await, Step::Http2);
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_leaves_after_tls_is_told() {
    let (target, config) = world();
    let leave = async |pipe: DuplexStream| {
        let mut session = accept(config, pipe).await;
        session.shutdown().await.unwrap();
    };
    let (outcome, after) = through_pipe(&target, leave).await;
    let error = outcome.unwrap_err();
    assert!(matches!(error, ConnectError::Closed { .. }), "{error:?}");
    assert_eq!(after, Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn pings_only_while_a_request_is_open_and_wants_them_answered() {
    let (target, config) = world();
    let (channel, mut session) = greeted(&target, config).await;
    let idle = async {
        loop {
            assert_ne!(read_frame(&mut session).await.unwrap().0, PING);
        }
    };
    let idle = timeout(Duration::from_secs(300), idle).await;
    assert!(idle.is_err(), "the session should outlast the wait");

    let asked = async { (request(&target, channel).await, Instant::now()) };
    let answers_once = async {
        let question = next_ping(&mut session).await;
        let first = Instant::now();
        session.write_all(PING_ANSWER).await.unwrap();
        session.write_all(&question).await.unwrap();
        next_ping(&mut session).await;
        let second = Instant::now();
        while read_frame(&mut session).await.is_ok() {}
        (first, second)
    };
    let ((outcome, failed), (first, second)) = tokio::join!(asked, answers_once);
    outcome.unwrap_err();
    assert_eq!((second - first).as_secs(), 30);
    assert_eq!((failed - second).as_secs(), 10);
}

#[tokio::test(start_paused = true)]
async fn a_target_may_want_no_pings() {
    let (mut target, config) = world();
    target.ping_interval = None;
    let (channel, mut session) = greeted(&target, config).await;
    let listen = async {
        loop {
            assert_ne!(read_frame(&mut session).await.unwrap().0, PING);
        }
    };
    let hour = Duration::from_secs(3600);
    tokio::select! {
        _ = request(&target, channel) => panic!("nobody answers"),
        outcome = timeout(hour, listen) => assert!(outcome.is_err()),
    }
}

/// A connection past its greeting, and the server's side of it.
async fn greeted(target: &Target, config: ServerConfig) -> (Channel, TlsStream<DuplexStream>) {
    let mut session = None;
    let greet = async |pipe: DuplexStream| {
        let session = session.insert(accept(config, pipe).await);
        session.write_all(EMPTY_SETTINGS).await.unwrap();
        session.read_exact(&mut [0; PREFACE.len()]).await.unwrap();
    };
    let channel = through_pipe(target, greet).await.0.unwrap();
    (channel, session.unwrap())
}

async fn next_ping(session: &mut TlsStream<DuplexStream>) -> Vec<u8> {
    loop {
        if let (PING, question) = read_frame(session).await.unwrap() {
            return question;
        }
    }
}
