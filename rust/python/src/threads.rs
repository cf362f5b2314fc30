//! Who runs the kernels' pieces: torch's own threads where it lends them, else this package's pool.
//!
//! torch >= 2.10 exports `torch_parallel_for`. Work that goes through it obeys `torch.set_num_threads` and meets no second
//! pool: OpenMP's threads spin for a while after a piece of work, and another pool would fight them for the cores.
//!
//! OpenMP's threads do not survive `fork`, and a child that asks for them waits for ever where the parent has used them.
//! A forked child therefore uses the pool, which starts anew in each process.
use crate::gate;
use crate::torch::Torch;
use pyo3::prelude::*;
use std::any::Any;
use std::ffi::{CString, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
use vhead_core::threads::{Pool, available_cores};
use vhead_core::{Executor, Serial};

type ParallelFor = unsafe extern "C" fn(i64, i64, i64, unsafe extern "C" fn(i64, i64, *mut c_void), *mut c_void) -> i32;
type GetNumThreads = unsafe extern "C" fn(*mut u32) -> i32;

/// torch's own threads.
#[derive(Debug, Clone, Copy)]
struct TorchThreads {
    parallel_for: ParallelFor,
    get_num_threads: GetNumThreads,
}

static TORCH_THREADS: OnceLock<TorchThreads> = OnceLock::new();
static FORKED: AtomicBool = AtomicBool::new(false);
/// What `VHEAD_NUM_THREADS` asks for; zero: as many as torch uses.
static ASKED: AtomicUsize = AtomicUsize::new(0);

/// Watches for forks; called once, when the module is made.
pub(crate) fn watch_forks() {
    extern "C" fn in_child() {
        FORKED.store(true, Ordering::Relaxed);
    }
    // SAFETY: the handler only stores to an atomic, and this module is never unloaded. Where it cannot be registered (no
    // memory), a forked child behaves as with torch's own operations.
    unsafe { libc::pthread_atfork(None, None, Some(in_child)) };
}

/// Uses `threads` threads from now on; `None`: as many as torch does.
pub(crate) fn ask(threads: Option<usize>) {
    ASKED.store(threads.unwrap_or(0), Ordering::Relaxed);
}

/// Finds torch's threads in the libtorch_cpu at `path`, which must be loaded already: nothing is loaded here.
pub(crate) fn find_torch(path: &str) {
    let Ok(path) = CString::new(path) else { return };
    // SAFETY: RTLD_NOLOAD gives a handle to a library that is there, or null. The two symbols are torch's stable C
    // interface (torch/csrc/stable/c/shim.h), whose signatures the types above repeat.
    unsafe {
        let library = libc::dlopen(path.as_ptr(), libc::RTLD_LAZY | libc::RTLD_NOLOAD);
        if library.is_null() {
            return;
        }
        let parallel_for = libc::dlsym(library, c"torch_parallel_for".as_ptr());
        let get_num_threads = libc::dlsym(library, c"torch_get_num_threads".as_ptr());
        if !parallel_for.is_null() && !get_num_threads.is_null() {
            let _ = TORCH_THREADS.set(TorchThreads {
                parallel_for: std::mem::transmute::<*mut c_void, ParallelFor>(parallel_for),
                get_num_threads: std::mem::transmute::<*mut c_void, GetNumThreads>(get_num_threads),
            });
        }
    }
}

/// What runs a kernel's pieces.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Threads {
    /// The calling thread alone.
    Caller(Serial),
    /// At most so many of torch's own threads.
    Torch(TorchPool),
    /// This package's pool.
    Own(Pool),
}

impl Threads {
    /// The threads for a piece of work in this process, now.
    pub(crate) fn now(py: Python<'_>) -> PyResult<Self> {
        let asked = ASKED.load(Ordering::Relaxed);
        let torch = TORCH_THREADS.get();
        let of_torch = match torch {
            Some(torch) => torch.count(),
            None if asked == 0 => Torch::get(py)?.num_threads(py)?,
            None => 0,
        };
        let threads = if asked == 0 { of_torch } else { asked };
        Ok(match torch {
            _ if threads <= 1 => Self::Caller(Serial),
            Some(torch) if threads <= of_torch && !FORKED.load(Ordering::Relaxed) => {
                Self::Torch(TorchPool { torch: *torch, threads })
            }
            _ => Self::Own(Pool::new(threads)),
        })
    }

