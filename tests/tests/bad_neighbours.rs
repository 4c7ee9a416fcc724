//! Whoever else misbehaves: applications in pods, clients of the proxy's own ports, the CNI agent, the mesh file. Each is followed by
//! normal traffic through the same proxy, with memory bounded and no panic ([`Calm::unharmed`]). `bad_citizens.rs` has the other half.
//!
//! |  | Who | What becomes of it |
//! |---|---|---|
//! | 20 | garbage at every port of the proxy | closed, or carried where bytes are bytes |
//! | 21 | resets connections as soon as they stand | nothing |
//! | 22 | connects and closes, five thousand times | nothing |
//! | 23 | sends a head of HTTP byte by byte | cut after two seconds |
//! | 24 | heads of HTTP without end | refused |
//! | 25 | a scraper that does not read | keeps one connection |
//! | 26 | an application that dials a black hole, and on | each waits its ten seconds |
//! | 27 | an application that dials the proxy | refused |
//! | 28 | garbage in place of DNS | dropped |
//! | 29 | messages of the CNI agent that make no sense | refused; it is dialled again |
//! | 30 | garbage in place of the mesh file | what was known stays |
//! | 31 | silent, at every port but that of HBONE | closed in time |
//! | 32 | an application that opens more than its share | the rest waits, in its own pod |
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a panic is a failed test"
)]

use std::{collections::BTreeMap, net::SocketAddr, time::Duration};

use hickory_proto::rr::RecordType;
use testkit::{
    Cluster, Mesh, PodSpec, World, dns,
    stage::{Calm, ForeignClient, Named, RESOLVER},
    traffic::{self, Behaviour},
    wait,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinSet,
};

/// Ports of the proxy's own pod.
const PROXYS: [u16; 3] = [15000, 15020, 15021];

/// A connection to a port of the proxy's own pod.
async fn proxys(foreign: &ForeignClient, port: u16) -> TcpStream {
    let netns = foreign.world.node(0).proxy_netns();
    let to = SocketAddr::from(([127, 0, 0, 1], port));
    traffic::connect(netns, to).await.unwrap()
}

#[tokio::test]
async fn n20_garbage_is_turned_away_everywhere() {
    let foreign = ForeignClient::new().unwrap();
    let calm = Calm::start(&foreign, &[("UNSTABLE_ENABLE_SOCKS5", "true")]).await;
    let garbage = traffic::pattern(10_000);
    for _ in 0..10 {
        for port in [15001, 15006, 15008] {
            if let Ok(mut stream) = foreign.peer.connect(foreign.api.at(port)).await {
                let _closed_while_writing = stream.write_all(&garbage).await;
            }
        }
        let socks5 = SocketAddr::from(([127, 0, 0, 1], 15080));
        let mut stream = foreign.api.connect(socks5).await.unwrap();
        let _closed_while_writing = stream.write_all(&garbage).await;
        for port in PROXYS {
            let mut stream = proxys(&foreign, port).await;
            let _closed_while_writing = stream.write_all(&garbage).await;
        }
    }
    calm.unharmed().await;
}

#[tokio::test]
async fn n31_silence_holds_up_nobody() {
    let foreign = ForeignClient::new().unwrap();
    let env = [
        ("ISTIO_META_DNS_CAPTURE", "true"),
        ("UNSTABLE_ENABLE_SOCKS5", "true"),
    ];
    let calm = Calm::start(&foreign, &env).await;
    let mut silent = Vec::new();
    for _ in 0..150 {
        for port in [15053, 15080] {
            let to = SocketAddr::from(([127, 0, 0, 1], port));
            silent.push(foreign.api.connect(to).await.unwrap());
        }
        for port in PROXYS {
            silent.push(proxys(&foreign, port).await);
        }
        // These two are for what is redirected to them.
        for to in [foreign.api.at(15001), foreign.api.at(15006)] {
            foreign.peer.turned_away(to).await.unwrap();
        }
    }
    calm.proxy().ready().await;
    calm.proxy().metrics().await.unwrap();
    calm.proxy().document("/config_dump").await.unwrap();
    calm.unharmed().await;
    for stream in &mut silent {
        traffic::closed(stream, Duration::from_secs(20))
            .await
            .unwrap();
    }
}

#[tokio::test]
async fn n21_resets_upon_connections_do_nothing() {
    let foreign = ForeignClient::new().unwrap();
    let calm = Calm::start(&foreign, &[]).await;
    for _ in 0..700 {
        for to in [foreign.hbone(), calm.application()] {
            traffic::reset(foreign.peer.connect(to).await.unwrap()).unwrap();
        }
        traffic::reset(proxys(&foreign, 15021).await).unwrap();
    }
    calm.unharmed().await;
}

