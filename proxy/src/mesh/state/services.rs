//! Services: finding the best of several, and keeping their indexes and endpoints.

use std::{cmp::Reverse, collections::BTreeMap, net::IpAddr, sync::Arc};

use ipnet::IpNet;

use super::{Endpoint, State};
use crate::mesh::{Service, index::HostKey, origin::Origin};

/// What is known under a service key.
#[derive(Debug)]
pub(super) struct Entry {
    /// `namespace/hostname`.
    pub(super) key: Arc<str>,
    /// Absent while only workloads have named it.
    pub(super) record: Option<(Arc<Service>, Origin)>,
    /// Ids of the workloads that name it, sorted.
    pub(super) endpoints: Vec<u32>,
}

impl Entry {
    pub(super) fn service(&self) -> Option<&Arc<Service>> {
        self.record.as_ref().map(|(service, _)| service)
    }
}

impl State {
    pub(super) fn service_id(&self, key: &str) -> Option<u32> {
        self.by_host.find(host_of(key)).find(|id| {
            let entry = self.services.get(*id);
            entry.is_some_and(|entry| &*entry.key == key)
        })
    }

    pub(super) fn service_by_key(&self, key: &str) -> Option<&Arc<Service>> {
        self.services.get(self.service_id(key)?)?.service()
    }

    pub(super) fn service_at_vip(
        &self,
        network: &str,
        ip: IpAddr,
        client_namespace: Option<&str>,
    ) -> Option<&Arc<Service>> {
        let candidates = self.by_vip.find((network, ip));
        self.best_service(candidates, client_namespace, |service| {
            let mut vips = service.vips.iter();
            vips.any(|vip| vip.ip == ip && &*vip.network == network)
                .then_some(())
        })
    }

    /// The service whose range contains `ip`: one probe for each prefix length in use.
    pub(super) fn service_over(
        &self,
        network: &str,
        ip: IpAddr,
        client_namespace: Option<&str>,
    ) -> Option<&Arc<Service>> {
        let ranges = self.prefix_lengths.ranges_around(ip);
        let candidates = ranges.flat_map(|range| self.by_cidr.find((network, range)));
        self.best_service(candidates, client_namespace, |service| {
            let cidrs = service.cidrs.iter();
            cidrs
                .filter(|cidr| cidr.range.contains(&ip) && &*cidr.network == network)
                .map(|cidr| cidr.range.prefix_len())
                .max()
        })
    }

    /// The candidate that goes before the others: one of the client's own namespace, then what `matches` says, then a
    /// canonical one. What is left is decided by key, so that every node decides alike.
    pub(super) fn best_service<M: Ord>(
        &self,
        candidates: impl Iterator<Item = u32>,
        client_namespace: Option<&str>,
        matches: impl Fn(&Service) -> Option<M>,
    ) -> Option<&Arc<Service>> {
        candidates
            .filter_map(|id| self.services.get(id)?.service())
            .filter(|service| service.visible_to(client_namespace))
            .filter_map(|service| {
                let own = client_namespace == Some(&*service.namespace);
                let rank = (
                    own,
                    matches(service)?,
                    service.canonical,
                    Reverse(&service.key),
                );
                Some((rank, service))
            })
            .max_by(|(one, _), (other, _)| one.cmp(other))
            .map(|(_, service)| service)
    }

