//! Workloads that the mesh knows by a host name only.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a panic is a failed test"
)]

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use hickory_proto::rr::{
    RData, Record, RecordType,
    rdata::{A, AAAA},
};
use testkit::{
    Cluster, Mesh, Pod, PodSpec, ProxyOptions, World,
    dns::{self, Dnsmasq, Scripted},
    mesh::{Ports, Workload},
    raw::RawServer,
    stage::UPSTREAM,
    traffic::{self, Behaviour},
    wait,
};

/// `web` calls; `outside`, on the other node, is known to the mesh by names alone.
struct Stage {
    world: World,
    web: Arc<Pod>,
    outside: Arc<Pod>,
}

const V4: &str = "10.96.0.1";
const V6: &str = "fd96::1";

impl Stage {
    fn new() -> Self {
        let world = World::new(2).unwrap();
        Self {
            web: world.node(0).pod(&PodSpec::captured("web")).unwrap(),
            outside: world.node(1).pod(&PodSpec::plain("outside")).unwrap(),
            world,
        }
    }

    /// A service `ext` whose one endpoint is a host name.
    fn mesh(&self, hostname: &str) -> Mesh {
        let mut mesh = Mesh::of(&[&self.web]);
        let service = mesh.service("ext", V4.parse().unwrap(), &[(80, 8080)], &[]);
        service.vips.push(format!("/{V6}"));
        mesh.workloads.push(self.named(hostname));
        let services = &mut mesh.workloads.last_mut().unwrap().services;
        let key = "shop/ext.shop.svc.cluster.local".to_owned();
        services.insert(key, Ports::from([(80, 8080)]));
        mesh
    }

    /// The record of `outside` under a host name.
    fn named(&self, hostname: &str) -> Workload {
        let mut workload = Workload::of(&self.outside);
        workload.workload_ips.clear();
        workload.set("hostname", hostname);
        workload
    }

    async fn start(&self, mesh: &Mesh) -> Cluster<'_> {
        mesh.write(&ProxyOptions::mesh_file(&self.world)).unwrap();
        let resolv_conf = self.world.file("resolv.conf");
        let text = format!("nameserver {UPSTREAM}\nsearch cell.example\noptions ndots:5\n");
        std::fs::write(&resolv_conf, text).unwrap();
        let options = |node: &testkit::Node| {
            ProxyOptions::new(&self.world, node).resolv_conf(resolv_conf.clone())
        };
        Cluster::run(&self.world, options, &[&self.web])
            .await
            .unwrap()
    }

    async fn dnsmasq(&self, records: &[String]) -> Dnsmasq {
        let netns = self.world.node(0).netns();
        let started = Dnsmasq::start(netns, &[UPSTREAM], "cell.example", records).await;
        started.unwrap()
    }

    async fn seen_at(&self, vip: &str) -> Option<IpAddr> {
        let to = SocketAddr::new(vip.parse().unwrap(), 80);
        Some(self.web.seen_as(to).await.ok()?.ip())
    }
}

#[tokio::test]
async fn a_host_name_is_dialled_in_the_family_that_the_application_chose() {
    let stage = Stage::new();
    let (ip4, ip6) = (stage.outside.ip4(), stage.outside.ip6());
    let records = [
        format!("host-record=both.cell.example,{ip4},{ip6}"),
        format!("host-record=six.cell.example,{ip6}"),
    ];
    let _dns = stage.dnsmasq(&records).await;
    let mut mesh = stage.mesh("both.cell.example");
    let cluster = stage.start(&mesh).await;
    let _app = stage.outside.serve(8080, Behaviour::Whoami).unwrap();
    assert_eq!(stage.seen_at(V4).await, Some(stage.web.ip4()));
    assert_eq!(stage.seen_at(V6).await, Some(stage.web.ip6()));
    let labels = [
        ("hostname", "both.cell.example"),
        ("source_workload", "web-deploy"),
    ];
    let resolved = "istio_on_demand_dns_total";
    cluster
        .proxy(0)
        .metric(resolved, &labels, |count| count == 2.0)
        .await;

    // Where the family of the address is not to be had, the other one serves; a short name is looked for in the search list.
    for name in ["six.cell.example", "six"] {
        mesh.workloads.last_mut().unwrap().set("hostname", name);
        mesh.write(&cluster.mesh_file).unwrap();
        let serves = async || (stage.seen_at(V4).await? == stage.web.ip6()).then_some(());
        wait::until(wait::SOON, name, serves).await;
    }
}

