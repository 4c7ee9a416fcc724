use http::{HeaderMap, HeaderValue, Uri};
use proptest::prelude::*;

use super::{
    AuthorityError, BAGGAGE, Baggage, FORWARDED, Forwarded, TRACEPARENT, TraceParent, WorkloadKind,
    authority, forwarded_host,
};

const SAMPLE: &str = "k8s.cluster.name=c1,k8s.namespace.name=shop,k8s.pod.name=cart-v1,\
    service.name=cart,service.version=v1,cloud.region=eu,cloud.availability_zone=eu-a";

fn headers(name: &http::HeaderName, values: &[&[u8]]) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for value in values {
        headers.append(name, HeaderValue::from_bytes(value).unwrap());
    }
    headers
}

fn sample() -> Baggage<&'static str> {
    Baggage {
        cluster: "c1",
        namespace: "shop",
        kind: WorkloadKind::Pod,
        workload: "cart-v1",
        service: "cart",
        revision: "v1",
        region: "eu",
        zone: "eu-a",
    }
}

#[test]
fn baggage_has_the_agreed_order_and_no_empty_fields() {
    assert_eq!(sample().to_string(), SAMPLE);
    let few = Baggage {
        namespace: "shop",
        ..Baggage::default()
    };
    assert_eq!(few.to_value(), "k8s.namespace.name=shop");
    assert_eq!(Baggage::<&str>::default().to_value(), "");
}

#[test]
fn baggage_is_read_as_other_proxies_read_it() {
    let lines = |values: &[&[u8]]| headers(&BAGGAGE, values);
    assert_eq!(Baggage::read(&lines(&[SAMPLE.as_bytes()])), Some(sample()));
    assert_eq!(Baggage::read(&lines(&[])), None);
    let foreign = lines(&[b"service.name=a", b"caf\xe9=x"]);
    assert_eq!(Baggage::read(&foreign), None);
    let split = lines(&[b"service.name=a,x=y", b"service.name=b=c,cloud.region"]);
    let split = Baggage::read(&split).unwrap();
    assert_eq!((split.service, split.region), ("b", ""));
    let job = lines(&[b"k8s.job.name=j"]);
    let job = Baggage::read(&job).unwrap();
    assert_eq!((job.kind, job.workload), (WorkloadKind::Job, "j"));
    let quoted = lines(&[b"service.name=\"a,b\",cloud.zone==,="]);
    assert_eq!(Baggage::read(&quoted).unwrap().service, "\"a");
}

