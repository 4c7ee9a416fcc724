//! What services list as their endpoints, and how it becomes links of the workloads.

use std::collections::{HashMap, HashSet};

use super::convert::{self, Endpoint};
use crate::{Rejected, proto::workload as pb};

/// The endpoints of services, by the names of these.
#[derive(Debug, Default)]
pub(super) struct Links(Vec<(String, Vec<Endpoint>)>);

/// Takes apart what services say of themselves and of their endpoints.
pub(super) fn told(services: Vec<(pb::Service, Vec<Endpoint>)>) -> (Vec<pb::Service>, Links) {
    let services = services.into_iter().map(|(service, endpoints)| {
        let name = format!("{}/{}", service.namespace, service.hostname);
        (service, (name, endpoints))
    });
    let (services, links) = services.unzip();
    (services, Links(links))
}

impl Links {
    /// Those of services that cannot be used, unless they are told in `others`.
    pub(super) fn kept<'a>(
        &self,
        unusable: impl Iterator<Item = &'a Rejected>,
        others: &'a Self,
    ) -> Self {
        let mut names: HashSet<_> = unusable.map(|one| &*one.name).collect();
        for (name, _) in &others.0 {
            names.remove(&**name);
        }
        let links = self.0.iter().filter(|(name, _)| names.contains(&**name));
        Self(links.cloned().collect())
    }

    /// Adds these to the workloads, and names the endpoints that are none of them.
    pub(super) fn apply(&self, workloads: &mut [pb::Workload]) -> Vec<Rejected> {
        if self.0.is_empty() {
            return Vec::new();
        }
        let uids = workloads.iter().map(|workload| workload.uid.clone());
        let by_uid: HashMap<_, _> = uids.zip(0_usize..).collect();
        let mut missing = Vec::new();
        for (service, endpoints) in &self.0 {
            for endpoint in endpoints {
                let position = by_uid.get(&endpoint.workload);
                match position.and_then(|position| workloads.get_mut(*position)) {
                    Some(workload) => convert::link(workload, service, endpoint),
                    None => missing.push(Rejected {
                        name: endpoint.workload.clone(),
                        reason: format!("endpoints of {service}: there is no such workload"),
                    }),
                }
            }
        }
        missing
    }

    /// Adds others.
    pub(super) fn extend(&mut self, others: Self) {
        self.0.extend(others.0);
    }
}
