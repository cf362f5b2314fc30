//! A publication while it is written, under a name that nobody reads.
use crate::blocks::{BLOCK, Encoder};
use crate::folder::{Folder, begin_flush, beside};
use crate::latest::{Latest, folder_of};
use crate::manifest::{Base, FileEntry, MANIFEST, Manifest, TensorEntry};
use crate::store::Store;
use crate::tensors::{Description, header, name_of};
use crate::{Digest, Error, Result};
use safetensors::Dtype;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Bytes that are hashed and written at a time, while they are in the cache.
const PIECE: usize = 1 << 20;
/// Bytes that are sent on their way to the disk at a time: a page that is written again meanwhile would have to wait.
const STRETCH: u64 = 16 << 20;
const CHANGES: &str = "changes.safetensors";

/// The weights of the last publication, against which changes are found.
#[derive(Debug)]
pub(crate) struct Shadow {
    store: Store,
    places: HashMap<String, usize>,
    tensors: Vec<Description>,
    /// What the store holds; `None` while it is being filled.
    pub(crate) base: Option<Base>,
}

impl Shadow {
    pub(crate) fn new(tensors: &[Description], place: &Path) -> Result<Self> {
        let mut end = 0;
        let mut places = HashMap::new();
        for tensor in tensors {
            places.insert(tensor.name.clone(), end);
            end += tensor.bytes().next_multiple_of(8);
        }
        Ok(Self { store: Store::new(end, place)?, places, tensors: sorted(tensors), base: None })
    }

    /// Whether it is of tensors of these names, dtypes and shapes.
    pub(crate) fn fits(&self, tensors: &[Description]) -> bool {
        self.tensors == sorted(tensors)
    }

    fn bytes(&mut self, name: &str, from: usize, length: usize) -> Option<&mut [u8]> {
        let start = self.places.get(name)? + from;
        self.store.bytes_mut().get_mut(start..start + length)
    }
}

fn sorted(tensors: &[Description]) -> Vec<Description> {
    let mut sorted = tensors.to_vec();
    sorted.sort_by(|one, other| one.name.cmp(&other.name));
    sorted
}

/// A file of tensors to be written.
#[derive(Debug)]
pub(crate) struct Planned {
    pub(crate) name: String,
    pub(crate) tensors: Vec<Description>,
}

/// A file that is being written.
#[derive(Debug)]
struct Open {
    name: String,
    file: File,
    /// Where the next byte goes.
    end: u64,
    /// What precedes this is on its way to the disk.
    flushed: u64,
    /// Tensors that still belong into it.
    left: usize,
}

/// The tensor that is being written.
#[derive(Debug, Default)]
struct Current {
    /// Bytes of it so far.
    taken: usize,
    hasher: blake3::Hasher,
    /// Of a delta: what is written of it.
    changes: blake3::Hasher,
    changed: usize,
}

/// What changes are written with.
struct Delta {
    base: Base,
    encoder: Encoder,
    room: usize,
    written: Vec<(String, Dtype, Vec<usize>, usize)>,
}

/// A publication while it is written.
pub(crate) struct Draft {
    root: Folder,
    folder: Folder,
    unfinished: String,
    step: u64,
    parts: Vec<String>,
    metadata: serde_json::Value,
    planned: std::vec::IntoIter<Planned>,
    order: Vec<(Description, String)>,
    at: usize,
    current: Current,
    open: Option<Open>,
    /// Files that may not be on the disk yet.
    written: Vec<(String, File)>,
    delta: Option<Delta>,
    pub(crate) shadow: Option<Shadow>,
    /// What `LATEST` was told to say.
    named: Option<Latest>,
    entries: BTreeMap<String, TensorEntry>,
    files: BTreeMap<String, FileEntry>,
    // Dropped last: the right to publish.
    _lock: File,
}

/// What a draft is of.
pub(crate) struct Content {
    pub(crate) step: u64,
    pub(crate) parts: Vec<String>,
    pub(crate) metadata: serde_json::Value,
    pub(crate) files: Vec<Planned>,
}

