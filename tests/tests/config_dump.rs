//! The dump of the admin server, decoded by what reads it.
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
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use testkit::{
    Mesh, PodSpec, Proxy, ProxyOptions, World,
    consumers::{
        self,
        istioctl::{Dump, Service, Workload, WorkloadState},
    },
    mesh::{Match, Policy, StringMatch},
    proxy::ADMIN_PORT,
    stage::Pair,
    traffic::{self, Behaviour},
    wait,
};

/// The dump, which must be one that istioctl and Kiali take.
async fn dump(proxy: &Proxy<'_>) -> (Dump, consumers::kiali::Dump) {
    let answer = proxy
        .get(ADMIN_PORT, "/config_dump?ignored=1")
        .await
        .unwrap();
    assert_eq!(answer.status, 200);
    assert_eq!(answer.header("content-type"), Some("application/json"));
    assert!(
        answer.body.starts_with("{\n  \"certificates\": ["),
        "{:.80}",
        answer.body
    );
    let istioctl = consumers::istioctl(&answer.body).unwrap();
    let kiali = consumers::kiali(&answer.body).unwrap();
    (istioctl, kiali)
}

/// Everything that a mesh can hold, with each key that readers know.
fn rich(stage: &Pair) -> Mesh {
    let mut mesh = stage.mesh();
    let workload = mesh.workload(&stage.api);
    workload.set(
        "waypoint",
        "{destination: 'shop/way.shop.svc.cluster.local', hboneMtlsPort: 15008}",
    );
    workload.set(
        "networkGateway",
        "{destination: '/10.9.9.9', hboneMtlsPort: 15008}",
    );
    workload.set("applicationTunnel", "{protocol: PROXY, port: 15088}");
    workload.set("locality", "{region: eu, zone: eu-a, subzone: ''}");
    workload.authorization_policies = vec!["shop/selected".to_owned()];
    workload.services.insert(
        "shop/absent.shop.svc.cluster.local".to_owned(),
        BTreeMap::from([(1, 2)]),
    );
    let service = mesh.service("rich", IpAddr::from([10, 96, 0, 2]), &[(80, 0)], &[]);
    service.set(
        "loadBalancer",
        "{routingPreferences: [Zone, Node], mode: Failover, healthPolicy: AllowAll}",
    );
    service.set(
        "subjectAltNames",
        "['spiffe://cluster.local/ns/shop/sa/api']",
    );
    service.set(
        "waypoint",
        "{destination: '/10.96.0.9', hboneMtlsPort: 15008}",
    );
    service.set("ipFamilies", "IPv4");
    let full = Match {
        principals: vec![
            StringMatch::Exact("cluster.local/ns/shop/sa/web".to_owned()),
            StringMatch::Prefix("cluster".to_owned()),
            StringMatch::Suffix("web".to_owned()),
            StringMatch::Presence(Vec::new()),
        ],
        ..Match::port(8080)
    };
    mesh.policies
        .push(Policy::new("wide", "Allow", vec![vec![vec![full]]]));
    let selected = Policy {
        scope: "WorkloadSelector".to_owned(),
        ..Policy::new("selected", "Deny", vec![])
    };
    mesh.policies.push(selected);
    mesh
}

#[tokio::test]
async fn the_dump_tells_of_the_whole_mesh_as_its_readers_decode_it() {
    let stage = Pair::new().unwrap();
    let cluster = stage.start(&rich(&stage), &[]).await.unwrap();
    let (dump, kiali) = dump(cluster.proxy(1)).await;
    let uid = check_workloads(&stage, dump.workloads.unwrap());
    check_services(&uid, &dump.services.unwrap());
    let policies = dump.policies.unwrap();
    let wide = policies
        .iter()
        .find(|one| one.name.as_deref() == Some("wide"));
    let full = &wide.unwrap().rules.as_ref().unwrap()[0][0][0];
    assert_eq!(full.principals.as_ref().unwrap().len(), 4);
    assert_eq!(full.destination_ports.as_deref(), Some(&[8080][..]));

    let config = kiali.config.unwrap();
    assert_eq!(config.proxy_mode.as_deref(), Some("Shared"));
    assert_eq!(config.proxy_args.as_deref(), Some("proxy ztunnel"));
    assert_eq!(
        (config.fake_ca, config.window_size),
        (Some(true), Some(4 << 20))
    );
    assert_eq!(
        config.local_node.as_deref(),
        Some(stage.world.node(1).name())
    );
    assert!(kiali.version.unwrap().contains_key("gitRevision"));
    let whole = cluster.proxy(1).document("/config_dump").await.unwrap();
    let staged = &whole["stagedServices"]["shop/absent.shop.svc.cluster.local"];
    assert_eq!(staged[&uid]["port"]["1"], 2);
    assert_eq!(
        whole["staticConfig"]["workloads"].as_array().unwrap().len(),
        2
    );
}

