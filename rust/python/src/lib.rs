//! The PyO3 module `vhead._native`: the list of what it exports, nothing else.
use pyo3::prelude::*;

mod backends;
mod candle;
mod cuda;
mod description;
mod dlpack;
mod gate;
mod head;
mod init;
mod statistics;
mod tensor;
mod threads;
mod torch;
mod two_layer;

#[pymodule(gil_used = false)]
mod _native {
    #[pymodule_export]
    use super::backends::{available_cores, backends, build_info, configure, panic_on_purpose, worker_threads};
    #[pymodule_export]
    use super::candle::CandleValueHead;
    #[pymodule_export]
    use super::cuda::cuda_absence;
    #[pymodule_export]
    use super::cuda::head::{cuda_value_head, cuda_value_head_backward};
    #[pymodule_export]
    use super::cuda::statistics::{CudaLogitGradients, CudaLogitStatistics};
    #[pymodule_export]
    use super::head::{try_value_head, value_head, value_head_backward};
    #[pymodule_export]
    use super::init::{dropout_mask, init_linear, init_normal};
    #[pymodule_export]
    use super::statistics::{LogitGradients, LogitStatistics};
    #[pymodule_export]
    use super::two_layer::{keep_kept, linear, value_head_two_layer};

    #[pymodule_init]
    fn prepare(_module: &super::Bound<'_, super::PyModule>) -> super::PyResult<()> {
        super::threads::watch_forks();
        Ok(())
    }
}
