//! Where connections of a captured pod go.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a panic is a failed test"
)]

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use testkit::{
    Capture, Cluster, Line, Mesh, Pod, PodSpec, World,
    mesh::Ports,
    raw::{Hello, RawClient},
    stage::ForeignClient,
    traffic::{Behaviour, Server},
    wait,
};

/// `web` calls; `near` is on its node, `far` on the other.
struct Stage {
    world: World,
    web: Arc<Pod>,
    near: Arc<Pod>,
    far: Arc<Pod>,
}

impl Stage {
    fn new() -> Self {
        let world = World::new(2).unwrap();
        let web = world.node(0).pod(&PodSpec::captured("web")).unwrap();
        let near = world.node(0).pod(&PodSpec::captured("near")).unwrap();
        let far = world.node(1).pod(&PodSpec::captured("far")).unwrap();
        Self {
            world,
            web,
            near,
            far,
        }
    }

    fn mesh(&self) -> Mesh {
        Mesh::of(&[&self.web, &self.near, &self.far])
    }

    async fn start(&self, mesh: &Mesh) -> Cluster<'_> {
        Cluster::start(&self.world, mesh, &[&self.web, &self.near, &self.far])
            .await
            .unwrap()
    }

    /// Calls and says which pod answered, told by the servers' counts.
    async fn answered(&self, to: SocketAddr, near: &Server, far: &Server) -> Option<&'static str> {
        let before = (near.peers().len(), far.peers().len());
        self.web
            .ask(to, b"hello")
            .await
            .ok()
            .filter(|answer| answer == b"hello")?;
        Some(if near.peers().len() > before.0 {
            "near"
        } else {
            assert!(far.peers().len() > before.1);
            "far"
        })
    }

    /// A connection that the proxy must close without an upstream.
    async fn refused(&self, cluster: &Cluster<'_>, to: SocketAddr, reason: &str) -> Line {
        let mark = cluster.proxy(0).log().mark();
        self.web.turned_away(to).await.unwrap();
        let refusal = cluster
            .proxy(0)
            .log()
            .wait_from(mark, reason, |line| line.is_access("connection failed"))
            .await;
        assert!(refusal.field("error").contains(reason), "{}", refusal.raw);
        refusal
    }
}

fn vip(last: u8) -> IpAddr {
    IpAddr::from([10, 96, 0, last])
}

fn at(last: u8, port: u16) -> SocketAddr {
    SocketAddr::new(vip(last), port)
}

/// The outbound access line of a connection that was dialled to this address.
async fn outbound(cluster: &Cluster<'_>, dialled: SocketAddr) -> Line {
    let (log, dialled) = (cluster.proxy(0).log(), dialled.to_string());
    log.wait("outbound line", |line| {
        line.is_access("connection complete")
            && line.field("direction") == "outbound"
            && line.field("dst.addr") == dialled
    })
    .await
}

#[tokio::test]
async fn unknown_and_plaintext_addresses_are_reached_by_plain_tcp() {
    let stage = Stage::new();
    let outside = stage.world.node(1).pod(&PodSpec::plain("outside")).unwrap();
    let host = stage.world.node(1).pod(&PodSpec::plain("host")).unwrap();
    let plain = stage.world.node(1).pod(&PodSpec::plain("plain")).unwrap();
    let mut mesh = stage.mesh();
    mesh.pod(&plain);
    let host_network = mesh.pod(&host);
    host_network.protocol = "HBONE".to_owned();
    host_network.set("networkMode", "HostNetwork");
    let cluster = stage.start(&mesh).await;
    for pod in [&outside, &host, &plain] {
        let app = pod.serve(7000, Behaviour::Whoami).unwrap();
        assert_eq!(
            stage.web.seen_as(app.address).await.unwrap().ip(),
            stage.web.ip4(),
            "{}",
            pod.name()
        );
        let line = outbound(&cluster, app.address).await;
        assert_eq!(line.field("dst.hbone_addr"), "", "{}", pod.name());
    }
}

