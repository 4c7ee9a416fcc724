//! Source ports for connections that carry their client's address.
//!
//! Two flows of one client to one application meet in the connection tracking of the pod: the
//! captured one, `client:P → pod:app`, and ours towards the application, `client:Q → pod:app`.
//! The kernel does not keep them apart: with P = Q it resets the first, or leaves the second
//! without an answer. Nor would its own choice of Q last: `bind(client, 0)` reserves a port for
//! all destinations, so one client is worth 28,000 connections at most.
//!
//! So Q is chosen here, from a range where clients do not draw their ports (those start at 32768),
//! and leaving out the few P that are live in it all the same. The same Q serves many
//! destinations; what must be unique is the whole tuple.
//!
//! For a client that does draw from this range two cases are left, which nobody but the rules could
//! rule out: it takes a P that is a live Q of ours, or its connection still waits to be accepted
//! while its P is chosen as Q.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use hashbrown::HashSet;
use parking_lot::Mutex;

/// The tuples in use in one pod. Cheap to clone; the clones share.
///
/// Costs one lock and typically one hash lookup per connection, and memory (about 90 bytes) only
/// for connections that are open now.
#[derive(Debug, Clone)]
pub struct SourcePorts(Arc<Mutex<Tuples>>);

/// A tuple that is taken until this is dropped. Hold it as long as its connection.
#[derive(Debug)]
#[must_use = "the port is free again as soon as the lease is dropped"]
pub struct PortLease {
    ports: SourcePorts,
    tuple: Tuple,
}

/// Where a port is looked for first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Range {
    /// 10240–32767: neither clients nor most servers are there.
    Preferred,
    /// 1024–10239: more servers are there, whose restart a taken port may disturb.
    Extension,
}

#[derive(Debug)]
struct Tuples {
    taken: HashSet<Tuple, foldhash::fast::RandomState>,
    preferred: Cursor,
    extension: Cursor,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Tuple {
    client: IpAddr,
    client_port: u16,
    to: IpAddr,
    to_port: u16,
}

/// Walks a range of ports round and round. Unless it leaps, a port comes up again only after all
/// others, which gives the kernel the longest time to forget its last connection (`TIME_WAIT`).
#[derive(Debug)]
struct Cursor {
    first: u16,
    count: u16,
    next: u16,
}

impl SourcePorts {
    /// No port taken yet. The walk starts anywhere, so that a proxy taking over from another one
    /// rarely meets its ports.
    pub fn new() -> Self {
        Self(Arc::new(Mutex::new(Tuples {
            taken: HashSet::default(),
            preferred: Cursor::over(PREFERRED_FIRST, PREFERRED_LAST),
            extension: Cursor::over(EXTENSION_FIRST, EXTENSION_LAST),
        })))
    }

    /// Tells that `client` has a captured connection to `to`, which must keep its tuple for itself
    /// until the lease is dropped. `None` if no port chosen here could collide with it.
    pub fn register(&self, client: SocketAddr, to: SocketAddr) -> Option<PortLease> {
        if !(EXTENSION_FIRST..=PREFERRED_LAST).contains(&client.port()) {
            return None;
        }
        let tuple = Tuple::new(client.ip(), client.port(), to);
        self.0.lock().taken.insert(tuple).then(|| self.lease(tuple))
    }

    /// Takes a free port of `client` towards `to`, from `first` if it has one. `None` if all
    /// 31,744 are in use.
    pub(super) fn take(&self, client: IpAddr, to: SocketAddr, first: Range) -> Option<PortLease> {
        let tuple = self.0.lock().take(client, to, first)?;
        Some(self.lease(tuple))
    }

    fn lease(&self, tuple: Tuple) -> PortLease {
        PortLease {
            ports: self.clone(),
            tuple,
        }
    }
}

impl Default for SourcePorts {
    fn default() -> Self {
        Self::new()
    }
}

impl PortLease {
    /// The port of the client in this tuple.
    pub fn port(&self) -> u16 {
        self.tuple.client_port
    }

    /// Gives back a tuple that the kernel refused, and lets the walk go on elsewhere: whoever holds
    /// it, another proxy or a connection just closed, typically holds the next ones too.
    pub(super) fn refused(self) {
        self.ports.0.lock().leap_from(self.tuple.client_port);
    }
}

impl Drop for PortLease {
    fn drop(&mut self) {
        let mut tuples = self.ports.0.lock();
        tuples.taken.remove(&self.tuple);
        tuples.shrink();
    }
}

impl Tuples {
    fn take(&mut self, client: IpAddr, to: SocketAddr, first: Range) -> Option<Tuple> {
        let Self {
            taken,
            preferred,
            extension,
        } = self;
        let mut free = |cursor: &mut Cursor, tries: u16| {
            (0..tries.min(cursor.count)).find_map(|_| {
                let tuple = Tuple::new(client, cursor.step(), to);
                taken.insert(tuple).then_some(tuple)
            })
        };
        match first {
            // A client that holds the whole preferred range would cost a walk through all of it
            // on each connection; a short one tells nearly as well.
            Range::Preferred => free(preferred, SHORT_WALK)
                .or_else(|| free(extension, u16::MAX))
                .or_else(|| free(preferred, u16::MAX)),
            Range::Extension => free(extension, u16::MAX).or_else(|| free(preferred, u16::MAX)),
        }
    }

    fn leap_from(&mut self, port: u16) {
        if port < PREFERRED_FIRST {
            self.extension.leap();
        } else {
            self.preferred.leap();
        }
    }

    /// Gives memory back after a burst.
    fn shrink(&mut self) {
        let used = self.taken.len();
        if self.taken.capacity() > SMALL && used < self.taken.capacity() / 8 {
            self.taken.shrink_to(used * 2);
        }
    }
}

impl Tuple {
    fn new(client: IpAddr, client_port: u16, to: SocketAddr) -> Self {
        Self {
            client,
            client_port,
            to: to.ip(),
            to_port: to.port(),
        }
    }
}

impl Cursor {
    /// A walk over `first..=last` that starts anywhere in it.
    fn over(first: u16, last: u16) -> Self {
        let count = last - first + 1;
        Self {
            first,
            count,
            next: rand::random_range(0..count),
        }
    }

    fn leap(&mut self) {
        self.next = rand::random_range(0..self.count);
    }

    fn step(&mut self) -> u16 {
        let port = self.first + self.next;
        self.next = (self.next + 1) % self.count;
        port
    }
}

const EXTENSION_FIRST: u16 = 1024;
const EXTENSION_LAST: u16 = PREFERRED_FIRST - 1;
const PREFERRED_FIRST: u16 = 10240;
/// Linux clients draw from 32768 on, unless they are told otherwise.
const PREFERRED_LAST: u16 = 32767;
/// Ports looked at in the preferred range before the other one is asked.
const SHORT_WALK: u16 = 256;
/// Tables up to this capacity are not worth shrinking.
const SMALL: usize = 64;

#[cfg(test)]
mod tests;
