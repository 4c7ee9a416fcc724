//! Rotations of roots, each as the next handshake sees it.

use std::{fs, os::unix::fs::symlink, path::Path};

use super::*;
use crate::{
    KeyedChain, SanRule, Svid, TlsOptions,
    svid::TlsContext,
    testing::{Authority, accept_in, handshake},
};

const WEB: &str = "spiffe://td/ns/shop/sa/web";
const DB: &str = "spiffe://td/ns/shop/sa/db";
const GRACE: Duration = Duration::from_secs(60);

/// One proxy: its bundle, and what its certificates have in common.
struct Node {
    bundle: TrustBundle,
    context: TlsContext,
}

impl Node {
    fn new() -> Self {
        let bundle = TrustBundle::new(GRACE);
        let context = TlsContext::new(TlsOptions::default(), SanRule::Requested);
        let context = context.trusting(bundle.clone());
        Self { bundle, context }
    }

    fn accept(&self, id: &str, answer: KeyedChain) -> Svid {
        accept_in(&self.context, id, answer)
    }
}

/// Whether `client` and `server` come together.
async fn talk(client: &Svid, server: &Svid) -> bool {
    let expected = Arc::from([server.id().clone()]);
    let sides = handshake(server.server_config(), client.client_config(&expected)).await;
    sides.0.is_ok() && sides.1.is_ok()
}

/// Both ways.
async fn meet(one: &Svid, other: &Svid) -> bool {
    talk(one, other).await && talk(other, one).await
}

fn pem(roots: &[&Authority]) -> String {
    let one = |root: &&Authority| pem::encode(&pem::Pem::new("CERTIFICATE", root.root().to_vec()));
    roots.iter().map(one).collect()
}

