//! `forwarded`: the application's address, and the service it dialled.

use std::{fmt, net::SocketAddr};

use http::{HeaderMap, HeaderValue};

use super::{FORWARDED, header_value};

/// What we send.
#[derive(Debug, Clone, Copy)]
#[expect(clippy::exhaustive_structs, reason = "a plain record, built by `flow`")]
pub struct Forwarded<'a> {
    /// The application's own address and port.
    pub source: SocketAddr,
    /// The service, if known.
    pub host: Option<&'a str>,
}

impl Forwarded<'_> {
    /// The header value. A host that would change the structure is left out.
    #[must_use]
    pub fn to_value(&self) -> HeaderValue {
        header_value(self)
    }
}

impl fmt::Display for Forwarded<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "for=\"{}\"", self.source)?;
        match self.host {
            Some(host) if is_plain(host) => write!(f, ";host={host}"),
            Some(_) | None => Ok(()),
        }
    }
}

fn is_plain(host: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_graphic() && !matches!(byte, b';' | b'"' | b',');
    !host.is_empty() && host.bytes().all(plain)
}

/// The `host` parameter of the `forwarded` header.
#[must_use]
pub fn forwarded_host(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(FORWARDED)?.to_str().ok()?;
    let mut parts = value.split(';').map(str::trim);
    let host = parts.find_map(|part| part.strip_prefix("host="))?;
    let unquoted = host
        .strip_prefix('"')
        .and_then(|rest| rest.strip_suffix('"'));
    Some(unquoted.unwrap_or(host)).filter(|host| !host.is_empty())
}
