//! Certificates and keys that outlast the process, in memory-backed files.
//!
//! [`KeptSource`] stands before another source. What that gives is written down; a process that starts hands it out again, once
//! for each identity and without asking anybody, so that it can serve at once and while the authority is away. Everything else
//! is as with any certificate: it is checked, renewed in the course of its remaining life, and removed when nobody needs it.
//!
//! Whoever names the directory sees to it that it is in memory and nobody else's: keys must not reach a disk.

use std::{
    collections::HashSet,
    fs::{self, DirBuilder, OpenOptions, Permissions},
    io::{self, Write as _},
    os::unix::fs::{
        DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _,
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use rustls_pki_types::CertificateDer;
use zeroize::Zeroizing;

use crate::{
    BoxFuture, Clock, KeyedChain, ObtainError, PrivateKey, Source, SpiffeId, verify::peer_not_after,
};

/// A source whose certificates outlast the process.
#[expect(missing_debug_implementations, reason = "the source may hold secrets")]
pub struct KeptSource {
    source: Arc<dyn Source>,
    directory: PathBuf,
    clock: Clock,
    /// Identities for which nothing kept is to be handed out any longer.
    done: Mutex<HashSet<SpiffeId>>,
}

impl KeptSource {
    /// Keeps what `source` gives in `directory`, which is made if it is not there.
    ///
    /// # Errors
    /// If the directory cannot be used.
    pub fn new(source: Arc<dyn Source>, directory: PathBuf) -> io::Result<Self> {
        let mut builder = DirBuilder::new();
        builder.recursive(true).mode(0o700).create(&directory)?;
        fs::set_permissions(&directory, Permissions::from_mode(0o700))?;
        Ok(Self {
            source,
            directory,
            clock: Clock::system(),
            done: Mutex::default(),
        })
    }

    /// What an earlier process held, if it can still be presented for a while. At most once for each identity.
    fn recalled(&self, id: &SpiffeId) -> Option<KeyedChain> {
        if !self.done.lock().insert(id.clone()) {
            return None;
        }
        let path = self.path(id);
        let ours = fs::metadata("/proc/self").ok()?.uid();
        let metadata = fs::symlink_metadata(&path).ok()?;
        if !metadata.is_file() || metadata.uid() != ours || metadata.mode() & 0o077 != 0 {
            return None;
        }
        let chain = decode(&Zeroizing::new(fs::read(path).ok()?))?;
        let ends = peer_not_after(&chain.chain)?;
        let left = ends.duration_since(self.clock.now()).ok()?;
        (left > WORTH_WHILE).then_some(chain)
    }

    fn path(&self, id: &SpiffeId) -> PathBuf {
        let name = id.as_str().trim_start_matches("spiffe://");
        self.directory
            .join(name.replace('%', "%25").replace('/', "%2F"))
    }
}

impl Source for KeptSource {
    fn obtain<'a>(&'a self, id: &'a SpiffeId) -> BoxFuture<'a, Result<KeyedChain, ObtainError>> {
        Box::pin(async move {
            if let Some(recalled) = self.recalled(id) {
                tracing::info!(%id, "the certificate of an earlier process is used");
                return Ok(recalled);
            }
            let chain = self.source.obtain(id).await?;
            if let Err(error) = write(&self.path(id), &encode(&chain)) {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(%id, error, "a certificate cannot be kept");
            }
            Ok(chain)
        })
    }

    fn release(&self, id: &SpiffeId) {
        self.source.release(id);
        // There may be none.
        let _ = fs::remove_file(self.path(id));
    }
}

/// Files in memory take no time worth a thread of their own.
fn write(path: &Path, content: &[u8]) -> io::Result<()> {
    let aside = path.with_extension("new");
    // What a process that was killed has left behind.
    let _ = fs::remove_file(&aside);
    let mut options = OpenOptions::new();
    let mut file = options
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&aside)?;
    file.write_all(content)?;
    fs::rename(aside, path)
}

/// Pieces, each after its tag and its length.
fn encode(chain: &KeyedChain) -> Zeroizing<Vec<u8>> {
    let key = [(KEY, chain.key.as_pkcs8_der())].into_iter();
    let certificates = chain.chain.iter().map(|one| (CERTIFICATE, one.as_ref()));
    let roots = chain.roots.iter().map(|one| (ROOT, one.as_ref()));
    let pieces = key.chain(certificates).chain(roots);
    let size = pieces.clone().map(|(_, piece)| piece.len() + 9).sum();
    // As large as it will be: growing would leave copies of the key behind.
    let mut encoded = Zeroizing::new(Vec::with_capacity(size));
    for (tag, piece) in pieces {
        encoded.push(tag);
        encoded.extend((piece.len() as u64).to_le_bytes());
        encoded.extend(piece);
    }
    encoded
}

fn decode(mut bytes: &[u8]) -> Option<KeyedChain> {
    let (mut key, mut chain, mut roots) = (None, Vec::new(), Vec::new());
    while let Some((tag, rest)) = bytes.split_first() {
        let (length, rest) = rest.split_first_chunk()?;
        let length = usize::try_from(u64::from_le_bytes(*length)).ok()?;
        let (piece, rest) = rest.split_at_checked(length)?;
        let certificate = || CertificateDer::from(piece.to_vec());
        match *tag {
            KEY => key = Some(PrivateKey::from_pkcs8_der(piece.to_vec())),
            CERTIFICATE => chain.push(certificate()),
            ROOT => roots.push(certificate()),
            _ => return None,
        }
        bytes = rest;
    }
    Some(KeyedChain::new(key?, chain, roots))
}

const KEY: u8 = b'k';
const CERTIFICATE: u8 = b'c';
const ROOT: u8 = b'r';
/// A certificate that ends sooner is not worth handing out.
const WORTH_WHILE: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{CsrSource, InProcessCa, Retry};

    struct Away;

    impl Source for Away {
        fn obtain<'a>(&'a self, _: &'a SpiffeId) -> BoxFuture<'a, Result<KeyedChain, ObtainError>> {
            Box::pin(async { Err(ObtainError::refused("away", Retry::Soon)) })
        }
    }

    fn source(lifetime: Duration) -> Arc<dyn Source> {
        let ca = InProcessCa::random().unwrap().with_lifetime(lifetime);
        Arc::new(CsrSource::new(ca))
    }

    fn id() -> SpiffeId {
        "spiffe://td/ns/n/sa/a".parse().unwrap()
    }

    async fn kept(lifetime: Duration) -> (tempfile::TempDir, KeyedChain) {
        let directory = tempfile::tempdir().unwrap();
        let source = KeptSource::new(source(lifetime), directory.path().to_owned()).unwrap();
        let chain = source.obtain(&id()).await.unwrap();
        (directory, chain)
    }

    #[tokio::test]
    async fn the_next_process_gets_it_once_while_the_authority_is_away() {
        let (directory, first) = kept(Duration::from_secs(3600)).await;
        let file = fs::read_dir(directory.path())
            .unwrap()
            .next()
            .unwrap()
            .unwrap();
        assert_eq!(file.metadata().unwrap().mode() & 0o777, 0o600);
        let next = KeptSource::new(Arc::new(Away), directory.path().to_owned()).unwrap();
        let again = next.obtain(&id()).await.unwrap();
        assert_eq!((&again.chain, &again.roots), (&first.chain, &first.roots));
        assert_eq!(again.key.as_pkcs8_der(), first.key.as_pkcs8_der());
        assert!(next.obtain(&id()).await.is_err(), "a renewal is a new one");
        next.release(&id());
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn what_is_damaged_exposed_or_about_to_end_is_not_used() {
        let path = |directory: &tempfile::TempDir| {
            let mut files = fs::read_dir(directory.path()).unwrap();
            files.next().unwrap().unwrap().path()
        };
        let recalled = async |directory: &tempfile::TempDir| {
            let next = KeptSource::new(Arc::new(Away), directory.path().to_owned()).unwrap();
            next.obtain(&id()).await.is_ok()
        };
        let (directory, _) = kept(Duration::from_secs(5)).await;
        assert!(!recalled(&directory).await, "about to end");
        let (directory, _) = kept(Duration::from_secs(3600)).await;
        let whole = fs::read(path(&directory)).unwrap();
        fs::write(path(&directory), &whole[..whole.len() - 1]).unwrap();
        assert!(!recalled(&directory).await, "cut off");
        fs::write(path(&directory), &whole).unwrap();
        assert!(recalled(&directory).await);
        fs::set_permissions(path(&directory), Permissions::from_mode(0o644)).unwrap();
        assert!(!recalled(&directory).await, "readable by others");
    }
}
