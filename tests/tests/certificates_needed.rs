//! Which certificates a node asks for, and how often.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a panic is a failed test"
)]

use std::{sync::Arc, time::Duration};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use testkit::{
    Istiod, Mesh, NodeRun, Pod, PodSpec, ProxyOptions, World, consumers,
    istiod::{CertificateCall, Kind},
    mesh::workload_uid,
    proxy::ADMIN_PORT,
    traffic::{Behaviour, Server},
};
use x509_parser::pem::parse_x509_pem;

/// Three pods of one account on one node, and a stand-in that is control plane and authority.
struct Stage {
    world: World,
    pods: [Arc<Pod>; 3],
    istiod: Istiod,
    app: Server,
}

impl Stage {
    fn new() -> Self {
        let world = World::new(1).unwrap();
        let node = world.node(0);
        let pods = ["one", "two", "three"].map(|name| {
            let spec = PodSpec::captured(name).service_account("shared");
            node.pod(&spec).unwrap()
        });
        let home = node.pod(&PodSpec::plain("istiod")).unwrap();
        let istiod = Istiod::options().start(&world, &home).unwrap();
        istiod.set(&Mesh::of(&[&pods[0], &pods[1], &pods[2]]));
        let app = pods[1].serve(8080, Behaviour::Echo).unwrap();
        Self {
            world,
            pods,
            istiod,
            app,
        }
    }

    async fn start(&self) -> NodeRun<'_> {
        self.start_with(|options| options).await
    }

    async fn start_with(&self, set: impl FnOnce(ProxyOptions) -> ProxyOptions) -> NodeRun<'_> {
        let node = self.world.node(0);
        let options = ProxyOptions::new(&self.world, node)
            .follow(&self.istiod)
            .certified_by(&self.istiod);
        let options = set(options);
        let pods: Vec<&Pod> = self.pods.iter().map(Arc::as_ref).collect();
        NodeRun::start(&self.world, node, &options, &pods)
            .await
            .unwrap()
    }

    /// The first pod gets an answer of the second.
    async fn echoes(&self) {
        let answer = self.pods[0].ask(self.app.address, b"hello").await;
        assert_eq!(answer.unwrap(), b"hello");
    }

    /// For whom certificates were asked, in order.
    fn asked(&self) -> Vec<String> {
        let calls = self.istiod.certificate_calls().into_iter();
        calls
            .filter_map(|call: CertificateCall| call.impersonated)
            .collect()
    }
}

/// The one entry of the dump for `id`: the serial number of its leaf.
async fn shown_serial(run: &NodeRun<'_>, id: &str) -> String {
    let answer = run.proxy.get(ADMIN_PORT, "/config_dump").await.unwrap();
    let dump = consumers::istioctl(&answer.body).unwrap();
    let mut mine = dump.certificates.unwrap();
    mine.retain(|certificate| certificate.identity.as_deref() == Some(id));
    assert_eq!(mine.len(), 1, "{mine:?}");
    assert_eq!(mine[0].state.as_deref(), Some("Available"));
    let leaf = &mine[0].cert_chain.as_ref().unwrap()[0];
    let text = BASE64_STANDARD.decode(leaf.pem.as_ref().unwrap()).unwrap();
    let (_, pem) = parse_x509_pem(&text).unwrap();
    let serial = leaf.serial_number.clone().unwrap();
    let certificate = pem.parse_x509().unwrap();
    assert_eq!(serial, certificate.serial.to_str_radix(10));
    serial
}

/// Cases 11 and 12.
#[tokio::test]
async fn one_request_serves_all_pods_of_an_account_and_none_is_made_for_others() {
    let stage = Stage::new();
    let node = stage.world.node(0);
    let [outside, elsewhere, last] =
        ["outside", "elsewhere", "last"].map(|name| node.pod(&PodSpec::plain(name)).unwrap());
    let mut mesh = Mesh::default();
    mesh.pod(&outside);
    let remote = mesh.pod(&elsewhere);
    "HBONE".clone_into(&mut remote.protocol);
    "another-node".clone_into(&mut remote.node);
    stage.istiod.put(&mesh);
    let run = stage.start().await;
    stage.echoes().await;
    let serial = shown_serial(&run, &stage.pods[0].spiffe_id()).await;
    assert!(serial.len() > 20, "that of 16 bytes in decimal: {serial}");

    // Its certificate is asked for after any that the others would have needed.
    let mut mesh = Mesh::default();
    "HBONE".clone_into(&mut mesh.pod(&last).protocol);
    stage.istiod.put(&mesh);
    stage.istiod.certified(&last.spiffe_id(), 1).await;
    assert_eq!(stage.asked(), [stage.pods[0].spiffe_id(), last.spiffe_id()]);
}

/// Case 21, but for the end of the grace, which is tested where the clock can be moved.
#[tokio::test]
async fn an_account_that_comes_back_at_once_finds_its_certificate() {
    let stage = Stage::new();
    let run = stage.start().await;
    stage.echoes().await;
    let uids = [0, 1, 2].map(|pod: usize| workload_uid(&stage.pods[pod]));
    let uids = uids.each_ref().map(String::as_str);
    stage.istiod.remove(Kind::Address, &uids);
    let id = stage.pods[0].spiffe_id();
    let forgotten = [("identity", &*id), ("state", "forgotten")];
    let name = "istio_certificate_state";
    let is_one = |value: f64| value.total_cmp(&1.0).is_eq();
    run.proxy.metric(name, &forgotten, is_one).await;

    stage
        .istiod
        .put(&Mesh::of(&[&stage.pods[0], &stage.pods[1]]));
    stage.echoes().await;
    assert_eq!(stage.asked(), [id]);
}

/// `CA_CERT_WATCHER=false`.
#[tokio::test]
async fn without_the_watcher_new_trust_roots_wait_for_the_next_connection() {
    let stage = Stage::new();
    let life = Duration::from_secs(8);
    stage.istiod.sign_for_at_most(life);
    let unwatched = |options: ProxyOptions| options.env("CA_CERT_WATCHER", "false");
    let _run = stage.start_with(unwatched).await;
    let id = stage.pods[0].spiffe_id();
    let first = stage.istiod.certified(&id, 1).await[0].connection;
    stage.istiod.replace_root().unwrap();
    let renewed = stage.istiod.certified_within(2 * life, &id, 2).await;
    assert_eq!(renewed[1].connection, first, "it is used on");
    stage.istiod.cut();
    let renewed = stage.istiod.certified_within(2 * life, &id, 3).await;
    assert_ne!(renewed[2].connection, first, "made with the new roots");
}
