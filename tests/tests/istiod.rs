//! The stand-in istiod keeps its word: what a raw client sees of it.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a panic is a failed test"
)]

#[path = "istiod/client.rs"]
mod client;

use std::{collections::HashMap, time::Duration};

use client::{Client, answer, first, names, node, on_demand, resources, subscribe, versions};
use prost::Message as _;
use testkit::{
    Istiod, IstiodOptions, Mesh,
    istiod::{Injection, Kind, Stream, SyncStatus},
    mesh::{Policy, Service, Workload},
};
use tonic::{Code, Status};
use xds_client::proto::{discovery::DeltaDiscoveryRequest, workload::Address};

/// A stand-in, its directory, and what it serves: pods `a` and `b` on nodes of the same names, both behind service `shop/s`.
struct Stage {
    istiod: Istiod,
    mesh: Mesh,
    _directory: tempfile::TempDir,
}

const A: &str = "c//Pod/shop/a";
const B: &str = "c//Pod/shop/b";
const S: &str = "shop/s.example";

impl Stage {
    fn new() -> Self {
        Self::with(Istiod::options())
    }

    fn with(options: IstiodOptions) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let istiod = options.start_here(directory.path()).unwrap();
        let workloads = ["a", "b"].into_iter().zip([A, B]).enumerate();
        let workloads = workloads.map(|(index, (name, uid))| Workload {
            uid: uid.to_owned(),
            name: name.to_owned(),
            node: name.to_owned(),
            namespace: "shop".to_owned(),
            protocol: "HBONE".to_owned(),
            workload_type: "pod".to_owned(),
            status: "Healthy".to_owned(),
            workload_ips: vec![format!("10.0.0.{}", index + 1).parse().unwrap()],
            services: [(S.to_owned(), [(80, 8080)].into())].into(),
            ..Workload::default()
        });
        let mesh = Mesh {
            workloads: workloads.collect(),
            services: vec![Service {
                name: "s".to_owned(),
                namespace: "shop".to_owned(),
                hostname: "s.example".to_owned(),
                vips: vec!["/10.96.0.1".to_owned()],
                ports: [(80, 8080)].into(),
                ..Service::default()
            }],
            policies: vec![Policy::allow("p", vec![])],
        };
        istiod.set(&mesh);
        Self {
            istiod,
            mesh,
            _directory: directory,
        }
    }

    async fn open(&self, first: &[DeltaDiscoveryRequest]) -> Result<Client, Status> {
        Client::open(&self.istiod, "Bearer secret", first).await
    }
}

#[tokio::test]
async fn the_first_response_of_a_type_is_complete_and_ordered() {
    let stage = Stage::new();
    let both = [first(Kind::Address, &[]), first(Kind::Authorization, &[])];
    let mut client = stage.open(&both).await.unwrap();
    let addresses = client.accept().await;
    assert_eq!(names(&addresses), [A, B, S]);
    for resource in resources(&addresses) {
        assert_eq!(resource.version.len(), 16, "{}", resource.version);
        assert!(resource.aliases.is_empty());
        let payload = resource.resource.unwrap();
        assert_eq!(payload.type_url, Kind::Address.url());
        Address::decode(payload.value).unwrap();
    }
    let policies = client.accept().await;
    assert_eq!(policies.type_url, Kind::Authorization.url());
    assert_eq!(
        versions(&policies),
        HashMap::from([("shop/p".to_owned(), String::new())])
    );
    stage.istiod.synced().await;
    let seen = stage.istiod.stream(0).await;
    assert_eq!(seen.server_name.as_deref(), Some("localhost"));
    assert_eq!(seen.headers["clusterid"], "c");
    assert!(seen.node_id().starts_with("ztunnel~10.1.0.9~"));
    assert_eq!(seen.metadata_text("NODE_NAME"), Some("a"));
    assert!(seen.complaints.is_empty());
}

#[tokio::test]
async fn empty_content_is_a_first_response_too() {
    let stage = Stage::new();
    stage.istiod.set(&Mesh::default());
    let mut client = stage.open(&[first(Kind::Address, &[])]).await.unwrap();
    assert_eq!(names(&client.next().await), Vec::<String>::new());
}

#[tokio::test]
async fn a_returning_client_is_told_the_difference() {
    let stage = Stage::new();
    let mut client = stage.open(&[first(Kind::Address, &[])]).await.unwrap();
    let held = versions(&client.accept().await);
    let claim: Vec<(&str, &str)> = held.iter().map(|(k, v)| (&**k, &**v)).collect();
    let mut again = stage.open(&[first(Kind::Address, &claim)]).await.unwrap();
    let nothing = again.next().await;
    assert!(nothing.resources.is_empty() && nothing.removed_resources.is_empty());

    let stale = [(A, "0"), (B, ""), (S, &held[S]), ("c//Pod/shop/gone", "1")];
    let mut other = stage.open(&[first(Kind::Address, &stale)]).await.unwrap();
    let difference = other.next().await;
    assert_eq!(names(&difference), [A, B]);
    assert_eq!(difference.removed_resources, ["c//Pod/shop/gone"]);

    stage.istiod.reversion();
    let mut replica = stage.open(&[first(Kind::Address, &claim)]).await.unwrap();
    assert_eq!(names(&replica.next().await), [A, B, S]);
}

