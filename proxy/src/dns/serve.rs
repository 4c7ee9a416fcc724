//! Serving the queries of one pod.

mod lookup;
mod report;

use std::{io, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt, stream::FuturesUnordered};
use hickory_proto::op::ResponseCode;
use rand::seq::SliceRandom;
use tokio::{
    io::AsyncWrite,
    net::{TcpListener, TcpStream, UdpSocket},
    sync::{OwnedSemaphorePermit, Semaphore},
    task::{JoinSet, coop::consume_budget},
    time::{Instant, timeout},
};
use tokio_util::{
    codec::{FramedRead, FramedWrite, LengthDelimitedCodec},
    sync::CancellationToken,
};

use self::report::{failed, log};
use super::{
    local::{self, Rules},
    origin::Origin,
    upstream::{Query, Upstreams},
    wire::{Ask, Request, Transport},
};
use crate::{
    config::{Sockets, WorkloadRef},
    listen::{self, DnsSockets, Netns},
    mesh::{Mesh, Workload},
    telemetry::DnsMetrics,
};

/// What the pods of a node share.
#[derive(Debug)]
#[expect(
    clippy::exhaustive_structs,
    reason = "put together by `node` from its parts"
)]
pub struct Shared {
    /// The state of the mesh.
    pub mesh: Mesh,
    /// Who is asked for what the mesh does not know.
    pub upstreams: Upstreams,
    /// What is counted.
    pub metrics: DnsMetrics,
    /// Options of sockets.
    pub sockets: Sockets,
    /// DNS domain of the cluster.
    pub cluster_domain: Arc<str>,
    /// The namespace that goes before others where a name is ambiguous.
    pub preferred_namespace: Option<Arc<str>>,
    /// Whether pods have the search domains of the upstreams' file instead of those of their namespaces.
    pub listed_search: bool,
    /// How long a query waits for the record of its own pod.
    pub workload_wait: Duration,
}

/// How serving ends, in two steps.
#[derive(Debug, Clone, Default)]
#[expect(clippy::exhaustive_structs, reason = "an end has two steps")]
pub struct End {
    /// Cancelled when a successor may be there: it gets what is asked from then on, and without one all goes on.
    pub retire: CancellationToken,
    /// Cancelled when nothing new is to be taken.
    pub stop: CancellationToken,
}

/// The names that one pod sees.
#[derive(Debug)]
pub struct Names {
    shared: Arc<Shared>,
    who: WorkloadRef,
    origin: Origin,
    /// Queries that wait for somebody: bounded, so that one pod cannot take what others need.
    waiting: Arc<Semaphore>,
}

impl Names {
    /// The names that the pod `who`, in `netns`, sees.
    #[must_use]
    pub fn new(shared: Arc<Shared>, who: WorkloadRef, netns: Arc<Netns>) -> Arc<Self> {
        Arc::new(Self {
            origin: Origin::new(netns, shared.sockets.clone()),
            shared,
            who,
            waiting: Arc::new(Semaphore::new(MAX_WAITING)),
        })
    }

    /// Serves until `end.stop` is asked for, and then until what was asked by then has its answer, which takes a few
    /// seconds at most.
    pub async fn serve(self: Arc<Self>, sockets: Vec<DnsSockets>, end: End) {
        let mut serving = JoinSet::new();
        for DnsSockets { udp, tcp, .. } in sockets {
            let (udp, end) = (Arc::new(udp), end.clone());
            serving.spawn(Arc::clone(&self).serve_udp(Arc::clone(&udp), end.stop.clone()));
            let tcp = Arc::new(tcp);
            serving.spawn(Arc::clone(&self).serve_tcp(Arc::clone(&tcp), end.stop.clone()));
            serving.spawn(async move {
                end.retire.cancelled().await;
                for steered in [
                    listen::prefer_successor(&*udp),
                    listen::prefer_successor(&*tcp),
                ] {
                    if let Err(error) = steered {
                        tracing::debug!(%error, "cannot point queries to a successor");
                    }
                }
            });
        }
        while serving.join_next().await.is_some() {}
    }

    async fn serve_udp(self: Arc<Self>, socket: Arc<UdpSocket>, stop: CancellationToken) {
        let mut waiting = JoinSet::new();
        loop {
            tokio::select! {
                biased; // stopping goes before reading
                () = stop.cancelled() => break,
                Some(_ended) = waiting.join_next() => {}
                readable = socket.readable() => {
                    if readable.is_ok() {
                        self.take_datagram(&socket, &mut waiting);
                        // A pod that asks without end must not hold the thread that others need, too.
                        consume_budget().await;
                    }
                }
            }
        }
        // What has come is answered, too, but not all that a flood may bring.
        for _ in 0..MAX_WAITING {
            self.take_datagram(&socket, &mut waiting);
        }
        drop(socket);
        while waiting.join_next().await.is_some() {}
    }

