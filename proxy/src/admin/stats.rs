//! 15020: metrics in OpenMetrics text.
//!
//! An exposition of many series is large, so it is never held as a whole: it is encoded, and compressed when the scraper
//! asks, while it is sent. Scrapers take turns chunk by chunk: however many there are, they occupy one core, and the others
//! are left to traffic.

use std::{
    fmt,
    io::{self, BufWriter, Write},
    sync::Arc,
};

use flate2::{
    Compression,
    write::{GzEncoder, ZlibEncoder},
};
use http::{
    HeaderMap, HeaderValue, Response, StatusCode,
    header::{ACCEPT, ACCEPT_ENCODING, CONTENT_ENCODING, VARY},
};
use parking_lot::{Mutex, MutexGuard};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::{
    http1::{Body, empty, serve},
    stream::{CHUNK_BYTES, Chunks, streamed},
};
use crate::telemetry::Exposition;

/// Serves `/metrics` and `/stats/prometheus` until `stop` fires.
pub async fn serve_stats(listener: TcpListener, exposition: Exposition, stop: CancellationToken) {
    let source = Arc::new(Source {
        exposition,
        turn: Mutex::new(()),
    });
    let handler = move |request: &http::Request<_>| {
        let wanted = match request.uri().path() {
            "/metrics" | "/stats/prometheus" => {
                Some((Arc::clone(&source), Shape::of(request.headers())))
            }
            _ => None,
        };
        async move {
            match wanted {
                Some((source, shape)) => answer(source, shape).await,
                None => empty(StatusCode::NOT_FOUND),
            }
        }
    };
    serve(listener, handler, stop).await;
}

/// What scrapers read.
struct Source {
    exposition: Exposition,
    /// Held by the one that encodes.
    turn: Mutex<()>,
}

/// What the scraper negotiated. The text is the same in either content type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Shape {
    content_type: &'static str,
    encoding: Encoding,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Encoding {
    Identity,
    Gzip,
    Deflate,
}

impl Shape {
    fn of(headers: &HeaderMap) -> Self {
        let open_metrics = elements(headers, &ACCEPT)
            .any(|(name, _)| name.eq_ignore_ascii_case("application/openmetrics-text"));
        let accepts = |encoding: &str| {
            elements(headers, &ACCEPT_ENCODING).any(|(name, parameters)| {
                name.eq_ignore_ascii_case(encoding) && !is_refused(parameters)
            })
        };
        Self {
            content_type: if open_metrics {
                "application/openmetrics-text;charset=utf-8;version=1.0.0"
            } else {
                "text/plain; charset=utf-8"
            },
            encoding: if accepts("gzip") {
                Encoding::Gzip
            } else if accepts("deflate") {
                Encoding::Deflate
            } else {
                Encoding::Identity
            },
        }
    }
}

/// Elements of a list header over all its lines, each as (name, parameters).
fn elements<'a>(
    headers: &'a HeaderMap,
    name: &http::HeaderName,
) -> impl Iterator<Item = (&'a str, &'a str)> {
    headers
        .get_all(name)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(|element| {
            let (name, parameters) = element.split_once(';').unwrap_or((element, ""));
            (name.trim(), parameters.trim())
        })
}

/// `q=0`, in any of its spellings.
fn is_refused(parameters: &str) -> bool {
    let weight = parameters
        .strip_prefix("q=")
        .or_else(|| parameters.strip_prefix("Q="));
    weight.is_some_and(|weight| weight.trim().parse() == Ok(0.0_f32))
}

async fn answer(source: Arc<Source>, shape: Shape) -> Response<Body> {
    let mut response = streamed(shape.content_type, move |chunks| {
        let turn = source.turn.lock();
        source.write(shape.encoding, InTurn { chunks, turn })
    })
    .await;
    if response.status() != StatusCode::OK {
        return response;
    }
    let headers = response.headers_mut();
    headers.insert(VARY, HeaderValue::from_static("accept, accept-encoding"));
    if let Some(name) = shape.encoding.name() {
        headers.insert(CONTENT_ENCODING, HeaderValue::from_static(name));
    }
    response
}

impl Encoding {
    /// As the header names it.
    fn name(self) -> Option<&'static str> {
        match self {
            Self::Identity => None,
            Self::Gzip => Some("gzip"),
            Self::Deflate => Some("deflate"),
        }
    }
}

impl Source {
    fn write(&self, encoding: Encoding, chunks: InTurn<'_>) -> io::Result<()> {
        let buffered = |chunks| BufWriter::with_capacity(CHUNK_BYTES, chunks);
        let level = Compression::fast();
        match encoding {
            Encoding::Identity => self.encode(chunks).map(drop),
            Encoding::Gzip => {
                let packed = self.encode(GzEncoder::new(buffered(chunks), level))?;
                packed.finish()?.flush()
            }
            Encoding::Deflate => {
                let packed = self.encode(ZlibEncoder::new(buffered(chunks), level))?;
                packed.finish()?.flush()
            }
        }
    }

    fn encode<W: Write>(&self, out: W) -> io::Result<W> {
        let mut text = Text(BufWriter::with_capacity(CHUNK_BYTES, out));
        let written = self.exposition.write(&mut text);
        written.map_err(io::Error::other)?;
        text.0.into_inner().map_err(io::IntoInnerError::into_error)
    }
}

/// Takes text for a writer of bytes.
struct Text<W: Write>(BufWriter<W>);

impl<W: Write> fmt::Write for Text<W> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.0.write_all(text.as_bytes()).map_err(|_| fmt::Error)
    }
}

/// Lets the next scraper have its turn while the connection of this one has enough.
struct InTurn<'a> {
    chunks: Chunks,
    turn: MutexGuard<'a, ()>,
}

impl Write for InTurn<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let Self { chunks, turn } = self;
        MutexGuard::unlocked_fair(turn, || chunks.write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests;