impl Draft {
    pub(crate) fn begin(root: Folder, lock: File, content: Content, shadow: Option<Shadow>) -> Result<Self> {
        let base = shadow.as_ref().and_then(|shadow| shadow.base.clone());
        let order: Vec<_> = content
            .files
            .iter()
            .flat_map(|file| file.tensors.iter().map(|tensor| (tensor.clone(), file.name.clone())))
            .collect();
        let unfinished = beside(&folder_of(content.step))?;
        let folder = root.make(&unfinished)?;
        let mut draft = Self {
            root,
            folder,
            unfinished,
            step: content.step,
            parts: content.parts,
            metadata: content.metadata,
            planned: content.files.into_iter(),
            order,
            at: 0,
            current: Current::default(),
            open: None,
            written: Vec::new(),
            delta: None,
            shadow,
            named: None,
            entries: BTreeMap::new(),
            files: BTreeMap::new(),
            _lock: lock,
        };
        if let Some(base) = base {
            draft.begin_delta(base)?;
        }
        draft.pass_whole_tensors()?;
        Ok(draft)
    }

    fn begin_delta(&mut self, base: Base) -> Result<()> {
        let place = self.folder.place(CHANGES);
        // Names as JSON writes them, and what stands around them.
        let room = self.order.iter().map(|(tensor, _)| serde_json::json!(tensor.name).to_string().len() + 160);
        let room = room.fold(256, |all, one| all + one).next_multiple_of(8);
        let encoder = Encoder::new().map_err(Error::at(&place))?;
        let file = self.folder.create(CHANGES)?;
        self.open =
            Some(Open { name: CHANGES.to_owned(), file, end: (8 + room) as u64, flushed: 0, left: self.order.len() });
        self.delta = Some(Delta { base, encoder, room, written: Vec::new() });
        Ok(())
    }

    /// The tensors in the order in which their bytes are to come.
    pub(crate) fn order(&self) -> impl Iterator<Item = &Description> {
        self.order.iter().map(|(tensor, _)| tensor)
    }

    /// Takes the next bytes of the tensor whose turn it is: all of them, or a multiple of [`BLOCK`].
    pub(crate) fn append(&mut self, bytes: &[u8]) -> Result<()> {
        let Some((tensor, _)) = self.order.get(self.at).cloned() else {
            return Err(Error::Argument("more bytes than the tensors have".to_owned()));
        };
        let left = tensor.bytes() - self.current.taken;
        if bytes.len() > left || (bytes.len() < left && !bytes.len().is_multiple_of(BLOCK)) {
            return Err(Error::Argument(format!("{}: expected {left} bytes, got {}", tensor.name, bytes.len())));
        }
        if self.delta.is_some() {
            for block in bytes.chunks(BLOCK) {
                self.append_changes(&tensor, block)?;
            }
        } else {
            self.append_whole(&tensor, bytes)?;
        }
        self.pass_whole_tensors()
    }

    fn append_whole(&mut self, tensor: &Description, bytes: &[u8]) -> Result<()> {
        let open = self.open.as_mut().ok_or_else(|| Error::Argument("no file is open".to_owned()))?;
        for piece in bytes.chunks(PIECE) {
            self.current.hasher.update(piece);
            open.file.write_all_at(piece, open.end).map_err(Error::at(&self.folder.place(&open.name)))?;
            open.end += piece.len() as u64;
            if open.end - open.flushed >= STRETCH {
                begin_flush(&open.file, open.flushed, STRETCH as usize);
                open.flushed += STRETCH;
            }
            if let Some(kept) =
                self.shadow.as_mut().and_then(|s| s.bytes(&tensor.name, self.current.taken, piece.len()))
            {
                kept.copy_from_slice(piece);
            }
            self.current.taken += piece.len();
        }
        Ok(())
    }

    fn append_changes(&mut self, tensor: &Description, block: &[u8]) -> Result<()> {
        let lost = || Error::Argument(format!("{}: is not among the tensors of the base", tensor.name));
        let (delta, open) = (self.delta.as_mut().ok_or_else(lost)?, self.open.as_mut().ok_or_else(lost)?);
        let place = self.folder.place(&open.name);
        let shadow = self.shadow.as_mut().and_then(|s| s.bytes(&tensor.name, self.current.taken, block.len()));
        let old = shadow.ok_or_else(lost)?;
        let index = self.current.taken / BLOCK;
        self.current.hasher.update(block);
        if let Some(frame) = delta.encoder.frame(index, block, old, tensor.width()).map_err(Error::at(&place))? {
            self.current.changes.update(&frame);
            self.current.changed += frame.len();
            open.file.write_all_at(&frame, open.end).map_err(Error::at(&place))?;
            open.end += frame.len() as u64;
        }
        self.current.taken += block.len();
        Ok(())
    }