async fn eventually(what: &str, reached: impl Fn() -> bool) {
    for _ in 0..100 {
        if reached() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("{what} did not come about");
}

#[tokio::test]
async fn a_root_of_a_source_is_trusted_without_a_new_certificate() {
    let (old, new) = (Authority::new("old"), Authority::new("new"));
    let (here, there) = (Node::new(), Node::new());
    let web = here.accept(WEB, old.issue(WEB));
    let db = there.accept(DB, new.issue(DB));
    assert!(!meet(&web, &db).await);
    here.bundle
        .update("file", &[old.root(), new.root()])
        .unwrap();
    there
        .bundle
        .update("file", &[old.root(), new.root()])
        .unwrap();
    assert!(meet(&web, &db).await);
    assert!(!web.roots().contains(&new.root()), "what the CA said stays");
}

#[tokio::test]
async fn a_removed_root_is_trusted_for_the_grace_only() {
    let (old, new) = (Authority::new("old"), Authority::new("new"));
    let node = Node::new();
    node.bundle.update("file", &[old.root()]).unwrap();
    let web = node.accept(WEB, new.issue(WEB));
    let mut answer = old.issue(DB);
    answer.roots.push(new.root());
    let db = Node::new().accept(DB, answer);
    tokio::time::pause();
    node.bundle.update("file", &[new.root()]).unwrap();
    tokio::time::advance(GRACE - Duration::from_secs(1)).await;
    assert!(meet(&web, &db).await);
    assert_eq!(node.bundle.sources()[0].leaving, 1);
    tokio::time::advance(Duration::from_secs(1)).await;
    assert!(!talk(&web, &db).await && !talk(&db, &web).await);
    assert_eq!(node.bundle.sources()[0].leaving, 0);
}

#[tokio::test]
async fn a_renewal_under_another_root_forgets_the_old_one_slowly() {
    let (old, new) = (Authority::new("old"), Authority::new("new"));
    let node = Node::new();
    let before = node.accept(WEB, old.issue(WEB));
    let mut answer = old.issue(DB);
    answer.roots.push(new.root());
    let db = Node::new().accept(DB, answer);
    let after = node.accept(WEB, new.issue(WEB));
    tokio::time::pause();
    for web in [&before, &after] {
        assert!(meet(web, &db).await, "throughout the rotation");
    }
    tokio::time::advance(GRACE).await;
    assert!(!talk(&after, &db).await, "the peer's root has left");
    drop((before, after));
    let fresh = node.accept(WEB, old.issue(WEB));
    assert!(meet(&fresh, &db).await);
}

#[tokio::test]
async fn configurations_are_made_anew_only_for_new_roots() {
    let (mesh, other) = (Authority::new("mesh"), Authority::new("other"));
    let node = Node::new();
    let web = node.accept(WEB, mesh.issue(WEB));
    let db = node.accept(DB, mesh.issue(DB));
    let expected = Arc::from([db.id().clone()]);
    let (server, client) = (web.server_config(), web.client_config(&expected));
    node.bundle.update("file", &[mesh.root()]).unwrap();
    assert!(Arc::ptr_eq(&server, &web.server_config()), "nothing new");
    assert!(Arc::ptr_eq(&client, &web.client_config(&expected)));
    node.bundle.update("file", &[other.root()]).unwrap();
    let renewed = web.server_config();
    assert!(!Arc::ptr_eq(&server, &renewed));
    assert!(!Arc::ptr_eq(&client, &web.client_config(&expected)));
    assert!(Arc::ptr_eq(&renewed, &web.server_config()));
}

#[test]
fn identities_with_equal_roots_share_them() {
    let mesh = Authority::new("mesh");
    let node = Node::new();
    node.bundle
        .update("file", &[Authority::new("more").root()])
        .unwrap();
    let one = node.bundle.answered(&WEB.parse().unwrap(), &[mesh.root()]);
    let two = node.bundle.answered(&DB.parse().unwrap(), &[mesh.root()]);
    assert!(Arc::ptr_eq(&one.anchors(), &two.anchors()));
    let again = node.bundle.answered(&WEB.parse().unwrap(), &[mesh.root()]);
    assert!(Arc::ptr_eq(&one, &again), "successors trust alike");
    drop((one, two, again));
    node.bundle.answered(&WEB.parse().unwrap(), &[mesh.root()]);
    assert_eq!(node.bundle.0.identities.lock().len(), 1, "the others left");
}

#[test]
fn a_source_without_usable_roots_changes_nothing() {
    let bundle = TrustBundle::new(GRACE);
    bundle
        .update("file", &[Authority::new("mesh").root()])
        .unwrap();
    let garbage = vec![1, 2, 3].into();
    for bad in [&[][..], &[garbage]] {
        assert!(bundle.update("file", bad).is_err());
    }
    let status = &bundle.sources()[0];
    assert_eq!((status.roots, status.updates, status.failures), (1, 1, 2));
    let mixed = [vec![1].into(), Authority::new("other").root()];
    assert_eq!(
        bundle.update("file", &mixed).unwrap(),
        1,
        "the bad one is skipped"
    );
}

/// A mounted volume: files in a directory that a link leads to.
fn publish(volume: &Path, name: &str, content: &str) {
    fs::create_dir(volume.join(name)).unwrap();
    fs::write(volume.join(name).join("root-cert.pem"), content).unwrap();
    symlink(name, volume.join("next")).unwrap();
    fs::rename(volume.join("next"), volume.join("..data")).unwrap();
}

#[tokio::test]
async fn a_file_is_followed_through_swaps_and_bad_contents() {
    let (old, new) = (Authority::new("old"), Authority::new("new"));
    let volume = tempfile::tempdir().unwrap();
    let path = volume.path().join("root-cert.pem");
    let (bundle, name) = (TrustBundle::new(Duration::ZERO), "file");
    let status = || bundle.sources().first().cloned();
    let steps = async {
        let failures = |count| move |it: &RootSourceStatus| it.failures == count;
        let is =
            |wanted: &dyn Fn(&RootSourceStatus) -> bool| status().is_some_and(|it| wanted(&it));
        eventually("a missing file", || is(&failures(1))).await;
        symlink("..data/root-cert.pem", &path).unwrap();
        publish(volume.path(), "1", &pem(&[&old]));
        eventually("the first roots", || is(&|it| it.roots == 1)).await;
        publish(volume.path(), "2", &pem(&[&old, &new]));
        eventually("two roots", || is(&|it| it.roots == 2)).await;
        for (count, bad) in [
            (2, "garbage"),
            (3, ""),
            (4, "-----BEGIN CERTIFICATE-----\nAA"),
        ] {
            publish(volume.path(), &format!("bad{count}"), bad);
            eventually("a failure", || is(&failures(count))).await;
            assert_eq!(status().unwrap().roots, 2, "{bad:?}");
        }
        publish(volume.path(), "3", &pem(&[&new]));
        eventually("the last root", || is(&|it| it.roots == 1)).await;
    };
    tokio::select! {
        () = steps => {}
        () = bundle.follow_file(name, path.clone()) => panic!("it ended"),
    }
}

#[tokio::test]
async fn a_receiver_is_followed_until_its_sender_is_gone() {
    let (old, new) = (Authority::new("old"), Authority::new("new"));
    let bundle = TrustBundle::new(Duration::ZERO);
    let (roots_tx, roots) = watch::channel(Roots::default());
    let steps = async {
        roots_tx.send_replace(Arc::from([old.root()]));
        eventually("one root", || !bundle.sources().is_empty()).await;
        roots_tx.send_replace(Arc::from([old.root(), new.root()]));
        eventually("two roots", || bundle.sources()[0].roots == 2).await;
        roots_tx.send_replace(Roots::default());
        drop(roots_tx);
    };
    tokio::join!(bundle.follow("issuers", roots), steps);
    let status = &bundle.sources()[0];
    assert_eq!(
        (status.roots, status.failures),
        (2, 0),
        "an empty list says nothing"
    );
}
