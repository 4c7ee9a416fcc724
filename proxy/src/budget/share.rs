//! What pods hold.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering::Relaxed},
};

use super::TAKING;

/// What the pods of this process hold, together. Clones share.
#[derive(Debug, Clone, Default)]
pub struct Shares(Arc<Sum>);

#[derive(Debug, Default)]
struct Sum {
    flows: AtomicUsize,
    tunnels: AtomicUsize,
    /// Pods that hold anything.
    pods: AtomicUsize,
}

/// What one pod holds.
#[derive(Debug)]
pub struct Share {
    all: Shares,
    bytes: AtomicUsize,
}

/// What memory is held for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Owner {
    /// A connection or stream with what belongs to it; its buffers have their own account.
    Flow,
    /// An HBONE connection: TLS, HTTP/2 and what a peer has sent that is not read yet, on the average.
    Tunnel,
}

impl Owner {
    /// What one of it is taken to hold, in bytes. An estimate.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            Self::Flow => 4 << 10,
            Self::Tunnel => 32 << 10,
        }
    }
}

impl Shares {
    /// The share of another pod.
    #[must_use]
    pub fn pod(&self) -> Arc<Share> {
        Arc::new(Share {
            all: self.clone(),
            bytes: AtomicUsize::new(0),
        })
    }

    /// What is held by flows, or by tunnels that peers have opened, in bytes.
    #[must_use]
    pub fn bytes(&self, owner: Owner) -> usize {
        self.0.count(owner).load(Relaxed) * owner.bytes()
    }
}

impl Sum {
    const fn count(&self, owner: Owner) -> &AtomicUsize {
        match owner {
            Owner::Flow => &self.flows,
            Owner::Tunnel => &self.tunnels,
        }
    }
}

impl Share {
    /// Notes that the pod holds one more, until the result is dropped.
    #[must_use]
    pub fn hold(self: &Arc<Self>, owner: Owner) -> Held {
        let Sum { pods, .. } = &*self.all.0;
        if self.bytes.fetch_add(owner.bytes(), Relaxed) == 0 {
            pods.fetch_add(1, Relaxed);
        }
        self.all.0.count(owner).fetch_add(1, Relaxed);
        TAKING.note();
        Held {
            share: Arc::clone(self),
            owner,
        }
    }

    /// Whether the pod holds less than pods do on the average, or little: then it is not the one that makes memory short.
    #[must_use]
    pub fn is_modest(&self) -> bool {
        let bytes = self.bytes.load(Relaxed);
        let all = self.all.bytes(Owner::Flow) + self.all.bytes(Owner::Tunnel);
        bytes < LITTLE || bytes.saturating_mul(self.all.0.pods.load(Relaxed)) < all
    }
}

/// Something that a pod holds.
#[derive(Debug)]
pub struct Held {
    share: Arc<Share>,
    owner: Owner,
}

impl Drop for Held {
    fn drop(&mut self) {
        let Share { all, bytes } = &*self.share;
        if bytes.fetch_sub(self.owner.bytes(), Relaxed) == self.owner.bytes() {
            all.0.pods.fetch_sub(1, Relaxed);
        }
        all.0.count(self.owner).fetch_sub(1, Relaxed);
    }
}

/// A pod that holds less than this is served whatever happens: a budget that is too small for the mesh itself must not stop traffic.
const LITTLE: usize = 256 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_holds_most_is_told_from_the_others() {
        let shares = Shares::default();
        let (greedy, modest, idle) = (shares.pod(), shares.pod(), shares.pod());
        let flows = |share: &Arc<Share>, count| -> Vec<Held> {
            (0..count).map(|_| share.hold(Owner::Flow)).collect()
        };
        let few = flows(&greedy, 63);
        assert!(greedy.is_modest(), "alone, but with little");
        let many = flows(&greedy, 1000);
        assert!(!greedy.is_modest());
        let some = flows(&modest, 300);
        assert!(modest.is_modest() && idle.is_modest() && !greedy.is_modest());
        assert_eq!(shares.bytes(Owner::Flow), 1363 * Owner::Flow.bytes());
        drop((few, many));
        assert!(greedy.is_modest() && !modest.is_modest());
        let tunnel = idle.hold(Owner::Tunnel);
        assert_eq!(shares.bytes(Owner::Tunnel), Owner::Tunnel.bytes());
        drop((some, tunnel));
        assert_eq!(shares.0.pods.load(Relaxed), 0);
        assert_eq!(shares.bytes(Owner::Flow) + shares.bytes(Owner::Tunnel), 0);
    }
}
