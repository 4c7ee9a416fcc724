use std::{fs::Permissions, os::unix::fs::PermissionsExt as _};

use tempfile::TempDir;

use super::*;
use crate::{CsrSource, InProcessCa, Retry, testing::Authority};

struct Away;

impl Source for Away {
    fn obtain<'a>(&'a self, _: &'a SpiffeId) -> BoxFuture<'a, Result<KeyedChain, ObtainError>> {
        Box::pin(async { Err(ObtainError::refused("away", Retry::Soon)) })
    }
}

fn authority(lifetime: Duration) -> InProcessCa {
    InProcessCa::random().unwrap().with_lifetime(lifetime)
}

fn keeping(directory: &TempDir, source: impl Source + 'static) -> KeptSource {
    let trust = TrustBundle::default();
    KeptSource::new(Arc::new(source), directory.path().to_owned(), trust).unwrap()
}

fn id(account: &str) -> SpiffeId {
    format!("spiffe://td.x/ns/n.y/sa/{account}")
        .parse()
        .unwrap()
}

/// A directory with the certificate of `web`, and what it is.
async fn kept(lifetime: Duration) -> (TempDir, KeyedChain) {
    let directory = tempfile::tempdir().unwrap();
    let source = keeping(&directory, CsrSource::new(authority(lifetime)));
    let chain = source.obtain(&id("web")).await.unwrap();
    (directory, chain)
}

async fn is_recalled(directory: &TempDir) -> bool {
    let next = keeping(directory, Away);
    next.obtain(&id("web")).await.is_ok()
}

fn files(directory: &TempDir) -> Vec<PathBuf> {
    let files = fs::read_dir(directory.path()).unwrap();
    files.map(|file| file.unwrap().path()).collect()
}

#[tokio::test]
async fn the_next_process_gets_it_once_while_the_authority_is_away() {
    let (directory, first) = kept(HOUR).await;
    let [file] = &files(&directory)[..] else {
        panic!("one file")
    };
    assert_eq!(file.metadata().unwrap().mode() & 0o777, 0o600);
    let next = keeping(&directory, Away);
    let again = next.obtain(&id("web")).await.unwrap();
    assert_eq!((&again.chain, &again.roots), (&first.chain, &first.roots));
    assert_eq!(again.key.as_pkcs8_der(), first.key.as_pkcs8_der());
    assert!(next.obtain(&id("web")).await.is_err(), "a renewal is new");
    next.release(&id("web"));
    assert_eq!(files(&directory).len(), 0);
}

#[tokio::test]
async fn a_renewal_takes_the_place_of_what_was_kept() {
    let (directory, first) = kept(HOUR).await;
    let renewing = keeping(&directory, CsrSource::new(authority(HOUR)));
    renewing.obtain(&id("web")).await.unwrap();
    let second = renewing.obtain(&id("web")).await.unwrap();
    assert_ne!(second.chain, first.chain);
    renewing.obtain(&id("api")).await.unwrap();
    assert_eq!(files(&directory).len(), 2);
    let last = keeping(&directory, Away).obtain(&id("web")).await.unwrap();
    assert_eq!(last.chain, second.chain);
}

#[tokio::test]
async fn what_is_damaged_exposed_or_about_to_end_is_not_used() {
    let (directory, _) = kept(Duration::from_secs(5)).await;
    assert!(!is_recalled(&directory).await, "about to end");
    let (directory, _) = kept(HOUR).await;
    let path = files(&directory).remove(0);
    let whole = fs::read(&path).unwrap();
    fs::write(&path, &whole[..whole.len() - 1]).unwrap();
    let next = keeping(&directory, Away);
    assert!(next.recalled(&id("web")).is_none(), "cut off");
    fs::write(&path, &whole).unwrap();
    assert!(is_recalled(&directory).await);
    fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
    assert!(!is_recalled(&directory).await, "readable by others");
}

#[tokio::test(start_paused = true)]
async fn what_is_being_written_is_the_file_of_no_other_identity() {
    let (directory, _) = kept(HOUR).await;
    let other = id(&format!("web.{}", process::id()));
    let source = keeping(&directory, CsrSource::new(authority(HOUR)));
    source.obtain(&other).await.unwrap();
    let again = source.source.obtain(&id("web")).await.unwrap();
    source.keep(&id("web"), &again).unwrap();
    let next = keeping(&directory, Away);
    assert!(next.recalled(&other).is_some());
    assert!(next.recalled(&id("web")).is_some());
    // A process that came down while it wrote leaves its part to others.
    fs::write(next.aside(&id("web")), "cut off").unwrap();
    next.sweep();
    assert_eq!(files(&directory).len(), 2);
}

#[tokio::test]
async fn a_root_that_has_left_the_bundle_counts_no_longer() {
    let [old, new] = ["old", "new"].map(Authority::new);
    let directory = tempfile::tempdir().unwrap();
    let mut chain = old.issue(id("web").as_str());
    chain.roots.push(new.root());
    let naming = |named: &[CertificateDer<'static>]| {
        let process = keeping(&directory, Away);
        if !named.is_empty() {
            process.trust.update("file", named).unwrap();
        }
        process
    };
    let recalled = |named: &[_]| naming(named).recalled(&id("web"));
    let both = [old.root(), new.root()];

    naming(&both).keep(&id("web"), &chain).unwrap();
    assert!(recalled(&[new.root()]).is_none(), "the old root has gone");
    let used = recalled(&[old.root()]).unwrap();
    assert_eq!(used.roots, [old.root()], "no other is trusted for it");
    for named in [&both[..], &[]] {
        assert_eq!(recalled(named).unwrap().roots, both, "none has gone");
    }
    // A bundle that is about something else tells nothing of the authority's roots.
    let other = Authority::new("other").root();
    naming(std::slice::from_ref(&other))
        .keep(&id("web"), &chain)
        .unwrap();
    assert_eq!(recalled(&[other]).unwrap().roots, both);
}

#[tokio::test(start_paused = true)]
async fn what_nobody_asks_for_goes_when_it_has_ended() {
    let (directory, _) = kept(HOUR).await;
    let other = directory.path().join("not of ours");
    fs::write(&other, "x").unwrap();
    let mut next = keeping(&directory, CsrSource::new(authority(2 * HOUR)));
    next.clock = crate::testing::paused_clock();
    next.obtain(&id("api")).await.unwrap();
    assert_eq!(files(&directory).len(), 3, "it has not ended");
    tokio::time::sleep(HOUR).await;
    next.obtain(&id("api")).await.unwrap();
    let mut left = files(&directory);
    left.sort_unstable();
    assert_eq!(left, [other, next.path(&id("api"))]);
}

const HOUR: Duration = Duration::from_secs(3600);
