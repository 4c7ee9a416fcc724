//! Responses that no istiod would build.

use bytes::Bytes;
use prost::Message as _;
use xds_client::{
    local::Document,
    proto::discovery::{DeltaDiscoveryResponse, Resource, resource::Payload},
};

use super::{Kind, catalogue::Catalogue};

/// A response made by hand, field by field.
#[derive(Debug, Clone)]
pub struct Injection(DeltaDiscoveryResponse);

impl Injection {
    /// An empty response with this nonce.
    #[must_use]
    pub fn new(kind: Kind, nonce: &str) -> Self {
        Self(DeltaDiscoveryResponse {
            type_url: kind.url().to_owned(),
            nonce: nonce.to_owned(),
            ..DeltaDiscoveryResponse::default()
        })
    }

    /// Another type URL.
    #[must_use]
    pub fn type_url(mut self, url: &str) -> Self {
        url.clone_into(&mut self.0.type_url);
        self
    }

    /// Adds all resources of its kind, workloads before services.
    ///
    /// # Panics
    /// After another type URL was set.
    #[must_use]
    pub fn content(mut self, content: impl Into<Document>) -> Self {
        let kind = Kind::of(&self.0.type_url).expect("a type that is served");
        let mut catalogue = Catalogue::default();
        catalogue.apply(content.into(), true);
        let names = catalogue.names(kind).into_iter();
        let encoded = names.filter_map(|name| catalogue.encoded(kind, &name, false));
        self.0.resources.extend(encoded);
        self
    }

    /// Adds a resource, encoded or not what it should be.
    #[must_use]
    pub fn resource(self, name: &str, version: &str, content: impl Into<Bytes>) -> Self {
        let payload = Payload {
            type_url: self.0.type_url.clone(),
            value: content.into(),
        };
        self.wrapped(name, version, Some(payload), &[])
    }

    /// Adds a resource under further names.
    #[must_use]
    pub fn aliased(self, name: &str, content: impl Into<Bytes>, aliases: &[&str]) -> Self {
        let payload = Payload {
            type_url: self.0.type_url.clone(),
            value: content.into(),
        };
        self.wrapped(name, "1", Some(payload), aliases)
    }

    /// Adds a resource without content.
    #[must_use]
    pub fn hollow(self, name: &str) -> Self {
        self.wrapped(name, "1", None, &[])
    }

    /// Adds bytes in the place of a whole resource.
    #[must_use]
    pub fn garbage(mut self, bytes: impl Into<Bytes>) -> Self {
        self.0.resources.push(bytes.into());
        self
    }

    /// Names a removed resource.
    #[must_use]
    pub fn removed(mut self, name: &str) -> Self {
        self.0.removed_resources.push(name.to_owned());
        self
    }

    fn wrapped(
        self,
        name: &str,
        version: &str,
        resource: Option<Payload>,
        aliases: &[&str],
    ) -> Self {
        let resource = Resource {
            version: version.to_owned(),
            resource,
            name: name.to_owned(),
            aliases: aliases.iter().map(|alias| (*alias).to_owned()).collect(),
        };
        self.garbage(resource.encode_to_vec())
    }
}

impl From<Injection> for DeltaDiscoveryResponse {
    fn from(injection: Injection) -> Self {
        injection.0
    }
}