#[tokio::test]
async fn changes_are_pushed_with_the_workloads_of_changed_services() {
    let mut stage = Stage::new();
    let both = [first(Kind::Address, &[]), first(Kind::Authorization, &[])];
    let mut client = stage.open(&both).await.unwrap();
    client.accept().await;
    client.accept().await;

    stage.istiod.set(&stage.mesh);
    stage.mesh.workloads[0].name = "renamed".to_owned();
    stage.istiod.set(&stage.mesh);
    assert_eq!(names(&client.accept().await), [A]);

    stage.mesh.services[0].canonical = true;
    stage.mesh.policies.clear();
    stage.istiod.set(&stage.mesh);
    assert_eq!(names(&client.accept().await), [A, B, S]);
    let policies = client.accept().await;
    assert_eq!(policies.removed_resources, ["shop/p"]);

    stage.istiod.remove(Kind::Address, &[B]);
    let removal = client.accept().await;
    assert_eq!(removal.removed_resources, [B]);
    assert!(removal.resources.is_empty());
    stage.istiod.put_raw(Kind::Address, "bad", &b"\xff"[..]);
    assert_eq!(names(&client.accept().await), ["bad"]);
    stage.istiod.synced().await;
    client.silent().await;
}

#[tokio::test]
async fn answers_are_matched_with_what_was_sent_last() {
    let stage = Stage::new();
    let status = async |expected: &SyncStatus| stage.istiod.status(Kind::Address, expected).await;
    let mut client = stage.open(&[first(Kind::Address, &[])]).await.unwrap();
    let response = client.next().await;
    status(&SyncStatus::Stale).await;
    let mut refusal = answer(&response);
    refusal.error_detail = Some(xds_client::proto::discovery::Status {
        code: 3,
        message: "a: no".to_owned(),
        details: vec![],
    });
    client.send(refusal).await;
    assert_eq!(stage.istiod.rejection(Kind::Address).await, "a: no");
    status(&SyncStatus::Error("a: no".to_owned())).await;
    client.send(answer(&response)).await;
    status(&SyncStatus::Synced).await;

    let injection = Injection::new(Kind::Address, "mine").garbage(&b"\x01"[..]);
    stage.istiod.inject(injection.hollow("x").removed("y"));
    let injected = client.next().await;
    assert_eq!(
        (injected.nonce.as_str(), injected.resources.len()),
        ("mine", 2)
    );
    client.send(answer(&response)).await;
    status(&SyncStatus::Stale).await;
    let mut mixed = answer(&injected);
    mixed.resource_names_subscribe = vec!["z".to_owned()];
    client.send(mixed).await;
    status(&SyncStatus::Synced).await;
    assert_eq!(stage.istiod.newest().complaints.len(), 1);
}

#[tokio::test]
async fn demand_is_met_with_aliases_pods_of_the_node_and_the_quirks() {
    let stage = Stage::new();
    let mut client = stage.open(&[on_demand(&[])]).await.unwrap();
    let local = client.accept().await;
    assert_eq!(names(&local), [A], "the pod of the client's node");
    assert_eq!(resources(&local)[0].aliases, ["/10.0.0.1"]);

    client.send(subscribe(&["/10.0.0.2", "/10.0.0.9"])).await;
    let found = client.accept().await;
    assert_eq!(names(&found), [B]);
    assert_eq!(resources(&found)[0].aliases, ["/10.0.0.2"]);
    assert_eq!(found.removed_resources, ["/10.0.0.9"]);

    client.send(subscribe(&["/10.0.0.2"])).await;
    client.silent().await;
    let complaint = &stage.istiod.newest().complaints[0];
    assert!(complaint.contains("mismatch"), "{complaint}");

    client.send(subscribe(&["/10.96.0.1"])).await;
    let service = client.accept().await;
    assert_eq!(names(&service), [A, B, S]);
    assert_eq!(resources(&service)[2].aliases, ["/10.96.0.1"]);

    let mut later = stage.mesh.clone();
    let mut pod = later.workloads[1].clone();
    (pod.uid, pod.workload_ips) = (
        "c//Pod/shop/new".to_owned(),
        vec!["10.0.0.9".parse().unwrap()],
    );
    later.workloads.push(pod);
    stage.istiod.set(&later);
    assert_eq!(names(&client.accept().await), ["c//Pod/shop/new"]);

    let mut trap = subscribe(&[]);
    trap.resource_names_unsubscribe = vec![A.to_owned()];
    client.send(trap).await;
    let removed = client.accept().await.removed_resources;
    assert!(removed.contains(&B.to_owned()) && !removed.contains(&A.to_owned()));
}

