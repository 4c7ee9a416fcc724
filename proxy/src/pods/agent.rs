//! The connection to the CNI node agent, made again whenever it breaks.

use std::{
    error::Error,
    io,
    io::IoSliceMut,
    os::fd::OwnedFd,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use file_hints::Hints;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_seqpacket::{UnixSeqpacket, ancillary::OwnedAncillaryMessage};
use tracing::{debug, info, warn};

use super::zds::{self, BadPacket, MAX_PACKET, Request};

/// The client side of one agent socket.
#[derive(Debug)]
pub(super) struct Agent {
    path: PathBuf,
    link: Link,
    /// Wait before the next attempt but one; grows with every failure.
    delay: Duration,
    /// Attempts since the last connection that came to life.
    failures: u32,
    /// When the packet that is to be answered came.
    heard: Instant,
}

#[derive(Debug)]
enum Link {
    /// Not connected; tried again at this time, or when the socket is another one than `seen`.
    Down {
        retry: Instant,
        seen: Option<SocketFile>,
    },
    /// Connected, hello not sent.
    Fresh(UnixSeqpacket),
    Open(UnixSeqpacket),
}

/// Which file a path leads to. The agent makes a new socket whenever it starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct SocketFile {
    device: u64,
    inode: u64,
    created: Option<SystemTime>,
}

/// What comes from the agent.
#[derive(Debug)]
pub(super) enum Heard {
    /// A new connection; hello is sent.
    Connected,
    /// A packet. It must be answered with [`Agent::answer`] before the next one is read.
    Packet(Result<Request, BadPacket>),
    /// The connection is gone.
    Lost,
}

impl Agent {
    pub(super) fn new(path: PathBuf) -> Self {
        Self {
            path,
            link: Link::Down {
                retry: Instant::now(),
                seen: None,
            },
            delay: FIRST_DELAY,
            failures: 0,
            heard: Instant::now(),
        }
    }

    /// The next event. Connects first where needed, for ever.
    ///
    /// # Cancel safety
    /// No packet is lost when the future is dropped.
    pub(super) async fn next(&mut self) -> Heard {
        loop {
            match &self.link {
                Link::Down { retry, seen } => {
                    if await_socket(&self.path, *retry, *seen).await == Socket::New {
                        self.delay = FIRST_DELAY;
                    }
                    match UnixSeqpacket::connect(&self.path).await {
                        Ok(socket) => self.link = Link::Fresh(socket),
                        Err(error) => self.back_off(&error),
                    }
                }
                Link::Fresh(socket) => match send(socket, &zds::hello()).await {
                    Ok(()) => {
                        self.link.open();
                        info!(socket = %self.path.display(), "connected to the CNI agent");
                        return Heard::Connected;
                    }
                    Err(error) => self.back_off(&error),
                },
                Link::Open(socket) => match receive(socket).await {
                    Ok(Some(packet)) => {
                        self.heard = Instant::now();
                        return Heard::Packet(packet);
                    }
                    Ok(None) => {
                        warn!("the CNI agent closed the connection");
                        self.hang_up();
                        return Heard::Lost;
                    }
                    Err(error) => {
                        let error = &error as &dyn Error;
                        warn!(error, "lost the connection to the CNI agent");
                        self.hang_up();
                        return Heard::Lost;
                    }
                },
            }
        }
    }

    /// Answers the last packet, unless that comes too late: the agent would take it for the answer to its next request. An error
    /// means that the connection is gone.
    pub(super) async fn answer(&mut self, result: Result<(), &str>) -> io::Result<()> {
        let Link::Open(socket) = &self.link else {
            return Err(io::ErrorKind::NotConnected.into());
        };
        let sent = if self.heard.elapsed() < LATEST_ANSWER {
            send(socket, &zds::answer(result)).await
        } else {
            Err(io::ErrorKind::TimedOut.into())
        };
        if let Err(error) = &sent {
            let error = error as &dyn Error;
            warn!(error, "cannot answer the CNI agent");
            self.hang_up();
        }
        sent
    }

    /// The connection works: when it breaks, the next one is tried at once.
    pub(super) fn is_well(&mut self) {
        self.delay = Duration::ZERO;
        self.failures = 0;
    }

