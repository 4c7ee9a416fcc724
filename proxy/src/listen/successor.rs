//! Handing a listener over to the process that will take its place.

use std::{io, os::fd::AsFd};

use nix::{
    libc::{BPF_K, BPF_RET, sock_filter, sock_fprog},
    sys::socket::{setsockopt, sockopt},
};

use super::sys::detach_program;

/// Sends new connections, or datagrams, to the socket that was bound after `listener` to the same
/// port, so that the queue of `listener` can run empty before it is closed. During an upgrade that is the new
/// proxy's.
///
/// The kernel keeps the sockets of a port in the order in which they began to listen and moves
/// the last one into the place of one that closes, so the successor of the older of two is number
/// one. Without a successor the number leads nowhere and the kernel goes on as before. If the
/// younger one stops first, it keeps what arrives until it closes. This stays said until another proxy joins them.
///
/// # Errors
/// If the kernel refuses: the port is not shared (`SO_REUSEPORT` is off).
pub fn prefer_successor(listener: &impl AsFd) -> io::Result<()> {
    let mut answer_one = [sock_filter {
        code: RETURN_CONSTANT,
        jt: 0,
        jf: 0,
        k: 1,
    }];
    let program = sock_fprog {
        len: 1,
        filter: answer_one.as_mut_ptr(),
    };
    Ok(setsockopt(
        listener,
        sockopt::AttachReusePortCbpf,
        &program,
    )?)
}

/// Has the kernel deal new connections, or datagrams, to all sockets of a port, `newcomer` among them, as it does until one
/// of them [prefers its successor](prefer_successor). What an earlier upgrade has said stays with the port for as long as
/// any socket of it: it would give everything to a newcomer, ready or not.
///
/// Call it once `newcomer` listens, or is bound to take datagrams: it has no part in the port before.
pub(super) fn deal_to_all(newcomer: &impl AsFd) {
    // Fails where nothing was said, which is the rule; where the port is not shared; and before Linux 5.3, which cannot take it back.
    let _ = detach_program(newcomer);
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "the instruction is 0x06; the library's constants are wider than its field"
)]
const RETURN_CONSTANT: u16 = (BPF_RET | BPF_K) as u16;

#[cfg(test)]
mod tests {
    use std::{net::SocketAddr, time::Duration};

    use socket2::{Domain, Socket, Type};
    use tokio::{
        net::{TcpListener, TcpStream, UdpSocket},
        time::timeout,
    };

    use super::*;

    fn shared(at: SocketAddr) -> TcpListener {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("socket");
        socket.set_reuse_port(true).expect("reuse");
        socket.set_nonblocking(true).expect("nonblocking");
        socket.bind(&at.into()).expect("bind");
        socket.listen(64).expect("listen");
        TcpListener::from_std(socket.into()).expect("register")
    }

    #[tokio::test]
    async fn the_younger_socket_gets_everything_and_the_last_one_too() {
        let old = shared(SocketAddr::from(([127, 0, 0, 1], 0)));
        let at = old.local_addr().expect("address");
        let new = shared(at);
        prefer_successor(&old).expect("steer");
        for _ in 0..32 {
            let _client = TcpStream::connect(at).await.expect("connect");
            timeout(Duration::from_secs(1), new.accept())
                .await
                .expect("at the new one")
                .expect("accept");
        }
        drop(old);
        let _client = TcpStream::connect(at).await.expect("connect");
        timeout(Duration::from_secs(1), new.accept())
            .await
            .expect("still")
            .expect("accept");
        let newest = shared(at);
        prefer_successor(&new).expect("steer again");
        let _client = TcpStream::connect(at).await.expect("connect");
        timeout(Duration::from_secs(1), newest.accept())
            .await
            .expect("at the newest")
            .expect("accept");
    }

    fn bound(at: SocketAddr) -> UdpSocket {
        let socket = Socket::new(Domain::IPV4, Type::DGRAM, None).expect("socket");
        socket.set_reuse_port(true).expect("reuse");
        socket.set_nonblocking(true).expect("nonblocking");
        socket.bind(&at.into()).expect("bind");
        UdpSocket::from_std(socket.into()).expect("register")
    }

    #[tokio::test]
    async fn a_newcomer_among_datagrams_gets_its_share() {
        let old = bound(SocketAddr::from(([127, 0, 0, 1], 0)));
        let at = old.local_addr().expect("address");
        prefer_successor(&old).expect("steer");
        let new = bound(at);
        deal_to_all(&new);
        let mut dealt = [0; 2];
        for _ in 0..200 {
            let client = UdpSocket::bind("127.0.0.1:0").await.expect("client");
            client.send_to(b"x", at).await.expect("send");
            let (mut one, mut other) = ([0; 1], [0; 1]);
            tokio::select! {
                got = old.recv(&mut one) => dealt[0] += got.expect("datagram"),
                got = new.recv(&mut other) => dealt[1] += got.expect("datagram"),
            }
        }
        assert!(!dealt.contains(&0), "{dealt:?}");
    }

    #[tokio::test]
    async fn datagrams_follow_as_well() {
        let old = bound(SocketAddr::from(([127, 0, 0, 1], 0)));
        let at = old.local_addr().expect("address");
        let new = bound(at);
        prefer_successor(&old).expect("steer");
        for _ in 0..32 {
            let client = UdpSocket::bind("127.0.0.1:0").await.expect("client");
            client.send_to(b"x", at).await.expect("send");
            timeout(Duration::from_secs(1), new.recv(&mut [0; 1]))
                .await
                .expect("at the new one")
                .expect("datagram");
        }
    }

    #[tokio::test]
    async fn an_unshared_port_is_no_harm() {
        let alone = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let _ = prefer_successor(&alone);
        let _client = TcpStream::connect(alone.local_addr().expect("address"))
            .await
            .expect("connect");
        alone.accept().await.expect("accept");
    }
}
