//! The file of a journal: found, read, continued in a file of our own, made smaller, given up.
//!
//! Two processes may follow the same mesh on one node while one hands over to the other. Each writes a file of its own; it
//! takes the name `mesh.state` only once the control plane has answered this process about every kind, so that the name always
//! leads to what somebody has been told as a whole. Who finds that the name leads elsewhere has been succeeded, and writes no more
//! while that process lives, which is known by the lock that it holds on its file. What a process left behind that was the last
//! to keep the state is removed by those that are told more: it would be recalled.

use std::{
    fs::{self, DirBuilder, File, OpenOptions, Permissions, TryLockError},
    io::{self, BufReader, BufWriter, Read},
    os::unix::fs::{
        DirBuilderExt as _, FileExt as _, MetadataExt as _, OpenOptionsExt as _,
        PermissionsExt as _,
    },
    path::{Path, PathBuf},
    time::SystemTime,
};

use bytes::Bytes;

use super::{
    Settings,
    format::{self, Begin, Item, Readable, Unusable, Visitor, Writer},
    in_force::in_force,
    live::{Copy, Live, only_named},
};
use crate::{Batch, Extent, Kind, Rejected};

/// A journal on disk. All of it blocks.
#[derive(Debug)]
pub(super) struct Store {
    settings: Settings,
    /// What was found at the start, until the file of this process has taken its place.
    found: Option<Found>,
    current: Option<Current>,
    /// Another process keeps the state, or did when that was looked at last.
    succeeded: bool,
}

/// A usable journal of an earlier process.
#[derive(Debug)]
struct Found {
    file: File,
    readable: Readable,
}

/// The file of this process.
#[derive(Debug)]
struct Current {
    writer: Writer<BufWriter<File>>,
    path: PathBuf,
    /// Whether it has the name under which it is looked for.
    is_published: bool,
    /// Kinds of which the control plane has told since it began.
    answered: [bool; 2],
    /// Kinds that it holds completely.
    based: [bool; 2],
    /// How long it was without anything superfluous.
    compact: u64,
}

/// What has become of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kept {
    /// It is on disk, and so is everything before it, under the name where it is looked for.
    Published,
    /// It is on disk, but not all is told yet.
    Begun,
    /// There is nothing that it could follow.
    Baseless,
    /// Another process keeps the mesh of this node now.
    Succeeded,
}

