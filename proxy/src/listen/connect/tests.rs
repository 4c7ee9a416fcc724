//! Connections out of real namespaces.

use std::net::Ipv4Addr;

use socket2::SockRef;
use tokio::{io::AsyncReadExt as _, io::AsyncWriteExt as _, net::TcpListener};

use super::*;
use crate::listen::testing::{fresh_netns, run, sockets};

/// A pod with an application address of each family, whose answers to any client come back over
/// `lo`, as the redirection rules arrange it.
fn pod() -> Netns {
    let pod = fresh_netns();
    pod.enter(|| {
        for line in [
            "ip addr add 10.78.0.9/32 dev lo",
            "ip addr add fd78::9/128 dev lo nodad",
            "ip route add local default dev lo table 100",
            "ip -6 route add local default dev lo table 100",
            "ip rule add from 10.78.0.9 lookup 100",
            "ip -6 rule add from fd78::9 lookup 100",
        ] {
            run(line);
        }
    })
    .unwrap();
    pod
}

fn app(pod: &Netns, at: &str) -> TcpListener {
    let listener = pod
        .enter(|| std::net::TcpListener::bind(at))
        .unwrap()
        .unwrap();
    listener.set_nonblocking(true).unwrap();
    TcpListener::from_std(listener).unwrap()
}

fn range(port: u16) -> &'static str {
    match port {
        0..=1023 => "privileged",
        1024..=10239 => "extension",
        10240..=32767 => "preferred",
        32768.. => "clients",
    }
}

#[tokio::test]
async fn the_application_sees_the_client() {
    let pod = pod();
    for (at, client) in [
        ("10.78.0.9:80", "192.0.2.7"),
        ("[fd78::9]:80", "2001:db8::7"),
    ] {
        let app = app(&pod, at);
        let to = app.local_addr().unwrap();
        let ports = SourcePorts::new();
        let ip: IpAddr = client.parse().unwrap();
        let from = LocalAddress::Client { ip, ports: &ports };
        let mut up = connect(&pod, &sockets(), to, from).await.unwrap();
        let (mut seen, peer) = app.accept().await.unwrap();
        assert_eq!(peer.ip(), ip);
        assert_eq!(peer.port(), up.port.as_ref().unwrap().port());
        assert_eq!(range(peer.port()), "preferred");
        up.stream.write_all(b"ping").await.unwrap();
        let mut read = [0; 4];
        seen.read_exact(&mut read).await.unwrap();
        seen.write_all(&read).await.unwrap();
        up.stream.read_exact(&mut read).await.unwrap();
        assert_eq!(&read, b"ping");
    }
}

#[tokio::test]
async fn carries_the_options_and_the_pods_own_address_by_default() {
    let pod = pod();
    let app = app(&pod, "10.78.0.9:80");
    let to = app.local_addr().unwrap();
    let up = connect(&pod, &sockets(), to, LocalAddress::Any)
        .await
        .unwrap();
    let (_seen, peer) = app.accept().await.unwrap();
    assert_eq!(peer.ip(), IpAddr::from([10, 78, 0, 9]));
    assert!(up.port.is_none());
    let socket = SockRef::from(&up.stream);
    assert_eq!(socket.mark().unwrap(), 1337);
    assert!(socket.tcp_nodelay().unwrap());
    assert_eq!(socket.tcp_keepalive_interval().unwrap().as_secs(), 180);
}

#[tokio::test]
async fn a_pod_that_calls_itself_and_a_foreign_family_keep_the_pods_address() {
    let pod = pod();
    let app = app(&pod, "10.78.0.9:80");
    let ports = SourcePorts::new();
    for client in ["10.78.0.9", "2001:db8::7"] {
        let ip = client.parse().unwrap();
        let from = LocalAddress::Client { ip, ports: &ports };
        let to = app.local_addr().unwrap();
        let up = connect(&pod, &sockets(), to, from).await.unwrap();
        assert!(up.port.is_none());
        let (_, peer) = app.accept().await.unwrap();
        assert_eq!(peer.ip(), to.ip());
    }
}

#[tokio::test]
async fn passes_over_ports_that_listeners_hold() {
    let pod = pod();
    let app = app(&pod, "10.78.0.9:80");
    // Learn where the walk is, then put listeners in its way.
    let ports = SourcePorts::new();
    let ip = IpAddr::from([192, 0, 2, 7]);
    let from = LocalAddress::Client { ip, ports: &ports };
    let to = app.local_addr().unwrap();
    let first = connect(&pod, &sockets(), to, from).await.unwrap();
    let here = first.port.as_ref().unwrap().port();
    // Near the end of the range the walk starts over; what blocks it then is not in the way.
    let blocked: Vec<u16> = (here + 1..=(here + 5).min(32767)).collect();
    let _in_the_way: Vec<_> = blocked
        .iter()
        .map(|port| self::app(&pod, &format!("0.0.0.0:{port}")))
        .collect();
    let second = connect(&pod, &sockets(), to, from).await.unwrap();
    let got = second.port.as_ref().unwrap().port();
    assert!(!blocked.contains(&got) && got != here);
}

