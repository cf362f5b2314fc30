//! A child of `fork` whose parent has used the pool uses its own.
#![cfg(unix)]
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use vhead_core::{Executor, Pool};

fn count_to(tasks: usize) -> bool {
    let count = AtomicUsize::new(0);
    Pool::new(3).run(tasks, &|_| {
        std::thread::sleep(Duration::from_millis(1));
        count.fetch_add(1, Ordering::Relaxed);
    });
    count.into_inner() == tasks
}

/// Exit status of a forked child that runs `work`; `None` where it did not end in time.
fn in_child(limit: Duration, work: impl FnOnce() -> bool) -> Option<i32> {
    // SAFETY: the child runs `work` and leaves by `_exit`; the C library's locks are in order after its `fork`.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let code = if work() { 0 } else { 1 };
        // SAFETY: ends the child without the parent's clean-up.
        unsafe { libc::_exit(code) };
    }
    let (start, mut status) = (Instant::now(), 0);
    while start.elapsed() < limit {
        // SAFETY: waits for the child that was just made.
        if unsafe { libc::waitpid(child, &raw mut status, libc::WNOHANG) } == child {
            return Some(status);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    // SAFETY: ends that child, and takes its status.
    unsafe {
        libc::kill(child, libc::SIGKILL);
        libc::waitpid(child, &raw mut status, 0);
    }
    None
}

#[test]
fn the_pool_survives_fork() {
    assert!(count_to(20));
    assert_eq!(in_child(Duration::from_secs(20), || count_to(20)), Some(0));
    // A child of the child, and the parent afterwards.
    let grandchild = || count_to(20) && in_child(Duration::from_secs(10), || count_to(20)) == Some(0);
    assert_eq!(in_child(Duration::from_secs(20), grandchild), Some(0));
    assert!(count_to(20));
}

/// Negative control: a pool that is kept over `fork` hangs in the child.
#[test]
fn a_pool_that_is_kept_does_not() -> Result<(), rayon::ThreadPoolBuildError> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build()?;
    assert_eq!(pool.install(|| 5), 5);
    assert_eq!(in_child(Duration::from_millis(500), || pool.install(|| 5) == 5), None);
    Ok(())
}
