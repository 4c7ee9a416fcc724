//! The control plane of the simulation: a source of truth, an istiod that tells of it, an authority that signs.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use cert_agent::{
    BoxFuture as Boxed, CsrSource, InProcessCa, KeyedChain, ObtainError, Retry, Source, SpiffeId,
};
use futures_util::{FutureExt as _, future::BoxFuture, stream};
use parking_lot::Mutex;
use prost::Message as _;
use tokio::sync::mpsc;
use xds_client::{
    Connect, Kind, OpenError, Responses,
    proto::{
        discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource, resource::Payload},
        security as policies, workload as workloads,
    },
};

pub(super) const PODS: usize = 4;
pub(super) const POLICIES: usize = 4;
pub(super) const PORTS: [u16; 2] = [80, 90];

/// Names of the policies that each pod is subject to.
pub(super) type Pods = BTreeMap<usize, BTreeSet<usize>>;
/// What each policy says.
pub(super) type Rules = BTreeMap<usize, Rule>;

/// Matches connections of one pod to one port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Rule {
    pub(super) deny: bool,
    pub(super) client: usize,
    pub(super) port: u16,
}

/// Whether these pods and rules let a connection in. A rule that is named and not there does not.
pub(super) fn allows(pods: &Pods, rules: &Rules, (from, to, port): (usize, usize, u16)) -> bool {
    let Some(named) = pods.get(&to) else {
        return false;
    };
    let known: Vec<_> = named.iter().filter_map(|name| rules.get(name)).collect();
    let matches = |rule: &&&Rule| rule.client == from && rule.port == port;
    let denied = known.iter().filter(matches).any(|rule| rule.deny);
    let has_allow = known.iter().any(|rule| !rule.deny);
    let allowed = known.iter().filter(matches).any(|rule| !rule.deny);
    known.len() == named.len() && !denied && (allowed || !has_allow)
}

/// The stand-in istiod. It tells a proxy of one kind at a time; whatever the proxy holds of a kind is one of the states that
/// were sent and not superseded by one that it has acknowledged.
#[derive(Default)]
pub(super) struct Istiod(Mutex<State>);

#[derive(Default)]
struct State {
    down: bool,
    pods: Pods,
    rules: Rules,
    /// Changes the versions of everything, as another replica would.
    replica: u64,
    nonce: u64,
    stream: Option<Stream>,
    /// What the proxy may hold, by the nonce of the response; the first is acknowledged.
    held_pods: Vec<(u64, Pods)>,
    held_rules: Vec<(u64, Rules)>,
}

struct Stream {
    responses_tx: mpsc::Sender<DeltaDiscoveryResponse>,
    requests: mpsc::Receiver<DeltaDiscoveryRequest>,
    told_pods: Pods,
    told_rules: Rules,
}

impl Istiod {
    pub(super) fn new() -> Self {
        let istiod = Self::default();
        istiod.forgotten();
        istiod
    }

    /// The proxy may have lost all it knew.
    pub(super) fn forgotten(&self) {
        let mut state = self.0.lock();
        state.held_pods.push((0, Pods::new()));
        state.held_rules.push((0, Rules::new()));
    }

    pub(super) fn change(&self, change: impl FnOnce(&mut Pods, &mut Rules)) {
        let State { pods, rules, .. } = &mut *self.0.lock();
        change(pods, rules);
    }

    pub(super) fn truth(&self) -> (Pods, Rules) {
        let state = self.0.lock();
        (state.pods.clone(), state.rules.clone())
    }

    /// Tells what has changed: workloads, then policies unless the stream `breaks` between them.
    pub(super) fn push(&self, breaks: bool) {
        let mut state = self.0.lock();
        state.tell(Kind::Address, &[], false);
        if breaks {
            state.stream = None;
        }
        state.tell(Kind::Authorization, &[], false);
    }

    pub(super) fn cut(&self) {
        self.0.lock().stream = None;
    }

    pub(super) fn set_down(&self, down: bool) {
        let mut state = self.0.lock();
        state.down = down;
        if down {
            state.stream = None;
        }
    }

    pub(super) fn change_replica(&self) {
        let mut state = self.0.lock();
        state.replica += 1;
        state.stream = None;
    }

