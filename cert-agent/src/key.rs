//! Private keys and the requests to certify them.

use std::fmt;

use rcgen::{CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256, SanType};
use rustls_pki_types::{CertificateSigningRequestDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use zeroize::Zeroizing;

use crate::SpiffeId;

/// A private key in PKCS#8 DER. Wiped when dropped; `Debug` hides it.
pub struct PrivateKey(Zeroizing<Vec<u8>>);

impl PrivateKey {
    /// Takes over a key in PKCS#8 DER form. Whether it parses shows when it is first used.
    #[must_use]
    pub fn from_pkcs8_der(der: Vec<u8>) -> Self {
        Self(Zeroizing::new(der))
    }

    pub(crate) fn as_pkcs8_der(&self) -> &[u8] {
        &self.0
    }

    /// The form that rustls takes; it wipes its copy.
    pub(crate) fn to_rustls(&self) -> PrivateKeyDer<'static> {
        PrivatePkcs8KeyDer::from(self.0.to_vec()).into()
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PrivateKey(<hidden>)")
    }
}

/// A key or the request for its certificate could not be made.
#[derive(Debug, thiserror::Error)]
#[error("failed to create CSR")]
pub struct CsrError(#[from] rcgen::Error);

/// Makes a fresh ECDSA P-256 key and a request to certify it for `id`.
///
/// The request has an empty subject and one extension: a critical subject alternative name with
/// exactly one URI. Istiod's registration authority and istio-csr refuse anything more.
pub(crate) fn key_and_request(
    id: &SpiffeId,
) -> Result<(PrivateKey, CertificateSigningRequestDer<'static>), CsrError> {
    let key = Zeroizing::new(KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?);
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![SanType::URI(id.as_str().try_into()?)];
    let request = params.serialize_request(&*key)?;
    Ok((
        PrivateKey::from_pkcs8_der(key.serialize_der()),
        request.der().clone(),
    ))
}

#[cfg(test)]
mod tests {
    use x509_parser::{
        certification_request::X509CertificationRequest, cri_attributes::ParsedCriAttribute,
        prelude::FromDer,
    };

    use super::*;

    #[test]
    fn request_holds_one_critical_uri_and_nothing_else() {
        let id: SpiffeId = "spiffe://td/ns/n/sa/a".parse().unwrap();
        let (_, der) = key_and_request(&id).unwrap();
        let (_, csr) = X509CertificationRequest::from_der(&der).unwrap();
        let info = &csr.certification_request_info;
        assert_eq!(info.subject.iter().count(), 0, "the subject is empty");
        assert_eq!(info.iter_attributes().count(), 1);
        let mut raw = Vec::new();
        for attribute in info.iter_attributes() {
            if let ParsedCriAttribute::ExtensionRequest(request) = attribute.parsed_attribute() {
                raw.extend(&request.extensions);
            }
        }
        assert_eq!(raw.len(), 1);
        assert!(raw[0].critical);
        let text = format!("{:?}", raw[0].parsed_extension());
        assert!(text.contains("URI(\"spiffe://td/ns/n/sa/a\")"), "{text}");
        let curve = info.subject_pki.algorithm.parameters.as_ref().unwrap();
        assert_eq!(
            curve.as_oid().unwrap().to_id_string(),
            "1.2.840.10045.3.1.7"
        );
    }

    #[test]
    fn every_request_has_its_own_key() {
        let id: SpiffeId = "spiffe://td/ns/n/sa/a".parse().unwrap();
        let (first, _) = key_and_request(&id).unwrap();
        let (second, _) = key_and_request(&id).unwrap();
        assert_ne!(first.0, second.0);
    }

    #[test]
    fn debug_hides_the_key() {
        let id: SpiffeId = "spiffe://td/ns/n/sa/a".parse().unwrap();
        let (key, _) = key_and_request(&id).unwrap();
        assert_eq!(format!("{key:?}"), "PrivateKey(<hidden>)");
    }
}
