//! Values that say where a server is and whom it must be signed by.

use http::Uri;
use rustls::pki_types::{CertificateDer, pem::PemObject as _};

use super::{fault::Given, reader::Reader, value::Reject};
use crate::config::RootSource;

/// An address; without a scheme, of TLS.
pub(super) fn uri(text: &str) -> Result<Uri, Reject> {
    let reject = |reason| Reject::new(reason, "host:port, https://host:port or http://host:port");
    let uri: Uri = if text.contains("://") {
        text.parse()
    } else {
        format!("https://{text}").parse()
    }
    .map_err(|_| reject("not a URI"))?;
    let authority = uri.authority().map_or("", |authority| authority.as_str());
    if authority.contains('@') {
        return Err(reject("credentials do not belong into an address"));
    }
    let host = uri.host().unwrap_or_default();
    let port_is_sound = authority == host || uri.port_u16().is_some_and(|port| port > 0);
    match uri.scheme_str() {
        Some("https" | "http") if host.is_empty() => Err(reject("the host is missing")),
        Some("https" | "http") if !port_is_sound => Err(reject("the port is out of range")),
        Some("https" | "http") => Ok(uri),
        _ => Err(reject("the scheme is not supported")),
    }
}

/// A file may appear later, so a value that is neither `SYSTEM` nor PEM is a path, whether or not
/// there is a file now.
pub(super) fn roots(reader: &mut Reader<'_>, key: &str, default: &str) -> RootSource {
    match reader.text(key) {
        None => RootSource::File(default.into()),
        Some("SYSTEM") => RootSource::System,
        Some(text) if looks_like_pem(text) => {
            let mut certificates = CertificateDer::pem_slice_iter(text.as_bytes());
            if !matches!(certificates.next(), Some(Ok(_))) {
                let reject = Reject::new(
                    "the PEM text begins with no readable certificate",
                    "a path, SYSTEM, or PEM certificates",
                );
                reader.fault(key, Given::Secret, reject);
            }
            RootSource::Pem(text.to_owned())
        }
        Some(path) => RootSource::File(path.into()),
    }
}

pub(super) fn looks_like_pem(text: &str) -> bool {
    text.contains("-----BEGIN")
}
