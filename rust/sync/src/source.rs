//! A publication whose files are all open: none of them can vanish any more, and each is the one that was checked.
use crate::folder::Folder;
use crate::latest::folder_of;
use crate::manifest::{FileEntry, Kind, Manifest, TensorEntry};
use crate::tensors::{LENGTH_BYTES, header_length, name_of, parse_header};
use crate::{Digest, Error, Result};
use safetensors::tensor::Metadata;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const OF_TENSORS: &str = ".safetensors";
/// Bytes that are read and hashed at a time, while they are in the cache.
pub(crate) const PIECE: usize = 1 << 20;
/// The longest file beside the tensors: a configuration, an index.
const LONGEST_ATTACHMENT: u64 = 128 << 20;

/// An open publication.
#[derive(Debug)]
pub(crate) struct Source {
    pub(crate) manifest: Manifest,
    pub(crate) digest: Digest,
    place: PathBuf,
    files: BTreeMap<String, TensorFile>,
}

#[derive(Debug)]
struct TensorFile {
    file: File,
    metadata: Metadata,
    data: u64,
}

/// Bytes in an open file.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stretch<'a> {
    file: &'a File,
    start: u64,
    pub(crate) bytes: usize,
}

impl Source {
    /// Opens the publication of a step and checks its manifest and everything but the tensors' bytes.
    pub(crate) fn open(root: &Folder, step: u64) -> Result<Self> {
        let folder = root.folder(&folder_of(step))?;
        let (manifest, digest) = Manifest::read(&folder)?;
        if manifest.step != step {
            return Err(Error::damaged(folder.path(), format!("step {step}"), format!("step {}", manifest.step)));
        }
        let mut files = BTreeMap::new();
        for (name, entry) in &manifest.files {
            if name.ends_with(OF_TENSORS) {
                files.insert(name.clone(), TensorFile::open(&folder, name, entry)?);
            } else {
                attachment(&folder, name, entry)?;
            }
        }
        let source = Self { manifest, digest, place: folder.path().to_owned(), files };
        source.check_tensors()?;
        Ok(source)
    }

    /// The small files beside the tensors, by name.
    pub(crate) fn attachments(&self) -> Result<Vec<(String, Vec<u8>)>> {
        let folder = Folder::at(&self.place)?;
        let small = self.manifest.files.iter().filter(|(name, _)| !name.ends_with(OF_TENSORS));
        small.map(|(name, entry)| Ok((name.clone(), attachment(&folder, name, entry)?))).collect()
    }

    /// Each tensor that the manifest puts into a file is there, and nothing else is.
    fn check_tensors(&self) -> Result<()> {
        let mut listed: BTreeMap<&str, usize> = BTreeMap::new();
        for (name, entry) in &self.manifest.tensors {
            if let Some(file) = &entry.file {
                *listed.entry(file).or_default() += 1;
                self.check_tensor(name, entry, file)?;
            }
        }
        for (name, file) in &self.files {
            let (held, expected) = (file.metadata.offset_keys().len(), listed.get(name.as_str()).copied().unwrap_or(0));
            if held != expected {
                return Err(Error::damaged(&self.place(name), format!("{expected} tensors"), held));
            }
        }
        Ok(())
    }

    fn check_tensor(&self, name: &str, entry: &TensorEntry, file: &str) -> Result<()> {
        let info = self.files.get(file).and_then(|file| file.metadata.info(name));
        let place = self.place(file);
        let info = info.ok_or_else(|| Error::damaged(&place, format!("the tensor {name:?}"), "none of that name"))?;
        let (dtype, shape) = (name_of(info.dtype), &info.shape);
        let fits = match self.manifest.kind {
            Kind::Full => dtype == entry.dtype && *shape == entry.shape,
            Kind::Delta => dtype == "U8" && shape.len() == 1,
        };
        let expected = || format!("{name:?} as {} {:?}", entry.dtype, entry.shape);
        if fits { Ok(()) } else { Err(Error::damaged(&place, expected(), format!("{dtype} {shape:?}"))) }
    }

