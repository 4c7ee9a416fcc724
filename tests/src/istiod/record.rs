//! What the stand-in has met: each stream with its headers, its requests, and how they answered.

use std::collections::BTreeMap;

use prost_types::Struct;
use tokio::time::Instant;
use xds_client::proto::discovery::DeltaDiscoveryRequest;

use super::{Kind, access};

/// One stream, also one that was refused.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Stream {
    /// The name that the client sent in its TLS hello.
    pub server_name: Option<String>,
    /// Metadata of the call, without binary ones.
    pub headers: BTreeMap<String, String>,
    /// What came, in order.
    pub requests: Vec<DeltaDiscoveryRequest>,
    /// What was sent, in order.
    pub sent: Vec<Sent>,
    /// What a real istiod would complain about in its log.
    pub complaints: Vec<String>,
    /// When it was opened.
    pub opened: Instant,
    /// When it ended.
    pub ended: Option<Instant>,
    pub(super) progress: [Progress; 2],
    /// All changes up to this generation are sent.
    pub(super) generation: u64,
}

/// A response, without its content.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Sent {
    /// Type URL.
    pub type_url: String,
    /// Its nonce.
    pub nonce: String,
    /// Names of its resources, in order.
    pub resources: Vec<String>,
    /// Names of removed resources.
    pub removed: Vec<String>,
    /// Length of the message.
    pub bytes: usize,
}

#[derive(Debug, Clone, Default)]
pub(super) struct Progress {
    pub(super) sent: Option<String>,
    pub(super) answered: Option<String>,
    pub(super) error: Option<String>,
}

/// The word of `istioctl proxy-status` for one type.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum SyncStatus {
    /// Nothing was sent.
    NotSent,
    /// The last response was acknowledged.
    Synced,
    /// The last response was not answered.
    Stale,
    /// The last answer was a rejection, with this text.
    Error(String),
}

impl Stream {
    pub(super) fn new(server_name: Option<String>, headers: BTreeMap<String, String>) -> Self {
        Self {
            server_name,
            headers,
            requests: Vec::new(),
            sent: Vec::new(),
            complaints: Vec::new(),
            opened: Instant::now(),
            ended: None,
            progress: Default::default(),
            generation: 0,
        }
    }

    /// Whether it still runs.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.ended.is_none()
    }

    /// Node id of the first request.
    #[must_use]
    pub fn node_id(&self) -> &str {
        let node = self.requests.first().and_then(|first| first.node.as_ref());
        node.map_or("", |node| &node.id)
    }

    /// Node metadata of the first request.
    #[must_use]
    pub fn metadata(&self) -> Option<&Struct> {
        self.requests.first()?.node.as_ref()?.metadata.as_ref()
    }

    /// One entry of the node metadata, if it is a string.
    #[must_use]
    pub fn metadata_text(&self, key: &str) -> Option<&str> {
        access::text(self.requests.first()?.node.as_ref()?, key)
    }

    /// The first request of a type.
    #[must_use]
    pub fn first(&self, kind: Kind) -> Option<&DeltaDiscoveryRequest> {
        self.of(kind).next()
    }

    /// All requests of a type.
    pub fn of(&self, kind: Kind) -> impl Iterator<Item = &DeltaDiscoveryRequest> {
        self.requests
            .iter()
            .filter(move |request| request.type_url == kind.url())
    }

    /// The requests that answer the response with this nonce.
    #[must_use]
    pub fn answers(&self, nonce: &str) -> Vec<&DeltaDiscoveryRequest> {
        let requests = self.requests.iter();
        requests
            .filter(|request| request.response_nonce == nonce)
            .collect()
    }

    /// The texts of all rejections of a type.
    #[must_use]
    pub fn rejections(&self, kind: Kind) -> Vec<String> {
        let errors = self
            .of(kind)
            .filter_map(|request| request.error_detail.as_ref());
        errors.map(|error| error.message.clone()).collect()
    }

    /// As `istioctl proxy-status` puts it.
    #[must_use]
    pub fn status(&self, kind: Kind) -> SyncStatus {
        let progress = &self.progress[kind as usize];
        match (&progress.sent, &progress.error) {
            (None, _) => SyncStatus::NotSent,
            (Some(_), Some(error)) => SyncStatus::Error(error.clone()),
            (sent, None) if *sent == progress.answered => SyncStatus::Synced,
            (Some(_), None) => SyncStatus::Stale,
        }
    }

    /// Notes an answer; one to an older response is ignored.
    pub(super) fn answer(&mut self, kind: Kind, request: &DeltaDiscoveryRequest) {
        let progress = &mut self.progress[kind as usize];
        if progress.sent.as_ref() != Some(&request.response_nonce) {
            return;
        }
        progress.answered = Some(request.response_nonce.clone());
        progress.error = request
            .error_detail
            .as_ref()
            .map(|error| error.message.clone());
    }
}
