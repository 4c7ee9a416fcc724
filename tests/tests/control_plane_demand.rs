//! The conversation with istiod of a node that asks on demand: what it subscribes to, and what of it outlives a stream.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a panic is a failed test"
)]

use std::sync::Arc;

use testkit::{
    Mesh, NodeRun, Pod, PodSpec,
    istiod::{Kind, Stream},
    stage::{Steered, vip, web_port},
    traffic::{Behaviour, Server},
};

/// `web` is all that runs on the node; `far` is outside the mesh, on another node as far as istiod knows, and behind the
/// service at address 1. What is needed of them has to be asked for.
struct Scene {
    stage: Steered,
    far: Arc<Pod>,
    app: Server,
}

impl Scene {
    fn new() -> Self {
        let stage = Steered::new().unwrap();
        let far = stage.world.node(0).pod(&PodSpec::plain("far")).unwrap();
        let app = far.serve(8080, Behaviour::Echo).unwrap();
        let scene = Self { stage, far, app };
        scene.stage.istiod.set(&scene.mesh());
        scene
    }

    fn mesh(&self) -> Mesh {
        let mut mesh = Mesh::of(&[&self.stage.web, &self.far]);
        "elsewhere".clone_into(&mut mesh.workload(&self.far).node);
        mesh.service("far", vip(1), &[(80, 8080)], &[&self.far]);
        mesh
    }

    async fn start(&self) -> NodeRun<'_> {
        let options = self.stage.options().env("XDS_ON_DEMAND", "true");
        let node = self.stage.world.node(0);
        NodeRun::start(&self.stage.world, node, &options, &[&self.stage.web])
            .await
            .unwrap()
    }

    /// What a real istiod would have complained about.
    fn complaints(&self) -> Vec<String> {
        self.stage.istiod.newest().complaints
    }
}

/// Case 2.
#[tokio::test]
async fn addresses_are_subscribed_to_nothing_and_policies_to_all() {
    let scene = Scene::new();
    let _run = scene.start().await;
    let stream = scene.stage.istiod.stream(0).await;
    let addresses = stream.first(Kind::Address).unwrap();
    assert_eq!(addresses.resource_names_subscribe, ["*"]);
    assert_eq!(addresses.resource_names_unsubscribe, ["*"]);
    let policies = stream.first(Kind::Authorization).unwrap();
    assert!(policies.resource_names_subscribe.is_empty());
    assert!(policies.resource_names_unsubscribe.is_empty());
}

/// Readiness waits for policies alone: istiod may have nothing to say about addresses.
#[tokio::test]
async fn a_node_of_which_istiod_knows_no_pods_becomes_ready() {
    let scene = Scene::new();
    scene.stage.istiod.set(&Mesh::default());
    let run = scene.start().await;
    assert!(run.proxy.is_ready().await);
    let sent = scene.stage.istiod.newest().sent;
    let policies = |sent: &testkit::istiod::Sent| sent.type_url == Kind::Authorization.url();
    assert!(sent.iter().all(policies), "{sent:?}");
}

/// A question that was not answered is asked again by the next stream, and its connection goes on.
#[tokio::test]
async fn a_question_survives_its_stream() {
    let scene = Scene::new();
    let _run = scene.start().await;
    scene.stage.istiod.hold(&[Kind::Address]);
    let interrupt = async {
        let key = "/10.96.0.1".to_owned();
        let asks = |request: &xds_client::proto::discovery::DeltaDiscoveryRequest| {
            request.resource_names_subscribe.contains(&key)
        };
        scene.stage.istiod.request("the question", asks).await;
        scene.stage.istiod.cut();
        let stream = scene.stage.istiod.stream(1).await;
        let claimed = &stream
            .first(Kind::Address)
            .unwrap()
            .initial_resource_versions;
        assert_eq!(claimed.get(&key).map(String::as_str), Some(""));
        scene.stage.istiod.hold(&[]);
    };
    let ((), answered) = tokio::join!(interrupt, scene.stage.echoes(web_port(1)));
    assert!(answered);
    assert_eq!(scene.complaints(), Vec::<String>::new());
}

/// What was fetched is claimed on the next stream, and followed there.
#[tokio::test]
async fn what_was_asked_for_is_kept_and_followed_after_a_reconnect() {
    let scene = Scene::new();
    let run = scene.start().await;
    assert!(scene.stage.echoes(web_port(1)).await);
    scene.stage.istiod.cut();
    let stream = scene.stage.istiod.stream(1).await;
    let claimed = &stream
        .first(Kind::Address)
        .unwrap()
        .initial_resource_versions;
    for name in [
        "Kubernetes//Pod/shop/far",
        "shop/far.shop.svc.cluster.local",
    ] {
        let version = scene.stage.istiod.version(Kind::Address, name);
        assert_eq!(claimed.get(name).cloned(), version, "{claimed:?}");
    }
    assert!(scene.stage.echoes(web_port(1)).await);
    let mut mesh = scene.mesh();
    mesh.workload(&scene.far).name = "renamed".to_owned();
    scene.stage.istiod.set(&mesh);
    let accepted = |streams: &[Stream]| {
        let stream = streams.last()?;
        let sent = stream.sent.iter().rev();
        let mut renamed = sent.filter(|sent| sent.resources == ["Kubernetes//Pod/shop/far"]);
        let nonce = &renamed.next()?.nonce;
        (!stream.answers(nonce).is_empty()).then_some(())
    };
    scene.stage.istiod.until("the update", accepted).await;
    assert!(scene.stage.echoes(scene.app.address).await);
    let renamed = |line: &testkit::Line| {
        line.is_access("connection complete") && line.field("dst.workload") == "renamed"
    };
    run.proxy.log().wait("the new name", renamed).await;
    assert_eq!(scene.complaints(), Vec::<String>::new());
}
