//! What tests ask the stand-in about its clients.

use std::time::Duration;

use xds_client::proto::discovery::DeltaDiscoveryRequest;

use super::{Istiod, Kind, Stream, SyncStatus};
use crate::{
    raw::frames::{ACK, kind},
    wait,
};

impl Istiod {
    /// All streams so far, refused ones included.
    #[must_use]
    pub fn streams(&self) -> Vec<Stream> {
        self.shared.streams.borrow().clone()
    }

    /// How many HTTP/2 pings all clients have sent, answers to pings apart.
    #[must_use]
    pub fn pings(&self) -> usize {
        let logs = self.wire.frames.lock();
        let frames = logs.iter().flat_map(|log| log.all());
        frames
            .filter(|frame| frame.kind == kind::PING && frame.flags & ACK == 0)
            .count()
    }

    /// The newest stream.
    ///
    /// # Panics
    /// When there was none.
    #[must_use]
    pub fn newest(&self) -> Stream {
        let streams = self.shared.streams.borrow();
        streams.last().expect("a stream").clone()
    }

    /// Waits until `probe` finds what it looks for.
    ///
    /// # Panics
    /// When it has not after ten seconds; the state of all streams is in the message.
    pub async fn until<T>(&self, what: &str, probe: impl FnMut(&[Stream]) -> Option<T>) -> T {
        self.until_within(wait::SOON, what, probe).await
    }

    /// As [`Istiod::until`], with another limit.
    ///
    /// # Panics
    /// When the time is up.
    pub async fn until_within<T>(
        &self,
        limit: Duration,
        what: &str,
        mut probe: impl FnMut(&[Stream]) -> Option<T>,
    ) -> T {
        let (mut streams, mut found) = (self.shared.streams.subscribe(), None);
        let search = streams.wait_for(|streams| {
            found = probe(streams);
            found.is_some()
        });
        let ended = tokio::time::timeout(limit, search)
            .await
            .map(|seen| drop(seen.expect("shared")));
        found.unwrap_or_else(|| {
            panic!(
                "{ended:?}, not within {limit:?}: {what}\n{}",
                self.summary()
            )
        })
    }

    /// Waits until stream number `index`, counted from 0, has sent a first request or was refused.
    ///
    /// # Panics
    /// When it has not after ten seconds.
    pub async fn stream(&self, index: usize) -> Stream {
        let what = format!("stream {index}");
        self.until(&what, |streams| {
            let stream = streams.get(index)?;
            (!stream.requests.is_empty() || !stream.is_open()).then(|| stream.clone())
        })
        .await
    }

    /// Waits for a request on the newest stream.
    ///
    /// # Panics
    /// When none fits within ten seconds.
    pub async fn request(
        &self,
        what: &str,
        fits: impl Fn(&DeltaDiscoveryRequest) -> bool,
    ) -> DeltaDiscoveryRequest {
        self.until(what, |streams| {
            let requests = &streams.last()?.requests;
            requests.iter().find(|request| fits(request)).cloned()
        })
        .await
    }

    /// Waits until a kind has this status on the newest stream.
    ///
    /// # Panics
    /// When it has not after ten seconds.
    pub async fn status(&self, kind: Kind, status: &SyncStatus) {
        let what = format!("{kind:?} is {status:?}");
        self.until(&what, |streams| {
            let newest = streams.last().filter(|stream| stream.is_open())?;
            (newest.status(kind) == *status).then_some(())
        })
        .await;
    }

    /// Waits until everything that is served has been sent to the newest stream and was accepted.
    ///
    /// # Panics
    /// When it has not after ten seconds.
    pub async fn synced(&self) {
        self.synced_within(wait::SOON).await;
    }

    /// As [`Istiod::synced`], with another limit.
    ///
    /// # Panics
    /// When the time is up.
    pub async fn synced_within(&self, limit: Duration) {
        let target = self.shared.catalogue.lock().generation();
        self.until_within(limit, "all is sent and accepted", |streams| {
            let newest = streams.last().filter(|stream| stream.is_open())?;
            let accepted = |kind| newest.status(kind) == SyncStatus::Synced;
            let synced = newest.generation >= target && Kind::ALL.into_iter().all(accepted);
            synced.then_some(())
        })
        .await;
    }

    /// Waits until the newest stream rejects something of a kind, and returns the text of its latest rejection.
    ///
    /// # Panics
    /// When it has not after ten seconds.
    pub async fn rejection(&self, kind: Kind) -> String {
        self.until("a rejection", |streams| {
            streams.last()?.rejections(kind).pop()
        })
        .await
    }

    fn summary(&self) -> String {
        let mut text = String::new();
        for (index, stream) in self.shared.streams.borrow().iter().enumerate() {
            let (addresses, policies) = (
                stream.status(Kind::Address),
                stream.status(Kind::Authorization),
            );
            let (requests, sent) = (stream.requests.len(), &stream.sent);
            let tail: Vec<_> = stream.requests.iter().rev().take(2).collect();
            text += &format!(
                "stream {index}: open {}, {requests} requests, {} responses, Address {addresses:?}, Authorization {policies:?}, {:?}\n  last requests {:.600}\n",
                stream.is_open(),
                sent.len(),
                stream.complaints,
                format!("{tail:?}"),
            );
        }
        text
    }
}
