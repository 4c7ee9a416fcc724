//! A raw client of the discovery service.

use std::{collections::HashMap, net::SocketAddr, sync::Arc, time::Duration};

use futures_util::stream;
use hyper_util::rt::TokioIo;
use prost::Message as _;
use prost_types::{Struct, Value, value};
use rustls::{
    ClientConfig, RootCertStore,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, ServerName, pem::PemObject as _},
};
use testkit::{Istiod, istiod::Kind, wait::soon};
use tokio::{net::TcpStream, sync::mpsc};
use tokio_rustls::TlsConnector;
use tonic::{Request, Status, Streaming, transport::Endpoint};
use tower::service_fn;
use xds_client::proto::discovery::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node, Resource,
    aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
};

/// One open stream.
pub(crate) struct Client {
    requests: mpsc::Sender<DeltaDiscoveryRequest>,
    responses: Streaming<DeltaDiscoveryResponse>,
}

impl Client {
    /// Opens a stream with these requests and waits for its first response.
    pub(crate) async fn open(
        istiod: &Istiod,
        authorization: &'static str,
        first: &[DeltaDiscoveryRequest],
    ) -> Result<Self, Status> {
        let roots = CertificateDer::pem_file_iter(istiod.root_file()).unwrap();
        let mut store = RootCertStore::empty();
        for root in roots {
            store.add(root.unwrap()).unwrap();
        }
        let provider = Arc::new(aws_lc_rs::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(store)
            .with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec()];
        let (connector, to) = (TlsConnector::from(Arc::new(config)), istiod.address());
        let channel = Endpoint::from_static("https://localhost")
            .connect_with_connector(service_fn(move |_| dial(connector.clone(), to)))
            .await
            .map_err(|error| Status::unavailable(format!("{error:?}")))?;
        let (requests, queue) = mpsc::channel(8);
        for request in first {
            requests.send(request.clone()).await.unwrap();
        }
        let outgoing = stream::unfold(queue, async |mut queue| {
            let request = queue.recv().await?;
            Some((request, queue))
        });
        let mut call = Request::new(outgoing);
        let headers = call.metadata_mut();
        headers.insert("authorization", authorization.parse().unwrap());
        headers.insert("clusterid", "c".parse().unwrap());
        let mut client =
            AggregatedDiscoveryServiceClient::new(channel).max_decoding_message_size(usize::MAX);
        let opening = client.delta_aggregated_resources(call);
        let responses = soon("the stream opens", opening).await?.into_inner();
        Ok(Self {
            requests,
            responses,
        })
    }

    pub(crate) async fn send(&self, request: DeltaDiscoveryRequest) {
        self.requests.send(request).await.unwrap();
    }

    pub(crate) async fn next(&mut self) -> DeltaDiscoveryResponse {
        self.result().await.unwrap().unwrap()
    }

    pub(crate) async fn result(&mut self) -> Result<Option<DeltaDiscoveryResponse>, Status> {
        soon("a response", self.responses.message()).await
    }

    /// Reads one response and accepts it.
    pub(crate) async fn accept(&mut self) -> DeltaDiscoveryResponse {
        let response = self.next().await;
        self.send(answer(&response)).await;
        response
    }

    pub(crate) async fn silent(&mut self) {
        let wait = Duration::from_millis(200);
        let read = tokio::time::timeout(wait, self.responses.message()).await;
        assert!(read.is_err(), "{read:?}");
    }
}

async fn dial(
    connector: TlsConnector,
    to: SocketAddr,
) -> std::io::Result<TokioIo<tokio_rustls::client::TlsStream<TcpStream>>> {
    let socket = TcpStream::connect(to).await?;
    let name = ServerName::try_from("localhost").unwrap();
    Ok(TokioIo::new(connector.connect(name, socket).await?))
}

pub(crate) fn answer(response: &DeltaDiscoveryResponse) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        type_url: response.type_url.clone(),
        response_nonce: response.nonce.clone(),
        ..DeltaDiscoveryRequest::default()
    }
}

pub(crate) fn node(id: &str) -> Node {
    let text = |text: &str| Value {
        kind: Some(value::Kind::StringValue(text.to_owned())),
    };
    let fields = [("NODE_NAME", "a"), ("NAMESPACE", "istio-system")];
    let fields = fields.map(|(key, value)| (key.to_owned(), text(value)));
    Node {
        id: id.to_owned(),
        cluster: String::new(),
        metadata: Some(Struct {
            fields: fields.into(),
        }),
    }
}

pub(crate) fn first(kind: Kind, held: &[(&str, &str)]) -> DeltaDiscoveryRequest {
    let held = held
        .iter()
        .map(|(name, version)| ((*name).to_owned(), (*version).to_owned()));
    DeltaDiscoveryRequest {
        node: Some(node(
            "ztunnel~10.1.0.9~zt.istio-system~istio-system.svc.cluster.local",
        )),
        type_url: kind.url().to_owned(),
        initial_resource_versions: held.collect(),
        ..DeltaDiscoveryRequest::default()
    }
}

/// The first request for addresses of a client that asks on demand.
pub(crate) fn on_demand(held: &[(&str, &str)]) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        resource_names_subscribe: vec!["*".to_owned()],
        resource_names_unsubscribe: vec!["*".to_owned()],
        ..first(Kind::Address, held)
    }
}

pub(crate) fn subscribe(names: &[&str]) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        type_url: Kind::Address.url().to_owned(),
        resource_names_subscribe: names.iter().map(|name| (*name).to_owned()).collect(),
        ..DeltaDiscoveryRequest::default()
    }
}

pub(crate) fn resources(response: &DeltaDiscoveryResponse) -> Vec<Resource> {
    let resources = response.resources.iter();
    resources
        .map(|bytes| Resource::decode(bytes.clone()).unwrap())
        .collect()
}

pub(crate) fn names(response: &DeltaDiscoveryResponse) -> Vec<String> {
    let resources = resources(response).into_iter();
    resources.map(|resource| resource.name).collect()
}

pub(crate) fn versions(response: &DeltaDiscoveryResponse) -> HashMap<String, String> {
    let resources = resources(response).into_iter();
    resources
        .map(|resource| (resource.name, resource.version))
        .collect()
}
