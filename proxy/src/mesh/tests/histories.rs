//! Random histories against a model that keeps plain lists and searches them, and against a mesh that is loaded at once.

use std::{collections::BTreeMap, fmt::Debug, net::IpAddr, sync::Arc};

use proptest::{collection::vec, prelude::*, sample::select};
use xds_client::{
    Extent,
    local::NamedPolicy,
    proto::{security, workload as pb},
};

use super::{super::*, fixture::*, key, uid};
use crate::config::WorkloadRef;

const UIDS: [&str; 6] = [
    "c//Pod/a/w0",
    "c//Pod/a/w1",
    "c//Pod/b/w2",
    "we/a/w3",
    "we/b/w4",
    "we/c/w5",
];
pub(super) const IPS: [&str; 4] = ["10.0.0.1", "10.0.1.1", "10.1.0.1", "fd00::1"];
const RANGES: [&str; 4] = ["10.0.0.0/8", "10.0.0.0/16", "10.0.0.0/24", "fd00::/8"];
pub(super) const NETWORKS: [&str; 2] = ["", "net2"];
const NAMESPACES: [&str; 3] = ["a", "b", "c"];
const HOSTS: [&str; 2] = ["h1", "h2"];
const POLICIES: [&str; 4] = ["a/p1", "a/p2", "b/p1", "c/p1"];

#[derive(Debug, Clone)]
pub(super) enum Step {
    Workload(Box<pb::Workload>),
    Service(Box<pb::Service>),
    Policy(NamedPolicy),
    RemoveAddress(String),
    RemovePolicy(String),
}

pub(super) type Push = (Extent, Vec<Step>);

fn services() -> impl Strategy<Value = pb::Service> {
    let address = (
        select(&NETWORKS),
        prop_oneof![select(&IPS), select(&RANGES)],
    );
    let name = (select(&NAMESPACES), select(&HOSTS));
    let choices = (any::<bool>(), 0..2_i32, 0..2_i32, 0..9_u32);
    (name, vec(address, 0..3), choices).prop_map(
        |((namespace, host), addresses, (canonical, visibility, health_policy, fault))| {
            pb::Service {
                load_balancing: Some(pb::LoadBalancing {
                    health_policy,
                    ..pb::LoadBalancing::default()
                }),
                addresses: addresses
                    .iter()
                    .map(|(net, ip)| network_address(net, ip))
                    .collect(),
                canonical,
                visibility,
                ports: port_list(&[(80, if fault == 0 { 65_536 } else { 80 })]),
                ..service(namespace, host, &[])
            }
        },
    )
}

fn workloads() -> impl Strategy<Value = pb::Workload> {
    let links = vec((select(&NAMESPACES), select(&HOSTS), 1..3_u32), 0..3);
    let names = (
        select(&NAMESPACES),
        select(&["s1", "s2"][..]),
        select(&["n1", "n2"][..]),
    );
    let kinds = (
        0..2_i32,
        prop_oneof![4 => Just(0), 1 => Just(1)],
        0..2_i32,
        0..9_u32,
    );
    let place = (
        select(&NETWORKS),
        vec(select(&IPS), 0..3),
        select(&["", "db"][..]),
    );
    (
        select(&UIDS),
        names,
        place,
        kinds,
        links,
        vec(select(&POLICIES), 0..2),
    )
        .prop_map(
            |(uid, (namespace, account, node), (network, ips, host), kinds, links, policies)| {
                let (tunnel, mode, status, fault) = kinds;
                workload(uid, "", |w| {
                    w.namespace = namespace.into();
                    w.service_account = account.into();
                    w.node = node.into();
                    w.network = network.into();
                    w.addresses = ips
                        .iter()
                        .map(|ip| network_address("", ip).address)
                        .collect();
                    w.hostname = host.into();
                    (w.tunnel_protocol, w.network_mode, w.status) = (tunnel, mode, status);
                    for (namespace, host, port) in links {
                        link(w, &format!("{namespace}/{host}"), &[(80, port)]);
                    }
                    w.authorization_policies = policies.iter().map(ToString::to_string).collect();
                    if fault == 0 {
                        w.addresses.push(vec![1, 2, 3]);
                    }
                })
            },
        )
}

