//! Heads in safetensors files: what is read, what is written, and what is refused.
#![expect(clippy::unwrap_used, reason = "helpers of tests, which clippy does not count as tests")]
use half::{bf16, f16};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use std::path::{Path, PathBuf};
use vhead_candle::candle_core::{Device, Tensor};
use vhead_candle::{Error, ValueHead};

const WEIGHT: [f32; 6] = [0.25, -1.5, 3.0e-39, f32::MAX, -0.0, 0.1];
const BIAS: [f32; 2] = [-0.75, 1.0e-3];

/// A folder that goes with the test.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("vhead_candle_{}_{name}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(&self.0).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn head(bias: Option<&[f32]>) -> ValueHead {
    let bias = bias.map(|bias| Tensor::new(bias, &Device::Cpu).unwrap());
    ValueHead::new(Tensor::from_slice(&WEIGHT, (2, 3), &Device::Cpu).unwrap(), bias).unwrap()
}

fn weight_bits(head: &ValueHead) -> Vec<u32> {
    bits(&head.weight().flatten_all().unwrap().to_vec1().unwrap())
}

fn bias_bits(head: &ValueHead) -> Option<Vec<u32>> {
    head.bias().map(|bias| bits(&bias.to_vec1().unwrap()))
}

fn bits(numbers: &[f32]) -> Vec<u32> {
    numbers.iter().map(|number| number.to_bits()).collect()
}

fn bytes(numbers: &[f32]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}

/// A file of these (name, dtype, shape, bytes).
fn file(tensors: &[(&str, Dtype, &[usize], &[u8])]) -> Vec<u8> {
    let views = tensors
        .iter()
        .map(|(name, dtype, shape, data)| (*name, TensorView::new(*dtype, shape.to_vec(), data).unwrap()));
    safetensors::serialize(views.collect::<Vec<_>>(), None).unwrap()
}

fn read(bytes: &[u8]) -> Result<ValueHead, Error> {
    ValueHead::from_bytes(bytes, &Device::Cpu)
}

#[test]
fn a_head_comes_back_from_its_file_bit_for_bit() {
    let folder = Folder::new("round_trip");
    let path = folder.0.join("v_head.safetensors");
    let original = head(Some(&BIAS));
    original.save(&path).unwrap();
    let loaded = ValueHead::load(&path, &Device::Cpu).unwrap();
    assert_eq!((weight_bits(&loaded), bias_bits(&loaded)), (bits(&WEIGHT), Some(bits(&BIAS))));
    assert_eq!((loaded.in_features(), loaded.out_features()), (3, 2));
    assert_eq!(std::fs::read(&path).unwrap(), original.to_bytes().unwrap());
    // Negative control: another head does not.
    assert_ne!(weight_bits(&loaded), bits(&WEIGHT.map(|weight| weight * 2.0)));
}

#[test]
fn a_head_without_bias_is_saved_with_zeros() {
    let loaded = read(&head(None).to_bytes().unwrap()).unwrap();
    assert_eq!(bias_bits(&loaded), Some(bits(&[0.0, 0.0])));
}

#[test]
fn the_file_says_what_the_python_writer_says() {
    let written = head(Some(&BIAS)).to_bytes().unwrap();
    let (_, metadata) = SafeTensors::read_metadata(&written).unwrap();
    assert_eq!(metadata.metadata().as_ref().unwrap().get("format").unwrap(), "pt");
    assert_eq!(metadata.offset_keys(), ["v_head.summary.bias", "v_head.summary.weight"]);
}

#[test]
fn every_name_of_a_head_is_found_beside_other_tensors() {
    let (weight, bias) = (bytes(&WEIGHT), bytes(&BIAS));
    for prefix in ["v_head.summary.", "summary.", ""] {
        let (weight_name, bias_name) = (format!("{prefix}weight"), format!("{prefix}bias"));
        let loaded = read(&file(&[
            (&weight_name, Dtype::F32, &[2, 3], &weight),
            (&bias_name, Dtype::F32, &[2], &bias),
            ("pretrained_model.lm_head.weight", Dtype::I64, &[1], &[0; 8]),
            ("model.flag", Dtype::U8, &[3], &[1, 2, 3]),
        ]));
        let loaded = loaded.unwrap();
        assert_eq!((weight_bits(&loaded), bias_bits(&loaded)), (bits(&WEIGHT), Some(bits(&BIAS))));
    }
    let loaded = read(&file(&[("weight", Dtype::F32, &[2, 3], &weight)])).unwrap();
    assert_eq!((weight_bits(&loaded), bias_bits(&loaded)), (bits(&WEIGHT), None));
}

