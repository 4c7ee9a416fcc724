//! The conversation with istiod: what opens a stream, how responses are answered, and what a bad one costs.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a panic is a failed test"
)]

use std::time::Duration;

use testkit::{
    Mesh, Proxy,
    agent::Agent,
    istiod::{Injection, Kind, Stream, SyncStatus},
    proxy::{ProxyOptions, READINESS_PORT},
    stage::{Steered, vip, web_port},
    traffic::Behaviour,
    wait,
};

const API: &str = "Kubernetes//Pod/shop/api";

/// What istiod reads of the rejections: name and reason.
async fn is_rejected(stage: &Steered, proxy: &Proxy<'_>, name: &str) -> String {
    let text = stage.istiod.rejection(Kind::Address).await;
    assert!(text.starts_with(&format!("{name}: ")), "{text}");
    let url = [("url", Kind::Address.url())];
    proxy
        .metric("istio_xds_message_rejections_total", &url, |count| {
            count >= 1.0
        })
        .await;
    let line = |line: &testkit::Line| line.level == "warn" && line.raw.contains(name);
    proxy.log().wait("the rejection", line).await;
    text
}

/// Case 1.
#[tokio::test]
async fn a_stream_opens_with_both_types_and_tells_who_asks() {
    let stage = Steered::new().unwrap();
    let options = stage
        .options()
        .env("POD_NAME", "zt-x7")
        .env("INSTANCE_IP", "10.1.0.9")
        .env(
            "PROXY_CONFIG",
            "{proxyMetadata: {ISTIO_META_ZONE: document, ISTIO_META_RACK: 7, SHELF: top}}",
        )
        .env("ISTIO_META_ZONE", "variable");
    let run = stage.start_with(&options).await.unwrap();
    stage.istiod.synced().await;
    let stream = stage.istiod.newest();
    for (request, kind) in stream.requests.iter().zip(Kind::ALL) {
        assert_eq!(request.type_url, kind.url());
        assert!(request.resource_names_subscribe.is_empty());
        assert!(request.resource_names_unsubscribe.is_empty());
        assert!(request.initial_resource_versions.is_empty());
        assert!(request.response_nonce.is_empty());
    }
    assert_eq!(
        stream.node_id(),
        "ztunnel~10.1.0.9~zt-x7.istio-system~istio-system.svc.cluster.local"
    );
    for (key, value) in [
        ("NAME", "zt-x7"),
        ("NAMESPACE", "istio-system"),
        ("INSTANCE_IPS", "10.1.0.9"),
        ("NODE_NAME", "node-0"),
        ("DNS_CAPTURE", "false"),
        ("ZONE", "variable"),
        ("RACK", "7"),
        ("SHELF", "top"),
    ] {
        assert_eq!(stream.metadata_text(key), Some(value), "{key}");
    }
    let later = &stream.requests[2..];
    assert!(later.iter().all(|request| request.node.is_none()));
    assert!(!stream.headers.contains_key("authorization"));
    assert_eq!(stage.istiod.streams().len(), 1);
    assert!(run.proxy.is_ready().await);
}

/// Case 8.
#[tokio::test]
async fn every_response_is_answered_once_in_order_and_by_its_nonce_alone() {
    let stage = Steered::new().unwrap();
    let _run = stage.start().await.unwrap();
    let mut mesh = stage.mesh();
    for count in 0..20 {
        mesh.services[0].canonical = count % 2 == 0;
        stage.istiod.set(&mesh);
        stage.istiod.inject(Injection::new(
            Kind::Authorization,
            &format!("empty {count}"),
        ));
        tokio::task::yield_now().await;
    }
    stage.istiod.remove(Kind::Address, &["c1//Pod/x/unknown"]);
    stage.istiod.synced().await;
    let stream = stage.istiod.newest();
    for kind in Kind::ALL {
        let sent = stream
            .sent
            .iter()
            .filter(|sent| sent.type_url == kind.url());
        let sent: Vec<&str> = sent.map(|sent| sent.nonce.as_str()).collect();
        let answers = stream.of(kind).skip(1);
        let answers: Vec<&str> = answers
            .map(|answer| answer.response_nonce.as_str())
            .collect();
        assert_eq!(answers, sent);
        assert!(sent.len() > 1, "{sent:?}");
    }
    for answer in &stream.requests[2..] {
        assert_eq!(answer.error_detail, None);
        assert!(answer.node.is_none());
        assert!(answer.resource_names_subscribe.is_empty());
        assert!(answer.resource_names_unsubscribe.is_empty());
        assert!(answer.initial_resource_versions.is_empty());
    }
    assert_eq!(stream.complaints, Vec::<String>::new());
}

