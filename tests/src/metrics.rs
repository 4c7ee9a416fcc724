//! `OpenMetrics` text, and questions to it.

use std::collections::BTreeMap;

use anyhow::{Context, bail, ensure};

/// One scrape.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Metrics {
    /// All samples in their order.
    pub samples: Vec<Sample>,
    /// `# TYPE` by family.
    pub types: BTreeMap<String, String>,
    /// `# HELP` by family.
    pub help: BTreeMap<String, String>,
}

/// One sample.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// Name with its suffix, for example `…_total`.
    pub name: String,
    /// Labels, unescaped.
    pub labels: BTreeMap<String, String>,
    /// Value.
    pub value: f64,
}

impl Sample {
    /// Whether it has all of these labels.
    #[must_use]
    pub fn has(&self, labels: &[(&str, &str)]) -> bool {
        labels
            .iter()
            .all(|(key, value)| self.labels.get(*key).is_some_and(|mine| mine == value))
    }
}

impl Metrics {
    /// Reads an exposition, which must be whole.
    ///
    /// # Errors
    /// When a line is not understood, a series appears twice, or `# EOF` is missing.
    pub fn parse(text: &str) -> anyhow::Result<Self> {
        let mut metrics = Self::default();
        let body = text
            .strip_suffix("# EOF\n")
            .context("does not end with # EOF")?;
        for line in body.lines() {
            let words: Vec<&str> = line.splitn(4, ' ').collect();
            match words.as_slice() {
                ["#", "TYPE", name, kind] => {
                    metrics.types.insert((*name).to_owned(), (*kind).to_owned());
                }
                ["#", "HELP", name, help] => {
                    metrics.help.insert((*name).to_owned(), (*help).to_owned());
                }
                ["#", "UNIT", ..] => {}
                _ => metrics.push(sample(line).with_context(|| format!("line {line:?}"))?)?,
            }
        }
        Ok(metrics)
    }

    fn push(&mut self, sample: Sample) -> anyhow::Result<()> {
        let twin = self
            .samples
            .iter()
            .any(|other| other.name == sample.name && other.labels == sample.labels);
        ensure!(!twin, "{} {:?} appears twice", sample.name, sample.labels);
        self.samples.push(sample);
        Ok(())
    }

    /// The sum over all series of that name that have these labels; 0 if there is none.
    #[must_use]
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.series(name, labels).map(|sample| sample.value).sum()
    }

    /// The series of that name that have these labels.
    pub fn series<'a>(
        &'a self,
        name: &'a str,
        labels: &'a [(&'a str, &'a str)],
    ) -> impl Iterator<Item = &'a Sample> {
        self.samples
            .iter()
            .filter(move |sample| sample.name == name && sample.has(labels))
    }
}

fn sample(line: &str) -> anyhow::Result<Sample> {
    let end = line.find(['{', ' ']).context("no value")?;
    let (name, mut rest) = line.split_at(end);
    let mut labels = BTreeMap::new();
    if let Some(inner) = rest.strip_prefix('{') {
        rest = inner;
        while !rest.starts_with('}') {
            let (key, tail) = rest.split_once("=\"").context("label without value")?;
            let (value, tail) = label_value(tail)?;
            labels.insert(key.trim_start_matches(',').to_owned(), value);
            rest = tail;
        }
        rest = &rest[1..];
    }
    Ok(Sample {
        name: name.to_owned(),
        labels,
        value: rest.trim().parse()?,
    })
}

fn label_value(text: &str) -> anyhow::Result<(String, &str)> {
    let mut value = String::new();
    let mut characters = text.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return Ok((value, &text[at + 1..])),
            '\\' => value.push(match characters.next() {
                Some((_, 'n')) => '\n',
                Some((_, escaped @ ('"' | '\\'))) => escaped,
                other => bail!("escape {other:?}"),
            }),
            _ => value.push(character),
        }
    }
    bail!("label value does not end")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_samples_with_and_without_labels() {
        let text = "# HELP a_b Things.\n# TYPE a_b counter\na_b_total{x=\"1\",y=\"q\\\"\\n\\\\\"} 3\na_b_total{x=\"2\",y=\"\"} 4\nplain 1.5\n# EOF\n";
        let metrics = Metrics::parse(text).unwrap();
        assert_eq!(metrics.sum("a_b_total", &[]), 7.0);
        assert_eq!(metrics.sum("a_b_total", &[("y", "q\"\n\\")]), 3.0);
        assert_eq!(metrics.sum("plain", &[]), 1.5);
        assert_eq!(metrics.types["a_b"], "counter");
        assert_eq!(metrics.help["a_b"], "Things.");
    }

    #[test]
    fn refuses_what_a_scraper_would_refuse() {
        for text in [
            "a 1\n",
            "a{x=\"1} 2\n# EOF\n",
            "a one\n# EOF\n",
            "a 1\na 2\n# EOF\n",
        ] {
            assert!(Metrics::parse(text).is_err(), "{text:?}");
        }
    }
}
