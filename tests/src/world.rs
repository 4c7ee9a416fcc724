//! Nodes and pods as network namespaces.
//!
//! ```text
//!   pod ─ eth0 ┐                                   ┌ eth0 ─ pod
//!   pod ─ eth0 ┼ bridge `pods` (node 0) ─ link ─ (node 1) bridge `pods` ┼ eth0 ─ pod
//! proxy ─ eth0 ┘                                   └ eth0 ─ proxy
//! ```
//! Pods of one node share a bridge; nodes route between each other over the link, which is a namespace with a bridge of its own.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicU32, Ordering},
    },
};

use anyhow::Context;

use crate::{ca::Authority, redirect::Redirect, sys, sys::Netns};

/// Nodes on one link, a certificate authority and a directory for files. Dropping it removes all of it.
#[derive(Debug)]
pub struct World {
    nodes: Vec<Node>,
    link: Netns,
    authority: Authority,
    directory: tempfile::TempDir,
}

impl World {
    /// Makes `nodes` connected nodes without pods.
    ///
    /// # Errors
    /// When namespaces cannot be made or `ip` fails.
    ///
    /// # Panics
    /// When neither root nor user namespaces are available.
    pub fn new(nodes: u8) -> anyhow::Result<Self> {
        sys::ensure_privileges();
        let directory = tempfile::Builder::new()
            .prefix("culvert-world-")
            .tempdir()?;
        let link = Netns::new().context("a namespace for the node link")?;
        link.command(
            "ip",
            &["-batch", "-"],
            "link set lo up\nlink add name br0 type bridge forward_delay 0 mcast_snooping 0\nlink set br0 up\n",
        )?;
        let nodes = (0..nodes)
            .map(|index| Node::new(index, nodes, &link))
            .collect::<Result<_, _>>()?;
        let authority = Authority::new("testkit root")?;
        authority.write(directory.path())?;
        Ok(Self {
            nodes,
            link,
            authority,
            directory,
        })
    }

    /// A node, counted from 0.
    #[must_use]
    pub fn node(&self, index: usize) -> &Node {
        &self.nodes[index]
    }

    /// All nodes.
    #[must_use]
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// The namespace through which all traffic between nodes goes.
    #[must_use]
    pub fn link(&self) -> &Netns {
        &self.link
    }

    /// The root that all proxies of this world share.
    #[must_use]
    pub fn authority(&self) -> &Authority {
        &self.authority
    }

    /// A directory that goes with the world.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// A path inside [`World::directory`].
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}

/// The address of a node's bridge. Without one of its own it takes that of a port, and may take that of another one with each pod
/// that joins: what the other pods send to the node is lost then until they have noticed.
const BRIDGE: &str = "02:00:00:00:00:01";

/// One node: a bridge for its pods, an uplink, and a namespace for its proxy.
#[derive(Debug)]
pub struct Node {
    name: String,
    index: u8,
    netns: Netns,
    proxy: Netns,
    next_host: AtomicU8,
    next_port: AtomicU32,
}

impl Node {
    fn new(index: u8, nodes: u8, link: &Netns) -> anyhow::Result<Self> {
        let node = Self {
            name: format!("node-{index}"),
            index,
            netns: Netns::new()?,
            proxy: Netns::new()?,
            next_host: AtomicU8::new(10),
            next_port: AtomicU32::new(0),
        };
        link.command(
            "ip",
            &["-batch", "-"],
            &format!(
                "link add node{index} type veth peer name uplink netns {}\nlink set node{index} master br0 up\n",
                node.netns.path()
            ),
        )?;
        quick_ipv6(&node.netns)?;
        node.netns.sysctl("ipv4/ip_forward", "1")?;
        node.netns.sysctl("ipv6/conf/all/forwarding", "1")?;
        let host = index + 1;
        let mut batch = format!(
            "link set lo up\nlink add name pods address {BRIDGE} type bridge forward_delay 0 mcast_snooping 0\nlink set pods up\nlink set uplink up\n\
             addr add 10.20.{index}.1/24 dev pods\naddr add fd20:0:0:{index:x}::1/64 dev pods nodad\n\
             addr add 172.31.0.{host}/24 dev uplink\naddr add fd31::{host:x}/64 dev uplink nodad\n"
        );
        for other in (0..nodes).filter(|other| *other != index) {
            let via = other + 1;
            batch += &format!(
                "route add 10.20.{other}.0/24 via 172.31.0.{via}\nroute add fd20:0:0:{other:x}::/64 via fd31::{via:x}\n"
            );
        }
        node.netns.command("ip", &["-batch", "-"], &batch)?;
        node.attach(&node.proxy, 2)?;
        Ok(node)
    }

    /// `node-0`, `node-1`, …
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The node's own namespace, where a kubelet would run: reaches its pods through the bridge.
    #[must_use]
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// The namespace of the proxy process.
    #[must_use]
    pub fn proxy_netns(&self) -> &Netns {
        &self.proxy
    }

    /// Starts a pod; captured if its spec says so.
    ///
    /// # Errors
    /// When `ip` or `nft` fails.
    pub fn pod(&self, spec: &PodSpec) -> anyhow::Result<Arc<Pod>> {
        let netns = Netns::new()?;
        let host = self.next_host.fetch_add(1, Ordering::Relaxed);
        let (ip4, ip6) = self.attach(&netns, host)?;
        if let Some(redirect) = spec.redirect {
            redirect
                .install(&netns)
                .with_context(|| format!("rules of pod {}", spec.name))?;
        }
        let node = self.name.clone();
        Ok(Arc::new(Pod {
            spec: spec.clone(),
            node,
            ip4,
            ip6,
            netns,
        }))
    }

