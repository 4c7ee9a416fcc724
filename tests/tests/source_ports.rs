//! The ports from which the proxy speaks to an application in a client's name, beside those from which that client itself spoke: one
//! that is used for both would reset the client's connection, or leave it without an answer.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a panic is a failed test"
)]

use std::{collections::HashSet, net::SocketAddr, ops::RangeInclusive};

use testkit::{
    Pod,
    raw::RawClient,
    stage::ForeignClient,
    traffic::{self, Behaviour},
    wait,
};
use tokio::{io::AsyncReadExt as _, net::TcpStream};

/// Where the proxy looks for a port first, and where it looks when it meets none that is free.
const PREFERRED: RangeInclusive<u16> = 10_240..=32_767;
const EXTENSION: RangeInclusive<u16> = 1_024..=10_239;
/// As many ports in a row as make the proxy look elsewhere, twice.
const WALL: u16 = 2 * 256 + 50;
/// Connections that come and go while the captured ones are held.
const MORE: u16 = 2_000;

/// A client that has connections captured, and what it knows of the ports in use.
struct Client<'a> {
    pod: &'a Pod,
    app: SocketAddr,
    hbone: RawClient,
    held: Vec<TcpStream>,
    /// Ports of its own captured connections.
    own: HashSet<u16>,
    /// Ports of the connections that the application has with it.
    seen: HashSet<u16>,
}

impl Client<'_> {
    /// Holds a captured connection from this port; yields the port that the application sees.
    async fn hold(&mut self, port: u16) -> u16 {
        self.own.insert(port);
        let (stream, seen) = self.connect(port).await;
        self.held.push(stream);
        self.seen.insert(seen);
        seen
    }

    async fn connect(&self, port: u16) -> (TcpStream, u16) {
        let from = SocketAddr::new(self.address().ip(), port);
        let connecting = self.pod.connect_from(from, self.app);
        let mut stream = wait::soon("connect", connecting)
            .await
            .unwrap_or_else(|error| panic!("port {port}: {error}"));
        let mut greeting = [0; 64];
        let reading = wait::soon("greeting", stream.read(&mut greeting));
        let length = reading
            .await
            .unwrap_or_else(|error| panic!("port {port}: {error}"));
        let seen = self.judge(&greeting[..length]);
        (stream, seen)
    }

    /// A connection by tunnel that comes and goes.
    async fn pass_by(&self) {
        let mut tunnel = self.hbone.tunnel(&self.app.to_string()).await.unwrap();
        tunnel.finish().unwrap();
        self.judge(&tunnel.read_to_end().await.unwrap());
    }

    /// What the application says of a connection: the client's own address, from a port of which it has no captured connection.
    fn judge(&self, greeting: &[u8]) -> u16 {
        let text = str::from_utf8(greeting).unwrap().trim();
        let seen: SocketAddr = text.parse().expect("the application greets each client");
        assert_eq!(seen.ip(), self.address().ip());
        assert!(!self.own.contains(&seen.port()), "{seen} is in use");
        seen.port()
    }

    fn address(&self) -> SocketAddr {
        if self.app.is_ipv4() {
            self.pod.at(0)
        } else {
            self.pod.at6(0)
        }
    }

    fn is_free(&self, port: u16) -> bool {
        !self.own.contains(&port) && !self.seen.contains(&port)
    }

    /// Holds connections from ports all over both ranges, low and high, odd and even.
    async fn scatter(&mut self) {
        for port in (*EXTENSION.start()..=*PREFERRED.end()).step_by(21) {
            if self.is_free(port) {
                self.hold(port).await;
            }
        }
    }

    /// Takes all ports that the proxy would take next, from far ahead down to where it has come meanwhile.
    async fn build_wall(&mut self) {
        let last = self.hold(*PREFERRED.end() + 1).await;
        let mut length = 0;
        for distance in (1..=3 * WALL).rev() {
            let port = ahead(&PREFERRED, last, distance);
            if self.seen.contains(&port) {
                break;
            }
            length += 1;
            if !self.own.contains(&port) {
                self.hold(port).await;
            }
        }
        assert!(length >= WALL, "{length}");
    }

    /// Stands in the way of the next port once more, where the proxy looks with the wall before it.
    async fn meet_below(&mut self) {
        let low = self.hold(*PREFERRED.end() + 2).await;
        assert!(EXTENSION.contains(&low), "{low}");
        let next = (1..).map(|distance| ahead(&EXTENSION, low, distance));
        let next = next.into_iter().find(|port| self.is_free(*port)).unwrap();
        let low = self.hold(next).await;
        assert!(EXTENSION.contains(&low), "{low}");
    }
}

/// The port that is so many behind another in a range that begins anew at its end.
fn ahead(range: &RangeInclusive<u16>, port: u16, distance: u16) -> u16 {
    let (first, count) = (*range.start(), range.end() - range.start() + 1);
    first + (port - first + distance) % count
}

/// Two thousand captured connections are held wherever the proxy draws its ports from, and as many come and go.
async fn never_collide(address: impl Fn(&Pod, u16) -> SocketAddr) {
    let foreign = ForeignClient::new().unwrap();
    let _cluster = foreign.cluster_with(&[("RUST_LOG", "warn")]).await.unwrap();
    let _app = foreign.api.serve(8080, Behaviour::Whoami).unwrap();
    let (hbone, hello) = (address(&foreign.api, 15008), foreign.hello());
    let hbone = RawClient::connect(foreign.peer.netns(), hbone, &hello);
    let mut client = Client {
        pod: &foreign.peer,
        app: address(&foreign.api, 8080),
        hbone: hbone.await.unwrap(),
        held: Vec::new(),
        own: HashSet::new(),
        seen: HashSet::new(),
    };
    client.scatter().await;
    client.build_wall().await;
    client.meet_below().await;
    assert!(client.held.len() > 2_000, "{}", client.held.len());
    for index in 0..MORE / 2 {
        let odd = 32_771 + 2 * index;
        drop(client.connect(odd).await);
        client.pass_by().await;
    }
    for stream in &mut client.held {
        traffic::ping(stream, b"never reset").await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn upstream_ports_never_collide_with_captured_clients() {
    never_collide(Pod::at).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn upstream_ports_never_collide_with_captured_clients_over_ipv6() {
    never_collide(Pod::at6).await;
}
