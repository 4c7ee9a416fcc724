//! The TLS handshake, driven by rustls without buffers of its own, up to the traffic keys.

use std::{io, sync::Arc};

use rustls::{
    ClientConfig, ExtractedSecrets, ServerConfig,
    client::UnbufferedClientConnection,
    pki_types::{CertificateDer, ServerName},
    server::UnbufferedServerConnection,
    unbuffered::{ConnectionState, EncodeError, EncodeTlsData, UnbufferedStatus},
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::{
    record::{HEADER, Protection},
    stream::{Kernel, TlsStream},
    wire::Wire,
};

/// What rustls wants next, freed of its borrows.
enum Step {
    Read,
    Write,
    Again,
    Done,
    Closed,
}

macro_rules! drive {
    ($connection:ident, $io:ident, $received:ident) => {{
        let mut out = Wire::default();
        loop {
            let UnbufferedStatus { discard, state, .. } =
                $connection.process_tls_records($received.records());
            let mut failure = None;
            let step = match state {
                Ok(ConnectionState::EncodeTlsData(data)) => {
                    encode(data, &mut out)?;
                    Step::Again
                }
                Ok(ConnectionState::TransmitTlsData(data)) => {
                    data.done();
                    Step::Write
                }
                Ok(ConnectionState::BlockedHandshake) => Step::Read,
                // What comes behind is no matter of the handshake, and rustls has not seen it.
                Ok(ConnectionState::WriteTraffic(_)) => Step::Done,
                Ok(_) => Step::Closed,
                Err(error) => {
                    failure = Some(error);
                    Step::Closed
                }
            };
            $received.discard(discard);
            match step {
                Step::Again => {}
                Step::Write => send(&mut $io, &mut out).await?,
                Step::Read => $received.read(&mut $io).await?,
                Step::Done => break,
                Step::Closed => {
                    let Some(error) = failure else {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    };
                    // The alert that names the failure is queued behind the error, alone. Asked again, the library would go
                    // on with what else the peer has sent, and fail again.
                    if let Ok(ConnectionState::EncodeTlsData(data)) = $connection
                        .process_tls_records($received.records())
                        .state
                    {
                        encode(data, &mut out)?;
                    }
                    let _ = send(&mut $io, &mut out).await;
                    let _ = $io.shutdown().await;
                    return Err(invalid(error));
                }
            }
        }
        send(&mut $io, &mut out).await?;
    }};
}

/// Connects as a TLS client over `io`. The configuration must allow secrets to be extracted.
///
/// # Errors
/// The peer's failure or ours, as [`io::ErrorKind::InvalidData`] around [`rustls::Error`], or the error of `io`.
/// # Cancel safety
/// Dropping the future ends the connection.
pub(super) async fn connect<S: AsyncRead + AsyncWrite + Unpin>(
    mut io: S,
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
) -> io::Result<TlsStream<S>> {
    let mut connection = UnbufferedClientConnection::new(config, name).map_err(invalid)?;
    let mut received = Received::default();
    drive!(connection, io, received);
    let peer = owned(connection.peer_certificates());
    let (secrets, kernel) = connection
        .dangerous_into_kernel_connection()
        .map_err(invalid)?;
    let kernel = Kernel::Client(kernel);
    established(io, &secrets, kernel, peer, received.wire)
}

/// Accepts as a TLS server over `io`. The configuration must allow secrets to be extracted.
///
/// # Errors
/// As [`connect`].
/// # Cancel safety
/// Dropping the future ends the connection.
pub(super) async fn accept<S: AsyncRead + AsyncWrite + Unpin>(
    mut io: S,
    config: Arc<ServerConfig>,
) -> io::Result<TlsStream<S>> {
    let mut connection = UnbufferedServerConnection::new(config).map_err(invalid)?;
    let mut received = Received::default();
    drive!(connection, io, received);
    let peer = owned(connection.peer_certificates());
    let (secrets, kernel) = connection
        .dangerous_into_kernel_connection()
        .map_err(invalid)?;
    let kernel = Kernel::Server(kernel);
    established(io, &secrets, kernel, peer, received.wire)
}

/// The session behind a handshake, with what was received beyond it.
fn established<S>(
    io: S,
    secrets: &ExtractedSecrets,
    kernel: Kernel,
    peer: Box<[CertificateDer<'static>]>,
    received: Wire,
) -> io::Result<TlsStream<S>> {
    let rx = Protection::new(secrets.rx.0, &secrets.rx.1).map_err(io::Error::other)?;
    let tx = Protection::new(secrets.tx.0, &secrets.tx.1).map_err(io::Error::other)?;
    Ok(TlsStream::new(io, rx, tx, kernel, peer).with_received(received))
}

fn encode<D>(mut data: EncodeTlsData<'_, D>, out: &mut Wire) -> io::Result<()> {
    let mut room = 1024;
    loop {
        match data.encode(out.spare(room)) {
            Ok(written) => {
                out.commit(written);
                return Ok(());
            }
            Err(EncodeError::InsufficientSize(size)) if room < size.required_size => {
                room = size.required_size;
            }
            Err(error) => return Err(io::Error::other(error)),
        }
    }
}

async fn send<S: AsyncWrite + Unpin>(io: &mut S, out: &mut Wire) -> io::Result<()> {
    if !out.is_empty() {
        io.write_all(out.queued()).await?;
        io.flush().await?;
        out.consume(out.len());
    }
    Ok(())
}

/// What was received of a handshake and is not done with.
#[derive(Default)]
struct Received {
    wire: Wire,
    /// Bytes at the front, in whole records, that rustls was shown and has not discarded: pieces of a message that goes on. It
    /// joins them in place, so their headers must not be read again.
    shown: usize,
}

impl Received {
    /// The records that are to be understood.
    fn records(&mut self) -> &mut [u8] {
        let records = self.wire.queued_mut().get_mut(..self.shown);
        records.unwrap_or_default()
    }

    /// What rustls was not shown.
    fn fresh(&self) -> &[u8] {
        self.wire.queued().get(self.shown..).unwrap_or_default()
    }

    /// Takes `count` bytes from the front.
    fn discard(&mut self, count: usize) {
        self.wire.consume(count);
        self.shown = self.shown.saturating_sub(count);
    }

    /// Adds one record to those that are to be understood: rustls sees no part of one, so a peer that sends byte by byte costs no
    /// repeated work, and none behind the handshake, which the keys it leaves behind are for. What can be no record is shown as
    /// it is, to be refused. A handshake of more than [`MAX_HANDSHAKE`] unprocessed bytes is refused.
    async fn read<S: AsyncRead + Unpin>(&mut self, io: &mut S) -> io::Result<()> {
        loop {
            let fresh = self.fresh();
            match record(fresh) {
                Some(length) if length <= fresh.len() => {
                    self.shown += length;
                    return Ok(());
                }
                Some(length) if length > MAX_RECORD => {
                    self.shown += fresh.len();
                    return Ok(());
                }
                Some(_) | None => {}
            }
            if self.wire.len() >= MAX_HANDSHAKE {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "handshake longer than 64 KiB",
                ));
            }
            let n = io.read(self.wire.spare(2048)).await?;
            if n == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.wire.commit(n);
        }
    }
}

/// Length of the record at the front of `bytes`, with its header, once that is there; more than [`MAX_RECORD`] if it is none.
fn record(bytes: &[u8]) -> Option<usize> {
    let &[kind, _, _, high, low] = bytes.first_chunk()?;
    let length = HEADER + usize::from(u16::from_be_bytes([high, low]));
    // change_cipher_spec, alert, handshake, application_data: RFC 8446 section 5.1.
    Some(if (20..=23).contains(&kind) {
        length
    } else {
        usize::MAX
    })
}

fn owned(chain: Option<&[CertificateDer<'static>]>) -> Box<[CertificateDer<'static>]> {
    chain.unwrap_or_default().into()
}

fn invalid(error: rustls::Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

/// The longest record, with its header (RFC 8446 section 5.2).
const MAX_RECORD: usize = HEADER + 16_384 + 256;
/// Handshake bytes a peer may have waiting to be understood.
const MAX_HANDSHAKE: usize = 65_536;
