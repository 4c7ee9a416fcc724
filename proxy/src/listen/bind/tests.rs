//! Listeners in real namespaces.

use std::{
    collections::HashSet, net::TcpStream as StdStream, os::fd::AsRawFd as _, time::Duration,
};

use socket2::SockRef;

use super::*;
use crate::listen::successor::prefer_successor;
use crate::listen::testing::{fresh_netns, ports, run, sockets};

/// Connects from inside `netns`, to loopback of the given family.
fn dial(netns: &Netns, host: &str, port: u16) -> io::Result<StdStream> {
    let to = SocketAddr::new(host.parse().unwrap(), port);
    netns.enter(|| StdStream::connect_timeout(&to, Duration::from_secs(5)))?
}

#[tokio::test]
async fn listens_on_every_port_for_both_families_in_the_pod_only() {
    let pod = fresh_netns();
    let listeners = bind(&pod, &sockets(), &ports()).unwrap();
    assert!(listeners.transparent);
    for port in [15001, 15006, 15008] {
        for host in ["127.0.0.1", "::1"] {
            dial(&pod, host, port).unwrap();
        }
    }
    let elsewhere = fresh_netns();
    assert!(dial(&elsewhere, "127.0.0.1", 15008).is_err());
    drop(listeners);
    assert!(dial(&pod, "127.0.0.1", 15008).is_err());
}

#[tokio::test]
async fn accepted_sockets_carry_the_options() {
    let pod = fresh_netns();
    let mut settings = sockets();
    settings.user_timeout = Some(Duration::from_secs(1800));
    settings.tunnel_timeout = Some(Duration::from_secs(12));
    let listeners = bind(&pod, &settings, &ports()).unwrap();
    for (listener, timeout, probes) in [
        (&listeners.outbound, 1800, [180, 180, 9]),
        (&listeners.inbound_plaintext, 1800, [180, 180, 9]),
        (&listeners.hbone, 12, [6, 3, 2]),
    ] {
        let port = listener.local_addr().unwrap().port();
        let _client = dial(&pod, "127.0.0.1", port).unwrap();
        let (stream, _) = crate::listen::accept(listener).await;
        let socket = SockRef::from(&stream);
        assert_eq!(socket.mark().unwrap(), 1337);
        assert!(socket.tcp_nodelay().unwrap());
        assert!(socket.ip_transparent_v4().unwrap());
        assert_eq!(
            socket.tcp_user_timeout().unwrap(),
            Some(Duration::from_secs(timeout))
        );
        assert!(socket.keepalive().unwrap());
        let [time, interval] = [
            socket.tcp_keepalive_time().unwrap().as_secs(),
            socket.tcp_keepalive_interval().unwrap().as_secs(),
        ];
        let retries = socket.tcp_keepalive_retries().unwrap();
        assert_eq!([time, interval, retries.into()], probes);
    }
}

#[tokio::test]
async fn two_proxies_share_the_ports_of_a_pod() {
    let pod = fresh_netns();
    let old = bind(&pod, &sockets(), &ports()).unwrap();
    let new = bind(&pod, &sockets(), &ports()).unwrap();
    // Connections are spread over both; whoever stays gets all.
    assert_eq!(reached(&pod, &old, &new).await.len(), 2);
    drop(old);
    for _ in 0..20 {
        let _client = dial(&pod, "127.0.0.1", 15001).unwrap();
        crate::listen::accept(&new.outbound).await;
    }
}

/// Which of two gets connections, when there are many.
async fn reached(pod: &Netns, old: &PodListeners, new: &PodListeners) -> HashSet<&'static str> {
    let mut reached = HashSet::new();
    for _ in 0..200 {
        let _client = dial(pod, "127.0.0.1", 15001).unwrap();
        tokio::select! {
            _ = crate::listen::accept(&old.outbound) => reached.insert("old"),
            _ = crate::listen::accept(&new.outbound) => reached.insert("new"),
        };
    }
    reached
}

#[tokio::test]
async fn a_proxy_shares_with_a_newcomer_after_an_earlier_upgrade() {
    let pod = fresh_netns();
    let oldest = bind(&pod, &sockets(), &ports()).unwrap();
    let old = bind(&pod, &sockets(), &ports()).unwrap();
    prefer_successor(&oldest.outbound).unwrap();
    drop(oldest);
    let new = bind(&pod, &sockets(), &ports()).unwrap();
    assert_eq!(reached(&pod, &old, &new).await.len(), 2);
}

