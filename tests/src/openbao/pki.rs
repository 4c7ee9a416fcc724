//! Engines, roles, policies and logins of a mesh, set up as an operator would.

use std::time::Duration;

use anyhow::Context as _;
use rcgen::{KeyPair, SigningKey as _};
use rustls::pki_types::PrivatePkcs8KeyDer;
use serde_json::{Value, json};
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

use super::OpenBao;
use crate::{
    ca::Identity,
    raw::{Hello, RawClient},
    traffic::Server,
    wait,
    world::Pod,
};

/// The engine with the root.
pub const ROOT: &str = "pki-root";
/// The engine with the intermediate, which signs for the mesh.
pub const MESH: &str = "pki-mesh";
/// The role that proxies use.
pub const ROLE: &str = "workload";

/// A certificate that was issued.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Issued {
    /// The URI in it.
    pub id: String,
    /// Common name of its issuer.
    pub issuer: String,
}

impl OpenBao {
    /// Makes both engines, a first root and intermediate of this name, the role, and a policy that allows its use.
    ///
    /// # Errors
    /// When the server refuses.
    pub async fn set_up(&self, name: &str) -> anyhow::Result<()> {
        for mount in [ROOT, MESH] {
            let engine = json!({ "type": "pki", "config": { "max_lease_ttl": "43800h" } });
            self.call("POST", &format!("sys/mounts/{mount}"), engine)
                .await?;
        }
        self.add_root(name).await?;
        self.add_intermediate(name).await?;
        self.set_role(json!({})).await?;
        let rule = format!("path \"{MESH}/sign/{ROLE}\" {{ capabilities = [\"update\"] }}");
        self.set_policy(&rule).await
    }

    /// A further root beside those that there are, and the default from now on.
    ///
    /// # Errors
    /// When the server refuses.
    pub async fn add_root(&self, name: &str) -> anyhow::Result<()> {
        let root = json!({ "common_name": format!("root {name}"), "issuer_name": name, "key_type": "ec", "ttl": "8760h" });
        let path = format!("{ROOT}/root/rotate/internal");
        let made = self.call("POST", &path, root).await?;
        self.set_default(ROOT, &made["data"]["issuer_id"]).await
    }

    /// A further intermediate below the default root, which signs from now on.
    ///
    /// # Errors
    /// When the server refuses.
    pub async fn add_intermediate(&self, name: &str) -> anyhow::Result<()> {
        let path = format!("{MESH}/intermediate/generate/internal");
        let named = json!({ "common_name": format!("mesh {name}"), "key_type": "ec" });
        let made = self.call("POST", &path, named).await?;
        let csr = json!({ "csr": made["data"]["csr"], "format": "pem_bundle", "ttl": "4000h" });
        let path = format!("{ROOT}/root/sign-intermediate");
        let signed = self.call("POST", &path, csr).await?;
        let certificate = json!({ "certificate": signed["data"]["certificate"] });
        let path = format!("{MESH}/intermediate/set-signed");
        let set = self.call("POST", &path, certificate).await?;
        // Of the intermediate and its root, the one with a key here.
        let mapping = set["data"]["mapping"].as_object().context("no mapping")?;
        let issuer = mapping.iter().find(|(_, key)| **key != json!(""));
        let (issuer, _) = issuer.context("no issuer with a key")?;
        self.set_default(MESH, &json!(issuer)).await
    }

    async fn set_default(&self, mount: &str, issuer: &Value) -> anyhow::Result<()> {
        let path = format!("{mount}/config/issuers");
        self.call("POST", &path, json!({ "default": issuer }))
            .await?;
        Ok(())
    }

    /// Takes all issuers but the default one out of an engine.
    ///
    /// # Errors
    /// When the server refuses.
    pub async fn remove_old_issuers(&self, mount: &str) -> anyhow::Result<()> {
        let path = format!("{mount}/issuers?list=true");
        let list = self.call("GET", &path, Value::Null).await?;
        let issuers = list["data"]["key_info"].as_object().context("no issuers")?;
        for (id, info) in issuers {
            if info["is_default"] == json!(false) {
                let path = format!("{mount}/issuer/{id}");
                self.call("DELETE", &path, Value::Null).await?;
            }
        }
        Ok(())
    }

    /// The role that proxies use, as it should be but for `changes`.
    ///
    /// # Errors
    /// When the server refuses.
    pub async fn set_role(&self, changes: Value) -> anyhow::Result<()> {
        let mut role = json!({
            "allowed_uri_sans": "spiffe://cluster.local/ns/*",
            "require_cn": false,
            "use_csr_common_name": false,
            "key_type": "ec",
            "key_bits": 256,
            "key_usage": "DigitalSignature",
            "allow_ip_sans": false,
            "allow_localhost": false,
            "ttl": "1h",
            "max_ttl": "24h",
            "not_before_duration": "30s",
            "not_after_bound": "forbid",
            "basic_constraints_valid_for_non_ca": true,
        });
        for (key, value) in changes.as_object().into_iter().flatten() {
            role[key] = value.clone();
        }
        self.call("POST", &format!("{MESH}/roles/{ROLE}"), role)
            .await?;
        Ok(())
    }

