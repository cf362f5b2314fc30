//! Rows anywhere: strides of any sign, views that overlap, addresses that are not aligned.
use crate::for_each_dtype;
use crate::support::{Case, noises};
use proptest::prelude::*;
use vhead_core::{Element, Level, Pool, Result, Rows, Serial};

/// The same rows, copied one after the other, have the same results.
fn same_as_a_copy<T: Element>(hidden: &Rows<'_, T>, p: f64) -> Result<()> {
    let mut case = Case::<T>::new(hidden.count(), hidden.columns(), 1, p)?;
    let element = |i| hidden.get(i / hidden.columns(), i % hidden.columns());
    case.data = (0..hidden.count() * hidden.columns()).map(element).collect();
    for level in Level::available() {
        let expected = case.run(level)?;
        assert!(case.run_on(level, hidden, &Serial)? == expected, "{} {}", level.name(), T::DTYPE.name());
        assert!(case.run_on(level, hidden, &Pool::new(2))? == expected);
    }
    Ok(())
}

#[test]
fn strided_rows() -> Result<()> {
    for_each_dtype!(strided());
    Ok(())
}

fn strided<T: Element>() -> Result<()> {
    let data: Vec<T> = noises(40_000, 8).into_iter().map(T::from_f32).collect();
    for columns in [1, 17, 300] {
        same_as_a_copy(&Rows::strided(&data, 3, &[4, 5], &[1501, 301], columns)?, 0.1)?;
        same_as_a_copy(&Rows::strided(&data, 3, &[5, 4], &[301, 1501], columns)?, 0.1)?;
        same_as_a_copy(&Rows::strided(&data, 39_000, &[7], &[-300], columns)?, 0.0)?;
        same_as_a_copy(&Rows::strided(&data, 9, &[2, 3, 4], &[0, 13, 1], columns)?, 0.5)?;
        same_as_a_copy(&Rows::strided(&data, 9, &[1, 6, 1], &[777, 900, 5], columns)?, 0.1)?;
        same_as_a_copy(&Rows::strided(&data, 9, &[], &[], columns)?, 0.1)?;
        same_as_a_copy(&Rows::strided(&data, 9, &[3, 0], &[4, 4], columns)?, 0.1)?;
    }
    Ok(())
}

/// Negative control: another stride has other results.
#[test]
fn another_stride_differs() -> Result<()> {
    let data = noises(5000, 8);
    let case = Case::<f32>::new(4, 300, 1, 0.0)?;
    let run = |stride| case.run_on(Level::best(), &Rows::strided(&data, 0, &[4], &[stride], 300)?, &Serial);
    assert!(run(301)? != run(302)? && run(301)? == run(301)?);
    Ok(())
}

#[test]
fn rows_at_any_address() -> Result<()> {
    for_each_dtype!(misaligned());
    Ok(())
}

fn misaligned<T: Element>() -> Result<()> {
    let (rows, columns) = (5, 301);
    let case = Case::<T>::new(rows, columns, 1, 0.1)?;
    let bytes = rows * columns * size_of::<T>();
    for shift in 0..size_of::<T>() + 3 {
        let mut buffer = vec![0xFF_u8; bytes + shift];
        // SAFETY: as many bytes as the elements have.
        let view = unsafe {
            case.data.as_ptr().cast::<u8>().copy_to_nonoverlapping(buffer.as_mut_ptr().add(shift), bytes);
            Rows::from_raw(buffer.as_ptr().add(shift).cast::<T>(), &[rows], &[columns as isize], columns)
        };
        for level in Level::available() {
            assert!(case.run_on(level, &view, &Serial)? == case.run(level)?, "{} {shift}", level.name());
        }
    }
    Ok(())
}

/// No byte past the last row is read: the buffer ends at a page that cannot be.
#[cfg(unix)]
#[test]
fn nothing_is_read_past_the_end() -> Result<()> {
    for_each_dtype!(ends_at_a_wall());
    Ok(())
}

#[cfg(unix)]
fn ends_at_a_wall<T: Element>() -> Result<()> {
    const PAGE: usize = 1 << 16;
    for columns in [1, 2, 7, 15, 17, 63, 65, 255, 257, 1000, 2049] {
        let case = Case::<T>::new(3, columns, 1, 0.1)?;
        let bytes = size_of_val(&case.data[..]);
        // SAFETY: a fresh mapping of two parts, the second of which is made unreadable; the data end where it starts.
        let (map, view) = unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let map = libc::mmap(std::ptr::null_mut(), 2 * PAGE, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
            assert!(map != libc::MAP_FAILED && libc::mprotect(map.byte_add(PAGE), PAGE, libc::PROT_NONE) == 0);
            let start = map.byte_add(PAGE - bytes).cast::<u8>();
            case.data.as_ptr().cast::<u8>().copy_to_nonoverlapping(start, bytes);
            (map, Rows::from_raw(start.cast::<T>(), &[3], &[columns as isize], columns))
        };
        for level in Level::available() {
            assert!(case.run_on(level, &view, &Serial)? == case.run(level)?);
        }
        // SAFETY: nothing refers to the mapping any more.
        unsafe { libc::munmap(map, 2 * PAGE) };
    }
    Ok(())
}

/// Gradients stay inside their buffers.
#[test]
fn nothing_is_written_past_the_end() -> Result<()> {
    for_each_dtype!(stays_inside());
    Ok(())
}

fn stays_inside<T: Element>() -> Result<()> {
    for columns in [1, 15, 17, 300] {
        let case = Case::<T>::new(3, columns, 1, 0.1)?;
        for level in Level::available() {
            let mut buffer = vec![T::from_f32(7.0); 5 * columns];
            let gradients =
                vhead_core::Gradients { hidden: Some(&mut buffer[columns..4 * columns]), weight: None, bias: None };
            let (hidden, head) = (case.hidden()?, case.head()?);
            let dropout = case.dropout.as_ref();
            vhead_core::value_head_backward_with(
                level,
                &hidden,
                &head,
                dropout,
                &case.grad_values,
                gradients,
                &Serial,
            )?;
            let outside = buffer[..columns].iter().chain(&buffer[4 * columns..]);
            assert!(outside.map(|x| x.to_f32()).all(|x| x == 7.0));
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_view_is_as_good_as_a_copy(
        columns in 1_usize..600,
        outer in proptest::collection::vec((0_usize..5, -700_isize..700), 0..4),
        p in prop_oneof![Just(0.0), 0.0..1.0],
    ) {
        let (sizes, strides): (Vec<usize>, Vec<isize>) = outer.into_iter().unzip();
        let data = noises(20_000, 5);
        let rows = Rows::strided(&data, 9_000, &sizes, &strides, columns);
        prop_assert!(rows.is_ok());
        if let Ok(rows) = rows {
            prop_assert_eq!(rows.count(), sizes.iter().product::<usize>());
            prop_assert!(same_as_a_copy(&rows, p).is_ok());
        }
    }
}
