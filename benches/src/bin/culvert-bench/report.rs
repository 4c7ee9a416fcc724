//! All figures, as a Markdown table and as JSON.

use std::{fmt, fs, path::Path};

use serde::Serialize;

use crate::{machine::Machine, options::Options};

/// What was measured so far.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    machine: Machine,
    rounds: u32,
    seconds: u64,
    quick: bool,
    rows: Vec<Row>,
    failures: Vec<String>,
}

/// One figure: the values of all rounds, and their median.
#[derive(Debug, Serialize)]
pub(crate) struct Row {
    measurement: String,
    unit: Unit,
    direct: Option<f64>,
    culvert: Option<f64>,
    ratio: Option<f64>,
    target: String,
    direct_rounds: Vec<f64>,
    culvert_rounds: Vec<f64>,
}

/// What a value counts; it says how it is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Unit {
    BytesPerSecond,
    PerSecond,
    SecondsPerByte,
    Seconds,
    /// Seconds, shown in thousandths.
    #[serde(rename = "seconds")]
    Milliseconds,
    Bytes,
    /// Bytes, shown in millions.
    #[serde(rename = "bytes")]
    Megabytes,
}

impl Report {
    pub(crate) fn new(machine: Machine, options: &Options) -> Self {
        Self {
            machine,
            rounds: options.rounds(),
            seconds: options.seconds(),
            quick: options.quick,
            rows: Vec::new(),
            failures: Vec::new(),
        }
    }

    pub(crate) fn push(&mut self, row: Row) {
        self.rows.push(row);
    }

    /// Notes what could not be measured, and says so at once.
    pub(crate) fn failed(&mut self, what: String) {
        eprintln!("failed: {what}");
        self.failures.push(what);
    }

    /// Whether all could be measured.
    pub(crate) fn is_complete(&self) -> bool {
        self.failures.is_empty()
    }

    /// Writes everything, values of single rounds included.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub(crate) fn write_json(&self, path: &Path) -> anyhow::Result<()> {
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        Ok(fs::write(path, serde_json::to_vec_pretty(self)?)?)
    }
}

impl Row {
    /// A figure of the proxy alone.
    pub(crate) fn of(measurement: &str, unit: Unit, culvert: Vec<f64>) -> Self {
        Self {
            measurement: measurement.to_owned(),
            unit,
            direct: None,
            culvert: median(&culvert),
            ratio: None,
            target: String::new(),
            direct_rounds: Vec::new(),
            culvert_rounds: culvert,
        }
    }

    /// A figure with its direct counterpart; the ratio is that of the medians.
    pub(crate) fn compared(
        measurement: &str,
        unit: Unit,
        direct: Vec<f64>,
        culvert: Vec<f64>,
    ) -> Self {
        let mut row = Self::of(measurement, unit, culvert);
        row.direct = median(&direct);
        row.ratio = row
            .culvert
            .zip(row.direct)
            .map(|(culvert, direct)| culvert / direct);
        row.direct_rounds = direct;
        row
    }

    /// What we aim at; empty = nothing.
    pub(crate) fn target(mut self, target: &str) -> Self {
        target.clone_into(&mut self.target);
        self
    }

    /// A ratio to something else than direct.
    pub(crate) fn ratio(mut self, ratio: f64) -> Self {
        self.ratio = Some(ratio);
        self
    }
}

impl Unit {
    /// A value in the unit that people read.
    pub(crate) fn show(self, value: f64) -> String {
        match self {
            Self::BytesPerSecond => format!("{:.2} Gbit/s", value * 8.0 / 1e9),
            Self::PerSecond => format!("{value:.0} /s"),
            Self::SecondsPerByte => format!("{:.2} s/GB", value * 1e9),
            Self::Seconds => format!("{:.1} µs", value * 1e6),
            Self::Milliseconds => format!("{:.2} ms", value * 1e3),
            Self::Bytes => format!("{value:.0} B"),
            Self::Megabytes => format!("{:.1} MB", value / 1e6),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (rounds, seconds) = (self.rounds, self.seconds);
        writeln!(
            f,
            "{}\n\n{rounds} rounds of {seconds} s; medians.\n",
            self.machine
        )?;
        writeln!(f, "| measurement | direct | culvert | ratio | target |")?;
        writeln!(f, "|---|---:|---:|---:|---|")?;
        for row in &self.rows {
            let show = |value: Option<f64>| value.map(|value| row.unit.show(value));
            let ratio = row.ratio.map(|ratio| format!("{ratio:.2}"));
            writeln!(
                f,
                "| {} | {} | {} | {} | {} |",
                row.measurement,
                show(row.direct).unwrap_or_default(),
                show(row.culvert).unwrap_or_else(|| "failed".to_owned()),
                ratio.unwrap_or_default(),
                row.target
            )?;
        }
        for failure in &self.failures {
            writeln!(f, "\nNot measured: {failure}")?;
        }
        Ok(())
    }
}

/// Of an even number of values the mean of the middle two; of none nothing.
fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let upper = *sorted.get(sorted.len() / 2)?;
    let lower = *sorted.get(sorted.len().saturating_sub(1) / 2)?;
    Some(f64::midpoint(lower, upper))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_of_odd_even_and_no_values() {
        for (values, expected) in [
            (&[3.0, 1.0, 2.0][..], Some(2.0)),
            (&[4.0, 1.0, 2.0, 3.0], Some(2.5)),
            (&[7.0], Some(7.0)),
            (&[], None),
        ] {
            assert_eq!(median(values), expected);
        }
    }

    #[test]
    fn the_ratio_is_that_of_the_medians_and_missing_without_them() {
        let row = Row::compared("m", Unit::PerSecond, vec![100.0, 80.0, 90.0], vec![45.0]);
        assert_eq!(row.ratio, Some(0.5));
        assert_eq!(
            Row::compared("m", Unit::PerSecond, vec![1.0], vec![]).ratio,
            None
        );
    }

    #[test]
    fn values_are_shown_in_units_of_people() {
        for (unit, value, shown) in [
            (Unit::BytesPerSecond, 1.25e9, "10.00 Gbit/s"),
            (Unit::PerSecond, 1234.4, "1234 /s"),
            (Unit::SecondsPerByte, 1.4e-9, "1.40 s/GB"),
            (Unit::Seconds, 0.000_120, "120.0 µs"),
            (Unit::Milliseconds, 0.012_345, "12.35 ms"),
            (Unit::Bytes, 399.6, "400 B"),
            (Unit::Megabytes, 11e6, "11.0 MB"),
        ] {
            assert_eq!(unit.show(value), shown);
        }
    }
}
