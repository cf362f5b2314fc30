//! Who runs the pieces of a kernel. No result depends on it.
//!
//! rayon's global pool hangs in a forked child whose parent has used it: the child has no worker threads, and waits for
//! them. So this crate keeps a pool of its own, forgets it in a child of `fork`, and builds another there. Work never
//! reaches the global pool.
use crate::{Error, Result};
use rayon::{ThreadPool, ThreadPoolBuilder};
use std::marker::PhantomData;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Once, OnceLock};

/// Runs numbered tasks, in any order, on any number of threads.
pub trait Executor: Sync {
    /// Threads this executor would use for a large piece of work.
    fn threads(&self) -> usize;
    /// Calls `task(i)` once for each `i` below `tasks`; returns when all are done.
    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync));
}

/// Everything on the calling thread.
#[derive(Debug, Clone, Copy, Default)]
pub struct Serial;

impl Executor for Serial {
    fn threads(&self) -> usize {
        1
    }
    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        (0..tasks).for_each(task);
    }
}

/// This crate's own pool of `threads` threads (rayon), which survives `fork`: a child starts a new one.
#[derive(Debug, Clone, Copy)]
pub struct Pool {
    threads: usize,
}

impl Pool {
    /// More threads than this are never started.
    pub const MOST_THREADS: usize = 1024;

    /// A pool of at most `threads` threads, the calling one included; the others are started on first use and shared by
    /// the process.
    #[must_use]
    pub fn new(threads: usize) -> Self {
        Self { threads: threads.clamp(1, Self::MOST_THREADS) }
    }
}

impl Executor for Pool {
    fn threads(&self) -> usize {
        self.threads
    }

    /// The calling thread takes part, so that a wake-up costs no more than the work it saves. Where threads cannot be
    /// started it does everything.
    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        let helpers = self.threads.min(tasks).saturating_sub(1);
        let Some(workers) = (helpers > 0).then(|| workers(helpers)).flatten() else {
            return Serial.run(tasks, task);
        };
        let next = AtomicUsize::new(0);
        let work = || {
            while let Some(i) = Some(next.fetch_add(1, Ordering::Relaxed)).filter(|i| *i < tasks) {
                task(i);
            }
        };
        workers.in_place_scope(|scope| {
            (0..helpers).for_each(|_| scope.spawn(|_| work()));
            work();
        });
    }
}

/// The process's worker threads; null until they are needed, and again in a forked child.
static WORKERS: AtomicPtr<Workers> = AtomicPtr::new(std::ptr::null_mut());

struct Workers {
    threads: usize,
    pool: ThreadPool,
}

/// At least `threads` worker threads. Too small a set is replaced and leaked (another thread may be using it): its threads
/// sleep from then on. `None` where the system has no more threads to give.
fn workers(threads: usize) -> Option<&'static ThreadPool> {
    forget_workers_in_children();
    let current = WORKERS.load(Ordering::Acquire);
    // SAFETY: what `WORKERS` points at is never freed.
    if let Some(workers) = unsafe { current.as_ref() }.filter(|workers| workers.threads >= threads) {
        return Some(&workers.pool);
    }
    let name = |i| format!("vhead-{i}");
    let pool = ThreadPoolBuilder::new().num_threads(threads).thread_name(name).build().ok()?;
    let new = Box::leak(Box::new(Workers { threads, pool }));
    // Of two threads that get here at once one pool is lost sight of, which costs sleeping threads and nothing else.
    WORKERS.store(new, Ordering::Release);
    Some(&new.pool)
}

/// Has `fork` reset [`WORKERS`] in the child, where none of the threads exist. The old pool is leaked: dropping it would
/// wait for them.
fn forget_workers_in_children() {
    static REGISTERED: Once = Once::new();
    #[cfg(unix)]
    REGISTERED.call_once(|| {
        extern "C" fn forget() {
            WORKERS.store(std::ptr::null_mut(), Ordering::Release);
        }
        // SAFETY: the handler stores to an atomic, which is all that a child may do between `fork` and `exec`.
        unsafe { libc::pthread_atfork(None, None, Some(forget)) };
    });
}

