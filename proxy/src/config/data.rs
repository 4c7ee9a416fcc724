//! Capture, sockets, HBONE and TLS.

use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use serde::Serialize;

use super::show;

/// What is captured, and how the pods of this node are found.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct Capture {
    /// `ENABLE_PROXY`.
    pub enabled: bool,
    /// `PROXY_MODE` and `PROXY_WORKLOAD_INFO`.
    pub mode: ProxyMode,
    /// `INPOD_UDS`: socket of the CNI node agent.
    pub agent_socket: PathBuf,
    /// Whether and where names are served to captured pods.
    pub dns: DnsCapture,
    /// `UNSTABLE_ENABLE_SOCKS5`.
    pub socks5: bool,
    /// `WORKLOAD_WAIT`, up to a minute: how long a connection waits for the record of its own workload; 10 s, the longest
    /// that istiod gathers changes before it tells of them.
    #[serde(serialize_with = "show::duration")]
    pub workload_wait: Duration,
}

/// Whom this process serves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub enum ProxyMode {
    /// Every pod the CNI agent names.
    Shared,
    /// One workload, in the process's own network namespace.
    Dedicated(WorkloadRef),
}

/// A workload by the names that Kubernetes gives it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
#[non_exhaustive]
pub struct WorkloadRef {
    /// Namespace.
    pub namespace: Arc<str>,
    /// Pod name.
    pub name: Arc<str>,
    /// Service account.
    pub service_account: Arc<str>,
}

impl WorkloadRef {
    /// Names a workload.
    pub fn new(
        namespace: impl Into<Arc<str>>,
        name: impl Into<Arc<str>>,
        service_account: impl Into<Arc<str>>,
    ) -> Self {
        Self {
            namespace: namespace.into(),
            name: name.into(),
            service_account: service_account.into(),
        }
    }
}

/// Whether names are served to captured pods.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub enum DnsCapture {
    /// `DNS_CAPTURE` present and not `true`.
    Off,
    /// On both loopback addresses, at this port.
    Loopback(u16),
    /// At one address.
    At(SocketAddr),
}

/// Options of every socket the proxy opens or accepts.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct Sockets {
    /// `PACKET_MARK`: 1337 in shared mode, `None` in dedicated mode unless set.
    pub mark: Option<u32>,
    /// `INPOD_PORT_REUSE`.
    pub reuse_port: bool,
    /// `ENABLE_ORIG_SRC`.
    pub original_source: OriginalSource,
    /// `IPV6_ENABLED`.
    pub ipv6: bool,
    /// `KEEPALIVE_*`; `None` when off.
    pub keepalive: Option<Keepalive>,
    /// `USER_TIMEOUT_ENABLED` with the keepalive values; `None` when off.
    #[serde(serialize_with = "show::optional_duration")]
    pub user_timeout: Option<Duration>,
    /// `HBONE_PEER_TIMEOUT`, 2 s to 1 h: how long the host of a tunnel's peer may leave bytes unacknowledged, or probes of an
    /// idle tunnel; 15 s. `None` leaves all to PINGs.
    #[serde(serialize_with = "show::optional_duration")]
    pub tunnel_timeout: Option<Duration>,
    /// Longest wait for a TCP connection, socket creation and bind included, and for an application
    /// to take its PROXY header; 10 s.
    #[serde(serialize_with = "show::duration")]
    pub connect_timeout: Duration,
    /// `LISTEN_BACKLOG`, 1 to 65 535: connections to an in-pod listener that wait to be accepted; 128.
    pub backlog: i32,
}

/// Whether the application sees the address of the real client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub enum OriginalSource {
    /// Try transparent sockets, go on without.
    Auto,
    /// Refuse to serve a pod where transparent sockets do not work.
    Required,
    /// Never try.
    Off,
}

/// TCP keepalive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Keepalive {
    /// Idle time before the first probe, 1 s to 32 767 s (what the kernel takes); 180 s.
    #[serde(serialize_with = "show::duration")]
    pub time: Duration,
    /// Time between probes, 1 s to 32 767 s; 180 s.
    #[serde(serialize_with = "show::duration")]
    pub interval: Duration,
    /// Probes before the connection counts as dead, 1 to 127; 9.
    pub retries: u32,
}

