//! The scripts of `deploy/openbao`, run as an operator would, against a real OpenBao; then proxies with the settings of the overlay.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a panic is a failed test"
)]

use std::{fs, process::Command, sync::Arc, time::Duration};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use rcgen::{CertificateParams, DistinguishedName, KeyPair, SanType};
use serde_json::{Value, json};
use testkit::{
    Cluster, Mesh, Node, OpenBao, Pod, PodSpec, ProxyOptions, World,
    kubetools::{deployed, documents, kustomize, validate},
    openbao::{ApiServer, WorkloadAccounts},
    traffic::Behaviour,
    wait,
};

struct Stage {
    world: World,
    web: Arc<Pod>,
    api: Arc<Pod>,
    home: Arc<Pod>,
    bao: OpenBao,
}

impl Stage {
    async fn new() -> Self {
        let world = World::new(1).unwrap();
        let pod = |spec| world.node(0).pod(&spec).unwrap();
        let [web, api] = ["web", "api"].map(|name| pod(PodSpec::captured(name)));
        let home = pod(PodSpec::plain("openbao"));
        let bao = OpenBao::dev(&world, &home).await.unwrap();
        Self {
            world,
            web,
            api,
            home,
            bao,
        }
    }

    /// A file of the world.
    fn file(&self, name: &str, content: &str) -> String {
        let path = self.world.file(name);
        fs::write(&path, content).unwrap();
        path.display().to_string()
    }

    fn set_up(&self, variables: &[(&str, &str)]) {
        let script = deployed("openbao/setup.sh");
        self.bao.operate(&script, variables).unwrap();
    }
}

/// What the overlay tells the proxy of OpenBao.
fn overlay() -> Vec<(String, String)> {
    let built = kustomize(&deployed("manifests/overlays/openbao")).unwrap();
    let built = documents(&built).unwrap();
    let set = built.iter().find(|it| it["kind"] == "DaemonSet").unwrap();
    let env = &set["spec"]["template"]["spec"]["containers"][0]["env"];
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let env = env.as_array().unwrap().iter();
    env.map(|it| (text(&it["name"]), it["value"].clone()))
        .filter(|(name, _)| name.starts_with("OPENBAO_") || name == "CA_PROVIDER")
        .map(|(name, value)| (name, text(&value)))
        .collect()
}

