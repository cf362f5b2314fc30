//! A publication on its way into a model: read once into room that nobody else can reach, verified there, and only then
//! copied over the weights in use. What is verified is what is installed, whatever becomes of the files meanwhile.
use crate::blocks::{BLOCK, Decoder, Frame, frames};
use crate::folder::Folder;
use crate::latest::Latest;
use crate::manifest::{Kind, Manifest};
use crate::source::{PIECE, Source, Stretch};
use crate::store::Store;
use crate::tensors::Description;
use crate::{Digest, Error, Result};
use std::fs::File;
use std::ops::Range;
use std::path::Path;

/// More publications than this are no chain of changes that anybody would make.
const LONGEST_CHAIN: usize = 10_000;

/// The weights that a follower has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Have {
    /// Their step.
    pub step: u64,
    /// The digest of all of them, from their manifest.
    pub weights: Digest,
}

/// Open files, and for each tensor which of them it lies in and its first byte there.
pub type Places = (Vec<File>, Vec<(usize, u64)>);

/// What there is for a follower.
#[derive(Debug)]
pub enum Staged {
    /// It has the newest weights, or nothing has been published.
    NothingNew,
    /// There are other weights.
    Found(Box<Stage>),
}

/// Weights in use, to be overwritten.
#[derive(Debug)]
pub struct Target<'a> {
    /// Which tensor of [`Stage::tensors`].
    pub tensor: usize,
    /// Its bytes.
    pub bytes: &'a mut [u8],
}

/// A tensor on its way.
#[derive(Debug)]
struct Tensor {
    description: Description,
    digest: Digest,
    /// Its bytes in the store, where the chain begins with all weights.
    image: Option<Range<usize>>,
    /// What has changed of it, in the store, oldest first; where changes are put over the weights in use.
    changes: Vec<Range<usize>>,
}

/// A publication on its way into a model.
#[derive(Debug)]
pub struct Stage {
    /// The publications, oldest first; the last one is the one that is wanted.
    chain: Vec<Source>,
    over_weights_in_use: bool,
    /// Whether the tensors are verified where they lie in the files, which are then to be mapped.
    in_place: bool,
    tensors: Vec<Tensor>,
    store: Store,
    scratch: usize,
    verified: usize,
}

impl Stage {
    /// Opens what `LATEST` names in a directory, or the publication of a step, and all that this is changes to.
    ///
    /// Changes since the weights that the follower has are taken alone, to be put over these. With `in_place`, a
    /// publication that holds everything is verified where it lies, and not copied.
    ///
    /// # Errors
    /// The publication is damaged or not there, a step is missing that it needs, or `LATEST` names a step below the one
    /// that the follower has.
    pub fn open(place: &Path, step: Option<u64>, have: Option<Have>, staging: &Path, in_place: bool) -> Result<Staged> {
        let root = Folder::at(place)?;
        let latest = if step.is_none() { Latest::read(&root)? } else { None };
        let Some(wanted) = step.or(latest.map(|latest| latest.step)) else { return Ok(Staged::NothingNew) };
        if let Some(have) = have.filter(|have| step.is_none() && have.step > wanted) {
            return Err(Error::Older { place: Latest::place(&root), named: wanted, last: have.step });
        }
        let newest = Source::open(&root, wanted)?;
        if let Some(latest) = latest.filter(|latest| latest.digest != newest.digest) {
            let expected = format!("the manifest of digest {}, which LATEST names", latest.digest);
            return Err(Error::damaged(&newest.place(""), expected, newest.digest));
        }
        if have.is_some_and(|have| have.step == wanted && have.weights == newest.manifest.weights) {
            return Ok(Staged::NothingNew);
        }
        let (chain, over_weights_in_use) = chain(&root, newest, have)?;
        let in_place = in_place && chain.len() == 1 && !over_weights_in_use;
        Self::planned(chain, over_weights_in_use, in_place, staging).map(|stage| Staged::Found(Box::new(stage)))
    }

