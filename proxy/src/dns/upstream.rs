//! Relaying queries to the resolvers of the node, as they came.
//!
//! A query keeps its bytes but for the identifier, so that types, options and flags that this proxy does not know pass
//! unharmed in both directions. Servers are asked one after the other with a head start each; the first that
//! helped last time goes first.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime},
};

use futures_util::stream::{FuturesUnordered, StreamExt};
use parking_lot::Mutex;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::{Instant, sleep_until, timeout},
};

use super::{
    origin::Origin,
    wire::{self, Transport},
};
use crate::listen::{self, LocalAddress};

/// The resolvers of the node, read from a `resolv.conf` that may change.
#[derive(Debug)]
pub struct Upstreams {
    path: PathBuf,
    held: Mutex<Held>,
    /// The server that helped last.
    preferred: AtomicUsize,
}

#[derive(Debug)]
struct Held {
    looked: Option<Instant>,
    modified: Option<SystemTime>,
    plan: Arc<Plan>,
}

/// What a `resolv.conf` says.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Plan {
    servers: Vec<SocketAddr>,
    pub(super) search: Vec<String>,
    attempts: usize,
    limit: Duration,
}

/// A query as it is to be relayed.
#[derive(Clone, Copy)]
pub(super) struct Query<'a> {
    pub(super) bytes: &'a [u8],
    pub(super) question_end: usize,
    pub(super) transport: Transport,
}

/// Why there is no answer from upstream.
#[derive(Debug, thiserror::Error)]
pub(super) enum RelayError {
    #[error("no name server in {}", .0.display())]
    NoServer(PathBuf),
    #[error("no answer from {0} servers within {1:?}")]
    Timeout(usize, Duration),
    #[error("cannot ask {0}")]
    Unreachable(SocketAddr, #[source] io::Error),
}

impl RelayError {
    /// The reason as metrics tell it.
    pub(super) fn reason(&self) -> &'static str {
        match self {
            Self::NoServer(_) => "no_server",
            Self::Timeout(..) => "timeout",
            Self::Unreachable(..) => "unreachable",
        }
    }
}

impl Upstreams {
    /// The resolvers that the file at `path` names, now and whenever it changes. Without the file there are none.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            held: Mutex::new(Held {
                looked: None,
                modified: None,
                plan: Arc::default(),
            }),
            preferred: AtomicUsize::new(0),
        }
    }

    /// What the file says; looked at once per second at most. A file that cannot be read changes nothing.
    pub(super) fn plan(&self) -> Arc<Plan> {
        let mut held = self.held.lock();
        if held
            .looked
            .is_none_or(|looked| looked.elapsed() >= LOOK_INTERVAL)
        {
            held.looked = Some(Instant::now());
            let modified = std::fs::metadata(&self.path).and_then(|file| file.modified());
            if let Ok(modified) = modified
                && held.modified != Some(modified)
                && let Ok(text) = std::fs::read(&self.path)
            {
                held.modified = Some(modified);
                held.plan = Arc::new(Plan::of(&text));
            }
        }
        Arc::clone(&held.plan)
    }

    /// Asks until a server helps: from inside the pod, with the mark of the proxy.
    pub(super) async fn ask(
        &self,
        origin: &Origin,
        query: Query<'_>,
    ) -> Result<Vec<u8>, RelayError> {
        let plan = self.plan();
        let count = plan.servers.len();
        if count == 0 {
            return Err(RelayError::NoServer(self.path.clone()));
        }
        let first = self.preferred.load(Ordering::Relaxed);
        let mut turns = (0..count * plan.attempts).map(|turn| (first + turn) % count);
        let mut fallback = Err(RelayError::Timeout(count, plan.limit));
        let relaying = async {
            let mut running = FuturesUnordered::new();
            loop {
                let more = turns.next();
                let head_start = match more.and_then(|at| Some((at, *plan.servers.get(at)?))) {
                    Some((at, server)) => {
                        let asking = async move { (at, ask_one(origin, server, query).await) };
                        running.push(asking);
                        Instant::now() + HEAD_START
                    }
                    None if running.is_empty() => return None,
                    None => Instant::now() + plan.limit,
                };
                tokio::select! {
                    Some((at, outcome)) = running.next() => match outcome {
                        Ok(answer) if !wire::is_unhelpful(&answer) => {
                            self.preferred.store(at, Ordering::Relaxed);
                            return Some(answer);
                        }
                        // An answer that does not help is worth more than none.
                        other if other.is_ok() || fallback.is_err() => fallback = other,
                        _ => {}
                    },
                    () = sleep_until(head_start) => {}
                }
            }
        };
        let limit = plan.limit;
        match timeout(limit, relaying).await {
            Ok(Some(answer)) => Ok(answer),
            Ok(None) => fallback,
            Err(_) => fallback.or(Err(RelayError::Timeout(count, limit))),
        }
    }
}

