//! What lists do to handshakes and to peers of live tunnels.

use std::{fs, time::Duration};

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, KeyUsagePurpose};
use rustls::pki_types::CertificateDer;

use super::*;
use crate::{
    KeyedChain, SanRule, Svid, TlsOptions,
    svid::TlsContext,
    testing::{Authority, HOUR, INTERMEDIATE, accept_in, handshake},
};

const WEB: &str = "spiffe://td/ns/shop/sa/web";
const DB: &str = "spiffe://td/ns/shop/sa/db";

/// A mesh where all check the same lists.
struct Mesh {
    authority: Authority,
    revocations: Revocations,
    context: TlsContext,
}

impl Mesh {
    fn new(authority: Authority) -> Self {
        let revocations = Revocations::armed();
        let context = TlsContext::new(TlsOptions::default(), SanRule::Requested);
        Self {
            authority,
            context: context.checking(revocations.clone()),
            revocations,
        }
    }

    fn svid(&self, id: &str) -> Svid {
        accept_in(&self.context, id, self.authority.issue(id))
    }

    fn load(&self, lists: &[&[u8]]) {
        let text: String = lists.iter().map(|list| pem("X509 CRL", list)).collect();
        let loaded = self.revocations.update("file", text.as_bytes()).unwrap();
        assert_eq!(loaded, lists.len());
    }

    fn status(&self) -> RevocationStatus {
        self.revocations.status().unwrap()
    }
}

fn pem(tag: &str, der: &[u8]) -> String {
    pem::encode(&pem::Pem::new(tag, der))
}

/// Errors of the server and of the client; `None` where the handshake went through.
async fn errors(client: &Svid, server: &Svid) -> [Option<String>; 2] {
    let expected = Arc::from([server.id().clone()]);
    let sides = handshake(server.server_config(), client.client_config(&expected)).await;
    let text = |error: std::io::Error| error.to_string();
    [sides.0.err().map(text), sides.1.err().map(text)]
}

async fn talk(client: &Svid, server: &Svid) -> bool {
    errors(client, server).await == [None, None]
}

#[tokio::test]
async fn a_revoked_leaf_is_refused_in_both_directions() {
    let mesh = Mesh::new(Authority::new("mesh"));
    let (web, db) = (mesh.svid(WEB), mesh.svid(DB));
    assert!(talk(&web, &db).await, "no list, nothing revoked");
    mesh.load(&[&mesh.authority.crl(&[&web.chain()[0]])]);
    let [server, client] = errors(&web, &db).await;
    assert!(server.unwrap().contains("Revoked"));
    assert!(
        client.unwrap().contains("CertificateRevoked"),
        "the peer is told"
    );
    let [_, client] = errors(&db, &web).await;
    assert!(client.unwrap().contains("Revoked"));
    let status = mesh.status();
    assert_eq!((status.lists, status.revoked), (1, 1));
    assert_eq!(
        (status.rejections.source, status.rejections.destination),
        (1, 1)
    );
    let renewed = mesh.svid(WEB);
    assert!(talk(&renewed, &db).await && talk(&db, &renewed).await);
}

#[tokio::test]
async fn a_revoked_intermediate_revokes_all_below() {
    let mesh = Mesh::new(Authority::new("mesh").with_intermediate());
    let (web, db) = (mesh.svid(WEB), mesh.svid(DB));
    mesh.load(&[&mesh.authority.root_crl(&[&web.chain()[1]])]);
    assert!(!talk(&web, &db).await && !talk(&db, &web).await);
    mesh.load(&[]);
    assert!(talk(&web, &db).await, "an empty file revokes nothing");
}

#[tokio::test]
async fn lists_of_other_issuers_say_nothing() {
    let mesh = Mesh::new(Authority::new("mesh"));
    let (web, db) = (mesh.svid(WEB), mesh.svid(DB));
    let leaf = &web.chain()[0];
    let namesake = Authority::new("mesh").crl(&[leaf]);
    mesh.load(&[&Authority::new("other").crl(&[leaf]), &namesake]);
    assert!(talk(&web, &db).await, "not signed by the issuer");
    mesh.load(&[&namesake, &mesh.authority.crl(&[leaf])]);
    assert!(
        !talk(&web, &db).await,
        "the issuer's own list is behind a namesake's"
    );
}

/// A mesh that has revoked `web`, which presents another certificate besides.
async fn is_refused(mesh: &Mesh, mut web: KeyedChain, besides: CertificateDer<'static>) -> bool {
    let db = mesh.svid(DB);
    web.chain.push(besides);
    let web = accept_in(&mesh.context, WEB, web);
    !talk(&web, &db).await && !talk(&db, &web).await
}

