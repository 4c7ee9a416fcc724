//! Whom to trust, apart from who issues: the roots that peers are verified against.
//!
//! For each identity these are the roots that came with its own certificate, and those of further sources that all
//! identities share: a file, an authority's issuers. A root that any of them names is trusted at once, without a new
//! certificate; one that none names any longer is trusted for a while more, since peers get their new certificates at
//! times of their own. Nothing here asks for certificates or touches connections: a change is found by the next
//! handshake.

use std::{
    collections::HashMap,
    fmt, fs, io,
    path::{Path, PathBuf},
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use parking_lot::{Mutex, RwLock};
use rustls::pki_types::{CertificateDer, pem::PemObject};
use tokio::{sync::watch, time::Instant};

use crate::{
    SpiffeId,
    anchors::{Aging, Anchors, Pool, Roots, is_usable},
    file::WatchedFile,
};

/// The trust anchors of this process. Clones share them.
///
/// Sources are fed by [`update`](Self::update), or by one of the futures [`follow`](Self::follow) and
/// [`follow_file`](Self::follow_file), which the caller owns.
#[derive(Clone)]
pub struct TrustBundle(Arc<Shared>);

struct Shared {
    /// For how long a root that its source names no longer is trusted.
    grace: Duration,
    sources: RwLock<Vec<Source>>,
    /// Counts changes of the sources.
    generation: AtomicU64,
    pool: Pool,
    identities: Mutex<HashMap<SpiffeId, Weak<IdentityTrust>>>,
}

struct Source {
    name: &'static str,
    roots: Aging,
    updates: u64,
    failures: u64,
}

impl TrustBundle {
    /// A bundle without further sources. A root stays trusted for `grace` after its last source has dropped it.
    #[must_use]
    pub fn new(grace: Duration) -> Self {
        Self(Arc::new(Shared {
            grace,
            sources: RwLock::default(),
            generation: AtomicU64::new(0),
            pool: Pool::default(),
            identities: Mutex::default(),
        }))
    }

    /// Trusts what `source` names now besides what others name. Certificates that cannot be trust anchors are
    /// skipped. Returns how many are in force.
    ///
    /// # Errors
    /// If none is usable: the roots of the source stay what they were.
    pub fn update(
        &self,
        source: &'static str,
        roots: &[CertificateDer<'static>],
    ) -> Result<usize, BundleError> {
        let usable: Vec<_> = roots.iter().filter(|it| is_usable(it)).cloned().collect();
        let skipped = roots.len() - usable.len();
        if usable.is_empty() {
            self.failed(source);
            return Err(BundleError::NoRoots { skipped });
        }
        if skipped > 0 {
            tracing::warn!(source, skipped, "unusable root certificates were skipped");
        }
        let count = usable.len();
        let list = self.0.pool.list(&usable);
        self.with_source(source, |held| {
            held.updates += 1;
            let changed = held.roots.replace(list, Instant::now(), self.0.grace);
            if changed {
                // Within the lock: whoever reads the new count reads the new roots.
                self.0.generation.fetch_add(1, Ordering::Release);
                tracing::info!(source, roots = count, "trust anchors changed");
            }
        });
        Ok(count)
    }

    /// Takes over what `roots` holds now and each time it changes. Empty lists change nothing. Ends when the sender
    /// is gone; the last roots stay.
    ///
    /// # Cancel safety
    /// Nothing is lost.
    pub async fn follow(
        &self,
        source: &'static str,
        mut roots: watch::Receiver<Arc<[CertificateDer<'static>]>>,
    ) {
        loop {
            let now = Arc::clone(&roots.borrow_and_update());
            if !now.is_empty()
                && let Err(error) = self.update(source, &now)
            {
                tracing::warn!(source, %error, "the trust anchors stay as they were");
            }
            if roots.changed().await.is_err() {
                return;
            }
        }
    }

    /// Takes over the certificates of a PEM file now and each time it changes, also by a swap of symbolic links. A
    /// file without usable certificates changes nothing, and one that is missing is awaited. Never ends by itself.
    ///
    /// # Cancel safety
    /// Nothing is lost.
    pub async fn follow_file(&self, source: &'static str, path: PathBuf) {
        let mut file = WatchedFile::new(path);
        loop {
            let content = file.changed().await;
            if let Err(error) = self.take(source, content) {
                let (error, path) = (&error as &dyn std::error::Error, file.path().display());
                tracing::warn!(source, %path, error, "the trust anchors stay as they were");
            }
        }
    }

    /// Takes over the certificates of a PEM file as it is now, for what happens before [`follow_file`](Self::follow_file) gets to
    /// it. Blocks while it reads.
    ///
    /// # Errors
    /// If there is nothing usable: the roots of the source stay what they were.
    pub fn load_file(&self, source: &'static str, path: &Path) -> Result<usize, BundleError> {
        self.take(source, fs::read(path))
    }

    fn take(
        &self,
        source: &'static str,
        content: io::Result<Vec<u8>>,
    ) -> Result<usize, BundleError> {
        let content = content.map_err(BundleError::Read);
        let roots = content.and_then(|content| certificates(&content));
        match roots {
            Ok(roots) => self.update(source, &roots),
            Err(error) => {
                self.failed(source);
                Err(error)
            }
        }
    }

    /// What each source names, sorted by name.
    #[must_use]
    pub fn sources(&self) -> Vec<RootSourceStatus> {
        let now = Instant::now();
        let sources = self.0.sources.read();
        let mut told: Vec<_> = sources
            .iter()
            .map(|source| {
                let (roots, leaving) = source.roots.counts(now);
                RootSourceStatus {
                    source: source.name,
                    named: source.roots.named(),
                    roots,
                    leaving,
                    updates: source.updates,
                    failures: source.failures,
                }
            })
            .collect();
        told.sort_unstable_by_key(|status| status.source);
        told
    }

    /// Notes the roots that came with a new certificate of `id`.
    pub(crate) fn answered(
        &self,
        id: &SpiffeId,
        roots: &[CertificateDer<'static>],
    ) -> Arc<IdentityTrust> {
        let mut identities = self.0.identities.lock();
        identities.retain(|_, held| held.strong_count() > 0);
        let known = identities.get(id).and_then(Weak::upgrade);
        let trust = known.unwrap_or_else(|| {
            let trust = Arc::new(IdentityTrust::new(self.clone()));
            identities.insert(id.clone(), Arc::downgrade(&trust));
            trust
        });
        drop(identities);
        trust.renew(self.0.pool.list(roots));
        trust
    }

    pub(crate) fn list(&self, roots: &[CertificateDer<'static>]) -> Roots {
        self.0.pool.list(roots)
    }

    /// Whether a source names `root` now, or did until a moment ago; `None` if none has named any yet.
    pub(crate) fn names(&self, root: &CertificateDer<'_>) -> Option<bool> {
        let (sources, now) = (self.0.sources.read(), Instant::now());
        let mut named = sources.iter().flat_map(|source| source.roots.trusted(now));
        let first = named.next()?;
        Some(first == root || named.any(|named| named == root))
    }

    fn failed(&self, source: &'static str) {
        self.with_source(source, |held| held.failures += 1);
    }

    fn with_source(&self, name: &'static str, change: impl FnOnce(&mut Source)) {
        let mut sources = self.0.sources.write();
        if let Some(held) = sources.iter_mut().find(|held| held.name == name) {
            return change(held);
        }
        let mut new = Source {
            name,
            roots: Aging::default(),
            updates: 0,
            failures: 0,
        };
        change(&mut new);
        sources.push(new);
    }

    fn generation(&self) -> u64 {
        self.0.generation.load(Ordering::Acquire)
    }
}

impl Default for TrustBundle {
    /// A grace of one hour: time for files and certificates to follow each other through a mesh.
    fn default() -> Self {
        Self::new(Duration::from_secs(60 * 60))
    }
}

impl fmt::Debug for TrustBundle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TrustBundle")
            .field("sources", &self.sources())
            .finish_non_exhaustive()
    }
}

/// What one source of roots names.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct RootSourceStatus {
    /// The source.
    pub source: &'static str,
    /// Roots that it names, in DER.
    pub named: Arc<[CertificateDer<'static>]>,
    /// How many these are.
    pub roots: usize,
    /// Roots that it names no longer, but that are trusted for a while more.
    pub leaving: usize,
    /// How often it was taken over.
    pub updates: u64,
    /// How often it was not usable.
    pub failures: u64,
}

/// Why the roots of a source stay what they were.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BundleError {
    /// The file cannot be read.
    #[error("the file of trust anchors cannot be read")]
    Read(#[source] io::Error),
    /// The file is not PEM.
    #[error("the file of trust anchors is not PEM")]
    Pem(#[source] rustls::pki_types::pem::Error),
    /// Nothing in it can be a trust anchor.
    #[error("there is no usable root certificate ({skipped} unusable)")]
    NoRoots {
        /// Certificates that are there, but cannot be trust anchors.
        skipped: usize,
    },
}

fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, BundleError> {
    CertificateDer::pem_slice_iter(pem)
        .collect::<Result<_, _>>()
        .map_err(BundleError::Pem)
}

/// Whom one identity trusts. The certificates of an identity that follow each other share it.
#[derive(Debug)]
pub(crate) struct IdentityTrust {
    bundle: TrustBundle,
    own: Mutex<Own>,
}

#[derive(Debug, Default)]
struct Own {
    roots: Aging,
    union: Option<Union>,
}

/// A union and how long it holds.
#[derive(Debug)]
struct Union {
    anchors: Arc<Anchors>,
    generation: u64,
    until: Option<Instant>,
}

impl IdentityTrust {
    fn new(bundle: TrustBundle) -> Self {
        Self {
            bundle,
            own: Mutex::default(),
        }
    }

    fn renew(&self, roots: Roots) {
        let mut own = self.own.lock();
        let grace = self.bundle.0.grace;
        if own.roots.replace(roots, Instant::now(), grace) {
            own.union = None;
        }
    }

    /// All roots that count now. The same as before unless something has changed.
    pub(crate) fn anchors(&self) -> Arc<Anchors> {
        let now = Instant::now();
        // Read before the roots: a change in between shows at the next call.
        let generation = self.bundle.generation();
        let mut own = self.own.lock();
        if let Some(union) = &own.union
            && union.generation == generation
            && union.until.is_none_or(|until| now < until)
        {
            return Arc::clone(&union.anchors);
        }
        let sources = self.bundle.0.sources.read();
        let all = || std::iter::once(&own.roots).chain(sources.iter().map(|it| &it.roots));
        let anchors = self
            .bundle
            .0
            .pool
            .anchors(all().flat_map(|roots| roots.trusted(now)));
        let until = all().filter_map(|roots| roots.next_end(now)).min();
        drop(sources);
        own.union = Some(Union {
            anchors: Arc::clone(&anchors),
            generation,
            until,
        });
        anchors
    }
}

#[cfg(test)]
mod tests;
