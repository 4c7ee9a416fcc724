//! Names that the mesh does not answer: asked of a real server, and of one that misbehaves.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a panic is a failed test"
)]

use std::{collections::BTreeSet, net::SocketAddr, time::Duration};

use hickory_proto::{
    op::{Edns, Message, OpCode, ResponseCode},
    rr::{
        DNSClass, RecordType,
        rdata::opt::{EdnsCode, EdnsOption},
    },
};
use testkit::{
    dns::{self, Library, Scripted},
    stage::{Named, RESOLVER, RESOLVER6, UPSTREAM, UPSTREAM6},
    traffic, wait,
};
use tokio::{io::AsyncWriteExt as _, time::Instant};

const DNS: u16 = 53;

fn a(name: &str) -> Vec<u8> {
    dns::query(name, RecordType::A).to_vec().unwrap()
}

/// A query that `edit` makes of one for `host.up.example`.
fn odd(edit: impl FnOnce(&mut Message)) -> Vec<u8> {
    let mut message = dns::query("host.up.example.", RecordType::A);
    edit(&mut message);
    message.to_vec().unwrap()
}

fn edns_with(option: EdnsOption) -> Edns {
    let mut edns = Edns::new();
    edns.set_max_payload(1232).set_dnssec_ok(true);
    edns.options_mut().insert(option);
    edns
}

/// Queries of all kinds that are none of the proxy's business.
fn queries() -> Vec<Vec<u8>> {
    let kinds = [
        ("host.up.example.", RecordType::A),
        ("HOST.up.Example.", RecordType::AAAA),
        ("host.up.example.", RecordType::TXT),
        ("mail.up.example.", RecordType::MX),
        ("_x._tcp.up.example.", RecordType::SRV),
        ("alias.up.example.", RecordType::A),
        ("text.up.example.", RecordType::TXT),
        ("text.up.example.", RecordType::ANY),
        ("long.up.example.", RecordType::TXT),
        ("up.example.", RecordType::SOA),
        ("up.example.", RecordType::NS),
        ("nobody.up.example.", RecordType::A),
        ("7.2.0.192.in-addr.arpa.", RecordType::PTR),
        ("host.up.example.", RecordType::HTTPS),
        ("host.up.example.", RecordType::Unknown(65400)),
        ("outside.example.", RecordType::A),
        ("localhost.", RecordType::A),
        ("x.onion.", RecordType::A),
        (".", RecordType::NS),
    ];
    let plain = kinds.map(|(name, kind)| dns::query(name, kind).to_vec().unwrap());
    let cookie = EdnsOption::Unknown(10, vec![7; 8]);
    let unheard_of = EdnsOption::Unknown(65001, b"whatever".to_vec());
    let odd = [
        odd(|query| query.metadata.checking_disabled = true),
        odd(|query| query.metadata.authentic_data = true),
        odd(|query| query.metadata.recursion_desired = false),
        odd(|query| {
            query.set_edns(edns_with(cookie));
        }),
        odd(|query| {
            query.set_edns(edns_with(unheard_of));
        }),
        odd(|query| {
            query.queries[0].set_query_class(DNSClass::CH);
        }),
    ];
    assert_eq!(EdnsCode::from(10), EdnsCode::Cookie);
    plain.into_iter().chain(odd).collect()
}

/// What the real server knows: among it, 4 KB under one name.
fn records() -> Vec<String> {
    let records = [
        "host-record=host.up.example,192.0.2.7,2001:db8::7",
        "cname=alias.up.example,host.up.example",
        "mx-host=mail.up.example,host.up.example,5",
        "srv-host=_x._tcp.up.example,host.up.example,99",
        "txt-record=text.up.example,a text,and another",
    ];
    let long = "x".repeat(250);
    let long = (0..16).map(|index| format!("txt-record=long.up.example,{index}{long}"));
    records.map(str::to_owned).into_iter().chain(long).collect()
}

