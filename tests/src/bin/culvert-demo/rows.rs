//! One row per conversation: what the client saw, and what the two proxies wrote of it.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use testkit::{Line, Log, Pod, wait::SOON};

use crate::report::{milliseconds, quantity};

/// A conversation.
#[derive(Debug, Clone)]
pub(crate) struct Row {
    /// Who began it.
    pub(crate) who: String,
    /// Whom it addressed.
    pub(crate) to: String,
    /// The access line of the client's proxy; `None` outside the mesh.
    pub(crate) source: Option<Line>,
    /// The access line of the server's proxy.
    pub(crate) target: Line,
    /// What the client measured.
    pub(crate) latency: String,
}

/// Headings of [`Row::cells`].
pub(crate) const HEADINGS: [&str; 7] = [
    "WHO",
    "TO WHOM",
    "ROUTE",
    "IDENTITY",
    "POLICY",
    "BYTES OUT / IN",
    "LATENCY",
];

impl Row {
    /// Texts for the table.
    pub(crate) fn cells(&self) -> [String; 7] {
        let route = match self.target.field("dst.hbone_addr") {
            "" => "plaintext".to_owned(),
            _ => "HBONE".to_owned(),
        };
        let identity = match self.target.field("src.identity") {
            "" => "none",
            identity => identity.trim_start_matches("spiffe://cluster.local/"),
        };
        let policy = if self.denied() { "denied" } else { "allowed" };
        let bytes = |field| quantity(self.target.field(field).parse().unwrap_or(0));
        // The line tells what the server received and sent: the client's way out and in.
        let bytes = format!("{} / {}", bytes("bytes_recv"), bytes("bytes_sent"));
        [
            self.who.clone(),
            self.to.clone(),
            route,
            identity.to_owned(),
            policy.to_owned(),
            bytes,
            self.latency.clone(),
        ]
    }

    fn denied(&self) -> bool {
        self.target.field("error").contains("policy rejection")
    }

    /// Checks that it went through the tunnel under these identities, as both proxies tell.
    ///
    /// # Errors
    /// When not; the text says what was expected.
    pub(crate) fn expect_tunnel(&self, client: &Pod, server: &Pod) -> anyhow::Result<()> {
        let source = self
            .source
            .as_ref()
            .context("no line of the client's proxy")?;
        for line in [source, &self.target] {
            expect(line, "src.identity", &client.spiffe_id())?;
            expect(line, "dst.identity", &server.spiffe_id())?;
            expect(line, "src.workload", client.name())?;
            expect(line, "dst.workload", server.name())?;
            expect(line, "dst.addr", &server.at(15008).to_string())?;
        }
        Ok(())
    }

    /// Checks that it was plaintext, told by the server's proxy alone.
    ///
    /// # Errors
    /// As [`Row::expect_tunnel`].
    pub(crate) fn expect_plaintext(&self, client: &Pod) -> anyhow::Result<()> {
        ensure!(
            self.source.is_none(),
            "a proxy of the client: {:?}",
            self.source
        );
        expect(&self.target, "src.identity", "")?;
        expect(&self.target, "dst.hbone_addr", "")?;
        expect(&self.target, "src.workload", client.name())
    }

    /// Checks that neither proxy tells an error, and that both count at least these bytes.
    ///
    /// # Errors
    /// As [`Row::expect_tunnel`].
    pub(crate) fn expect_carried(&self, out: u64) -> anyhow::Result<()> {
        let sides = [
            (self.source.as_ref(), "bytes_sent"),
            (Some(&self.target), "bytes_recv"),
        ];
        for (line, field) in sides {
            let Some(line) = line else { continue };
            expect(line, "error", "")?;
            let counted: u64 = line.field(field).parse().unwrap_or(0);
            ensure!(
                counted >= out,
                "{field}={counted} is less than {out}: {}",
                line.raw
            );
        }
        Ok(())
    }

    /// Checks that policy denied it, at the server's side.
    ///
    /// # Errors
    /// As [`Row::expect_tunnel`].
    pub(crate) fn expect_denied(&self) -> anyhow::Result<()> {
        ensure!(self.denied(), "not denied: {}", self.target.raw);
        let source = self
            .source
            .as_ref()
            .context("no line of the client's proxy")?;
        ensure!(
            source.field("error").contains("401"),
            "no refusal: {}",
            source.raw
        );
        Ok(())
    }
}

fn expect(line: &Line, field: &str, value: &str) -> anyhow::Result<()> {
    let found = line.field(field);
    ensure!(
        found == value,
        "{field} is {found:?} instead of {value:?}: {}",
        line.raw
    );
    Ok(())
}

/// The end of `who`'s next connection after `mark`, as that proxy tells it.
///
/// # Errors
/// When it does not tell within ten seconds.
pub(crate) async fn end_of(
    log: &Log,
    mark: usize,
    direction: &str,
    who: &str,
) -> anyhow::Result<Line> {
    let wanted = |line: &Line| {
        line.is_access("connection complete")
            && line.field("direction") == direction
            && line.field("src.workload") == who
    };
    log.find(mark, SOON, wanted).await.with_context(|| {
        format!(
            "no {direction} access line of {who}; the log ends with\n{}",
            log.tail(20)
        )
    })
}

/// `0.21 ms, first 2.4 ms`.
pub(crate) fn latency(median: Duration, first: Duration) -> String {
    format!("{}, first {}", milliseconds(median), milliseconds(first))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(fields: &str) -> Row {
        Row {
            who: "web".to_owned(),
            to: "api:8080".to_owned(),
            source: None,
            target: Line::parse(&format!("t\tinfo\taccess\tconnection complete\t{fields}")),
            latency: "1 ms".to_owned(),
        }
    }

    #[test]
    fn tells_tunnel_from_plaintext_and_allowed_from_denied() {
        let cells = row(
            "src.identity=\"spiffe://cluster.local/ns/shop/sa/web\" dst.hbone_addr=10.20.1.10:8080 bytes_sent=1000 bytes_recv=2",
        )
        .cells();
        let texts: Vec<&str> = cells.iter().map(String::as_str).collect();
        assert_eq!(
            texts,
            [
                "web",
                "api:8080",
                "HBONE",
                "ns/shop/sa/web",
                "allowed",
                "2 / 1.0 k",
                "1 ms"
            ]
        );
        let denied = row(
            "error=\"connection closed due to policy rejection: allow policies exist, but none allowed\"",
        );
        let [_, _, route, identity, policy, ..] = denied.cells();
        assert_eq!([route, identity, policy], ["plaintext", "none", "denied"]);
        assert!(denied.expect_carried(0).is_err());
        assert!(
            denied.expect_denied().is_err(),
            "the client's proxy is silent"
        );
    }

    #[test]
    fn expects_the_bytes_that_were_sent() {
        let row = row("bytes_sent=1 bytes_recv=500");
        row.expect_carried(500).unwrap();
        assert!(row.expect_carried(501).is_err());
    }
}