    /// Where a tensor, or what has changed of it, lies; `None` where nothing has changed.
    pub(crate) fn find(&self, name: &str) -> Option<Stretch<'_>> {
        let file = self.files.get(self.manifest.tensors.get(name)?.file.as_ref()?)?;
        let (start, end) = file.metadata.info(name)?.data_offsets;
        Some(Stretch { file: &file.file, start: file.data + start as u64, bytes: end - start })
    }

    /// The file of a tensor, by its place among [`Self::open_files`], and the tensor's first byte in it.
    pub(crate) fn locate(&self, tensor: &str) -> Option<(usize, u64)> {
        let name = self.manifest.tensors.get(tensor)?.file.as_ref()?;
        Some((self.files.keys().position(|file| file == name)?, self.find(tensor)?.start))
    }

    /// The open files of tensors once more, for who keeps them longer than this.
    pub(crate) fn open_files(&self) -> Result<Vec<File>> {
        let again = |(name, file): (&String, &TensorFile)| file.file.try_clone().map_err(Error::at(&self.place(name)));
        self.files.iter().map(again).collect()
    }

    /// The path of a file of the publication, or of the publication for an empty name, for messages.
    pub(crate) fn place(&self, name: &str) -> PathBuf {
        if name.is_empty() { self.place.clone() } else { self.place.join(name) }
    }

    /// The path of the file of a tensor, for messages.
    pub(crate) fn place_of(&self, tensor: &str) -> PathBuf {
        let file = self.manifest.tensors.get(tensor).and_then(|entry| entry.file.as_deref());
        self.place(file.unwrap_or_default())
    }
}

impl TensorFile {
    fn open(folder: &Folder, name: &str, entry: &FileEntry) -> Result<Self> {
        let (file, length) = folder.file(name)?;
        let place = folder.place(name);
        if length != entry.bytes {
            return Err(Error::damaged(&place, format!("{} bytes", entry.bytes), length));
        }
        let whole = Stretch { file: &file, start: 0, bytes: usize::try_from(length).unwrap_or(usize::MAX) };
        let mut first = [0; LENGTH_BYTES];
        whole.read(0, &mut first, &place)?;
        let mut header = vec![0; LENGTH_BYTES + header_length(first, &place)?.min(whole.bytes)];
        whole.read(0, &mut header, &place)?;
        if Digest::of(&header) != entry.digest {
            return Err(Error::damaged(&place, "the header of the manifest's digest", "another one"));
        }
        let metadata = parse_header(&header[LENGTH_BYTES..], length, &place)?;
        Ok(Self { metadata, data: header.len() as u64, file })
    }
}

impl Stretch<'_> {
    /// The digest of all of it.
    pub(crate) fn digest(&self, place: &Path) -> Result<Digest> {
        let mut hasher = blake3::Hasher::new();
        let mut room = vec![0; PIECE.min(self.bytes)];
        for from in (0..self.bytes).step_by(PIECE) {
            let piece = &mut room[..PIECE.min(self.bytes - from)];
            self.read(from, piece, place)?;
            hasher.update(piece);
        }
        Ok(Digest::finished(&hasher))
    }

    /// Reads bytes that begin at `from` of this stretch.
    pub(crate) fn read(&self, from: usize, into: &mut [u8], place: &Path) -> Result<()> {
        self.file.read_exact_at(into, self.start + from as u64).map_err(|error| match error.kind() {
            ErrorKind::UnexpectedEof => Error::damaged(place, "a whole file", "one that is cut short"),
            _ => Error::at(place)(error),
        })
    }
}

/// The content of a small file, which is what the manifest knows.
fn attachment(folder: &Folder, name: &str, entry: &FileEntry) -> Result<Vec<u8>> {
    let bytes = folder.read(name, LONGEST_ATTACHMENT.min(entry.bytes))?;
    if bytes.len() as u64 == entry.bytes && Digest::of(&bytes) == entry.digest {
        return Ok(bytes);
    }
    Err(Error::damaged(&folder.place(name), "the content of the manifest's digest", "another one"))
}
