//! What a publication says about itself: every tensor's dtype, shape and digest, and every file.
//!
//! The text begins with the digest of all that follows it, so that a manifest of any step shows damage by itself.
use crate::folder::Folder;
use crate::tensors::{Description, dtype_named};
use crate::{Digest, Error, Result};
use serde::de::{self, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;
use std::path::Path;

pub(crate) const MANIFEST: &str = "manifest.json";
const SCHEMA: &str = "vhead.sync/1";
const MOST_BYTES: u64 = 128 << 20;
const OPENING: &str = "{\"digest\":\"";

/// Whether a publication holds all weights or what has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// All weights: an ordinary checkpoint.
    Full,
    /// What has changed since the base.
    Delta,
}

/// The publication that a delta changes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Base {
    pub(crate) step: u64,
    pub(crate) weights: Digest,
}

/// A file of a publication.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct FileEntry {
    pub(crate) bytes: u64,
    /// Of the whole file, or of all that precedes the tensors in a file of tensors.
    pub(crate) digest: Digest,
}

/// A tensor of a publication.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct TensorEntry {
    pub(crate) dtype: String,
    pub(crate) shape: Vec<usize>,
    /// Of its bytes once everything is applied.
    pub(crate) digest: Digest,
    /// The file that holds it, or its changes; none where it has not changed.
    pub(crate) file: Option<String>,
    /// Of what a delta holds of it.
    pub(crate) changes: Option<Digest>,
}

/// A publication's manifest.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    schema: String,
    pub(crate) step: u64,
    pub(crate) kind: Kind,
    pub(crate) base: Option<Base>,
    /// Of all tensors' names, dtypes, shapes and digests.
    pub(crate) weights: Digest,
    pub(crate) parts: Vec<String>,
    #[serde(deserialize_with = "without_duplicates")]
    pub(crate) files: BTreeMap<String, FileEntry>,
    #[serde(deserialize_with = "without_duplicates")]
    pub(crate) tensors: BTreeMap<String, TensorEntry>,
    pub(crate) metadata: serde_json::Value,
}

impl Manifest {
    pub(crate) fn new(
        step: u64,
        base: Option<Base>,
        parts: Vec<String>,
        files: BTreeMap<String, FileEntry>,
        tensors: BTreeMap<String, TensorEntry>,
        metadata: serde_json::Value,
    ) -> Self {
        let kind = if base.is_some() { Kind::Delta } else { Kind::Full };
        let weights = weights_digest(&tensors);
        Self { schema: SCHEMA.to_owned(), step, kind, base, weights, parts, files, tensors, metadata }
    }

    /// The step.
    #[must_use]
    pub fn step(&self) -> u64 {
        self.step
    }

    /// Whether it holds everything.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The step that a delta changes.
    #[must_use]
    pub fn base_step(&self) -> Option<u64> {
        self.base.as_ref().map(|base| base.step)
    }

    /// The digest of all weights.
    #[must_use]
    pub fn weights(&self) -> Digest {
        self.weights
    }

    /// Which parts of a model were published, as the publisher names them.
    #[must_use]
    pub fn parts(&self) -> &[String] {
        &self.parts
    }

    /// What the publisher says beside the weights, as JSON.
    #[must_use]
    pub fn metadata(&self) -> String {
        self.metadata.to_string()
    }

    /// The files, each with its length.
    pub fn files(&self) -> impl Iterator<Item = (&str, u64)> {
        self.files.iter().map(|(name, file)| (name.as_str(), file.bytes))
    }

    /// The tensors, in the order of their names.
    ///
    /// # Errors
    /// Never for a manifest that was read, whose tensors have been checked.
    pub fn descriptions(&self) -> Result<Vec<Description>> {
        let described =
            |(name, entry): (&String, &TensorEntry)| Description::new(name.clone(), &entry.dtype, entry.shape.clone());
        self.tensors.iter().map(described).collect()
    }

    /// The text of the manifest, and its digest.
    pub(crate) fn text(&self) -> Result<(Vec<u8>, Digest)> {
        let body = serde_json::to_string_pretty(self).map_err(|error| Error::Argument(error.to_string()))?;
        let rest = format!("\",{}\n", body.trim_start_matches('{'));
        let digest = Digest::of(rest.as_bytes());
        Ok((format!("{OPENING}{digest}{rest}").into_bytes(), digest))
    }

    /// The manifest in a publication's folder, and its digest.
    pub(crate) fn read(folder: &Folder) -> Result<(Self, Digest)> {
        let bytes = folder.read(MANIFEST, MOST_BYTES)?;
        Self::parse(&bytes, &folder.place(MANIFEST))
    }

