//! The grammar of single values.

use std::{fmt::Display, ops::RangeInclusive, str::FromStr, time::Duration};

/// Why a value is refused, and what would be accepted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Reject {
    pub(super) reason: String,
    pub(super) accepted: String,
}

impl Reject {
    pub(super) fn new(reason: impl Into<String>, accepted: impl Into<String>) -> Self {
        Self {
            reason: reason.into(),
            accepted: accepted.into(),
        }
    }
}

/// Exactly `true` or `false`.
pub(super) fn boolean(text: &str) -> Result<bool, Reject> {
    match text {
        "true" => Ok(true),
        "false" => Ok(false),
        _ => Err(Reject::new(
            "not a boolean",
            "exactly true or false, in lower case",
        )),
    }
}

/// Decimal digits only, within `range`.
pub(super) fn integer<T>(text: &str, range: &RangeInclusive<T>) -> Result<T, Reject>
where
    T: FromStr + PartialOrd + Display,
{
    let reject = |reason| {
        let accepted = format!("an integer from {} to {}", range.start(), range.end());
        Reject::new(reason, accepted)
    };
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(reject("not a decimal number"));
    }
    match text.parse() {
        Ok(number) if range.contains(&number) => Ok(number),
        _ => Err(reject("out of range")),
    }
}

/// Numbers with units, such as `1h30m`; a bare number means seconds.
pub(super) fn duration(text: &str) -> Result<Duration, Reject> {
    duration_str::parse(text).map_err(|_| {
        Reject::new(
            "not a duration",
            "numbers with units ns, us, ms, s, m, h, d, w, mon or y, such as 250ms, 90 or 1h30m",
        )
    })
}

/// A duration that is not nothing when it is told in whole seconds.
pub(super) fn seconds(text: &str) -> Result<Duration, Reject> {
    let duration = duration(text)?;
    if duration < Duration::from_secs(1) {
        return Err(Reject::new("too short", "a duration of 1s or more"));
    }
    Ok(duration)
}

/// A Kubernetes CPU quantity such as `2`, `1.5` or `500m`, rounded up to whole CPUs.
pub(super) fn cpus(text: &str) -> Result<usize, Reject> {
    let quantity = match text.strip_suffix('m') {
        Some(milli) => Decimal::parse(milli).map(|Decimal(value)| Decimal(value.div_ceil(1000))),
        None => Decimal::parse(text),
    };
    quantity
        .filter(|Decimal(value)| *value > 0)
        .and_then(|quantity| quantity.ceil())
        .ok_or_else(|| {
            Reject::new(
                "not a CPU quantity",
                "a positive number of CPUs such as 2, 1.5 or 500m",
            )
        })
}

/// A thread count that is fixed or follows the number of cores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Threads {
    Count(usize),
    /// Of the cores: parts per 10⁹ of one percent.
    Percent(Decimal),
}

impl Threads {
    /// An integer, or `P%` with P above 0 and up to 100.
    pub(super) fn parse(text: &str) -> Result<Self, Reject> {
        let accepted = "a number of threads, 0 for one per core, or a share of the cores from above 0% to 100%";
        let Some(percent) = text.strip_suffix('%') else {
            return integer(text, &(0..=usize::from(u16::MAX)))
                .map(Self::Count)
                .map_err(|reject| Reject::new(reject.reason, accepted));
        };
        match Decimal::parse(percent) {
            Some(share) if share.0 > 0 && share.0 <= 100 * Decimal::ONE => Ok(Self::Percent(share)),
            Some(_) => Err(Reject::new("out of range", accepted)),
            None => Err(Reject::new("not a percentage", accepted)),
        }
    }

    /// How many that is with so many cores; at least 1.
    pub(super) fn of(self, cores: usize) -> usize {
        let count = match self {
            Self::Count(0) => cores,
            Self::Count(count) => count,
            Self::Percent(Decimal(share)) => {
                let cores_percent = u128::try_from(cores).unwrap_or(u128::MAX);
                let threads = cores_percent
                    .saturating_mul(share)
                    .div_ceil(100 * Decimal::ONE);
                usize::try_from(threads).unwrap_or(cores)
            }
        };
        count.max(1)
    }
}

/// A non-negative decimal number, exact, in parts per 10⁹.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Decimal(u128);

impl Decimal {
    const ONE: u128 = 1_000_000_000;
    const DIGITS: usize = 9;

    fn parse(text: &str) -> Option<Self> {
        let (whole, fraction) = text.split_once('.').unwrap_or((text, "0"));
        let digits = |part: &str| {
            let ok = (1..=Self::DIGITS).contains(&part.len())
                && part.bytes().all(|byte| byte.is_ascii_digit());
            ok.then_some(())
        };
        digits(whole)?;
        digits(fraction)?;
        let whole: u128 = whole.parse().ok()?;
        let fraction: u128 = format!("{fraction:0<width$}", width = Self::DIGITS)
            .parse()
            .ok()?;
        Some(Self(whole * Self::ONE + fraction))
    }

    fn ceil(self) -> Option<usize> {
        usize::try_from(self.0.div_ceil(Self::ONE)).ok()
    }
}
