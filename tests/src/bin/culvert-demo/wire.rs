//! What a listener on the link between the nodes learns.

use std::net::IpAddr;

use anyhow::ensure;
use testkit::{Capture, Pod, World, capture::Packet, wait};

use crate::{bank::MARKER, say};

/// Enough of a frame to hold several markers.
const HEAD: u32 = 2048;
const HBONE_PORT: u16 = 15008;
const TLS_RECORD_VERSION: u8 = 3;

/// All frames on the link.
#[derive(Debug)]
pub(crate) struct Wire {
    capture: Capture,
}

/// What two pods said to each other there.
#[derive(Debug)]
pub(crate) struct Overheard {
    packets: Vec<Packet>,
    server: IpAddr,
}

impl Wire {
    /// Starts to listen.
    ///
    /// # Errors
    /// When no packet socket can be opened.
    pub(crate) fn tap(world: &World) -> anyhow::Result<Self> {
        let capture = Capture::heads(world.link(), HEAD)?;
        Ok(Self { capture })
    }

    /// What was heard so far between a client and a server.
    pub(crate) fn between(&self, client: &Pod, server: &Pod) -> Overheard {
        let (one, two) = (client.ip4(), server.ip4());
        let packets = self.capture.packets(|packet| {
            let ends = (packet.from.ip(), packet.to.ip());
            (ends == (one, two) || ends == (two, one)) && packet.length > 0
        });
        Overheard {
            packets,
            server: two,
        }
    }

    /// Waits until something with the marker was heard between them, for frames are delivered with a delay.
    pub(crate) async fn hears_marker(&self, client: &Pod, server: &Pod) -> bool {
        let heard = async || self.between(client, server).readable().then_some(());
        let wait = wait::until(wait::SOON, "the capture hears a plaintext", heard);
        tokio::time::timeout(wait::SOON / 4, wait).await.is_ok()
    }
}

impl Overheard {
    /// Whether the marker can be read.
    pub(crate) fn readable(&self) -> bool {
        let marker = MARKER.as_bytes();
        self.packets.iter().any(|packet| {
            let mut windows = packet.payload.windows(marker.len());
            windows.any(|window| window == marker)
        })
    }

    /// Checks that all of it was TLS to the HBONE port, and that the marker cannot be read.
    ///
    /// # Errors
    /// When not.
    pub(crate) fn expect_secret(&self, least_bytes: u64) -> anyhow::Result<()> {
        let port = |packet: &Packet| self.server_port(packet);
        let stray = self
            .packets
            .iter()
            .find(|packet| port(packet) != HBONE_PORT);
        ensure!(stray.is_none(), "a frame past the tunnel: {stray:?}");
        ensure!(
            self.bytes() >= least_bytes,
            "only {} bytes were heard",
            self.bytes()
        );
        ensure!(!self.readable(), "the payload can be read");
        Ok(())
    }

    /// Bytes in both directions, as the headers of the frames say.
    pub(crate) fn bytes(&self) -> u64 {
        self.packets.iter().map(|packet| packet.length as u64).sum()
    }

    fn server_port(&self, packet: &Packet) -> u16 {
        if packet.to.ip() == self.server {
            packet.to.port()
        } else {
            packet.from.port()
        }
    }

    /// Prints what was heard, and the beginning of a frame that carried application data.
    pub(crate) fn tell(&self, client: &str, server: &str) {
        let port = self
            .packets
            .first()
            .map_or(0, |first| self.server_port(first));
        let verdict = if self.readable() {
            "payload READABLE"
        } else {
            "payload not readable"
        };
        let (frames, bytes) = (self.packets.len(), self.bytes());
        say(format_args!(
            "  {client:<6} > {server}  port {port:<5}  {frames:>6} frames  {bytes:>11} bytes  {verdict}"
        ));
        if let Some(sample) = self.sample() {
            say(format_args!("           e.g. {sample}"));
        }
    }

    /// Plaintext shows with its marker; of TLS, a frame of application data rather than of the handshake.
    fn sample(&self) -> Option<String> {
        const APPLICATION_DATA: u8 = 23;
        let text = |packet: &&Packet| packet.payload.starts_with(b"GET ");
        let record = |packet: &&Packet| {
            packet
                .payload
                .starts_with(&[APPLICATION_DATA, TLS_RECORD_VERSION])
        };
        let shown = |packet: &Packet| printable(&packet.payload, 80);
        let found = self.packets.iter().find(text);
        found
            .or_else(|| self.packets.iter().find(record))
            .map(shown)
    }
}

/// The first bytes as characters, a dot for each that is none.
fn printable(bytes: &[u8], length: usize) -> String {
    let line = bytes.iter().take(length);
    line.map(|byte| match byte {
        b' '..=b'~' => char::from(*byte),
        _ => '.',
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn overheard(port: u16, payload: &[u8]) -> Overheard {
        let server: IpAddr = [10, 20, 1, 10].into();
        Overheard {
            packets: vec![Packet {
                from: ([10, 20, 0, 10], 40_000).into(),
                to: (server, port).into(),
                payload: payload.to_vec(),
                length: payload.len(),
            }],
            server,
        }
    }

    #[test]
    fn a_secret_is_neither_readable_nor_on_another_port_nor_silent() {
        let secret = overheard(HBONE_PORT, &[23, 3, 3, 9, 9]);
        secret.expect_secret(5).unwrap();
        assert!(secret.expect_secret(6).is_err());
        assert!(!secret.readable());
        assert!(overheard(80, &[23, 3, 3]).expect_secret(1).is_err());
        let open = overheard(HBONE_PORT, format!("x{MARKER}").as_bytes());
        assert!(open.expect_secret(1).is_err());
        assert!(open.readable());
    }

    #[test]
    fn unprintable_bytes_are_dots() {
        assert_eq!(printable(b"a\x00b\xff~ c", 6), "a.b.~ ");
    }
}
