//! Peers of live tunnels, to be judged again when lists change.

use std::{future::pending, sync::Arc};

use rustls::{
    crypto::WebPkiSupportedAlgorithms,
    pki_types::{CertificateDer, UnixTime},
};

use super::Revocations;
use crate::{
    anchors::Anchors,
    chain::{Chain, Side, Terms},
};

/// Makes peers of one kind of tunnel known to the revocation check. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Tracker {
    pub(crate) revocations: Revocations,
    pub(crate) anchors: Arc<Anchors>,
    pub(crate) algorithms: WebPkiSupportedAlgorithms,
    pub(crate) side: Side,
}

/// A peer whose chain was verified, and what it takes to verify it again.
#[derive(Debug)]
pub struct Tracked {
    tracker: Tracker,
    /// Leaf first.
    chain: Box<[CertificateDer<'static>]>,
    established: UnixTime,
}

/// What the lists say about a peer now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Standing {
    /// Nothing of its chain is revoked.
    Good,
    /// A list revokes its leaf or one of the intermediates.
    Revoked,
    /// A list may, but the chain cannot be verified again.
    Unknown,
}

impl Tracker {
    /// Remembers the `chain` that a handshake has verified at this moment.
    #[must_use]
    pub fn track(self, chain: &[CertificateDer<'static>]) -> Tracked {
        Tracked {
            tracker: self,
            chain: chain.into(),
            established: UnixTime::now(),
        }
    }
}

impl Tracked {
    /// Judges the peer by the lists of this moment, as of the time when its tunnel was established: that its
    /// certificates have expired since does not matter.
    #[must_use]
    pub fn standing(&self) -> Standing {
        let Some((leaf, intermediates)) = self.chain.split_first() else {
            return Standing::Unknown;
        };
        let chain = Chain {
            leaf,
            intermediates,
        };
        let terms = Terms {
            anchors: &self.tracker.anchors.store.roots,
            algorithms: self.tracker.algorithms,
            side: self.tracker.side,
            now: self.established,
        };
        let revocations = &self.tracker.revocations;
        if !revocations.may_revoke(chain) {
            Standing::Good
        } else if revocations.revokes(chain, &terms) {
            Standing::Revoked
        } else if chain.verify(&terms, None).is_ok() {
            Standing::Good
        } else {
            Standing::Unknown
        }
    }

    /// Ready once the peer is revoked, which counts as a rejection; judged now and at each change of the lists.
    ///
    /// # Cancel safety
    /// Nothing is lost.
    pub async fn revoked(&self) {
        let (revocations, side) = (&self.tracker.revocations, self.tracker.side);
        // Before the first look: a change while looking is seen after it.
        let Some(mut changes) = revocations.changes() else {
            return pending().await;
        };
        loop {
            match self.standing() {
                Standing::Good => {}
                Standing::Revoked => return revocations.count(side, |counts| &counts.rejections),
                Standing::Unknown => {
                    revocations.count(side, |counts| &counts.untracked);
                    return pending().await;
                }
            }
            if changes.changed().await.is_err() {
                return pending().await;
            }
        }
    }
}