    /// Reads one datagram and answers it, now or when somebody else has.
    fn take_datagram(self: &Arc<Self>, socket: &Arc<UdpSocket>, waiting: &mut JoinSet<()>) {
        // Room is taken while there is something to read, and held by nobody in between.
        let mut room = [0; MAX_QUERY_BYTES];
        // An error here is that of an earlier answer: its client is gone.
        let Ok((length, client)) = socket.try_recv_from(&mut room) else {
            return;
        };
        let bytes = room.get(..length).unwrap_or_default();
        let query = match self.begin(bytes, Transport::Udp) {
            Begun::Answered(answer) => {
                // A full socket buffer loses the answer, as the network would; the client asks again.
                let sent = answer.map(|answer| socket.try_send_to(&answer, client));
                if let Some(Err(_)) = sent {
                    self.shared.metrics.unanswered(UNSENT);
                }
                return;
            }
            Begun::Waits(query) => query,
        };
        let Ok(slot) = Arc::clone(&self.waiting).try_acquire_owned() else {
            self.shared.metrics.unanswered("too_many");
            return;
        };
        let (names, socket) = (Arc::clone(self), Arc::clone(socket));
        waiting.spawn(async move {
            if let Some(answer) = names.finish(*query, slot).await
                && socket.send_to(&answer, client).await.is_err()
            {
                names.shared.metrics.unanswered(UNSENT);
            }
        });
    }

    async fn serve_tcp(self: Arc<Self>, listener: Arc<TcpListener>, stop: CancellationToken) {
        let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let mut open = JoinSet::new();
        loop {
            let next = async {
                let slot = Arc::clone(&connections).acquire_owned().await;
                (listen::accept(&listener).await, slot)
            };
            tokio::select! {
                biased; // stopping goes before accepting
                () = stop.cancelled() => break,
                Some(_ended) = open.join_next() => {}
                ((stream, _), slot) = next => {
                    let (names, stop) = (Arc::clone(&self), stop.clone());
                    open.spawn(async move {
                        // Whoever breaks the connection off knows it.
                        let _ended = names.converse(stream, stop).await;
                        drop(slot);
                    });
                }
            }
        }
        drop(listener);
        while open.join_next().await.is_some() {}
    }

    /// One connection: queries are answered as answers come, not in their order (RFC 7766 section 6.2.1.1).
    async fn converse(
        self: Arc<Self>,
        stream: TcpStream,
        stop: CancellationToken,
    ) -> io::Result<()> {
        let frames_up_to = |bytes| {
            let mut frames = LengthDelimitedCodec::builder();
            let frames = frames.length_field_type::<u16>();
            frames.max_frame_length(bytes).new_codec()
        };
        let (reading, writing) = stream.into_split();
        let mut queries = FramedRead::new(reading, frames_up_to(MAX_QUERY_BYTES));
        let mut answers = FramedWrite::new(writing, frames_up_to(u16::MAX.into()));
        let mut running = FuturesUnordered::new();
        let mut ended = false;
        loop {
            let may_read = !ended && running.len() < MAX_PIPELINED;
            tokio::select! {
                Some(answer) = running.next() => {
                    if let Some(answer) = answer {
                        self.reply(&mut answers, answer).await?;
                    }
                }
                read = timeout(IDLE, queries.next()), if may_read => match read {
                    Ok(Some(Ok(query))) => match self.begin(&query, Transport::Tcp) {
                        Begun::Answered(Some(answer)) => self.reply(&mut answers, answer).await?,
                        Begun::Answered(None) => return Ok(()),
                        Begun::Waits(query) => running.push(self.finish_in_turn(*query)),
                    },
                    Ok(Some(Err(error))) => {
                        if error.kind() == io::ErrorKind::InvalidData {
                            self.malformed(Transport::Tcp); // longer than any query
                        }
                        return Err(error);
                    }
                    Ok(None) => ended = true,
                    Err(_) if running.is_empty() => return Ok(()),
                    Err(_) => {}
                },
                () = stop.cancelled(), if !ended => ended = true,
            }
            if ended && running.is_empty() {
                return Ok(());
            }
        }
    }

    /// Sends an answer over a connection, unless its client does not read.
    async fn reply<W>(&self, answers: &mut Framed<W>, answer: Vec<u8>) -> io::Result<()>
    where
        W: AsyncWrite + Unpin,
    {
        let sent = timeout(IDLE, answers.send(Bytes::from(answer))).await;
        let sent = sent.unwrap_or_else(|late| Err(late.into()));
        if sent.is_err() {
            self.shared.metrics.unanswered(UNSENT);
        }
        sent
    }

    /// Answers a query if that takes no waiting.
    fn begin(&self, bytes: &[u8], transport: Transport) -> Begun {
        let Some(request) = Request::read(bytes) else {
            self.malformed(transport);
            return Begun::Answered(None);
        };
        let client = self.shared.mesh.read().local_workload(&self.who).cloned();
        let waits = |request: Request| {
            let bytes = bytes.to_vec();
            Begun::Waits(Box::new(Waiting {
                request,
                bytes,
                transport,
            }))
        };
        match (request.ask(), client) {
            (Ask::Refuse(code), client) => {
                let labels = self.labels(Some(&request), transport, client.as_deref());
                self.shared.metrics.requested(&labels);
                self.shared.metrics.unanswered("refused");
                Begun::Answered(request.refusal(code))
            }
            (Ask::Nothing, _) => {
                self.malformed(transport);
                Begun::Answered(None)
            }
            (Ask::Addresses(name, family), Some(client)) => {
                match self.known(&request, &client, (&name, family), transport) {
                    Some(answer) => Begun::Answered(answer),
                    None => waits(request),
                }
            }
            (Ask::Other, _) | (Ask::Addresses(..), None) => waits(request),
        }
    }

