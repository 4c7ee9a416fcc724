//! What is told of queries: labels of metrics, and the log.

use std::sync::Arc;

use hickory_proto::rr::RecordType;

use super::Names;
use crate::{
    dns::{
        upstream::RelayError,
        wire::{Request, Transport},
    },
    mesh::Workload,
    telemetry::{DnsLabels, DnsProtocol},
};

impl Names {
    /// Counts what is no message.
    pub(super) fn malformed(&self, transport: Transport) {
        let client = self.shared.mesh.read().local_workload(&self.who).cloned();
        let labels = self.labels(None, transport, client.as_deref());
        self.shared.metrics.requested(&labels);
        self.shared.metrics.unanswered("malformed");
    }

    /// Whose query it is, and of which kind.
    pub(super) fn labels(
        &self,
        request: Option<&Request>,
        transport: Transport,
        client: Option<&Workload>,
    ) -> DnsLabels {
        let asked = request.and_then(Request::asked);
        let unknown = || Arc::from("unknown");
        let known = |text: &Arc<str>| (!text.is_empty()).then(|| Arc::clone(text));
        let service = client.and_then(|client| known(client.canonical_name()));
        let revision = client.and_then(|client| known(client.canonical_revision()));
        DnsLabels {
            request_query_type: asked.map_or("unknown", |(kind, _)| type_label(kind)),
            request_protocol: match transport {
                Transport::Udp => DnsProtocol::Udp,
                Transport::Tcp => DnsProtocol::Tcp,
            },
            source_canonical_service: service.unwrap_or_else(unknown),
            source_canonical_revision: revision.unwrap_or_else(unknown),
        }
    }
}

/// How a query that could not be relayed is told of.
pub(super) fn failed(error: &RelayError) -> String {
    let cause = std::error::Error::source(error);
    match cause {
        Some(cause) => format!("forwarding failed ({error}: {cause})"),
        None => format!("forwarding failed ({error})"),
    }
}

/// Tells of a query that was answered or relayed.
pub(super) fn log(request: &Request, client: Option<&Workload>, result: &str, endpoints: usize) {
    if !tracing::enabled!(target: "dns", tracing::Level::DEBUG) {
        return;
    }
    let (query, domain) = request
        .asked()
        .map_or_else(Default::default, |(kind, name)| {
            (kind.to_string(), name.to_lowercase().to_ascii())
        });
    let unknown = "unknown";
    tracing::event!(target: "dns", tracing::Level::DEBUG, {
        src.workload = client.map_or(unknown, Workload::name),
        src.namespace = client.map_or(unknown, |client| client.namespace()),
        query,
        domain,
        result,
        endpoints
    });
}

/// The types that clients ask for; all others are one, as there are 65,536 of them.
fn type_label(kind: RecordType) -> &'static str {
    let named = TYPES.iter().find(|(named, _)| *named == kind);
    named.map_or("unknown", |(_, label)| label)
}

const TYPES: [(RecordType, &str); 13] = [
    (RecordType::A, "a"),
    (RecordType::AAAA, "aaaa"),
    (RecordType::ANY, "any"),
    (RecordType::CNAME, "cname"),
    (RecordType::HTTPS, "https"),
    (RecordType::MX, "mx"),
    (RecordType::NAPTR, "naptr"),
    (RecordType::NS, "ns"),
    (RecordType::PTR, "ptr"),
    (RecordType::SOA, "soa"),
    (RecordType::SRV, "srv"),
    (RecordType::SVCB, "svcb"),
    (RecordType::TXT, "txt"),
];