#[tokio::test]
async fn a_list_in_force_counts_behind_an_older_one_that_a_stranger_brings_up() {
    let mesh = Mesh::new(Authority::new("mesh"));
    let numbered = |params: &mut CertificateParams| params.serial_number = Some(7.into());
    let seven = mesh.authority.issue_with(&[DB], numbered).chain.remove(0);
    let web = mesh.authority.issue(WEB);
    let old = mesh.authority.crl(&[&seven]);
    let new = mesh.authority.crl(&[&web.chain[0], &seven]);
    mesh.load(&[&old, &new]);
    let namesake = Authority::new("mesh");
    let stranger = namesake.issue_with(&[WEB], numbered).chain.remove(0);
    assert!(is_refused(&mesh, web, stranger).await);
}

#[tokio::test]
async fn a_way_that_leads_nowhere_hides_no_revocation() {
    let mesh = Mesh::new(Authority::new("mesh").with_intermediate());
    let web = mesh.authority.issue(WEB);
    mesh.load(&[&mesh.authority.crl(&[&web.chain[0]])]);
    let expired_namesake = Authority::new("other").issue_with(&[], |params| {
        let name = &mut params.distinguished_name;
        name.push(DnType::CommonName, INTERMEDIATE);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.not_after = (std::time::SystemTime::now() - HOUR).into();
    });
    assert!(is_refused(&mesh, web, expired_namesake.chain[0].clone()).await);
}

#[tokio::test]
async fn one_good_way_is_enough() {
    let mesh = Mesh::new(Authority::new("mesh").with_intermediate());
    let (mut chain, again) = (
        mesh.authority.issue(WEB),
        mesh.authority.intermediate_again(),
    );
    let [one, other] = [&chain.chain[1], &again].map(|it| mesh.authority.root_crl(&[it]));
    chain.chain.push(again);
    let web = accept_in(&mesh.context, WEB, chain);
    let db = mesh.svid(DB);
    let is_accepted = || {
        let server = db.client_tracker().unwrap();
        server.track(web.chain()).standing() == Standing::Good
    };
    for list in [&one, &other] {
        mesh.load(&[list]);
        assert!(is_accepted());
    }
    mesh.load(&[&one, &other]);
    assert!(!is_accepted(), "each is revoked, by another list");
}

#[tokio::test]
async fn a_list_past_its_time_counts() {
    let mesh = Mesh::new(Authority::new("mesh"));
    let (web, db) = (mesh.svid(WEB), mesh.svid(DB));
    mesh.load(&[&mesh.authority.stale_crl(&[&web.chain()[0]])]);
    assert!(!talk(&web, &db).await);
    assert!(talk(&mesh.svid(WEB), &db).await, "others are not harmed");
}

#[tokio::test]
async fn an_issuer_that_may_not_sign_lists_revokes_nothing() {
    let authority = Authority::new("mesh");
    let mesh = Mesh::new(authority.with_intermediate_for(&[KeyUsagePurpose::KeyCertSign]));
    let (web, db) = (mesh.svid(WEB), mesh.svid(DB));
    mesh.load(&[&mesh.authority.crl(&[&web.chain()[0]])]);
    assert!(talk(&web, &db).await);
}

#[test]
fn contents_are_pem_or_der_or_empty() {
    let authority = Authority::new("mesh");
    let (one, two) = (authority.crl(&[]), authority.stale_crl(&[]));
    let root = pem("CERTIFICATE", &authority.root());
    let mixed = [root.clone(), pem("X509 CRL", &one), pem("X509 CRL", &two)].concat();
    let cases: [(&[u8], usize); 5] = [
        (b"", 0),
        (b"\n", 0),
        (&one, 1),
        (mixed.as_bytes(), 2),
        (root.as_bytes(), 0),
    ];
    for (content, count) in cases {
        assert_eq!(parse(content).unwrap().len(), count);
    }
    let bad = [pem("X509 CRL", &one), pem("X509 CRL", &one[1..])].concat();
    let torn = &pem("X509 CRL", &one)[..100];
    for content in [
        b"garbage",
        bad.as_bytes(),
        torn.as_bytes(),
        &one[..one.len() - 1],
    ] {
        assert!(parse(content).is_err());
    }
}

#[test]
fn a_bad_content_changes_nothing() {
    let mesh = Mesh::new(Authority::new("mesh"));
    let web = mesh.svid(WEB);
    assert!(mesh.revocations.update("file", b"garbage").is_err());
    mesh.load(&[&mesh.authority.crl(&[&web.chain()[0]])]);
    assert!(mesh.revocations.update("file", b"garbage").is_err());
    let status = mesh.status();
    assert_eq!((status.revoked, status.updates, status.failures), (1, 1, 2));
    mesh.revocations.update("issuer", b"").unwrap();
    assert_eq!(mesh.status().revoked, 1, "each source has its own lists");
}

