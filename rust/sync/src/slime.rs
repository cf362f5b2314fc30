//! Publications as the version folders that slime writes and SGLang's `/pull_weights` reads.
//!
//! A folder `weight_v000007` is a checkpoint: whole, or, where its index names a `delta_encoding`, of changes to version
//! 6. A changed tensor is a compressed list of bytes: how many have changed, their places, and their new values.
use crate::folder::{Folder, beside};
use crate::publisher::plan;
use crate::retention::LOCK;
use crate::stage::{Stage, Staged};
use crate::tensors::{Description, header};
use crate::{Digest, Error, Result};
use safetensors::Dtype;
use serde_json::{Map, Value, json};
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use zstd::stream::write::Encoder;

const PREFIX: &str = "weight_v";
const INDEX: &str = "model.safetensors.index.json";
const LONGEST_INDEX: u64 = 128 << 20;
/// Its files of changes are numbered from 0.
const CHANGES: &str = "model-00000-of-00001.safetensors";
const LEVEL: i32 = 1;
/// Places of changed bytes are numbers of 32 bits.
const LONGEST_TENSOR: usize = u32::MAX as usize;
/// In the index, which publication a version is of.
const STEP: &str = "vhead_step";
const WEIGHTS: &str = "vhead_weights";

/// What a version says of each tensor's bytes once its changes are applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Checksum {
    /// XXH3 of 128 bits.
    Xxh3,
    /// BLAKE3.
    Blake3,
}

impl Checksum {
    /// The checksum of a name, as an index has it.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        [Self::Xxh3, Self::Blake3].into_iter().find(|checksum| checksum.name() == name)
    }

    /// Its name in an index.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Xxh3 => "xxh3-128",
            Self::Blake3 => "blake3",
        }
    }

    fn of(self, bytes: &[u8]) -> String {
        match self {
            Self::Xxh3 => format!("{:032x}", xxhash_rust::xxh3::xxh3_128(bytes)),
            Self::Blake3 => Digest::of(bytes).to_string(),
        }
    }
}

/// The publication that a version is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Held {
    version: u64,
    step: u64,
    weights: Digest,
}

/// Writes a publication as the next version into the folder `to`, and gives its number.
///
/// It holds the changes since the last version where that one's publication is still in the directory, is of the same
/// tensors, and none of them has 4 GiB or more; all weights otherwise, and where `full` asks for that. A publication that
/// the last version is of already is not written again.
///
/// # Errors
/// The publication is damaged, not there, or not of a whole model; `to` cannot be written, or somebody else writes there.
pub fn export(
    from: &Path,
    to: &Path,
    step: Option<u64>,
    checksum: Checksum,
    full: bool,
    staging: &Path,
) -> Result<u64> {
    let new = verified(from, step, staging)?;
    let root = Folder::at(to)?;
    let conflict = |did: String| Error::Conflict { place: to.to_owned(), did };
    let _lock = root.lock(LOCK)?.ok_or_else(|| conflict("is writing".to_owned()))?;
    let (last, held) = last_version(&root)?;
    let is_of = (new.step(), new.weights());
    if let Some(held) = held.filter(|held| (held.step, held.weights) == is_of && !full) {
        return Ok(held.version);
    }
    let version = last + 1;
    let old = held.filter(|_| !full).map(|held| base(from, held, &new, staging)).transpose()?.flatten();
    let name = version_name(version);
    let unfinished = beside(&name)?;
    let folder = root.make(&unfinished)?;
    let written = match &old {
        Some(old) => write_changes(&folder, version, &new, old, checksum),
        None => write_whole(&folder, version, &new),
    };
    let placed = written.and_then(|()| folder.sync()).and_then(|()| {
        root.rename(&unfinished, &name).map_err(|error| match error.raw_os_error() {
            Some(libc::ENOTEMPTY | libc::EEXIST) => conflict(format!("has put {name} there")),
            _ => Error::at(&root.place(&name))(error),
        })
    });
    if placed.is_err() {
        // The first error is the one to report; nobody reads what is left over.
        let _ = root.remove(&unfinished);
    }
    placed.and_then(|()| root.sync()).map(|()| version)
}

fn version_name(version: u64) -> String {
    format!("{PREFIX}{version:06}")
}