#[tokio::test]
async fn n22_connections_that_close_at_once_do_nothing() {
    let foreign = ForeignClient::new().unwrap();
    let calm = Calm::start(&foreign, &[]).await;
    for _ in 0..2500 {
        for to in [foreign.hbone(), calm.application()] {
            drop(foreign.peer.connect(to).await.unwrap());
        }
    }
    calm.unharmed().await;
}

#[tokio::test]
async fn n23_slow_heads_of_http_are_cut() {
    let foreign = ForeignClient::new().unwrap();
    let calm = Calm::start(&foreign, &[]).await;
    let mut slow = Vec::new();
    for port in PROXYS {
        for _ in 0..150 {
            let mut stream = proxys(&foreign, port).await;
            stream
                .write_all(b"GET /metrics HTTP/1.1\r\nX")
                .await
                .unwrap();
            slow.push(stream);
        }
    }
    calm.proxy().ready().await;
    calm.proxy().metrics().await.unwrap();
    for stream in &mut slow {
        traffic::closed(stream, wait::SOON).await.unwrap();
    }
    calm.unharmed().await;
}

#[tokio::test]
async fn n24_heads_without_end_are_refused() {
    let foreign = ForeignClient::new().unwrap();
    let calm = Calm::start(&foreign, &[]).await;
    let line = [b"GET / HTTP/1.1\r\nX: ".as_slice(), &[b'x'; 1 << 20]].concat();
    let lines = [b"GET / HTTP/1.1\r\n".to_vec(), b"A: b\r\n".repeat(200_000)].concat();
    for head in [&line, &lines] {
        for port in PROXYS {
            let mut stream = proxys(&foreign, port).await;
            let _closed_while_writing = stream.write_all(head).await;
            traffic::closed(&mut stream, wait::SOON).await.unwrap();
        }
    }
    calm.unharmed().await;
}

#[tokio::test]
async fn n25_a_scraper_that_does_not_read_stops_no_other() {
    let foreign = ForeignClient::new().unwrap();
    let calm = Calm::start(&foreign, &[]).await;
    let mut deaf = Vec::new();
    // More than the server has places for, of which one address gets a part.
    let netns = foreign.world.node(0).proxy_netns();
    let [from, to] = [([127, 0, 0, 2], 0), ([127, 0, 0, 1], 15020)].map(SocketAddr::from);
    for _ in 0..200 {
        let stream = traffic::connect_from(netns, from, to).await.unwrap();
        let scrape = b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n".repeat(100);
        let _no_room = stream.try_write(&scrape);
        deaf.push(stream);
    }
    calm.proxy().metrics().await.unwrap();
    calm.unharmed().await;
}

#[tokio::test]
async fn n26_a_black_hole_swallows_one_flow_at_a_time_and_no_other() {
    let foreign = ForeignClient::new().unwrap();
    let calm = Calm::start(&foreign, &[]).await;
    let rules = "table inet hole { chain out { type filter hook output priority 0; tcp dport 7777 drop; }; }";
    let node = foreign.api.netns();
    node.command("nft", &["-f", "-"], rules).unwrap();
    let nowhere = foreign.peer.at(7777);
    let mut waiting = JoinSet::new();
    for _ in 0..300 {
        let mut stream = foreign.api.connect(nowhere).await.unwrap();
        waiting.spawn(async move { traffic::closed(&mut stream, Duration::from_secs(20)).await });
    }
    calm.unharmed().await;
    for end in waiting.join_all().await {
        end.unwrap();
    }
    calm.unharmed().await;
}

#[tokio::test]
async fn n27_an_application_that_dials_the_proxy_gets_no_further() {
    let foreign = ForeignClient::new().unwrap();
    let calm = Calm::start(&foreign, &[]).await;
    for _ in 0..20 {
        for port in [15001, 15006, 15008] {
            for to in [foreign.api.at(port), ([127, 0, 0, 1], port).into()] {
                let Ok(mut stream) = foreign.api.connect(to).await else {
                    continue;
                };
                let _closed_while_writing = stream.write_all(b"who is there?").await;
                stream.shutdown().await.ok();
                let mut answer = Vec::new();
                let read = wait::soon("an end", stream.read_to_end(&mut answer)).await;
                assert!(read.is_err() || !answer.ends_with(b"there?"));
            }
        }
    }
    calm.unharmed().await;
}

