//! CUDA tensors: views of them, the value head on them, and whether a device has kernels at all.
use crate::gate;
use crate::torch::Dtype;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use vhead_cuda::{Description, Device, Error};

pub(crate) mod head;
pub(crate) mod statistics;
mod view;

pub(crate) use view::CudaView;

/// Why device `ordinal` has no kernels of this package; `None` where it has, and they are loaded then.
///
/// # Errors
/// `ValueError` where there is no such device; `vhead.errors.CudaError` where loading failed and may succeed later, and in a
/// process that was forked after CUDA had started.
#[pyfunction]
pub(crate) fn cuda_absence(py: Python<'_>, ordinal: i32) -> PyResult<Option<String>> {
    if Device::is_loaded(ordinal) {
        return Ok(None);
    }
    gate::launch(py, || match Device::get(ordinal) {
        Ok(_) => Ok(None),
        Err(error) if error.is_absence() => Ok(Some(error.to_string())),
        Err(error) => Err(error),
    })
}

/// What `vhead.backends()` says about CUDA. It starts the driver, but makes no context and loads nothing.
pub(crate) fn describe(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let row = PyDict::new(py);
    row.set_item("device", "cuda")?;
    row.set_item("dispatch_key", "CUDA")?;
    row.set_item("dtypes", Dtype::FLOATS.map(Dtype::name).to_vec())?;
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
        Ok(devices) => {
            let absences: Vec<_> = devices.iter().map(absence).collect();
            row.set_item("available", absences.iter().any(Option::is_none))?;
            let described = PyDict::new(py);
            for (ordinal, (device, absence)) in devices.iter().zip(absences).enumerate() {
                described.set_item(ordinal, describe_device(device, absence))?;
            }
            row.set_item("devices", described)?;
        }
        Err(error) => {
            row.set_item("available", false)?;
            row.set_item("reason", error.to_string())?;
        }
    }
    Ok(row)
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
