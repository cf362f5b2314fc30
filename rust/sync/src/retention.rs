//! Which publications a directory holds, and which of them nobody needs any more.
use crate::folder::{Folder, UNFINISHED, beside};
use crate::latest::{Latest, folder_of, step_of};
use crate::manifest::Manifest;
use crate::{Error, Kind, Result};
use std::collections::BTreeSet;
use std::path::Path;

/// Held while somebody publishes or collects.
pub(crate) const LOCK: &str = ".publisher";

/// A publication in a directory.
#[derive(Debug)]
pub struct Listed {
    /// Its step.
    pub step: u64,
    /// What it says of itself, or what is wrong with that.
    pub manifest: Result<Manifest>,
    /// Whether `LATEST` names it.
    pub is_latest: bool,
}

/// What was removed.
#[derive(Debug, Default)]
pub struct Collected {
    /// Steps of publications.
    pub steps: Vec<u64>,
    /// Names that killed publishers had left.
    pub leftovers: Vec<String>,
}

/// The publications in a directory, by rising step.
///
/// # Errors
/// The directory cannot be read.
pub fn list(place: &Path) -> Result<Vec<Listed>> {
    let root = Folder::at(place)?;
    let latest = Latest::read(&root)?.map(|latest| latest.step);
    let steps: BTreeSet<u64> = root.names()?.iter().filter_map(|name| step_of(name)).collect();
    let listed = |step| Listed { step, manifest: manifest_of(&root, step), is_latest: latest == Some(step) };
    Ok(steps.into_iter().map(listed).collect())
}

fn manifest_of(root: &Folder, step: u64) -> Result<Manifest> {
    root.folder(&folder_of(step)).and_then(|folder| Manifest::read(&folder)).map(|(manifest, _)| manifest)
}

/// Removes all publications but the last `keep` ones and those that they are changes to, and what killed publishers left.
///
/// # Errors
/// Somebody publishes in the directory, or it cannot be read or written.
pub fn collect(place: &Path, keep: usize) -> Result<Collected> {
    let root = Folder::at(place)?;
    let busy = || Error::Conflict { place: place.to_owned(), did: "is writing".to_owned() };
    let _lock = root.lock(LOCK)?.ok_or_else(busy)?;
    let leftovers = leftovers(&root, Latest::read(&root)?)?;
    Ok(Collected { leftovers, ..remove_unneeded(&root, keep)? })
}

/// Removes all publications but the last `keep` ones and those that they are changes to.
///
/// Each loses its name first, in one step, and then its files; who has opened them goes on reading.
pub(crate) fn remove_unneeded(root: &Folder, keep: usize) -> Result<Collected> {
    let Some(latest) = Latest::read(root)? else { return Ok(Collected::default()) };
    let steps: BTreeSet<u64> =
        root.names()?.iter().filter_map(|name| step_of(name)).filter(|&s| s <= latest.step).collect();
    if steps.len() <= keep.max(1) {
        return Ok(Collected::default());
    }
    let mut needed = BTreeSet::new();
    for &step in steps.iter().rev().take(keep.max(1)) {
        if !need(root, step, &mut needed) {
            // What a chain needs cannot be told, so nothing is removed.
            return Ok(Collected::default());
        }
    }
    let mut collected = Collected::default();
    // Newest first: a chain that is cut short by a kill lacks its end, which nobody needs, and never its beginning.
    for &step in steps.difference(&needed).collect::<Vec<_>>().into_iter().rev() {
        let (name, aside) = (folder_of(step), beside(&folder_of(step))?);
        if root.rename(&name, &aside).is_ok() {
            root.remove(&aside)?;
            collected.steps.push(step);
        }
    }
    Ok(collected)
}

/// Notes a publication and all that it is changes to; false where one of them cannot be read.
fn need(root: &Folder, step: u64, needed: &mut BTreeSet<u64>) -> bool {
    let mut next = Some(step);
    while let Some(step) = next.filter(|&step| needed.insert(step)) {
        match manifest_of(root, step) {
            Ok(manifest) if manifest.kind() == Kind::Full => next = None,
            Ok(manifest) => next = manifest.base_step(),
            Err(_) => return false,
        }
    }
    true
}

/// Removes the names that killed publishers have left in a directory in which nobody publishes now.
pub(crate) fn leftovers(root: &Folder, latest: Option<Latest>) -> Result<Vec<String>> {
    let mut removed = Vec::new();
    for name in root.names()? {
        let unnamed = step_of(&name).is_some_and(|step| latest.is_none_or(|latest| step > latest.step));
        if unnamed || (name.starts_with('.') && name.ends_with(UNFINISHED)) {
            root.remove(&name)?;
            removed.push(name);
        }
    }
    Ok(removed)
}
