//! Which pods are served: the rules of the workload manager, without sockets and clock.
//!
//! Requests and other events go in; out come a verdict for the agent, and calls to the [`Stage`],
//! where pods really start and stop. A uid is either up or pending, never both, and never twice.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use tokio::time::Instant;

use super::zds::{Candidate, Request};
use crate::config::WorkloadRef;

/// Where pods start and stop. Neither waits.
pub(super) trait Stage {
    /// A pod's network namespace.
    type Netns;
    /// A pod that is being served.
    type Instance;

    /// Whether both are the same namespace.
    fn same(one: &Self::Netns, other: &Self::Netns) -> bool;
    /// Binds all listeners of a pod and serves them. The error is for the agent and the log.
    fn start(&mut self, pod: &Candidate<Self::Netns>) -> Result<Self::Instance, String>;
    /// Closes the listeners of all instances whose uid and namespace say that they are gone, also of those that were retired, and
    /// cuts their connections, in the background.
    fn cut(&mut self, is_gone: impl Fn(&str, &Self::Netns) -> bool);
    /// The ports of listeners that have closed unasked.
    fn deaf(&self, instance: &Self::Instance) -> Vec<u16>;
    /// Closes the listeners; connections go on for as long as they like, or until they are cut.
    fn retire(&mut self, instance: Self::Instance);
}

/// What the agent is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Done.
    Done,
    /// Not done; the agent may go on.
    Refused(String),
    /// Agent and proxy are out of step: not done, and the connection must start over.
    OutOfStep(String),
}

/// The pods of this node.
pub(super) struct Roster<S: Stage> {
    stage: S,
    entries: HashMap<Arc<str>, Entry<S>>,
    link: Link,
}

struct Entry<S: Stage> {
    pod: Candidate<S::Netns>,
    phase: Phase<S::Instance>,
}

#[derive(Debug)]
enum Phase<I> {
    Up(I),
    Pending(Retry),
}

/// A pod whose listeners had closed.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Repair {
    pub(super) uid: Arc<str>,
    pub(super) who: WorkloadRef,
    /// Which of its listeners had closed.
    pub(super) deaf: Vec<u16>,
    /// Whether it listens again, or why not. It is tried again then.
    pub(super) outcome: Result<(), String>,
}

/// The next attempt at a pod whose sockets could not be made.
#[derive(Debug, Clone, Copy)]
struct Retry {
    at: Instant,
    delay: Duration,
    /// The pod has been pending since then.
    since: Instant,
}

/// How far the connection to the agent has come.
#[derive(Debug)]
enum Link {
    Down,
    /// The agent is naming its pods; these so far.
    Snapshot(HashSet<Arc<str>>),
    /// The agent has named all of them.
    Live,
}

impl<S: Stage> Roster<S> {
    pub(super) fn new(stage: S) -> Self {
        Self {
            stage,
            entries: HashMap::new(),
            link: Link::Down,
        }
    }

    /// A new connection: the agent will name its pods. Those that are up stay; what is pending
    /// will be named again or is gone.
    pub(super) fn connected(&mut self) {
        self.link = Link::Snapshot(HashSet::new());
        self.entries
            .retain(|_, entry| matches!(entry.phase, Phase::Up(_)));
    }

    /// The connection is gone. Pods are served as before.
    pub(super) fn disconnected(&mut self) {
        self.link = Link::Down;
    }

    /// Carries out one request.
    pub(super) fn handle(&mut self, request: Request<S::Netns>, now: Instant) -> Verdict {
        match request {
            Request::Add(pod) => self.add(pod, now),
            Request::Keep(uid) => self.keep(uid),
            Request::Del(uid) => {
                self.del(&uid);
                Verdict::Done
            }
            Request::SnapshotSent => self.snapshot_sent(),
        }
    }

    fn add(&mut self, pod: Candidate<S::Netns>, now: Instant) -> Verdict {
        if let Link::Snapshot(named) = &mut self.link {
            named.insert(Arc::clone(&pod.uid));
        }
        if let Some(Entry {
            pod: served,
            phase: Phase::Up(_),
        }) = self.entries.get(&pod.uid)
            && S::same(&served.netns, &pod.netns)
        {
            return Verdict::Done;
        }
        // A sandbox made anew has another namespace; what was in the old one is worthless.
        self.stage
            .cut(|uid, netns| *uid == *pod.uid && !S::same(netns, &pod.netns));
        match self.try_start(pod, Retry::first(now)) {
            Ok(()) => Verdict::Done,
            Err(reason) => Verdict::Refused(reason),
        }
    }

    fn keep(&mut self, uid: Arc<str>) -> Verdict {
        match &mut self.link {
            Link::Snapshot(named) => {
                named.insert(uid);
                Verdict::Done
            }
            Link::Live | Link::Down => Verdict::OutOfStep("keep after the snapshot".into()),
        }
    }

    fn del(&mut self, uid: &str) {
        if let Link::Snapshot(named) = &mut self.link {
            named.remove(uid);
            // Instances are left to the end of the snapshot, which may name the pod again.
            if !self.is_up(uid) {
                self.entries.remove(uid);
            }
            return;
        }
        self.entries.remove(uid);
        self.stage.cut(|one, _| one == uid);
    }