    pub(crate) fn parse(bytes: &[u8], place: &Path) -> Result<(Self, Digest)> {
        let no_manifest = |why: &str| Error::damaged(place, format!("a manifest of {SCHEMA}"), why);
        let text = std::str::from_utf8(bytes).map_err(|_| no_manifest("bytes that are no text"))?;
        let stated = text.strip_prefix(OPENING).and_then(|rest| rest.get(..Digest::DIGITS)).and_then(Digest::parse);
        let stated = stated.ok_or_else(|| no_manifest("a text without a digest"))?;
        let rest = &text[OPENING.len() + Digest::DIGITS..];
        if Digest::of(rest.as_bytes()) != stated {
            return Err(no_manifest("a text that its digest does not belong to"));
        }
        let body = rest.strip_prefix("\",").ok_or_else(|| no_manifest("a text without a body"))?;
        let manifest: Self =
            serde_json::from_str(&format!("{{{body}")).map_err(|error| no_manifest(&error.to_string()))?;
        manifest.check(place)?;
        Ok((manifest, stated))
    }

    fn check(&self, place: &Path) -> Result<()> {
        let wrong = |what: String| Err(Error::damaged(place, format!("a manifest of {SCHEMA}"), what));
        if self.schema != SCHEMA {
            return wrong(format!("schema {:?}, which this release does not know", self.schema));
        }
        if (self.kind == Kind::Delta) != self.base.is_some() {
            return wrong("a delta without a base, or a base of a full publication".to_owned());
        }
        if self.base.as_ref().is_some_and(|base| base.step >= self.step) {
            return wrong("a base that is not older".to_owned());
        }
        if let Some(name) = self.files.keys().find(|name| !is_plain(name)) {
            return wrong(format!("the file {name:?}, which is no plain name in its folder"));
        }
        if weights_digest(&self.tensors) != self.weights {
            return wrong("tensors that the digest of all weights does not belong to".to_owned());
        }
        for (name, entry) in &self.tensors {
            let known = entry.file.as_ref().is_none_or(|file| self.files.contains_key(file));
            let holds = entry.file.is_some() || self.kind == Kind::Delta;
            let changes = entry.changes.is_some() == (entry.file.is_some() && self.kind == Kind::Delta);
            let sized = Description::new(name.clone(), &entry.dtype, entry.shape.clone()).is_ok();
            if !(known && holds && changes && sized && dtype_named(&entry.dtype).is_some()) {
                return wrong(format!("the tensor {name:?} of {} {:?} without its bytes", entry.dtype, entry.shape));
            }
        }
        Ok(())
    }
}

/// Whether a name is that of a file in the same folder, of characters that every file system takes.
fn is_plain(name: &str) -> bool {
    let known = |letter: u8| letter.is_ascii_alphanumeric() || matches!(letter, b'.' | b'-' | b'_');
    !name.is_empty() && name.len() <= 200 && name.bytes().all(known) && !name.starts_with('.') && name != MANIFEST
}

fn weights_digest(tensors: &BTreeMap<String, TensorEntry>) -> Digest {
    let mut hasher = blake3::Hasher::new();
    for (name, entry) in tensors {
        // The lengths first, so that no two lists of tensors have the same text.
        hasher.update(&(name.len() as u64).to_le_bytes());
        hasher.update(name.as_bytes());
        hasher.update(format!("{} {:?} {}\n", entry.dtype, entry.shape, entry.digest).as_bytes());
    }
    Digest::finished(&hasher)
}

/// A map in which no name comes twice: of two entries of one name, readers would take either.
fn without_duplicates<'de, D: Deserializer<'de>, V: Deserialize<'de>>(
    deserializer: D,
) -> std::result::Result<BTreeMap<String, V>, D::Error> {
    struct Once<V>(PhantomData<V>);

    impl<'de, V: Deserialize<'de>> Visitor<'de> for Once<V> {
        type Value = BTreeMap<String, V>;

        fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
            formatter.write_str("an object in which each name comes once")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> std::result::Result<Self::Value, A::Error> {
            let mut map = BTreeMap::new();
            while let Some((name, value)) = access.next_entry::<String, V>()? {
                if map.contains_key(&name) {
                    return Err(de::Error::custom(format!("{name:?} comes twice")));
                }
                map.insert(name, value);
            }
            Ok(map)
        }
    }

    deserializer.deserialize_map(Once(PhantomData))
}
