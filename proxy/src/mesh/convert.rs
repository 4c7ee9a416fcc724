//! The edge: protobuf resources become records here, and nobody above sees protobuf.
//!
//! A resource is taken whole or refused whole, with a reason that names the field. Nothing is cut, dropped or guessed,
//! save what the API defines: defaults for absent fields, `deployment` and public for unknown kinds of owner and of
//! visibility.

mod policy;
mod service;
mod workload;

use std::{net::IpAddr, sync::Arc};

use xds_client::proto::workload as pb;

use super::{Destination, GatewayAddress, PortMap, intern::Pool, record::Record};

/// Why a resource is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Invalid {
    /// The resource holds neither a workload nor a service that this version knows.
    #[error("neither a workload nor a service")]
    UnknownKind,
    /// The primary key is missing.
    #[error("{0} is empty")]
    Empty(&'static str),
    /// Not 4 or 16 bytes.
    #[error("{field}: an address of {length} bytes")]
    Address {
        /// The field.
        field: &'static str,
        /// How many bytes there were.
        length: usize,
    },
    /// Longer than the address.
    #[error("{field}: prefix length {length} is longer than the address")]
    PrefixLength {
        /// The field.
        field: &'static str,
        /// The length.
        length: u32,
    },
    /// Above 65535.
    #[error("{field}: {port} is not a port")]
    Port {
        /// The field.
        field: &'static str,
        /// The value.
        port: u32,
    },
    /// A number that this version does not know.
    #[error("{field}: value {value} is not supported")]
    Value {
        /// The field.
        field: &'static str,
        /// The value.
        value: i32,
    },
    /// A reference to a service without `/`.
    #[error("services: `{0}` is not namespace/hostname")]
    ServiceKey(String),
    /// A namespace that holds a `/` would make the key ambiguous.
    #[error("namespace: `{0}` contains a slash")]
    Namespace(String),
    /// A waypoint or gateway that points nowhere.
    #[error("{0} has no destination")]
    Destination(&'static str),
    /// A string match without a kind that this version knows.
    #[error("{0}: a string match without a known kind")]
    StringMatch(&'static str),
    /// A resource without content.
    #[error("no content")]
    NoContent,
    /// Not the message that it should be.
    #[error("not readable: {0}")]
    Undecodable(#[from] prost::DecodeError),
    /// A text beyond all reason.
    #[error("{0} is too long")]
    TooLong(&'static str),
}

/// A resource that was refused.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Rejection {
    /// The uid of a workload, `namespace/hostname` of a service, `namespace/name` of a policy.
    pub name: String,
    /// Why.
    pub reason: Invalid,
}

impl std::fmt::Display for Rejection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.name, self.reason)
    }
}

/// Turns resources into records, shared parts from a pool.
pub(super) struct Converter<'a> {
    pub(super) pool: &'a mut Pool,
}

impl Converter<'_> {
    /// Converts a workload or service.
    pub(super) fn address(&mut self, address: &pb::Address) -> Result<Record, Invalid> {
        match &address.r#type {
            Some(pb::address::Type::Workload(workload)) => {
                self.workload(workload).map(Arc::new).map(Record::Workload)
            }
            Some(pb::address::Type::Service(service)) => {
                self.service(service).map(Arc::new).map(Record::Service)
            }
            None => Err(Invalid::UnknownKind),
        }
    }

    fn gateway(
        &mut self,
        gateway: &pb::GatewayAddress,
        field: &'static str,
    ) -> Result<GatewayAddress, Invalid> {
        use pb::gateway_address::Destination as Given;
        let destination = match &gateway.destination {
            Some(Given::Address(address)) => Destination::Address {
                network: self.pool.string(&address.network),
                ip: ip(&address.address, field)?,
            },
            Some(Given::Hostname(host)) => Destination::Host {
                namespace: self.pool.string(&host.namespace),
                hostname: self.pool.string(&host.hostname),
            },
            None => return Err(Invalid::Destination(field)),
        };
        Ok(GatewayAddress {
            destination,
            hbone_mtls_port: port(gateway.hbone_mtls_port, field)?,
        })
    }

    /// Of a port that is given twice, the last mapping holds.
    fn ports(&mut self, ports: &[pb::Port]) -> Result<PortMap, Invalid> {
        let mut pairs = Vec::with_capacity(ports.len());
        for given in ports.iter().rev() {
            pairs.push((
                port(given.service_port, "service_port")?,
                port(given.target_port, "target_port")?,
            ));
        }
        pairs.sort_by_key(|(service_port, _)| *service_port);
        pairs.dedup_by_key(|(service_port, _)| *service_port);
        Ok(self.pool.port_map(pairs))
    }
}

fn port(port: u32, field: &'static str) -> Result<u16, Invalid> {
    u16::try_from(port).map_err(|_| Invalid::Port { field, port })
}

/// Reads an address; an IPv4-mapped one in its IPv4 form, as all look-ups ask for it.
fn ip(bytes: &[u8], field: &'static str) -> Result<IpAddr, Invalid> {
    raw_ip(bytes, field).map(|ip| ip.to_canonical())
}

fn raw_ip(bytes: &[u8], field: &'static str) -> Result<IpAddr, Invalid> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Ok(v4.into());
    }
    let length = bytes.len();
    let v6 = <[u8; 16]>::try_from(bytes).map_err(|_| Invalid::Address { field, length })?;
    Ok(v6.into())
}

/// Reads a range; one within the IPv4-mapped addresses in its IPv4 form.
fn range(bytes: &[u8], length: u32, field: &'static str) -> Result<ipnet::IpNet, Invalid> {
    let raw = raw_ip(bytes, field)?;
    let (ip, bits) = match (raw, raw.to_canonical()) {
        (IpAddr::V6(_), IpAddr::V4(v4)) if length >= 96 => (IpAddr::V4(v4), length - 96),
        _ => (raw, length),
    };
    let too_long = |_| Invalid::PrefixLength { field, length };
    let bits = u8::try_from(bits).map_err(|_| Invalid::PrefixLength { field, length })?;
    Ok(ipnet::IpNet::new(ip, bits).map_err(too_long)?.trunc())
}

/// Looks a number up among the values of its enum.
fn known<E: TryFrom<i32>>(value: i32, field: &'static str) -> Result<E, Invalid> {
    E::try_from(value).map_err(|_| Invalid::Value { field, value })
}

#[cfg(test)]
mod tests;
