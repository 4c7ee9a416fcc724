//! What is wrong with the files that settings name and that the process reads once, at its start: told with the faults of the
//! settings, and not one by one after them.

use std::path::Path;

use cert_agent::InProcessCa;
use xds_client::local;

use super::{fault::Given, reader::Reader, value::Reject};
use crate::{
    config::{CertificateSource, ControlPlane, MeshSource},
    telemetry::with_causes,
};

/// Adds what is wrong with the files of these settings.
///
/// The mesh may be large, and its reader tells all that is wrong with it, too: it is read here only where the process does not start
/// anyway.
pub(super) fn check(reader: &mut Reader<'_>, control: &ControlPlane) {
    if let CertificateSource::InProcess {
        root: Some((certificate, key)),
    } = &control.certificates
        && reader.literal("FAKE_CA", "true")
    {
        root(reader, certificate, key);
    }
    if reader.is_at_fault()
        && let Some(source) = &control.local
    {
        mesh(reader, source);
    }
}

/// The root of the in-process CA.
fn root(reader: &mut Reader<'_>, certificate: &Path, key: &Path) {
    let certificate = read(reader, "FAKE_CA_ROOT_CERT", certificate);
    let key = read(reader, "FAKE_CA_ROOT_KEY", key);
    if let (Some(certificate), Some(key)) = (certificate, key)
        && let Err(error) = InProcessCa::from_pem(&certificate, &key)
    {
        let reject = Reject::new(
            with_causes(&error),
            "PEM files of a CA's certificate and its key",
        );
        let keys = "FAKE_CA_ROOT_CERT and FAKE_CA_ROOT_KEY";
        reader.fault(keys, Given::Nothing, reject);
    }
}

/// Each record that nobody can make sense of is a fault of its own.
fn mesh(reader: &mut Reader<'_>, source: &MeshSource) {
    let (key, text) = match source {
        MeshSource::Text(text) => ("LOCAL_XDS", Some(text.clone())),
        MeshSource::File(path) => ("LOCAL_XDS_PATH", read(reader, "LOCAL_XDS_PATH", path)),
    };
    let accepted = "a description of a mesh, as the README has it";
    match text.map(|text| local::parse(&text)) {
        None => {}
        Some(Err(error)) => reader.fault(
            key,
            Given::Nothing,
            Reject::new(with_causes(&error), accepted),
        ),
        Some(Ok(document)) => {
            for record in document.misshapen {
                let reject = Reject::new(record.to_string(), accepted);
                reader.fault(key, Given::Nothing, reject);
            }
        }
    }
}

fn read(reader: &mut Reader<'_>, key: &str, path: &Path) -> Option<String> {
    let outcome = reader.environment().files().read(path);
    let outcome = outcome.map_err(|error| {
        let reason = format!("cannot be read: {error}");
        Reject::new(reason, "the path of a readable file")
    });
    reader.keep(key, Given::Value(path.display().to_string()), outcome)
}
