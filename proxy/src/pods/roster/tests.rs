//! The rules, one by one and over random histories.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    rc::Rc,
};

use proptest::prelude::*;

use super::*;
use crate::config::WorkloadRef;

/// A namespace by its number; the count of references shows leaks.
type Ns = Rc<u32>;

/// Pods of the fake stage: number of the instance → uid and namespace.
#[derive(Default)]
struct Floor {
    next: u32,
    alive: BTreeMap<u32, (Arc<str>, u32)>,
    /// Namespaces whose ports are in use by someone else.
    blocked: HashSet<u32>,
    attempts: usize,
    /// Instances of which a listener has closed.
    deaf: BTreeSet<u32>,
    /// Instances that do not listen any more, but have connections.
    retired: BTreeMap<u32, (Arc<str>, u32)>,
}

#[derive(Clone, Default)]
struct Fake(Rc<RefCell<Floor>>);

impl Stage for Fake {
    type Netns = Ns;
    type Instance = u32;

    fn same(one: &Ns, other: &Ns) -> bool {
        one == other
    }

    fn start(&mut self, pod: &Candidate<Ns>) -> Result<u32, String> {
        let mut floor = self.0.borrow_mut();
        floor.attempts += 1;
        if floor.blocked.contains(&*pod.netns) {
            return Err("in use".to_owned());
        }
        floor.next += 1;
        let number = floor.next;
        let entry = (Arc::clone(&pod.uid), *pod.netns);
        floor.alive.insert(number, entry);
        Ok(number)
    }

    fn cut(&mut self, is_gone: impl Fn(&str, &Ns) -> bool) {
        let floor = &mut *self.0.borrow_mut();
        for instances in [&mut floor.alive, &mut floor.retired] {
            instances.retain(|_, (uid, netns)| !is_gone(uid, &Rc::new(*netns)));
        }
    }

    fn deaf(&self, instance: &u32) -> Vec<u16> {
        let deaf = self.0.borrow().deaf.contains(instance);
        deaf.then_some(15008).into_iter().collect()
    }

    fn retire(&mut self, instance: u32) {
        let floor = &mut *self.0.borrow_mut();
        let retired = floor.alive.remove_entry(&instance);
        floor.retired.extend(retired);
    }
}

struct World {
    fake: Fake,
    roster: Roster<Fake>,
    now: Instant,
}

impl World {
    fn connected() -> Self {
        let fake = Fake::default();
        let mut roster = Roster::new(fake.clone());
        roster.connected();
        let now = Instant::now();
        Self { fake, roster, now }
    }

    fn live() -> Self {
        let mut world = Self::connected();
        assert_eq!(world.snapshot_sent(), Verdict::Done);
        world
    }

    fn add(&mut self, uid: &str, netns: u32) -> Verdict {
        let pod = Candidate {
            uid: uid.into(),
            who: WorkloadRef::new("s", uid, "a"),
            netns: Rc::new(netns),
        };
        self.roster.handle(Request::Add(pod), self.now)
    }

    fn keep(&mut self, uid: &str) -> Verdict {
        self.roster.handle(Request::Keep(uid.into()), self.now)
    }

    fn del(&mut self, uid: &str) -> Verdict {
        self.roster.handle(Request::Del(uid.into()), self.now)
    }

    fn snapshot_sent(&mut self) -> Verdict {
        self.roster.handle(Request::SnapshotSent, self.now)
    }

    fn block(&self, netns: u32) {
        self.fake.0.borrow_mut().blocked.insert(netns);
    }

    fn unblock(&self, netns: u32) {
        self.fake.0.borrow_mut().blocked.remove(&netns);
    }

    /// Lets time pass and the retries that fall due happen.
    fn pass(&mut self, time: Duration) {
        let until = self.now + time;
        while let Some(at) = self.roster.next_retry().filter(|at| *at <= until) {
            self.now = at;
            self.roster.retry(at);
        }
        self.now = until;
    }

    fn alive(&self) -> Vec<(String, u32)> {
        let floor = self.fake.0.borrow();
        let mut alive: Vec<_> = floor
            .alive
            .values()
            .map(|(uid, netns)| (uid.to_string(), *netns))
            .collect();
        alive.sort();
        alive
    }

    fn instances(&self) -> Vec<u32> {
        self.fake.0.borrow().alive.keys().copied().collect()
    }

    fn retired(&self) -> Vec<u32> {
        self.fake.0.borrow().retired.keys().copied().collect()
    }

