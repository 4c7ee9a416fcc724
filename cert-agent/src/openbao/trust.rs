//! Whom to trust and whom no longer: the self-signed issuers of the engines, and the revocation lists of all issuers.

use std::{collections::BTreeMap, sync::Arc};

use parking_lot::Mutex;
use rustls_pki_types::CertificateDer;
use tokio::sync::watch;
use x509_parser::{prelude::FromDer as _, revocation_list::CertificateRevocationList};
use zeroize::Zeroizing;

use super::{
    client::{Call, Client},
    failure::{Failure, Step},
    settings::is_path,
    wire::{self, IssuerRef},
};
use crate::check::is_self_signed;

/// Revocation lists, each in DER.
pub type Crls = Arc<[Vec<u8>]>;
/// Trust anchors.
pub type TrustRoots = Arc<[CertificateDer<'static>]>;

/// What the engines were last seen to hold. Nothing is ever emptied by an answer that is empty or fails.
pub(super) struct Trust {
    engines: Mutex<BTreeMap<String, Engine>>,
    roots: watch::Sender<TrustRoots>,
    crls: watch::Sender<Crls>,
}

/// One mount.
#[derive(Default, Clone)]
struct Engine {
    roots: Vec<CertificateDer<'static>>,
    /// By issuer.
    crls: BTreeMap<String, Vec<u8>>,
}

impl Trust {
    pub(super) fn new() -> Self {
        Self {
            engines: Mutex::default(),
            roots: watch::Sender::new(TrustRoots::from([])),
            crls: watch::Sender::new(Crls::from([])),
        }
    }

    pub(super) fn roots(&self) -> &watch::Sender<TrustRoots> {
        &self.roots
    }

    pub(super) fn crls(&self) -> &watch::Sender<Crls> {
        &self.crls
    }

    /// Reads all `mounts` and publishes what is new. The first failure, after everything else was read.
    ///
    /// # Cancel safety
    /// What was read of an unfinished engine is lost.
    pub(super) async fn poll(&self, client: &Client, mounts: &[String]) -> Result<(), Failure> {
        let mut first_failure = Ok(());
        for mount in mounts {
            let before = self.engines.lock().get(mount).cloned().unwrap_or_default();
            let (engine, outcome) = Box::pin(before.read(client, mount)).await;
            self.engines.lock().insert(mount.clone(), engine);
            first_failure = first_failure.and(outcome);
        }
        self.publish();
        first_failure
    }

    fn publish(&self) {
        let (mut roots, mut crls) = (Vec::new(), Vec::new());
        for engine in self.engines.lock().values() {
            roots.extend(engine.roots.iter().cloned());
            crls.extend(engine.crls.values().cloned());
        }
        if !roots.is_empty() {
            replace(&self.roots, roots);
        }
        replace(&self.crls, crls);
    }
}

/// Each once, in an order of their own.
pub(super) fn normalise<T: AsRef<[u8]> + PartialEq>(set: &mut Vec<T>) {
    set.sort_unstable_by(|one, other| one.as_ref().cmp(other.as_ref()));
    set.dedup();
}

/// Publishes the set, if it is another one.
fn replace<T>(published: &watch::Sender<Arc<[T]>>, mut set: Vec<T>)
where
    T: AsRef<[u8]> + PartialEq,
{
    normalise(&mut set);
    published.send_if_modified(|held| {
        let changed = **held != *set;
        if changed {
            *held = set.into();
        }
        changed
    });
}

impl Engine {
    /// The engine as it is now; what cannot be read stays as it was.
    async fn read(self, client: &Client, mount: &str) -> (Self, Result<(), Failure>) {
        let issuers = match self.issuers(client, mount).await {
            Ok(issuers) => issuers,
            Err(failure) => return (self, Err(failure)),
        };
        let (mut fresh, mut outcome) = (Self::default(), Ok(()));
        let mut complete = true;
        for IssuerRef { name, has_key } in issuers {
            match self.issuer(client, mount, &name).await {
                Ok(certificates) => fresh.roots.extend(certificates),
                Err(failure) => (complete, outcome) = (false, outcome.and(Err(failure))),
            }
            if !has_key {
                continue;
            }
            let before = self.crls.get(&name).cloned();
            let crl = match crl(client, mount, &name).await {
                Ok(found) => found.or(before),
                Err(failure) => {
                    outcome = outcome.and(Err(failure));
                    before
                }
            };
            fresh.crls.extend(crl.map(|crl| (name, crl)));
        }
        if !complete {
            fresh.roots.extend(self.roots);
        }
        (fresh, outcome)
    }

    async fn issuers(&self, client: &Client, mount: &str) -> Result<Vec<IssuerRef>, Failure> {
        let path = format!("{mount}/issuers?list=true");
        let mut issuers = wire::issuers(&get(client, &path, MAX_JSON).await?)?;
        issuers.retain(|issuer| is_path(&issuer.name) && !issuer.name.contains('/'));
        if issuers.len() > MAX_ISSUERS {
            tracing::warn!(
                mount,
                issuers = issuers.len(),
                "too many issuers in an engine of OpenBao; the first {MAX_ISSUERS} are read"
            );
            issuers.truncate(MAX_ISSUERS);
        }
        if issuers.is_empty() {
            let reason = format!("the engine {mount} has no issuer");
            return Err(Failure::without_answer(Step::Read, reason));
        }
        Ok(issuers)
    }

    /// The self-signed ones among an issuer and those above it.
    async fn issuer(
        &self,
        client: &Client,
        mount: &str,
        name: &str,
    ) -> Result<Vec<CertificateDer<'static>>, Failure> {
        let path = format!("{mount}/issuer/{name}/json");
        let mut found = wire::issuer(&get(client, &path, MAX_JSON).await?)?;
        found.retain(is_self_signed);
        Ok(found)
    }
}

/// The revocation list of one issuer; `None` if it has none.
async fn crl(client: &Client, mount: &str, name: &str) -> Result<Option<Vec<u8>>, Failure> {
    let path = format!("{mount}/issuer/{name}/crl/der");
    let der = match get(client, &path, MAX_CRL).await {
        Ok(der) => der,
        Err(failure)
            if failure
                .status
                .is_some_and(|status| status.is_client_error()) =>
        {
            tracing::debug!(mount, issuer = name, %failure, "no revocation list");
            return Ok(None);
        }
        Err(failure) => return Err(failure),
    };
    if der.is_empty() {
        return Ok(None);
    }
    match CertificateRevocationList::from_der(&der) {
        Ok(_) => Ok(Some(der.to_vec())),
        Err(_) => {
            let reason = format!("what the engine {mount} serves at {path} is no revocation list");
            Err(Failure::without_answer(Step::Read, reason))
        }
    }
}

async fn get(
    client: &Client,
    path: &str,
    max_answer: usize,
) -> Result<Zeroizing<Vec<u8>>, Failure> {
    let call = Call {
        step: Step::Read,
        path,
        token: None,
        body: None,
        max_answer,
    };
    client.call(&call).await
}

const MAX_JSON: usize = 1024 * 1024;
const MAX_CRL: usize = 16 * 1024 * 1024;
const MAX_ISSUERS: usize = 64;
