//! Application tunnels with a PROXY header: what a captured waypoint learns of the tunnels that end at its pod.
//! Those without a header are in `routing.rs`.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a panic is a failed test"
)]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use testkit::{
    Cluster, Line, Mesh,
    mesh::{Match, Policy},
    raw::RawClient,
    stage::ForeignClient,
    traffic::{self, Behaviour},
    wait,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};

/// Where the application takes connections with a header.
const PORT: u16 = 15088;

/// A service behind the application.
const SERVED: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 96, 0, 8)), 80);

/// A mesh in which `api` asks for headers.
fn mesh(foreign: &ForeignClient) -> Mesh {
    let mut mesh = foreign.mesh();
    let tunnel = format!("{{protocol: PROXY, port: {PORT}}}");
    mesh.workload(&foreign.api)
        .set("applicationTunnel", &tunnel);
    mesh
}

async fn start<'a>(foreign: &'a ForeignClient, mesh: &Mesh) -> Cluster<'a> {
    Cluster::start(&foreign.world, mesh, &[&foreign.api])
        .await
        .unwrap()
}

fn listen(foreign: &ForeignClient, port: u16) -> TcpListener {
    let any = SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port);
    traffic::listen(foreign.api.netns(), any).unwrap()
}

async fn accept(listener: &TcpListener) -> TcpStream {
    let accepted = wait::soon("the application is reached", listener.accept()).await;
    accepted.unwrap().0
}

fn ends(stream: &TcpStream) -> (IpAddr, SocketAddr) {
    let (peer, local) = (stream.peer_addr().unwrap(), stream.local_addr().unwrap());
    (
        peer.ip().to_canonical(),
        SocketAddr::new(local.ip().to_canonical(), local.port()),
    )
}

/// Reads as many bytes as `expected` has, and compares.
async fn expect(stream: &mut TcpStream, expected: &[u8]) {
    let mut got = vec![0; expected.len()];
    wait::soon("bytes for the application", stream.read_exact(&mut got))
        .await
        .unwrap();
    assert_eq!(got, expected);
}

/// What the protocol says for these facts, written by hand.
fn header(
    source: SocketAddr,
    target: SocketAddr,
    identity: &str,
    service: Option<&str>,
) -> Vec<u8> {
    let (family, addresses) = match (source.ip(), target.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => (0x11, [from.octets(), to.octets()].concat()),
        (IpAddr::V6(from), IpAddr::V6(to)) => (0x21, [from.octets(), to.octets()].concat()),
        _ => (0x01, Vec::new()),
    };
    let mut rest = addresses;
    if !rest.is_empty() {
        rest.extend(source.port().to_be_bytes());
        rest.extend(target.port().to_be_bytes());
    }
    let mut field = |kind: u8, text: &str| {
        rest.push(kind);
        rest.extend(u16::try_from(text.len()).unwrap().to_be_bytes());
        rest.extend(text.as_bytes());
    };
    field(0xd0, identity);
    if let Some(service) = service {
        field(0xd1, service);
    }
    let length = u16::try_from(rest.len()).unwrap().to_be_bytes();
    let signature = *b"\x0d\x0a\x0d\x0a\x00\x0d\x0a\x51\x55\x49\x54\x0a";
    [&signature[..], &[0x21, family], &length, &rest].concat()
}

/// The log's line of the flow that ended.
async fn complete(cluster: &Cluster<'_>, mark: usize) -> Line {
    let log = cluster.proxy(0).log();
    log.wait_from(mark, "the end of the flow", |line| {
        line.is_access("connection complete")
    })
    .await
}