/// HTTP/2 and pool parameters of HBONE.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct Tunnel {
    /// `HTTP2_STREAM_WINDOW_SIZE`, bytes; 4 MiB.
    pub stream_window: u32,
    /// `HTTP2_CONNECTION_WINDOW_SIZE`, bytes; 16 MiB.
    pub connection_window: u32,
    /// `HTTP2_FRAME_SIZE`, bytes; 1 MiB.
    pub frame_size: u32,
    /// `POOL_MAX_STREAMS_PER_CONNECTION`, at least 1; 100.
    pub pool_max_streams: u16,
    /// `POOL_UNUSED_RELEASE_TIMEOUT`; 5 min.
    #[serde(serialize_with = "show::duration")]
    pub pool_idle_release: Duration,
    /// `HBONE_MAX_AGE`, default unlimited: how long a connection takes new streams, on either side.
    pub max_age: MaxAge,
    /// `HTTP2_MAX_STREAMS`, at least 1: streams a peer may have open on one connection; 200.
    pub server_max_streams: u32,
    /// `HTTP2_MAX_HEADER_BYTES`, at least 4096: largest header list accepted from a client; 65 536.
    pub server_max_header_bytes: u32,
    /// Largest header list accepted from a server, bytes; 16 384.
    pub client_max_header_bytes: u32,
    /// `HTTP2_MAX_CONTROL_FRAMES`, at least 1: frames without payload that a peer may send on one connection per second,
    /// averaged over 10 s; 1000.
    pub max_control_frames: u32,
    /// `HTTP2_MAX_RESETS`, at least 1: streams that a peer may reset on one connection per second, averaged over 10 s; 500.
    pub max_resets: u32,
    /// Longest wait for a TLS handshake, on either side; 10 s.
    #[serde(serialize_with = "show::duration")]
    pub handshake_timeout: Duration,
    /// Longest wait for the peer's HTTP/2 preface and SETTINGS; 10 s.
    #[serde(serialize_with = "show::duration")]
    pub preface_timeout: Duration,
    /// Longest wait for the answer to a CONNECT; 20 s, which leaves the peer its own 10 s connect.
    #[serde(serialize_with = "show::duration")]
    pub answer_timeout: Duration,
    /// Wait before the first PING and after each PONG; 10 s.
    #[serde(serialize_with = "show::duration")]
    pub ping_interval: Duration,
    /// Longest wait for a PONG; 20 s.
    #[serde(serialize_with = "show::duration")]
    pub ping_timeout: Duration,
}

impl Default for Tunnel {
    fn default() -> Self {
        let seconds = Duration::from_secs;
        Self {
            stream_window: 4 << 20,
            connection_window: 16 << 20,
            frame_size: 1 << 20,
            pool_max_streams: 100,
            pool_idle_release: seconds(300),
            max_age: MaxAge::Unlimited,
            server_max_streams: 200,
            server_max_header_bytes: 65_536,
            client_max_header_bytes: 16_384,
            max_control_frames: 1000,
            max_resets: 500,
            handshake_timeout: seconds(10),
            preface_timeout: seconds(10),
            answer_timeout: seconds(20),
            ping_interval: seconds(10),
            ping_timeout: seconds(20),
        }
    }
}

/// How long a connection takes new streams. After that it ends with its last stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum MaxAge {
    /// As long as it is of use.
    Unlimited,
    /// Until shortly before the certificate of either side ends, when both should have newer ones.
    Certificate,
    /// For this long, at least 1 s.
    For(Duration),
}

impl Serialize for MaxAge {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Unlimited => serializer.serialize_str("unlimited"),
            Self::Certificate => serializer.serialize_str("certificate"),
            Self::For(age) => show::duration(age, serializer),
        }
    }
}

/// TLS parameters of HBONE.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct Tls {
    /// `TLS12_ENABLED=true`: also offer TLS 1.2.
    pub tls12: bool,
    /// `COMPLIANCE_POLICY=pqc`.
    pub pqc: PqcPolicy,
    /// Any other `COMPLIANCE_POLICY`: without effect here, though the control plane may hold all others to it.
    pub ignored_policy: Option<String>,
    /// `TRUST_DOMAINS`: trust domains whose peers are accepted besides those of the own one.
    pub trust_domains: Arc<[Arc<str>]>,
    /// `TRUST_BUNDLE_PATH`: a PEM file of roots that peers may have besides those that came with a certificate.
    /// Default: the file of `CA_ROOT_CA`, unless certificates are signed in this process.
    pub trust_file: Option<PathBuf>,
    /// `TRUST_BUNDLE_GRACE`, default 1 h: for how long a root is trusted that is named no longer.
    #[serde(serialize_with = "show::duration")]
    pub trust_grace: Duration,
}

/// Which key exchanges are offered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub enum PqcPolicy {
    /// The library's default groups.
    Default,
    /// X25519MLKEM768 only.
    Required,
}

/// `SAME_NODE` and `SAME_NODE_NAMESPACES`: how flows between two pods that this process serves are carried.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct SameNode {
    /// For namespaces that are not listed.
    pub path: NodePath,
    /// For single namespaces.
    pub namespaces: BTreeMap<Arc<str>, NodePath>,
}

impl Default for SameNode {
    fn default() -> Self {
        Self {
            path: NodePath::Hbone,
            namespaces: BTreeMap::new(),
        }
    }
}

impl SameNode {
    /// Whether the pods of `namespace` may do without a tunnel. A flow does if both sides may.
    #[must_use]
    pub fn is_direct(&self, namespace: &str) -> bool {
        *self.namespaces.get(namespace).unwrap_or(&self.path) == NodePath::Direct
    }
}

/// The way between two pods of one process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum NodePath {
    /// A tunnel, as to any other pod.
    Hbone,
    /// From socket to socket, where both sides are proven and allowed as a tunnel would have them. Bytes are not encrypted.
    Direct,
}

/// Inbound behaviour that is not routing.
#[derive(Debug, Clone, Copy, Serialize)]
#[non_exhaustive]
pub struct Inbound {
    /// `ENABLE_RESPONSE_BAGGAGE`: read and answer baggage.
    pub baggage: bool,
    /// `LOCALHOST_APP_TUNNEL`: application tunnels go to loopback.
    pub localhost_app_tunnel: bool,
}