#[tokio::test]
async fn what_a_real_server_says_arrives_byte_for_byte() {
    let stage = Named::new().unwrap();
    let _upstream = stage.dnsmasq("up.example", &records()).await.unwrap();
    let cluster = stage.start(&stage.mesh()).await.unwrap();

    let queries = queries();
    let upstream = SocketAddr::new(UPSTREAM, DNS);
    let (mut authority, mut edns, mut cut, mut longest) = (0, 0, 0, 0);
    for query in &queries {
        let direct = stage.desk.datagram(upstream, query).await.unwrap();
        let relayed = stage.web.datagram(RESOLVER, query).await.unwrap();
        let asked = dns::read(query);
        assert_eq!(relayed, direct, "{:?}", asked.queries);
        let answer = dns::read(&direct);
        authority += answer.authorities.len();
        edns += usize::from(answer.edns.is_some());
        cut += usize::from(answer.metadata.truncation);

        let one = std::slice::from_ref(query);
        let direct = stage.desk.pipeline(upstream, one).await.unwrap();
        let relayed = stage.web.pipeline(RESOLVER, one).await.unwrap();
        assert_eq!(relayed, direct, "{:?} over TCP", asked.queries);
        longest = longest.max(direct[0].len());
    }
    assert!(cut == 1 && longest > 4096, "{cut} cut, {longest} bytes");
    assert!(
        authority >= 3 && edns >= 2,
        "a server without SOA or EDNS proves nothing"
    );

    let total = queries.len() as f64;
    for protocol in ["udp", "tcp"] {
        let labels = [
            ("request_protocol", protocol),
            ("source_canonical_service", "web-app"),
        ];
        let metrics = cluster.proxy(0).metrics().await.unwrap();
        for family in [
            "requests_total",
            "upstream_requests_total",
            "upstream_request_duration_seconds_count",
        ] {
            let name = format!("istio_dns_{family}");
            assert_eq!(metrics.sum(&name, &labels), total, "{name} {protocol}");
        }
        assert_eq!(
            metrics.sum("istio_dns_upstream_failures_total", &labels),
            0.0
        );
    }
    let of = |kind| async move {
        let labels = [("request_query_type", kind), ("request_protocol", "udp")];
        let metrics = cluster.proxy(0).metrics().await.unwrap();
        metrics.sum("istio_dns_requests_total", &labels)
    };
    assert_eq!(of("srv").await, 1.0);
}

#[tokio::test]
async fn queries_and_answers_keep_every_byte_but_the_identifier_of_the_query() {
    let stage = Named::new().unwrap();
    let mut tail: Vec<u8> = (0..=255).collect();
    tail.extend_from_slice(b"nothing that any parser of DNS would like");
    let strange = tail.clone();
    let at = SocketAddr::new(UPSTREAM, DNS);
    let upstream = Scripted::start(stage.world.node(0).netns(), at, move |asked| {
        let mut answer = dns::answer(&asked.bytes, |message| {
            message.edns = None;
            message.metadata.authentic_data = true;
        });
        // Claims records that it does not have.
        answer[6..12].copy_from_slice(&[9; 6]);
        answer.extend_from_slice(&strange);
        vec![(Duration::ZERO, answer)]
    })
    .unwrap();
    let _cluster = stage.start(&stage.mesh()).await.unwrap();
    for query in queries() {
        let answer = stage.web.datagram(RESOLVER, &query).await.unwrap();
        let asked = upstream.asked().pop().unwrap().bytes;
        assert_eq!(asked[2..], query[2..], "the query as it came");
        assert_eq!(
            answer[..2],
            query[..2],
            "the identifier that was asked under"
        );
        assert!(answer.ends_with(&tail), "{:?}", dns::read(&query).queries);
    }
    let identifiers: BTreeSet<_> = upstream
        .asked()
        .iter()
        .map(|asked| asked.bytes[..2].to_vec())
        .collect();
    assert!(
        identifiers.len() > 15,
        "identifiers are drawn: {identifiers:?}"
    );
    let ports: BTreeSet<_> = upstream
        .asked()
        .iter()
        .map(|asked| asked.from.port())
        .collect();
    assert!(ports.len() > 10, "so are ports: {ports:?}");
    let from = upstream.asked().pop().unwrap().from;
    assert_eq!(from.ip(), stage.web.ip4(), "asked from inside the pod");
}

