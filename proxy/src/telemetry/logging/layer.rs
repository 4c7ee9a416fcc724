//! The subscriber layer: decides by the filter, formats, hands to the queue.

use std::cell::RefCell;

use time::OffsetDateTime;
use tracing::{
    Event, Level, Metadata, Subscriber,
    level_filters::LevelFilter,
    span::{Attributes, Id, Record},
    subscriber::Interest,
};
use tracing_subscriber::{Layer, layer::Context, registry::LookupSpan};

use super::{
    Levels,
    format::{Fields, Message, json_string, write_to},
    queue::Queue,
};
use crate::config::LogFormat;

/// Writes every record that the filter lets pass.
pub(super) struct LogLayer {
    format: LogFormat,
    levels: Levels,
    queue: Queue,
}

/// The fields of a span, formatted once when they are known.
struct SpanFields(Box<str>);

impl LogLayer {
    pub(super) fn new(format: LogFormat, levels: Levels, queue: Queue) -> Self {
        Self {
            format,
            levels,
            queue,
        }
    }

    fn line<S>(&self, line: &mut String, event: &Event<'_>, context: &Context<'_, S>)
    where
        S: Subscriber + for<'a> LookupSpan<'a>,
    {
        match self.format {
            LogFormat::Text => text(line, event, context),
            LogFormat::Json => json(line, event, context),
        }
    }
}

impl<S> Layer<S> for LogLayer
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    fn register_callsite(&self, metadata: &'static Metadata<'static>) -> Interest {
        // The answer is remembered, so that a disabled call site costs one load.
        if self.levels.current.load().enables(metadata) {
            Interest::always()
        } else {
            Interest::never()
        }
    }

    fn enabled(&self, metadata: &Metadata<'_>, _: Context<'_, S>) -> bool {
        self.levels.current.load().enables(metadata)
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(self.levels.current.load().max_level())
    }

    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        if attributes.is_empty() {
            return;
        }
        let fields = with_buffer(|buffer| {
            attributes.record(&mut Fields::new(self.format, buffer));
            Box::from(buffer.as_str())
        });
        if let Some(span) = context.span(id) {
            span.extensions_mut().insert(SpanFields(fields));
        }
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        let mut extensions = span.extensions_mut();
        let old = extensions.remove::<SpanFields>();
        let fields = with_buffer(|buffer| {
            let mut fields = match old {
                Some(SpanFields(old)) if !old.is_empty() => {
                    buffer.push_str(&old);
                    Fields::continued(self.format, buffer)
                }
                _ => Fields::new(self.format, buffer),
            };
            values.record(&mut fields);
            Box::from(buffer.as_str())
        });
        extensions.insert(SpanFields(fields));
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        with_buffer(|line| {
            self.line(line, event, &context);
            self.queue.push(line.as_bytes());
        });
    }
}

/// `TIMESTAMP⇥level⇥scope[:span{fields}]…⇥message⇥fields`
fn text<S>(line: &mut String, event: &Event<'_>, context: &Context<'_, S>)
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    let metadata = event.metadata();
    timestamp(line, OffsetDateTime::now_utc());
    line.push('\t');
    line.push_str(level(*metadata.level()));
    line.push('\t');
    line.push_str(strip_crate(metadata.target()));
    let scope = context.event_scope(event).into_iter();
    for span in scope.flat_map(|scope| scope.from_root()) {
        line.push(':');
        line.push_str(span.name());
        if let Some(SpanFields(fields)) = span.extensions().get()
            && !fields.is_empty()
        {
            line.push('{');
            line.push_str(fields);
            line.push('}');
        }
    }
    line.push('\t');
    event.record(&mut Message::new(LogFormat::Text, metadata.target(), line));
    event.record(&mut Fields::new(LogFormat::Text, line));
    line.push('\n');
}

/// `{"level":…,"time":…,"scope":…,"message":…,"msg":…,fields…,"span":{fields}…}`
fn json<S>(line: &mut String, event: &Event<'_>, context: &Context<'_, S>)
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    let metadata = event.metadata();
    line.push_str("{\"level\":\"");
    line.push_str(level(*metadata.level()));
    line.push_str("\",\"time\":\"");
    timestamp(line, OffsetDateTime::now_utc());
    line.push_str("\",\"scope\":");
    json_string(line, metadata.target());
    event.record(&mut Message::new(LogFormat::Json, metadata.target(), line));
    event.record(&mut Fields::continued(LogFormat::Json, line));
    let scope = context.event_scope(event).into_iter();
    for span in scope.flat_map(|scope| scope.from_root()) {
        line.push(',');
        json_string(line, span.name());
        line.push_str(":{");
        if let Some(SpanFields(fields)) = span.extensions().get() {
            line.push_str(fields);
        }
        line.push('}');
    }
    line.push_str("}\n");
}

/// RFC 3339 in UTC with six fractional digits.
pub(super) fn timestamp(line: &mut String, now: OffsetDateTime) {
    let (year, month, day) = now.to_calendar_date();
    let (hour, minute, second, micro) = now.to_hms_micro();
    let month = u8::from(month);
    write_to(
        line,
        format_args!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{micro:06}Z"),
    );
}

fn level(level: Level) -> &'static str {
    match level {
        Level::ERROR => "error",
        Level::WARN => "warn",
        Level::INFO => "info",
        Level::DEBUG => "debug",
        Level::TRACE => "trace",
    }
}

/// Text shows module paths without the crate, and the scopes that carry the old name without it.
fn strip_crate(target: &str) -> &str {
    ["culvert::", "ztunnel::"]
        .iter()
        .find_map(|prefix| target.strip_prefix(prefix))
        .unwrap_or(target)
}

/// Lends the empty buffer of this thread; a value that logs while it is formatted gets its own.
fn with_buffer<T>(f: impl FnOnce(&mut String) -> T) -> T {
    thread_local! {
        static BUFFER: RefCell<String> = const { RefCell::new(String::new()) };
    }
    BUFFER.with(|buffer| match buffer.try_borrow_mut() {
        Ok(mut buffer) => {
            buffer.clear();
            let result = f(&mut buffer);
            buffer.shrink_to(KEPT_BYTES);
            result
        }
        Err(_) => f(&mut String::new()),
    })
}

/// What a thread keeps of its buffer after a long record.
const KEPT_BYTES: usize = 4 << 10;
