//! TLS handshakes with limits, and the buffer sizes of established sessions.

use std::{io, net::IpAddr, sync::Arc, time::Duration};

use rustls::{ClientConfig, ServerConfig, pki_types::ServerName};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

use super::{error::OpenError, io::ReadAhead};
use crate::relay::Buffers;

/// An accepted TLS session; `get_ref().1.peer_certificates()` tells who the peer is.
pub type Tls<T> = server::TlsStream<ReadAhead<T>>;

/// Ciphertext that a session holds before writers wait: a few of our largest DATA frames, so that
/// one system call carries many records.
const SEND_BUFFER: usize = 256 << 10;

/// Why no TLS session was accepted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AcceptError {
    /// The client failed the handshake, or we refused its certificate.
    #[error("TLS handshake: {0}")]
    Handshake(#[from] io::Error),
    /// The client did not finish it.
    #[error("no TLS handshake within {0:?}")]
    Timeout(Duration),
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
    let io = ReadAhead::new(io, buffers.clone());
    let handshake = TlsAcceptor::from(config).accept(io);
    let mut tls = timeout(limit, handshake)
        .await
        .map_err(|_| AcceptError::Timeout(limit))??;
    tls.get_mut().1.set_buffer_limit(Some(SEND_BUFFER));
    Ok(tls)
}

/// Opens a TLS session to the peer at `address`. Its certificate is checked for identity only, by
/// the verifier in `config`, so the address serves as a name that is never sent.
pub(super) async fn connect<T: AsyncRead + AsyncWrite + Unpin>(
    io: T,
    config: Arc<ClientConfig>,
    address: IpAddr,
    buffers: &Buffers,
    limit: Duration,
) -> Result<client::TlsStream<ReadAhead<T>>, OpenError> {
    let io = ReadAhead::new(io, buffers.clone());
    let name = ServerName::from(address);
    let handshake = TlsConnector::from(config).connect(name, io);
    let mut tls = timeout(limit, handshake)
        .await
        .map_err(|_| OpenError::HandshakeTimeout(limit))?
        .map_err(OpenError::Handshake)?;
    tls.get_mut().1.set_buffer_limit(Some(SEND_BUFFER));
    Ok(tls)
}
