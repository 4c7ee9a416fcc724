//! Flows between two plain sockets, whose bulk goes through pipes: every byte arrives, is counted, and ends as it should.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_precision_loss,
    reason = "test code: a panic is a failed test"
)]

use std::{collections::BTreeMap, io::ErrorKind, net::SocketAddr, process::Command, sync::Arc};

use testkit::{Cluster, Mesh, Pod, PodSpec, Proxy, World, traffic, wait};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

/// `web` and `near` are captured, on one node; `plain` is of no mesh.
struct Stage {
    world: World,
    web: Arc<Pod>,
    near: Arc<Pod>,
    plain: Arc<Pod>,
}

impl Stage {
    fn new() -> Self {
        let world = World::new(1).unwrap();
        let captured = |name| world.node(0).pod(&PodSpec::captured(name)).unwrap();
        Self {
            web: captured("web"),
            near: captured("near"),
            plain: world.node(0).pod(&PodSpec::plain("plain")).unwrap(),
            world,
        }
    }

    async fn start(&self) -> Cluster<'_> {
        let mesh = Mesh::of(&[&self.web, &self.near, &self.plain]);
        let env = BTreeMap::from([("SAME_NODE", "direct")]);
        let cluster = Cluster::start_with(&self.world, &mesh, &[&self.web, &self.near], &env)
            .await
            .unwrap();
        // Both certificates are there once a tunnel, or its better, has led somewhere.
        let warm = self.near.serve(9999, traffic::Behaviour::Echo).unwrap();
        self.web.ask(warm.address, b"warm").await.unwrap();
        cluster
    }

    fn legs(&self) -> [Leg; 3] {
        [
            Leg::new(
                "same node",
                (&self.web, &self.near),
                &["source", "destination"],
            ),
            Leg::new("plaintext out", (&self.web, &self.plain), &["source"]),
            Leg::new("plaintext in", (&self.plain, &self.near), &["destination"]),
        ]
    }
}

/// A way of a connection from socket to socket.
struct Leg {
    name: &'static str,
    from: Arc<Pod>,
    to: SocketAddr,
    listener: TcpListener,
    /// Who reports it.
    reporters: &'static [&'static str],
}

impl Leg {
    fn new(
        name: &'static str,
        (from, to): (&Arc<Pod>, &Arc<Pod>),
        reporters: &'static [&'static str],
    ) -> Self {
        let listener = traffic::listen(to.netns(), to.at(0)).unwrap();
        Self {
            name,
            from: Arc::clone(from),
            to: listener.local_addr().unwrap(),
            listener,
            reporters,
        }
    }

    async fn open(&self) -> (TcpStream, TcpStream) {
        let (client, server) = tokio::join!(self.from.connect(self.to), self.listener.accept());
        (client.unwrap(), server.unwrap().0)
    }

    /// Bytes received and sent so far, as all that report them tell.
    async fn counted(&self, proxy: &Proxy<'_>) -> [f64; 2] {
        let metrics = proxy.metrics().await.unwrap();
        let totals = self.reporters.iter().map(|reporter| {
            [
                "istio_tcp_received_bytes_total",
                "istio_tcp_sent_bytes_total",
            ]
            .map(|name| metrics.sum(name, &[("reporter", reporter)]))
        });
        totals.fold([0.0; 2], |sum, each| [sum[0] + each[0], sum[1] + each[1]])
    }
}

/// Sends `bytes` over `from`, and holds what comes out of `to` against them.
async fn carry(
    leg: &Leg,
    from: &mut (impl AsyncWriteExt + Unpin),
    to: &mut (impl AsyncReadExt + Unpin),
    bytes: &[u8],
) {
    let mut got = vec![0; bytes.len()];
    let moving = async { tokio::join!(from.write_all(bytes), to.read_exact(&mut got)) };
    let (wrote, read) = wait::soon("bytes", moving).await;
    assert!(
        wrote.is_ok() && read.is_ok(),
        "{}: {wrote:?}, {read:?}",
        leg.name
    );
    assert_eq!(
        traffic::checksum(&got),
        traffic::checksum(bytes),
        "{}",
        leg.name
    );
}

