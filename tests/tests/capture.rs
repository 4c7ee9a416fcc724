//! Redirected traffic on its way through the proxy: who sees which address, and what stays untouched.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a panic is a failed test"
)]

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use testkit::{
    Cluster, Line, Mesh, Node, Pod, PodSpec, ProxyOptions, Redirect, World, dns,
    traffic::{self, Behaviour},
    wait,
};

struct Pods {
    web: Arc<Pod>,
    api: Arc<Pod>,
    outside: Arc<Pod>,
}

/// `web` on one node, `api` on the other, and a pod outside the mesh.
fn pods(world: &World) -> Pods {
    Pods {
        web: world.node(0).pod(&PodSpec::captured("web")).unwrap(),
        api: world.node(1).pod(&PodSpec::captured("api")).unwrap(),
        outside: world.node(0).pod(&PodSpec::plain("outside")).unwrap(),
    }
}

#[tokio::test]
async fn applications_see_their_real_client_and_logs_the_real_destination() {
    let world = World::new(2).unwrap();
    let Pods { web, api, outside } = pods(&world);
    let mesh = Mesh::of(&[&web, &api]);
    let cluster = Cluster::start(&world, &mesh, &[&web, &api]).await.unwrap();
    let (app, other) = (
        api.serve(8080, Behaviour::Whoami).unwrap(),
        outside.serve(7000, Behaviour::Whoami).unwrap(),
    );

    for (to, client) in [(other.address, web.ip4()), (other.address6, web.ip6())] {
        assert_eq!(web.seen_as(to).await.unwrap().ip(), client, "passthrough");
        let out = cluster
            .proxy(0)
            .log()
            .wait("passthrough", |line| {
                line.field("dst.addr") == to.to_string()
            })
            .await;
        assert_eq!(out.field("direction"), "outbound");
    }
    for (to, client) in [(app.address, outside.ip4()), (app.address6, outside.ip6())] {
        assert_eq!(
            outside.seen_as(to).await.unwrap().ip(),
            client,
            "plaintext inbound"
        );
        let log = cluster.proxy(1).log();
        let inbound = log.wait("plaintext inbound", |line| {
            line.is_access("connection complete") && line.field("dst.addr") == to.to_string()
        });
        assert_eq!(inbound.await.field("direction"), "inbound");
    }
    for (to, client) in [(app.address, web.ip4()), (app.address6, web.ip6())] {
        assert_eq!(web.seen_as(to).await.unwrap().ip(), client, "HBONE");
        let log = cluster.proxy(0).log();
        let out = log.wait("HBONE", |line| {
            line.field("dst.hbone_addr") == to.to_string()
        });
        assert_eq!(
            out.await.field("dst.addr"),
            SocketAddr::new(to.ip(), 15008).to_string()
        );
    }
}

#[tokio::test]
async fn every_socket_in_a_pod_carries_the_mark() {
    let world = World::new(2).unwrap();
    let Pods { web, api, outside } = pods(&world);
    let mesh = Mesh::of(&[&web, &api]);
    mesh.write(&ProxyOptions::mesh_file(&world)).unwrap();
    let resolver = outside.udp(outside.at(53)).unwrap();
    let resolv_conf = world.file("resolv.conf");
    std::fs::write(&resolv_conf, format!("nameserver {}\n", outside.ip4())).unwrap();
    let options = |node: &Node| {
        let options = ProxyOptions::new(&world, node).env("ISTIO_META_DNS_CAPTURE", "true");
        let options = options.env("UNSTABLE_ENABLE_SOCKS5", "true");
        options.resolv_conf(resolv_conf.clone())
    };
    let cluster = Cluster::run(&world, options, &[&web, &api]).await.unwrap();
    let (app, other) = (
        api.serve(8080, Behaviour::Echo).unwrap(),
        outside.serve(7000, Behaviour::Echo).unwrap(),
    );
    // A tunnel, what goes past the mesh, what comes from there.
    let mut held = Vec::new();
    for (from, to) in [
        (&web, app.address),
        (&web, app.address6),
        (&web, other.address),
        (&outside, app.address),
        (&outside, app.address6),
    ] {
        let mut stream = from.connect(to).await.unwrap();
        traffic::ping(&mut stream, b"held").await.unwrap();
        held.push(stream);
    }
    // A name that the resolver keeps to itself.
    let own = |port| SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port);
    let asker = web.udp(own(0)).unwrap();
    let query = dns::address_query("example.org.").to_vec().unwrap();
    asker.send_to(&query, own(15053)).await.unwrap();
    let mut passed_on = [0; 512];
    let receiving = resolver.recv(&mut passed_on);
    wait::soon("the query is passed on", receiving)
        .await
        .unwrap();
    // Listeners: three, names over two transports and two families, SOCKS5. Then the flows: outbound three accepted, one tunnel, one
    // passed on, and the query; inbound two accepted, one tunnel, four to the application.
    for (pod, node, sockets) in [(&web, 0, 8 + 6), (&api, 1, 8 + 7)] {
        marks_are_on_every_socket(pod, cluster.proxy(node).pid(), sockets);
    }
}

