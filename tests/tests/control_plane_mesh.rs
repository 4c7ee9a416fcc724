//! The mesh as it changes: each accepted push is in force when it is acknowledged, for every connection after it.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a panic is a failed test"
)]

use std::net::SocketAddr;

use testkit::{
    Mesh, NodeRun, PodSpec, ProxyOptions, World,
    istiod::{Injection, Kind},
    mesh::{Match, Policy, Workload},
    stage::{Steered, vip, web_port},
    traffic::{self, Behaviour, Server},
    wait,
};
use xds_client::{
    local::Document,
    proto::workload::{Address, Service, Workload as Pod, address},
};

const API: &str = "Kubernetes//Pod/shop/api";
const DB: &str = "Kubernetes//Pod/shop/db";
const SERVICE: &str = "shop/api.shop.svc.cluster.local";

/// A stage with a running proxy, and applications in both pods.
struct Scene<'a> {
    stage: &'a Steered,
    run: NodeRun<'a>,
    api: Server,
    db: Server,
}

impl<'a> Scene<'a> {
    async fn start(stage: &'a Steered) -> Self {
        let run = stage.start().await.unwrap();
        stage.istiod.synced().await;
        Self {
            api: stage.api.serve(8080, Behaviour::Echo).unwrap(),
            db: stage.db.serve(8080, Behaviour::Echo).unwrap(),
            run,
            stage,
        }
    }

    /// Serves another mesh, which is in force on return.
    async fn set(&self, content: impl Into<Document>) {
        self.stage.istiod.set(content);
        self.stage.istiod.synced().await;
    }

    /// Sends a response that must be accepted, which is in force on return.
    async fn inject(&self, response: Injection, nonce: &str) {
        self.stage.istiod.inject(response);
        let answers = |request: &xds_client::proto::discovery::DeltaDiscoveryRequest| {
            request.response_nonce == nonce
        };
        let answer = self.stage.istiod.request(nonce, answers).await;
        assert_eq!(answer.error_detail, None);
    }

    /// The pods that answer so many calls of `web`; a call that fails counts for none.
    async fn answer(&self, to: SocketAddr, calls: usize) -> [usize; 2] {
        let before = [self.api.peers().len(), self.db.peers().len()];
        for _ in 0..calls {
            self.stage.echoes(to).await;
        }
        [
            self.api.peers().len() - before[0],
            self.db.peers().len() - before[1],
        ]
    }
}

/// Services `one` at address 1 and `two` at 2 on port 80, both `api`'s.
fn two_services(stage: &Steered) -> Mesh {
    let mut mesh = Mesh::of(&[&stage.web, &stage.api, &stage.db]);
    for (name, last) in [("one", 1), ("two", 2)] {
        mesh.service(name, vip(last), &[(80, 8080)], &[&stage.api]);
    }
    mesh
}

fn pod<'d>(document: &'d mut Document, uid: &str) -> &'d mut Pod {
    let found = document
        .addresses
        .iter_mut()
        .find_map(|address| match address {
            Address {
                r#type: Some(address::Type::Workload(workload)),
            } if workload.uid == uid => Some(workload),
            _ => None,
        });
    found.unwrap()
}

fn service(document: &mut Document) -> &mut Service {
    let found = document
        .addresses
        .iter_mut()
        .find_map(|address| match address {
            Address {
                r#type: Some(address::Type::Service(service)),
            } => Some(service),
            _ => None,
        });
    found.unwrap()
}