#[test]
fn forwarded_names_the_source_and_maybe_the_host() {
    let forwarded = |source: &str, host| {
        let source = source.parse().unwrap();
        Forwarded { source, host }.to_string()
    };
    assert_eq!(forwarded("10.0.1.7:51324", None), r#"for="10.0.1.7:51324""#);
    assert_eq!(
        forwarded("[fd00::7]:1", Some("a.b")),
        r#"for="[fd00::7]:1";host=a.b"#
    );
    assert_eq!(forwarded("10.0.1.7:1", Some("a;b")), r#"for="10.0.1.7:1""#);
}

#[test]
fn the_host_of_forwarded_is_found_or_absent() {
    let cases: [(&[u8], Option<&str>); 7] = [
        (br#"for="1.2.3.4:5";host=a.b"#, Some("a.b")),
        (br#"for="1.2.3.4:5"; host="a.b""#, Some("a.b")),
        (b"host=a;host=b", Some("a")),
        (b"host=", None),
        (b"host=\"\"", None),
        (b"for=x", None),
        (b"host=\xe9", None),
    ];
    for (value, host) in cases {
        assert_eq!(
            forwarded_host(&headers(&FORWARDED, &[value])),
            host,
            "{value:?}"
        );
    }
}

#[test]
fn a_malformed_traceparent_is_absent() {
    let read = |text: &str| TraceParent::read(&headers(&TRACEPARENT, &[text.as_bytes()]));
    let good = format!("00-{}-{}-01", "4b".repeat(16), "0f".repeat(8));
    let parsed = read(&good).unwrap();
    assert_eq!(parsed.span_id, 0x0f0f_0f0f_0f0f_0f0f);
    assert!(parsed.sampled);
    assert_eq!(parsed.to_string(), good);
    let untold = good.replace("-01", "-00");
    assert!(!read(&untold).unwrap().sampled);
    let bad = [
        format!("00-{}", "0".repeat(52)),
        format!("{good}-"),
        good.replace('4', "+"),
        good.replace('4', "g"),
        String::new(),
        "-".repeat(55),
    ];
    for text in bad {
        assert_eq!(read(&text), None, "{text}");
    }
}

#[test]
fn an_authority_needs_host_and_port() {
    let check = |text: &str| {
        let uri: Uri = text.parse().unwrap();
        authority(&uri).map(str::to_owned)
    };
    for good in ["10.0.0.5:8080", "[fd00::5]:80", "a.b.svc:9080", "a:0"] {
        assert_eq!(check(good).as_deref(), Ok(good));
    }
    for bad in ["10.0.0.5", "a.b", "[fd00::5]"] {
        assert!(check(bad).is_err(), "{bad}");
    }
    assert_eq!(check("u@a:80"), Err(AuthorityError::Host));
    assert_eq!(
        authority(&Uri::from_static("/x")),
        Err(AuthorityError::Host)
    );
}

proptest! {
    #[test]
    fn plain_baggage_comes_back(words in prop::collection::vec("[!-+\\--<>-~]{0,12}", 7)) {
        let [cluster, namespace, workload, service, revision, region, zone] =
            <[String; 7]>::try_from(words).unwrap();
        let kind = if workload.is_empty() { WorkloadKind::default() } else { WorkloadKind::Job };
        let baggage = Baggage {
            cluster: &*cluster,
            namespace: &namespace,
            kind,
            workload: &workload,
            service: &service,
            revision: &revision,
            region: &region,
            zone: &zone,
        };
        let lines = headers(&BAGGAGE, &[baggage.to_value().as_bytes()]);
        prop_assert_eq!(Baggage::read(&lines), Some(baggage));
    }

    #[test]
    fn no_text_bends_the_structure(name in any::<String>(), host in any::<String>()) {
        let baggage = Baggage { service: name.as_str(), zone: "z", ..Baggage::default() };
        let lines = headers(&BAGGAGE, &[baggage.to_value().as_bytes()]);
        let read = Baggage::read(&lines).unwrap();
        prop_assert!(read.service == name || read.service.is_empty());
        prop_assert_eq!(read.zone, "z");
        let source = "1.2.3.4:5".parse().unwrap();
        let value = Forwarded { source, host: Some(&host) }.to_value();
        let headers = headers(&FORWARDED, &[value.as_bytes()]);
        prop_assert!(forwarded_host(&headers).is_none_or(|read| read == host));
    }

    #[test]
    fn readers_never_panic(bytes in prop::collection::vec(32u8..=255, 0..80)) {
        for name in [BAGGAGE, FORWARDED, TRACEPARENT] {
            let Ok(value) = HeaderValue::from_bytes(&bytes) else { continue };
            let mut headers = HeaderMap::new();
            headers.insert(name, value);
            let _ = (Baggage::read(&headers), forwarded_host(&headers), TraceParent::read(&headers));
        }
    }

    #[test]
    fn traces_come_back(
        trace_id in any::<u128>(), span_id in any::<u64>(), sampled in any::<bool>(),
    ) {
        let trace = TraceParent { trace_id, span_id, sampled };
        let value = trace.to_value();
        prop_assert_eq!(value.len(), 55);
        prop_assert_eq!(TraceParent::read(&headers(&TRACEPARENT, &[value.as_bytes()])), Some(trace));
    }
}
