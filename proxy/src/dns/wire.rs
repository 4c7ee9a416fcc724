//! Queries read and answers written. Messages themselves are hickory's; what is relayed stays the bytes that came.

use std::net::IpAddr;

use hickory_proto::{
    op::{Edns, Message, MessageType, OpCode, Query, ResponseCode},
    rr::{DNSClass, Name, RData, Record, RecordType, rdata},
};

use super::local::{Family, Found};

/// A message that can be answered in some way.
#[derive(Debug)]
pub(super) struct Request {
    message: Message,
}

/// What a request asks of us.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Ask {
    /// Addresses of a name (lower case, without the final dot).
    Addresses(String, Family),
    /// Something that only others know.
    Other,
    /// Nothing that can be served; the code says so.
    Refuse(ResponseCode),
    /// Nothing: it is itself a refusal, and two servers that refuse each other's refusals would never end.
    Nothing,
}

/// How a message travels, and so how long an answer may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Transport {
    Udp,
    Tcp,
}

impl Request {
    /// Reads a message; `None` if it is none.
    pub(super) fn read(bytes: &[u8]) -> Option<Self> {
        let message = Message::from_vec(bytes).ok()?;
        Some(Self { message })
    }

    /// What is asked.
    pub(super) fn ask(&self) -> Ask {
        let Message {
            metadata, queries, ..
        } = &self.message;
        if metadata.message_type == MessageType::Response {
            let is_refusal = metadata.response_code != ResponseCode::NoError;
            return if is_refusal {
                Ask::Nothing
            } else {
                Ask::Refuse(ResponseCode::FormErr)
            };
        }
        if metadata.op_code != OpCode::Query {
            return Ask::Refuse(ResponseCode::NotImp);
        }
        let [query] = &queries[..] else {
            return Ask::Refuse(ResponseCode::FormErr);
        };
        let families = [(RecordType::A, Family::V4), (RecordType::AAAA, Family::V6)];
        let family = families
            .into_iter()
            .find(|(kind, _)| *kind == query.query_type);
        let Some((_, family)) = family else {
            return Ask::Other;
        };
        if query.query_class != DNSClass::IN || query.name.is_root() {
            return Ask::Other;
        }
        let name = query.name.to_lowercase().to_ascii();
        let name = name.strip_suffix('.').map_or(&*name, |name| name);
        Ask::Addresses(name.to_owned(), family)
    }

    /// The type that is asked for, and the name as it was written, for reports.
    pub(super) fn asked(&self) -> Option<(RecordType, &Name)> {
        let query = self.message.queries.first()?;
        Some((query.query_type, &query.name))
    }

    /// The longest answer that the client takes.
    pub(super) fn room(&self, transport: Transport) -> usize {
        match transport {
            Transport::Tcp => MAX_TCP_BYTES,
            // Without EDNS, or with less, 512: RFC 6891 section 6.2.3.
            Transport::Udp => self.message.max_payload().max(MIN_UDP_BYTES).into(),
        }
    }

    /// Where the question ends in the bytes of a message that repeats it.
    pub(super) fn question_end(&self) -> usize {
        let query = self.message.queries.first();
        // A length byte before each label, and the root's at the end.
        let name = query.map_or(0, |query: &Query| {
            query
                .name
                .iter()
                .map(|label| label.len() + 1)
                .sum::<usize>()
                + 1
        });
        HEADER_BYTES + name + TYPE_AND_CLASS_BYTES
    }

    /// An answer from the mesh. Addresses are told in the order given: over TCP as many as fit, since there is no longer way.
    pub(super) fn answer(&self, found: &Found, transport: Transport) -> Option<Vec<u8>> {
        let mut addresses = &*found.addresses;
        loop {
            let answer = self.told(found, addresses)?;
            let bytes = answer.to_vec().ok()?;
            let is_cut = bytes.get(2).is_some_and(|flags| flags & TRUNCATED != 0);
            match transport {
                Transport::Udp if is_cut || bytes.len() > self.room(transport) => {
                    return answer.truncate().to_vec().ok();
                }
                Transport::Tcp if is_cut => {
                    // The library writes out the names of all records but the first, which costs a long name most of the room.
                    addresses = addresses.get(..addresses.len() * 3 / 4)?;
                }
                Transport::Udp | Transport::Tcp => return Some(bytes),
            }
        }
    }

