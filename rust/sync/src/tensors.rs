//! What a tensor is before its bytes are read, and the headers of safetensors files.
use crate::{Error, Result};
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use std::collections::HashMap;
use std::path::Path;

/// Bytes before a safetensors file's header, which say how long that is.
pub(crate) const LENGTH_BYTES: usize = 8;
/// Room for some 200,000 tensors; a longer header is no model's.
const LONGEST_HEADER: usize = 25_000_000;

/// A tensor without its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description {
    /// Its name in a checkpoint.
    pub name: String,
    /// Its dtype, by safetensors' name.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
}

impl Description {
    /// A tensor whose dtype has safetensors' name `dtype`.
    ///
    /// # Errors
    /// [`Error::Argument`] for a dtype whose elements are not whole bytes, and for a shape beyond all memory.
    pub fn new(name: String, dtype: &str, shape: Vec<usize>) -> Result<Self> {
        let Some(parsed) = dtype_named(dtype) else {
            return Err(Error::Argument(format!("{name}: expected a dtype that safetensors has, got {dtype}")));
        };
        let made = Self { name, dtype: parsed, shape };
        match made.checked_bytes() {
            Some(_) => Ok(made),
            None => Err(Error::Argument(format!("{}: expected a shape of a tensor, got {:?}", made.name, made.shape))),
        }
    }

    /// Bytes of one element.
    #[must_use]
    pub fn width(&self) -> usize {
        self.dtype.bitsize() / 8
    }

    /// Bytes of the tensor.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.checked_bytes().unwrap_or(usize::MAX)
    }

    fn checked_bytes(&self) -> Option<usize> {
        self.shape
            .iter()
            .try_fold(self.width(), |bytes, &size| bytes.checked_mul(size))
            .filter(|&b| b <= isize::MAX as usize)
    }
}

/// safetensors' dtype of a name, where its elements are whole bytes.
pub(crate) fn dtype_named(name: &str) -> Option<Dtype> {
    let parsed: Option<Dtype> = serde_json::from_value(serde_json::Value::String(name.to_owned())).ok();
    parsed.filter(|dtype| dtype.bitsize().is_multiple_of(8))
}

/// safetensors' name of a dtype.
pub(crate) fn name_of(dtype: Dtype) -> String {
    format!("{dtype:?}")
}

/// A safetensors file's first bytes for these tensors in this order, with room for `room` bytes of header.
pub(crate) fn header(
    tensors: Vec<(String, Dtype, Vec<usize>, usize)>,
    room: usize,
    say: HashMap<String, String>,
) -> Result<Vec<u8>> {
    let mut offset = 0;
    let infos = tensors.into_iter().map(|(name, dtype, shape, bytes)| {
        let data_offsets = (offset, offset + bytes);
        offset += bytes;
        (name, TensorInfo { dtype, shape, data_offsets })
    });
    let metadata = Metadata::new(Some(say), infos.collect()).map_err(|error| Error::Argument(error.to_string()))?;
    let mut text = serde_json::to_vec(&metadata).map_err(|error| Error::Argument(error.to_string()))?;
    text.resize(text.len().max(room).next_multiple_of(8), b' ');
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.append(&mut text);
    Ok(bytes)
}

/// The tensors of a safetensors file, from its header; `length` is the file's.
pub(crate) fn parse_header(text: &[u8], length: u64, place: &Path) -> Result<Metadata> {
    let metadata: Metadata = serde_json::from_slice(text)
        .map_err(|error| Error::damaged(place, "the header of a safetensors file", error))?;
    let expected = (LENGTH_BYTES + text.len() + metadata.data_len()) as u64;
    if expected == length { Ok(metadata) } else { Err(Error::damaged(place, format!("{expected} bytes"), length)) }
}

/// The length of a header, from a file's first bytes.
pub(crate) fn header_length(bytes: [u8; LENGTH_BYTES], place: &Path) -> Result<usize> {
    let length = u64::from_le_bytes(bytes);
    usize::try_from(length).ok().filter(|&length| length <= LONGEST_HEADER).ok_or_else(|| {
        Error::damaged(place, format!("a safetensors header of at most {LONGEST_HEADER} bytes"), format!("{length}"))
    })
}
