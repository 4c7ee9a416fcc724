//! Identity of the proxy and its control-plane connections.

use std::{collections::BTreeMap, path::PathBuf, sync::Arc, time::Duration};

use serde::{Serialize, Serializer};

use super::{OpenBao, show};

/// Who this proxy is. Sent to the control plane as the xDS node, and used to tell local workloads
/// from remote ones.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct Identity {
    /// `NODE_NAME`: the Kubernetes node; `None` makes every workload count as local.
    pub node_name: Option<Arc<str>>,
    /// `POD_NAME`, empty if unset.
    pub pod_name: Arc<str>,
    /// `POD_NAMESPACE`, empty if unset.
    pub pod_namespace: Arc<str>,
    /// `INSTANCE_IP`, default `1.1.1.1`.
    pub instance_ip: Arc<str>,
    /// `NETWORK`: id of the network this node is in, empty for the default network.
    pub network: Arc<str>,
    /// `ISTIO_META_CLUSTER_ID`, else `CLUSTER_ID`, else `Kubernetes`.
    pub cluster_id: Arc<str>,
    /// `CLUSTER_DOMAIN`; default: that of the proxy's own search list (`svc.X` besides `X`), else `cluster.local`.
    pub cluster_domain: Arc<str>,
    /// `ISTIO_META_ISTIO_VERSION`, default `unknown`: the `tag` of `istio_build`.
    pub istio_version: Arc<str>,
    /// Present when `POD_NAME`, `POD_NAMESPACE` and `SERVICE_ACCOUNT` are all set: the proxy then
    /// serves HBONE for itself in its own network namespace.
    pub own: Option<SelfIdentity>,
    /// Node metadata: `proxyMetadata` and `ISTIO_META_*`, prefix stripped.
    pub metadata: BTreeMap<String, String>,
    /// `ISTIO_METAJSON_*`, prefix stripped.
    pub json_metadata: BTreeMap<String, serde_json::Value>,
}

/// The SPIFFE identity of the proxy's own pod.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct SelfIdentity {
    /// `TRUST_DOMAIN`, default `cluster.local`.
    pub trust_domain: Arc<str>,
    /// `POD_NAMESPACE`.
    pub namespace: Arc<str>,
    /// `SERVICE_ACCOUNT`.
    pub service_account: Arc<str>,
}

/// Where mesh state and certificates come from.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct ControlPlane {
    /// `XDS_ADDRESS`; `None` turns delta xDS off.
    pub xds: Option<Address>,
    /// `LOCAL_XDS_PATH` or `LOCAL_XDS`.
    pub local: Option<MeshSource>,
    /// `XDS_ON_DEMAND`.
    pub on_demand: bool,
    /// Who signs certificates.
    pub certificates: CertificateSource,
    /// `CA_CERT_WATCHER`: a file of trust roots of the authority that changes takes the connection to it out of use.
    pub watches_ca_roots: bool,
    /// `SECRET_TTL`, default 24 h: requested certificate lifetime.
    #[serde(serialize_with = "show::duration")]
    pub secret_ttl: Duration,
    /// `AUTH_TOKEN`; `None` sends no authentication headers.
    pub token: Option<AuthToken>,
    /// `PREFERED_SERVICE_NAMESPACE`.
    pub preferred_service_namespace: Option<Arc<str>>,
    /// `CRL_PATH`.
    pub crl_path: Option<PathBuf>,
    /// `STATE_DIR`; `None` keeps nothing on disk.
    pub last_known: Option<LastKnown>,
    /// `STATE_KEYS`: a directory in memory for certificates and their keys; `tmpfs` is `keys` below `STATE_DIR`. `None` keeps none.
    pub kept_keys: Option<PathBuf>,
}

/// Where what the control plane told is kept for a start without it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct LastKnown {
    /// `STATE_DIR`: a directory of this proxy alone.
    pub directory: PathBuf,
    /// `STATE_MAX_BYTES`, default 256 MiB: a mesh that takes more is not kept.
    pub max_bytes: u64,
}

/// One control-plane server.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct Address {
    /// `https://host:port`.
    #[serde(serialize_with = "show::text")]
    pub uri: http::Uri,
    /// Trust roots of the server.
    pub roots: RootSource,
    /// Second name accepted when the server certificate is verified.
    pub alternative_host: Option<String>,
    /// Extra gRPC metadata; values are never logged.
    pub headers: Vec<Header>,
}

/// One extra gRPC metadata entry. `Debug` hides the value.
#[derive(Clone)]
#[non_exhaustive]
pub struct Header {
    /// Lower-case metadata name.
    pub name: http::HeaderName,
    /// The value, marked sensitive.
    pub value: http::HeaderValue,
}

impl std::fmt::Debug for Header {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.name, show::REDACTED)
    }
}

impl Serialize for Header {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{self:?}"))
    }
}

/// Trust roots of a control-plane server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub enum RootSource {
    /// A PEM file, read again on each connect; it may appear later.
    File(PathBuf),
    /// The roots of the operating system.
    System,
    /// PEM text given inline.
    Pem(#[serde(serialize_with = "show::size")] String),
}

/// The token shown to the control plane. `Debug` hides a literal.
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum AuthToken {
    /// A file, read again for every request.
    File(PathBuf),
    /// The token itself.
    Literal(String),
}

impl std::fmt::Debug for AuthToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File(path) => f.debug_tuple("File").field(path).finish(),
            Self::Literal(_) => write!(f, "Literal({})", show::REDACTED),
        }
    }
}

impl Serialize for AuthToken {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::File(path) => serializer.serialize_newtype_variant("AuthToken", 0, "File", path),
            Self::Literal(_) => {
                serializer.serialize_newtype_variant("AuthToken", 1, "Literal", show::REDACTED)
            }
        }
    }
}

/// A mesh description without a control plane.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub enum MeshSource {
    /// `LOCAL_XDS_PATH`: a YAML file, loaded again when it changes.
    File(PathBuf),
    /// `LOCAL_XDS`: the YAML text.
    Text(#[serde(serialize_with = "show::size")] String),
}

/// Who signs workload certificates.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub enum CertificateSource {
    /// `CA_ADDRESS`: a server of `istio.v1.auth.IstioCertificateService`.
    Istio(Address),
    /// `CA_PROVIDER=openbao`: the PKI engine of an OpenBao server.
    OpenBao(Box<OpenBao>),
    /// `FAKE_CA=true`: a CA inside this process, for tests and demonstrations.
    InProcess {
        /// `FAKE_CA_ROOT_CERT` and `FAKE_CA_ROOT_KEY`: PEM certificate and PKCS#8 key of a root that several processes share;
        /// `None` makes a fresh random root.
        root: Option<(PathBuf, PathBuf)>,
    },
}
