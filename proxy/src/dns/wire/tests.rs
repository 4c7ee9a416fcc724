use hickory_proto::op::EdnsFlags;
use proptest::prelude::*;

use super::*;

fn query(name: &str, kind: RecordType, edns: Option<u16>) -> Vec<u8> {
    let mut message = Message::query();
    message.metadata.id = 0x1234;
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    if let Some(payload) = edns {
        let mut edns = Edns::new();
        edns.set_max_payload(payload).set_dnssec_ok(true);
        message.set_edns(edns);
    }
    message.to_vec().unwrap()
}

fn read(bytes: &[u8]) -> Request {
    Request::read(bytes).unwrap()
}

fn found(count: u8) -> Found {
    Found {
        alias: None,
        addresses: (0..count).map(|last| [10, 0, 0, last].into()).collect(),
        supported: true,
    }
}

fn answer(request: &Request, found: &Found, transport: Transport) -> Message {
    Message::from_vec(&request.answer(found, transport).unwrap()).unwrap()
}

#[test]
fn asks_are_told_apart() {
    let of = |name, kind| read(&query(name, kind, None)).ask();
    let addresses = |family| Ask::Addresses("web.shop".into(), family);
    assert_eq!(of("WEB.Shop.", RecordType::A), addresses(Family::V4));
    assert_eq!(of("web.shop.", RecordType::AAAA), addresses(Family::V6));
    assert_eq!(of("web.shop.", RecordType::SRV), Ask::Other);
    assert_eq!(of("web.shop.", RecordType::ANY), Ask::Other);
    assert_eq!(of(".", RecordType::A), Ask::Other);

    let edited = |edit: fn(&mut Message)| {
        let mut message = Message::from_vec(&query("a.", RecordType::A, None)).unwrap();
        edit(&mut message);
        Request { message }.ask()
    };
    let notify = edited(|message| message.metadata.op_code = OpCode::Notify);
    assert_eq!(notify, Ask::Refuse(ResponseCode::NotImp));
    let response = edited(|message| message.metadata.message_type = MessageType::Response);
    assert_eq!(response, Ask::Refuse(ResponseCode::FormErr));
    let refusal = edited(|message| {
        message.metadata.message_type = MessageType::Response;
        message.metadata.response_code = ResponseCode::FormErr;
    });
    assert_eq!(refusal, Ask::Nothing);
    let nothing = edited(|message| message.queries.clear());
    assert_eq!(nothing, Ask::Refuse(ResponseCode::FormErr));
    let chaos = edited(|message| message.queries[0].query_class = DNSClass::CH);
    assert_eq!(chaos, Ask::Other);
}

#[test]
fn what_asks_several_questions_is_refused_in_short() {
    let mut message = Message::from_vec(&query("a.", RecordType::A, None)).unwrap();
    let question = Name::from_ascii(format!("{0}.{0}.{0}.", "x".repeat(60))).unwrap();
    message.add_queries((0..8).map(|_| Query::query(question.clone(), RecordType::A)));
    let request = Request { message };
    assert_eq!(request.ask(), Ask::Refuse(ResponseCode::FormErr));
    let refusal = request.refusal(ResponseCode::FormErr).unwrap();
    assert_eq!(refusal.len(), HEADER_BYTES);
}

#[test]
fn an_answer_is_authoritative_repeats_the_question_and_lives_for_thirty_seconds() {
    let request = read(&query("Web.Shop.", RecordType::A, None));
    let told = answer(&request, &found(2), Transport::Udp);
    let head = told.metadata;
    assert_eq!(
        (head.id, head.response_code),
        (0x1234, ResponseCode::NoError)
    );
    assert!(head.authoritative && head.recursion_available && head.recursion_desired);
    assert_eq!(told.queries[0].name.to_ascii(), "Web.Shop.");
    assert_eq!(told.answers.len(), 2);
    for record in &told.answers {
        assert_eq!(
            (record.ttl, record.name.to_ascii()),
            (30, "web.shop.".into())
        );
    }
    assert!(told.authorities.is_empty() && told.edns.is_none());
}

#[test]
fn an_alias_owns_the_addresses() {
    let request = read(&query("cart.web.shop.svc.", RecordType::A, None));
    let aliased = Found {
        alias: Some("cart.web".into()),
        ..found(1)
    };
    let told = answer(&request, &aliased, Transport::Udp);
    let [cname, address] = &told.answers[..] else {
        panic!("{told:?}")
    };
    assert_eq!(cname.name.to_ascii(), "cart.web.shop.svc.");
    let target = RData::CNAME(rdata::CNAME(Name::from_ascii("cart.web.").unwrap()));
    assert_eq!(cname.data, target);
    assert_eq!(address.name.to_ascii(), "cart.web.");
}

