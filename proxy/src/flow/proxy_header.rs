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

use crate::{listen, route::ProxyTarget};

/// What a header tells.
///
/// Its addresses are of one family, or the header carries none: the protocol has no form for a
/// mixed pair. Fields of types [`IDENTITY`] and [`SERVICE`] follow the addresses.
#[derive(Debug, Clone, Copy)]
pub(super) struct ProxyHeader<'a> {
    /// The client, as the tunnel's connection shows it.
    pub(super) source: SocketAddr,
    /// What the client asked for.
    pub(super) target: SocketAddr,
    /// Whom the client's certificate names.
    pub(super) identity: &'a SpiffeId,
    /// Host name of the service that the client asked for, if it asked for one.
    pub(super) service: Option<&'a str>,
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

impl<'a> ProxyHeader<'a> {
    /// What to tell of this client, which asked for `target`.
    pub(super) fn new(
        (source, identity): (SocketAddr, &'a SpiffeId),
        target: &'a ProxyTarget,
    ) -> Self {
        Self {
            source,
            target: target.address,
            identity,
            service: target.service.as_deref(),
        }
    }

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

    /// The wire form. Fails only for what does not fit into 64 KiB, which no [`SpiffeId`] and no host name reaches.
    fn to_bytes(self) -> io::Result<Vec<u8>> {
        let addresses = (
            listen::canonical(self.source),
            listen::canonical(self.target),
        );
        let header =
            Builder::with_addresses(Version::Two | Command::Proxy, Protocol::Stream, addresses)
                .write_tlv(IDENTITY, self.identity.as_str().as_bytes())?;
        let header = match self.service {
            Some(host) => header.write_tlv(SERVICE, host.as_bytes())?,
            None => header,
        };
        header.build()
    }
}

/// The field with the client's SPIFFE URI, in ASCII.
const IDENTITY: u8 = 0xd0;

/// The field with the host name of the service that the client asked for.
const SERVICE: u8 = 0xd1;

#[cfg(test)]
mod tests;
