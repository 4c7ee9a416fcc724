//! HTTP/2 frames (RFC 9113): reading, writing, and noting what passes by.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf},
    sync::watch,
};

use crate::wait::SOON;

/// What a client says before its first frame.
pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Frame types.
pub mod kind {
    /// DATA.
    pub const DATA: u8 = 0;
    /// HEADERS.
    pub const HEADERS: u8 = 1;
    /// `RST_STREAM`.
    pub const RST_STREAM: u8 = 3;
    /// SETTINGS.
    pub const SETTINGS: u8 = 4;
    /// PING.
    pub const PING: u8 = 6;
    /// GOAWAY.
    pub const GOAWAY: u8 = 7;
    /// `WINDOW_UPDATE`.
    pub const WINDOW_UPDATE: u8 = 8;
    /// CONTINUATION.
    pub const CONTINUATION: u8 = 9;
}

/// Settings.
pub mod setting {
    /// `ENABLE_PUSH`.
    pub const ENABLE_PUSH: u16 = 2;
    /// `MAX_CONCURRENT_STREAMS`.
    pub const MAX_CONCURRENT_STREAMS: u16 = 3;
    /// `INITIAL_WINDOW_SIZE`.
    pub const INITIAL_WINDOW_SIZE: u16 = 4;
    /// `MAX_FRAME_SIZE`.
    pub const MAX_FRAME_SIZE: u16 = 5;
    /// `MAX_HEADER_LIST_SIZE`.
    pub const MAX_HEADER_LIST_SIZE: u16 = 6;
}

/// Flag of SETTINGS and PING.
pub const ACK: u8 = 1;
/// Flag of HEADERS and DATA.
pub const END_STREAM: u8 = 1;
/// Flag of HEADERS.
pub const END_HEADERS: u8 = 4;

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// See [`kind`].
    pub kind: u8,
    /// Flags.
    pub flags: u8,
    /// Stream; 0 = connection.
    pub stream: u32,
    /// Payload; the tap leaves that of DATA out.
    pub payload: Vec<u8>,
}

impl Frame {
    /// A connection's or stream's error code, of RST_STREAM and GOAWAY.
    #[must_use]
    pub fn error_code(&self) -> Option<u32> {
        let at = match self.kind {
            kind::RST_STREAM => 0,
            kind::GOAWAY => 4,
            _ => return None,
        };
        self.number(at)
    }

    /// The increment of a WINDOW_UPDATE.
    #[must_use]
    pub fn increment(&self) -> Option<u32> {
        if self.kind == kind::WINDOW_UPDATE {
            self.number(0)
        } else {
            None
        }
    }

    /// The value of a setting, if this is a SETTINGS frame that has it.
    #[must_use]
    pub fn setting(&self, id: u16) -> Option<u32> {
        if self.kind != kind::SETTINGS {
            return None;
        }
        let entry = self
            .payload
            .chunks_exact(6)
            .find(|entry| entry[..2] == id.to_be_bytes())?;
        Some(u32::from_be_bytes(entry[2..].try_into().ok()?))
    }

    /// Whether this is the peer's SETTINGS, not the acknowledgement of ours.
    #[must_use]
    pub fn is_settings(&self) -> bool {
        self.kind == kind::SETTINGS && self.flags & ACK == 0
    }

    fn number(&self, at: usize) -> Option<u32> {
        Some(u32::from_be_bytes(
            self.payload.get(at..at + 4)?.try_into().ok()?,
        ))
    }
}

/// The frames that a peer sent so far.
#[derive(Debug, Clone)]
pub struct FrameLog {
    frames: Arc<Mutex<Vec<Frame>>>,
    count: watch::Sender<usize>,
}

impl Default for FrameLog {
    fn default() -> Self {
        Self {
            frames: Arc::default(),
            count: watch::Sender::new(0),
        }
    }
}

impl FrameLog {
    fn push(&self, frame: Frame) {
        self.frames.lock().push(frame);
        self.count.send_modify(|count| *count += 1);
    }

    /// All frames so far.
    #[must_use]
    pub fn all(&self) -> Vec<Frame> {
        self.frames.lock().clone()
    }

