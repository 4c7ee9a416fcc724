//! Services whose endpoints are on another network, behind a gateway.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a panic is a failed test"
)]

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::Arc,
};

use http::StatusCode;
use parking_lot::Mutex;
use testkit::{
    Cluster, Line, Mesh, Pod, PodSpec, Proxy, ProxyOptions, World,
    mesh::{Match, Policy, Ports, Workload},
    proxy::ADMIN_PORT,
    raw::{RawServer, ServerConnection},
    traffic::{self, Behaviour},
    wait,
};
use tokio::task::JoinSet;

/// `web` is on network `east`, which is node 0; `api` on `west`, where `gateway` is at the border. Both networks have a
/// service `api`, and each has a mesh of its own.
struct Stage {
    world: World,
    web: Arc<Pod>,
    near: Arc<Pod>,
    gateway: Arc<Pod>,
    api: Arc<Pod>,
}

const HOST: &str = "api.shop.svc.cluster.local";
const TARGET: &str = "api.shop.svc.cluster.local:80";
const VIP: [u8; 4] = [10, 96, 0, 1];

impl Stage {
    fn new(api: fn(&str) -> PodSpec) -> Self {
        let world = World::new(2).unwrap();
        let pod = |node: usize, spec: PodSpec| world.node(node).pod(&spec).unwrap();
        Self {
            web: pod(0, PodSpec::captured("web")),
            near: pod(0, PodSpec::captured("near")),
            gateway: pod(1, PodSpec::plain("gateway")),
            api: pod(1, api("api")),
            world,
        }
    }

    /// What a control plane of `east` tells: of `west` the gateway, and one workload that stands for all behind it.
    fn east(&self) -> Mesh {
        let mut mesh = Mesh::of(&[&self.web, &self.near]);
        for pod in [&self.web, &self.near] {
            mesh.workload(pod).set("network", "east");
        }
        let gateway = mesh.pod(&self.gateway);
        gateway.protocol = "HBONE".to_owned();
        gateway.set("network", "west");
        self.service(&mut mesh, "east")
            .set("subjectAltNames", &format!("[{}]", self.api.spiffe_id()));
        mesh.workloads.push(self.behind(self.gateway.ip4()));
        mesh
    }

    /// Stands for all endpoints behind the gateway at this address.
    fn behind(&self, gateway: IpAddr) -> Workload {
        let mut behind = Workload {
            uid: "west/SplitHorizonWorkload/east-west/api".to_owned(),
            name: "west-api".to_owned(),
            namespace: "shop".to_owned(),
            protocol: "HBONE".to_owned(),
            status: "Healthy".to_owned(),
            capacity: 1,
            services: [(format!("shop/{HOST}"), Ports::from([(80, 8080)]))].into(),
            ..Workload::default()
        };
        behind.set("network", "west");
        let gateway = format!("{{destination: 'west/{gateway}', hboneMtlsPort: 15008}}");
        behind.set("networkGateway", &gateway);
        behind
    }

    fn west(&self) -> Mesh {
        let mut mesh = Mesh::of(&[&self.api]);
        mesh.workload(&self.api).set("network", "west");
        self.service(&mut mesh, "west");
        let services = &mut mesh.workload(&self.api).services;
        services.insert(format!("shop/{HOST}"), Ports::from([(80, 8080)]));
        mesh
    }

    fn service<'m>(&self, mesh: &'m mut Mesh, network: &str) -> &'m mut testkit::mesh::Service {
        let service = mesh.service("api", VIP.into(), &[(80, 8080)], &[]);
        service.vips = vec![format!("{network}/{}", IpAddr::from(VIP))];
        service
    }

    fn file(&self, network: &str) -> PathBuf {
        self.world.file(&format!("{network}.yaml"))
    }

    async fn start(&self, east: &Mesh, west: &Mesh) -> Cluster<'_> {
        self.start_with(east, west, &[]).await
    }

    async fn start_with(&self, east: &Mesh, west: &Mesh, env: &[(&str, &str)]) -> Cluster<'_> {
        east.write(&self.file("east")).unwrap();
        west.write(&self.file("west")).unwrap();
        let options = |node: &testkit::Node| {
            let east = node.name() == self.world.node(0).name();
            let network = if east { "east" } else { "west" };
            let options = ProxyOptions::new(&self.world, node)
                .env("NETWORK", network)
                .env("LOCAL_XDS_PATH", &self.file(network).display().to_string());
            let all = env.iter();
            all.fold(options, |options, (key, value)| options.env(key, value))
        };
        let pods = [&self.web, &self.near, &self.api];
        Cluster::run(&self.world, options, &pods).await.unwrap()
    }

    fn server(&self, pod: &Pod, identity: &str) -> RawServer {
        let authority = self.world.authority();
        let identity = authority.issue(identity).unwrap();
        RawServer::listen(pod, &identity, authority.root()).unwrap()
    }

    /// A gateway that joins each stream with a connection to `api`.
    fn gateway(&self) -> Gateway {
        let server = self.server(&self.gateway, &self.gateway.spiffe_id());
        let connections = Arc::new(Mutex::new(Vec::new()));
        let (seen, pod, to) = (
            Arc::clone(&connections),
            Arc::clone(&self.gateway),
            self.api.at(15008),
        );
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut serving = JoinSet::new();
            while let Ok(connection) = accept(&server).await {
                seen.lock().push(Vec::new());
                let index = seen.lock().len() - 1;
                let (seen, pod) = (Arc::clone(&seen), Arc::clone(&pod));
                serving.spawn(pass_on(connection, pod, to, move |asked| {
                    seen.lock()[index].push(asked);
                }));
            }
        });
        Gateway {
            connections,
            _tasks: tasks,
        }
    }

    async fn call(&self) -> std::io::Result<Vec<u8>> {
        self.web.ask(SocketAddr::from((VIP, 80)), b"hello").await
    }
}