    fn attempts(&self) -> usize {
        self.fake.0.borrow().attempts
    }

    fn is_ready(&self) -> bool {
        self.roster.is_ready(self.now)
    }

    fn pending(&self) -> usize {
        self.roster.pods().filter(|(_, up)| !up).count()
    }
}

fn up(pods: &[(&str, u32)]) -> Vec<(String, u32)> {
    pods.iter()
        .map(|(uid, ns)| ((*uid).to_owned(), *ns))
        .collect()
}

#[test]
fn an_audit_replaces_what_has_gone_deaf_and_nothing_else() {
    let mut world = World::live();
    world.add("a", 1);
    world.add("b", 2);
    assert_eq!(world.roster.audit(world.now), []);
    let first = world.instances()[0];
    world.fake.0.borrow_mut().deaf.insert(first);
    let repairs = world.roster.audit(world.now);
    let [repair] = repairs.as_slice() else {
        panic!("{repairs:?}")
    };
    assert_eq!((&*repair.uid, &*repair.deaf), ("a", &[15008][..]));
    assert_eq!(repair.outcome, Ok(()));
    assert_eq!(world.alive(), up(&[("a", 1), ("b", 2)]));
    assert_eq!(world.retired(), [first]);
    assert_eq!(world.roster.audit(world.now), []);
}

/// Pod `a` in namespace 1 whose listeners were lost and cannot be had again, with the connections that it still has.
fn lost() -> World {
    let mut world = World::live();
    world.add("a", 1);
    world.block(1);
    world.fake.0.borrow_mut().deaf.insert(1);
    assert!(world.roster.audit(world.now)[0].outcome.is_err());
    assert_eq!(world.retired(), [1]);
    world
}

#[test]
fn connections_of_a_removed_pod_are_cut_though_it_was_pending() {
    let mut deleted = lost();
    deleted.del("a");
    assert!(deleted.retired().is_empty());

    let mut unnamed = lost();
    unnamed.roster.connected();
    unnamed.del("a");
    assert_eq!(unnamed.retired(), [1], "the snapshot may name it again");
    unnamed.snapshot_sent();
    assert!(unnamed.retired().is_empty());

    let mut elsewhere = lost();
    elsewhere.add("a", 2);
    assert!(elsewhere.retired().is_empty());
    assert_eq!(elsewhere.alive(), up(&[("a", 2)]));
}

#[test]
fn connections_of_a_pod_that_is_named_again_go_on_though_it_was_pending() {
    let mut world = lost();
    world.roster.connected();
    world.add("a", 1);
    world.snapshot_sent();
    world.add("a", 1);
    assert_eq!((world.retired(), world.pending()), (vec![1], 1));
    world.unblock(1);
    world.add("a", 1);
    assert_eq!((world.retired(), world.pending()), (vec![1], 0));
}

#[test]
fn what_cannot_be_repaired_is_pending_and_tried_again() {
    let mut world = World::live();
    world.add("a", 1);
    world.block(1);
    world.fake.0.borrow_mut().deaf.insert(1);
    let repairs = world.roster.audit(world.now);
    assert!(repairs[0].outcome.is_err());
    assert!(world.alive().is_empty() && world.pending() == 1);
    world.unblock(1);
    world.pass(MINUTE);
    assert_eq!(world.alive(), up(&[("a", 1)]));
}

const MINUTE: Duration = Duration::from_secs(60);

#[test]
fn a_repeated_add_changes_nothing() {
    let mut world = World::live();
    assert_eq!(world.add("a", 1), Verdict::Done);
    let before = world.instances();
    assert_eq!(world.add("a", 1), Verdict::Done);
    assert_eq!(world.instances(), before);
    assert_eq!(world.attempts(), 1);
}

#[test]
fn another_namespace_replaces_the_instance() {
    let mut world = World::live();
    world.add("a", 1);
    assert_eq!(world.add("a", 2), Verdict::Done);
    assert_eq!(world.alive(), up(&[("a", 2)]));
}

#[test]
fn a_failed_pod_is_pending_and_comes_up_within_6_s_of_the_cure() {
    for hours in [0, 5] {
        let mut world = World::live();
        world.block(1);
        assert_eq!(world.add("a", 1), Verdict::Refused("in use".to_owned()));
        assert!(!world.is_ready());
        world.pass(MINUTE * 60 * hours);
        assert!(world.alive().is_empty());
        world.unblock(1);
        world.pass(Duration::from_secs(6));
        assert_eq!(world.alive(), up(&[("a", 1)]));
        assert!(world.is_ready());
    }
}

