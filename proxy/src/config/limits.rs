//! How much of anything one pod or peer gets.

use serde::Serialize;

/// Bounds on what pods and peers can make the process hold. Those of single HTTP/2 connections are in
/// [`Tunnel`](super::Tunnel).
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct Limits {
    /// `MEMORY_BUDGET`, bytes, at least 32 MiB: what may be resident; four fifths of the limit of the control group unless
    /// set. `None` without either.
    pub memory_budget: Option<u64>,
    /// `DESCRIPTOR_RESERVE`: descriptors that are kept for control work; a sixteenth of what the process may have, at least
    /// 16 and at most 1024, unless set.
    pub descriptor_reserve: Option<u16>,
    /// `MAX_FLOWS_PER_POD`, at least 1: open flows of a pod, and connections that one of its listeners has accepted;
    /// 250 000.
    pub flows_per_pod: usize,
    /// `MAX_HANDSHAKES_PER_POD`, at least 1: TLS handshakes under way in one pod, each with a socket and about 40 KiB; 512.
    pub handshakes_per_pod: usize,
    /// `MAX_HANDSHAKES_PER_PEER`, at least 1: those of one address in one pod; 128.
    pub handshakes_per_peer: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            memory_budget: None,
            descriptor_reserve: None,
            flows_per_pod: 250_000,
            handshakes_per_pod: 512,
            handshakes_per_peer: 128,
        }
    }
}