/// Why a batch is not kept. The journal is given up: an old one could grant what was denied since.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeepError {
    /// The disk is full, or gone.
    #[error("the file cannot be written")]
    Io(#[from] io::Error),
    /// More than is allowed.
    #[error("it takes {needed} bytes, and {allowed} are allowed")]
    TooLarge {
        /// The size of what counts.
        needed: u64,
        /// The bound.
        allowed: u64,
    },
    /// It brings several resources of one name of which only some are in force: which cannot be known.
    #[error("some resources named {name:?} of one response were refused, and others were not")]
    Ambiguous {
        /// The name.
        name: String,
    },
    /// What was written does not read back.
    #[error("what was written cannot be read")]
    Unreadable(#[source] Unusable),
}

impl Store {
    /// Looks what there is. A journal that cannot be used is set aside as `mesh.state.unusable`.
    ///
    /// # Errors
    /// If the directory cannot be written: what could not be kept up must not be trusted either.
    pub(super) fn open(settings: Settings) -> io::Result<(Self, Option<Unusable>)> {
        prepare(&settings.directory)?;
        let mut store = Self {
            settings,
            found: None,
            current: None,
            succeeded: false,
        };
        store.remove_left_overs()?;
        let unusable = match store.find() {
            Ok(found) => {
                store.found = found;
                None
            }
            Err(unusable) => {
                let aside = store.settings.directory.join(UNUSABLE);
                fs::rename(store.path(), aside)?;
                Some(unusable)
            }
        };
        Ok((store, unusable))
    }

    /// When the journal that was found was written last, and its size.
    pub(super) fn found(&self) -> Option<(SystemTime, u64)> {
        let readable = self.found.as_ref()?.readable;
        Some((readable.told?, readable.end))
    }

    /// Hands out what was found, in the order in which it was told.
    ///
    /// # Errors
    /// If it does not read as it did a moment ago.
    pub(super) fn recall(&self, sink: &mut dyn FnMut(Batch)) -> Result<(), Unusable> {
        let Some(Found { file, readable }) = &self.found else {
            return Ok(());
        };
        let mut replay = Replay::into(sink);
        self.read(file, readable.end, &mut replay).map(drop)
    }

    /// Writes what was applied; when it returns it is on disk. `refused` of it were not.
    ///
    /// # Errors
    /// The journal is given up then, with its file.
    pub(super) fn append(
        &mut self,
        batch: &Batch,
        refused: &[Rejected],
    ) -> Result<Kept, KeepError> {
        let outcome = self.try_append(batch, refused);
        if outcome.is_err() {
            self.give_up();
        }
        outcome
    }

    /// Removes what is kept: it can no longer be kept up. What another process keeps up is left to it.
    pub(super) fn give_up(&mut self) {
        // What cannot be locked must go all the same.
        let lock = self.lock();
        self.found = None;
        let aside = match self.current.take() {
            Some(current) if !current.is_published => fs::remove_file(&current.path),
            _ => Ok(()),
        };
        let named = self.release();
        drop(lock);
        if let Err(error) = named.and(aside) {
            let error = &error as &dyn std::error::Error;
            tracing::error!(
                error,
                directory = %self.settings.directory.display(),
                "the outdated state of the mesh cannot be removed; remove it before the next start"
            );
        }
    }

    /// Bytes of the file, as long as it is kept up.
    pub(super) fn size(&self) -> Option<u64> {
        let current = self.current.as_ref().filter(|current| current.is_published);
        current.map(|current| current.writer.readable().end)
    }

    fn try_append(&mut self, batch: &Batch, refused: &[Rejected]) -> Result<Kept, KeepError> {
        if self.is_succeeded()? {
            return Ok(Kept::Succeeded);
        }
        self.go_on(batch)?;
        let has_base = |current: &&mut Current| current.is_base_of(batch);
        let Some(current) = self.current.as_mut().filter(has_base) else {
            return Ok(Kept::Baseless);
        };
        current.append(batch, refused)?;
        let length = current.writer.readable().end;
        if length > self.settings.max_bytes || length > current.compact * 2 + COMPACT_FROM {
            self.compact()?;
        }
        self.publish()
    }

    /// Whether another process keeps the state. If it has ended, the state is for this one to keep again.
    fn is_succeeded(&mut self) -> io::Result<bool> {
        let published = self.current.as_ref().filter(|current| current.is_published);
        if let Some(current) = published
            && !self.is_published(current.file())?
        {
            self.succeed();
        }
        if self.succeeded {
            let _lock = self.lock()?;
            self.release()?;
            if !self.succeeded {
                tracing::info!(
                    "no other process keeps the state of the mesh any longer: it begins anew here once everything is told"
                );
            }
        }
        Ok(self.succeeded)
    }

    fn succeed(&mut self) {
        tracing::info!("another process of this node keeps the state of the mesh from now on");
        self.current = None;
        self.succeeded = true;
    }

    /// Removes what has the name, unless a living process holds it: none but another can, since ours is closed by now. If that
    /// fails, the next batch tries again.
    fn release(&mut self) -> io::Result<()> {
        self.succeeded = true;
        let named = match File::open(self.path()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            other => Some(other?),
        };
        if let Some(named) = named {
            match named.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Ok(()),
                Err(TryLockError::Error(error)) => return Err(error),
            }
            fs::remove_file(self.path())?;
            self.sync_names()?;
        }
        self.succeeded = false;
        Ok(())
    }

    /// Sees to it that there is a journal which this batch can go on with, if it is able to.
    fn go_on(&mut self, batch: &Batch) -> Result<(), KeepError> {
        if self.current.is_some() {
            return Ok(());
        }
        if let Some(Found { file, readable }) = &self.found {
            let mut current = self.compacted(file, *readable)?;
            current.answered = self.settings.unasked();
            self.current = Some(current);
        } else if batch.extent() == Extent::Everything {
            let (path, file) = self.create()?;
            let writer = Writer::begin(BufWriter::new(file), &self.settings.owner);
            self.current = Some(Current {
                writer: remove_unless(&path, writer)?,
                path,
                is_published: false,
                answered: self.settings.unasked(),
                based: self.settings.unasked(),
                compact: 0,
            });
        }
        Ok(())
    }

    /// Gives the journal the name under which it is looked for, if it holds everything.
    fn publish(&mut self) -> Result<Kept, KeepError> {
        let path = self.path();
        let lock = self.lock()?;
        let Some(current) = &mut self.current else {
            return Ok(Kept::Succeeded); // found when it was rewritten
        };
        if !current.is_published {
            if current.answered != [true; 2] || current.based != [true; 2] {
                return Ok(Kept::Begun);
            }
            fs::rename(&current.path, &path)?;
            current.path = path;
            current.is_published = true;
            self.found = None;
            self.sync_names()?;
        }
        drop(lock);
        Ok(Kept::Published)
    }

    /// Writes what still counts into a file that takes the journal's place.
    pub(super) fn compact(&mut self) -> Result<(), KeepError> {
        let Some(old) = &self.current else {
            return Ok(());
        };
        let mut new = self.compacted(old.file(), old.writer.readable())?;
        new.answered = old.answered;
        new.based = old.based;
        let needed = new.compact;
        let allowed = self.settings.max_bytes;
        if needed > allowed {
            fs::remove_file(&new.path)?;
            return Err(KeepError::TooLarge { needed, allowed });
        }
        if old.is_published {
            let _lock = self.lock()?;
            if !self.is_published(old.file())? {
                fs::remove_file(&new.path)?;
                self.succeed();
                return Ok(());
            }
            fs::rename(&new.path, &old.path)?;
            self.sync_names()?;
            new.path.clone_from(&old.path);
            new.is_published = true;
        } else {
            fs::remove_file(&old.path)?;
        }
        self.current = Some(new);
        Ok(())
    }

    /// A new file with what still counts of another: the policies before the workloads that name them.
    fn compacted(&self, file: &File, readable: Readable) -> Result<Current, KeepError> {
        let mut live = Live::default();
        let read = self.read(file, readable.end, &mut live);
        let told = read.map_err(KeepError::Unreadable)?.told;
        let (path, new) = self.create()?;
        let writer = self.copy(file, readable, (&live, told), new);
        let writer = remove_unless(&path, writer)?;
        let compact = writer.readable().end;
        Ok(Current {
            writer,
            path,
            is_published: false,
            answered: [false; 2],
            based: [true; 2],
            compact,
        })
    }

    fn copy(
        &self,
        file: &File,
        readable: Readable,
        (live, told): (&Live, Option<SystemTime>),
        new: File,
    ) -> Result<Writer<BufWriter<File>>, KeepError> {
        let mut writer = Writer::begin(BufWriter::new(new), &self.settings.owner)?;
        for kind in [Kind::Authorization, Kind::Address] {
            let (places, length) = live.places(kind);
            writer.transaction(&Begin {
                kind,
                extent: Extent::Everything,
                time: told.unwrap_or(SystemTime::UNIX_EPOCH),
                length,
            })?;
            let places = places.into_iter().peekable();
            let to = &mut writer;
            let read = self.read(file, readable.end, &mut Copy { to, places });
            read.map_err(KeepError::Unreadable)?;
            writer.commit()?;
        }
        writer.get_ref().get_ref().sync_data()?;
        Ok(writer)
    }

    fn find(&self) -> Result<Option<Found>, Unusable> {
        let path = self.path();
        let metadata = match fs::symlink_metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other?,
        };
        let ours = fs::metadata("/proc/self")?.uid();
        if !metadata.is_file() || metadata.uid() != ours || metadata.mode() & 0o077 != 0 {
            return Err(Unusable::Exposed);
        }
        let file = File::open(path)?;
        let mut live = Live::default();
        let readable = self.read(&file, file.metadata()?.len(), &mut live)?;
        let needed = Kind::ALL.into_iter().zip(self.settings.unasked());
        let mut needed = needed.filter(|(_, is_unasked)| !is_unasked);
        if needed.all(|(kind, _)| live.is_based(kind)) {
            Ok(Some(Found { file, readable }))
        } else {
            Err(Unusable::Incomplete)
        }
    }

    fn read(
        &self,
        file: &File,
        length: u64,
        visitor: &mut dyn Visitor,
    ) -> Result<Readable, Unusable> {
        let mut input = BufReader::with_capacity(READ_AT_ONCE, FromStart { file, at: 0 });
        format::read(&mut input, length, &self.settings.owner, visitor)
    }

    fn path(&self) -> PathBuf {
        self.settings.directory.join(NAME)
    }

    /// Whether the name leads to this file.
    fn is_published(&self, file: &File) -> io::Result<bool> {
        match fs::symlink_metadata(self.path()) {
            Ok(named) => {
                let file = file.metadata()?;
                Ok((named.dev(), named.ino()) == (file.dev(), file.ino()))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Makes names that were given or taken away last.
    fn sync_names(&self) -> io::Result<()> {
        File::open(&self.settings.directory)?.sync_all()
    }

    /// A new file that nobody looks for. It stays locked, which tells it from what a process left behind.
    fn create(&self) -> io::Result<(PathBuf, File)> {
        let name = format!("{NAME}.{:016x}{ASIDE}", rand::random::<u64>());
        let path = self.settings.directory.join(name);
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create_new(true).mode(0o600);
        let file = file.open(&path)?;
        file.try_lock()?;
        Ok((path, file))
    }

    /// Held while a name is given or taken away.
    fn lock(&self) -> io::Result<File> {
        let mut options = OpenOptions::new();
        let file = options.write(true).create(true).truncate(false).mode(0o600);
        let file = file.open(self.settings.directory.join(LOCK))?;
        file.lock()?;
        Ok(file)
    }

    fn remove_left_overs(&self) -> io::Result<()> {
        for entry in fs::read_dir(&self.settings.directory)? {
            let entry = entry?;
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if name.starts_with(NAME)
                && name.ends_with(ASIDE)
                && File::open(entry.path())?.try_lock().is_ok()
            {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }
}

impl Current {
    fn file(&self) -> &File {
        self.writer.get_ref().get_ref()
    }

    /// Whether a batch says something about what is written here: all there is, or what has changed since.
    fn is_base_of(&self, batch: &Batch) -> bool {
        let based = self.based.get(batch.kind() as usize);
        batch.extent() == Extent::Everything || based.copied().unwrap_or_default()
    }

    fn append(&mut self, batch: &Batch, refused: &[Rejected]) -> Result<(), KeepError> {
        let in_force = in_force(batch, refused)?;
        let items = || {
            let resources = batch.encoded().iter().zip(&in_force);
            let resources = resources.filter(|(_, is_in_force)| **is_in_force);
            let resources = resources.map(|(encoded, _)| Item::Resource(encoded));
            let refused = refused.iter().map(|one| Item::Refused(&one.name));
            let removed = batch.removed().iter().map(|name| Item::Removed(name));
            resources.chain(refused).chain(removed)
        };
        self.writer.transaction(&Begin {
            kind: batch.kind(),
            extent: batch.extent(),
            time: SystemTime::now(),
            length: items().map(Item::size).sum(),
        })?;
        items().try_for_each(|item| self.writer.item(item))?;
        self.writer.commit()?;
        self.file().sync_data()?;
        let index = batch.kind() as usize;
        for known in [&mut self.answered, &mut self.based] {
            if let Some(known) = known.get_mut(index) {
                *known = true;
            }
        }
        Ok(())
    }
}

/// Turns transactions back into batches.
pub(super) struct Replay<'a> {
    sink: &'a mut dyn FnMut(Batch),
    resources: Vec<Bytes>,
    removed: Vec<String>,
}

impl<'a> Replay<'a> {
    pub(super) fn into(sink: &'a mut dyn FnMut(Batch)) -> Self {
        Self {
            sink,
            resources: Vec::new(),
            removed: Vec::new(),
        }
    }
}

impl Visitor for Replay<'_> {
    fn begin(&mut self, _: &Begin) {
        self.resources.clear();
        self.removed.clear();
    }

    fn item(&mut self, _: u64, item: Item<'_>) -> Result<(), Unusable> {
        match item {
            Item::Resource(encoded) => self.resources.push(Bytes::copy_from_slice(encoded)),
            Item::Refused(name) => self.resources.push(only_named(name)),
            Item::Removed(name) => self.removed.push(name.to_owned()),
        }
        Ok(())
    }

    fn commit(&mut self, begin: &Begin) -> Result<(), Unusable> {
        let resources = std::mem::take(&mut self.resources);
        let removed = std::mem::take(&mut self.removed);
        (self.sink)(Batch::new(begin.kind, begin.extent, resources, removed));
        Ok(())
    }
}

/// Reads a file from its start, wherever its cursor is.
struct FromStart<'a> {
    file: &'a File,
    at: u64,
}

impl Read for FromStart<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read_at(into, self.at)?;
        self.at += count as u64;
        Ok(count)
    }
}

/// Removes a file that could not be begun.
fn remove_unless<T, E>(path: &Path, begun: Result<T, E>) -> Result<T, E> {
    if begun.is_err() {
        // The error at hand is the one to tell of.
        let _ = fs::remove_file(path);
    }
    begun
}

/// Makes the directory ours alone, and finds out whether it can be written.
fn prepare(directory: &Path) -> io::Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)?;
    if fs::metadata(directory)?.mode() & 0o077 != 0 {
        fs::set_permissions(directory, Permissions::from_mode(0o700))?;
    }
    let probe = directory.join(PROBE);
    fs::write(&probe, [])?;
    fs::remove_file(probe)
}

const NAME: &str = "mesh.state";
const UNUSABLE: &str = "mesh.state.unusable";
const ASIDE: &str = ".new";
const LOCK: &str = "lock";
const PROBE: &str = "probe";
/// Superfluous bytes that are not worth a rewrite.
const COMPACT_FROM: u64 = 1 << 20;
const READ_AT_ONCE: usize = 64 << 10;