/// The number of the last version, and what it is of, where an export has written it.
fn last_version(root: &Folder) -> Result<(u64, Option<Held>)> {
    let versions = root.names()?.into_iter().filter_map(|name| {
        let version = name.strip_prefix(PREFIX)?.parse().ok()?;
        (version_name(version) == name).then_some(version)
    });
    let Some(version) = versions.max() else { return Ok((0, None)) };
    let index = match root.folder(&version_name(version))?.read(INDEX, LONGEST_INDEX) {
        Err(Error::Vanished { .. }) => return Ok((version, None)),
        other => other?,
    };
    let index: Value = serde_json::from_slice(&index).unwrap_or_default();
    let said = |key: &str| index["metadata"][key].as_str();
    let held = said(STEP).and_then(|step| step.parse().ok()).zip(said(WEIGHTS).and_then(Digest::parse));
    Ok((version, held.map(|(step, weights)| Held { version, step, weights })))
}

/// What the last version is of, where changes to it can be written.
fn base(from: &Path, held: Held, new: &Exportable, staging: &Path) -> Result<Option<Exportable>> {
    let old = match verified(from, Some(held.step), staging) {
        Err(Error::Vanished { .. } | Error::Base { .. }) => return Ok(None),
        other => other?,
    };
    let fits = old.tensors == new.tensors && new.tensors.iter().all(|tensor| tensor.bytes() <= LONGEST_TENSOR);
    Ok((fits && old.weights() == held.weights).then_some(old))
}

/// A verified publication of a whole model, in room that nobody else can reach.
struct Exportable {
    stage: Box<Stage>,
    tensors: Vec<Description>,
    attachments: Vec<(String, Vec<u8>)>,
    step: u64,
    weights: Digest,
}

fn verified(from: &Path, step: Option<u64>, staging: &Path) -> Result<Exportable> {
    let Staged::Found(mut stage) = Stage::open(from, step, None, staging, false)? else {
        return Err(Error::Vanished { place: from.join("LATEST") });
    };
    let source = stage.newest().ok_or_else(|| Error::Argument("no publication".to_owned()))?;
    let manifest = &source.manifest;
    if manifest.parts() != ["model"] {
        let expected = "expected a publication of a whole model, got one of";
        return Err(Error::Argument(format!(
            "{}: {expected} {}",
            source.place("").display(),
            manifest.parts().join(", ")
        )));
    }
    let (step, weights, attachments) = (manifest.step(), manifest.weights(), source.attachments()?);
    while stage.next().is_some() {
        stage.verify_next(None)?;
    }
    Ok(Exportable { tensors: stage.tensors().cloned().collect(), stage, attachments, step, weights })
}

impl Exportable {
    fn step(&self) -> u64 {
        self.step
    }

    fn weights(&self) -> Digest {
        self.weights
    }

    /// What an index says of every version.
    fn said(&self, version: u64) -> Map<String, Value> {
        let said =
            [("version", format!("{version:06}")), (STEP, self.step.to_string()), (WEIGHTS, self.weights.to_string())];
        said.into_iter().map(|(key, value)| (key.to_owned(), Value::String(value))).collect()
    }

    fn bytes(&self, tensor: &Description) -> Result<&[u8]> {
        let place = self.tensors.binary_search_by(|other| other.name.cmp(&tensor.name));
        self.stage.image(place.map_err(|_| Error::Argument(format!("{}: no such tensor", tensor.name)))?)
    }
}

fn write_whole(folder: &Folder, version: u64, new: &Exportable) -> Result<()> {
    let mut weight_map = Map::new();
    let mut total = 0;
    for planned in plan(new.tensors.iter().map(|tensor| (tensor.clone(), "model".to_owned())).collect())? {
        let described = planned.tensors.iter().map(|t| (t.name.clone(), t.dtype, t.shape.clone(), t.bytes())).collect();
        let header = header(described, 0, HashMap::from([("format".to_owned(), "pt".to_owned())]))?;
        let mut file = Writing::new(folder, &planned.name)?;
        file.append(&header)?;
        for tensor in &planned.tensors {
            file.append(new.bytes(tensor)?)?;
            total += tensor.bytes();
            weight_map.insert(tensor.name.clone(), json!(planned.name));
        }
        file.finish()?;
    }
    for (name, bytes) in new.attachments.iter().filter(|(name, _)| !name.ends_with(".index.json")) {
        folder.write(name, bytes)?;
    }
    let mut said = new.said(version);
    said.insert("total_size".to_owned(), json!(total));
    write_index(folder, said, weight_map)
}

