//! Applications in pods: small servers, clients, and what goes between them.
//!
//! All run in the test process, on sockets that were made inside the pod's namespace.

use std::{
    io,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpSocket, TcpStream, UdpSocket},
    sync::watch,
    task::JoinSet,
};

use crate::{sys::Netns, wait, world::Pod};

/// What a server does with each connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Behaviour {
    /// Sends back what comes, until the client ends.
    Echo,
    /// First sends the client's address as a line, then echoes.
    Whoami,
    /// Reads to the end, then sends `<count> <checksum>` of what came.
    Sink,
    /// Sends this many bytes of [`pattern`], then ends.
    Source(usize),
    /// Reads one byte, then resets the connection.
    Reset,
    /// Neither reads nor writes, and keeps the connection open.
    Stall,
}

/// A server in a pod; stops when dropped, and closes its connections.
#[derive(Debug)]
pub struct Server {
    /// Where it listens, at the pod's IPv4 address.
    pub address: SocketAddr,
    /// And at its IPv6 address.
    pub address6: SocketAddr,
    peers: Arc<Mutex<Vec<SocketAddr>>>,
    accepted: watch::Receiver<usize>,
    open: watch::Receiver<usize>,
    tasks: JoinSet<()>,
}

impl Server {
    /// The clients so far, as the server saw them.
    #[must_use]
    pub fn peers(&self) -> Vec<SocketAddr> {
        self.peers.lock().clone()
    }

    /// Stops; its port is free when this returns.
    pub async fn stop(mut self) {
        self.tasks.shutdown().await;
    }

    /// Waits until no connection is open.
    ///
    /// # Panics
    /// When there still is one.
    pub async fn idle(&self) {
        let mut open = self.open.clone();
        let none = open.wait_for(|open| *open == 0);
        wait::soon("connections of the application end", none)
            .await
            .unwrap();
    }

    /// Waits until `count` connections were accepted: a client may be served by the kernel before
    /// the application learns of it. Returns the clients.
    ///
    /// # Panics
    /// When they do not come.
    pub async fn accepted(&self, count: usize) -> Vec<SocketAddr> {
        let mut accepted = self.accepted.clone();
        let reached = accepted.wait_for(|now| *now >= count);
        wait::soon("connections reach the application", reached)
            .await
            .unwrap();
        self.peers()
    }
}

impl Pod {
    /// Serves a port, 0 for any free one, on both families.
    ///
    /// # Errors
    /// When it cannot be bound.
    pub fn serve(&self, port: u16, behaviour: Behaviour) -> io::Result<Server> {
        let listener = listen(
            self.netns(),
            SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port),
        )?;
        let port = listener.local_addr()?.port();
        let peers = Arc::new(Mutex::new(Vec::new()));
        let (count_tx, accepted) = watch::channel(0);
        let (open_tx, open) = watch::channel(0);
        let mut tasks = JoinSet::new();
        tasks.spawn(accept_all(
            listener,
            behaviour,
            Arc::clone(&peers),
            [count_tx, open_tx],
        ));
        Ok(Server {
            address: self.at(port),
            address6: self.at6(port),
            peers,
            accepted,
            open,
            tasks,
        })
    }

    /// Connects from inside the pod.
    ///
    /// # Errors
    /// When refused, reset or unreachable.
    pub async fn connect(&self, to: SocketAddr) -> io::Result<TcpStream> {
        connect(self.netns(), to).await
    }

    /// Connects to where nobody lets the pod in, and tells how that ends: a reset may come before the client has
    /// noticed that it was connected.
    ///
    /// # Errors
    /// When there is no connection, or it is still open after ten seconds.
    pub async fn turned_away(&self, to: SocketAddr) -> io::Result<End> {
        match self.connect(to).await {
            Ok(mut stream) => closed(&mut stream, wait::SOON).await,
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(End::Reset),
            Err(error) => Err(error),
        }
    }

    /// Connects from a chosen address and port of the pod.
    ///
    /// # Errors
    /// As [`Pod::connect`], and when the address is taken.
    pub async fn connect_from(&self, from: SocketAddr, to: SocketAddr) -> io::Result<TcpStream> {
        connect_from(self.netns(), from, to).await
    }

    /// Connects, sends `request`, ends its side, and reads to the end.
    ///
    /// # Errors
    /// When anything fails, or takes more than ten seconds.
    pub async fn ask(&self, to: SocketAddr, request: &[u8]) -> io::Result<Vec<u8>> {
        let talk = async { exchange(&mut self.connect(to).await?, request).await };
        tokio::time::timeout(wait::SOON, talk).await?
    }

    /// The client address that a [`Behaviour::Whoami`] server at `to` sees.
    ///
    /// # Errors
    /// When there is no such answer.
    pub async fn seen_as(&self, to: SocketAddr) -> anyhow::Result<SocketAddr> {
        let answer = String::from_utf8(self.ask(to, b"").await?)?;
        Ok(answer.trim().parse()?)
    }

    /// A UDP socket of the pod.
    ///
    /// # Errors
    /// When it cannot be bound.
    pub fn udp(&self, at: SocketAddr) -> io::Result<UdpSocket> {
        let socket = self.netns().run(|| std::net::UdpSocket::bind(at))?;
        socket.set_nonblocking(true)?;
        UdpSocket::from_std(socket)
    }
}

