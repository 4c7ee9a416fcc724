//! Names that the proxy itself asks for on behalf of the pod.

use std::net::Ipv4Addr;

use hickory_proto::{
    op::{Message, Query},
    rr::{Name, RData, RecordType},
};

use super::{Begun, Names, Transport};

impl Names {
    /// The first IPv4 address of `name`, as a client inside the pod would be told.
    ///
    /// # Cancel safety
    /// Nothing is lost.
    pub async fn first_address(&self, name: &str) -> Option<Ipv4Addr> {
        let mut name = Name::from_ascii(name).ok()?;
        name.set_fqdn(true);
        let mut message = Message::query();
        message.metadata.recursion_desired = true;
        message.add_query(Query::query(name, RecordType::A));
        let answer = match self.begin(&message.to_vec().ok()?, Transport::Tcp) {
            Begun::Answered(answer) => answer?,
            Begun::Waits(query) => self.finish_in_turn(*query).await?,
        };
        let answer = Message::from_vec(&answer).ok()?;
        answer.answers.iter().find_map(|record| {
            let RData::A(address) = &record.data else {
                return None;
            };
            Some(address.0)
        })
    }
}
