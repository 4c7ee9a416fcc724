//! The discovery service: admits streams and runs a [`Session`] for each.

use std::sync::Arc;

use cert_agent::istio::proto::istio_certificate_service_server::IstioCertificateServiceServer;
use futures_util::{StreamExt as _, stream};
use tonic::{Request, Response, Status, Streaming, service::Routes};
use xds_client::proto::discovery::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse,
    aggregated_discovery_service_server::{
        AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
    },
};

use super::{
    Shared, record::Stream, server, server::Hello, session::Session, signing::Certificates,
};

/// The services of the server; further ones are added here.
pub(super) fn routes(shared: &Arc<Shared>) -> Routes {
    let discovery = AggregatedDiscoveryServiceServer::new(Discovery(Arc::clone(shared)))
        // The session refuses as istiod does.
        .max_decoding_message_size(usize::MAX);
    let certificates = IstioCertificateServiceServer::new(Certificates(Arc::clone(shared)));
    Routes::new(discovery).add_service(certificates).prepare()
}

#[derive(Debug)]
struct Discovery(Arc<Shared>);

impl Discovery {
    /// Notes a stream, and whether it may go on.
    fn admit<T>(&self, request: &Request<T>) -> Result<usize, Status> {
        let hello = request.extensions().get::<Hello>();
        let server_name = hello.and_then(|hello| hello.server_name.clone());
        let headers = server::headers(request.metadata());
        let refusal = self.0.faults.lock().refusal.clone();
        let admitted = refusal.map_or_else(|| self.0.access.admit(&headers), Err);
        let mut serial = 0;
        self.0.streams.send_modify(|streams| {
            serial = streams.len();
            let mut stream = Stream::new(server_name, headers);
            stream.ended = admitted.is_err().then_some(stream.opened);
            streams.push(stream);
        });
        admitted.map(|()| serial)
    }
}

#[tonic::async_trait]
impl AggregatedDiscoveryService for Discovery {
    type DeltaAggregatedResourcesStream =
        stream::BoxStream<'static, Result<DeltaDiscoveryResponse, Status>>;

    /// Like istiod's, the answer begins with its first message: what goes wrong before is a status alone.
    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let serial = self.admit(&request)?;
        let mut session = Session::new(Arc::clone(&self.0), serial, request.into_inner());
        let first = match session.next().await {
            Some(Ok(first)) => first,
            Some(Err(status)) => return Err(status),
            None => return Ok(Response::new(stream::empty().boxed())),
        };
        let rest = stream::unfold(session, async |mut session| {
            let next = session.next().await?;
            Some((next, session))
        });
        let all = stream::once(std::future::ready(Ok(first))).chain(rest);
        Ok(Response::new(all.boxed()))
    }
}
