//! What the node knows at one moment: records and the indexes that find them.

mod policies;
mod services;
mod shadows;
mod workloads;
mod write;

use std::{net::IpAddr, sync::Arc, time::SystemTime};

use cert_agent::SpiffeId;
use foldhash::fast::RandomState;
use hashbrown::HashMap;

use super::{
    Policy, PortMap, Service, View, Workload,
    index::{HostKey, Index, Slab},
    origin::{Origin, Source},
};
use crate::config::WorkloadRef;
use services::Entry;
pub(super) use services::PrefixLengths;
use shadows::Shadows;
use workloads::Held;
pub(super) use write::{Effects, Step};

type Map<K, V> = HashMap<K, V, RandomState>;

/// The mesh as this node sees it. Read it through [`Mesh::read`](super::Mesh::read), clone the `Arc` records that you
/// need, and let go.
///
/// Links between workloads and services are stored as workloads declare them, whatever their health and whether or not
/// the service is known, so the order in which resources arrive does not matter.
#[derive(Debug)]
pub struct State {
    view: View,
    workloads: Slab<Held>,
    by_uid: Index,
    by_address: Index,
    by_hostname: Index,
    local: Index,
    /// How many workloads of this node that take part in the mesh have an identity.
    identities: Map<SpiffeId, usize>,
    services: Slab<Entry>,
    by_host: Index,
    by_vip: Index,
    by_cidr: Index,
    prefix_lengths: PrefixLengths,
    policies: Map<Arc<str>, (Arc<Policy>, Origin)>,
    /// Policies of scope namespace by namespace, sorted by key.
    namespace_policies: Map<Arc<str>, Vec<Arc<Policy>>>,
    /// Policies of scope global, sorted by key.
    global_policies: Vec<Arc<Policy>>,
    shadows: Shadows,
    /// When the state was told, if that was before the process started and nothing has confirmed it.
    recalled: Option<SystemTime>,
}

/// One endpoint of a service, healthy or not.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct Endpoint<'a> {
    /// The workload.
    pub workload: &'a Arc<Workload>,
    /// Its own port mapping for the service.
    pub ports: &'a PortMap,
}

impl Endpoint<'_> {
    /// The endpoint's own target for a service port, if it has one.
    #[must_use]
    pub fn target_port(&self, service_port: u16) -> Option<u16> {
        self.ports.get(service_port).filter(|port| *port != 0)
    }
}

/// A policy that a workload is subject to.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum Applicable<'a> {
    /// One that is known.
    Policy(&'a Arc<Policy>),
    /// The workload names it, but it was not delivered.
    Missing(&'a Arc<str>),
}

/// How much the state holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Counts {
    /// Workloads.
    pub workloads: usize,
    /// Services.
    pub services: usize,
    /// Services that workloads name and that are not known.
    pub staged_services: usize,
    /// Policies.
    pub policies: usize,
}

impl State {
    pub(super) fn new(view: View) -> Self {
        Self {
            view,
            workloads: Slab::default(),
            by_uid: Index::default(),
            by_address: Index::default(),
            by_hostname: Index::default(),
            local: Index::default(),
            identities: Map::default(),
            services: Slab::default(),
            by_host: Index::default(),
            by_vip: Index::default(),
            by_cidr: Index::default(),
            prefix_lengths: PrefixLengths::default(),
            policies: Map::default(),
            namespace_policies: Map::default(),
            global_policies: Vec::new(),
            shadows: Shadows::default(),
            recalled: None,
        }
    }

    /// From where this state is looked at.
    #[must_use]
    pub fn view(&self) -> &View {
        &self.view
    }

    /// When the control plane told of this state, if that was before the process started, and it has not answered since.
    #[must_use]
    pub fn recalled(&self) -> Option<SystemTime> {
        self.recalled
    }

    pub(super) fn set_recalled(&mut self, told: Option<SystemTime>) {
        self.recalled = told;
    }

    /// The workload with this uid.
    #[must_use]
    pub fn workload(&self, uid: &str) -> Option<&Arc<Workload>> {
        self.workload_of(self.workload_id(uid)?)
    }

