//! Certificates that count no longer: at the handshake, and for tunnels that are open.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a panic is a failed test"
)]

use std::{fs, path::PathBuf, time::Duration};

use testkit::{
    Authority, Cluster, Identity, Mesh, PodSpec, World,
    logs::Line,
    proxy::Proxy,
    raw::{Hello, RawServer},
    stage::ForeignClient,
    traffic::{self, Behaviour},
    wait,
};

/// Where the lists of a world are.
fn lists(world: &World) -> PathBuf {
    world.file("ca-crl.pem")
}

/// Puts a list in place as a mounted volume does: all at once.
fn publish(world: &World, content: &str) {
    let next = world.file("ca-crl.next");
    fs::write(&next, content).unwrap();
    fs::rename(next, lists(world)).unwrap();
}

async fn cluster(foreign: &ForeignClient) -> Cluster<'_> {
    let path = lists(&foreign.world).display().to_string();
    foreign.cluster_with(&[("CRL_PATH", &path)]).await.unwrap()
}

async fn reloads(proxy: &Proxy<'_>, result: &str, count: f64) {
    let labels = [("result", result)];
    proxy
        .metric("istio_crl_reloads_total", &labels, |it| it >= count)
        .await;
}

/// Waits for the end of one flow, as cut by the proxy on this side.
async fn cut(proxy: &Proxy<'_>, mark: usize, reporter: &str) {
    let ended = |line: &Line| line.is_access("connection complete");
    let line = proxy.log().wait_from(mark, "the flow's end", ended).await;
    let error = "connection closed: peer certificate revoked by CRL";
    assert_eq!(line.field("error"), error);
    let labels = [("response_flags", "CERT_REVOKED"), ("reporter", reporter)];
    let failed = "istio_tcp_connections_failed_total";
    proxy.metric(failed, &labels, |it| it == 1.0).await;
}

async fn rejections(proxy: &Proxy<'_>, reporter: &str) -> f64 {
    let metrics = proxy.metrics().await.unwrap();
    let labels = [("reporter", reporter)];
    metrics.sum("istio_crl_policy_rejections_total", &labels)
}

/// A leaf below an intermediate, with the chain that a peer presents.
fn below(intermediate: &Authority, id: &str) -> Identity {
    let mut identity = intermediate.issue(id).unwrap();
    identity.chain.push(intermediate.root().clone());
    identity
}

#[tokio::test]
async fn a_client_that_is_revoked_is_cut_and_others_stay() {
    let foreign = ForeignClient::new().unwrap();
    let authority = foreign.world.authority();
    let id = foreign.peer.spiffe_id();
    let cluster = cluster(&foreign).await;
    let proxy = cluster.proxy(0);
    reloads(proxy, "failed", 1.0).await;
    let _app = foreign.api.serve(8080, Behaviour::Echo).unwrap();
    let intermediate = authority.subordinate("intermediate").unwrap();
    let (leaf, nested) = (authority.issue(&id).unwrap(), below(&intermediate, &id));
    let short = authority.issue_for(&id, Duration::from_secs(4)).unwrap();

    let mut tunnels = Vec::new();
    for identity in [&leaf, &nested, &short] {
        let client = foreign.try_client(&Hello::new(identity)).await.unwrap();
        let mut tunnel = client.tunnel(&foreign.target(8080)).await.unwrap();
        tunnel.ping(b"before").await.unwrap();
        tunnels.push((client, tunnel));
    }
    let mark = proxy.log().mark();
    publish(&foreign.world, &authority.crl(&[&leaf.chain[0]]).unwrap());
    tunnels[0].0.ended(wait::SOON).await.unwrap();
    assert!(tunnels[0].1.ping(b"after").await.is_err());
    cut(proxy, mark, "destination").await;
    for (_, tunnel) in &mut tunnels[1..] {
        tunnel.ping(b"unrelated").await.unwrap();
    }
    assert_eq!(rejections(proxy, "destination").await, 1.0);
    assert!(foreign.try_client(&Hello::new(&leaf)).await.is_err());
    assert_eq!(rejections(proxy, "destination").await, 2.0);

    let expired = Hello::new(&short);
    wait::until(wait::SOON, "the third has expired", async || {
        foreign.try_client(&expired).await.is_err().then_some(())
    })
    .await;
    publish(
        &foreign.world,
        &authority
            .crl(&[&leaf.chain[0], intermediate.root()])
            .unwrap(),
    );
    tunnels[1].0.ended(wait::SOON).await.unwrap();
    assert!(foreign.try_client(&Hello::new(&nested)).await.is_err());
    tunnels[2]
        .1
        .ping(b"expired since, not revoked")
        .await
        .unwrap();
    assert_eq!(rejections(proxy, "destination").await, 4.0);
}