    fn planned(chain: Vec<Source>, over_weights_in_use: bool, in_place: bool, staging: &Path) -> Result<Self> {
        let Some(newest) = chain.last() else { return Err(Error::Argument("no publication".to_owned())) };
        let (mut end, mut longest) = (0, 0);
        let mut take = |bytes: usize| {
            let start = end;
            end += bytes.next_multiple_of(64);
            start..start + bytes
        };
        let mut tensors = Vec::new();
        for (description, entry) in newest.manifest.descriptions()?.into_iter().zip(newest.manifest.tensors.values()) {
            let held = chain.iter().filter_map(|source| source.find(&description.name));
            let (mut image, mut changes) = (None, Vec::new());
            if over_weights_in_use {
                changes = held.map(|stretch| take(stretch.bytes)).collect();
            } else if !in_place {
                image = Some(take(description.bytes()));
                longest = held.skip(1).map(|stretch| stretch.bytes).fold(longest, usize::max);
            }
            tensors.push(Tensor { description, digest: entry.digest, image, changes });
        }
        let scratch = end;
        let store = Store::new(end + longest, staging)?;
        Ok(Self { chain, over_weights_in_use, in_place, tensors, store, scratch, verified: 0 })
    }

    /// The manifest of the publication.
    #[must_use]
    pub fn manifest(&self) -> Option<&Manifest> {
        self.newest().map(|source| &source.manifest)
    }

    /// The publication.
    pub(crate) fn newest(&self) -> Option<&Source> {
        self.chain.last()
    }

    /// The verified bytes of a tensor, where the stage holds whole tensors.
    pub(crate) fn image(&self, tensor: usize) -> Result<&[u8]> {
        self.check_verified()?;
        let image = self.tensors.get(tensor).and_then(|tensor| tensor.image.clone());
        image.map(|image| &self.store.bytes()[image]).ok_or_else(|| Error::Argument("no such tensor".to_owned()))
    }

    /// The tensors, in the order of their names.
    pub fn tensors(&self) -> impl Iterator<Item = &Description> {
        self.tensors.iter().map(|tensor| &tensor.description)
    }

    /// The digests of the tensors, in the same order.
    pub fn digests(&self) -> impl Iterator<Item = Digest> {
        self.tensors.iter().map(|tensor| tensor.digest)
    }

    /// Whether it is changes to the weights in use: [`Self::verify_next`] then needs these.
    #[must_use]
    pub fn is_over_weights_in_use(&self) -> bool {
        self.over_weights_in_use
    }

    /// The open files in which the tensors lie as they are, and each tensor's file among these and its first byte there;
    /// `None` where they are not verified in place.
    ///
    /// # Errors
    /// Not everything is verified, or this process has no room for open files.
    pub fn places(&self) -> Result<Option<Places>> {
        self.check_verified()?;
        let Some(source) = self.chain.first().filter(|_| self.in_place) else { return Ok(None) };
        let tensors = self.tensors().map(|tensor| source.locate(&tensor.name));
        let tensors: Option<Vec<_>> = tensors.collect();
        let tensors = tensors.ok_or_else(|| Error::damaged(&source.place(""), "all tensors", "fewer"))?;
        Ok(Some((source.open_files()?, tensors)))
    }

    /// The tensor that is verified next; `None` where all are.
    #[must_use]
    pub fn next(&self) -> Option<usize> {
        (self.verified < self.tensors.len()).then_some(self.verified)
    }

    /// Reads and verifies the next tensor.
    ///
    /// # Errors
    /// Its bytes are not those that the manifest is about. Nothing can be installed then.
    pub fn verify_next(&mut self, in_use: Option<&[u8]>) -> Result<()> {
        let Some(at) = self.next() else { return Ok(()) };
        let digest = match in_use {
            Some(in_use) if self.over_weights_in_use => self.put_over(at, in_use)?,
            None if !self.over_weights_in_use => self.build(at)?,
            _ => return Err(Error::Argument("expected the weights in use for changes alone".to_owned())),
        };
        let tensor = &self.tensors[at];
        if digest != tensor.digest {
            return Err(self.refused(at));
        }
        self.verified += 1;
        Ok(())
    }

    fn refused(&self, at: usize) -> Error {
        let (name, first) = (&self.tensors[at].description.name, &self.chain[0]);
        match &first.manifest.base {
            Some(base) => Error::Base {
                place: first.place(""),
                base: base.step,
                why: format!("{name:?} in use is not that of step {}, or the changes are damaged", base.step),
            },
            None => other_bytes(self.chain.last().unwrap_or(first), name),
        }
    }