/// A request for a certificate with one name, by which it is signed or not.
async fn signs(bao: &OpenBao, role: &str, name: SanType) -> bool {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![name];
    let csr = params.serialize_request(&KeyPair::generate().unwrap());
    let body = json!({ "csr": csr.unwrap().pem().unwrap() });
    let path = format!("pki-mesh/sign/{role}");
    let (status, _) = bao.try_call("POST", &path, &body).await.unwrap();
    status.is_success()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_with_the_overlay_gets_certificates_of_what_the_script_made() {
    let stage = Stage::new().await;
    let account = stage.bao.reviewed_account(&stage.world, &stage.home);
    let (token, _api) = account.unwrap();
    let token = stage.file("node-token", &token);
    let roots = stage.file("kubernetes-ca.pem", stage.world.authority().root_pem());
    let host = ApiServer::address(&stage.home);
    let variables = [
        ("KUBERNETES_HOST", &*host),
        ("KUBERNETES_CA", &roots),
        ("REVIEWER_JWT", &token),
    ];
    stage.set_up(&variables);
    let issuers = stage
        .bao
        .call("GET", "pki-mesh/issuers?list=true", Value::Null);
    let issuers = issuers.await.unwrap()["data"]["keys"].clone();
    stage.set_up(&variables);
    let again = stage
        .bao
        .call("GET", "pki-mesh/issuers?list=true", Value::Null);
    assert_eq!(again.await.unwrap()["data"]["keys"], issuers, "made once");

    let mesh = Mesh::of(&[&stage.web, &stage.api]);
    mesh.write(&ProxyOptions::mesh_file(&stage.world)).unwrap();
    let app = stage.api.serve(8080, Behaviour::Echo).unwrap();
    let options = |node: &Node| {
        let plain = ProxyOptions::new(&stage.world, node).env("FAKE_CA", "false");
        let overlaid = overlay().into_iter();
        let overlaid = overlaid.fold(plain, |options, (name, value)| options.env(&name, &value));
        overlaid
            .env(
                "OPENBAO_ADDRESS",
                &format!("https://{}", stage.bao.address()),
            )
            .env(
                "OPENBAO_ROOT_CA",
                &stage.bao.root_file().display().to_string(),
            )
            .env("OPENBAO_JWT_PATH", &token)
    };
    let cluster = Cluster::run(&stage.world, options, &[&stage.web, &stage.api]).await;
    let cluster = cluster.unwrap_or_else(|error| panic!("{error:#}\n{}", stage.bao.log()));
    let talks = async || stage.web.ask(app.address, b"hello").await.ok();
    wait::until(Duration::from_secs(20), "the pods talk", talks).await;
    let line = cluster.proxy(0).log().wait("the flow is told", |line| {
        line.is_access("connection complete") && line.field("error").is_empty()
    });
    assert_eq!(line.await.field("src.identity"), stage.web.spiffe_id());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_workload_signs_for_itself_where_the_script_was_told_so() {
    let stage = Stage::new().await;
    let accounts = WorkloadAccounts::start(&stage.world, &stage.home, "shop").unwrap();
    let keys = stage.file("keys.pem", &accounts.public_key_pem());
    stage.set_up(&[("LOGIN", "workload"), ("JWT_KEYS", &keys)]);
    let [web, api] = [stage.web.spiffe_id(), stage.api.spiffe_id()];
    assert!(
        accounts
            .may_sign(&stage.bao, &stage.web, &web)
            .await
            .unwrap()
    );
    assert!(
        !accounts
            .may_sign(&stage.bao, &stage.web, &api)
            .await
            .unwrap()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_role_of_cert_manager_signs_for_the_mesh_and_no_other_name() {
    let stage = Stage::new().await;
    let account = stage.bao.reviewed_account(&stage.world, &stage.home);
    let (token, _api) = account.unwrap();
    let token = stage.file("node-token", &token);
    let roots = stage.file("kubernetes-ca.pem", stage.world.authority().root_pem());
    stage.set_up(&[
        ("LOGIN", "cert-manager"),
        ("KUBERNETES_HOST", &ApiServer::address(&stage.home)),
        ("KUBERNETES_CA", &roots),
        ("REVIEWER_JWT", &token),
    ]);
    let uri = |text: &str| SanType::URI(text.try_into().unwrap());
    let dns = |text: &str| SanType::DnsName(text.try_into().unwrap());
    for (name, signed) in [
        (uri("spiffe://cluster.local/ns/shop/sa/web"), true),
        (uri("spiffe://elsewhere/ns/shop/sa/web"), false),
        (dns("istiod.istio-system.svc"), true),
        (dns("cert-manager-istio-csr.cert-manager.svc"), true),
        (dns("evil.istiod.istio-system.svc"), false),
    ] {
        let what = format!("{name:?}");
        assert_eq!(
            signs(&stage.bao, "cert-manager", name).await,
            signed,
            "{what}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn istiod_becomes_an_authority_below_the_root() {
    let stage = Stage::new().await;
    stage.set_up(&[("LOGIN", "none")]);
    let secret = stage
        .bao
        .operate(&deployed("openbao/cacerts.sh"), &[])
        .unwrap();
    assert_eq!(validate(&secret).unwrap(), 1);
    let secret = &documents(&secret).unwrap()[0];
    assert_eq!(secret["metadata"]["name"], "cacerts");
    let data = secret["data"].as_object().unwrap();
    let part = |name: &str| {
        let text = BASE64_STANDARD
            .decode(data[name].as_str().unwrap())
            .unwrap();
        stage.file(name, &String::from_utf8(text).unwrap())
    };
    let openssl = |arguments: &[&str]| {
        let output = Command::new("openssl").args(arguments).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let [root, certificate] = ["root-cert.pem", "ca-cert.pem"].map(part);
    openssl(&["verify", "-CAfile", &root, &certificate]);
    openssl(&["verify", "-CAfile", &root, &part("cert-chain.pem")]);
    let text = openssl(&["x509", "-in", &certificate, "-noout", "-text"]);
    assert!(text.contains("CA:TRUE, pathlen:0"), "{text}");
    let of_key = openssl(&["pkey", "-in", &part("ca-key.pem"), "-pubout"]);
    let of_certificate = openssl(&["x509", "-in", &certificate, "-noout", "-pubkey"]);
    assert_eq!(of_key, of_certificate);
}