#[tokio::test]
async fn lies_are_passed_over_and_garbage_is_no_answer() {
    let stage = Named::new().unwrap();
    stage
        .upstreams(&format!(
            "nameserver {UPSTREAM}\noptions timeout:1 attempts:1\n"
        ))
        .unwrap();
    let _upstream = stage.scripted().unwrap();
    let cluster = stage.start(&stage.mesh()).await.unwrap();
    let ask = async |name: &str| dns::read(&stage.web.datagram(RESOLVER, &a(name)).await.unwrap());

    let truth = ask("liar.up.example.").await;
    assert_eq!(truth.answers.len(), 1, "{truth:?}");
    let refused = ask("refused.up.example.").await;
    assert_eq!(refused.metadata.response_code, ResponseCode::Refused);
    for name in ["garbage.up.example.", "silent.up.example."] {
        let began = Instant::now();
        let failed = ask(name).await;
        assert_eq!(
            failed.metadata.response_code,
            ResponseCode::ServFail,
            "{name}"
        );
        assert!(began.elapsed() >= Duration::from_millis(990), "{name}");
    }
    let proxy = cluster.proxy(0);
    let metrics = proxy.metrics().await.unwrap();
    let sum = |name, labels| metrics.sum(name, labels);
    assert_eq!(sum("istio_dns_upstream_failures_total", &[]), 2.0);
    assert_eq!(
        sum("istio_dns_unanswered_total", &[("reason", "timeout")]),
        2.0
    );
    assert_eq!(
        sum("istio_dns_upstream_request_duration_seconds_count", &[]),
        4.0
    );
    assert_eq!(
        sum(
            "istio_dns_upstream_request_duration_seconds_bucket",
            &[("le", "0.1")]
        ),
        2.0
    );

    let silent = |line: &testkit::Line| line.field("domain") == "silent.up.example.";
    let line = proxy.log().wait("the failure", silent).await;
    assert!(
        line.field("result").starts_with("forwarding failed ("),
        "{line:?}"
    );
}

#[tokio::test]
async fn a_server_that_is_down_or_silent_is_stood_in_for_by_the_next() {
    let stage = Named::new().unwrap();
    let netns = stage.world.node(0).netns();
    let mute = Scripted::start(netns, "10.20.0.1:53".parse().unwrap(), |_| Vec::new()).unwrap();
    let at6 = SocketAddr::new(UPSTREAM6, DNS);
    let _alive = Scripted::by_first_label(netns, at6).unwrap();
    // Nobody listens at the second, nobody is at the third.
    let servers = [
        UPSTREAM.to_string(),
        "172.31.0.1".into(),
        "10.20.0.99".into(),
        UPSTREAM6.to_string(),
    ];
    let listed = servers
        .map(|server| format!("nameserver {server}\n"))
        .concat();
    stage
        .upstreams(&format!("{listed}options timeout:2 attempts:5\n"))
        .unwrap();
    let _cluster = stage.start(&stage.mesh()).await.unwrap();

    let answer = stage
        .web
        .datagram(RESOLVER, &a("one.up.example."))
        .await
        .unwrap();
    assert_eq!(dns::read(&answer).answers.len(), 1);
    assert_eq!(mute.asked().len(), 1, "in the order of the file");
    for name in ["two.up.example.", "three.up.example."] {
        let began = Instant::now();
        stage.web.datagram(RESOLVER, &a(name)).await.unwrap();
        assert!(
            began.elapsed() < Duration::from_secs(1),
            "who helped is asked first"
        );
    }
    assert_eq!(mute.asked().len(), 1);
}