    /// What the tokens of proxies may do.
    ///
    /// # Errors
    /// When the server refuses.
    pub async fn set_policy(&self, rules: &str) -> anyhow::Result<()> {
        let policy = json!({ "policy": rules });
        self.call("POST", "sys/policies/acl/culvert", policy)
            .await?;
        Ok(())
    }

    /// Sets up `approle`; the variables with which a proxy logs in.
    ///
    /// # Errors
    /// When the server refuses.
    pub async fn approle(&self) -> anyhow::Result<Vec<(String, String)>> {
        let pair = self.approle_pair().await?;
        let file = |name: &str, key: &str| self.file(name, pair[key].as_str().unwrap_or_default());
        Ok(variables([
            ("OPENBAO_AUTH_METHOD", "approle".to_owned()),
            ("OPENBAO_ROLE_ID_PATH", file("role-id", "role_id")?),
            ("OPENBAO_SECRET_ID_PATH", file("secret-id", "secret_id")?),
        ]))
    }

    /// Sets up `approle`; what a client logs in with.
    pub(super) async fn approle_pair(&self) -> anyhow::Result<Value> {
        self.call("POST", "sys/auth/approle", json!({ "type": "approle" }))
            .await?;
        let path = "auth/approle/role/node";
        let role = json!({ "token_policies": "culvert", "token_ttl": "1h" });
        self.call("POST", path, role).await?;
        let role_id = self
            .call("GET", &format!("{path}/role-id"), Value::Null)
            .await?;
        let made = self
            .call("POST", &format!("{path}/secret-id"), json!({}))
            .await?;
        let (role_id, secret_id) = (&role_id["data"]["role_id"], &made["data"]["secret_id"]);
        Ok(json!({ "role_id": role_id, "secret_id": secret_id }))
    }

    /// Ends all tokens that `approle` gave.
    ///
    /// # Errors
    /// When the server refuses.
    pub async fn revoke_tokens(&self) -> anyhow::Result<()> {
        let path = "sys/leases/revoke-prefix/auth/approle";
        self.call("PUT", path, json!({ "sync": true })).await?;
        Ok(())
    }

    /// Sets up `jwt` for the token of a service account; the variables with which a proxy logs in.
    ///
    /// # Errors
    /// When the server refuses.
    pub async fn jwt(&self) -> anyhow::Result<Vec<(String, String)>> {
        self.call("POST", "sys/auth/jwt", json!({ "type": "jwt" }))
            .await?;
        let key = KeyPair::generate()?;
        let config = json!({ "jwt_validation_pubkeys": [key.public_key_pem()] });
        self.call("POST", "auth/jwt/config", config).await?;
        let role = json!({
            "role_type": "jwt",
            "user_claim": "sub",
            "bound_audiences": "openbao",
            "bound_subject": ACCOUNT,
            "token_policies": "culvert",
            "token_type": "batch",
            "token_ttl": "1h",
        });
        self.call("POST", "auth/jwt/role/node", role).await?;
        Ok(variables([
            ("OPENBAO_AUTH_METHOD", "jwt".to_owned()),
            ("OPENBAO_AUTH_ROLE", "node".to_owned()),
            (
                "OPENBAO_JWT_PATH",
                self.file("jwt", &account_token(&key, NODE)?)?,
            ),
        ]))
    }

    /// A token in a file; the variables with which a proxy uses it.
    ///
    /// # Errors
    /// When the server refuses.
    pub async fn token(&self) -> anyhow::Result<Vec<(String, String)>> {
        let wish = json!({ "policies": ["culvert"], "ttl": "1h" });
        let made = self.call("POST", "auth/token/create", wish).await?;
        let token = made["auth"]["client_token"].as_str().context("no token")?;
        Ok(variables([
            ("OPENBAO_AUTH_METHOD", "token".to_owned()),
            ("OPENBAO_TOKEN_PATH", self.file("token", token)?),
        ]))
    }

    /// A certificate of [`ROLE`] for a foreign peer, with the intermediate that signed it and a key.
    ///
    /// # Errors
    /// When the server refuses.
    async fn identity(&self, id: &str) -> anyhow::Result<Identity> {
        let wish = json!({ "uri_sans": id, "private_key_format": "pkcs8" });
        let path = format!("{MESH}/issue/{ROLE}");
        let made = self.call("POST", &path, wish).await?;
        let der = |name: &str| -> anyhow::Result<Vec<u8>> {
            let text = made["data"][name].as_str().context("no PEM")?;
            Ok(pem::parse(text)?.into_contents())
        };
        Ok(Identity {
            chain: vec![der("certificate")?.into(), der("issuing_ca")?.into()],
            key: PrivatePkcs8KeyDer::from(der("private_key")?).into(),
        })
    }

