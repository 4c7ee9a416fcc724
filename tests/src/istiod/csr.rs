//! What the certificate service was asked for.

use std::collections::BTreeMap;

use cert_agent::istio::proto::IstioCertificateRequest;
use prost_types::{Struct, value};
use tokio::time::Instant;
use tonic::Code;
use x509_parser::{
    certification_request::X509CertificationRequest,
    extensions::{GeneralName, ParsedExtension},
    oid_registry,
    prelude::FromDer as _,
    public_key::PublicKey,
};

use super::server::Hello;

/// One call of the certificate service.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct CertificateCall {
    /// Number of the connection that it came over.
    pub connection: u64,
    /// The name that the client sent in its TLS hello.
    pub server_name: Option<String>,
    /// Metadata of the call, without binary ones.
    pub headers: BTreeMap<String, String>,
    /// `ImpersonatedIdentity`.
    pub impersonated: Option<String>,
    /// All of the request's metadata.
    pub metadata: Option<Struct>,
    /// Requested lifetime.
    pub validity_seconds: i64,
    /// As it came.
    pub csr_pem: String,
    /// As it was read; `None` if it is none.
    pub csr: Option<Csr>,
    /// When it came.
    pub came: Instant,
    /// How it ended, and when.
    pub ended: Option<(Outcome, Instant)>,
}

/// How a call ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Outcome {
    /// With a chain, be it flawed.
    Answered,
    /// With a status.
    Refused(Code),
    /// The client gave up, or its connection ended.
    Cancelled,
}

/// A certificate request.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Csr {
    /// Whether the key is on the curve P-256.
    pub is_p256: bool,
    /// The key.
    pub public_key: Vec<u8>,
    /// Whether its signature is right.
    pub is_signed: bool,
    /// Entries of the subject.
    pub subject_entries: usize,
    /// URI names.
    pub uris: Vec<String>,
    /// Names of other types.
    pub other_names: usize,
    /// Whether the names are critical.
    pub names_are_critical: bool,
    /// The number of requested extensions.
    pub extensions: usize,
}

impl CertificateCall {
    pub(super) fn new(
        hello: Option<Hello>,
        headers: BTreeMap<String, String>,
        request: IstioCertificateRequest,
    ) -> Self {
        let metadata = request.metadata;
        let fields = metadata.as_ref().map(|metadata| &metadata.fields);
        let impersonated = fields.and_then(|fields| fields.get("ImpersonatedIdentity"));
        let impersonated = impersonated.and_then(|value| match &value.kind {
            Some(value::Kind::StringValue(id)) => Some(id.clone()),
            _ => None,
        });
        Self {
            connection: hello.as_ref().map_or(0, |hello| hello.connection),
            server_name: hello.and_then(|hello| hello.server_name),
            headers,
            impersonated,
            metadata,
            validity_seconds: request.validity_duration,
            csr: Csr::parse(&request.csr),
            csr_pem: request.csr,
            came: Instant::now(),
            ended: None,
        }
    }

    /// Whether it is not answered yet.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.ended.is_none()
    }

    /// How it ended.
    #[must_use]
    pub fn outcome(&self) -> Option<Outcome> {
        self.ended.map(|(outcome, _)| outcome)
    }

    /// The key to be certified.
    ///
    /// # Panics
    /// When there was no request.
    #[must_use]
    pub fn public_key(&self) -> &[u8] {
        &self.csr.as_ref().expect("a request").public_key
    }

    pub(super) fn end(&mut self, outcome: Outcome) {
        self.ended = Some((outcome, Instant::now()));
    }
}

impl Csr {
    fn parse(text: &str) -> Option<Self> {
        let (_, block) = x509_parser::pem::parse_x509_pem(text.as_bytes()).ok()?;
        if block.label != "CERTIFICATE REQUEST" {
            return None;
        }
        let (_, csr) = X509CertificationRequest::from_der(&block.contents).ok()?;
        let info = &csr.certification_request_info;
        let key = &info.subject_pki;
        let curve = key.algorithm.parameters.as_ref();
        let curve = curve.and_then(|parameters| parameters.as_oid().ok());
        let is_p256 = matches!(key.parsed(), Ok(PublicKey::EC(_)))
            && curve.is_some_and(|curve| curve == oid_registry::OID_EC_P256);
        let mut parsed = Self {
            is_p256,
            public_key: key.subject_public_key.data.to_vec(),
            is_signed: csr.verify_signature().is_ok(),
            subject_entries: info.subject.iter().count(),
            uris: Vec::new(),
            other_names: 0,
            names_are_critical: false,
            extensions: 0,
        };
        for attribute in info.iter_attributes() {
            parsed.attribute(attribute.parsed_attribute());
        }
        Some(parsed)
    }

    fn attribute(&mut self, attribute: &x509_parser::cri_attributes::ParsedCriAttribute<'_>) {
        use x509_parser::cri_attributes::ParsedCriAttribute;
        let ParsedCriAttribute::ExtensionRequest(request) = attribute else {
            return;
        };
        self.extensions += request.extensions.len();
        for extension in &request.extensions {
            let ParsedExtension::SubjectAlternativeName(names) = extension.parsed_extension()
            else {
                continue;
            };
            self.names_are_critical = extension.critical;
            for name in &names.general_names {
                if let GeneralName::URI(uri) = name {
                    self.uris.push((*uri).to_owned());
                } else {
                    self.other_names += 1;
                }
            }
        }
    }
}