/// Bytes that went through pipes so far.
async fn spliced(proxy: &Proxy<'_>) -> f64 {
    proxy
        .metrics()
        .await
        .unwrap()
        .sum("culvert_spliced_bytes_total", &[])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fifty_megabytes_each_way_arrive_and_are_counted_as_they_go() {
    let stage = Stage::new();
    let cluster = stage.start().await;
    let proxy = cluster.proxy(0);
    let bytes = traffic::pattern(50_000_000);
    for leg in stage.legs() {
        let (counted, before) = (leg.counted(proxy).await, spliced(proxy).await);
        let (mut client, mut server) = leg.open().await;
        let (mut from_client, mut to_server) = client.split();
        let (mut from_server, mut to_client) = server.split();
        tokio::join!(
            carry(&leg, &mut to_server, &mut from_server, &bytes),
            carry(&leg, &mut to_client, &mut from_client, &bytes[7..]),
        );
        let expected =
            [bytes.len(), bytes.len() - 7].map(|count| (count * leg.reporters.len()) as f64);
        let running = leg.counted(proxy).await;
        for index in [0, 1] {
            assert_eq!(
                running[index] - counted[index],
                expected[index],
                "{}",
                leg.name
            );
        }
        let through_pipes = spliced(proxy).await - before;
        assert!(through_pipes > 80e6, "{}: {through_pipes}", leg.name);
        let pipes = proxy
            .metrics()
            .await
            .unwrap()
            .sum("culvert_relay_pipes_taken", &[]);
        assert_eq!(pipes, 0.0, "{}: an idle flow has no pipe", leg.name);

        client.write_all(b"the end").await.unwrap();
        client.shutdown().await.unwrap();
        let mut rest = Vec::new();
        server.read_to_end(&mut rest).await.unwrap();
        assert_eq!(rest, b"the end", "{}", leg.name);
        drop(server);
        assert_eq!(client.read(&mut [0; 1]).await.unwrap(), 0, "{}", leg.name);
        let closed = leg.counted(proxy).await;
        let last = (7 * leg.reporters.len()) as f64;
        assert_eq!(closed, [running[0] + last, running[1]], "{}", leg.name);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ends_and_resets_come_behind_the_bulk_before_them() {
    let stage = Stage::new();
    let _cluster = stage.start().await;
    let (bulk, last) = (traffic::pattern(8_000_000), traffic::pattern(20_000));
    for leg in stage.legs() {
        let (mut client, mut server) = leg.open().await;
        carry(&leg, &mut client, &mut server, &bulk).await;
        client.shutdown().await.unwrap();
        assert_eq!(server.read(&mut [0; 1]).await.unwrap(), 0, "{}", leg.name);
        carry(&leg, &mut server, &mut client, &bulk).await;
        drop(server);
        assert_eq!(client.read(&mut [0; 1]).await.unwrap(), 0, "{}", leg.name);

        let (mut client, mut server) = leg.open().await;
        carry(&leg, &mut client, &mut server, &bulk).await;
        client.write_all(&last).await.unwrap();
        traffic::reset(client).unwrap();
        ends_reset(&leg, &mut server, &last).await;

        let (mut client, mut server) = leg.open().await;
        carry(&leg, &mut server, &mut client, &bulk).await;
        server.write_all(&last).await.unwrap();
        traffic::reset(server).unwrap();
        ends_reset(&leg, &mut client, &last).await;
    }
}

async fn ends_reset(leg: &Leg, stream: &mut TcpStream, last: &[u8]) {
    let mut bytes = Vec::new();
    let end = wait::soon("an end", stream.read_to_end(&mut bytes)).await;
    assert!(
        bytes == last,
        "{}: {} bytes before the reset",
        leg.name,
        bytes.len()
    );
    assert_eq!(
        end.expect_err(leg.name).kind(),
        ErrorKind::ConnectionReset,
        "{}",
        leg.name
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_descriptors_for_a_pipe_bytes_are_copied() {
    let stage = Stage::new();
    let cluster = stage.start().await;
    let proxy = cluster.proxy(0);
    let limit = |soft: &str| {
        let mut prlimit = Command::new("prlimit");
        prlimit.args([
            "--pid",
            &proxy.pid().to_string(),
            &format!("--nofile={soft}:"),
        ]);
        assert!(prlimit.status().unwrap().success());
    };
    let bulk = traffic::pattern(8_000_000);
    for leg in stage.legs() {
        let before = spliced(proxy).await;
        let (mut client, mut server) = leg.open().await;
        carry(&leg, &mut client, &mut server, b"open").await;
        limit("10");
        carry(&leg, &mut client, &mut server, &bulk).await;
        limit("1024");
        assert_eq!(spliced(proxy).await, before, "{}", leg.name);
    }
}