    pub(super) fn endpoints_of<'a>(
        &'a self,
        entry: &'a Entry,
    ) -> impl Iterator<Item = Endpoint<'a>> {
        entry.endpoints.iter().filter_map(|id| {
            let workload = self.workload_of(*id)?;
            let link = workload
                .links()
                .iter()
                .find(|link| link.service == entry.key)?;
            Some(Endpoint {
                workload,
                ports: &link.ports,
            })
        })
    }

    /// Inserts or replaces a service; returns the one replaced.
    pub(super) fn put_service(
        &mut self,
        new: &Arc<Service>,
        origin: Origin,
    ) -> Option<(Arc<Service>, Origin)> {
        let id = self.entry(&new.key);
        let record = &mut self.services.get_mut(id)?.record;
        let old = record.replace((Arc::clone(new), origin));
        let replaced = old.as_ref().map(|(old, _)| &**old);
        self.index_service(id, replaced, Some(new));
        old
    }

    /// The endpoints stay: workloads declare them, and go on to do so when the service returns.
    pub(super) fn drop_service(&mut self, key: &str) -> Option<(Arc<Service>, Origin)> {
        let id = self.service_id(key)?;
        let old = self.services.get_mut(id)?.record.take()?;
        self.index_service(id, Some(&old.0), None);
        self.drop_if_unused(id);
        Some(old)
    }

    pub(super) fn add_endpoint(&mut self, key: &Arc<str>, workload: u32) {
        let id = self.entry(key);
        if let Some(entry) = self.services.get_mut(id)
            && let Err(position) = entry.endpoints.binary_search(&workload)
        {
            entry.endpoints.insert(position, workload);
        }
    }

    pub(super) fn remove_endpoint(&mut self, key: &str, workload: u32) {
        let Some(id) = self.service_id(key) else {
            return;
        };
        if let Some(entry) = self.services.get_mut(id)
            && let Ok(position) = entry.endpoints.binary_search(&workload)
        {
            let endpoints = &mut entry.endpoints;
            endpoints.remove(position);
            if endpoints.capacity() / 4 > endpoints.len() {
                endpoints.shrink_to(2 * endpoints.len());
            }
        }
        self.drop_if_unused(id);
    }

    fn entry(&mut self, key: &Arc<str>) -> u32 {
        if let Some(id) = self.service_id(key) {
            return id;
        }
        let id = self.services.insert(Entry {
            key: Arc::clone(key),
            record: None,
            endpoints: Vec::new(),
        });
        self.by_host.insert(host_of(key), id);
        id
    }

    fn drop_if_unused(&mut self, id: u32) {
        let unused = |entry: &Entry| entry.record.is_none() && entry.endpoints.is_empty();
        if self.services.get(id).is_some_and(unused)
            && let Some(entry) = self.services.remove(id)
        {
            self.by_host.remove(host_of(&entry.key), id);
        }
    }

    fn index_service(&mut self, id: u32, old: Option<&Service>, new: Option<&Service>) {
        if old.map(|old| &old.vips) != new.map(|new| &new.vips) {
            for vip in old.iter().flat_map(|old| &old.vips) {
                self.by_vip.remove((&*vip.network, vip.ip), id);
            }
            for vip in new.iter().flat_map(|new| &new.vips) {
                self.by_vip.insert((&*vip.network, vip.ip), id);
            }
        }
        if old.map(|old| &old.cidrs) != new.map(|new| &new.cidrs) {
            for cidr in old.iter().flat_map(|old| &old.cidrs) {
                self.by_cidr.remove((&*cidr.network, cidr.range), id);
                self.prefix_lengths.remove(&cidr.range);
            }
            for cidr in new.iter().flat_map(|new| &new.cidrs) {
                self.by_cidr.insert((&*cidr.network, cidr.range), id);
                self.prefix_lengths.insert(&cidr.range);
            }
        }
    }
}

fn host_of(key: &str) -> HostKey<'_> {
    HostKey(key.split_once('/').map_or(key, |(_, hostname)| hostname))
}

/// How many ranges of each length there are: few lengths are in use, and only these are probed.
#[derive(Debug, Default)]
pub(in crate::mesh) struct PrefixLengths {
    v4: BTreeMap<u8, usize>,
    v6: BTreeMap<u8, usize>,
}

impl PrefixLengths {
    pub(in crate::mesh) fn insert(&mut self, range: &IpNet) {
        *self
            .family(range.addr())
            .entry(range.prefix_len())
            .or_default() += 1;
    }

    fn remove(&mut self, range: &IpNet) {
        let lengths = self.family(range.addr());
        if let Some(count) = lengths.get_mut(&range.prefix_len()) {
            *count -= 1;
            if *count == 0 {
                lengths.remove(&range.prefix_len());
            }
        }
    }

    fn family(&mut self, ip: IpAddr) -> &mut BTreeMap<u8, usize> {
        match ip {
            IpAddr::V4(_) => &mut self.v4,
            IpAddr::V6(_) => &mut self.v6,
        }
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.v4.is_empty() && self.v6.is_empty()
    }

    /// A range around `ip` of each length in use.
    pub(in crate::mesh) fn ranges_around(&self, ip: IpAddr) -> impl Iterator<Item = IpNet> {
        let lengths = if ip.is_ipv4() { &self.v4 } else { &self.v6 };
        lengths
            .keys()
            .filter_map(move |length| IpNet::new(ip, *length).ok())
            .map(|range| range.trunc())
    }
}