/// A running gateway.
struct Gateway {
    /// What was asked of it, by connection.
    connections: Arc<Mutex<Vec<Vec<Asked>>>>,
    _tasks: JoinSet<()>,
}

/// A request as the gateway saw it.
#[derive(Debug, Clone)]
struct Asked {
    client: Option<String>,
    authority: String,
    headers: Vec<String>,
}

/// Waits for as long as it takes.
async fn accept(server: &RawServer) -> anyhow::Result<ServerConnection> {
    loop {
        match server.accept().await {
            Err(error) if error.to_string() == "no connection" => {}
            accepted => return accepted,
        }
    }
}

async fn pass_on(
    mut connection: ServerConnection,
    pod: Arc<Pod>,
    to: SocketAddr,
    tell: impl Fn(Asked),
) {
    let mut joined = JoinSet::new();
    loop {
        let incoming = match connection.next().await {
            Ok(incoming) => incoming,
            Err(error) if error.to_string() == "no request" => continue,
            Err(_) => return,
        };
        let names = incoming.request.headers().keys();
        tell(Asked {
            client: connection.client_id.clone(),
            authority: incoming.authority().to_owned(),
            headers: names.map(|name| name.as_str().to_owned()).collect(),
        });
        let pod = Arc::clone(&pod);
        joined.spawn(async move { incoming.join(pod.connect(to).await?).await });
    }
}

/// The outbound access line of the first connection that ended.
async fn outbound(cluster: &Cluster<'_>) -> Line {
    let log = cluster.proxy(0).log();
    log.wait("outbound line", |line| {
        line.is_access("connection complete") && line.field("direction") == "outbound"
    })
    .await
}

#[tokio::test]
async fn both_tunnels_ask_for_the_service_and_only_the_outer_one_is_shared() {
    let stage = Stage::new(PodSpec::plain);
    let _cluster = stage.start(&stage.east(), &Mesh::default()).await;
    let gateway = stage.gateway();
    let far = stage.server(&stage.api, &stage.api.spiffe_id());
    for _ in 0..2 {
        let (call, inner) =
            tokio::join!(stage.web.connect(SocketAddr::from((VIP, 80))), far.accept());
        let (mut call, mut inner) = (call.unwrap(), inner.unwrap());
        assert_eq!(inner.client_id, Some(stage.web.spiffe_id()));
        assert_eq!(inner.peer.ip(), stage.gateway.ip4());
        let incoming = inner.next().await.unwrap();
        assert_eq!(incoming.authority(), TARGET);
        assert_eq!(incoming.header("x-forwarded-network"), "east");
        let source = call.local_addr().unwrap();
        let forwarded = format!("for=\"{source}\";host={HOST}");
        assert_eq!(incoming.header("forwarded"), forwarded);
        assert!(incoming.header("baggage").contains("web-deploy"));
        assert!(incoming.request.headers().get("x-istio-source").is_none());
        let mut echo = JoinSet::new();
        echo.spawn(incoming.echo());
        traffic::ping(&mut call, b"across").await.unwrap();
        drop(call);
        inner.ended(wait::SOON).await.unwrap();
    }
    let asked = gateway.connections.lock().clone();
    assert_eq!(asked.len(), 1, "one connection to the gateway");
    assert_eq!(asked[0].len(), 2);
    for Asked {
        client,
        authority,
        mut headers,
    } in asked.into_iter().flatten()
    {
        headers.sort_unstable();
        assert_eq!(client, Some(stage.web.spiffe_id()));
        assert_eq!(authority, TARGET);
        assert_eq!(headers, ["baggage", "forwarded", "traceparent"]);
    }
}

