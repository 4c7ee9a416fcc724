//! The pods of this node: whom the CNI agent names is served until the agent says otherwise.
//!
//! The agent sends, over a local socket, each pod's uid, names and network namespace; it lets the
//! pod start when we answer that its listeners are bound. So nothing here waits for anyone before
//! an answer: listeners are bound at once, and whatever their connections need (the record of
//! the pod, a certificate) is awaited by those connections.
//!
//! `node` runs [`Pods`] on the control runtime; each pod's task lives on the data runtime. The
//! rules are in `roster`, the bytes in `zds`, the connection in `agent`, the tasks in `instances`.

mod agent;
mod audit;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
mod instances;
mod launch;
mod roster;
mod view;
mod zds;

use std::{io, path::PathBuf, sync::Arc};

use tokio::{
    runtime::Handle,
    time::{Instant, sleep, sleep_until},
};
use tracing::{error, info, warn};

pub use launch::{Launch, Pod};
pub use view::{PodPhase, PodState, View};

use crate::{
    config::{Drain, Ports, Sockets},
    flow::Stop,
    telemetry::{PodMetrics, ReadinessTask, with_causes},
};
use agent::{Agent, Heard};
use audit::{Audit, Suspect};
use instances::{Instances, Served};
use roster::{Repair, Roster, Verdict};
use zds::{BadPacket, Request};

/// Name of the task in the readiness answer.
pub const READINESS_TASK: &str = "workload proxy manager";

/// What the room is told.
#[derive(Debug)]
#[expect(clippy::exhaustive_structs, reason = "built by `node`, field by field")]
pub struct Settings {
    /// The socket of the CNI agent.
    pub agent_socket: PathBuf,
    /// Options of the sockets in pods.
    pub sockets: Sockets,
    /// Ports of the listeners in pods.
    pub ports: Ports,
    /// How long connections may go on after a stop.
    pub drain: Drain,
    /// The runtime on which pods are served.
    pub data: Handle,
}

/// Serves the pods that the CNI agent names.
pub struct Pods {
    settings: Arc<Settings>,
    launch: Arc<dyn Launch>,
    reports: Reports,
}

/// Where the room tells how it is.
#[derive(Debug)]
struct Reports {
    metrics: PodMetrics,
    readiness: ReadinessTask,
    view: View,
}

impl std::fmt::Debug for Pods {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pods").finish_non_exhaustive()
    }
}

impl Pods {
    /// Nothing happens before [`Self::run`].
    pub fn new(
        settings: Settings,
        launch: Arc<dyn Launch>,
        metrics: PodMetrics,
        readiness: ReadinessTask,
    ) -> Self {
        Self {
            settings: Arc::new(settings),
            launch,
            reports: Reports {
                metrics,
                readiness,
                view: View::default(),
            },
        }
    }

    /// What the admin dump shows.
    pub fn view(&self) -> View {
        self.reports.view.clone()
    }

    /// Follows the agent until `stop.accept` fires. Then the connection is closed, and the pods'
    /// listeners with it (their [`Stop`] hangs on this one); what is open may finish until the
    /// drain deadline or `stop.force`. Returns when every pod has ended.
    pub async fn run(self, stop: Stop) {
        let Self {
            settings,
            launch,
            reports,
        } = self;
        // Forcing our pods must not force what else hangs on the caller's token.
        let ours = stop.child();
        let agent_socket = settings.agent_socket.clone();
        let deadline = settings.drain.deadline;
        let stage = Instances::new(settings, launch, reports.metrics.clone(), ours.clone());
        let mut house = House {
            agent: Agent::new(agent_socket),
            roster: Roster::new(stage),
            audit: Audit::new(),
            reports,
        };
        house.follow_agent(&stop).await;
        let House {
            agent,
            roster,
            audit,
            reports,
        } = house;
        drop((agent, audit));
        reports.readiness.pending();
        let mut stage = roster.into_stage();
        tokio::select! {
            () = stage.finish() => {}
            () = stop.force.cancelled() => {}
            () = sleep(deadline) => info!("drain deadline reached, cutting what is open"),
        }
        ours.now();
        stage.finish().await;
        reports.metrics.active.set(0);
        reports.metrics.pending.set(0);
        reports.metrics.unprotected.set(0);
        reports.view.show(Vec::new());
    }
}

/// The running room.
struct House {
    agent: Agent,
    roster: Roster<Instances>,
    audit: Audit,
    reports: Reports,
}

