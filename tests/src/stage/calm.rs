//! Normal traffic before, while and after somebody misbehaves.

use std::{net::SocketAddr, time::Duration};

use tokio::{io::AsyncWriteExt as _, net::TcpStream, sync::Mutex};

use crate::{
    cluster::Cluster,
    proxy::Proxy,
    raw::{
        RawClient, Tunnel,
        frames::{Frame, PREFACE, Preface, Tap, encode, kind},
    },
    stage::ForeignClient,
    traffic::{self, Behaviour, Server},
    wait,
};

/// A proxy that serves one pod, with an application in it and one outside.
#[derive(Debug)]
pub struct Calm<'a> {
    /// The proxy.
    pub cluster: Cluster<'a>,
    foreign: &'a ForeignClient,
    inside: Server,
    outside: Server,
    resident: u64,
    held: Mutex<Held>,
}

/// Flows that are open all the time.
#[derive(Debug)]
struct Held {
    inwards: TcpStream,
    outwards: TcpStream,
    _client: RawClient,
    tunnel: Tunnel,
}

impl Held {
    async fn go_on(&mut self) {
        let word = b"never cut";
        traffic::ping(&mut self.inwards, word).await.unwrap();
        traffic::ping(&mut self.outwards, word).await.unwrap();
        self.tunnel.ping(word).await.unwrap();
    }
}

impl<'a> Calm<'a> {
    /// Starts the proxy with these further variables, and sends the first traffic through it.
    ///
    /// # Panics
    /// When that fails.
    pub async fn start(foreign: &'a ForeignClient, env: &[(&str, &str)]) -> Self {
        let cluster = foreign.cluster_with(env).await.unwrap();
        let inside = foreign.api.serve(INSIDE, Behaviour::Echo).unwrap();
        let outside = foreign.peer.serve(OUTSIDE, Behaviour::Echo).unwrap();
        let client = foreign.client().await;
        let mut held = Held {
            inwards: foreign.peer.connect(inside.address).await.unwrap(),
            outwards: foreign.api.connect(outside.address).await.unwrap(),
            tunnel: client.tunnel(&inside.address.to_string()).await.unwrap(),
            _client: client,
        };
        held.go_on().await;
        let mut calm = Self {
            cluster,
            foreign,
            inside,
            outside,
            resident: 0,
            held: Mutex::new(held),
        };
        calm.carries_on().await;
        calm.resident = calm.proxy().resident_bytes().unwrap();
        calm
    }

    /// The proxy.
    #[must_use]
    pub fn proxy(&self) -> &Proxy<'a> {
        self.cluster.proxy(0)
    }

    /// The application of the pod.
    #[must_use]
    pub fn application(&self) -> SocketAddr {
        self.inside.address
    }

    /// Checks that whatever came before harms nobody: what was open still is, connections go in and out in plaintext and by HBONE,
    /// memory comes back, and nothing panicked.
    ///
    /// # Panics
    /// When it does.
    pub async fn unharmed(&self) {
        self.held.lock().await.go_on().await;
        self.carries_on().await;
        let bound = self.resident + MORE;
        let small = async || {
            let resident = self.proxy().resident_bytes().unwrap();
            (resident <= bound).then_some(())
        };
        wait::until(
            wait::SOON,
            &format!("at most {bound} bytes are resident"),
            small,
        )
        .await;
        let panics = self
            .proxy()
            .log()
            .since(0, |line| line.raw.contains("panic"));
        assert!(panics.is_empty(), "{panics:?}");
    }

    async fn carries_on(&self) {
        let Self {
            foreign,
            inside,
            outside,
            ..
        } = self;
        let word = b"as ever";
        let within = Duration::from_secs(30);
        let inwards = wait::within(
            within,
            "in plaintext",
            foreign.peer.ask(inside.address, word),
        );
        assert_eq!(inwards.await.unwrap(), word);
        let outwards = wait::within(within, "outwards", foreign.api.ask(outside.address, word));
        assert_eq!(outwards.await.unwrap(), word);
        let client = Box::pin(foreign.client());
        let client = wait::within(within, "by HBONE", client).await;
        let tunnel = client.tunnel(&inside.address.to_string()).await;
        tunnel.unwrap().ping(word).await.unwrap();
    }

    /// Waits until this limit was hit.
    ///
    /// # Panics
    /// When it is not.
    pub async fn hit(&self, limit: &str) {
        let labels = [("limit", limit)];
        let metric = "culvert_limits_hit_total";
        self.proxy()
            .metric(metric, &labels, |hits| hits > 0.0)
            .await;
    }

    /// Sends frames as a client of HBONE, and reads until the proxy ends the connection. Returns the code of its GOAWAY; `None`
    /// if a reset was faster, since the proxy reads no more of a flood.
    ///
    /// # Panics
    /// When the connection stays open.
    pub async fn flood(&self, frames: &[u8]) -> Option<u32> {
        let (tap, log) = Tap::new(self.foreign.tls().await, Preface::None);
        let (mut reader, mut writer) = tokio::io::split(tap);
        let settings = encode(kind::SETTINGS, 0, 0, &[]);
        let bytes = [PREFACE, &settings, frames].concat();
        let talk = async {
            let mut sink = tokio::io::sink();
            // The proxy may close while there is still something to say.
            let _ = tokio::join!(
                writer.write_all(&bytes),
                tokio::io::copy(&mut reader, &mut sink)
            );
        };
        wait::within(Duration::from_secs(30), "the connection ends", talk).await;
        let seen = log.all();
        let goaway = seen.iter().find(|frame| frame.kind == kind::GOAWAY);
        goaway.and_then(Frame::error_code)
    }
}

/// Port of the application in the pod.
const INSIDE: u16 = 8080;
/// Port of the one outside.
const OUTSIDE: u16 = 7000;
/// What may stay resident after a flood.
const MORE: u64 = 48 << 20;
