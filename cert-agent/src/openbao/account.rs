//! Tokens of workloads' service accounts, made by the API server of Kubernetes.

use std::{fmt, path::PathBuf, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{
    HeaderValue, Request, StatusCode, Uri,
    header::{ACCEPT, AUTHORIZATION, CONNECTION, CONTENT_TYPE, HOST},
};
use http_body_util::Full;
use tokio::time::timeout;
use zeroize::Zeroizing;

use super::{
    client::{Answer, authority, exchange},
    dial::{Dial, Roots, TlsDialler, in_full},
    failure::{Failure, Step},
    secret, wire,
};
use crate::{SpiffeId, TlsOptions};

/// The API server of Kubernetes, which makes tokens of service accounts (`TokenRequest`).
///
/// The account of this process must be allowed to `create` `serviceaccounts/token`; for which accounts, decides what
/// identities it can have.
#[derive(Clone)]
pub struct KubernetesApi {
    address: Uri,
    token: PathBuf,
    audience: String,
    dialler: Arc<dyn Dial>,
}

impl KubernetesApi {
    /// The server at `address`, `https://host:port`, whose certificate leads to one of `roots`. `token` is the file with
    /// the token of this process; it is read each time. What is made is for `audience`.
    #[must_use]
    pub fn new(
        address: Uri,
        roots: Roots,
        token: PathBuf,
        audience: String,
        tls: TlsOptions,
    ) -> Self {
        let dialler = Arc::new(TlsDialler::new(roots, tls));
        Self::over(dialler, address, token, audience)
    }

    pub(super) fn over(
        dialler: Arc<dyn Dial>,
        address: Uri,
        token: PathBuf,
        audience: String,
    ) -> Self {
        Self {
            address,
            token,
            audience,
            dialler,
        }
    }

    pub(super) fn address(&self) -> &Uri {
        &self.address
    }

    /// A fresh token of the service account of `id`.
    ///
    /// # Cancel safety
    /// The connection is closed; a token that was made is lost, and ends by itself.
    pub(super) async fn token_of(&self, id: &SpiffeId) -> Result<Zeroizing<String>, Failure> {
        let own = secret::read(&self.token).await?;
        let answer = timeout(LIMIT, Box::pin(self.ask(id, own.trim())))
            .await
            .unwrap_or_else(|_| {
                let reason = format!("no answer from {} within {LIMIT:?}", self.address);
                Err(Failure::without_answer(Step::Account, reason))
            })?;
        if answer.status.is_success() {
            return wire::requested_token(&answer.body);
        }
        Err(self.refused(id, &answer, own.trim()))
    }

    async fn ask(&self, id: &SpiffeId, own: &str) -> Result<Answer, Failure> {
        let failed = |reason: String| Failure::without_answer(Step::Account, reason);
        let request = self
            .request(id, own)
            .map_err(|error| failed(error.to_string()))?;
        exchange(&*self.dialler, &self.address, request, MAX_ANSWER)
            .await
            .map_err(|error| failed(format!("{}: {}", authority(&self.address), in_full(&error))))
    }

    /// Namespaces and accounts of identities have no character that would mean anything in a path.
    fn request(&self, id: &SpiffeId, own: &str) -> Result<Request<Full<Bytes>>, http::Error> {
        let bearer = Zeroizing::new(format!("Bearer {own}"));
        let mut bearer = HeaderValue::from_str(&bearer)?;
        bearer.set_sensitive(true);
        let (namespace, account) = (id.namespace(), id.service_account());
        let path = format!("/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token");
        Request::post(path)
            .header(HOST, authority(&self.address))
            .header(ACCEPT, JSON)
            .header(CONNECTION, "close")
            .header(CONTENT_TYPE, JSON)
            .header(AUTHORIZATION, bearer)
            .body(Full::new(wire::token_request(&self.audience, LIFETIME)))
    }

    fn refused(&self, id: &SpiffeId, answer: &Answer, own: &str) -> Failure {
        let said = wire::kubernetes_text(&answer.body, own);
        let account = format!("{}/{}", id.namespace(), id.service_account());
        let texts = match answer.status {
            StatusCode::UNAUTHORIZED => {
                format!("the token in {} is not good", self.token.display())
            }
            _ => format!("account {account}: {said}"),
        };
        Failure::refused(Step::Account, answer.status, &texts, answer.pause())
    }
}

impl fmt::Debug for KubernetesApi {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KubernetesApi")
            .field("address", &self.address)
            .field("token", &self.token)
            .field("audience", &self.audience)
            .finish_non_exhaustive()
    }
}

const JSON: &str = "application/json";
/// The least that Kubernetes makes. A token is shown once, at once.
const LIFETIME: Duration = Duration::from_mins(10);
/// From the first packet to the last byte.
const LIMIT: Duration = Duration::from_secs(20);
const MAX_ANSWER: usize = 64 * 1024;