/// The cores that this process may use: what affinity and the quota of its control group leave, at least 1.
#[must_use]
pub fn available_cores() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// A mutable slice that tasks write to, each to its own part.
pub(crate) struct Shared<'a, T> {
    data: *mut T,
    length: usize,
    owner: PhantomData<&'a mut [T]>,
}

// SAFETY: a `Shared` is a mutable borrow; `Shared::slice` makes its callers promise that parts do not overlap.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    pub(crate) fn new(data: &'a mut [T]) -> Self {
        Self { data: data.as_mut_ptr(), length: data.len(), owner: PhantomData }
    }

    /// The start of the whole slice.
    pub(crate) fn as_mut_ptr(&self) -> *mut T {
        self.data
    }

    /// A part of the slice.
    ///
    /// # Safety
    /// No two parts that are alive at the same time overlap.
    ///
    /// # Panics
    /// Where the part is not inside the slice.
    #[expect(clippy::mut_from_ref, reason = "parts do not overlap, as the caller promises")]
    pub(crate) unsafe fn slice(&self, start: usize, length: usize) -> &mut [T] {
        assert!(start <= self.length && length <= self.length - start);
        // SAFETY: inside the slice, and nobody else has it.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(start), length) }
    }
}

/// Calls `task(i, part)` for the parts of `length` elements that `data` consists of; the last may be shorter.
pub(crate) fn for_each_chunk<T: Send>(
    executor: &dyn Executor,
    data: &mut [T],
    length: usize,
    task: impl Fn(usize, &mut [T]) + Sync,
) {
    let (total, shared) = (data.len(), Shared::new(data));
    executor.run(total.div_ceil(length), &|i| {
        let start = i * length;
        // SAFETY: task `i` runs once and no other has this part.
        task(i, unsafe { shared.slice(start, length.min(total - start)) });
    });
}

/// [`for_each_chunk`] with a task that can fail.
///
/// # Errors
/// As [`try_run`].
pub(crate) fn try_for_each_chunk<T: Send>(
    executor: &dyn Executor,
    data: &mut [T],
    length: usize,
    task: impl Fn(usize, &mut [T]) -> Result<()> + Sync,
) -> Result<()> {
    let failure = OnceLock::new();
    for_each_chunk(executor, data, length, |i, part| note(&failure, || task(i, part)));
    failure.into_inner().map_or(Ok(()), Err)
}

/// Runs tasks that can fail.
///
/// # Errors
/// That of one that failed; those that had not started then were left out.
pub(crate) fn try_run(
    executor: &dyn Executor,
    tasks: usize,
    task: &(dyn Fn(usize) -> Result<()> + Sync),
) -> Result<()> {
    let failure = OnceLock::new();
    executor.run(tasks, &|i| note(&failure, || task(i)));
    failure.into_inner().map_or(Ok(()), Err)
}

/// Runs a task unless another one has failed.
fn note(failure: &OnceLock<Error>, task: impl FnOnce() -> Result<()>) {
    if failure.get().is_none()
        && let Err(error) = task()
    {
        // Of two that fail at once, one is enough.
        let _ = failure.set(error);
    }
}

/// Asks for huge pages under a large buffer that is about to be overwritten; nothing happens where there are none.
///
/// A large allocation is freshly mapped memory, and taking a fault for every 4 KiB of it costs more time than computing
/// what is written there. Linux only, from 4 MiB on; whole huge pages inside `data` are advised.
pub fn advise_huge_pages<T>(data: &mut [T]) {
    #[cfg(target_os = "linux")]
    {
        const HUGE: usize = 2 << 20;
        let (start, bytes) = (data.as_mut_ptr().cast::<u8>(), size_of_val(data));
        let skip = start.addr().next_multiple_of(HUGE) - start.addr();
        if bytes >= 2 * HUGE {
            let interior = (bytes - skip) / HUGE * HUGE;
            // SAFETY: the pages lie inside `data`, and the advice changes nothing that can be read.
            unsafe { libc::madvise(start.wrapping_add(skip).cast(), interior, libc::MADV_HUGEPAGE) };
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = data;
}
