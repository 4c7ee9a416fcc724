//! TLS for HBONE connections, with limits.
//!
//! rustls shakes hands and keeps the key schedule; with TLS 1.3, the only version unless an
//! operator asks for 1.2 as well, `stream` then protects the bytes by itself and copies none. Where
//! TLS 1.2 may be spoken, or a configuration keeps its secrets, the library does all of it.

#[cfg(any(test, fuzzing))]
pub(super) mod fuzzing;
mod handshake;
mod record;
mod stream;
#[cfg(test)]
mod tests;
mod wire;

use std::{
    io::{self, IoSlice},
    net::IpAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use rustls::{
    ClientConfig, ServerConfig,
    crypto::CryptoProvider,
    pki_types::{CertificateDer, ServerName},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream as LibraryStream};

use super::{
    error::{OpenError, handshake_reason},
    io::ReadAhead,
};
use crate::{relay::Buffers, telemetry::Reason};
pub use record::RecordError;
use stream::TlsStream;

/// An established TLS session.
#[derive(Debug)]
pub struct Tls<T>(Session<T>);

#[derive(Debug)]
enum Session<T> {
    Lean(Box<TlsStream<T>>),
    Library(Box<LibraryStream<ReadAhead<T>>>),
}

/// Ciphertext that a session of the library holds before writers wait: a few of our largest DATA
/// frames, so that one system call carries many records.
const SEND_BUFFER: usize = 256 << 10;

/// Why no TLS session was accepted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AcceptError {
    /// The client failed the handshake, or we refused its certificate.
    #[error("TLS handshake")]
    Handshake(#[from] io::Error),
    /// The client did not finish it.
    #[error("no TLS handshake within {0:?}")]
    Timeout(Duration),
}

impl AcceptError {
    /// What metrics and logs call this failure.
    #[must_use]
    pub fn reason(&self) -> Reason {
        match self {
            Self::Handshake(error) => handshake_reason(error),
            Self::Timeout(_) => Reason::TlsTimeout,
        }
    }
}

/// Accepts a TLS session within `limit`.
///
/// # Errors
/// If the handshake fails or takes too long.
pub async fn accept<T: AsyncRead + AsyncWrite + Unpin>(
    io: T,
    config: Arc<ServerConfig>,
    buffers: &Buffers,
    limit: Duration,
) -> Result<Tls<T>, AcceptError> {
    let shaking = async {
        if config.enable_secret_extraction && is_tls13(config.crypto_provider()) {
            return Ok(Session::Lean(Box::new(
                handshake::accept(io, config).await?,
            )));
        }
        let io = ReadAhead::new(io, buffers.clone());
        let mut tls = TlsAcceptor::from(config).accept(io).await?;
        tls.get_mut().1.set_buffer_limit(Some(SEND_BUFFER));
        Ok(Session::Library(Box::new(LibraryStream::Server(tls))))
    };
    let shaken = timeout(limit, shaking).await;
    shaken
        .map_err(|_| AcceptError::Timeout(limit))?
        .map(Tls)
        .map_err(AcceptError::Handshake)
}

/// Opens a TLS session to the peer at `address`. Its certificate is checked for identity only, by
/// the verifier in `config`, so the address serves as a name that is never sent.
pub(super) async fn connect<T: AsyncRead + AsyncWrite + Unpin>(
    io: T,
    config: Arc<ClientConfig>,
    address: IpAddr,
    buffers: &Buffers,
    limit: Duration,
) -> Result<Tls<T>, OpenError> {
    let name = ServerName::from(address);
    let shaking = async {
        if config.enable_secret_extraction && is_tls13(config.crypto_provider()) {
            return Ok(Session::Lean(Box::new(
                handshake::connect(io, config, name).await?,
            )));
        }
        let io = ReadAhead::new(io, buffers.clone());
        let mut tls = TlsConnector::from(config).connect(name, io).await?;
        tls.get_mut().1.set_buffer_limit(Some(SEND_BUFFER));
        Ok(Session::Library(Box::new(LibraryStream::Client(tls))))
    };
    let shaken = timeout(limit, shaking).await;
    shaken
        .map_err(|_| OpenError::HandshakeTimeout(limit))?
        .map(Tls)
        .map_err(OpenError::Handshake)
}

/// Whether nothing but TLS 1.3 can come of a handshake.
fn is_tls13(provider: &CryptoProvider) -> bool {
    provider
        .cipher_suites
        .iter()
        .all(|suite| suite.tls13().is_some())
}

impl<T> Tls<T> {
    /// The peer's certificate chain, leaf first, as it was verified.
    #[must_use]
    pub fn peer_certificates(&self) -> &[CertificateDer<'static>] {
        match &self.0 {
            Session::Lean(stream) => stream.peer_certificates(),
            Session::Library(stream) => stream.get_ref().1.peer_certificates().unwrap_or_default(),
        }
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> AsyncRead for Tls<T> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match &mut self.get_mut().0 {
            Session::Lean(stream) => Pin::new(stream).poll_read(cx, buf),
            Session::Library(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Tls<T> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        match &mut self.get_mut().0 {
            Session::Lean(stream) => Pin::new(stream).poll_write(cx, buf),
            Session::Library(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.get_mut().0 {
            Session::Lean(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Session::Library(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().0 {
            Session::Lean(stream) => Pin::new(stream).poll_flush(cx),
            Session::Library(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().0 {
            Session::Lean(stream) => Pin::new(stream).poll_shutdown(cx),
            Session::Library(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
