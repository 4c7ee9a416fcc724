//! The headers of CONNECT: writers for what we send, readers for what anybody may send.
//!
//! A reader never fails: what cannot be read counts as absent.

mod baggage;
mod forwarded;
#[cfg(test)]
mod tests;
mod trace;

use std::{
    fmt::{Display, Write as _},
    net::SocketAddr,
};

use http::{HeaderName, HeaderValue, Uri};

pub use self::{
    baggage::{Baggage, WorkloadKind},
    forwarded::{Forwarded, forwarded_host},
    trace::TraceParent,
};

/// `baggage`: who the source (in requests) or the destination (in answers) is.
pub const BAGGAGE: HeaderName = HeaderName::from_static("baggage");
/// `forwarded`: the application's address and the service it dialled.
pub const FORWARDED: HeaderName = HeaderName::from_static("forwarded");
/// `traceparent`: ids for logs.
pub const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
/// `x-forwarded-network`: the network of the source, in inner tunnels.
pub const NETWORK: HeaderName = HeaderName::from_static("x-forwarded-network");

/// `value` in one allocation, as a text that grows while it is written would not be.
pub(super) fn text(value: &(impl Display + ?Sized)) -> String {
    let mut text = String::with_capacity(USUAL_LENGTH);
    // Writing to a string does not fail.
    let _ = write!(text, "{value}");
    text
}

/// `value` as a header's; empty if no header can hold it.
fn header_value(value: &impl Display) -> HeaderValue {
    HeaderValue::try_from(text(value)).unwrap_or_else(|_| HeaderValue::from_static(""))
}

/// Bytes that most texts fit in.
const USUAL_LENGTH: usize = 128;

/// Why an authority names no target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AuthorityError {
    /// No host.
    #[error("no host")]
    Host,
    /// No port, or one that is no number up to 65535.
    #[error("no valid port")]
    Port,
}

/// Checks the form `address:port` or `host:port`, and gives the authority as text.
///
/// # Errors
/// If host or port are missing.
pub fn authority(uri: &Uri) -> Result<&str, AuthorityError> {
    let authority = uri.authority().ok_or(AuthorityError::Host)?.as_str();
    if authority.parse::<SocketAddr>().is_ok() {
        return Ok(authority);
    }
    let (host, port) = authority.rsplit_once(':').ok_or(AuthorityError::Port)?;
    if host.is_empty() || host.contains(['@', ':', '[', ']']) {
        return Err(AuthorityError::Host);
    }
    let digits = !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
    if !digits || port.parse::<u16>().is_err() {
        return Err(AuthorityError::Port);
    }
    Ok(authority)
}