#[tokio::test]
async fn an_identity_that_changes_while_the_far_end_is_asked_ends_the_flow() {
    let stage = Stage::new(PodSpec::plain);
    let mut east = stage.east();
    let cluster = stage.start(&east, &Mesh::default()).await;
    let _gateway = stage.gateway();
    let far = stage.server(&stage.api, &stage.api.spiffe_id());
    let mut flows = Vec::new();
    let mut requests = Vec::new();
    for _ in 0..2 {
        let connecting = stage.web.connect(SocketAddr::from((VIP, 80)));
        let (call, inner) = tokio::join!(connecting, far.accept());
        let mut inner = inner.unwrap();
        requests.push(inner.next().await.unwrap());
        flows.push((call.unwrap(), inner));
    }
    let mut echo = JoinSet::new();
    let [(open, _), (waiting, _)] = &mut flows[..] else {
        unreachable!()
    };
    echo.spawn(requests.remove(0).echo());
    traffic::ping(open, b"open").await.unwrap();
    east.workload(&stage.web).trust_domain = "renamed.example".to_owned();
    east.write(&stage.file("east")).unwrap();
    traffic::closed(open, wait::SOON).await.unwrap();
    let log = cluster.proxy(0).log();
    let changed = |line: &Line| line.field("reason") == "identity-changed";
    log.wait("the flow that was open", changed).await;
    let mark = log.mark();
    echo.spawn(requests.remove(0).echo());
    traffic::closed(waiting, wait::SOON).await.unwrap();
    log.wait_from(mark, "the flow that was not", changed).await;
}

#[tokio::test]
async fn a_far_end_that_the_service_does_not_list_is_refused() {
    let stage = Stage::new(PodSpec::plain);
    let cluster = stage.start(&stage.east(), &Mesh::default()).await;
    let _gateway = stage.gateway();
    let far = stage.server(
        &stage.api,
        "spiffe://cluster.local/ns/shop/sa/somebody-else",
    );
    let (call, inner) = tokio::join!(stage.call(), far.accept());
    assert!(!call.is_ok_and(|answer| !answer.is_empty()));
    assert!(inner.is_err());
    let line = outbound(&cluster).await;
    let error = line.field("error");
    assert!(error.starts_with("inner tunnel: io error"), "{error}");
    assert!(
        error.contains("sa/api"),
        "it says who was expected: {error}"
    );
    let failed = "istio_tcp_connections_failed_total";
    let flags = [("response_flags", "CONNECT")];
    cluster
        .proxy(0)
        .metric(failed, &flags, |count| count == 1.0)
        .await;
}

/// What is told of the connection names both networks, as a document and as text.
async fn explained(stage: &Stage, proxy: &Proxy<'_>) {
    let ask = format!("/debug/explain?from=shop/web&to={}:80", IpAddr::from(VIP));
    let told = proxy.document(&ask).await.unwrap();
    assert_eq!(told["from"]["network"], "east");
    assert_eq!(told["endpoints"][0]["network"], "west");
    assert_eq!(told["route"]["kind"], "double-hbone");
    assert_eq!(told["route"]["network"], "west");
    let ask = format!("{ask}&output=text");
    let text = proxy.get(ADMIN_PORT, &ask).await.unwrap().body;
    let from = format!("as {} on network east\n", stage.web.spiffe_id());
    assert!(text.contains(&from), "{text}");
    assert!(text.contains(" on network west, asking for"), "{text}");
}

