//! Whom the proxy trusts: roots that come and go, and what else a handshake must show.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a panic is a failed test"
)]

use std::{fs, os::unix::fs::symlink, path::PathBuf};

use rustls::crypto::aws_lc_rs::kx_group;
use testkit::{
    Authority, Cluster, Identity, Mesh, Pod, PodSpec, World,
    proxy::Proxy,
    raw::{Hello, RawServer},
    stage::ForeignClient,
    traffic::{self, Behaviour},
    wait,
};
use tokio::io::AsyncReadExt as _;

/// A volume that holds roots, as Kubernetes mounts a ConfigMap.
struct Volume(PathBuf);

impl Volume {
    fn new(world: &World) -> Self {
        let volume = world.file("roots");
        fs::create_dir(&volume).unwrap();
        symlink("..data/root-cert.pem", volume.join("root-cert.pem")).unwrap();
        Self(volume)
    }

    fn path(&self) -> String {
        self.0.join("root-cert.pem").display().to_string()
    }

    /// Swaps the content by a symbolic link.
    fn publish(&self, version: &str, content: &str) {
        fs::create_dir(self.0.join(version)).unwrap();
        fs::write(self.0.join(version).join("root-cert.pem"), content).unwrap();
        symlink(version, self.0.join("next")).unwrap();
        fs::rename(self.0.join("next"), self.0.join("..data")).unwrap();
    }
}

async fn roots(proxy: &Proxy<'_>, family: &str, count: f64) {
    let name = format!("istio_trust_bundle_{family}");
    proxy
        .metric(&name, &[("source", "file")], |it| it == count)
        .await;
}

#[tokio::test]
async fn roots_of_the_file_come_and_go_without_new_certificates() {
    let foreign = ForeignClient::new().unwrap();
    let (old, new) = (foreign.world.authority(), Authority::new("new").unwrap());
    let volume = Volume::new(&foreign.world);
    let env = [
        ("TRUST_BUNDLE_PATH", &*volume.path()),
        ("TRUST_BUNDLE_GRACE", "0s"),
    ];
    let cluster = foreign.cluster_with(&env).await.unwrap();
    let proxy = cluster.proxy(0);
    let _app = foreign.api.serve(8080, Behaviour::Echo).unwrap();
    let newcomer = Hello::new(&new.issue(&foreign.peer.spiffe_id()).unwrap());
    let established = foreign.client().await;
    let mut tunnel = established.tunnel(&foreign.target(8080)).await.unwrap();
    let first = foreign
        .tls()
        .await
        .get_ref()
        .1
        .peer_certificates()
        .unwrap()
        .to_vec();
    assert!(foreign.try_client(&newcomer).await.is_err());

    volume.publish("1", &format!("{}{}", old.root_pem(), new.root_pem()));
    roots(proxy, "roots", 2.0).await;
    let mut taken = foreign.try_client(&newcomer).await.unwrap();
    let mut through = taken.tunnel(&foreign.target(8080)).await.unwrap();
    through.ping(b"new root").await.unwrap();
    let second = foreign
        .tls()
        .await
        .get_ref()
        .1
        .peer_certificates()
        .unwrap()
        .to_vec();
    assert_eq!(first, second, "the own certificate is the same");

    volume.publish("2", "garbage");
    roots(proxy, "failures_total", 2.0).await;
    drop(foreign.try_client(&newcomer).await.unwrap());

    volume.publish("3", old.root_pem());
    roots(proxy, "roots", 1.0).await;
    assert!(
        foreign.try_client(&newcomer).await.is_err(),
        "its root has gone"
    );
    through.ping(b"live connections stay").await.unwrap();
    tunnel.ping(b"all of them").await.unwrap();
    assert!(
        taken
            .ended(std::time::Duration::from_millis(100))
            .await
            .is_err()
    );
}

#[tokio::test]
async fn a_root_that_left_is_trusted_for_the_grace() {
    let foreign = ForeignClient::new().unwrap();
    let other = Authority::new("other").unwrap();
    let volume = Volume::new(&foreign.world);
    volume.publish("1", other.root_pem());
    let env = [
        ("TRUST_BUNDLE_PATH", &*volume.path()),
        ("TRUST_BUNDLE_GRACE", "5s"),
    ];
    let cluster = foreign.cluster_with(&env).await.unwrap();
    let proxy = cluster.proxy(0);
    let hello = Hello::new(&other.issue(&foreign.peer.spiffe_id()).unwrap());
    roots(proxy, "roots", 1.0).await;
    drop(foreign.try_client(&hello).await.unwrap());
    volume.publish("2", foreign.world.authority().root_pem());
    roots(proxy, "leaving_roots", 1.0).await;
    drop(foreign.try_client(&hello).await.unwrap());
    roots(proxy, "leaving_roots", 0.0).await;
    assert!(foreign.try_client(&hello).await.is_err());
}

#[tokio::test]
async fn trust_domains_are_an_opt_in() {
    let foreign = ForeignClient::new().unwrap();
    let alias = [("TRUST_DOMAINS", "old.example, older.example")];
    let _cluster = foreign.cluster_with(&alias).await.unwrap();
    let _app = foreign.api.serve(8080, Behaviour::Echo).unwrap();
    let authority = foreign.world.authority();
    for domain in ["old.example", "older.example"] {
        let id = format!("spiffe://{domain}/ns/shop/sa/peer");
        let hello = Hello::new(&authority.issue(&id).unwrap());
        let client = foreign.try_client(&hello).await.unwrap();
        let mut tunnel = client.tunnel(&foreign.target(8080)).await.unwrap();
        tunnel.ping(b"hello").await.unwrap();
    }
    let id = "spiffe://else.example/ns/shop/sa/peer";
    let hello = Hello::new(&authority.issue(id).unwrap());
    assert!(foreign.try_client(&hello).await.is_err());
}

