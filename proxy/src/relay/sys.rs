//! What only the kernel knows of the bytes on their way.

#![expect(unsafe_code, reason = "no safe crate asks for the queue of a socket")]

use std::{
    io,
    os::fd::{AsFd, AsRawFd as _},
};

use nix::libc;

/// How many bytes were written to a TCP socket and not acknowledged by the far end yet; a FIN counts as one. What a reset has
/// taken from the queue counts, too.
///
/// # Errors
/// If `socket` is none, or listens.
pub(super) fn unacknowledged(socket: &impl AsFd) -> io::Result<usize> {
    let mut bytes: libc::c_int = 0;
    // For a socket, `TIOCOUTQ` is `SIOCOUTQ`.
    // SAFETY: the descriptor is open while `socket` is borrowed, and the kernel writes one integer, into `bytes`.
    let outcome =
        unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    if outcome != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(usize::try_from(bytes).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use std::{
        io::Write as _,
        net::{TcpListener, TcpStream},
    };

    use socket2::SockRef;

    use super::*;

    #[test]
    fn what_a_far_end_has_no_room_for_is_counted() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        assert_eq!(unacknowledged(&near).unwrap(), 0);
        assert!(unacknowledged(&listener).is_err());
        near.set_nonblocking(true).unwrap();
        SockRef::from(&near).set_send_buffer_size(1 << 20).unwrap();
        while near.write(&[1; 64 << 10]).is_ok() {}
        assert!(unacknowledged(&near).unwrap() > 64 << 10);
    }
}