#[tokio::test]
async fn a_service_address_leads_to_its_endpoint_and_target_port() {
    let stage = Stage::new();
    let mut mesh = stage.mesh();
    mesh.service("far", vip(1), &[(80, 8080)], &[&stage.far]);
    let cluster = stage.start(&mesh).await;
    let _app = stage.far.serve(8080, Behaviour::Whoami).unwrap();
    let wire = Capture::start(stage.world.link()).unwrap();
    assert_eq!(
        stage.web.seen_as(at(1, 80)).await.unwrap().ip(),
        stage.web.ip4()
    );
    let line = outbound(&cluster, stage.far.at(15008)).await;
    assert_eq!(line.field("dst.hbone_addr"), stage.far.at(8080).to_string());
    assert_eq!(line.field("dst.service"), "far.shop.svc.cluster.local");

    stage
        .refused(&cluster, at(1, 81), "no healthy upstream: 10.96.0.1:81")
        .await;
    let metrics = cluster.proxy(0).metrics().await.unwrap();
    let cause = [("reporter", "source"), ("reason", "no-healthy-upstream")];
    assert_eq!(metrics.sum("culvert_flows_refused_total", &cause), 1.0);
    assert_eq!(metrics.sum("culvert_flows_failed_total", &[]), 0.0);
    assert!(
        wire.packets(|packet| packet.to.ip() == vip(1)).is_empty(),
        "a packet left for the service address"
    );
}

#[tokio::test]
async fn health_is_minded_for_services_and_ignored_for_pod_addresses() {
    let stage = Stage::new();
    let mut mesh = stage.mesh();
    mesh.service("ready-only", vip(1), &[(80, 8080)], &[&stage.far]);
    let all = mesh.service("all", vip(2), &[(80, 8080)], &[&stage.far]);
    all.set(
        "loadBalancer",
        "{routingPreferences: [], mode: Standard, healthPolicy: AllowAll}",
    );
    mesh.workload(&stage.far).status = "Unhealthy".to_owned();
    let cluster = stage.start(&mesh).await;
    let app = stage.far.serve(8080, Behaviour::Whoami).unwrap();
    stage
        .refused(&cluster, at(1, 80), "no healthy upstream")
        .await;
    for to in [at(2, 80), app.address] {
        assert_eq!(
            stage.web.seen_as(to).await.unwrap().ip(),
            stage.web.ip4(),
            "{to}"
        );
    }
    mesh.workload(&stage.far).status = "Healthy".to_owned();
    mesh.write(&cluster.mesh_file).unwrap();
    let recovered = async || stage.web.seen_as(at(1, 80)).await.ok();
    wait::until(
        wait::SOON,
        "the endpoint is used once it is healthy",
        recovered,
    )
    .await;
}

#[tokio::test]
async fn failover_prefers_the_own_zone_and_strict_refuses_the_rest() {
    let stage = Stage::new();
    let mut mesh = stage.mesh();
    mesh.workload(&stage.web)
        .set("locality", "{region: r, zone: a, subzone: ''}");
    mesh.workload(&stage.near)
        .set("locality", "{region: r, zone: a, subzone: ''}");
    mesh.workload(&stage.far)
        .set("locality", "{region: r, zone: b, subzone: ''}");
    let both: [&Pod; 2] = [&stage.near, &stage.far];
    let failover = mesh.service("failover", vip(1), &[(80, 8080)], &both);
    failover.set(
        "loadBalancer",
        "{routingPreferences: [Network, Region, Zone], mode: Failover, healthPolicy: OnlyHealthy}",
    );
    let strict = mesh.service("strict", vip(2), &[(80, 8080)], &both);
    strict.set(
        "loadBalancer",
        "{routingPreferences: [Node], mode: Strict, healthPolicy: OnlyHealthy}",
    );
    let cluster = stage.start(&mesh).await;
    let (near, far) = (
        stage.near.serve(8080, Behaviour::Echo).unwrap(),
        stage.far.serve(8080, Behaviour::Echo).unwrap(),
    );
    for _ in 0..12 {
        assert_eq!(stage.answered(at(1, 80), &near, &far).await, Some("near"));
        assert_eq!(stage.answered(at(2, 80), &near, &far).await, Some("near"));
    }
    mesh.workload(&stage.near).status = "Unhealthy".to_owned();
    mesh.write(&cluster.mesh_file).unwrap();
    let moved =
        async || (stage.answered(at(1, 80), &near, &far).await == Some("far")).then_some(());
    wait::until(wait::SOON, "the next rank is used", moved).await;
    stage
        .refused(&cluster, at(2, 80), "no healthy upstream")
        .await;
}