/// Case 20.
#[tokio::test]
async fn services_and_workloads_come_in_any_order() {
    let stage = Steered::new().unwrap();
    let full = Document::from(&stage.mesh());
    stage.istiod.set(&Mesh::of(&[&stage.web]));
    let scene = Scene::start(&stage).await;
    let (services, workloads): (Vec<_>, Vec<_>) = full
        .addresses
        .iter()
        .cloned()
        .partition(|address| matches!(address.r#type, Some(address::Type::Service(_))));
    let only = |addresses: &[Address]| Document {
        addresses: addresses.to_vec(),
        ..Document::default()
    };
    for (index, order) in [[&workloads, &services], [&services, &workloads]]
        .into_iter()
        .enumerate()
    {
        for part in order {
            stage.istiod.put(only(part));
            stage.istiod.synced().await;
        }
        assert_eq!(scene.answer(web_port(1), 2).await, [2, 0], "order {index}");
        scene.set(&Mesh::of(&[&stage.web])).await;
        assert_eq!(scene.answer(web_port(1), 1).await, [0, 0], "{index}: gone");
    }
    let response = Injection::new(Kind::Address, "backwards")
        .content(only(&services))
        .content(only(&workloads));
    scene.inject(response, "backwards").await;
    assert_eq!(scene.answer(web_port(1), 2).await, [2, 0]);
}

/// Case 21.
#[tokio::test]
async fn a_workload_moves_between_services_in_one_step() {
    let stage = Steered::new().unwrap();
    let mut mesh = two_services(&stage);
    let [one, two] = ["one", "two"].map(|name| format!("shop/{name}.shop.svc.cluster.local"));
    mesh.workload(&stage.api).services.remove(&two);
    stage.istiod.set(&mesh);
    let scene = Scene::start(&stage).await;
    assert_eq!(scene.answer(web_port(1), 2).await, [2, 0]);
    assert_eq!(scene.answer(web_port(2), 1).await, [0, 0]);
    let services = &mut mesh.workload(&stage.api).services;
    let ports = services.remove(&one).unwrap();
    services.insert(two, ports);
    scene.set(&mesh).await;
    let sent = stage.istiod.newest().sent;
    assert_eq!(sent.last().unwrap().resources, [API], "it alone was sent");
    assert_eq!(scene.answer(web_port(1), 1).await, [0, 0]);
    assert_eq!(scene.answer(web_port(2), 2).await, [2, 0]);
}

/// Cases 22 and 23.
#[tokio::test]
async fn health_counts_for_services_as_each_of_them_wants() {
    let stage = Steered::new().unwrap();
    let mut mesh = two_services(&stage);
    let all = "{routingPreferences: [], mode: Standard, healthPolicy: AllowAll}";
    mesh.services[1].set("loadBalancer", all);
    stage.istiod.set(&mesh);
    let scene = Scene::start(&stage).await;
    mesh.workload(&stage.api).status = "Unhealthy".to_owned();
    scene.set(&mesh).await;
    assert_eq!(scene.answer(web_port(1), 1).await, [0, 0], "healthy only");
    assert_eq!(scene.answer(web_port(2), 2).await, [2, 0], "all");
    assert_eq!(scene.answer(stage.api.at(8080), 2).await, [2, 0], "direct");

    mesh.services[0].set("loadBalancer", all);
    let only_service = Mesh {
        services: vec![mesh.services[0].clone()],
        ..Mesh::default()
    };
    let response = Injection::new(Kind::Address, "all").content(&only_service);
    scene.inject(response, "all").await;
    assert_eq!(scene.answer(web_port(1), 2).await, [2, 0], "all, now");
}

/// Case 24.
#[tokio::test]
async fn a_service_that_returns_has_its_endpoints() {
    let stage = Steered::new().unwrap();
    let scene = Scene::start(&stage).await;
    stage.istiod.remove(Kind::Address, &[SERVICE]);
    stage.istiod.synced().await;
    assert_eq!(scene.answer(web_port(1), 1).await, [0, 0]);
    scene.set(&stage.mesh()).await;
    assert_eq!(scene.answer(web_port(1), 2).await, [2, 0]);
}

/// Case 25.
#[tokio::test]
async fn replaced_endpoints_of_a_range_are_used_at_once() {
    let stage = Steered::new().unwrap();
    let mut mesh = stage.mesh();
    mesh.services[0].vips.clear();
    mesh.services[0].set("cidrVips", "[{network: '', cidr: 10.97.0.0/16}]");
    stage.istiod.set(&mesh);
    let scene = Scene::start(&stage).await;
    let inside: SocketAddr = "10.97.3.4:80".parse().unwrap();
    assert_eq!(scene.answer(inside, 4).await, [4, 0]);
    let links = std::mem::take(&mut mesh.workload(&stage.api).services);
    mesh.workload(&stage.db).services = links;
    scene.set(&mesh).await;
    assert_eq!(scene.answer(inside, 8).await, [0, 8], "new ones only");
    stage.istiod.remove(Kind::Address, &[SERVICE]);
    stage.istiod.synced().await;
    assert_eq!(scene.answer(inside, 1).await, [0, 0]);
}

/// Case 26.
#[tokio::test]
async fn services_that_share_an_address_do_not_take_it_along() {
    for gone in ["one", "two"] {
        let stage = Steered::new().unwrap();
        let mut mesh = two_services(&stage);
        mesh.services[1].vips = mesh.services[0].vips.clone();
        stage.istiod.set(&mesh);
        let scene = Scene::start(&stage).await;
        assert_eq!(scene.answer(web_port(1), 2).await, [2, 0]);
        let gone = format!("shop/{gone}.shop.svc.cluster.local");
        stage.istiod.remove(Kind::Address, &[&gone]);
        stage.istiod.synced().await;
        assert_eq!(scene.answer(web_port(1), 2).await, [2, 0], "without {gone}");
    }
}

/// Case 27.
#[tokio::test]
async fn a_pod_goes_before_an_entry_of_the_same_address() {
    let stage = Steered::new().unwrap();
    let plain = stage.world.node(0).pod(&PodSpec::plain("plain")).unwrap();
    let app = plain.serve(7000, Behaviour::Echo).unwrap();
    let mut mesh = stage.mesh();
    // It takes no tunnels: a record that says so makes calls fail.
    let record = mesh.pod(&plain);
    record.protocol = "HBONE".to_owned();
    let entry = Workload {
        uid: "Kubernetes/networking.istio.io/WorkloadEntry/shop/plain".to_owned(),
        protocol: "TCP".to_owned(),
        ..record.clone()
    };
    let uid = record.uid.clone();
    mesh.workloads.push(entry);
    stage.istiod.set(&mesh);
    let _scene = Scene::start(&stage).await;
    assert!(!stage.echoes(app.address).await, "the pod's record counts");
    stage.istiod.remove(Kind::Address, &[&uid]);
    stage.istiod.synced().await;
    assert!(stage.echoes(app.address).await, "the entry's record counts");
}

/// Case 28.
#[tokio::test]
async fn workloads_of_the_host_network_are_found_by_their_service_alone() {
    let stage = Steered::new().unwrap();
    let host = stage.world.node(0).pod(&PodSpec::plain("host")).unwrap();
    let apps = [7000, 7001].map(|port| host.serve(port, Behaviour::Echo).unwrap());
    let mut mesh = stage.mesh();
    let key = "shop/hosted.shop.svc.cluster.local";
    for (name, port) in [("one", 7000), ("two", 7001)] {
        let mut record = Workload::of(&host);
        record.uid = format!("Kubernetes//Pod/shop/{name}");
        record.name = name.to_owned();
        record.set("networkMode", "HostNetwork");
        record.services.insert(key.to_owned(), [(80, port)].into());
        mesh.workloads.push(record);
    }
    mesh.service("hosted", vip(3), &[(80, 0)], &[]);
    stage.istiod.set(&mesh);
    let scene = Scene::start(&stage).await;
    let log = scene.run.proxy.log();
    assert!(stage.echoes(apps[0].address).await);
    let ended = |line: &testkit::Line| {
        line.is_access("connection complete") && line.field("direction") == "outbound"
    };
    let line = log.wait("the first flow", ended).await;
    assert_eq!(line.field("dst.workload"), "", "found by its address");
    for _ in 0..40 {
        assert!(stage.echoes(web_port(3)).await);
    }
    assert!(apps.iter().all(|app| app.peers().len() > 5));
}

/// Case 29.
#[tokio::test]
async fn an_address_means_another_workload_on_another_network() {
    let stage = Steered::new().unwrap();
    let plain = stage.world.node(0).pod(&PodSpec::plain("plain")).unwrap();
    let app = plain.serve(7000, Behaviour::Echo).unwrap();
    let mut mesh = stage.mesh();
    let near = mesh.pod(&plain).clone();
    let mut far = near.clone();
    far.uid.push_str("-far");
    // It takes no tunnels: a record that says so makes calls fail.
    far.protocol = "HBONE".to_owned();
    far.set("network", "n2");
    mesh.workloads.push(far);
    stage.istiod.set(&mesh);
    let scene = Scene::start(&stage).await;
    assert!(stage.echoes(app.address).await, "on the network of `web`");
    mesh.workload(&stage.web).set("network", "n2");
    scene.set(&mesh).await;
    assert!(!stage.echoes(app.address).await, "and now on the other one");
}

/// Case 30.
#[tokio::test]
async fn an_identity_that_is_not_told_is_that_of_the_default_account() {
    let stage = Steered::new().unwrap();
    let bare = PodSpec::captured("bare").service_account("default");
    let bare = stage.world.node(0).pod(&bare).unwrap();
    let mut mesh = stage.mesh();
    let record = mesh.pod(&bare);
    record.service_account.clear();
    record.trust_domain.clear();
    stage.istiod.set(&mesh);
    let scene = Scene::start(&stage).await;
    scene.run.session.add(&bare).await.unwrap().unwrap();
    assert_eq!(bare.ask(web_port(1), b"hello").await.unwrap(), b"hello");
    let log = scene.run.proxy.log();
    let line = log
        .wait("the flow", |line| line.is_access("connection complete"))
        .await;
    assert_eq!(
        line.field("src.identity"),
        "spiffe://cluster.local/ns/shop/sa/default"
    );
}

/// Case 31.
#[tokio::test]
async fn a_service_of_one_namespace_is_unknown_in_others() {
    let stage = Steered::new().unwrap();
    let dark = PodSpec::captured("dark").namespace("dark");
    let dark = stage.world.node(0).pod(&dark).unwrap();
    let mut mesh = stage.mesh();
    mesh.pod(&dark);
    stage.istiod.set(&mesh);
    let scene = Scene::start(&stage).await;
    scene.run.session.add(&dark).await.unwrap().unwrap();
    let reaches = async || {
        dark.ask(web_port(1), b"hello")
            .await
            .is_ok_and(|a| a == b"hello")
    };
    assert!(reaches().await, "public at first");
    mesh.services[0].set("visibility", "Namespace");
    scene.set(&mesh).await;
    assert!(!reaches().await, "hidden");
    assert_eq!(scene.answer(web_port(1), 2).await, [2, 0]);
}

/// Case 33.
#[tokio::test]
async fn removals_of_what_is_unknown_are_accepted() {
    let stage = Steered::new().unwrap();
    let scene = Scene::start(&stage).await;
    let response = Injection::new(Kind::Address, "unknown")
        .removed("c1//Pod/x/unknown")
        .removed("shop/unknown.shop.svc.cluster.local")
        .removed("/10.99.99.99")
        .removed("nothing")
        .removed("");
    scene.inject(response, "unknown").await;
    let policies = Injection::new(Kind::Authorization, "none").removed("shop/none");
    scene.inject(policies, "none").await;
    assert_eq!(scene.answer(web_port(1), 2).await, [2, 0]);
}

/// Case 34.
#[tokio::test]
async fn an_unknown_tunnel_protocol_costs_its_workload_alone() {
    for protocol in [2, 9] {
        let stage = Steered::new().unwrap();
        let mut document = Document::from(&two_services(&stage));
        pod(&mut document, DB).tunnel_protocol = protocol;
        stage.istiod.set(document);
        let run = stage.start().await.unwrap();
        let text = stage.istiod.rejection(Kind::Address).await;
        assert!(text.starts_with(&format!("{DB}: ")), "{text}");
        assert!(!text.contains(API), "{text}");
        let _app = stage.api.serve(8080, Behaviour::Echo).unwrap();
        assert!(stage.echoes(web_port(2)).await);
        assert!(run.proxy.is_ready().await);
    }
}

/// Case 35.
#[tokio::test]
async fn an_unknown_visibility_is_public() {
    let stage = Steered::new().unwrap();
    let mut document = Document::from(&stage.mesh());
    service(&mut document).visibility = 7;
    stage.istiod.set(document);
    let scene = Scene::start(&stage).await;
    assert_eq!(scene.answer(web_port(1), 2).await, [2, 0]);
}

/// Case 36.
#[tokio::test]
async fn a_policy_takes_effect_when_it_comes_after_its_workload() {
    let stage = Steered::new().unwrap();
    let mut mesh = stage.mesh();
    mesh.workload(&stage.api).authorization_policies = vec!["shop/late".to_owned()];
    stage.istiod.set(&mesh);
    let scene = Scene::start(&stage).await;
    let mut open = stage.web.connect(web_port(1)).await.unwrap();
    traffic::ping(&mut open, b"tolerated").await.unwrap();
    mesh.policy(Policy::deny("late", vec![Match::pod(&stage.web)]).selected());
    scene.set(&mesh).await;
    traffic::closed(&mut open, wait::SOON).await.unwrap();
    assert_eq!(scene.answer(web_port(1), 2).await, [0, 0], "denied");
    stage.istiod.remove(Kind::Authorization, &["shop/late"]);
    stage.istiod.synced().await;
    assert_eq!(scene.answer(web_port(1), 2).await, [2, 0], "removed");
}

/// §6: both sources are used, and the control plane takes nothing of the file.
#[tokio::test]
async fn a_local_file_and_istiod_are_merged() {
    let stage = Steered::new().unwrap();
    let mut local = Mesh::of(&[&stage.api]);
    local.service("local", vip(2), &[(80, 8080)], &[&stage.api]);
    let file = ProxyOptions::mesh_file(&stage.world);
    local.write(&file).unwrap();
    let mut mesh = Mesh::of(&[&stage.web, &stage.db]);
    mesh.service("remote", vip(1), &[(80, 8080)], &[&stage.db]);
    stage.istiod.set(&mesh);
    let options = stage
        .options()
        .env("LOCAL_XDS_PATH", file.to_str().unwrap());
    let run = stage.start_with(&options).await.unwrap();
    stage.istiod.synced().await;
    let scene = Scene {
        api: stage.api.serve(8080, Behaviour::Echo).unwrap(),
        db: stage.db.serve(8080, Behaviour::Echo).unwrap(),
        run,
        stage: &stage,
    };
    assert_eq!(scene.answer(web_port(1), 2).await, [0, 2]);
    assert_eq!(scene.answer(web_port(2), 2).await, [2, 0]);
    mesh.services.clear();
    mesh.workload(&stage.db).services.clear();
    scene.set(&mesh).await;
    stage.istiod.cut();
    stage.istiod.stream(1).await;
    stage.istiod.synced().await;
    let newest = stage.istiod.newest();
    let claimed = &newest
        .first(Kind::Address)
        .unwrap()
        .initial_resource_versions;
    assert_eq!(claimed.len(), 2, "what came from istiod: {claimed:?}");
    assert_eq!(scene.answer(web_port(1), 1).await, [0, 0]);
    assert_eq!(scene.answer(web_port(2), 2).await, [2, 0]);
    assert!(scene.run.proxy.is_ready().await);
}

/// Case 39: the sample of the file's form, with the addresses and further pods of this world.
#[tokio::test]
async fn a_mesh_file_alone_makes_ready_and_routes_with_its_policy_in_force() {
    let world = World::new(1).unwrap();
    let node = world.node(0);
    let [cart, web, db] =
        ["cart", "web", "db"].map(|name| node.pod(&PodSpec::captured(name)).unwrap());
    let mut text = SAMPLE.to_owned();
    for (name, pod) in [("CART", &cart), ("WEB", &web), ("DB", &db)] {
        text = text.replace(name, &pod.ip4().to_string());
    }
    let file = ProxyOptions::mesh_file(&world);
    std::fs::write(&file, text.replace("NODE", node.name())).unwrap();
    let options = ProxyOptions::new(&world, node).env("XDS_ADDRESS", "");
    let pods: [&testkit::Pod; 3] = [&cart, &web, &db];
    let run = NodeRun::start(&world, node, &options, &pods).await.unwrap();
    assert!(run.proxy.is_ready().await);
    let app = cart.serve(8080, Behaviour::Echo).unwrap();
    let service = "10.96.0.7:80".parse().unwrap();
    assert_eq!(web.ask(service, b"hello").await.unwrap(), b"hello");
    assert_eq!(app.peers().len(), 1);
    assert!(db.ask(service, b"hello").await.is_err(), "only `web` may");
    assert_eq!(app.peers().len(), 1);
}

const SAMPLE: &str = r#"
workloads:
- {uid: c1//Pod/shop/cart, name: cart, namespace: shop, serviceAccount: cart, trustDomain: cluster.local,
   workloadIps: ["CART"], protocol: HBONE, node: NODE, services: {"shop/cart.shop.svc.cluster.local": {80: 8080}}}
- {uid: c1//Pod/shop/web, name: web, namespace: shop, serviceAccount: web, trustDomain: cluster.local,
   workloadIps: ["WEB"], protocol: HBONE, node: NODE, services: {}}
- {uid: c1//Pod/shop/db, name: db, namespace: shop, serviceAccount: db, trustDomain: cluster.local,
   workloadIps: ["DB"], protocol: HBONE, node: NODE, services: {}}
services:
- {name: cart, namespace: shop, hostname: cart.shop.svc.cluster.local, vips: ["/10.96.0.7"], ports: {80: 8080}, canonical: true}
policies:
- {name: only-web, namespace: shop, scope: Namespace, action: Allow, dryRun: false,
   rules: [[[{principals: [!Exact cluster.local/ns/shop/sa/web]}]]]}
"#;