    /// The digest of a tensor of a full publication with all changes since. Each publication of the chain is verified, also
    /// where a later one replaces all of it.
    fn build(&mut self, at: usize) -> Result<Digest> {
        let (tensor, source) = (&self.tensors[at], &self.chain[0]);
        let name = &tensor.description.name;
        let missing = || Error::damaged(&source.place(""), format!("the tensor {name:?}"), "none");
        let stretch = source.find(name).filter(|stretch| stretch.bytes == tensor.description.bytes());
        let (stretch, place) = (stretch.ok_or_else(missing)?, source.place_of(name));
        let Some(image) = tensor.image.clone() else { return stretch.digest(&place) };
        let (images, scratch) = self.store.bytes_mut().split_at_mut(self.scratch);
        let image = &mut images[image];
        let mut hasher = blake3::Hasher::new();
        for (index, piece) in image.chunks_mut(PIECE).enumerate() {
            stretch.read(index * PIECE, piece, &place)?;
            hasher.update(piece);
        }
        let digest = Digest::finished(&hasher);
        if source.manifest.tensors.get(name).map(|entry| entry.digest) != Some(digest) {
            return Err(other_bytes(source, name));
        }
        let layers: Vec<_> = self.chain[1..].iter().filter_map(|source| Some((source, source.find(name)?))).collect();
        if layers.is_empty() {
            return Ok(digest);
        }
        for (source, stretch) in layers {
            put_changes(source, stretch, &tensor.description, image, scratch)?;
        }
        Ok(Digest::of(image))
    }

    /// The digest of the weights in use with the changes put over a copy of each block.
    fn put_over(&mut self, at: usize, in_use: &[u8]) -> Result<Digest> {
        let tensor = &self.tensors[at];
        let name = &tensor.description.name;
        if in_use.len() != tensor.description.bytes() {
            return Err(Error::Argument(format!("{name}: expected {} bytes", tensor.description.bytes())));
        }
        let held = self.chain.iter().filter_map(|source| Some((source, source.find(name)?)));
        for ((source, stretch), place) in held.zip(&tensor.changes) {
            let bytes = &mut self.store.bytes_mut()[place.clone()];
            stretch.read(0, bytes, &source.place_of(name))?;
            check_changes(source, name, bytes)?;
        }
        let broken = |why: &str| Error::damaged(&self.chain[0].place_of(name), format!("the changes of {name:?}"), why);
        let mut layers = self.layers(tensor).map_err(broken)?;
        let mut decoder = Decoder::new().map_err(Error::at(&self.chain[0].place_of(name)))?;
        let (mut hasher, mut copy) = (blake3::Hasher::new(), Vec::new());
        for (index, block) in in_use.chunks(BLOCK).enumerate() {
            if layers.iter().all(|layer| layer.first().is_none_or(|frame| frame.index != index)) {
                hasher.update(block);
                continue;
            }
            copy.clear();
            copy.extend_from_slice(block);
            for layer in &mut layers {
                if let Some(frame) = layer.first().copied().filter(|frame| frame.index == index) {
                    decoder.overlay(frame, &mut copy, tensor.description.width()).map_err(broken)?;
                    layer.remove(0);
                }
            }
            hasher.update(&copy);
        }
        Ok(Digest::finished(&hasher))
    }

    fn layers(&self, tensor: &Tensor) -> std::result::Result<Vec<Vec<Frame<'_>>>, &'static str> {
        let blocks = tensor.description.bytes().div_ceil(BLOCK);
        tensor.changes.iter().map(|place| frames(&self.store.bytes()[place.clone()], blocks)).collect()
    }