    /// The workload that owns an address. Among several: pods before other things, then those that speak HBONE, then the
    /// one first seen last. Workloads of the host network own no address.
    #[must_use]
    pub fn workload_at(&self, network: &str, ip: IpAddr) -> Option<&Arc<Workload>> {
        let ip = ip.to_canonical();
        self.best_workload(self.by_address.find((network, ip)), |workload| {
            &**workload.network() == network && workload.addresses().contains(&ip)
        })
    }

    /// The workload that is known by a host name in a namespace; precedence as for [`workload_at`](Self::workload_at).
    #[must_use]
    pub fn workload_by_hostname(&self, namespace: &str, hostname: &str) -> Option<&Arc<Workload>> {
        self.best_workload(self.by_hostname.find(HostKey(hostname)), |workload| {
            workload.hostname().eq_ignore_ascii_case(hostname)
                && &**workload.namespace() == namespace
        })
    }

    /// The record of a pod of this node, by the names that the node agent gives it: never by address, which
    /// may not be the pod's own.
    #[must_use]
    pub fn local_workload(&self, who: &WorkloadRef) -> Option<&Arc<Workload>> {
        let key = (&*who.namespace, &*who.name, &*who.service_account);
        self.best_workload(self.local.find(key), |workload| {
            workloads::local_key(workload) == key
        })
    }

    /// The service with this key.
    #[must_use]
    pub fn service(&self, namespace: &str, hostname: &str) -> Option<&Arc<Service>> {
        let found = self
            .by_host
            .find(HostKey(hostname))
            .filter_map(|id| self.services.get(id));
        found
            .filter_map(Entry::service)
            .find(|service| service.is_named(hostname) && &*service.namespace == namespace)
    }

    /// The service that owns an address, as a client of this namespace sees it: by virtual address, else by range.
    /// `None` as client sees everything and prefers no namespace.
    #[must_use]
    pub fn service_at(
        &self,
        network: &str,
        ip: IpAddr,
        client_namespace: Option<&str>,
    ) -> Option<&Arc<Service>> {
        let ip = ip.to_canonical();
        self.service_at_vip(network, ip, client_namespace)
            .or_else(|| self.service_over(network, ip, client_namespace))
    }

    /// The service of a host name, as a client of this namespace sees it.
    #[must_use]
    pub fn service_by_host(
        &self,
        hostname: &str,
        client_namespace: Option<&str>,
    ) -> Option<&Arc<Service>> {
        let candidates = self.by_host.find(HostKey(hostname));
        self.best_service(candidates, client_namespace, |service| {
            service.is_named(hostname).then_some(())
        })
    }

