//! Certificates and keys that outlast the process, in memory-backed files.
//!
//! [`KeptSource`] stands before another source. What that gives is written down; a process that starts hands it out again, once
//! for each identity and without asking anybody, so that it can serve at once and while the authority is away. It is then
//! checked as any answer is, and its root must not have left the trust bundle meanwhile; it is renewed in the course of its
//! remaining life, or at once if it is revoked, and its file goes when nobody needs the identity or the certificate has ended.
//!
//! Whoever names the directory sees to it that it is in memory and that others cannot write there: keys must not reach a disk.

use std::{
    collections::HashSet,
    ffi::OsStr,
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    process,
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use rustls_pki_types::CertificateDer;
use tokio::time::Instant;
use zeroize::Zeroizing;

use crate::{
    BoxFuture, Clock, KeyedChain, ObtainError, Origin, PrivateKey, SanRule, Source, SpiffeId,
    TlsOptions, TrustBundle, check::check_chain, verify::peer_not_after,
};

/// A source whose certificates outlast the process.
#[expect(missing_debug_implementations, reason = "the source may hold secrets")]
pub struct KeptSource {
    source: Arc<dyn Source>,
    directory: PathBuf,
    trust: TrustBundle,
    clock: Clock,
    /// Who we are to the file system.
    uid: u32,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Identities for which nothing kept is to be handed out any longer.
    done: HashSet<SpiffeId>,
    swept: Option<Instant>,
}

impl KeptSource {
    /// Keeps what `source` gives in `directory`, which is made if it is not there. What an earlier process kept is not used if its
    /// root was one that the sources of `trust` named, and is none any longer.
    ///
    /// # Errors
    /// If nothing can be written there.
    pub fn new(
        source: Arc<dyn Source>,
        directory: PathBuf,
        trust: TrustBundle,
    ) -> io::Result<Self> {
        let mut builder = DirBuilder::new();
        builder.recursive(true).mode(0o700).create(&directory)?;
        let probe = directory.join(format!("{}.{EXTENSION}", process::id()));
        let uid = fresh_file(&probe)?.metadata()?.uid();
        fs::remove_file(probe)?;
        Ok(Self {
            source,
            directory,
            trust,
            clock: Clock::system(),
            uid,
            state: Mutex::default(),
        })
    }

    /// What an earlier process held, if it can still be presented for a while. At most once for each identity.
    fn recalled(&self, id: &SpiffeId) -> Option<KeyedChain> {
        if !self.state.lock().done.insert(id.clone()) {
            return None;
        }
        let chain = self.read(&self.path(id))?;
        let (provider, now) = (TlsOptions::default().provider(), self.clock.now());
        // The agent has the last word on the name, which a proxy of one workload is given.
        let (rule, certificates) = (SanRule::Any, chain.chain.clone());
        match check_chain(id, rule, certificates, &chain.roots, (&provider, now)) {
            Ok(checked) if checked.not_after > now + WORTH_WHILE => Some(KeyedChain {
                origin: Origin::Kept,
                ..chain
            }),
            Ok(_) => None,
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                tracing::info!(%id, error, "the certificate of an earlier process is not used");
                None
            }
        }
    }

    /// Writes to the file of `id`, at once and as a whole.
    fn keep(&self, id: &SpiffeId, chain: &KeyedChain) -> io::Result<()> {
        // Another process, the predecessor in an upgrade, may write the same.
        let aside = self.aside(id);
        let written = fresh_file(&aside)
            .and_then(|mut file| file.write_all(&encode(chain, &self.trust)))
            .and_then(|()| fs::rename(&aside, self.path(id)));
        if written.is_err() {
            let _ = fs::remove_file(aside);
        }
        written
    }

    /// Removes what cannot be used any longer, now and then: nobody else does for identities that are needed no more.
    fn sweep(&self) {
        let now = Instant::now();
        let mut state = self.state.lock();
        if state.swept.is_some_and(|last| now < last + SWEEP_INTERVAL) {
            return;
        }
        state.swept = Some(now);
        drop(state);
        let Ok(files) = fs::read_dir(&self.directory) else {
            return;
        };
        let paths = files.flatten().map(|file| file.path());
        let extensions = [EXTENSION, ASIDE_EXTENSION].map(|it| Some(OsStr::new(it)));
        for path in paths.filter(|path| extensions.contains(&path.extension())) {
            let ends = self
                .read(&path)
                .and_then(|chain| peer_not_after(&chain.chain));
            if ends.is_none_or(|ends| ends <= self.clock.now()) {
                let _ = fs::remove_file(path);
            }
        }
    }

    /// What a file holds. One that others could read, or have written, counts for nothing.
    fn read(&self, path: &Path) -> Option<KeyedChain> {
        let mut file = File::open(path).ok()?;
        let metadata = file.metadata().ok()?;
        if !metadata.is_file() || metadata.uid() != self.uid || metadata.mode() & 0o077 != 0 {
            return None;
        }
        let size = usize::try_from(metadata.len()).ok()?;
        // As large as it will be: growing would leave copies of the key behind.
        let mut content = Zeroizing::new(vec![0; size.min(MOST_BYTES)]);
        file.read_exact(&mut content).ok()?;
        decode(&content, &self.trust)
    }

    /// The file of `id`.
    fn path(&self, id: &SpiffeId) -> PathBuf {
        let name = id.as_str().trim_start_matches("spiffe://");
        let name = name.replace('%', "%25").replace('/', "%2F");
        self.directory.join(format!("{name}.{EXTENSION}"))
    }

    /// What this process writes before it takes the place of the file of `id`, whose name no identity's file can have.
    fn aside(&self, id: &SpiffeId) -> PathBuf {
        let extension = format!("{}.{ASIDE_EXTENSION}", process::id());
        self.path(id).with_extension(extension)
    }
}