/// Listens inside a namespace; `[::]` takes both families.
///
/// # Errors
/// When it cannot be bound.
pub fn listen(netns: &Netns, at: SocketAddr) -> io::Result<TcpListener> {
    listen_for(netns, at, 1024)
}

/// As [`listen`], with room for `waiting` connections that nobody has accepted yet: for their clients they are open, and here they
/// take no descriptor. The namespace's `core/somaxconn` must allow as many.
///
/// # Errors
/// When it cannot be bound.
pub fn listen_for(netns: &Netns, at: SocketAddr, waiting: i32) -> io::Result<TcpListener> {
    let socket = tcp_socket(netns, at)?;
    if at.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    socket.set_reuse_address(true)?;
    socket.bind(&at.into())?;
    socket.listen(waiting)?;
    TcpListener::from_std(socket.into())
}

/// Connects from inside a namespace.
///
/// # Errors
/// When refused, reset or unreachable.
pub async fn connect(netns: &Netns, to: SocketAddr) -> io::Result<TcpStream> {
    finish(tcp_socket(netns, to)?, to).await
}

/// Connects from inside a namespace, from a chosen address.
///
/// # Errors
/// As [`connect`], and when the address is taken.
pub async fn connect_from(
    netns: &Netns,
    from: SocketAddr,
    to: SocketAddr,
) -> io::Result<TcpStream> {
    let socket = tcp_socket(netns, to)?;
    socket.set_reuse_address(true)?;
    socket.bind(&from.into())?;
    finish(socket, to).await
}

/// A TCP socket of the namespace, in non-blocking mode.
///
/// # Errors
/// When out of descriptors.
pub fn tcp_socket(netns: &Netns, family_of: SocketAddr) -> io::Result<Socket> {
    let domain = Domain::for_address(family_of);
    let socket = netns.run(|| Socket::new(domain, Type::STREAM, Some(Protocol::TCP)))?;
    socket.set_nonblocking(true)?;
    socket.set_tcp_nodelay(true)?;
    Ok(socket)
}

async fn finish(socket: Socket, to: SocketAddr) -> io::Result<TcpStream> {
    TcpSocket::from_std_stream(socket.into()).connect(to).await
}

/// Sends all, ends its side, and reads to the end.
///
/// # Errors
/// When the connection fails.
pub async fn exchange(stream: &mut TcpStream, request: &[u8]) -> io::Result<Vec<u8>> {
    let (mut reader, mut writer) = stream.split();
    let mut answer = Vec::new();
    let send = async {
        writer.write_all(request).await?;
        writer.shutdown().await
    };
    let (sent, read) = tokio::join!(send, reader.read_to_end(&mut answer));
    sent?;
    read?;
    Ok(answer)
}

/// Writes `request` and reads exactly as many bytes back.
///
/// # Errors
/// When the connection fails or ends early.
pub async fn ping(stream: &mut TcpStream, request: &[u8]) -> io::Result<()> {
    stream.write_all(request).await?;
    let mut answer = vec![0; request.len()];
    tokio::time::timeout(wait::SOON, stream.read_exact(&mut answer)).await??;
    if answer == request {
        Ok(())
    } else {
        Err(io::Error::other("another answer than the request"))
    }
}

