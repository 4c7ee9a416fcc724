//! The proxy's knowledge under random faults: istiod, the certificate authority, the disk and the process itself fail in any
//! order, and connections are judged all the time.
//!
//! What is simulated is the control plane; the client, the mesh, the policies, the journal and the keeper of certificates
//! are the real ones, on a clock that jumps. A failing history is printed, made smaller, and kept by proptest.

mod control;

use std::{collections::BTreeSet, path::Path, sync::Arc, time::Duration};

use cert_agent::{Agent, AgentOptions, CertificateState, SpiffeId};
use prometheus_client::registry::Registry;
use proptest::prelude::*;
use tokio::{task::JoinSet, time::sleep};
use tokio_util::sync::CancellationToken;
use xds_client::{Client, Metrics, NodeFacts, journal};

use super::{control_plane::Follower, last_known};
use crate::{
    admin::Rejections,
    config::WorkloadRef,
    mesh::{Mesh, View},
    policy::{self, Connection},
};
use control::{Authority, Istiod, Mood, PODS, POLICIES, PORTS, Road, Rule, allows};

/// Something that happens.
#[derive(Debug, Clone)]
enum Event {
    /// A pod is there, subject to these policies.
    Pod(usize, BTreeSet<usize>),
    PodGone(usize),
    Policy(usize, Rule),
    PolicyGone(usize),
    /// Istiod tells what has changed; the stream may break in between.
    Push {
        breaks: bool,
    },
    Cut,
    Down(bool),
    Replica,
    Authority(Mood),
    /// The process ends and starts again, possibly with a file that was damaged.
    Restart {
        damaged: bool,
    },
    /// Time passes, in milliseconds.
    Pass(u64),
}

fn event() -> impl Strategy<Value = Event> {
    let named = prop::collection::btree_set(0..POLICIES, 0..3);
    let rule = (any::<bool>(), 0..PODS, prop::sample::select(&PORTS[..]));
    let rule = rule.prop_map(|(deny, client, port)| Rule { deny, client, port });
    let mood = prop_oneof![
        2 => Just(Mood::Signs),
        1 => Just(Mood::Refuses),
        1 => Just(Mood::Hangs),
        1 => (1_u64..20_000).prop_map(|ms| Mood::Late(Duration::from_millis(ms))),
    ];
    prop_oneof![
        4 => (0..PODS, named).prop_map(|(pod, named)| Event::Pod(pod, named)),
        1 => (0..PODS).prop_map(Event::PodGone),
        4 => (0..POLICIES, rule).prop_map(|(name, rule)| Event::Policy(name, rule)),
        1 => (0..POLICIES).prop_map(Event::PolicyGone),
        6 => prop::bool::weighted(0.2).prop_map(|breaks| Event::Push { breaks }),
        1 => Just(Event::Cut),
        2 => any::<bool>().prop_map(Event::Down),
        1 => Just(Event::Replica),
        2 => mood.prop_map(Event::Authority),
        2 => prop::bool::weighted(0.2).prop_map(|damaged| Event::Restart { damaged }),
        5 => prop_oneof![1_u64..1_000, 1_u64..40_000].prop_map(Event::Pass),
    ]
}

/// A process: what it knows, and what runs in it.
struct Process {
    mesh: Mesh,
    agent: Agent,
    running: JoinSet<()>,
    keeping: JoinSet<()>,
    stop: CancellationToken,
}

impl Process {
    fn start(directory: &Path, istiod: &Arc<Istiod>, authority: &Arc<Authority>) -> Self {
        let mesh = Mesh::new(View {
            node_name: Some("node".into()),
            network: "".into(),
            cluster_id: "Kubernetes".into(),
        });
        let agent = Agent::new(Arc::clone(authority) as _, AgentOptions::default());
        let settings = journal::Settings {
            directory: directory.to_owned(),
            max_bytes: 1 << 20,
            owner: "simulation".into(),
            on_demand: false,
        };
        let opened =
            last_known::recall(settings, journal::JournalMetrics::default(), &mesh, &agent);
        let (journal, keeper, _) = opened.unwrap();
        let follower = Follower {
            mesh: mesh.clone(),
            agent: agent.clone(),
            rejections: Rejections::default(),
            journal: Some(journal),
        };
        let client = Client::new(
            NodeFacts::default().to_node(),
            Arc::new(Road(Arc::clone(istiod))),
            Arc::new(follower),
            Metrics::register(&mut Registry::default()),
        );
        let stop = CancellationToken::new();
        let (mut running, mut keeping) = (JoinSet::new(), JoinSet::new());
        keeping.spawn(keeper.run(stop.clone()));
        running.spawn(last_known::confirm(client.synced(), mesh.clone()));
        running.spawn(client.run(stop.clone()));
        let keeps = agent.clone();
        running.spawn({
            let stop = stop.clone();
            async move { keeps.run(stop).await }
        });
        Self {
            mesh,
            agent,
            running,
            keeping,
            stop,
        }
    }

    /// Ends wherever it is.
    async fn end(mut self) {
        self.running.shutdown().await;
        self.stop.cancel();
        while self.keeping.join_next().await.is_some() {}
    }