#[tokio::test]
async fn a_list_is_enforced_whatever_was_there_before() {
    let foreign = ForeignClient::new().unwrap();
    let authority = foreign.world.authority();
    publish(&foreign.world, "garbage");
    let cluster = cluster(&foreign).await;
    let proxy = cluster.proxy(0);
    reloads(proxy, "failed", 1.0).await;
    let _warned = proxy
        .log()
        .wait("a warning", |line| {
            line.level == "warn" && line.message.contains("revocation lists stay as they were")
        })
        .await;
    let leaf = authority.issue(&foreign.peer.spiffe_id()).unwrap();
    let hello = Hello::new(&leaf);
    drop(foreign.try_client(&hello).await.unwrap());
    publish(&foreign.world, &authority.crl(&[&leaf.chain[0]]).unwrap());
    reloads(proxy, "loaded", 1.0).await;
    assert!(foreign.try_client(&hello).await.is_err());
    publish(&foreign.world, "-----BEGIN X509 CRL-----\ntorn");
    reloads(proxy, "failed", 2.0).await;
    assert!(foreign.try_client(&hello).await.is_err(), "the list stays");
    drop(foreign.client().await);
    publish(&foreign.world, "");
    reloads(proxy, "loaded", 2.0).await;
    drop(foreign.try_client(&hello).await.unwrap());
}

#[tokio::test]
async fn a_revoked_certificate_of_a_pod_here_is_replaced_at_once() {
    let foreign = ForeignClient::new().unwrap();
    let authority = foreign.world.authority();
    let cluster = cluster(&foreign).await;
    let client = foreign.client().await;
    let before = &client.server_chain[0];
    publish(&foreign.world, &authority.crl(&[before]).unwrap());
    let told = |line: &Line| {
        let api = foreign.api.spiffe_id();
        line.field("id") == api && line.message.starts_with("the certificate is revoked")
    };
    let log = cluster.proxy(0).log();
    let line = log.wait("whose certificate it is", told).await;
    assert_eq!(line.level, "warn");
    wait::until(wait::SOON, "another one", async || {
        let now = foreign.client().await;
        (now.server_chain[0] != *before).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_server_that_is_revoked_is_cut_and_not_dialled_again() {
    let world = World::new(1).unwrap();
    let web = world.node(0).pod(&PodSpec::captured("web")).unwrap();
    let peer = world.node(0).pod(&PodSpec::plain("peer")).unwrap();
    let mut mesh = Mesh::of(&[&web]);
    mesh.pod(&peer).protocol = "HBONE".to_owned();
    let path = lists(&world).display().to_string();
    let env = [("CRL_PATH", path.as_str())].into_iter().collect();
    let cluster = Cluster::start_with(&world, &mesh, &[&web], &env)
        .await
        .unwrap();
    let proxy = cluster.proxy(0);
    let identity = world.authority().issue(&peer.spiffe_id()).unwrap();
    let server = RawServer::listen(&peer, &identity, world.authority().root()).unwrap();

    let (call, connection) = tokio::join!(web.connect(peer.at(8080)), server.accept());
    let (mut call, mut connection) = (call.unwrap(), connection.unwrap());
    let mut echoes = tokio::task::JoinSet::new();
    echoes.spawn(connection.next().await.unwrap().echo());
    traffic::ping(&mut call, b"before").await.unwrap();
    let mark = proxy.log().mark();
    publish(
        &world,
        &world.authority().crl(&[&identity.chain[0]]).unwrap(),
    );
    connection.ended(wait::SOON).await.unwrap();
    traffic::closed(&mut call, wait::SOON).await.unwrap();
    cut(proxy, mark, "source").await;
    assert_eq!(rejections(proxy, "source").await, 1.0);

    let (refused, accepted) = tokio::join!(web.connect(peer.at(8080)), server.accept());
    assert!(accepted.is_err(), "a revoked server was taken");
    traffic::closed(&mut refused.unwrap(), wait::SOON)
        .await
        .unwrap();
    assert_eq!(rejections(proxy, "source").await, 2.0);
}