    fn snapshot_sent(&mut self) -> Verdict {
        let Link::Snapshot(named) = &self.link else {
            return Verdict::OutOfStep("the snapshot was already sent".into());
        };
        self.entries.retain(|uid, _| named.contains(uid));
        // Not only of those that have left just now: what was pending was forgotten when the connection was made.
        self.stage.cut(|uid, _| !named.contains(uid));
        self.link = Link::Live;
        Verdict::Done
    }

    /// The instance of `uid` that `is_it` recognises ended unasked; it will be started again.
    /// Returns false if there is no such instance, because it was cut.
    pub(super) fn ended(
        &mut self,
        uid: &str,
        is_it: impl FnOnce(&S::Instance) -> bool,
        now: Instant,
    ) -> bool {
        let Some(entry) = self.entries.get_mut(uid) else {
            return false;
        };
        match &entry.phase {
            Phase::Up(instance) if is_it(instance) => {
                entry.phase = Phase::Pending(Retry::first(now));
                true
            }
            Phase::Up(_) | Phase::Pending(_) => false,
        }
    }

    /// When [`Self::retry`] has something to do.
    pub(super) fn next_retry(&self) -> Option<Instant> {
        let due = |entry: &Entry<S>| match &entry.phase {
            Phase::Up(_) => None,
            Phase::Pending(retry) => Some(retry.at),
        };
        self.entries.values().filter_map(due).min()
    }

    /// Tries again what is due.
    pub(super) fn retry(&mut self, now: Instant) {
        let due = self.entries.extract_if(
            |_, entry| matches!(&entry.phase, Phase::Pending(retry) if retry.at <= now),
        );
        for (_, entry) in due.collect::<Vec<_>>() {
            let Phase::Pending(retry) = entry.phase else {
                continue;
            };
            // The reason was told at the first failure, and the pod stays visible as pending.
            let _ = self.try_start(entry.pod, retry.next(now));
        }
    }

    /// Opens new listeners for pods of which one has closed. Those that still listen go on until the new ones do; connections
    /// are left alone.
    pub(super) fn audit(&mut self, now: Instant) -> Vec<Repair> {
        let deaf = self.entries.iter().filter_map(|(uid, entry)| {
            let Phase::Up(instance) = &entry.phase else {
                return None;
            };
            let deaf = self.stage.deaf(instance);
            (!deaf.is_empty()).then(|| (Arc::clone(uid), deaf))
        });
        let deaf: Vec<_> = deaf.collect();
        let repaired = deaf.into_iter().filter_map(|(uid, deaf)| {
            let Entry { pod, phase } = self.entries.remove(&uid)?;
            let who = pod.who.clone();
            let outcome = self.try_start(pod, Retry::first(now));
            if let Phase::Up(old) = phase {
                self.stage.retire(old);
            }
            Some(Repair {
                uid,
                who,
                deaf,
                outcome,
            })
        });
        repaired.collect()
    }

    /// Puts the pod up, or makes it pending until `retry`.
    fn try_start(&mut self, pod: Candidate<S::Netns>, retry: Retry) -> Result<(), String> {
        let started = self.stage.start(&pod);
        let (phase, outcome) = match started {
            Ok(instance) => (Phase::Up(instance), Ok(())),
            Err(reason) => (Phase::Pending(retry), Err(reason)),
        };
        let uid = Arc::clone(&pod.uid);
        self.entries.insert(uid, Entry { pod, phase });
        outcome
    }

    /// Whether the agent has named all pods, and all of them are up but those that have been tried for long: one pod that cannot be
    /// served does not hold up the node and its upgrade. It stays visible as pending.
    pub(super) fn is_ready(&self, now: Instant) -> bool {
        let mut phases = self.entries.values().map(|entry| &entry.phase);
        let is_waited_for = |phase: &Phase<S::Instance>| match phase {
            Phase::Up(_) => false,
            Phase::Pending(retry) => now - retry.since < LONGEST_WAIT,
        };
        matches!(self.link, Link::Live) && !phases.any(is_waited_for)
    }

    fn is_up(&self, uid: &str) -> bool {
        let entry = self.entries.get(uid);
        entry.is_some_and(|entry| matches!(entry.phase, Phase::Up(_)))
    }

    /// Every pod, and whether it is up.
    pub(super) fn pods(&self) -> impl Iterator<Item = (&Candidate<S::Netns>, bool)> {
        let entries = self.entries.values();
        entries.map(|Entry { pod, phase }| (pod, matches!(phase, Phase::Up(_))))
    }

    pub(super) fn stage(&mut self) -> &mut S {
        &mut self.stage
    }

    /// Gives the stage back; everything on it goes on.
    pub(super) fn into_stage(self) -> S {
        self.stage
    }
}

impl Retry {
    fn first(now: Instant) -> Self {
        Self {
            at: now + FIRST_RETRY,
            delay: FIRST_RETRY,
            since: now,
        }
    }

    fn next(self, now: Instant) -> Self {
        let delay = (self.delay * 2).min(LAST_RETRY);
        Self {
            at: now + delay,
            delay,
            ..self
        }
    }
}

const FIRST_RETRY: Duration = Duration::from_millis(250);
/// A pod is up at most this long after the obstacle has gone. An attempt costs three sockets.
const LAST_RETRY: Duration = Duration::from_secs(5);
/// For how long a pending pod keeps the proxy from being ready.
const LONGEST_WAIT: Duration = Duration::from_mins(1);

#[cfg(test)]
mod tests;
