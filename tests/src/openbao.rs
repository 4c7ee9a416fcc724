//! A real OpenBao server in a pod, and what an operator does with it over its API.
//!
//! Its program comes from PyPI, once for all working copies: see `.ci/openbao`.

mod api;
mod issuer;
mod kubernetes;
mod pki;

pub use issuer::Issuer;
pub use kubernetes::{ApiServer, WorkloadAccounts};
pub use pki::{Issued, MESH, ROLE, ROOT};

use std::{
    fs,
    net::SocketAddr,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep},
};

use crate::{
    logs::Log,
    program,
    proxy::ProxyOptions,
    sys::{self, Running},
    world::{Pod, World},
};
use api::{Endpoint, LIMIT};

/// A running server. Dropping it kills it.
#[derive(Debug)]
pub struct OpenBao {
    endpoint: Endpoint,
    root_file: PathBuf,
    directory: PathBuf,
    root_token: String,
    unseal_key: Option<String>,
    log: Log,
    _running: Running,
    _readers: JoinSet<()>,
}

impl OpenBao {
    /// A server that keeps everything in memory, as `bao server -dev` does; also reached over TLS, at the pod's address.
    ///
    /// # Errors
    /// When it cannot be fetched or does not start.
    pub async fn dev(world: &World, home: &Pod) -> anyhow::Result<Self> {
        let mut server = Self::start(world, home, "", |command, _| {
            command.args(["-dev", "-dev-no-store-token", "-dev-root-token-id=root"]);
            command.arg("-dev-listen-address=127.0.0.1:8202");
        })?;
        server.root_token = "root".to_owned();
        server.active().await?;
        Ok(server)
    }

    /// A server that keeps everything on disk, initialised and unsealed.
    ///
    /// # Errors
    /// As [`OpenBao::dev`].
    pub async fn sealable(world: &World, home: &Pod) -> anyhow::Result<Self> {
        let data = world.file("openbao-data");
        fs::create_dir_all(&data)?;
        let address = |port| format!("https://{}", home.at(port));
        let config = format!(
            "api_addr = \"{}\"\ncluster_addr = \"{}\"\nstorage \"raft\" {{\n  path = \"{}\"\n  node_id = \"one\"\n  \
             performance_multiplier = 1\n}}\n",
            address(PORT),
            address(PORT + 1),
            data.display()
        );
        let mut server = Self::start(world, home, &config, |_, _| {})?;
        server.answers().await?;
        let shares = json!({ "secret_shares": 1, "secret_threshold": 1 });
        let init = server.call("POST", "sys/init", shares).await?;
        let text = |value: &Value| value.as_str().map(str::to_owned).context("sys/init");
        server.root_token = text(&init["root_token"])?;
        server.unseal_key = Some(text(&init["keys"][0])?);
        server.unseal().await?;
        Ok(server)
    }

    fn start(
        world: &World,
        home: &Pod,
        config: &str,
        more: impl FnOnce(&mut Command, &Path),
    ) -> anyhow::Result<Self> {
        let address = home.at(PORT);
        let names = [address.ip().to_string()];
        let identity = world.authority().issue_server(&names)?;
        let file = |name: &str, content: &str| -> anyhow::Result<PathBuf> {
            let path = world.file(&format!("openbao-{name}"));
            fs::write(&path, content).with_context(|| path.display().to_string())?;
            Ok(path)
        };
        let pem = |tag, der: &[u8]| pem::encode(&pem::Pem::new(tag, der));
        let certificate = file("cert.pem", &pem("CERTIFICATE", &identity.chain[0]))?;
        let key = file("key.pem", &pem("PRIVATE KEY", identity.key.secret_der()))?;
        let root_file = file("ca.pem", world.authority().root_pem())?;
        let listener = format!(
            "{config}listener \"tcp\" {{\n  address = \"{address}\"\n  tls_cert_file = \"{}\"\n  tls_key_file = \"{}\"\n}}\n",
            certificate.display(),
            key.display()
        );
        let config = file("config.hcl", &listener)?;
        let mut command = Command::new(program::fetched("openbao")?);
        command.arg("server").arg("-config").arg(&config);
        more(&mut command, &config);
        command.env("HOME", world.directory()).current_dir("/");
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut running = home.netns().spawn(command)?;
        let (log, readers) = Log::of(&mut running.child)?;
        Ok(Self {
            endpoint: Endpoint {
                from: home.netns().duplicate()?,
                server: address,
                tls: api::trusting(world.authority().root())?,
            },
            root_file,
            directory: world.directory().to_owned(),
            root_token: String::new(),
            unseal_key: None,
            log,
            _running: running,
            _readers: readers,
        })
    }

