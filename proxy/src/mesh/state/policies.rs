//! Policies: keeping those of wide scope in the order of their keys.

use std::sync::Arc;

use super::State;
use crate::mesh::{Policy, PolicyScope, origin::Origin};

impl State {
    /// Inserts or replaces a policy; returns the one replaced.
    pub(super) fn put_policy(
        &mut self,
        new: &Arc<Policy>,
        origin: Origin,
    ) -> Option<(Arc<Policy>, Origin)> {
        let held = (Arc::clone(new), origin);
        let old = self.policies.insert(Arc::clone(&new.key), held);
        if let Some((old, _)) = &old {
            self.unscope(old);
        }
        let scoped = match new.scope {
            PolicyScope::Global => &mut self.global_policies,
            PolicyScope::Namespace => self
                .namespace_policies
                .entry(Arc::clone(&new.namespace))
                .or_default(),
            PolicyScope::WorkloadSelector => return old,
        };
        let position = scoped.partition_point(|held| held.key < new.key);
        scoped.insert(position, Arc::clone(new));
        old
    }

    pub(super) fn drop_policy(&mut self, key: &str) -> Option<(Arc<Policy>, Origin)> {
        let old = self.policies.remove(key)?;
        self.unscope(&old.0);
        Some(old)
    }

    fn unscope(&mut self, old: &Policy) {
        let scoped = match old.scope {
            PolicyScope::Global => Some(&mut self.global_policies),
            PolicyScope::Namespace => self.namespace_policies.get_mut(&old.namespace),
            PolicyScope::WorkloadSelector => None,
        };
        let Some(scoped) = scoped else {
            return;
        };
        if let Ok(position) = scoped.binary_search_by(|held| held.key.cmp(&old.key)) {
            scoped.remove(position);
        }
        if scoped.is_empty() && old.scope == PolicyScope::Namespace {
            self.namespace_policies.remove(&old.namespace);
        }
    }
}
