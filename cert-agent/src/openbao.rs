//! Certificates from the PKI engine of an OpenBao (or Vault) server.
//!
//! An [`Authority`] signs requests with `POST <mount>/sign/<role>`. Its token comes from one of four [`Login`]s. One token
//! serves all identities, is replaced after two thirds of its life, and at once when it is refused; or each certificate
//! has one of its own, from a login with the service-account token of its workload ([`Jwt`]). Beside that, [`Authority::run`] reads whom the
//! engines vouch for and whom no longer: [`Authority::roots`] and [`Authority::crls`].
//!
//! ```no_run
//! # use std::sync::Arc;
//! # use cert_agent::{Agent, AgentOptions, CsrSource, openbao::{Authority, Jwt, Login, Roots, Settings}};
//! # fn start() -> Result<(), Box<dyn std::error::Error>> {
//! let login = Login::Kubernetes {
//!     mount: "kubernetes".into(),
//!     role: "culvert".into(),
//!     jwt: Jwt::Own("/var/run/secrets/tokens/openbao-token".into()),
//! };
//! let address = "https://openbao.vault.svc:8200".parse()?;
//! let roots = Roots::File("/var/run/secrets/openbao/ca.crt".into());
//! let authority = Authority::new(Settings::new(address, roots, "workload", login))?;
//! let agent = Agent::new(Arc::new(CsrSource::new(authority.clone())), AgentOptions::default());
//! // Somebody runs both: `authority.run(stop)` and `agent.run(stop)`.
//! # Ok(())
//! # }
//! ```
//!
//! # Whom the server has to trust
//!
//! OpenBao knows no node: nothing in it holds an identity that is asked for against the pods of the node that asks, as
//! istiod does.
//!
//! - **A role with a glob** (`allowed_uri_sans=spiffe://cluster.local/ns/*`) and the node's account: whoever has the
//!   token of *one* node can become *every* workload of the trust domain. Only for small clusters of nodes that all are
//!   trusted alike. Roles and policies by namespace make the damage smaller, not different in kind.
//! - **A templated role** (`allowed_uri_sans_template=true`, with the account's namespace and name out of the metadata
//!   of the login) gives each login its own identity only. That needs *the workload's own* service-account token: with
//!   [`Jwt::Own`] in a process that serves one workload, else with [`Jwt::Directory`] or [`Jwt::Requested`]. A node then
//!   gets the identities whose tokens it can have. A directory holds what its keeper puts there. Kubernetes makes tokens
//!   of whatever accounts its rules (RBAC) allow the node's account, wherever their pods run: a rule for all accounts
//!   makes this no stronger than the glob, but rules by namespace or account hold, and every token that is made is in the
//!   audit log.
//! - istiod or istio-csr in front of OpenBao keep istiod's rule that a node gets the identities of its pods alone.
//!
//! In each case: `require_cn=false`, `key_type=ec`, `use_csr_sans=true`, `not_after_bound=forbid`, and never `sign-verbatim`. A role signs
//! requests without a name or with two; the agent refuses such certificates.
//!
//! # What is promised
//! - Nothing is final: every failure is tried again, as soon as its kind makes sense ([`Retry`]).
//! - Answers are bounded in time and size; a redirection is followed over TLS, to the same path, in the same cluster only.
//! - Tokens, JWTs and secret ids are kept in memory alone, wiped, and appear in no `Debug` or message.
//! - Roots and revocation lists that were published are never emptied by an answer that is empty or fails.

mod account;
mod client;
mod dial;
mod failure;
mod secret;
mod settings;
#[cfg(test)]
mod tests;
mod token;
mod trust;
mod wire;

pub use account::KubernetesApi;
pub use dial::Roots;
pub use settings::{Jwt, Login, Settings, SettingsError, is_path};
pub use trust::{Crls, TrustRoots};

use std::{fmt, sync::Arc, time::Duration};