fn steps() -> impl Strategy<Value = Step> {
    let scopes = [
        security::Scope::Global,
        security::Scope::Namespace,
        security::Scope::WorkloadSelector,
    ];
    let name = prop_oneof![
        select(&UIDS).prop_map(String::from),
        (select(&NAMESPACES), select(&HOSTS))
            .prop_map(|(namespace, host)| format!("{namespace}/{host}")),
    ];
    prop_oneof![
        6 => workloads().prop_map(|one| Step::Workload(Box::new(one))),
        4 => services().prop_map(|one| Step::Service(Box::new(one))),
        2 => (select(&POLICIES), select(scopes.to_vec())).prop_map(|(key, scope)| Step::Policy(policy(key, scope))),
        3 => name.prop_map(Step::RemoveAddress),
        1 => select(&POLICIES).prop_map(|key| Step::RemovePolicy(key.into())),
    ]
}

pub(super) fn histories() -> impl Strategy<Value = Vec<Push>> {
    let extent = prop_oneof![9 => Just(Extent::Changes), 1 => Just(Extent::Everything)];
    let batch = (extent, vec(steps(), 0..8)).prop_map(|(extent, mut steps)| {
        let is_removal =
            |step: &Step| matches!(step, Step::RemoveAddress(_) | Step::RemovePolicy(_));
        steps.retain(|step| extent == Extent::Changes || !is_removal(step));
        (extent, steps)
    });
    vec(batch, 0..12)
}

pub(super) fn update(steps: Vec<Step>) -> Update {
    let mut update = Update::default();
    for step in steps {
        match step {
            Step::Workload(workload) => update.addresses.push((*workload).into()),
            Step::Service(service) => update.addresses.push((*service).into()),
            Step::Policy(policy) => update.policies.push(policy),
            Step::RemoveAddress(name) => update.removed_addresses.push(name),
            Step::RemovePolicy(name) => update.removed_policies.push(name),
        }
    }
    update
}

/// Plain lists; workloads in the order in which they were first seen.
#[derive(Debug, Clone, Default)]
pub(super) struct Model {
    workloads: Vec<pb::Workload>,
    services: BTreeMap<String, pb::Service>,
    policies: BTreeMap<String, NamedPolicy>,
}

fn service_key(service: &pb::Service) -> String {
    format!("{}/{}", service.namespace, service.hostname)
}

fn is_valid(workload: &pb::Workload) -> bool {
    workload.addresses.iter().all(|address| address.len() != 3)
}

impl Model {
    pub(super) fn run(&mut self, (extent, steps): &Push) {
        if *extent == Extent::Everything {
            let named = |uid: &str| {
                steps
                    .iter()
                    .any(|s| matches!(s, Step::Workload(w) if w.uid == uid))
            };
            self.workloads.retain(|held| named(&held.uid));
            let named = |key: &str| {
                steps
                    .iter()
                    .any(|s| matches!(s, Step::Service(s) if service_key(s) == key))
            };
            self.services.retain(|key, _| named(key));
            let named = |key: &str| {
                steps
                    .iter()
                    .any(|s| matches!(s, Step::Policy(p) if p.name == key))
            };
            self.policies.retain(|key, _| named(key));
        }
        for step in steps {
            match step {
                Step::Workload(new) if is_valid(new) => {
                    let held = self.workloads.iter_mut().find(|held| held.uid == new.uid);
                    match held {
                        Some(held) => held.clone_from(new),
                        None => self.workloads.push((**new).clone()),
                    }
                }
                Step::Service(new) if new.ports[0].target_port <= 65_535 => {
                    self.services.insert(service_key(new), (**new).clone());
                }
                Step::Policy(new) => {
                    self.policies.insert(new.name.clone(), new.clone());
                }
                Step::Workload(_)
                | Step::Service(_)
                | Step::RemoveAddress(_)
                | Step::RemovePolicy(_) => {}
            }
        }
        for step in steps {
            match step {
                Step::RemoveAddress(name) => {
                    self.workloads.retain(|held| held.uid != *name);
                    self.services.remove(name);
                }
                Step::RemovePolicy(name) => drop(self.policies.remove(name)),
                Step::Workload(_) | Step::Service(_) | Step::Policy(_) => {}
            }
        }
    }

