//! Streams over gRPC to a [`Target`].

use futures_util::{FutureExt, StreamExt, future::BoxFuture, stream};
use tokio::sync::mpsc;
use tonic::Request;

use super::{Connect, OpenError, Responses};
use crate::{
    proto::discovery::{
        DeltaDiscoveryRequest,
        aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
    },
    transport::Target,
};

impl Connect for Target {
    fn open(
        &self,
        requests: mpsc::Receiver<DeltaDiscoveryRequest>,
    ) -> BoxFuture<'_, Result<Responses, OpenError>> {
        async {
            let metadata = self.metadata().await;
            let metadata = metadata.map_err(|error| OpenError::Local(error.into()))?;
            let channel = self.connect().await.map_err(|error| {
                if error.is_local() {
                    OpenError::Local(error.into())
                } else {
                    OpenError::Unreachable(error.into())
                }
            })?;
            let next = |mut requests: mpsc::Receiver<_>| async {
                let request = requests.recv().await?;
                Some((request, requests))
            };
            let mut request = Request::new(stream::unfold(requests, next));
            *request.metadata_mut() = metadata;
            let mut client = AggregatedDiscoveryServiceClient::new(channel)
                .max_decoding_message_size(MAX_RESPONSE_BYTES);
            let responses = client.delta_aggregated_resources(request).await;
            let responses = responses.map_err(OpenError::Refused)?;
            Ok(responses.into_inner().boxed())
        }
        .boxed()
    }

    fn improved(&self) -> BoxFuture<'_, ()> {
        self.roots_changed().boxed()
    }
}

/// istiod sends each response as one message: room for a million pods.
const MAX_RESPONSE_BYTES: usize = 512 << 20;
