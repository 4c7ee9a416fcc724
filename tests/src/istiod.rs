//! A stand-in istiod: the delta discovery service and the certificate service over TLS, with their habits and their faults.
//!
//! It serves a mesh that tests describe with the same builders as the mesh file ([`Mesh`](crate::Mesh)), records whatever it is told, and does on
//! demand what control planes do on bad days. What a real istiod does is done of its own accord: one complete first response
//! per type, workloads before services, versions that are hashes, differences to what a client claims to have, Address
//! before Authorization, headers only with the first response, and the quirks of on-demand clients.
//!
//! ```no_run
//! # async fn example(world: &testkit::World, mesh: &testkit::Mesh) -> anyhow::Result<()> {
//! use testkit::{Istiod, PodSpec, ProxyOptions, istiod::Kind};
//!
//! let istiod = Istiod::options().token("secret").start(world, &*world.node(0).pod(&PodSpec::plain("istiod"))?)?;
//! istiod.set(mesh);
//! let proxy = ProxyOptions::new(world, world.node(0)).follow(&istiod).start(world.node(0))?;
//! istiod.synced().await;
//! istiod.remove(Kind::Address, &["Kubernetes//Pod/shop/web"]);
//! # Ok(()) }
//! ```

mod access;
mod catalogue;
mod certify;
mod csr;
mod discovery;
mod inject;
mod observe;
mod record;
mod server;
mod session;
mod signing;

pub use catalogue::Kind;
pub use csr::{CertificateCall, Csr, Outcome};
pub use inject::Injection;
pub use record::{Sent, Stream, SyncStatus};
pub use signing::{Flaw, Layout, Signing};

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::Context as _;
use bytes::Bytes;
use parking_lot::{Mutex, RwLock};
use tokio::{
    net::TcpListener,
    sync::{broadcast, watch},
    task::JoinSet,
};
use tonic::Status;
use xds_client::{
    local::{Document, LocalFile},
    proto::discovery::DeltaDiscoveryResponse,
};

use crate::{
    ca::Authority,
    raw::tls::server_tls,
    sys::Netns,
    traffic,
    world::{Pod, World},
};
use access::Access;
use catalogue::Catalogue;
use server::{Switch, Valve, Wire};
use signing::Signer;

/// The port of istiod's TLS services.
pub const PORT: u16 = 15012;

/// How to start a stand-in.
#[derive(Debug, Clone, Default)]
pub struct IstiodOptions {
    access: Access,
    names: Vec<String>,
}

impl IstiodOptions {
    /// Refuses streams and requests to sign without this bearer token.
    #[must_use]
    pub fn token(mut self, token: &str) -> Self {
        self.access.token = Some(token.to_owned());
        self
    }

    /// Refuses streams of another cluster.
    #[must_use]
    pub fn cluster(mut self, id: &str) -> Self {
        self.access.cluster = Some(id.to_owned());
        self
    }

    /// Refuses nodes of another namespace than this one, that of the token.
    #[must_use]
    pub fn namespace(mut self, namespace: &str) -> Self {
        self.access.namespace = Some(namespace.to_owned());
        self
    }

    /// Refuses longer requests; 4 MiB unless set.
    #[must_use]
    pub fn request_limit(mut self, bytes: usize) -> Self {
        self.access.request_limit = bytes;
        self
    }

    /// Presents a certificate for these host names and addresses only, instead of one for its address and `localhost`.
    #[must_use]
    pub fn valid_for(mut self, names: &[&str]) -> Self {
        self.names = names.iter().map(|name| (*name).to_owned()).collect();
        self
    }

    /// Starts on port 15012 of a pod, where proxies of all nodes reach it.
    ///
    /// # Errors
    /// When the port is taken or the root certificate cannot be written.
    pub fn start(self, world: &World, pod: &Pod) -> anyhow::Result<Istiod> {
        self.start_at(pod.netns(), pod.at(PORT), world.directory())
    }

    /// Starts on a free port of this process's own loopback interface.
    ///
    /// # Errors
    /// As [`IstiodOptions::start`].
    pub fn start_here(self, directory: &Path) -> anyhow::Result<Istiod> {
        let here = Netns::current()?;
        self.start_at(&here, (Ipv4Addr::LOCALHOST, 0).into(), directory)
    }

