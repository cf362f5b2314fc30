//! `LATEST`: the name of the newest publication, and the digest of its manifest.
use crate::folder::{Folder, Replacement};
use crate::{Digest, Error, Result};
use std::path::PathBuf;

const NAME: &str = "LATEST";
const MOST_BYTES: u64 = 256;
const PREFIX: &str = "step-";

/// Which publication is the newest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Latest {
    /// Its step.
    pub step: u64,
    /// The digest of its manifest.
    pub digest: Digest,
}

/// The folder of a step: `step-00000120`.
#[must_use]
pub fn folder_of(step: u64) -> String {
    format!("{PREFIX}{step:08}")
}

/// The step of a folder, where its name is one.
pub(crate) fn step_of(name: &str) -> Option<u64> {
    let step = name.strip_prefix(PREFIX)?.parse().ok()?;
    (folder_of(step) == name).then_some(step)
}

impl Latest {
    /// Where it lies, for messages.
    pub(crate) fn place(root: &Folder) -> PathBuf {
        root.place(NAME)
    }

    /// What `LATEST` says; `None` where nothing has been published.
    pub(crate) fn read(root: &Folder) -> Result<Option<Self>> {
        let bytes = match root.read(NAME, MOST_BYTES) {
            Err(Error::Vanished { .. }) => return Ok(None),
            other => other?,
        };
        let text = String::from_utf8_lossy(&bytes);
        let parsed = text
            .strip_suffix('\n')
            .and_then(|line| line.split_once(' '))
            .and_then(|(name, digest)| Some(Self { step: step_of(name)?, digest: Digest::parse(digest)? }));
        let expected = "the name of a publication and a digest";
        parsed.map(Some).ok_or_else(|| Error::damaged(&Self::place(root), expected, format!("{text:?}")))
    }

    /// A `LATEST` that names this publication, to be put in place.
    pub(crate) fn prepared(self, root: &Folder) -> Result<Replacement> {
        Replacement::new(root, NAME, format!("{} {}\n", folder_of(self.step), self.digest).as_bytes())
    }
}