    fn everything(&self) -> Update {
        let workloads = self.workloads.iter().cloned().map(Into::into);
        let services = self.services.values().cloned().map(Into::into);
        Update {
            addresses: workloads.chain(services).collect(),
            policies: self.policies.values().cloned().collect(),
            ..Update::default()
        }
    }

    fn workload_where(&self, matches: impl Fn(&pb::Workload) -> bool) -> Option<String> {
        let found = self
            .workloads
            .iter()
            .enumerate()
            .filter(|(_, w)| matches(w));
        let best = found.max_by_key(|(age, w)| (w.uid.contains("//Pod/"), w.tunnel_protocol, *age));
        best.map(|(_, w)| w.uid.clone())
    }

    fn service_where<M: Ord>(
        &self,
        client: Option<&str>,
        matches: impl Fn(&pb::Service) -> Option<M>,
    ) -> Option<String> {
        let mut found: Vec<_> = self
            .services
            .iter()
            .filter(|(_, s)| s.visibility == 0 || client.is_none_or(|client| client == s.namespace))
            .filter_map(|(key, s)| {
                Some((
                    (client == Some(&*s.namespace), matches(s)?, s.canonical),
                    key,
                ))
            })
            .collect();
        found.sort_by(|(one, _), (other, _)| other.cmp(one));
        found.first().map(|(_, key)| (*key).clone())
    }

    /// The longest range of a service around an address; exact addresses count by `length` `None`.
    fn service_at(&self, network: &str, ip: &str, client: Option<&str>) -> Option<String> {
        let octets = network_address("", ip).address;
        let exact = |s: &pb::Service| {
            let mut all = s.addresses.iter();
            all.any(|a| a.network == network && a.length.is_none() && a.address == octets)
                .then_some(())
        };
        let bits = |bytes: &[u8]| {
            bytes
                .iter()
                .fold(0_u128, |bits, byte| bits << 8 | u128::from(*byte))
        };
        let over = |s: &pb::Service| {
            let around = |a: &&pb::NetworkAddress| {
                let Some(length) = a.length.filter(|_| a.address.len() == octets.len()) else {
                    return false;
                };
                let rest = 8 * octets.len() - length as usize;
                a.network == network && bits(&a.address) >> rest == bits(&octets) >> rest
            };
            s.addresses.iter().filter(around).map(|a| a.length).max()
        };
        self.service_where(client, exact)
            .or_else(|| self.service_where(client, over))
    }

    fn policies_of(&self, workload: &pb::Workload) -> Vec<String> {
        let scope = |p: &NamedPolicy| p.policy.scope();
        let applies = |p: &NamedPolicy| match scope(p) {
            security::Scope::Global => true,
            security::Scope::Namespace => p.policy.namespace == workload.namespace,
            security::Scope::WorkloadSelector => workload.authorization_policies.contains(&p.name),
        };
        let mut all: Vec<_> = self
            .policies
            .values()
            .filter(|p| applies(p))
            .map(|p| p.name.clone())
            .collect();
        for name in &workload.authorization_policies {
            match self.policies.get(name) {
                Some(_) if all.contains(name) => {}
                Some(_) => all.push(name.clone()),
                None => all.push(format!("?{name}")),
            }
        }
        all
    }

    pub(super) fn answers(&self) -> Answers {
        let mut answers = Answers::default();
        self.answer_by_key(&mut answers);
        self.answer_by_name(&mut answers);
        answers
    }

