//! The testkit itself: what it builds must behave before it may judge a proxy.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a panic is a failed test"
)]

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::AsFd as _,
    time::Duration,
};

use socket2::{Domain, Protocol, SockAddr, SockRef, Socket, Type};
use testkit::{
    Agent, Authority, Capture, Netns, PodSpec, Redirect, World,
    raw::{Hello, RawClient, RawServer, frames::setting},
    redirect::PROXY_MARK,
    traffic::{self, Behaviour, End},
    wait,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
    task::JoinSet,
};
use tokio_seqpacket::{UnixSeqpacket, ancillary::OwnedAncillaryMessage};

#[tokio::test]
async fn pods_talk_within_a_node_and_across_nodes_in_both_families() {
    let world = World::new(2).unwrap();
    let near = world.node(0).pod(&PodSpec::plain("near")).unwrap();
    let here = world.node(0).pod(&PodSpec::plain("here")).unwrap();
    let far = world.node(1).pod(&PodSpec::plain("far")).unwrap();
    for server in [&near, &far] {
        let app = server.serve(0, Behaviour::Whoami).unwrap();
        assert_eq!(here.seen_as(app.address).await.unwrap().ip(), here.ip4());
        assert_eq!(here.seen_as(app.address6).await.unwrap().ip(), here.ip6());
        assert_eq!(app.peers().len(), 2);
    }
}

#[tokio::test]
async fn applications_echo_count_source_and_reset() {
    let world = World::new(1).unwrap();
    let client = world.node(0).pod(&PodSpec::plain("client")).unwrap();
    let server = world.node(0).pod(&PodSpec::plain("server")).unwrap();
    let bytes = traffic::pattern(300_000);
    for (behaviour, answer) in [
        (Behaviour::Echo, bytes.clone()),
        (Behaviour::Sink, traffic::receipt(&bytes)),
    ] {
        let app = server.serve(0, behaviour).unwrap();
        assert!(
            client.ask(app.address, &bytes).await.unwrap() == answer,
            "{behaviour:?}"
        );
    }
    let source = server.serve(0, Behaviour::Source(100_000)).unwrap();
    assert!(client.ask(source.address, b"").await.unwrap() == traffic::pattern(100_000));
    let rude = server.serve(0, Behaviour::Reset).unwrap();
    let mut stream = client
        .connect_from(client.at(41_000), rude.address)
        .await
        .unwrap();
    stream.write_all(b"x").await.unwrap();
    assert_eq!(
        traffic::closed(&mut stream, wait::SOON).await.unwrap(),
        End::Reset
    );
    assert_eq!(rude.peers(), [client.at(41_000)]);
}

#[tokio::test]
async fn datagrams_pass() {
    let world = World::new(1).unwrap();
    let one = world.node(0).pod(&PodSpec::plain("one")).unwrap();
    let two = world.node(0).pod(&PodSpec::captured("two")).unwrap();
    let (from, to) = (
        one.udp(one.at(5000)).unwrap(),
        two.udp(two.at6(5000)).unwrap(),
    );
    from.send_to(b"dropped", two.at(5001)).await.unwrap();
    let from6 = one.udp(one.at6(5002)).unwrap();
    from6.send_to(b"hello", two.at6(5000)).await.unwrap();
    let mut buffer = [0; 16];
    let (length, peer) = wait::soon("datagram", to.recv_from(&mut buffer))
        .await
        .unwrap();
    assert_eq!((&buffer[..length], peer), (&b"hello"[..], one.at6(5002)));
}

/// A listener as the proxy makes it: marked, in the pod.
fn marked_listener(netns: &Netns, port: u16) -> TcpListener {
    let socket = netns
        .run(|| Socket::new(Domain::IPV6, Type::STREAM, Some(Protocol::TCP)))
        .unwrap();
    socket.set_mark(PROXY_MARK).unwrap();
    socket.set_only_v6(false).unwrap();
    socket.set_nonblocking(true).unwrap();
    socket
        .bind(&SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port).into())
        .unwrap();
    socket.listen(16).unwrap();
    TcpListener::from_std(socket.into()).unwrap()
}

fn original_destination(stream: &tokio::net::TcpStream) -> SocketAddr {
    let socket = SockRef::from(stream);
    let address = socket
        .original_dst_v4()
        .or_else(|_| socket.original_dst_v6())
        .unwrap();
    SockAddr::as_socket(&address).unwrap()
}

