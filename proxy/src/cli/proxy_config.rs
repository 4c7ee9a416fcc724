//! The layers below the variables: `defaultConfig` of the mesh configuration file, and the
//! `PROXY_CONFIG` variable. Later wins, key by key; unknown keys are ignored.

use std::{collections::BTreeMap, io, path::Path};

use serde_yaml_ng::Value;

use super::{fault::Given, reader::Reader, value::Reject};

/// What both layers say together.
#[derive(Debug, Default)]
pub(super) struct ProxyConfig {
    pub(super) discovery_address: Option<Setting>,
    pub(super) admin_port: Option<u16>,
    pub(super) stats_port: Option<u16>,
    /// Worker threads; 0 for one per core.
    pub(super) concurrency: Option<u16>,
    /// `proxyMetadata`, `ISTIO_META_` stripped.
    pub(super) metadata: BTreeMap<String, String>,
}

/// A value with the place it comes from, for a fault that is found later.
#[derive(Debug)]
pub(super) struct Setting {
    pub(super) key: String,
    pub(super) value: String,
}

/// Reads both layers.
pub(super) fn load(reader: &mut Reader<'_>) -> ProxyConfig {
    let mut layers = ProxyConfig::default();
    if let Some(mesh) = mesh_config(reader)
        && let Some(default) = mesh.get("defaultConfig").filter(|value| !value.is_null())
    {
        let source = format!("{MESH_CONFIG}: defaultConfig");
        layers.apply(reader, &source, default);
    }
    if let Some(text) = reader.text(PROXY_CONFIG)
        && let Some(document) = document(reader, PROXY_CONFIG, text)
    {
        layers.apply(reader, PROXY_CONFIG, &document);
    }
    layers
}

fn mesh_config(reader: &mut Reader<'_>) -> Option<Value> {
    match reader.environment().files().read(Path::new(MESH_CONFIG)) {
        Ok(text) => document(reader, MESH_CONFIG, &text),
        Err(error) if absent(&error) => None,
        Err(error) => {
            let reject = Reject::new(
                format!("cannot be read: {error}"),
                "a readable YAML file, or none",
            );
            reader.fault(MESH_CONFIG, Given::Nothing, reject);
            None
        }
    }
}

fn absent(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
    )
}

/// A YAML mapping; an empty document says nothing. The text is not repeated in faults: it may
/// hold secrets.
fn document(reader: &mut Reader<'_>, source: &str, text: &str) -> Option<Value> {
    let reason = match serde_yaml_ng::from_str(text) {
        Ok(Value::Null) => return None,
        Ok(value @ Value::Mapping(_)) => return Some(value),
        Ok(_) => "not a mapping".to_owned(),
        Err(error) => format!("malformed YAML{}", position(&error)),
    };
    let reject = Reject::new(reason, "a YAML or JSON mapping");
    reader.fault(source, Given::Nothing, reject);
    None
}

fn position(error: &serde_yaml_ng::Error) -> String {
    error.location().map_or_else(String::new, |at| {
        format!(" at line {} column {}", at.line(), at.column())
    })
}

impl ProxyConfig {
    fn apply(&mut self, reader: &mut Reader<'_>, source: &str, document: &Value) {
        if !document.is_mapping() {
            let reject = Reject::new("not a mapping", "a YAML or JSON mapping");
            return reader.fault(source, Given::Nothing, reject);
        }
        let mut layer = Layer {
            reader,
            source,
            document,
        };
        if let Some(address) = layer.text("discoveryAddress") {
            self.discovery_address = Some(address);
        }
        self.admin_port = layer.port("proxyAdminPort").or(self.admin_port);
        self.stats_port = layer.port("statsPort").or(self.stats_port);
        self.concurrency = layer.integer("concurrency").or(self.concurrency);
        self.metadata.extend(layer.metadata());
    }
}

/// One document, read key by key.
struct Layer<'r, 'e, 'd> {
    reader: &'r mut Reader<'e>,
    source: &'d str,
    document: &'d Value,
}

impl<'d> Layer<'_, '_, 'd> {
    fn get(&self, key: &str) -> Option<&'d Value> {
        self.document.get(key).filter(|value| !value.is_null())
    }

    fn fault(&mut self, key: &str, given: Given, accepted: &str) {
        let key = format!("{}: {key}", self.source);
        let reject = Reject::new("wrong type or out of range", accepted);
        self.reader.fault(&key, given, reject);
    }

    fn text(&mut self, key: &str) -> Option<Setting> {
        let Some(value) = scalar(self.get(key)?) else {
            self.fault(key, Given::Nothing, "a string");
            return None;
        };
        (!value.is_empty()).then(|| Setting {
            key: format!("{}: {key}", self.source),
            value,
        })
    }

    fn integer(&mut self, key: &str) -> Option<u16> {
        let value = self.get(key)?;
        let number = number(value);
        if number.is_none() {
            let given = scalar(value).map_or(Given::Nothing, Given::Value);
            self.fault(key, given, "an integer from 0 to 65535");
        }
        number
    }

    /// A port on which a server of the process itself may listen.
    fn port(&mut self, key: &str) -> Option<u16> {
        let value = self.get(key)?;
        let port = number(value).filter(|port| *port > 0 && !TAKEN.contains(port));
        if port.is_none() {
            let given = scalar(value).map_or(Given::Nothing, Given::Value);
            let accepted = format!("a port from 1 to 65535, but for those of the mesh: {TAKEN:?}");
            self.fault(key, given, &accepted);
        }
        port
    }

    /// `proxyMetadata`. Values may be any scalar; the whole key may be missing.
    fn metadata(&mut self) -> BTreeMap<String, String> {
        let Some(value) = self.get("proxyMetadata") else {
            return BTreeMap::new();
        };
        let Some(entries) = value.as_mapping() else {
            self.fault("proxyMetadata", Given::Nothing, "a mapping of strings");
            return BTreeMap::new();
        };
        let mut metadata = BTreeMap::new();
        for (name, value) in entries.iter().filter(|(_, value)| !value.is_null()) {
            match (scalar(name), scalar(value)) {
                (Some(name), Some(value)) => {
                    let name = name.strip_prefix(META_PREFIX).unwrap_or(&name).to_owned();
                    metadata.insert(name, value);
                }
                (name, _) => {
                    let key = format!("proxyMetadata.{}", name.unwrap_or_default());
                    self.fault(&key, Given::Nothing, "a string, number or boolean");
                }
            }
        }
        metadata
    }
}

fn number(value: &Value) -> Option<u16> {
    value.as_u64().and_then(|n| u16::try_from(n).ok())
}

/// A string, or a number or boolean in its YAML form.
fn scalar(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(flag) => Some(flag.to_string()),
        Value::Null | Value::Sequence(_) | Value::Mapping(_) | Value::Tagged(_) => None,
    }
}

/// Prefix of node metadata, in `proxyMetadata` and among the variables.
pub(super) const META_PREFIX: &str = "ISTIO_META_";
/// Absolute: where the process was started must not matter.
pub(super) const MESH_CONFIG: &str = "/etc/istio/config/mesh";
/// Ports that other servers of the process have, or that mean something else everywhere in the mesh.
const TAKEN: [u16; 6] = [15_001, 15_006, 15_008, 15_021, 15_053, 15_080];
const PROXY_CONFIG: &str = "PROXY_CONFIG";