    /// Closes what is complete, and opens what the next byte belongs to.
    fn pass_whole_tensors(&mut self) -> Result<()> {
        loop {
            if self.delta.is_none() && self.open.is_none() && !self.open_next()? {
                return Ok(());
            }
            match self.order.get(self.at).cloned() {
                Some((tensor, file)) if self.current.taken == tensor.bytes() => self.close_tensor(&tensor, file)?,
                _ => return Ok(()),
            }
        }
    }

    fn open_next(&mut self) -> Result<bool> {
        let Some(planned) = self.planned.next() else { return Ok(false) };
        let tensors = planned.tensors.iter().map(|t| (t.name.clone(), t.dtype, t.shape.clone(), t.bytes())).collect();
        let header = header(tensors, 0, HashMap::from([("format".to_owned(), "pt".to_owned())]))?;
        let file = self.folder.create(&planned.name)?;
        let bytes = (header.len() + planned.tensors.iter().fold(0, |all, tensor| all + tensor.bytes())) as u64;
        file.write_all_at(&header, 0).map_err(Error::at(&self.folder.place(&planned.name)))?;
        self.files.insert(planned.name.clone(), FileEntry { bytes, digest: Digest::of(&header) });
        self.open =
            Some(Open { name: planned.name, file, end: header.len() as u64, flushed: 0, left: planned.tensors.len() });
        Ok(true)
    }

    fn close_tensor(&mut self, tensor: &Description, file: String) -> Result<()> {
        let mut current = std::mem::take(&mut self.current);
        let mut entry = TensorEntry {
            dtype: name_of(tensor.dtype),
            shape: tensor.shape.clone(),
            digest: Digest::finished(&current.hasher),
            file: Some(file),
            changes: None,
        };
        if self.delta.is_some() {
            entry.file = self.close_changes(tensor, &mut current)?.then(|| CHANGES.to_owned());
            entry.changes = entry.file.is_some().then(|| Digest::finished(&current.changes));
        }
        self.entries.insert(tensor.name.clone(), entry);
        self.at += 1;
        if let Some(open) = self.open.as_mut().filter(|_| self.delta.is_none()) {
            open.left -= 1;
            if open.left == 0 {
                self.written.extend(self.open.take().map(|open| (open.name, open.file)));
            }
        }
        Ok(())
    }

    /// Whether anything of the tensor has changed. What is written of it ends at a multiple of 8 bytes.
    fn close_changes(&mut self, tensor: &Description, current: &mut Current) -> Result<bool> {
        let (Some(delta), Some(open)) = (self.delta.as_mut(), self.open.as_mut()) else { return Ok(false) };
        if current.changed == 0 {
            return Ok(false);
        }
        let padding = current.changed.next_multiple_of(8) - current.changed;
        open.file.write_all_at(&[0; 8][..padding], open.end).map_err(Error::at(&self.folder.place(&open.name)))?;
        open.end += padding as u64;
        current.changes.update(&[0; 8][..padding]);
        let bytes = current.changed + padding;
        delta.written.push((tensor.name.clone(), Dtype::U8, vec![bytes], bytes));
        Ok(true)
    }

    /// Completes the publication, gives it its name, and has `LATEST` name it where that still names `last`.
    pub(crate) fn finish(
        &mut self,
        attachments: &[(String, Vec<u8>)],
        last: Option<Latest>,
    ) -> Result<(Manifest, Latest)> {
        if let Some((tensor, _)) = self.order.get(self.at) {
            return Err(Error::Argument(format!("{}: its bytes have not come", tensor.name)));
        }
        let base = self.finish_changes()?;
        for (name, bytes) in attachments.iter().chain(&indices(&self.entries)) {
            self.write(name, bytes)?;
            self.files.insert(name.clone(), FileEntry { bytes: bytes.len() as u64, digest: Digest::of(bytes) });
        }
        let parts = std::mem::take(&mut self.parts);
        let (files, tensors) = (std::mem::take(&mut self.files), std::mem::take(&mut self.entries));
        let manifest = Manifest::new(self.step, base, parts, files, tensors, std::mem::take(&mut self.metadata));
        let (text, digest) = manifest.text()?;
        self.write(MANIFEST, &text)?;
        // What nobody could read back is not published.
        Manifest::parse(&text, &self.folder.place(MANIFEST))?;
        let latest = Latest { step: self.step, digest };
        self.place(latest, last)?;
        if let Some(shadow) = self.shadow.as_mut() {
            shadow.base = Some(Base { step: self.step, weights: manifest.weights });
        }
        Ok((manifest, latest))
    }

