//! Roots and revocation lists.

use std::{collections::BTreeMap, sync::Arc};

use parking_lot::Mutex;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, DnType,
    IsCa, KeyIdMethod, KeyPair, KeyUsagePurpose,
};
use serde_json::json;
use tokio::time::Duration;
use tokio_util::sync::CancellationToken;

use super::server::{Reply, Stage, WEB, errors, header, ok, pem_text, reply, stage, stage_with};
use crate::testing;

type Issuer = CertifiedIssuer<'static, KeyPair>;

fn root(name: &str) -> Issuer {
    root_until(name, CertificateParams::default().not_after)
}

fn root_until(name: &str, not_after: time::OffsetDateTime) -> Issuer {
    let mut params = CertificateParams::default();
    params.not_after = not_after;
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

fn crl(issuer: &Issuer, number: u64) -> Vec<u8> {
    let now = time::OffsetDateTime::now_utc();
    let params = CertificateRevocationListParams {
        this_update: now,
        next_update: now + time::Duration::hours(1),
        crl_number: number.into(),
        issuing_distribution_point: None,
        revoked_certs: Vec::new(),
        key_identifier_method: KeyIdMethod::Sha256,
    };
    params.signed_by(issuer).unwrap().der().to_vec()
}

/// What the engines serve: replies by path.
#[derive(Clone, Default)]
struct Engines(Arc<Mutex<BTreeMap<String, Reply>>>);

impl Engines {
    fn set(&self, path: &str, reply: Reply) {
        self.0.lock().insert(format!("/v1/{path}"), reply);
    }

    fn list(&self, mount: &str, names: &[&str]) {
        let keys = ok(&json!({ "data": { "keys": names } }));
        self.set(&format!("{mount}/issuers?list=true"), keys);
    }

    /// As an engine does that has certificates of issuers whose keys are elsewhere.
    fn list_without_keys(&self, mount: &str, names: &[&str]) {
        let info: BTreeMap<_, _> = names
            .iter()
            .map(|it| (*it, json!({ "key_id": "" })))
            .collect();
        let data = json!({ "keys": names, "key_info": info });
        self.set(
            &format!("{mount}/issuers?list=true"),
            ok(&json!({ "data": data })),
        );
    }

    fn issuer(&self, mount: &str, name: &str, issuer: &Issuer, number: u64) {
        let data =
            json!({ "certificate": pem_text(issuer.der()), "ca_chain": [pem_text(issuer.der())] });
        self.set(
            &format!("{mount}/issuer/{name}/json"),
            ok(&json!({ "data": data })),
        );
        self.set(
            &format!("{mount}/issuer/{name}/crl/der"),
            reply(200, crl(issuer, number)),
        );
    }

    fn serve(&self, stage: &Stage) {
        let replies = Arc::clone(&self.0);
        stage.fake.script(move |seen| {
            let found = replies.lock().get(&seen.path).cloned();
            found.or_else(|| seen.path.contains("/issuer").then(|| errors(404, "")))
        });
    }
}

/// Reads once.
async fn poll(stage: &Stage) -> bool {
    let inner = &stage.authority.0;
    inner.trust.poll(&inner.client, &inner.mounts).await.is_ok()
}

fn ders(issuers: &[&Issuer]) -> Vec<Vec<u8>> {
    let mut ders: Vec<_> = issuers.iter().map(|it| it.der().to_vec()).collect();
    ders.sort();
    ders
}

fn published(stage: &Stage) -> (Vec<Vec<u8>>, usize) {
    let roots = stage
        .authority
        .roots()
        .borrow()
        .iter()
        .map(|it| it.to_vec())
        .collect();
    let crls = stage.authority.crls().borrow().len();
    (roots, crls)
}

#[tokio::test(start_paused = true)]
async fn the_bundle_is_the_union_of_all_self_signed_issuers() {
    let stage = stage_with(|settings| settings.root_mounts = vec!["pki-root".into()]);
    let (one, two) = (root("one"), root("two"));
    let below = testing::Authority::new("x").with_intermediate();
    let intermediate = below.issue(WEB).chain[1].clone();
    let engines = Engines::default();
    engines.serve(&stage);
    engines.list("pki-root", &["a", "b"]);
    engines.issuer("pki-root", "a", &one, 1);
    engines.issuer("pki-root", "b", &two, 1);
    engines.list("pki-mesh", &["i", "../evil", ""]);
    let data = json!({ "certificate": pem_text(&intermediate), "ca_chain": [pem_text(&intermediate), pem_text(one.der())] });
    engines.set("pki-mesh/issuer/i/json", ok(&json!({ "data": data })));
    assert!(poll(&stage).await);
    assert_eq!(published(&stage), (ders(&[&one, &two]), 2));
    let seen = stage.fake.seen();
    assert!(
        seen.iter()
            .all(|it| it.header("x-vault-token").is_empty() && !it.path.contains("evil"))
    );

    // A root that is gone goes; what is as before is not announced.
    let (mut roots, mut crls) = (stage.authority.roots(), stage.authority.crls());
    roots.mark_unchanged();
    crls.mark_unchanged();
    assert!(poll(&stage).await);
    assert!(!roots.has_changed().unwrap() && !crls.has_changed().unwrap());
    engines.list("pki-root", &["b"]);
    engines.set("pki-mesh/issuer/i/json", errors(500, ""));
    assert!(!poll(&stage).await);
    assert_eq!(
        published(&stage).0,
        ders(&[&one, &two]),
        "the other engine still vouches"
    );
    let data = json!({ "certificate": pem_text(&intermediate) });
    engines.set("pki-mesh/issuer/i/json", ok(&json!({ "data": data })));
    poll(&stage).await;
    assert!(roots.has_changed().unwrap() && !crls.has_changed().unwrap());
    assert_eq!(published(&stage), (ders(&[&two]), 2));
}

/// An engine that held the issuers `names` and their keys, and what it published.
async fn held(stage: &Stage, engines: &Engines, names: &[&str], issuer: &Issuer) -> Vec<u8> {
    engines.serve(stage);
    engines.list("pki-mesh", names);
    for name in names {
        engines.issuer("pki-mesh", name, issuer, 1);
    }
    assert!(poll(stage).await);
    stage.authority.crls().borrow()[0].clone()
}

#[tokio::test(start_paused = true)]
async fn what_an_issuer_has_revoked_outlives_its_key_and_itself() {
    let (stage, engines) = (stage(), Engines::default());
    let before = held(&stage, &engines, &["a"], &root("one")).await;
    let lists = || stage.authority.crls().borrow().to_vec();
    engines.list_without_keys("pki-mesh", &["a"]);
    assert!(poll(&stage).await);
    assert!(lists().contains(&before), "it has lost its key");
    engines.list("pki-mesh", &["b"]);
    engines.issuer("pki-mesh", "b", &root("two"), 1);
    for _ in 0..2 {
        assert!(poll(&stage).await);
        assert!(lists().contains(&before), "it is gone");
        assert_eq!(lists().len(), 2);
    }
    let again = root("one");
    engines.list("pki-mesh", &["a", "b"]);
    engines.issuer("pki-mesh", "a", &again, 2);
    assert!(poll(&stage).await);
    assert!(!lists().contains(&before), "it is back, with another list");
}

#[tokio::test(start_paused = true)]
async fn the_list_of_a_former_issuer_goes_when_that_ends() {
    let (stage, engines) = (stage(), Engines::default());
    let ended = root_until(
        "one",
        time::OffsetDateTime::now_utc() - time::Duration::HOUR,
    );
    let before = held(&stage, &engines, &["a"], &ended).await;
    assert!(poll(&stage).await);
    assert!(stage.authority.crls().borrow().contains(&before));
    engines.list("pki-mesh", &["b"]);
    engines.issuer("pki-mesh", "b", &root("two"), 1);
    assert!(poll(&stage).await);
    let lists = stage.authority.crls().borrow().to_vec();
    assert!(lists.len() == 1 && !lists.contains(&before));
}

#[tokio::test(start_paused = true)]
async fn a_list_of_another_kind_goes_with_its_issuer() {
    let (stage, engines, one) = (stage(), Engines::default(), root("one"));
    held(&stage, &engines, &["a"], &one).await;
    let mut first_version = crl(&one, 2);
    let version = first_version.windows(3).position(|it| it == [2, 1, 1]);
    first_version[version.unwrap() + 2] = 0;
    let list = reply(200, first_version.clone());
    engines.set("pki-mesh/issuer/a/crl/der", list);
    assert!(poll(&stage).await);
    assert!(stage.authority.crls().borrow().contains(&first_version));
    engines.list("pki-mesh", &["b"]);
    engines.issuer("pki-mesh", "b", &root("two"), 1);
    assert!(poll(&stage).await);
    assert!(!stage.authority.crls().borrow().contains(&first_version));
}

#[tokio::test(start_paused = true)]
async fn lists_of_the_latest_former_issuers_are_kept() {
    let (stage, engines) = (stage(), Engines::default());
    let (mut all, most) = (Vec::new(), 16);
    // Each in the place of the one before; their names sort the other way round.
    for turn in 0..most + 4 {
        let (name, issuer) = (format!("i{}", 99 - turn), root("one"));
        engines.serve(&stage);
        engines.list("pki-mesh", &[&name]);
        engines.issuer("pki-mesh", &name, &issuer, 1);
        assert!(poll(&stage).await);
        let lists = stage.authority.crls().borrow().to_vec();
        let new = lists.iter().find(|list| !all.contains(*list)).unwrap();
        all.push(new.clone());
    }
    let mut latest = all.split_off(all.len() - (most + 1));
    latest.sort();
    assert_eq!(stage.authority.crls().borrow().to_vec(), latest);
}

#[tokio::test(start_paused = true)]
async fn an_issuer_without_a_key_is_not_asked_for_its_list() {
    let stage = stage();
    let (one, engines) = (root("one"), Engines::default());
    engines.serve(&stage);
    engines.list_without_keys("pki-mesh", &["a"]);
    engines.issuer("pki-mesh", "a", &one, 1);
    engines.set(
        "pki-mesh/issuer/a/crl/der",
        errors(500, "unable to find CRL for issuer"),
    );
    assert!(poll(&stage).await);
    assert_eq!(published(&stage), (ders(&[&one]), 0));
}

#[tokio::test(start_paused = true)]
async fn nothing_is_emptied() {
    let stage = stage();
    let (one, engines) = (root("one"), Engines::default());
    engines.serve(&stage);
    engines.list("pki-mesh", &["a"]);
    engines.issuer("pki-mesh", "a", &one, 1);
    assert!(poll(&stage).await);
    let before = published(&stage);
    assert_eq!(before, (ders(&[&one]), 1));
    let list = "pki-mesh/issuers?list=true";
    for (path, bad) in [
        (list, errors(404, "")),
        (list, errors(503, "Vault is sealed")),
        (list, reply(200, "junk")),
        (list, ok(&json!({ "data": { "keys": [] } }))),
        ("pki-mesh/issuer/a/json", errors(404, "")),
        (
            "pki-mesh/issuer/a/json",
            ok(&json!({ "data": { "certificate": "" } })),
        ),
        ("pki-mesh/issuer/a/crl/der", errors(404, "")),
        ("pki-mesh/issuer/a/crl/der", errors(500, "")),
        ("pki-mesh/issuer/a/crl/der", reply(200, "")),
        ("pki-mesh/issuer/a/crl/der", reply(200, "junk")),
    ] {
        engines.list("pki-mesh", &["a"]);
        engines.issuer("pki-mesh", "a", &one, 1);
        engines.set(path, bad);
        poll(&stage).await;
        assert_eq!(published(&stage), before, "{path}");
    }
    engines.issuer("pki-mesh", "a", &one, 2);
    let mut crls = stage.authority.crls();
    crls.mark_unchanged();
    assert!(poll(&stage).await);
    assert!(crls.has_changed().unwrap());
}

#[tokio::test(start_paused = true)]
async fn issuers_are_polled_and_sooner_after_a_failure() {
    let stage = stage();
    let (one, two) = (root("one"), root("two"));
    let engines = Engines::default();
    engines.serve(&stage);
    let stop = CancellationToken::new();
    let watching = async {
        let mut roots = stage.authority.roots();
        let start = tokio::time::Instant::now();
        tokio::time::sleep(Duration::from_secs(20)).await;
        let failures = stage.fake.seen().len();
        assert!(
            (4..=7).contains(&failures),
            "{failures} polls in 20 s of failing"
        );
        engines.list("pki-mesh", &["a"]);
        engines.issuer("pki-mesh", "a", &one, 1);
        roots.changed().await.unwrap();
        assert!(start.elapsed() < Duration::from_secs(60));
        engines.issuer("pki-mesh", "a", &two, 1);
        let start = tokio::time::Instant::now();
        roots.changed().await.unwrap();
        let waited = start.elapsed().as_secs();
        assert!((270..=330).contains(&waited), "{waited}");
        stop.cancel();
    };
    tokio::join!(stage.authority.run(stop.clone()), watching);
}

#[tokio::test(start_paused = true)]
async fn a_rate_limit_on_reading_slows_reading_alone() {
    let stage = stage();
    stage.fake.script(|seen| {
        let limit = || header(errors(429, "quota exceeded"), "retry-after", "60");
        seen.path.contains("/issuers").then(limit)
    });
    let stop = CancellationToken::new();
    let watching = async {
        tokio::time::sleep(Duration::from_secs(30)).await;
        stage.sign().await.unwrap();
        let reads = |seen: &&super::server::Seen| seen.path.contains("/issuers");
        assert_eq!(stage.fake.seen().iter().filter(reads).count(), 1);
        stop.cancel();
    };
    tokio::join!(stage.authority.run(stop.clone()), watching);
}

#[tokio::test(start_paused = true)]
async fn a_certificate_from_a_new_root_has_the_issuers_read() {
    let stage = stage();
    let (one, engines) = (root("one"), Engines::default());
    engines.serve(&stage);
    engines.list("pki-mesh", &["a"]);
    engines.issuer("pki-mesh", "a", &one, 1);
    let stop = CancellationToken::new();
    let watching = async {
        let mut roots = stage.authority.roots();
        roots.changed().await.unwrap();
        let signer = stage.fake.ca.root().clone();
        let data = json!({ "certificate": pem_text(&signer) });
        engines.set("pki-mesh/issuer/a/json", ok(&json!({ "data": data })));
        let start = tokio::time::Instant::now();
        let signed = stage.sign().await.unwrap();
        assert_eq!(signed.roots.len(), 2, "the one above it, and the one known");
        roots.changed().await.unwrap();
        assert!(
            start.elapsed() <= Duration::from_secs(6),
            "{:?}",
            start.elapsed()
        );
        stop.cancel();
    };
    tokio::join!(stage.authority.run(stop.clone()), watching);
}

#[tokio::test(start_paused = true)]
async fn roots_are_read_at_once_if_the_answer_names_none() {
    let stage = stage_with(|settings| settings.root_mounts = vec!["pki-root".into()]);
    let below = testing::Authority::new("mesh").with_intermediate();
    let answer = below.issue(WEB);
    let (leaf, intermediate) = (pem_text(&answer.chain[0]), pem_text(&answer.chain[1]));
    let root = pem_text(&below.root());
    stage.fake.script(move |seen| {
        Some(match seen.path.as_str() {
            "/v1/pki-mesh/sign/workload" => {
                let data = json!({ "certificate": leaf, "ca_chain": [intermediate] });
                ok(&json!({ "data": data }))
            }
            "/v1/pki-root/issuers?list=true" => ok(&json!({ "data": { "keys": ["r"] } })),
            "/v1/pki-root/issuer/r/json" => ok(&json!({ "data": { "certificate": root } })),
            _ if seen.is_login() => return None,
            _ => errors(404, ""),
        })
    });
    let signed = stage.sign().await.unwrap();
    assert_eq!(signed.roots, [below.root()]);
}