    /// All services of a host name, in no particular order, whoever may see them.
    pub fn services_named<'a>(
        &'a self,
        hostname: &'a str,
    ) -> impl Iterator<Item = &'a Arc<Service>> {
        let found = self.by_host.find(HostKey(hostname));
        found
            .filter_map(|id| self.services.get(id)?.service())
            .filter(move |service| service.is_named(hostname))
    }

    /// All endpoints of a service, whatever their health: who selects one, applies the health policy.
    pub fn endpoints<'a>(&'a self, service: &'a Service) -> impl Iterator<Item = Endpoint<'a>> {
        let entry = self
            .service_id(&service.key)
            .and_then(|id| self.services.get(id));
        entry.into_iter().flat_map(|entry| self.endpoints_of(entry))
    }

    /// The services that a workload belongs to, as far as they are known, with its own port mapping.
    pub fn services_of<'a>(
        &'a self,
        workload: &'a Workload,
    ) -> impl Iterator<Item = (&'a Arc<Service>, &'a PortMap)> {
        workload
            .links()
            .iter()
            .filter_map(|link| Some((self.service_by_key(&link.service)?, &link.ports)))
    }

    /// The policies that a workload is subject to, each once: global ones, those of its namespace, those it names.
    pub fn policies_for<'a>(
        &'a self,
        workload: &'a Workload,
    ) -> impl Iterator<Item = Applicable<'a>> {
        let namespace = self.namespace_policies.get(&**workload.namespace());
        let scoped = self
            .global_policies
            .iter()
            .chain(namespace.into_iter().flatten());
        let named = workload.authorization_policies();
        // Global and namespace policies apply anyway; named again, they are not told twice.
        let applies_anyway = |policy: &Policy| match policy.scope {
            super::PolicyScope::Global => true,
            super::PolicyScope::Namespace => policy.namespace == *workload.namespace(),
            super::PolicyScope::WorkloadSelector => false,
        };
        let named = named
            .iter()
            .filter_map(move |key| match self.policies.get(key) {
                Some((policy, _)) if applies_anyway(policy) => None,
                Some((policy, _)) => Some(Applicable::Policy(policy)),
                None => Some(Applicable::Missing(key)),
            });
        scoped.map(Applicable::Policy).chain(named)
    }

    /// The policy with this key.
    #[must_use]
    pub fn policy(&self, key: &str) -> Option<&Arc<Policy>> {
        self.policies.get(key).map(|(policy, _)| policy)
    }

    /// All workloads, in no particular order.
    pub fn workloads(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.workloads.iter().map(|held| &held.record)
    }

    /// All services, in no particular order.
    pub fn services(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.services.iter().filter_map(Entry::service)
    }

    /// All policies, in no particular order.
    pub fn policies(&self) -> impl Iterator<Item = &Arc<Policy>> {
        self.policies.values().map(|(policy, _)| policy)
    }

    /// Workloads at up to `most` places from `from`; `None` beyond the last place.
    pub(super) fn workload_page(
        &self,
        from: usize,
        most: usize,
    ) -> Option<Vec<(Arc<Workload>, Source)>> {
        let page = self.workloads.page(from, most)?;
        let told = |held: &Held| (Arc::clone(&held.record), held.origin.source());
        Some(page.map(told).collect())
    }

    /// Services, as [`Self::workload_page`].
    pub(super) fn service_page(
        &self,
        from: usize,
        most: usize,
    ) -> Option<Vec<(Arc<Service>, Source)>> {
        let page = self.services.page(from, most)?;
        let records = page.filter_map(|entry| entry.record.as_ref());
        let told = |(record, origin): &(Arc<_>, Origin)| (Arc::clone(record), origin.source());
        Some(records.map(told).collect())
    }

    /// All policies, in no particular order, with who told of them.
    pub(super) fn policies_told(&self) -> impl Iterator<Item = (Arc<Policy>, Source)> {
        let told = |(policy, origin): &(Arc<Policy>, Origin)| (Arc::clone(policy), origin.source());
        self.policies.values().map(told)
    }

    /// Keys of services that workloads name and that are not known, with the endpoints that wait for them.
    pub fn staged_services(
        &self,
    ) -> impl Iterator<Item = (&Arc<str>, impl Iterator<Item = Endpoint<'_>>)> {
        let staged = self.services.iter().filter(|entry| entry.record.is_none());
        staged.map(|entry| (&entry.key, self.endpoints_of(entry)))
    }

    /// How much is held.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let services = self.services().count();
        Counts {
            workloads: self.workloads.len(),
            services,
            staged_services: self.services.len() - services,
            policies: self.policies.len(),
        }
    }

    /// Whether a workload of this node takes part in the mesh under this identity.
    #[must_use]
    pub fn has_local_identity(&self, id: &SpiffeId) -> bool {
        self.identities.contains_key(id)
    }

    /// Whether nothing is left, not even in an index.
    #[cfg(test)]
    pub(super) fn is_bare(&self) -> bool {
        let indexes = [
            &self.by_uid,
            &self.by_address,
            &self.by_hostname,
            &self.local,
            &self.by_host,
            &self.by_vip,
            &self.by_cidr,
        ];
        indexes.iter().all(|index| index.len() == 0)
            && self.workloads.is_empty()
            && self.services.is_empty()
            && self.identities.is_empty()
            && self.prefix_lengths.is_empty()
            && self.namespace_policies.is_empty()
            && self.global_policies.is_empty()
            && self.shadows.is_empty()
    }
}
