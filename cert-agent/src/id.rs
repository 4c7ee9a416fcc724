//! The identity of a workload: `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`.

use std::{fmt, str::FromStr, sync::Arc};

/// A SPIFFE identity in the form that Istio gives it. Checked where it enters, trusted everywhere
/// after; clones share one allocation.
///
/// The text is kept byte for byte: identities are compared case-sensitively in all three parts.
/// Beyond the Istio form, what the SPIFFE standard asks for holds as well: no empty part, no
/// percent-encoding, characters `[A-Za-z0-9._-]`, a trust domain of at most 255 and a whole of at
/// most 2048 bytes.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpiffeId {
    uri: Arc<str>,
    /// End of the trust domain within `uri`.
    domain_end: u16,
    /// End of the namespace within `uri`.
    namespace_end: u16,
}

impl SpiffeId {
    /// Builds the identity of a service account. An `@` in the trust domain becomes `.`, as
    /// istiod does it.
    ///
    /// # Errors
    /// If a part is empty or holds a character that SPIFFE does not allow.
    pub fn new(
        trust_domain: &str,
        namespace: &str,
        service_account: &str,
    ) -> Result<Self, SpiffeIdError> {
        let trust_domain = trust_domain.replace('@', ".");
        format!("{SCHEME}{trust_domain}{NAMESPACE}{namespace}{ACCOUNT}{service_account}").parse()
    }

    /// The trust domain.
    #[must_use]
    pub fn trust_domain(&self) -> &str {
        self.part(SCHEME.len(), self.domain_end.into())
    }

    /// The Kubernetes namespace.
    #[must_use]
    pub fn namespace(&self) -> &str {
        let start = usize::from(self.domain_end) + NAMESPACE.len();
        self.part(start, self.namespace_end.into())
    }

    /// The Kubernetes service account.
    #[must_use]
    pub fn service_account(&self) -> &str {
        let start = usize::from(self.namespace_end) + ACCOUNT.len();
        self.part(start, self.uri.len())
    }

    /// The whole URI.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.uri
    }

    fn part(&self, start: usize, end: usize) -> &str {
        // The bounds were found by the parser in this very text.
        self.uri.get(start..end).unwrap_or_default()
    }
}

impl FromStr for SpiffeId {
    type Err = SpiffeIdError;

    fn from_str(uri: &str) -> Result<Self, SpiffeIdError> {
        let rest = uri.strip_prefix(SCHEME).ok_or(SpiffeIdError::Scheme)?;
        let mut parts = rest.split('/');
        let (Some(domain), Some("ns"), Some(namespace), Some("sa"), Some(_), None) = (
            parts.next(),
            parts.next(),
            parts.next(),
            parts.next(),
            parts.next(),
            parts.next(),
        ) else {
            return Err(SpiffeIdError::Form);
        };
        if uri.len() > MAX_URI_BYTES {
            return Err(SpiffeIdError::TooLong);
        }
        spiffe::SpiffeId::new(uri)?;
        let domain_end = SCHEME.len() + domain.len();
        let namespace_end = domain_end + NAMESPACE.len() + namespace.len();
        Ok(Self {
            uri: uri.into(),
            domain_end: u16::try_from(domain_end).map_err(|_| SpiffeIdError::TooLong)?,
            namespace_end: u16::try_from(namespace_end).map_err(|_| SpiffeIdError::TooLong)?,
        })
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.uri)
    }
}

impl fmt::Debug for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.uri)
    }
}

impl AsRef<str> for SpiffeId {
    fn as_ref(&self) -> &str {
        &self.uri
    }
}

/// Why a text is not an identity.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum SpiffeIdError {
    /// The text does not begin with `spiffe://` in lower case.
    #[error("identity does not begin with spiffe://")]
    Scheme,
    /// The path is not `/ns/<namespace>/sa/<service account>`.
    #[error("identity is not of the form spiffe://<trust domain>/ns/<namespace>/sa/<account>")]
    Form,
    /// The URI is longer than SPIFFE allows.
    #[error("identity is longer than 2048 bytes")]
    TooLong,
    /// The SPIFFE standard forbids it.
    #[error("identity breaks the SPIFFE standard")]
    Syntax(#[from] spiffe::SpiffeIdError),
}