    fn finish_changes(&mut self) -> Result<Option<Base>> {
        let (Some(delta), Some(open)) = (self.delta.take(), self.open.take()) else { return Ok(None) };
        let place = self.folder.place(CHANGES);
        let say = HashMap::from([("format".to_owned(), "vhead.sync changes".to_owned())]);
        let header = header(delta.written, delta.room, say)?;
        if header.len() != 8 + delta.room {
            return Err(Error::Argument("the names of the tensors are too long".to_owned()));
        }
        open.file.write_all_at(&header, 0).map_err(Error::at(&place))?;
        self.written.push((open.name, open.file));
        self.files.insert(CHANGES.to_owned(), FileEntry { bytes: open.end, digest: Digest::of(&header) });
        Ok(Some(delta.base))
    }

    fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let file = self.folder.put(name, bytes)?;
        self.written.push((name.to_owned(), file));
        Ok(())
    }

    /// Waits until everything is on the disk. What is on its way there already is waited for together.
    fn flush(&mut self) -> Result<()> {
        for (name, file) in std::mem::take(&mut self.written) {
            file.sync_all().map_err(Error::at(&self.folder.place(&name)))?;
        }
        self.folder.sync()
    }

    /// Gives the publication its name, and has `LATEST` name it.
    fn place(&mut self, latest: Latest, last: Option<Latest>) -> Result<()> {
        let next = latest.prepared(&self.root)?;
        let taken = self.flush().and_then(|()| next.sync(&self.root)).and_then(|()| self.take_name(last));
        if taken.is_err() {
            next.abandon(&self.root);
        }
        taken?;
        self.named = Some(latest);
        next.place(&self.root)
    }

    fn take_name(&self, last: Option<Latest>) -> Result<()> {
        let name = folder_of(self.step);
        let conflict = |did: String| Error::Conflict { place: self.root.path().to_owned(), did };
        self.root.rename(&self.unfinished, &name).map_err(|error| match error.raw_os_error() {
            Some(libc::ENOTEMPTY | libc::EEXIST) => conflict(format!("has put {name} there")),
            Some(libc::ENOENT) => conflict(format!("has removed {}", self.unfinished)),
            _ => Error::at(&self.root.place(&name))(error),
        })?;
        self.root.sync()?;
        match Latest::read(&self.root)? {
            found if found == last => Ok(()),
            found => Err(conflict(format!("has published {}", found.map_or(0, |found| found.step)))),
        }
    }

    /// This publication, if `LATEST` names it although an error came after that.
    pub(crate) fn named(&self) -> Option<Latest> {
        let found = self.named.and_then(|_| Latest::read(&self.root).ok().flatten());
        found.filter(|found| Some(*found) == self.named)
    }

    pub(crate) fn root(&self) -> &Folder {
        &self.root
    }

    /// Removes what was written so far.
    pub(crate) fn abandon(&self) {
        // What cannot be removed now, the next publication removes.
        let _ = self.root.remove(&self.unfinished);
    }
}

/// The indices of weights that are split over several files, as transformers reads them.
fn indices(entries: &BTreeMap<String, TensorEntry>) -> Vec<(String, Vec<u8>)> {
    let mut maps: BTreeMap<String, BTreeMap<&str, &str>> = BTreeMap::new();
    for (name, entry) in entries {
        let file = entry.file.as_deref().unwrap_or_default();
        if let Some((start, _)) = file.split_once("-of-")
            && let Some((stem, _)) = start.rsplit_once('-')
        {
            maps.entry(format!("{stem}.safetensors.index.json")).or_default().insert(name, file);
        }
    }
    let text = |map| serde_json::json!({ "metadata": {}, "weight_map": map }).to_string().into_bytes();
    maps.into_iter().map(|(name, map)| (name, text(map))).collect()
}