#[tokio::test]
async fn two_networks_meet_through_a_gateway_that_sees_nothing() {
    let stage = Stage::new(PodSpec::captured);
    let mut west = stage.west();
    let cluster = stage.start(&stage.east(), &west).await;
    let _gateway = stage.gateway();
    let app = stage.api.serve(8080, Behaviour::Echo).unwrap();
    assert_eq!(stage.call().await.unwrap(), b"hello");
    assert_eq!(app.peers()[0].ip(), stage.gateway.ip4());

    let line = outbound(&cluster).await;
    assert_eq!(line.field("dst.addr"), stage.gateway.at(15008).to_string());
    assert_eq!(line.field("dst.hbone_addr"), TARGET);
    assert_eq!(line.field("dst.service"), HOST);
    assert_eq!(line.field("dst.workload"), "api-deploy", "from its baggage");
    assert_eq!(line.field("dst.identity"), stage.api.spiffe_id());
    let inbound = cluster.proxy(1).log();
    let inbound = inbound
        .wait("inbound line", |line| {
            line.is_access("connection complete") && line.field("direction") == "inbound"
        })
        .await;
    assert_eq!(
        inbound.field("src.addr").split(':').next().unwrap(),
        stage.gateway.ip4().to_string()
    );
    assert_eq!(
        inbound.field("src.workload"),
        "web-deploy",
        "from its baggage"
    );
    assert_eq!(inbound.field("src.identity"), stage.web.spiffe_id());
    assert_eq!(inbound.field("dst.hbone_addr"), TARGET);
    assert_eq!(inbound.field("dst.service"), HOST);
    let metrics = cluster.proxy(0).metrics().await.unwrap();
    let labels = [
        ("destination_workload", "api-deploy"),
        ("destination_canonical_service", "api-app"),
        ("destination_service", HOST),
        ("connection_security_policy", "mutual_tls"),
    ];
    assert_eq!(
        metrics.sum("istio_tcp_connections_opened_total", &labels),
        1.0
    );
    explained(&stage, cluster.proxy(0)).await;

    // Policy at the far end sees the real client.
    west.policy(Policy::deny("web", vec![Match::pod(&stage.web)]));
    west.write(&stage.file("west")).unwrap();
    let denied = async || (!stage.call().await.is_ok_and(|it| it == b"hello")).then_some(());
    wait::until(wait::SOON, "the client is denied", denied).await;
    let log = cluster.proxy(0).log();
    let reason = |line: &Line| line.field("error") == "inner tunnel: http status: 401 Unauthorized";
    log.wait("the reason", reason).await;
}

#[tokio::test]
async fn an_endpoint_of_the_own_network_goes_first() {
    let stage = Stage::new(PodSpec::captured);
    let mut east = stage.east();
    let services = &mut east.workload(&stage.near).services;
    services.insert(format!("shop/{HOST}"), Ports::from([(80, 8080)]));
    let service = east.services.last_mut().unwrap();
    let failover =
        "{routingPreferences: [Network, Region, Zone], mode: Failover, healthPolicy: OnlyHealthy}";
    service.set("loadBalancer", failover);
    let _cluster = stage.start(&east, &stage.west()).await;
    let gateway = stage.gateway();
    let (near, far) = (
        stage.near.serve(8080, Behaviour::Echo).unwrap(),
        stage.api.serve(8080, Behaviour::Echo).unwrap(),
    );
    for _ in 0..5 {
        assert_eq!(stage.call().await.unwrap(), b"hello");
    }
    assert_eq!((near.peers().len(), far.peers().len()), (5, 0));
    assert!(gateway.connections.lock().is_empty());
    east.workload(&stage.near).status = "Unhealthy".to_owned();
    east.write(&stage.file("east")).unwrap();
    let moved = async || {
        let _answered = stage.call().await.ok()?;
        (!far.peers().is_empty()).then_some(())
    };
    wait::until(wait::SOON, "the other network is used", moved).await;
}

#[tokio::test]
async fn a_gateway_that_is_down_is_stood_in_for_by_the_next() {
    let stage = Stage::new(PodSpec::captured);
    let mut east = stage.east();
    let down = stage.world.node(1).pod(&PodSpec::plain("down")).unwrap();
    let gateway = east.pod(&down);
    gateway.protocol = "HBONE".to_owned();
    gateway.set("network", "west");
    let mut favourite = stage.behind(down.ip4());
    favourite.uid.push_str("-too");
    favourite.capacity = 100;
    east.workloads.push(favourite);
    let cluster = stage.start(&east, &stage.west()).await;
    let _gateway = stage.gateway();
    let _app = stage.api.serve(8080, Behaviour::Echo).unwrap();
    for _ in 0..5 {
        assert_eq!(stage.call().await.unwrap(), b"hello");
    }
    let retries = "istio_tcp_connection_retries_total";
    let metrics = cluster.proxy(0).metrics().await.unwrap();
    assert!(metrics.sum(retries, &[]) > 0.0);
}

#[tokio::test]
async fn a_gateway_may_be_a_service() {
    let stage = Stage::new(PodSpec::captured);
    let mut east = stage.east();
    let vip = IpAddr::from([10, 96, 0, 9]);
    let gateways = east.service("east-west", vip, &[(15008, 15008)], &[&stage.gateway]);
    gateways.vips = vec![format!("west/{vip}")];
    let behind = east.workloads.iter_mut();
    for behind in behind.filter(|one| one.name == "west-api") {
        behind.set(
            "networkGateway",
            "{destination: 'shop/east-west.shop.svc.cluster.local', hboneMtlsPort: 15008}",
        );
    }
    let _cluster = stage.start(&east, &stage.west()).await;
    let gateway = stage.gateway();
    let _app = stage.api.serve(8080, Behaviour::Echo).unwrap();
    assert_eq!(stage.call().await.unwrap(), b"hello");
    assert_eq!(gateway.connections.lock()[0][0].authority, TARGET);
}

