//! The redirection that the CNI agent installs inside a captured pod: what leaves goes to 15001, what enters to 15006, and packets of
//! the proxy, told by their mark, go free.

use std::fmt::Write as _;

use crate::sys::Netns;

/// The mark of every packet of the proxy.
pub const PROXY_MARK: u32 = 0x539;

/// What is captured in one pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Redirect {
    /// Whether plaintext that enters the pod goes to 15006; off for a pod annotated as ingress.
    pub inbound: bool,
    /// Whether DNS queries go to 15053.
    pub dns: bool,
    /// Whether IPv6 is redirected and routed as well.
    pub ipv6: bool,
}

impl Default for Redirect {
    fn default() -> Self {
        Self {
            inbound: true,
            dns: false,
            ipv6: true,
        }
    }
}

impl Redirect {
    /// Plaintext enters the pod directly; HBONE and outbound are captured.
    #[must_use]
    pub fn ingress() -> Self {
        Self {
            inbound: false,
            ..Self::default()
        }
    }

    /// Queries are captured, too.
    #[must_use]
    pub fn with_dns(self) -> Self {
        Self { dns: true, ..self }
    }

    /// Installs rules and policy routes. `lo` must be up.
    ///
    /// # Errors
    /// When `nft` or `ip` is missing or refuses.
    pub fn install(self, netns: &Netns) -> anyhow::Result<()> {
        netns.command("nft", &["-f", "-"], &self.ruleset())?;
        let mut routes = String::from(
            "rule add fwmark 0x111/0xfff table 100 priority 32764\n\
             route add local 0.0.0.0/0 dev lo table 100\n",
        );
        if self.ipv6 {
            routes.push_str(
                "-6 rule add fwmark 0x111/0xfff table 100 priority 32764\n\
                 -6 route add local ::/0 dev lo table 100\n",
            );
        }
        for line in routes.lines() {
            let args: Vec<&str> = line.split(' ').collect();
            netns.command("ip", &args, "")?;
        }
        Ok(())
    }

    /// The rules, in the input format of `nft -f`.
    #[must_use]
    pub fn ruleset(self) -> String {
        let mut rules = String::from("table inet captured {\n");
        if self.dns {
            rules.push_str(DNS_ZONE);
        }
        rules.push_str(MANGLE);
        if self.inbound {
            rules.push_str(INBOUND);
        }
        rules.push_str(
            "  chain nat_out {\n    type nat hook output priority -100; policy accept;\n    meta mark & 0xfff == 0x539 accept\n",
        );
        if self.dns {
            rules.push_str("    oifname != \"lo\" udp dport 53 redirect to :15053\n");
        }
        rules.push_str(
            "    meta l4proto != tcp accept\n    ip daddr { 127.0.0.1, 169.254.7.127 } accept\n    \
             ip6 daddr { ::1, fd16:9254:7127:1337:ffff:ffff:ffff:ffff } accept\n",
        );
        if self.dns {
            rules.push_str("    tcp dport 53 redirect to :15053\n");
        }
        let family = if self.ipv6 {
            "meta l4proto tcp"
        } else {
            "meta nfproto ipv4 meta l4proto tcp"
        };
        let _ = write!(
            rules,
            "    meta mark & 0xfff == 0x111 accept\n    oifname \"lo\" accept\n    {family} redirect to :15001\n  }}\n}}\n"
        );
        rules
    }
}

/// Queries of the proxy to its resolver must not meet the queries of the pod in connection tracking.
const DNS_ZONE: &str = r"  chain raw_pre {
    type filter hook prerouting priority -300; policy accept;
    udp sport 53 meta mark & 0xfff != 0x539 ct zone set 1
  }
  chain raw_out {
    type filter hook output priority -300; policy accept;
    udp dport 53 meta mark & 0xfff == 0x539 ct zone set 1
  }
";

/// Remembers flows of the proxy, and sends their answers back through `lo`.
const MANGLE: &str = r"  chain mangle_pre {
    type filter hook prerouting priority -150; policy accept;
    meta mark & 0xfff == 0x539 ct mark set ct mark & 0xfffff000 | 0x111
  }
  chain mangle_out {
    type route hook output priority -150; policy accept;
    ct mark & 0xfff == 0x111 meta mark set ct mark
  }
";

const INBOUND: &str = r"  chain nat_pre {
    type nat hook prerouting priority -100; policy accept;
    meta l4proto != tcp accept
    ip saddr 169.254.7.127 accept
    ip6 saddr fd16:9254:7127:1337:ffff:ffff:ffff:ffff accept
    meta mark & 0xfff == 0x539 accept
    tcp dport 15008 accept
    ip daddr 127.0.0.1 accept
    ip6 daddr ::1 accept
    meta l4proto tcp redirect to :15006
  }
";
