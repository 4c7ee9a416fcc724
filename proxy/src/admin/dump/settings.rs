//! The effective configuration, in the types that Kiali knows: what has another form here is given in one of its, or left out.

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc, time::Duration};

use serde::Serialize;

use crate::config::{
    Address, CertificateSource, Config, DnsCapture, OriginalSource, ProxyMode, RootSource,
};

/// The `config` section of the dump. Values of headers and other secrets are not in it.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
#[expect(clippy::struct_excessive_bools, reason = "the switches of the dump")]
pub struct Settings {
    admin_addr: Bound,
    #[serde(skip_serializing_if = "Option::is_none")]
    alt_ca_hostname: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    alt_xds_hostname: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ca_address: Option<String>,
    ca_headers: Vec<[String; 2]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ca_root_cert: Option<RootFile>,
    cluster_domain: Arc<str>,
    cluster_id: Arc<str>,
    connection_window_size: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    crl_path: Option<String>,
    dns_proxy: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    dns_proxy_addr: Option<Bound>,
    enable_enhanced_baggage: bool,
    fake_ca: bool,
    fake_self_inbound: bool,
    frame_size: u32,
    illegal_ports: [u16; 4],
    inbound_addr: String,
    inbound_plaintext_addr: String,
    inpod_port_reuse: bool,
    inpod_uds: String,
    ipv6_enabled: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    local_node: Option<Arc<str>>,
    localhost_app_tunnel: bool,
    network: Arc<str>,
    num_worker_threads: usize,
    outbound_addr: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    packet_mark: Option<u32>,
    pool_max_streams_per_conn: u16,
    pool_unused_release_timeout: Span,
    #[serde(skip_serializing_if = "Option::is_none")]
    prefered_service_namespace: Option<Arc<str>>,
    proxy: bool,
    proxy_args: String,
    proxy_metadata: BTreeMap<String, String>,
    proxy_mode: &'static str,
    proxy_workload_information: Option<String>,
    readiness_addr: Bound,
    require_original_source: Option<&'static str>,
    secret_ttl: Span,
    self_termination_deadline: Span,
    socks5_addr: Option<String>,
    stats_addr: Bound,
    window_size: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    xds_address: Option<String>,
    xds_headers: Vec<[String; 2]>,
    xds_on_demand: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    xds_root_cert: Option<RootFile>,
}

impl Settings {
    /// Takes from `config` what is shown.
    #[must_use]
    #[expect(clippy::too_many_lines, reason = "one line per key")]
    pub fn of(config: &Config) -> Self {
        let Config {
            identity,
            control,
            capture,
            sockets,
            tunnel,
            ports,
            ..
        } = config;
        let any = |port| any_address(port, sockets.ipv6);
        let xds = control.xds.as_ref();
        let ca = match &control.certificates {
            CertificateSource::Istio(address) => Some(address),
            CertificateSource::OpenBao(_) | CertificateSource::InProcess { .. } => None,
        };
        let (proxy_mode, own) = match &capture.mode {
            ProxyMode::Shared => (SHARED, None),
            ProxyMode::Dedicated(who) => {
                let who = [&*who.namespace, &*who.name, &*who.service_account];
                ("Dedicated", Some(who.join("/")))
            }
        };
        Self {
            admin_addr: Bound::Localhost(sockets.ipv6, ports.admin),
            alt_ca_hostname: ca.and_then(|address| address.alternative_host.clone()),
            alt_xds_hostname: xds.and_then(|address| address.alternative_host.clone()),
            ca_address: ca_address(&control.certificates),
            ca_headers: headers(ca),
            ca_root_cert: root_file(ca),
            cluster_domain: Arc::clone(&identity.cluster_domain),
            cluster_id: Arc::clone(&identity.cluster_id),
            connection_window_size: tunnel.connection_window,
            crl_path: control
                .crl_path
                .as_ref()
                .map(|path| path.display().to_string()),
            dns_proxy: capture.dns != DnsCapture::Off,
            dns_proxy_addr: match capture.dns {
                DnsCapture::Off => None,
                DnsCapture::Loopback(port) => Some(Bound::Localhost(sockets.ipv6, port)),
                DnsCapture::At(address) => Some(Bound::SocketAddr(address.to_string())),
            },
            enable_enhanced_baggage: config.inbound.baggage,
            fake_ca: matches!(control.certificates, CertificateSource::InProcess { .. }),
            fake_self_inbound: false,
            frame_size: tunnel.frame_size,
            illegal_ports: [
                ports.outbound,
                ports.inbound_plaintext,
                ports.hbone,
                ports.socks5,
            ],
            inbound_addr: any(ports.hbone),
            inbound_plaintext_addr: any(ports.inbound_plaintext),
            inpod_port_reuse: sockets.reuse_port,
            inpod_uds: capture.agent_socket.display().to_string(),
            ipv6_enabled: sockets.ipv6,
            local_node: identity.node_name.clone(),
            localhost_app_tunnel: config.inbound.localhost_app_tunnel,
            network: Arc::clone(&identity.network),
            num_worker_threads: config.runtime.worker_threads,
            outbound_addr: any(ports.outbound),
            packet_mark: sockets.mark,
            pool_max_streams_per_conn: tunnel.pool_max_streams,
            pool_unused_release_timeout: tunnel.pool_idle_release.into(),
            prefered_service_namespace: control.preferred_service_namespace.clone(),
            proxy: capture.enabled,
            proxy_args: config.runtime.arguments.clone(),
            proxy_metadata: identity.metadata.clone(),
            proxy_mode,
            proxy_workload_information: own,
            readiness_addr: Bound::SocketAddr(any(ports.readiness)),
            require_original_source: match sockets.original_source {
                OriginalSource::Auto => None,
                OriginalSource::Required => Some("true"),
                OriginalSource::Off => Some("false"),
            },
            secret_ttl: control.secret_ttl.into(),
            self_termination_deadline: config.drain.deadline.into(),
            socks5_addr: capture
                .socks5
                .then(|| format!("127.0.0.1:{}", ports.socks5)),
            stats_addr: Bound::SocketAddr(any(ports.stats)),
            window_size: tunnel.stream_window,
            xds_address: xds.map(|address| address.uri.to_string()),
            xds_headers: headers(xds),
            xds_on_demand: control.on_demand,
            xds_root_cert: root_file(xds),
        }
    }

