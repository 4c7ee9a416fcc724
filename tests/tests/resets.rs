//! How connections end: a reset arrives as a reset, an end as an end, and neither before the bytes in front of it.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a panic is a failed test"
)]

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use nix::sys::signal::Signal;
use testkit::{
    Cluster, Mesh, Pod, PodSpec, World,
    mesh::{Match, Policy},
    traffic::{self, Behaviour, End},
    wait,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};

/// `web` is captured, `near` on its node too, `far` on the other; `plain` is of no mesh.
struct Stage {
    world: World,
    web: Arc<Pod>,
    near: Arc<Pod>,
    far: Arc<Pod>,
    plain: Arc<Pod>,
}

impl Stage {
    fn new() -> Self {
        let world = World::new(2).unwrap();
        let captured = |node: usize, name| world.node(node).pod(&PodSpec::captured(name)).unwrap();
        Self {
            web: captured(0, "web"),
            near: captured(0, "near"),
            far: captured(1, "far"),
            plain: world.node(0).pod(&PodSpec::plain("plain")).unwrap(),
            world,
        }
    }

    fn mesh(&self) -> Mesh {
        Mesh::of(&[&self.web, &self.near, &self.far, &self.plain])
    }

    async fn start(&self, mesh: &Mesh) -> Cluster<'_> {
        Cluster::start(&self.world, mesh, &[&self.web, &self.near, &self.far])
            .await
            .unwrap()
    }

    /// Two proxies, one proxy at both ends, plaintext out of a pod, plaintext into a pod.
    fn legs(&self) -> [Leg; 4] {
        [
            ("two nodes", &self.web, &self.far),
            ("one node", &self.web, &self.near),
            ("plaintext out", &self.web, &self.plain),
            ("plaintext in", &self.plain, &self.near),
        ]
        .map(|(name, from, to)| Leg::new(name, from, to))
    }
}

/// A way of a connection.
struct Leg {
    name: &'static str,
    from: Arc<Pod>,
    to: SocketAddr,
    listener: TcpListener,
}

impl Leg {
    fn new(name: &'static str, from: &Arc<Pod>, to: &Arc<Pod>) -> Self {
        let listener = traffic::listen(to.netns(), to.at(0)).unwrap();
        Self {
            name,
            from: Arc::clone(from),
            to: listener.local_addr().unwrap(),
            listener,
        }
    }

    /// Both ends of a connection that has carried something each way.
    async fn open(&self) -> (TcpStream, TcpStream) {
        let (client, server) = tokio::join!(self.from.connect(self.to), self.listener.accept());
        let (mut client, (mut server, _)) = (client.unwrap(), server.unwrap());
        for bytes in [b"there", b"again"] {
            client.write_all(bytes).await.unwrap();
            server.read_exact(&mut [0; 5]).await.unwrap();
            server.write_all(bytes).await.unwrap();
            client.read_exact(&mut [0; 5]).await.unwrap();
        }
        (client, server)
    }
}

/// What comes until the end, and which end that is.
async fn rest(stream: &mut TcpStream) -> (Vec<u8>, io::Result<()>) {
    let mut bytes = Vec::new();
    let end = wait::soon("an end", stream.read_to_end(&mut bytes)).await;
    (bytes, end.map(|_| ()))
}

async fn ends_reset(leg: &Leg, stream: &mut TcpStream, last: &[u8]) {
    let (bytes, end) = rest(stream).await;
    assert_eq!(bytes, last, "{}: what was sent before the reset", leg.name);
    let error = end.expect_err(leg.name);
    assert_eq!(
        error.kind(),
        io::ErrorKind::ConnectionReset,
        "{}: {error}",
        leg.name
    );
}

#[tokio::test]
async fn a_reset_arrives_as_a_reset_behind_the_last_bytes() {
    let stage = Stage::new();
    let _cluster = stage.start(&stage.mesh()).await;
    for leg in stage.legs() {
        let (mut client, mut server) = leg.open().await;
        client.write_all(b"last words").await.unwrap();
        traffic::reset(client).unwrap();
        ends_reset(&leg, &mut server, b"last words").await;

        let (mut client, mut server) = leg.open().await;
        server.write_all(b"last words").await.unwrap();
        traffic::reset(server).unwrap();
        ends_reset(&leg, &mut client, b"last words").await;

        // An application that closes without having read all is reset by its kernel.
        let (mut client, mut server) = leg.open().await;
        client.write_all(b"unread").await.unwrap();
        server.peek(&mut [0; 1]).await.unwrap();
        server.write_all(b"enough").await.unwrap();
        drop(server);
        ends_reset(&leg, &mut client, b"enough").await;

        // After one direction has ended in order.
        let (mut client, mut server) = leg.open().await;
        client.shutdown().await.unwrap();
        assert!(rest(&mut server).await.1.is_ok(), "{}", leg.name);
        traffic::reset(server).unwrap();
        ends_reset(&leg, &mut client, b"").await;
    }
}

