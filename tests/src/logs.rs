//! The proxy's log, line by line, in both formats.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use anyhow::Context as _;
use parking_lot::Mutex;
use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncRead, BufReader},
    process::Child,
    sync::watch,
    task::JoinSet,
};

use crate::wait::SOON;

/// One log line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// The line as written.
    pub raw: String,
    /// `info`, `warn`, …; empty if the line has no known form.
    pub level: String,
    /// `access`, `state`, …; in text form with the spans behind it.
    pub scope: String,
    /// The message.
    pub message: String,
    /// Fields by dotted name, quotes removed. Numbers and strings of JSON look the same.
    pub fields: BTreeMap<String, String>,
}

impl Line {
    /// Reads a line of either format; what has neither keeps its text in `raw` alone.
    #[must_use]
    pub fn parse(raw: &str) -> Self {
        Self::from_json(raw)
            .or_else(|| Self::from_text(raw))
            .unwrap_or_else(|| Self {
                raw: raw.to_owned(),
                level: String::new(),
                scope: String::new(),
                message: String::new(),
                fields: BTreeMap::new(),
            })
    }

    fn from_text(raw: &str) -> Option<Self> {
        let mut parts = raw.splitn(5, '\t');
        let (_time, level, scope) = (parts.next()?, parts.next()?, parts.next()?);
        // A tab follows every message; a record without one starts with its fields.
        let (message, fields) = match (parts.next()?, parts.next()) {
            (message, Some(fields)) => (message, fields),
            (fields, None) => ("", fields),
        };
        Some(Self {
            raw: raw.to_owned(),
            level: level.to_owned(),
            scope: scope.to_owned(),
            message: message.to_owned(),
            fields: text_fields(fields),
        })
    }

    fn from_json(raw: &str) -> Option<Self> {
        let Ok(Value::Object(mut object)) = serde_json::from_str(raw) else {
            return None;
        };
        let mut take = |key: &str| {
            object
                .remove(key)
                .map(|value| plain(&value))
                .unwrap_or_default()
        };
        let (level, scope, message) = (take("level"), take("scope"), take("message"));
        let fields = object
            .into_iter()
            .map(|(key, value)| (key, plain(&value)))
            .collect();
        Some(Self {
            raw: raw.to_owned(),
            level,
            scope,
            message,
            fields,
        })
    }

    /// A field, empty if absent.
    #[must_use]
    pub fn field(&self, name: &str) -> &str {
        self.fields.get(name).map_or("", String::as_str)
    }

    /// Whether this is an access line with that message, for example `connection complete`.
    #[must_use]
    pub fn is_access(&self, message: &str) -> bool {
        self.scope == "access" && self.message == message
    }
}

fn plain(value: &Value) -> String {
    value
        .as_str()
        .map_or_else(|| value.to_string(), str::to_owned)
}

/// `k=v k="quoted \" value"`.
fn text_fields(mut rest: &str) -> BTreeMap<String, String> {
    let mut fields = BTreeMap::new();
    while let Some((key, tail)) = rest.split_once('=') {
        let (value, after) = match tail.strip_prefix('"') {
            Some(quoted) => unquote(quoted),
            None => {
                let (value, after) = tail.split_once(' ').unwrap_or((tail, ""));
                (value.to_owned(), after)
            }
        };
        fields.insert(key.trim().to_owned(), value);
        rest = after;
    }
    fields
}

/// Reads up to the closing quote; returns the value and what follows it.
fn unquote(text: &str) -> (String, &str) {
    let (mut value, mut escaped) = (String::new(), false);
    for (at, character) in text.char_indices() {
        match character {
            _ if escaped => {
                value.push(character);
                escaped = false;
            }
            '\\' => escaped = true,
            '"' => return (value, &text[at + 1..]),
            _ => value.push(character),
        }
    }
    (value, "")
}

/// All lines of one proxy so far; cheap to clone.
#[derive(Debug, Clone)]
pub struct Log {
    lines: Arc<Mutex<Vec<Line>>>,
    written: watch::Sender<usize>,
}

impl Default for Log {
    fn default() -> Self {
        Self {
            lines: Arc::default(),
            written: watch::Sender::new(0),
        }
    }
}

impl Log {
    /// Follows what a program writes to its piped standard output and error, for as long as the tasks live.
    ///
    /// # Errors
    /// When one of them is not piped.
    pub fn of(child: &mut Child) -> anyhow::Result<(Self, JoinSet<()>)> {
        let (log, mut readers) = (Self::default(), JoinSet::new());
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        readers.spawn(log.clone().follow(stdout.context("stdout")?));
        readers.spawn(log.clone().follow(stderr.context("stderr")?));
        Ok((log, readers))
    }