/// Addresses that no host has.
const PROBED: [&str; 2] = ["192.0.2.1", "[2001:db8::1]"];

/// Every socket that the proxy has in the pod carries its mark, and it has as many as these.
fn marks_are_on_every_socket(pod: &Pod, pid: u32, expected: usize) {
    let table = pod
        .netns()
        .command("ss", &["-H", "-t", "-u", "-a", "-n", "-p", "-e"], "")
        .unwrap();
    let owner = format!("pid={pid},");
    // All but what looks like a connection of the application, to find out whether those are redirected.
    let is_probe = |line: &str| PROBED.iter().any(|address| line.contains(address));
    let sockets = table.lines().filter(|line| line.contains(&owner));
    let sockets: Vec<&str> = sockets.filter(|line| !is_probe(line)).collect();
    assert!(sockets.len() >= expected, "{table}");
    for socket in sockets {
        assert!(socket.contains("fwmark:0x539"), "{socket}");
    }
}

#[tokio::test]
async fn probes_loopback_and_the_own_address_never_meet_the_proxy() {
    let world = World::new(2).unwrap();
    let Pods { web, api, .. } = pods(&world);
    let cluster = Cluster::start(&world, &Mesh::of(&[&web, &api]), &[&web, &api])
        .await
        .unwrap();
    let app = api.serve(8080, Behaviour::Whoami).unwrap();
    let mark = cluster.proxy(1).log().mark();

    let node = world.node(1).netns();
    for (probe, to) in [
        ("169.254.7.127", app.address),
        ("fd16:9254:7127:1337:ffff:ffff:ffff:ffff", app.address6),
    ] {
        let add = format!(
            "addr add {probe} dev pods {}",
            if to.is_ipv6() { "nodad" } else { "" }
        );
        node.command("ip", &["-batch", "-"], &add).unwrap();
        let probe = SocketAddr::new(probe.parse().unwrap(), 40123);
        let mut stream = traffic::connect_from(node, probe, to).await.unwrap();
        let seen = traffic::exchange(&mut stream, b"").await.unwrap();
        assert_eq!(seen, format!("{probe}\n").into_bytes());
    }
    let loopback: IpAddr = Ipv4Addr::LOCALHOST.into();
    assert_eq!(
        api.seen_as(SocketAddr::new(loopback, 8080))
            .await
            .unwrap()
            .ip(),
        loopback
    );
    assert_eq!(api.seen_as(app.address).await.unwrap().ip(), api.ip4());
    assert_eq!(api.seen_as(app.address6).await.unwrap().ip(), api.ip6());

    // A connection that the proxy does see marks the end of those that it must not.
    web.seen_as(app.address).await.unwrap();
    let log = cluster.proxy(1).log();
    log.wait_from(mark, "the last one", |line| {
        line.is_access("connection complete")
    })
    .await;
    let lines = log.since(mark, |line| {
        line.scope == "access" && !line.field("src.addr").starts_with(&web.ip4().to_string())
    });
    assert!(lines.is_empty(), "{lines:?}");
}

#[tokio::test]
async fn a_pod_reaches_itself_through_its_service() {
    let world = World::new(2).unwrap();
    let Pods { web, api, .. } = pods(&world);
    let mut mesh = Mesh::of(&[&web, &api]);
    let (vip, vip6) = ("10.96.0.7".parse().unwrap(), "fd96::7".parse().unwrap());
    let service = mesh.service("api", vip, &[(80, 8080)], &[&api]);
    service.vips.push(format!("/{vip6}"));
    let _cluster = Cluster::start(&world, &mesh, &[&web, &api]).await.unwrap();
    let _app = api.serve(8080, Behaviour::Whoami).unwrap();
    for (to, from, seen) in [
        (vip, &api, api.ip4()),
        (vip, &web, web.ip4()),
        (vip6, &api, api.ip6()),
        (vip6, &web, web.ip6()),
    ] {
        let to = SocketAddr::new(to, 80);
        assert_eq!(from.seen_as(to).await.unwrap().ip(), seen, "{to}");
    }
}

