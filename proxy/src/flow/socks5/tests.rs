//! The protocol, against clients that keep to it and others.

use proptest::prelude::*;
use tokio::io::duplex;

use super::*;

/// Knows one name.
#[derive(Debug)]
struct One;

impl Resolve for One {
    fn ipv4<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Option<Ipv4Addr>> {
        let found = (name == "api.shop").then_some(Ipv4Addr::new(10, 96, 0, 1));
        Box::pin(std::future::ready(found))
    }
}

/// Sends `bytes` and ends; what came of it, what was answered, and what was left unread.
async fn talk(bytes: &[u8], names: Names) -> (Result<SocketAddr, Refused>, Vec<u8>, Vec<u8>) {
    let (mut client, mut server) = duplex(4096);
    client.write_all(bytes).await.unwrap();
    client.shutdown().await.unwrap();
    let wanted = negotiate(&mut server, &names).await;
    let mut rest = Vec::new();
    server.read_to_end(&mut rest).await.unwrap();
    drop(server);
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).await.unwrap();
    (wanted, answer, rest)
}

/// A request of these parts, after a greeting that offers a password too.
fn request(kind: u8, address: &[u8], port: u16) -> Vec<u8> {
    let greeting = [5, 2, 2, 0];
    [
        &greeting[..],
        &[5, 1, 0, kind],
        address,
        &port.to_be_bytes(),
    ]
    .concat()
}

fn named(name: &str) -> Vec<u8> {
    let length = u8::try_from(name.len()).unwrap();
    request(NAME, &[&[length], name.as_bytes()].concat(), 80)
}

fn reply(code: u8) -> Vec<u8> {
    vec![5, 0, 5, code, 0, 1, 0, 0, 0, 0, 0, 0]
}

#[tokio::test]
async fn all_kinds_of_addresses_are_understood_and_no_byte_too_many_is_read() {
    let six: Ipv6Addr = "fd96::1".parse().unwrap();
    let mapped = Ipv4Addr::new(10, 0, 0, 5).to_ipv6_mapped();
    let cases = [
        (request(IPV4, &[10, 0, 0, 5], 80), "10.0.0.5:80"),
        (request(IPV6, &six.octets(), 80), "[fd96::1]:80"),
        (request(IPV6, &mapped.octets(), 80), "10.0.0.5:80"),
        (named("api.shop"), "10.96.0.1:80"),
        (named("10.0.0.5"), "10.0.0.5:80"),
    ];
    for (bytes, expected) in cases {
        let payload = [&bytes[..], b"GET /"].concat();
        let (wanted, answer, rest) = talk(&payload, Some(Arc::new(One))).await;
        assert_eq!(wanted.unwrap(), expected.parse().unwrap());
        assert_eq!(answer, reply(SUCCEEDED));
        assert_eq!(rest, b"GET /");
    }
}

#[tokio::test]
async fn refusals_have_their_codes() {
    let names = || -> Names { Some(Arc::new(One)) };
    let bind = [&[5, 1, 0][..], &[5, 2, 0, 1, 10, 0, 0, 5, 0, 80]].concat();
    for (bytes, names, code) in [
        (named("nobody"), names(), HOST_UNREACHABLE),
        (named("api.shop"), None, GENERAL_FAILURE),
        (bind, names(), COMMAND_NOT_SUPPORTED),
        (request(9, &[0; 4], 80), names(), COMMAND_NOT_SUPPORTED),
        (
            request(NAME, &[1, 0xff], 80),
            names(),
            COMMAND_NOT_SUPPORTED,
        ),
    ] {
        let (wanted, answer, _) = talk(&bytes, names).await;
        assert!(wanted.is_err(), "{bytes:?}");
        assert_eq!(answer, reply(code), "{bytes:?}");
    }
    for greeting in [&[4, 1, 0, 80][..], &[5, 1, 2]] {
        let (wanted, answer, _) = talk(greeting, None).await;
        assert!(matches!(wanted, Err(Refused::Violation(_))));
        assert_eq!(answer[..2], [5, COMMAND_NOT_SUPPORTED]);
    }
}

proptest! {
    #[test]
    fn any_bytes_are_refused_or_name_an_address(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let run = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let (wanted, answer, rest) = run.block_on(talk(&bytes, None));
        prop_assert!(rest.len() <= bytes.len());
        if let Ok(to) = wanted {
            prop_assert_eq!(bytes[0], VERSION);
            prop_assert_eq!(answer, reply(SUCCEEDED));
            prop_assert!(bytes.windows(2).any(|pair| pair == to.port().to_be_bytes()));
        }
    }

    #[test]
    fn every_address_and_port_arrives(ip in any::<IpAddr>(), port in any::<u16>()) {
        let bytes = match ip {
            IpAddr::V4(ip) => request(IPV4, &ip.octets(), port),
            IpAddr::V6(ip) => request(IPV6, &ip.octets(), port),
        };
        let run = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let (wanted, ..) = run.block_on(talk(&bytes, None));
        prop_assert_eq!(wanted.unwrap(), SocketAddr::new(ip.to_canonical(), port));
    }
}
