//! The table of backends, and what this binary is: for `vhead env` and for the registration of torch's operations.
use crate::backend::Backend;
use crate::cpu::Cpu;
use crate::cuda::Cuda;
use crate::torch::{self, Torch};
use crate::{gate, threads};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use vhead_core::Error;

/// Every kind of device that has kernels of this package: a new one is a new row.
static BACKENDS: [&dyn Backend; 2] = [&Cpu, &Cuda];

/// The backend of a call whose first tensor is `tensor`, which errors call `name`. What is no tensor goes to the first one,
/// whose checks say so.
///
/// # Errors
/// `ValueError` for a tensor on a device without kernels.
pub(crate) fn backend_of(name: &str, tensor: &Bound<'_, PyAny>) -> PyResult<&'static dyn Backend> {
    for backend in BACKENDS {
        if backend.holds(tensor)? {
            return Ok(backend);
        }
    }
    if Torch::get(tensor.py())?.is_tensor(tensor)? {
        let device = tensor.getattr("device")?.str()?;
        let expected = names();
        return Err(PyValueError::new_err(format!("{name}: expected a tensor on {expected}, got one on {device}")));
    }
    Ok(BACKENDS[0])
}

/// `cpu or cuda`
fn names() -> String {
    BACKENDS.map(Backend::device).join(" or ")
}

/// A dictionary for each kind of device that has native kernels.
#[pyfunction]
pub(crate) fn backends(py: Python<'_>) -> PyResult<Vec<Bound<'_, PyDict>>> {
    let describe = |backend: &dyn Backend| {
        let row = PyDict::new(py);
        row.set_item("device", backend.device())?;
        row.set_item("dispatch_key", backend.dispatch_key())?;
        row.set_item("dtypes", vhead_core::Dtype::ALL.map(vhead_core::Dtype::name).to_vec())?;
        backend.describe(&row)?;
        Ok(row)
    };
    BACKENDS.into_iter().map(describe).collect()
}

/// The key of torch's dispatcher for each kind of device that has native kernels. It asks no driver.
#[pyfunction]
pub(crate) fn dispatch_keys(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let keys = PyDict::new(py);
    for backend in BACKENDS {
        keys.set_item(backend.device(), backend.dispatch_key())?;
    }
    Ok(keys)
}

/// Why device `ordinal` of the kind `device` has no kernels of this package; `None` where it has, and they are loaded then.
///
/// # Errors
/// `ValueError` where there is no such device; `vhead.errors.CudaError` where loading failed and may succeed later, and in a
/// process that was forked after CUDA had started.
#[pyfunction]
pub(crate) fn kernel_absence(py: Python<'_>, device: &str, ordinal: i32) -> PyResult<Option<String>> {
    match BACKENDS.into_iter().find(|backend| backend.device() == device) {
        Some(backend) => backend.absence(py, ordinal),
        None => Err(PyValueError::new_err(format!("device: expected {}, got {device}", names()))),
    }
}

/// The cores that this process may use: what affinity and the quota of its control group leave, at least 1.
#[pyfunction]
pub(crate) fn available_cores() -> usize {
    vhead_core::threads::available_cores()
}

/// The processor's maker, empty where it does not say, and its vector instructions for half precisions.
#[pyfunction]
pub(crate) fn processor() -> (String, Vec<&'static str>) {
    (vhead_core::processor::maker(), vhead_core::processor::half_instructions())
}

/// Version, profile and target of this binary.
#[pyfunction]
pub(crate) fn build_info(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let info = PyDict::new(py);
    info.set_item("version", env!("CARGO_PKG_VERSION"))?;
    info.set_item("profile", if cfg!(debug_assertions) { "debug" } else { "release" })?;
    info.set_item("target", format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS))?;
    Ok(info)
}

/// Says how to run: where libtorch_cpu lies (to use its threads), how many threads, how to read tensors.
#[pyfunction]
#[pyo3(signature = (*, libtorch_cpu=None, num_threads=None, read_attributes=false))]
pub(crate) fn configure(libtorch_cpu: Option<&str>, num_threads: Option<usize>, read_attributes: bool) {
    if let Some(path) = libtorch_cpu {
        threads::find_torch(path);
    }
    threads::ask(num_threads);
    torch::read_attributes(read_attributes);
}

/// Runs `tasks` short naps as a kernel's pieces are run; the operating system's ids of the threads that ran them.
///
/// For tests, which must ask the binary that users have: whether torch's threads are lent depends on the torch beside it.
#[pyfunction]
pub(crate) fn worker_threads(py: Python<'_>, tasks: usize) -> PyResult<Vec<u64>> {
    let threads = threads::Threads::now(py)?;
    let ids = (0..tasks).map(|_| std::sync::atomic::AtomicU64::new(0));
    let ids = vhead_core::allocation::collected(tasks, ids).map_err(gate::to_python)?;
    gate::run(py, usize::MAX, || {
        threads.executor().run(tasks, &|index| {
            std::thread::sleep(std::time::Duration::from_millis(2));
            if let Some(id) = ids.get(index) {
                id.store(thread_id(), std::sync::atomic::Ordering::Relaxed);
            }
        });
        Ok::<(), Error>(())
    })?;
    Ok(ids.into_iter().map(std::sync::atomic::AtomicU64::into_inner).collect())
}

#[cfg(target_os = "linux")]
fn thread_id() -> u64 {
    // SAFETY: the call has no arguments and cannot fail.
    u64::from(unsafe { libc::gettid() }.cast_unsigned())
}

#[cfg(not(target_os = "linux"))]
fn thread_id() -> u64 {
    // SAFETY: as above.
    unsafe { libc::pthread_self() as u64 }
}

/// Fails inside, on one of the threads that run pieces: for tests of what a caller sees then, as no argument makes a kernel
/// fail, and a panic that crossed into torch's threads would end the process.
#[pyfunction]
pub(crate) fn panic_on_purpose(py: Python<'_>, tasks: usize) -> PyResult<()> {
    let threads = threads::Threads::now(py)?;
    gate::run(py, usize::MAX, || {
        threads.executor().run(tasks, &|index| assert!(index != tasks / 2, "on purpose"));
        Ok(())
    })
}
