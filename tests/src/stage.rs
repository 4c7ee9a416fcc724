//! Small worlds that several chapters play on.

mod calm;
mod guarded;
mod named;
mod pair;
mod steady;
mod steered;

pub use calm::Calm;
pub use guarded::{BYTES, Guarded};
pub use named::{Named, RESOLVER, RESOLVER6, UPSTREAM, UPSTREAM6};
pub use pair::Pair;
pub use steady::Steady;
pub use steered::{Steered, vip, web_port};

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc};

use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

use crate::{
    cluster::Cluster,
    mesh::Mesh,
    raw::{Hello, RawClient, Tunnel, Wire},
    traffic::{Behaviour, Server},
    world::{Pod, PodSpec, World},
};

/// `api` is captured; `peer` is a foreign HBONE client with a certificate of the mesh.
#[derive(Debug)]
pub struct ForeignClient {
    /// One node.
    pub world: World,
    /// The captured pod.
    pub api: Arc<Pod>,
    /// Where the client lives.
    pub peer: Arc<Pod>,
}

impl ForeignClient {
    /// Builds the world.
    ///
    /// # Errors
    /// When namespaces cannot be made.
    pub fn new() -> anyhow::Result<Self> {
        let world = World::new(1)?;
        let api = world.node(0).pod(&PodSpec::captured("api"))?;
        let peer = world.node(0).pod(&PodSpec::plain("peer"))?;
        Ok(Self { world, api, peer })
    }

    /// Both pods, known to the mesh.
    #[must_use]
    pub fn mesh(&self) -> Mesh {
        Mesh::of(&[&self.api, &self.peer])
    }

    /// A proxy that serves `api`.
    ///
    /// # Errors
    /// When it does not start.
    pub async fn cluster(&self) -> anyhow::Result<Cluster<'_>> {
        Cluster::start(&self.world, &self.mesh(), &[&self.api]).await
    }

    /// As [`ForeignClient::cluster`], with further variables.
    ///
    /// # Errors
    /// When it does not start.
    pub async fn cluster_with(&self, env: &[(&str, &str)]) -> anyhow::Result<Cluster<'_>> {
        let env: BTreeMap<_, _> = env.iter().copied().collect();
        Cluster::start_with(&self.world, &self.mesh(), &[&self.api], &env).await
    }

    /// A certificate of the mesh for `peer`.
    ///
    /// # Panics
    /// When it cannot be signed.
    #[must_use]
    pub fn hello(&self) -> Hello {
        Hello::new(
            &self
                .world
                .authority()
                .issue(&self.peer.spiffe_id())
                .unwrap(),
        )
    }

    /// Where `api` takes tunnels.
    #[must_use]
    pub fn hbone(&self) -> SocketAddr {
        self.api.at(15008)
    }

    /// A connected client.
    ///
    /// # Panics
    /// When it is refused.
    pub async fn client(&self) -> RawClient {
        self.try_client(&self.hello()).await.unwrap()
    }

    /// Connects with any introduction.
    ///
    /// # Errors
    /// When it is refused.
    pub async fn try_client(&self, hello: &Hello) -> anyhow::Result<RawClient> {
        RawClient::connect(self.peer.netns(), self.hbone(), hello).await
    }

    /// A port of `api`, as an authority.
    #[must_use]
    pub fn target(&self, port: u16) -> String {
        self.api.at(port).to_string()
    }

    /// A proxy, an application in `api` and a connected client.
    ///
    /// # Panics
    /// When one of them does not start.
    pub async fn talk(&self, behaviour: Behaviour) -> Talk<'_> {
        self.talk_over(self.cluster().await.unwrap(), behaviour)
            .await
    }

    /// As [`ForeignClient::talk`], with a proxy that runs already.
    ///
    /// # Panics
    /// As [`ForeignClient::talk`].
    pub async fn talk_over<'a>(&self, cluster: Cluster<'a>, behaviour: Behaviour) -> Talk<'a> {
        Talk {
            cluster,
            app: self.api.serve(APPLICATION, behaviour).unwrap(),
            client: self.client().await,
            target: self.target(APPLICATION),
        }
    }

    /// A connection past TLS that has said nothing yet.
    ///
    /// # Panics
    /// When it is refused.
    pub async fn tls(&self) -> TlsStream<TcpStream> {
        let hello = self.hello();
        hello
            .connect(self.peer.netns(), self.hbone())
            .await
            .unwrap()
    }

    /// A connection for single frames.
    ///
    /// # Panics
    /// When it is refused.
    pub async fn wire(&self) -> Wire<TlsStream<TcpStream>> {
        Wire::start(self.tls().await).await.unwrap()
    }
}

/// A foreign client that is connected to a running application.
#[derive(Debug)]
pub struct Talk<'a> {
    /// The proxy.
    pub cluster: Cluster<'a>,
    /// What listens in `api` at port 8080.
    pub app: Server,
    /// The client.
    pub client: RawClient,
    /// The application, as an authority.
    pub target: String,
}

impl Talk<'_> {
    /// A tunnel to the application, whatever the answer.
    ///
    /// # Panics
    /// When there is no answer.
    pub async fn tunnel(&self) -> Tunnel {
        self.client.tunnel(&self.target).await.unwrap()
    }

    /// Checks that a new tunnel on the same connection carries these bytes to the application and back.
    ///
    /// # Panics
    /// When it does not.
    pub async fn carries(&self, bytes: &[u8]) {
        self.tunnel().await.ping(bytes).await.unwrap();
    }
}

const APPLICATION: u16 = 8080;
