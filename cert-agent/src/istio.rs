//! Certificates from istiod or istio-csr: the client of `istio.v1.auth.IstioCertificateService`.
//!
//! An [`IstioCa`] is a [`Signer`]. How the server is reached, and what proves who is calling, is the business of whoever
//! implements [`Connect`]. All calls share one connection, which is replaced after it failed, when a new one would be made
//! differently, and which is let go when nobody used it for a while.

mod chain;
mod connection;
pub mod proto;

use std::{collections::BTreeMap, error::Error, time::Duration};

use prost_types::{Struct, Value, value::Kind};
use tokio::time::timeout;
use tonic::{Code, Request, Status, metadata::MetadataMap, transport::Channel};

use crate::{
    BoxFuture, ObtainError, Retry, SignedChain, Signer, SigningRequest, SpiffeId,
    error_text::chain_text,
};
pub(crate) use chain::split;
use connection::Connection;
use proto::{
    IstioCertificateRequest, istio_certificate_service_client::IstioCertificateServiceClient,
};

/// Any error of a [`Connect`]; its text, causes included, is told to operators and must hold no secret.
pub type ConnectError = Box<dyn Error + Send + Sync>;

/// How the authority is reached.
pub trait Connect: Send + Sync {
    /// Makes a new connection, within a bounded time. The channel must stand for this one connection, and fail once that
    /// has ended; dropping it must close the connection. It must send HTTP/2 pings no more often than every five minutes
    /// and none without a call (istio-csr ends connections at the third violation); none at all is fine.
    ///
    /// # Cancel safety
    /// The future is dropped when the call that needs the connection is given up.
    fn connect(&self) -> BoxFuture<'_, Result<Channel, ConnectError>>;

    /// What goes with one call: the token as it is now, the cluster, further headers.
    fn metadata(&self) -> BoxFuture<'_, Result<MetadataMap, ConnectError>>;

    /// Whether a connection made now would be made as the last one was; if not, because the trust roots of the server were
    /// replaced, the next call makes one. If that fails, the old connection is used on.
    fn is_current(&self) -> BoxFuture<'_, bool>;
}

/// What an [`IstioCa`] asks for.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct IstioOptions {
    /// Requested lifetime of certificates; default 24 h. Servers may grant less.
    pub lifetime: Duration,
    /// Default [`Caller::Impersonates`].
    pub caller: Caller,
    /// How long one request may take, connecting included, before it is cancelled. Default 80 s: istiod as a registration
    /// authority may take 60 s, and istio-csr waits for a pending request without end.
    pub deadline: Duration,
}

/// For whom certificates are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Caller {
    /// A node proxy asks for the workloads of its node: the request names the identity, which the server allows or not.
    Impersonates,
    /// A proxy asks for itself; the server knows its identity by the token, whatever the request says. Use
    /// [`SanRule::Any`](crate::SanRule::Any) to accept it.
    Itself,
}

impl Default for IstioOptions {
    fn default() -> Self {
        Self {
            lifetime: Duration::from_secs(24 * 60 * 60),
            caller: Caller::Impersonates,
            deadline: Duration::from_secs(80),
        }
    }
}

/// istiod, istio-csr, or any other server of the same service.
#[derive(Debug)]
pub struct IstioCa<C> {
    connection: Connection<C>,
    options: IstioOptions,
}

impl<C: Connect> IstioCa<C> {
    /// The authority that `connect` reaches. Nothing is opened before the first request.
    #[must_use]
    pub fn new(connect: C, options: IstioOptions) -> Self {
        Self {
            connection: Connection::new(connect),
            options,
        }
    }

    async fn call(&self, request: SigningRequest<'_>) -> Result<SignedChain, ObtainError> {
        let message = self.message(request);
        let metadata = self.connection.connect().metadata().await;
        let metadata = metadata.map_err(|error| {
            let error = chain_text(&*error);
            let message = format!("cannot tell the certificate authority who is calling: {error}");
            ObtainError::refused(message, Retry::Soon)
        })?;
        let answer = match self.attempt(&message, &metadata).await {
            // It may have ended long ago, as servers end each once in a while.
            Err(Failure {
                lost: Lost::Reused, ..
            }) => self.attempt(&message, &metadata).await,
            answer => answer,
        };
        Ok(split(&answer.map_err(|failure| failure.error)?)?)
    }