    /// Whether a connection is let in at once.
    fn lets_in(&self, (from, to, port): (usize, usize, u16)) -> bool {
        let name = format!("pod-{to}");
        let who = WorkloadRef::new("sim", name.as_str(), name.as_str());
        let state = self.mesh.read();
        let Some(local) = state.local_workload(&who) else {
            return false;
        };
        let verdict = policy::authorize(
            &state,
            local,
            &Connection {
                source: ([10, 0, 0, u8::try_from(from).unwrap() + 1], 40_000).into(),
                destination: ([10, 0, 0, u8::try_from(to).unwrap() + 1], port).into(),
                identity: Some(&identity(from)),
            },
        );
        // Where one is missing a connection waits, or is refused.
        verdict.is_allowed() && verdict.missing().next().is_none()
    }
}

fn identity(pod: usize) -> SpiffeId {
    format!("spiffe://cluster.local/ns/sim/sa/pod-{pod}")
        .parse()
        .unwrap()
}

fn connections() -> impl Iterator<Item = (usize, usize, u16)> {
    let pods = (0..PODS).flat_map(|from| (0..PODS).map(move |to| (from, to)));
    pods.flat_map(|(from, to)| PORTS.map(|port| (from, to, port)))
}

/// All that there is.
struct World {
    directory: tempfile::TempDir,
    istiod: Arc<Istiod>,
    authority: Arc<Authority>,
    process: Process,
}

impl World {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (istiod, authority) = (Arc::new(Istiod::new()), Arc::new(Authority::new()));
        Self {
            process: Process::start(directory.path(), &istiod, &authority),
            directory,
            istiod,
            authority,
        }
    }

    async fn happens(mut self, event: Event) -> Self {
        match event {
            Event::Pod(pod, named) => self.istiod.change(|pods, _| {
                pods.insert(pod, named);
            }),
            Event::PodGone(pod) => self.istiod.change(|pods, _| {
                pods.remove(&pod);
            }),
            Event::Policy(name, rule) => self.istiod.change(|_, rules| {
                rules.insert(name, rule);
            }),
            Event::PolicyGone(name) => self.istiod.change(|_, rules| {
                rules.remove(&name);
            }),
            Event::Push { breaks } => self.istiod.push(breaks),
            Event::Cut => self.istiod.cut(),
            Event::Down(down) => self.istiod.set_down(down),
            Event::Replica => self.istiod.change_replica(),
            Event::Authority(mood) => self.authority.set_mood(mood),
            Event::Pass(ms) => sleep(Duration::from_millis(ms)).await,
            Event::Restart { damaged } => self = self.restarted(damaged).await,
        }
        self
    }

    async fn restarted(self, damaged: bool) -> Self {
        let Self {
            directory,
            istiod,
            authority,
            process,
        } = self;
        process.end().await;
        istiod.read();
        istiod.cut();
        let state = directory.path().join("mesh.state");
        if let (true, Ok(mut bytes)) = (damaged, std::fs::read(&state)) {
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            std::fs::write(&state, bytes).unwrap();
        }
        // Nothing is on disk before both kinds were told once, nor after damage.
        istiod.forgotten();
        Self {
            process: Process::start(directory.path(), &istiod, &authority),
            directory,
            istiod,
            authority,
        }
    }

    /// Nothing is let in that no state forbids which the proxy may have been told last.
    fn grants_nothing(&self) {
        self.istiod.read();
        for connection in connections().filter(|&one| self.process.lets_in(one)) {
            let expected = self.istiod.may_allow(connection);
            assert!(expected, "{connection:?} is let in");
        }
    }

    /// When all faults are over, what is known is what is true, and every pod has its certificate.
    async fn converges(&self) {
        self.istiod.set_down(false);
        self.authority.set_mood(Mood::Signs);
        self.istiod.push(false);
        sleep(Duration::from_secs(300)).await;
        self.grants_nothing();
        let (pods, rules) = self.istiod.truth();
        for connection in connections() {
            let expected = allows(&pods, &rules, connection);
            assert_eq!(self.process.lets_in(connection), expected, "{connection:?}");
        }
        assert_eq!(self.process.mesh.read().recalled(), None);
        assert_eq!(self.process.mesh.read().counts().workloads, pods.len());
        let held = self.process.agent.snapshot();
        let available = |state: &CertificateState| *state == CertificateState::Available;
        let held: BTreeSet<_> = held
            .into_iter()
            .filter(|status| available(&status.state))
            .map(|status| status.identity)
            .collect();
        let needed: BTreeSet<_> = pods.keys().map(|pod| identity(*pod)).collect();
        assert_eq!(held, needed, "identities");
    }
}

async fn live(events: Vec<Event>) {
    let mut world = World::new();
    for event in events {
        world = world.happens(event).await;
        world.grants_nothing();
        sleep(Duration::from_millis(1)).await;
        world.grants_nothing();
    }
    world.converges().await;
    // And all of it is on disk.
    world.istiod.set_down(true);
    let world = world.restarted(false).await;
    let (pods, rules) = world.istiod.truth();
    for connection in connections() {
        let expected = allows(&pods, &rules, connection);
        assert_eq!(
            world.process.lets_in(connection),
            expected,
            "recalled: {connection:?}"
        );
    }
    world.process.end().await;
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn nothing_forbidden_is_let_in_and_all_is_well_in_the_end(
        events in prop::collection::vec(event(), 1..60)
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap();
        runtime.block_on(live(events));
    }
}
