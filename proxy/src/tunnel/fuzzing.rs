//! What a peer may send to a tunnel, for the fuzzer, and for the test that replays its seeds.
//!
//! Each function reads arbitrary bytes and panics if what comes of them is not as it must be.

use std::net::SocketAddr;

use http::{HeaderMap, HeaderName, HeaderValue, Uri};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex},
    runtime::Builder,
};
use tokio_util::sync::CancellationToken;

pub use super::tls::fuzzing::{handshake, records};
use super::{
    Cut, client,
    headers::{
        BAGGAGE, Baggage, FORWARDED, Forwarded, TRACEPARENT, TraceParent, authority, forwarded_host,
    },
    serve,
    testing::{echo, request, take},
};
use crate::{config, route::Authority};

/// The head of a CONNECT. Each line is a letter, a byte that is not looked at, and a value: `a` is the authority, `b` baggage,
/// `f` forwarded, `t` traceparent.
///
/// # Panics
/// When something that was read cannot be written and read again.
pub fn headers(bytes: &[u8]) {
    let mut head = HeaderMap::new();
    for line in bytes.split(|byte| *byte == b'\n') {
        let Some((&[letter, _], value)) = line.split_first_chunk() else {
            continue;
        };
        let name = match letter {
            b'a' => {
                target(value);
                continue;
            }
            b'b' => BAGGAGE,
            b'f' => FORWARDED,
            _ => TRACEPARENT,
        };
        if let Ok(value) = HeaderValue::from_bytes(value) {
            head.append(name, value);
        }
    }
    if let Some(read) = Baggage::read(&head) {
        let written = read.to_value();
        let again = one(BAGGAGE, written.clone());
        let again = Baggage::read(&again).map(|again| again.to_value());
        assert_eq!(again, Some(written));
    }
    if let Some(host) = forwarded_host(&head) {
        assert!(!host.is_empty());
        let source = SocketAddr::from(([10, 0, 0, 1], 40000));
        let host = Some(host);
        let written = one(FORWARDED, Forwarded { source, host }.to_value());
        let again = forwarded_host(&written);
        assert!(
            again.is_none() || again == host,
            "{host:?} became {again:?}"
        );
    }
    if let Some(read) = TraceParent::read(&head) {
        let again = TraceParent::read(&one(TRACEPARENT, read.to_value()));
        assert_eq!(again, Some(read));
    }
}

fn target(bytes: &[u8]) {
    let Ok(uri) = Uri::try_from(bytes) else {
        return;
    };
    let Ok(text) = authority(&uri) else {
        return;
    };
    if let Ok(target) = text.parse::<Authority>() {
        assert_eq!(target.to_string().parse::<Authority>(), Ok(target));
    }
}

fn one(name: HeaderName, value: HeaderValue) -> HeaderMap {
    HeaderMap::from_iter([(name, value)])
}

/// A peer that speaks HTTP/2 as it likes, then hangs up. Of the first byte, the lowest bit says that the peer is the server, and the
/// rest how many of its bytes come at a time. What follows are frames: type, flags, number of the stream, length, and as many bytes;
/// a type of 255 stands for bytes without a head.
///
/// # Panics
/// When the peer gets out much more than it put in, or its victim does not notice that it has gone.
pub fn http2(bytes: &[u8]) {
    let Some((&how, script)) = bytes.split_first() else {
        return;
    };
    let (is_server, at_once) = (how & 1 == 1, usize::from(how / 2) * 8 + 1);
    let mut said = frames(script);
    if !is_server {
        said.splice(0..0, *PREFACE);
    }
    let runtime = Builder::new_current_thread().enable_time().build();
    let Ok(runtime) = runtime else { return };
    let heard = runtime.block_on(async {
        let (near, far) = duplex(at_once);
        let victim = async {
            if is_server {
                call(near).await;
            } else {
                let stop = CancellationToken::new();
                let limits = config::Tunnel::default();
                let _ = serve(near, &limits, stop, Cut::never(), echo).await;
            }
        };
        tokio::join!(victim, converse(far, &said)).1
    });
    let most = OWN_WORDS + 16 * said.len();
    assert!(heard <= most, "{heard} bytes for {}", said.len());
}

/// Says all, and counts what comes back meanwhile and later.
async fn converse(io: DuplexStream, said: &[u8]) -> usize {
    let (mut read, mut write) = tokio::io::split(io);
    let saying = async {
        let _ = write.write_all(said).await;
        let _ = write.shutdown().await;
    };
    let hearing = async {
        let (mut heard, mut buffer) = (0, [0; 4096]);
        while let Ok(count @ 1..) = read.read(&mut buffer).await {
            heard += count;
        }
        heard
    };
    tokio::join!(saying, hearing).1
}

/// A client asks for one stream, and reads it to its end.
async fn call(io: DuplexStream) {
    let Ok((sender, driver)) = client::handshake(io, &config::Tunnel::default()).await else {
        return;
    };
    let calling = async {
        let request = request();
        if let Ok(mut answer) = sender.connect(&request).await {
            while let Ok(Some(_)) = take(&mut answer.stream).await {}
        }
        drop(sender);
    };
    tokio::join!(driver.run(), calling);
}

fn frames(mut script: &[u8]) -> Vec<u8> {
    let mut said = Vec::new();
    while let Some((&[kind, flags, stream, length], rest)) = script.split_first_chunk() {
        let (given, rest) = rest.split_at(rest.len().min(length.into()));
        script = rest;
        if kind != 255 {
            let length = u8::try_from(given.len()).unwrap_or(u8::MAX);
            said.extend([0, 0, length, kind, flags, 0, 0, 0, stream]);
        }
        said.extend(given);
    }
    said
}

const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// What we say unasked, a request with its headers among it.
const OWN_WORDS: usize = 2048;

#[cfg(test)]
mod tests {
    #[test]
    fn seeds_are_harmless() {
        testkit::seeds::replay("proxy/fuzz/seeds/headers", super::headers);
        testkit::seeds::replay("proxy/fuzz/seeds/records", super::records);
        testkit::seeds::replay("proxy/fuzz/seeds/handshake", super::handshake);
        testkit::seeds::replay("proxy/fuzz/seeds/http2", super::http2);
    }
}
