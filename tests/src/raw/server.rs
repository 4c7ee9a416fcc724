//! An HBONE server on the `h2` library: a foreign peer for the proxy's outbound side.

use std::{net::SocketAddr, time::Duration};

use anyhow::Context;
use bytes::Bytes;
use h2::{
    RecvStream, SendStream,
    server::{Builder, Connection, SendResponse},
};
use http::{Request, Response, StatusCode};
use rustls::pki_types::CertificateDer;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    task::JoinSet,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use crate::{
    ca::Identity,
    raw::{
        client::{chunk, write},
        frames::{FrameLog, Preface, Tap},
        tls,
    },
    traffic,
    wait::SOON,
    world::Pod,
};

type Stream = Tap<TlsStream<TcpStream>>;

/// Listens on 15008 of a pod that no proxy serves.
#[expect(missing_debug_implementations, reason = "TlsAcceptor has none")]
pub struct RawServer {
    listener: TcpListener,
    acceptor: TlsAcceptor,
    builder: Builder,
}

/// One connection of a proxy.
#[derive(Debug)]
pub struct ServerConnection {
    /// TCP peer.
    pub peer: SocketAddr,
    /// The SPIFFE URI of the client's certificate.
    pub client_id: Option<String>,
    /// What the proxy sent.
    pub frames: FrameLog,
    requests: mpsc::Receiver<Incoming>,
    orders: mpsc::Sender<Order>,
    driver: JoinSet<()>,
}

/// One request of the proxy.
#[derive(Debug)]
pub struct Incoming {
    /// The request; its body is what the application sends.
    pub request: Request<RecvStream>,
    /// For the answer.
    pub respond: SendResponse<Bytes>,
}

#[derive(Debug)]
enum Order {
    Goaway,
    Freeze(Duration),
}

impl RawServer {
    /// Listens with this certificate, for clients of `root`.
    ///
    /// # Errors
    /// When the port is taken or the certificate unusable.
    pub fn listen(
        pod: &Pod,
        identity: &Identity,
        root: &CertificateDer<'static>,
    ) -> anyhow::Result<Self> {
        Self::listen_on(pod, 15008, identity, root)
    }

    /// As [`RawServer::listen`], on another port.
    ///
    /// # Errors
    /// As [`RawServer::listen`].
    pub fn listen_on(
        pod: &Pod,
        port: u16,
        identity: &Identity,
        root: &CertificateDer<'static>,
    ) -> anyhow::Result<Self> {
        let any = SocketAddr::new(std::net::Ipv6Addr::UNSPECIFIED.into(), port);
        let listener = traffic::listen(pod.netns(), any)?;
        Ok(Self {
            listener,
            acceptor: tls::acceptor(identity, root)?,
            builder: Builder::new(),
        })
    }

    /// Changes HTTP/2 settings for connections to come.
    pub fn settings(&mut self, change: impl FnOnce(&mut Builder)) {
        change(&mut self.builder);
    }

    /// Waits for TCP alone: the peer of a server that stays silent.
    ///
    /// # Errors
    /// When none comes within ten seconds.
    pub async fn accept_tcp(&self) -> anyhow::Result<(TcpStream, SocketAddr)> {
        Ok(tokio::time::timeout(SOON, self.listener.accept())
            .await
            .context("no connection")??)
    }

    /// Waits for the next connection and both handshakes.
    ///
    /// # Errors
    /// When none comes within ten seconds, or a handshake fails.
    pub async fn accept(&self) -> anyhow::Result<ServerConnection> {
        let (socket, peer) = self.accept_tcp().await?;
        let shake = async {
            let stream = self.acceptor.accept(socket).await.context("TLS")?;
            let client_id = tls::client_id(&stream);
            let (tap, frames) = Tap::new(stream, Preface::Expected);
            let connection = self.builder.handshake(tap).await.context("HTTP/2")?;
            anyhow::Ok((client_id, frames, connection))
        };
        let (client_id, frames, connection) = tokio::time::timeout(SOON, shake)
            .await
            .context("silent client")??;
        let (requests_tx, requests) = mpsc::channel(256);
        let (orders, orders_rx) = mpsc::channel(4);
        let mut driver = JoinSet::new();
        driver.spawn(drive(connection, requests_tx, orders_rx));
        let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
        Ok(ServerConnection {
            peer,
            client_id,
            frames,
            requests,
            orders,
            driver,
        })
    }

    /// Whether no connection comes for `period`.
    pub async fn idle(&self, period: Duration) -> bool {
        tokio::time::timeout(period, self.listener.accept())
            .await
            .is_err()
    }
}