#[tokio::test]
async fn the_application_learns_who_calls_before_the_first_byte() {
    let foreign = ForeignClient::new().unwrap();
    let mut mesh = mesh(&foreign);
    mesh.service("served", SERVED.ip(), &[(80, 8080)], &[]);
    let cluster = start(&foreign, &mesh).await;
    let app = listen(&foreign, PORT);
    let (v4, v6) = (foreign.hbone(), foreign.api.at6(15008));
    let cases = [
        (v4, foreign.api.at(80)),
        (v6, foreign.api.at6(80)),
        // A service that the application serves, and addresses that nobody told of, one of the other family.
        (v4, SERVED),
        (v4, "10.96.0.7:443".parse().unwrap()),
        (v4, "[fd00:96::7]:443".parse().unwrap()),
    ];
    for (to, target) in cases {
        let mark = cluster.proxy(0).log().mark();
        let client = RawClient::connect(foreign.peer.netns(), to, &foreign.hello())
            .await
            .unwrap();
        let mut tunnel = client.tunnel(&target.to_string()).await.unwrap();
        assert_eq!(tunnel.status.as_u16(), 200, "{target}");
        // The client does not wait for what the application is told.
        tunnel.write(b"request").await.unwrap();
        tunnel.finish().unwrap();
        let mut served = accept(&app).await;
        let loopback: IpAddr = match to {
            SocketAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
            SocketAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
        };
        assert_eq!(
            ends(&served),
            (loopback, SocketAddr::new(loopback, PORT)),
            "{target}"
        );
        let service = (target == SERVED).then_some("served.shop.svc.cluster.local");
        let expected = header(client.local, target, &foreign.peer.spiffe_id(), service);
        expect(&mut served, &expected).await;

        // Behind it, the bytes of the flow: both directions, each with an end of its own.
        let mut request = Vec::new();
        wait::soon("half-close", served.read_to_end(&mut request))
            .await
            .unwrap();
        assert_eq!(request, b"request");
        served.write_all(b"the answer").await.unwrap();
        served.shutdown().await.unwrap();
        assert_eq!(tunnel.read_to_end().await.unwrap(), b"the answer");
        let line = complete(&cluster, mark).await;
        assert_eq!(
            (line.field("bytes_recv"), line.field("bytes_sent")),
            ("7", "10"),
            "the header counts as traffic: {}",
            line.raw
        );
    }
    let metrics = cluster.proxy(0).metrics().await.unwrap();
    for (name, bytes) in [("received", 7.0), ("sent", 10.0)] {
        let name = format!("istio_tcp_{name}_bytes_total");
        assert_eq!(metrics.sum(&name, &[]), 5.0 * bytes, "{name}");
    }
}

#[tokio::test]
async fn a_host_name_is_told_as_an_address_of_its_service() {
    let foreign = ForeignClient::new().unwrap();
    let mut mesh = mesh(&foreign);
    let vip: IpAddr = [10, 96, 0, 1].into();
    let cases: [(&str, &[&str], Option<&str>); 5] = [
        (
            "four",
            &["abroad/10.9.0.9", "/fd00:96::1", "/10.96.0.1"],
            Some("10.96.0.1:443"),
        ),
        (
            "order",
            &["/10.96.0.2", "/fd00:96::2", "abroad/10.9.0.9"],
            Some("10.96.0.2:443"),
        ),
        (
            "six",
            &["abroad/10.9.0.9", "/fd00:96::3"],
            Some("[fd00:96::3]:443"),
        ),
        (
            "abroad",
            &["abroad/fd00:9::9", "abroad/10.9.0.9"],
            Some("10.9.0.9:443"),
        ),
        ("headless", &[], None),
    ];
    for (name, vips, _) in cases {
        mesh.service(name, vip, &[(443, 8443)], &[&foreign.api])
            .vips = vips.iter().map(|vip| (*vip).to_owned()).collect();
    }
    let _cluster = start(&foreign, &mesh).await;
    let app = listen(&foreign, PORT);
    let client = foreign.client().await;
    for (name, _, target) in cases {
        let authority = format!("{name}.shop.svc.cluster.local:443");
        let tunnel = client.tunnel(&authority).await.unwrap();
        let Some(target) = target else {
            assert_eq!(tunnel.status.as_u16(), 503, "{name} has no address");
            continue;
        };
        assert_eq!(tunnel.status.as_u16(), 200, "{name}");
        let (target, host) = (target.parse().unwrap(), authority.strip_suffix(":443"));
        let expected = header(client.local, target, &foreign.peer.spiffe_id(), host);
        expect(&mut accept(&app).await, &expected).await;
    }
}

