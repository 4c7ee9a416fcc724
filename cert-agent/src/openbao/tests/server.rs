//! An OpenBao in memory: answers what a script says, and remembers what it was asked.

use std::{
    convert::Infallible,
    io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt as _, Full};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use super::super::{
    Authority, Jwt, Login, Roots, Settings,
    dial::{Dial, Stream},
};
use crate::{
    BoxFuture, CsrSource, InProcessCa, Signer as _, SigningRequest, Source as _, SpiffeId,
};

pub(super) const JWT: &str = "eyJ.s3cret.jwt";

/// One request.
#[derive(Debug, Clone)]
pub(super) struct Seen {
    pub(super) host: String,
    pub(super) method: Method,
    /// With its query.
    pub(super) path: String,
    pub(super) headers: HeaderMap,
    /// `null` if there is none.
    pub(super) body: Value,
}

impl Seen {
    pub(super) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |it| it.to_str().unwrap())
    }

    pub(super) fn is_login(&self) -> bool {
        self.path.starts_with("/v1/auth/")
    }
}

/// What is answered; `None`: nothing, ever.
pub(super) type Reply = Option<Response<Full<Bytes>>>;
type Script = Box<dyn Fn(&Seen) -> BoxFuture<'static, Reply> + Send + Sync>;

pub(super) fn reply(status: u16, body: impl Into<Bytes>) -> Reply {
    let response = Response::builder().status(status);
    Some(response.body(Full::new(body.into())).unwrap())
}

pub(super) fn errors(status: u16, text: &str) -> Reply {
    reply(status, json!({ "errors": [text] }).to_string())
}

pub(super) fn header(reply: Reply, name: &'static str, value: &str) -> Reply {
    let mut response = reply?;
    response.headers_mut().insert(name, value.parse().unwrap());
    Some(response)
}

/// A server, the dialler that reaches it, and a CA behind it.
pub(super) struct Fake {
    script: Mutex<Script>,
    pub(super) ca: Arc<InProcessCa>,
    seen: Mutex<Vec<Seen>>,
    logins: AtomicUsize,
    connections: Mutex<JoinSet<()>>,
}

impl Fake {
    /// A server that does everything it is asked; tokens are `token-1`, `token-2`, … and live for 90 s.
    pub(super) fn new() -> Arc<Self> {
        let fake = Arc::new(Self {
            script: Mutex::new(Box::new(|_| Box::pin(async { None }))),
            ca: Arc::new(InProcessCa::random().unwrap()),
            seen: Mutex::default(),
            logins: AtomicUsize::new(0),
            connections: Mutex::default(),
        });
        fake.script(|_| None);
        fake
    }

    /// From now on answers what `script` says; what it leaves open is done as usual.
    pub(super) fn script(
        self: &Arc<Self>,
        script: impl Fn(&Seen) -> Option<Reply> + Send + Sync + 'static,
    ) {
        let this = Arc::downgrade(self);
        *self.script.lock() = Box::new(move |seen| {
            let (said, seen, this) = (script(seen), seen.clone(), this.upgrade());
            Box::pin(async move {
                match said {
                    Some(reply) => reply,
                    None => this?.usual(&seen).await,
                }
            })
        });
    }

    async fn usual(&self, seen: &Seen) -> Reply {
        if seen.is_login() {
            let count = 1 + self.logins.fetch_add(1, Ordering::Relaxed);
            let token = format!("token-{count}");
            let auth = json!({ "client_token": token, "lease_duration": 90 });
            return reply(200, json!({ "auth": auth }).to_string());
        }
        if seen.path.contains("/sign/") {
            let signed = self.sign(&seen.body).await;
            return reply(200, json!({ "data": signed }).to_string());
        }
        errors(404, "no handler for route")
    }

    /// `data` of a good answer.
    pub(super) async fn sign(&self, body: &Value) -> Value {
        let csr = pem::parse(body["csr"].as_str().unwrap()).unwrap();
        let id: SpiffeId = WEB.parse().unwrap();
        let request = SigningRequest {
            id: &id,
            csr: &csr.contents().into(),
        };
        let signed = self.ca.sign(request).await.unwrap();
        let leaf = pem_text(&signed.chain[0]);
        let root = pem_text(self.ca.root());
        json!({ "certificate": leaf.trim_end(), "issuing_ca": root, "ca_chain": [root] })
    }

