//! The kernels of an image, by what they compute.
use crate::driver::check;
use crate::{Error, Result};
use cudarc::driver::sys::{self, CUfunction, CUmodule};
use std::ffi::CString;
use vhead_core::Dtype;

/// A kernel of a loaded module.
#[derive(Debug)]
pub(crate) struct Function {
    pub(crate) handle: CUfunction,
    pub(crate) name: String,
}

/// One kernel for each dtype, without and with dropout.
#[derive(Debug)]
pub(crate) struct Family(Vec<Function>);

impl Family {
    fn read(module: CUmodule, prefix: &str, path: &str) -> Result<Self> {
        let names = Dtype::ALL
            .into_iter()
            .flat_map(|dtype| ["", "_dropout"].map(|dropout| format!("{prefix}_{}{path}{dropout}", dtype.name())));
        names.map(|name| find_function(module, name)).collect::<Result<_>>().map(Self)
    }

    /// The kernel for hidden states of `dtype`.
    pub(crate) fn get(&self, dtype: Dtype, has_dropout: bool) -> &Function {
        &self.0[2 * dtype as usize + usize::from(has_dropout)]
    }
}

/// Kernels that read 16 bytes at a time, and those that read one element at a time.
#[derive(Debug)]
pub(crate) struct Paths {
    vector: Family,
    scalar: Family,
}

impl Paths {
    fn read(module: CUmodule, prefix: &str) -> Result<Self> {
        let path = |path| Family::read(module, prefix, path);
        Ok(Self { vector: path("_vector")?, scalar: path("_scalar")? })
    }

    /// The kernels of a path.
    pub(crate) fn get(&self, is_vector: bool) -> &Family {
        if is_vector { &self.vector } else { &self.scalar }
    }
}

/// Every kernel of a module.
#[derive(Debug)]
pub(crate) struct Functions {
    pub(crate) forward: Paths,
    /// Several rows a warp: one output, vectors.
    pub(crate) forward_rows: Family,
    pub(crate) backward: Paths,
    /// Without the gradient of the hidden states.
    pub(crate) backward_weight: Paths,
    pub(crate) add_chunks: Function,
    pub(crate) add_rows: Function,
    pub(crate) fold_logits: Function,
    /// With candidates and the likeliest tokens.
    pub(crate) fold_selected: Function,
    pub(crate) finish_statistics: Function,
    pub(crate) finish_selected: Function,
    differentiate_logits: Vec<Function>,
}

impl Functions {
    /// Looks all of them up, so that none is missing later.
    ///
    /// # Errors
    /// [`crate::Error::Launch`] with the name of one that the module does not have.
    pub(crate) fn read(module: CUmodule) -> Result<Self> {
        Ok(Self {
            forward: Paths::read(module, "vhead_value_head")?,
            forward_rows: Family::read(module, "vhead_value_head_rows", "")?,
            backward: Paths::read(module, "vhead_value_head_backward")?,
            backward_weight: Paths::read(module, "vhead_value_head_backward_weight")?,
            add_chunks: find_function(module, "vhead_value_head_add_chunks".to_owned())?,
            add_rows: find_function(module, "vhead_value_head_add_rows".to_owned())?,
            fold_logits: find_function(module, "vhead_token_statistics_fold".to_owned())?,
            fold_selected: find_function(module, "vhead_token_statistics_fold_selected".to_owned())?,
            finish_statistics: find_function(module, "vhead_token_statistics_finish".to_owned())?,
            finish_selected: find_function(module, "vhead_token_statistics_finish_selected".to_owned())?,
            differentiate_logits: Dtype::ALL
                .into_iter()
                .map(|dtype| find_function(module, format!("vhead_token_statistics_differentiate_{}", dtype.name())))
                .collect::<Result<_>>()?,
        })
    }

    /// The kernel that writes gradients of `dtype`.
    pub(crate) fn differentiate_logits(&self, dtype: Dtype) -> &Function {
        &self.differentiate_logits[dtype as usize]
    }
}

/// Looks a kernel of a loaded module up; its context must be current.
fn find_function(module: CUmodule, name: String) -> Result<Function> {
    let mut handle = std::ptr::null_mut();
    let symbol = CString::new(name.as_bytes()).unwrap_or_default();
    // SAFETY: the module is loaded, its context is current, and the name is a C string.
    let result = unsafe { sys::cuModuleGetFunction(&raw mut handle, module, symbol.as_ptr()) };
    match check("cuModuleGetFunction", result) {
        Ok(()) => Ok(Function { handle, name }),
        Err(failure) => Err(Error::Launch { kernel: name, failure }),
    }
}