#[tokio::test]
async fn capacity_weighs_endpoints() {
    let stage = Stage::new();
    let idle = stage.world.node(1).pod(&PodSpec::captured("idle")).unwrap();
    let mut mesh = stage.mesh();
    mesh.pod(&idle).capacity = 0;
    mesh.workload(&stage.far).capacity = 3;
    mesh.service(
        "weighted",
        vip(1),
        &[(80, 8080)],
        &[&stage.near, &stage.far, &idle],
    );
    let _cluster = stage.start(&mesh).await;
    let (near, far) = (
        stage.near.serve(8080, Behaviour::Echo).unwrap(),
        stage.far.serve(8080, Behaviour::Echo).unwrap(),
    );
    let (mut nears, mut fars) = (0, 0);
    for _ in 0..200 {
        match stage.answered(at(1, 80), &near, &far).await {
            Some("near") => nears += 1,
            Some(_) => fars += 1,
            None => panic!("an endpoint without capacity was chosen"),
        }
    }
    // Expected 50 of 200, standard deviation 6.
    assert!((20..=80).contains(&nears), "{nears} near, {fars} far");
}

#[tokio::test]
async fn families_and_named_ports_are_resolved_per_endpoint() {
    let stage = Stage::new();
    let mut mesh = stage.mesh();
    let both: [&Pod; 2] = [&stage.near, &stage.far];
    mesh.service("six", vip(1), &[(80, 8080)], &[&stage.far])
        .set("ipFamilies", "IPv6");
    mesh.service("named", vip(2), &[(80, 0)], &both);
    let key = "shop/named.shop.svc.cluster.local".to_owned();
    mesh.workload(&stage.near)
        .services
        .insert(key.clone(), Ports::from([(80, 7001)]));
    mesh.workload(&stage.far)
        .services
        .insert(key, Ports::from([(80, 7002)]));
    let cluster = stage.start(&mesh).await;
    let _six = stage.far.serve(8080, Behaviour::Whoami).unwrap();
    assert_eq!(
        stage.web.seen_as(at(1, 80)).await.unwrap().ip(),
        stage.web.ip6()
    );
    let line = outbound(&cluster, stage.far.at6(15008)).await;
    assert_eq!(
        line.field("dst.hbone_addr"),
        stage.far.at6(8080).to_string()
    );

    let (near, far) = (
        stage.near.serve(7001, Behaviour::Echo).unwrap(),
        stage.far.serve(7002, Behaviour::Echo).unwrap(),
    );
    let mut seen = BTreeMap::new();
    while seen.len() < 2 {
        let who = stage
            .answered(at(2, 80), &near, &far)
            .await
            .expect("each has its own port");
        *seen.entry(who).or_insert(0) += 1;
        assert!(seen.values().sum::<i32>() < 100, "{seen:?}");
    }
}

