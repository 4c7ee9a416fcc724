use ppp::v2::{Addresses, Header, TypeLengthValues};
use proptest::prelude::*;
use tokio::io::{AsyncReadExt as _, duplex};

use super::*;

fn id() -> SpiffeId {
    SpiffeId::new("cluster.local", "default", "client").expect("a valid identity")
}

fn header(source: &str, target: &str) -> Vec<u8> {
    let (source, target) = (source.parse().expect("source"), target.parse());
    ProxyHeader {
        source,
        target: target.expect("target"),
        identity: &id(),
        service: None,
    }
    .to_bytes()
    .expect("fits")
}

fn sample(identity: &SpiffeId) -> ProxyHeader<'_> {
    ProxyHeader {
        source: ([10, 0, 0, 1], 40_000).into(),
        target: ([10, 10, 0, 1], 80).into(),
        identity,
        service: None,
    }
}

/// The identity's field, behind whatever the beginning says.
fn with_identity(beginning: &[&[u8]]) -> Vec<u8> {
    let uri = b"spiffe://cluster.local/ns/default/sa/client";
    [&beginning.concat()[..], b"\xd0\x00\x2b", uri].concat()
}

const SIGNATURE: &[u8] = b"\r\n\r\n\x00\r\nQUIT\n";

#[test]
fn ipv4_addresses_are_written_with_their_ports() {
    let expected = with_identity(&[
        SIGNATURE,
        b"\x21\x11\x00\x3a",
        &[10, 0, 0, 1],
        &[10, 10, 0, 1],
        b"\x9c\x40\x00\x50",
    ]);
    assert_eq!(header("10.0.0.1:40000", "10.10.0.1:80"), expected);
}

#[test]
fn ipv6_addresses_are_written_with_their_ports() {
    let expected = with_identity(&[
        SIGNATURE,
        b"\x21\x21\x00\x52",
        b"\xfd\x00\0\0\0\0\0\0\0\0\0\0\0\0\0\x01",
        b"\xfd\x00\0\0\0\0\0\0\0\0\0\0\0\0\0\x02",
        b"\x9c\x40\x00\x50",
    ]);
    assert_eq!(header("[fd00::1]:40000", "[fd00::2]:80"), expected);
}

#[test]
fn addresses_of_two_families_are_left_out() {
    let expected = with_identity(&[SIGNATURE, b"\x21\x01\x00\x2e"]);
    assert_eq!(header("10.0.0.1:40000", "[fd00::2]:80"), expected);
    assert_eq!(header("[fd00::2]:40000", "10.0.0.1:80"), expected);
}

#[test]
fn a_mapped_address_is_written_as_ipv4() {
    let plain = header("10.0.0.1:40000", "10.10.0.1:80");
    assert_eq!(header("10.0.0.1:40000", "[::ffff:10.10.0.1]:80"), plain);
    assert_eq!(header("[::ffff:10.0.0.1]:40000", "10.10.0.1:80"), plain);
}

#[test]
fn the_longest_identity_fits() {
    let around = "spiffe://d/ns/n/sa/".len();
    let identity = SpiffeId::new("d", "n", &"a".repeat(2048 - around)).expect("just fits");
    let header = sample(&identity);
    assert_eq!(header.to_bytes().expect("fits").len(), 16 + 12 + 3 + 2048);
}

#[tokio::test]
async fn the_header_comes_first_and_whole() {
    let (identity, limit) = (id(), Duration::from_secs(1));
    let header = sample(&identity);
    // Smaller than the header: it is written in pieces.
    let (mut ours, mut application) = duplex(16);
    let sent = async move {
        header.send(&mut ours, limit).await.expect("taken");
        ours.write_all(b"payload").await.expect("taken");
    };
    let mut got = Vec::new();
    let (read, ()) = tokio::join!(application.read_to_end(&mut got), sent);
    read.expect("read");
    let mut expected = header.to_bytes().expect("fits");
    expected.extend_from_slice(b"payload");
    assert_eq!(got, expected);
}

#[tokio::test(start_paused = true)]
async fn an_application_that_does_not_read_is_given_up() {
    let (identity, limit) = (id(), Duration::from_secs(10));
    let (mut ours, _application) = duplex(8);
    let header = sample(&identity);
    let begin = tokio::time::Instant::now();
    let end = header.send(&mut ours, limit).await;
    assert!(matches!(end, Err(HeaderError::Timeout(waited)) if waited == limit));
    assert_eq!(begin.elapsed(), limit);
}

#[tokio::test]
async fn an_application_that_has_gone_is_an_error() {
    let identity = id();
    let (mut ours, application) = duplex(4096);
    drop(application);
    let header = sample(&identity);
    let end = header.send(&mut ours, Duration::from_secs(1)).await;
    assert!(
        matches!(&end, Err(HeaderError::Write(cause)) if cause.kind() == io::ErrorKind::BrokenPipe),
        "{end:?}"
    );
}

proptest! {
    #[test]
    fn a_reader_finds_what_was_written(
        source: SocketAddr,
        target: SocketAddr,
        account in "[a-z0-9][a-z0-9-]{0,60}",
        service in proptest::option::of("[a-z0-9.-]{1,253}"),
    ) {
        let identity = SpiffeId::new("cluster.local", "shop", &account).expect("valid");
        let header = ProxyHeader { source, target, identity: &identity, service: service.as_deref() };
        let bytes = header.to_bytes().expect("fits");
        let read = Header::try_from(&bytes[..]).expect("a header");
        prop_assert_eq!((read.version, read.command), (Version::Two, Command::Proxy));
        prop_assert_eq!((read.protocol, read.len()), (Protocol::Stream, bytes.len()));
        let (source, target) = (listen::canonical(source), listen::canonical(target));
        let fields = match read.addresses {
            Addresses::IPv4(given) => {
                let from = SocketAddr::from((given.source_address, given.source_port));
                let to = SocketAddr::from((given.destination_address, given.destination_port));
                prop_assert_eq!((from, to), (source, target));
                read.tlv_bytes()
            }
            Addresses::IPv6(given) => {
                let ips = (given.source_address.into(), given.destination_address.into());
                prop_assert_eq!(ips, (source.ip(), target.ip()));
                let ports = (given.source_port, given.destination_port);
                prop_assert_eq!(ports, (source.port(), target.port()));
                read.tlv_bytes()
            }
            Addresses::Unspecified => {
                prop_assert_ne!(source.is_ipv4(), target.is_ipv4());
                read.address_bytes() // this reader takes all for addresses of an unknown kind
            }
            Addresses::Unix(_) => return Err(TestCaseError::fail("no such family")),
        };
        let fields: Vec<_> = TypeLengthValues::from(fields).collect::<Result<_, _>>().expect("fields");
        let fields: Vec<_> = fields.iter().map(|field| (field.kind, &field.value[..])).collect();
        let mut expected = vec![(IDENTITY, identity.as_str().as_bytes())];
        expected.extend(service.iter().map(|host| (SERVICE, host.as_bytes())));
        prop_assert_eq!(fields, expected);
    }
}
