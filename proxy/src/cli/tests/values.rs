//! The grammar of single values.

use std::time::Duration;

use proptest::prelude::*;

use super::given;
use crate::cli::value;

#[test]
fn every_boolean_accepts_two_spellings() {
    for key in [
        "XDS_ON_DEMAND",
        "FAKE_CA",
        "ENABLE_PROXY",
        "INPOD_PORT_REUSE",
        "ENABLE_ORIG_SRC",
        "IPV6_ENABLED",
        "LOCALHOST_APP_TUNNEL",
        "ENABLE_RESPONSE_BAGGAGE",
        "UNSTABLE_ENABLE_SOCKS5",
        "KEEPALIVE_ENABLED",
        "USER_TIMEOUT_ENABLED",
    ] {
        for bad in ["", "1", "0", "TRUE", "False", "yes", " true"] {
            let faulty = given(&[(key, bad)]).faulty();
            assert_eq!(faulty, [key.to_owned()].into(), "{key}={bad}");
        }
    }
}

#[test]
fn durations() {
    for (text, millis) in [
        ("250ms", 250),
        ("5m", 300_000),
        ("1h30m", 5_400_000),
        ("24h", 86_400_000),
        ("1h 30m", 5_400_000),
        ("90", 90_000),
        ("0", 0),
        ("1s500ms", 1_500),
        ("1000000ns", 1),
        ("1000us", 1),
        ("1000µs", 1),
        ("1d", 86_400_000),
        ("1w", 604_800_000),
        ("1mon", 2_592_000_000),
        ("1y", 31_536_000_000),
        ("1m+30", 90_000),
        ("1m + 30s", 90_000),
        ("2*3s", 6_000),
        ("1m*10", 600_000),
    ] {
        assert_eq!(
            value::duration(text),
            Ok(Duration::from_millis(millis)),
            "{text}"
        );
    }
    for bad in [
        "",
        " ",
        "-1s",
        "1.5s",
        "x",
        "5 parsecs",
        "s",
        "99999999999999999999y",
        "600y600y600y",
    ] {
        assert!(value::duration(bad).is_err(), "{bad:?}");
    }
}

#[test]
fn cpu_quantities() {
    for (text, cpus) in [
        ("2", 2),
        ("1.5", 2),
        ("500m", 1),
        ("1001m", 2),
        ("0.000000001", 1),
    ] {
        assert_eq!(value::cpus(text), Ok(cpus), "{text}");
    }
    for bad in [
        "",
        "0",
        "0m",
        "-1",
        "inf",
        "NaN",
        "1.",
        ".5",
        "1.5.1",
        "m",
        "1e3",
        "9999999999",
    ] {
        assert!(value::cpus(bad).is_err(), "{bad:?}");
    }
}

proptest! {
    #[test]
    fn integers_round_trip(number: u32) {
        prop_assert_eq!(value::integer(&number.to_string(), &(0..=u32::MAX)), Ok(number));
    }

    #[test]
    fn milli_cpus_round_up(milli in 1_usize..10_000_000) {
        prop_assert_eq!(value::cpus(&format!("{milli}m")), Ok(milli.div_ceil(1000)));
    }

    #[test]
    fn a_share_of_the_cores_is_exact(cores in 1_usize..10_000, percent in 1_usize..=100) {
        let threads = value::Threads::parse(&format!("{percent}%")).unwrap();
        prop_assert_eq!(threads.of(cores), (cores * percent).div_ceil(100));
    }
}
