//! HTTP/1.1 between pods: a small server that says who it is, and a client that keeps its connection.

use std::{convert::Infallible, io, net::SocketAddr, sync::Arc};

use anyhow::Context as _;
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full};
use hyper::{
    body::Incoming,
    client::conn::http1::{self as client, SendRequest},
    server::conn::http1 as server,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpListener, task::JoinSet};

use crate::{traffic, wait, world::Pod};

/// A server that sends each request's body back, with the pod's name in header `pod`; stops when dropped.
#[derive(Debug)]
pub struct Web {
    /// Where it listens.
    pub address: SocketAddr,
    _serving: JoinSet<()>,
}

impl Web {
    /// Serves a port of the pod's IPv4 address.
    ///
    /// # Errors
    /// When the port is taken.
    pub fn serve(pod: &Pod, port: u16) -> io::Result<Self> {
        let address = pod.at(port);
        let listener = traffic::listen(pod.netns(), address)?;
        let mut serving = JoinSet::new();
        serving.spawn(accept_all(listener, pod.name().into()));
        Ok(Self {
            address,
            _serving: serving,
        })
    }
}

async fn accept_all(listener: TcpListener, name: Arc<str>) {
    let mut connections = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        let name = Arc::clone(&name);
        let service = service_fn(move |request| echo(request, Arc::clone(&name)));
        connections.spawn(server::Builder::new().serve_connection(TokioIo::new(stream), service));
        while connections.try_join_next().is_some() {}
    }
}

async fn echo(
    request: Request<Incoming>,
    name: Arc<str>,
) -> Result<Response<Incoming>, Infallible> {
    let mut response = Response::new(request.into_body());
    let name = http::HeaderValue::from_str(&name).expect("the name of a pod");
    response.headers_mut().insert("pod", name);
    Ok(response)
}

/// A connection for one request after the other.
#[derive(Debug)]
pub struct Caller {
    requests: SendRequest<Full<Bytes>>,
    _driving: JoinSet<()>,
}

impl Caller {
    /// Connects from inside the pod.
    ///
    /// # Errors
    /// When refused, reset or unreachable.
    pub async fn connect(from: &Pod, to: SocketAddr) -> anyhow::Result<Self> {
        let stream = from.connect(to).await?;
        let (requests, connection) = client::handshake(TokioIo::new(stream)).await?;
        let mut driving = JoinSet::new();
        driving.spawn(async { drop(connection.await) });
        Ok(Self {
            requests,
            _driving: driving,
        })
    }

    /// Sends these bytes, which must come back, and says which pod answered.
    ///
    /// # Errors
    /// When there is another answer, or none within a minute.
    pub async fn call(&mut self, body: &Bytes) -> anyhow::Result<String> {
        let request = Request::post("/").header("host", "service");
        let request = request.body(Full::new(body.clone()))?;
        let talk = async {
            self.requests.ready().await?;
            let response = self.requests.send_request(request).await?;
            let (head, answer) = response.into_parts();
            let answer = answer.collect().await?.to_bytes();
            anyhow::ensure!(head.status == 200, "{}: {answer:?}", head.status);
            anyhow::ensure!(answer == *body, "{} bytes, other than sent", answer.len());
            let name = head.headers.get("pod").context("no name")?;
            anyhow::Ok(name.to_str()?.to_owned())
        };
        tokio::time::timeout(6 * wait::SOON, talk).await?
    }
}
