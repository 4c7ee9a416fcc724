//! Tables and figures in plain text, for a hundred columns.

use std::time::Duration;

use testkit::Metrics;

use crate::say;

/// Prints columns as wide as their widest cell, two spaces apart, with headings.
pub(crate) fn table<const N: usize>(headings: [&str; N], rows: &[[String; N]]) {
    let headings = headings.map(str::to_owned);
    let lines = || std::iter::once(&headings).chain(rows);
    let mut widths = [0; N];
    for line in lines() {
        for (width, cell) in widths.iter_mut().zip(line) {
            *width = cell.len().max(*width);
        }
    }
    for line in lines() {
        let cells = line.iter().zip(&widths);
        let cells: Vec<String> = cells
            .map(|(cell, width)| format!("{cell:<width$}"))
            .collect();
        say(format_args!("  {}", cells.join("  ").trim_end()));
    }
}

/// Prints the traffic counters of a proxy; five of their 27 labels.
pub(crate) fn metrics(metrics: &Metrics) {
    const LABELS: [&str; 5] = [
        "reporter",
        "source_workload",
        "destination_service_name",
        "connection_security_policy",
        "response_flags",
    ];
    let ours = metrics.samples.iter();
    let rows: Vec<[String; 7]> = ours
        .filter(|sample| sample.name.starts_with("istio_tcp_"))
        .map(|sample| {
            let label = |name| sample.labels.get(name).cloned().unwrap_or_default();
            let [reporter, source, target, security, flags] = LABELS.map(label);
            let (name, value) = (sample.name.clone(), sample.value.to_string());
            [name, reporter, source, target, security, flags, value]
        })
        .collect();
    let headings = [
        "METRIC", "REPORTER", "SOURCE", "SERVICE", "SECURITY", "FLAGS", "VALUE",
    ];
    table(headings, &rows);
}

/// Three significant digits with a decimal prefix: `268 M`.
pub(crate) fn quantity(value: u64) -> String {
    let (mut scaled, mut prefixes) = (value as f64, ["", "k", "M", "G", "T"].into_iter());
    let mut prefix = prefixes.next().unwrap_or_default();
    while scaled >= 999.5 {
        scaled /= 1000.0;
        prefix = prefixes.next().unwrap_or("?");
    }
    match prefix {
        "" => format!("{scaled} "),
        _ if scaled < 9.95 => format!("{scaled:.1} {prefix}"),
        _ => format!("{scaled:.0} {prefix}"),
    }
    .trim_end()
    .to_owned()
}

/// `0.21 ms`, `12 ms`.
pub(crate) fn milliseconds(time: Duration) -> String {
    let value = time.as_secs_f64() * 1000.0;
    match value {
        ..1.0 => format!("{value:.2} ms"),
        1.0..10.0 => format!("{value:.1} ms"),
        _ => format!("{value:.0} ms"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_have_a_prefix() {
        for (value, text) in [
            (0, "0"),
            (999, "999"),
            (1000, "1.0 k"),
            (9_960, "10 k"),
            (999_600, "1.0 M"),
            (268_435_456, "268 M"),
        ] {
            assert_eq!(quantity(value), text);
        }
    }

    #[test]
    fn times_keep_two_digits() {
        for (micros, text) in [(212, "0.21 ms"), (2_440, "2.4 ms"), (12_300, "12 ms")] {
            assert_eq!(milliseconds(Duration::from_micros(micros)), text);
        }
    }
}
