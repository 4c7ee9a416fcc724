//! How much at a time: long answers, many queries on one connection, and pods that ask too much.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a panic is a failed test"
)]

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use hickory_proto::{op::Edns, rr::RecordType};
use testkit::{
    Pod,
    dns::{self, Scripted},
    mesh::Service,
    stage::{Named, RESOLVER, UPSTREAM},
    wait,
};

fn a(name: &str) -> Vec<u8> {
    dns::query(name, RecordType::A).to_vec().unwrap()
}

fn with_edns(name: &str, payload: u16) -> Vec<u8> {
    let mut message = dns::query(name, RecordType::A);
    let mut edns = Edns::new();
    edns.set_max_payload(payload);
    message.set_edns(edns);
    message.to_vec().unwrap()
}

#[tokio::test]
async fn answers_are_cut_to_what_the_client_takes() {
    let stage = Named::new().unwrap();
    let _upstream = stage.scripted().unwrap();
    let mut mesh = stage.mesh();
    mesh.services.push(Service {
        name: "crowd".to_owned(),
        namespace: "shop".to_owned(),
        hostname: "big.shop.svc.cluster.local".to_owned(),
        vips: (0..=255).map(|last| format!("/10.97.0.{last}")).collect(),
        ports: BTreeMap::from([(80, 80)]),
        ..Service::default()
    });
    let _cluster = stage.start(&mesh).await.unwrap();
    // One of the mesh, one of the upstream, which sends 4 KB no matter what it is asked.
    for (name, count) in [("big.shop.svc.", 256), ("big.up.example.", 255)] {
        for (query, room) in [
            (a(name), 512),
            (with_edns(name, 1232), 1232),
            (with_edns(name, 100), 512),
        ] {
            let answer = stage.web.datagram(RESOLVER, &query).await.unwrap();
            assert!(answer.len() <= room, "{name} {room}: {}", answer.len());
            assert!(dns::read(&answer).metadata.truncation, "{name} {room}");
        }
        let wide = with_edns(name, 8192);
        let answer = dns::read(&stage.web.datagram(RESOLVER, &wide).await.unwrap());
        assert!(!answer.metadata.truncation, "{name}");
        assert_eq!(answer.answers.len(), count, "{name}");
        // dig asks again over TCP of its own accord.
        let at = format!("@{}", RESOLVER.ip());
        let dug = stage
            .web
            .dig(&[&at, "+bufsize=1232", name, "A"])
            .await
            .unwrap();
        assert_eq!(dug.data("A").len(), count, "{name}");
        assert!(dug.server.ends_with("(TCP)") && !dug.has("tc"), "{dug:?}");
    }
    let cut = dns::read(
        &stage
            .web
            .datagram(RESOLVER, &a("cut.up.example."))
            .await
            .unwrap(),
    );
    assert!(cut.metadata.truncation, "as the upstream says");
}

#[tokio::test]
async fn answers_that_the_kernel_does_not_take_are_counted() {
    let stage = Named::new().unwrap();
    let _upstream = stage.scripted().unwrap();
    let mut mesh = stage.mesh();
    mesh.service("cart", [10, 96, 7, 1].into(), &[(80, 80)], &[]);
    let cluster = stage.start(&mesh).await.unwrap();
    let mute = "table inet mute { chain out { type filter hook output priority 0; udp sport 15053 drop; }; }";
    let netns = stage.web.netns();
    netns.command("nft", &["-f", "-"], mute).unwrap();
    let socket = stage.web.udp(([0, 0, 0, 0], 0).into()).unwrap();
    // One that the mesh answers at once, and one that somebody else does.
    for (count, name) in [(1.0, "cart."), (2.0, "one.up.example.")] {
        socket.send_to(&a(name), RESOLVER).await.unwrap();
        let unsent = [("reason", "unsent")];
        let counted = |now| now == count;
        let proxy = cluster.proxy(0);
        proxy
            .metric("istio_dns_unanswered_total", &unsent, counted)
            .await;
    }
}

