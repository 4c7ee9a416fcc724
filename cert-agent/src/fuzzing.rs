//! Where fuzz targets (`fuzz/`) enter: each function takes bytes of somebody who is not trusted. Unit tests replay the
//! targets' seeds.

use std::time::SystemTime;

use rustls::pki_types::{CertificateDer, UnixTime};

use crate::{
    Revocations, SanRule, SpiffeId, TlsOptions,
    anchors::Pool,
    chain::{Chain, Side, Terms},
    check::check_chain,
    istio, kept, openbao, peer_id,
};

/// A peer's certificate, an identity as text, and a file of revocation lists.
pub fn peer(bytes: &[u8]) {
    if let Some(id) = peer_id(&[bytes.into()]) {
        assert_eq!(id.as_str().parse::<SpiffeId>().as_ref(), Ok(&id));
    }
    let text = std::str::from_utf8(bytes).ok();
    if let Some(id) = text.and_then(|text| text.parse::<SpiffeId>().ok()) {
        assert!(!id.trust_domain().is_empty() && !id.namespace().is_empty());
    }
    let _ = Revocations::armed().update("fuzz", bytes);
}

/// An authority's certificates in DER, or those of a peer, each after its length in two bytes; the last one is the root.
pub fn chain(bytes: &[u8]) {
    let mut certificates = pieces(bytes);
    let roots: Vec<_> = certificates.pop().into_iter().collect();
    let Some((leaf, intermediates)) = certificates.split_first() else {
        return;
    };
    let provider = TlsOptions::default().provider();
    let anchors = Pool::default().anchors(roots.iter());
    let revocations = Revocations::armed();
    // What comes first may be a list as well as a certificate.
    let _ = revocations.update("fuzz", leaf);
    for side in [Side::Client, Side::Server] {
        let terms = Terms {
            anchors: &anchors.store.roots,
            algorithms: provider.signature_verification_algorithms,
            side,
            now: UnixTime::now(),
        };
        let chain = Chain {
            leaf,
            intermediates,
        };
        if !chain.is_too_long() {
            let _ = revocations.verify(chain, &terms);
        }
    }
    let Ok(requested) = SpiffeId::new("td", "shop", "web") else {
        return;
    };
    let now = (&*provider, SystemTime::now());
    let checked = check_chain(
        &requested,
        SanRule::Requested,
        certificates.clone(),
        &roots,
        now,
    );
    if let Ok(accepted) = checked {
        assert_eq!(accepted.id, requested);
        assert!(accepted.not_after > now.1 && !accepted.presented.is_empty());
    }
}

/// An answer of istiod: PEM texts with NUL between.
pub fn istiod(bytes: &[u8]) {
    let elements = bytes.split(|byte| *byte == 0).map(String::from_utf8_lossy);
    let elements: Vec<_> = elements.map(std::borrow::Cow::into_owned).collect();
    let _ = istio::split(&elements);
}

/// Answers of OpenBao and Kubernetes.
pub fn openbao(bytes: &[u8]) {
    openbao::read_all(bytes);
}

/// A file of a kept certificate.
pub fn kept(bytes: &[u8]) {
    kept::reread(bytes);
}

fn pieces(mut bytes: &[u8]) -> Vec<CertificateDer<'static>> {
    let mut pieces = Vec::new();
    while let Some((length, rest)) = bytes.split_first_chunk() {
        let length = usize::from(u16::from_be_bytes(*length)).min(rest.len());
        let (piece, rest) = rest.split_at(length);
        pieces.push(CertificateDer::from(piece.to_vec()));
        bytes = rest;
    }
    pieces
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::*;

    #[test]
    fn seeds_are_survived() {
        type Target = fn(&[u8]);
        let targets = [
            ("peer", peer as Target),
            ("chain", chain),
            ("istiod", istiod),
            ("openbao", openbao),
            ("kept", kept),
        ];
        for (name, target) in targets {
            let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds");
            let mut seen = 0;
            for seed in fs::read_dir(seeds.join(name)).unwrap() {
                target(&fs::read(seed.unwrap().path()).unwrap());
                seen += 1;
            }
            assert!(seen > 0, "{name} has no seeds");
        }
    }
}
