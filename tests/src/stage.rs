//! Small worlds that several chapters play on.

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc};

use crate::{
    cluster::Cluster,
    mesh::Mesh,
    raw::{Hello, RawClient},
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
}