    pub(super) fn seen(&self) -> Vec<Seen> {
        self.seen.lock().clone()
    }

    pub(super) fn logins(&self) -> usize {
        self.seen().iter().filter(|seen| seen.is_login()).count()
    }

    pub(super) fn signings(&self) -> usize {
        let seen = self.seen();
        seen.iter()
            .filter(|seen| seen.path.contains("/sign/"))
            .count()
    }
}

pub(super) const WEB: &str = "spiffe://td/ns/shop/sa/web";

pub(super) fn pem_text(der: &[u8]) -> String {
    pem::encode(&pem::Pem::new("CERTIFICATE", der))
}

/// The dialler.
pub(super) struct ToFake(pub(super) Arc<Fake>);

impl Dial for ToFake {
    fn dial<'a>(&'a self, to: &'a Uri) -> BoxFuture<'a, io::Result<Box<dyn Stream>>> {
        let (near, far) = tokio::io::duplex(64 * 1024);
        let (fake, host) = (Arc::clone(&self.0), to.authority().unwrap().to_string());
        let serve = async move {
            let service = service_fn(|request| answer(Arc::clone(&fake), host.clone(), request));
            let _ = http1::Builder::new()
                .serve_connection(TokioIo::new(far), service)
                .await;
        };
        self.0.connections.lock().spawn(serve);
        Box::pin(async move { Ok(Box::new(near) as Box<dyn Stream>) })
    }

    fn same_cluster(&self, _home: &str, host: &str) -> bool {
        host != "elsewhere"
    }
}

async fn answer(
    fake: Arc<Fake>,
    host: String,
    request: Request<Incoming>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let (head, body) = request.into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    let seen = Seen {
        host,
        method: head.method,
        path: head.uri.to_string(),
        headers: head.headers,
        body: serde_json::from_slice(&body).unwrap_or_default(),
    };
    fake.seen.lock().push(seen.clone());
    let reply = fake.script.lock()(&seen);
    match reply.await {
        Some(response) => Ok(response),
        None => std::future::pending().await,
    }
}

/// An authority in front of a fake; keeps the file with its JWT.
pub(super) struct Stage {
    pub(super) fake: Arc<Fake>,
    pub(super) authority: Authority,
    _jwt: tempfile::NamedTempFile,
}

pub(super) fn stage() -> Stage {
    stage_with(|_| {})
}

pub(super) fn stage_with(bend: impl FnOnce(&mut Settings)) -> Stage {
    stage_around(Fake::new(), bend)
}

pub(super) fn stage_around(fake: Arc<Fake>, bend: impl FnOnce(&mut Settings)) -> Stage {
    let jwt = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(jwt.path(), format!("{JWT}\n")).unwrap();
    let login = Login::Kubernetes {
        mount: "kubernetes".into(),
        role: "node".into(),
        jwt: Jwt::Own(jwt.path().into()),
    };
    let mut settings = Settings::new(Uri::from_static(HOME), Roots::System, "workload", login);
    settings.mount = "pki-mesh".into();
    bend(&mut settings);
    Stage {
        authority: Authority::over(Arc::new(ToFake(Arc::clone(&fake))), settings).unwrap(),
        fake,
        _jwt: jwt,
    }
}

pub(super) const HOME: &str = "https://bao.example:8200";

impl Stage {
    /// Has one certificate signed, as the agent does.
    pub(super) async fn sign(&self) -> Result<crate::KeyedChain, crate::ObtainError> {
        self.sign_for(WEB).await
    }

    pub(super) async fn sign_for(&self, id: &str) -> Result<crate::KeyedChain, crate::ObtainError> {
        let source = CsrSource::new(self.authority.clone());
        source.obtain(&id.parse().unwrap()).await
    }

    /// The failure that this reply to every request to sign leads to.
    pub(super) async fn refusal(&self, reply: fn() -> Reply) -> crate::ObtainError {
        self.fake
            .script(move |seen| seen.path.contains("/sign/").then(reply));
        self.sign().await.expect_err("it was signed")
    }
}

pub(super) fn ok(body: &Value) -> Reply {
    reply(StatusCode::OK.as_u16(), body.to_string())
}
