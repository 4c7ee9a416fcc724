//! `RawPeer`: HBONE by hand, as a foreign or a hostile client or server would speak it.
//!
//! Three levels: [`tls`] ends at a TLS stream with any certificate; [`frames`] reads and writes single HTTP/2 frames on such a stream;
//! [`client`] and [`server`] run the `h2` library over it, while a tap notes every frame that the proxy sends.

pub mod client;
pub mod frames;
pub mod server;
pub mod tls;

pub use client::{RawClient, Tunnel};
pub use frames::{Frame, FrameLog, Wire};
pub use server::{RawServer, ServerConnection};
pub use tls::Hello;
