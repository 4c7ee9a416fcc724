//! Listening on a wire: is this byte string readable there, and who talked to whom?

use std::{
    io::{ErrorKind, Read as _},
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use anyhow::Context;
use parking_lot::Mutex;
use socket2::{Domain, Protocol, SockFilter, Socket, Type};

use crate::sys::Netns;

/// Every frame that crosses a namespace, from [`Capture::start`] until it is dropped.
#[derive(Debug)]
pub struct Capture {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    packets: Mutex<Vec<Packet>>,
}

/// One TCP or UDP packet.
#[derive(Debug, Clone)]
pub struct Packet {
    /// Sender.
    pub from: SocketAddr,
    /// Receiver.
    pub to: SocketAddr,
    /// What the transport carries, unencrypted or not; of a capture of heads, its beginning.
    pub payload: Vec<u8>,
    /// Bytes that the transport carries, kept or not.
    pub length: usize,
}

impl Capture {
    /// Starts listening on all interfaces of a namespace.
    ///
    /// # Errors
    /// When a packet socket cannot be opened.
    pub fn start(netns: &Netns) -> anyhow::Result<Self> {
        Self::open(netns, None)
    }

    /// As [`Capture::start`] for bulk traffic: of each frame that enters an interface it keeps the first `bytes` and drops the rest,
    /// so a sender who wants to be found repeats its needle well within that. What leaves an interface is not seen a second time.
    ///
    /// # Errors
    /// As [`Capture::start`].
    pub fn heads(netns: &Netns, bytes: u32) -> anyhow::Result<Self> {
        Self::open(netns, Some(&keep_entering(bytes)))
    }

    fn open(netns: &Netns, filter: Option<&[SockFilter]>) -> anyhow::Result<Self> {
        const ALL_PROTOCOLS: u16 = 0x0003;
        let protocol = Protocol::from(i32::from(ALL_PROTOCOLS.to_be()));
        let socket = netns
            .run(|| Socket::new(Domain::PACKET, Type::RAW, Some(protocol)))
            .context("a packet socket needs CAP_NET_RAW")?;
        if let Some(filter) = filter {
            socket.attach_filter(filter).context("packet filter")?;
        }
        let _ = socket.set_recv_buffer_size(16 << 20);
        socket.set_read_timeout(Some(Duration::from_millis(50)))?;
        let shared = Arc::new(Shared::default());
        let theirs = Arc::clone(&shared);
        let thread = std::thread::spawn(move || read_all(&socket, &theirs));
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Whether `needle` stands in clear in any packet so far. Needles that packets may cut in two should be repeated by the sender.
    #[must_use]
    pub fn can_read(&self, needle: &[u8]) -> bool {
        let packets = self.shared.packets.lock();
        packets.iter().any(|packet| {
            packet
                .payload
                .windows(needle.len())
                .any(|window| window == needle)
        })
    }

    /// Packets so far for which `which` holds.
    #[must_use]
    pub fn packets(&self, which: impl Fn(&Packet) -> bool) -> Vec<Packet> {
        self.shared
            .packets
            .lock()
            .iter()
            .filter(|packet| which(packet))
            .cloned()
            .collect()
    }

    /// Bytes of payload that went to `port` so far.
    #[must_use]
    pub fn bytes_to_port(&self, port: u16) -> usize {
        let packets = self.shared.packets.lock();
        packets
            .iter()
            .filter(|packet| packet.to.port() == port)
            .map(|packet| packet.length)
            .sum()
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn read_all(mut socket: &Socket, shared: &Shared) {
    let mut frame = vec![0_u8; 256 * 1024];
    while !shared.stop.load(Ordering::Relaxed) {
        match socket.read(&mut frame) {
            Ok(length) => {
                if let Some(packet) = parse(&frame[..length]) {
                    shared.packets.lock().push(packet);
                }
            }
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
                ) => {}
            Err(_) => break,
        }
    }
}

/// Classic BPF: nothing of a frame that leaves an interface, `bytes` of any other.
fn keep_entering(bytes: u32) -> [SockFilter; 4] {
    const LOAD_WORD: u16 = 0x20;
    const JUMP_IF_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    /// `SKF_AD_OFF + SKF_AD_PKTTYPE`: the kernel's own note on the frame.
    const DIRECTION: u32 = 0xffff_f004;
    const OUTGOING: u32 = 4;
    [
        SockFilter::new(LOAD_WORD, 0, 0, DIRECTION),
        SockFilter::new(JUMP_IF_EQUAL, 0, 1, OUTGOING),
        SockFilter::new(RETURN, 0, 0, 0),
        SockFilter::new(RETURN, 0, 0, bytes),
    ]
}

/// Ethernet, then IPv4 or IPv6 without extension headers, then TCP or UDP.
fn parse(frame: &[u8]) -> Option<Packet> {
    let (header, packet) = frame.split_at_checked(14)?;
    let (source, target, protocol, segment, length): (IpAddr, IpAddr, u8, &[u8], usize) =
        match header[12..] {
            [0x08, 0x00] => {
                let length = usize::from(packet.first()? & 0x0f) * 4;
                let total = usize::from(u16::from_be_bytes([*packet.get(2)?, *packet.get(3)?]));
                let whole = packet
                    .get(..total)
                    .filter(|whole| whole.len() >= length)
                    .unwrap_or(packet);
                let source: [u8; 4] = packet.get(12..16)?.try_into().ok()?;
                let target: [u8; 4] = packet.get(16..20)?.try_into().ok()?;
                (
                    source.into(),
                    target.into(),
                    *packet.get(9)?,
                    whole.get(length..)?,
                    total.checked_sub(length)?,
                )
            }
            [0x86, 0xdd] => {
                let source: [u8; 16] = packet.get(8..24)?.try_into().ok()?;
                let target: [u8; 16] = packet.get(24..40)?.try_into().ok()?;
                (
                    source.into(),
                    target.into(),
                    *packet.get(6)?,
                    packet.get(40..)?,
                    usize::from(u16::from_be_bytes([*packet.get(4)?, *packet.get(5)?])),
                )
            }
            _ => return None,
        };
    let ports = segment.get(..4)?;
    let start = match protocol {
        6 => usize::from(segment.get(12)? >> 4) * 4,
        17 => 8,
        _ => return None,
    };
    Some(Packet {
        from: SocketAddr::new(source, u16::from_be_bytes([ports[0], ports[1]])),
        to: SocketAddr::new(target, u16::from_be_bytes([ports[2], ports[3]])),
        payload: segment.get(start..)?.to_vec(),
        length: length.checked_sub(start)?,
    })
}
