//! Where the allocator refuses, whichever allocation it is, the kernels return an error and the process lives.
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use vhead_core::token_statistics::Statistics;
use vhead_core::{
    Dropout, Error, Gradients, Head, Linear, LogitGradients, LogitStatistics, LogitsRule, Result, Rows, Serial,
    TwoLayerHead, allocation, apply_dropout, linear, two_layer, value_head, value_head_backward,
};

thread_local! {
    /// How many allocations of this thread still succeed; negative: all.
    static LEFT: Cell<isize> = const { Cell::new(-1) };
}

/// The system's allocator, until [`LEFT`] has run out.
struct Refusing;

impl Refusing {
    fn refuses() -> bool {
        let left = LEFT.get();
        LEFT.set(if left > 0 { left - 1 } else { left });
        left == 0
    }
}

// SAFETY: the system's allocator, or null, which means that there is no memory.
unsafe impl GlobalAlloc for Refusing {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as the caller promises.
        if Self::refuses() { std::ptr::null_mut() } else { unsafe { System.alloc(layout) } }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as the caller promises.
        if Self::refuses() { std::ptr::null_mut() } else { unsafe { System.alloc_zeroed(layout) } }
    }
    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: as the caller promises.
        if Self::refuses() { std::ptr::null_mut() } else { unsafe { System.realloc(memory, layout, size) } }
    }
    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Refusing = Refusing;

/// Refuses the first allocation of `call`, then the second, and so on until there is none to refuse; gives their number.
fn refusals(mut call: impl FnMut() -> Result<()>) -> isize {
    for allowed in 0.. {
        LEFT.set(allowed);
        let result = call();
        LEFT.set(-1);
        match result {
            Ok(()) => return allowed,
            Err(error) => assert!(matches!(error, Error::Allocation { bytes } if bytes > 0), "{error}"),
        }
    }
    unreachable!("a call that allocates for ever")
}

const ROWS: usize = 5;
const COLUMNS: usize = 300;

fn numbers(count: usize) -> Vec<f32> {
    (0..count).map(|i| (i as f32).sin()).collect()
}

#[test]
fn the_head() {
    let (data, weight) = (numbers(ROWS * COLUMNS), numbers(2 * COLUMNS));
    let hidden = Rows::contiguous(&data, ROWS, COLUMNS).expect("whole rows");
    let head = Head::new(&weight, None, COLUMNS).expect("whole rows");
    let dropout = Dropout::new(0.3, 7).expect("a probability");
    let mut values = [0.0; 2 * ROWS];
    assert!(refusals(|| value_head(&hidden, &head, None, &mut values, &Serial)) >= 1);
    assert!(refusals(|| value_head(&hidden, &head, dropout.as_ref(), &mut values, &Serial)) >= 3);
    let (mut grad_hidden, mut grad_weight, mut grad_bias) = (data.clone(), weight.clone(), [0.0; 2]);
    let count = refusals(|| {
        let gradients =
            Gradients { hidden: Some(&mut grad_hidden), weight: Some(&mut grad_weight), bias: Some(&mut grad_bias) };
        value_head_backward(&hidden, &head, dropout.as_ref(), &values, gradients, &Serial)
    });
    assert!(count >= 5, "{count}");
}

#[test]
fn layers_of_many_outputs() {
    let (data, weight1, weight2) = (numbers(ROWS * COLUMNS), numbers(40 * COLUMNS), numbers(40));
    let hidden = Rows::contiguous(&data, ROWS, COLUMNS).expect("whole rows");
    let weight = Rows::contiguous(&weight1, 40, COLUMNS).expect("whole rows");
    let second = Head::new(&weight2, None, 40).expect("whole rows");
    let dropout = Dropout::new(0.3, 7).expect("a probability");
    let mut copies = vec![weight.clone(); 3];
    let mut new = || Linear::new(copies.pop().expect("one for each refusal"), None).map(drop);
    assert_eq!(refusals(&mut new), 1);
    let first = Linear::new(weight, None).expect("a layer");
    let (mut values, mut outputs, mut kept) = ([0.0; ROWS], vec![0.0; 40 * ROWS], data.clone());
    let head = TwoLayerHead::new(first.clone(), second).expect("layers that fit");
    assert!(refusals(|| two_layer(&hidden, &head, dropout.as_ref(), &mut values, &Serial)) >= 9);
    assert!(refusals(|| linear(&hidden, &first, 1.0, true, &mut outputs, &Serial)) >= 7);
    assert!(refusals(|| apply_dropout(&hidden, dropout.as_ref(), 0, &mut kept, &Serial)) >= 3);
}

#[test]
fn token_statistics() {
    let (products, targets) = (numbers(ROWS * COLUMNS), [0, 1, 2, 3, 4]);
    let tile = Rows::contiguous(&products, ROWS, COLUMNS).expect("whole rows");
    let rule = LogitsRule::new(1.0, None, 1.0);
    let new = || LogitStatistics::new(rule, &targets, None, COLUMNS);
    assert_eq!(refusals(|| new().map(drop)), 2);
    let mut statistics = new().expect("statistics");
    assert_eq!(refusals(|| statistics.fold(&tile, 0, 0, &Serial)), 0);
    let [mut a, mut b, mut c, mut d, mut peak, mut log_sum] = [[0.0; ROWS]; 6];
    let to = Statistics {
        logprobs: &mut a,
        entropy: &mut b,
        log_sum_p_squared: &mut c,
        is_top1: &mut d,
        peak: &mut peak,
        log_sum: &mut log_sum,
    };
    statistics.finish(to).expect("as many rows");
    let new = || LogitGradients::new(rule, &targets, None, COLUMNS, [&peak, &log_sum, &b], [&a, &b]);
    assert_eq!(refusals(|| new().map(drop)), 2);
}

#[test]
fn vectors() {
    assert_eq!(refusals(|| allocation::zeros::<f32>(3).map(drop)), 1);
    assert_eq!(refusals(|| allocation::zeros::<f32>(0).map(drop)), 0);
    assert_eq!(allocation::zeros::<f32>(3).expect("little"), [0.0; 3]);
    assert_eq!(allocation::filled(7_u8, 3).expect("little"), [7; 3]);
    assert_eq!(allocation::collected(2, [1, 2, 3].into_iter()).expect("little"), [1, 2]);
    for error in [
        allocation::zeros::<f32>(usize::MAX).map(drop),
        allocation::filled(0.0, usize::MAX / 2).map(drop),
        allocation::reserved::<u8>(usize::MAX).map(drop),
    ] {
        assert!(matches!(error, Err(Error::Allocation { .. })));
    }
    assert_eq!(Error::Allocation { bytes: 5 }.to_string(), "cannot allocate 5 bytes");
}
