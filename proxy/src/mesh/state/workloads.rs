//! Workloads: finding the best of several, and keeping their indexes.

use std::{net::IpAddr, sync::Arc};

use super::State;
use crate::mesh::{Workload, index::HostKey, origin::Origin};

/// A workload and where it came from.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) record: Arc<Workload>,
    pub(super) origin: Origin,
}

impl State {
    pub(super) fn workload_of(&self, id: u32) -> Option<&Arc<Workload>> {
        self.workloads.get(id).map(|held| &held.record)
    }

    pub(super) fn workload_id(&self, uid: &str) -> Option<u32> {
        self.by_uid.find(uid).find(|id| {
            let workload = self.workload_of(*id);
            workload.is_some_and(|workload| workload.uid() == uid)
        })
    }

    /// The candidate that `matches` and goes before the others.
    pub(super) fn best_workload(
        &self,
        candidates: impl Iterator<Item = u32>,
        matches: impl Fn(&Workload) -> bool,
    ) -> Option<&Arc<Workload>> {
        let mut best: Option<(&Arc<Workload>, u32)> = None;
        for id in candidates {
            let Some(workload) = self.workload_of(id).filter(|found| matches(found)) else {
                continue;
            };
            let precedence = |workload: &Workload, id| (workload.rank(), self.workloads.since(id));
            // Nearly always there is one candidate, and nothing is ranked.
            if best.is_none_or(|(held, at)| precedence(held, at) < precedence(workload, id)) {
                best = Some((workload, id));
            }
        }
        best.map(|(workload, _)| workload)
    }

    /// Inserts or replaces a workload; returns the one replaced.
    pub(super) fn put_workload(&mut self, new: &Arc<Workload>, origin: Origin) -> Option<Held> {
        let record = Arc::clone(new);
        let held = Held { record, origin };
        let Some(id) = self.workload_id(new.uid()) else {
            let id = self.workloads.insert(held);
            self.by_uid.insert(new.uid(), id);
            self.index_workload(id, None, Some(new));
            return None;
        };
        let old = std::mem::replace(self.workloads.get_mut(id)?, held);
        self.index_workload(id, Some(&old.record), Some(new));
        Some(old)
    }

    pub(super) fn drop_workload(&mut self, uid: &str) -> Option<Held> {
        let id = self.workload_id(uid)?;
        self.by_uid.remove(uid, id);
        let old = self.workloads.remove(id)?;
        self.index_workload(id, Some(&old.record), None);
        Some(old)
    }

    /// Moves the index entries of one id from one record to the next. What both have in common stays untouched.
    fn index_workload(&mut self, id: u32, old: Option<&Workload>, new: Option<&Workload>) {
        let profiles = (old.map(|old| &old.profile), new.map(|new| &new.profile));
        let same_profile = matches!(profiles, (Some(old), Some(new)) if Arc::ptr_eq(old, new));
        if old.map(address_place) != new.map(address_place) {
            for key in old.into_iter().flat_map(address_keys) {
                self.by_address.remove(key, id);
            }
            for key in new.into_iter().flat_map(address_keys) {
                self.by_address.insert(key, id);
            }
        }
        if old.and_then(hostname_key) != new.and_then(hostname_key) {
            if let Some(key) = old.and_then(hostname_key) {
                self.by_hostname.remove(HostKey(key), id);
            }
            if let Some(key) = new.and_then(hostname_key) {
                self.by_hostname.insert(HostKey(key), id);
            }
        }
        let (was_local, is_local) = (
            old.filter(|old| self.is_local(old)).map(local_key),
            new.filter(|new| self.is_local(new)).map(local_key),
        );
        if was_local != is_local {
            if let Some(key) = was_local {
                self.local.remove(key, id);
            }
            if let Some(key) = is_local {
                self.local.insert(key, id);
            }
        }
        if !same_profile {
            self.move_links(id, old, new);
        }
    }

    fn move_links(&mut self, id: u32, old: Option<&Workload>, new: Option<&Workload>) {
        let (old, new) = (
            old.map_or(&[][..], Workload::links),
            new.map_or(&[][..], Workload::links),
        );
        for link in new {
            if !old.iter().any(|held| held.service == link.service) {
                self.add_endpoint(&link.service, id);
            }
        }
        for link in old {
            if !new.iter().any(|kept| kept.service == link.service) {
                self.remove_endpoint(&link.service, id);
            }
        }
    }

    /// Whether a workload runs on this node. Without a node name, every workload does.
    pub(super) fn is_local(&self, workload: &Workload) -> bool {
        let node = self.view.node_name.as_ref();
        node.is_none_or(|node| node == workload.node())
    }
}

fn address_keys(workload: &Workload) -> impl Iterator<Item = (&str, IpAddr)> {
    let (network, ips) = address_place(workload);
    ips.iter().map(move |ip| (network, *ip))
}

/// The network and the addresses that a workload is found by.
fn address_place(workload: &Workload) -> (&str, &[IpAddr]) {
    let found = workload.owns_addresses().then(|| workload.addresses());
    (workload.network(), found.unwrap_or_default())
}

fn hostname_key(workload: &Workload) -> Option<&str> {
    Some(&**workload.hostname()).filter(|hostname| !hostname.is_empty())
}

pub(super) fn local_key(workload: &Workload) -> (&str, &str, &str) {
    (
        workload.namespace(),
        workload.name(),
        workload.service_account(),
    )
}
