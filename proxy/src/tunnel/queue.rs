//! Knows when the HTTP/2 library has passed on what a stream was given.
//!
//! A reset throws away what the library still holds, and nothing in it tells how much that is. So each payload is counted until
//! it is dropped, when its bytes are on their way. (An empty DATA frame behind them would tell the same, but peers take a
//! hundred of those on one connection for an attack.)

use std::task::{Context, Poll};

use bytes::Buf;

use super::sync::{Arc, AtomicUsize, AtomicWaker, Ordering};
use crate::{config, relay::Payload};

/// Bytes that a stream may have queued for the connection before it waits.
pub(super) const SEND_BUFFER: usize = 256 << 10;

/// What the library may hold of small frames that wait for a reader: each counts for what it lacks of 256 bytes. A stream whose
/// reader pauses may fill its window by messages of a few bytes, and that is no reason to end its neighbours; whoever does so to
/// take memory gets twice of it what he gets by large frames: 254 bytes for each, measured, and with the usual window one frame more
/// than this would double the library's table once again.
pub(super) fn small_frames(config: &config::Tunnel) -> usize {
    usize::try_from(config.connection_window).map_or(usize::MAX, |window| window / 8 * 15)
}

/// The payloads of one stream that are with the library.
#[derive(Debug, Default)]
pub(super) struct Queue(Arc<Held>);

#[derive(Debug, Default)]
struct Held {
    payloads: AtomicUsize,
    /// Waits until there are none.
    waiter: AtomicWaker,
}

impl Queue {
    /// `payload` on its way into the library.
    pub(super) fn enter(&self, payload: Payload) -> Queued {
        self.0.payloads.fetch_add(1, Ordering::AcqRel);
        Queued {
            payload,
            _place: Place(Arc::clone(&self.0)),
        }
    }

    /// Ready once nothing is with the library.
    pub(super) fn poll_empty(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.0.waiter.register(cx.waker());
        if self.0.payloads.load(Ordering::Acquire) == 0 {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    }
}

/// A payload as the HTTP/2 library holds it.
#[derive(Debug)]
pub(super) struct Queued {
    payload: Payload,
    _place: Place,
}

impl Buf for Queued {
    fn remaining(&self) -> usize {
        self.payload.remaining()
    }

    fn chunk(&self) -> &[u8] {
        self.payload.chunk()
    }

    fn advance(&mut self, count: usize) {
        self.payload.advance(count);
    }
}

/// One payload that is counted, until it is dropped.
#[derive(Debug)]
struct Place(Arc<Held>);

impl Drop for Place {
    fn drop(&mut self) {
        if self.0.payloads.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.waiter.wake();
        }
    }
}
