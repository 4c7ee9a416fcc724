//! Bounded HTTP calls: in time, in the size of what comes back, in the number of redirections.
//!
//! Each call has a connection of its own. Calls are rare (a certificate a day and workload), and so none is lost to a
//! connection that went stale, and changed trust roots count at once.

use std::{convert::Infallible, io, sync::Arc, time::Duration};

use bytes::{Buf as _, Bytes};
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri,
    header::{ACCEPT, CONNECTION, CONTENT_TYPE, HOST, LOCATION, RETRY_AFTER},
};
use http_body_util::{BodyExt as _, Full};
use hyper::{body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio::time::{Instant, timeout};
use zeroize::Zeroizing;

use super::{
    dial::{Dial, Stream, bare_host, in_full},
    failure::{Failure, Step},
    wire,
};

/// Sends calls to one OpenBao cluster.
pub(super) struct Client {
    dialler: Arc<dyn Dial>,
    home: Uri,
    namespace: Option<HeaderValue>,
    /// No call before: a rate limit.
    not_before: Mutex<Option<Instant>>,
}

/// One call.
pub(super) struct Call<'a> {
    pub(super) step: Step,
    /// Below `/v1/`, with a query if there is one.
    pub(super) path: &'a str,
    pub(super) token: Option<&'a HeaderValue>,
    /// What is in the body that nobody else may see.
    pub(super) secret: Option<&'a str>,
    /// `POST` with this body; without one it is a `GET`.
    pub(super) body: Option<Bytes>,
    pub(super) max_answer: usize,
}

impl Call<'_> {
    /// What the words of an answer are not to repeat.
    fn secrets(&self) -> [&str; 2] {
        let token = self.token.map(HeaderValue::as_bytes);
        let token = token.and_then(|token| str::from_utf8(token).ok());
        [token, self.secret].map(Option::unwrap_or_default)
    }
}

impl Client {
    pub(super) fn new(dialler: Arc<dyn Dial>, home: Uri, namespace: Option<HeaderValue>) -> Self {
        Self {
            dialler,
            home,
            namespace,
            not_before: Mutex::new(None),
        }
    }

    /// Makes the call; the body of a successful answer.
    ///
    /// # Cancel safety
    /// The connection is closed; the server may or may not have done what it was asked.
    pub(super) async fn call(&self, call: &Call<'_>) -> Result<Zeroizing<Vec<u8>>, Failure> {
        self.check_throttle(call.step)?;
        let answer = timeout(CALL_LIMIT, Box::pin(self.follow(call)))
            .await
            .unwrap_or_else(|_| {
                let reason = format!("no answer from {} within {CALL_LIMIT:?}", self.home);
                Err(Failure::without_answer(call.step, reason))
            })?;
        if answer.status.is_success() {
            return Ok(answer.body);
        }
        let retry_after = answer.pause();
        // Reading is not worth holding up a certificate.
        let throttled = answer.status == StatusCode::TOO_MANY_REQUESTS;
        if throttled && call.step != Step::Read {
            *self.not_before.lock() = Instant::now().checked_add(retry_after);
        }
        let texts = wire::error_texts(&answer.body, call.secrets());
        let failure = Failure::refused(call.step, answer.status, &texts, retry_after);
        Err(failure)
    }

    /// A rate limit is one of the node rather than of one identity: nobody asks before it is over.
    fn check_throttle(&self, step: Step) -> Result<(), Failure> {
        let mut not_before = self.not_before.lock();
        let left = not_before.map(|end| end.saturating_duration_since(Instant::now()));
        match left {
            Some(left) if !left.is_zero() => Err(Failure::throttled(step, left)),
            Some(_) | None => {
                *not_before = None;
                Ok(())
            }
        }
    }

    /// A standby that does not forward by itself names the active node, for the same path: it is sent the same call.
    async fn follow(&self, call: &Call<'_>) -> Result<Answer, Failure> {
        let mut to = self.home.clone();
        for _ in 0..=MAX_REDIRECTIONS {
            let answer = self.exchange(&to, call).await.map_err(|error| {
                let reason = format!("{}: {}", authority(&to), in_full(&error));
                Failure::without_answer(call.step, reason)
            })?;
            match &answer.redirection {
                None => return Ok(answer),
                Some(location) => to = self.within_cluster(&to, call, location)?,
            }
        }
        let reason = "its servers send one to another without end";
        Err(Failure::without_answer(call.step, reason))
    }

    /// The server at `location`, which must be asked for the very same thing, over TLS, in the same cluster.
    fn within_cluster(&self, from: &Uri, call: &Call<'_>, location: &str) -> Result<Uri, Failure> {
        let to = location.parse::<Uri>().ok().filter(|to| {
            let path = to.path_and_query().map(|path| path.as_str());
            to.scheme_str() == Some("https")
                && !authority(to).contains('@')
                && path.and_then(|path| path.strip_prefix("/v1/")) == Some(call.path)
                && self
                    .dialler
                    .same_cluster(bare_host(&self.home), bare_host(to))
        });
        to.ok_or_else(|| {
            let reason = format!(
                "{} redirects to a place that is not trusted with the call",
                authority(from)
            );
            Failure::without_answer(call.step, reason)
        })
    }

