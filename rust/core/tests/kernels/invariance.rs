//! A row's value depends on the row alone; nothing depends on threads.
use crate::for_each_dtype;
use crate::support::Case;
use vhead_core::{Element, Executor, Level, Pool, Result, Rows, Serial, value_head};

/// Runs tasks from the last to the first.
struct Backwards;

impl Executor for Backwards {
    fn threads(&self) -> usize {
        3
    }
    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        (0..tasks).rev().for_each(task);
    }
}

#[test]
fn threads_and_their_order_change_nothing() -> Result<()> {
    for_each_dtype!(same_on_any_executor());
    Ok(())
}

fn same_on_any_executor<T: Element>() -> Result<()> {
    for (rows, columns, p) in [(700, 300, 0.1), (300, 2100, 0.0), (1100, 64, 0.5)] {
        let case = Case::<T>::new(rows, columns, 1, p)?;
        let expected = case.run(Level::best())?;
        let executors: [&dyn Executor; 5] = [&Serial, &Pool::new(1), &Pool::new(2), &Pool::new(5), &Backwards];
        for executor in executors {
            assert!(case.run_on(Level::best(), &case.hidden()?, executor)? == expected);
        }
    }
    Ok(())
}

#[test]
fn a_row_alone_has_the_value_it_has_in_a_batch() -> Result<()> {
    for_each_dtype!(same_alone(1));
    for_each_dtype!(same_alone(3));
    Ok(())
}

fn same_alone<T: Element>(outputs: usize) -> Result<()> {
    let case = Case::<T>::new(400, 777, outputs, 0.0)?;
    let mut values = vec![0.0; 400 * outputs];
    value_head(&case.hidden()?, &case.head()?, None, &mut values, &Pool::new(2))?;
    for (row, expected) in case.data.chunks(777).zip(values.chunks(outputs)) {
        let mut alone = vec![0.0; outputs];
        value_head(&Rows::contiguous(row, 1, 777)?, &case.head()?, None, &mut alone, &Serial)?;
        assert!(alone.iter().zip(expected).all(|(a, b)| a.to_bits() == b.to_bits()));
    }
    Ok(())
}

/// Negative control: with dropout the row's number is part of its mask, so that a row alone has another value.
#[test]
fn a_row_alone_with_dropout_differs() -> Result<()> {
    let case = Case::<f32>::new(3, 777, 1, 0.5)?;
    let values = case.run(Level::best())?.values;
    let mut alone = [0.0];
    let third = Rows::contiguous(&case.data[2 * 777..], 1, 777)?;
    value_head(&third, &case.head()?, case.dropout.as_ref(), &mut alone, &Serial)?;
    assert!(alone[0].to_bits() != values[2].to_bits());
    Ok(())
}

#[test]
fn a_pool_runs_each_task_once() {
    use std::sync::atomic::{AtomicUsize, Ordering};
    for (threads, tasks) in [(1, 5), (2, 1), (2, 0), (2, 100), (7, 1000), (3, 2)] {
        let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
        Pool::new(threads).run(tasks, &|i| {
            counts[i].fetch_add(1, Ordering::Relaxed);
        });
        assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1), "{threads} {tasks}");
    }
}

#[test]
fn a_pool_uses_no_more_threads_than_asked_for() {
    let names = std::sync::RwLock::new(std::collections::HashSet::new());
    Pool::new(8).run(64, &|_| std::thread::sleep(std::time::Duration::from_millis(1)));
    Pool::new(2).run(64, &|_| {
        std::thread::sleep(std::time::Duration::from_millis(1));
        if let Ok(mut names) = names.write() {
            names.insert(std::thread::current().id());
        }
    });
    assert_eq!(names.read().map_or(0, |names| names.len()), 2);
}
