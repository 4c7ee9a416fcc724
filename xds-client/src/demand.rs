//! On-demand look-ups: who waits for which name, and which names do not exist.
//!
//! A name is answered by its own name, by an alias or by a removal. Any number of callers may wait for it, each with its
//! own limit. That a name does not exist holds for as long as the subscription that said so would tell otherwise.

use std::{collections::HashMap, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::{
    sync::{Notify, oneshot},
    time::timeout,
};

use crate::proto::discovery::DeltaDiscoveryRequest;
use crate::session::Session;

/// Asks the control plane for single resources. Clones share what is known.
#[derive(Debug, Clone, Default)]
pub struct Demand {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    names: Mutex<HashMap<String, Known>>,
    wanted: Notify,
}

/// What came of asking.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Answer {
    /// The resource is in force: look again.
    Delivered,
    /// There is no such resource.
    Absent,
    /// Nobody answered in time, or too many names are being asked for.
    Unanswered,
}

#[derive(Debug)]
enum Known {
    Awaited {
        waiters: Vec<oneshot::Sender<Answer>>,
        sent: bool,
    },
    Absent,
}

impl Demand {
    /// Asks for a resource by uid, `namespace/hostname` or `network/address`, and waits until the answer is in force.
    ///
    /// # Cancel safety
    /// The question stands, and its answer is applied, also when nobody waits any longer.
    pub async fn fetch(&self, name: &str, limit: Duration) -> Answer {
        let (waiter, answer) = oneshot::channel();
        {
            let mut names = self.shared.names.lock();
            let room = names.len() < MAX_NAMES;
            match names.get_mut(name) {
                Some(Known::Absent) => return Answer::Absent,
                Some(Known::Awaited { waiters, .. }) => {
                    waiters.retain(|waiter| !waiter.is_closed());
                    waiters.push(waiter);
                }
                None if room => {
                    let waiters = vec![waiter];
                    let sent = false;
                    names.insert(name.to_owned(), Known::Awaited { waiters, sent });
                    self.shared.wanted.notify_one();
                }
                None => return Answer::Unanswered,
            }
        }
        let answer = timeout(limit, answer).await;
        answer
            .ok()
            .and_then(Result::ok)
            .unwrap_or(Answer::Unanswered)
    }

    /// Resolves when there may be names to ask for.
    ///
    /// # Cancel safety
    /// Nothing is lost.
    pub(crate) async fn wanted(&self) {
        self.shared.wanted.notified().await;
    }

    /// The requests for names that were not asked for on this stream. A name that was, and that nobody answers a second
    /// time, is one that came and went.
    pub(crate) fn requests(&self, session: &mut Session) -> Vec<DeltaDiscoveryRequest> {
        let mut requests = Vec::new();
        for (name, known) in self.shared.names.lock().iter_mut() {
            let Known::Awaited { waiters, sent } = known else {
                continue;
            };
            if std::mem::replace(sent, true) {
                continue;
            }
            if let Some(request) = session.ask(name) {
                requests.push(request);
            } else {
                tell(waiters, Answer::Absent);
                *known = Known::Absent;
            }
        }
        requests
    }

    /// A new stream is attempted: the names that it must ask for. Those that nobody waits for any longer are let go.
    pub(crate) fn begin(&self) -> Vec<String> {
        let mut awaited = Vec::new();
        self.shared.names.lock().retain(|name, known| match known {
            Known::Absent => true,
            Known::Awaited { waiters, sent } => {
                waiters.retain(|waiter| !waiter.is_closed());
                *sent = true;
                if !waiters.is_empty() {
                    awaited.push(name.clone());
                }
                !waiters.is_empty()
            }
        });
        awaited
    }

    /// The new stream is open. What did not exist may exist by now, and is asked for again when it is needed. Until then
    /// it was left at that: without a control plane, addresses outside the mesh would cost each connection its limit.
    pub(crate) fn opened(&self) {
        let mut names = self.shared.names.lock();
        names.retain(|_, known| !matches!(known, Known::Absent));
    }

    /// Resources under these names or aliases are in force.
    pub(crate) fn delivered<'a>(&self, delivered: impl IntoIterator<Item = &'a str>) {
        let mut names = self.shared.names.lock();
        for name in delivered {
            if let Some(Known::Awaited { mut waiters, .. }) = names.remove(name) {
                tell(&mut waiters, Answer::Delivered);
            }
        }
    }

    /// These names do not exist. Only those that somebody asked for are remembered.
    pub(crate) fn absent(&self, gone: &[String]) {
        let mut names = self.shared.names.lock();
        for name in gone {
            if let Some(known) = names.get_mut(name) {
                if let Known::Awaited { waiters, .. } = known {
                    tell(waiters, Answer::Absent);
                }
                *known = Known::Absent;
            }
        }
    }

    /// Whether no further name can be remembered, so that a new stream, which forgets those that do not exist, is due.
    pub(crate) fn is_full(&self) -> bool {
        self.shared.names.lock().len() >= MAX_NAMES
    }
}

fn tell(waiters: &mut Vec<oneshot::Sender<Answer>>, answer: Answer) {
    for waiter in waiters.drain(..) {
        // Who is gone does not need it.
        let _gone = waiter.send(answer);
    }
}

/// Names that are awaited or known not to exist. A pod that scans addresses must not fill the memory of the node,
/// nor the subscriptions of the control plane.
pub(crate) const MAX_NAMES: usize = 16_384;

#[cfg(test)]
mod tests;
