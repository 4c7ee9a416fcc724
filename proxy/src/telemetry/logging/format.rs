//! How the parts of a record are written, in both formats.

use std::{
    error::Error,
    fmt::{self, Debug},
};

use tracing::field::{Field, Visit};

use super::DOCUMENT_SCOPE;
use crate::{config::LogFormat, telemetry::causes::with_causes};

/// Writes the fields of a record or span but its message: `k=v k=v` or `"k":v,"k":v`.
pub(super) struct Fields<'a> {
    format: LogFormat,
    out: &'a mut String,
    /// Nothing stands before the next field that it must be separated from.
    first: bool,
}

/// Writes the message of a record and what surrounds it, or nothing if it has none.
pub(super) struct Message<'a> {
    format: LogFormat,
    /// Line feeds of the message stay what they are, in text.
    document: bool,
    out: &'a mut String,
}

enum Value<'a> {
    Text(&'a str),
    /// Addresses and the like: bare in text, a string in JSON.
    Bare(fmt::Arguments<'a>),
    Number(fmt::Arguments<'a>),
}

impl<'a> Fields<'a> {
    /// Fields that begin something.
    pub(super) fn new(format: LogFormat, out: &'a mut String) -> Self {
        Self {
            format,
            out,
            first: true,
        }
    }

    /// Fields that follow others.
    pub(super) fn continued(format: LogFormat, out: &'a mut String) -> Self {
        Self {
            format,
            out,
            first: false,
        }
    }

    fn put(&mut self, field: &Field, value: Value<'_>) {
        if field.name() == MESSAGE {
            return;
        }
        let first = std::mem::replace(&mut self.first, false);
        match self.format {
            LogFormat::Text => {
                if !first {
                    self.out.push(' ');
                }
                self.out.push_str(field.name());
                self.out.push('=');
            }
            LogFormat::Json => {
                if !first {
                    self.out.push(',');
                }
                json_string(self.out, field.name());
                self.out.push(':');
            }
        }
        write_value(self.format, self.out, value);
    }
}

impl<'a> Message<'a> {
    pub(super) fn new(format: LogFormat, scope: &str, out: &'a mut String) -> Self {
        Self {
            format,
            document: scope == DOCUMENT_SCOPE,
            out,
        }
    }

    fn put(&mut self, field: &Field, text: fmt::Arguments<'_>) {
        if field.name() != MESSAGE {
            return;
        }
        match self.format {
            LogFormat::Text => {
                if self.document {
                    write_to(self.out, text);
                } else {
                    write_to(&mut OneLine(self.out), text);
                }
                self.out.push('\t');
            }
            LogFormat::Json => {
                // Istio's own statistics read the second name, log pipelines the first.
                for name in [",\"message\":", ",\"msg\":"] {
                    self.out.push_str(name);
                    write_value(self.format, self.out, Value::Bare(text));
                }
            }
        }
    }
}

impl Visit for Message<'_> {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, format_args!("{value}"));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.put(field, format_args!("{value:?}"));
    }
}

impl Visit for Fields<'_> {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, Value::Text(value));
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        let number = format_args!("{value}");
        let finite = value.is_finite();
        self.put(
            field,
            if finite {
                Value::Number(number)
            } else {
                Value::Bare(number)
            },
        );
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, Value::Number(format_args!("{value}")));
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, Value::Number(format_args!("{value}")));
    }

    fn record_i128(&mut self, field: &Field, value: i128) {
        self.put(field, Value::Number(format_args!("{value}")));
    }

    fn record_u128(&mut self, field: &Field, value: u128) {
        self.put(field, Value::Number(format_args!("{value}")));
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, Value::Bare(format_args!("{value}")));
    }

    /// The error and its causes, as one text.
    fn record_error(&mut self, field: &Field, value: &(dyn Error + 'static)) {
        self.put(field, Value::Text(&with_causes(value)));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.put(field, Value::Bare(format_args!("{value:?}")));
    }
}

fn write_value(format: LogFormat, out: &mut String, value: Value<'_>) {
    match (format, value) {
        (_, Value::Number(number)) => write_to(out, number),
        (LogFormat::Text, Value::Text(text)) => write_to(out, format_args!("{text:?}")),
        (LogFormat::Text, Value::Bare(text)) => write_to(&mut OneLine(out), text),
        (LogFormat::Json, Value::Text(text)) => json_string(out, text),
        (LogFormat::Json, Value::Bare(text)) => {
            out.push('"');
            write_to(&mut Json(out), text);
            out.push('"');
        }
    }
}

/// Writes `text` as a JSON string.
pub(super) fn json_string(out: &mut String, text: &str) {
    write_value(LogFormat::Json, out, Value::Bare(format_args!("{text}")));
}

/// Keeps what others display on one line and within its column.
struct OneLine<'a>(&'a mut String);

impl fmt::Write for OneLine<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        escape(
            self.0,
            text,
            |c| c.is_control(),
            |out, c| out.extend(c.escape_debug()),
        );
        Ok(())
    }
}

/// Escapes for the inside of a JSON string.
struct Json<'a>(&'a mut String);

impl fmt::Write for Json<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let special = |c: char| c == '"' || c == '\\' || c < ' ';
        escape(self.0, text, special, |out, c| match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\t' => out.push_str("\\t"),
            _ => write_to(out, format_args!("\\u{:04x}", u32::from(c))),
        });
        Ok(())
    }
}

fn escape(
    out: &mut String,
    text: &str,
    special: impl Fn(char) -> bool,
    replace: impl Fn(&mut String, char),
) {
    let mut rest = text;
    while let Some((plain, tail)) = rest.find(&special).and_then(|at| rest.split_at_checked(at)) {
        out.push_str(plain);
        let mut chars = tail.chars();
        if let Some(c) = chars.next() {
            replace(out, c);
        }
        rest = chars.as_str();
    }
    out.push_str(rest);
}

/// Writes into a buffer. A `Display` of others may fail midway; the record then ends there.
pub(super) fn write_to(out: &mut impl fmt::Write, text: fmt::Arguments<'_>) {
    let _ = out.write_fmt(text);
}

/// The field that tracing keeps the message in.
const MESSAGE: &str = "message";
