//! Whom the stand-in talks to: tokens, cluster ids, and what it demands of a node message.

use std::{collections::BTreeMap, net::IpAddr};

use prost_types::value;
use tonic::Status;
use xds_client::proto::discovery::Node;

/// The demands. What is `None` is not checked.
#[derive(Debug, Clone)]
pub(super) struct Access {
    pub(super) token: Option<String>,
    pub(super) cluster: Option<String>,
    pub(super) namespace: Option<String>,
    /// Bytes of one request.
    pub(super) request_limit: usize,
}

impl Default for Access {
    fn default() -> Self {
        Self {
            token: None,
            cluster: None,
            namespace: None,
            request_limit: 4 * 1024 * 1024,
        }
    }
}

impl Access {
    /// Judges the metadata of a call.
    pub(super) fn admit(&self, headers: &BTreeMap<String, String>) -> Result<(), Status> {
        let header = |name: &str| headers.get(name).map_or("", String::as_str);
        let authorization = self.token.as_ref().map(|token| format!("Bearer {token}"));
        let token_fits = authorization.is_none_or(|wanted| header("authorization") == wanted);
        let cluster = header("clusterid");
        let cluster_fits = self
            .cluster
            .as_ref()
            .is_none_or(|wanted| cluster.is_empty() || cluster == wanted);
        if token_fits && cluster_fits {
            Ok(())
        } else {
            Err(Status::unauthenticated("authentication failure"))
        }
    }

    /// Judges the first message of a stream.
    pub(super) fn node(&self, node: Option<&Node>) -> Result<Node, Status> {
        let node = node.filter(|node| !node.id.is_empty());
        let node = node.ok_or_else(|| Status::invalid_argument("missing node information"))?;
        let parts: Vec<&str> = node.id.split('~').collect();
        let &[kind, address, _, _] = parts.as_slice() else {
            let id = &node.id;
            return Err(Status::invalid_argument(format!(
                "missing parts in the service node {id:?}"
            )));
        };
        if kind != "ztunnel" {
            return Err(Status::invalid_argument(format!("proxy type {kind:?}")));
        }
        let addresses = text(node, "INSTANCE_IPS").unwrap_or(address).split(',');
        if !addresses.into_iter().all(|ip| ip.parse::<IpAddr>().is_ok()) {
            return Err(Status::invalid_argument("no valid IP address"));
        }
        self.metadata(node)?;
        Ok(node.clone())
    }

    fn metadata(&self, node: &Node) -> Result<(), Status> {
        let capture = text(node, "DNS_CAPTURE");
        if has(node, "DNS_CAPTURE") && !matches!(capture, Some("true" | "false")) {
            return Err(Status::invalid_argument(
                "DNS_CAPTURE is not a string boolean",
            ));
        }
        if let Some(wanted) = &self.namespace
            && text(node, "NAMESPACE") != Some(wanted)
        {
            return Err(Status::permission_denied(format!(
                "the token is of namespace {wanted}"
            )));
        }
        Ok(())
    }
}

fn has(node: &Node, key: &str) -> bool {
    let metadata = node.metadata.as_ref();
    metadata.is_some_and(|metadata| metadata.fields.contains_key(key))
}

/// A string of the metadata.
pub(super) fn text<'n>(node: &'n Node, key: &str) -> Option<&'n str> {
    let value = node.metadata.as_ref()?.fields.get(key)?;
    let Some(value::Kind::StringValue(text)) = &value.kind else {
        return None;
    };
    Some(text)
}