use http::HeaderValue;
use rustls_pki_types::CertificateDer;
use tokio::{
    sync::{Notify, watch},
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use crate::{
    BoxFuture, ObtainError, Retry, SignedChain, Signer, SigningRequest, check::is_self_signed,
};
use client::{Call, Client};
use dial::{Dial, TlsDialler};
use failure::{Failure, Step};
use token::Tokens;
use trust::Trust;
use wire::{SignRequest, Signed};

/// A PKI engine as a certificate authority. Clones share the token.
#[derive(Clone)]
pub struct Authority(Arc<Inner>);

struct Inner {
    client: Client,
    tokens: Tokens,
    trust: Trust,
    sign_path: String,
    mounts: Vec<String>,
    ttl: Duration,
    poll_interval: Duration,
    /// A root was seen that no engine was known to hold.
    unknown_root: Notify,
    settings: Settings,
}

impl Authority {
    /// The authority that `settings` describe. Nothing is sent yet.
    ///
    /// # Errors
    /// [`SettingsError`] if a part of them cannot be part of a request.
    pub fn new(settings: Settings) -> Result<Self, SettingsError> {
        let dialler = TlsDialler::new(settings.roots.clone(), settings.tls.clone());
        Self::over(Arc::new(dialler), settings)
    }

    fn over(dialler: Arc<dyn Dial>, settings: Settings) -> Result<Self, SettingsError> {
        settings.check()?;
        let namespace = settings.namespace.as_deref().map(HeaderValue::from_str);
        let namespace = namespace
            .transpose()
            .map_err(|_| SettingsError::Path(settings.namespace.clone().unwrap_or_default()))?;
        let mut mounts = vec![settings.mount.clone()];
        mounts.extend(settings.root_mounts.iter().cloned());
        mounts.sort_unstable();
        mounts.dedup();
        Ok(Self(Arc::new(Inner {
            client: Client::new(dialler, settings.address.clone(), namespace),
            tokens: Tokens::new(settings.login.clone()),
            trust: Trust::new(),
            sign_path: format!("{}/sign/{}", settings.mount, settings.role),
            mounts,
            ttl: settings.ttl,
            poll_interval: settings.poll_interval.min(MAX_POLL),
            unknown_root: Notify::new(),
            settings,
        })))
    }

    /// The self-signed issuers of all engines, as far as known; empty until [`run`](Self::run) has read them.
    #[must_use]
    pub fn roots(&self) -> watch::Receiver<TrustRoots> {
        self.0.trust.roots().subscribe()
    }

    /// The revocation lists of all issuers, as far as known; empty until [`run`](Self::run) has read them. Only complete
    /// lists, never deltas; their signatures are for the reader to check. The last list of an issuer that is deleted or
    /// loses its key stays until the issuer's certificate ends, up to 16 such lists for each engine.
    #[must_use]
    pub fn crls(&self) -> watch::Receiver<Crls> {
        self.0.trust.crls().subscribe()
    }

    /// Reads issuers and revocation lists every [`Settings::poll_interval`], and sooner after a failure or when a
    /// certificate comes from a root that is new, until `stop` fires.
    ///
    /// # Cancel safety
    /// What was published stays.
    pub async fn run(&self, stop: CancellationToken) {
        tokio::select! {
            biased; // stopping goes first
            () = stop.cancelled() => {}
            () = self.0.follow() => {}
        }
    }
}

impl Signer for Authority {
    fn sign<'a>(
        &'a self,
        request: SigningRequest<'a>,
    ) -> BoxFuture<'a, Result<SignedChain, ObtainError>> {
        Box::pin(async move { Ok(self.0.sign(request).await?) })
    }
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Authority").field(&self.0.settings).finish()
    }
}

impl Inner {
    async fn sign(&self, request: SigningRequest<'_>) -> Result<SignedChain, Failure> {
        let token = self.tokens.token(&self.client, request.id).await?;
        let signed = match self.try_sign(request, &token).await {
            Err(refusal) if refusal.is_forbidden() => {
                // It ended early, or was revoked: once more with another one.
                let other = self.tokens.replace(&self.client, request.id, &token);
                let Some(token) = other.await? else {
                    return Err(refusal);
                };
                let again = self.try_sign(request, &token).await;
                if again.as_ref().is_err_and(Failure::is_forbidden) {
                    self.tokens.refused_again();
                }
                again?
            }
            other => other?,
        };
        if !signed.warnings.is_empty() {
            tracing::debug!(id = %request.id, warnings = ?signed.warnings, "OpenBao signed with warnings");
        }
        Ok(self.chain(signed).await)
    }

