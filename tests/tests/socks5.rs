//! Connections that applications ask for by SOCKS5.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a panic is a failed test"
)]

use std::net::{IpAddr, SocketAddr};

use testkit::{
    Cluster, Mesh, Pod,
    stage::Named,
    traffic::{self, Behaviour},
    wait,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

const VIP: &str = "10.96.0.1";
const PORT: u16 = 15080;

/// `web` asks for a service of `shopper`.
async fn start<'a>(stage: &'a Named, mesh: &Mesh, dns: &str) -> Cluster<'a> {
    let options = stage
        .options()
        .env("UNSTABLE_ENABLE_SOCKS5", "true")
        .env("ISTIO_META_DNS_CAPTURE", dns)
        .env("RUST_LOG", "info,access=debug");
    stage.start_with(mesh, &options).await.unwrap()
}

fn mesh(stage: &Named) -> Mesh {
    let mut mesh = stage.mesh();
    mesh.service(
        "api",
        VIP.parse().unwrap(),
        &[(80, 8080)],
        &[&stage.shopper],
    );
    mesh
}

/// Asks for this address in the protocol's form; yields the connection and the code of the answer.
async fn ask(pod: &Pod, kind: u8, address: &[u8], port: u16) -> (TcpStream, u8) {
    let at = SocketAddr::new(IpAddr::from([127, 0, 0, 1]), PORT);
    let mut stream = pod.connect(at).await.unwrap();
    let request = [&[5, 1, 0, 5, 1, 0, kind][..], address, &port.to_be_bytes()].concat();
    stream.write_all(&request).await.unwrap();
    let mut answer = [0; 12];
    let read = stream.read_exact(&mut answer);
    wait::soon("an answer", read).await.unwrap();
    (stream, answer[3])
}

async fn ask_name(pod: &Pod, name: &str) -> (TcpStream, u8) {
    let length = u8::try_from(name.len()).unwrap();
    ask(pod, 3, &[&[length], name.as_bytes()].concat(), 80).await
}

#[tokio::test]
async fn addresses_and_names_lead_where_a_connection_of_the_pod_would() {
    let stage = Named::new().unwrap();
    let cluster = start(&stage, &mesh(&stage), "true").await;
    let _app = stage.shopper.serve(8080, Behaviour::Echo).unwrap();
    let (mut by_address, code) = ask(&stage.web, 1, &[10, 96, 0, 1], 80).await;
    assert_eq!(code, 0);
    traffic::ping(&mut by_address, b"by address").await.unwrap();
    for name in ["api.shop.svc.cluster.local", "api.shop", "api"] {
        let (mut by_name, code) = ask_name(&stage.web, name).await;
        assert_eq!(code, 0, "{name}");
        traffic::ping(&mut by_name, name.as_bytes()).await.unwrap();
    }
    drop(by_address);
    let log = cluster.proxy(0).log();
    let line = log
        .wait("outbound line", |line| {
            line.is_access("connection complete") && line.field("direction") == "outbound"
        })
        .await;
    assert_eq!(line.field("src.identity"), stage.web.spiffe_id());
    assert_eq!(
        line.field("dst.hbone_addr"),
        stage.shopper.at(8080).to_string()
    );
    assert_eq!(line.field("dst.service"), "api.shop.svc.cluster.local");
}

#[tokio::test]
async fn what_cannot_be_had_is_refused_by_its_code_or_closed() {
    let stage = Named::new().unwrap();
    let _dns = stage.dnsmasq("up.example", &[]).await.unwrap();
    let cluster = start(&stage, &mesh(&stage), "true").await;
    let (_, code) = ask_name(&stage.web, "nobody.up.example").await;
    assert_eq!(code, 4, "host unreachable");
    // The answer comes before the connection: what fails then is closed.
    for (port, reason) in [
        (PORT, "attempted recursive call to ourselves"),
        (15001, "attempted recursive call to ourselves"),
    ] {
        let (mut stream, code) = ask(&stage.web, 1, &[127, 0, 0, 1], port).await;
        assert_eq!(code, 0);
        traffic::closed(&mut stream, wait::SOON).await.unwrap();
        let refused = |line: &testkit::Line| line.field("error").contains(reason);
        cluster.proxy(0).log().wait(reason, refused).await;
    }
    let (mut stream, _) = ask(&stage.web, 1, &[10, 96, 0, 1], 81).await;
    traffic::closed(&mut stream, wait::SOON).await.unwrap();
    // Nobody else reaches the port.
    let from_outside = stage.desk.connect(stage.web.at(PORT)).await;
    if let Ok(mut stream) = from_outside {
        traffic::closed(&mut stream, wait::SOON).await.unwrap();
    }
}

#[tokio::test]
async fn without_names_addresses_are_served_and_without_the_switch_nothing() {
    let stage = Named::new().unwrap();
    let cluster = start(&stage, &mesh(&stage), "false").await;
    let _app = stage.shopper.serve(8080, Behaviour::Echo).unwrap();
    let (mut stream, _) = ask(&stage.web, 1, &[10, 96, 0, 1], 80).await;
    traffic::ping(&mut stream, b"by address").await.unwrap();
    let (_, code) = ask_name(&stage.web, "api.shop").await;
    assert_eq!(code, 1, "general failure");
    drop(cluster);
    let _cluster = stage.start(&mesh(&stage)).await.unwrap();
    let at = SocketAddr::new(IpAddr::from([127, 0, 0, 1]), PORT);
    assert!(stage.web.connect(at).await.is_err());
}