#[tokio::test]
async fn the_ports_of_the_proxy_are_no_way_into_itself() {
    let world = World::new(2).unwrap();
    let Pods { web, api, outside } = pods(&world);
    let cluster = Cluster::start(&world, &Mesh::of(&[&web, &api]), &[&web, &api])
        .await
        .unwrap();
    let own = |port| SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port);
    for (node, from, to) in [
        (1, &outside, api.at(15001)),
        (1, &outside, api.at(15006)),
        (0, &web, own(15001)),
    ] {
        from.turned_away(to).await.unwrap();
        let log = cluster.proxy(node).log();
        let is_denied = |line: &Line| {
            line.is_access("connection failed") && line.field("dst.addr") == to.to_string()
        };
        let denied = log.wait("a denial line", is_denied).await;
        assert!(
            denied
                .field("error")
                .contains("attempted recursive call to ourselves"),
            "{}",
            denied.raw
        );
        // Whatever else were to be said of it has been said once a later connection was.
        let _ = from.turned_away(own(15006)).await;
        assert_eq!(log.since(0, is_denied).len(), 1, "{to}");
    }
    assert_eq!(
        cluster
            .proxy(0)
            .metrics()
            .await
            .unwrap()
            .sum("istio_tcp_connections_opened_total", &[]),
        0.0
    );
}

#[tokio::test]
async fn an_ingress_pod_takes_plaintext_directly_and_hbone_through_the_proxy() {
    let world = World::new(2).unwrap();
    let web = world.node(0).pod(&PodSpec::captured("web")).unwrap();
    let outside = world.node(0).pod(&PodSpec::plain("outside")).unwrap();
    let ingress = world
        .node(1)
        .pod(&PodSpec::captured("ingress").redirect(Redirect::ingress()))
        .unwrap();
    let cluster = Cluster::start(&world, &Mesh::of(&[&web, &ingress]), &[&web, &ingress])
        .await
        .unwrap();
    let app = ingress.serve(8080, Behaviour::Whoami).unwrap();
    let other = web.serve(8080, Behaviour::Whoami).unwrap();
    assert_eq!(
        outside.seen_as(app.address).await.unwrap().ip(),
        outside.ip4()
    );
    assert_eq!(web.seen_as(app.address).await.unwrap().ip(), web.ip4());
    assert_eq!(
        ingress.seen_as(other.address).await.unwrap().ip(),
        ingress.ip4()
    );
    let log = cluster.proxy(1).log();
    for direction in ["inbound", "outbound"] {
        log.wait(direction, |line| {
            line.field("direction") == direction && line.is_access("connection complete")
        })
        .await;
    }
    let inbound = log.since(0, |line| {
        line.is_access("connection complete") && line.field("direction") == "inbound"
    });
    assert_eq!(inbound.len(), 1, "plaintext did not pass the proxy");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bulk_passes_unchanged_in_both_directions_and_unreadable_on_the_link() {
    let world = World::new(2).unwrap();
    let Pods { web, api, .. } = pods(&world);
    let _cluster = Cluster::start(&world, &Mesh::of(&[&web, &api]), &[&web, &api])
        .await
        .unwrap();
    let (sink, source) = (
        api.serve(8080, Behaviour::Sink).unwrap(),
        api.serve(8081, Behaviour::Source(3 << 20)).unwrap(),
    );
    let wire = testkit::Capture::start(world.link()).unwrap();
    let mut bytes = traffic::pattern(6 << 20);
    for chunk in bytes.chunks_mut(1000) {
        let end = chunk.len().min(6);
        chunk[..end].copy_from_slice(&b"secret"[..end]);
    }
    assert_eq!(
        web.ask(sink.address, &bytes).await.unwrap(),
        traffic::receipt(&bytes)
    );
    assert!(web.ask(source.address6, b"").await.unwrap() == traffic::pattern(3 << 20));
    let seen = async || (wire.bytes_to_port(15008) > 1 << 20).then_some(());
    wait::until(
        Duration::from_secs(5),
        "the tunnel is seen on the link",
        seen,
    )
    .await;
    assert!(!wire.can_read(b"secret"));
    assert!(
        wire.packets(|packet| packet.to == sink.address).is_empty(),
        "plain TCP left the node"
    );
}