#[tokio::test]
async fn an_end_of_one_direction_leaves_the_other() {
    let stage = Stage::new();
    let _cluster = stage.start(&stage.mesh()).await;
    for leg in stage.legs() {
        let (mut client, mut server) = leg.open().await;
        client.write_all(b"request").await.unwrap();
        client.shutdown().await.unwrap();
        assert_eq!(rest(&mut server).await.0, b"request", "{}", leg.name);
        server.write_all(b"answer").await.unwrap();
        drop(server);
        let (bytes, end) = rest(&mut client).await;
        assert!(bytes == b"answer" && end.is_ok(), "{}: {end:?}", leg.name);

        let (mut client, mut server) = leg.open().await;
        server.shutdown().await.unwrap();
        assert!(rest(&mut client).await.1.is_ok(), "{}", leg.name);
        client.write_all(b"late").await.unwrap();
        drop(client);
        let (bytes, end) = rest(&mut server).await;
        assert!(bytes == b"late" && end.is_ok(), "{}: {end:?}", leg.name);
    }
}

#[tokio::test]
async fn what_cannot_be_carried_is_reset() {
    let stage = Stage::new();
    let mut mesh = stage.mesh();
    mesh.policy(Policy::deny("no-9090", vec![Match::port(9090)]));
    let _cluster = stage.start(&mesh).await;
    let _forbidden = [&stage.near, &stage.far].map(|pod| pod.serve(9090, Behaviour::Echo).unwrap());
    for (why, from, to) in [
        ("refused by an application", &stage.web, stage.far.at(8081)),
        ("denied by a policy", &stage.web, stage.far.at(9090)),
        ("refused outside", &stage.web, stage.plain.at(8081)),
        ("refused, plaintext", &stage.plain, stage.near.at(8081)),
        ("denied, plaintext", &stage.plain, stage.near.at(9090)),
        ("our own port", &stage.web, stage.far.at(15006)),
    ] {
        assert_eq!(from.turned_away(to).await.unwrap(), End::Reset, "{why}");
    }
}

#[tokio::test]
async fn a_proxy_that_dies_resets_what_it_carried() {
    let stage = Stage::new();
    let cluster = stage.start(&stage.mesh()).await;
    let legs = stage.legs();
    let mut open = Vec::new();
    for leg in &legs {
        open.push(leg.open().await);
    }
    cluster.proxy(0).signal(Signal::SIGKILL).unwrap();
    for (leg, (mut client, mut server)) in legs.iter().zip(open) {
        ends_reset(leg, &mut client, b"").await;
        ends_reset(leg, &mut server, b"").await;
    }
}

#[tokio::test]
async fn a_node_that_vanishes_is_found_out_within_seconds() {
    let stage = Stage::new();
    let cluster = stage.start(&stage.mesh()).await;
    let leg = Leg::new("two nodes", &stage.web, &stage.far);
    let (mut idle, mut idle_server) = leg.open().await;
    let (mut busy, mut busy_server) = leg.open().await;
    for index in [0, 1] {
        let node = stage.world.node(index).netns();
        node.command("ip", &["link", "set", "uplink", "down"], "")
            .unwrap();
    }
    // What is on its way changes nothing.
    busy.write_all(b"into the void").await.unwrap();
    let ends = [&mut idle, &mut busy, &mut idle_server, &mut busy_server];
    // Where nothing is on its way, the next PING is.
    let limits = [20, 1, 12, 1].map(Duration::from_secs);
    for (end, limit) in ends.into_iter().zip(limits) {
        let end = traffic::closed(end, limit).await.unwrap();
        assert_eq!(end, End::Reset);
    }
    for node in [0, 1] {
        let log = cluster.proxy(node).log();
        log.wait("both flows failed", |line| {
            line.is_access("connection complete") && line.field("error").contains("h2 failed")
        })
        .await;
    }
}
