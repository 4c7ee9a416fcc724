//! What a response brings: encoded resources of one kind, and names of those that are gone.

use std::fmt;

use bytes::Bytes;
use prost::{DecodeError, Message};

use crate::proto::discovery::Resource;

/// What is followed. istiod serves more types; a node proxy needs these two.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[expect(
    clippy::exhaustive_enums,
    reason = "who receives resources must decide about each kind"
)]
pub enum Kind {
    /// `istio.workload.Address`: workloads and services.
    Address,
    /// `istio.security.Authorization`: policies.
    Authorization,
}

impl Kind {
    /// All kinds, in the order in which they are asked for.
    pub const ALL: [Self; 2] = [Self::Address, Self::Authorization];

    /// The type URL of the resources.
    #[must_use]
    pub fn type_url(self) -> &'static str {
        match self {
            Self::Address => "type.googleapis.com/istio.workload.Address",
            Self::Authorization => "type.googleapis.com/istio.security.Authorization",
        }
    }

    pub(crate) fn of_type_url(url: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.type_url() == url)
    }
}

/// How much a batch tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "there is no third")]
pub enum Extent {
    /// What has changed; everything else stays.
    Changes,
    /// All there is: what was held and is not named is gone.
    Everything,
}

/// The content of one response. Resources stay encoded until they are asked for, one at a time, so that a whole mesh is
/// not held in three forms at once.
///
/// Resources apply in their order, then removals in theirs.
#[derive(Debug, Clone)]
pub struct Batch {
    kind: Kind,
    extent: Extent,
    resources: Vec<Bytes>,
    removed: Vec<String>,
}

impl Batch {
    /// A batch of encoded `envoy.service.discovery.v3.Resource` messages.
    #[must_use]
    pub fn new(kind: Kind, extent: Extent, resources: Vec<Bytes>, removed: Vec<String>) -> Self {
        Self {
            kind,
            extent,
            resources,
            removed,
        }
    }

    /// What the resources are.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// How much the batch tells.
    #[must_use]
    pub fn extent(&self) -> Extent {
        self.extent
    }

    /// How many resources it brings, readable or not.
    #[must_use]
    pub fn len(&self) -> usize {
        self.resources.len()
    }

    /// Whether it brings no resources; it may still remove some.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.resources.is_empty()
    }

    /// Names of resources that are gone. Unknown ones are to be ignored.
    #[must_use]
    pub fn removed(&self) -> &[String] {
        &self.removed
    }

    /// The resources, each decoded when it is reached. Their content is a slice of what was received.
    ///
    /// # Errors
    /// Each item by itself: a resource that is not a `Resource` message does not concern the others.
    pub fn resources(&self) -> impl Iterator<Item = Result<Resource, DecodeError>> + '_ {
        self.resources
            .iter()
            .map(|encoded| Resource::decode(encoded.clone()))
    }

    /// The name of the resource at a position, as far as it can be read; the rest of the resource need not be readable.
    #[must_use]
    pub fn name_at(&self, position: usize) -> Option<String> {
        self.resources.get(position).and_then(|one| name_of(one))
    }

    /// The resources as they came.
    pub(crate) fn encoded(&self) -> &[Bytes] {
        &self.resources
    }

    /// Bytes of content, names and framing left out.
    pub(crate) fn content_bytes(&self) -> usize {
        let contents = self.resources.iter();
        let contents = contents.filter_map(|encoded| Weighed::decode(encoded.clone()).ok());
        contents
            .filter_map(|one| Some(one.resource?.value.len()))
            .sum()
    }
}

/// The part of a `Resource` that tells its weight; nothing else of it is copied out.
#[derive(Clone, PartialEq, Message)]
struct Weighed {
    #[prost(message, optional, tag = "2")]
    resource: Option<WeighedPayload>,
}

#[derive(Clone, PartialEq, Message)]
struct WeighedPayload {
    #[prost(bytes = "bytes", tag = "2")]
    value: Bytes,
}