#[tokio::test]
async fn the_rules_send_what_leaves_a_pod_to_15001() {
    let world = World::new(2).unwrap();
    let pod = world.node(0).pod(&PodSpec::captured("web")).unwrap();
    let outbound = marked_listener(pod.netns(), 15001);
    for target in ["192.0.2.7:80", "[2001:db8::7]:80"] {
        let target: SocketAddr = target.parse().unwrap();
        let mut client = wait::soon("connect", pod.connect(target)).await.unwrap();
        let (mut server, _) = wait::soon("accept", outbound.accept()).await.unwrap();
        assert_eq!(original_destination(&server), target);
        server.write_all(b"back").await.unwrap();
        let mut answer = [0; 4];
        wait::soon("answer", client.read_exact(&mut answer))
            .await
            .unwrap();
        assert_eq!(&answer, b"back");
    }
}

#[tokio::test]
async fn the_rules_send_what_enters_a_pod_to_15006_and_let_a_spoofed_upstream_work() {
    let world = World::new(2).unwrap();
    let pod = world.node(0).pod(&PodSpec::captured("api")).unwrap();
    let outside = world.node(1).pod(&PodSpec::plain("outside")).unwrap();
    let inbound = marked_listener(pod.netns(), 15006);
    let app = pod.serve(8080, Behaviour::Whoami).unwrap();
    for target in [app.address, app.address6] {
        let from = SocketAddr::new(
            if target.is_ipv4() {
                outside.ip4()
            } else {
                outside.ip6()
            },
            40_001,
        );
        let _client = wait::soon("connect", outside.connect_from(from, target))
            .await
            .unwrap();
        let (server, peer) = wait::soon("accept", inbound.accept()).await.unwrap();
        assert_eq!(peer.ip().to_canonical(), from.ip());
        assert_eq!(original_destination(&server), target);

        let upstream = traffic::tcp_socket(pod.netns(), target).unwrap();
        upstream.set_mark(PROXY_MARK).unwrap();
        if target.is_ipv4() {
            upstream.set_ip_transparent_v4(true).unwrap();
        } else {
            upstream.set_ip_transparent_v6(true).unwrap();
        }
        upstream
            .bind(&SocketAddr::new(from.ip(), 0).into())
            .unwrap();
        let upstream = tokio::net::TcpSocket::from_std_stream(upstream.into());
        let mut stream = wait::soon("spoofed connect", upstream.connect(target))
            .await
            .unwrap();
        let mut line = vec![0; 64];
        let length = wait::soon("answer over lo", stream.read(&mut line))
            .await
            .unwrap();
        let seen: SocketAddr = std::str::from_utf8(&line[..length])
            .unwrap()
            .trim()
            .parse()
            .unwrap();
        assert_eq!(seen.ip(), from.ip());
    }
}

#[tokio::test]
async fn the_rules_leave_loopback_the_own_address_probes_and_15008_alone() {
    let world = World::new(1).unwrap();
    let pod = world.node(0).pod(&PodSpec::captured("api")).unwrap();
    let app = pod.serve(8080, Behaviour::Whoami).unwrap();
    let hbone = pod.serve(15008, Behaviour::Whoami).unwrap();
    let loopback: IpAddr = Ipv4Addr::LOCALHOST.into();
    assert_eq!(
        pod.seen_as(SocketAddr::new(loopback, 8080))
            .await
            .unwrap()
            .ip(),
        loopback
    );
    assert_eq!(pod.seen_as(app.address).await.unwrap().ip(), pod.ip4());
    assert_eq!(pod.seen_as(app.address6).await.unwrap().ip(), pod.ip6());
    let client = world.node(0).pod(&PodSpec::plain("client")).unwrap();
    assert_eq!(
        client.seen_as(hbone.address).await.unwrap().ip(),
        client.ip4()
    );
    assert!(
        client.connect(app.address).await.is_err(),
        "captured, and nobody listens on 15006"
    );

    let node = world.node(0).netns();
    node.command(
        "ip",
        &["addr", "add", "169.254.7.127/32", "dev", "pods"],
        "",
    )
    .unwrap();
    let probe = "169.254.7.127:0".parse().unwrap();
    wait::soon("probe", traffic::connect_from(node, probe, app.address))
        .await
        .unwrap();
}