#[tokio::test]
async fn a_name_without_an_address_ends_the_connection_and_says_why() {
    let stage = Stage::new();
    let _dns = stage.dnsmasq(&[]).await;
    let cluster = stage.start(&stage.mesh("nobody.cell.example")).await;
    let to = SocketAddr::new(V4.parse().unwrap(), 80);
    stage.web.turned_away(to).await.unwrap();
    let log = cluster.proxy(0).log();
    let line = log
        .wait("the refusal", |line| line.is_access("connection failed"))
        .await;
    let error = line.field("error");
    assert!(
        error.starts_with("no ip addresses were resolved for workload: "),
        "{error}"
    );
    assert!(
        error.contains("cannot resolve nobody.cell.example"),
        "{error}"
    );
}

/// Whoever has the names below the search list of the proxy has no say about other names.
#[tokio::test]
async fn a_full_name_is_not_looked_for_in_the_search_list() {
    let stage = Stage::new();
    let ip4 = stage.outside.ip4();
    let record = format!("host-record=api.corp.example.cell.example,{ip4}");
    let _dns = stage.dnsmasq(&[record]).await;
    let mut mesh = stage.mesh("api.corp.example");
    let cluster = stage.start(&mesh).await;
    let _app = stage.outside.serve(8080, Behaviour::Whoami).unwrap();
    let to = SocketAddr::new(V4.parse().unwrap(), 80);
    stage.web.turned_away(to).await.unwrap();
    let full = "api.corp.example.cell.example";
    mesh.workloads.last_mut().unwrap().set("hostname", full);
    mesh.write(&cluster.mesh_file).unwrap();
    let serves = async || stage.seen_at(V4).await;
    wait::until(wait::SOON, "the name that there is", serves).await;
}

#[tokio::test]
async fn connections_that_ask_at_once_share_an_answer_and_later_ones_its_memory() {
    let stage = Stage::new();
    let (IpAddr::V4(ip4), IpAddr::V6(ip6)) = (stage.outside.ip4(), stage.outside.ip6()) else {
        unreachable!()
    };
    // Slow, so that all connections meet the question under way.
    let reply = move |asked: &dns::Asked| {
        let reply = dns::answer(&asked.bytes, |message| {
            let query = message.queries[0].clone();
            let data = if query.query_type() == RecordType::A {
                RData::A(A(ip4))
            } else {
                RData::AAAA(AAAA(ip6))
            };
            message.add_answer(Record::from_rdata(query.name().clone(), 60, data));
        });
        vec![(Duration::from_millis(300), reply)]
    };
    let netns = stage.world.node(0).netns();
    let server = Scripted::start(netns, SocketAddr::new(UPSTREAM, 53), reply).unwrap();
    let _cluster = stage.start(&stage.mesh("slow.cell.example")).await;
    let _app = stage.outside.serve(8080, Behaviour::Whoami).unwrap();
    let calls = (0..30).map(|_| stage.seen_at(V4));
    for seen in futures_util::future::join_all(calls).await {
        assert_eq!(seen, Some(stage.web.ip4()));
    }
    // A question that is put again because the answer is late keeps its id.
    let ids = || -> BTreeSet<[u8; 2]> {
        let asked = server.asked().into_iter();
        asked.map(|one| [one.bytes[0], one.bytes[1]]).collect()
    };
    let questions = ids();
    assert_eq!(questions.len(), 2, "one for each family");
    assert_eq!(stage.seen_at(V4).await, Some(stage.web.ip4()));
    assert_eq!(ids(), questions);
}

