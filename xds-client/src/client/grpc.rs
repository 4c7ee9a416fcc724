//! Streams over gRPC to a [`Target`].
//!
//! tonic keeps the buffer of the largest message for as long as a stream is open; the first response of a large mesh would
//! double what the mesh takes. So the five bytes before each message are read here, and each message has a buffer of its own that
//! goes when the message does. Statuses, connections and the rest of gRPC stay tonic's.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use futures_util::{FutureExt, StreamExt, future::BoxFuture, stream};
use http::{
    HeaderValue, Request, Response, Uri,
    header::{CONTENT_TYPE, TE},
};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use prost::Message;
use tokio::sync::mpsc;
use tonic::{Code, Status, body::Body, metadata::MetadataMap, transport::Channel};
use tower::{Service, ServiceExt};

use super::{Connect, OpenError, Responses};
use crate::{
    proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse},
    transport::Target,
};

impl Connect for Target {
    fn open(
        &self,
        requests: mpsc::Receiver<DeltaDiscoveryRequest>,
    ) -> BoxFuture<'_, Result<Responses, OpenError>> {
        async {
            let metadata = self.metadata().await;
            let metadata = metadata.map_err(|error| OpenError::Local(error.into()))?;
            let channel = self.connect().await.map_err(|error| {
                if error.is_local() {
                    OpenError::Local(error.into())
                } else {
                    OpenError::Unreachable(error.into())
                }
            })?;
            call(channel, metadata, requests).await
        }
        .boxed()
    }

    fn improved(&self) -> BoxFuture<'_, ()> {
        self.roots_changed().boxed()
    }
}

async fn call(
    mut channel: Channel,
    metadata: MetadataMap,
    requests: mpsc::Receiver<DeltaDiscoveryRequest>,
) -> Result<Responses, OpenError> {
    let unreachable = |error: tonic::transport::Error| OpenError::Unreachable(error.into());
    let next = |mut requests: mpsc::Receiver<_>| async {
        let request: DeltaDiscoveryRequest = requests.recv().await?;
        Some((Ok::<_, Status>(Frame::data(framed(&request))), requests))
    };
    let mut request = Request::new(Body::new(StreamBody::new(stream::unfold(requests, next))));
    *request.method_mut() = http::Method::POST;
    *request.uri_mut() = Uri::from_static(PATH);
    *request.headers_mut() = metadata.into_headers();
    let headers = request.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers.insert(TE, HeaderValue::from_static("trailers"));
    let ready = channel.ready().await.map_err(unreachable)?;
    let response = ready.call(request).await.map_err(unreachable)?;
    let body = accepted(response).map_err(OpenError::Refused)?;
    let responses = stream::unfold(Some(Messages::new(body)), |messages| async {
        let mut messages = messages?;
        match messages.next().await {
            Ok(Some(message)) => Some((Ok(message), Some(messages))),
            Ok(None) => None,
            Err(status) => Some((Err(status), None)),
        }
    });
    Ok(responses.boxed())
}

/// The body of a response, unless it is a refusal: a status in place of a body, or no gRPC at all.
fn accepted(response: Response<Body>) -> Result<Body, Status> {
    if let Some(status) = Status::from_header_map(response.headers())
        && status.code() != Code::Ok
    {
        return Err(status);
    }
    if response.status() != http::StatusCode::OK {
        let answer = format!("HTTP status {}: is this the gRPC port?", response.status());
        return Err(Status::unknown(answer));
    }
    Ok(response.into_body())
}

/// A message as gRPC frames it: not compressed, length, content.
fn framed(message: &impl Message) -> Bytes {
    let length = message.encoded_len();
    let mut frame = BytesMut::with_capacity(HEAD_BYTES + length);
    frame.put_u8(0);
    // A request is bounded far below four gigabytes: by the room for versions, and that for reasons.
    frame.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
    frame.put_slice(&message.encode_to_vec());
    frame.freeze()
}

/// Takes a body apart into messages.
struct Messages<B> {
    body: B,
    /// What was received and not looked at.
    chunk: Bytes,
    frame: Partial,
}

/// The frame that is being received.
enum Partial {
    Head(BytesMut),
    Content { content: BytesMut, missing: usize },
}

impl<B> Messages<B>
where
    B: hyper::body::Body<Data = Bytes, Error = Status> + Unpin,
{
    fn new(body: B) -> Self {
        Self {
            body,
            chunk: Bytes::new(),
            frame: Partial::Head(BytesMut::new()),
        }
    }

    /// The next message; `None` at the end of a stream that went well.
    async fn next(&mut self) -> Result<Option<DeltaDiscoveryResponse>, Status> {
        loop {
            if let Some(content) = self.assemble()? {
                let message = DeltaDiscoveryResponse::decode(content);
                return message.map(Some).map_err(|error| {
                    Status::internal(format!("a response that cannot be decoded: {error}"))
                });
            }
            let Some(frame) = self.body.frame().await.transpose()? else {
                return match &self.frame {
                    Partial::Head(head) if head.is_empty() => Ok(None),
                    Partial::Head(_) | Partial::Content { .. } => {
                        Err(Status::unknown("the stream ended within a message"))
                    }
                };
            };
            match frame.into_data() {
                Ok(data) => self.chunk = data,
                Err(frame) => {
                    let trailers = frame.into_trailers().ok();
                    let status = trailers.as_ref().and_then(Status::from_header_map);
                    if let Some(status) = status.filter(|status| status.code() != Code::Ok) {
                        return Err(status);
                    }
                }
            }
        }
    }

    /// Uses up what was received, to the end of a message at most.
    fn assemble(&mut self) -> Result<Option<Bytes>, Status> {
        loop {
            match &mut self.frame {
                Partial::Head(head) => {
                    let wanted = self.chunk.len().min(HEAD_BYTES - head.len());
                    head.put(self.chunk.split_to(wanted));
                    if head.len() < HEAD_BYTES {
                        return Ok(None);
                    }
                    if head.get_u8() != 0 {
                        return Err(Status::internal(
                            "a compressed message, which was not asked for",
                        ));
                    }
                    let missing = head.get_u32() as usize;
                    if missing > MAX_RESPONSE_BYTES {
                        let message = format!(
                            "a message of {missing} bytes is larger than {MAX_RESPONSE_BYTES}"
                        );
                        return Err(Status::out_of_range(message));
                    }
                    let content = BytesMut::with_capacity(missing);
                    self.frame = Partial::Content { content, missing };
                }
                Partial::Content { content, missing } => {
                    let part = self.chunk.split_to(self.chunk.len().min(*missing));
                    *missing -= part.len();
                    content.put(part);
                    if *missing > 0 {
                        return Ok(None);
                    }
                    let content = std::mem::take(content).freeze();
                    self.frame = Partial::Head(BytesMut::new());
                    return Ok(Some(content));
                }
            }
        }
    }
}