    pub(in crate::admin) fn node(&self) -> Option<&str> {
        self.local_node.as_deref()
    }

    /// Who signs certificates; `None` if this process does.
    pub(in crate::admin) fn authority(&self) -> Option<&str> {
        self.ca_address.as_deref()
    }

    pub(in crate::admin) fn cluster_domain(&self) -> &str {
        &self.cluster_domain
    }

    pub(super) fn is_shared(&self) -> bool {
        self.proxy_mode == SHARED
    }
}

const SHARED: &str = "Shared";

fn any_address(port: u16, ipv6: bool) -> String {
    let any: SocketAddr = if ipv6 {
        (std::net::Ipv6Addr::UNSPECIFIED, port).into()
    } else {
        (std::net::Ipv4Addr::UNSPECIFIED, port).into()
    };
    any.to_string()
}

fn ca_address(source: &CertificateSource) -> Option<String> {
    match source {
        CertificateSource::Istio(address) => Some(address.uri.to_string()),
        CertificateSource::OpenBao(server) => Some(server.address.to_string()),
        CertificateSource::InProcess { .. } => None,
    }
}

/// Pairs of name and value, as others print them, but without the value.
fn headers(address: Option<&Address>) -> Vec<[String; 2]> {
    let headers = address.into_iter().flat_map(|address| &address.headers);
    let hidden = headers.map(|header| [header.name.to_string(), "<redacted>".to_owned()]);
    hidden.collect()
}

/// Roots that are not in a file have no form that Kiali reads.
fn root_file(address: Option<&Address>) -> Option<RootFile> {
    match &address?.roots {
        RootSource::File(path) => Some(RootFile {
            file: path.display().to_string(),
        }),
        RootSource::System | RootSource::Pem(_) => None,
    }
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
struct RootFile {
    file: String,
}

/// Where a server listens: `{"Localhost": [true, 15000]}`, with whether IPv6 is meant too, or `{"SocketAddr": "…"}`.
#[derive(Debug, Clone, Serialize)]
enum Bound {
    Localhost(bool, u16),
    SocketAddr(String),
}

#[derive(Debug, Clone, Serialize)]
struct Span {
    secs: u64,
    nanos: u32,
}

impl From<Duration> for Span {
    fn from(duration: Duration) -> Self {
        Self {
            secs: duration.as_secs(),
            nanos: duration.subsec_nanos(),
        }
    }
}