#[tokio::test]
async fn an_ingress_pod_is_entered_directly_and_left_through_15001() {
    let world = World::new(1).unwrap();
    let pod = world
        .node(0)
        .pod(&PodSpec::captured("ingress").redirect(Redirect::ingress()))
        .unwrap();
    let client = world.node(0).pod(&PodSpec::plain("client")).unwrap();
    let app = pod.serve(8080, Behaviour::Whoami).unwrap();
    assert_eq!(
        client.seen_as(app.address).await.unwrap().ip(),
        client.ip4()
    );
    assert!(
        pod.connect(client.at(80)).await.is_err(),
        "captured, and nobody listens on 15001"
    );
}

#[tokio::test]
async fn dns_queries_are_redirected_only_when_asked_for() {
    let world = World::new(1).unwrap();
    for (redirect, captured) in [
        (Redirect::default(), false),
        (Redirect::default().with_dns(), true),
    ] {
        let pod = world
            .node(0)
            .pod(&PodSpec::captured("dns").redirect(redirect))
            .unwrap();
        let resolver = pod.udp("127.0.0.1:15053".parse().unwrap()).unwrap();
        let app = pod.udp("0.0.0.0:0".parse().unwrap()).unwrap();
        app.send_to(b"query", "192.0.2.53:53").await.unwrap();
        let mut buffer = [0; 16];
        let got =
            tokio::time::timeout(Duration::from_millis(300), resolver.recv_from(&mut buffer)).await;
        assert_eq!(got.is_ok(), captured);
        if let Ok(Ok((_, peer))) = got {
            resolver.send_to(b"answer", peer).await.unwrap();
            let (_, from) = wait::soon("answer", app.recv_from(&mut buffer))
                .await
                .unwrap();
            assert_eq!(from, "192.0.2.53:53".parse().unwrap());
        }
    }
}

#[tokio::test]
async fn the_agent_talks_with_a_client_and_passes_descriptors() {
    let world = World::new(1).unwrap();
    let pod = world.node(0).pod(&PodSpec::captured("web")).unwrap();
    let path = world.file("agent.sock");
    let mut agent = Agent::bind(&path).unwrap();
    let mut client = JoinSet::new();
    client.spawn(async move {
        let socket = UnixSeqpacket::connect(path).await.unwrap();
        socket.send(&[0x08, 0x01]).await.unwrap();
        let mut seen = Vec::new();
        for answer in [&b"\x0a\x00"[..], b"\x0a\x00", b"\x0a\x03\x0a\x01x"] {
            let (mut buffer, mut space) = ([0; 1024], [0; 128]);
            let (info, ancillary) = socket
                .recv_with_ancillary(&mut buffer, &mut space)
                .await
                .unwrap();
            let fds: Vec<_> = ancillary
                .into_messages()
                .filter_map(|message| match message {
                    OwnedAncillaryMessage::FileDescriptors(fds) => Some(fds),
                    _ => None,
                })
                .flatten()
                .collect();
            seen.push((buffer[..info.bytes_read()].to_vec(), fds));
            socket.send(answer).await.unwrap();
        }
        seen
    });
    let session = agent.accept().await.unwrap();
    session.snapshot(&[&pod]).await.unwrap();
    assert_eq!(session.del(pod.uid()).await.unwrap(), Err("x".to_owned()));
    session.closed(wait::SOON).await.unwrap();
    let seen = client.join_next().await.unwrap().unwrap();
    assert_eq!(seen[0].1.len(), 1);
    let stat = nix::sys::stat::fstat(seen[0].1[0].as_fd()).unwrap();
    assert_eq!((stat.st_dev, stat.st_ino), pod.netns().id());
    assert_eq!(seen[1].0, b"\x1a\x00");
    assert!(seen[1].1.is_empty() && seen[2].1.is_empty());
}