#[tokio::test]
async fn without_loopback_the_client_address_is_kept_as_well() {
    let foreign = ForeignClient::new().unwrap();
    let mut mesh = foreign.mesh();
    // Without a port of its own, the tunnel leads to the port that was asked for.
    mesh.workload(&foreign.api)
        .set("applicationTunnel", "{protocol: PROXY}");
    let env = [("LOCALHOST_APP_TUNNEL", "false")].into();
    let _cluster = Cluster::start_with(&foreign.world, &mesh, &[&foreign.api], &env)
        .await
        .unwrap();
    let (app, target) = (listen(&foreign, 8080), foreign.api.at(8080));
    let client = foreign.client().await;
    let _tunnel = client.tunnel(&target.to_string()).await.unwrap();
    let mut served = accept(&app).await;
    assert_eq!(ends(&served), (foreign.peer.ip4(), target));
    let expected = header(client.local, target, &foreign.peer.spiffe_id(), None);
    expect(&mut served, &expected).await;
}

#[tokio::test]
async fn plaintext_has_neither_a_tunnel_nor_a_header() {
    let foreign = ForeignClient::new().unwrap();
    let _cluster = start(&foreign, &mesh(&foreign)).await;
    let tunnelled = foreign.api.serve(PORT, Behaviour::Echo).unwrap();
    let _app = foreign.api.serve(8080, Behaviour::Sink).unwrap();
    // The sink's receipt counts and sums up every byte that it got.
    assert_eq!(
        foreign
            .peer
            .ask(foreign.api.at(8080), b"plain")
            .await
            .unwrap(),
        traffic::receipt(b"plain")
    );
    assert!(tunnelled.peers().is_empty());
}

#[tokio::test]
async fn a_denied_client_is_not_announced() {
    let foreign = ForeignClient::new().unwrap();
    let mut mesh = mesh(&foreign);
    // Policy judges the port where the bytes arrive, not the one that was asked for.
    mesh.policy(Policy::deny("closed", vec![Match::port(PORT)]));
    let _cluster = start(&foreign, &mesh).await;
    let app = foreign.api.serve(PORT, Behaviour::Stall).unwrap();
    let client = foreign.client().await;
    let tunnel = client.tunnel(&foreign.target(80)).await.unwrap();
    assert_eq!(tunnel.status.as_u16(), 401);
    assert!(app.peers().is_empty());
}

#[tokio::test]
async fn an_application_that_leaves_at_once_ends_its_stream_alone() {
    let foreign = ForeignClient::new().unwrap();
    let cluster = start(&foreign, &mesh(&foreign)).await;
    let client = foreign.client().await;
    let refused = client.tunnel(&foreign.target(80)).await.unwrap();
    assert_eq!(refused.status.as_u16(), 503, "nobody listens");

    let app = listen(&foreign, PORT);
    for (read, reset) in [(true, false), (false, false), (false, true)] {
        let mark = cluster.proxy(0).log().mark();
        let mut tunnel = client.tunnel(&foreign.target(80)).await.unwrap();
        assert_eq!(tunnel.status.as_u16(), 200);
        let mut served = accept(&app).await;
        if read {
            let target = foreign.api.at(80);
            let expected = header(client.local, target, &foreign.peer.spiffe_id(), None);
            expect(&mut served, &expected).await;
        }
        if reset {
            traffic::reset(served).unwrap();
        } else {
            drop(served);
        }
        // Whether the header or the relay meets the end is a race; both end the stream.
        let _ended_or_reset = tunnel.read_to_end().await;
        drop(tunnel);
        let line = complete(&cluster, mark).await;
        assert_eq!(
            (line.field("bytes_recv"), line.field("bytes_sent")),
            ("0", "0"),
            "{}",
            line.raw
        );
    }

    let mut tunnel = client.tunnel(&foreign.target(80)).await.unwrap();
    let mut served = accept(&app).await;
    served.write_all(b"the connection stays").await.unwrap();
    assert_eq!(
        tunnel.read(20).await.unwrap(),
        b"the connection stays",
        "an application may speak before it has read its header"
    );
}