#[tokio::test]
async fn a_tuple_the_kernel_still_remembers_is_passed_over() {
    let pod = pod();
    let app = app(&pod, "10.78.0.9:80");
    let ip = IpAddr::from([192, 0, 2, 7]);
    let to = app.local_addr().unwrap();
    let old_proxy = SourcePorts::new();
    let from = LocalAddress::Client {
        ip,
        ports: &old_proxy,
    };
    let first = connect(&pod, &sockets(), to, from).await.unwrap();
    let (_seen, peer) = app.accept().await.unwrap();
    // Another allocator knows nothing of the first one's port. Make it the only one left.
    let ports = SourcePorts::new();
    let mut all: Vec<_> = std::iter::from_fn(|| ports.take(ip, to, Range::Preferred)).collect();
    all.retain(|lease| lease.port() != peer.port() && lease.port() != 2000);
    let from = LocalAddress::Client { ip, ports: &ports };
    let second = connect(&pod, &sockets(), to, from).await.unwrap();
    assert_eq!(second.port.as_ref().unwrap().port(), 2000);
    drop(first);
}

#[tokio::test]
async fn a_block_of_another_proxy_is_leapt_over() {
    let pod = pod();
    let app = app(&pod, "10.78.0.9:80");
    let ip = IpAddr::from([192, 0, 2, 7]);
    let to = app.local_addr().unwrap();
    let (old_proxy, ports) = (SourcePorts::new(), SourcePorts::new());
    let from_old = LocalAddress::Client {
        ip,
        ports: &old_proxy,
    };
    let (mut held, mut taken) = (Vec::new(), Vec::new());
    for (first, last, wanted) in [
        (10240, 32767, Range::Preferred),
        (1024, 10239, Range::Extension),
    ] {
        let block = held.len();
        for _ in 0..MAX_ROUNDS {
            held.push(connect(&pod, &sockets(), to, from_old).await.unwrap());
        }
        // Make the walk of our own come to the block next.
        let start = held[block].port.as_ref().unwrap().port();
        assert!((first..=last).contains(&start));
        let before = if start == first { last } else { start - 1 };
        while ports.take(ip, to, wanted).unwrap().port() != before {}
        // Nothing else is left to the other proxy in this range.
        let rest = std::iter::from_fn(|| {
            let lease = old_proxy.take(ip, to, Range::Preferred)?;
            (lease.port() >= first).then_some(lease)
        });
        taken.extend(rest);
    }
    let from = LocalAddress::Client { ip, ports: &ports };
    let ours = connect(&pod, &sockets(), to, from).await.unwrap();
    assert_eq!(range(ours.port.as_ref().unwrap().port()), "preferred");
}

#[tokio::test]
async fn never_falls_back_to_the_pods_address_when_ports_run_out() {
    let pod = pod();
    let app = app(&pod, "10.78.0.9:80");
    let ip = IpAddr::from([192, 0, 2, 7]);
    let to = app.local_addr().unwrap();
    let ports = SourcePorts::new();
    let _all: Vec<_> = std::iter::from_fn(|| ports.take(ip, to, Range::Preferred)).collect();
    let from = LocalAddress::Client { ip, ports: &ports };
    let refused = connect(&pod, &sockets(), to, from).await.unwrap_err();
    assert!(matches!(refused, ConnectError::PortsExhausted { .. }));
}

#[tokio::test]
async fn says_what_failed() {
    let pod = pod();
    let closed = SocketAddr::from(([10, 78, 0, 9], 81));
    let refused = connect(&pod, &sockets(), closed, LocalAddress::Any).await;
    assert!(matches!(refused, Err(ConnectError::Connect { .. })));

    // A full backlog: the kernel drops the SYN and says nothing.
    let silent = pod
        .enter(|| {
            let socket = Socket::new(Domain::IPV4, socket2::Type::STREAM, None)?;
            socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 82)).into())?;
            socket.listen(0).map(|()| socket)
        })
        .unwrap()
        .unwrap();
    let to = silent.local_addr().unwrap().as_socket().unwrap();
    let mut settings = sockets();
    settings.connect_timeout = Duration::from_millis(300);
    let mut open = Vec::new();
    let timed_out = loop {
        match connect(&pod, &settings, to, LocalAddress::Any).await {
            Ok(up) => open.push(up),
            Err(error) => break error,
        }
    };
    assert!(matches!(timed_out, ConnectError::Timeout { .. }));
}