    /// Copies the verified bytes over weights in use. Whatever can fail is tried before the first byte is written.
    ///
    /// # Errors
    /// Not everything is verified, or a target is not as long as its tensor. Nothing has been written then.
    pub fn install(&self, targets: &mut [Target<'_>]) -> Result<()> {
        self.check_verified()?;
        let mut decoder = Decoder::new().map_err(Error::at(&self.chain[0].place("")))?;
        let mut changes = Vec::new();
        for target in &*targets {
            let tensor = self.tensors.get(target.tensor);
            let Some(tensor) = tensor.filter(|tensor| tensor.description.bytes() == target.bytes.len()) else {
                return Err(Error::Argument(format!("tensor {}: expected its own length", target.tensor)));
            };
            changes.push(self.layers(tensor).map_err(|why| Error::Argument(why.to_owned()))?);
            decoder.make_room(tensor.description.width());
        }
        for (target, layers) in targets.iter_mut().zip(changes) {
            let tensor = &self.tensors[target.tensor];
            if let Some(image) = &tensor.image {
                target.bytes.copy_from_slice(&self.store.bytes()[image.clone()]);
            }
            for frame in layers.into_iter().flatten() {
                // The same bytes have been put over a copy of the same weights before, and this has room for all that
                // they become: nothing is left that could fail.
                let put = decoder.overlay(frame, block_of(target.bytes, frame.index), tensor.description.width());
                debug_assert!(put.is_ok());
            }
        }
        Ok(())
    }

    /// Copies verified bytes of a tensor from `from` on, where the stage holds whole tensors.
    ///
    /// # Errors
    /// Not everything is verified, or there are no such bytes.
    pub fn copy(&self, place: usize, from: usize, into: &mut [u8]) -> Result<()> {
        self.check_verified()?;
        let tensor = self.tensors.get(place);
        if let (true, Some(tensor)) = (self.in_place, tensor) {
            let (source, name) = (&self.chain[0], &tensor.description.name);
            let stretch =
                source.find(name).filter(|stretch| from <= stretch.bytes && into.len() <= stretch.bytes - from);
            let stretch = stretch.ok_or_else(|| Error::Argument("no such bytes".to_owned()))?;
            return stretch.read(from, into, &source.place_of(name));
        }
        let bytes = self.image(place)?.get(from..).and_then(|rest| rest.get(..into.len()));
        into.copy_from_slice(bytes.ok_or_else(|| Error::Argument("no such bytes".to_owned()))?);
        Ok(())
    }

    fn check_verified(&self) -> Result<()> {
        match self.next() {
            None => Ok(()),
            Some(_) => Err(Error::Argument("expected a publication that is verified".to_owned())),
        }
    }
}

/// The publications from a full one, or from the weights that the follower has, to the newest.
fn chain(root: &Folder, newest: Source, have: Option<Have>) -> Result<(Vec<Source>, bool)> {
    let mut chain = vec![newest];
    while let Some(oldest) = chain.last() {
        let Some(base) = oldest.manifest.base.clone() else { break };
        if have.is_some_and(|have| have.step == base.step && have.weights == base.weights) {
            chain.reverse();
            return Ok((chain, true));
        }
        let lost = |why: String| Error::Base { place: oldest.place(""), base: base.step, why };
        let found = Source::open(root, base.step).map_err(|error| lost(error.to_string()))?;
        if found.manifest.weights != base.weights {
            return Err(lost(format!("its weights are not those of digest {}", base.weights)));
        }
        let same = |source: &Source| source.manifest.descriptions();
        if same(&found)? != same(oldest)? || chain.len() >= LONGEST_CHAIN {
            return Err(lost("it is of other tensors".to_owned()));
        }
        chain.push(found);
    }
    chain.reverse();
    let begins_full = chain.first().is_some_and(|source| source.manifest.kind == Kind::Full);
    debug_assert!(begins_full);
    Ok((chain, false))
}

fn other_bytes(source: &Source, name: &str) -> Error {
    let digest = source.manifest.tensors.get(name).map(|entry| entry.digest.to_string()).unwrap_or_default();
    Error::damaged(&source.place_of(name), format!("{name:?} of digest {digest}"), "other bytes")
}

/// Puts what a publication has changed of a tensor over its bytes.
fn put_changes(
    source: &Source,
    stretch: Stretch<'_>,
    tensor: &Description,
    image: &mut [u8],
    scratch: &mut [u8],
) -> Result<()> {
    let (name, place) = (&tensor.name, source.place_of(&tensor.name));
    let broken = |why: &str| Error::damaged(&place, format!("the changes of {name:?}"), why);
    let bytes = &mut scratch[..stretch.bytes];
    stretch.read(0, bytes, &place)?;
    check_changes(source, name, bytes)?;
    let mut decoder = Decoder::new().map_err(Error::at(&place))?;
    for frame in frames(bytes, image.len().div_ceil(BLOCK)).map_err(broken)? {
        decoder.overlay(frame, block_of(image, frame.index), tensor.width()).map_err(broken)?;
    }
    Ok(())
}

fn check_changes(source: &Source, name: &str, bytes: &[u8]) -> Result<()> {
    let stated = source.manifest.tensors.get(name).and_then(|entry| entry.changes);
    if stated == Some(Digest::of(bytes)) {
        return Ok(());
    }
    Err(Error::damaged(&source.place_of(name), format!("the changes of {name:?}"), "other bytes"))
}

fn block_of(bytes: &mut [u8], index: usize) -> &mut [u8] {
    let start = index * BLOCK;
    let end = bytes.len().min(start + BLOCK);
    &mut bytes[start..end]
}
