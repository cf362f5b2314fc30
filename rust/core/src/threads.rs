//! Who runs the pieces of a kernel. No result depends on it.

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
    /// A pool of at most `threads` threads; threads are started on first use and shared by the process.
    #[must_use]
    pub fn new(threads: usize) -> Self {
        Self { threads: threads.max(1) }
    }
}

impl Executor for Pool {
    fn threads(&self) -> usize {
        self.threads
    }
    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        Serial.run(tasks, task); // placeholder until the pool lands
    }
}
