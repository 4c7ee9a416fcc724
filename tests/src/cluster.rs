//! A whole running mesh: on each node an agent, a proxy and their conversation.

use std::{collections::BTreeMap, path::PathBuf, sync::Arc};

use anyhow::Context;

use crate::{
    agent::{Agent, Session},
    istiod::{self, Istiod},
    mesh::Mesh,
    proxy::{Proxy, ProxyOptions},
    wait,
    world::{Node, Pod, World},
};

/// Proxies on all nodes of a world, ready, with all captured pods enrolled.
#[derive(Debug)]
pub struct Cluster<'a> {
    /// One per node.
    pub nodes: Vec<NodeRun<'a>>,
    /// The file that proxies without a control plane read.
    pub mesh_file: PathBuf,
    /// What serves the file, if proxies do not read it themselves.
    pub istiod: Option<Istiod>,
}

/// What runs on one node.
#[derive(Debug)]
pub struct NodeRun<'a> {
    /// Listens for further proxies.
    pub agent: Agent,
    /// The conversation with the proxy.
    pub session: Session,
    /// The proxy.
    pub proxy: Proxy<'a>,
}

impl<'a> Cluster<'a> {
    /// Writes the mesh, starts all proxies, and hands them the captured pods of their nodes.
    ///
    /// # Errors
    /// When a proxy does not start or refuses a pod.
    pub async fn start(world: &'a World, mesh: &Mesh, pods: &[&Arc<Pod>]) -> anyhow::Result<Self> {
        Self::start_with(world, mesh, pods, &BTreeMap::new()).await
    }

    /// As [`Cluster::start`], with further variables for all proxies.
    ///
    /// With `TESTKIT_MESH=istiod` in the environment the proxies do not read the file: a stand-in istiod does, and they follow it.
    ///
    /// # Errors
    /// As [`Cluster::start`].
    pub async fn start_with(
        world: &'a World,
        mesh: &Mesh,
        pods: &[&Arc<Pod>],
        env: &BTreeMap<&str, &str>,
    ) -> anyhow::Result<Self> {
        let file = ProxyOptions::mesh_file(world);
        mesh.write(&file)?;
        let istiod = if mesh_from_istiod() {
            let at = ([10, 20, 0, 1], istiod::PORT).into();
            let first = world.node(0).netns();
            let istiod = Istiod::options().start_at(first, at, world.directory())?;
            istiod.follow(&file).await?;
            Some(istiod)
        } else {
            None
        };
        let options = |node: &Node| {
            let plain = ProxyOptions::new(world, node);
            let source = istiod
                .iter()
                .fold(plain, |options, istiod| options.follow(istiod));
            env.iter()
                .fold(source, |options, (key, value)| options.env(key, value))
        };
        let mut cluster = Self::run(world, options, pods).await?;
        cluster.istiod = istiod;
        Ok(cluster)
    }

    /// Starts all proxies as followers of a control plane, and hands them the captured pods of their nodes.
    ///
    /// # Errors
    /// As [`Cluster::start`].
    pub async fn follow(
        world: &'a World,
        istiod: &Istiod,
        pods: &[&Arc<Pod>],
    ) -> anyhow::Result<Self> {
        Self::run(
            world,
            |node| ProxyOptions::new(world, node).follow(istiod),
            pods,
        )
        .await
    }

    /// Starts all proxies with options of the caller's choice, and hands them the captured pods of their nodes.
    ///
    /// # Errors
    /// As [`Cluster::start`].
    pub async fn run(
        world: &'a World,
        options: impl Fn(&Node) -> ProxyOptions,
        pods: &[&Arc<Pod>],
    ) -> anyhow::Result<Self> {
        let mut nodes = Vec::new();
        for node in world.nodes() {
            let options = options(node);
            let mine: Vec<&Pod> = captured(pods, node);
            nodes.push(
                NodeRun::start(world, node, &options, &mine)
                    .await
                    .with_context(|| node.name().to_owned())?,
            );
        }
        let mesh_file = ProxyOptions::mesh_file(world);
        Ok(Self {
            nodes,
            mesh_file,
            istiod: None,
        })
    }

    /// The proxy of a node.
    #[must_use]
    pub fn proxy(&self, node: usize) -> &Proxy<'a> {
        &self.nodes[node].proxy
    }
}

impl<'a> NodeRun<'a> {
    /// Starts agent and proxy of one node and hands over these pods.
    ///
    /// # Errors
    /// When the proxy does not connect, or refuses a pod.
    pub async fn start(
        world: &World,
        node: &'a Node,
        options: &ProxyOptions,
        pods: &[&Pod],
    ) -> anyhow::Result<Self> {
        let run = Self::connect(world, node, options).await?;
        run.session.snapshot(pods).await?;
        run.proxy.ready().await;
        Ok(run)
    }

    /// Starts agent and proxy of one node; the proxy has said hello and waits for the snapshot.
    ///
    /// # Errors
    /// When the proxy does not connect.
    pub async fn connect(
        world: &World,
        node: &'a Node,
        options: &ProxyOptions,
    ) -> anyhow::Result<Self> {
        let mut agent = Agent::bind(&ProxyOptions::agent_socket(world, node))?;
        let proxy = options.start(node)?;
        let connected = tokio::time::timeout(wait::SOON, agent.accept()).await;
        let session = connected.with_context(|| {
            format!(
                "the proxy does not connect; its log:\n{}",
                proxy.log().tail(40)
            )
        })??;
        Ok(Self {
            agent,
            session,
            proxy,
        })
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "test runs are steered by the environment"
)]
fn mesh_from_istiod() -> bool {
    std::env::var("TESTKIT_MESH").is_ok_and(|source| source == "istiod")
}

fn captured<'p>(pods: &[&'p Arc<Pod>], node: &Node) -> Vec<&'p Pod> {
    let pods = pods.iter().map(|pod| Arc::as_ref(pod));
    pods.filter(|pod| pod.node() == node.name() && pod.spec().redirect.is_some())
        .collect()
}
