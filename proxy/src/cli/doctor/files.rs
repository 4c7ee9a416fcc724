//! The files that the configuration names: trust roots and tokens.

use std::{fs, path::Path, time::SystemTime};

use super::{
    finding::Finding,
    token::{self, Reader},
};
use crate::config::{
    Address, AuthToken, CertificateSource, Config, OpenBaoJwt, OpenBaoLogin, RootSource,
};

/// Looks for the trust roots of the control plane. Whether they suit the servers is seen when those are called.
pub(super) fn roots(config: &Config) -> Vec<Finding> {
    let xds = config
        .control
        .xds
        .as_ref()
        .map(|it| ("XDS_ROOT_CA", &it.roots));
    let ca = match &config.control.certificates {
        CertificateSource::Istio(Address { roots, .. }) => Some(("CA_ROOT_CA", roots)),
        CertificateSource::OpenBao(server) => Some(("OPENBAO_ROOT_CA", &server.roots)),
        CertificateSource::InProcess { .. } => None,
    };
    let findings = xds.into_iter().chain(ca);
    findings
        .map(|(key, roots)| judge_roots(key, roots))
        .collect()
}

fn judge_roots(key: &str, roots: &RootSource) -> Finding {
    let way_out = "mount the ConfigMap istio-ca-root-cert there, or name another path, SYSTEM, or the PEM text itself";
    let (origin, text) = match roots {
        RootSource::System => return Finding::ok(format!("{key}: those of the system")),
        RootSource::Pem(text) => (format!("{key}, taken as PEM text"), text.clone()),
        RootSource::File(path) => match fs::read_to_string(path) {
            Ok(text) => (format!("{key} ({})", path.display()), text),
            Err(error) => {
                let what = format!("{key}: cannot read {}: {error}", path.display());
                return Finding::error(what, way_out);
            }
        },
    };
    let count = text.matches("-----BEGIN CERTIFICATE-----").count();
    if count == 0 {
        return Finding::error(format!("{origin} holds no certificate"), way_out);
    }
    Finding::ok(format!("{origin}: certificates: {count}"))
}

/// Judges each token that is shown to somebody, as of `now`.
pub(super) fn tokens(config: &Config, now: SystemTime) -> Vec<Finding> {
    let mut findings = Vec::new();
    let istio = matches!(config.control.certificates, CertificateSource::Istio(_));
    if config.control.xds.is_some() || istio {
        findings.extend(match &config.control.token {
            Some(AuthToken::File(path)) => judge_file(path, now, Some("istio-ca")),
            Some(AuthToken::Literal(text)) => {
                let origin = "in AUTH_TOKEN".to_owned();
                let audience = Some("istio-ca");
                token::judge(text, now, &Reader { origin, audience })
            }
            None => vec![Finding::warning(
                "there is no token, so istiod is not told who is calling",
                "mount a projected service-account token with the audience istio-ca at \
                 /var/run/secrets/tokens/istio-token, or set AUTH_TOKEN",
            )],
        });
    }
    if let CertificateSource::OpenBao(server) = &config.control.certificates {
        findings.extend(openbao(&server.login, now));
    }
    findings
}

fn openbao(login: &OpenBaoLogin, now: SystemTime) -> Vec<Finding> {
    let readable = |path: &Path| match fs::read_to_string(path) {
        Ok(text) if text.trim().is_empty() => Finding::error(
            format!("{} is empty", path.display()),
            "mount the secret that OpenBao expects there",
        ),
        Ok(_) => Finding::ok(format!("{} can be read", path.display())),
        Err(error) => unreadable(path, &error),
    };
    match login {
        OpenBaoLogin::Kubernetes { jwt, .. } | OpenBaoLogin::Jwt { jwt, .. } => match jwt {
            OpenBaoJwt::File(path) => judge_file(path, now, None),
            OpenBaoJwt::Directory(path) => match fs::read_dir(path) {
                Ok(_) => vec![Finding::ok(format!("{} can be read", path.display()))],
                Err(error) => vec![unreadable(path, &error)],
            },
            OpenBaoJwt::Kubernetes { .. } => Vec::new(),
        },
        OpenBaoLogin::AppRole {
            role_id, secret_id, ..
        } => {
            let paths = std::iter::once(role_id).chain(secret_id);
            paths.map(|path| readable(path)).collect()
        }
        OpenBaoLogin::TokenFile(path) => vec![readable(path)],
    }
}

fn judge_file(path: &Path, now: SystemTime, audience: Option<&'static str>) -> Vec<Finding> {
    let origin = format!("in {}", path.display());
    match fs::read_to_string(path) {
        Ok(text) => token::judge(&text, now, &Reader { origin, audience }),
        Err(error) => vec![unreadable(path, &error)],
    }
}

fn unreadable(path: &Path, error: &std::io::Error) -> Finding {
    Finding::error(
        format!("cannot read {}: {error}", path.display()),
        "mount it there, readable by user 0 or group 1337: root without DAC_OVERRIDE obeys file modes",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::Severity;

    #[test]
    fn roots_are_there_or_told() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("root-cert.pem");
        let judged = || judge_roots("XDS_ROOT_CA", &RootSource::File(path.clone())).severity;
        assert_eq!(judged(), Severity::Error);
        fs::write(&path, "nothing").unwrap();
        assert_eq!(judged(), Severity::Error);
        fs::write(&path, "-----BEGIN CERTIFICATE-----\n").unwrap();
        assert_eq!(judged(), Severity::Ok);
        let trap = RootSource::Pem("./var/run/secrets/istio/root-cert.pem".to_owned());
        let finding = judge_roots("XDS_ROOT_CA", &trap);
        assert!(
            finding
                .what
                .contains("taken as PEM text holds no certificate"),
            "{finding:?}"
        );
    }

    #[test]
    fn secrets_of_openbao_are_looked_for_and_not_shown() {
        let directory = tempfile::tempdir().unwrap();
        let (role_id, secret_id) = (
            directory.path().join("role"),
            directory.path().join("secret"),
        );
        fs::write(&role_id, "hidden-role").unwrap();
        let login = OpenBaoLogin::AppRole {
            mount: "approle".to_owned(),
            role_id,
            secret_id: Some(secret_id),
        };
        let findings = openbao(&login, SystemTime::now());
        assert_eq!(findings[0].severity, Severity::Ok);
        assert_eq!(findings[1].severity, Severity::Error);
        assert!(!format!("{findings:?}").contains("hidden"));
    }
}