#[tokio::test]
async fn raw_peers_speak_hbone_with_each_other() {
    let world = World::new(2).unwrap();
    let client = world.node(0).pod(&PodSpec::plain("client")).unwrap();
    let server = world.node(1).pod(&PodSpec::plain("server")).unwrap();
    let authority = world.authority();
    let server_id = authority.issue(&server.spiffe_id()).unwrap();
    let hello = Hello::new(&authority.issue(&client.spiffe_id()).unwrap());
    let mut listener = RawServer::listen(&server, &server_id, authority.root()).unwrap();
    listener.settings(|builder| {
        builder.max_concurrent_streams(7);
    });
    let wire = Capture::start(world.link()).unwrap();
    let (raw, connection) = tokio::join!(
        RawClient::connect(client.netns(), server.at(15008), &hello),
        listener.accept()
    );
    let (raw, mut connection) = (raw.unwrap(), connection.unwrap());
    assert_eq!(raw.server_id, Some(server.spiffe_id()));
    assert_eq!(connection.client_id, Some(client.spiffe_id()));
    assert_eq!(connection.peer.ip(), client.ip4());
    let settings = raw
        .frames
        .wait("SETTINGS", |frame| frame.is_settings())
        .await;
    assert_eq!(settings.setting(setting::MAX_CONCURRENT_STREAMS), Some(7));

    let mut echo = JoinSet::new();
    echo.spawn(async move {
        let incoming = connection.next().await.unwrap();
        assert_eq!(incoming.authority(), "10.0.0.7:80");
        assert_eq!(incoming.header("forwarded"), "for=x");
        incoming.echo().await.unwrap();
        connection
    });
    let mut tunnel = raw
        .tunnel_with("10.0.0.7:80", &[("forwarded", "for=x")])
        .await
        .unwrap();
    tunnel.ping(&traffic::pattern(200_000)).await.unwrap();
    tunnel.ping(b"not to be read on the wire").await.unwrap();
    tunnel.finish().unwrap();
    assert!(tunnel.read_to_end().await.unwrap().is_empty());
    let connection = wait::soon("echo ends", echo.join_next())
        .await
        .unwrap()
        .unwrap();
    connection.goaway().await.unwrap();
    raw.frames
        .wait("GOAWAY", |frame| frame.error_code() == Some(0))
        .await;
    assert!(wire.bytes_to_port(15008) > 200_000);
    assert!(!wire.can_read(b"not to be read"));
}

#[tokio::test]
async fn a_raw_server_refuses_clients_of_another_root_and_without_certificate() {
    let world = World::new(1).unwrap();
    let client = world.node(0).pod(&PodSpec::plain("client")).unwrap();
    let server = world.node(0).pod(&PodSpec::plain("server")).unwrap();
    let authority = world.authority();
    let server_id = authority.issue(&server.spiffe_id()).unwrap();
    let foreign = Authority::new("another root")
        .unwrap()
        .issue(&client.spiffe_id())
        .unwrap();
    let expired = authority.issue_expired(&client.spiffe_id()).unwrap();
    let listener = RawServer::listen(&server, &server_id, authority.root()).unwrap();
    for hello in [
        Hello::new(&foreign),
        Hello::new(&expired),
        Hello::anonymous(),
    ] {
        let (raw, connection) = tokio::join!(
            RawClient::connect(client.netns(), server.at(15008), &hello),
            listener.accept()
        );
        assert!(raw.is_err() && connection.is_err());
    }
}

#[tokio::test]
async fn a_capture_reads_what_is_not_encrypted() {
    let world = World::new(2).unwrap();
    let client = world.node(0).pod(&PodSpec::plain("client")).unwrap();
    let server = world.node(1).pod(&PodSpec::plain("server")).unwrap();
    let app = server.serve(0, Behaviour::Echo).unwrap();
    let wire = Capture::start(world.link()).unwrap();
    for address in [app.address, app.address6] {
        client.ask(address, b"in clear").await.unwrap();
        let readable =
            async || (!wire.packets(|packet| packet.to == address).is_empty()).then_some(());
        wait::until(wait::SOON, "packets are seen", readable).await;
    }
    assert!(wire.can_read(b"in clear"));
    assert!(!wire.can_read(b"never said"));
}

#[tokio::test]
async fn a_world_leaves_nothing_behind() {
    let (directory, id) = {
        let world = World::new(2).unwrap();
        let pod = world.node(0).pod(&PodSpec::captured("web")).unwrap();
        (world.directory().to_owned(), pod.netns().id())
    };
    assert!(!directory.exists());
    for entry in std::fs::read_dir("/proc/self/fd").unwrap().flatten() {
        if let Ok(meta) = std::fs::metadata(entry.path()) {
            use std::os::unix::fs::MetadataExt as _;
            assert_ne!(
                (meta.dev(), meta.ino()),
                id,
                "a descriptor of the namespace is left"
            );
        }
    }
}
