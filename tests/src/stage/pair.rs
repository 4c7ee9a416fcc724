//! Two nodes, a client and a service.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use crate::{
    cluster::Cluster,
    mesh::Mesh,
    world::{Pod, PodSpec, World},
};

/// `web` on the first node calls the service of `api` on the second.
#[derive(Debug)]
pub struct Pair {
    /// Two nodes.
    pub world: World,
    /// The client.
    pub web: Arc<Pod>,
    /// What serves port 80 of the service at its port 8080.
    pub api: Arc<Pod>,
}

impl Pair {
    /// Port 80 of the service.
    pub const SERVICE: SocketAddr =
        SocketAddr::new(IpAddr::V4(std::net::Ipv4Addr::new(10, 96, 0, 1)), 80);

    /// Builds the world.
    ///
    /// # Errors
    /// When namespaces cannot be made.
    pub fn new() -> anyhow::Result<Self> {
        let world = World::new(2)?;
        let web = world.node(0).pod(&PodSpec::captured("web"))?;
        let api = world.node(1).pod(&PodSpec::captured("api"))?;
        Ok(Self { world, web, api })
    }

    /// Both pods and the service.
    #[must_use]
    pub fn mesh(&self) -> Mesh {
        let mut mesh = Mesh::of(&[&self.web, &self.api]);
        mesh.service("api", Self::SERVICE.ip(), &[(80, 8080)], &[&self.api]);
        mesh
    }

    /// Proxies on both nodes, with these further variables.
    ///
    /// # Errors
    /// When one does not start.
    pub async fn start(&self, mesh: &Mesh, env: &[(&str, &str)]) -> anyhow::Result<Cluster<'_>> {
        let env: BTreeMap<_, _> = env.iter().copied().collect();
        Cluster::start_with(&self.world, mesh, &[&self.web, &self.api], &env).await
    }
}
