//! The section [`Identity`]: who this proxy is.

use std::{collections::BTreeMap, net::IpAddr, path::Path, sync::Arc};

use super::{
    fault::Given,
    proxy_config::{META_PREFIX, ProxyConfig},
    reader::Reader,
    value::Reject,
};
use crate::config::{Identity, SelfIdentity};

pub(super) fn parse(reader: &mut Reader<'_>, proxy: &ProxyConfig) -> Identity {
    let or = |value: Option<Arc<str>>, default: &str| value.unwrap_or_else(|| default.into());
    let cluster_id = reader
        .name("ISTIO_META_CLUSTER_ID")
        .or_else(|| reader.name("CLUSTER_ID"));
    Identity {
        own: own(reader),
        node_name: reader.name("NODE_NAME"),
        pod_name: or(reader.name("POD_NAME"), ""),
        pod_namespace: or(reader.name("POD_NAMESPACE"), ""),
        instance_ip: or(instance_ip(reader), "1.1.1.1"),
        network: or(reader.name("NETWORK"), ""),
        cluster_id: or(cluster_id, "Kubernetes"),
        cluster_domain: cluster_domain(reader),
        istio_version: or(reader.name("ISTIO_META_ISTIO_VERSION"), "unknown"),
        metadata: metadata(reader, proxy),
        json_metadata: json_metadata(reader),
    }
}

/// As it was written: the control plane compares texts.
fn instance_ip(reader: &mut Reader<'_>) -> Option<Arc<str>> {
    let text = reader.text("INSTANCE_IP")?;
    let outcome = text.parse::<IpAddr>();
    let outcome = outcome.map(|_| text.into());
    let outcome = outcome.map_err(|_| Reject::new("not an address", "an IPv4 or IPv6 address"));
    reader.keep("INSTANCE_IP", Given::Value(text.to_owned()), outcome)
}

/// Charts do not tell of a cluster's own domain; the search list that Kubernetes gives to the proxy's pod does.
fn cluster_domain(reader: &Reader<'_>) -> Arc<str> {
    let searched = || {
        let text = reader.environment().files().read(Path::new(RESOLV_CONF));
        let (config, _faults) = resolv_conf::Config::parse_with_errors(text.ok()?.as_bytes());
        let search = config.get_search()?.iter();
        let search: Vec<_> = search.map(|one| one.trim_end_matches('.')).collect();
        let mut domains = search.iter().filter_map(|one| one.strip_prefix("svc."));
        let domain = domains.find(|domain| search.contains(domain))?;
        Some(domain.into())
    };
    let told = reader.name("CLUSTER_DOMAIN");
    told.or_else(searched)
        .unwrap_or_else(|| DEFAULT_DOMAIN.into())
}

/// The identity of the proxy's own pod, if all its parts are known.
fn own(reader: &mut Reader<'_>) -> Option<SelfIdentity> {
    let trust_domain = reader
        .text("TRUST_DOMAIN")
        .and_then(|text| {
            let outcome = trust_domain(text);
            reader.keep("TRUST_DOMAIN", Given::Value(text.to_owned()), outcome)
        })
        .unwrap_or_else(|| DEFAULT_DOMAIN.into());
    reader.name("POD_NAME")?;
    Some(SelfIdentity {
        trust_domain,
        namespace: reader.name("POD_NAMESPACE")?,
        service_account: reader.name("SERVICE_ACCOUNT")?,
    })
}

/// The SPIFFE grammar of a trust domain.
pub(super) fn trust_domain(text: &str) -> Result<Arc<str>, Reject> {
    let allowed =
        |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b".-_".contains(&byte);
    if (1..=255).contains(&text.len()) && text.bytes().all(allowed) {
        return Ok(text.into());
    }
    Err(Reject::new(
        "not a trust domain",
        "1 to 255 lower-case letters, digits, dots, dashes and underscores",
    ))
}

fn metadata(reader: &Reader<'_>, proxy: &ProxyConfig) -> BTreeMap<String, String> {
    let mut metadata = proxy.metadata.clone();
    let variables = reader.environment().with_prefix(META_PREFIX);
    metadata.extend(variables.map(|(key, value)| (key.to_owned(), value.to_owned())));
    metadata
}

/// What is not JSON is left out with an error in the log: metadata is for the control plane, and
/// the data plane works without.
fn json_metadata(reader: &Reader<'_>) -> BTreeMap<String, serde_json::Value> {
    let parse = |(key, text): (&str, &str)| match serde_json::from_str(text) {
        Ok(value) => Some((key.to_owned(), value)),
        Err(error) => {
            tracing::error!("ISTIO_METAJSON_{key} is not JSON and is left out: {error}");
            None
        }
    };
    reader
        .environment()
        .with_prefix("ISTIO_METAJSON_")
        .filter_map(parse)
        .collect()
}

const RESOLV_CONF: &str = "/etc/resolv.conf";
const DEFAULT_DOMAIN: &str = "cluster.local";