    fn answer_by_key(&self, answers: &mut Answers) {
        for uid in UIDS {
            let found = self.workloads.iter().find(|w| w.uid == uid);
            answers.note(
                ("workload", uid),
                found.map(|w| (w.status, w.addresses.len().min(1))),
            );
            answers.note(
                ("policies", uid),
                found.map(|w| sorted(self.policies_of(w))),
            );
        }
        for (network, ip) in pairs(&NETWORKS, &IPS) {
            let octets = network_address("", ip).address;
            let at = |w: &pb::Workload| {
                w.network == network && w.network_mode == 0 && w.addresses.contains(&octets)
            };
            answers.note(("at", network, ip), self.workload_where(at));
            for client in clients() {
                answers.note(
                    ("vip", network, ip, client),
                    self.service_at(network, ip, client),
                );
            }
        }
        for (namespace, host) in pairs(&NAMESPACES, &HOSTS) {
            let key = format!("{namespace}/{host}");
            let linked = self
                .workloads
                .iter()
                .filter_map(|w| Some((w.uid.clone(), w.services.get(&key)?.ports[0].target_port)));
            let linked = sorted(linked.collect());
            let known = self.services.get(&key);
            answers.note(("endpoints", &key), known.map(|_| linked.clone()));
            let usable = known.map(|s| self.usable_endpoints(&key, s));
            answers.note(("usable", &key), usable);
            answers.note(
                ("staged", &key),
                Some(linked).filter(|linked| known.is_none() && !linked.is_empty()),
            );
            for client in clients() {
                let by_host = self.service_where(client, |s| (s.hostname == host).then_some(()));
                answers.note(("host", host, client), by_host);
            }
        }
    }

    /// Whom the service may choose by what is known of their health now, and by what it says of health now.
    fn usable_endpoints(&self, key: &str, service: &pb::Service) -> Vec<String> {
        let policy = service.load_balancing.as_ref().unwrap().health_policy();
        let all = policy == pb::load_balancing::HealthPolicy::AllowAll;
        let usable = self
            .workloads
            .iter()
            .filter(|w| w.services.contains_key(key) && (all || w.status == 0));
        sorted(usable.map(|w| w.uid.clone()).collect())
    }

    fn answer_by_name(&self, answers: &mut Answers) {
        for namespace in NAMESPACES {
            let named = |w: &pb::Workload| w.hostname == "db" && w.namespace == namespace;
            answers.note(("named", namespace), self.workload_where(named));
            for account in ["s1", "s2"] {
                let here = |w: &pb::Workload| {
                    w.node == "n1" && w.namespace == namespace && w.service_account == account
                };
                let needed = self
                    .workloads
                    .iter()
                    .any(|w| here(w) && w.tunnel_protocol == 1);
                answers.note(("identity", namespace, account), Some(needed));
                for uid in UIDS {
                    let name = uid.rsplit('/').next().unwrap();
                    let local = self.workload_where(|w| here(w) && w.name == name);
                    answers.note(("local", namespace, account, name), local);
                }
            }
        }
    }
}

/// What is answered to every question of a small world.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Answers(BTreeMap<String, String>);

impl Answers {
    fn note(&mut self, question: impl Debug, answer: Option<impl Debug>) {
        let answer = answer.map_or_else(|| "nothing".into(), |answer| format!("{answer:?}"));
        self.0.insert(format!("{question:?}"), answer);
    }

    pub(super) fn of(state: &State) -> Self {
        let mut answers = Self::default();
        answers.ask_by_key(state);
        answers.ask_by_name(state);
        answers
    }

    fn ask_by_key(&mut self, state: &State) {
        for uid in UIDS {
            let found = state.workload(uid);
            let health = |w: &Arc<Workload>| i32::from(w.health() == Health::Unhealthy);
            self.note(
                ("workload", uid),
                found.map(|w| (health(w), w.addresses().len().min(1))),
            );
            self.note(
                ("policies", uid),
                found.map(|w| sorted(state.policies_for(w).map(policy_name).collect())),
            );
        }
        for (network, text) in pairs(&NETWORKS, &IPS) {
            let ip: IpAddr = text.parse().unwrap();
            self.note(("at", network, text), uid(state.workload_at(network, ip)));
            for client in clients() {
                self.note(
                    ("vip", network, text, client),
                    key(state.service_at(network, ip, client)),
                );
            }
        }
        let staged: BTreeMap<_, _> = state
            .staged_services()
            .map(|(key, e)| (key.to_string(), targets(e)))
            .collect();
        for (namespace, host) in pairs(&NAMESPACES, &HOSTS) {
            let name = format!("{namespace}/{host}");
            let known = state.service(namespace, host);
            self.note(
                ("endpoints", &name),
                known.map(|s| targets(state.endpoints(s))),
            );
            self.note(("usable", &name), known.map(|s| usable(state, s)));
            self.note(("staged", &name), staged.get(&name));
            for client in clients() {
                self.note(
                    ("host", host, client),
                    key(state.service_by_host(host, client)),
                );
            }
        }
    }