impl House {
    /// Biased: stopping goes first; pods that ended are known as such before the agent's next
    /// request about them; and retries, which come seldom, are not put off by a busy agent.
    async fn follow_agent(&mut self, stop: &Stop) {
        loop {
            let retry = self.roster.next_retry();
            tokio::select! {
                biased;
                () = stop.accept.cancelled() => return,
                Some((id, served)) = self.roster.stage().next_ended() => {
                    let now = Instant::now();
                    if self.roster.ended(&served.uid, |it| it.id() == id, now) {
                        warn!(uid = %served.uid, "the proxy of a pod ended, starting it again");
                    }
                }
                () = sleep_until(retry.unwrap_or_else(Instant::now)), if retry.is_some() => {
                    self.roster.retry(Instant::now());
                }
                () = sleep_until(self.audit.due()) => self.look_around(),
                () = self.audit.ended() => {}
                heard = self.agent.next() => self.hear(heard).await,
            }
            self.report();
        }
    }

    async fn hear(&mut self, heard: Heard) {
        match heard {
            Heard::Connected => self.roster.connected(),
            Heard::Lost => self.roster.disconnected(),
            Heard::Packet(packet) => {
                let ends_snapshot = matches!(packet, Ok(Request::SnapshotSent));
                let verdict = match packet {
                    Ok(request) => self.roster.handle(request, Instant::now()),
                    Err(bad) => Verdict::from(&bad),
                };
                if ends_snapshot && verdict == Verdict::Done {
                    self.agent.is_well();
                    self.audit.soon();
                }
                // Whoever has the answer sees its effect in readiness, metrics and dump.
                self.report();
                self.reply(&verdict).await;
            }
        }
    }

    /// Repairs what has closed, and has the rules in all pods probed.
    fn look_around(&mut self) {
        for repair in self.roster.audit(Instant::now()) {
            self.reports.metrics.repaired.inc();
            tell(&repair);
        }
        let up = self.roster.pods().filter(|(_, up)| *up);
        let suspects = up.map(|(pod, _)| Suspect {
            uid: Arc::clone(&pod.uid),
            who: pod.who.clone(),
            netns: Arc::clone(&pod.netns),
        });
        self.audit.begin(suspects.collect());
    }

    /// Answers once, and starts over where the two sides are out of step.
    async fn reply(&mut self, verdict: &Verdict) {
        let sent = match verdict {
            Verdict::Done => self.agent.answer(Ok(())).await,
            Verdict::Refused(reason) => {
                warn!(reason, "refused a request of the CNI agent");
                self.agent.answer(Err(reason)).await
            }
            Verdict::OutOfStep(reason) => {
                warn!(reason, "out of step with the CNI agent, reconnecting");
                // Whether it arrives does not matter: the connection ends either way.
                let _ = self.agent.answer(Err(reason)).await;
                self.agent.hang_up();
                Err(io::ErrorKind::ConnectionAborted.into())
            }
        };
        if sent.is_err() {
            self.roster.disconnected();
        }
    }

    /// Brings metrics, readiness and dump up to date.
    fn report(&mut self) {
        let ready = self.roster.is_ready(Instant::now());
        let pods = self.roster.pods();
        let mut pods: Vec<_> = pods
            .map(|(pod, up)| PodState {
                uid: Arc::clone(&pod.uid),
                who: pod.who.clone(),
                phase: if up { PodPhase::Up } else { PodPhase::Pending },
                probed: self.audit.of(&pod.uid),
            })
            .collect();
        let count = |phase| {
            let there = pods.iter().filter(|pod| pod.phase == phase).count();
            i64::try_from(there).unwrap_or(i64::MAX)
        };
        let Reports {
            metrics,
            readiness,
            view,
        } = &self.reports;
        metrics.active.set(count(PodPhase::Up));
        metrics.pending.set(count(PodPhase::Pending));
        let unprotected = pods.iter().filter(|pod| pod.is_unprotected()).count();
        metrics
            .unprotected
            .set(i64::try_from(unprotected).unwrap_or(i64::MAX));
        if ready {
            readiness.ready();
        } else {
            readiness.pending();
        }
        pods.extend(self.roster.stage().served().map(PodState::from));
        view.show(pods);
    }
}

impl From<&BadPacket> for Verdict {
    fn from(bad: &BadPacket) -> Self {
        let reason = with_causes(bad);
        if bad.keeps_connection() {
            Self::Refused(reason)
        } else {
            Self::OutOfStep(reason)
        }
    }
}

impl From<&Served> for PodState {
    /// An instance that is being cut is still there.
    fn from(served: &Served) -> Self {
        Self {
            uid: Arc::clone(&served.uid),
            who: served.who.clone(),
            phase: PodPhase::Up,
            probed: None,
        }
    }
}

/// Logs what an audit has repaired.
fn tell(repair: &Repair) {
    let Repair {
        uid,
        who,
        deaf,
        outcome,
    } = repair;
    let (name, namespace) = (&who.name, &who.namespace);
    match outcome {
        Ok(()) => {
            warn!(%uid, %name, %namespace, ports = ?deaf, "listeners of a pod had been closed, opened them again");
        }
        Err(reason) => {
            error!(%uid, %name, %namespace, ports = ?deaf, reason, "listeners of a pod have been closed, and cannot be opened again yet");
        }
    }
}

#[cfg(test)]
mod tests;