/// Returns the uid of `api`.
fn check_workloads(stage: &Pair, workloads: Vec<Workload>) -> String {
    let uids = workloads.iter().map(|one| one.uid.clone().unwrap());
    let uids: Vec<_> = uids.collect();
    assert!(uids.is_sorted() && uids.len() == 2, "{uids:?}");
    let is_api = |one: &Workload| one.name.as_deref() == Some("api");
    let api = workloads.into_iter().find(is_api).unwrap();
    let addresses = [stage.api.ip4().to_string(), stage.api.ip6().to_string()];
    assert_eq!(api.workload_ips, Some(addresses.to_vec()));
    assert_eq!(api.protocol.as_deref(), Some("HBONE"));
    assert_eq!(api.status.as_deref(), Some("Healthy"));
    let destination = |gateway: Option<consumers::Gateway>| gateway.unwrap().destination.unwrap();
    assert_eq!(destination(api.waypoint), "shop/way.shop.svc.cluster.local");
    assert_eq!(destination(api.network_gateway), "/10.9.9.9");
    assert_eq!(api.application_tunnel.unwrap().port, Some(15088));
    assert_eq!(
        api.authorization_policies,
        Some(vec!["shop/selected".to_owned()])
    );
    api.uid.unwrap()
}

fn check_services(api: &str, services: &[Service]) {
    let names = services.iter().map(|one| one.hostname.as_deref().unwrap());
    let names: Vec<_> = names.collect();
    assert_eq!(
        names,
        ["api.shop.svc.cluster.local", "rich.shop.svc.cluster.local"]
    );
    assert_eq!(services[0].vips, Some(vec!["/10.96.0.1".to_owned()]));
    assert_eq!(services[0].ports.as_ref().unwrap()["80"], 8080);
    let endpoint = &services[0].endpoints.as_ref().unwrap()[api];
    assert_eq!(endpoint.workload_uid.as_deref(), Some(api));
    assert_eq!(endpoint.port.as_ref().unwrap()["80"], 8080);
    assert_eq!(services[1].endpoints.as_ref().unwrap().len(), 0);
    let balancer = services[1].load_balancer.as_ref().unwrap();
    assert_eq!(balancer.mode.as_deref(), Some("Failover"));
    assert_eq!(balancer.health_policy.as_deref(), Some("AllowAll"));
    assert_eq!(services[1].ip_families.as_deref(), Some("IPv4"));
}

#[tokio::test]
async fn without_policies_the_list_is_empty_and_not_absent() {
    let stage = Pair::new().unwrap();
    let cluster = stage.start(&stage.mesh(), &[]).await.unwrap();
    let dump = cluster.proxy(0).document("/config_dump").await.unwrap();
    assert_eq!(dump["policies"], serde_json::json!([]));
}

