//! The PROXY protocol header, version 2: how an application behind an application tunnel learns
//! whom it serves.
//!
//! A captured waypoint does not see the tunnel of its client: this proxy ends it. What the tunnel
//! told goes in front of the bytes, once, and counts as no traffic of the flow.

use std::{io, net::SocketAddr, time::Duration};

use cert_agent::SpiffeId;
use ppp::v2::{Builder, Command, Protocol, Version};
use tokio::{
    io::{AsyncWrite, AsyncWriteExt as _},
    time::timeout,
};

use crate::listen;

/// What a header tells.
///
/// Its addresses are of one family, or the header carries none: the protocol has no form for a
/// mixed pair. The identity is a field of type [`IDENTITY`], which follows the addresses.
#[derive(Debug, Clone, Copy)]
pub(super) struct ProxyHeader<'a> {
    /// The client, as the tunnel's connection shows it.
    pub(super) source: SocketAddr,
    /// What the client asked for.
    pub(super) target: SocketAddr,
    /// Whom the client's certificate names.
    pub(super) identity: &'a SpiffeId,
}

/// Why an application did not get its header.
#[derive(Debug, thiserror::Error)]
pub(super) enum HeaderError {
    /// It does not read.
    #[error("the application did not take the PROXY header within {0:?}")]
    Timeout(Duration),
    /// It is gone.
    #[error("cannot write the PROXY header")]
    Write(#[from] io::Error),
}

impl ProxyHeader<'_> {
    /// Writes the header to a connection that has carried no byte yet, waiting at most `limit`.
    ///
    /// # Errors
    /// The connection is of no use afterwards: what follows a broken header would be misread.
    /// # Cancel safety
    /// Dropped half-way, it leaves a part of the header written: drop the connection as well.
    pub(super) async fn send<W>(
        &self,
        application: &mut W,
        limit: Duration,
    ) -> Result<(), HeaderError>
    where
        W: AsyncWrite + Unpin,
    {
        let bytes = self.to_bytes()?;
        timeout(limit, application.write_all(&bytes))
            .await
            .map_err(|_| HeaderError::Timeout(limit))?
            .map_err(HeaderError::Write)
    }

    /// The wire form. Fails only for what does not fit into 64 KiB, which no [`SpiffeId`] reaches.
    fn to_bytes(self) -> io::Result<Vec<u8>> {
        let addresses = (
            listen::canonical(self.source),
            listen::canonical(self.target),
        );
        Builder::with_addresses(Version::Two | Command::Proxy, Protocol::Stream, addresses)
            .write_tlv(IDENTITY, self.identity.as_str().as_bytes())?
            .build()
    }
}

/// The field with the client's SPIFFE URI, in ASCII.
const IDENTITY: u8 = 0xd0;

#[cfg(test)]
mod tests;
