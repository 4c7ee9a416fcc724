//! Profiles in the format of pprof: stacks with values, as a message of protocol buffers.

use std::{
    collections::{BTreeMap, HashMap},
    hash::Hash,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use prost::Message;

use super::image::Image;

/// A place in the program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Frame {
    /// Anywhere in the kernel.
    Kernel,
    /// At an address of memory, within the instruction that is, or was, executed.
    At(u64),
}

/// How often each stack was seen.
#[derive(Debug, Default)]
pub(super) struct Stacks {
    seen: HashMap<Vec<Frame>, i64>,
    /// Samples for which there was no room.
    pub(super) lost: u64,
}

impl Stacks {
    /// One more of these frames, innermost first.
    pub(super) fn count(&mut self, frames: Vec<Frame>) {
        if self.seen.len() < MOST_STACKS || self.seen.contains_key(&frames) {
            *self.seen.entry(frames).or_default() += 1;
        } else {
            self.lost += 1;
        }
    }

    /// As a profile of processor time that took `length`, with so many samples for each second.
    pub(super) fn profile(self, images: &[Image], length: Duration, frequency: u64) -> Vec<u8> {
        let period = i64::try_from(NANOS / frequency.max(1)).unwrap_or(i64::MAX);
        let mut builder = Builder::default();
        builder.values(&[("samples", "count"), ("cpu", "nanoseconds")]);
        builder.profile.period_type = Some(builder.value_type("cpu", "nanoseconds"));
        builder.profile.period = period;
        builder.profile.duration_nanos = nanos(length);
        if self.lost > 0 {
            let comment = builder.text(&format!("{} samples were lost", self.lost));
            builder.profile.comment.push(comment);
        }
        for (frames, count) in self.seen {
            builder.sample(&frames, vec![count, count.saturating_mul(period)]);
        }
        builder.build(images)
    }
}

/// A profile in the making.
#[derive(Debug, Default)]
pub(super) struct Builder {
    profile: Profile,
    texts: Numbers<String>,
    locations: Numbers<Frame>,
}

/// Gives each thing a number, counting from 0.
#[derive(Debug)]
struct Numbers<T>(HashMap<T, u64>);

impl<T: Hash + Eq> Numbers<T> {
    fn of(&mut self, thing: T) -> u64 {
        let next = u64::try_from(self.0.len()).unwrap_or(u64::MAX);
        *self.0.entry(thing).or_insert(next)
    }
}

impl<T> Default for Numbers<T> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl Builder {
    /// What the values of samples are, one after the other.
    pub(super) fn values(&mut self, kinds: &[(&str, &str)]) {
        for (kind, unit) in kinds {
            let one = self.value_type(kind, unit);
            self.profile.sample_type.push(one);
        }
    }

    fn value_type(&mut self, kind: &str, unit: &str) -> ValueType {
        ValueType {
            kind: self.text(kind),
            unit: self.text(unit),
        }
    }

    fn text(&mut self, text: &str) -> i64 {
        self.texts.of(String::new()); // the first one is empty
        i64::try_from(self.texts.of(text.to_owned())).unwrap_or(0)
    }

    /// Adds these values to a stack, innermost frame first.
    pub(super) fn sample(&mut self, frames: &[Frame], value: Vec<i64>) {
        let number = |frame| 1 + self.locations.of(frame);
        let location_id = frames.iter().copied().map(number).collect();
        self.profile.sample.push(Sample { location_id, value });
    }

