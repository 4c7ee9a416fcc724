//! What tests tell the certificate service, and ask it.

use std::{sync::Arc, time::Duration};

use tonic::Status;

use super::{Istiod, csr::CertificateCall, signing::Flaw, signing::Signing};
use crate::{openbao::Issuer, wait};

impl Istiod {
    /// Signs certificates like this from now on; at first there is one fresh root.
    pub fn sign_by(&self, signing: Signing) {
        self.shared.signer.sign_by(signing);
    }

    /// Has a real OpenBao sign from now on, as an istio-csr does by way of cert-manager; leaves may be as it likes, and neither
    /// [`Istiod::sign_by`] nor [`Istiod::sign_wrongly`] changes them.
    pub fn sign_through(&self, issuer: Issuer) {
        let set =
            |settings: &mut super::signing::Settings| settings.issuer = Some(Arc::new(issuer));
        self.shared.signer.set(set);
    }

    /// The root of the certificates that it signs, the first if there are several.
    #[must_use]
    pub fn mesh_root_pem(&self) -> String {
        self.shared.signer.root_pem()
    }

    /// Errs with each answer, or no longer.
    pub fn sign_wrongly(&self, flaw: impl Into<Option<Flaw>>) {
        let flaw = flaw.into();
        self.shared.signer.set(|settings| settings.flaw = flaw);
    }

    /// Grants no more than this, whatever is asked for.
    pub fn sign_for_at_most(&self, lifetime: Duration) {
        let set = |settings: &mut super::signing::Settings| settings.longest = lifetime;
        self.shared.signer.set(set);
    }

    /// Refuses to sign with this status, or no longer.
    pub fn refuse_to_sign(&self, with: impl Into<Option<Status>>) {
        let with = with.into();
        self.shared.signer.set(|settings| settings.refusal = with);
    }

    /// Refuses the next requests to sign, one with each status.
    pub fn refuse_to_sign_next(&self, with: &[Status]) {
        let set = |settings: &mut super::signing::Settings| settings.refusals = with.to_vec();
        self.shared.signer.set(set);
    }

    /// Takes this long for each request that comes from now on.
    pub fn sign_after(&self, latency: Duration) {
        self.shared
            .signer
            .set(|settings| settings.latency = latency);
    }

    /// Takes calls without impersonation for calls of this identity.
    pub fn take_callers_for(&self, id: &str) {
        let set = |settings: &mut super::signing::Settings| id.clone_into(&mut settings.caller);
        self.shared.signer.set(set);
    }

    /// All calls of the certificate service so far.
    #[must_use]
    pub fn certificate_calls(&self) -> Vec<CertificateCall> {
        self.shared.signer.calls.borrow().clone()
    }

    /// Waits until `probe` finds what it looks for in the calls of the certificate service.
    ///
    /// # Panics
    /// When the time is up; all calls are in the message.
    pub async fn until_certified<T>(
        &self,
        limit: Duration,
        what: &str,
        mut probe: impl FnMut(&[CertificateCall]) -> Option<T>,
    ) -> T {
        let (mut calls, mut found) = (self.shared.signer.calls.subscribe(), None);
        let search = calls.wait_for(|calls| {
            found = probe(calls);
            found.is_some()
        });
        let ended = tokio::time::timeout(limit, search).await.map(drop);
        found.unwrap_or_else(|| {
            let calls = self.certificate_calls();
            panic!("{ended:?}, not within {limit:?}: {what}\n{calls:#?}")
        })
    }

    /// Waits until an identity was asked for `count` times with the calls ended, and returns these calls.
    ///
    /// # Panics
    /// When it was not within ten seconds.
    pub async fn certified(&self, id: &str, count: usize) -> Vec<CertificateCall> {
        self.certified_within(wait::SOON, id, count).await
    }

    /// As [`Istiod::certified`], within `limit`.
    ///
    /// # Panics
    /// When the time is up.
    pub async fn certified_within(
        &self,
        limit: Duration,
        id: &str,
        count: usize,
    ) -> Vec<CertificateCall> {
        let what = format!("{count} requests for {id}");
        self.until_certified(limit, &what, |calls| {
            let mine = calls
                .iter()
                .filter(|call| call.impersonated.as_deref() == Some(id) && !call.is_open());
            let mine: Vec<_> = mine.cloned().collect();
            (mine.len() >= count).then_some(mine)
        })
        .await
    }
}