impl Plan {
    pub(super) fn of(text: &[u8]) -> Self {
        // Lines that make no sense are left out, as every resolver does.
        let (config, _faults) = resolv_conf::Config::parse_with_errors(text);
        let servers = config.nameservers.iter().cloned().map(IpAddr::from);
        let each = Duration::from_secs(config.timeout.clamp(1, 30).into());
        let attempts = config.attempts.clamp(1, 5);
        Self {
            servers: servers
                .take(MAX_SERVERS)
                .map(|ip| (ip, 53).into())
                .collect(),
            search: config
                .get_search()
                .into_iter()
                .flatten()
                .map(|domain| domain.trim_end_matches('.').to_ascii_lowercase())
                .collect(),
            attempts: attempts as usize,
            limit: (each * attempts).min(LONGEST),
        }
    }
}

async fn ask_one(
    origin: &Origin,
    server: SocketAddr,
    query: Query<'_>,
) -> Result<Vec<u8>, RelayError> {
    // The client's identifier may be predictable to others in its pod; ours is not.
    let mut bytes = query.bytes.to_vec();
    wire::set_id(&mut bytes, rand::random());
    let answer = match query.transport {
        Transport::Udp => over_udp(origin, server, &bytes, query.question_end).await,
        Transport::Tcp => over_tcp(origin, server, &bytes, query.question_end).await,
    };
    let mut answer = answer.map_err(|error| RelayError::Unreachable(server, error))?;
    if let Some(id) = wire::id(query.bytes) {
        wire::set_id(&mut answer, id);
    }
    Ok(answer)
}

/// Waits for the answer to this query; datagrams that do not belong to it are passed over.
async fn over_udp(
    origin: &Origin,
    server: SocketAddr,
    query: &[u8],
    question_end: usize,
) -> io::Result<Vec<u8>> {
    let socket = origin.dial(server).await?;
    socket.send(query).await?;
    loop {
        socket.readable().await?;
        // Room is taken while there is something to read, and held by nobody in between.
        let mut room = [0; u16::MAX as usize];
        match socket.try_recv(&mut room) {
            Ok(length) => {
                let answer = room.get(..length).unwrap_or_default();
                if wire::answers(answer, query, question_end) {
                    let answer = answer.to_vec();
                    origin.rest(socket);
                    return Ok(answer);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

async fn over_tcp(
    origin: &Origin,
    server: SocketAddr,
    query: &[u8],
    question_end: usize,
) -> io::Result<Vec<u8>> {
    let (netns, sockets) = (&origin.netns, &origin.sockets);
    let dialled = listen::connect(netns, sockets, server, LocalAddress::Any).await;
    let mut stream = dialled.map_err(io::Error::other)?.stream;
    let length = u16::try_from(query.len()).map_err(io::Error::other)?;
    stream
        .write_all(&[&length.to_be_bytes(), query].concat())
        .await?;
    let length = stream.read_u16().await?;
    let mut answer = vec![0; length.into()];
    stream.read_exact(&mut answer).await?;
    if wire::answers(&answer, query, question_end) {
        Ok(answer)
    } else {
        Err(io::Error::other("the answer is to another question"))
    }
}

/// How long a server is asked alone before the next one is asked, too.
const HEAD_START: Duration = Duration::from_secs(1);
/// Clients give up after five seconds, and ask again; what is older nobody waits for.
const LONGEST: Duration = Duration::from_secs(10);
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
const MAX_SERVERS: usize = 8;

#[cfg(test)]
mod tests;