/// Case 9.
#[tokio::test]
async fn a_bad_resource_costs_neither_its_neighbours_nor_the_stream() {
    let stage = Steered::new().unwrap();
    let mesh = stage.mesh();
    let mut start = Mesh::of(&[&stage.web]);
    stage.istiod.set(&start);
    let run = stage.start().await.unwrap();
    let _app = stage.api.serve(8080, Behaviour::Echo).unwrap();
    let mut second = Mesh::of(&[&stage.api]);
    second.services.clone_from(&mesh.services);
    second.workloads[0]
        .services
        .clone_from(&mesh.workloads[1].services);
    let response = Injection::new(Kind::Address, "mixed")
        .resource("bad one", "1", &b"\xff\xff"[..])
        .hollow("hollow one")
        .garbage(&b"\xff"[..])
        .content(&second);
    stage.istiod.inject(response);
    let text = is_rejected(&stage, &run.proxy, "bad one").await;
    assert!(text.contains("; hollow one: "), "{text}");
    let stream = stage.istiod.newest();
    let [answer] = stream.answers("mixed")[..] else {
        panic!("{stream:?}")
    };
    assert_eq!(answer.error_detail.as_ref().unwrap().code, 3);
    assert!(stage.echoes(web_port(1)).await, "the valid ones are used");

    start.service("later", "10.96.0.2".parse().unwrap(), &[(80, 8080)], &[]);
    let mut workload = second.workloads[0].clone();
    let ports = [(80, 8080)].into();
    workload
        .services
        .insert("shop/later.shop.svc.cluster.local".to_owned(), ports);
    start.workloads.push(workload);
    stage.istiod.put(&start);
    stage.istiod.synced().await;
    assert!(stage.echoes(web_port(2)).await, "later ones are used");
}

/// Case 10.
#[tokio::test]
async fn a_rejected_update_leaves_the_old_version_in_force_and_claimed() {
    let stage = Steered::new().unwrap();
    let run = stage.start().await.unwrap();
    let _app = stage.api.serve(8080, Behaviour::Echo).unwrap();
    let old = stage.istiod.version(Kind::Address, API).unwrap();
    stage.istiod.put_raw(Kind::Address, API, &b"\xff"[..]);
    is_rejected(&stage, &run.proxy, API).await;
    stage.istiod.put_raw(Kind::Address, "never", &b"\xff"[..]);
    stage
        .istiod
        .until("both rejections", |streams| {
            let rejections = streams[0].rejections(Kind::Address);
            let never = |text: &String| text.starts_with("never: ");
            rejections.iter().any(never).then_some(())
        })
        .await;
    assert!(stage.echoes(web_port(1)).await);
    stage.istiod.cut();
    let stream = stage.istiod.stream(1).await;
    let claimed = &stream
        .first(Kind::Address)
        .unwrap()
        .initial_resource_versions;
    assert_eq!(claimed.get(API), Some(&old));
    assert_eq!(claimed.get("never"), None);
    assert_eq!(claimed.len(), 4, "{claimed:?}");
    stage.istiod.rejection(Kind::Address).await;
    assert!(stage.echoes(web_port(1)).await);
}

/// Case 11.
#[tokio::test]
async fn empty_first_responses_make_the_proxy_ready() {
    let stage = Steered::new().unwrap();
    stage.istiod.set(&Mesh::default());
    let run = stage.start().await.unwrap();
    assert!(run.proxy.is_ready().await);
    let sent = stage.istiod.newest().sent;
    assert!(sent.iter().all(|sent| sent.resources.is_empty()));
    stage.istiod.synced().await;
    stage.istiod.set(&stage.mesh());
    stage.istiod.synced().await;
    let _app = stage.api.serve(8080, Behaviour::Echo).unwrap();
    assert!(stage.echoes(web_port(1)).await);
}