    /// Starts inside any namespace; `directory` takes the root certificate.
    ///
    /// # Errors
    /// As [`IstiodOptions::start`].
    pub fn start_at(
        mut self,
        netns: &Netns,
        at: SocketAddr,
        directory: &Path,
    ) -> anyhow::Result<Istiod> {
        static COUNTER: AtomicU32 = AtomicU32::new(1);
        let serial = COUNTER.fetch_add(1, Ordering::Relaxed);
        if self.names.is_empty() {
            self.names = vec![at.ip().to_string(), "localhost".to_owned()];
        }
        let authority = Authority::new("stand-in istiod root")?;
        let root_file = directory.join(format!("istiod-{serial}-root.pem"));
        std::fs::write(&root_file, authority.root_pem()).context("root certificate")?;
        let tls = server_tls(&authority.issue_server(&self.names)?)?;
        let listener = traffic::listen(netns, at)?;
        let istiod = Istiod {
            shared: Arc::new(Shared {
                access: self.access,
                catalogue: Mutex::default(),
                changes: watch::Sender::new(0),
                streams: watch::Sender::default(),
                faults: Mutex::default(),
                commands: broadcast::Sender::new(64),
                signer: Signer::new()?,
            }),
            wire: Arc::new(Wire {
                tls: RwLock::new(tls),
                cut: Switch::default(),
                goaway: Switch::default(),
                grace: Mutex::default(),
                valve: Arc::<Valve>::default(),
                connections: AtomicU64::new(0),
                frames: Mutex::default(),
            }),
            netns: netns.duplicate()?,
            address: listener.local_addr()?,
            names: self.names,
            root_file,
            serving: Mutex::default(),
        };
        istiod.serve(listener);
        Ok(istiod)
    }
}

/// The running stand-in. Dropping it closes everything.
#[derive(Debug)]
pub struct Istiod {
    shared: Arc<Shared>,
    wire: Arc<Wire>,
    netns: Netns,
    address: SocketAddr,
    names: Vec<String>,
    root_file: PathBuf,
    serving: Mutex<JoinSet<()>>,
}

/// What the handle and all streams share.
#[derive(Debug)]
struct Shared {
    access: Access,
    catalogue: Mutex<Catalogue>,
    /// Wakes streams: the catalogue or the faults have changed.
    changes: watch::Sender<u64>,
    streams: watch::Sender<Vec<Stream>>,
    faults: Mutex<Faults>,
    commands: broadcast::Sender<Command>,
    signer: Signer,
}

impl Shared {
    fn set(&self, document: Document) {
        self.catalogue.lock().apply(document, true);
        self.wake();
    }

    fn set_readable(&self, document: Document) {
        let rejected = Vec::new();
        self.set(Document {
            rejected,
            ..document
        });
    }

    fn wake(&self) {
        self.changes.send_modify(|count| *count += 1);
    }
}

#[derive(Debug, Default)]
struct Faults {
    refusal: Option<Status>,
    delay: Duration,
    held: Vec<Kind>,
}

/// To all open streams.
#[derive(Debug, Clone)]
enum Command {
    Inject(DeltaDiscoveryResponse),
    End(Result<(), Status>),
}

/// What it serves.
impl Istiod {
    /// Builds one.
    #[must_use]
    pub fn options() -> IstiodOptions {
        IstiodOptions::default()
    }

    /// Serves exactly this from now on, and pushes the difference.
    ///
    /// # Panics
    /// When the mesh cannot be expressed in protobuf.
    pub fn set(&self, content: impl Into<Document>) {
        self.shared.set(content.into());
    }

    /// Serves what a mesh file says, now and whenever it says something new, so that any scenario that writes such a file can run
    /// from a control plane. What cannot be read is not served.
    ///
    /// # Errors
    /// When the file cannot be used at all.
    pub async fn follow(&self, file: &Path) -> anyhow::Result<()> {
        let mut file = LocalFile::new(file);
        let shared = Arc::clone(&self.shared);
        shared.set_readable(file.load().await?);
        self.serving.lock().spawn(async move {
            loop {
                if let Ok(document) = file.changed().await {
                    shared.set_readable(document);
                }
            }
        });
        Ok(())
    }

    /// Adds and replaces resources, and pushes them.
    ///
    /// # Panics
    /// As [`Istiod::set`].
    pub fn put(&self, content: impl Into<Document>) {
        self.shared.catalogue.lock().apply(content.into(), false);
        self.shared.wake();
    }