#[tokio::test]
async fn a_port_in_use_fails_the_pod_and_leaves_nothing_behind() {
    let pod = fresh_netns();
    let squatter = pod
        .enter(|| std::net::TcpListener::bind("0.0.0.0:15008"))
        .unwrap()
        .unwrap();
    let error = bind(&pod, &sockets(), &ports()).unwrap_err();
    assert_eq!((error.port, error.step), (15008, Step::Bind));
    assert!(error.to_string().contains("another user id"));
    assert!(dial(&pod, "127.0.0.1", 15001).is_err());
    drop(squatter);
    bind(&pod, &sockets(), &ports()).unwrap();
}

#[tokio::test]
async fn captures_ipv4_where_sockets_default_to_ipv6_only() {
    let pod = fresh_netns();
    pod.enter(|| std::fs::write("/proc/sys/net/ipv6/bindv6only", "1"))
        .unwrap()
        .unwrap();
    let _listeners = bind(&pod, &sockets(), &ports()).unwrap();
    dial(&pod, "127.0.0.1", 15006).unwrap();
    dial(&pod, "::1", 15006).unwrap();
}

#[tokio::test]
async fn serves_ipv4_where_the_pod_has_no_ipv6() {
    let pod = fresh_netns();
    for scope in ["all", "lo"] {
        let path = format!("/proc/sys/net/ipv6/conf/{scope}/disable_ipv6");
        pod.enter(|| std::fs::write(path, "1")).unwrap().unwrap();
    }
    let _listeners = bind(&pod, &sockets(), &ports()).unwrap();
    dial(&pod, "127.0.0.1", 15006).unwrap();
    assert!(dial(&pod, "::1", 15006).is_err());
}

#[tokio::test]
async fn ipv6_turned_off_binds_ipv4_only() {
    let pod = fresh_netns();
    let mut settings = sockets();
    settings.ipv6 = false;
    let listeners = bind(&pod, &settings, &ports()).unwrap();
    assert!(listeners.hbone.local_addr().unwrap().is_ipv4());
    dial(&pod, "127.0.0.1", 15006).unwrap();
    assert!(dial(&pod, "::1", 15006).is_err());
}

#[tokio::test]
async fn original_source_off_never_tries() {
    let pod = fresh_netns();
    let mut settings = sockets();
    settings.original_source = OriginalSource::Off;
    let listeners = bind(&pod, &settings, &ports()).unwrap();
    assert!(!listeners.transparent);
    let socket = SockRef::from(&listeners.outbound);
    assert!(!socket.ip_transparent_v4().unwrap());
}

#[tokio::test]
async fn reads_the_original_destination_of_a_redirected_connection() {
    let pod = fresh_netns();
    let listeners = bind(&pod, &sockets(), &ports()).unwrap();
    pod.enter(|| {
        run("ip link add pods-out type veth peer name pods-peer");
        run("ip link set pods-peer up");
        run("ip link set pods-out up");
        run("ip addr add 10.77.0.1/24 dev pods-out");
        run("ip addr add fd77::1/64 dev pods-out nodad");
        let rule = "meta mark != 0x539 meta l4proto tcp redirect to :15001";
        let chain = "{ type nat hook output priority -100 ; }";
        run("nft add table inet t");
        run(&format!("nft add chain inet t out {chain}"));
        run(&format!("nft add rule inet t out oifname pods-out {rule}"));
    })
    .unwrap();
    for target in ["10.77.0.20:8080", "[fd77::20]:8080"] {
        let target: SocketAddr = target.parse().unwrap();
        let client = dial(&pod, &target.ip().to_string(), 8080).unwrap();
        let (stream, peer) = crate::listen::accept(&listeners.outbound).await;
        assert_eq!(peer, client.local_addr().unwrap());
        assert_eq!(
            crate::listen::original_destination(&stream).unwrap(),
            target
        );
    }
}

#[tokio::test]
async fn descriptors_are_closed_on_exec() {
    let pod = fresh_netns();
    let listeners = bind(&pod, &sockets(), &ports()).unwrap();
    let flags = nix::fcntl::fcntl(&listeners.hbone, nix::fcntl::FcntlArg::F_GETFD).unwrap();
    assert!(listeners.hbone.as_raw_fd() > 2);
    assert_eq!(flags & libc::FD_CLOEXEC, libc::FD_CLOEXEC);
}