#[tokio::test]
async fn pods_and_their_connections_are_shown() {
    let stage = Pair::new().unwrap();
    let cluster = stage.start(&stage.mesh(), &[]).await.unwrap();
    let _app = stage.api.serve(8080, Behaviour::Echo).unwrap();
    let mut stream = stage.web.connect(Pair::SERVICE).await.unwrap();
    traffic::ping(&mut stream, b"hello").await.unwrap();

    let (source, _) = dump(cluster.proxy(0)).await;
    let state = only_pod(source).unwrap();
    assert_eq!(state.state.as_deref(), Some("Up"));
    assert_eq!(state.info.unwrap().name.as_deref(), Some("web"));
    let outbound = state.connections.unwrap().outbound.unwrap();
    let text = |value: SocketAddr| Some(value.to_string());
    assert_eq!(outbound.len(), 1);
    assert_eq!(outbound[0].src, text(stream.local_addr().unwrap()));
    assert_eq!(outbound[0].original_dst, text(Pair::SERVICE));
    assert_eq!(outbound[0].actual_dst, text(stage.api.at(15008)));
    assert_eq!(outbound[0].protocol.as_deref(), Some("HBONE"));

    let (destination, _) = dump(cluster.proxy(1)).await;
    let connections = only_pod(destination).unwrap().connections.unwrap();
    let inbound = &connections.inbound.unwrap()[0];
    assert_eq!(inbound.actual_dst, text(stage.api.at(8080)));
    assert_eq!(
        inbound.original_dst.as_deref(),
        Some("api.shop.svc.cluster.local")
    );
    assert_eq!(inbound.protocol.as_deref(), Some("HBONE"));

    drop(stream);
    wait::until(wait::SOON, "the connection is gone", async || {
        let (source, _) = dump(cluster.proxy(0)).await;
        let connections = only_pod(source)?.connections?;
        connections.outbound?.is_empty().then_some(())
    })
    .await;
}

fn only_pod(dump: Dump) -> Option<WorkloadState> {
    let states = dump.workload_state?;
    assert_eq!(states.len(), 1);
    states.into_values().next()
}

#[tokio::test]
async fn certificates_are_shown_as_istioctl_reads_them() {
    let stage = Pair::new().unwrap();
    let cluster = stage.start(&stage.mesh(), &[]).await.unwrap();
    let web = wait::until(wait::SOON, "a certificate", async || {
        let (dump, _) = dump(cluster.proxy(0)).await;
        let mut all = dump.certificates?.into_iter();
        let web = all.find(|one| one.identity == Some(stage.web.spiffe_id()))?;
        (web.state.as_deref() == Some("Available")).then_some(web)
    })
    .await;
    let leaf = &web.cert_chain.unwrap()[0];
    let serial = leaf.serial_number.as_ref().unwrap();
    assert!(serial.bytes().all(|byte| byte.is_ascii_digit()), "{serial}");
    assert!(leaf.expiration_time.as_ref().unwrap().ends_with('Z'));
    let pem = BASE64_STANDARD.decode(leaf.pem.as_ref().unwrap()).unwrap();
    assert!(pem.starts_with(b"-----BEGIN CERTIFICATE-----"), "{pem:?}");
    assert!(!web.root_certs.unwrap().is_empty());
}

/// Configurations by what is special about them; each broke a reader of another proxy's dump before, or might.
fn configurations(world: &World) -> Vec<(&'static str, ProxyOptions)> {
    let plain = || ProxyOptions::new(world, world.node(0));
    let servers = || {
        plain()
            .without("FAKE_CA")
            .without("FAKE_CA_ROOT_CERT")
            .without("FAKE_CA_ROOT_KEY")
            .env("CA_ADDRESS", "127.0.0.1:1")
            .env("XDS_ADDRESS", "127.0.0.1:1")
            .env("CA_HEADER_X_SECRET", SECRET)
            .env("AUTH_TOKEN", SECRET)
    };
    let dedicated = || {
        plain()
            .env("PROXY_MODE", "dedicated")
            .env("PROXY_WORKLOAD_INFO", "shop/web/web")
    };
    let dns = || plain().env("ISTIO_META_DNS_CAPTURE", "true");
    let openbao = || {
        servers()
            .env("CA_PROVIDER", "openbao")
            .env("OPENBAO_ADDRESS", "https://127.0.0.1:1")
            .env("OPENBAO_ROLE", "workload")
            .env("OPENBAO_AUTH_METHOD", "token")
            .env("OPENBAO_TOKEN_PATH", "/nonexistent/token")
    };
    let demand = || {
        servers()
            .env("XDS_ON_DEMAND", "true")
            .env("XDS_ROOT_CA", PEM)
            .env("CA_ROOT_CA", PEM)
    };
    let ours = plain()
        .env("SAME_NODE_NAMESPACES", "shop=direct")
        .env("MEMORY_BUDGET", "64Mi")
        .env("METRICS_LABELS", "minimal")
        .env("CRL_PATH", "/nonexistent/crl.pem")
        .env("PREFERED_SERVICE_NAMESPACE", "shop");
    let system = servers().env("CA_ROOT_CA", "SYSTEM");
    vec![
        ("system roots", system.env("XDS_ROOT_CA", "SYSTEM")),
        (
            "a root that is not there",
            servers().env("ALT_XDS_HOSTNAME", "istiod.other"),
        ),
        ("source needed", plain().env("ENABLE_ORIG_SRC", "true")),
        ("source off", plain().env("ENABLE_ORIG_SRC", "false")),
        ("no IPv6", dns().env("IPV6_ENABLED", "false")),
        (
            "a DNS address",
            dns().env("ISTIO_META_DNS_PROXY_ADDR", "127.0.0.1:15054"),
        ),
        ("dedicated", dedicated()),
        ("dedicated with a mark", dedicated().env("PACKET_MARK", "7")),
        ("SOCKS5", plain().env("UNSTABLE_ENABLE_SOCKS5", "true")),
        ("OpenBao", openbao()),
        ("on demand, with roots as texts", demand()),
        ("settings of our own", ours),
    ]
}