#[test]
fn what_is_longer_than_the_client_takes_is_cut() {
    for (edns, room) in [(None, 512), (Some(100), 512), (Some(1232), 1232)] {
        let request = read(&query("web.shop.", RecordType::A, edns));
        assert_eq!(request.room(Transport::Udp), room);
        let cut = request.answer(&found(200), Transport::Udp).unwrap();
        assert!(cut.len() <= room);
        let cut = Message::from_vec(&cut).unwrap();
        assert!(cut.metadata.truncation && cut.answers.is_empty());
        let whole = answer(&request, &found(200), Transport::Tcp);
        assert!(!whole.metadata.truncation && whole.answers.len() == 200);
    }
}

#[test]
fn over_tcp_as_many_addresses_are_told_as_fit() {
    let name = format!("{}.web.shop.svc.cluster.local.", "x".repeat(60));
    let request = read(&query(&name, RecordType::AAAA, Some(1232)));
    let mut found = found(0);
    found.addresses = (0..1000_u16)
        .map(|last| std::net::Ipv6Addr::from([0xfd00, 0, 0, 0, 0, 0, 0, last]).into())
        .collect();
    let told = answer(&request, &found, Transport::Tcp);
    assert!(!told.metadata.truncation && told.edns.is_some());
    assert!((500..1000).contains(&told.answers.len()));
    found.addresses.truncate(500);
    assert_eq!(
        answer(&request, &found, Transport::Tcp).answers.len(),
        500,
        "none is left out in vain"
    );
}

#[test]
fn edns_is_answered_by_edns() {
    let request = read(&query("web.", RecordType::A, Some(4096)));
    let told = answer(&request, &found(1), Transport::Udp).edns.unwrap();
    assert_eq!((told.max_payload(), told.version()), (4096, 0));
    let EdnsFlags { dnssec_ok, .. } = *told.flags();
    assert!(dnssec_ok);
}

#[test]
fn only_the_answer_to_a_question_is_one() {
    let asked = query("web.shop.", RecordType::A, None);
    let end = read(&asked).question_end();
    let reply = |bytes: &[u8]| {
        let mut bytes = bytes.to_vec();
        bytes[2] |= 0x80;
        bytes
    };
    assert!(answers(&reply(&asked), &asked, end));
    assert!(!answers(&asked, &asked, end), "that is a question");
    assert!(answers(
        &reply(&query("WEB.shop.", RecordType::A, None)),
        &asked,
        end
    ));
    assert!(!answers(
        &reply(&query("web.shop.", RecordType::AAAA, None)),
        &asked,
        end
    ));
    assert!(!answers(
        &reply(&query("wob.shop.", RecordType::A, None)),
        &asked,
        end
    ));
    let mut other = reply(&asked);
    set_id(&mut other, [9, 9]);
    assert!(!answers(&other, &asked, end));
    assert!(answers(&reply(&asked)[..12], &asked, end), "a bare error");
    assert!(!answers(&reply(&asked)[..20], &asked, end));
    assert!(!answers(&[], &asked, end));
}

#[test]
fn unhelpful_answers_are_those_that_another_server_may_better() {
    for (code, unhelpful) in [(0, false), (2, true), (3, false), (4, true), (5, true)] {
        assert_eq!(
            is_unhelpful(&[0, 0, 0x81, 0x80 | code]),
            unhelpful,
            "{code}"
        );
    }
    assert!(!is_unhelpful(&[]));
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
        if let Some(request) = Request::read(&bytes) {
            let _ask = request.ask();
            let _refusal = request.refusal(ResponseCode::ServFail);
            let _answer = request.answer(&found(3), Transport::Udp);
            answers(&bytes, &bytes, request.question_end());
        }
    }

    #[test]
    fn damaged_queries_never_panic(at in 0..40_usize, with in any::<u8>(), kind in any::<u16>()) {
        let mut bytes = query("web.shop.svc.", RecordType::from(kind), Some(1232));
        if let Some(byte) = bytes.get_mut(at) {
            *byte = with;
        }
        if let Some(request) = Request::read(&bytes) {
            for transport in [Transport::Udp, Transport::Tcp] {
                if let Some(answer) = request.answer(&found(250), transport) {
                    prop_assert!(answer.len() <= request.room(transport).max(300));
                }
            }
        }
    }
}
