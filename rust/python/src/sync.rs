//! Weights handed from a trainer to its workers, as numpy arrays of bytes.
use crate::buffers::{elements, overwritten};
use crate::gate;
use pyo3::buffer::PyBuffer;
use pyo3::prelude::*;
use std::os::fd::IntoRawFd;
use std::path::PathBuf;
use vhead_sync::{
    Checksum, Description, Digest, Error, Have, Kind, Manifest, Publisher, Settings, Stage, Staged, Target,
};

/// A tensor's name, dtype by safetensors' name, and shape.
type Described = (String, String, Vec<usize>);
/// A publication's step, whether it holds everything, its base, its parts, its metadata in JSON, its digest, its bytes.
type Summary = (u64, bool, Option<u64>, Vec<String>, String, String, u64);

fn describe(tensor: &Description) -> Described {
    (tensor.name.clone(), format!("{:?}", tensor.dtype), tensor.shape.clone())
}

fn summary(manifest: &Manifest) -> Summary {
    let bytes = manifest.files().fold(0, |all, (_, bytes)| all + bytes);
    let (is_full, digest) = (manifest.kind() == Kind::Full, manifest.weights().to_string());
    let parts = manifest.parts().to_vec();
    (manifest.step(), is_full, manifest.base_step(), parts, manifest.metadata(), digest, bytes)
}

/// Descriptors of open files, and for each tensor which of them it is in and where.
type Places = (Vec<i32>, Vec<(usize, u64)>);

/// Publishes weights in a directory: `begin`, then the bytes of each tensor in the order that it gives, then `finish`.
#[pyclass(name = "SyncPublisher", module = "vhead._native")]
pub(crate) struct SyncPublisher(Publisher);

#[pymethods]
impl SyncPublisher {
    #[new]
    fn new(
        py: Python<'_>,
        directory: PathBuf,
        delta: bool,
        full_every: u64,
        keep: usize,
        staging: PathBuf,
    ) -> PyResult<Self> {
        let settings = Settings { delta, full_every, keep, staging };
        gate::sync(py, || Publisher::open(&directory, settings)).map(Self)
    }

    #[getter]
    fn last_step(&self) -> Option<u64> {
        self.0.last_step()
    }

    /// Begins a publication of tensors, each with the stem of its file; gives them in the order of their bytes.
    fn begin(
        &mut self,
        py: Python<'_>,
        step: u64,
        tensors: Vec<(String, String, Vec<usize>, String)>,
        parts: Vec<String>,
        metadata: &str,
    ) -> PyResult<Vec<Described>> {
        let publisher = &mut self.0;
        let order = gate::sync(py, || {
            let described = tensors
                .into_iter()
                .map(|(name, dtype, shape, stem)| Ok((Description::new(name, &dtype, shape)?, stem)))
                .collect::<vhead_sync::Result<Vec<_>>>()?;
            publisher.begin(step, described, parts, metadata)
        })?;
        Ok(order.iter().map(describe).collect())
    }

    fn append(&mut self, py: Python<'_>, piece: PyBuffer<u8>) -> PyResult<()> {
        let (publisher, piece) = (&mut self.0, elements("piece", &piece)?);
        gate::sync(py, || publisher.append(piece))
    }

    fn finish(&mut self, py: Python<'_>, attachments: Vec<(String, Vec<u8>)>) -> PyResult<Summary> {
        let publisher = &mut self.0;
        gate::sync(py, || publisher.finish(&attachments)).map(|manifest| summary(&manifest))
    }

    fn abandon(&mut self, py: Python<'_>) -> PyResult<()> {
        let publisher = &mut self.0;
        gate::sync(py, || {
            publisher.abandon();
            Ok(())
        })
    }
}

/// A publication on its way into a model: `verify_next` until `next` is None, then `install` or `copy`.
#[pyclass(name = "SyncStage", module = "vhead._native")]
pub(crate) struct SyncStage(Stage);

#[pymethods]
impl SyncStage {
    /// What is new for a follower that has the weights `have`; None where nothing is.
    #[staticmethod]
    fn open(
        py: Python<'_>,
        directory: PathBuf,
        step: Option<u64>,
        have: Option<(u64, String)>,
        staging: PathBuf,
        in_place: bool,
    ) -> PyResult<Option<Self>> {
        let staged = gate::sync(py, || {
            let have = have.and_then(|(step, weights)| Some(Have { step, weights: Digest::parse(&weights)? }));
            Stage::open(&directory, step, have, &staging, in_place)
        })?;
        Ok(match staged {
            Staged::NothingNew => None,
            Staged::Found(stage) => Some(Self(*stage)),
        })
    }

    #[getter]
    fn summary(&self) -> Option<Summary> {
        self.0.manifest().map(summary)
    }

    #[getter]
    fn tensors(&self) -> Vec<Described> {
        self.0.tensors().map(describe).collect()
    }