#[test]
fn one_pod_that_cannot_be_served_holds_up_the_node_for_a_minute() {
    let mut world = World::live();
    world.block(1);
    world.add("a", 1);
    world.pass(MINUTE - Duration::from_millis(1));
    assert!(!world.is_ready());
    world.pass(Duration::from_millis(1));
    assert!(world.is_ready());
    assert_eq!(world.pending(), 1);
    // Another one is news.
    world.block(2);
    world.add("b", 2);
    assert!(!world.is_ready());
}

#[test]
fn retries_slow_down() {
    let mut world = World::live();
    world.block(1);
    world.add("a", 1);
    world.pass(MINUTE);
    // 0.25, 0.5, 1, 2, 4 s, then every 5 s.
    assert!(
        (15..=17).contains(&world.attempts()),
        "{}",
        world.attempts()
    );
}

#[test]
fn a_deleted_pending_pod_is_forgotten() {
    let mut world = World::live();
    world.block(1);
    world.add("a", 1);
    assert_eq!(world.del("a"), Verdict::Done);
    assert!(world.is_ready());
    assert_eq!(world.roster.pods().count(), 0);
    let attempts = world.attempts();
    world.pass(MINUTE);
    assert_eq!(world.attempts(), attempts);
}

#[test]
fn a_good_add_ends_the_retries_of_a_dead_namespace() {
    let mut world = World::live();
    world.block(1);
    world.add("a", 1);
    assert_eq!(world.add("a", 2), Verdict::Done);
    let good = world.instances();
    world.pass(MINUTE);
    assert_eq!(world.instances(), good);
    assert_eq!(world.alive(), up(&[("a", 2)]));
}

#[test]
fn del_of_an_unknown_pod_is_done() {
    assert_eq!(World::live().del("nobody"), Verdict::Done);
}

#[test]
fn what_a_new_snapshot_leaves_out_is_cut_at_its_end() {
    let mut world = World::live();
    world.add("a", 1);
    world.add("b", 2);
    let first = world.instances();
    world.roster.disconnected();
    assert!(!world.is_ready());
    world.roster.connected();
    world.add("a", 1);
    assert_eq!(world.instances(), first);
    world.snapshot_sent();
    assert_eq!(world.alive(), up(&[("a", 1)]));
    assert_eq!(world.instances(), first[..1]);
}

#[test]
fn what_a_snapshot_keeps_survives() {
    let mut world = World::live();
    world.add("a", 1);
    world.roster.connected();
    assert_eq!(world.keep("a"), Verdict::Done);
    assert_eq!(world.keep("unknown"), Verdict::Done);
    world.snapshot_sent();
    assert_eq!(world.alive(), up(&[("a", 1)]));
}

#[test]
fn del_within_the_snapshot_waits_for_its_end() {
    let mut world = World::live();
    world.add("a", 1);
    world.block(2);
    world.add("b", 2);
    world.roster.connected();
    assert_eq!(
        world.pending(),
        0,
        "a new connection forgets what is pending"
    );
    world.add("a", 1);
    world.add("b", 2);
    world.del("a");
    world.del("b");
    assert_eq!(world.alive(), up(&[("a", 1)]));
    assert_eq!(world.pending(), 0);
    world.snapshot_sent();
    assert!(world.alive().is_empty());
}

#[test]
fn a_pod_that_fails_within_the_snapshot_stays_pending_after_it() {
    let mut world = World::connected();
    world.block(1);
    world.add("a", 1);
    world.snapshot_sent();
    assert_eq!(world.pending(), 1);
    assert!(!world.is_ready());
}

#[test]
fn slips_are_told_and_change_nothing() {
    let mut world = World::live();
    world.add("a", 1);
    assert!(matches!(world.snapshot_sent(), Verdict::OutOfStep(_)));
    assert!(matches!(world.keep("a"), Verdict::OutOfStep(_)));
    assert_eq!(world.alive(), up(&[("a", 1)]));
}

#[test]
fn an_instance_that_ends_unasked_is_started_again() {
    let mut world = World::live();
    world.add("a", 1);
    let [number] = world.instances()[..] else {
        panic!("one instance")
    };
    world.fake.0.borrow_mut().alive.clear();
    let now = world.now;
    assert!(world.roster.ended("a", |instance| *instance == number, now));
    assert!(!world.roster.ended("a", |instance| *instance == number, now));
    world.pass(Duration::from_secs(1));
    assert_eq!(world.alive(), up(&[("a", 1)]));
    assert_ne!(world.instances(), [number]);
}

