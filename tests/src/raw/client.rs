//! An HBONE client on the `h2` library.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use h2::{
    RecvStream, SendStream,
    client::{SendRequest, handshake},
};
use http::{HeaderMap, Method, Request, StatusCode, Uri};
use rustls::pki_types::CertificateDer;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, DuplexStream},
    task::JoinSet,
};
use tokio_rustls::client::TlsStream;

use crate::{
    raw::{
        frames::{FrameLog, Preface, Tap},
        tls::{self, Hello},
    },
    sys::Netns,
    wait::SOON,
};

/// One HBONE connection, ready for requests.
#[derive(Debug)]
pub struct RawClient {
    /// Makes streams.
    pub requests: SendRequest<Bytes>,
    /// What the proxy sent.
    pub frames: FrameLog,
    /// The client's address of the TCP connection.
    pub local: SocketAddr,
    /// The SPIFFE URI of the server's certificate.
    pub server_id: Option<String>,
    /// What the server presented, leaf first.
    pub server_chain: Vec<CertificateDer<'static>>,
    driver: JoinSet<Result<(), h2::Error>>,
    _pump: JoinSet<anyhow::Result<()>>,
}

impl RawClient {
    /// Connects, shakes hands, and waits for the server's SETTINGS: only then has the server taken the certificate.
    ///
    /// # Errors
    /// When any of it fails.
    pub async fn connect(netns: &Netns, to: SocketAddr, hello: &Hello) -> anyhow::Result<Self> {
        let stream = hello.connect(netns, to).await?;
        let local = stream.get_ref().0.local_addr()?;
        Self::over(stream, local).await
    }

    /// Opens a tunnel to `authority` and, through it, a connection of its own with whoever is there.
    ///
    /// # Errors
    /// When the tunnel is refused, or as [`RawClient::connect`].
    pub async fn nested(&self, authority: &str, hello: &Hello) -> anyhow::Result<Self> {
        let tunnel = self.tunnel(authority).await?;
        ensure!(tunnel.status == StatusCode::OK, "{}", tunnel.status);
        let (near, far) = tokio::io::duplex(64 * 1024);
        let mut pump = JoinSet::new();
        pump.spawn(tunnel.carry(far));
        let stream = hello.shake(near, self.local.ip()).await?;
        let nested = Self::over(stream, self.local).await?;
        Ok(Self {
            _pump: pump,
            ..nested
        })
    }

    async fn over<S>(stream: TlsStream<S>, local: SocketAddr) -> anyhow::Result<Self>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let server_id = tls::server_id(&stream);
        let server_chain = stream.get_ref().1.peer_certificates();
        let server_chain = server_chain.unwrap_or_default().to_vec();
        let (tap, frames) = Tap::new(stream, Preface::None);
        let (requests, mut connection) = handshake(tap).await.context("HTTP/2")?;
        let mut settled = connection.ping_pong().context("ping")?;
        let mut driver = JoinSet::new();
        driver.spawn(connection);
        tokio::time::timeout(SOON, settled.ping(h2::Ping::opaque()))
            .await?
            .context("refused after the handshake")?;
        let requests = requests.ready().await?;
        Ok(Self {
            requests,
            frames,
            local,
            server_id,
            server_chain,
            driver,
            _pump: JoinSet::new(),
        })
    }

    /// Opens a tunnel to `authority` without any header.
    ///
    /// # Errors
    /// When the stream or the connection fails; a refusal by status is a [`Tunnel`].
    pub async fn tunnel(&self, authority: &str) -> anyhow::Result<Tunnel> {
        self.tunnel_with(authority, &[]).await
    }

    /// Asks for a tunnel to `authority` and lets it go; yields the status of the answer.
    ///
    /// # Errors
    /// As [`RawClient::tunnel`].
    pub async fn status(&self, authority: &str) -> anyhow::Result<u16> {
        Ok(self.tunnel(authority).await?.status.as_u16())
    }

    /// Opens a tunnel with these headers.
    ///
    /// # Errors
    /// As [`RawClient::tunnel`].
    pub async fn tunnel_with(
        &self,
        authority: &str,
        headers: &[(&str, &str)],
    ) -> anyhow::Result<Tunnel> {
        let uri = Uri::builder().authority(authority).build()?;
        let request = Request::builder().method(Method::CONNECT).uri(uri);
        let request = headers.iter().fold(request, |request, (name, value)| {
            request.header(*name, *value)
        });
        self.send(request.body(())?).await
    }

    /// Sends any request.
    ///
    /// # Errors
    /// As [`RawClient::tunnel`].
    pub async fn send(&self, request: Request<()>) -> anyhow::Result<Tunnel> {
        let talk = async {
            let mut ready = self.requests.clone().ready().await?;
            let (response, send) = ready.send_request(request, false)?;
            let (head, recv) = response.await?.into_parts();
            anyhow::Ok(Tunnel {
                status: head.status,
                headers: head.headers,
                send,
                recv,
            })
        };
        tokio::time::timeout(Duration::from_secs(25), talk).await?
    }

    /// Waits until the server ends the connection.
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