    /// The answer that tells these addresses of what was found.
    fn told(&self, found: &Found, addresses: &[IpAddr]) -> Option<Message> {
        let mut answer = self.response(ResponseCode::NoError);
        answer.metadata.authoritative = true;
        let query = self.message.queries.first()?;
        let mut owner = query.name.to_lowercase();
        if let Some(alias) = &found.alias {
            let target = Name::from_ascii(format!("{alias}.")).ok()?;
            let data = RData::CNAME(rdata::CNAME(target.clone()));
            answer.add_answer(Record::from_rdata(owner, TTL_SECONDS, data));
            owner = target;
        }
        for ip in addresses {
            let data = match ip {
                IpAddr::V4(ip) => RData::A(rdata::A(*ip)),
                IpAddr::V6(ip) => RData::AAAA(rdata::AAAA(*ip)),
            };
            answer.add_answer(Record::from_rdata(owner.clone(), TTL_SECONDS, data));
        }
        Some(answer)
    }

    /// An answer without records.
    pub(super) fn refusal(&self, code: ResponseCode) -> Option<Vec<u8>> {
        self.response(code).to_vec().ok()
    }

    /// The answer that tells a client to ask again over TCP.
    pub(super) fn truncated(&self) -> Option<Vec<u8>> {
        self.response(ResponseCode::NoError)
            .truncate()
            .to_vec()
            .ok()
    }

    fn response(&self, code: ResponseCode) -> Message {
        let asked = &self.message.metadata;
        let mut response = Message::response(asked.id, asked.op_code);
        response.metadata.response_code = code;
        response.metadata.recursion_desired = asked.recursion_desired;
        response.metadata.recursion_available = true;
        response.metadata.checking_disabled = asked.checking_disabled;
        // Several questions are a fault, and their names, written out, may be much longer than the message was.
        if let [query] = &self.message.queries[..] {
            response.add_query(query.clone());
        }
        if let Some(asked) = &self.message.edns {
            let mut edns = Edns::new();
            edns.set_max_payload(asked.max_payload().max(MIN_UDP_BYTES));
            edns.set_dnssec_ok(asked.flags().dnssec_ok);
            response.set_edns(edns);
        }
        response
    }
}

/// The identifier of a message.
pub(super) fn id(message: &[u8]) -> Option<[u8; 2]> {
    message.first_chunk().copied()
}

/// Gives a message another identifier.
pub(super) fn set_id(message: &mut [u8], id: [u8; 2]) {
    if let Some(place) = message.first_chunk_mut() {
        *place = id;
    }
}

/// Whether `answer` belongs to `query` of the given question end: a response with the same identifier that repeats the
/// question, or a bare header, as some servers send with an error.
pub(super) fn answers(answer: &[u8], query: &[u8], question_end: usize) -> bool {
    let is_response = answer.get(2).is_some_and(|flags| flags & 0x80 != 0);
    let question = |message: &[u8]| {
        let question = message.get(HEADER_BYTES..question_end)?;
        Some(question.to_ascii_lowercase())
    };
    let same_question = question(answer).is_some_and(|own| Some(own) == question(query));
    is_response && id(answer) == id(query) && (same_question || answer.len() == HEADER_BYTES)
}

/// Whether an answer says that this server cannot help, where another might: SERVFAIL, NOTIMP or REFUSED.
pub(super) fn is_unhelpful(answer: &[u8]) -> bool {
    let code = answer.get(3).map(|flags| flags & 0x0f);
    matches!(code, Some(2 | 4 | 5))
}

/// Seconds that a client may keep an answer of the mesh.
const TTL_SECONDS: u32 = 30;
const HEADER_BYTES: usize = 12;
/// The flag TC, in the third byte of a message.
const TRUNCATED: u8 = 0x02;
const TYPE_AND_CLASS_BYTES: usize = 4;
const MIN_UDP_BYTES: u16 = 512;
const MAX_TCP_BYTES: usize = u16::MAX as usize;

#[cfg(test)]
mod tests;
