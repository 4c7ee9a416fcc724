//! Where the relayed queries of one pod come from.

use std::{io, mem::MaybeUninit, net::SocketAddr, sync::Arc};

use parking_lot::Mutex;
use socket2::SockRef;
use tokio::net::UdpSocket;

use crate::{
    config::Sockets,
    listen::{self, Netns},
};

/// The namespace of a pod, and a few sockets there.
///
/// Making a socket inside another namespace costs five times what it takes to point one elsewhere that is there already.
/// Each query still has a socket to itself and a port that the kernel draws anew: a socket that rests has neither port nor
/// peer, so that nobody can send it anything.
#[derive(Debug)]
pub(super) struct Origin {
    pub(super) netns: Arc<Netns>,
    pub(super) sockets: Sockets,
    resting: Mutex<Vec<UdpSocket>>,
}

impl Origin {
    pub(super) fn new(netns: Arc<Netns>, sockets: Sockets) -> Self {
        Self {
            netns,
            sockets,
            resting: Mutex::default(),
        }
    }

    /// A socket that talks to `server` alone.
    ///
    /// # Errors
    /// If it cannot be made, or there is no route to the server.
    pub(super) async fn dial(&self, server: SocketAddr) -> io::Result<UdpSocket> {
        let family = |socket: &UdpSocket| socket.local_addr().map(|own| own.is_ipv6()).ok();
        let rested = {
            let mut resting = self.resting.lock();
            let fits = resting
                .iter()
                .position(|socket| family(socket) == Some(server.is_ipv6()));
            fits.map(|position| resting.swap_remove(position))
        };
        let Some(socket) = rested else {
            return listen::dns_client(&self.netns, &self.sockets, server).await;
        };
        drain(&socket);
        socket.connect(server).await?;
        Ok(socket)
    }

    /// Takes back a socket whose query was answered.
    pub(super) fn rest(&self, socket: UdpSocket) {
        // It lets go of its port as well.
        if rustix::net::connect_unspec(&socket).is_err() {
            return;
        }
        let mut resting = self.resting.lock();
        if resting.len() < MAX_RESTING {
            resting.push(socket);
        }
    }

    #[cfg(test)]
    pub(super) fn resting(&self) -> usize {
        self.resting.lock().len()
    }
}

/// Forgets what came for the query before, and its error. Without a port no more can come.
fn drain(socket: &UdpSocket) {
    let mut room = [MaybeUninit::uninit()];
    for _ in 0..MAX_LEFT_OVER {
        match SockRef::from(socket).recv(&mut room) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            Ok(_) | Err(_) => {}
        }
    }
}

/// What is left after these is told apart from an answer like any other lie.
const MAX_LEFT_OVER: usize = 1024;
/// Most resolvers ask for the addresses of both families at once.
const MAX_RESTING: usize = 2;
