//! A discovery server in this process, and the certificates for it.

use std::{io, net::SocketAddr, path::Path, sync::Arc};

use futures_util::{StreamExt as _, stream};
use parking_lot::Mutex;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use rustls::{
    ServerConfig, SupportedProtocolVersion, crypto::aws_lc_rs, pki_types::PrivateKeyDer,
    version::TLS13,
};
use tokio::{net::TcpListener, task::JoinSet};
use tokio_rustls::TlsAcceptor;
use tonic::{Request, Response, Status, Streaming, metadata::MetadataMap};

use crate::proto::discovery::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse,
    aggregated_discovery_service_server::{
        AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
    },
};

/// A certificate authority.
pub(super) struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    pub(super) fn new() -> Self {
        let mut params = CertificateParams::default();
        // Authorities with one name would be taken for the same with another key.
        let name = rand::random::<u64>().to_string();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        Self(CertifiedIssuer::self_signed(params, key).unwrap())
    }

    pub(super) fn pem(&self) -> String {
        self.0.as_ref().pem()
    }

    pub(super) fn write(&self, path: &Path) {
        std::fs::write(path, self.pem()).unwrap();
    }

    pub(super) fn config(&self, name: &str) -> ServerConfig {
        self.config_with(name, &TLS13)
    }

    pub(super) fn config_with(
        &self,
        name: &str,
        version: &'static SupportedProtocolVersion,
    ) -> ServerConfig {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new([name.to_owned()]).unwrap();
        let leaf = params.signed_by(&key, &self.0).unwrap();
        let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        let provider = Arc::new(aws_lc_rs::default_provider());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[version])
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![leaf.der().clone()], key)
            .unwrap();
        config.alpn_protocols = vec![b"h2".to_vec()];
        config
    }
}

/// What a client showed.
#[derive(Default)]
pub(super) struct Shown {
    /// Of each TLS session: SNI and ALPN.
    pub(super) hellos: Vec<(Option<String>, Option<Vec<u8>>)>,
    /// Of each request.
    pub(super) metadata: Vec<MetadataMap>,
}

/// Answers each request with an empty stream, until dropped.
pub(super) struct Server {
    pub(super) address: SocketAddr,
    pub(super) shown: Arc<Mutex<Shown>>,
    connections: Connections,
    _acceptor: JoinSet<()>,
}

impl Server {
    pub(super) async fn start(config: ServerConfig) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shown = Arc::new(Mutex::new(Shown::default()));
        let connections = Arc::new(tokio::sync::Mutex::new(JoinSet::new()));
        let mut acceptor = JoinSet::new();
        let tls = TlsAcceptor::from(Arc::new(config));
        acceptor.spawn(serve(
            listener,
            tls,
            (Arc::clone(&connections), Arc::clone(&shown)),
        ));
        Self {
            address,
            shown,
            connections,
            _acceptor: acceptor,
        }
    }

    /// Ends all connections, and goes on accepting.
    pub(super) async fn cut(&self) {
        self.connections.lock().await.shutdown().await;
    }

    /// SNI and ALPN of the TLS session before which there was none.
    pub(super) fn only_hello(&self) -> (Option<String>, Option<Vec<u8>>) {
        let shown = self.shown.lock();
        assert_eq!(shown.hellos.len(), 1);
        shown.hellos[0].clone()
    }
}

type Connections = Arc<tokio::sync::Mutex<JoinSet<()>>>;

async fn serve(
    listener: TcpListener,
    tls: TlsAcceptor,
    (connections, shown): (Connections, Arc<Mutex<Shown>>),
) {
    loop {
        let (socket, _) = listener.accept().await.unwrap();
        let (tls, shown) = (tls.clone(), Arc::clone(&shown));
        connections.lock().await.spawn(async move {
            let Ok(mut session) = tls.accept(socket).await else {
                return; // the client did not like the certificate
            };
            let hello = session.get_ref().1;
            shown.lock().hellos.push((
                hello.server_name().map(str::to_owned),
                hello.alpn_protocol().map(<[u8]>::to_vec),
            ));
            // tonic serves this kind of stream without its own TLS feature.
            let (near, mut far) = tokio::io::duplex(65_536);
            let incoming = stream::iter([Ok::<_, io::Error>(near)]).chain(stream::pending());
            let service = AggregatedDiscoveryServiceServer::new(Silent(shown));
            let router = tonic::transport::Server::builder().add_service(service);
            tokio::select! {
                served = router.serve_with_incoming(incoming) => served.unwrap(),
                _ = tokio::io::copy_bidirectional(&mut session, &mut far) => (),
            }
        });
    }
}

struct Silent(Arc<Mutex<Shown>>);

#[tonic::async_trait]
impl AggregatedDiscoveryService for Silent {
    type DeltaAggregatedResourcesStream = stream::Empty<Result<DeltaDiscoveryResponse, Status>>;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        self.0.lock().metadata.push(request.metadata().clone());
        Ok(Response::new(stream::empty()))
    }
}
