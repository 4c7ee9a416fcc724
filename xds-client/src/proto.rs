//! The messages of istiod's APIs, generated from `proto/*.proto`.

macro_rules! generated {
    ($(#[$doc:meta])* $name:ident, $package:literal) => {
        $(#[$doc])*
        #[allow(
            clippy::all,
            clippy::restriction,
            clippy::pedantic,
            missing_docs,
            unused_qualifications,
            reason = "generated code"
        )]
        pub mod $name {
            include!(concat!(env!("OUT_DIR"), "/", $package, ".rs"));
        }
    };
}

generated!(
    /// Workloads and services (`istio.workload`).
    workload, "istio.workload"
);
generated!(
    /// Authorization policies (`istio.security`).
    security, "istio.security"
);
generated!(
    /// The delta discovery protocol (`envoy.service.discovery.v3`), with the error message that it carries.
    discovery, "envoy.service.discovery.v3"
);

impl From<workload::Workload> for workload::Address {
    fn from(workload: workload::Workload) -> Self {
        Self {
            r#type: Some(workload::address::Type::Workload(workload)),
        }
    }
}

impl From<workload::Service> for workload::Address {
    fn from(service: workload::Service) -> Self {
        Self {
            r#type: Some(workload::address::Type::Service(service)),
        }
    }
}

impl discovery::Resource {
    /// A resource of this name, version and content.
    #[must_use]
    pub fn new(name: &str, version: &str, content: &impl prost::Message) -> Self {
        Self {
            name: name.into(),
            version: version.into(),
            resource: Some(discovery::resource::Payload {
                type_url: String::new(),
                value: content.encode_to_vec().into(),
            }),
            aliases: Vec::new(),
        }
    }
}