    /// Reads what the proxy has acknowledged.
    pub(super) fn read(&self) {
        let state = &mut *self.0.lock();
        let Some(stream) = &mut state.stream else {
            return;
        };
        while let Ok(request) = stream.requests.try_recv() {
            assert_eq!(request.error_detail, None);
            let nonce: u64 = request.response_nonce.parse().unwrap();
            let is_newer = |(sent, _): &(u64, _)| *sent >= nonce;
            if request.type_url == Kind::Address.type_url() {
                state.held_pods.retain(is_newer);
            } else {
                let is_newer = |(sent, _): &(u64, _)| *sent >= nonce;
                state.held_rules.retain(is_newer);
            }
        }
    }

    /// Whether any state that the proxy may hold lets this in.
    pub(super) fn may_allow(&self, connection: (usize, usize, u16)) -> bool {
        let state = self.0.lock();
        let mut pairs = state
            .held_pods
            .iter()
            .flat_map(|(_, pods)| state.held_rules.iter().map(move |(_, rules)| (pods, rules)));
        pairs.any(|(pods, rules)| allows(pods, rules, connection))
    }

    fn begin(
        &self,
        mut requests: mpsc::Receiver<DeltaDiscoveryRequest>,
    ) -> Result<Responses, OpenError> {
        let mut state = self.0.lock();
        if state.down {
            return Err(OpenError::Unreachable("istiod is down".into()));
        }
        let first = Kind::ALL.map(|_| requests.try_recv().unwrap());
        let (responses_tx, responses) = mpsc::channel(1000);
        state.stream = Some(Stream {
            responses_tx,
            requests,
            told_pods: Pods::new(),
            told_rules: Rules::new(),
        });
        for (kind, request) in Kind::ALL.into_iter().zip(first) {
            let claimed: Vec<_> = request.initial_resource_versions.into_iter().collect();
            state.tell(kind, &claimed, true);
        }
        let next = |mut responses: mpsc::Receiver<_>| async {
            let response = responses.recv().await?;
            Some((Ok(response), responses))
        };
        Ok(Box::pin(stream::unfold(responses, next)))
    }
}

impl State {
    /// Sends the difference to what the stream was told, or, at its beginning, to what the client claims to hold.
    fn tell(&mut self, kind: Kind, claimed: &[(String, String)], is_first: bool) {
        let truth = self.resources(kind, &self.pods, &self.rules);
        let Some(stream) = &self.stream else { return };
        let told = if is_first {
            claimed.iter().cloned().collect()
        } else {
            let told = self.resources(kind, &stream.told_pods, &stream.told_rules);
            let versions = told.into_iter().map(|(name, (version, _))| (name, version));
            versions.collect::<BTreeMap<_, _>>()
        };
        let is_new = |name: &String, version: &String| {
            let held = told.get(name);
            held != Some(version) || (is_first && version.is_empty())
        };
        let resources: Vec<Bytes> = truth
            .iter()
            .filter(|(name, (version, _))| is_new(name, version))
            .map(|(name, (version, value))| resource(kind, name, version, value))
            .collect();
        let removed = told.keys().filter(|name| !truth.contains_key(*name));
        let removed_resources: Vec<_> = removed.cloned().collect();
        if !is_first && resources.is_empty() && removed_resources.is_empty() {
            return;
        }
        self.nonce += 1;
        let response = DeltaDiscoveryResponse {
            type_url: kind.type_url().into(),
            nonce: self.nonce.to_string(),
            resources,
            removed_resources,
            ..DeltaDiscoveryResponse::default()
        };
        let Some(stream) = &mut self.stream else {
            return;
        };
        // A client that is gone reads nothing.
        let _ = stream.responses_tx.try_send(response);
        match kind {
            Kind::Address => {
                stream.told_pods.clone_from(&self.pods);
                self.held_pods.push((self.nonce, self.pods.clone()));
            }
            Kind::Authorization => {
                stream.told_rules.clone_from(&self.rules);
                self.held_rules.push((self.nonce, self.rules.clone()));
            }
        }
    }

    /// Version and content of each resource, by name. Policies are told without versions, but compared on a stream.
    fn resources(
        &self,
        kind: Kind,
        pods: &Pods,
        rules: &Rules,
    ) -> BTreeMap<String, (String, Vec<u8>)> {
        match kind {
            Kind::Address => pods
                .iter()
                .map(|(pod, named)| {
                    let number = named.iter().fold(0, |sum, name| sum | 1_u64 << name);
                    let version = format!("{:016x}", number | self.replica << 32);
                    (format!("pod-{pod}"), (version, workload(*pod, named)))
                })
                .collect(),
            Kind::Authorization => rules
                .iter()
                .map(|(name, rule)| {
                    let version = format!("{rule:?}");
                    (
                        format!("sim/policy-{name}"),
                        (version, policy(*name, *rule)),
                    )
                })
                .collect(),
        }
    }
}

