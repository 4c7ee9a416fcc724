//! The target of a CONNECT request: an address, or a service host name with a port.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    str::FromStr,
    sync::Arc,
};

/// What `:authority` of a CONNECT names. `Display` writes the wire form, `FromStr` reads it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Authority {
    /// `10.0.0.5:8080` or `[fd00::5]:8080`; never an IPv4-mapped IPv6 address.
    Address(SocketAddr),
    /// `reviews.default.svc.cluster.local:9080`: a service and one of its *service* ports.
    Host {
        /// Service host name, compared byte by byte.
        name: Arc<str>,
        /// Service port.
        port: u16,
    },
}

impl Authority {
    /// The address form. IPv4-mapped addresses become IPv4; IPv6 scopes and flow labels are dropped.
    #[must_use]
    pub fn address(ip: IpAddr, port: u16) -> Self {
        Self::Address(SocketAddr::new(ip.to_canonical(), port))
    }

    /// The port, whatever the form.
    #[must_use]
    pub fn port(&self) -> u16 {
        match self {
            Self::Address(address) => address.port(),
            Self::Host { port, .. } => *port,
        }
    }
}

impl fmt::Display for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Host { name, port } => write!(f, "{name}:{port}"),
        }
    }
}

/// Why a text is not an authority. Each is the peer's fault and answered with status 400.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AuthorityError {
    /// Nothing stands before the port.
    #[error("authority has no host")]
    MissingHost,
    /// No `:port` at the end.
    #[error("authority has no port")]
    MissingPort,
    /// The port is not a decimal number of 0 to 65535.
    #[error("authority port is not a number of 0 to 65535")]
    BadPort,
    /// A host of more than [`MAX_HOST_BYTES`] bytes.
    #[error("authority host is longer than {MAX_HOST_BYTES} bytes")]
    HostTooLong,
    /// The host holds something else than letters, digits, `-`, `.` and `_`.
    #[error("authority host is not a host name")]
    BadHost,
}

/// The longest host name that DNS, and so this parser, admits.
pub const MAX_HOST_BYTES: usize = 253;

impl FromStr for Authority {
    type Err = AuthorityError;

    /// A whole socket address is the address form; everything else must be host and port.
    fn from_str(text: &str) -> Result<Self, AuthorityError> {
        if let Ok(address) = text.parse::<SocketAddr>() {
            return Ok(Self::address(address.ip(), address.port()));
        }
        let (name, port) = text.rsplit_once(':').ok_or(AuthorityError::MissingPort)?;
        if name.is_empty() {
            return Err(AuthorityError::MissingHost);
        }
        if port.is_empty() {
            return Err(AuthorityError::MissingPort);
        }
        if name.len() > MAX_HOST_BYTES {
            return Err(AuthorityError::HostTooLong);
        }
        if !name.bytes().all(is_host_byte) {
            return Err(AuthorityError::BadHost);
        }
        if !port.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(AuthorityError::BadPort); // `u16::from_str` would accept a plus sign
        }
        let port = port.parse().map_err(|_| AuthorityError::BadPort)?;
        Ok(Self::Host {
            name: name.into(),
            port,
        })
    }
}

fn is_host_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn host(name: &str, port: u16) -> Authority {
        Authority::Host {
            name: name.into(),
            port,
        }
    }

    #[test]
    fn reads_both_forms() {
        let v4 = Authority::address("10.0.0.5".parse().unwrap(), 8080);
        let v6 = Authority::address("fd00::5".parse().unwrap(), 8080);
        let cases = [
            ("10.0.0.5:8080", v4.clone()),
            ("[fd00::5]:8080", v6.clone()),
            ("[::ffff:10.0.0.5]:8080", v4),
            ("[fd00::5%3]:8080", v6),
            (
                "a.b.svc.cluster.local:9080",
                host("a.b.svc.cluster.local", 9080),
            ),
            ("UPPER_case-1:1", host("UPPER_case-1", 1)),
        ];
        for (text, expected) in cases {
            assert_eq!(text.parse(), Ok(expected), "{text}");
        }
    }

    #[test]
    fn refuses_what_is_neither_form() {
        use AuthorityError as E;
        let long = format!("{}:80", "a".repeat(MAX_HOST_BYTES + 1));
        let cases = [
            ("", E::MissingPort),
            ("10.0.0.5", E::MissingPort),
            ("host", E::MissingPort),
            ("host:", E::MissingPort),
            (":80", E::MissingHost),
            ("host:http", E::BadPort),
            ("host:+80", E::BadPort),
            ("host:-1", E::BadPort),
            ("10.0.0.5:65536", E::BadPort),
            ("user@host:80", E::BadHost),
            ("a b:80", E::BadHost),
            ("http://host:80", E::BadHost),
            ("fd00::5", E::BadHost),
            ("[fd00::5:80", E::BadHost),
            ("h\u{f6}st:80", E::BadHost),
            (long.as_str(), E::HostTooLong),
        ];
        for (text, expected) in cases {
            assert_eq!(text.parse::<Authority>(), Err(expected), "{text}");
        }
    }

    fn authorities() -> impl Strategy<Value = Authority> {
        prop_oneof![
            (any::<IpAddr>(), any::<u16>()).prop_map(|(ip, port)| Authority::address(ip, port)),
            ("[a-zA-Z0-9_.-]{1,253}", any::<u16>())
                .prop_filter("an address is the other form", |(name, port)| {
                    format!("{name}:{port}").parse::<SocketAddr>().is_err()
                })
                .prop_map(|(name, port)| host(&name, port)),
        ]
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(authority in authorities()) {
            prop_assert_eq!(authority.to_string().parse(), Ok(authority));
        }

        #[test]
        fn any_text_is_refused_or_stable(text in ".{0,300}|[0-9a-f:.\\[\\]%@+-]{0,60}") {
            if let Ok(authority) = text.parse::<Authority>() {
                prop_assert_eq!(authority.to_string().parse(), Ok(authority));
            }
        }
    }
}