    fn message(&self, request: SigningRequest<'_>) -> IstioCertificateRequest {
        let seconds = self.options.lifetime.as_secs();
        IstioCertificateRequest {
            csr: request.csr_pem(),
            // Zero would mean as little as the server likes.
            validity_duration: i64::try_from(seconds).unwrap_or(i64::MAX).max(1),
            metadata: match self.options.caller {
                Caller::Impersonates => Some(impersonation(request.id)),
                Caller::Itself => None,
            },
        }
    }

    async fn attempt(
        &self,
        message: &IstioCertificateRequest,
        metadata: &MetadataMap,
    ) -> Result<Vec<String>, Failure> {
        let mut lease = self.connection.lease().await.map_err(|error| Failure {
            error: ObtainError::Unreachable(format!(
                "cannot reach the certificate authority: {error}"
            )),
            lost: Lost::No,
        })?;
        let mut call = Request::new(message.clone());
        *call.metadata_mut() = metadata.clone();
        // For a server that our cancelling does not reach.
        call.set_timeout(self.options.deadline + Duration::from_secs(1));
        let mut client = IstioCertificateServiceClient::new(lease.channel())
            .max_decoding_message_size(MAX_ANSWER_BYTES);
        match client.create_certificate(call).await {
            Ok(answer) => {
                lease.proved();
                Ok(answer.into_inner().cert_chain)
            }
            Err(status) => {
                // The transport's own failures have a cause, the server's words have none.
                let answered = status.source().is_none();
                if answered && status.code() != Code::Unavailable {
                    lease.proved();
                }
                let lost = match (answered, lease.is_reused()) {
                    (false, true) => Lost::Reused,
                    _ => Lost::No,
                };
                let error = refusal(&status);
                Err(Failure { error, lost })
            }
        }
    }
}

impl<C: Connect> Signer for IstioCa<C> {
    fn sign<'a>(
        &'a self,
        request: SigningRequest<'a>,
    ) -> BoxFuture<'a, Result<SignedChain, ObtainError>> {
        let limit = self.options.deadline;
        Box::pin(async move {
            // Dropping the call cancels it at the server.
            let answer = timeout(limit, self.call(request)).await;
            answer.unwrap_or(Err(ObtainError::Deadline(limit)))
        })
    }
}

/// A failed attempt.
struct Failure {
    error: ObtainError,
    lost: Lost,
}

/// Whether the connection broke.
#[derive(PartialEq, Eq)]
enum Lost {
    No,
    /// It had been made by an earlier call.
    Reused,
}

fn impersonation(id: &SpiffeId) -> Struct {
    let id = Value {
        kind: Some(Kind::StringValue(id.to_string())),
    };
    Struct {
        fields: BTreeMap::from([(IMPERSONATED.to_owned(), id)]),
    }
}

/// All refusals are worth another attempt. `Unauthenticated` often means that the server does not know of a new pod yet.
fn refusal(status: &Status) -> ObtainError {
    let retry = match status.code() {
        Code::InvalidArgument | Code::Unimplemented => Retry::Slowly,
        Code::Ok
        | Code::Cancelled
        | Code::Unknown
        | Code::DeadlineExceeded
        | Code::NotFound
        | Code::AlreadyExists
        | Code::PermissionDenied
        | Code::ResourceExhausted
        | Code::FailedPrecondition
        | Code::Aborted
        | Code::OutOfRange
        | Code::Internal
        | Code::Unavailable
        | Code::DataLoss
        | Code::Unauthenticated => Retry::Soon,
    };
    let (code, words) = (status.code(), status.message());
    let words: String = words
        .chars()
        .take(MAX_WORDS)
        .flat_map(char::escape_debug)
        .collect();
    let mut message = format!("signing gRPC error ({code:?}): {words}");
    let causes = std::iter::successors(status.source(), |cause| (*cause).source());
    // The first one is the message once more.
    let root = causes.last().map(ToString::to_string);
    if let Some(cause) = root.filter(|cause| !message.contains(cause)) {
        message.push_str(": ");
        message.push_str(&cause);
    }
    if status.code() == Code::Unavailable {
        ObtainError::Unreachable(message)
    } else {
        ObtainError::refused(message, retry)
    }
}

const IMPERSONATED: &str = "ImpersonatedIdentity";
/// A chain and a bundle of roots take some kilobytes.
const MAX_ANSWER_BYTES: usize = 1024 * 1024;
/// Of a server's message that goes into logs.
const MAX_WORDS: usize = 1000;

#[cfg(test)]
mod tests;
