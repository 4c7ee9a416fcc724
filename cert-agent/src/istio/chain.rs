//! Takes the answer apart.

use rustls_pki_types::CertificateDer;

use crate::{Rejection, SignedChain};

/// All elements but the last are the chain, the last one holds the roots. Each may hold any number of certificates: older
/// versions of istiod put all intermediates into one.
///
/// A single element is a leaf without roots.
pub(crate) fn split(elements: &[String]) -> Result<SignedChain, Rejection> {
    let (chain, roots) = match elements {
        [chain @ .., roots] if !chain.is_empty() => (chain, roots.as_str()),
        all => (all, ""),
    };
    let chain = chain.iter().map(|element| certificates(element));
    let chain: Vec<_> = chain.collect::<Result<_, _>>()?;
    Ok(SignedChain::new(chain.concat(), certificates(roots)?))
}

/// Nothing but certificates, or nothing at all.
fn certificates(element: &str) -> Result<Vec<CertificateDer<'static>>, Rejection> {
    let blocks = pem::parse_many(element).map_err(|_| Rejection::NotACertificate)?;
    if blocks.is_empty() && !element.trim().is_empty() {
        return Err(Rejection::NotACertificate);
    }
    let certificates = blocks.into_iter().map(|block| {
        if block.tag() == "CERTIFICATE" {
            Ok(block.into_contents().into())
        } else {
            Err(Rejection::NotACertificate)
        }
    });
    certificates.collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn block(content: u8) -> String {
        pem::encode(&pem::Pem::new("CERTIFICATE", vec![content]))
    }

    fn split_of(elements: &[String]) -> (Vec<u8>, Vec<u8>) {
        let signed = split(elements).unwrap();
        let contents = |certificates: Vec<CertificateDer<'static>>| -> Vec<u8> {
            certificates.iter().map(|one| one[0]).collect()
        };
        (contents(signed.chain), contents(signed.roots))
    }

    #[test]
    fn the_last_element_holds_the_roots() {
        assert_eq!(split_of(&[block(1), block(9)]), (vec![1], vec![9]));
        let several = [
            block(1),
            block(2) + &block(3),
            block(4),
            block(8) + &block(9),
        ];
        assert_eq!(split_of(&several), (vec![1, 2, 3, 4], vec![8, 9]));
    }

    #[test]
    fn a_single_element_has_no_roots() {
        assert_eq!(split_of(&[]), (vec![], vec![]));
        assert_eq!(split_of(&[block(1)]), (vec![1], vec![]));
    }

    #[test]
    fn empty_elements_hold_nothing() {
        let holes = [block(1), String::new(), "\n".to_owned(), block(9)];
        assert_eq!(split_of(&holes), (vec![1], vec![9]));
        assert_eq!(split_of(&[block(1), String::new()]), (vec![1], vec![]));
    }

    #[test]
    fn anything_else_is_refused() {
        let key = pem::encode(&pem::Pem::new("PRIVATE KEY", vec![1]));
        let torn = block(1).replace("END", "FIN");
        for bad in ["garbage".to_owned(), key.clone(), block(1) + &key, torn] {
            assert!(split(&[bad.clone(), block(9)]).is_err(), "{bad}");
            assert!(split(&[block(1), bad.clone()]).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn any_answer_is_survived(elements in prop::collection::vec(".{0,80}", 0..5)) {
            let _ = split(&elements);
        }
    }
}
