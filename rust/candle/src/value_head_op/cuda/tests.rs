//! The op on device 0 against the op on the CPU, bit for bit: on a GPU, or on the emulated driver of this project's tests,
//! which runs no kernel of candle's own.
use super::super::tests::{bits, case, layouts, tensor};
use super::*;
use crate::ValueHead;
use candle_core::{Device as CandleDevice, Var};
use std::sync::Arc;
use vhead_core::Serial;

const SEED: u64 = 0xfeed_5eed;

fn device() -> CandleDevice {
    CandleDevice::new_cuda(0).unwrap()
}

fn op(p: f64, seed: u64) -> ValueHeadOp {
    ValueHeadOp { dropout: Dropout::new(p, seed).unwrap(), executor: Arc::new(Serial) }
}

fn values(hidden: &Tensor, weight: &Tensor, bias: Option<&Tensor>, op: &ValueHeadOp) -> Tensor {
    match bias {
        Some(bias) => hidden.apply_op3(weight, bias, op.clone()),
        None => hidden.apply_op2(weight, op.clone()),
    }
    .unwrap()
}

fn to(tensor: &Tensor, device: &CandleDevice) -> Tensor {
    tensor.to_device(device).unwrap()
}

fn home(tensor: &Tensor) -> Tensor {
    to(tensor, &CandleDevice::Cpu)
}

#[test]
fn values_are_the_cpu_s_bit_for_bit() {
    let device = device();
    for columns in [1, 7, 8, 64, 300] {
        for (outputs, with_bias, p) in [(1, true, 0.0), (1, false, 0.3), (3, true, 0.3), (3, false, 0.0)] {
            let weight = tensor((outputs, columns), 10, DType::F32);
            let bias = with_bias.then(|| tensor(outputs, 11, DType::F32));
            let there = (to(&weight, &device), bias.as_ref().map(|bias| to(bias, &device)));
            for dtype in [DType::F32, DType::BF16, DType::F16] {
                for hidden in layouts(columns, dtype) {
                    let op = op(p, SEED);
                    let expected = values(&hidden, &weight, bias.as_ref(), &op);
                    let actual = values(&to(&hidden, &device), &there.0, there.1.as_ref(), &op);
                    assert!(actual.device().is_cuda());
                    assert_eq!((actual.dims(), actual.dtype()), (expected.dims(), DType::F32));
                    assert_eq!(bits(&home(&actual)), bits(&expected), "{dtype:?} {hidden:?} {outputs} {p}");
                }
            }
        }
    }
}

/// Negative control of the test above: another seed gives other bits.
#[test]
fn values_follow_the_seed() {
    let device = device();
    let (hidden, weight) = (tensor((4, 64), 1, DType::F32), tensor((1, 64), 2, DType::F32));
    let there = values(&to(&hidden, &device), &to(&weight, &device), None, &op(0.5, SEED + 1));
    assert_ne!(bits(&home(&there)), bits(&values(&hidden, &weight, None, &op(0.5, SEED))));
    assert_eq!(bits(&home(&there)), bits(&values(&hidden, &weight, None, &op(0.5, SEED + 1))));
}

#[test]
fn gradients_are_the_cpu_s_bit_for_bit() {
    let device = device();
    for (dtype, outputs) in [(DType::F32, 1), (DType::BF16, 1), (DType::F16, 1), (DType::BF16, 3)] {
        let case = case(dtype, outputs);
        let there = [&case.hidden, &case.weight, &case.bias].map(|x| Var::from_tensor(&to(x, &device)).unwrap());
        let [hidden, weight, bias] = &there;
        let grad_values = to(&case.grad_values, &device);
        let expected = case.op.gradients(&case.hidden, &case.weight, Some(&case.bias), &case.grad_values).unwrap();
        let actual = case.op.gradients(hidden, weight, Some(bias), &grad_values).unwrap();
        for (expected, actual) in [(expected.0, actual.0), (expected.1, actual.1), (expected.2, actual.2)] {
            let (expected, actual) = (expected.unwrap(), actual.unwrap());
            assert_eq!((actual.dims(), actual.dtype()), (expected.dims(), expected.dtype()));
            assert_eq!(bits(&home(&actual)), bits(&expected), "{dtype:?} {outputs}");
        }
    }
}

#[test]
fn gradients_that_nothing_depends_on_are_not_computed() {
    let (case, device) = (case(DType::BF16, 1), device());
    let (hidden, weight) = (to(&case.hidden.detach(), &device), Var::from_tensor(&to(&case.weight, &device)).unwrap());
    let grad_values = to(&case.grad_values, &device);
    let frozen = case.op.gradients(&hidden, &weight, None, &grad_values).unwrap();
    assert!(frozen.0.is_none() && frozen.2.is_none());
    let expected = case.op.gradients(&case.hidden, &case.weight, None, &case.grad_values).unwrap();
    assert_eq!(bits(&home(&frozen.1.unwrap())), bits(&expected.1.unwrap()));
}

#[test]
fn wrong_arguments_are_errors_that_say_what_was_expected() {
    let device = device();
    let weight = to(&tensor((1, 64), 2, DType::F32), &device);
    let refusal = |hidden: &Tensor, weight: &Tensor| hidden.apply_op2(weight, op(0.0, SEED)).unwrap_err().to_string();
    let hidden = |shape: (usize, usize), dtype| to(&tensor(shape, 1, dtype), &device);
    for (hidden, weight, expected) in [
        (hidden((2, 64), DType::F64), weight.clone(), "hidden states: expected float32, bfloat16 or float16"),
        (hidden((2, 63), DType::F32), weight.clone(), "weight: expected shape [K, 63], got [1, 64]"),
        (hidden((64, 2), DType::F32).t().unwrap(), weight.clone(), "expected a contiguous last dimension"),
        (hidden((2, 64), DType::F32), to(&tensor((1, 64), 2, DType::F64), &device), "weight: expected float32 (f32)"),
    ] {
        let message = refusal(&hidden, &weight);
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn rows_of_foreign_memory_need_a_head_on_the_cpu() {
    let head = ValueHead::new(to(&tensor((1, 64), 2, DType::F32), &device()), None).unwrap();
    let data = [0.0_f32; 64];
    let rows = vhead_core::Rows::contiguous(&data, 1, 64).unwrap();
    let error = head.forward_rows(&rows, &mut [0.0]).unwrap_err();
    assert_eq!(error.to_string(), "value_head: expected tensors on the CPU, got some on a CUDA device");
}