#[tokio::test]
async fn ranges_passthrough_and_visibility_follow_the_service() {
    let stage = Stage::new();
    let outside = stage.world.node(1).pod(&PodSpec::plain("outside")).unwrap();
    let mut mesh = stage.mesh();
    // The wide range of the own namespace wins over the narrow one elsewhere.
    let own = mesh.service("own-range", vip(1), &[(80, 8080)], &[&stage.far]);
    own.set("cidrVips", "[{network: '', cidr: 10.64.0.0/10}]");
    let other = mesh.service("other-range", vip(2), &[(80, 8080)], &[&stage.near]);
    other.namespace = "elsewhere".to_owned();
    other.set("cidrVips", "[{network: '', cidr: 10.100.0.0/16}]");
    // Every address of the pass range is used as dialled.
    let pass = mesh.service("pass", vip(3), &[(80, 8080)], &[]);
    pass.set("cidrVips", "[{network: '', cidr: 10.20.1.0/24}]");
    pass.set(
        "loadBalancer",
        "{routingPreferences: [], mode: Passthrough, healthPolicy: AllowAll}",
    );
    // Somebody else's private service at the address of a real server.
    let hidden = mesh.service("hidden", outside.ip4(), &[(7000, 8080)], &[&stage.far]);
    hidden.namespace = "elsewhere".to_owned();
    hidden.set("visibility", "Namespace");
    let cluster = stage.start(&mesh).await;
    let (near, far) = (
        stage.near.serve(8080, Behaviour::Echo).unwrap(),
        stage.far.serve(8080, Behaviour::Echo).unwrap(),
    );
    assert_eq!(
        stage
            .answered("10.100.2.3:80".parse().unwrap(), &near, &far)
            .await,
        Some("far")
    );
    let app = outside.serve(7000, Behaviour::Whoami).unwrap();
    assert_eq!(
        stage.web.seen_as(app.address).await.unwrap().ip(),
        stage.web.ip4()
    );
    let line = outbound(&cluster, app.address).await;
    assert_eq!(line.field("dst.hbone_addr"), "");
}

#[tokio::test]
async fn what_cannot_be_routed_yet_is_refused_and_never_bypassed() {
    let stage = Stage::new();
    let mut mesh = stage.mesh();
    let guarded = mesh.service("guarded", vip(1), &[(80, 8080)], &[&stage.far]);
    guarded.set(
        "waypoint",
        "{destination: 'shop/waypoint.shop.svc.cluster.local', hboneMtlsPort: 15008}",
    );
    mesh.service("abroad", vip(2), &[(80, 8080)], &[&stage.near]);
    mesh.workload(&stage.near).set("network", "elsewhere");
    let cluster = stage.start(&mesh).await;
    let app = stage.far.serve(8080, Behaviour::Echo).unwrap();
    stage.refused(&cluster, at(1, 80), "waypoint").await;
    stage
        .refused(&cluster, at(2, 80), "no valid routing destination")
        .await;
    assert!(app.peers().is_empty(), "the waypoint was bypassed");
    // The same pod by its own address has no waypoint.
    assert_eq!(
        stage.web.ask(app.address, b"direct").await.unwrap(),
        b"direct"
    );
}

#[tokio::test]
async fn a_changed_mesh_file_is_taken_up_and_a_broken_one_is_not() {
    let stage = Stage::new();
    let mut mesh = stage.mesh();
    let cluster = stage.start(&mesh).await;
    let (near, far) = (
        stage.near.serve(8080, Behaviour::Echo).unwrap(),
        stage.far.serve(8080, Behaviour::Echo).unwrap(),
    );
    mesh.service("moving", vip(1), &[(80, 8080)], &[&stage.near]);
    mesh.write(&cluster.mesh_file).unwrap();
    let appears = async || {
        stage
            .answered(at(1, 80), &near, &far)
            .await
            .filter(|who| *who == "near")
    };
    wait::until(wait::SOON, "the service appears", appears).await;

    std::fs::write(&cluster.mesh_file, "workloads: [{nonsense").unwrap();
    cluster
        .proxy(0)
        .log()
        .wait("a complaint", |line| {
            matches!(line.level.as_str(), "warn" | "error")
        })
        .await;
    assert_eq!(
        stage.answered(at(1, 80), &near, &far).await,
        Some("near"),
        "the last good state is kept"
    );

    let mut mesh = stage.mesh();
    mesh.service("moving", vip(1), &[(80, 8080)], &[&stage.far]);
    mesh.write(&cluster.mesh_file).unwrap();
    let moves = async || {
        stage
            .answered(at(1, 80), &near, &far)
            .await
            .filter(|who| *who == "far")
    };
    wait::until(wait::SOON, "the endpoint moves", moves).await;
}

