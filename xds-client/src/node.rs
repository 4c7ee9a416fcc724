//! Who asks: the node message that opens a stream. istiod parses it strictly.

use std::collections::BTreeMap;

use prost_types::{ListValue, Struct, Value, value::Kind};

use crate::proto::discovery::Node;

/// The facts that a node proxy tells about itself.
#[derive(Debug, Clone, Default)]
pub struct NodeFacts {
    /// Name of the pod that the proxy runs in.
    pub pod_name: String,
    /// Its namespace; the control plane holds it against that of the token.
    pub pod_namespace: String,
    /// An address of the node proxy, in text.
    pub instance_ip: String,
    /// The Kubernetes node, if known.
    pub node_name: Option<String>,
    /// Metadata of text values. They go before the facts above.
    pub metadata: BTreeMap<String, String>,
    /// Metadata of any values. They go before all others.
    pub json_metadata: BTreeMap<String, serde_json::Value>,
}

impl NodeFacts {
    /// The message that the first request of each kind carries.
    #[must_use]
    pub fn to_node(&self) -> Node {
        let (pod, namespace) = (&self.pod_name, &self.pod_namespace);
        let id = format!(
            "ztunnel~{}~{pod}.{namespace}~{namespace}.svc.cluster.local",
            self.instance_ip
        );
        let text = |value: &str| Kind::StringValue(value.into());
        let mut fields = BTreeMap::from([
            ("NAME".to_owned(), text(pod)),
            ("NAMESPACE".to_owned(), text(namespace)),
            ("INSTANCE_IPS".to_owned(), text(&self.instance_ip)),
        ]);
        if let Some(name) = &self.node_name {
            fields.insert("NODE_NAME".to_owned(), text(name));
        }
        for (key, value) in &self.metadata {
            fields.insert(key.clone(), text(value));
        }
        for (key, value) in &self.json_metadata {
            fields.insert(key.clone(), json(value));
        }
        let fields = fields.into_iter().map(|(key, kind)| (key, value(kind)));
        Node {
            id,
            cluster: String::new(),
            metadata: Some(Struct {
                fields: fields.collect(),
            }),
        }
    }
}

fn value(kind: Kind) -> Value {
    Value { kind: Some(kind) }
}

fn json(given: &serde_json::Value) -> Kind {
    use serde_json::Value as Json;
    match given {
        Json::Null => Kind::NullValue(0),
        Json::Bool(yes) => Kind::BoolValue(*yes),
        // Struct knows no other numbers; those beyond its precision are rounded, as everywhere in JSON.
        Json::Number(number) => Kind::NumberValue(number.as_f64().unwrap_or_default()),
        Json::String(text) => Kind::StringValue(text.clone()),
        Json::Array(values) => Kind::ListValue(ListValue {
            values: values.iter().map(json).map(value).collect(),
        }),
        Json::Object(fields) => {
            let fields = fields.iter();
            Kind::StructValue(Struct {
                fields: fields
                    .map(|(key, field)| (key.clone(), value(json(field))))
                    .collect(),
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn facts() -> NodeFacts {
        NodeFacts {
            pod_name: "zt-x7".into(),
            pod_namespace: "istio-system".into(),
            instance_ip: "10.1.0.9".into(),
            node_name: Some("n1".into()),
            ..NodeFacts::default()
        }
    }

    fn field(node: &Node, key: &str) -> Kind {
        let fields = &node.metadata.as_ref().unwrap().fields;
        fields[key].kind.clone().unwrap()
    }

    #[test]
    fn the_id_has_four_parts() {
        let node = facts().to_node();
        assert_eq!(
            node.id,
            "ztunnel~10.1.0.9~zt-x7.istio-system~istio-system.svc.cluster.local"
        );
        assert_eq!(NodeFacts::default().to_node().id.split('~').count(), 4);
    }

    #[test]
    fn addresses_are_one_text() {
        let ips = field(&facts().to_node(), "INSTANCE_IPS");
        assert_eq!(ips, Kind::StringValue("10.1.0.9".into()));
    }

    #[test]
    fn later_sources_go_before_earlier_ones() {
        let given = NodeFacts {
            metadata: BTreeMap::from([
                ("NAME".into(), "other".into()),
                ("CLUSTER_ID".into(), "c1".into()),
            ]),
            json_metadata: BTreeMap::from([("CLUSTER_ID".into(), json!({"a": [1, true, null]}))]),
            ..facts()
        };
        let node = given.to_node();
        assert_eq!(field(&node, "NAME"), Kind::StringValue("other".into()));
        let Kind::StructValue(of) = field(&node, "CLUSTER_ID") else {
            panic!("{node:?}")
        };
        let Some(Kind::ListValue(list)) = of.fields["a"].kind.clone() else {
            panic!("{of:?}")
        };
        let kinds: Vec<_> = list.values.into_iter().filter_map(|v| v.kind).collect();
        let expected = [
            Kind::NumberValue(1.0),
            Kind::BoolValue(true),
            Kind::NullValue(0),
        ];
        assert_eq!(kinds, expected);
    }
}
