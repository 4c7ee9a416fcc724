//! When an established connection must end at once: its peer's certificate counts no longer.

use std::future::pending;

use cert_agent::Tracker;
use futures_util::future::BoxFuture;
use rustls::pki_types::CertificateDer;

/// Fires when a connection is to be cut; never, and at the cost of a null pointer, if nobody tracks its peer.
pub struct Cut(Option<BoxFuture<'static, ()>>);

impl Cut {
    /// Fires once `tracker` finds the verified `chain` of the peer revoked, after it has called `first`.
    #[must_use]
    pub fn new(
        tracker: Option<Tracker>,
        chain: &[CertificateDer<'static>],
        first: impl FnOnce() + Send + 'static,
    ) -> Self {
        Self(tracker.map(|tracker| -> BoxFuture<'static, ()> {
            let peer = tracker.track(chain);
            Box::pin(async move {
                peer.revoked().await;
                first();
            })
        }))
    }

    /// Never fires.
    #[must_use]
    pub const fn never() -> Self {
        Self(None)
    }

    /// Ready when the connection is to be cut.
    pub async fn fired(self) {
        match self.0 {
            Some(revoked) => revoked.await,
            None => pending().await,
        }
    }
}

impl std::fmt::Debug for Cut {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let tracked = self.0.is_some();
        f.debug_struct("Cut").field("tracked", &tracked).finish()
    }
}
