//! Sockets inside the network namespaces of pods.
//!
//! Every captured pod has listeners of this process in its own namespace, and every connection to
//! its application starts there too, where possible with the address of the real client. This
//! room knows how to enter a namespace and come back, which options each socket needs, and which
//! source ports are safe. It takes no decision about a connection: `flow` does, and calls it.
//!
//! Sockets are created inside the namespace and belong to it for life, so everything but the
//! `socket` call itself happens outside of the excursion.

mod accept;
mod bind;
mod connect;
mod descriptors;
mod dns;
mod netns;
mod options;
mod ports;
mod privilege;
mod probe;
mod successor;
mod sys;
#[cfg(test)]
pub(crate) mod testing;
mod throttle;
mod watch;

pub use accept::{accept, canonical, original_destination};
pub use bind::{BindError, PodListeners, Step, bind, bind_socks5};
pub use connect::{ConnectError, LocalAddress, Upstream, connect};
pub use descriptors::{Connecting, Descriptors};
pub use dns::{DnsSockets, bind_dns, dns_client};
pub use netns::{Netns, NetnsId};
pub use options::watch_peer;
pub use ports::{PortLease, SourcePorts};
pub use privilege::{Need, Shortage, shortages};
pub use probe::{Probed, Redirection, is_probe, mtu, probe};
pub use successor::prefer_successor;
pub use sys::round_trip;
pub use watch::Watch;