    /// The message, with the names of functions.
    pub(super) fn build(mut self, images: &[Image]) -> Vec<u8> {
        let names = self.names(images);
        for (index, image) in images.iter().enumerate() {
            let named = |frame: &Frame| matches!(frame, Frame::At(at) if image.memory.contains(at));
            let filename = self.text(&image.path.display().to_string());
            self.profile.mapping.push(Mapping {
                id: number(index),
                memory_start: image.memory.start,
                memory_limit: image.memory.end,
                file_offset: image.offset,
                filename,
                // Where there are no names, `pprof` looks for them in a file that it is given.
                has_functions: names.keys().any(named),
            });
        }
        let mut functions = Numbers::default();
        for (frame, id) in std::mem::take(&mut self.locations.0) {
            let line = names.get(&frame).map(|name| Line {
                function_id: 1 + functions.of(name.clone()),
            });
            let (address, mapping_id) = match frame {
                Frame::Kernel => (0, 0),
                Frame::At(address) => {
                    let holds = |image: &Image| image.memory.contains(&address);
                    (address, images.iter().position(holds).map_or(0, number))
                }
            };
            self.profile.location.push(Location {
                id: id + 1,
                mapping_id,
                address,
                line: line.into_iter().collect(),
            });
        }
        for (name, id) in functions.0 {
            let name = self.text(&name);
            self.profile.function.push(Function { id: id + 1, name });
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        self.profile.time_nanos = nanos(now.unwrap_or_default());
        let mut texts: Vec<_> = self.texts.0.into_iter().collect();
        texts.sort_unstable_by_key(|(_, number)| *number);
        self.profile.string_table = texts.into_iter().map(|(text, _)| text).collect();
        self.profile.encode_to_vec()
    }

    fn names(&self, images: &[Image]) -> BTreeMap<Frame, String> {
        let mut names = BTreeMap::from([(Frame::Kernel, "[kernel]".to_owned())]);
        for image in images {
            let here = self.locations.0.keys().filter_map(|frame| match frame {
                Frame::At(address) if image.memory.contains(address) => Some(*address),
                Frame::At(_) | Frame::Kernel => None,
            });
            let here: Vec<u64> = here.collect();
            if here.is_empty() {
                continue;
            }
            let named = here.iter().zip(image.names(&here));
            names.extend(named.filter_map(|(at, name)| Some((Frame::At(*at), name?))));
        }
        names
    }
}

/// Counting from 1.
fn number(index: usize) -> u64 {
    u64::try_from(index).unwrap_or(u64::MAX).saturating_add(1)
}

fn nanos(duration: Duration) -> i64 {
    i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX)
}

/// Different stacks that are kept of a profile.
const MOST_STACKS: usize = 50_000;
const NANOS: u64 = 1_000_000_000;

/// `perftools.profiles.Profile`, as far as it is used; texts are indexes into `string_table`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Profile {
    #[prost(message, repeated, tag = "1")]
    pub(super) sample_type: Vec<ValueType>,
    #[prost(message, repeated, tag = "2")]
    pub(super) sample: Vec<Sample>,
    #[prost(message, repeated, tag = "3")]
    pub(super) mapping: Vec<Mapping>,
    #[prost(message, repeated, tag = "4")]
    pub(super) location: Vec<Location>,
    #[prost(message, repeated, tag = "5")]
    pub(super) function: Vec<Function>,
    #[prost(string, repeated, tag = "6")]
    pub(super) string_table: Vec<String>,
    #[prost(int64, tag = "9")]
    pub(super) time_nanos: i64,
    #[prost(int64, tag = "10")]
    pub(super) duration_nanos: i64,
    #[prost(message, optional, tag = "11")]
    pub(super) period_type: Option<ValueType>,
    #[prost(int64, tag = "12")]
    pub(super) period: i64,
    #[prost(int64, repeated, tag = "13")]
    pub(super) comment: Vec<i64>,
}

#[derive(Clone, Copy, PartialEq, Message)]
pub(super) struct ValueType {
    #[prost(int64, tag = "1")]
    pub(super) kind: i64,
    #[prost(int64, tag = "2")]
    pub(super) unit: i64,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Sample {
    #[prost(uint64, repeated, tag = "1")]
    pub(super) location_id: Vec<u64>,
    #[prost(int64, repeated, tag = "2")]
    pub(super) value: Vec<i64>,
}

#[derive(Clone, Copy, PartialEq, Message)]
pub(super) struct Mapping {
    #[prost(uint64, tag = "1")]
    pub(super) id: u64,
    #[prost(uint64, tag = "2")]
    pub(super) memory_start: u64,
    #[prost(uint64, tag = "3")]
    pub(super) memory_limit: u64,
    #[prost(uint64, tag = "4")]
    pub(super) file_offset: u64,
    #[prost(int64, tag = "5")]
    pub(super) filename: i64,
    #[prost(bool, tag = "7")]
    pub(super) has_functions: bool,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Location {
    #[prost(uint64, tag = "1")]
    pub(super) id: u64,
    #[prost(uint64, tag = "2")]
    pub(super) mapping_id: u64,
    #[prost(uint64, tag = "3")]
    pub(super) address: u64,
    #[prost(message, repeated, tag = "4")]
    pub(super) line: Vec<Line>,
}

#[derive(Clone, Copy, PartialEq, Message)]
pub(super) struct Line {
    #[prost(uint64, tag = "1")]
    pub(super) function_id: u64,
}

#[derive(Clone, Copy, PartialEq, Message)]
pub(super) struct Function {
    #[prost(uint64, tag = "1")]
    pub(super) id: u64,
    #[prost(int64, tag = "2")]
    pub(super) name: i64,
}
