//! How much the threads of control hold back of what they free.
//!
//! jemalloc keeps for each thread what that freed last, up to twenty blocks of each size to 32 KiB, for as long as the thread allocates
//! little. Where flows run, this saves time all the time. The threads of control use large blocks for a push of the mesh or a
//! handshake, and then none for half an hour: there it would be half a megabyte that nobody needs.

mod sys;

/// Has the calling thread give back at once what is larger than a page.
pub(super) fn keep_little() {
    if let Err(error) = sys::keep_at_most(PAGE_BYTES) {
        tracing::debug!(%error, "the allocator keeps what it likes");
    }
}

const PAGE_BYTES: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_allocator_knows_the_setting() {
        sys::keep_at_most(PAGE_BYTES).unwrap();
    }
}