impl Source for KeptSource {
    fn obtain<'a>(&'a self, id: &'a SpiffeId) -> BoxFuture<'a, Result<KeyedChain, ObtainError>> {
        // Files in memory take no time worth a thread of their own.
        Box::pin(async move {
            self.sweep();
            if let Some(recalled) = self.recalled(id) {
                tracing::info!(%id, "the certificate of an earlier process is used");
                return Ok(recalled);
            }
            let chain = self.source.obtain(id).await?;
            if let Err(error) = self.keep(id, &chain) {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(%id, error, "a certificate cannot be kept");
            }
            Ok(chain)
        })
    }

    fn release(&self, id: &SpiffeId) {
        self.source.release(id);
        self.state.lock().done.remove(id);
        // There may be none.
        let _ = fs::remove_file(self.path(id));
    }
}

/// A new file for us alone, in place of what a process of the same number may have left behind.
fn fresh_file(path: &Path) -> io::Result<File> {
    let _ = fs::remove_file(path);
    let mut options = OpenOptions::new();
    options.write(true).create_new(true).mode(0o600).open(path)
}

/// Pieces, each after its tag and its length.
fn encode(chain: &KeyedChain, trust: &TrustBundle) -> Zeroizing<Vec<u8>> {
    let key = [(KEY, chain.key.as_pkcs8_der())].into_iter();
    let certificates = chain.chain.iter().map(|one| (CERTIFICATE, one.as_ref()));
    let roots = chain.roots.iter().map(|one| {
        let named = trust.names(one) == Some(true);
        (if named { NAMED_ROOT } else { ROOT }, one.as_ref())
    });
    let pieces = key.chain(certificates).chain(roots);
    let size = pieces.clone().map(|(_, piece)| piece.len() + 9).sum();
    // As large as it will be, for the same reason.
    let mut encoded = Zeroizing::new(Vec::with_capacity(size));
    for (tag, piece) in pieces {
        encoded.push(tag);
        encoded.extend(u64::try_from(piece.len()).unwrap_or(u64::MAX).to_le_bytes());
        encoded.extend(piece);
    }
    encoded
}

/// The roots are those that may still be trusted.
fn decode(mut bytes: &[u8], trust: &TrustBundle) -> Option<KeyedChain> {
    let (mut key, mut chain, mut roots) = (None, Vec::new(), Vec::new());
    while let Some((tag, rest)) = bytes.split_first() {
        let (length, rest) = rest.split_first_chunk()?;
        let length = usize::try_from(u64::from_le_bytes(*length)).ok()?;
        let (piece, rest) = rest.split_at_checked(length)?;
        let certificate = || CertificateDer::from(piece.to_vec());
        match *tag {
            KEY => key = Some(PrivateKey::from_pkcs8_der(piece.to_vec())),
            CERTIFICATE => chain.push(certificate()),
            NAMED_ROOT if trust.names(&certificate()) == Some(false) => {}
            ROOT | NAMED_ROOT => roots.push(certificate()),
            _ => return None,
        }
        bytes = rest;
    }
    Some(KeyedChain::new(key?, chain, roots))
}

/// Reads what anybody may have written, and what is written of that.
#[cfg(any(test, fuzzing))]
pub(crate) fn reread(bytes: &[u8]) {
    let trust = TrustBundle::default();
    let Some(chain) = decode(bytes, &trust) else {
        return;
    };
    let again = decode(&encode(&chain, &trust), &trust);
    let parts = |chain: KeyedChain| (chain.key.as_pkcs8_der().to_vec(), chain.chain, chain.roots);
    assert_eq!(again.map(parts), Some(parts(chain)));
}

/// Only files of these two kinds are ours.
const EXTENSION: &str = "svid";
const ASIDE_EXTENSION: &str = "aside";
const KEY: u8 = b'k';
const CERTIFICATE: u8 = b'c';
const ROOT: u8 = b'r';
/// A root that came with the certificate and was in the trust bundle as well.
const NAMED_ROOT: u8 = b'n';
/// More than any chain that is accepted has.
const MOST_BYTES: usize = 1024 * 1024;
/// A certificate that ends sooner is not worth handing out.
const WORTH_WHILE: Duration = Duration::from_secs(10);
const SWEEP_INTERVAL: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests;
