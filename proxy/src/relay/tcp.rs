//! A TCP socket as one side of a flow.

use std::{
    fmt,
    io::{self, ErrorKind},
    ops::Deref,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Buf;
use nix::sys::socket::{getsockopt, setsockopt, sockopt::TcpKeepIdle};
use socket2::SockRef;
use tokio::{
    io::AsyncWrite,
    net::TcpStream,
    time::{Instant, Sleep, sleep},
};

use super::{Appetite, Buffers, Endpoint, Fault, Leave, Payload, sys::unacknowledged};

/// The largest read. It becomes one DATA frame where the peer allows, which the receiver assembles
/// before it delivers; measured against 64 and 128 KiB, it saves a fifth of the processor time of
/// several bulk streams on one connection.
const LARGEST_READ: usize = 256 << 10;

/// Seconds without a packet after which a connection that is closed one way is probed.
const TRACKED: u32 = 30;

/// Pause between two looks at whether a far end that sends no more is still there.
const WATCH: Duration = Duration::from_secs(2);

/// Pause between two looks at a queue that runs empty.
const LOOK: Duration = Duration::from_millis(5);

/// A connection of an application. Whatever drops it, the end of the process included, resets it:
/// only a flow that has come to its orderly end closes it with FIN.
pub struct Socket {
    stream: TcpStream,
    /// Ready for the next look at the far end, which some connections need towards their end.
    look: Option<Pin<Box<Sleep>>>,
}

/// A socket error other than the end of the connection.
#[derive(Debug, thiserror::Error)]
#[error("io error")]
struct SocketError(#[source] io::Error);

impl Socket {
    /// Takes over an established connection.
    #[must_use]
    pub fn new(stream: TcpStream) -> Self {
        let socket = Self { stream, look: None };
        socket.set_linger(Some(Duration::ZERO));
        socket
    }

    /// Zero: to be dropped is to be reset.
    fn set_linger(&self, linger: Option<Duration>) {
        // Fails on no TCP socket.
        let _ = SockRef::from(&self.stream).set_linger(linger);
    }

    /// Reads and drops what comes; ready at its end. A socket that is closed with bytes unread, or
    /// gets some afterwards, sends a reset, which destroys what is still on its way to the far end.
    fn poll_discard(&mut self, cx: &mut Context<'_>, buffers: &Buffers) -> Poll<()> {
        let mut appetite = Appetite::at_least(LARGEST_READ / 4);
        while let Ok(()) = ready!(self.poll_readable(cx)) {
            let Ok(Some(_)) = ready!(self.poll_take(cx, &mut appetite, buffers)) else {
                break;
            };
        }
        Poll::Ready(())
    }

    /// Waits until the far end has acknowledged all that was put here, or is there no more: a reset throws away what is left.
    fn poll_delivered(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while self.is_there() && unacknowledged(&self.stream).is_ok_and(|bytes| bytes > 0) {
            ready!(self.poll_look(cx, LOOK));
        }
        Poll::Ready(())
    }

    /// Whether the kernel has not given up the connection.
    fn is_there(&self) -> bool {
        self.peer_addr().is_ok()
    }

    /// Ready `pause` after the last time it was.
    fn poll_look(&mut self, cx: &mut Context<'_>, pause: Duration) -> Poll<()> {
        let look = self.look.get_or_insert_with(|| Box::pin(sleep(pause)));
        let soon = Instant::now() + pause;
        if look.deadline() > soon {
            // It was to be a longer one.
            look.as_mut().reset(soon);
        }
        ready!(look.as_mut().poll(cx));
        self.look = None;
        Poll::Ready(())
    }
}

impl fmt::Debug for Socket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Socket").field(&self.stream).finish()
    }
}

impl Deref for Socket {
    type Target = TcpStream;

    fn deref(&self) -> &TcpStream {
        &self.stream
    }
}

impl Endpoint for Socket {
    fn socket(&self) -> Option<&TcpStream> {
        Some(&self.stream)
    }

    fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Fault>> {
        self.poll_read_ready(cx).map_err(read_fault)
    }

    fn poll_take(
        &mut self,
        cx: &mut Context<'_>,
        appetite: &mut Appetite,
        buffers: &Buffers,
    ) -> Poll<Result<Option<Payload>, Fault>> {
        let mut buffer = buffers.take(*appetite);
        let got = ready!(buffer.poll_read(&mut self.stream, cx)).map_err(read_fault)?;
        if got == 0 {
            return Poll::Ready(Ok(None));
        }
        appetite.learn(got, LARGEST_READ);
        Poll::Ready(Ok(Some(Payload::Pooled(buffer))))
    }

    fn poll_room(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Fault>> {
        Poll::Ready(Ok(()))
    }

    fn poll_put(
        &mut self,
        cx: &mut Context<'_>,
        payload: &mut Payload,
    ) -> Poll<Result<usize, Fault>> {
        let put = ready!(Pin::new(&mut self.stream).poll_write(cx, payload.chunk()));
        let put = put.map_err(write_fault)?;
        if put == 0 {
            return Poll::Ready(Err(Fault::Gone));
        }
        payload.advance(put);
        Poll::Ready(Ok(put))
    }

    fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Fault>> {
        // Fails only where nobody is connected any more, which a read tells better.
        Pin::new(&mut self.stream)
            .poll_shutdown(cx)
            .map_err(|_| Fault::Gone)
    }

    fn release(&mut self, _: usize) {}

    /// A far end that has reset the connection, or answers no probe any more. Nothing is read any more that would tell, and to be
    /// woken for errors alone takes a descriptor, which a look now and then does not.
    fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<Fault> {
        ready!(self.poll_look(cx, WATCH));
        while self.is_there() {
            ready!(self.poll_look(cx, WATCH));
        }
        let error = self.take_error().ok().flatten();
        Poll::Ready(error.map_or(Fault::Gone, write_fault))
    }

    fn poll_leave(
        &mut self,
        cx: &mut Context<'_>,
        leave: Leave,
        buffers: &Buffers,
        late: bool,
    ) -> Poll<()> {
        match leave {
            Leave::Reset if late => Poll::Ready(()),
            Leave::Reset => self.poll_delivered(cx),
            Leave::Ended => {
                self.set_linger(None);
                Poll::Ready(())
            }
            Leave::Early => {
                self.set_linger(None);
                if late {
                    return Poll::Ready(());
                }
                self.poll_discard(cx, buffers)
            }
        }
    }
}

/// Has the connection probed often enough for the kernel's connection tracking to keep it. A connection of which one direction
/// has ended is forgotten there after a minute without a packet, by default. What the redirection sent here lives by that entry:
/// without it neither end hears of the other again. Nothing happens where keepalive is off.
pub(super) fn stay_tracked(socket: &TcpStream) {
    if getsockopt(socket, TcpKeepIdle).is_ok_and(|idle| idle > TRACKED) {
        // Fails on no TCP socket.
        let _ = setsockopt(socket, TcpKeepIdle, &TRACKED);
    }
}

/// A far end that has sent its FIN and then resets what it gets (`EPIPE`) has closed as a whole and
/// reads no more. Any other reset is told once, here or by a read.
pub(super) fn write_fault(error: io::Error) -> Fault {
    if error.kind() == ErrorKind::BrokenPipe {
        Fault::Gone
    } else {
        read_fault(error)
    }
}

pub(super) fn read_fault(error: io::Error) -> Fault {
    let gone = [
        ErrorKind::ConnectionReset,
        ErrorKind::BrokenPipe,
        ErrorKind::NotConnected,
        ErrorKind::UnexpectedEof,
    ];
    if gone.contains(&error.kind()) {
        Fault::Reset
    } else {
        Fault::Failed(Box::new(SocketError(error)))
    }
}