    async fn follow(self, stream: impl AsyncRead + Unpin) {
        let mut lines = BufReader::new(stream).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            self.push(&line);
        }
    }

    pub(crate) fn push(&self, raw: &str) {
        self.lines.lock().push(Line::parse(raw));
        self.written.send_modify(|count| *count += 1);
    }

    /// How many lines there are: a place to continue from.
    #[must_use]
    pub fn mark(&self) -> usize {
        self.lines.lock().len()
    }

    /// All lines from `mark` on for which `which` holds.
    #[must_use]
    pub fn since(&self, mark: usize, which: impl Fn(&Line) -> bool) -> Vec<Line> {
        self.lines
            .lock()
            .iter()
            .skip(mark)
            .filter(|line| which(line))
            .cloned()
            .collect()
    }

    /// The first line that fits, past or future, within ten seconds.
    ///
    /// # Panics
    /// When there is none; the end of the log is in the message.
    pub async fn wait(&self, what: &str, which: impl Fn(&Line) -> bool) -> Line {
        self.wait_from(0, what, which).await
    }

    /// As [`Log::wait`], looking only at lines from `mark` on.
    ///
    /// # Panics
    /// As [`Log::wait`].
    pub async fn wait_from(&self, mark: usize, what: &str, which: impl Fn(&Line) -> bool) -> Line {
        self.find(mark, SOON, which)
            .await
            .unwrap_or_else(|| panic!("no log line: {what}; the log ends with\n{}", self.tail(40)))
    }

    /// The first line that fits from `mark` on, if it comes within `limit`.
    pub async fn find(
        &self,
        mark: usize,
        limit: Duration,
        which: impl Fn(&Line) -> bool,
    ) -> Option<Line> {
        let mut written = self.written.subscribe();
        let search = async {
            let mut next = mark;
            loop {
                written.borrow_and_update();
                let found = {
                    let lines = self.lines.lock();
                    let found = lines.iter().skip(next).find(|line| which(line)).cloned();
                    next = next.max(lines.len());
                    found
                };
                if found.is_some() || written.changed().await.is_err() {
                    return found;
                }
            }
        };
        tokio::time::timeout(limit, search).await.ok().flatten()
    }

    /// The last `count` lines as written.
    #[must_use]
    pub fn tail(&self, count: usize) -> String {
        let lines = self.lines.lock();
        let start = lines.len().saturating_sub(count);
        lines[start..]
            .iter()
            .map(|line| line.raw.as_str())
            .collect::<Vec<_>>()
            .join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_a_text_line_with_quotes() {
        let line = Line::parse(
            "2026-08-20T10:15:30.123456Z\tinfo\taccess\tconnection complete\tsrc.addr=10.0.0.7:40112 src.workload=\"we\\\"b\" bytes_sent=67 duration=\"13ms\"",
        );
        assert!(line.is_access("connection complete"));
        assert_eq!(line.level, "info");
        assert_eq!(line.field("src.addr"), "10.0.0.7:40112");
        assert_eq!(line.field("src.workload"), "we\"b");
        assert_eq!(line.field("bytes_sent"), "67");
        assert_eq!(line.field("duration"), "13ms");
        assert_eq!(line.field("error"), "");
    }

    #[test]
    fn reads_a_json_line_alike() {
        let line = Line::parse(
            r#"{"level":"warn","time":"2026-08-20T10:15:30.123456Z","scope":"access","message":"connection failed","bytes_sent":67,"error":"a b"}"#,
        );
        assert!(line.is_access("connection failed"));
        assert_eq!(
            (line.field("bytes_sent"), line.field("error")),
            ("67", "a b")
        );
    }

    #[test]
    fn keeps_what_it_cannot_read() {
        let line = Line::parse("thread 'main' panicked");
        assert_eq!(
            (line.raw.as_str(), line.message.as_str()),
            ("thread 'main' panicked", "")
        );
    }

    #[tokio::test]
    async fn finds_lines_written_before_and_after() {
        let log = Log::default();
        log.push("t\tinfo\taccess\tone\t");
        assert_eq!(
            log.wait("one", |line| line.message == "one").await.level,
            "info"
        );
        let mark = log.mark();
        let (found, ()) = tokio::join!(
            log.wait_from(mark, "two", |line| line.message == "two"),
            async {
                log.push("t\twarn\taccess\ttwo\t");
            }
        );
        assert_eq!(found.level, "warn");
        assert!(
            log.find(mark + 1, Duration::from_millis(20), |_| true)
                .await
                .is_none()
        );
    }
}
