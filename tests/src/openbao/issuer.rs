//! Signing on behalf of a certificate authority in front, as cert-manager's Vault issuer does.

use std::{sync::Arc, time::Duration};

use anyhow::{Context as _, ensure};
use rustls::{
    RootCertStore,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, UnixTime},
    server::WebPkiClientVerifier,
};
use serde_json::{Value, json};
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::{
    MESH, OpenBao, ROLE, ROOT,
    api::{self, Endpoint},
};
use crate::world::{Pod, World};

/// Gets requests signed by [`ROLE`], with a login of its own for each.
#[derive(Debug)]
pub struct Issuer {
    endpoint: Endpoint,
    /// A role ID and its secret.
    login: Value,
}

/// What came of a request.
pub(crate) struct Signed {
    pub(crate) leaf: String,
    /// From the issuer on, without roots.
    pub(crate) intermediates: Vec<String>,
    /// All that the engine of the root holds: the bundle that an operator hands out.
    pub(crate) roots: Vec<String>,
}

impl OpenBao {
    /// An issuer that calls from a pod; it logs in with `approle`, which is set up for it.
    ///
    /// # Errors
    /// When the server refuses.
    pub async fn issuer(&self, world: &World, from: &Pod) -> anyhow::Result<Issuer> {
        let endpoint = Endpoint {
            from: from.netns().duplicate()?,
            server: self.address(),
            tls: api::trusting(world.authority().root())?,
        };
        let login = self.approle_pair().await?;
        Ok(Issuer { endpoint, login })
    }
}

impl Issuer {
    pub(crate) async fn sign(
        &self,
        csr: &str,
        id: &str,
        lifetime: Duration,
    ) -> anyhow::Result<Signed> {
        let login = self.call("POST", "auth/approle/login", "", &self.login);
        let login = login.await?;
        let token = text(&login["auth"]["client_token"])?;
        let wish = json!({
            "csr": csr,
            "common_name": "",
            "uri_sans": id,
            "ttl": format!("{}s", lifetime.as_secs()),
            "exclude_cn_from_sans": true,
        });
        let path = format!("{MESH}/sign/{ROLE}");
        let answer = self.call("POST", &path, token, &wish).await?;
        let answer = &answer["data"];
        let mut intermediates = Vec::new();
        for issuer in answer["ca_chain"].as_array().context("no chain")? {
            let issuer = certificate(issuer)?;
            if !is_root(&issuer)? {
                intermediates.push(issuer);
            }
        }
        Ok(Signed {
            leaf: certificate(&answer["certificate"])?,
            intermediates,
            roots: self.roots().await?,
        })
    }

    async fn roots(&self) -> anyhow::Result<Vec<String>> {
        let path = format!("{ROOT}/issuers?list=true");
        let list = self.call("GET", &path, "", &Value::Null).await?;
        let mut roots = Vec::new();
        for issuer in list["data"]["keys"].as_array().context("no issuers")? {
            let path = format!("{ROOT}/issuer/{}/json", text(issuer)?);
            let found = self.call("GET", &path, "", &Value::Null).await?;
            roots.push(certificate(&found["data"]["certificate"])?);
        }
        Ok(roots)
    }

    async fn call(
        &self,
        method: &str,
        path: &str,
        token: &str,
        body: &Value,
    ) -> anyhow::Result<Value> {
        let (status, answer) = self.endpoint.call((method, path), token, body).await?;
        ensure!(status.is_success(), "{method} {path}: {status} {answer}");
        Ok(answer)
    }
}

impl Signed {
    /// Whether the chain leads to one of the roots.
    pub(crate) fn verify(&self) -> anyhow::Result<()> {
        let mut roots = RootCertStore::empty();
        for root in &self.roots {
            roots.add(der(root)?)?;
        }
        let provider = Arc::new(aws_lc_rs::default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(roots.into(), provider);
        let intermediates = self.intermediates.iter().map(|pem| der(pem));
        let intermediates = intermediates.collect::<anyhow::Result<Vec<_>>>()?;
        let now = UnixTime::now();
        verifier
            .build()?
            .verify_client_cert(&der(&self.leaf)?, &intermediates, now)?;
        Ok(())
    }

    /// The elements of an answer of istiod or istio-csr: leaf, intermediates, bundle of roots.
    pub(crate) fn into_elements(self) -> Vec<String> {
        let bundle = self.roots.concat();
        let chain = std::iter::once(self.leaf).chain(self.intermediates);
        chain.chain([bundle]).collect()
    }
}

fn is_root(pem: &str) -> anyhow::Result<bool> {
    let der = der(pem)?;
    let (_, certificate) = X509Certificate::from_der(&der)?;
    Ok(certificate.subject() == certificate.issuer())
}

fn der(pem: &str) -> anyhow::Result<CertificateDer<'static>> {
    Ok(pem::parse(pem)?.into_contents().into())
}

fn text(value: &Value) -> anyhow::Result<&str> {
    value
        .as_str()
        .with_context(|| format!("{value} is no text"))
}

/// One that others may follow: OpenBao does not promise a line feed at the end.
fn certificate(value: &Value) -> anyhow::Result<String> {
    Ok(format!("{}\n", text(value)?.trim_end()))
}
