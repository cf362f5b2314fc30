//! Who publishes: one at a time in a directory, with steps that rise.
use crate::draft::{Content, Draft, Planned, Shadow};
use crate::folder::Folder;
use crate::latest::Latest;
use crate::manifest::Manifest;
use crate::tensors::Description;
use crate::{Error, Result, retention};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Bytes of a file of tensors, above which the next one begins; as transformers has it.
const LARGEST_FILE: usize = 5_000_000_000;

/// How a publisher works.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Whether publications hold only what has changed since the last one.
    pub delta: bool,
    /// With `delta`: each so many publications, one holds everything.
    pub full_every: u64,
    /// How many publications stay, beside those that they are changes to.
    pub keep: usize,
    /// A folder on a disk of this machine for copies of what is published, without names.
    pub staging: PathBuf,
}

/// Publishes weights in a directory.
pub struct Publisher {
    place: PathBuf,
    settings: Settings,
    last: Option<Latest>,
    shadow: Option<Shadow>,
    since_full: u64,
    draft: Option<Draft>,
}

impl Publisher {
    /// A publisher that goes on after what the directory's `LATEST` names.
    ///
    /// # Errors
    /// There is no such directory, or its `LATEST` is damaged.
    pub fn open(place: &Path, settings: Settings) -> Result<Self> {
        let last = Latest::read(&Folder::at(place)?)?;
        Ok(Self { place: place.to_owned(), settings, last, shadow: None, since_full: 0, draft: None })
    }

    /// The step that was published last.
    #[must_use]
    pub fn last_step(&self) -> Option<u64> {
        self.last.map(|last| last.step)
    }

    /// Begins a publication. Its tensors come with the stem of the file that each belongs to.
    ///
    /// # Errors
    /// Another publisher is at work or has published here, or the step is not above the last one.
    pub fn begin(
        &mut self,
        step: u64,
        tensors: Vec<(Description, String)>,
        parts: Vec<String>,
        metadata: &str,
    ) -> Result<Vec<Description>> {
        self.abandon();
        let metadata = serde_json::from_str(metadata).map_err(|error| Error::Argument(format!("metadata: {error}")))?;
        let root = Folder::at(&self.place)?;
        let conflict = |did: String| Error::Conflict { place: self.place.clone(), did };
        let lock = root.lock(retention::LOCK)?.ok_or_else(|| conflict("is writing".to_owned()))?;
        let latest = Latest::read(&root)?;
        if latest != self.last {
            return Err(conflict(format!("has published {}", latest.map_or(0, |latest| latest.step))));
        }
        if let Some(last) = latest.filter(|last| last.step >= step) {
            return Err(Error::Backwards { asked: step, last: last.step, place: self.place.clone() });
        }
        retention::leftovers(&root, latest)?;
        let described: Vec<_> = tensors.iter().map(|(tensor, _)| tensor.clone()).collect();
        let shadow = self.shadow_for(&described)?;
        let content = Content { step, parts, metadata, files: plan(tensors)? };
        let draft = Draft::begin(root, lock, content, shadow)?;
        let order = draft.order().cloned().collect();
        self.draft = Some(draft);
        Ok(order)
    }

    /// What the last publication's weights are kept in; without a base where this one must hold everything.
    fn shadow_for(&mut self, tensors: &[Description]) -> Result<Option<Shadow>> {
        if !self.settings.delta {
            return Ok(None);
        }
        let kept = self.shadow.take().filter(|shadow| shadow.fits(tensors));
        let mut shadow = match kept {
            Some(shadow) => shadow,
            None => Shadow::new(tensors, &self.settings.staging)?,
        };
        let follows = shadow.base.as_ref().map(|base| base.step) == self.last_step();
        if !follows || self.since_full + 1 >= self.settings.full_every {
            shadow.base = None;
        }
        Ok(Some(shadow))
    }

    /// Takes the next bytes of the tensor whose turn it is.
    ///
    /// # Errors
    /// They are not what the tensor has, or cannot be written.
    pub fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.current()?.append(bytes)
    }

    fn current(&mut self) -> Result<&mut Draft> {
        self.draft.as_mut().ok_or_else(|| Error::Argument("no publication has begun".to_owned()))
    }

    /// Completes the publication, with these small files beside the tensors, and removes publications that nobody needs.
    ///
    /// # Errors
    /// Another publisher was faster, or the publication cannot be written; readers then see what they saw before.
    pub fn finish(&mut self, attachments: &[(String, Vec<u8>)]) -> Result<Manifest> {
        let last = self.last;
        let finished = self.current()?.finish(attachments, last);
        let (manifest, latest) = match finished {
            Ok(finished) => finished,
            Err(error) => {
                self.abandon();
                return Err(error);
            }
        };
        self.last = Some(latest);
        self.since_full = if manifest.base.is_some() { self.since_full + 1 } else { 0 };
        if let Some(mut draft) = self.draft.take() {
            self.shadow = draft.shadow.take();
            // It is published. What cannot be removed now, the next publication removes.
            let _ = retention::remove_unneeded(draft.root(), self.settings.keep);
        }
        Ok(manifest)
    }

    /// Gives up the publication that has begun, if any. The next one holds everything.
    pub fn abandon(&mut self) {
        if let Some(draft) = self.draft.take() {
            draft.abandon();
            // Where only the flush of the directory failed, readers may have it already.
            self.last = draft.named().or(self.last);
        }
    }
}

/// Which tensor goes into which file, widest dtype first, so that each lies on a multiple of its width.
pub(crate) fn plan(tensors: Vec<(Description, String)>) -> Result<Vec<Planned>> {
    let mut groups: BTreeMap<String, Vec<Description>> = BTreeMap::new();
    let mut seen = std::collections::HashSet::new();
    for (tensor, stem) in tensors {
        if !seen.insert(tensor.name.clone()) {
            return Err(Error::Argument(format!("{}: comes twice among the tensors", tensor.name)));
        }
        groups.entry(stem).or_default().push(tensor);
    }
    let mut files = Vec::new();
    for (stem, mut tensors) in groups {
        tensors.sort_by(|one, other| other.width().cmp(&one.width()).then_with(|| one.name.cmp(&other.name)));
        let mut shards: Vec<Vec<Description>> = vec![Vec::new()];
        let mut bytes = 0;
        for tensor in tensors {
            if bytes > 0 && bytes + tensor.bytes() > LARGEST_FILE {
                shards.push(Vec::new());
                bytes = 0;
            }
            bytes += tensor.bytes();
            if let Some(shard) = shards.last_mut() {
                shard.push(tensor);
            }
        }
        let count = shards.len();
        for (at, tensors) in shards.into_iter().enumerate() {
            let name = if count == 1 {
                format!("{stem}.safetensors")
            } else {
                format!("{stem}-{:05}-of-{count:05}.safetensors", at + 1)
            };
            files.push(Planned { name, tensors });
        }
    }
    Ok(files)
}
