//! The example, as its documentation tells to run it, against a real OpenBao.
#![expect(clippy::unwrap_used, reason = "a test may fail wherever it does")]

use std::{
    env, fs,
    net::{Ipv4Addr, TcpListener},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use tokio::time::{Instant, sleep};

/// A server in memory, over TLS, and its command line.
struct OpenBao {
    program: PathBuf,
    address: String,
    directory: tempfile::TempDir,
    process: Child,
}

impl OpenBao {
    async fn start() -> Self {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.ci/openbao");
        let output = Command::new(script).stderr(Stdio::inherit()).output();
        let program = String::from_utf8(output.unwrap().stdout).unwrap();
        let program = PathBuf::from(program.trim());
        let directory = tempfile::tempdir().unwrap();
        let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let at = free.local_addr().unwrap();
        drop(free);
        let process = Command::new(&program)
            .args([
                "server",
                "-dev",
                "-dev-no-store-token",
                "-dev-root-token-id=root",
            ])
            .arg(format!("-dev-listen-address={at}"))
            .arg("-dev-tls")
            .arg(format!("-dev-tls-cert-dir={}", directory.path().display()))
            .env("HOME", directory.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let server = Self {
            program,
            address: format!("https://{at}"),
            directory,
            process: process.unwrap(),
        };
        let start = Instant::now();
        while !server.call(&["status"]) {
            assert!(
                start.elapsed() < Duration::from_secs(30),
                "it does not start"
            );
            sleep(Duration::from_millis(100)).await;
        }
        server
    }

    fn root_file(&self) -> PathBuf {
        self.directory.path().join("vault-ca.pem")
    }

    /// Whether `bao` does what it is told.
    fn call(&self, arguments: &[&str]) -> bool {
        let mut command = Command::new(&self.program);
        command
            .args(arguments)
            .env("BAO_ADDR", &self.address)
            .env("BAO_CACERT", self.root_file())
            .env("BAO_TOKEN", "root")
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        command.status().unwrap().success()
    }
}

impl Drop for OpenBao {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Cargo builds examples along with tests.
fn example() -> PathBuf {
    let tests = env::current_exe().unwrap();
    let profile = tests.ancestors().nth(2).unwrap();
    profile.join("examples/openbao")
}

#[tokio::test]
async fn the_example_prints_a_certificate_of_openbao() {
    let server = OpenBao::start().await;
    for call in [
        &["secrets", "enable", "pki"][..],
        &[
            "write",
            "pki/root/generate/internal",
            "common_name=root",
            "key_type=ec",
        ],
        &[
            "write",
            "pki/roles/workload",
            "allowed_uri_sans=spiffe://cluster.local/ns/*",
            "require_cn=false",
            "key_type=ec",
            "ttl=1h",
        ],
    ] {
        assert!(server.call(call), "{call:?}");
    }
    let token = server.directory.path().join("token");
    fs::write(&token, "root\n").unwrap();
    let id = "spiffe://cluster.local/ns/shop/sa/web";
    let output = Command::new(example())
        .arg(&server.address)
        .args([&server.root_file(), &token])
        .arg(id)
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
    // A day, which the role allows, and what the server takes off for skew.
    assert!(text.starts_with(&format!("{id} for 86430s")), "{text}");
    let certificates = text.matches("BEGIN CERTIFICATE").count();
    assert_eq!(certificates, 2, "the leaf and the root: {text}");
    assert!(!text.contains("PRIVATE"), "{text}");
}
