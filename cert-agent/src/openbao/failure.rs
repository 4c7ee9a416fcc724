//! Why OpenBao, or Kubernetes for it, did not do what it was asked, and when it may be asked again.

use std::time::Duration;

use http::StatusCode;

use crate::{ObtainError, Retry};

/// What a call is for. The same status means different things in different steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Getting the token of a workload's service account from Kubernetes.
    Account,
    /// Getting a token.
    Login,
    /// Getting a certificate.
    Sign,
    /// Reading issuers and revocation lists.
    Read,
}

impl Step {
    const fn text(self) -> &'static str {
        match self {
            Self::Account => "getting the workload's token from Kubernetes",
            Self::Login => "login at OpenBao",
            Self::Sign => "signing by OpenBao",
            Self::Read => "reading from OpenBao",
        }
    }
}

/// A call that failed. Cheap to clone, since all who wait for one login share its outcome.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{} failed: {reason}", .step.text())]
pub(super) struct Failure {
    pub(super) step: Step,
    /// Without tokens.
    pub(super) reason: String,
    pub(super) retry: Retry,
    /// The status, if there was an answer.
    pub(super) status: Option<StatusCode>,
}

impl Failure {
    /// No answer at all, or none that makes sense.
    pub(super) fn without_answer(step: Step, reason: impl Into<String>) -> Self {
        Self {
            step,
            reason: reason.into(),
            retry: Retry::Soon,
            status: None,
        }
    }

    /// Nothing may be sent now: OpenBao said so earlier.
    pub(super) fn throttled(step: Step, left: Duration) -> Self {
        Self {
            step,
            reason: format!("OpenBao limits the rate of calls for another {left:.1?}"),
            retry: Retry::After(left),
            status: None,
        }
    }

    /// An answer other than success. `texts` are the server's words.
    pub(super) fn refused(
        step: Step,
        status: StatusCode,
        texts: &str,
        retry_after: Duration,
    ) -> Self {
        let hint = hint(step, status);
        let said = if texts.is_empty() {
            String::new()
        } else {
            format!(": {texts}")
        };
        Self {
            step,
            reason: format!("status {}{hint}{said}", status.as_u16()),
            retry: retry(step, status, retry_after),
            status: Some(status),
        }
    }

    pub(super) fn is_forbidden(&self) -> bool {
        self.status == Some(StatusCode::FORBIDDEN)
    }
}

impl From<Failure> for ObtainError {
    fn from(failure: Failure) -> Self {
        let unfit = matches!(failure.status, None | Some(StatusCode::SERVICE_UNAVAILABLE));
        if unfit && failure.retry == Retry::Soon {
            Self::Unreachable(failure.to_string())
        } else {
            Self::refused(failure.to_string(), failure.retry)
        }
    }
}

/// Nothing is final. What somebody has to put right is asked for slowly; at a login the same statuses also stand for an
/// API server of Kubernetes that is away, or a JWT that is about to be replaced.
fn retry(step: Step, status: StatusCode, retry_after: Duration) -> Retry {
    match status {
        StatusCode::TOO_MANY_REQUESTS => Retry::After(retry_after),
        StatusCode::BAD_REQUEST if step == Step::Login => Retry::Soon,
        StatusCode::FORBIDDEN if step == Step::Account => Retry::Slowly,
        StatusCode::BAD_REQUEST | StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED => {
            Retry::Slowly
        }
        _ => Retry::Soon,
    }
}

/// Where to look.
const fn hint(step: Step, status: StatusCode) -> &'static str {
    match (step, status) {
        (Step::Account, StatusCode::FORBIDDEN) => {
            " (may the proxy's account create serviceaccounts/token?)"
        }
        (Step::Account, _) => "",
        (_, StatusCode::SERVICE_UNAVAILABLE) => " (is it sealed?)",
        (_, StatusCode::TOO_MANY_REQUESTS) => " (a rate limit)",
        (Step::Sign, StatusCode::FORBIDDEN) => " (the token or its policy)",
        (Step::Sign, StatusCode::BAD_REQUEST) => " (the role refuses)",
        (_, StatusCode::NOT_FOUND) => " (the mount, its path or the namespace)",
        _ => "",
    }
}