const SECRET: &str = "hidden-value";
const PEM: &str = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";

#[tokio::test]
async fn the_dump_is_decoded_in_every_configuration() {
    let world = World::new(1).unwrap();
    let web = world.node(0).pod(&PodSpec::captured("web")).unwrap();
    let mesh = Mesh::of(&[&web]);
    mesh.write(&ProxyOptions::mesh_file(&world)).unwrap();
    for (what, options) in configurations(&world) {
        let is_shared = !what.starts_with("dedicated");
        let netns = if is_shared {
            world.node(0).proxy_netns()
        } else {
            web.netns()
        };
        let mut proxy = options.start_in(netns, what).unwrap();
        let body = wait::until(wait::SOON, what, async || {
            let answer = proxy.get(ADMIN_PORT, "/config_dump").await.ok()?;
            (answer.status == 200).then_some(answer.body)
        })
        .await;
        let decoded = consumers::istioctl(&body).err();
        assert!(decoded.is_none(), "{what}: {decoded:?}\n{body}");
        let kiali = consumers::kiali(&body);
        let kiali = kiali.unwrap_or_else(|error| panic!("{what}: {error}\n{body}"));
        assert!(!body.contains(SECRET), "{what}: a secret is shown");
        let mode = kiali.config.unwrap().proxy_mode.unwrap();
        assert_eq!(mode == "Shared", is_shared, "{what}");
        assert_eq!(body.contains("\"workloadState\""), is_shared, "{what}");
        proxy.post("/quitquitquit").await.unwrap();
        proxy.exit(wait::SOON).await.unwrap();
    }
}

#[tokio::test]
async fn an_identity_that_is_not_signed_is_unavailable() {
    let world = World::new(1).unwrap();
    let web = world.node(0).pod(&PodSpec::captured("web")).unwrap();
    let mesh = Mesh::of(&[&web]);
    mesh.write(&ProxyOptions::mesh_file(&world)).unwrap();
    let options = ProxyOptions::new(&world, world.node(0))
        .without("FAKE_CA")
        .without("FAKE_CA_ROOT_CERT")
        .without("FAKE_CA_ROOT_KEY")
        .env("CA_ADDRESS", "127.0.0.1:1");
    let proxy = options.start(world.node(0)).unwrap();
    let certificate = wait::until(wait::SOON, "an identity fails", async || {
        let answer = proxy.get(ADMIN_PORT, "/config_dump").await.ok()?;
        let certificates = consumers::istioctl(&answer.body).unwrap().certificates?;
        let state = certificates.first()?.state.clone()?;
        state
            .starts_with("Unavailable")
            .then(|| certificates[0].clone())
    })
    .await;
    assert_eq!(certificate.identity, Some(web.spiffe_id()));
    assert_eq!(
        (certificate.cert_chain, certificate.root_certs),
        (Some(vec![]), Some(vec![]))
    );
}
