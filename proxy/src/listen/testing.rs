//! Namespaces and settings for the tests of this room and of those above it.

use std::{fs::File, process::Command, time::Duration};

use nix::sched::{CloneFlags, unshare};

use super::netns::Netns;
use crate::config::{Keepalive, OriginalSource, Ports, Sockets};

/// A new network namespace with `lo` up. It lives as long as the value.
///
/// # Panics
/// Without the privilege to make one: these tests run as root, or under `unshare -Urn`.
pub(crate) fn fresh_netns() -> Netns {
    let made = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).expect(
            "tests need to make network namespaces: run them as root or under unshare -Urn",
        );
        run("ip link set lo up");
        let file = File::open("/proc/thread-self/ns/net").expect("proc shows the namespace");
        Netns::from_fd(file.into()).expect("a namespace file")
    });
    made.join().expect("the namespace was made")
}

/// Runs a command line in the namespace of the calling thread.
///
/// # Panics
/// If it fails.
pub(crate) fn run(line: &str) {
    let mut words = line.split_whitespace();
    let program = words.next().expect("a program");
    let done = Command::new(program).args(words).output().expect(line);
    assert!(
        done.status.success(),
        "{line}: {}",
        String::from_utf8_lossy(&done.stderr)
    );
}

/// The settings of a shared-mode proxy.
pub(crate) fn sockets() -> Sockets {
    Sockets {
        mark: Some(1337),
        reuse_port: true,
        original_source: OriginalSource::Auto,
        ipv6: true,
        keepalive: Some(Keepalive {
            time: Duration::from_secs(180),
            interval: Duration::from_secs(180),
            retries: 9,
        }),
        user_timeout: None,
        tunnel_timeout: Some(Duration::from_secs(15)),
        connect_timeout: Duration::from_secs(10),
        backlog: 128,
    }
}

/// The usual ports.
pub(crate) fn ports() -> Ports {
    Ports {
        admin: 15000,
        stats: 15020,
        readiness: 15021,
        outbound: 15001,
        inbound_plaintext: 15006,
        hbone: 15008,
        socks5: 15080,
    }
}
