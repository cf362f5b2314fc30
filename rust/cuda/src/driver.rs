//! The driver library: whether it is there, whether it started, what its answers mean.
//!
//! cudarc opens the library at the first call and panics where there is none, so nothing here is called before
//! [`start`] has looked for it.
use crate::{Error, Failure, Result};
use cudarc::driver::sys::{self, CUresult};
use std::ffi::{CStr, c_char, c_void};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

/// The library that the driver installs; it comes with no toolkit.
const LIBRARY: (&CStr, &str) = (c"libcuda.so.1", "libcuda.so.1");
/// What the emulated driver of the tests exports, whose device memory is the process's own: whether the calling thread means
/// the device's memory, where it speaks of the process's.
const MOCK: &CStr = c"vhead_mock_takes_memory";

/// The process that started the driver; zero before that.
static STARTED_IN: AtomicU32 = AtomicU32::new(0);

/// The error for a driver function that did not succeed.
pub(crate) fn check(call: &'static str, result: CUresult) -> std::result::Result<(), Failure> {
    if result == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let describe = |function: unsafe fn(CUresult, *mut *const c_char) -> CUresult| {
        let mut text = std::ptr::null();
        // SAFETY: both functions write a pointer to a static string, or null for a code that they do not know.
        unsafe {
            let _ = function(result, &raw mut text);
            if text.is_null() { None } else { Some(CStr::from_ptr(text).to_string_lossy().into_owned()) }
        }
    };
    let name = describe(sys::cuGetErrorName).unwrap_or_else(|| "unknown code".to_owned());
    let text = describe(sys::cuGetErrorString).unwrap_or_else(|| "no description".to_owned());
    Err(Failure { call, code: result as u32, name, text })
}

/// The error that fits a failure, whatever the call.
pub(crate) fn explain(failure: Failure) -> Error {
    match failure.code {
        code if code == CUresult::CUDA_ERROR_OUT_OF_MEMORY as u32 => Error::OutOfMemory(failure),
        _ => Error::Driver(failure),
    }
}

/// [`check`], with its failure as an error.
pub(crate) fn call(call: &'static str, result: CUresult) -> Result<()> {
    check(call, result).map_err(explain)
}

/// Starts the driver, where it has not been started yet.
///
/// # Errors
/// [`Error::NoDriver`], [`Error::Start`], [`Error::NoDevice`], and [`Error::Forked`] in a child of the process in which it
/// was started.
pub(crate) fn start() -> Result<()> {
    let process = std::process::id();
    match STARTED_IN.load(Ordering::Acquire) {
        0 => {}
        known if known == process => return Ok(()),
        _ => return Err(Error::Forked),
    }
    if library().is_none() {
        return Err(Error::NoDriver(LIBRARY.1));
    }
    // SAFETY: the library is there, and the function has no other requirement.
    match check("cuInit", unsafe { sys::cuInit(0) }) {
        Ok(()) => STARTED_IN.store(process, Ordering::Release),
        Err(failure) => return Err(explain_start(failure)),
    }
    Ok(())
}

fn explain_start(failure: Failure) -> Error {
    match failure.code {
        code if code == CUresult::CUDA_ERROR_NO_DEVICE as u32 => Error::NoDevice,
        // Somebody else, such as torch, had started the driver before the fork.
        code if code == CUresult::CUDA_ERROR_NOT_INITIALIZED as u32 => Error::Forked,
        _ => Error::Start(failure),
    }
}

/// The driver library, once it has been looked for.
static LIBRARY_HANDLE: OnceLock<Option<Library>> = OnceLock::new();

/// A handle to the driver library, which is never closed.
struct Library {
    /// The emulated driver's function, where this is the emulated driver.
    mock: Option<MockTakesMemory>,
}

type MockTakesMemory = unsafe extern "C" fn() -> i32;

/// The driver library, which is opened at the first call; `None` where there is none.
fn library() -> Option<&'static Library> {
    let open = || {
        // SAFETY: opening the driver library runs its initialisers, which is what every CUDA program does.
        let handle = unsafe { libc::dlopen(LIBRARY.0.as_ptr(), libc::RTLD_LAZY) };
        if handle.is_null() {
            return None;
        }
        // SAFETY: the handle is open for good, and the name is a C string.
        let mock = unsafe { libc::dlsym(handle, MOCK.as_ptr()) };
        // SAFETY: a library that exports this name is the tests' own, whose function has this type; null is `None`.
        Some(Library { mock: unsafe { std::mem::transmute::<*mut c_void, Option<MockTakesMemory>>(mock) } })
    };
    LIBRARY_HANDLE.get_or_init(open).as_ref()
}

/// Whether the driver is the tests' emulation: then, and only then, an address of this process is one of device 0.
#[must_use]
pub fn is_emulated() -> bool {
    library().is_some_and(|library| library.mock.is_some())
}

/// Whether a tensor in this process's memory is to be taken for one of the emulated device, as the calling thread has told
/// the emulated driver. Where no driver has been looked for yet this does not look for one.
#[must_use]
pub fn takes_host_memory() -> bool {
    let mock = LIBRARY_HANDLE.get().and_then(|library| library.as_ref()?.mock);
    // SAFETY: the function takes nothing and reads a flag of the calling thread.
    mock.is_some_and(|takes_memory| unsafe { takes_memory() } != 0)
}

/// The newest CUDA version that the driver knows: 12040 is 12.4.
///
/// # Errors
/// As [`crate::describe`].
pub fn driver_version() -> Result<i32> {
    start()?;
    let mut version = 0;
    // SAFETY: the driver has started; it writes one number.
    call("cuDriverGetVersion", unsafe { sys::cuDriverGetVersion(&raw mut version) })?;
    Ok(version)
}
