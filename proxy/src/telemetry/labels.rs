//! The label set of a traffic series, and how its values are printed.

use std::{
    fmt::{self, Write as _},
    hash::{Hash, Hasher},
    sync::Arc,
};

use prometheus_client::encoding::{EncodeLabelSet, LabelSetEncoder};

/// Everything that tells one traffic series from another, but for the response flag.
///
/// Callers fill it with borrowed [`Label`]s; the table of series keeps an owned copy the first time
/// it sees the set.
#[derive(Debug, Clone, Copy)]
pub struct Labels<T> {
    /// Which side of the connection reports.
    pub reporter: Reporter,
    /// Whether the peers proved their identities.
    pub security: Security,
    /// Who opened the connection.
    pub source: Party<T>,
    /// Who accepted it.
    pub destination: Party<T>,
    /// The service that was addressed.
    pub service: ServiceName<T>,
}

/// One side of a connection. The `*_version` label repeats the canonical revision and has no field.
#[derive(Debug, Clone, Copy, Default)]
pub struct Party<T> {
    /// Name of the controller, e.g. of the Deployment.
    pub workload: T,
    /// Canonical service name.
    pub canonical_service: T,
    /// Canonical service revision, also printed as version.
    pub canonical_revision: T,
    /// Kubernetes namespace.
    pub namespace: T,
    /// SPIFFE URI, scheme included.
    pub principal: T,
    /// Canonical name; the workload name for a peer known from its baggage only.
    pub app: T,
    /// Cluster id.
    pub cluster: T,
    /// Locality: region.
    pub region: T,
    /// Locality: zone.
    pub zone: T,
}

/// The three names of a service.
#[derive(Debug, Clone, Copy, Default)]
pub struct ServiceName<T> {
    /// Fully qualified host name.
    pub hostname: T,
    /// Namespace.
    pub namespace: T,
    /// Short name.
    pub name: T,
}

/// One value on its way in. Empty text counts as absent, and absent prints as `unknown`.
#[derive(Debug, Clone, Copy, Default)]
#[non_exhaustive]
pub enum Label<'a> {
    /// Not known.
    #[default]
    Absent,
    /// A shared string: kept without a copy.
    Shared(&'a Arc<str>),
    /// Any other text: copied once, when its series is made.
    Text(&'a str),
}

/// Which side of the connection reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Reporter {
    /// The outbound path.
    Source,
    /// Both inbound paths.
    Destination,
}

/// Whether the peers proved their identities.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Security {
    /// HBONE, simple or nested.
    MutualTls,
    /// Anything else.
    Unknown,
}

/// How a connection ended: the one vocabulary of metrics and logs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ResponseFlag {
    /// Without failure, or cut by a drain.
    None,
    /// Authorization denied it.
    Deny,
    /// The upstream failed, in a way no other flag names.
    Connect,
    /// TLS could not be configured.
    TlsFailure,
    /// The HTTP/2 connection failed.
    H2HandshakeFailure,
    /// No answer from the HBONE port within the connect timeout.
    NetworkPolicy,
    /// There was no certificate to present.
    IdentityError,
    /// A certificate of the peers was revoked.
    CertRevoked,
}

impl ResponseFlag {
    /// The flags of failed connections, in the order of [`Self::failure_index`].
    pub(super) const FAILURES: [Self; 7] = [
        Self::Deny,
        Self::Connect,
        Self::TlsFailure,
        Self::H2HandshakeFailure,
        Self::NetworkPolicy,
        Self::IdentityError,
        Self::CertRevoked,
    ];

    /// The value of the `response_flags` label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "-",
            Self::Deny => "DENY",
            Self::Connect => "CONNECT",
            Self::TlsFailure => "TLS_FAILURE",
            Self::H2HandshakeFailure => "H2_HANDSHAKE_FAILURE",
            Self::NetworkPolicy => "NETWORK_POLICY",
            Self::IdentityError => "IDENTITY_ERROR",
            Self::CertRevoked => "CERT_REVOKED",
        }
    }

    /// Position in [`Self::FAILURES`].
    pub(super) fn failure_index(self) -> Option<usize> {
        Self::FAILURES.iter().position(|&flag| flag == self)
    }
}

impl Reporter {
    /// The value of the `reporter` label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
        }
    }

    /// The direction in the access log.
    pub(super) fn direction(self) -> &'static str {
        match self {
            Self::Source => "outbound",
            Self::Destination => "inbound",
        }
    }
}

impl Security {
    /// The value of the `connection_security_policy` label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::MutualTls => "mutual_tls",
            Self::Unknown => UNKNOWN,
        }
    }
}

impl<'a> From<&'a Arc<str>> for Label<'a> {
    fn from(shared: &'a Arc<str>) -> Self {
        Self::Shared(shared)
    }
}

impl<'a> From<&'a str> for Label<'a> {
    fn from(text: &'a str) -> Self {
        Self::Text(text)
    }
}

impl<'a, T: Into<Self>> From<Option<T>> for Label<'a> {
    fn from(value: Option<T>) -> Self {
        value.map_or(Self::Absent, Into::into)
    }
}

