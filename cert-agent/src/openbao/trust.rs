//! Whom to trust and whom no longer: the self-signed issuers of the engines, and the revocation lists of all issuers.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::SystemTime,
};

use parking_lot::Mutex;
use rustls_pki_types::CertificateDer;
use tokio::sync::watch;
use webpki::BorrowedCertRevocationList;
use x509_parser::{prelude::FromDer as _, revocation_list::CertificateRevocationList};
use zeroize::Zeroizing;

use super::{
    client::{Call, Client},
    failure::{Failure, Step},
    settings::is_path,
    wire::{self, IssuerRef},
};
use crate::{Clock, check::is_self_signed, verify::peer_not_after};

/// Revocation lists, each in DER.
pub type Crls = Arc<[Vec<u8>]>;
/// Trust anchors.
pub type TrustRoots = Arc<[CertificateDer<'static>]>;

/// What the engines were last seen to hold. Nothing is ever emptied by an answer that is empty or fails.
pub(super) struct Trust {
    engines: Mutex<BTreeMap<String, Engine>>,
    roots: watch::Sender<TrustRoots>,
    crls: watch::Sender<Crls>,
    clock: Clock,
}

/// One mount.
#[derive(Default, Clone)]
struct Engine {
    roots: Vec<CertificateDer<'static>>,
    /// By issuer; also of some that make none any longer, since certificates that they have signed may still be presented.
    lists: BTreeMap<String, List>,
}

/// The revocation list of an issuer.
#[derive(Clone)]
struct List {
    der: Vec<u8>,
    /// When the certificate of the issuer ends, if it could be read.
    issuer_ends: Option<SystemTime>,
    read_at: SystemTime,
}

impl List {
    /// Whether it counts without its issuer: a certificate of that may still be valid, and the list can be read, without which no
    /// list would be taken over.
    fn outlives_its_issuer(&self, now: SystemTime) -> bool {
        self.issuer_ends.is_none_or(|end| now < end)
            && BorrowedCertRevocationList::from_der(&self.der)
                .is_ok_and(|list| list.to_owned().is_ok())
    }
}

impl Trust {
    pub(super) fn new() -> Self {
        Self {
            engines: Mutex::default(),
            roots: watch::Sender::new(TrustRoots::from([])),
            crls: watch::Sender::new(Crls::from([])),
            clock: Clock::system(),
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
            let (engine, outcome) = Box::pin(before.read(client, mount, &self.clock)).await;
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
            crls.extend(engine.lists.values().map(|list| list.der.clone()));
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
    async fn read(
        self,
        client: &Client,
        mount: &str,
        clock: &Clock,
    ) -> (Self, Result<(), Failure>) {
        let issuers = match self.issuers(client, mount).await {
            Ok(issuers) => issuers,
            Err(failure) => return (self, Err(failure)),
        };
        let (mut fresh, mut outcome) = (Self::default(), Ok(()));
        let (mut complete, mut with_keys) = (true, BTreeSet::new());
        for IssuerRef { name, has_key } in issuers {
            let mut issuer_ends = None;
            match self.issuer(client, mount, &name).await {
                Ok(mut certificates) => {
                    issuer_ends = peer_not_after(&certificates);
                    certificates.retain(is_self_signed);
                    fresh.roots.extend(certificates);
                }
                Err(failure) => (complete, outcome) = (false, outcome.and(Err(failure))),
            }
            if !has_key {
                continue;
            }
            match crl(client, mount, &name).await {
                Ok(Some(der)) => {
                    let read_at = clock.now();
                    let list = List {
                        der,
                        issuer_ends,
                        read_at,
                    };
                    fresh.lists.insert(name.clone(), list);
                }
                Ok(None) => {}
                Err(failure) => outcome = outcome.and(Err(failure)),
            }
            with_keys.insert(name);
        }
        fresh.keep_lists(self.lists, &with_keys, clock.now());
        if !complete {
            fresh.roots.extend(self.roots);
        }
        (fresh, outcome)
    }

    /// Keeps what was not read now of the lists of before: those of all issuers `with_keys`, and of the others, which make none any
    /// longer, the latest [`MAX_FORMER`] that outlive them.
    fn keep_lists(
        &mut self,
        mut before: BTreeMap<String, List>,
        with_keys: &BTreeSet<String>,
        now: SystemTime,
    ) {
        before.retain(|name, _| !self.lists.contains_key(name));
        let (current, mut former): (Vec<_>, Vec<_>) = before
            .into_iter()
            .partition(|(name, _)| with_keys.contains(name));
        former.retain(|(_, list)| list.outlives_its_issuer(now));
        former.sort_unstable_by_key(|(_, list)| Reverse(list.read_at));
        for (issuer, _) in former.drain(MAX_FORMER.min(former.len())..) {
            tracing::warn!(
                issuer,
                "what a former issuer of OpenBao has revoked is forgotten: there are {MAX_FORMER} later ones"
            );
        }
        self.lists.extend(current.into_iter().chain(former));
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

    /// The certificates of an issuer and of those above it, its own first.
    async fn issuer(
        &self,
        client: &Client,
        mount: &str,
        name: &str,
    ) -> Result<Vec<CertificateDer<'static>>, Failure> {
        let path = format!("{mount}/issuer/{name}/json");
        wire::issuer(&get(client, &path, MAX_JSON).await?)
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
        secret: None,
        body: None,
        max_answer,
    };
    client.call(&call).await
}

const MAX_JSON: usize = 1024 * 1024;
const MAX_CRL: usize = 16 * 1024 * 1024;
const MAX_ISSUERS: usize = 64;
/// How many lists are kept for each engine of issuers that are gone or have lost their keys.
const MAX_FORMER: usize = 16;