#[tokio::test]
async fn a_returning_client_on_demand_is_subscribed_to_what_it_claims() {
    let stage = Stage::new();
    let claim = [("/10.0.0.2", ""), ("/10.0.0.8", "")];
    let mut client = stage.open(&[on_demand(&claim)]).await.unwrap();
    let response = client.accept().await;
    assert_eq!(names(&response), [A, B]);
    assert_eq!(response.removed_resources, ["/10.0.0.8"]);
    stage.istiod.remove(Kind::Address, &[B]);
    assert_eq!(client.next().await.removed_resources, [B]);
}

#[tokio::test]
async fn refusals_come_in_place_of_the_first_response() {
    let options = Istiod::options().token("secret").request_limit(400);
    let stage = Stage::with(options.cluster("c").namespace("istio-system"));
    let refused = async |authorization, request: DeltaDiscoveryRequest| {
        let refused = Client::open(&stage.istiod, authorization, &[request]).await;
        refused.err().expect("a refusal").code()
    };
    let good = first(Kind::Address, &[]);
    assert_eq!(
        refused("Bearer wrong", good.clone()).await,
        Code::Unauthenticated
    );
    let anonymous = DeltaDiscoveryRequest {
        node: None,
        ..good.clone()
    };
    let short = DeltaDiscoveryRequest {
        node: Some(node("ztunnel~10.1.0.9~zt")),
        ..good.clone()
    };
    let big = first(Kind::Address, &[("name".repeat(100).as_str(), "1")]);
    for (request, code) in [
        (anonymous, Code::InvalidArgument),
        (short, Code::InvalidArgument),
        (big, Code::ResourceExhausted),
    ] {
        assert_eq!(refused("Bearer secret", request).await, code);
    }
    let mut foreign = good.clone();
    foreign.node.as_mut().unwrap().metadata = None;
    let denied = refused("Bearer secret", foreign).await;
    assert_eq!(denied, Code::PermissionDenied);

    stage.istiod.refuse(Status::unknown("server is not ready"));
    assert_eq!(refused("Bearer secret", good.clone()).await, Code::Unknown);
    stage.istiod.refuse(None);
    stage.open(&[good]).await.unwrap();
    assert_eq!(stage.istiod.streams().len(), 7);
}

#[tokio::test]
async fn streams_end_and_connections_break_on_demand() {
    let stage = Stage::new();
    let both = [first(Kind::Address, &[]), first(Kind::Authorization, &[])];
    for fault in ["status", "ok", "cut", "goaway", "stop"] {
        let mut client = stage.open(&both).await.unwrap();
        client.accept().await;
        client.accept().await;
        stage.istiod.synced().await;
        match fault {
            "status" => stage.istiod.end_streams(Err(Status::internal("x"))),
            "ok" => stage.istiod.end_streams(Ok(())),
            "cut" => stage.istiod.cut(),
            "goaway" => stage.istiod.goaway(Duration::ZERO),
            _ => stage.istiod.stop().await,
        }
        let end = client.result().await;
        assert_eq!(matches!(end, Ok(None)), fault == "ok", "{fault}: {end:?}");
        let closed = |streams: &[Stream]| (!streams.last()?.is_open()).then_some(());
        stage.istiod.until("the record is closed", closed).await;
    }
    assert!(stage.open(&both).await.is_err(), "it has stopped");
    stage.istiod.set(&Mesh::default());
    stage.istiod.replace_root().unwrap();
    stage.istiod.start().unwrap();
    let mut client = stage.open(&both).await.unwrap();
    assert!(client.next().await.resources.is_empty());
}

#[tokio::test]
async fn responses_are_held_delayed_and_stalled() {
    let stage = Stage::new();
    let both = [first(Kind::Address, &[]), first(Kind::Authorization, &[])];
    stage.istiod.hold(&[Kind::Address]);
    let mut client = stage.open(&both).await.unwrap();
    assert_eq!(client.accept().await.type_url, Kind::Authorization.url());
    client.silent().await;
    stage.istiod.hold(&[]);
    assert_eq!(client.accept().await.type_url, Kind::Address.url());
    stage.istiod.synced().await;

    stage.istiod.delay(Duration::from_millis(400));
    stage.istiod.remove(Kind::Address, &[A]);
    client.silent().await;
    client.accept().await;
    stage.istiod.delay(Duration::ZERO);
    stage.istiod.synced().await;

    stage.istiod.stall(false, true);
    stage.istiod.remove(Kind::Address, &[B]);
    client.silent().await;
    stage.istiod.stall(true, false);
    let response = client.accept().await;
    assert_eq!(response.removed_resources, [B]);
    stage.istiod.status(Kind::Address, &SyncStatus::Stale).await;
    stage.istiod.stall(false, false);
    stage.istiod.synced().await;
}
