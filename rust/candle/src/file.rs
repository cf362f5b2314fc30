//! Heads in safetensors files: which names make one, and the bytes.
use crate::{Error, Result};
use half::{bf16, f16};
use memmap2::Mmap;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use vhead_core::allocation::{self, collected};

/// Where a head may lie in a file, and whether a bias must lie beside the weight there: a TRL head always has one, so
/// that its absence means half a head.
const PREFIXES: [(&str, bool); 3] = [("v_head.summary.", true), ("summary.", true), ("", false)];
const EXPECTED: &str = "one head: v_head.summary.weight and v_head.summary.bias, summary.weight and summary.bias, or weight \
                        (and perhaps bias)";

/// Where a file's metadata has what belongs to a head and is no weight.
const SETTINGS: &str = "v_head";
/// Where a model's configuration has it.
const STATED: [&str; 2] = ["v_head_support", "v_head_activation"];
/// A weight and a bias.
const TENSORS_OF_A_HEAD: usize = 2;

/// A head as it lies in a file, widened to float32.
pub(crate) struct Parameters {
    pub(crate) weight: Vec<f32>,
    pub(crate) bias: Option<Vec<f32>>,
    pub(crate) outputs: usize,
    pub(crate) columns: usize,
}

/// Bytes of the longest header that is read, which lists some hundred thousand tensors. Longer ones take seconds and a
/// multiple of their length in memory, and say nothing that a checkpoint has to say.
const MOST_HEADER: u64 = 16 << 20;

/// More than the header of a head takes.
const HEADER_ROOM: usize = 1024;

/// The bytes of a file, which must not be truncated while they are in use.
pub(crate) fn map(path: &Path) -> Result<Mmap> {
    let kind = fs::metadata(path)?.file_type();
    if kind.is_dir() {
        return Err(std::io::Error::new(ErrorKind::IsADirectory, "expected a safetensors file, got a folder").into());
    }
    if !kind.is_file() {
        // Opening a pipe waits for whoever writes to it; a device has no length.
        return Err(std::io::Error::new(ErrorKind::InvalidInput, "expected a regular file").into());
    }
    let file = File::open(path)?;
    // SAFETY: the mapping is private and dropped once the head has been copied out. A file that another process cuts
    // short in that time is a bus error, as for every reader that maps; ours are replaced by renaming, never cut.
    Ok(unsafe { Mmap::map(&file) }?)
}

/// The one head among the tensors of a safetensors file.
pub(crate) fn parse(bytes: &[u8]) -> Result<Parameters> {
    check_header(bytes)?;
    check_settings(bytes)?;
    let tensors = SafeTensors::deserialize(bytes)?;
    let present: Vec<_> = PREFIXES.iter().filter(|(prefix, _)| holds_part(&tensors, prefix)).collect();
    let &[&(prefix, needs_bias)] = present.as_slice() else { return Err(keys(&tensors)) };
    let [weight_name, bias_name] = names(prefix);
    let weight = tensors.tensor(&weight_name).map_err(|_| keys(&tensors))?;
    let (outputs, columns) = match *weight.shape() {
        [outputs, columns] if outputs > 0 && columns > 0 => (outputs, columns),
        _ => return Err(unfit(&weight_name, "shape [K, H], neither zero", format!("{:?}", weight.shape()))),
    };
    let bias = match tensors.tensor(&bias_name) {
        Ok(bias) if bias.shape() == [outputs] => Some(widen(&bias_name, &bias)?),
        Ok(bias) => return Err(unfit(&bias_name, &format!("shape [{outputs}]"), format!("{:?}", bias.shape()))),
        Err(_) if needs_bias => return Err(keys(&tensors)),
        Err(_) => None,
    };
    Ok(Parameters { weight: widen(&weight_name, &weight)?, bias, outputs, columns })
}

/// A head in the bytes that `safetensors.torch.save_file` writes with metadata `{"format": "pt"}`.
pub(crate) fn serialize(weight: &[f32], bias: &[f32], columns: usize) -> Result<Vec<u8>> {
    let [weight_name, bias_name] = names(PREFIXES[0].0);
    let (weight_bytes, bias_bytes) = (little_endian(weight)?, little_endian(bias)?);
    let weight = TensorView::new(Dtype::F32, vec![bias.len(), columns], &weight_bytes)?;
    let bias = TensorView::new(Dtype::F32, vec![bias.len()], &bias_bytes)?;
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    // safetensors ends the process where there is no memory for the file.
    drop(allocation::reserved::<u8>(weight_bytes.len() + bias_bytes.len() + HEADER_ROOM)?);
    Ok(safetensors::serialize([(weight_name, weight), (bias_name, bias)], Some(metadata))?)
}