    /// The first frame that fits, past or future, within ten seconds.
    ///
    /// # Panics
    /// When there is none.
    pub async fn wait(&self, what: &str, which: impl Fn(&Frame) -> bool) -> Frame {
        self.wait_for(SOON, what, which).await
    }

    /// Checks the values of the peer's SETTINGS, and by how much it widens the window of the connection.
    ///
    /// # Panics
    /// When they differ, or do not come.
    pub async fn announces(&self, settings: &[(u16, Option<u32>)], widened: u32) {
        let frame = self.wait("SETTINGS", Frame::is_settings).await;
        for (id, value) in settings {
            assert_eq!(frame.setting(*id), *value, "setting {id}");
        }
        let of_connection = |frame: &Frame| frame.stream == 0 && frame.increment().is_some();
        let update = self.wait("WINDOW_UPDATE", of_connection).await;
        assert_eq!(update.increment(), Some(widened));
    }

    /// As [`FrameLog::wait`], with another limit.
    ///
    /// # Panics
    /// When there is none.
    pub async fn wait_for(
        &self,
        limit: Duration,
        what: &str,
        which: impl Fn(&Frame) -> bool,
    ) -> Frame {
        let mut count = self.count.subscribe();
        let search = async {
            loop {
                count.borrow_and_update();
                if let Some(frame) = self.frames.lock().iter().find(|frame| which(frame)) {
                    return frame.clone();
                }
                let _ = count.changed().await;
            }
        };
        let found = tokio::time::timeout(limit, search).await;
        found.unwrap_or_else(|_| panic!("no frame: {what}; seen {:?}", self.all()))
    }
}

/// A stream whose incoming frames are noted in a [`FrameLog`].
#[derive(Debug)]
pub struct Tap<S> {
    inner: S,
    log: FrameLog,
    pending: Vec<u8>,
}

impl<S> Tap<S> {
    /// Wraps a stream on which a client's preface comes first if `preface`.
    pub fn new(inner: S, preface: Preface) -> (Self, FrameLog) {
        let log = FrameLog::default();
        // A frame of unknown type and the preface's length makes the parser step over it.
        let pending = match preface {
            Preface::Expected => vec![0, 0, (PREFACE.len()) as u8, 0xff, 0, 0, 0, 0, 0],
            Preface::None => Vec::new(),
        };
        (
            Self {
                inner,
                log: log.clone(),
                pending,
            },
            log,
        )
    }

    fn note(&mut self, bytes: &[u8]) {
        self.pending.extend_from_slice(bytes);
        while let Some(length) = frame_length(&self.pending) {
            if self.pending.len() < length {
                break;
            }
            let mut frame = decode(&self.pending[..length]);
            self.pending.drain(..length);
            if frame.kind == kind::DATA {
                frame.payload.clear();
            }
            if frame.kind != 0xff {
                self.log.push(frame);
            }
        }
    }
}

/// Whether a client's preface comes before the frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Preface {
    /// The peer is a client.
    Expected,
    /// The peer is a server.
    None,
}

fn frame_length(bytes: &[u8]) -> Option<usize> {
    let [high, middle, low, ..] = *bytes else {
        return None;
    };
    (bytes.len() >= 9).then(|| 9 + u32::from_be_bytes([0, high, middle, low]) as usize)
}

fn decode(bytes: &[u8]) -> Frame {
    let stream = u32::from_be_bytes(bytes[5..9].try_into().expect("four bytes")) & 0x7fff_ffff;
    Frame {
        kind: bytes[3],
        flags: bytes[4],
        stream,
        payload: bytes[9..].to_vec(),
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Tap<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.inner).poll_read(cx, buf))?;
        self.note(&buf.filled()[before..]);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Tap<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