#[test]
fn off_checks_and_tracks_nothing() {
    let web = Authority::new("mesh").svid(WEB, &TlsOptions::default());
    assert!(web.client_tracker().is_none() && web.server_tracker().is_none());
    let off = Revocations::off();
    assert!(off.changes().is_none() && off.status().is_none());
    assert_eq!(off.update("file", b"").unwrap(), 0);
}

/// Whether `peer` is cut now.
async fn is_cut(peer: &Tracked) -> bool {
    tokio::time::timeout(Duration::from_millis(50), peer.revoked())
        .await
        .is_ok()
}

#[tokio::test]
async fn a_live_peer_is_cut_by_a_later_list_even_after_its_end() {
    let mesh = Mesh::new(Authority::new("mesh"));
    let db = mesh.svid(DB);
    let short = mesh.authority.issue_with(&[WEB], |params| {
        params.not_after = (std::time::SystemTime::now() + Duration::from_secs(1)).into();
    });
    let web = accept_in(&mesh.context, WEB, short);
    let peer = db.client_tracker().unwrap().track(web.chain());
    let other = db.client_tracker().unwrap().track(mesh.svid(WEB).chain());
    tokio::time::sleep(Duration::from_millis(2100)).await;
    assert!(!talk(&web, &db).await, "expired by now");
    mesh.load(&[&mesh.authority.crl(&[&db.chain()[0]])]);
    assert_eq!(peer.standing(), Standing::Good, "expiry alone cuts nothing");
    let cut = async {
        tokio::join!(peer.revoked(), async {
            tokio::task::yield_now().await;
            mesh.load(&[&mesh.authority.crl(&[&web.chain()[0]])]);
        })
    };
    tokio::time::timeout(Duration::from_secs(5), cut)
        .await
        .unwrap();
    assert_eq!(mesh.status().rejections.destination, 1);
    assert!(!is_cut(&other).await);
    let late = db.client_tracker().unwrap().track(web.chain());
    assert_eq!(
        late.standing(),
        Standing::Unknown,
        "it had expired when it was established"
    );
}

#[tokio::test]
async fn a_chain_that_cannot_be_verified_again_is_counted() {
    let mesh = Mesh::new(Authority::new("mesh"));
    let web = mesh.svid(WEB);
    let untracked = web.server_tracker().unwrap().track(&[]);
    assert!(!is_cut(&untracked).await);
    assert_eq!(
        mesh.status().untracked,
        SideCounts {
            source: 1,
            destination: 0
        }
    );
}

#[tokio::test]
async fn a_file_is_followed_from_before_it_exists() {
    let mesh = Mesh::new(Authority::new("mesh"));
    let web = mesh.svid(WEB);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("ca-crl.pem");
    let crl = pem("X509 CRL", &mesh.authority.crl(&[&web.chain()[0]]));
    let until = async |what: &str, reached: &dyn Fn(&RevocationStatus) -> bool| {
        for _ in 0..100 {
            if reached(&mesh.status()) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        panic!("{what}: {:?}", mesh.status());
    };
    let steps = async {
        until("missing", &|it| it.failures == 1).await;
        fs::write(&path, "garbage").unwrap();
        until("corrupt at first", &|it| it.failures == 2).await;
        fs::write(&path, &crl).unwrap();
        until("loaded", &|it| it.revoked == 1).await;
        fs::write(&path, &crl[..crl.len() / 2]).unwrap();
        until("corrupt later", &|it| it.failures == 3).await;
        fs::remove_file(&path).unwrap();
        until("gone", &|it| it.failures == 4).await;
        assert_eq!(mesh.status().revoked, 1);
        fs::write(&path, "").unwrap();
        until("lifted", &|it| it.revoked == 0).await;
    };
    tokio::select! {
        () = steps => {}
        () = mesh.revocations.follow_file("file", path.clone()) => panic!("it ended"),
    }
}

#[tokio::test]
async fn a_receiver_is_followed_until_its_sender_is_gone() {
    let mesh = Mesh::new(Authority::new("mesh"));
    let web = mesh.svid(WEB);
    let first: Arc<[_]> = Arc::from([mesh.authority.crl(&[&web.chain()[0]])]);
    let (lists_tx, lists) = watch::channel(first);
    let mut changes = mesh.revocations.changes().unwrap();
    let steps = async {
        changes.changed().await.unwrap();
        assert_eq!(mesh.status().revoked, 1);
        lists_tx.send_replace(Arc::from([b"garbage".to_vec()]));
        while mesh.status().failures == 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        drop(lists_tx);
    };
    tokio::join!(mesh.revocations.follow("openbao", lists), steps);
    assert_eq!(mesh.status().revoked, 1, "the good ones stay");
}