    async fn try_sign(
        &self,
        request: SigningRequest<'_>,
        token: &HeaderValue,
    ) -> Result<Signed, Failure> {
        let csr = request.csr_pem();
        let body = SignRequest {
            csr: &csr,
            ttl: format!("{}s", self.ttl.as_secs()),
            format: "pem",
        };
        let body = wire::body(&body, csr.len())
            .map_err(|error| Failure::without_answer(Step::Sign, error.to_string()))?;
        let call = Call {
            step: Step::Sign,
            path: &self.sign_path,
            token: Some(token),
            secret: None,
            body: Some(body),
            max_answer: MAX_ANSWER,
        };
        Signed::parse(&self.client.call(&call).await?)
    }

    /// Adds the roots: those above the certificate, and all that the engines hold.
    async fn chain(&self, signed: Signed) -> SignedChain {
        let above = signed.above.iter().filter(|one| is_self_signed(one));
        let mut roots: Vec<CertificateDer<'static>> = above.cloned().collect();
        let known = self.trust.roots().borrow().clone();
        if roots.iter().any(|root| !known.contains(root)) {
            self.unknown_root.notify_one();
        }
        if roots.is_empty() && known.is_empty() {
            // The mount does not know the root above its intermediate, and none of the engines was read yet.
            if let Err(failure) = self.trust.poll(&self.client, &self.mounts).await {
                tracing::warn!(%failure, "cannot read the trust roots");
            }
        }
        roots.extend(self.trust.roots().borrow().iter().cloned());
        trust::normalise(&mut roots);
        let mut chain = signed.leaf;
        chain.extend(signed.above);
        SignedChain::new(chain, roots)
    }

    async fn follow(&self) {
        let mut failures = 0;
        loop {
            let pause = match self.trust.poll(&self.client, &self.mounts).await {
                Ok(()) => {
                    failures = 0;
                    self.poll_interval
                }
                Err(failure) => {
                    tracing::warn!(%failure, "trust roots and revocation lists stay as they were");
                    failures += 1;
                    let told = match failure.retry {
                        Retry::After(pause) => pause,
                        Retry::Soon | Retry::Slowly => Duration::ZERO,
                    };
                    back_off(failures).min(self.poll_interval).max(told)
                }
            };
            let pause = pause.mul_f64(0.9 + 0.2 * rand::random::<f64>());
            // Ends early for a new root, but never at once: one signature a second must not mean one poll a second.
            tokio::time::sleep(pause.min(MIN_PAUSE)).await;
            let left = pause.saturating_sub(MIN_PAUSE);
            let _early = timeout(left, self.unknown_root.notified()).await;
        }
    }
}

/// Reads an answer as that of each call, for fuzzing.
#[cfg(any(test, fuzzing))]
pub(crate) fn read_all(body: &[u8]) {
    drop(Signed::parse(body));
    drop(wire::LoggedIn::parse(body));
    drop(wire::issuers(body));
    drop(wire::issuer(body));
    drop(wire::requested_token(body));
    assert!(wire::error_texts(body, ["errors", ""]).len() <= 4 * 300);
    assert!(wire::kubernetes_text(body, "message").len() <= 4 * 300);
}

/// The pause after so many failures in a row.
fn back_off(failures: u32) -> Duration {
    Duration::from_secs(1).saturating_mul(2_u32.saturating_pow(failures.saturating_sub(1)))
}

const MAX_ANSWER: usize = 1024 * 1024;
const MAX_POLL: Duration = Duration::from_hours(24);
const MIN_PAUSE: Duration = Duration::from_secs(5);