    /// Closes the connection; [`Self::next`] makes a new one.
    pub(super) fn hang_up(&mut self) {
        let wait = self.delay;
        self.delay = (wait * 2).clamp(FIRST_DELAY, LAST_DELAY);
        self.link = Link::Down {
            retry: Instant::now() + wait.mul_f64(rand::random_range(0.8..1.2)),
            seen: SocketFile::at(&self.path),
        };
    }

    fn back_off(&mut self, error: &io::Error) {
        let (error, socket) = (error as &dyn Error, self.path.display());
        if self.failures == 0 {
            warn!(error, %socket, "cannot reach the CNI agent, retrying");
        } else {
            debug!(error, %socket, "cannot reach the CNI agent");
        }
        self.failures = self.failures.saturating_add(1);
        self.hang_up();
    }
}

impl Link {
    /// Marks a fresh connection as greeted.
    fn open(&mut self) {
        let down = Self::Down {
            retry: Instant::now(),
            seen: None,
        };
        *self = match std::mem::replace(self, down) {
            Self::Fresh(socket) | Self::Open(socket) => Self::Open(socket),
            down @ Self::Down { .. } => down,
        };
    }
}

impl SocketFile {
    fn at(path: &Path) -> Option<Self> {
        let meta = std::fs::metadata(path).ok()?;
        Some(Self {
            device: meta.dev(),
            inode: meta.ino(),
            created: meta.modified().ok(),
        })
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Socket {
    New,
    Same,
}

/// Waits until `retry`, or until the agent has made a new socket.
async fn await_socket(path: &Path, retry: Instant, seen: Option<SocketFile>) -> Socket {
    let made = async {
        let mut hints = Hints::new(path);
        loop {
            hints.next().await;
            let file = SocketFile::at(path);
            if file.is_some() && file != seen {
                return Socket::New;
            }
        }
    };
    timeout_at(retry, made).await.unwrap_or(Socket::Same)
}

/// One packet, `None` at the end of the stream. A packet of no bytes cannot be told from it.
async fn receive(socket: &UnixSeqpacket) -> io::Result<Option<Result<Request, BadPacket>>> {
    let mut bytes = [0; MAX_PACKET];
    let mut control = Control([0; CONTROL_BYTES]);
    let (info, ancillary) = socket
        .recv_vectored_with_ancillary(&mut [IoSliceMut::new(&mut bytes)], &mut control.0)
        .await?;
    // Owned from here on, so that every way out closes them.
    let descriptors: Vec<OwnedFd> = ancillary
        .into_messages()
        .filter_map(|message| match message {
            OwnedAncillaryMessage::FileDescriptors(descriptors) => Some(descriptors),
            OwnedAncillaryMessage::Other(_) => None,
        })
        .flatten()
        .collect();
    let packet = bytes.get(..info.bytes_read()).unwrap_or_default();
    if packet.is_empty() {
        return Ok(None);
    }
    Ok(Some(if info.truncated() {
        Err(BadPacket::Truncated)
    } else if info.ancillary_truncated() {
        Err(BadPacket::DescriptorsTruncated)
    } else {
        zds::decode(packet, descriptors)
    }))
}

async fn send(socket: &UnixSeqpacket, packet: &[u8]) -> io::Result<()> {
    let sent = timeout(SEND_LIMIT, socket.send(packet)).await;
    sent.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
        .map(|_| ())
}

/// Room for control messages, aligned as the kernel writes them.
#[repr(align(8))]
struct Control([u8; CONTROL_BYTES]);

/// More than the one descriptor that is allowed, so that a second one is seen.
const CONTROL_BYTES: usize = 128;
const FIRST_DELAY: Duration = Duration::from_millis(20);
/// Pods cannot start while there is no connection, so the wait stays short.
const LAST_DELAY: Duration = Duration::from_secs(1);
/// The agent gives up on an answer after five seconds, but goes on to wait for the next one.
const LATEST_ANSWER: Duration = Duration::from_millis(4500);
/// The agent waits this long for an answer.
const SEND_LIMIT: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests;