/// As applications see it: the first server is gone, and the second one is slow, sends lies before the truth, or needs a connection.
#[tokio::test]
async fn both_c_libraries_get_along_with_bad_servers() {
    let stage = Named::new().unwrap();
    let _upstream = stage.scripted().unwrap();
    let servers = format!("nameserver 10.20.0.99\nnameserver {UPSTREAM}\n");
    stage.upstreams(&servers).unwrap();
    let _cluster = stage.start(&stage.mesh()).await.unwrap();
    let resolv_conf = stage.pod_resolv_conf("shop").unwrap();
    let found = async |library, name| {
        let how = (library, &*resolv_conf);
        let found = stage.web.look_up(&stage.world, how, name).await.unwrap();
        found.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    for library in [Library::Glibc, Library::Musl] {
        for name in ["one.up.example.", "slow.up.example.", "liar.up.example."] {
            let found = found(library, name).await;
            assert_eq!(found, ["192.0.2.0"], "{library:?} {name}");
        }
    }
    let long = found(Library::Glibc, "big.up.example.").await;
    assert_eq!(long.len(), 255, "4 KB, over a connection");
}

#[tokio::test]
async fn a_changed_resolv_conf_counts_for_the_next_query() {
    let stage = Named::new().unwrap();
    let _upstream = stage.scripted().unwrap();
    stage.upstreams("# nothing yet\n").unwrap();
    let cluster = stage.start(&stage.mesh()).await.unwrap();
    let ask = async || {
        let answer = stage.web.datagram(RESOLVER, &a("one.up.example.")).await;
        dns::read(&answer.unwrap()).metadata.response_code
    };
    assert_eq!(ask().await, ResponseCode::ServFail, "nobody to ask");
    let labels = [("reason", "no_server")];
    let metrics = cluster.proxy(0).metrics().await.unwrap();
    assert_eq!(metrics.sum("istio_dns_unanswered_total", &labels), 1.0);
    stage
        .upstreams(&format!("nameserver {UPSTREAM}\n"))
        .unwrap();
    let answered = async || (ask().await == ResponseCode::NoError).then_some(());
    wait::until(wait::SOON, "the new server is asked", answered).await;
}

#[tokio::test]
async fn what_is_no_query_is_refused_and_what_is_no_message_is_dropped() {
    let stage = Named::new().unwrap();
    let upstream = stage.scripted().unwrap();
    let cluster = stage.start(&stage.mesh()).await.unwrap();
    for (query, code) in [
        (
            odd(|query| query.metadata.op_code = OpCode::Notify),
            ResponseCode::NotImp,
        ),
        (odd(|query| query.queries.clear()), ResponseCode::FormErr),
    ] {
        let answer = dns::read(&stage.web.datagram(RESOLVER, &query).await.unwrap());
        assert_eq!(answer.metadata.response_code, code);
    }
    let socket = stage.web.udp("0.0.0.0:0".parse().unwrap()).unwrap();
    for nonsense in [&b""[..], b"x", &[0xff; 600], &[0; 12], &a("a.b.")[..14]] {
        socket.send_to(nonsense, RESOLVER).await.unwrap();
    }
    let labels = [("request_query_type", "unknown")];
    let proxy = cluster.proxy(0);
    proxy
        .metric("istio_dns_requests_total", &labels, |now| now >= 4.0)
        .await;
    // Over a connection, no message, and the beginning of one that is longer than a query may be.
    for nonsense in [&[0, 3, 1, 2, 3][..], &[0xff, 0xff, 0]] {
        let mut stream = stage.web.connect(RESOLVER).await.unwrap();
        stream.write_all(nonsense).await.unwrap();
        traffic::closed(&mut stream, wait::SOON).await.unwrap();
    }
    let over_tcp = [
        ("request_query_type", "unknown"),
        ("request_protocol", "tcp"),
    ];
    let metrics = proxy.metrics().await.unwrap();
    assert_eq!(metrics.sum("istio_dns_requests_total", &over_tcp), 2.0);
    let malformed = [("reason", "malformed")];
    assert!(metrics.sum("istio_dns_unanswered_total", &malformed) >= 6.0);
    assert!(
        stage
            .web
            .datagram(RESOLVER, &a("still.there."))
            .await
            .is_ok()
    );
    assert_eq!(
        upstream.asked().len(),
        1,
        "only the last was anybody's business"
    );
}

#[tokio::test]
async fn queries_leave_the_pod_with_the_mark_and_in_a_zone_of_their_own() {
    let stage = Named::new().unwrap();
    let _upstream = stage.dnsmasq("up.example", &[]).await.unwrap();
    let _cluster = stage.start(&stage.mesh()).await.unwrap();
    let web = stage.web.netns();
    web.command("nft", &["-f", "-"], COUNTERS).unwrap();
    for (resolver, option) in [
        (RESOLVER, "+notcp"),
        (RESOLVER6, "+notcp"),
        (RESOLVER, "+tcp"),
    ] {
        let at = format!("@{}", resolver.ip());
        let dug = stage
            .web
            .dig(&[&at, option, "up.example", "NS"])
            .await
            .unwrap();
        assert_eq!(dug.status, "NOERROR");
    }
    let packets = |counter: &str| {
        let listed = web.command("nft", &["list", "counter", "inet", "probe", counter], "");
        let listed = listed.unwrap();
        let words: Vec<_> = listed.split_whitespace().map(str::to_owned).collect();
        let at = words.iter().position(|word| word == "packets").unwrap();
        words[at + 1].parse::<u32>().unwrap()
    };
    assert_eq!(packets("asked"), 2, "UDP queries with mark and zone");
    assert_eq!(packets("answered"), 2, "UDP answers in the same zone");
    assert!(packets("connected") > 2, "TCP with the mark");
    assert_eq!(packets("astray"), 0, "port 53 without the mark");
}

const COUNTERS: &str = r#"table inet probe {
  counter asked {}
  counter answered {}
  counter connected {}
  counter astray {}
  chain out {
    type filter hook postrouting priority 200; policy accept;
    oifname != "eth0" accept
    udp dport 53 meta mark & 0xfff == 0x539 ct zone 1 counter name asked accept
    tcp dport 53 meta mark & 0xfff == 0x539 counter name connected accept
    meta l4proto { tcp, udp } th dport 53 counter name astray
  }
  chain in {
    type filter hook input priority 200; policy accept;
    iifname "eth0" udp sport 53 ct zone 1 counter name answered
  }
}
"#;