async fn drive(
    mut connection: Connection<Stream, Bytes>,
    requests: mpsc::Sender<Incoming>,
    mut orders: mpsc::Receiver<Order>,
) {
    loop {
        tokio::select! {
            order = orders.recv() => match order {
                Some(Order::Goaway) => connection.graceful_shutdown(),
                Some(Order::Freeze(time)) => tokio::time::sleep(time).await,
                None => return,
            },
            request = connection.accept() => match request {
                Some(Ok((request, respond))) => {
                    if requests.send(Incoming { request, respond }).await.is_err() {
                        return;
                    }
                }
                Some(Err(_)) | None => return,
            },
        }
    }
}

impl ServerConnection {
    /// Waits for the next request.
    ///
    /// # Errors
    /// When none comes within ten seconds, or the connection ended.
    pub async fn next(&mut self) -> anyhow::Result<Incoming> {
        tokio::time::timeout(SOON, self.requests.recv())
            .await
            .context("no request")?
            .context("connection ended")
    }

    /// Sends GOAWAY; streams go on.
    ///
    /// # Errors
    /// When the connection ended.
    pub async fn goaway(&self) -> anyhow::Result<()> {
        Ok(self.orders.send(Order::Goaway).await?)
    }

    /// Stops answering anything, also PING, and keeps the socket open.
    ///
    /// # Errors
    /// When the connection ended.
    pub async fn freeze(&self) -> anyhow::Result<()> {
        self.pause(Duration::MAX).await
    }

    /// As [`Self::freeze`], for `time`.
    ///
    /// # Errors
    /// When the connection ended.
    pub async fn pause(&self, time: Duration) -> anyhow::Result<()> {
        Ok(self.orders.send(Order::Freeze(time)).await?)
    }

    /// Waits until the proxy ends the connection.
    ///
    /// # Errors
    /// When it is still open after `limit`.
    pub async fn ended(&mut self, limit: Duration) -> anyhow::Result<()> {
        tokio::time::timeout(limit, self.driver.join_next())
            .await
            .context("still open")?;
        Ok(())
    }
}

impl Incoming {
    /// `:authority` of the request.
    #[must_use]
    pub fn authority(&self) -> &str {
        self.request
            .uri()
            .authority()
            .map_or("", http::uri::Authority::as_str)
    }

    /// A header of the request, empty if absent.
    #[must_use]
    pub fn header(&self, name: &str) -> &str {
        self.request
            .headers()
            .get(name)
            .and_then(|value| value.to_str().ok())
            .unwrap_or("")
    }

    /// Answers with a status and nothing else.
    ///
    /// # Errors
    /// When the stream is over.
    pub fn refuse(mut self, status: StatusCode) -> anyhow::Result<()> {
        self.respond
            .send_response(Response::builder().status(status).body(())?, true)?;
        Ok(())
    }

    /// Answers 200; yields both directions.
    ///
    /// # Errors
    /// When the stream is over.
    pub fn accept(mut self) -> anyhow::Result<(RecvStream, SendStream<Bytes>)> {
        let send = self.respond.send_response(Response::new(()), false)?;
        Ok((self.request.into_body(), send))
    }

    /// Answers 200 and joins the stream with a connection, as a gateway does, until both directions have ended.
    ///
    /// # Errors
    /// When one of the two fails.
    pub async fn join(self, connection: TcpStream) -> anyhow::Result<()> {
        let (mut recv, mut send) = self.accept()?;
        let (mut from, mut to) = connection.into_split();
        let inward = async {
            while let Some(data) = recv.data().await {
                let data = data?;
                recv.flow_control().release_capacity(data.len())?;
                to.write_all(&data).await?;
            }
            anyhow::Ok(to.shutdown().await?)
        };
        let outward = async {
            let mut buffer = vec![0; 16 << 10];
            loop {
                match from.read(&mut buffer).await? {
                    0 => return anyhow::Ok(send.send_data(Bytes::new(), true)?),
                    count => write(&mut send, &buffer[..count]).await?,
                }
            }
        };
        tokio::try_join!(inward, outward)?;
        Ok(())
    }

    /// Answers 200 and sends back what comes.
    ///
    /// # Errors
    /// When the stream fails.
    pub async fn echo(self) -> anyhow::Result<()> {
        let (mut recv, mut send) = self.accept()?;
        while let Some(data) = chunk(&mut recv).await? {
            write(&mut send, &data).await?;
        }
        Ok(send.send_data(Bytes::new(), true)?)
    }
}
