//! Whether the listeners of a pod still listen.

use std::sync::{Arc, Weak};

use socket2::SockRef;
use tokio::net::TcpListener;

/// Watches listeners without keeping them open.
#[derive(Debug)]
pub struct Watch(Vec<(u16, Weak<TcpListener>)>);

impl Watch {
    pub(super) fn new(listeners: [(u16, &Arc<TcpListener>); 3]) -> Self {
        let weak = |(port, listener)| (port, Arc::downgrade(listener));
        Self(listeners.map(weak).into())
    }

    /// Ports whose listener is gone, or no longer listens: an administrator can close sockets of other processes (`ss -K`).
    pub fn deaf(&self) -> Vec<u16> {
        let is_deaf = |listener: &Weak<TcpListener>| {
            let listener = listener.upgrade();
            // A socket that cannot be asked is none that can be told to be well.
            !listener.is_some_and(|it| SockRef::from(&*it).is_listener().unwrap_or(false))
        };
        let deaf = self.0.iter().filter(|(_, listener)| is_deaf(listener));
        deaf.map(|(port, _)| *port).collect()
    }
}

#[cfg(test)]
mod tests {
    use crate::listen::{
        bind,
        testing::{fresh_netns, ports, run, sockets},
    };

    #[tokio::test]
    async fn a_listener_that_is_dropped_or_killed_is_deaf() {
        let pod = fresh_netns();
        let listeners = bind(&pod, &sockets(), &ports()).unwrap();
        let watch = listeners.watch();
        assert!(watch.deaf().is_empty());
        pod.enter(|| run("ss -K -l -t sport = 15006")).unwrap();
        assert_eq!(watch.deaf(), [15006]);
        drop(listeners.hbone);
        assert_eq!(watch.deaf(), [15006, 15008]);
        drop(listeners.outbound);
        assert_eq!(watch.deaf().len(), 3);
        // What watches does not keep the port.
        bind(&pod, &sockets(), &ports()).unwrap();
    }
}
