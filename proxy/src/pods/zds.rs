//! The messages of the CNI agent: packets in, requests out; verdicts in, packets out.
//!
//! Everything here judges bytes of another process. Nothing panics, and a descriptor that came
//! with a packet is either in the request or closed.

use std::{io, os::fd::OwnedFd, sync::Arc};

use prost::Message as _;

use crate::{config::WorkloadRef, listen::Netns};
use proto::{
    Ack, AddWorkload, WorkloadRequest, WorkloadResponse, workload_request, workload_response,
};

/// One pod, as the agent describes it.
#[derive(Debug, Clone)]
pub(super) struct Candidate<N> {
    pub(super) uid: Arc<str>,
    pub(super) who: WorkloadRef,
    pub(super) netns: N,
}

/// What the agent asks for.
#[derive(Debug)]
pub(super) enum Request<N = Arc<Netns>> {
    /// Serve this pod.
    Add(Candidate<N>),
    /// Go on serving this pod if you do.
    Keep(Arc<str>),
    /// This pod is gone.
    Del(Arc<str>),
    /// All pods have been named.
    SnapshotSent,
}

/// A packet that is not a request.
#[derive(Debug, thiserror::Error)]
pub(super) enum BadPacket {
    #[error("the packet is longer than {MAX_PACKET} bytes")]
    Truncated,
    #[error("the packet carries more descriptors than fit")]
    DescriptorsTruncated,
    #[error("the packet is not a WorkloadRequest")]
    Undecodable(#[source] prost::DecodeError),
    #[error("the request has no payload known to this version")]
    UnknownPayload,
    #[error("an add needs one descriptor, this one has {0}")]
    AddWithDescriptors(usize),
    #[error("a request other than add came with {0} descriptors")]
    StrayDescriptors(usize),
    #[error("an add needs workload_info")]
    NoWorkloadInfo,
    #[error("the descriptor is no network namespace")]
    NotNetns(#[source] io::Error),
}

impl BadPacket {
    /// Whether agent and proxy may go on after the error ack. A message of a later version is
    /// simply refused, whereas one that breaks the rules means that the two are out of step.
    pub(super) fn keeps_connection(&self) -> bool {
        match self {
            Self::UnknownPayload | Self::NotNetns(_) => true,
            Self::Truncated
            | Self::DescriptorsTruncated
            | Self::Undecodable(_)
            | Self::AddWithDescriptors(_)
            | Self::StrayDescriptors(_)
            | Self::NoWorkloadInfo => false,
        }
    }
}

/// Reads one packet with the descriptors that came along.
///
/// # Errors
/// [`BadPacket`]; the descriptors are closed then.
pub(super) fn decode(packet: &[u8], descriptors: Vec<OwnedFd>) -> Result<Request, BadPacket> {
    use workload_request::Payload;
    let decoded = WorkloadRequest::decode(packet).map_err(BadPacket::Undecodable)?;
    let request = match decoded.payload.ok_or(BadPacket::UnknownPayload)? {
        Payload::Add(add) => return decode_add(add, descriptors),
        Payload::Keep(keep) => Request::Keep(keep.uid.into()),
        Payload::Del(del) => Request::Del(del.uid.into()),
        Payload::SnapshotSent(_) => Request::SnapshotSent,
    };
    match descriptors.len() {
        0 => Ok(request),
        stray => Err(BadPacket::StrayDescriptors(stray)),
    }
}

fn decode_add(add: AddWorkload, descriptors: Vec<OwnedFd>) -> Result<Request, BadPacket> {
    let [descriptor] = <[OwnedFd; 1]>::try_from(descriptors)
        .map_err(|several| BadPacket::AddWithDescriptors(several.len()))?;
    let info = add.workload_info.ok_or(BadPacket::NoWorkloadInfo)?;
    let netns = Netns::from_fd(descriptor).map_err(BadPacket::NotNetns)?;
    Ok(Request::Add(Candidate {
        uid: add.uid.into(),
        who: WorkloadRef::new(info.namespace, info.name, info.service_account),
        netns: Arc::new(netns),
    }))
}

/// The packet that answers a request; long errors are cut, as the agent reads 1024 bytes.
pub(super) fn answer(result: Result<(), &str>) -> Vec<u8> {
    let error = result.err().unwrap_or_default();
    let end = error.floor_char_boundary(MAX_ERROR);
    let ack = Ack {
        error: error.get(..end).unwrap_or_default().to_owned(),
    };
    let response = WorkloadResponse {
        payload: Some(workload_response::Payload::Ack(ack)),
    };
    response.encode_to_vec()
}

/// The first packet of a connection.
pub(super) fn hello() -> Vec<u8> {
    let version = proto::Version::V1.into();
    proto::ZdsHello { version }.encode_to_vec()
}

/// Longer packets are not read. The agent's are below 700 bytes.
pub(super) const MAX_PACKET: usize = 4096;
/// Bytes of error text in an answer.
const MAX_ERROR: usize = 900;

mod proto {
    #![expect(unnameable_types, unreachable_pub, reason = "generated from zds.proto")]
    include!(concat!(env!("OUT_DIR"), "/istio.workload.zds.rs"));
}

#[cfg(test)]
mod tests;
