//! A tunnel within a tunnel, to a workload behind the gateway of another network.

use std::sync::Arc;

use cert_agent::{SpiffeId, peer_id};
use tokio::select;

use super::{Credentials, Cut, Dial, Key, Pool, lease::Load};
use crate::tunnel::{
    client::{self, Answer, Request, Sender},
    error::{ConnectError, OpenError},
    stream::Stream,
    tls,
};

/// A stream that a peer behind a gateway granted.
#[derive(Debug)]
#[non_exhaustive]
pub struct Nested {
    /// The answer of that peer.
    pub answer: Answer,
    /// Who it proved to be.
    pub peer: Option<SpiffeId>,
}

/// A connection inside a stream of another one.
struct Inside {
    sender: Sender,
    peer: Option<SpiffeId>,
    load: Arc<Load>,
}

impl<D: Dial> Pool<D> {
    /// Opens a stream to somebody behind a gateway: asks the gateway, by `outer`, for a stream of a shared connection, opens
    /// a connection inside it to a peer that proves one of the `expected` identities, and asks that by `inner`.
    ///
    /// The connection inside ends with its one stream. Were it shared, all streams would reach the one workload that the
    /// gateway chose for the first of them.
    ///
    /// # Errors
    /// As [`Self::connect`]; [`ConnectError::Inner`] once the gateway has granted its part.
    /// # Cancel safety
    /// Dropping the future ends the stream of the gateway only; the connection to it stays for others.
    pub async fn connect_through(
        &self,
        gateway: &Key,
        outer: &Request,
        expected: &Arc<[SpiffeId]>,
        inner: &Request,
    ) -> Result<Nested, ConnectError> {
        let carrier = self.connect(gateway, outer).await?;
        let key = Key {
            expected: Arc::clone(expected),
            ..gateway.clone()
        };
        let entering = async {
            let inside = self.open_inside(&key, carrier.stream).await;
            let inside = inside.map_err(|error| ConnectError::Open(Arc::new(error)))?;
            let mut answer = inside.sender.connect(inner).await?;
            answer.fate = carrier.fate.and(inside.load);
            let peer = inside.peer;
            Ok(Nested { answer, peer })
        };
        let entered: Result<_, ConnectError> = Box::pin(entering).await;
        entered.map_err(|error| ConnectError::Inner(Box::new(error)))
    }

    /// The connection is driven by a task of the pool, until nobody holds its sender or a stream of it.
    async fn open_inside(&self, key: &Key, carrier: Stream) -> Result<Inside, OpenError> {
        let (settings, buffers) = (&self.config, &self.buffers);
        let credentials = self.dial.tls(key).await.map_err(OpenError::Identity)?;
        let Credentials {
            config, tracker, ..
        } = credentials;
        let (io, address) = (carrier.buffered(buffers.clone()), key.destination.ip());
        let limit = settings.handshake_timeout;
        let io = tls::connect(io, config, address, buffers, limit).await?;
        let peer = peer_id(io.peer_certificates());
        let load = Arc::new(Load::new(1, self.metrics.clone()));
        let noting = Arc::clone(&load);
        let cut = Cut::new(tracker, io.peer_certificates(), move || noting.cut());
        let (sender, driver) = client::handshake(io, settings).await?;
        self.spawn(async move {
            select! {
                () = driver.run() => {}
                () = cut.fired() => {}
            }
        });
        Ok(Inside { sender, peer, load })
    }
}

#[cfg(test)]
mod tests;