    /// The answer of the mesh, reported; `None` if it has none.
    fn known(
        &self,
        request: &Request,
        client: &Workload,
        (name, family): (&str, local::Family),
        transport: Transport,
    ) -> Option<Option<Vec<u8>>> {
        let plan = self
            .shared
            .listed_search
            .then(|| self.shared.upstreams.plan());
        let rules = Rules {
            cluster_domain: &self.shared.cluster_domain,
            search: plan.as_ref().map(|plan| &*plan.search),
            preferred_namespace: self.shared.preferred_namespace.as_deref(),
            ipv6: self.shared.sockets.ipv6,
        };
        let mut found = local::find(&self.shared.mesh.read(), client, &rules, name, family)?;
        found.addresses.shuffle(&mut rand::rng());
        let labels = self.labels(Some(request), transport, Some(client));
        self.shared.metrics.requested(&labels);
        let result = match (found.supported, found.addresses.is_empty()) {
            (false, _) => "service does not support this record type",
            (true, true) => "no records",
            (true, false) => "success",
        };
        log(request, Some(client), result, found.addresses.len());
        Some(request.answer(&found, transport))
    }

    /// Answers a query that the mesh could not answer at once.
    async fn finish(&self, waiting: Waiting, _slot: OwnedSemaphorePermit) -> Option<Vec<u8>> {
        let Waiting {
            request,
            bytes,
            transport,
        } = waiting;
        let (mesh, patience) = (&self.shared.mesh, self.shared.workload_wait);
        let deadline = Instant::now() + patience;
        let Some(client) = mesh.local_workload(&self.who, deadline).await else {
            let labels = self.labels(Some(&request), transport, None);
            self.shared.metrics.requested(&labels);
            self.shared.metrics.unanswered("unknown_client");
            return request.refusal(ResponseCode::ServFail);
        };
        // The record may have come only now, and with it the answer.
        if let Ask::Addresses(name, family) = request.ask()
            && let Some(answer) = self.known(&request, &client, (&name, family), transport)
        {
            return answer;
        }
        self.relay(&request, &bytes, transport, &client).await
    }

    /// As [`finish`](Self::finish), when the pod has room for one more. The wait is part of the answer, and not of the
    /// connection: those who hold the room must go on meanwhile.
    async fn finish_in_turn(&self, waiting: Waiting) -> Option<Vec<u8>> {
        let slot = Arc::clone(&self.waiting).acquire_owned().await.ok()?;
        self.finish(waiting, slot).await
    }

    async fn relay(
        &self,
        request: &Request,
        bytes: &[u8],
        transport: Transport,
        client: &Workload,
    ) -> Option<Vec<u8>> {
        let query = Query {
            bytes,
            question_end: request.question_end(),
            transport,
        };
        let labels = self.labels(Some(request), transport, Some(client));
        self.shared.metrics.requested(&labels);
        let began = Instant::now();
        let asking = self.shared.upstreams.ask(&self.origin, query);
        let answer = Box::pin(asking).await;
        let metrics = &self.shared.metrics;
        metrics.forwarded(&labels, answer.is_ok(), began.elapsed());
        match answer {
            Ok(answer) => {
                log(request, Some(client), "forwarded", 0);
                if answer.len() > request.room(transport) {
                    return request.truncated();
                }
                Some(answer)
            }
            Err(error) => {
                metrics.unanswered(error.reason());
                log(request, Some(client), &failed(&error), 0);
                request.refusal(ResponseCode::ServFail)
            }
        }
    }
}

/// A connection that messages are written to, each behind its length.
type Framed<W> = FramedWrite<W, LengthDelimitedCodec>;

/// A query that was looked at.
enum Begun {
    /// It is done with: this is sent, or nothing can be.
    Answered(Option<Vec<u8>>),
    /// It waits for somebody else.
    Waits(Box<Waiting>),
}

struct Waiting {
    request: Request,
    bytes: Vec<u8>,
    transport: Transport,
}

/// The reason for an answer that neither the kernel nor the client took.
const UNSENT: &str = "unsent";
/// Queries of one pod that may wait at the same time.
const MAX_WAITING: usize = 256;
/// Connections of one pod; further ones wait to be accepted.
const MAX_CONNECTIONS: usize = 64;
/// Queries of one connection that may wait at the same time.
const MAX_PIPELINED: usize = 16;
/// No client has a longer question.
const MAX_QUERY_BYTES: usize = 4096;
/// A connection without a query, or whose client does not read, is let go.
const IDLE: Duration = Duration::from_secs(5);
