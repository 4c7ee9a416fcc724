//! Which port of an endpoint a service port leads to.

use std::sync::Arc;

/// Pairs of service port and target port, sorted by service port, shared by all records with the same pairs.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct PortMap(Arc<[(u16, u16)]>);

impl PortMap {
    /// The pairs must be sorted and have distinct service ports.
    pub(super) fn new(pairs: Arc<[(u16, u16)]>) -> Self {
        Self(pairs)
    }

    /// The raw target of a service port; 0 stands for a named port.
    #[must_use]
    pub fn get(&self, service_port: u16) -> Option<u16> {
        let index = self
            .0
            .binary_search_by_key(&service_port, |(port, _)| *port)
            .ok()?;
        self.0.get(index).map(|(_, target)| *target)
    }

    /// All pairs, sorted by service port.
    #[must_use]
    pub fn pairs(&self) -> &[(u16, u16)] {
        &self.0
    }
}

impl std::fmt::Debug for PortMap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_map().entries(self.0.iter().copied()).finish()
    }
}

/// What a service says about the target of one of its ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum TargetPort {
    /// This port, unless the endpoint has a mapping of its own.
    Number(u16),
    /// A named port: only the endpoint's own mapping tells.
    Named,
}
