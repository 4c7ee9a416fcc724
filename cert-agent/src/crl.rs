//! Revocation: which certificates of peers count no longer, at their next handshake and while a tunnel lives.
//!
//! A certificate is revoked if a list that its own issuer has signed names it. The lists of an issuer that nobody has
//! given us say nothing, and one past its time still counts: a missing update must not take a mesh down. What a list says
//! is looked up by serial first, and proven by signature only if it names one: a handshake costs a lookup, however long
//! the lists are.

mod list;
mod track;

use std::{
    fmt,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use parking_lot::RwLock;
use tokio::{sync::watch, task::spawn_blocking};
use webpki::CertRevocationList;

use crate::{
    chain::{Chain, Side, Terms},
    file::WatchedFile,
};
pub use list::CrlError;
use list::{List, listed, parse, parse_each, revokes};
pub use track::{Standing, Tracked, Tracker};

/// The revocation lists in force. Clones share them.
///
/// [`off`](Self::off) checks nothing and costs nothing. Once [`armed`](Self::armed), it stays so, whatever becomes of
/// its sources: they are fed by [`update`](Self::update), or by the future [`follow_file`](Self::follow_file), which the
/// caller owns.
#[derive(Clone, Default)]
pub struct Revocations(Option<Arc<Shared>>);

#[derive(Default)]
struct Shared {
    /// By source.
    held: RwLock<Vec<(&'static str, Lists)>>,
    /// Counts changes.
    generation: watch::Sender<u64>,
    counts: Counts,
}

type Lists = Arc<[List]>;

#[derive(Default)]
struct Counts {
    updates: AtomicU64,
    failures: AtomicU64,
    rejections: PerSide,
    untracked: PerSide,
}

/// A count for each side that we may be on.
#[derive(Default)]
struct PerSide {
    client: AtomicU64,
    server: AtomicU64,
}

impl PerSide {
    fn of(&self, side: Side) -> &AtomicU64 {
        match side {
            Side::Client => &self.client,
            Side::Server => &self.server,
        }
    }
}

impl Revocations {
    /// Never finds anything revoked.
    #[must_use]
    pub fn off() -> Self {
        Self(None)
    }

    /// Checks every handshake. No list yet, so nothing is revoked.
    #[must_use]
    pub fn armed() -> Self {
        Self(Some(Arc::default()))
    }

    /// Whether handshakes are checked.
    #[must_use]
    pub fn is_armed(&self) -> bool {
        self.0.is_some()
    }

    /// Replaces the lists of `source`: PEM with any number of `X509 CRL` blocks, or one in DER; nothing at all means
    /// that nothing is revoked. Returns how many lists it has.
    ///
    /// # Errors
    /// If any list is unusable: those of the source stay what they were.
    pub fn update(&self, source: &'static str, content: &[u8]) -> Result<usize, CrlError> {
        let lists = parse(content);
        self.take(source, lists)
    }

    /// Takes over the lists in `lists`, each in DER, now and each time it changes. If any is unusable, those before stay.
    /// Ends when the sender is gone; the last lists stay.
    ///
    /// # Cancel safety
    /// Nothing is lost.
    pub async fn follow(&self, source: &'static str, mut lists: watch::Receiver<Arc<[Vec<u8>]>>) {
        loop {
            let now = Arc::clone(&lists.borrow_and_update());
            let Ok(parsed) = spawn_blocking(move || parse_each(&now)).await else {
                return;
            };
            if let Err(error) = self.take(source, parsed) {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(
                    source,
                    error,
                    "the certificate revocation lists stay as they were"
                );
            }
            if lists.changed().await.is_err() {
                return;
            }
        }
    }

    /// Takes over the lists of a file now and each time it changes, also by a swap of symbolic links. A file that is
    /// not usable changes nothing, and one that is missing is awaited. Never ends by itself.
    ///
    /// # Cancel safety
    /// Nothing is lost.
    pub async fn follow_file(&self, source: &'static str, path: PathBuf) {
        let mut file = WatchedFile::new(path);
        loop {
            let lists = match file.changed().await {
                Ok(content) => match spawn_blocking(move || parse(&content)).await {
                    Ok(lists) => lists,
                    // The runtime is ending.
                    Err(_) => return std::future::pending().await,
                },
                Err(error) => Err(CrlError::Read(error)),
            };
            if let Err(error) = self.take(source, lists) {
                let (error, path) = (&error as &dyn std::error::Error, file.path().display());
                tracing::warn!(
                    source,
                    %path,
                    error,
                    "the certificate revocation lists stay as they were; the file is looked at again"
                );
            }
        }
    }

    /// Rung after each change of the lists; `None` when off.
    #[must_use]
    pub fn changes(&self) -> Option<watch::Receiver<u64>> {
        Some(self.0.as_ref()?.generation.subscribe())
    }

    /// What was loaded and what it led to; `None` when off.
    #[must_use]
    pub fn status(&self) -> Option<RevocationStatus> {
        let shared = self.0.as_ref()?;
        let held = shared.held.read();
        let lists = || held.iter().flat_map(|(_, lists)| lists.iter());
        let count = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let sides = |sides: &PerSide| SideCounts {
            source: count(&sides.client),
            destination: count(&sides.server),
        };
        Some(RevocationStatus {
            lists: lists().count(),
            revoked: lists().map(List::len).sum(),
            updates: count(&shared.counts.updates),
            failures: count(&shared.counts.failures),
            rejections: sides(&shared.counts.rejections),
            untracked: sides(&shared.counts.untracked),
        })
    }

    /// Whether `chain` leads to an anchor and nothing on its way is revoked.
    pub(crate) fn verify(&self, chain: Chain<'_>, terms: &Terms<'_>) -> Result<(), webpki::Error> {
        chain.verify(terms, None)?;
        if self.revokes(chain, terms) {
            self.count(terms.side, |counts| &counts.rejections);
            return Err(webpki::Error::CertRevoked);
        }
        Ok(())
    }

    /// Whether a list names a certificate of `chain`, whoever signed the list.
    fn may_revoke(&self, chain: Chain<'_>) -> bool {
        self.with_listed(chain, |lists| !lists.is_empty())
    }

    /// Whether a list revokes a certificate of `chain`, as of the time of `terms`.
    fn revokes(&self, chain: Chain<'_>, terms: &Terms<'_>) -> bool {
        self.with_listed(chain, |lists| {
            !lists.is_empty() && revokes(lists, chain, terms)
        })
    }

    fn with_listed(
        &self,
        chain: Chain<'_>,
        judge: impl FnOnce(&[&CertRevocationList<'static>]) -> bool,
    ) -> bool {
        let Some(shared) = &self.0 else {
            return false;
        };
        let held: Vec<Lists> = shared
            .held
            .read()
            .iter()
            .map(|it| Arc::clone(&it.1))
            .collect();
        judge(&listed(held.iter().flat_map(|lists| lists.iter()), chain))
    }

    fn take(
        &self,
        source: &'static str,
        lists: Result<Lists, CrlError>,
    ) -> Result<usize, CrlError> {
        let Some(shared) = &self.0 else {
            return Ok(0);
        };
        let lists = lists.inspect_err(|_| {
            shared.counts.failures.fetch_add(1, Ordering::Relaxed);
        })?;
        let count = lists.len();
        let revoked: usize = lists.iter().map(List::len).sum();
        let mut held = shared.held.write();
        match held.iter_mut().find(|(name, _)| *name == source) {
            Some((_, before)) => *before = lists,
            None => held.push((source, lists)),
        }
        drop(held);
        shared.counts.updates.fetch_add(1, Ordering::Relaxed);
        tracing::info!(
            source,
            lists = count,
            revoked,
            "certificate revocation lists loaded"
        );
        shared.generation.send_modify(|generation| *generation += 1);
        Ok(count)
    }

    fn count(&self, side: Side, which: impl FnOnce(&Counts) -> &PerSide) {
        if let Some(shared) = &self.0 {
            which(&shared.counts)
                .of(side)
                .fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl fmt::Debug for Revocations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Revocations").field(&self.status()).finish()
    }
}

/// What was loaded and what it led to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct RevocationStatus {
    /// Lists in force.
    pub lists: usize,
    /// Certificates that they name.
    pub revoked: usize,
    /// How often a source was taken over.
    pub updates: u64,
    /// How often one was not usable.
    pub failures: u64,
    /// Handshakes refused and tunnels cut because of a list.
    pub rejections: SideCounts,
    /// Tunnels that cannot be checked again.
    pub untracked: SideCounts,
}

/// A count by the side that we were on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct SideCounts {
    /// Where we dialled.
    pub source: u64,
    /// Where we accepted.
    pub destination: u64,
}

#[cfg(test)]
mod tests;
