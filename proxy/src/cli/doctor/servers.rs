//! Servers that the proxy calls, called as the proxy calls them, and what their clocks say.

use std::{
    future::poll_fn,
    time::{Duration, SystemTime},
};

use http::{
    Method, Request,
    header::{CONTENT_TYPE, DATE, TE},
};
use tonic::{body::Body, client::GrpcService as _, transport::Channel};
use xds_client::transport::{ConnectError, Target};

use super::{finding::Finding, token::rounded};
use crate::{
    config::{Address, CertificateSource, Config},
    node,
    telemetry::with_causes,
};

/// A server, and what to ask it for the sake of its clock.
#[derive(Debug)]
pub(super) struct Server {
    name: &'static str,
    address: Address,
    method: Method,
    path: &'static str,
}

impl Server {
    /// Those that this configuration names; one that is named twice once.
    pub(super) fn all(config: &Config) -> (Option<Self>, Option<Self>) {
        // Neither server need know the method: it answers that it does not.
        let grpc = |name, address: &Address| Self {
            name,
            address: address.clone(),
            method: Method::POST,
            path: "/grpc.health.v1.Health/Check",
        };
        let xds = config.control.xds.as_ref();
        let ca = match &config.control.certificates {
            CertificateSource::Istio(address)
                if xds.is_some_and(|xds| xds.uri == address.uri && xds.roots == address.roots) =>
            {
                None
            }
            CertificateSource::Istio(address) => Some(grpc("the certificate authority", address)),
            CertificateSource::OpenBao(server) => Some(Self {
                name: "OpenBao",
                address: Address {
                    uri: server.address.clone(),
                    roots: server.roots.clone(),
                    alternative_host: None,
                    headers: Vec::new(),
                },
                method: Method::GET,
                path: "/v1/sys/health",
            }),
            CertificateSource::InProcess { .. } => None,
        };
        (xds.map(|address| grpc("istiod", address)), ca)
    }

    /// Connects, and compares clocks. Takes as long as [`Target::connect`] at most, and then [`ANSWER_LIMIT`].
    pub(super) async fn call(&self, config: &Config) -> Vec<Finding> {
        let target: Target = node::target(config, &self.address);
        let (name, uri) = (self.name, &self.address.uri);
        let channel = match target.connect().await {
            Ok(channel) => channel,
            Err(error) => return vec![refusal(name, &error)],
        };
        let mut findings = vec![Finding::ok(format!("{name} answers at {uri}"))];
        let date = tokio::time::timeout(ANSWER_LIMIT, self.date(channel)).await;
        if let Ok(Some(theirs)) = date {
            findings.extend(skew(name, theirs, SystemTime::now()));
        }
        findings
    }

    /// When the server believes it is. Not all of them say.
    async fn date(&self, mut channel: Channel) -> Option<SystemTime> {
        let host = self.address.uri.authority()?;
        let request = Request::builder()
            .method(self.method.clone())
            .uri(format!("https://{host}{}", self.path))
            .header(CONTENT_TYPE, "application/grpc")
            .header(TE, "trailers")
            .body(Body::empty())
            .ok()?;
        poll_fn(|cx| channel.poll_ready(cx)).await.ok()?;
        let response = channel.call(request).await.ok()?;
        let date = response.headers().get(DATE)?.to_str().ok()?;
        httpdate::parse_http_date(date).ok()
    }
}

/// Judges a failed connection.
fn refusal(name: &str, error: &ConnectError) -> Finding {
    let what = format!("{name}: {}", with_causes(error));
    let of_time = what.contains("not valid yet") || what.contains("expired");
    let way_out = if of_time {
        "the certificate of the server is not of this time: see to the clock of this node first (NTP)"
    } else if error.is_local() {
        "put the configuration or the mounted files right"
    } else if matches!(error, ConnectError::Handshake { .. }) {
        "the trust roots must be those of this server (ConfigMap istio-ca-root-cert), and its certificate be for this host name"
    } else {
        "is the server running, does its name resolve here, and do network policies admit this pod?"
    };
    Finding::error(what, way_out)
}

/// Compares clocks. An answer's date is cut to the second.
fn skew(name: &str, theirs: SystemTime, ours: SystemTime) -> Option<Finding> {
    let (apart, word) = match ours.duration_since(theirs) {
        Ok(ahead) => (ahead, "ahead of"),
        Err(behind) => (behind.duration(), "behind"),
    };
    let what = format!(
        "the clock of this node is {} {word} that of {name}",
        rounded(apart)
    );
    let way_out =
        "set both clocks by NTP: certificates and tokens are refused outside of their times";
    if apart >= TOO_FAR {
        Some(Finding::error(what, way_out))
    } else if apart >= FAR {
        Some(Finding::warning(what, way_out))
    } else {
        None
    }
}

const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// Nobody who uses NTP is so far away.
const FAR: Duration = Duration::from_secs(10);
/// Fresh certificates are valid since two minutes before they were signed, tokens are taken a minute too early.
const TOO_FAR: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;
    use crate::cli::doctor::Severity;

    #[test]
    fn clocks_are_compared() {
        let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        for (theirs, expected) in [
            (1000, None),
            (1009, None),
            (
                985,
                Some((Severity::Warning, "15 s ahead of that of istiod")),
            ),
            (
                1030,
                Some((Severity::Warning, "30 s behind that of istiod")),
            ),
            (5000, Some((Severity::Error, "66 min behind"))),
        ] {
            let found = skew("istiod", at(theirs), at(1000));
            match (&found, expected) {
                (None, None) => {}
                (Some(finding), Some((severity, part))) => {
                    assert_eq!(finding.severity, severity);
                    assert!(finding.what.contains(part), "{finding:?}");
                }
                _ => panic!("{theirs}: {found:?}"),
            }
        }
    }
}