    /// The threads for work on arrays that are not torch's, which streams through about `elements` elements: torch's own
    /// where this package's operations have found them, else at most `threads` of this package's pool; `None`: one for
    /// each core that this process may use. Imports nothing.
    pub(crate) fn without_torch(py: Python<'_>, elements: usize, threads: Option<usize>) -> PyResult<Self> {
        if TORCH_THREADS.get().is_some() {
            return Self::worth(py, elements);
        }
        // Counting the cores takes longer than all the arithmetic of a short array.
        let threads = if elements > gate::SMALL { threads.unwrap_or_else(available_cores) } else { 1 };
        Ok(if threads > 1 { Self::Own(Pool::new(threads)) } else { Self::Caller(Serial) })
    }

    /// The threads for work that streams through about `elements` elements: the caller alone where others would not pay.
    pub(crate) fn worth(py: Python<'_>, elements: usize) -> PyResult<Self> {
        if elements > gate::SMALL { Self::now(py) } else { Ok(Self::Caller(Serial)) }
    }

    /// As an executor.
    pub(crate) fn executor(&self) -> &dyn Executor {
        match self {
            Self::Caller(serial) => serial,
            Self::Torch(pool) => pool,
            Self::Own(pool) => pool,
        }
    }

    /// Whose threads they are, as `vhead env` prints it.
    pub(crate) fn source(&self) -> &'static str {
        match self {
            Self::Caller(_) => "caller",
            Self::Torch(_) => "torch",
            Self::Own(_) => "vhead",
        }
    }
}

impl TorchThreads {
    fn count(&self) -> usize {
        let mut count = 0;
        // SAFETY: the function writes one number.
        let status = unsafe { (self.get_num_threads)(&raw mut count) };
        if status == 0 { count as usize } else { 1 }
    }
}

/// Some of torch's own threads.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TorchPool {
    torch: TorchThreads,
    threads: usize,
}

/// What a thread needs to take its share: each takes the next task that nobody has taken.
struct Work<'a> {
    tasks: usize,
    next: AtomicUsize,
    task: &'a (dyn Fn(usize) + Sync),
    panic: AtomicPtr<Box<dyn Any + Send>>,
}

impl Work<'_> {
    fn take_all(&self) {
        loop {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            if index >= self.tasks {
                return;
            }
            (self.task)(index);
        }
    }

    /// Runs tasks without letting a panic reach torch's frames; the first one is kept, and no further task starts.
    unsafe extern "C" fn enter(_begin: i64, _end: i64, context: *mut c_void) {
        // SAFETY: `run` passes a `Work` that outlives the parallel region.
        let work = unsafe { &*context.cast::<Work<'_>>() };
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| work.take_all())) {
            work.next.store(work.tasks, Ordering::Relaxed);
            let panic = Box::into_raw(Box::new(panic));
            let kept = work.panic.compare_exchange(std::ptr::null_mut(), panic, Ordering::AcqRel, Ordering::Acquire);
            if kept.is_err() {
                // SAFETY: made by `into_raw` above and kept by nobody.
                drop(unsafe { Box::from_raw(panic) });
            }
        }
    }

    fn resume_panic(&self) {
        let panic = self.panic.swap(std::ptr::null_mut(), Ordering::AcqRel);
        if !panic.is_null() {
            // SAFETY: made by `into_raw` in `enter`; the swap took it out, so that it is freed once.
            resume_unwind(*unsafe { Box::from_raw(panic) });
        }
    }
}

impl Executor for TorchPool {
    fn threads(&self) -> usize {
        self.threads
    }

    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        if tasks <= 1 {
            return Serial.run(tasks, task);
        }
        let panic = AtomicPtr::new(std::ptr::null_mut());
        let work = Work { tasks, next: AtomicUsize::new(0), task, panic };
        let shares = self.threads.min(tasks) as i64;
        // SAFETY: `work` outlives the call, which returns when every share has run; `enter` never unwinds. A share that
        // finds no task left returns at once, so the result does not depend on how torch deals the shares out.
        let status =
            unsafe { (self.torch.parallel_for)(0, shares, 1, Work::enter, (&raw const work).cast_mut().cast()) };
        if status != 0 {
            work.take_all();
        }
        work.resume_panic();
    }
}