/// A client that writes frames by hand, well-formed or not.
#[derive(Debug)]
pub struct Wire<S> {
    /// The stream below, for bytes that are no frames at all.
    pub stream: S,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Wire<S> {
    /// Sends preface and empty SETTINGS.
    ///
    /// # Errors
    /// When the connection fails.
    pub async fn start(stream: S) -> io::Result<Self> {
        let mut wire = Self { stream };
        wire.stream.write_all(PREFACE).await?;
        wire.send(kind::SETTINGS, 0, 0, &[]).await?;
        Ok(wire)
    }

    /// Sends one frame.
    ///
    /// # Errors
    /// When the connection fails.
    pub async fn send(
        &mut self,
        kind: u8,
        flags: u8,
        stream: u32,
        payload: &[u8],
    ) -> io::Result<()> {
        let frame = encode(kind, flags, stream, payload);
        self.stream.write_all(&frame).await?;
        self.stream.flush().await
    }

    /// Sends HEADERS with these fields, pseudo-headers included, in this order.
    ///
    /// # Errors
    /// When the connection fails.
    pub async fn headers(&mut self, stream: u32, fields: &[(&str, &str)]) -> io::Result<()> {
        self.send(kind::HEADERS, END_HEADERS, stream, &block(fields))
            .await
    }

    /// Reads one frame.
    ///
    /// # Errors
    /// When the connection ends or nothing comes within ten seconds.
    pub async fn next(&mut self) -> io::Result<Frame> {
        self.next_within(SOON).await
    }

    /// As [`Wire::next`], with another limit.
    ///
    /// # Errors
    /// As [`Wire::next`].
    pub async fn next_within(&mut self, limit: Duration) -> io::Result<Frame> {
        let read = async {
            let mut head = [0; 9];
            self.stream.read_exact(&mut head).await?;
            let length = frame_length(&head).unwrap_or(9) - 9;
            let mut frame = decode(&head);
            frame.payload = vec![0; length];
            self.stream.read_exact(&mut frame.payload).await?;
            Ok(frame)
        };
        tokio::time::timeout(limit, read).await?
    }

    /// Reads until a frame fits.
    ///
    /// # Errors
    /// As [`Wire::next`].
    pub async fn until(&mut self, which: impl Fn(&Frame) -> bool) -> io::Result<Frame> {
        loop {
            let frame = self.next().await?;
            if which(&frame) {
                return Ok(frame);
            }
        }
    }
}

/// The bytes of a frame.
#[must_use]
pub fn encode(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32).to_be_bytes();
    let mut frame = vec![length[1], length[2], length[3], kind, flags];
    frame.extend_from_slice(&stream.to_be_bytes());
    frame.extend_from_slice(payload);
    frame
}

/// The payload of HEADERS with these fields, pseudo-headers included, in this order.
#[must_use]
pub fn block(fields: &[(&str, &str)]) -> Vec<u8> {
    let fields = fields.iter();
    fields
        .flat_map(|(name, value)| literal(name, value))
        .collect()
}

/// A header field as HPACK literal without indexing and without Huffman code; both parts shorter than 127 bytes.
fn literal(name: &str, value: &str) -> Vec<u8> {
    assert!(
        name.len() < 127 && value.len() < 127,
        "needs no continued length"
    );
    let mut field = vec![0x00, name.len() as u8];
    field.extend_from_slice(name.as_bytes());
    field.push(value.len() as u8);
    field.extend_from_slice(value.as_bytes());
    field
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_tap_sees_what_the_wire_sends_however_it_is_cut() {
        let (ours, theirs) = tokio::io::duplex(7);
        let (mut tap, log) = Tap::new(theirs, Preface::Expected);
        let send = async {
            let mut wire = Wire::start(ours).await.unwrap();
            wire.send(kind::SETTINGS, 0, 0, &[0, 4, 0, 1, 0, 0])
                .await
                .unwrap();
            wire.send(kind::DATA, END_STREAM, 1, b"hello")
                .await
                .unwrap();
            wire.send(kind::RST_STREAM, 0, 1, &[0, 0, 0, 8])
                .await
                .unwrap();
        };
        let mut bytes = Vec::new();
        let (_, read) = tokio::join!(send, tap.read_to_end(&mut bytes));
        read.unwrap();
        let frames = log.all();
        assert_eq!(
            frames.iter().map(|frame| frame.kind).collect::<Vec<_>>(),
            [4, 4, 0, 3]
        );
        assert_eq!(frames[1].setting(setting::INITIAL_WINDOW_SIZE), Some(65536));
        assert_eq!((frames[2].flags, frames[2].payload.len()), (END_STREAM, 0));
        assert_eq!(frames[3].error_code(), Some(8));
    }
}
