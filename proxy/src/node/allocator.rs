//! How much threads hold back of what they free.
//!
//! jemalloc keeps for each thread what that freed last, up to 200 blocks of each small size and twenty of each size to 32 KiB, for as long
//! as the thread allocates little. Where flows run, this saves time, but what a burst freed would stay with workers that have
//! nothing to do, so they give it back when they go to sleep. The threads of control use large blocks for a push of the mesh or a
//! handshake, and then none for half an hour: there it would be half a megabyte that nobody needs.

mod sys;

use std::{cell::Cell, time::Duration};

use tokio::time::Instant;

/// Has the calling thread give back at once what is larger than a page.
pub(super) fn keep_little() {
    if let Err(error) = sys::keep_at_most(PAGE_BYTES) {
        tracing::debug!(%error, "the allocator keeps what it likes");
    }
}

/// Has the calling thread, which is about to sleep, give back what it keeps, unless it did so a moment ago.
pub(super) fn give_back() {
    thread_local! {
        static LAST: Cell<Option<Instant>> = const { Cell::new(None) };
    }
    let now = Instant::now();
    if LAST
        .get()
        .is_none_or(|last| now.duration_since(last) >= BETWEEN)
    {
        LAST.set(Some(now));
        // It refuses only where the thread keeps nothing.
        let _ = sys::flush();
    }
}

const PAGE_BYTES: usize = 4096;

/// Time between two times that a thread gives back. What it freed since the last one is little; a busy thread, which
/// sleeps ten thousand times a second, shall seldom ask for its blocks again.
const BETWEEN: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_allocator_knows_the_setting() {
        sys::keep_at_most(PAGE_BYTES).unwrap();
    }

    #[test]
    fn the_allocator_knows_the_request() {
        sys::flush().unwrap();
    }
}