#[tokio::test]
async fn queries_of_one_connection_do_not_wait_for_each_other() {
    let stage = Named::new().unwrap();
    let _upstream = stage.scripted().unwrap();
    let mut mesh = stage.mesh();
    mesh.service("cart", [10, 96, 7, 1].into(), &[(80, 80)], &[]);
    let _cluster = stage.start(&mesh).await.unwrap();
    let names = [
        "slow.up.example.",
        "fast.up.example.",
        "cart.",
        "cart.shop.",
    ];
    let mut queries: Vec<_> = names.map(a).into();
    queries.extend((0..40).map(|index| a(&format!("n{index}.up.example."))));
    let answers = stage.web.pipeline(RESOLVER, &queries).await.unwrap();
    let id = |message: &Vec<u8>| [message[0], message[1]];
    let asked: BTreeSet<_> = queries.iter().map(id).collect();
    assert_eq!(answers.iter().map(id).collect::<BTreeSet<_>>(), asked);
    for answer in &answers {
        assert_eq!(dns::read(answer).answers.len(), 1);
    }
    let slow = answers
        .iter()
        .position(|answer| id(answer) == id(&queries[0]));
    assert!(slow.unwrap() > 4, "the slow one came as number {slow:?}");
}

#[tokio::test]
async fn connections_that_together_ask_more_than_a_pod_may_are_served_in_turn() {
    const AT_A_TIME: usize = 256;
    let stage = Named::new().unwrap();
    let (patience, at) = (Duration::from_secs(3), SocketAddr::new(UPSTREAM, 53));
    let netns = stage.world.node(0).netns();
    let upstream = Scripted::start(netns, at, move |asked| {
        vec![(patience, dns::addresses(&asked.bytes, 1))]
    })
    .unwrap();
    let _cluster = stage.start(&stage.mesh()).await.unwrap();
    let mut streams = Vec::new();
    for _ in 0..40 {
        streams.push(stage.web.connect(RESOLVER).await.unwrap());
    }
    // All connections come to hold some of the room before any of them needs more.
    let query = a("one.up.example.");
    for round in 1..=10 {
        for stream in &mut streams {
            dns::send(stream, &query).await.unwrap();
        }
        let expected = AT_A_TIME.min(40 * round);
        let asked = async || (upstream.asked().len() >= expected).then_some(());
        wait::until(wait::SOON, &format!("{expected} queries"), asked).await;
    }
    for stream in &mut streams {
        for _ in 1..=10 {
            let answer = wait::soon("an answer", dns::receive(stream)).await.unwrap();
            assert_eq!(dns::read(&answer).answers.len(), 1);
        }
    }
}

/// Sends the same datagram from a pod again and again, until dropped.
struct Flood {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Flood {
    fn start(pod: &Pod, query: Vec<u8>) -> Self {
        let open = || std::net::UdpSocket::bind("0.0.0.0:0");
        let socket = pod.netns().run(open).unwrap();
        socket.connect(RESOLVER).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            while !told.load(Ordering::Relaxed) {
                let _ = socket.send(&query);
            }
        });
        Self {
            stop,
            thread: Some(thread),
        }
    }
}

impl Drop for Flood {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.thread.take().map(std::thread::JoinHandle::join);
    }
}

#[tokio::test]
async fn a_flood_from_one_pod_leaves_the_queries_of_others_served() {
    let stage = Named::new().unwrap();
    let _upstream = stage.scripted().unwrap();
    let mut mesh = stage.mesh();
    mesh.service("cart", [10, 96, 7, 1].into(), &[(80, 80)], &[]);
    let one_thread = stage
        .options()
        .env("ZTUNNEL_WORKER_THREADS", "1")
        .env("RUST_LOG", "info");
    let cluster = stage.start_with(&mesh, &one_thread).await.unwrap();
    let floods = ["silent.up.example.", "cart."].map(|name| Flood::start(&stage.web, a(name)));
    let proxy = cluster.proxy(0);
    let dropped = [("reason", "too_many")];
    proxy
        .metric("istio_dns_unanswered_total", &dropped, |now| now > 1000.0)
        .await;
    for round in 0..20 {
        for name in ["cart.", "one.up.example."] {
            let answer = stage.shopper.datagram(RESOLVER, &a(name)).await;
            let answer = answer.unwrap_or_else(|error| panic!("round {round}, {name}: {error}"));
            assert_eq!(dns::read(&answer).answers.len(), 1, "{name}");
        }
    }
    drop(floods);
}