#[tokio::test]
async fn n28_garbage_is_no_query() {
    let stage = Named::new().unwrap();
    let _upstream = stage.scripted().unwrap();
    let mut mesh = stage.mesh();
    mesh.service("cart", [10, 96, 7, 1].into(), &[(80, 80)], &[]);
    let cluster = stage.start(&mesh).await.unwrap();
    let before = cluster.proxy(0).resident_bytes().unwrap();
    let socket = stage.web.udp(([0, 0, 0, 0], 0).into()).unwrap();
    let garbage = traffic::pattern(1400);
    for round in 0..20_000 {
        let length = round % garbage.len();
        let _full = socket.try_send_to(&garbage[..length], RESOLVER);
    }
    let mut streams: Vec<TcpStream> = Vec::new();
    for _ in 0..100 {
        let mut stream = stage.web.connect(RESOLVER).await.unwrap();
        let _closed_while_writing = stream.write_all(&[&[0xff, 0xff], &*garbage].concat()).await;
        streams.push(stream);
    }
    let query = dns::query("cart.", RecordType::A).to_vec().unwrap();
    let answer = stage.shopper.datagram(RESOLVER, &query).await.unwrap();
    assert_eq!(dns::read(&answer).answers.len(), 1);
    let after = cluster.proxy(0).resident_bytes().unwrap();
    assert!(after < before + (48 << 20), "{before}, then {after} bytes");
    let panics = |line: &testkit::Line| line.raw.contains("panic");
    assert!(cluster.proxy(0).log().since(0, panics).is_empty());
}

#[tokio::test]
async fn n29_nonsense_of_the_agent_costs_its_connection() {
    let foreign = ForeignClient::new().unwrap();
    let mut calm = Calm::start(&foreign, &[]).await;
    for nonsense in [
        vec![0xff; 100_000],
        vec![0x0a, 0xff, 0xff, 0xff, 0xff, 0x0f],
        vec![0x7a, 0x02, 0x0a, 0x00],
        Vec::new(),
    ] {
        let node = &mut calm.cluster.nodes[0];
        // One larger than a packet may be is not even sent.
        let _not_sent = node.session.send_raw(&nonsense, &[]).await;
        let again = tokio::time::timeout(Duration::from_secs(2), node.agent.accept()).await;
        if let Ok(session) = again {
            node.session = session.unwrap();
            node.session.snapshot(&[&foreign.api]).await.unwrap();
        }
        calm.unharmed().await;
    }
}

#[tokio::test]
async fn n30_garbage_in_place_of_the_mesh_changes_nothing() {
    let foreign = ForeignClient::new().unwrap();
    let calm = Calm::start(&foreign, &[]).await;
    let nested = "[".repeat(200_000);
    let log = calm.proxy().log();
    for text in ["\0\u{1}\u{2}", "workloads: 7", &nested] {
        let mark = log.mark();
        std::fs::write(&calm.cluster.mesh_file, text).unwrap();
        let complains = |line: &testkit::Line| ["warn", "error"].contains(&&*line.level);
        log.wait_from(mark, "a complaint", complains).await;
        calm.unharmed().await;
    }
}

#[tokio::test]
async fn n32_who_takes_more_than_its_share_waits_alone() {
    let world = World::new(1).unwrap();
    let pod = |spec| world.node(0).pod(&spec).unwrap();
    let greedy = pod(PodSpec::captured("greedy"));
    let other = pod(PodSpec::captured("other"));
    let outside = pod(PodSpec::plain("outside"));
    let mesh = Mesh::of(&[&greedy, &other]);
    let env = BTreeMap::from([("MAX_FLOWS_PER_POD", "20")]);
    let pods = [&greedy, &other];
    let cluster = Cluster::start_with(&world, &mesh, &pods, &env)
        .await
        .unwrap();
    let app = outside.serve(7000, Behaviour::Whoami).unwrap();
    let mut open = Vec::new();
    for _ in 0..60 {
        open.push(greedy.connect(app.address).await.unwrap());
    }
    let limit = [("limit", "flows_per_pod")];
    let proxy = cluster.proxy(0);
    proxy
        .metric("culvert_limits_hit_total", &limit, |hits| hits > 0.0)
        .await;
    assert_eq!(app.accepted(20).await.len(), 20);
    let inside = greedy.serve(8080, Behaviour::Echo).unwrap();
    for (from, to) in [(&other, app.address), (&outside, inside.address)] {
        from.ask(to, b"as ever").await.unwrap();
    }
    assert_eq!(app.accepted(21).await.len(), 21);
    // Those that waited take the places of those that go, which are counted a few at a time.
    open.drain(..20);
    app.accepted(21 + 12).await;
}
