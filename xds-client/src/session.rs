//! One stream of the delta discovery protocol as a state machine: no socket, no clock, no resource semantics.
//!
//! The rules that it keeps, beyond the protocol's own: exactly one answer per response, never joined with a change of
//! subscription; versions are told in the first request of a kind only; the first response to a request without versions
//! is everything there is; a name is asked for once in the life of a stream, and never given up (istiod answers
//! a bare unsubscription by "removing" all other names).

use std::collections::{HashMap, HashSet};

use crate::{
    proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node, Status},
    resource::{Batch, Extent, Kind, Rejected, Versions},
};

/// What a client wants to be told of workloads and services. Policies always come all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "there is no third")]
pub enum Mode {
    /// Everything.
    Everything,
    /// What was asked for, and what runs on this node.
    OnDemand,
}

/// One stream, from its first request on.
#[derive(Debug)]
pub struct Session {
    addresses: Progress,
    policies: Progress,
    /// Names asked for on this stream; `None` where everything is followed.
    asked: Option<HashSet<String>>,
}

/// How far one kind is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Progress {
    /// Asked without versions: the first response will be everything.
    AwaitsEverything,
    /// The difference to what is held goes on.
    Follows,
}

/// The answer that a response is owed, complete but for its outcome.
#[derive(Debug)]
#[must_use = "every response is owed an answer"]
pub struct Receipt {
    type_url: String,
    nonce: String,
}

impl Session {
    /// Opens a stream: the requests to send at once and in this order. `versions` tells what is held of a kind, and
    /// `awaited` the names that somebody waits for (in on-demand mode).
    pub fn open(
        node: &Node,
        mode: Mode,
        mut versions: impl FnMut(Kind) -> Versions,
        awaited: &[String],
    ) -> (Self, [DeltaDiscoveryRequest; 2]) {
        let mut progress = [Progress::Follows; 2];
        let mut asked = (mode == Mode::OnDemand).then(HashSet::new);
        let requests = Kind::ALL.map(|kind| {
            let held = versions(kind).into_held().filter(|held| !held.is_empty());
            if let (None, Some(slot)) = (&held, progress.get_mut(kind as usize)) {
                *slot = Progress::AwaitsEverything;
            }
            let mut held: HashMap<_, _> = held.unwrap_or_default().into_iter().collect();
            let mut request = DeltaDiscoveryRequest {
                node: Some(node.clone()),
                type_url: kind.type_url().into(),
                ..DeltaDiscoveryRequest::default()
            };
            if let (Kind::Address, Some(asked)) = (kind, &mut asked) {
                for name in awaited {
                    held.entry(name.clone()).or_default();
                }
                asked.extend(held.keys().cloned());
                // Subscribed to nothing: an empty list would mean everything.
                request.resource_names_subscribe = vec![ALL_NAMES.into()];
                request.resource_names_unsubscribe = vec![ALL_NAMES.into()];
            }
            request.initial_resource_versions = held;
            request
        });
        let [addresses, policies] = progress;
        let session = Self {
            addresses,
            policies,
            asked,
        };
        (session, requests)
    }

    /// Takes a response: what to apply (nothing if its type was never asked for), and what answers it afterwards.
    pub fn receive(&mut self, response: DeltaDiscoveryResponse) -> (Option<Batch>, Receipt) {
        let batch = Kind::of_type_url(&response.type_url).map(|kind| {
            let progress = match kind {
                Kind::Address => &mut self.addresses,
                Kind::Authorization => &mut self.policies,
            };
            let extent = match std::mem::replace(progress, Progress::Follows) {
                Progress::AwaitsEverything => Extent::Everything,
                Progress::Follows => Extent::Changes,
            };
            Batch::new(kind, extent, response.resources, response.removed_resources)
        });
        let receipt = Receipt {
            type_url: response.type_url,
            nonce: response.nonce,
        };
        (batch, receipt)
    }

    /// Asks for a name in on-demand mode. `None` if it was asked for already, or everything is followed.
    pub fn ask(&mut self, name: &str) -> Option<DeltaDiscoveryRequest> {
        let new = self.asked.as_mut()?.insert(name.to_owned());
        new.then(|| DeltaDiscoveryRequest {
            type_url: Kind::Address.type_url().into(),
            resource_names_subscribe: vec![name.to_owned()],
            ..DeltaDiscoveryRequest::default()
        })
    }

    /// How many names were asked for on this stream.
    #[must_use]
    pub fn asked(&self) -> usize {
        self.asked.as_ref().map_or(0, HashSet::len)
    }
}

impl Receipt {
    /// The answer once the response is applied. What was rejected is named with its reason, the rest is in force.
    #[must_use]
    pub fn answer(self, rejected: &[Rejected]) -> DeltaDiscoveryRequest {
        DeltaDiscoveryRequest {
            type_url: self.type_url,
            response_nonce: self.nonce,
            error_detail: (!rejected.is_empty()).then(|| Status {
                code: tonic::Code::InvalidArgument.into(),
                message: reasons(rejected),
                details: Vec::new(),
            }),
            ..DeltaDiscoveryRequest::default()
        }
    }
}

/// All reasons; past a size that any control plane reads, the number of those left out.
fn reasons(rejected: &[Rejected]) -> String {
    let mut message = String::new();
    for (index, one) in rejected.iter().enumerate() {
        let reason = one.to_string();
        if message.len() + reason.len() > MAX_REASONS_BYTES {
            let more = rejected.len() - index;
            message.push_str(&format!("; and {more} more"));
            break;
        }
        if index > 0 {
            message.push_str("; ");
        }
        message.push_str(&reason);
    }
    message
}

const ALL_NAMES: &str = "*";
/// An answer must stay well below the 4 MiB that istiod reads.
const MAX_REASONS_BYTES: usize = 1 << 20;

#[cfg(test)]
mod tests;
