//! Answers that are too large to be held as a whole.
//!
//! A blocking task writes them into chunks, and hands these to the connection through a short queue. A reader that stops
//! reading stops the writing.

use std::{
    fmt,
    io::{self, Write},
};

use bytes::Bytes;
use futures_util::stream;
use http::{HeaderValue, Response, StatusCode, header::CONTENT_TYPE};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use tokio::{sync::mpsc, task::spawn_blocking};

use super::http1::{Body, text};

/// Lets `produce` write the body, and answers when its first chunk is there: a failure before that is told by the
/// status, a later one by cutting the body.
pub(super) async fn streamed(
    content_type: &'static str,
    produce: impl FnOnce(Chunks) -> io::Result<()> + Send + 'static,
) -> Response<Body> {
    let (chunk_tx, mut chunk_rx) = mpsc::channel(QUEUED_CHUNKS);
    // Nobody awaits the task: it ends with the body, which holds the other end of the queue.
    drop(spawn_blocking(move || {
        let chunks = Chunks {
            tx: chunk_tx.clone(),
        };
        if produce(chunks).is_err() {
            // Fails if the reader has gone, which is fine.
            let _ = chunk_tx.blocking_send(Err(fmt::Error));
        }
    }));
    let first = match chunk_rx.recv().await {
        Some(Ok(chunk)) => chunk,
        Some(Err(error)) => return text(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
        None => return text(StatusCode::INTERNAL_SERVER_ERROR, "no answer".to_owned()),
    };
    let chunks = stream::unfold((Some(Ok(first)), chunk_rx), |(first, mut rest)| async {
        let chunk = match first {
            Some(first) => first,
            None => rest.recv().await?,
        };
        Some((chunk.map(Frame::data), (None, rest)))
    });
    let mut response = Response::new(BodyExt::boxed_unsync(StreamBody::new(chunks)));
    let content_type = HeaderValue::from_static(content_type);
    response.headers_mut().insert(CONTENT_TYPE, content_type);
    response
}

/// Sends what is written to the connection, and waits while the connection has enough. Each write travels by itself: to
/// be wrapped in a buffer of [`CHUNK_BYTES`].
#[derive(Debug)]
pub(super) struct Chunks {
    tx: mpsc::Sender<Result<Bytes, fmt::Error>>,
}

impl Write for Chunks {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let sent = self.tx.blocking_send(Ok(Bytes::copy_from_slice(bytes)));
        sent.map_err(|_| io::ErrorKind::BrokenPipe)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Size of the pieces in which an answer travels.
pub(super) const CHUNK_BYTES: usize = 32 << 10;
/// Pieces that wait for the reader.
const QUEUED_CHUNKS: usize = 2;
