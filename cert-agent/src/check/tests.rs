//! Answers that an authority should not give.

use rcgen::{CertificateParams, ExtendedKeyUsagePurpose};

use super::*;
use crate::{KeyedChain, Svid, TlsOptions, svid::TlsContext, testing::Authority};

const WEB: &str = "spiffe://td/ns/shop/sa/web";
const DB: &str = "spiffe://td/ns/shop/sa/db";

fn judge(answer: KeyedChain, rule: SanRule) -> Result<Svid, Rejection> {
    let context = TlsContext::new(TlsOptions::default(), rule);
    Svid::accept(&WEB.parse().unwrap(), answer, &context, SystemTime::now())
}

fn refusal(answer: KeyedChain) -> Rejection {
    judge(answer, SanRule::Requested).expect_err("the answer was accepted")
}

#[test]
fn good_answers_are_accepted() {
    judge(Authority::new("mesh").issue(WEB), SanRule::Requested).unwrap();
    let below = Authority::new("mesh").with_intermediate();
    let svid = judge(below.issue(WEB), SanRule::Requested).unwrap();
    assert_eq!(svid.chain().len(), 2, "leaf and intermediate, not the root");
    assert_eq!(svid.roots(), [below.root()]);
}

#[test]
fn missing_parts_are_refused() {
    let mesh = Authority::new("mesh");
    let mut answer = mesh.issue(WEB);
    answer.chain.clear();
    let error = refusal(answer);
    assert_eq!(
        error.to_string(),
        format!("chain returned from CA is empty for: {WEB}")
    );
    let mut answer = mesh.issue(WEB);
    answer.roots.clear();
    assert_eq!(refusal(answer).to_string(), "no root certificate present");
    let mut answer = mesh.issue(WEB);
    answer.chain[0] = vec![0x30, 0x00].into();
    assert!(matches!(refusal(answer), Rejection::NotACertificate));
}

#[test]
fn unusable_roots_are_skipped() {
    let mut answer = Authority::new("mesh").issue(WEB);
    answer.roots.insert(0, vec![1, 2, 3].into());
    judge(answer, SanRule::Requested).unwrap();
    let mut answer = Authority::new("mesh").issue(WEB);
    answer.roots = vec![vec![1, 2, 3].into()];
    assert!(matches!(refusal(answer), Rejection::NoRoots));
}

#[test]
fn wrong_names_are_refused() {
    let mesh = Authority::new("mesh");
    for names in [&[DB][..], &[WEB, DB], &[WEB, "https://x/"], &[]] {
        let error = refusal(mesh.issue_with(names, |_| {}));
        assert!(
            error
                .to_string()
                .starts_with(&format!("did not find expected SAN: {WEB}")),
            "{names:?}: {error}"
        );
    }
}

#[test]
fn any_one_identity_passes_where_the_authority_chooses() {
    let mesh = Authority::new("mesh");
    let svid = judge(mesh.issue(DB), SanRule::Any).unwrap();
    assert_eq!(svid.id().as_str(), DB);
    assert!(judge(mesh.issue_with(&[WEB, DB], |_| {}), SanRule::Any).is_err());
    assert!(judge(mesh.issue_with(&["https://x/"], |_| {}), SanRule::Any).is_err());
}

#[test]
fn another_key_is_refused() {
    let mesh = Authority::new("mesh");
    let mut answer = mesh.issue(WEB);
    answer.key = mesh.issue(WEB).key;
    assert!(matches!(refusal(answer), Rejection::Key(_)));
}

#[test]
fn validity_must_contain_now() {
    let mesh = Authority::new("mesh");
    let bent = |from: i64, to: i64| {
        let now = time::OffsetDateTime::now_utc();
        mesh.issue_with(&[WEB], |params: &mut CertificateParams| {
            params.not_before = now + time::Duration::seconds(from);
            params.not_after = now + time::Duration::seconds(to);
        })
    };
    assert!(matches!(refusal(bent(-100, -10)), Rejection::Expired));
    assert!(matches!(refusal(bent(600, 900)), Rejection::NotYetValid));
    judge(bent(30, 900), SanRule::Requested).expect("a slightly fast clock of the CA is tolerated");
}

#[test]
fn chain_must_end_in_a_returned_root() {
    let mut answer = Authority::new("mesh").issue(WEB);
    answer.roots = vec![Authority::new("mesh").root()];
    assert!(matches!(refusal(answer), Rejection::Untrusted(_)));
    let mut answer = Authority::new("mesh").with_intermediate().issue(WEB);
    answer.chain.remove(1);
    assert!(matches!(refusal(answer), Rejection::Untrusted(_)));
}

/// Peers refuse what is longer, so it would be of no use until its renewal.
#[test]
fn a_chain_that_no_peer_would_take_is_refused() {
    let mesh = Authority::new("mesh").with_intermediate();
    let mut answer = mesh.issue(WEB);
    let more = Authority::new("other").issue(DB).chain.remove(0);
    let with = |answer: &mut KeyedChain, count: usize| {
        answer.chain.truncate(2);
        answer.chain.resize(2 + count, more.clone());
    };
    with(&mut answer, 12);
    assert!(matches!(refusal(answer), Rejection::ChainTooLong));
    let mut answer = mesh.issue(WEB);
    with(&mut answer, 11);
    assert_eq!(judge(answer, SanRule::Requested).unwrap().chain().len(), 13);
}

/// The key of a new root, certified by the old one of the same name: without it nobody who trusts the old one alone is reached.
#[test]
fn a_root_that_another_of_its_name_certifies_is_presented() {
    let own_key = |params: &mut CertificateParams| {
        params.distinguished_name = rcgen::DistinguishedName::new();
        params
            .distinguished_name
            .push(rcgen::DnType::CommonName, "mesh");
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    };
    let cross = |identified: bool| {
        let answer = Authority::new("mesh").issue_with(&[], |params| {
            own_key(params);
            params.use_authority_key_identifier_extension = identified;
        });
        answer.chain[0].clone()
    };
    assert!(!is_self_signed(&cross(true)));
    assert!(is_self_signed(&cross(false)), "nothing tells it apart");
    assert!(is_self_signed(&Authority::new("mesh").root()));
}

#[test]
fn leaf_must_serve_both_roles() {
    let mesh = Authority::new("mesh");
    for usage in [
        ExtendedKeyUsagePurpose::ServerAuth,
        ExtendedKeyUsagePurpose::ClientAuth,
    ] {
        let answer = mesh.issue_with(&[WEB], |params| params.extended_key_usages = vec![usage]);
        assert!(matches!(refusal(answer), Rejection::Untrusted(_)));
    }
    let without = mesh.issue_with(&[WEB], |params| params.extended_key_usages.clear());
    judge(without, SanRule::Requested).unwrap();
}