/// Case 12, better than required: the node is not hostage to one resource.
#[tokio::test]
async fn a_rejected_first_response_is_reported_and_does_not_block_the_node() {
    let stage = Steered::new().unwrap();
    stage.istiod.put_raw(Kind::Address, "bad", &b"\xff"[..]);
    let run = stage.start().await.unwrap();
    is_rejected(&stage, &run.proxy, "bad").await;
    let _app = stage.api.serve(8080, Behaviour::Echo).unwrap();
    assert!(stage.echoes(web_port(1)).await);
    stage.istiod.remove(Kind::Address, &["bad"]);
    stage.istiod.synced().await;
}

/// Case 13.
#[tokio::test]
async fn without_policies_the_proxy_is_not_ready_and_takes_no_pods() {
    let stage = Steered::new().unwrap();
    stage.istiod.hold(&[Kind::Authorization]);
    let node = stage.world.node(0);
    let mut agent = Agent::bind(&ProxyOptions::agent_socket(&stage.world, node)).unwrap();
    let proxy = stage.options().start(node).unwrap();
    stage
        .istiod
        .status(Kind::Address, &SyncStatus::Synced)
        .await;
    let connected = tokio::time::timeout(Duration::from_secs(1), agent.accept()).await;
    assert!(connected.is_err(), "it took the agent's socket");
    let answer = proxy.get(READINESS_PORT, "/healthz/ready").await.unwrap();
    assert_ne!(answer.status, 200);
    assert!(answer.body.contains("state manager"), "{}", answer.body);
    stage.istiod.hold(&[]);
    let session = wait::soon("it connects", agent.accept()).await.unwrap();
    session.snapshot(&[&stage.web]).await.unwrap();
    proxy.ready().await;
}

/// A type that was never asked for is no reason to end the stream, nor is it taken for another.
#[tokio::test]
async fn a_foreign_type_is_answered_and_harmless() {
    let stage = Steered::new().unwrap();
    let run = stage.start().await.unwrap();
    let _app = stage.api.serve(8080, Behaviour::Echo).unwrap();
    let url = "type.googleapis.com/envoy.config.cluster.v3.Cluster";
    let foreign = Injection::new(Kind::Address, "foreign")
        .removed("shop/api.shop.svc.cluster.local")
        .type_url(url);
    stage.istiod.inject(foreign);
    let answer = stage
        .istiod
        .request("an answer", |request| request.response_nonce == "foreign")
        .await;
    assert_eq!(answer.type_url, url);
    assert!(stage.echoes(web_port(1)).await);
    stage.istiod.set(&stage.mesh());
    stage.istiod.synced().await;
    assert_eq!(stage.istiod.streams().len(), 1);
    assert!(run.proxy.is_ready().await);
}

/// §2.4: several responses may be in flight. One that istiod cannot hear the answer of is in force all the same.
#[tokio::test]
async fn a_control_plane_that_reads_nothing_is_followed_and_answered_later() {
    let stage = Steered::new().unwrap();
    let _run = stage.start().await.unwrap();
    let _app = stage.api.serve(8080, Behaviour::Echo).unwrap();
    stage.istiod.synced().await;
    stage.istiod.stall(true, false);
    for count in 0..50 {
        let nonce = format!("unheard {count}");
        stage
            .istiod
            .inject(Injection::new(Kind::Address, &nonce).removed("c1//Pod/x/unknown"));
        let sent = |streams: &[Stream]| (streams[0].sent.last()?.nonce == nonce).then_some(());
        stage.istiod.until(&nonce, sent).await;
    }
    let mut mesh = stage.mesh();
    mesh.service("later", vip(2), &[(80, 8080)], &[&stage.api]);
    stage.istiod.set(&mesh);
    let applied = async || stage.echoes(web_port(2)).await.then_some(());
    wait::until(wait::SOON, "the last one is in force", applied).await;
    let last = stage.istiod.newest().status(Kind::Address);
    assert_eq!(last, SyncStatus::Stale, "it hears nothing");
    stage.istiod.stall(false, false);
    stage.istiod.synced().await;
    let stream = stage.istiod.newest();
    for count in 0..50 {
        let nonce = format!("unheard {count}");
        assert_eq!(stream.answers(&nonce).len(), 1, "{nonce}");
    }
}
