//! Where a connection goes: pure functions from the mesh state and what is known of a connection
//! to one value. `flow` performs the value; `explain` prints it.
//!
//! Nothing here waits, locks or asks the clock; randomness is handed in. What cannot be pure, the
//! look-up of a host name, is the answer [`Outbound::Resolve`], completed once somebody has the
//! addresses. Where resources are looked up on demand, [`Outbound::missing`] and
//! [`InboundRefusal::missing`] name the one that might change the answer; whoever gets it asks again.
//!
//! [`outbound`] decides for what a pod dials, `D`; the first rule that applies wins:
//!
//! | rule | if | then |
//! |---|---|---|
//! | O1 | `D` is a port of this proxy on loopback, or where the connection arrived (the caller's to find out) | refuse |
//! | O2 | the source is not in the mesh state (the caller's to find out) | refuse |
//! | O3 | `D` belongs to a service (else a workload: O10; else nobody: O8) | O4 |
//! | O4 | the service has a waypoint | tunnel to it, asking for `D`; never around it. O4a: nested if it is on another network |
//! | O6 | | choose an endpoint |
//! | O7 | there is none | refuse |
//! | O8 | nobody owns `D`, or its service wants the dialled address | plain TCP to `D` |
//! | O9 | the endpoint is on another network | nested tunnel through its gateway |
//! | O10 | the dialled workload has a waypoint, and the source is not that | tunnel to it, asking for `D` |
//! | O11 | the target speaks HBONE | tunnel to it |
//! | O12 | it does not | plain TCP to it |
//!
//! [`inbound`] decides for what a peer asks of a pod, at the pod's address `L`, with the authority `A`:
//!
//! | rule | if | then |
//! |---|---|---|
//! | I1 | `A` is a host name | accept if the pod is an endpoint or a waypoint of that service, or has an application tunnel; I5 |
//! | I2 | `A` is `L` | accept |
//! | I3 | the pod has an application tunnel | accept |
//! | I4 | the pod is no waypoint of what `A` belongs to | refuse |
//! | I5 | | deliver to `L`: at the port of `A`, or at that behind the service port |
//! | I6 | that is a port of this proxy | refuse |
//! | I7 | the pod has an application tunnel | its port, and perhaps a PROXY header |
//!
//! **One address, one meaning.** Every look-up of an address, outbound or inbound, uses one order,
//! the most specific owner first: a service with exactly this virtual address, then a workload,
//! then a service with a range around it. So a virtual address that is also a workload's is the
//! service in every step, its waypoint included, and a service over a wide range never takes the
//! traffic of a workload inside it.

mod authority;
mod balance;
mod explain;
mod hop;
mod inbound;
mod outbound;
mod refusal;
mod upstream;

#[cfg(test)]
mod testing;

pub use authority::{Authority, AuthorityError, MAX_HOST_BYTES};
pub use explain::{Fit, Meaning, Unfit, meaning};
pub use hop::{Hop, InnerHop, Lookup, Outbound, Via};
pub use inbound::{
    ClientAddress, InboundQuery, InboundRoute, PlaintextQuery, ProxyTarget, guess_service, inbound,
    inbound_plaintext,
};
pub use outbound::{OutboundQuery, outbound};
pub use refusal::{InboundRefusal, Refusal};

use std::{net::IpAddr, sync::Arc};

use crate::{
    config::Ports,
    mesh::{Service, State, Workload},
};

/// The port on which every peer accepts HBONE; part of the protocol, not a setting.
pub const HBONE_PORT: u16 = 15008;

/// The ports on which this proxy listens inside a pod. A connection to one of them would come
/// back to the proxy, again and again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoopGuard {
    listeners: [u16; 3],
    socks5: Option<u16>,
}

impl LoopGuard {
    /// Guards the in-pod listeners; `socks5` tells whether that one is bound.
    #[must_use]
    pub fn new(ports: &Ports, socks5: bool) -> Self {
        Self {
            listeners: [ports.outbound, ports.inbound_plaintext, ports.hbone],
            socks5: socks5.then_some(ports.socks5),
        }
    }

    /// Whether `port` is one of ours.
    #[must_use]
    pub fn covers(&self, port: u16) -> bool {
        self.listeners.contains(&port) || self.socks5 == Some(port)
    }
}

/// The ports that redirection in pods is built on, without SOCKS5.
impl Default for LoopGuard {
    fn default() -> Self {
        Self {
            listeners: [15001, 15006, HBONE_PORT],
            socks5: None,
        }
    }
}

/// Who owns an address.
enum Owner<'a> {
    Service(&'a Arc<Service>),
    Workload(&'a Arc<Workload>),
    Nobody,
}

/// The one look-up of an address; the module documentation explains its order.
fn owner<'a>(state: &'a State, network: &str, ip: IpAddr, client: Option<&str>) -> Owner<'a> {
    let service = state.service_at(network, ip, client);
    if let Some(service) = service
        && has_vip(service, network, ip)
    {
        return Owner::Service(service);
    }
    match (state.workload_at(network, ip), service) {
        (Some(workload), _) => Owner::Workload(workload),
        (None, Some(service)) => Owner::Service(service),
        (None, None) => Owner::Nobody,
    }
}

fn has_vip(service: &Service, network: &str, ip: IpAddr) -> bool {
    service
        .vips()
        .iter()
        .any(|vip| vip.ip == ip && &*vip.network == network)
}
