//! The messages between the CNI agent and the proxy: protobuf package `istio.workload.zds`, one message per packet.

/// What a connecting proxy says first.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct ZdsHello {
    /// 1 = V1.
    #[prost(int32, tag = "1")]
    pub version: i32,
}

/// Agent → proxy.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct WorkloadRequest {
    /// Exactly one of these.
    #[prost(oneof = "Request", tags = "1, 2, 3, 5")]
    pub payload: Option<Request>,
}

/// What the agent asks for.
#[derive(Clone, PartialEq, Eq, prost::Oneof)]
#[non_exhaustive]
pub enum Request {
    /// Serve this pod; carries a descriptor of its network namespace.
    #[prost(message, tag = "1")]
    Add(AddWorkload),
    /// The pod is gone.
    #[prost(message, tag = "2")]
    Del(DelWorkload),
    /// Everything known was sent.
    #[prost(message, tag = "3")]
    SnapshotSent(SnapshotSent),
    /// Known to the agent, which has no descriptor.
    #[prost(message, tag = "5")]
    Keep(KeepWorkload),
}

/// Serve this pod.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct AddWorkload {
    /// Pod UID.
    #[prost(string, tag = "1")]
    pub uid: String,
    /// Who it is.
    #[prost(message, optional, tag = "2")]
    pub workload_info: Option<WorkloadInfo>,
}

/// A pod by the names of Kubernetes.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct WorkloadInfo {
    /// Pod name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Namespace.
    #[prost(string, tag = "2")]
    pub namespace: String,
    /// Service account.
    #[prost(string, tag = "3")]
    pub service_account: String,
}

/// The pod is gone.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct DelWorkload {
    /// Pod UID; field 1 does not exist.
    #[prost(string, tag = "2")]
    pub uid: String,
}

/// Everything known was sent.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct SnapshotSent {}

/// Known to the agent, which has no descriptor.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct KeepWorkload {
    /// Pod UID.
    #[prost(string, tag = "1")]
    pub uid: String,
}

/// Proxy → agent.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct WorkloadResponse {
    /// The only kind of answer.
    #[prost(oneof = "Response", tags = "1")]
    pub payload: Option<Response>,
}

/// The only kind of answer.
#[derive(Clone, PartialEq, Eq, prost::Oneof)]
#[non_exhaustive]
pub enum Response {
    /// Done, or why not.
    #[prost(message, tag = "1")]
    Ack(Ack),
}

/// Done, or why not.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Ack {
    /// Empty = success.
    #[prost(string, tag = "1")]
    pub error: String,
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;

    fn request(payload: Request) -> Vec<u8> {
        WorkloadRequest {
            payload: Some(payload),
        }
        .encode_to_vec()
    }

    #[test]
    fn messages_have_the_bytes_that_the_agent_sends() {
        let info = WorkloadInfo {
            name: "n".into(),
            namespace: "s".into(),
            service_account: "a".into(),
        };
        let add = AddWorkload {
            uid: "abc".into(),
            workload_info: Some(info),
        };
        let cases: [(Vec<u8>, &[u8]); 7] = [
            (ZdsHello { version: 1 }.encode_to_vec(), &[0x08, 0x01]),
            (
                request(Request::Add(add)),
                b"\x0a\x10\x0a\x03abc\x12\x09\x0a\x01n\x12\x01s\x1a\x01a",
            ),
            (
                request(Request::Keep(KeepWorkload { uid: "abc".into() })),
                b"\x2a\x05\x0a\x03abc",
            ),
            (
                request(Request::Del(DelWorkload { uid: "abc".into() })),
                b"\x12\x05\x12\x03abc",
            ),
            (request(Request::SnapshotSent(SnapshotSent {})), b"\x1a\x00"),
            (
                WorkloadResponse {
                    payload: Some(Response::Ack(Ack::default())),
                }
                .encode_to_vec(),
                b"\x0a\x00",
            ),
            (
                WorkloadResponse {
                    payload: Some(Response::Ack(Ack { error: "x".into() })),
                }
                .encode_to_vec(),
                b"\x0a\x03\x0a\x01x",
            ),
        ];
        for (bytes, expected) in cases {
            assert_eq!(bytes, expected);
        }
    }
}
