//! What only the kernel knows of a connection, and what it does for the sockets of a port.

#![expect(
    unsafe_code,
    reason = "no safe crate reads TCP_INFO, or detaches a program"
)]

use std::{
    io,
    mem::MaybeUninit,
    os::fd::{AsFd, AsRawFd},
    ptr,
    time::Duration,
};

use nix::libc;
use tokio::net::TcpStream;

/// The smoothed round-trip time of a connection, and how many segments it had to send again in all its life.
///
/// # Errors
/// If the kernel has nothing to tell.
pub fn round_trip(stream: &TcpStream) -> io::Result<(Duration, u32)> {
    let mut info = MaybeUninit::<libc::tcp_info>::zeroed();
    let mut length = libc::socklen_t::try_from(size_of::<libc::tcp_info>()).unwrap_or(0);
    // SAFETY: the descriptor is open while `stream` is borrowed, and the kernel writes at most `length` bytes, which is the
    // size of what `info` has room for.
    let outcome = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if outcome != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a structure of integers, all of which were zeroed before the kernel wrote some of them.
    let info = unsafe { info.assume_init() };
    let rtt = Duration::from_micros(info.tcpi_rtt.into());
    Ok((rtt, info.tcpi_total_retrans))
}

/// Takes away the program by which the kernel chooses among the sockets that share the port of `socket`.
///
/// # Errors
/// If there is none, or the kernel cannot (it can since 5.3).
pub(super) fn detach_program(socket: &impl AsFd) -> io::Result<()> {
    let unused: libc::c_int = 0;
    let length = libc::socklen_t::try_from(size_of_val(&unused)).unwrap_or(0);
    // SAFETY: the descriptor is open while `socket` is borrowed, and the kernel reads at most `length` bytes of `unused`.
    let outcome = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_DETACH_REUSEPORT_BPF,
            ptr::from_ref(&unused).cast(),
            length,
        )
    };
    if outcome != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };

    use super::*;

    #[tokio::test]
    async fn a_connection_on_loopback_has_a_short_way() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut near = TcpStream::connect(listener.local_addr().unwrap())
            .await
            .unwrap();
        let (mut far, _) = listener.accept().await.unwrap();
        near.write_all(b"x").await.unwrap();
        far.read_exact(&mut [0]).await.unwrap();
        let (rtt, retransmits) = round_trip(&near).unwrap();
        assert!(
            rtt > Duration::ZERO && rtt < Duration::from_secs(1),
            "{rtt:?}"
        );
        assert_eq!(retransmits, 0);
    }
}