    #[getter]
    fn digests(&self) -> Vec<String> {
        self.0.digests().map(|digest| digest.to_string()).collect()
    }

    #[getter]
    fn is_over_weights_in_use(&self) -> bool {
        self.0.is_over_weights_in_use()
    }

    /// Descriptors of the open files in which the verified tensors lie, to be closed by the caller, and each tensor's
    /// file and first byte; None where they were copied.
    fn places(&self) -> PyResult<Option<Places>> {
        let places = self.0.places().map_err(to_python)?;
        Ok(places.map(|(files, tensors)| (files.into_iter().map(IntoRawFd::into_raw_fd).collect(), tensors)))
    }

    #[getter]
    fn next(&self) -> Option<usize> {
        self.0.next()
    }

    fn verify_next(&mut self, py: Python<'_>, in_use: Option<PyBuffer<u8>>) -> PyResult<()> {
        let in_use = in_use.as_ref().map(|buffer| elements("in_use", buffer)).transpose()?;
        let stage = &mut self.0;
        gate::sync(py, || stage.verify_next(in_use))
    }

    /// Copies the verified bytes over weights in use, all or none.
    fn install(&self, py: Python<'_>, mut targets: Vec<(usize, PyBuffer<u8>)>) -> PyResult<()> {
        let mut into = Vec::with_capacity(targets.len());
        for (tensor, buffer) in &mut targets {
            into.push(Target { tensor: *tensor, bytes: overwritten("weights", buffer)? });
        }
        let stage = &self.0;
        gate::sync(py, || stage.install(&mut into))
    }

    /// Copies verified bytes of one tensor from `start` on.
    fn copy(&self, py: Python<'_>, tensor: usize, start: usize, mut into: PyBuffer<u8>) -> PyResult<()> {
        let (stage, into) = (&self.0, overwritten("into", &mut into)?);
        gate::sync(py, || stage.copy(tensor, start, into))
    }
}

/// A step, what its publication says of itself, or what is wrong with it, and whether it is the latest.
type Listed = (u64, Option<Summary>, String, bool);

/// The publications of a directory by rising step: the step, what it says of itself or what is wrong, and whether it is
/// the latest.
#[pyfunction]
pub(crate) fn sync_list(py: Python<'_>, directory: PathBuf) -> PyResult<Vec<Listed>> {
    let listed = gate::sync(py, || vhead_sync::list(&directory))?;
    let row = |one: vhead_sync::Listed| match one.manifest {
        Ok(manifest) => (one.step, Some(summary(&manifest)), String::new(), one.is_latest),
        Err(error) => (one.step, None, error.to_string(), one.is_latest),
    };
    Ok(listed.into_iter().map(row).collect())
}

/// Removes publications that nobody needs and what killed publishers have left; gives the steps and the names.
#[pyfunction]
pub(crate) fn sync_collect(py: Python<'_>, directory: PathBuf, keep: usize) -> PyResult<(Vec<u64>, Vec<String>)> {
    gate::sync(py, || vhead_sync::collect(&directory, keep)).map(|found| (found.steps, found.leftovers))
}

/// Writes a publication into a folder of slime's versions, and gives the version's number.
#[pyfunction]
pub(crate) fn sync_export(
    py: Python<'_>,
    directory: PathBuf,
    to: PathBuf,
    step: Option<u64>,
    checksum: &str,
    full: bool,
    staging: PathBuf,
) -> PyResult<u64> {
    let known = Checksum::named(checksum)
        .ok_or_else(|| Error::Argument(format!("checksum: expected \"xxh3-128\" or \"blake3\", got {checksum:?}")));
    gate::sync(py, || vhead_sync::export(&directory, &to, step, known?, full, &staging))
}

pyo3::import_exception!(vhead.errors, PublicationError);
pyo3::import_exception!(vhead.errors, PublicationMissingError);
pyo3::import_exception!(vhead.errors, PublisherConflictError);
pyo3::import_exception!(vhead.errors, SyncFileError);
pyo3::import_exception!(vhead.errors, SyncStepError);
pyo3::import_exception!(vhead.errors, WrongBaseError);

/// The Python exception for an error of the crate.
pub(crate) fn to_python(error: Error) -> PyErr {
    let text = error.to_string();
    match error {
        Error::Io { place, source } => match source.raw_os_error() {
            Some(code) => {
                let said = source.to_string();
                let said = said.split(" (os error").next().unwrap_or_default().to_owned();
                SyncFileError::new_err((code, said, place))
            }
            None => SyncFileError::new_err(text),
        },
        Error::Vanished { .. } => PublicationMissingError::new_err(text),
        Error::Conflict { .. } => PublisherConflictError::new_err(text),
        Error::Backwards { .. } | Error::Older { .. } => SyncStepError::new_err(text),
        Error::Argument(_) => pyo3::exceptions::PyValueError::new_err(text),
        Error::Base { .. } => WrongBaseError::new_err(text),
        _ => PublicationError::new_err(text),
    }
}