#[tokio::test]
async fn a_waypoint_may_be_known_by_a_host_name_too() {
    let stage = Stage::new();
    let record = format!("host-record=waypoint.cell.example,{}", stage.outside.ip4());
    let _dns = stage.dnsmasq(&[record]).await;
    let mut mesh = Mesh::of(&[&stage.web]);
    let mut waypoint = stage.named("waypoint.cell.example");
    waypoint.protocol = "HBONE".to_owned();
    mesh.workloads.push(waypoint);
    let service = mesh.service("ext", V4.parse().unwrap(), &[(80, 8080)], &[]);
    let reference = "{destination: 'shop/waypoint.cell.example', hboneMtlsPort: 15008}";
    service.set("waypoint", reference);
    let _cluster = stage.start(&mesh).await;
    let authority = stage.world.authority();
    let identity = authority.issue(&stage.outside.spiffe_id()).unwrap();
    let server = RawServer::listen(&stage.outside, &identity, authority.root()).unwrap();
    let to = SocketAddr::new(V4.parse().unwrap(), 80);
    let (call, connection) = tokio::join!(stage.web.connect(to), server.accept());
    let (mut call, mut connection) = (call.unwrap(), connection.unwrap());
    let incoming = connection.next().await.unwrap();
    assert_eq!(incoming.authority(), format!("{V4}:80"));
    let mut echo = tokio::task::JoinSet::new();
    echo.spawn(incoming.echo());
    traffic::ping(&mut call, b"by name").await.unwrap();
}

/// What leads to another network may be known by a host name: it is resolved, and the tunnel inside is as ever.
#[tokio::test]
async fn a_gateway_may_be_known_by_a_host_name_too() {
    let stage = Stage::new();
    let record = format!("host-record=gateway.cell.example,{}", stage.outside.ip4());
    let _dns = stage.dnsmasq(&[record]).await;
    let mut gateway = stage.named("gateway.cell.example");
    gateway.protocol = "HBONE".to_owned();
    gateway.set("network", "west");
    let mut mesh = stage.mesh("unused.example");
    let behind = mesh.workloads.last_mut().unwrap();
    behind.uid.push_str("-behind");
    behind.protocol = "HBONE".to_owned();
    behind.set("hostname", "''");
    behind.set("network", "west");
    behind.set(
        "networkGateway",
        "{destination: 'shop/gateway.cell.example', hboneMtlsPort: 15008}",
    );
    mesh.workloads.push(gateway);
    let far_id = "spiffe://cluster.local/ns/shop/sa/far";
    let service = mesh.services.last_mut().unwrap();
    service.set("subjectAltNames", &format!("[{far_id}]"));
    let _cluster = stage.start(&mesh).await;

    let authority = stage.world.authority();
    let listen = |id: &str, port| {
        let identity = authority.issue(id).unwrap();
        RawServer::listen_on(&stage.outside, port, &identity, authority.root()).unwrap()
    };
    let (border, far) = (
        listen(&stage.outside.spiffe_id(), 15008),
        listen(far_id, 15018),
    );
    let to = SocketAddr::new(V4.parse().unwrap(), 80);
    let mut tasks = tokio::task::JoinSet::new();
    let pass_on = async {
        let mut connection = border.accept().await.unwrap();
        let incoming = connection.next().await.unwrap();
        assert_eq!(incoming.authority(), "ext.shop.svc.cluster.local:80");
        let onward = stage.outside.connect(stage.outside.at(15018)).await;
        tasks.spawn(incoming.join(onward.unwrap()));
        connection
    };
    let (call, _border, inner) = tokio::join!(stage.web.connect(to), pass_on, far.accept());
    let (mut call, mut inner) = (call.unwrap(), inner.unwrap());
    assert_eq!(inner.client_id, Some(stage.web.spiffe_id()));
    let incoming = inner.next().await.unwrap();
    assert_eq!(incoming.authority(), "ext.shop.svc.cluster.local:80");
    tasks.spawn(incoming.echo());
    traffic::ping(&mut call, b"by name").await.unwrap();
}
