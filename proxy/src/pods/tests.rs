//! Conversations with a stand-in agent, about real namespaces.

use std::{
    fs::File,
    net::TcpStream as StdStream,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::fs::MetadataExt as _,
    },
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    time::Duration,
};

use futures_util::future::BoxFuture;
use prometheus_client::registry::Registry;
use tempfile::TempDir;
use tokio::{task::JoinSet, time::timeout};
use tokio_seqpacket::{UnixSeqpacket, UnixSeqpacketListener, ancillary::AncillaryMessageWriter};

use super::*;
use crate::{
    listen::{
        Netns, accept,
        testing::{fresh_netns, ports, sockets},
    },
    telemetry::Readiness,
};

const SECOND: Duration = Duration::from_secs(1);
const DONE: &[u8] = &[0x0A, 0x00];
const SNAPSHOT_SENT: &[u8] = &[0x1A, 0x00];

/// Holds what it accepts, as a pod's proxy would, and ends as it is told.
#[derive(Default)]
struct Holder {
    held: AtomicUsize,
    panics: AtomicBool,
    /// Ignores the force token.
    stubborn: bool,
    /// Closes the listener for plaintext.
    loses: bool,
}

impl Launch for Arc<Holder> {
    fn launch(&self, mut pod: Pod, stop: Stop) -> BoxFuture<'static, ()> {
        let holder = Self::clone(self);
        Box::pin(async move {
            assert!(
                !holder.panics.swap(false, Ordering::Relaxed),
                "as the test wants it"
            );
            if holder.loses {
                pod.listeners.inbound_plaintext = Arc::clone(&pod.listeners.outbound);
            }
            let mut held = Vec::new();
            loop {
                tokio::select! {
                    biased;
                    () = stop.accept.cancelled() => break,
                    (stream, _) = accept(&pod.listeners.hbone) => {
                        held.push(stream);
                        holder.held.fetch_add(1, Ordering::Relaxed);
                    }
                }
            }
            drop(pod);
            if holder.stubborn {
                std::future::pending::<()>().await;
            }
            if !held.is_empty() {
                stop.force.cancelled().await;
            }
        })
    }
}

/// A node: the room under test, and the agent that it talks to.
struct Node {
    directory: TempDir,
    agent: Option<UnixSeqpacketListener>,
    socket: Option<UnixSeqpacket>,
    readiness: Readiness,
    view: View,
    holder: Arc<Holder>,
    stop: Stop,
    room: JoinSet<()>,
}

impl Node {
    fn start() -> Self {
        Self::with(Holder::default(), SECOND / 2)
    }

