//! Every rule of the configuration, by its outside: variables and files in, sections out.

mod acceptance;
mod faults;
mod identity;
mod openbao;
mod sections;
mod traces;
mod values;

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    path::{Path, PathBuf},
};

use super::{Environment, Faults, Files, configuration};
use crate::config::Config;

/// A file system of a few texts.
#[derive(Debug, Default)]
struct Texts(BTreeMap<PathBuf, String>);

impl Files for Texts {
    fn exists(&self, path: &Path) -> bool {
        self.0.contains_key(path)
    }

    fn read(&self, path: &Path) -> io::Result<String> {
        let text = self.0.get(path).cloned();
        text.ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

/// Surroundings in the making.
#[derive(Debug, Default)]
struct Given {
    variables: BTreeMap<String, String>,
    files: Texts,
    cpus: usize,
}

/// Surroundings with these variables, eight CPUs and no files.
fn given(variables: &[(&str, &str)]) -> Given {
    let owned = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
    Given {
        variables: variables.iter().map(owned).collect(),
        files: Texts::default(),
        cpus: 8,
    }
}

impl Given {
    fn cpus(self, cpus: usize) -> Self {
        Self { cpus, ..self }
    }

    fn file(mut self, path: &str, text: &str) -> Self {
        self.files.0.insert(path.into(), text.to_owned());
        self
    }

    fn read(self) -> Result<Config, Faults> {
        let environment = Environment::new(self.variables, self.cpus, &self.files);
        configuration(&environment, "proxy ztunnel")
    }

    fn config(self) -> Config {
        self.read().unwrap_or_else(|faults| panic!("{faults}"))
    }

    /// The keys at fault.
    fn faulty(self) -> BTreeSet<String> {
        let faults = self.read().expect_err("the configuration is accepted");
        faults.iter().map(|fault| fault.key.clone()).collect()
    }
}