/// One event of a random history. Three uids, three namespaces.
#[derive(Debug, Clone)]
enum Step {
    Add(u8, u32),
    Keep(u8),
    Del(u8),
    SnapshotSent,
    Reconnect,
    Block(u32),
    Unblock(u32),
    Pass(u8),
    Crash,
    Deafen,
}

fn step() -> impl Strategy<Value = Step> {
    let (uid, ns) = (0..3_u8, 0..3_u32);
    prop_oneof![
        6 => (uid.clone(), ns.clone()).prop_map(|(uid, ns)| Step::Add(uid, ns)),
        1 => uid.clone().prop_map(Step::Keep),
        3 => uid.prop_map(Step::Del),
        2 => Just(Step::SnapshotSent),
        1 => Just(Step::Reconnect),
        2 => ns.clone().prop_map(Step::Block),
        2 => ns.prop_map(Step::Unblock),
        3 => (0..20_u8).prop_map(Step::Pass),
        1 => Just(Step::Crash),
        2 => Just(Step::Deafen),
    ]
}

impl World {
    fn take(&mut self, step: &Step) {
        let uid = |uid: &u8| format!("pod-{uid}");
        match step {
            Step::Add(who, ns) => {
                let was_up = self.alive().contains(&(uid(who), *ns));
                let blocked = self.fake.0.borrow().blocked.contains(ns);
                let done = self.add(&uid(who), *ns) == Verdict::Done;
                assert_eq!(done, was_up || !blocked);
                assert_eq!(done, self.alive().contains(&(uid(who), *ns)));
            }
            Step::Keep(who) => drop(self.keep(&uid(who))),
            Step::Del(who) => {
                assert_eq!(self.del(&uid(who)), Verdict::Done);
                let is_live = matches!(self.roster.link, Link::Live);
                let retired = &self.fake.0.borrow().retired;
                let is_left = retired.values().any(|(one, _)| **one == *uid(who));
                assert!(!(is_live && is_left), "what is gone has connections");
            }
            Step::SnapshotSent => drop(self.snapshot_sent()),
            Step::Reconnect => {
                let before = self.instances();
                self.roster.disconnected();
                self.roster.connected();
                assert_eq!(self.instances(), before);
            }
            Step::Block(ns) => self.block(*ns),
            Step::Unblock(ns) => self.unblock(*ns),
            Step::Pass(seconds) => self.pass(Duration::from_secs(u64::from(*seconds))),
            Step::Crash => {
                let crashed = self.fake.0.borrow_mut().alive.pop_first();
                if let Some((number, (uid, _))) = crashed {
                    let now = self.now;
                    assert!(self.roster.ended(&uid, |it| *it == number, now));
                }
            }
            Step::Deafen => {
                let first = self.instances().into_iter().next();
                self.fake.0.borrow_mut().deaf.extend(first);
                assert_eq!(self.roster.audit(self.now).len(), first.into_iter().count());
            }
        }
    }

    /// What must hold after every event.
    fn check(&self) {
        let listed: Vec<_> = self
            .roster
            .pods()
            .filter(|(_, up)| *up)
            .map(|(pod, _)| (pod.uid.to_string(), *pod.netns))
            .collect();
        let mut listed = listed;
        listed.sort();
        // What is believed up is up, nothing else is, and no uid twice.
        assert_eq!(listed, self.alive());
        let uids: HashSet<_> = listed.iter().map(|(uid, _)| uid).collect();
        assert_eq!(uids.len(), listed.len());
        // Nobody but its entry holds a namespace.
        for (pod, _) in self.roster.pods() {
            assert_eq!(Rc::strong_count(&pod.netns), 1);
        }
        assert_eq!(self.pending() > 0, self.roster.next_retry().is_some());
    }
}

proptest! {
    #[test]
    fn any_history_leaves_a_consistent_roster(steps in proptest::collection::vec(step(), 1..120)) {
        let mut world = World::connected();
        for step in &steps {
            world.take(step);
            world.check();
        }
        // A last snapshot that names nobody ends everything.
        world.roster.connected();
        world.snapshot_sent();
        prop_assert!(world.alive().is_empty() && world.retired().is_empty());
        prop_assert_eq!(world.roster.pods().count(), 0);
        prop_assert!(world.is_ready());
    }
}