/// The chain of the far end is known to no proxy but that of the source.
#[tokio::test]
async fn a_far_end_that_is_revoked_is_cut_and_the_gateway_stays() {
    let stage = Stage::new(PodSpec::plain);
    let lists = stage.world.file("ca-crl.pem");
    let env = [("CRL_PATH", lists.to_str().unwrap())];
    let cluster = stage
        .start_with(&stage.east(), &Mesh::default(), &env)
        .await;
    let gateway = stage.gateway();
    let authority = stage.world.authority();
    let leaf = authority.issue(&stage.api.spiffe_id()).unwrap();
    let far = RawServer::listen(&stage.api, &leaf, authority.root()).unwrap();
    let (call, inner) = tokio::join!(stage.web.connect(SocketAddr::from((VIP, 80))), far.accept());
    let (mut call, mut inner) = (call.unwrap(), inner.unwrap());
    let mut echo = JoinSet::new();
    echo.spawn(inner.next().await.unwrap().echo());
    traffic::ping(&mut call, b"before").await.unwrap();

    let aside = stage.world.file("next.pem");
    std::fs::write(&aside, authority.crl(&[&leaf.chain[0]]).unwrap()).unwrap();
    std::fs::rename(&aside, &lists).unwrap();
    inner.ended(wait::SOON).await.unwrap();
    assert!(traffic::ping(&mut call, b"after").await.is_err());
    let error = outbound(&cluster).await.field("error").to_owned();
    assert_eq!(error, "connection closed: peer certificate revoked by CRL");
    let (flags, reporter) = (
        [("response_flags", "CERT_REVOKED")],
        [("reporter", "source")],
    );
    let once = |count: f64| count == 1.0;
    let proxy = cluster.proxy(0);
    proxy
        .metric("istio_tcp_connections_failed_total", &flags, once)
        .await;
    proxy
        .metric("istio_crl_policy_rejections_total", &reporter, once)
        .await;
    // The next one is refused while it shakes hands, through the same gateway.
    let (again, refused) = tokio::join!(stage.call(), far.accept());
    assert!(!again.is_ok_and(|answer| !answer.is_empty()) && refused.is_err());
    assert_eq!(gateway.connections.lock().len(), 1);
}

/// Which workload of its network a gateway leads to is its own choice, so it is asked once more.
#[tokio::test]
async fn a_far_end_without_its_application_is_stood_in_for_by_another_behind_the_gateway() {
    let stage = Stage::new(PodSpec::plain);
    let cluster = stage.start(&stage.east(), &Mesh::default()).await;
    let gateway = stage.gateway();
    let far = stage.server(&stage.api, &stage.api.spiffe_id());
    let mut echo = JoinSet::new();
    let served = async {
        let mut first = far.accept().await.unwrap();
        let asked = first.next().await.unwrap();
        asked.refuse(StatusCode::SERVICE_UNAVAILABLE).unwrap();
        let mut second = far.accept().await.unwrap();
        echo.spawn(second.next().await.unwrap().echo());
        (first, second)
    };
    let call = async {
        let mut call = stage
            .web
            .connect(SocketAddr::from((VIP, 80)))
            .await
            .unwrap();
        traffic::ping(&mut call, b"hello").await.unwrap();
        call
    };
    let _open = tokio::join!(served, call);
    let asked = gateway.connections.lock().clone();
    assert_eq!((asked.len(), asked[0].len()), (1, 2), "{asked:?}");
    let retries = "istio_tcp_connection_retries_total";
    cluster.proxy(0).metric(retries, &[], |it| it == 1.0).await;
}

#[tokio::test]
async fn far_ends_without_their_application_are_asked_for_a_bounded_number_of_times() {
    let stage = Stage::new(PodSpec::captured);
    let cluster = stage.start(&stage.east(), &stage.west()).await;
    let gateway = stage.gateway();
    let to = SocketAddr::from((VIP, 80));
    assert_eq!(
        stage.web.turned_away(to).await.unwrap(),
        traffic::End::Reset
    );
    assert_eq!(gateway.connections.lock()[0].len(), 3);
    let retries = "istio_tcp_connection_retries_total";
    cluster.proxy(0).metric(retries, &[], |it| it == 2.0).await;
}
