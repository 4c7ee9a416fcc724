//! The sections of the data plane: capture, sockets, HBONE, TLS, inbound, flows within the node.

use std::{collections::BTreeMap, fmt, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use super::{
    fault::Given,
    reader::Reader,
    value::{self, Reject},
};
use crate::config::{
    Capture, DnsCapture, Inbound, Keepalive, MaxAge, NodePath, OriginalSource, ProxyMode, SameNode,
    Sockets, Tunnel, WorkloadRef,
};

/// `metadata` is the merged node metadata, two keys of which act here.
pub(super) fn capture(reader: &mut Reader<'_>, metadata: &BTreeMap<String, String>) -> Capture {
    Capture {
        enabled: reader.boolean("ENABLE_PROXY", true),
        mode: mode(reader),
        agent_socket: agent_socket(reader),
        dns: dns(reader, metadata),
        socks5: reader.boolean("UNSTABLE_ENABLE_SOCKS5", false),
        workload_wait: reader
            .typed("WORKLOAD_WAIT", workload_wait)
            .unwrap_or(Duration::from_secs(10)),
    }
}

/// Combinations of features that do not work.
pub(super) fn check_features(reader: &mut Reader<'_>, capture: &Capture, on_demand: bool) {
    let dns_off = capture.dns == DnsCapture::Off;
    if !capture.enabled && dns_off {
        let reject = Reject::new(
            "with DNS capture off too there is nothing to do",
            "ENABLE_PROXY=true, or ISTIO_META_DNS_CAPTURE=true",
        );
        reader.fault("ENABLE_PROXY", Given::Value("false".into()), reject);
    }
    if on_demand && !dns_off {
        let reject = Reject::new(
            "names cannot be served while services are looked up on demand",
            "false, or ISTIO_META_DNS_CAPTURE=false beside it",
        );
        reader.fault("XDS_ON_DEMAND", Given::Value("true".into()), reject);
    }
}

/// An application that is kept longer has given up.
fn workload_wait(text: &str) -> Result<Duration, Reject> {
    let reject = |reason| Reject::new(reason, "a duration up to 1m, such as 10s");
    match value::duration(text) {
        Ok(wait) if wait <= Duration::from_mins(1) => Ok(wait),
        Ok(_) => Err(reject("out of range")),
        Err(Reject { reason, .. }) => Err(reject(&reason)),
    }
}

fn mode(reader: &mut Reader<'_>) -> ProxyMode {
    let dedicated = reader.typed("PROXY_MODE", |text| match text {
        "shared" => Ok(false),
        "dedicated" => Ok(true),
        _ => Err(Reject::new("not a mode", "shared or dedicated")),
    });
    if dedicated != Some(true) {
        return ProxyMode::Shared;
    }
    let key = "PROXY_WORKLOAD_INFO";
    let outcome = reader.raw(key).and_then(workload_ref).ok_or_else(|| {
        Reject::new(
            "PROXY_MODE=dedicated needs to know its workload",
            "namespace/name/serviceaccount",
        )
    });
    let given = reader
        .raw(key)
        .map_or(Given::Nothing, |text| Given::Value(text.into()));
    reader
        .keep(key, given, outcome)
        .map_or(ProxyMode::Shared, ProxyMode::Dedicated)
}

fn workload_ref(text: &str) -> Option<WorkloadRef> {
    let mut parts = text.split('/').filter(|part| !part.is_empty());
    let workload = WorkloadRef::new(parts.next()?, parts.next()?, parts.next()?);
    (text.matches('/').count() == 2).then_some(workload)
}

fn agent_socket(reader: &mut Reader<'_>) -> PathBuf {
    let Some(text) = reader.text("INPOD_UDS") else {
        return "/var/run/ztunnel/ztunnel.sock".into();
    };
    if text.len() > MAX_SOCKET_PATH_BYTES {
        let reject = Reject::new(
            "too long for a Unix socket",
            format!("a path of at most {MAX_SOCKET_PATH_BYTES} bytes"),
        );
        reader.fault("INPOD_UDS", Given::Value(text.to_owned()), reject);
    }
    text.into()
}

fn dns(reader: &mut Reader<'_>, metadata: &BTreeMap<String, String>) -> DnsCapture {
    let listen = metadata
        .get("DNS_PROXY_ADDR")
        .map_or(Some(DEFAULT_DNS), |text| {
            let key = "ISTIO_META_DNS_PROXY_ADDR";
            reader.keep(key, Given::Value(text.clone()), dns_address(text))
        });
    let on = metadata
        .get("DNS_CAPTURE")
        .is_none_or(|text| text.eq_ignore_ascii_case("true"));
    if on {
        listen.unwrap_or(DEFAULT_DNS)
    } else {
        DnsCapture::Off
    }
}

fn dns_address(text: &str) -> Result<DnsCapture, Reject> {
    let reject = || Reject::new("not an address to listen at", "localhost:PORT or IP:PORT");
    if let Some(port) = text.strip_prefix("localhost:") {
        return value::integer(port, &(1..=u16::MAX))
            .map(DnsCapture::Loopback)
            .map_err(|_| reject());
    }
    let address = text.parse::<SocketAddr>().ok();
    // Port 0 would be another port for each socket.
    let address = address.filter(|address| address.port() > 0);
    address.map(DnsCapture::At).ok_or_else(reject)
}

pub(super) fn sockets(reader: &mut Reader<'_>, mode: &ProxyMode) -> Sockets {
    let mark = reader.typed("PACKET_MARK", |text| value::integer(text, &(0..=u32::MAX)));
    let default_mark = match mode {
        ProxyMode::Shared => Some(CNI_MARK),
        ProxyMode::Dedicated(_) => None,
    };
    let keepalive = keepalive(reader);
    if mark.is_some_and(|mark| mark & MARK_MASK != CNI_MARK) && *mode == ProxyMode::Shared {
        tracing::warn!(
            "PACKET_MARK is not the mark that the CNI agent's rules look for: the proxy's own packets will be redirected to it"
        );
    }
    let user_timeout = reader.boolean("USER_TIMEOUT_ENABLED", false);
    let original_source = match reader.typed("ENABLE_ORIG_SRC", value::boolean) {
        None => OriginalSource::Auto,
        Some(true) => OriginalSource::Required,
        Some(false) => OriginalSource::Off,
    };
    Sockets {
        mark: mark.or(default_mark),
        reuse_port: reader.boolean("INPOD_PORT_REUSE", true),
        original_source,
        ipv6: reader.boolean("IPV6_ENABLED", true),
        keepalive: reader
            .boolean("KEEPALIVE_ENABLED", true)
            .then_some(keepalive),
        user_timeout: user_timeout.then(|| time_to_dead(keepalive)),
        tunnel_timeout: tunnel_timeout(reader),
        connect_timeout: Duration::from_secs(10),
        backlog: reader.integer("LISTEN_BACKLOG", &(1..=65535), 128),
    }
}

/// Values outside of what the kernel takes are brought to its limits, with a word about it: an option that it refuses would otherwise
/// mean no keepalive at all.
fn keepalive(reader: &mut Reader<'_>) -> Keepalive {
    let (shortest, longest) = (Duration::from_secs(1), Duration::from_secs(32_767));
    let seconds = |asked: Option<Duration>, key| {
        let asked = asked.unwrap_or(Duration::from_mins(3));
        brought(key, asked, asked.clamp(shortest, longest))
    };
    let time = reader.duration("KEEPALIVE_TIME");
    let interval = reader.duration("KEEPALIVE_INTERVAL");
    let retries = reader.integer("KEEPALIVE_RETRIES", &(0..=u32::MAX), 9);
    Keepalive {
        time: seconds(time, "KEEPALIVE_TIME"),
        interval: seconds(interval, "KEEPALIVE_INTERVAL"),
        retries: brought("KEEPALIVE_RETRIES", retries, retries.clamp(1, 127)),
    }
}

/// What is used in place of what was asked for; tells of it if that is something else.
fn brought<T: Copy + PartialEq + fmt::Debug>(key: &str, asked: T, used: T) -> T {
    if asked != used {
        tracing::warn!("{key}: the kernel does not take {asked:?}, {used:?} is used");
    }
    used
}

/// How long keepalive takes to find a silent peer dead: data that stays unacknowledged gets as
/// long as an idle connection.
fn time_to_dead(keepalive: Keepalive) -> Duration {
    keepalive.time + keepalive.interval * keepalive.retries
}

fn tunnel_timeout(reader: &mut Reader<'_>) -> Option<Duration> {
    let limits = Duration::from_secs(2)..=Duration::from_hours(1);
    let timeout = reader.typed("HBONE_PEER_TIMEOUT", |text| {
        value::duration(text)
            .ok()
            .filter(|timeout| timeout.is_zero() || limits.contains(timeout))
            .ok_or_else(|| Reject::new("not a time for a peer to answer", "0, or 2s to 1h"))
    });
    let timeout = timeout.unwrap_or(Duration::from_secs(15));
    (!timeout.is_zero()).then_some(timeout)
}

pub(super) fn tunnel(reader: &mut Reader<'_>) -> Tunnel {
    let stream_window = reader.integer("HTTP2_STREAM_WINDOW_SIZE", &WINDOW, 4 << 20);
    let connection_window = reader.integer("HTTP2_CONNECTION_WINDOW_SIZE", &WINDOW, 16 << 20);
    if connection_window / 4 < stream_window {
        tracing::warn!(
            stream_window,
            connection_window,
            "HTTP2_CONNECTION_WINDOW_SIZE is less than four of HTTP2_STREAM_WINDOW_SIZE: few slow streams hold up all others"
        );
    }
    let streams = "POOL_MAX_STREAMS_PER_CONNECTION";
    let pool_max_streams = reader.integer(streams, &(1..=u16::MAX), WAYPOINT_STREAMS);
    if pool_max_streams > WAYPOINT_STREAMS {
        tracing::warn!("{streams} is more than the {WAYPOINT_STREAMS} that waypoints admit");
    }
    Tunnel {
        stream_window,
        connection_window,
        frame_size: reader.integer("HTTP2_FRAME_SIZE", &FRAME, 1 << 20),
        pool_max_streams,
        pool_idle_release: reader
            .duration("POOL_UNUSED_RELEASE_TIMEOUT")
            .unwrap_or(Duration::from_mins(5)),
        max_age: reader
            .typed("HBONE_MAX_AGE", max_age)
            .unwrap_or(MaxAge::Unlimited),
        server_max_streams: reader.integer("HTTP2_MAX_STREAMS", &POSITIVE, 200),
        server_max_header_bytes: reader.integer("HTTP2_MAX_HEADER_BYTES", &HEADERS, 65_536),
        max_control_frames: reader.integer("HTTP2_MAX_CONTROL_FRAMES", &POSITIVE, 1000),
        max_resets: reader.integer("HTTP2_MAX_RESETS", &POSITIVE, 500),
        ..Tunnel::default()
    }
}

fn max_age(text: &str) -> Result<MaxAge, Reject> {
    if text == "certificate" {
        return Ok(MaxAge::Certificate);
    }
    let age = value::duration(text).ok();
    let long_enough = age.filter(|age| *age >= Duration::from_secs(1));
    long_enough.map(MaxAge::For).ok_or_else(|| {
        Reject::new(
            "not an age of connections",
            "certificate, or a duration of 1s or more, such as 90m",
        )
    })
}

pub(super) fn same_node(reader: &mut Reader<'_>) -> SameNode {
    SameNode {
        path: reader
            .typed("SAME_NODE", node_path)
            .unwrap_or(NodePath::Hbone),
        namespaces: reader
            .typed("SAME_NODE_NAMESPACES", node_paths)
            .unwrap_or_default(),
    }
}

fn node_path(text: &str) -> Result<NodePath, Reject> {
    match text {
        "hbone" => Ok(NodePath::Hbone),
        "direct" => Ok(NodePath::Direct),
        _ => Err(Reject::new("not a path", "hbone or direct")),
    }
}

fn node_paths(text: &str) -> Result<BTreeMap<Arc<str>, NodePath>, Reject> {
    let pair = |pair: &str| {
        let (namespace, path) = pair.trim().split_once('=')?;
        let is_named = !namespace.is_empty();
        Some((namespace.into(), node_path(path).ok().filter(|_| is_named)?))
    };
    let pairs = text.split(',').filter(|pair| !pair.trim().is_empty());
    pairs.map(pair).collect::<Option<_>>().ok_or_else(|| {
        let accepted = "namespace=hbone or namespace=direct, separated by commas";
        Reject::new("not paths of namespaces", accepted)
    })
}

pub(super) fn inbound(reader: &mut Reader<'_>) -> Inbound {
    Inbound {
        baggage: reader.boolean("ENABLE_RESPONSE_BAGGAGE", true),
        localhost_app_tunnel: reader.boolean("LOCALHOST_APP_TUNNEL", true),
    }
}

const DEFAULT_DNS: DnsCapture = DnsCapture::Loopback(15053);
/// `sun_path` less its closing zero byte.
const MAX_SOCKET_PATH_BYTES: usize = 107;
/// The rules in pods take packets for the proxy's whose mark has these low bits.
const CNI_MARK: u32 = 0x539;
const MARK_MASK: u32 = 0xfff;
const POSITIVE: std::ops::RangeInclusive<u32> = 1..=1_000_000;
/// Streams that a waypoint admits on one connection.
const WAYPOINT_STREAMS: u16 = 100;
/// What fits into less than 4 KiB leaves out what other proxies send.
const HEADERS: std::ops::RangeInclusive<u32> = 4096..=16_777_216;
/// Flow-control windows (RFC 9113 §6.9.1); a window of zero could never be used.
const WINDOW: std::ops::RangeInclusive<u32> = 1..=(1 << 31) - 1;
/// `SETTINGS_MAX_FRAME_SIZE` (RFC 9113 §6.5.2).
const FRAME: std::ops::RangeInclusive<u32> = 16_384..=16_777_215;
