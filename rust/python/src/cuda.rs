//! CUDA devices: `vhead_cuda`'s kernels on torch's memory and torch's current stream.
use crate::backend::{
    Backend, DropoutArguments, HeadArguments, HeadGradients, SelectionArguments, TokenArguments, TokenGradients,
    TokenStatistics, is_true,
};
use crate::gate;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use vhead_cuda::{Description, Device, Error};

mod token_statistics;
mod value_head;
mod view;

/// torch's CUDA tensors.
pub(crate) struct Cuda;

impl Backend for Cuda {
    fn device(&self) -> &'static str {
        "cuda"
    }

    fn dispatch_key(&self) -> &'static str {
        "CUDA"
    }

    fn holds(&self, tensor: &Bound<'_, PyAny>) -> PyResult<bool> {
        let py = tensor.py();
        Ok(is_true(tensor, intern!(py, "is_cuda"))?
            || (vhead_cuda::takes_host_memory() && is_true(tensor, intern!(py, "is_cpu"))?))
    }

    /// It starts the driver, but makes no context and loads nothing.
    fn describe(&self, row: &Bound<'_, PyDict>) -> PyResult<()> {
        let py = row.py();
        row.set_item("images", vhead_cuda::images().collect::<Vec<_>>())?;
        let found = gate::launch(py, || {
            let version = vhead_cuda::driver_version();
            let count = version.clone().and_then(|_| vhead_cuda::device_count());
            let devices = count.map(|count| (0..count).map(vhead_cuda::describe).collect::<Vec<_>>());
            Ok((version, devices))
        })?;
        if let Ok(version) = found.0 {
            let name = if vhead_cuda::is_emulated() { " (emulated)" } else { "" };
            row.set_item("driver", format!("{}.{}{name}", version / 1000, version % 1000 / 10))?;
        }
        match found.1 {
            Ok(devices) => describe_devices(row, &devices),
            Err(error) => {
                row.set_item("available", false)?;
                row.set_item("reason", error.to_string())
            }
        }
    }

    fn absence(&self, py: Python<'_>, ordinal: i32) -> PyResult<Option<String>> {
        if Device::is_loaded(ordinal) {
            return Ok(None);
        }
        gate::launch(py, || match Device::get(ordinal) {
            Ok(_) => Ok(None),
            Err(error) if error.is_absence() => Ok(Some(error.to_string())),
            Err(error) => Err(error),
        })
    }

    fn value_head<'py>(
        &self,
        head: HeadArguments<'_, 'py>,
        dropout: DropoutArguments<'_, 'py>,
    ) -> PyResult<Bound<'py, PyAny>> {
        value_head::value_head(head, dropout)
    }

    fn try_value_head<'py>(&self, head: HeadArguments<'_, 'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        value_head::try_value_head(head)
    }

    fn value_head_backward<'py>(
        &self,
        grad: &Bound<'py, PyAny>,
        head: HeadArguments<'_, 'py>,
        dropout: DropoutArguments<'_, 'py>,
        needed: [bool; 3],
    ) -> PyResult<HeadGradients<'py>> {
        value_head::value_head_backward(grad, head, dropout, needed)
    }

    fn token_statistics(
        &self,
        tokens: TokenArguments<'_, '_>,
        selection: SelectionArguments<'_, '_>,
    ) -> PyResult<Box<dyn TokenStatistics>> {
        token_statistics::statistics(tokens, selection)
    }

    fn token_gradients<'py>(
        &self,
        tokens: TokenArguments<'_, 'py>,
        statistics: &[Bound<'py, PyAny>; 3],
        gradients: &[Bound<'py, PyAny>; 2],
    ) -> PyResult<Box<dyn TokenGradients>> {
        token_statistics::gradients(tokens, statistics, gradients)
    }
}

fn describe_devices(row: &Bound<'_, PyDict>, devices: &[Result<Description, Error>]) -> PyResult<()> {
    let absences: Vec<_> = devices.iter().map(absence).collect();
    row.set_item("available", absences.iter().any(Option::is_none))?;
    let described = PyDict::new(row.py());
    for (ordinal, (device, absence)) in devices.iter().zip(absences).enumerate() {
        described.set_item(ordinal, describe_device(device, absence))?;
    }
    row.set_item("devices", described)
}

/// Why a device has no kernels.
fn absence(device: &Result<Description, Error>) -> Option<String> {
    match device {
        Ok(Description { failure: Some(error), .. }) | Err(error) => Some(error.to_string()),
        Ok(Description { image: None, .. }) => Some("no kernel image for it".to_owned()),
        Ok(_) => None,
    }
}

fn describe_device(device: &Result<Description, Error>, absence: Option<String>) -> String {
    let what = match device {
        Ok(found) => format!("{}, compute capability {}.{}: ", found.name, found.capability.0, found.capability.1),
        Err(_) => String::new(),
    };
    let runs = match (absence, device) {
        (Some(reason), _) => format!("plain torch, {reason}"),
        (None, Ok(Description { image: Some(image), is_loaded, .. })) => {
            format!("native, image {image}{}", if *is_loaded { ", loaded" } else { "" })
        }
        (None, _) => "native".to_owned(),
    };
    format!("{what}{runs}")
}