/// The name of an encoded resource, whether or not the rest of it can be read. Nothing else of it is copied out.
pub(crate) fn name_of(encoded: &[u8]) -> Option<String> {
    Named::decode(encoded).ok().map(|named| named.name)
}

/// The part of a `Resource` that names it.
#[derive(Clone, PartialEq, Message)]
struct Named {
    #[prost(string, tag = "3")]
    name: String,
}

/// A resource that was refused, and why. What was held under its name stays in force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejected {
    /// The name of the resource, or its place if it has none.
    pub name: String,
    /// What is wrong, and where.
    pub reason: String,
}

impl fmt::Display for Rejected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.name, self.reason)
    }
}

/// Names and versions of what is held, for the first request of a stream, so that only the difference is sent.
///
/// istiod refuses requests above 4 MiB for ever. Past a budget below that nothing is kept here, and the stream is opened
/// without versions: istiod then sends everything, and the difference is found on this side.
#[derive(Debug)]
pub struct Versions {
    held: Vec<(String, String)>,
    room: Option<usize>,
}

impl Versions {
    pub(crate) fn with_room(bytes: usize) -> Self {
        Self {
            held: Vec::new(),
            room: Some(bytes),
        }
    }

    /// Adds a resource that came from the control plane; an empty version never matches, but lets the removal of the
    /// resource be told.
    pub fn add(&mut self, name: &str, version: &str) {
        let Some(room) = self.room else { return };
        self.room = room.checked_sub(name.len() + version.len() + ENTRY_OVERHEAD);
        if self.room.is_some() {
            self.held.push((name.into(), version.into()));
        } else {
            self.held = Vec::new();
        }
    }

    /// Whether the budget is used up, and further ones need not be added.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.room.is_none()
    }

    /// What was added, unless it was too much.
    pub(crate) fn into_held(self) -> Option<Vec<(String, String)>> {
        self.room.map(|_| self.held)
    }
}

/// Tags and lengths of one entry of the map on the wire, with names of up to 16,383 bytes.
const ENTRY_OVERHEAD: usize = 1 + 3 + 1 + 2 + 1 + 2;

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::proto::discovery::{DeltaDiscoveryRequest, resource::Payload};

    #[test]
    fn the_budget_bounds_what_goes_over_the_wire() {
        let mut versions = Versions::with_room(100_000);
        let mut wire = HashMap::new();
        for number in 0.. {
            let name = format!("Kubernetes//Pod/{}/{number}", "n".repeat(number % 300));
            versions.add(&name, "0123456789abcdef");
            if versions.is_over() {
                break;
            }
            wire.insert(name, "0123456789abcdef".to_owned());
        }
        let request = DeltaDiscoveryRequest {
            initial_resource_versions: wire,
            ..Default::default()
        };
        let size = request.encoded_len();
        assert!((90_000..=100_000).contains(&size), "{size}");
        assert!(versions.into_held().is_none());
    }

    #[test]
    fn a_broken_resource_does_not_hide_its_neighbours() {
        let resource = |name: &str| Resource {
            name: name.into(),
            resource: Some(Payload {
                value: Bytes::from_static(b"12345"),
                ..Payload::default()
            }),
            ..Resource::default()
        };
        let encoded = vec![
            resource("a").encode_to_vec().into(),
            Bytes::from_static(b"\xff\xff"),
            resource("b").encode_to_vec().into(),
        ];
        let batch = Batch::new(Kind::Address, Extent::Changes, encoded, Vec::new());
        let read: Vec<_> = batch.resources().collect();
        assert_eq!(read[0].as_ref().unwrap().name, "a");
        assert!(read[1].is_err());
        assert_eq!(batch.name_at(1), None);
        assert_eq!(read[2].as_ref().unwrap().name, "b");
        assert_eq!((batch.len(), batch.content_bytes()), (3, 10));
    }
}
