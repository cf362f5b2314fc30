//! What runs where, and what this binary is: for `vhead env` and for the registration of torch ops.
use crate::torch::{self, Dtype, Torch};
use crate::{cuda, gate, threads};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use vhead_core::{Error, Level};

/// A dictionary for each device type that has native kernels: a new one is a new row.
#[pyfunction]
pub(crate) fn backends(py: Python<'_>) -> PyResult<Vec<Bound<'_, PyDict>>> {
    Ok(vec![describe_cpu(py)?, cuda::describe(py)?])
}

fn describe_cpu(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let threads = threads::Threads::now(py)?;
    let row = PyDict::new(py);
    row.set_item("device", "cpu")?;
    row.set_item("dispatch_key", "CPU")?;
    row.set_item("dtypes", Dtype::FLOATS.map(Dtype::name).to_vec())?;
    row.set_item("simd", Level::best().name())?;
    row.set_item("simd_available", Level::available().into_iter().map(Level::name).collect::<Vec<_>>())?;
    row.set_item("threads", threads.executor().threads())?;
    row.set_item("thread_source", threads.source())?;
    row.set_item("tensor_view", if Torch::get(py)?.exchange().is_some() { "exchange" } else { "attributes" })?;
    Ok(row)
}

/// The cores that this process may use: what affinity and the quota of its control group leave, at least 1.
#[pyfunction]
pub(crate) fn available_cores() -> usize {
    vhead_core::threads::available_cores()
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

/// Fails inside, on one of the threads that run pieces: for tests of what a caller sees then.
#[pyfunction]
pub(crate) fn panic_on_purpose(py: Python<'_>, tasks: usize) -> PyResult<()> {
    let threads = threads::Threads::now(py)?;
    gate::run(py, usize::MAX, || {
        threads.executor().run(tasks, &|index| assert!(index != tasks / 2, "on purpose"));
        Ok(())
    })
}