#[test]
fn halves_are_widened_exactly() {
    let (b, f) = (WEIGHT.map(bf16::from_f32), WEIGHT.map(f16::from_f32));
    let (b_bytes, f_bytes) = (b.map(bf16::to_le_bytes).concat(), f.map(f16::to_le_bytes).concat());
    for (dtype, data, expected) in
        [(Dtype::BF16, b_bytes, b.map(bf16::to_f32)), (Dtype::F16, f_bytes, f.map(f16::to_f32))]
    {
        let loaded = read(&file(&[("weight", dtype, &[2, 3], &data)])).unwrap();
        assert_eq!(weight_bits(&loaded), bits(&expected));
    }
}

#[test]
fn no_head_half_a_head_and_two_heads_are_errors_that_list_what_was_found() {
    let (weight, bias) = (bytes(&WEIGHT), bytes(&BIAS));
    let weight_entry = |name| (name, Dtype::F32, [2_usize, 3].as_slice(), weight.as_slice());
    let bias_entry = |name| (name, Dtype::F32, [2_usize].as_slice(), bias.as_slice());
    for (tensors, found) in [
        (vec![], "no tensors"),
        (vec![weight_entry("v_head.weight"), bias_entry("v_head.bias")], "v_head.bias, v_head.weight"),
        (vec![weight_entry("v_head.summary.weight")], "v_head.summary.weight"),
        (vec![bias_entry("v_head.summary.bias")], "v_head.summary.bias"),
        (vec![bias_entry("bias")], "bias"),
        (
            vec![weight_entry("weight"), weight_entry("summary.weight"), bias_entry("summary.bias")],
            "weight, summary.bias, summary.weight",
        ),
    ] {
        let message = read(&file(&tensors)).unwrap_err().to_string();
        assert!(message.starts_with("expected one head: v_head.summary.weight and"), "{message}");
        assert!(message.ends_with(&format!("found {found}")), "{message}");
    }
}

#[test]
fn a_long_list_of_names_is_cut_and_starts_with_the_short_ones() {
    let names: Vec<String> = (0..40).map(|layer| format!("model.layers.{layer}.mlp.weight")).collect();
    let mut tensors: Vec<_> =
        names.iter().map(|name| (name.as_str(), Dtype::U8, [1].as_slice(), [0].as_slice())).collect();
    tensors.push(("v_head.weight", Dtype::U8, &[1], &[0]));
    let message = read(&file(&tensors)).unwrap_err().to_string();
    assert!(message.contains("found v_head.weight, model.layers.0") && message.ends_with("and 29 more"), "{message}");
}

#[test]
fn tensors_that_are_no_part_of_a_head_are_named() {
    let (weight, bias) = (bytes(&WEIGHT), bytes(&BIAS));
    let f64s = [0; 48];
    for (tensors, expected) in [
        (
            vec![("weight", Dtype::F32, [6].as_slice(), weight.as_slice())],
            "`weight`: expected shape [K, H], neither zero, found [6]",
        ),
        (vec![("weight", Dtype::F32, &[0, 3], &[])], "`weight`: expected shape [K, H], neither zero, found [0, 3]"),
        (
            vec![("weight", Dtype::F32, &[3, 2], &weight), ("bias", Dtype::F32, &[2], &bias)],
            "`bias`: expected shape [3], found [2]",
        ),
        (vec![("weight", Dtype::F64, &[2, 3], &f64s)], "`weight`: expected dtype F32, BF16 or F16, found F64"),
    ] {
        assert_eq!(read(&file(&tensors)).unwrap_err().to_string(), format!("tensor {expected}"));
    }
}

