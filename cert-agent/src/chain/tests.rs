//! What a chain must show, and what hostile ones cost.

use std::sync::OnceLock;

use proptest::{prelude::*, sample::Index};
use rcgen::ExtendedKeyUsagePurpose::{ClientAuth, ServerAuth};
use rustls::{RootCertStore, crypto::aws_lc_rs};

use super::*;
use crate::{KeyedChain, Revocations, SpiffeId, peer_id, testing::Authority};

const DB: &str = "spiffe://td/ns/shop/sa/db";

/// Verifies what `answer` would present, from `side`.
fn verify(side: Side, answer: &KeyedChain) -> Result<(), webpki::Error> {
    let mut anchors = RootCertStore::empty();
    anchors.add_parsable_certificates(answer.roots.iter().cloned());
    let terms = Terms {
        anchors: &anchors.roots,
        algorithms: aws_lc_rs::default_provider().signature_verification_algorithms,
        side,
        now: UnixTime::now(),
    };
    let (leaf, intermediates) = answer.chain.split_first().unwrap();
    let chain = Chain {
        leaf,
        intermediates,
    };
    chain.verify(&terms, None)
}

#[test]
fn the_use_of_a_key_counts_where_it_is_told() {
    let mesh = Authority::new("mesh");
    let cases = [
        (vec![], true, true),
        (vec![ServerAuth, ClientAuth], true, true),
        (vec![ServerAuth], true, false),
        (vec![ClientAuth], false, true),
    ];
    for (usages, serves, dials) in cases {
        let answer = mesh.issue_with(&[DB], |params| params.extended_key_usages = usages.clone());
        assert_eq!(verify(Side::Client, &answer).is_ok(), serves, "{usages:?}");
        assert_eq!(verify(Side::Server, &answer).is_ok(), dials, "{usages:?}");
    }
}

#[test]
fn names_with_zero_bytes_are_no_identities() {
    let mesh = Authority::new("mesh");
    for name in [
        "spiffe://td/ns/shop/sa/web\0",
        "spiffe://td/ns/shop\0/sa/web",
    ] {
        let leaf = mesh.issue_with(&[name], |_| {});
        assert_eq!(peer_id(&leaf.chain), None);
    }
}

/// A good answer with an intermediate, made once: keys are slow.
fn good() -> &'static KeyedChain {
    static GOOD: OnceLock<KeyedChain> = OnceLock::new();
    GOOD.get_or_init(|| Authority::new("mesh").with_intermediate().issue(DB))
}

fn crl() -> &'static [u8] {
    static CRL: OnceLock<Vec<u8>> = OnceLock::new();
    CRL.get_or_init(|| Authority::new("mesh").crl(&[&good().chain[0]]))
}

/// Some bytes changed, then cut off.
fn bend(bytes: &[u8], changes: &[(Index, u8)], keep: Index) -> Vec<u8> {
    let mut bent = bytes.to_vec();
    for (place, value) in changes {
        let place = place.index(bent.len());
        bent[place] = *value;
    }
    bent.truncate(keep.index(bytes.len() * 8).max(1));
    bent
}

fn changes() -> impl Strategy<Value = Vec<(Index, u8)>> {
    prop::collection::vec(any::<(Index, u8)>(), 0..8)
}

proptest! {
    #[test]
    fn arbitrary_bytes_are_no_identity(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        let _ = Revocations::armed().update("fuzz", &bytes);
        prop_assert_eq!(peer_id(&[bytes.into()]), None);
    }

    #[test]
    fn a_bent_leaf_never_panics_and_never_verifies(changes in changes(), keep: Index) {
        let leaf = bend(&good().chain[0], &changes, keep);
        let same = *leaf == *good().chain[0];
        if let Some(id) = peer_id(&[leaf.clone().into()]) {
            prop_assert_eq!(id.as_str().parse::<SpiffeId>().unwrap(), id);
        }
        let mut answer = KeyedChain::new(
            crate::PrivateKey::from_pkcs8_der(Vec::new()),
            good().chain.clone(),
            good().roots.clone(),
        );
        answer.chain[0] = leaf.into();
        prop_assert_eq!(verify(Side::Client, &answer).is_ok(), same);
    }

    #[test]
    fn a_bent_list_never_panics(changes in changes(), keep: Index) {
        let _ = Revocations::armed().update("fuzz", &bend(crl(), &changes, keep));
    }
}