/// One CONNECT stream and its answer.
#[derive(Debug)]
pub struct Tunnel {
    /// Status of the answer.
    pub status: StatusCode,
    /// Headers of the answer.
    pub headers: HeaderMap,
    /// Towards the proxy.
    pub send: SendStream<Bytes>,
    /// From the proxy.
    pub recv: RecvStream,
}

impl Tunnel {
    /// Sends all bytes as windows allow.
    ///
    /// # Errors
    /// When the stream ends before.
    pub async fn write(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        write(&mut self.send, bytes).await
    }

    /// Ends this side.
    ///
    /// # Errors
    /// When the stream is over.
    pub fn finish(&mut self) -> anyhow::Result<()> {
        Ok(self.send.send_data(Bytes::new(), true)?)
    }

    /// Reads exactly `count` bytes.
    ///
    /// # Errors
    /// When the stream ends before, is reset, or stalls for ten seconds.
    pub async fn read(&mut self, count: usize) -> anyhow::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        read(&mut self.recv, count, &mut bytes).await?;
        Ok(bytes)
    }

    /// Reads until the proxy ends the stream.
    ///
    /// # Errors
    /// When the stream is reset, or stalls for ten seconds.
    pub async fn read_to_end(&mut self) -> anyhow::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        while let Some(data) = chunk(&mut self.recv).await? {
            bytes.extend_from_slice(&data);
        }
        Ok(bytes)
    }

    /// Writes and reads the same bytes back.
    ///
    /// # Errors
    /// When another answer comes, or none.
    pub async fn ping(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        let mut answer = Vec::new();
        let reading = read(&mut self.recv, bytes.len(), &mut answer);
        let (written, read) = tokio::join!(write(&mut self.send, bytes), reading);
        written?;
        read?;
        ensure!(answer == bytes, "another answer than the request");
        Ok(())
    }

    /// Carries the bytes of `stream` until both directions have ended.
    async fn carry(mut self, stream: DuplexStream) -> anyhow::Result<()> {
        let (mut reader, mut writer) = tokio::io::split(stream);
        let there = async {
            let mut buffer = vec![0; 16 * 1024];
            loop {
                let count = reader.read(&mut buffer).await?;
                if count == 0 {
                    return anyhow::Ok(self.send.send_data(Bytes::new(), true)?);
                }
                write(&mut self.send, &buffer[..count]).await?;
            }
        };
        let back = async {
            while let Some(data) = chunk(&mut self.recv).await? {
                writer.write_all(&data).await?;
            }
            Ok(writer.shutdown().await?)
        };
        tokio::try_join!(there, back)?;
        Ok(())
    }

    /// Waits until the proxy resets the stream; returns the code.
    ///
    /// # Errors
    /// When the stream ends in order, or stalls for ten seconds.
    pub async fn reset(&mut self) -> anyhow::Result<h2::Reason> {
        loop {
            match tokio::time::timeout(SOON, self.recv.data()).await? {
                Some(Ok(_)) => {}
                Some(Err(error)) => return error.reason().context("no stream error"),
                None => bail!("ended in order"),
            }
        }
    }
}

async fn read(recv: &mut RecvStream, count: usize, bytes: &mut Vec<u8>) -> anyhow::Result<()> {
    while bytes.len() < count {
        match chunk(recv).await? {
            Some(data) => bytes.extend_from_slice(&data),
            None => bail!("ended after {} of {count} bytes", bytes.len()),
        }
    }
    ensure!(
        bytes.len() == count,
        "{} bytes instead of {count}",
        bytes.len()
    );
    Ok(())
}

/// Reads one chunk and gives its window back.
pub(super) async fn chunk(recv: &mut RecvStream) -> anyhow::Result<Option<Bytes>> {
    let Some(data) = tokio::time::timeout(SOON, recv.data())
        .await
        .context("no data")?
    else {
        return Ok(None);
    };
    let data = data?;
    recv.flow_control().release_capacity(data.len())?;
    Ok(Some(data))
}

/// Sends all bytes as windows allow.
pub(super) async fn write(send: &mut SendStream<Bytes>, bytes: &[u8]) -> anyhow::Result<()> {
    let mut rest = Bytes::copy_from_slice(bytes);
    while !rest.is_empty() {
        send.reserve_capacity(rest.len());
        let window = std::future::poll_fn(|cx| send.poll_capacity(cx));
        let Some(granted) = tokio::time::timeout(SOON, window)
            .await
            .context("no window")?
        else {
            bail!("stream is over")
        };
        let part = rest.split_to(granted?.min(rest.len()));
        send.send_data(part, false)?;
    }
    Ok(())
}
