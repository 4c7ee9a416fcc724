//! In which order the steps of an update are taken, and which of them together.
//!
//! A large update takes many turns, and readers look at the mesh in between. What they must never see is an address without
//! an owner that one record gives up and another takes: a connection to it would pass by the waypoint for as long as it lasts. Nor a
//! policy that allows more, before the one of the same update that denies it. So what takes such an address comes before what gives it up,
//! what does both comes in one turn, and so do all policies: they are few, and a step of theirs takes a microsecond.

use std::sync::Arc;

use foldhash::fast::RandomState;
use hashbrown::HashSet;
use ipnet::IpNet;

use super::{
    record::Record,
    state::{PrefixLengths, State, Step},
};

/// The turns of an update. Each takes up to `at_once` steps, but for steps that belong together.
///
/// No two steps concern one name, so their order decides nothing about what they lead to but the age of workloads: those that
/// are new give nothing up, and come in the order in which they were told.
pub(super) fn turns(
    steps: Vec<Step>,
    state: &State,
    at_once: usize,
) -> impl Iterator<Item = Vec<Step>> + use<> {
    let [mut policies, mut first, mut moves, mut last, mut lifted] = [const { Vec::new() }; 5];
    let with_policies = steps.iter().any(is_of_policy);
    if steps.len() <= at_once || with_policies && steps.iter().all(is_of_policy) {
        // One turn.
        moves = steps;
    } else {
        let contested = Contested::among(&steps, state);
        if contested.0.is_empty() && !with_policies {
            first = steps;
        } else {
            for step in steps {
                let phase = match (step.record(), &step) {
                    // Whoever names a policy does so after it came, and until it has gone.
                    (Record::Policy(_), Step::Forget(..)) => &mut lifted,
                    (Record::Policy(_), Step::Put(..) | Step::Confirm(..)) => &mut policies,
                    (Record::Workload(_) | Record::Service(_), _) => {
                        match contested.role(&step, state) {
                            Role::Keeps => &mut first,
                            Role::Exchanges => &mut moves,
                            Role::Yields => &mut last,
                        }
                    }
                };
                phase.push(step);
            }
        }
    }
    let together = usize::MAX;
    cut(policies, together)
        .chain(cut(first, at_once))
        .chain(cut(moves, together))
        .chain(cut(last, at_once))
        .chain(cut(lifted, together))
}

fn is_of_policy(step: &Step) -> bool {
    matches!(step.record(), Record::Policy(_))
}

fn cut(steps: Vec<Step>, at_once: usize) -> impl Iterator<Item = Vec<Step>> {
    let mut rest = steps.into_iter();
    std::iter::from_fn(move || {
        let turn: Vec<_> = rest.by_ref().take(at_once).collect();
        (!turn.is_empty()).then_some(turn)
    })
}

/// What a step does to contested places.
enum Role {
    /// Gives none up; it may take some.
    Keeps,
    /// Gives some up and takes others.
    Exchanges,
    /// Gives some up and takes none.
    Yields,
}

/// Places that one record gives up while another takes them, or a part of them, or a range around them.
struct Contested(HashSet<Place, RandomState>);

impl Contested {
    fn among(steps: &[Step], state: &State) -> Self {
        let mut contested = HashSet::default();
        let mut lost = Places::default();
        for step in steps {
            lost.extend(given_up(step, state));
        }
        // Nearly always: nothing is given up, and nobody need know what is taken.
        if !lost.all.is_empty() {
            let mut gained = Places::default();
            for step in steps {
                gained.extend(taken(step, state));
            }
            gained.find_within(&lost, &mut contested);
            lost.find_within(&gained, &mut contested);
        }
        Self(contested)
    }

    fn role(&self, step: &Step, state: &State) -> Role {
        if self.0.is_empty() {
            return Role::Keeps;
        }
        let is_any_of = |places: Vec<Place>| places.iter().any(|place| self.0.contains(place));
        match (
            is_any_of(given_up(step, state)),
            is_any_of(taken(step, state)),
        ) {
            (false, _) => Role::Keeps,
            (true, true) => Role::Exchanges,
            (true, false) => Role::Yields,
        }
    }
}

/// A network, and an address or a range in it.
type Place = (Arc<str>, IpNet);

#[derive(Default)]
struct Places {
    all: HashSet<Place, RandomState>,
    lengths: PrefixLengths,
}

impl Places {
    fn extend(&mut self, places: Vec<Place>) {
        for (_, range) in &places {
            self.lengths.insert(range);
        }
        self.all.extend(places);
    }

    /// Finds each of these places that is within one of `others`, and that one.
    fn find_within(&self, others: &Self, found: &mut HashSet<Place, RandomState>) {
        for place @ (network, range) in &self.all {
            for around in others.lengths.ranges_around(range.addr()) {
                let around = (Arc::clone(network), around);
                if others.all.contains(&around) {
                    found.insert(around);
                    found.insert(place.clone());
                }
            }
        }
    }
}

fn given_up(step: &Step, state: &State) -> Vec<Place> {
    let [old, new] = state.outcome(step);
    difference(old.as_ref(), new.as_ref())
}

fn taken(step: &Step, state: &State) -> Vec<Place> {
    let [old, new] = state.outcome(step);
    difference(new.as_ref(), old.as_ref())
}

fn difference(one: Option<&Record>, other: Option<&Record>) -> Vec<Place> {
    if one.zip(other).is_some_and(are_found_alike) {
        return Vec::new();
    }
    let mut all = places(one);
    // Nothing is given up by what is new, which in a large update is nearly everything.
    if !all.is_empty() {
        let other = places(other);
        all.retain(|place| !other.contains(place));
    }
    all.into_iter().collect()
}

/// Whether two records have their places in common, at one glance: nearly always, what changes is something else.
fn are_found_alike(records: (&Record, &Record)) -> bool {
    match records {
        (Record::Workload(one), Record::Workload(other)) => {
            one.owns_addresses() == other.owns_addresses()
                && one.network() == other.network()
                && one.addresses() == other.addresses()
        }
        (Record::Service(one), Record::Service(other)) => {
            one.vips == other.vips && one.cidrs == other.cidrs
        }
        _ => false,
    }
}

/// The places that a record is found by.
fn places(record: Option<&Record>) -> HashSet<Place, RandomState> {
    match record {
        Some(Record::Workload(workload)) if workload.owns_addresses() => {
            let ips = workload.addresses().iter();
            ips.map(|ip| (Arc::clone(workload.network()), IpNet::from(*ip)))
                .collect()
        }
        Some(Record::Service(service)) => {
            let vips = service.vips.iter();
            let vips = vips.map(|vip| (Arc::clone(&vip.network), IpNet::from(vip.ip)));
            let cidrs = service.cidrs.iter();
            let cidrs = cidrs.map(|cidr| (Arc::clone(&cidr.network), cidr.range));
            vips.chain(cidrs).collect()
        }
        Some(Record::Workload(_) | Record::Policy(_)) | None => HashSet::default(),
    }
}