    /// Another namespace for a second proxy on this node, as during an upgrade.
    ///
    /// # Errors
    /// When `ip` fails.
    pub fn second_proxy_netns(&self) -> anyhow::Result<Netns> {
        let netns = Netns::new()?;
        self.attach(&netns, self.next_host.fetch_add(1, Ordering::Relaxed))?;
        Ok(netns)
    }

    /// Joins a namespace to the bridge with address `host` of the node's range.
    fn attach(&self, netns: &Netns, host: u8) -> anyhow::Result<(Ipv4Addr, Ipv6Addr)> {
        let (index, port) = (self.index, self.next_port.fetch_add(1, Ordering::Relaxed));
        quick_ipv6(netns)?;
        let ip4 = Ipv4Addr::new(10, 20, index, host);
        let ip6 = Ipv6Addr::new(0xfd20, 0, 0, index.into(), 0, 0, 0, host.into());
        self.netns.command(
            "ip",
            &["-batch", "-"],
            &format!(
                "link add port{port} type veth peer name eth0 netns {}\nlink set port{port} master pods up\n",
                netns.path()
            ),
        )?;
        netns.command(
            "ip",
            &["-batch", "-"],
            &format!(
                "link set lo up\nlink set eth0 up\naddr add {ip4}/24 dev eth0\naddr add {ip6}/64 dev eth0 nodad\n\
                 route add default via 10.20.{index}.1\nroute add default via fd20:0:0:{index:x}::1\n"
            ),
        )?;
        Ok((ip4, ip6))
    }
}

/// Addresses are usable at once: no duplicate address detection in a world that we alone fill.
fn quick_ipv6(netns: &Netns) -> anyhow::Result<()> {
    netns.sysctl("ipv6/conf/default/accept_dad", "0")?;
    netns.sysctl("ipv6/conf/default/dad_transmits", "0")?;
    netns.sysctl("ipv6/conf/all/accept_dad", "0")
}

/// Who a pod is, and how it is captured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodSpec {
    /// Kubernetes pod UID.
    pub uid: String,
    /// Pod name.
    pub name: String,
    /// Namespace; `shop` unless set.
    pub namespace: String,
    /// Service account; the pod name unless set.
    pub service_account: String,
    /// The rules in the pod; `None` = outside the mesh.
    pub redirect: Option<Redirect>,
}

impl PodSpec {
    /// A captured pod in namespace `shop` with a service account of the same name.
    #[must_use]
    pub fn captured(name: &str) -> Self {
        static COUNTER: AtomicU32 = AtomicU32::new(1);
        let serial = COUNTER.fetch_add(1, Ordering::Relaxed);
        Self {
            uid: format!("00000000-0000-4000-8000-{serial:012x}"),
            name: name.to_owned(),
            namespace: "shop".to_owned(),
            service_account: name.to_owned(),
            redirect: Some(Redirect::default()),
        }
    }

    /// A pod outside the mesh.
    #[must_use]
    pub fn plain(name: &str) -> Self {
        Self {
            redirect: None,
            ..Self::captured(name)
        }
    }

    /// In another namespace.
    #[must_use]
    pub fn namespace(self, namespace: &str) -> Self {
        Self {
            namespace: namespace.to_owned(),
            ..self
        }
    }

    /// Under another service account.
    #[must_use]
    pub fn service_account(self, account: &str) -> Self {
        Self {
            service_account: account.to_owned(),
            ..self
        }
    }

    /// With other rules.
    #[must_use]
    pub fn redirect(self, redirect: Redirect) -> Self {
        Self {
            redirect: Some(redirect),
            ..self
        }
    }
}

/// A pod: a namespace with `lo` and `eth0`, IPv4 and IPv6.
#[derive(Debug)]
pub struct Pod {
    spec: PodSpec,
    node: String,
    ip4: Ipv4Addr,
    ip6: Ipv6Addr,
    netns: Netns,
}

impl Pod {
    /// What it was made from.
    #[must_use]
    pub fn spec(&self) -> &PodSpec {
        &self.spec
    }

    /// Pod name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.spec.name
    }

    /// Kubernetes pod UID.
    #[must_use]
    pub fn uid(&self) -> &str {
        &self.spec.uid
    }

    /// Name of its node.
    #[must_use]
    pub fn node(&self) -> &str {
        &self.node
    }

    /// Its IPv4 address.
    #[must_use]
    pub fn ip4(&self) -> IpAddr {
        self.ip4.into()
    }

    /// Its IPv6 address.
    #[must_use]
    pub fn ip6(&self) -> IpAddr {
        self.ip6.into()
    }

    /// A port at its IPv4 address.
    #[must_use]
    pub fn at(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.ip4(), port)
    }

    /// A port at its IPv6 address.
    #[must_use]
    pub fn at6(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.ip6(), port)
    }

    /// `spiffe://cluster.local/ns/…/sa/…`
    #[must_use]
    pub fn spiffe_id(&self) -> String {
        format!(
            "spiffe://cluster.local/ns/{}/sa/{}",
            self.spec.namespace, self.spec.service_account
        )
    }

    /// Its namespace.
    #[must_use]
    pub fn netns(&self) -> &Netns {
        &self.netns
    }
}