#[tokio::test]
async fn a_tunnel_may_name_a_service_only_where_its_waypoint_is() {
    let foreign = ForeignClient::new().unwrap();
    let mut mesh = foreign.mesh();
    mesh.service("waypoint", vip(1), &[(15008, 15008)], &[&foreign.api]);
    let waypoint = "{destination: 'shop/waypoint.shop.svc.cluster.local', hboneMtlsPort: 15008}";
    mesh.service("mine", vip(2), &[(80, 8080)], &[])
        .set("waypoint", waypoint);
    mesh.service("other", vip(3), &[(80, 8080)], &[]);
    let _cluster = Cluster::start(&foreign.world, &mesh, &[&foreign.api])
        .await
        .unwrap();
    let _app = foreign.api.serve(80, Behaviour::Echo).unwrap();
    let client = foreign.client().await;
    for (authority, status) in [(at(2, 80), 200), (at(3, 80), 400), (at(9, 80), 400)] {
        assert_eq!(
            client
                .tunnel(&authority.to_string())
                .await
                .unwrap()
                .status
                .as_u16(),
            status,
            "{authority}"
        );
    }
}

#[tokio::test]
async fn an_application_tunnel_may_change_the_port_and_is_never_bypassed() {
    let foreign = ForeignClient::new().unwrap();
    let mut mesh = foreign.mesh();
    mesh.workload(&foreign.api)
        .set("applicationTunnel", "{protocol: NONE, port: 15088}");
    let cluster = Cluster::start(&foreign.world, &mesh, &[&foreign.api])
        .await
        .unwrap();
    let app = foreign.api.serve(15088, Behaviour::Echo).unwrap();
    let asked = foreign.api.serve(80, Behaviour::Echo).unwrap();
    let client = foreign.client().await;
    // Any address is taken: the application behind the tunnel knows what to do with it.
    for authority in [foreign.target(80), at(9, 80).to_string()] {
        let mut tunnel = client.tunnel(&authority).await.unwrap();
        assert_eq!(tunnel.status.as_u16(), 200, "{authority}");
        tunnel.ping(b"unchanged").await.unwrap();
    }
    assert!(
        app.peers()
            .iter()
            .all(|peer| peer.ip() == foreign.peer.ip4()),
        "{:?}",
        app.peers()
    );
    assert_eq!((app.peers().len(), asked.peers().len()), (2, 0));

    // With a header, the port stays the tunnel's; `app_tunnel.rs` reads it.
    mesh.workload(&foreign.api)
        .set("applicationTunnel", "{protocol: PROXY, port: 15088}");
    mesh.write(&cluster.mesh_file).unwrap();
    let announced = async || {
        let mut tunnel = client.tunnel(&foreign.target(80)).await.unwrap();
        assert_eq!(tunnel.status.as_u16(), 200);
        tunnel.write(b"payload").await.unwrap();
        tunnel.finish().unwrap();
        let echo = tunnel.read_to_end().await.unwrap();
        echo.starts_with(b"\r\n\r\n\x00\r\nQUIT\n").then_some(())
    };
    wait::until(wait::SOON, "the application is sent a header", announced).await;
    assert!(asked.peers().is_empty());
}

/// As a gateway that a proxy serves: what it sends to port 15008 is a tunnel already.
#[tokio::test]
async fn an_application_may_make_its_tunnels_by_itself() {
    let stage = Stage::new();
    let cluster = stage.start(&stage.mesh()).await;
    let app = stage.far.serve(8080, Behaviour::Echo).unwrap();
    let identity = stage.world.authority().issue(&stage.web.spiffe_id());
    let hello = Hello::new(&identity.unwrap());
    let client = RawClient::connect(stage.web.netns(), stage.far.at(15008), &hello);
    let client = client.await.unwrap();
    assert_eq!(client.server_id, Some(stage.far.spiffe_id()));
    let target = app.address.to_string();
    let mut tunnel = client.tunnel(&target).await.unwrap();
    tunnel.ping(b"hello").await.unwrap();
    drop((tunnel, client));
    let line = outbound(&cluster, stage.far.at(15008)).await;
    assert_eq!(line.field("dst.hbone_addr"), "");
}