#[test]
fn a_file_cut_anywhere_is_an_error() {
    let folder = Folder::new("cut");
    let path = folder.0.join("v_head.safetensors");
    let whole = head(Some(&BIAS)).to_bytes().unwrap();
    for length in 0..whole.len() {
        std::fs::write(&path, &whole[..length]).unwrap();
        let error = ValueHead::load(&path, &Device::Cpu).unwrap_err();
        assert!(matches!(&error, Error::File { source, .. } if matches!(**source, Error::Format(_))), "{error}");
        assert!(error.to_string().contains("v_head.safetensors: not a safetensors file"), "{error}");
    }
    std::fs::write(&path, &whole).unwrap();
    assert!(ValueHead::load(&path, &Device::Cpu).is_ok());
}

#[test]
fn a_hostile_header_is_an_error() {
    let with_header = |header: &str, data: usize| {
        let length = (header.len() as u64).to_le_bytes();
        [length.as_slice(), header.as_bytes(), &vec![0; data]].concat()
    };
    let entry = |shape: &str, start: &str, end: &str| {
        format!(r#"{{"weight":{{"dtype":"F32","shape":{shape},"data_offsets":[{start},{end}]}}}}"#)
    };
    for bytes in [
        [u64::MAX.to_le_bytes().as_slice(), b"{}"].concat(),
        with_header("not json", 0),
        with_header(&entry("[1,2]", "0", "8"), 7),
        with_header(&entry("[1,2]", "0", "8"), 9),
        with_header(&entry("[1,3]", "0", "8"), 8),
        with_header(&entry("[1,2]", "8", "0"), 8),
        with_header(&entry("[1,2]", "-1", "7"), 8),
        with_header(&entry("[4294967296,4294967296]", "0", "8"), 8),
        with_header(&entry("[1,2305843009213693952]", "0", "8"), 8),
    ] {
        let error = read(&bytes).unwrap_err();
        assert!(matches!(error, Error::Format(_) | Error::Header { .. }), "{error}");
    }
    assert!(read(&with_header(&entry("[1,2]", "0", "8"), 8)).is_ok());
}

#[test]
fn a_missing_file_is_an_input_output_error_that_names_it() {
    let error = ValueHead::load("/nowhere/v_head.safetensors", &Device::Cpu).unwrap_err();
    let Error::File { path, source } = error else { panic!("{error}") };
    assert_eq!(path, Path::new("/nowhere/v_head.safetensors"));
    assert!(matches!(*source, Error::Io(error) if error.kind() == std::io::ErrorKind::NotFound));
}

#[test]
fn saving_replaces_the_file_and_leaves_nothing_else() {
    let folder = Folder::new("replace");
    let path = folder.0.join("v_head.safetensors");
    std::fs::write(&path, "old").unwrap();
    head(None).save(&path).unwrap();
    head(Some(&BIAS)).save(&path).unwrap();
    assert_eq!(folder.names(), ["v_head.safetensors"]);
    assert_eq!(bias_bits(&ValueHead::load(&path, &Device::Cpu).unwrap()), Some(bits(&BIAS)));
}

#[test]
fn saving_never_writes_into_the_old_file() {
    let folder = Folder::new("old");
    let (path, old) = (folder.0.join("v_head.safetensors"), folder.0.join("still_mapped"));
    std::fs::write(&path, "old").unwrap();
    std::fs::hard_link(&path, &old).unwrap();
    head(Some(&BIAS)).save(&path).unwrap();
    assert_eq!(std::fs::read(&old).unwrap(), b"old");
}

#[test]
fn a_failed_save_leaves_nothing_behind() {
    let folder = Folder::new("failed");
    let path = folder.0.join("taken");
    std::fs::create_dir(&path).unwrap();
    let error = head(None).save(&path).unwrap_err().to_string();
    assert!(error.contains("taken"), "{error}");
    assert_eq!(folder.names(), ["taken"]);
}

#[test]
fn a_header_longer_than_any_checkpoint_s_is_refused_before_it_is_read() {
    let mut written = vec![b' '; 40 << 20];
    written[..8].copy_from_slice(&((16_u64 << 20) + 1).to_le_bytes());
    let message = read(&written).unwrap_err().to_string();
    assert_eq!(message, "not a safetensors file: expected a header of at most 16777216 bytes, got 16777217");
}