/// Waits until the peer ends or resets the connection; what still came is dropped.
///
/// # Errors
/// When it is still open after `limit`.
pub async fn closed(stream: &mut TcpStream, limit: Duration) -> io::Result<End> {
    let mut buffer = [0; 4096];
    let drain = async {
        loop {
            match stream.read(&mut buffer).await {
                Ok(0) => return End::Eof,
                Ok(_) => {}
                Err(_) => return End::Reset,
            }
        }
    };
    Ok(tokio::time::timeout(limit, drain).await?)
}

/// How a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum End {
    /// In order.
    Eof,
    /// By a reset or another error.
    Reset,
}

/// Closes with RST instead of FIN.
///
/// # Errors
/// When the option cannot be set.
pub fn reset(stream: TcpStream) -> io::Result<()> {
    SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
    drop(stream);
    Ok(())
}

/// `length` bytes that repeat late, so that lost, doubled or swapped ones show in [`checksum`].
#[must_use]
pub fn pattern(length: usize) -> Vec<u8> {
    let words = (0_u64..).map(|word| word.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(17));
    let mut bytes: Vec<u8> = words
        .take(length.div_ceil(8))
        .flat_map(u64::to_le_bytes)
        .collect();
    bytes.truncate(length);
    bytes
}

/// FNV-1a, 64 bit.
#[must_use]
pub fn checksum(bytes: &[u8]) -> u64 {
    continue_checksum(0xcbf2_9ce4_8422_2325, bytes)
}

fn continue_checksum(start: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(start, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// The answer of a [`Behaviour::Sink`] to these bytes.
#[must_use]
pub fn receipt(bytes: &[u8]) -> Vec<u8> {
    format!("{} {:016x}", bytes.len(), checksum(bytes)).into_bytes()
}

async fn accept_all(
    listener: TcpListener,
    behaviour: Behaviour,
    peers: Arc<Mutex<Vec<SocketAddr>>>,
    [count, open]: [watch::Sender<usize>; 2],
) {
    let mut connections = JoinSet::new();
    while let Ok((stream, peer)) = listener.accept().await {
        let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
        peers.lock().push(peer);
        count.send_modify(|count| *count += 1);
        open.send_modify(|open| *open += 1);
        let open = open.clone();
        connections.spawn(async move {
            let _ = behave(stream, peer, behaviour).await;
            open.send_modify(|open| *open -= 1);
        });
        while connections.try_join_next().is_some() {}
    }
}

async fn behave(mut stream: TcpStream, peer: SocketAddr, behaviour: Behaviour) -> io::Result<()> {
    let _ = stream.set_nodelay(true);
    match behaviour {
        Behaviour::Echo => echo(&mut stream).await,
        Behaviour::Whoami => {
            stream.write_all(format!("{peer}\n").as_bytes()).await?;
            echo(&mut stream).await
        }
        Behaviour::Sink => sink(&mut stream).await,
        Behaviour::Source(length) => {
            stream.write_all(&pattern(length)).await?;
            stream.shutdown().await
        }
        Behaviour::Reset => {
            let _ = stream.read_u8().await?;
            reset(stream)
        }
        Behaviour::Stall => std::future::pending().await,
    }
}

async fn echo(stream: &mut TcpStream) -> io::Result<()> {
    let (mut reader, mut writer) = stream.split();
    tokio::io::copy(&mut reader, &mut writer).await?;
    writer.shutdown().await
}

async fn sink(stream: &mut TcpStream) -> io::Result<()> {
    let mut buffer = vec![0; 64 * 1024];
    let (mut count, mut hash) = (0, checksum(b""));
    loop {
        let read = stream.read(&mut buffer).await?;
        if read == 0 {
            break;
        }
        count += read;
        hash = continue_checksum(hash, &buffer[..read]);
    }
    stream
        .write_all(format!("{count} {hash:016x}").as_bytes())
        .await?;
    stream.shutdown().await
}

/// Any port at an address.
#[must_use]
pub fn any_port(ip: IpAddr) -> SocketAddr {
    SocketAddr::new(ip, 0)
}
