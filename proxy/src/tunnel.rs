//! HBONE: byte streams to and from peers, as HTTP/2 CONNECT over mutual TLS.
//!
//! `flow` opens streams through a [`Pool`] (one per captured pod) and takes them from [`serve`]
//! (one call per accepted connection); both hand it a [`Stream`] that `relay` pumps. This room
//! decides nothing: whom to trust comes as a TLS configuration, where to go as a [`Key`] and a
//! [`Request`], and how to dial through [`Dial`]. Every wait on a peer has a limit.

mod age;
pub mod client;
mod cut;
mod error;
mod flood;
mod frames;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
pub mod headers;
mod io;
mod keepalive;
#[cfg(test)]
mod model;
mod pool;
mod queue;
mod server;
mod stream;
#[cfg(any(test, fuzzing))]
#[cfg_attr(not(test), expect(dead_code, reason = "the fuzzer needs a part of it"))]
mod testing;
#[cfg(test)]
mod tests;
mod tls;
mod turn;
mod window;

pub use self::{
    age::Retirement,
    client::{Answer, Request},
    cut::Cut,
    error::{ConnectError, OpenError, ServeError},
    flood::Flood,
    pool::{Credentials, Dial, Fate, Key, Nested, Opening, Pool, PoolMetrics},
    server::{Connect, Host, Incoming, Responder, serve},
    stream::{Buffered, Stream},
    tls::{AcceptError, RecordError, Tls, accept},
};

/// What [`queue`] synchronises with; `model` has the same in a form that tries all orders.
mod sync {
    pub(super) use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    };

    pub(super) use futures_util::task::AtomicWaker;
}