impl<'a> Party<Label<'a>> {
    /// The source of a connection from what its peer `derived` for us (TLS identity, baggage) and
    /// from the `workload` record. The record overrides all but the principal, even where it is empty.
    pub fn source(derived: Option<Self>, workload: Option<Self>) -> Self {
        let derived = derived.unwrap_or_default();
        match workload {
            Some(workload) => Self {
                principal: derived.principal,
                ..workload
            },
            None => derived,
        }
    }

    /// A side of which nothing but its identity is known.
    pub fn identified(principal: impl Into<Label<'a>>) -> Self {
        Self {
            principal: principal.into(),
            ..Self::default()
        }
    }
}

/// A label value that can be printed; `unknown` when there is none.
pub trait LabelValue {
    /// The text, not yet escaped.
    fn value(&self) -> &str;
}

impl LabelValue for Label<'_> {
    fn value(&self) -> &str {
        match self.text() {
            "" => UNKNOWN,
            text => text,
        }
    }
}

/// A value as it is kept; `None` prints as `unknown`.
pub type Kept = Option<Arc<str>>;

impl LabelValue for Kept {
    fn value(&self) -> &str {
        self.as_deref().unwrap_or(UNKNOWN)
    }
}

impl Label<'_> {
    fn text(&self) -> &str {
        match self {
            Self::Absent => "",
            Self::Shared(shared) => shared,
            Self::Text(text) => text,
        }
    }

    /// The form that is kept. A text of `unknown` is kept as absent: both print alike.
    pub(super) fn kept(self) -> Kept {
        if self.value() == UNKNOWN {
            return None;
        }
        match self {
            Self::Absent => None,
            Self::Shared(shared) => Some(Arc::clone(shared)),
            Self::Text(text) => Some(Arc::from(text)),
        }
    }
}

impl<T: Copy> Party<T> {
    /// The same party with each value replaced.
    pub(super) fn map<U>(self, f: impl Fn(T) -> U) -> Party<U> {
        Party {
            workload: f(self.workload),
            canonical_service: f(self.canonical_service),
            canonical_revision: f(self.canonical_revision),
            namespace: f(self.namespace),
            principal: f(self.principal),
            app: f(self.app),
            cluster: f(self.cluster),
            region: f(self.region),
            zone: f(self.zone),
        }
    }
}

impl<T: Copy> ServiceName<T> {
    /// The same service with each value replaced.
    pub(super) fn map<U>(self, f: impl Fn(T) -> U) -> ServiceName<U> {
        ServiceName {
            hostname: f(self.hostname),
            namespace: f(self.namespace),
            name: f(self.name),
        }
    }
}

impl<T: LabelValue> Party<T> {
    fn values(&self) -> [&str; 9] {
        [
            self.workload.value(),
            self.canonical_service.value(),
            self.canonical_revision.value(),
            self.namespace.value(),
            self.principal.value(),
            self.app.value(),
            self.cluster.value(),
            self.region.value(),
            self.zone.value(),
        ]
    }
}

impl<T: LabelValue> ServiceName<T> {
    fn values(&self) -> [&str; 3] {
        [
            self.hostname.value(),
            self.namespace.value(),
            self.name.value(),
        ]
    }
}

impl<T: LabelValue> Hash for Labels<T> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.reporter.hash(state);
        self.security.hash(state);
        self.source.hash(state);
        self.destination.hash(state);
        self.service.hash(state);
    }
}

impl<T: LabelValue> Hash for Party<T> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.values().hash(state);
    }
}

impl<T: LabelValue> Hash for ServiceName<T> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.values().hash(state);
    }
}

impl<T: LabelValue, U: LabelValue> PartialEq<Party<U>> for Party<T> {
    /// Whether both print alike.
    fn eq(&self, other: &Party<U>) -> bool {
        self.values() == other.values()
    }
}

impl<T: LabelValue, U: LabelValue> PartialEq<ServiceName<U>> for ServiceName<T> {
    /// Whether both print alike.
    fn eq(&self, other: &ServiceName<U>) -> bool {
        self.values() == other.values()
    }
}

impl<T: LabelValue> Eq for Party<T> {}

impl<T: LabelValue> Eq for ServiceName<T> {}

/// Writes one label; the encoder escapes the value.
pub(super) fn label(set: &mut LabelSetEncoder<'_>, name: &str, value: &str) -> fmt::Result {
    let mut label = set.encode_label();
    let mut key = label.encode_label_key()?;
    key.write_str(name)?;
    let mut encoder = key.encode_label_value()?;
    encoder.write_str(value)?;
    encoder.finish()
}

/// A label set of one label: its name and its value.
#[derive(Debug)]
pub(super) struct Single(pub(super) &'static str, pub(super) &'static str);

impl EncodeLabelSet for Single {
    fn encode(&self, set: &mut LabelSetEncoder<'_>) -> fmt::Result {
        label(set, self.0, self.1)
    }
}

/// What an absent value prints as.
pub(super) const UNKNOWN: &str = "unknown";
/// What stands for names that were given up, because there were too many.
pub(super) const OTHER: &str = "other";