    fn with(holder: Holder, deadline: Duration) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ztunnel.sock");
        let agent = UnixSeqpacketListener::bind(&path).unwrap();
        let holder = Arc::new(holder);
        let readiness = Readiness::new();
        let settings = Settings {
            agent_socket: path,
            sockets: sockets(),
            ports: ports(),
            drain: Drain { deadline },
            data: Handle::current(),
        };
        let metrics = PodMetrics::register(&mut Registry::default());
        let task = readiness.task(READINESS_TASK);
        let launch = Arc::new(Arc::clone(&holder));
        let pods = Pods::new(settings, launch, metrics, task);
        let (view, stop) = (pods.view(), Stop::new());
        let mut room = JoinSet::new();
        room.spawn(pods.run(stop.clone()));
        Self {
            directory,
            agent: Some(agent),
            socket: None,
            readiness,
            view,
            holder,
            stop,
            room,
        }
    }

    /// A node whose agent has named nobody yet.
    async fn live() -> Self {
        let mut node = Self::start();
        node.greet().await;
        assert_eq!(node.ask(SNAPSHOT_SENT, &[]).await, DONE);
        node
    }

    /// Accepts the next connection and reads its hello.
    async fn greet(&mut self) {
        let accepted = timeout(2 * SECOND, self.agent.as_mut().unwrap().accept()).await;
        self.socket = Some(accepted.expect("the proxy connects").unwrap());
        assert_eq!(self.read().await, [0x08, 0x01]);
    }

    async fn read(&self) -> Vec<u8> {
        let mut packet = [0; 1024];
        let socket = self.socket.as_ref().unwrap();
        let info = timeout(2 * SECOND, socket.recv(&mut packet)).await;
        let info = info.expect("an answer in time").unwrap();
        assert!(!info.truncated());
        packet[..info.bytes_read()].to_vec()
    }

    async fn send(&self, packet: &[u8], descriptors: &[OwnedFd]) {
        let mut space = [0; 128];
        let mut control = AncillaryMessageWriter::new(&mut space);
        if !descriptors.is_empty() {
            assert!(control.add_fds(descriptors).is_ok());
        }
        let socket = self.socket.as_ref().unwrap();
        let packet = [io::IoSlice::new(packet)];
        let sent = socket.send_vectored_with_ancillary(&packet, &mut control);
        sent.await.unwrap();
    }

    async fn ask(&self, packet: &[u8], descriptors: &[OwnedFd]) -> Vec<u8> {
        self.send(packet, descriptors).await;
        self.read().await
    }

    async fn add(&self, uid: &str, pod: &Netns) -> Vec<u8> {
        self.ask(&add(uid), &[again(pod)]).await
    }

    async fn del(&self, uid: &str) -> Vec<u8> {
        self.ask(&with_uid(0x12, 0x12, uid), &[]).await
    }

    async fn keep(&self, uid: &str) -> Vec<u8> {
        self.ask(&with_uid(0x2A, 0x0A, uid), &[]).await
    }

    /// A connection to a pod that its proxy has accepted.
    async fn held_by(&self, pod: &Netns) -> StdStream {
        let before = self.holder.held.load(Ordering::Relaxed);
        let stream = dial(pod).unwrap();
        eventually("it is accepted", || {
            self.holder.held.load(Ordering::Relaxed) > before
        })
        .await;
        stream
    }

    fn is_ready(&self) -> bool {
        self.readiness.pending().is_empty()
    }

    fn phases(&self) -> Vec<(String, PodPhase)> {
        let pods = self.view.pods();
        pods.iter()
            .map(|pod| (pod.uid.to_string(), pod.phase))
            .collect()
    }
}

/// `tag` of the oneof, `tag` of the uid in it.
fn with_uid(member: u8, field: u8, uid: &str) -> Vec<u8> {
    let length = u8::try_from(uid.len()).unwrap();
    let mut packet = vec![member, length + 2, field, length];
    packet.extend(uid.as_bytes());
    packet
}

fn add(uid: &str) -> Vec<u8> {
    let info = [0x0A, 1, b'n', 0x12, 1, b's', 0x1A, 1, b'a'];
    let length = u8::try_from(uid.len()).unwrap();
    let mut packet = vec![0x0A, length + 13, 0x0A, length];
    packet.extend(uid.as_bytes());
    packet.extend([0x12, 9]);
    packet.extend(info);
    packet
}

fn again(pod: &Netns) -> OwnedFd {
    pod.as_fd().try_clone_to_owned().unwrap()
}

fn dial(pod: &Netns) -> io::Result<StdStream> {
    pod.enter(|| StdStream::connect("127.0.0.1:15008"))?
}

/// Whether the other side has let go of the connection.
fn is_cut(stream: &StdStream) -> bool {
    stream.set_nonblocking(true).unwrap();
    match io::Read::read(&mut &*stream, &mut [0]) {
        Ok(0) => true,
        Ok(_) => panic!("nobody sends"),
        Err(error) => error.kind() != io::ErrorKind::WouldBlock,
    }
}

/// Descriptors of this process that refer to the namespace.
fn descriptors_of(pod: &Netns) -> usize {
    let inode = File::from(again(pod)).metadata().unwrap().ino();
    let name = format!("net:[{inode}]");
    let links = std::fs::read_dir("/proc/self/fd").unwrap();
    links
        .filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok())
        .filter(|target| target.as_os_str() == name.as_str())
        .count()
}

