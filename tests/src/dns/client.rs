//! Who asks: `dig`, the resolvers of two C libraries, and bare sockets.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::Path,
    process::{Command, Output, Stdio},
};

use anyhow::{Context, ensure};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use super::with_resolv_conf;
use crate::{
    sys::{Netns, tools},
    wait,
    world::{Pod, World},
};

/// What `dig` prints, sorted out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Dug {
    /// `NOERROR`, `NXDOMAIN`, …
    pub status: String,
    /// `qr`, `aa`, `tc`, …
    pub flags: Vec<String>,
    /// The line about EDNS, such as `version: 0, flags: do; udp: 1232`.
    pub edns: Option<String>,
    /// `name ttl IN type data`.
    pub answer: Vec<String>,
    /// As [`Dug::answer`].
    pub authority: Vec<String>,
    /// Who answered, and how: `10.96.0.10#53(10.96.0.10) (UDP)`.
    pub server: String,
}

impl Dug {
    fn parse(text: &str) -> Self {
        let (mut dug, mut section) = (Self::default(), "");
        for line in text.lines().map(str::trim_end) {
            let words = || line.split_whitespace().collect::<Vec<_>>().join(" ");
            if let Some((_, rest)) = line.split_once("status: ") {
                // Of several messages the last counts: dig asks again when it must.
                dug = Self::default();
                rest.split(',')
                    .next()
                    .unwrap_or_default()
                    .clone_into(&mut dug.status);
            } else if let Some(rest) = line.strip_prefix(";; flags: ") {
                let flags = rest.split(';').next().unwrap_or_default();
                dug.flags = flags.split_whitespace().map(str::to_owned).collect();
            } else if let Some(rest) = line.strip_prefix("; EDNS: ") {
                dug.edns = Some(rest.to_owned());
            } else if let Some(rest) = line.strip_prefix(";; SERVER: ") {
                rest.clone_into(&mut dug.server);
            } else if let Some(rest) = line.strip_suffix(" SECTION:") {
                section = rest.trim_start_matches([';', ' ']);
            } else if line.is_empty() || line.starts_with(';') {
                section = if line.is_empty() { "" } else { section };
            } else if section == "ANSWER" {
                dug.answer.push(words());
            } else if section == "AUTHORITY" {
                dug.authority.push(words());
            }
        }
        dug
    }

    /// Whether the header has the flag.
    #[must_use]
    pub fn has(&self, flag: &str) -> bool {
        self.flags.iter().any(|one| one == flag)
    }

    /// The data of the answers of a type, sorted.
    #[must_use]
    pub fn data(&self, kind: &str) -> Vec<&str> {
        let marker = format!(" IN {kind} ");
        let of_kind = self.answer.iter();
        let mut data: Vec<&str> = of_kind
            .filter_map(|line| line.split_once(&marker))
            .map(|(_, data)| data)
            .collect();
        data.sort_unstable();
        data
    }
}

/// Whose `getaddrinfo` looks a name up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "the two of Linux")]
pub enum Library {
    /// Debian's.
    Glibc,
    /// Alpine's.
    Musl,
}

impl Pod {
    /// Runs `dig` to its end: one try, unless the arguments say otherwise.
    ///
    /// # Errors
    /// When it is not installed, or gets no answer.
    pub async fn dig(&self, words: &[&str]) -> anyhow::Result<Dug> {
        let mut command = Command::new("dig");
        command
            .args(["+tries=1", "+time=15", "+nocookie"])
            .args(words);
        let output = run(self.netns(), command).await?;
        let text = String::from_utf8_lossy(&output.stdout);
        ensure!(output.status.success(), "dig {words:?}: {text}");
        Ok(Dug::parse(&text))
    }

