//! A proxy whose mesh comes from a stand-in istiod.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use crate::{
    cluster::NodeRun,
    istiod::{Istiod, IstiodOptions},
    mesh::Mesh,
    proxy::ProxyOptions,
    world::{Pod, PodSpec, World},
};

/// One node, steered by a stand-in istiod: `web` calls, `api` and `db` answer.
#[derive(Debug)]
pub struct Steered {
    /// One node.
    pub world: World,
    /// Captured.
    pub web: Arc<Pod>,
    /// Captured.
    pub api: Arc<Pod>,
    /// Captured.
    pub db: Arc<Pod>,
    /// Serves [`Steered::mesh`] at first.
    pub istiod: Istiod,
}

impl Steered {
    /// Builds the world and starts the stand-in.
    ///
    /// # Errors
    /// When namespaces cannot be made.
    pub fn new() -> anyhow::Result<Self> {
        Self::with(Istiod::options())
    }

    /// As [`Steered::new`], with another stand-in.
    ///
    /// # Errors
    /// As [`Steered::new`].
    pub fn with(options: IstiodOptions) -> anyhow::Result<Self> {
        let world = World::new(1)?;
        let node = world.node(0);
        let [web, api, db] = ["web", "api", "db"].map(|name| node.pod(&PodSpec::captured(name)));
        let home = node.pod(&PodSpec::plain("istiod"))?;
        let istiod = options.start(&world, &home)?;
        let stage = Self {
            web: web?,
            api: api?,
            db: db?,
            istiod,
            world,
        };
        stage.istiod.set(&stage.mesh());
        Ok(stage)
    }

    /// The three pods, and service `api` at [`vip`] 1, port 80, which is port 8080 of the pod.
    #[must_use]
    pub fn mesh(&self) -> Mesh {
        let mut mesh = Mesh::of(&[&self.web, &self.api, &self.db]);
        mesh.service("api", vip(1), &[(80, 8080)], &[&self.api]);
        mesh
    }

    /// A proxy that follows the stand-in.
    #[must_use]
    pub fn options(&self) -> ProxyOptions {
        ProxyOptions::new(&self.world, self.world.node(0)).follow(&self.istiod)
    }

    /// Starts a ready proxy that serves the three pods.
    ///
    /// # Errors
    /// When it does not start.
    pub async fn start(&self) -> anyhow::Result<NodeRun<'_>> {
        self.start_with(&self.options()).await
    }

    /// As [`Steered::start`], with other options.
    ///
    /// # Errors
    /// As [`Steered::start`].
    pub async fn start_with(&self, options: &ProxyOptions) -> anyhow::Result<NodeRun<'_>> {
        let pods: [&Pod; 3] = [&self.web, &self.api, &self.db];
        NodeRun::start(&self.world, self.world.node(0), options, &pods).await
    }

    /// Whether `web` gets its words back from there.
    pub async fn echoes(&self, to: SocketAddr) -> bool {
        let answer = self.web.ask(to, b"hello").await;
        answer.is_ok_and(|answer| answer == b"hello")
    }
}

/// A service address.
#[must_use]
pub fn vip(last: u8) -> IpAddr {
    IpAddr::from([10, 96, 0, last])
}

/// Port 80 of a service address.
#[must_use]
pub fn web_port(last: u8) -> SocketAddr {
    SocketAddr::new(vip(last), 80)
}