async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let wait = async {
        while !holds() {
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(7 * SECOND, wait).await.expect(what);
}

#[tokio::test]
async fn says_hello_and_then_only_answers() {
    let mut node = Node::start();
    node.greet().await;
    let mut nothing = [0; 8];
    let socket = node.socket.as_ref().unwrap();
    let silence = timeout(SECOND / 5, socket.recv(&mut nothing));
    assert!(silence.await.is_err());
    let pod = fresh_netns();
    assert!(!node.is_ready());
    assert_eq!(node.add("a", &pod).await, DONE);
    // The answer means: listening.
    for port in [15001, 15006, 15008] {
        let dialled = pod.enter(|| StdStream::connect(("127.0.0.1", port)));
        dialled.unwrap().unwrap();
    }
    assert_eq!(node.keep("b").await, DONE);
    assert_eq!(node.ask(SNAPSHOT_SENT, &[]).await, DONE);
    assert!(node.is_ready());
    assert_eq!(node.phases(), [("a".to_owned(), PodPhase::Up)]);
}

#[tokio::test]
async fn the_same_pod_again_changes_nothing_and_leaks_nothing() {
    let node = Node::live().await;
    let pod = fresh_netns();
    node.add("a", &pod).await;
    let stream = node.held_by(&pod).await;
    // Ours, and the room's.
    assert_eq!(descriptors_of(&pod), 2);
    for _ in 0..5 {
        assert_eq!(node.add("a", &pod).await, DONE);
    }
    assert_eq!(descriptors_of(&pod), 2);
    assert!(!is_cut(&stream));
    assert_eq!(node.del("a").await, DONE);
    eventually("nothing is left", || descriptors_of(&pod) == 1).await;
}

#[tokio::test]
async fn a_new_sandbox_replaces_the_old_one() {
    let node = Node::live().await;
    let (old, new) = (fresh_netns(), fresh_netns());
    node.add("a", &old).await;
    let stream = node.held_by(&old).await;
    assert_eq!(node.add("a", &new).await, DONE);
    dial(&new).unwrap();
    eventually("the old one is cut", || is_cut(&stream)).await;
    eventually("the old ports are closed", || dial(&old).is_err()).await;
    assert_eq!(node.phases(), [("a".to_owned(), PodPhase::Up)]);
}

#[tokio::test]
async fn a_pod_that_cannot_be_served_is_tried_again() {
    let node = Node::live().await;
    let pod = fresh_netns();
    let squat = || pod.enter(|| std::net::TcpListener::bind("0.0.0.0:15008"));
    let squatter = squat().unwrap().unwrap();
    let refused = node.add("a", &pod).await;
    assert!(refused.len() < 1000);
    let text = String::from_utf8_lossy(&refused);
    assert!(text.contains("15008") && text.contains("in use"), "{text}");
    assert!(!node.is_ready());
    assert_eq!(node.phases(), [("a".to_owned(), PodPhase::Pending)]);
    drop(squatter);
    eventually("it is up", || node.is_ready()).await;
    dial(&pod).unwrap();

    // Deleted while pending: no more attempts, and no trace.
    node.del("a").await;
    eventually("its ports are free", || dial(&pod).is_err()).await;
    let squatter = squat().unwrap().unwrap();
    node.add("a", &pod).await;
    assert!(!node.is_ready());
    assert_eq!(node.del("a").await, DONE);
    assert!(node.is_ready());
    assert!(node.phases().is_empty());
    assert_eq!(descriptors_of(&pod), 1);
    drop(squatter);
}

#[tokio::test]
async fn a_reconnect_spares_what_is_still_named() {
    let mut node = Node::live().await;
    let [added, kept, dropped] = [fresh_netns(), fresh_netns(), fresh_netns()];
    let mut streams = Vec::new();
    for (uid, pod) in [("added", &added), ("kept", &kept), ("dropped", &dropped)] {
        assert_eq!(node.add(uid, pod).await, DONE);
        streams.push(node.held_by(pod).await);
    }
    node.socket = None;
    eventually("the loss is noticed", || !node.is_ready()).await;
    node.greet().await;
    node.add("added", &added).await;
    node.keep("kept").await;
    assert!(streams.iter().all(|stream| !is_cut(stream)));
    assert_eq!(node.ask(SNAPSHOT_SENT, &[]).await, DONE);
    eventually("the unnamed one is cut", || is_cut(&streams[2])).await;
    eventually("its ports are closed", || dial(&dropped).is_err()).await;
    assert!(!is_cut(&streams[0]) && !is_cut(&streams[1]));
    assert!(node.is_ready());
}

#[tokio::test]
async fn serves_without_an_agent_and_finds_the_next_one_soon() {
    let mut node = Node::live().await;
    let pod = fresh_netns();
    node.add("a", &pod).await;
    let stream = node.held_by(&pod).await;
    let path = node.directory.path().join("ztunnel.sock");
    (node.socket, node.agent) = (None, None);
    std::fs::remove_file(&path).unwrap();
    eventually("the loss is noticed", || !node.is_ready()).await;
    // Long enough for the wait between attempts to reach its ceiling.
    sleep(3 * SECOND / 2).await;
    assert!(!is_cut(&stream));
    node.held_by(&pod).await;

    node.agent = Some(UnixSeqpacketListener::bind(&path).unwrap());
    let before = Instant::now();
    node.greet().await;
    assert!(before.elapsed() < SECOND / 2, "{:?}", before.elapsed());
    node.add("a", &pod).await;
    node.ask(SNAPSHOT_SENT, &[]).await;
    assert!(node.is_ready() && !is_cut(&stream));
}

#[tokio::test]
async fn slips_end_the_connection_and_nothing_else() {
    let mut node = Node::live().await;
    let (pod, stray) = (fresh_netns(), fresh_netns());
    node.add("a", &pod).await;
    let stream = node.held_by(&pod).await;
    let bare_add = with_uid(0x0A, 0x0A, "b");
    let slips: [(&[u8], usize); 9] = [
        (&[0xFF; 2000], 0),
        (&[0xFF; 6000], 1),
        (&[0xFF, 0xFF], 1),
        (&add("b"), 0),
        (&add("b"), 2),
        (&add("b"), 40), // more than there is room for
        (&with_uid(0x12, 0x12, "a"), 1),
        (&bare_add, 1),
        (SNAPSHOT_SENT, 0), // the second one
    ];
    for (packet, descriptors) in slips {
        let descriptors: Vec<_> = (0..descriptors).map(|_| again(&stray)).collect();
        let socket = node.socket.as_ref().unwrap();
        let mut space = vec![0; 512];
        let mut control = AncillaryMessageWriter::new(&mut space);
        assert!(descriptors.is_empty() || control.add_fds(&descriptors).is_ok());
        let slices = [io::IoSlice::new(packet)];
        let sent = socket.send_vectored_with_ancillary(&slices, &mut control);
        sent.await.unwrap();
        drop(descriptors);
        let answer = node.read().await;
        assert!(
            answer.len() > 2 && answer.len() < 1000,
            "{packet:?}: {answer:?}"
        );
        assert!(node.read().await.is_empty(), "the connection is closed");
        assert!(!node.is_ready());
        node.greet().await;
        assert_eq!(node.keep("a").await, DONE);
        assert_eq!(node.ask(SNAPSHOT_SENT, &[]).await, DONE);
        assert_eq!(descriptors_of(&stray), 1, "{packet:?}");
    }
    assert!(!is_cut(&stream) && node.is_ready());
}

#[tokio::test]
async fn a_message_of_a_later_version_is_refused_and_the_connection_stays() {
    let node = Node::live().await;
    let answer = node.ask(&[0x4A, 0x00], &[]).await;
    assert!(answer.len() > 2);
    let pod = fresh_netns();
    assert_eq!(node.add("a", &pod).await, DONE);
}

#[tokio::test]
async fn a_burst_is_answered_in_order() {
    let node = Node::live().await;
    let (pod, squatted) = (fresh_netns(), fresh_netns());
    let squatter = squatted.enter(|| std::net::TcpListener::bind("0.0.0.0:15001"));
    let _squatter = squatter.unwrap().unwrap();
    let asked = async {
        for i in 0..200 {
            let netns = if i % 3 == 0 { &squatted } else { &pod };
            node.send(&add(&format!("{i}")), &[again(netns)]).await;
        }
    };
    let answered = async {
        for i in 0..200 {
            let good = node.read().await == DONE;
            assert_eq!(good, i % 3 != 0, "answer {i}");
        }
    };
    let both = async { tokio::join!(asked, answered) };
    timeout(5 * SECOND, both).await.expect("all in time");
    assert_eq!(node.view.pods().len(), 200);
}

#[tokio::test]
async fn a_deleted_pod_is_cut_at_once() {
    let node = Node::live().await;
    let pod = fresh_netns();
    node.add("a", &pod).await;
    let stream = node.held_by(&pod).await;
    let before = Instant::now();
    assert_eq!(node.del("a").await, DONE);
    eventually("it is cut", || is_cut(&stream)).await;
    eventually("it is gone", || node.phases().is_empty()).await;
    assert!(before.elapsed() < SECOND);
    assert_eq!(descriptors_of(&pod), 1);
}

#[tokio::test]
async fn a_deleted_pod_is_cut_though_its_listeners_were_lost() {
    let holder = Holder {
        loses: true,
        ..Holder::default()
    };
    let mut node = Node::with(holder, SECOND);
    node.greet().await;
    let pod = fresh_netns();
    node.add("a", &pod).await;
    let stream = node.held_by(&pod).await;
    let squatter = pod.enter(|| std::net::TcpListener::bind("0.0.0.0:15006"));
    let _squatter = squatter.unwrap().unwrap();
    assert_eq!(node.ask(SNAPSHOT_SENT, &[]).await, DONE);
    let pending = [("a".to_owned(), PodPhase::Pending)];
    eventually("an audit has seen it", || node.phases() == pending).await;
    assert!(!is_cut(&stream));
    assert_eq!(node.del("a").await, DONE);
    eventually("it is cut", || is_cut(&stream)).await;
    eventually("it is gone", || node.phases().is_empty()).await;
}

#[tokio::test]
async fn a_pod_whose_task_panics_is_started_again() {
    let node = Node::live().await;
    let pod = fresh_netns();
    node.holder.panics.store(true, Ordering::Relaxed);
    assert_eq!(node.add("a", &pod).await, DONE);
    eventually("it is noticed", || !node.is_ready()).await;
    eventually("it is back", || node.is_ready()).await;
    node.held_by(&pod).await;
}

#[tokio::test]
async fn who_ignores_the_force_token_is_dropped() {
    let holder = Holder {
        stubborn: true,
        ..Holder::default()
    };
    let mut node = Node::with(holder, SECOND);
    node.greet().await;
    node.ask(SNAPSHOT_SENT, &[]).await;
    let pod = fresh_netns();
    node.add("a", &pod).await;
    let stream = node.held_by(&pod).await;
    node.del("a").await;
    eventually("it is dropped", || is_cut(&stream)).await;
    eventually("it is gone", || node.phases().is_empty()).await;
}

#[tokio::test]
async fn a_stop_lets_connections_finish_until_the_deadline() {
    let mut node = Node::live().await;
    let pod = fresh_netns();
    node.add("a", &pod).await;
    let stream = node.held_by(&pod).await;
    let before = Instant::now();
    node.stop.accept.cancel();
    assert!(node.read().await.is_empty(), "the agent is left");
    eventually("listeners are closed", || dial(&pod).is_err()).await;
    assert!(!is_cut(&stream));
    timeout(5 * SECOND, node.room.join_next())
        .await
        .expect("it ends");
    assert!(before.elapsed() >= SECOND / 2);
    assert!(is_cut(&stream));
    assert!(!node.is_ready() && node.phases().is_empty());
    assert_eq!(descriptors_of(&pod), 1);
}

#[tokio::test]
async fn a_stop_with_nothing_open_is_immediate() {
    let mut node = Node::with(Holder::default(), 60 * SECOND);
    node.greet().await;
    let pod = fresh_netns();
    node.add("a", &pod).await;
    node.stop.accept.cancel();
    timeout(SECOND, node.room.join_next())
        .await
        .expect("it ends");
}

#[tokio::test]
async fn force_ends_a_drain() {
    let mut node = Node::with(Holder::default(), 60 * SECOND);
    node.greet().await;
    let pod = fresh_netns();
    node.add("a", &pod).await;
    let stream = node.held_by(&pod).await;
    node.stop.accept.cancel();
    node.stop.force.cancel();
    timeout(SECOND, node.room.join_next())
        .await
        .expect("it ends");
    assert!(is_cut(&stream));
}