    /// Has a foreign peer with a certificate of this server talk to an application in a captured pod, which presents one of
    /// the same intermediate.
    ///
    /// # Panics
    /// When it does not get through.
    pub async fn visit(&self, peer: &Pod, pod: &Pod, app: &Server) {
        let identity = self.identity(&peer.spiffe_id()).await.unwrap();
        let hello = Hello::new(&identity);
        let client = RawClient::connect(peer.netns(), pod.at(15008), &hello);
        let client = client.await.unwrap();
        assert_eq!(client.server_id, Some(pod.spiffe_id()));
        assert_eq!(client.server_chain[1..], identity.chain[1..]);
        let mut tunnel = client.tunnel(&app.address.to_string()).await.unwrap();
        tunnel.ping(b"hello").await.unwrap();
    }

    /// All certificates with a URI that [`MESH`] issued, in no order.
    ///
    /// # Errors
    /// When the server refuses.
    pub async fn issued(&self) -> anyhow::Result<Vec<Issued>> {
        let path = format!("{MESH}/certs?list=true");
        let (_, list) = self.try_call("GET", &path, &Value::Null).await?;
        let mut issued = Vec::new();
        for serial in list["data"]["keys"].as_array().into_iter().flatten() {
            let path = format!("{MESH}/cert/{}", serial.as_str().unwrap_or_default());
            let found = self.call("GET", &path, Value::Null).await?;
            let pem = found["data"]["certificate"].as_str().context("no PEM")?;
            issued.extend(read(pem)?);
        }
        Ok(issued)
    }

    /// Waits until an issuer of this name has signed `count` certificates for each of `ids` in all.
    ///
    /// # Panics
    /// When it has not within 25 seconds.
    pub async fn until_issued(&self, ids: &[String], issuer: &str, count: usize) {
        let what = format!("{count} certificates each from {issuer}");
        wait::until(Duration::from_secs(25), &what, async || {
            let issued = self.issued().await.ok()?;
            let enough = |id: &String| {
                let mine = |one: &&Issued| one.id == *id && one.issuer == issuer;
                issued.iter().filter(mine).count() >= count
            };
            ids.iter().all(enough).then_some(())
        })
        .await;
    }
}

fn read(pem: &str) -> anyhow::Result<Option<Issued>> {
    let der = pem::parse(pem)?.into_contents();
    let (_, certificate) = X509Certificate::from_der(&der)?;
    let names = certificate.subject_alternative_name()?;
    let id = names.and_then(|names| match names.value.general_names.as_slice() {
        [GeneralName::URI(uri)] => Some((*uri).to_owned()),
        _ => None,
    });
    let issuer = certificate.issuer().iter_common_name().next();
    let issuer = issuer
        .context("an issuer without a name")?
        .as_str()?
        .to_owned();
    Ok(id.map(|id| Issued { id, issuer }))
}

pub(super) fn variables<const N: usize>(pairs: [(&str, String); N]) -> Vec<(String, String)> {
    let owned = pairs.map(|(key, value)| (key.to_owned(), value));
    owned.into_iter().collect()
}

/// A token of the account of this namespace and name, as an API server signs it, good for an hour.
pub(super) fn account_token(
    key: &KeyPair,
    (namespace, name): (&str, &str),
) -> anyhow::Result<String> {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
    let claims = json!({
        "aud": ["openbao"],
        "exp": now.as_secs() + 3600,
        "iat": now.as_secs(),
        "iss": "https://kubernetes.default.svc",
        "kubernetes.io": {
            "namespace": namespace,
            "serviceaccount": { "name": name, "uid": "uid-1" },
        },
        "sub": format!("system:serviceaccount:{namespace}:{name}"),
    });
    let header = json!({ "alg": "ES256", "typ": "JWT" });
    let signed = format!(
        "{}.{}",
        base64(header.to_string().as_bytes()),
        base64(claims.to_string().as_bytes())
    );
    let signature = fixed_length(&key.sign(signed.as_bytes())?)?;
    Ok(format!("{signed}.{}", base64(&signature)))
}

/// The two numbers of a DER signature, 32 bytes each.
fn fixed_length(der: &[u8]) -> anyhow::Result<Vec<u8>> {
    let mut fixed = Vec::new();
    let mut rest = der.get(2..).context("no sequence")?;
    for _ in 0..2 {
        let length = usize::from(*rest.get(1).context("no length")?);
        let number = rest.get(2..2 + length).context("no number")?;
        let number = &number[number.len().saturating_sub(32)..];
        fixed.extend(std::iter::repeat_n(0, 32 - number.len()));
        fixed.extend_from_slice(number);
        rest = &rest[2 + length..];
    }
    Ok(fixed)
}

/// URL-safe and without padding.
fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let word = chunk
            .iter()
            .fold(0_u32, |word, byte| word << 8 | u32::from(*byte))
            << (8 * (3 - chunk.len()));
        for position in 0..=chunk.len() {
            let index = (word >> (18 - 6 * position)) & 63;
            text.push(char::from(ALPHABET[index as usize]));
        }
    }
    text
}

/// The account of a node's proxy.
pub(super) const NODE: (&str, &str) = ("istio-system", "ztunnel");
pub(super) const ACCOUNT: &str = "system:serviceaccount:istio-system:ztunnel";