    async fn exchange(&self, to: &Uri, call: &Call<'_>) -> io::Result<Answer> {
        let request = self.request(to, call).map_err(io::Error::other)?;
        exchange(&*self.dialler, to, request, call.max_answer).await
    }

    fn request(&self, to: &Uri, call: &Call<'_>) -> Result<Request<Full<Bytes>>, http::Error> {
        let method = if call.body.is_some() {
            Method::POST
        } else {
            Method::GET
        };
        let mut request = Request::builder()
            .method(method)
            .uri(format!("/v1/{}", call.path))
            .header(HOST, authority(to))
            .header(ACCEPT, "*/*")
            .header(CONNECTION, "close")
            .header(&X_VAULT_REQUEST, "true");
        if let Some(namespace) = &self.namespace {
            request = request.header(&X_VAULT_NAMESPACE, namespace);
        }
        if let Some(token) = call.token {
            request = request.header(&X_VAULT_TOKEN, token);
        }
        if call.body.is_some() {
            request = request.header(CONTENT_TYPE, "application/json");
        }
        request.body(Full::new(call.body.clone().unwrap_or_default()))
    }
}

/// What came back.
pub(super) struct Answer {
    pub(super) status: StatusCode,
    retry_after: Option<Duration>,
    redirection: Option<String>,
    /// Wiped, since it may be a token.
    pub(super) body: Zeroizing<Vec<u8>>,
}

impl Answer {
    /// How long the server wants to be left alone, if it is about that.
    pub(super) fn pause(&self) -> Duration {
        self.retry_after.unwrap_or(DEFAULT_RETRY_AFTER)
    }
}

/// Makes a connection for one request and its answer, which has at most `max_answer` bytes.
///
/// # Cancel safety
/// The connection is closed.
pub(super) async fn exchange(
    dialler: &dyn Dial,
    to: &Uri,
    request: Request<Full<Bytes>>,
    max_answer: usize,
) -> io::Result<Answer> {
    let stream = timeout(CONNECT_LIMIT, dialler.dial(to))
        .await
        .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "connecting takes too long"))??;
    send(stream, request, max_answer).await
}

async fn send(
    stream: Box<dyn Stream>,
    request: Request<Full<Bytes>>,
    max_answer: usize,
) -> io::Result<Answer> {
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
        .await
        .map_err(io::Error::other)?;
    // What the connection brought stays readable after its end.
    let driving = async {
        let _ended = connection.await;
        std::future::pending::<Infallible>().await
    };
    let exchange = async {
        let response = sender
            .send_request(request)
            .await
            .map_err(io::Error::other)?;
        read(response, max_answer).await
    };
    tokio::select! {
        answer = exchange => answer,
        never = driving => match never {},
    }
}

async fn read(response: Response<Incoming>, max_answer: usize) -> io::Result<Answer> {
    let (head, mut incoming) = response.into_parts();
    // Growing would leave copies behind.
    let announced = head
        .headers
        .get(http::header::CONTENT_LENGTH)
        .and_then(number);
    let capacity = announced.and_then(|length| usize::try_from(length).ok());
    let capacity = capacity.unwrap_or(USUAL_ANSWER).min(max_answer);
    let mut body = Zeroizing::new(Vec::with_capacity(capacity));
    while let Some(frame) = incoming.frame().await {
        let Ok(mut data) = frame.map_err(io::Error::other)?.into_data() else {
            continue;
        };
        if body.len() + data.remaining() > max_answer {
            let text = format!("the answer is longer than {max_answer} bytes");
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        body.extend_from_slice(&data);
        data.advance(data.remaining());
    }
    Ok(Answer {
        status: head.status,
        retry_after: seconds(&head.headers, &RETRY_AFTER),
        redirection: redirection(head.status, &head.headers),
        body,
    })
}

/// Only redirections that keep method and body.
fn redirection(status: StatusCode, headers: &HeaderMap) -> Option<String> {
    let keeps = [
        StatusCode::TEMPORARY_REDIRECT,
        StatusCode::PERMANENT_REDIRECT,
    ];
    let location = keeps.contains(&status).then(|| headers.get(LOCATION))??;
    Some(location.to_str().unwrap_or_default().to_owned())
}

fn seconds(headers: &HeaderMap, name: &HeaderName) -> Option<Duration> {
    let seconds = headers.get(name).and_then(number)?;
    Some(Duration::from_secs(seconds).clamp(DEFAULT_RETRY_AFTER, MAX_RETRY_AFTER))
}

fn number(value: &HeaderValue) -> Option<u64> {
    value.to_str().ok()?.trim().parse().ok()
}

pub(super) fn authority(uri: &Uri) -> &str {
    uri.authority().map_or("", |authority| authority.as_str())
}

static X_VAULT_REQUEST: HeaderName = HeaderName::from_static("x-vault-request");
static X_VAULT_NAMESPACE: HeaderName = HeaderName::from_static("x-vault-namespace");
static X_VAULT_TOKEN: HeaderName = HeaderName::from_static("x-vault-token");
/// From the first packet to the last byte, redirections included.
const CALL_LIMIT: Duration = Duration::from_secs(30);
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
const MAX_REDIRECTIONS: usize = 2;
const USUAL_ANSWER: usize = 16 * 1024;
const DEFAULT_RETRY_AFTER: Duration = Duration::from_secs(1);
/// A server that wants to be left alone for longer is asked again nevertheless.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(150);