fn write_changes(folder: &Folder, version: u64, new: &Exportable, old: &Exportable, checksum: Checksum) -> Result<()> {
    let (mut checksums, mut written, mut weight_map) = (HashMap::new(), Vec::new(), Map::new());
    // Names as JSON writes them, twice; a checksum; and what stands around them.
    let room = new.tensors.iter().map(|tensor| 2 * json!(tensor.name).to_string().len() + 224);
    let room = room.fold(256, |all, one| all + one).next_multiple_of(8);
    let mut file = Writing::new(folder, CHANGES)?;
    file.end = (8 + room) as u64;
    for tensor in &new.tensors {
        let (after, before) = (new.bytes(tensor)?, old.bytes(tensor)?);
        let start = file.end;
        if encode(after, before, &mut file).map_err(Error::at(&file.place))? {
            let bytes = (file.end - start) as usize;
            written.push((tensor.name.clone(), Dtype::U8, vec![bytes], bytes));
            checksums.insert(tensor.name.clone(), checksum.of(after));
            weight_map.insert(tensor.name.clone(), json!(CHANGES));
        }
    }
    if written.is_empty() {
        folder.remove(CHANGES)?;
    } else {
        let header = header(written, room, checksums)?;
        if header.len() != 8 + room {
            return Err(Error::Argument("the names of the tensors are too long".to_owned()));
        }
        file.end = 0;
        file.append(&header)?;
        file.finish()?;
    }
    let mut said = new.said(version);
    for (key, value) in [
        ("base_version", format!("{:06}", version - 1)),
        ("delta_encoding", "overwrite".to_owned()),
        ("compression_format", "zstd".to_owned()),
        ("checksum_format", checksum.name().to_owned()),
    ] {
        said.insert(key.to_owned(), Value::String(value));
    }
    write_index(folder, said, weight_map)
}

fn write_index(folder: &Folder, said: Map<String, Value>, weight_map: Map<String, Value>) -> Result<()> {
    folder.write(INDEX, json!({ "metadata": said, "weight_map": weight_map }).to_string().as_bytes())
}

/// Writes the changes of a tensor, compressed; whether there are any. The list is made three times over, for its length,
/// its places and its values, as it may be longer than the memory for it.
fn encode(new: &[u8], old: &[u8], file: &mut Writing) -> io::Result<bool> {
    let mut count = 0_u32;
    changed(new, old, |_, _| {
        count += 1;
        Ok(())
    })?;
    if count == 0 {
        return Ok(false);
    }
    let mut encoder = Encoder::new(io::BufWriter::with_capacity(1 << 20, file), LEVEL)?;
    // The reader asks the frame for its length.
    encoder.include_contentsize(true)?;
    encoder.set_pledged_src_size(Some(4 + 5 * u64::from(count)))?;
    encoder.write_all(&count.to_le_bytes())?;
    changed(new, old, |place, _| encoder.write_all(&(place as u32).to_le_bytes()))?;
    changed(new, old, |_, value| encoder.write_all(&[value]))?;
    encoder.finish()?.into_inner().map_err(io::IntoInnerError::into_error)?;
    Ok(true)
}

/// Calls `note` with the place and the new value of each byte that differs.
fn changed(new: &[u8], old: &[u8], mut note: impl FnMut(usize, u8) -> io::Result<()>) -> io::Result<()> {
    const WORD: usize = 64;
    for (at, (new, old)) in new.chunks(WORD).zip(old.chunks(WORD)).enumerate() {
        if new != old {
            for (within, (&new, &old)) in new.iter().zip(old).enumerate() {
                if new != old {
                    note(at * WORD + within, new)?;
                }
            }
        }
    }
    Ok(())
}

/// A file that is written from its beginning to its end.
struct Writing {
    file: File,
    place: std::path::PathBuf,
    end: u64,
}

impl Writing {
    fn new(folder: &Folder, name: &str) -> Result<Self> {
        Ok(Self { file: folder.create(name)?, place: folder.place(name), end: 0 })
    }

    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.write_all(bytes).map_err(Error::at(&self.place))
    }

    fn finish(self) -> Result<()> {
        self.file.sync_all().map_err(Error::at(&self.place))
    }
}

impl Write for Writing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = self.file.write_at(bytes, self.end)?;
        self.end += taken as u64;
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