#[tokio::test]
async fn a_peer_with_more_certificates_than_make_sense_is_refused() {
    let foreign = ForeignClient::new().unwrap();
    let _cluster = foreign.cluster().await.unwrap();
    let authority = foreign.world.authority();
    let mut identity = authority.issue(&foreign.peer.spiffe_id()).unwrap();
    let filler = authority.subordinate("filler").unwrap();
    identity
        .chain
        .extend(std::iter::repeat_n(filler.root().clone(), 12));
    drop(foreign.try_client(&Hello::new(&identity)).await.unwrap());
    identity.chain.push(filler.root().clone());
    assert!(foreign.try_client(&Hello::new(&identity)).await.is_err());
}

#[tokio::test]
async fn every_handshake_is_full_and_every_name_gets_the_same_certificate() {
    let foreign = ForeignClient::new().unwrap();
    let _cluster = foreign.cluster().await.unwrap();
    let mut chains = Vec::new();
    let hello = foreign.hello();
    for hello in [hello.clone(), hello.server_name("another.example")] {
        let connected = hello.connect(foreign.peer.netns(), foreign.hbone());
        let mut stream = connected.await.unwrap();
        let mut settings = [0; 9];
        stream.read_exact(&mut settings).await.unwrap();
        let session = stream.get_ref().1;
        assert_eq!(session.handshake_kind(), Some(rustls::HandshakeKind::Full));
        assert_eq!(session.tls13_tickets_received(), 0);
        chains.push(session.peer_certificates().unwrap().to_vec());
    }
    assert_eq!(chains[0], chains[1]);
}

#[tokio::test]
async fn the_policy_for_quantum_computers_leaves_one_group() {
    let foreign = ForeignClient::new().unwrap();
    let _cluster = foreign
        .cluster_with(&[("COMPLIANCE_POLICY", "pqc")])
        .await
        .unwrap();
    let hybrid = foreign.hello().groups(&[kx_group::X25519MLKEM768]);
    drop(foreign.try_client(&hybrid).await.unwrap());
    let classic = [kx_group::X25519, kx_group::SECP256R1, kx_group::SECP384R1];
    let error = foreign.try_client(&foreign.hello().groups(&classic)).await;
    let error = format!("{:#}", error.unwrap_err());
    assert!(error.contains("HandshakeFailure"), "{error}");
}

#[tokio::test]
async fn a_client_that_says_nothing_loses_its_socket() {
    let foreign = ForeignClient::new().unwrap();
    let _cluster = foreign.cluster().await.unwrap();
    let mut silent = traffic::connect(foreign.peer.netns(), foreign.hbone())
        .await
        .unwrap();
    let limit = std::time::Duration::from_secs(15);
    traffic::closed(&mut silent, limit).await.unwrap();
}

/// `web` dials `peer`, which presents any certificate.
struct Dialled {
    world: World,
    web: std::sync::Arc<Pod>,
    peer: std::sync::Arc<Pod>,
}

impl Dialled {
    fn new() -> Self {
        let world = World::new(1).unwrap();
        let web = world.node(0).pod(&PodSpec::captured("web")).unwrap();
        let peer = world.node(0).pod(&PodSpec::plain("peer")).unwrap();
        Self { world, web, peer }
    }

    async fn cluster(&self, env: &[(&str, &str)]) -> Cluster<'_> {
        let mut mesh = Mesh::of(&[&self.web]);
        mesh.pod(&self.peer).protocol = "HBONE".to_owned();
        let env = env.iter().copied().collect();
        Cluster::start_with(&self.world, &mesh, &[&self.web], &env)
            .await
            .unwrap()
    }

    fn server(&self, identity: &Identity) -> RawServer {
        RawServer::listen(&self.peer, identity, self.world.authority().root()).unwrap()
    }

    /// Whether the proxy takes the server.
    async fn takes(&self, server: &RawServer) -> bool {
        let (call, accepted) = tokio::join!(self.web.connect(self.peer.at(8080)), server.accept());
        drop(call);
        accepted.is_ok()
    }
}

#[tokio::test]
async fn a_server_of_another_identity_is_named_with_what_was_expected() {
    let dialled = Dialled::new();
    let cluster = dialled.cluster(&[]).await;
    let proxy = cluster.proxy(0);
    let other = "spiffe://cluster.local/ns/shop/sa/mallory";
    let server = dialled.server(&dialled.world.authority().issue(other).unwrap());
    assert!(!dialled.takes(&server).await);
    let line = proxy
        .log()
        .wait("the refusal", |line| line.is_access("connection complete"))
        .await;
    let expected = dialled.peer.spiffe_id();
    let wanted = format!("peer did not present the expected SAN ({expected}), got {other}");
    assert!(line.field("error").contains(&wanted), "{}", line.raw);
}

#[tokio::test]
async fn a_server_under_a_root_of_the_file_is_taken() {
    let dialled = Dialled::new();
    let volume = Volume::new(&dialled.world);
    let cluster = dialled
        .cluster(&[("TRUST_BUNDLE_PATH", &volume.path())])
        .await;
    let new = Authority::new("new").unwrap();
    let server = dialled.server(&new.issue(&dialled.peer.spiffe_id()).unwrap());
    assert!(!dialled.takes(&server).await);
    volume.publish("1", new.root_pem());
    roots(cluster.proxy(0), "roots", 1.0).await;
    let what = "the server is taken";
    wait::until(wait::SOON, what, async || {
        dialled.takes(&server).await.then_some(())
    })
    .await;
}
