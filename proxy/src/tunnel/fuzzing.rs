//! What a peer may send to a tunnel, for the fuzzer, and for the test that replays its seeds.
//!
//! Each function reads arbitrary bytes and panics if what comes of them is not as it must be.

use std::net::SocketAddr;

use http::{HeaderMap, HeaderName, HeaderValue, Uri};

use super::headers::{
    BAGGAGE, Baggage, FORWARDED, Forwarded, TRACEPARENT, TraceParent, authority, forwarded_host,
};
pub use super::tls::fuzzing::records;
use crate::route::Authority;

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
        let again = Baggage::read(&one(BAGGAGE, written.clone()));
        assert_eq!(again.map(|again| again.to_value()), Some(written));
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

#[cfg(test)]
mod tests {
    #[test]
    fn seeds_are_harmless() {
        testkit::seeds::replay("proxy/fuzz/seeds/headers", super::headers);
        testkit::seeds::replay("proxy/fuzz/seeds/records", super::records);
    }
}