/// Writes `bytes` beside `path` and renames: a reader sees the old file or the new one, whole.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let temporary = beside(path);
    let written = write_new(&temporary, bytes).and_then(|()| fs::rename(&temporary, path));
    if written.is_err() {
        // The first error is the one to report; what is left over is only a file nobody names.
        let _ = fs::remove_file(&temporary);
    }
    Ok(written?)
}

fn write_new(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut file = File::create_new(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// A name in the same folder that no other thread or process takes.
fn beside(path: &Path) -> PathBuf {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}.{}.tmp", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed)));
    name.into()
}

/// What is wrong with a header that is not there is safetensors' to say.
fn check_header(bytes: &[u8]) -> Result<()> {
    match bytes.first_chunk().map(|length| u64::from_le_bytes(*length)) {
        Some(actual) if actual > MOST_HEADER => Err(Error::Header { actual, most: MOST_HEADER }),
        _ => Ok(()),
    }
}

/// A head whose outputs need more than its weights, a distributional one or a classifier, is none of this crate's: it would
/// give logits for values. `vhead` states that in the file's metadata.
fn check_settings(bytes: &[u8]) -> Result<()> {
    let (_, header) = SafeTensors::read_metadata(bytes)?;
    match header.metadata().as_ref().and_then(|metadata| metadata.get(SETTINGS)) {
        Some(found) => Err(Error::Settings { place: "metadata `v_head`", found: found.clone() }),
        None => Ok(()),
    }
}

/// The same for a head that lies in a model's file, where transformers states it in the configuration beside that file. A
/// file with nothing but a head is its own, whatever model lies in the folder.
pub(crate) fn check_configuration(path: &Path, bytes: &[u8]) -> Result<()> {
    let (_, header) = SafeTensors::read_metadata(bytes)?;
    let beside = path.with_file_name("config.json");
    if header.tensors().len() <= TENSORS_OF_A_HEAD || !fs::metadata(&beside).is_ok_and(|found| found.is_file()) {
        return Ok(());
    }
    let Ok(Value::Object(stated)) = serde_json::from_slice(&fs::read(beside)?) else { return Ok(()) };
    let settings = STATED.iter().filter_map(|name| Some((name, stated.get(*name).filter(|value| !value.is_null())?)));
    match settings.map(|(name, value)| format!("{name} {value}")).next() {
        Some(found) => Err(Error::Settings { place: "the config.json beside it", found }),
        None => Ok(()),
    }
}

fn names(prefix: &str) -> [String; 2] {
    [format!("{prefix}weight"), format!("{prefix}bias")]
}

fn holds_part(tensors: &SafeTensors<'_>, prefix: &str) -> bool {
    names(prefix).iter().any(|name| tensors.tensor(name).is_ok())
}

fn keys(tensors: &SafeTensors<'_>) -> Error {
    Error::Keys { expected: EXPECTED.to_owned(), found: tensors.names().into_iter().map(str::to_owned).collect() }
}

fn unfit(name: &str, expected: &str, found: String) -> Error {
    Error::Tensor { name: name.to_owned(), expected: expected.to_owned(), found }
}

/// Little-endian numbers, wherever they lie, as float32: exact for each of the three dtypes.
fn widen(name: &str, tensor: &TensorView<'_>) -> Result<Vec<f32>> {
    let (pairs, quads) = (tensor.data().as_chunks().0, tensor.data().as_chunks().0);
    let widened = match tensor.dtype() {
        Dtype::F32 => collected(quads.len(), quads.iter().map(|bytes| f32::from_le_bytes(*bytes))),
        Dtype::BF16 => collected(pairs.len(), pairs.iter().map(|bytes| bf16::from_le_bytes(*bytes).to_f32())),
        Dtype::F16 => collected(pairs.len(), pairs.iter().map(|bytes| f16::from_le_bytes(*bytes).to_f32())),
        other => return Err(unfit(name, "dtype F32, BF16 or F16", format!("{other:?}"))),
    };
    Ok(widened?)
}

fn little_endian(numbers: &[f32]) -> Result<Vec<u8>> {
    let bytes = numbers.iter().flat_map(|number| number.to_le_bytes());
    Ok(collected(size_of_val(numbers), bytes)?)
}
