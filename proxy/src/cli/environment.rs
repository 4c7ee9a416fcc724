//! What surrounds the process: variables, files, CPUs. Tests put their own in its place.

use std::{collections::BTreeMap, fmt, io, path::Path};

/// The surroundings a configuration is made from.
#[derive(Debug)]
pub struct Environment<'a> {
    variables: BTreeMap<String, String>,
    cpus: usize,
    files: &'a dyn Files,
}

/// The file system, as far as settings depend on it.
pub trait Files: fmt::Debug {
    /// Whether something exists at `path`.
    fn exists(&self, path: &Path) -> bool;

    /// The text of the file at `path`.
    ///
    /// # Errors
    /// As [`std::fs::read_to_string`].
    fn read(&self, path: &Path) -> io::Result<String>;
}

/// The real file system.
#[derive(Debug, Clone, Copy)]
#[expect(clippy::exhaustive_structs, reason = "a unit: there is nothing to add")]
pub struct Disk;

impl Files for Disk {
    fn exists(&self, path: &Path) -> bool {
        path.exists()
    }

    fn read(&self, path: &Path) -> io::Result<String> {
        std::fs::read_to_string(path)
    }
}

impl Environment<'static> {
    /// The surroundings of this process. A variable that is not UTF-8 counts as unset.
    #[must_use]
    pub fn of_process() -> Self {
        let variables = std::env::vars_os()
            .filter_map(|(key, value)| Some((key.into_string().ok()?, value.into_string().ok()?)))
            .collect();
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        Self::new(variables, cpus, &Disk)
    }
}

impl<'a> Environment<'a> {
    /// Surroundings made of these parts.
    #[must_use]
    pub fn new(variables: BTreeMap<String, String>, cpus: usize, files: &'a dyn Files) -> Self {
        Self {
            variables,
            cpus,
            files,
        }
    }

    /// The value of `key`, as it is.
    #[must_use]
    pub fn variable(&self, key: &str) -> Option<&str> {
        self.variables.get(key).map(String::as_str)
    }

    /// All variables that begin with `prefix`, without it, in order.
    pub fn with_prefix(&self, prefix: &str) -> impl Iterator<Item = (&str, &str)> {
        self.variables
            .iter()
            .filter_map(move |(key, value)| Some((key.strip_prefix(prefix)?, value.as_str())))
    }

    /// Online logical CPUs this process may use.
    #[must_use]
    pub const fn cpus(&self) -> usize {
        self.cpus
    }

    /// The file system.
    #[must_use]
    pub const fn files(&self) -> &'a dyn Files {
        self.files
    }
}