fn resource(kind: Kind, name: &str, version: &str, value: &[u8]) -> Bytes {
    let version = match kind {
        Kind::Address => version.to_owned(),
        Kind::Authorization => String::new(),
    };
    let resource = Resource {
        name: name.to_owned(),
        version,
        resource: Some(Payload {
            type_url: kind.type_url().into(),
            value: Bytes::copy_from_slice(value),
        }),
        ..Resource::default()
    };
    resource.encode_to_vec().into()
}

fn workload(pod: usize, named: &BTreeSet<usize>) -> Vec<u8> {
    let last = u8::try_from(pod).unwrap() + 1;
    let workload = workloads::Workload {
        uid: format!("pod-{pod}"),
        name: format!("pod-{pod}"),
        namespace: "sim".into(),
        service_account: format!("pod-{pod}"),
        trust_domain: "cluster.local".into(),
        node: "node".into(),
        addresses: vec![vec![10, 0, 0, last]],
        tunnel_protocol: workloads::TunnelProtocol::Hbone.into(),
        authorization_policies: named
            .iter()
            .map(|name| format!("sim/policy-{name}"))
            .collect(),
        ..workloads::Workload::default()
    };
    workloads::Address {
        r#type: Some(workloads::address::Type::Workload(workload)),
    }
    .encode_to_vec()
}

fn policy(name: usize, rule: Rule) -> Vec<u8> {
    let exact = format!("cluster.local/ns/sim/sa/pod-{}", rule.client);
    let client = policies::StringMatch {
        match_type: Some(policies::string_match::MatchType::Exact(exact)),
    };
    // All clauses of a rule must hold.
    let of = |change: policies::Match| policies::Clause {
        matches: vec![change],
    };
    let clauses = vec![
        of(policies::Match {
            principals: vec![client],
            ..policies::Match::default()
        }),
        of(policies::Match {
            destination_ports: vec![rule.port.into()],
            ..policies::Match::default()
        }),
    ];
    let action = if rule.deny {
        policies::Action::Deny
    } else {
        policies::Action::Allow
    };
    policies::Authorization {
        name: format!("policy-{name}"),
        namespace: "sim".into(),
        scope: policies::Scope::WorkloadSelector.into(),
        action: action.into(),
        rules: vec![policies::Rule { clauses }],
        ..policies::Authorization::default()
    }
    .encode_to_vec()
}

/// Reaches the stand-in.
pub(super) struct Road(pub(super) Arc<Istiod>);

impl Connect for Road {
    fn open(
        &self,
        requests: mpsc::Receiver<DeltaDiscoveryRequest>,
    ) -> BoxFuture<'_, Result<Responses, OpenError>> {
        async { self.0.begin(requests) }.boxed()
    }

    fn improved(&self) -> BoxFuture<'_, ()> {
        std::future::pending().boxed()
    }
}

/// How the authority answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mood {
    Signs,
    Refuses,
    /// Never answers.
    Hangs,
    /// Signs after this time.
    Late(Duration),
}

/// An authority with moods.
pub(super) struct Authority {
    mood: Mutex<Mood>,
    signs: CsrSource<InProcessCa>,
}

impl Authority {
    pub(super) fn new() -> Self {
        Self {
            mood: Mutex::new(Mood::Signs),
            signs: CsrSource::new(InProcessCa::random().unwrap()),
        }
    }

    pub(super) fn set_mood(&self, mood: Mood) {
        *self.mood.lock() = mood;
    }
}

impl Source for Authority {
    fn obtain<'a>(&'a self, id: &'a SpiffeId) -> Boxed<'a, Result<KeyedChain, ObtainError>> {
        Box::pin(async move {
            let mood = *self.mood.lock();
            match mood {
                Mood::Signs => {}
                Mood::Refuses => return Err(ObtainError::refused("not now", Retry::Soon)),
                Mood::Hangs => return std::future::pending().await,
                Mood::Late(by) => tokio::time::sleep(by).await,
            }
            self.signs.obtain(id).await
        })
    }
}