const SCHEME: &str = "spiffe://";
const NAMESPACE: &str = "/ns/";
const ACCOUNT: &str = "/sa/";
const MAX_URI_BYTES: usize = 2048;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn takes_the_istio_form_apart() {
        let id: SpiffeId = "spiffe://td.x/ns/n.y/sa/a.z".parse().unwrap();
        assert_eq!(
            (id.trust_domain(), id.namespace(), id.service_account()),
            ("td.x", "n.y", "a.z")
        );
        assert_eq!(id.to_string(), "spiffe://td.x/ns/n.y/sa/a.z");
        assert_eq!(format!("{id:?}"), id.as_str());
    }

    #[test]
    fn refuses_every_other_form() {
        for bad in [
            "",
            "td/ns/n/sa/a",
            "SPIFFE://td/ns/n/sa/a",
            "http://td/ns/n/sa/a",
            "spiffe://td/ns/n/sa/a/",
            "spiffe://td/ns/n/sa",
            "spiffe://td/ns/n/sa/a/b",
            "spiffe://td/NS/n/sa/a",
            "spiffe://td/ns/n/account/a",
            "spiffe:///ns/n/sa/a",
            "spiffe://td/ns//sa/a",
            "spiffe://td/ns/n/sa/",
            "spiffe://td/ns/../sa/a",
            "spiffe://td/ns/n%20/sa/a",
            "spiffe://t d/ns/n/sa/a",
            "spiffe://td:80/ns/n/sa/a",
        ] {
            assert!(bad.parse::<SpiffeId>().is_err(), "{bad} was accepted");
        }
        let long = format!("spiffe://td/ns/n/sa/{}", "a".repeat(2048));
        assert_eq!(long.parse::<SpiffeId>(), Err(SpiffeIdError::TooLong));
        let long = format!("spiffe://{}/ns/n/sa/a", "d".repeat(256));
        assert!(long.parse::<SpiffeId>().is_err());
    }

    #[test]
    fn compares_case_sensitively() {
        let lower: SpiffeId = "spiffe://td/ns/n/sa/a".parse().unwrap();
        let upper: SpiffeId = "spiffe://TD/ns/n/sa/a".parse().unwrap();
        assert_ne!(lower, upper);
        assert_eq!(upper.trust_domain(), "TD");
    }

    #[test]
    fn builds_with_at_sign_replaced() {
        let id = SpiffeId::new("me@corp.example", "n", "a").unwrap();
        assert_eq!(id.as_str(), "spiffe://me.corp.example/ns/n/sa/a");
        assert!(SpiffeId::new("td", "", "a").is_err());
        assert!(SpiffeId::new("td", "n/sa/x", "a").is_err());
    }

    proptest! {
        #[test]
        fn parts_round_trip(
            domain in "[a-z0-9._-]{1,40}", namespace in "[a-z0-9][A-Za-z0-9._-]{0,30}", account in "[a-z0-9][A-Za-z0-9._-]{0,30}",
        ) {
            let id = SpiffeId::new(&domain, &namespace, &account).unwrap();
            prop_assert_eq!(id.trust_domain(), &domain);
            prop_assert_eq!(id.namespace(), &namespace);
            prop_assert_eq!(id.service_account(), &account);
            prop_assert_eq!(id.as_str().parse::<SpiffeId>().unwrap(), id);
        }

        #[test]
        fn arbitrary_text_never_panics(text in "(spiffe://)?[\\PC/]{0,60}") {
            if let Ok(id) = text.parse::<SpiffeId>() {
                prop_assert_eq!(id.as_str(), &text);
                prop_assert!(!id.namespace().is_empty() && !id.service_account().is_empty());
            }
        }
    }
}