/// The responses of a body of which so many bytes come at a time, as far as it is one.
#[cfg(any(test, fuzzing))]
pub(crate) fn responses(body: &[u8], at_once: usize) -> Vec<DeltaDiscoveryResponse> {
    let frame = |part: &[u8]| Ok::<_, Status>(Frame::data(Bytes::copy_from_slice(part)));
    let parts: Vec<_> = body.chunks(at_once).map(frame).collect();
    let mut messages = Messages::new(StreamBody::new(stream::iter(parts)));
    let next = || messages.next().now_or_never()?.ok()?;
    std::iter::from_fn(next).collect()
}

const PATH: &str =
    "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";
const HEAD_BYTES: usize = 5;
/// istiod sends each response as one message: room for a million pods.
const MAX_RESPONSE_BYTES: usize = 512 << 20;

#[cfg(test)]
mod tests {
    use http::HeaderMap;
    use proptest::prelude::*;

    use super::*;

    fn response(nonce: &str, resource: usize) -> DeltaDiscoveryResponse {
        DeltaDiscoveryResponse {
            nonce: nonce.into(),
            resources: vec![vec![7; resource].into()],
            ..DeltaDiscoveryResponse::default()
        }
    }

    fn trailers(code: &'static str) -> Frame<Bytes> {
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", HeaderValue::from_static(code));
        Frame::trailers(trailers)
    }

    type Read = (Vec<DeltaDiscoveryResponse>, Result<(), Status>);

    /// Everything that comes of these frames, and how it ends.
    fn read(frames: Vec<Frame<Bytes>>) -> Read {
        let body = StreamBody::new(stream::iter(frames.into_iter().map(Ok::<_, Status>)));
        let mut messages = Messages::new(body);
        let mut all = Vec::new();
        loop {
            match messages.next().now_or_never().unwrap() {
                Ok(Some(message)) => all.push(message),
                Ok(None) => return (all, Ok(())),
                Err(status) => return (all, Err(status)),
            }
        }
    }

    fn data(bytes: &'static [u8]) -> Vec<Frame<Bytes>> {
        vec![Frame::data(Bytes::from_static(bytes))]
    }

    proptest! {
        #[test]
        fn messages_are_found_however_they_are_cut(
            sizes in proptest::collection::vec(0..300_usize, 0..5),
            cuts in proptest::collection::vec(0..60_usize, 0..60),
        ) {
            let sent: Vec<_> = sizes.iter().map(|size| response("n", *size)).collect();
            let mut bytes: Bytes = sent.iter().flat_map(framed).collect::<Vec<_>>().into();
            let mut frames = Vec::new();
            for cut in cuts {
                frames.push(Frame::data(bytes.split_to(cut.min(bytes.len()))));
            }
            frames.extend([Frame::data(bytes), trailers("0")]);
            let (received, end) = read(frames);
            prop_assert_eq!(received, sent);
            prop_assert!(end.is_ok());
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _read = read(vec![Frame::data(bytes.into())]);
        }
    }

    #[test]
    fn a_status_ends_the_stream() {
        let good = Frame::data(framed(&response("n", 3)));
        let (received, end) = read(vec![good, trailers("14")]);
        assert_eq!(received.len(), 1);
        assert_eq!(end.unwrap_err().code(), Code::Unavailable);
    }

    #[test]
    fn what_is_no_message_is_told() {
        let cases: [(&'static [u8], &str); 4] = [
            (b"\x01\x00\x00\x00\x00", "compressed"),
            (b"\x00\xff\xff\xff\xff", "larger than"),
            (b"\x00\x00\x00\x00\x02\xff\xff", "cannot be decoded"),
            (b"\x00\x00\x00", "within a message"),
        ];
        for (bytes, reason) in cases {
            let (_, end) = read(data(bytes));
            let message = end.unwrap_err().message().to_owned();
            assert!(message.contains(reason), "{message}");
        }
    }

    #[test]
    fn a_refusal_is_no_stream() {
        let mut refusal = Response::new(Body::empty());
        let denied = HeaderValue::from_static("16");
        refusal.headers_mut().insert("grpc-status", denied);
        assert_eq!(accepted(refusal).unwrap_err().code(), Code::Unauthenticated);
        let mut page = Response::new(Body::empty());
        *page.status_mut() = http::StatusCode::NOT_FOUND;
        assert!(accepted(page).unwrap_err().message().contains("404"));
    }
}
