//! What `deploy` holds beside the chart: in step with it, and valid.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a panic is a failed test"
)]

use std::{
    collections::BTreeMap,
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::{Value, json};
use testkit::kubetools::{deployed, documents, helm, kustomize, validate};

/// The files of a directory below `deploy`, by name.
fn files(directory: &str) -> BTreeMap<String, String> {
    let entries = fs::read_dir(deployed(directory)).unwrap();
    let paths = entries.map(|it| it.unwrap().path());
    let yaml = paths.filter(|path| path.extension().is_some_and(|it| it == "yaml"));
    let read = |path: PathBuf| {
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        (name, fs::read_to_string(path).unwrap())
    };
    yaml.map(read).collect()
}

/// Documents by kind and name. Order counts in no list that has names.
fn sorted(text: &str) -> BTreeMap<String, Value> {
    fn sort(value: &mut Value) {
        match value {
            Value::Array(list) => {
                list.iter_mut().for_each(sort);
                if list.iter().all(|it| it["name"].is_string()) {
                    list.sort_by_key(|it| it["name"].to_string());
                }
            }
            Value::Object(map) => map.values_mut().for_each(sort),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
        }
    }
    let documents = documents(text).unwrap().into_iter().map(|mut document| {
        sort(&mut document);
        let name = format!("{} {}", document["kind"], document["metadata"]["name"]);
        (name, document)
    });
    documents.collect()
}

fn rendered(directory: &Path) -> String {
    let values = directory.join("values.yaml");
    helm(&["-f", values.to_str().unwrap()]).unwrap()
}

#[test]
fn the_base_is_what_the_chart_renders() {
    let base = deployed("manifests/base");
    let kept = fs::read_to_string(base.join("culvert.yaml")).unwrap();
    assert_eq!(kept, rendered(&base), "run `make manifests`");
}

#[test]
fn overlays_are_what_the_chart_renders_with_their_values() {
    let entries = fs::read_dir(deployed("manifests/overlays")).unwrap();
    let overlays: Vec<_> = entries.map(|it| it.unwrap().path()).collect();
    assert_eq!(overlays.len(), 4);
    let mut all = Vec::new();
    for overlay in overlays {
        let built = kustomize(&overlay).unwrap();
        all.push(built.clone());
        let mut built = sorted(&built);
        if overlay.ends_with("talos") {
            let namespace = built.remove("\"Namespace\" \"istio-system\"").unwrap();
            let level = &namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"];
            assert_eq!(level, "privileged");
        }
        assert_eq!(built, sorted(&rendered(&overlay)), "{}", overlay.display());
    }
    validate(&all.join("\n---\n")).unwrap();
}

#[test]
fn manifests_are_valid() {
    let mut all = Vec::new();
    for directory in ["argocd", "kind", "mesh"] {
        all.extend(files(directory).into_values());
    }
    for file in ["istio/issuer-openbao.yaml", "prometheus/podmonitor.yaml"] {
        all.push(fs::read_to_string(deployed(file)).unwrap());
    }
    let count = validate(&all.join("\n---\n")).unwrap();
    assert!(count > all.len(), "{count}");
}

#[test]
fn what_is_no_manifest_is_not_valid() {
    let pod = |spec: Value| json!({ "apiVersion": "v1", "kind": "Pod", "metadata": { "name": "a" }, "spec": spec });
    let good = json!({ "containers": [{ "name": "a", "image": "b" }] });
    assert_eq!(validate(&pod(good).to_string()).unwrap(), 1);
    let strange = json!({ "apiVersion": "v1", "kind": "Toaster", "metadata": { "name": "a" } });
    let lax = json!({ "apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication", "metadata": { "name": "a" }, "spec": { "mtls": { "mode": "LAX" } } });
    for bad in [pod(json!({ "containers": [{ "nam": "a" }] })), strange, lax] {
        assert!(validate(&bad.to_string()).is_err(), "{bad}");
    }
}

#[test]
fn applications_come_in_the_order_in_which_they_need_each_other() {
    let applications = files("argocd");
    let wave = |name: &str| {
        let application = &documents(&applications[&format!("{name}.yaml")]).unwrap()[0];
        assert_eq!(application["metadata"]["name"], name);
        let wave = application["metadata"]["annotations"]["argocd.argoproj.io/sync-wave"].as_str();
        wave.unwrap().parse::<u8>().unwrap()
    };
    let waves = ["istio-base", "istio-cni", "istiod", "culvert", "mesh"].map(wave);
    assert_eq!(waves, [2, 2, 3, 4, 5]);
    for text in applications.values() {
        let application = &documents(text).unwrap()[0];
        let sources = application["spec"]["sources"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        for source in sources.iter().chain([&application["spec"]["source"]]) {
            for file in source["helm"]["valueFiles"]
                .as_array()
                .into_iter()
                .flatten()
            {
                let file = file
                    .as_str()
                    .unwrap()
                    .trim_start_matches("$culvert/deploy/");
                assert!(deployed(file).exists(), "{file}");
            }
            if let Some(path) = source["path"].as_str() {
                let path = path.trim_start_matches("deploy/");
                assert!(deployed(path).is_dir(), "{path}");
            }
        }
    }
}

#[test]
fn the_application_of_the_proxy_renders() {
    let application = &documents(&files("argocd")["culvert.yaml"]).unwrap()[0];
    let values = application["spec"]["source"]["helm"]["valuesObject"].to_string();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("values.json");
    fs::write(&file, values).unwrap();
    let text = helm(&["-f", file.to_str().unwrap()]).unwrap();
    validate(&text).unwrap();
    assert!(
        text.contains("image: \"registry.example/mesh/culvert:"),
        "{text}"
    );
}

/// An image of these programs by architecture, each of them a file in `directory`.
fn assembled(directory: &Path, archive: &str, architectures: &[&str]) -> Vec<u8> {
    let archive = directory.join(archive);
    let program = |arch: &&str| format!("{arch}={}", directory.join(arch).display());
    let done = Command::new(deployed("image/assemble"))
        .arg(&archive)
        .args(architectures.iter().map(program))
        .envs([("REVISION", "r"), ("SOURCE_DATE_EPOCH", "1700000000")])
        .output()
        .unwrap();
    assert!(done.status.success(), "{done:?}");
    fs::read(archive).unwrap()
}

#[test]
fn the_same_programs_make_the_same_image() {
    let [here, there] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let both = ["amd64", "arm64"];
    for (directory, mode) in [(&here, 0o700), (&there, 0o644)] {
        for arch in both {
            let program = directory.path().join(arch);
            fs::write(&program, arch).unwrap();
            fs::set_permissions(program, Permissions::from_mode(mode)).unwrap();
        }
    }
    for architectures in [&both[..1], &both] {
        let [one, other] =
            [&here, &there].map(|it| assembled(it.path(), "image.tar", architectures));
        assert!(one == other, "{architectures:?}");
    }
    let amd64 = assembled(here.path(), "image.tar", &both[..1]);
    let arm64 = assembled(here.path(), "other.tar", &both[1..]);
    assert!(amd64 != arm64);
}

#[test]
fn an_image_names_each_of_its_parts_by_what_is_in_it() {
    let directory = tempfile::tempdir().unwrap();
    let both = ["amd64", "arm64"];
    for arch in both {
        fs::write(directory.path().join(arch), arch).unwrap();
    }
    assembled(directory.path(), "image.tar", &both);
    let run = |program: &str, arguments: &[&str]| {
        let mut command = Command::new(program);
        let done = command.args(arguments).current_dir(directory.path());
        let output = done.output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    run("tar", &["-xf", "image.tar"]);
    let blobs = directory.path().join("blobs/sha256");
    for blob in fs::read_dir(&blobs).unwrap() {
        let blob = blob.unwrap().path();
        let sum = run("sha256sum", &[blob.to_str().unwrap()]);
        let name = blob.file_name().unwrap().to_str().unwrap();
        assert!(sum.starts_with(name), "{sum}");
    }
    let read = |path: &Path| serde_json::from_slice::<Value>(&fs::read(path).unwrap()).unwrap();
    let blob = |described: &Value| {
        let digest = described["digest"].as_str().unwrap();
        let path = blobs.join(digest.strip_prefix("sha256:").unwrap());
        assert_eq!(described["size"], fs::metadata(&path).unwrap().len());
        path
    };
    // Programs that copy images want one entry, which may be the list of the architectures.
    let index = read(&directory.path().join("index.json"));
    assert_eq!(index["manifests"].as_array().unwrap().len(), 1);
    let images = read(&blob(&index["manifests"][0]));
    for (image, arch) in images["manifests"].as_array().unwrap().iter().zip(both) {
        assert_eq!(image["platform"]["architecture"], arch);
        let manifest = read(&blob(image));
        assert_eq!(read(&blob(&manifest["config"]))["architecture"], arch);
        let layer = blob(&manifest["layers"][0]);
        let said = run(
            "tar",
            &["-xzOf", layer.to_str().unwrap(), "./usr/local/bin/culvert"],
        );
        assert_eq!(said, arch);
    }
}