    /// Serves any bytes as the content of a resource.
    pub fn put_raw(&self, kind: Kind, name: &str, content: impl Into<Bytes>) {
        let mut catalogue = self.shared.catalogue.lock();
        catalogue.put_raw(kind, name, content.into());
        drop(catalogue);
        self.shared.wake();
    }

    /// Removes resources, and pushes that.
    pub fn remove(&self, kind: Kind, names: &[&str]) {
        self.shared.catalogue.lock().remove(kind, names);
        self.shared.wake();
    }

    /// Serves the same under other versions from the next stream on, as another replica of istiod may.
    pub fn reversion(&self) {
        self.shared.catalogue.lock().reversion();
    }

    /// The version of a resource; policies have an empty one.
    #[must_use]
    pub fn version(&self, kind: Kind, name: &str) -> Option<String> {
        let catalogue = self.shared.catalogue.lock();
        catalogue.version(kind, name).map(str::to_owned)
    }
}

/// Where it is.
impl Istiod {
    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The file that holds its root certificate.
    #[must_use]
    pub fn root_file(&self) -> &Path {
        &self.root_file
    }

    /// The token that it asks for.
    #[must_use]
    pub fn token(&self) -> Option<&str> {
        self.shared.access.token.as_deref()
    }

    /// Listens again after [`Istiod::stop`], at the same address and with whatever it serves now.
    ///
    /// # Errors
    /// When the port is taken.
    pub fn start(&self) -> anyhow::Result<()> {
        self.serve(traffic::listen(&self.netns, self.address)?);
        Ok(())
    }

    fn serve(&self, listener: TcpListener) {
        let (wire, routes) = (Arc::clone(&self.wire), discovery::routes(&self.shared));
        let mut serving = self.serving.lock();
        serving.spawn(server::serve(listener, wire, routes));
    }

    /// Closes port and connections, as a process that is killed.
    pub async fn stop(&self) {
        let mut serving = std::mem::take(&mut *self.serving.lock());
        serving.shutdown().await;
    }

    /// Takes a new root and a new certificate, writes the root file anew, and uses them for new connections.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn replace_root(&self) -> anyhow::Result<()> {
        let authority = Authority::new("stand-in istiod root, the next")?;
        let aside = self.root_file.with_extension("new");
        std::fs::write(&aside, authority.root_pem())?;
        std::fs::rename(&aside, &self.root_file)?;
        *self.wire.tls.write() = server_tls(&authority.issue_server(&self.names)?)?;
        Ok(())
    }
}

/// Bad days.
impl Istiod {
    /// Cuts all connections; new ones are welcome.
    pub fn cut(&self) {
        self.wire.cut.flip();
    }

    /// Says GOAWAY on all connections, and closes those that are still there after `grace` (istiod: 10 s).
    pub fn goaway(&self, grace: Duration) {
        *self.wire.grace.lock() = grace;
        self.wire.goaway.flip();
    }

    /// Ends all streams with OK or a status.
    pub fn end_streams(&self, with: Result<(), Status>) {
        // Nobody listens when no stream is open.
        let _ = self.shared.commands.send(Command::End(with));
    }

    /// Refuses new streams with this status, or no longer.
    pub fn refuse(&self, with: impl Into<Option<Status>>) {
        self.shared.faults.lock().refusal = with.into();
    }

    /// Sends each response this much later.
    pub fn delay(&self, by: Duration) {
        self.shared.faults.lock().delay = by;
    }

    /// Holds back all responses of these kinds; what is no longer among them goes out.
    pub fn hold(&self, kinds: &[Kind]) {
        kinds.clone_into(&mut self.shared.faults.lock().held);
        self.shared.wake();
    }

    /// Stops reading and writing on all connections, or goes on. Stopping both is how a network that lost its way looks.
    pub fn stall(&self, reads: bool, writes: bool) {
        self.wire.valve.set(reads, writes);
    }

    /// Sends a response as it is on all open streams.
    ///
    /// # Panics
    /// When no stream is open.
    pub fn inject(&self, response: impl Into<DeltaDiscoveryResponse>) {
        let sent = self.shared.commands.send(Command::Inject(response.into()));
        assert!(sent.is_ok(), "no stream is open");
    }
}