    /// The addresses that a program of the pod gets for a name, sorted, with `resolv_conf` as the pod's `/etc/resolv.conf`; none
    /// if it gets none.
    ///
    /// # Errors
    /// When the program is not installed, or cannot be built.
    pub async fn look_up(
        &self,
        world: &World,
        (library, resolv_conf): (Library, &Path),
        name: &str,
    ) -> anyhow::Result<Vec<IpAddr>> {
        let start = with_resolv_conf(resolv_conf);
        let mut command = Command::new(&start[0]);
        command.args(&start[1..]);
        match library {
            Library::Glibc => command.args(["getent", "ahosts", name]),
            Library::Musl => command.arg(musl_program(world).await?).arg(name),
        };
        let output = run(self.netns(), command).await?;
        let text = String::from_utf8(output.stdout)?;
        let first = text.lines().filter_map(|line| line.split(' ').next());
        let mut found = first
            .map(|word| word.parse().with_context(|| text.clone()))
            .collect::<Result<Vec<IpAddr>, _>>()?;
        found.sort_unstable();
        found.dedup();
        Ok(found)
    }

    /// Sends one datagram and returns the first that comes back from where it went.
    ///
    /// # Errors
    /// When none comes within ten seconds.
    pub async fn datagram(&self, to: SocketAddr, bytes: &[u8]) -> io::Result<Vec<u8>> {
        let any = match to {
            SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
            SocketAddr::V6(_) => (std::net::Ipv6Addr::UNSPECIFIED, 0).into(),
        };
        let socket = self.udp(any)?;
        socket.connect(to).await?;
        socket.send(bytes).await?;
        let mut room = vec![0; 1 << 16];
        let length = tokio::time::timeout(wait::SOON, socket.recv(&mut room)).await??;
        room.truncate(length);
        Ok(room)
    }

    /// Sends queries over one connection, all at once, and returns as many answers, in the order they come.
    ///
    /// # Errors
    /// When one does not come within thirty seconds.
    pub async fn pipeline(&self, to: SocketAddr, queries: &[Vec<u8>]) -> io::Result<Vec<Vec<u8>>> {
        let mut stream = self.connect(to).await?;
        for query in queries {
            send(&mut stream, query).await?;
        }
        let mut answers = Vec::new();
        let reading = async {
            while answers.len() < queries.len() {
                answers.push(receive(&mut stream).await?);
            }
            io::Result::Ok(())
        };
        tokio::time::timeout(3 * wait::SOON, reading).await??;
        Ok(answers)
    }
}

/// Sends a message over a connection.
///
/// # Errors
/// When the connection is gone.
pub async fn send(stream: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    let length = u16::try_from(message.len()).map_err(io::Error::other)?;
    let framed = [&length.to_be_bytes(), message].concat();
    stream.write_all(&framed).await
}

/// The next message of a connection.
///
/// # Errors
/// When the connection ends first.
pub async fn receive(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut message = vec![0; stream.read_u16().await?.into()];
    stream.read_exact(&mut message).await?;
    Ok(message)
}

/// A static program that prints what musl's `getaddrinfo` finds; built once for each world.
async fn musl_program(world: &World) -> anyhow::Result<std::path::PathBuf> {
    let (program, source) = (world.file("lookup"), world.file("lookup.c"));
    if !program.exists() {
        std::fs::write(&source, include_str!("lookup.c"))?;
        let mut compiler = tokio::process::Command::new("musl-gcc");
        compiler.arg("-static").arg("-o").args([&program, &source]);
        let output = compiler.env("PATH", tools()).output().await;
        let output = output.context("musl-gcc, of Debian's package musl-tools")?;
        let complaint = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "musl-gcc: {complaint}");
    }
    Ok(program)
}

async fn run(netns: &Netns, mut command: Command) -> anyhow::Result<Output> {
    let what = format!("{command:?}");
    command
        .env("PATH", tools())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let running = netns.spawn(command).with_context(|| what.clone())?;
    let ended = running.child.wait_with_output();
    Ok(tokio::time::timeout(3 * wait::SOON, ended)
        .await
        .context(what)??)
}
