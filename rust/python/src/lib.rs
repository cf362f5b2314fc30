//! The PyO3 module `vhead._native`: the list of what it exports, nothing else.
use pyo3::prelude::*;

mod backend;
mod backends;
mod buffers;
mod candle;
mod cpu;
mod cuda;
mod description;
mod dlpack;
mod dtype;
mod gate;
mod init;
mod matrix_unit;
mod returns;
mod shapes;
mod sync;
mod tensor;
mod threads;
mod token_statistics;
mod torch;
mod two_layer;
mod value_head;

#[pymodule(gil_used = false)]
mod _native {
    #[pymodule_export]
    use super::backends::{
        available_cores, backends, build_info, configure, dispatch_keys, kernel_absence, panic_on_purpose, processor,
        worker_threads,
    };
    #[pymodule_export]
    use super::candle::CandleValueHead;
    #[pymodule_export]
    use super::init::{init_linear, init_normal};
    #[pymodule_export]
    use super::matrix_unit::{Attention, FeedForward, has_matrix_unit, rms_norm, rotate};
    #[pymodule_export]
    use super::returns::{explained_variance, gae, token_rewards, whiten};
    #[pymodule_export]
    use super::sync::{SyncPublisher, SyncStage, sync_collect, sync_export, sync_list};
    #[pymodule_export]
    use super::token_statistics::{LogitGradients, LogitStatistics};
    #[pymodule_export]
    use super::two_layer::{apply_dropout, linear, value_head_two_layer};
    #[pymodule_export]
    use super::value_head::{try_value_head, value_head, value_head_backward};

    #[pymodule_init]
    fn prepare(_module: &super::Bound<'_, super::PyModule>) -> super::PyResult<()> {
        super::threads::watch_forks();
        Ok(())
    }
}
