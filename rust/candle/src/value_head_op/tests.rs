//! The op against the kernels it calls, and its gradients against a float64 twin.
use super::*;
use crate::ValueHead;
use candle_core::{D, Device, Var};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use vhead_core::philox::{Stream, philox4x32_10};
use vhead_core::{Executor, Serial, reference};

const SEED: u64 = 0x5eed;

/// Numbers in [-1, 1), a function of the seed.
pub(super) fn random(count: usize, seed: u64) -> Vec<f32> {
    let word = |i: usize| philox4x32_10([(i / 4) as u32, 0, 0, Stream::Weight as u32], seed)[i % 4];
    (0..count).map(|i| (f64::from(word(i)) / 2_147_483_648.0 - 1.0) as f32).collect()
}

pub(super) fn tensor<S: Into<Shape>>(shape: S, seed: u64, dtype: DType) -> Tensor {
    let shape = shape.into();
    Tensor::from_vec(random(shape.elem_count(), seed), shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
}

pub(super) fn bits(tensor: &Tensor) -> Vec<u32> {
    let floats = tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    floats.into_iter().map(f32::to_bits).collect()
}

fn zeros<T: Element>(count: usize) -> Vec<T> {
    allocation::zeros(count).unwrap()
}

fn elements<T: WithDType>(tensor: &Tensor) -> Vec<T> {
    tensor.contiguous().unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// Hidden states of `columns` in every kind of layout the op takes: whole, offset, swapped, repeated, one row, none.
pub(super) fn layouts(columns: usize, dtype: DType) -> Vec<Tensor> {
    let whole = tensor((3, 4, columns), 1, dtype);
    vec![
        whole.clone(),
        whole.narrow(1, 1, 2).unwrap(),
        whole.transpose(0, 1).unwrap(),
        whole.narrow(0, 1, 1).unwrap().broadcast_as((5, 4, columns)).unwrap(),
        tensor((3, 2 * columns), 2, dtype).narrow(1, columns, columns).unwrap(),
        tensor(columns, 3, dtype),
        Tensor::zeros((2, 0, columns), dtype, &Device::Cpu).unwrap(),
    ]
}

fn expected_values<T: Hidden>(hidden: &Tensor, head: &Head<'_>, dropout: Option<&Dropout>) -> Vec<u32> {
    let data = elements::<T>(hidden);
    let rows = Rows::contiguous(&data, data.len() / head.columns(), head.columns()).unwrap();
    let mut values = vec![0.0; rows.count() * head.outputs()];
    vhead_core::value_head(&rows, head, dropout, &mut values, &Serial).unwrap();
    values.into_iter().map(f32::to_bits).collect()
}

fn check_values<T: Hidden>(columns: usize, outputs: usize, with_bias: bool, p: f64) {
    let (weight, bias) = (random(outputs * columns, 10), random(outputs, 11));
    let bias = with_bias.then_some(bias);
    let to_tensor = |bias: Vec<f32>| Tensor::from_vec(bias, outputs, &Device::Cpu).unwrap();
    let weight_tensor = Tensor::from_vec(weight.clone(), (outputs, columns), &Device::Cpu).unwrap();
    let module = ValueHead::new(weight_tensor, bias.clone().map(to_tensor)).unwrap();
    let head = Head::new(&weight, bias.as_deref(), columns).unwrap();
    for hidden in layouts(columns, <T as WithDType>::DTYPE) {
        let values = module.forward_train(&hidden, p, SEED).unwrap();
        let dropout = Dropout::new(p, SEED).unwrap();
        assert_eq!(bits(&values), expected_values::<T>(&hidden, &head, dropout.as_ref()));
        let mut shape = hidden.dims().to_vec();
        shape.pop();
        shape.extend((outputs > 1).then_some(outputs));
        assert_eq!(values.dims(), shape);
        assert_eq!(values.dtype(), DType::F32);
    }
}

#[test]
fn values_are_the_kernels_values_bit_for_bit() {
    for columns in [1, 7, 8, 300] {
        for (outputs, with_bias, p) in [(1, true, 0.0), (1, false, 0.3), (3, true, 0.3), (3, false, 0.0)] {
            check_values::<f32>(columns, outputs, with_bias, p);
            check_values::<bf16>(columns, outputs, with_bias, p);
            check_values::<f16>(columns, outputs, with_bias, p);
        }
    }
}

/// Negative control of the test above: what should change the bits does.
#[test]
fn values_change_with_the_seed_the_row_and_the_bias() {
    let hidden = tensor((4, 64), 1, DType::F32);
    let (weight, bias) = (tensor((1, 64), 2, DType::F32), tensor(1, 3, DType::F32));
    let head = ValueHead::new(weight.clone(), Some(bias)).unwrap();
    let values = bits(&head.forward_train(&hidden, 0.5, 1).unwrap());
    assert_ne!(values, bits(&head.forward_train(&hidden, 0.5, 2).unwrap()));
    assert_ne!(values, bits(&head.forward(&hidden).unwrap()));
    assert_ne!(values[0], values[1]);
    assert_ne!(
        bits(&head.forward(&hidden).unwrap()),
        bits(&ValueHead::new(weight, None).unwrap().forward(&hidden).unwrap())
    );
}

#[test]
fn a_strided_last_dimension_is_copied_by_the_head_and_refused_by_the_op() {
    let hidden = tensor((64, 5), 1, DType::BF16).t().unwrap();
    let head = ValueHead::new(tensor((1, 64), 2, DType::F32), None).unwrap();
    assert_eq!(bits(&head.forward(&hidden).unwrap()), bits(&head.forward(&hidden.contiguous().unwrap()).unwrap()));
    let op = ValueHeadOp { dropout: None, executor: Arc::new(Serial) };
    let message = hidden.apply_op2(head.weight(), op).unwrap_err().to_string();
    assert!(message.contains("contiguous last dimension") && message.contains("[5, 64]"), "{message}");
}

#[test]
fn layouts_that_reach_outside_the_storage_are_refused() {
    let data = random(24, 1);
    let layout = |sizes: &[usize], strides: &[usize], offset| Layout::new(sizes.into(), strides.to_vec(), offset);
    for (sizes, strides, offset, fits) in [
        (vec![4, 6], vec![6, 1], 0, true),
        (vec![4, 6], vec![6, 1], 1, false),
        (vec![3, 6], vec![6, 1], 6, true),
        (vec![5, 6], vec![6, 1], 0, false),
        (vec![19, 6], vec![1, 1], 0, true),
        (vec![9, 6], vec![0, 1], 18, true),
        (vec![2, 6], vec![usize::MAX, 1], 0, false),
        (vec![usize::MAX, 6], vec![usize::MAX, 1], 0, false),
        (vec![0, 6], vec![6, 1], 99, true),
        (vec![4, 6], vec![1, 4], 0, false),
        (vec![24, 1], vec![1, 7], 0, true),
    ] {
        assert_eq!(
            rows::<f32>(&data, &layout(&sizes, &strides, offset)).is_ok(),
            fits,
            "{sizes:?} {strides:?} {offset}"
        );
    }
}

#[test]
fn foreign_rows_have_the_values_of_tensors() {
    let (hidden, bias) = (tensor((5, 64), 1, DType::BF16), tensor(3, 3, DType::F32));
    let head = ValueHead::new(tensor((3, 64), 2, DType::F32), Some(bias)).unwrap();
    let data = elements::<bf16>(&hidden);
    let mut values = vec![0.0; 15];
    head.forward_rows(&Rows::contiguous(&data, 5, 64).unwrap(), &mut values).unwrap();
    let expected = bits(&head.forward(&hidden).unwrap());
    assert_eq!(values.iter().map(|value| value.to_bits()).collect::<Vec<_>>(), expected);
    let error = head.forward_rows(&Rows::contiguous(&data, 5, 64).unwrap(), &mut values[1..]).unwrap_err();
    assert_eq!(error.to_string(), "values: expected 15 elements, got 14");
}

/// An op with a dropout mask, its three arguments as variables, and the gradient of its values.
pub(super) struct Case {
    pub(super) op: ValueHeadOp,
    pub(super) hidden: Var,
    pub(super) weight: Var,
    pub(super) bias: Var,
    pub(super) grad_values: Tensor,
}

pub(super) fn case(dtype: DType, outputs: usize) -> Case {
    let (rows, columns) = (300, 37);
    let shape = if outputs == 1 { vec![3, 100] } else { vec![3, 100, outputs] };
    Case {
        op: ValueHeadOp { dropout: Dropout::new(0.3, SEED).unwrap(), executor: Arc::new(Serial) },
        hidden: Var::from_tensor(&tensor((3, rows / 3, columns), 1, dtype)).unwrap(),
        weight: Var::from_tensor(&tensor((outputs, columns), 2, DType::F32)).unwrap(),
        bias: Var::from_tensor(&tensor(outputs, 3, DType::F32)).unwrap(),
        grad_values: tensor(shape, 4, DType::F32),
    }
}

fn kernel_gradients<T: Hidden>(case: &Case) -> [Vec<u32>; 3] {
    let columns = case.weight.dims()[1];
    let (data, weight) = (elements::<T>(&case.hidden), elements::<f32>(&case.weight));
    let rows = Rows::contiguous(&data, data.len() / columns, columns).unwrap();
    let head = Head::new(&weight, None, columns).unwrap();
    let (mut hidden, mut weight, mut bias) =
        (zeros::<T>(data.len()), zeros(head.outputs() * columns), zeros(head.outputs()));
    let gradients = Gradients { hidden: Some(&mut hidden), weight: Some(&mut weight), bias: Some(&mut bias) };
    let grad_values = elements::<f32>(&case.grad_values);
    vhead_core::value_head_backward(&rows, &head, case.op.dropout.as_ref(), &grad_values, gradients, &Serial).unwrap();
    let to_bits = |numbers: Vec<f32>| numbers.into_iter().map(f32::to_bits).collect();
    [hidden.into_iter().map(|x| Element::to_f32(x).to_bits()).collect(), to_bits(weight), to_bits(bias)]
}

fn check_gradients<T: Hidden>(outputs: usize) {
    let case = case(<T as WithDType>::DTYPE, outputs);
    let (hidden, weight, bias) =
        case.op.gradients(&case.hidden, &case.weight, Some(&case.bias), &case.grad_values).unwrap();
    let actual = [hidden.unwrap(), weight.unwrap(), bias.unwrap()];
    let dtypes = [<T as WithDType>::DTYPE, DType::F32, DType::F32];
    let arguments = [&case.hidden, &case.weight, &case.bias];
    for (((actual, expected), dtype), argument) in
        actual.iter().zip(kernel_gradients::<T>(&case)).zip(dtypes).zip(arguments)
    {
        assert_eq!((actual.dtype(), actual.dims()), (dtype, argument.dims()));
        assert_eq!(bits(actual), expected);
    }
}

#[test]
fn gradients_are_the_kernels_gradients_bit_for_bit() {
    for outputs in [1, 3] {
        check_gradients::<f32>(outputs);
        check_gradients::<bf16>(outputs);
        check_gradients::<f16>(outputs);
    }
}

/// The sum of the values, weighted by `grad_values`, in float64.
fn loss(case: &Case, dropout: Option<&Dropout>, hidden: &[f32], weight: &[f32], bias: &[f32]) -> f64 {
    let columns = case.weight.dims()[1];
    let rows = Rows::contiguous(hidden, hidden.len() / columns, columns).unwrap();
    let values = reference::value_head(&rows, &Head::new(weight, Some(bias), columns).unwrap(), dropout);
    let products = values.iter().zip(elements::<f32>(&case.grad_values)).map(|(value, grad)| value * f64::from(grad));
    products.fold(0.0, |a, b| a + b)
}

/// The largest distance from a central difference, relative to the largest gradient; the loss is linear in each
/// argument, so that a step of one is as good as a small one and loses fewer digits.
fn distance_from_differences(case: &Case, dropout: Option<&Dropout>) -> [f64; 3] {
    let arguments = [&case.hidden, &case.weight, &case.bias].map(|argument| elements::<f32>(argument));
    let values = case.hidden.apply_op3(&case.weight, &case.bias, case.op.clone()).unwrap();
    let gradients = (values * &case.grad_values).unwrap().sum_all().unwrap().backward().unwrap();
    let gradients =
        [&case.hidden, &case.weight, &case.bias].map(|argument| elements::<f32>(gradients.get(argument).unwrap()));
    std::array::from_fn(|argument| {
        let mut largest = [0.0_f64; 2];
        for index in (0..arguments[argument].len()).step_by(1 + arguments[argument].len() / 40) {
            let [up, down] = [1.0, -1.0].map(|step| {
                let mut moved = arguments.clone();
                moved[argument][index] += step;
                let reached = f64::from(moved[argument][index]);
                (reached, loss(case, dropout, &moved[0], &moved[1], &moved[2]))
            });
            let difference = (up.1 - down.1) / (up.0 - down.0);
            largest[0] = largest[0].max((f64::from(gradients[argument][index]) - difference).abs());
            largest[1] = largest[1].max(difference.abs());
        }
        largest[0] / largest[1]
    })
}

#[test]
fn gradients_through_candle_match_differences_of_the_float64_twin() {
    for outputs in [1, 3] {
        let case = case(DType::F32, outputs);
        let distances = distance_from_differences(&case, case.op.dropout.as_ref());
        assert!(distances.iter().all(|distance| *distance < 1e-6), "{distances:?}");
        // Negative control: another mask is far away, for the two arguments that the mask touches.
        let distances = distance_from_differences(&case, Dropout::new(0.3, SEED + 1).unwrap().as_ref());
        assert!(distances[0] > 0.1 && distances[1] > 0.01 && distances[2] < 1e-6, "{distances:?}");
    }
}

#[test]
fn gradients_that_nothing_depends_on_are_not_computed() {
    let case = case(DType::F32, 1);
    let (hidden, weight, bias) =
        case.op.gradients(&case.hidden.detach(), &case.weight, Some(&case.bias.detach()), &case.grad_values).unwrap();
    assert!(hidden.is_none() && bias.is_none());
    assert!(weight.is_some());
}

#[test]
fn gradients_accept_broadcast_and_strided_gradients_of_the_values() {
    let case = case(DType::F32, 3);
    let arguments = (&case.hidden, &case.weight, Some(case.bias.as_tensor()));
    let ones = Tensor::new(2.0_f32, &Device::Cpu).unwrap().broadcast_as((3, 100, 3)).unwrap();
    let swapped = case.grad_values.transpose(0, 1).unwrap().contiguous().unwrap().transpose(0, 1).unwrap();
    for (view, whole) in [(&ones, &ones.contiguous().unwrap()), (&swapped, &case.grad_values)] {
        let [a, b] = [view, whole].map(|grad| case.op.gradients(arguments.0, arguments.1, arguments.2, grad).unwrap());
        assert_eq!(bits(&a.0.unwrap()), bits(&b.0.unwrap()));
        assert_eq!(bits(&a.1.unwrap()), bits(&b.1.unwrap()));
        assert_eq!(bits(&a.2.unwrap()), bits(&b.2.unwrap()));
    }
}

#[test]
fn gradients_of_a_strided_last_dimension_come_back_in_its_shape() {
    let hidden = Var::from_tensor(&tensor((16, 5), 1, DType::F32)).unwrap();
    let head = ValueHead::new(tensor((1, 16), 2, DType::F32), None).unwrap();
    let values = head.forward(&hidden.t().unwrap()).unwrap();
    let gradients = values.sum_all().unwrap().backward().unwrap();
    let expected = head.weight().t().unwrap().broadcast_as((16, 5)).unwrap();
    assert_eq!(bits(gradients.get(&hidden).unwrap()), bits(&expected));
}

#[test]
fn not_a_number_and_infinity_reach_the_values_even_where_dropped() {
    let head = ValueHead::new(tensor((1, 64), 2, DType::F32), None).unwrap();
    let mut data = random(3 * 64, 1);
    (0..64).step_by(2).for_each(|column| data[column] = f32::NAN);
    data[64] = f32::INFINITY;
    let hidden = Tensor::from_vec(data, (3, 64), &Device::Cpu).unwrap();
    for p in [0.0, 0.9] {
        let values = head.forward_train(&hidden, p, SEED).unwrap().to_vec1::<f32>().unwrap();
        assert!(values[0].is_nan() && !values[1].is_finite() && values[2].is_finite(), "{values:?}");
    }
}

/// Without the backtrace that candle puts behind it where `RUST_BACKTRACE` asks for one.
fn message<T: std::fmt::Debug>(result: Result<T>) -> String {
    result.unwrap_err().to_string().lines().next().unwrap_or_default().to_owned()
}

#[test]
fn wrong_arguments_are_errors_that_say_what_was_expected() {
    let head = ValueHead::new(tensor((1, 64), 2, DType::F32), Some(tensor(1, 3, DType::F32))).unwrap();
    let scalar = Tensor::new(1.0_f32, &Device::Cpu).unwrap();
    for (hidden, expected) in [
        (tensor((2, 63), 1, DType::F32), "hidden states: expected shape [..., 64], got [2, 63]"),
        (scalar, "hidden states: expected shape [..., 64], got []"),
        (
            tensor((2, 64), 1, DType::F64),
            "hidden states: expected float32, bfloat16 or float16 (f32, bf16, f16), got f64",
        ),
    ] {
        assert_eq!(message(head.forward(&hidden)), expected);
    }
    let hidden = tensor((2, 64), 1, DType::F32);
    for p in [-0.1, 1.0, f64::NAN] {
        assert!(message(head.forward_train(&hidden, p, 0)).starts_with("dropout probability must lie in [0, 1)"));
    }
}

#[test]
fn wrong_weights_are_errors_that_say_what_was_expected() {
    let weight = tensor((2, 4), 1, DType::F32);
    for (weight, bias, expected) in [
        (tensor(4, 1, DType::F32), None, "weight: expected shape [K, H] of at least one row and column, got [4]"),
        (
            Tensor::zeros((1, 0), DType::F32, &Device::Cpu).unwrap(),
            None,
            "weight: expected shape [K, H] of at least one row and column, got [1, 0]",
        ),
        (tensor((2, 4), 1, DType::BF16), None, "weight: expected float32 (f32), got bf16"),
        (weight.clone(), Some(tensor(1, 1, DType::F32)), "bias: expected shape [2], got [1]"),
        (weight, Some(tensor(2, 1, DType::F64)), "bias: expected float32 (f32), got f64"),
    ] {
        assert_eq!(message(ValueHead::new(weight, bias)), expected);
    }
}

#[test]
fn what_is_broadcast_to_terabytes_is_an_error() {
    let many = |columns| tensor((1, 1), 1, DType::F32).broadcast_as((1_usize << 42, columns)).unwrap();
    let terabytes = "cannot allocate 17592186044416 bytes";
    assert_eq!(message(ValueHead::new(many(1), None)), terabytes);
    let head = ValueHead::new(tensor((1, 1), 1, DType::F32), None).unwrap();
    assert_eq!(message(head.forward(&many(1))), terabytes);
    let head = ValueHead::new(tensor((1, 2), 1, DType::F32), None).unwrap();
    assert_eq!(message(head.forward(&many(2))), "cannot allocate 35184372088832 bytes");
}

#[test]
fn weights_may_be_views() {
    let (wide, hidden) = (tensor((64, 3), 1, DType::F32), tensor((2, 64), 2, DType::F32));
    let (weight, bias) = (wide.t().unwrap(), wide.narrow(0, 5, 1).unwrap().squeeze(0).unwrap());
    let head = ValueHead::new(weight.clone(), Some(bias.clone())).unwrap();
    let copied = ValueHead::new(weight.contiguous().unwrap(), Some(bias.copy().unwrap())).unwrap();
    assert_eq!(bits(&head.forward(&hidden).unwrap()), bits(&copied.forward(&hidden).unwrap()));
    assert_eq!(head.forward(&hidden).unwrap().dim(D::Minus1).unwrap(), 3);
}

/// Counts what it is given; runs it on the calling thread.
struct Counting(AtomicUsize);

impl Executor for Counting {
    fn threads(&self) -> usize {
        4
    }
    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        self.0.fetch_add(tasks, Ordering::Relaxed);
        Serial.run(tasks, task);
    }
}

#[test]
fn work_runs_on_the_executor_of_the_caller() {
    let (hidden, weight) =
        (tensor((512, 1024), 1, DType::F32), Var::from_tensor(&tensor((1, 1024), 2, DType::F32)).unwrap());
    let executor = Arc::new(Counting(AtomicUsize::new(0)));
    let head = ValueHead::new(weight.as_tensor().clone(), None).unwrap().with_executor(executor.clone());
    let values = head.forward(&hidden).unwrap();
    let forward = executor.0.load(Ordering::Relaxed);
    values.sum_all().unwrap().backward().unwrap();
    assert!(forward > 0 && executor.0.load(Ordering::Relaxed) > forward);
}