    fn ask_by_name(&mut self, state: &State) {
        for namespace in NAMESPACES {
            self.note(
                ("named", namespace),
                uid(state.workload_by_hostname(namespace, "db")),
            );
            for account in ["s1", "s2"] {
                let id = SpiffeId::new("cluster.local", namespace, account).unwrap();
                self.note(
                    ("identity", namespace, account),
                    Some(state.has_local_identity(&id)),
                );
                for name in UIDS.map(|uid| uid.rsplit('/').next().unwrap()) {
                    let who = WorkloadRef::new(namespace, name, account);
                    self.note(
                        ("local", namespace, account, name),
                        uid(state.local_workload(&who)),
                    );
                }
            }
        }
    }
}

fn targets<'a>(endpoints: impl Iterator<Item = Endpoint<'a>>) -> Vec<(String, u32)> {
    let target = |e: Endpoint<'a>| {
        (
            e.workload.uid().to_owned(),
            e.target_port(80).unwrap().into(),
        )
    };
    sorted(endpoints.map(target).collect())
}

fn usable(state: &State, service: &Service) -> Vec<String> {
    let all = service.load_balancing.health_policy == HealthPolicy::AllowAll;
    let usable = state
        .endpoints(service)
        .filter(|e| all || e.workload.health() == Health::Healthy);
    sorted(usable.map(|e| e.workload.uid().to_owned()).collect())
}

fn policy_name(applicable: Applicable<'_>) -> String {
    match applicable {
        Applicable::Policy(policy) => policy.key.to_string(),
        Applicable::Missing(name) => format!("?{name}"),
    }
}

fn sorted<T: Ord>(mut all: Vec<T>) -> Vec<T> {
    all.sort();
    all
}

fn clients() -> impl Iterator<Item = Option<&'static str>> {
    [None, Some("a"), Some("b"), Some("z")].into_iter()
}

pub(super) fn pairs<'a>(
    ones: &'a [&'a str],
    others: &'a [&'a str],
) -> impl Iterator<Item = (&'a str, &'a str)> {
    ones.iter()
        .flat_map(|one| others.iter().map(|other| (*one, *other)))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2048))]

    #[test]
    fn any_history_ends_where_the_model_and_a_full_load_do(history in histories()) {
        let mesh = mesh();
        let mut model = Model::default();
        for batch in history {
            model.run(&batch);
            let before = Answers::of(&mesh.read());
            let generation = *mesh.changes().borrow();
            let (extent, steps) = batch;
            let report = apply(&mesh, extent, update(steps));
            let after = Answers::of(&mesh.read());
            prop_assert!(report.is_effective() || before == after);
            prop_assert_eq!(*mesh.changes().borrow() > generation, report.is_effective());
            prop_assert_eq!(after, model.answers());
        }
        let loaded = super::fixture::mesh();
        apply(&loaded, Extent::Changes, model.everything());
        prop_assert_eq!(Answers::of(&loaded.read()), model.answers());
        prop_assert_eq!(loaded.read().counts(), mesh.read().counts());
        let again = apply(&mesh, Extent::Everything, model.everything());
        prop_assert!(!again.is_effective(), "it is all there");
        apply(&mesh, Extent::Everything, Update::default());
        prop_assert_eq!(mesh.read().counts(), Counts::default());
        prop_assert!(mesh.read().is_bare(), "an index kept an entry: {:?}", *mesh.read());
        prop_assert_eq!(mesh.shared.pool.lock().held_after_sweep(), 0);
    }
}