    /// Makes a call with the root token; the body of a successful answer.
    ///
    /// # Errors
    /// When there is another answer, or none.
    pub async fn call(&self, method: &str, path: &str, body: Value) -> anyhow::Result<Value> {
        let (status, answer) = self.try_call(method, path, &body).await?;
        ensure!(status.is_success(), "{method} {path}: {status} {answer}");
        Ok(answer)
    }

    /// Makes a call with the root token, whatever the answer.
    ///
    /// # Errors
    /// When there is none.
    pub async fn try_call(
        &self,
        method: &str,
        path: &str,
        body: &Value,
    ) -> anyhow::Result<(http::StatusCode, Value)> {
        self.endpoint
            .call((method, path), &self.root_token, body)
            .await
    }

    /// Seals it: every call is refused with 503 from now on.
    ///
    /// # Errors
    /// When it refuses.
    pub async fn seal(&self) -> anyhow::Result<()> {
        self.call("POST", "sys/seal", Value::Null).await?;
        Ok(())
    }

    /// Unseals it and waits until it is in charge.
    ///
    /// # Errors
    /// When it does not become so.
    pub async fn unseal(&self) -> anyhow::Result<()> {
        let key = json!({ "key": self.unseal_key });
        self.call("POST", "sys/unseal", key).await?;
        self.active().await
    }

    /// Runs a script of an operator, who is root and knows the server by the variables of `bao`; what it prints.
    ///
    /// # Errors
    /// When it fails; its standard error is in the text.
    pub fn operate(&self, script: &Path, variables: &[(&str, &str)]) -> anyhow::Result<String> {
        let bao = program::fetched("openbao")?;
        let directory = bao.parent().context("no directory")?.display();
        let mut command = Command::new("bash");
        command.arg(script).envs(variables.iter().copied());
        command
            .env("PATH", format!("{directory}:{}", sys::tools()))
            .env("HOME", &self.directory)
            .env("BAO_ADDR", format!("https://{}", self.address()))
            .env("BAO_CACERT", &self.root_file)
            .env("BAO_TOKEN", &self.root_token);
        let output = self.endpoint.from.run(|| command.output())?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{}: {said}", script.display());
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Where it is reached over TLS.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.endpoint.server
    }

    /// Who signed its certificate, as a PEM file.
    #[must_use]
    pub fn root_file(&self) -> &Path {
        &self.root_file
    }

    /// The end of what it wrote.
    #[must_use]
    pub fn log(&self) -> String {
        self.log.tail(30)
    }

    /// Has a proxy get its certificates from [`ROLE`]; `login` are the variables of one login.
    #[must_use]
    pub fn certify(&self, options: ProxyOptions, login: &[(String, String)]) -> ProxyOptions {
        let options = options
            .env("FAKE_CA", "false")
            .env("CA_PROVIDER", "openbao")
            .env("OPENBAO_ADDRESS", &format!("https://{}", self.address()))
            .env("OPENBAO_ROOT_CA", &self.root_file.display().to_string())
            .env("OPENBAO_MOUNT", MESH)
            .env("OPENBAO_ROOT_MOUNTS", ROOT)
            .env("OPENBAO_ROLE", ROLE)
            .env("OPENBAO_POLL_INTERVAL", "1s");
        let set = |options: ProxyOptions, (key, value): &(String, String)| options.env(key, value);
        login.iter().fold(options, set)
    }

    /// Writes a file that goes with the world.
    fn file(&self, name: &str, content: &str) -> anyhow::Result<String> {
        let path = self.directory.join(format!("openbao-{name}"));
        fs::write(&path, content)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
        Ok(path.display().to_string())
    }

    /// Waits until it says anything at all.
    async fn answers(&self) -> anyhow::Result<()> {
        self.health(|_| true).await
    }

    async fn active(&self) -> anyhow::Result<()> {
        self.health(|status| status == http::StatusCode::OK).await
    }

    async fn health(&self, enough: impl Fn(http::StatusCode) -> bool) -> anyhow::Result<()> {
        let end = Instant::now() + LIMIT;
        loop {
            let answer = self.try_call("GET", "sys/health", &Value::Null).await;
            if answer.as_ref().is_ok_and(|(status, _)| enough(*status)) {
                return Ok(());
            }
            ensure!(Instant::now() < end, "{answer:?}; {}", self.log());
            sleep(Duration::from_millis(50)).await;
        }
    }
}

const PORT: u16 = 8200;
