use std::{error::Error, sync::mpsc};

use serde_json::{Value, json};
use time::{Date, Month, OffsetDateTime, Time};
use tracing::{debug, error, info, info_span, trace, warn};

use super::*;
use crate::config::LogFormat;

/// The lines that `f` logs, without the time, which is checked for its shape.
pub(in crate::telemetry) fn capture(
    format: LogFormat,
    filter: &str,
    f: impl FnOnce(&Levels),
) -> Vec<String> {
    struct Tap(mpsc::Sender<Vec<u8>>);
    impl io::Write for Tap {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.send(bytes.to_vec()).unwrap();
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let (tx, rx) = mpsc::channel();
    let writer = Writer::spawn(Tap(tx)).unwrap();
    let levels = Levels::new(filter.parse().unwrap());
    let layer = LogLayer::new(format, levels.clone(), writer.queue());
    let subscriber = tracing_subscriber::registry().with(layer);
    tracing::subscriber::with_default(subscriber, || f(&levels));
    drop(writer);
    let bytes: Vec<Vec<u8>> = rx.try_iter().collect();
    let text = String::from_utf8(bytes.concat()).unwrap();
    text.lines()
        .map(|line| without_time(format, line))
        .collect()
}

fn without_time(format: LogFormat, line: &str) -> String {
    let (before, time, after) = match format {
        LogFormat::Text => {
            let (time, after) = line.split_once('\t').expect("a time and a TAB");
            ("", time, after)
        }
        LogFormat::Json => {
            let (before, rest) = line.split_once("\"time\":\"").expect("a time");
            let (time, after) = rest.split_once("\",").expect("more after the time");
            (before, time, after)
        }
    };
    let shape: String = time
        .chars()
        .map(|c| if c.is_ascii_digit() { '0' } else { c })
        .collect();
    assert_eq!(shape, "0000-00-00T00:00:00.000000Z");
    format!("{before}{after}")
}

#[derive(Debug, thiserror::Error)]
#[error("outer \"fault\"")]
struct Outer(#[source] std::num::ParseIntError);

fn say_everything(_: &Levels) {
    let cause = "x".parse::<u8>().unwrap_err();
    info!(target: "culvert::pods", "plain");
    warn!(target: "culvert::pods::agent", text = "a \"b\"\\\n", "with text");
    info!(target: "h2", bare = %"10.0.0.1:80", debug = ?Some("s"), n = 7_u64, neg = -1, f = 0.5, ok = true);
    error!(target: "culvert::flow", error = &Outer(cause) as &dyn Error, "failed");
    info!(target: "ztunnel::state", absent = None::<&str>, "two\nlines\tand {}", "a\u{1b}[31m");
    let outer = info_span!("outbound", flow.id = 3, src.addr = %"10.0.0.2:1", later = tracing::field::Empty);
    let _outer = outer.enter();
    let _inner = info_span!("connect").entered();
    outer.record("later", "yes");
    info!(target: "culvert::flow", "inside");
    info!(target: "access", parent: None, "no spans");
}

#[test]
fn text_lines_have_their_columns() {
    let lines = capture(LogFormat::Text, "info", say_everything);
    assert_eq!(
        lines,
        [
            "info\tpods\tplain\t",
            "warn\tpods::agent\twith text\ttext=\"a \\\"b\\\"\\\\\\n\"",
            "info\th2\tbare=10.0.0.1:80 debug=Some(\"s\") n=7 neg=-1 f=0.5 ok=true",
            "error\tflow\tfailed\terror=\"outer \\\"fault\\\": invalid digit found in string\"",
            "info\tstate\ttwo\\nlines\\tand a\\u{1b}[31m\t",
            "info\tflow:outbound{flow.id=3 src.addr=10.0.0.2:1 later=\"yes\"}:connect\tinside\t",
            "info\taccess\tno spans\t",
        ]
    );
}

#[test]
fn json_lines_are_objects_in_order() {
    let lines = capture(LogFormat::Json, "info", say_everything);
    assert_eq!(
        lines,
        [
            r#"{"level":"info","scope":"culvert::pods","message":"plain","msg":"plain"}"#,
            r#"{"level":"warn","scope":"culvert::pods::agent","message":"with text","msg":"with text","text":"a \"b\"\\\n"}"#,
            r#"{"level":"info","scope":"h2","bare":"10.0.0.1:80","debug":"Some(\"s\")","n":7,"neg":-1,"f":0.5,"ok":"true"}"#,
            r#"{"level":"error","scope":"culvert::flow","message":"failed","msg":"failed","error":"outer \"fault\": invalid digit found in string"}"#,
            r#"{"level":"info","scope":"ztunnel::state","message":"two\nlines\tand a\u001b[31m","msg":"two\nlines\tand a\u001b[31m"}"#,
            r#"{"level":"info","scope":"culvert::flow","message":"inside","msg":"inside","outbound":{"flow.id":3,"src.addr":"10.0.0.2:1","later":"yes"},"connect":{}}"#,
            r#"{"level":"info","scope":"access","message":"no spans","msg":"no spans"}"#,
        ]
    );
    for line in lines {
        let object: Value = serde_json::from_str(&line).unwrap();
        assert!(object["level"] != json!(null), "{line}");
    }
}

#[test]
fn a_document_keeps_its_lines_in_text_only() {
    let log = |_: &Levels| info!(target: DOCUMENT_SCOPE, "configuration:\na: 1\nb: 2\n");
    let text = capture(LogFormat::Text, "info", |levels| {
        // The continued lines carry no time: put one there for the helper.
        info!(target: DOCUMENT_SCOPE, "c:\n2026-01-01T00:00:00.000000Z\tb: 2");
        let _ = levels;
    });
    assert_eq!(text, ["info\tconfig\tc:", "b: 2\t"]);
    let json = capture(LogFormat::Json, "info", log);
    assert!(
        json[0].ends_with(
            r#""message":"configuration:\na: 1\nb: 2\n","msg":"configuration:\na: 1\nb: 2\n"}"#
        ),
        "{json:?}"
    );
}

#[test]
fn levels_change_while_running() {
    let chatter = || {
        trace!(target: "culvert::mesh", "trace");
        debug!(target: "culvert::mesh", "debug");
        info!(target: "culvert::mesh", "info");
    };
    let lines = capture(LogFormat::Text, "info", |levels| {
        chatter();
        levels.append("ztunnel::state:debug").unwrap();
        chatter();
        levels.append("nonsense").unwrap_err();
        assert_eq!(levels.current().to_string(), "ztunnel::state=debug,info");
        levels.reset("off").unwrap();
        chatter();
        levels.reset("").unwrap();
        assert_eq!(levels.current().to_string(), "info");
        chatter();
    });
    let messages: Vec<_> = lines
        .iter()
        .map(|line| line.split('\t').nth(2).unwrap())
        .collect();
    assert_eq!(messages, ["info", "debug", "info", "info"]);
}

#[test]
fn a_value_that_logs_while_it_is_formatted_is_written_too() {
    struct Chatty;
    impl std::fmt::Display for Chatty {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            info!(target: "x", "within");
            f.write_str("value")
        }
    }
    // tracing passes no events from inside an event; what counts is that nothing panics.
    let lines = capture(
        LogFormat::Text,
        "info",
        |_| info!(target: "x", v = %Chatty, "around"),
    );
    assert_eq!(
        lines.last().map(String::as_str),
        Some("info\tx\taround\tv=value")
    );
}

#[test]
fn time_has_six_digits() {
    let date = Date::from_calendar_date(2026, Month::August, 2).unwrap();
    let time = Time::from_hms_nano(3, 4, 5, 67_000).unwrap();
    let mut line = String::new();
    layer::timestamp(&mut line, OffsetDateTime::new_utc(date, time));
    assert_eq!(line, "2026-08-02T03:04:05.000067Z");
}
