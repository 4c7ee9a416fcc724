//! Records after the handshake, from a peer that has the keys and does with them what it likes.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "not a part of the proxy: a panic is a failed test"
)]

use std::{
    io,
    sync::{Arc, LazyLock},
};

use rustls::{ClientConfig, ServerConfig, pki_types::ServerName};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream},
    runtime::{Builder, Runtime},
};

use super::{
    handshake::{accept, connect},
    record::Content,
    stream::TlsStream,
};
use crate::tunnel::testing::{spiffe, svids};

/// Records of a peer, then what its victim reads. The first byte says how much the victim reads at a time; what follows are steps: an
/// operation, a length, and as many bytes.
///
/// | operation | what the peer sends |
/// |---|---|
/// | 0 | data |
/// | 1 | handshake messages |
/// | 2 | an alert |
/// | 3 | a record of which the protected text, with its type and padding, is given |
/// | 4 | bytes that no key protects |
/// | 5 | data of which a bit is changed on the way |
/// | 6 | a change of keys, as it should be |
///
/// # Panics
/// When the victim reads anything but a prefix of what was sent as data.
pub fn records(bytes: &[u8]) {
    let Some((&appetite, script)) = bytes.split_first() else {
        return;
    };
    SCENE.runtime.block_on(async {
        let (near, far) = tokio::io::duplex(ROOM);
        let name = ServerName::from(std::net::IpAddr::from([10, 0, 0, 1]));
        let (peer, victim) = tokio::join!(
            connect(near, Arc::clone(&SCENE.client), name),
            accept(far, Arc::clone(&SCENE.server)),
        );
        let (peer, victim) = (peer.expect("a client"), victim.expect("a server"));
        let sent = play(peer, script).await;
        let read = consume(victim, usize::from(appetite) * 16 + 1).await;
        assert!(sent.starts_with(&read), "{} bytes read", read.len());
    });
}

/// A peer without keys: what it says instead of a handshake. Of the first byte, the lowest bit says that the peer is the server, and
/// the rest how many of its bytes come at a time.
///
/// # Panics
/// When the victim takes that for a handshake.
pub fn handshake(bytes: &[u8]) {
    let Some((&how, said)) = bytes.split_first() else {
        return;
    };
    SCENE.runtime.block_on(async {
        let (near, mut far) = tokio::io::duplex(usize::from(how / 2) * 8 + 1);
        let victim = async {
            if how & 1 == 1 {
                let name = ServerName::from(std::net::IpAddr::from([10, 0, 0, 1]));
                connect(near, Arc::clone(&SCENE.client), name).await
            } else {
                accept(near, Arc::clone(&SCENE.server)).await
            }
        };
        let peer = async {
            let (mut read, mut write) = tokio::io::split(&mut far);
            let saying = async {
                let _ = write.write_all(said).await;
                let _ = write.shutdown().await;
            };
            let hearing = async {
                let mut buffer = [0; 4096];
                while let Ok(1..) = read.read(&mut buffer).await {}
            };
            tokio::join!(saying, hearing);
        };
        let (shaken, ()) = tokio::join!(victim, peer);
        assert!(shaken.is_err(), "a handshake without keys");
    });
}

struct Scene {
    runtime: Runtime,
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
}

static SCENE: LazyLock<Scene> = LazyLock::new(|| {
    let runtime = Builder::new_current_thread()
        .enable_time()
        .build()
        .expect("a runtime");
    let svids = runtime.block_on(svids(&["peer", "victim"]));
    let [peer, victim] = &*svids else {
        panic!("two were asked for");
    };
    let expected = Arc::from([spiffe("victim")]);
    let (client, server) = (peer.client_config(&expected), victim.server_config());
    Scene {
        runtime,
        client,
        server,
    }
});

/// Sends what the script says; yields what of it is data.
async fn play(mut peer: TlsStream<DuplexStream>, mut script: &[u8]) -> Vec<u8> {
    let mut sent = Vec::new();
    while let Some((&[operation, length], rest)) = script.split_first_chunk() {
        let (given, rest) = rest.split_at(rest.len().min(length.into()));
        script = rest;
        if step(&mut peer, operation % 7, given, &mut sent).is_err() {
            break;
        }
        // As much as fits is on its way before the victim reads: more is never written.
        if peer.flush().await.is_err() {
            break;
        }
    }
    sent
}

/// Puts one step among what the peer is about to write.
fn step(
    peer: &mut TlsStream<DuplexStream>,
    operation: u8,
    given: &[u8],
    sent: &mut Vec<u8>,
) -> io::Result<()> {
    match operation {
        0 => {
            sent.extend_from_slice(given);
            peer.seal(Content::Data, given)
        }
        1 => peer.seal(Content::Handshake, given),
        2 => peer.seal(Content::Alert, given),
        3 => {
            let end = given.iter().rposition(|byte| *byte != 0);
            if let Some(end) = end.filter(|end| given[*end] == DATA) {
                sent.extend_from_slice(&given[..end]);
            }
            peer.seal_inner(given)
        }
        4 => {
            let room = peer.outgoing.spare(given.len());
            room[..given.len()].copy_from_slice(given);
            peer.outgoing.commit(given.len());
            Ok(())
        }
        5 => {
            peer.seal(Content::Data, given)?;
            if let Some(last) = peer.outgoing.queued_mut().last_mut() {
                *last ^= 1;
            }
            Ok(())
        }
        _ => peer.update_tx(),
    }
}

/// Reads to the end or to the first error.
async fn consume(mut victim: TlsStream<DuplexStream>, at_once: usize) -> Vec<u8> {
    let (mut read, mut buffer) = (Vec::new(), vec![0; at_once]);
    while let Ok(count @ 1..) = victim.read(&mut buffer).await {
        read.extend_from_slice(&buffer[..count]);
    }
    read
}

/// Content type of data (RFC 8446 section 5.1).
const DATA: u8 = 23;
/// More than the records of any script take: a script is at most a few thousand bytes long.
const ROOM: usize = 1 << 20;
