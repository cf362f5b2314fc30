//! Everything that can be wrong with a publication, its directory or the weights that go into it.
use std::fmt::Display;
use std::path::{Path, PathBuf};

/// Why something could not be published, read or installed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// What is in the directory is not what a publisher wrote.
    #[error("{}: expected {expected}, got {found}; nothing of it was installed", place.display())]
    Damaged {
        /// The file or folder.
        place: PathBuf,
        /// What it should hold.
        expected: String,
        /// What it holds.
        found: String,
    },
    /// A folder or a file is not there, or no longer.
    #[error("{}: is not there, or was removed while it was read", place.display())]
    Vanished {
        /// What is missing.
        place: PathBuf,
    },
    /// What is to be published is not above the last step.
    #[error("step: expected one above {last}, which {} holds, got {asked}", place.display())]
    Backwards {
        /// The step that came.
        asked: u64,
        /// The last step.
        last: u64,
        /// The directory.
        place: PathBuf,
    },
    /// The newest publication is of an earlier step than the weights that a model has.
    #[error("{}: expected step {last}, which the model has, or a later one, got {named}", place.display())]
    Older {
        /// `LATEST`.
        place: PathBuf,
        /// The step that it names.
        named: u64,
        /// The step of the model's weights.
        last: u64,
    },
    /// Another publisher writes to the directory.
    #[error("{}: another publisher {did}; only one may publish here, so this one has stopped", place.display())]
    Conflict {
        /// The directory.
        place: PathBuf,
        /// What the other one did.
        did: String,
    },
    /// Changes were published against weights that the reader does not have and cannot get.
    #[error("{}: holds changes to step {base}, which cannot be had: {why}", place.display())]
    Base {
        /// The publication.
        place: PathBuf,
        /// The step that it changes.
        base: u64,
        /// Why that is of no use.
        why: String,
    },
    /// A caller's argument is not what it must be.
    #[error("{0}")]
    Argument(String),
    /// The file system refused a call.
    #[error("{}: {source}", place.display())]
    Io {
        /// The file or folder.
        place: PathBuf,
        /// What it answered.
        source: std::io::Error,
    },
}

/// This crate's result.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn damaged(place: &Path, expected: impl Into<String>, found: impl Display) -> Self {
        Self::Damaged { place: place.to_owned(), expected: expected.into(), found: found.to_string() }
    }

    /// For `map_err` after a call of the file system; what is not there has vanished.
    pub(crate) fn at(place: &Path) -> impl Fn(std::io::Error) -> Self {
        let place = place.to_owned();
        move |source| match source.raw_os_error() {
            Some(libc::ENOENT | libc::ESTALE) => Self::Vanished { place: place.clone() },
            _ => Self::Io { place: place.clone(), source },
        }
    }
}
