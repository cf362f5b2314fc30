//! A device with its kernels loaded, and launches on it.
use crate::driver::{call, check, explain, start};
use crate::images::{self, Capability, Image};
use crate::kernels::{Function, Functions};
use crate::{Error, Result, driver_version};
use cudarc::driver::sys::{self, CUcontext, CUdevice, CUdevice_attribute, CUmodule, CUresult, CUstream};
use std::ffi::{CStr, c_void};
use std::marker::PhantomData;
use std::sync::OnceLock;

/// More devices than a machine has.
const MOST_DEVICES: usize = 128;

/// What each device is found to be, once it has been asked for: its kernels, or why it has none.
static DEVICES: [OnceLock<Result<Device>>; MOST_DEVICES] = [const { OnceLock::new() }; MOST_DEVICES];

/// A stream as the driver numbers it, of the device that work is sent to; 0 is the default stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stream(pub usize);

impl Stream {
    fn handle(self) -> CUstream {
        std::ptr::with_exposed_provenance_mut(self.0)
    }
}

/// What a device is, and which image runs on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description {
    /// Its name.
    pub name: String,
    /// Its compute capability.
    pub capability: Capability,
    /// The image that it takes; `None` where no image runs there.
    pub image: Option<&'static str>,
    /// Whether this process has loaded the image.
    pub is_loaded: bool,
    /// Why the image could not be loaded.
    pub failure: Option<Error>,
}

/// How many devices the driver sees.
///
/// # Errors
/// [`Error::NoDriver`], [`Error::Start`], [`Error::NoDevice`] or [`Error::Forked`] where it sees none.
pub fn device_count() -> Result<i32> {
    start()?;
    let mut count = 0;
    // SAFETY: the driver has started; it writes one number.
    call("cuDeviceGetCount", unsafe { sys::cuDeviceGetCount(&raw mut count) })?;
    if count > 0 { Ok(count) } else { Err(Error::NoDevice) }
}

/// What device `ordinal` is. This starts the driver, but makes no context and loads nothing.
///
/// # Errors
/// As [`device_count`]; [`Error::Ordinal`] where there are not so many devices.
pub fn describe(ordinal: i32) -> Result<Description> {
    let device = find(ordinal)?;
    let capability = capability(device)?;
    let known = slot(ordinal).and_then(OnceLock::get);
    Ok(Description {
        name: name(device)?,
        capability,
        image: images::choose(capability).map(Image::name),
        is_loaded: Device::is_loaded(ordinal),
        failure: known.and_then(|known| known.as_ref().err().cloned()),
    })
}

fn slot(ordinal: i32) -> Option<&'static OnceLock<Result<Device>>> {
    usize::try_from(ordinal).ok().and_then(|ordinal| DEVICES.get(ordinal))
}

fn find(ordinal: i32) -> Result<CUdevice> {
    let count = device_count()?;
    if !(0..count).contains(&ordinal) {
        return Err(Error::Ordinal { ordinal, count });
    }
    let mut device = 0;
    // SAFETY: the driver has started and has such a device; it writes one number.
    call("cuDeviceGet", unsafe { sys::cuDeviceGet(&raw mut device, ordinal) })?;
    Ok(device)
}

fn name(device: CUdevice) -> Result<String> {
    let mut name = [0_u8; 256];
    // SAFETY: the driver writes a C string of at most this length.
    call("cuDeviceGetName", unsafe { sys::cuDeviceGetName(name.as_mut_ptr().cast(), 256, device) })?;
    Ok(CStr::from_bytes_until_nul(&name).map(|name| name.to_string_lossy().into_owned()).unwrap_or_default())
}

fn capability(device: CUdevice) -> Result<Capability> {
    let attribute = |attribute: CUdevice_attribute| {
        let mut value = 0;
        // SAFETY: the driver writes one number.
        call("cuDeviceGetAttribute", unsafe { sys::cuDeviceGetAttribute(&raw mut value, attribute, device) })?;
        Ok(u32::try_from(value).unwrap_or(0))
    };
    Ok((
        attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
        attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
    ))
}

/// A device whose kernels are loaded, in its primary context: the one that torch and the CUDA runtime use.
#[derive(Debug)]
pub struct Device {
    context: Context,
    module: CUmodule,
    image: &'static str,
    pub(crate) functions: Functions,
}

// SAFETY: the driver's handles may be used from any thread, and nothing here changes after it has been made.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

impl Device {
    /// Device `ordinal` with its kernels, which are loaded at the first call and stay for the life of the process.
    ///
    /// # Errors
    /// [`Error`]; those that [`Error::is_absence`] names are found once and answered from then on.
    pub fn get(ordinal: i32) -> Result<&'static Self> {
        start()?;
        let Some(slot) = slot(ordinal) else { return Err(Error::Ordinal { ordinal, count: device_count()? }) };
        if slot.get().is_none() {
            let opened = Self::open(ordinal);
            match opened {
                Err(error) if !error.is_absence() => return Err(error),
                // Where two threads open a device at once, the second one's module is unloaded again.
                opened => drop(slot.set(opened)),
            }
        }
        match slot.get() {
            Some(Ok(device)) => Ok(device),
            Some(Err(error)) => Err(error.clone()),
            None => Err(Error::NoDevice),
        }
    }

    /// Whether [`Device::get`] has loaded the kernels of device `ordinal` in this process.
    #[must_use]
    pub fn is_loaded(ordinal: i32) -> bool {
        matches!(slot(ordinal).and_then(OnceLock::get), Some(Ok(_)))
    }

    fn open(ordinal: i32) -> Result<Self> {
        let device = find(ordinal)?;
        let capability = capability(device)?;
        let Some(image) = images::choose(capability) else {
            let images = images::images().collect::<Vec<_>>().join(", ");
            return Err(Error::NoImage { device: name(device)?, capability, images });
        };
        let context = Context::retain(device)?;
        let current = context.make_current()?;
        let module = load(image)?;
        // SAFETY: just loaded, and on an error nobody has a handle to it.
        let functions = Functions::read(module).inspect_err(|_| unsafe { unload(module) })?;
        drop(current);
        Ok(Self { context, module, image: image.name(), functions })
    }

    /// Name of the image that runs on it.
    #[must_use]
    pub fn image(&self) -> &'static str {
        self.image
    }

    /// Sends a kernel to `stream`.
    ///
    /// # Safety
    /// `arguments` must be the kernel's, in its order and of its types; the memory that they point to must be the device's,
    /// large enough, and not in use by work that is not ordered before or after this.
    pub(crate) unsafe fn launch<const N: usize>(
        &self,
        function: &Function,
        geometry: Geometry,
        stream: Stream,
        arguments: [Argument<'_>; N],
    ) -> Result<()> {
        let _current = self.context.make_current()?;
        let mut pointers = arguments.map(|argument| argument.pointer);
        let (grid, block) = (geometry.grid, geometry.block);
        // SAFETY: the context is current, the function is of its module; the driver copies the arguments before it returns,
        // and the caller promises that they fit.
        let result = unsafe {
            sys::cuLaunchKernel(
                function.handle,
                grid[0],
                grid[1],
                1,
                block[0],
                block[1],
                1,
                0,
                stream.handle(),
                pointers.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        check("cuLaunchKernel", result).map_err(|failure| match explain(failure) {
            Error::Driver(failure) => Error::Launch { kernel: function.name.clone(), failure },
            error => error,
        })
    }

    /// Sets `bytes` bytes from `address` on to zero, on `stream`.
    ///
    /// # Safety
    /// As [`Device::launch`].
    pub(crate) unsafe fn clear(&self, address: u64, bytes: u64, stream: Stream) -> Result<()> {
        let _current = self.context.make_current()?;
        let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
        // SAFETY: the context is current; the caller promises the rest.
        call("cuMemsetD8Async", unsafe { sys::cuMemsetD8Async(address, 0, bytes, stream.handle()) })
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if let Ok(_current) = self.context.make_current() {
            // SAFETY: loaded in this context, which is current, and dropped once.
            unsafe { unload(self.module) };
        }
    }
}

/// Blocks, and threads of a block, in the first two dimensions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Geometry {
    pub(crate) grid: [u32; 2],
    pub(crate) block: [u32; 2],
}

/// A kernel's argument, which the driver copies when the kernel is launched.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Argument<'a> {
    pointer: *mut c_void,
    value: PhantomData<&'a ()>,
}

impl<'a, T: Copy> From<&'a T> for Argument<'a> {
    fn from(value: &'a T) -> Self {
        Self { pointer: std::ptr::from_ref(value).cast_mut().cast(), value: PhantomData }
    }
}

/// A device's primary context, held.
#[derive(Debug)]
struct Context {
    handle: CUcontext,
    device: CUdevice,
}

impl Context {
    fn retain(device: CUdevice) -> Result<Self> {
        let mut handle = std::ptr::null_mut();
        // SAFETY: the driver has started and has this device; it writes a handle.
        call("cuDevicePrimaryCtxRetain", unsafe { sys::cuDevicePrimaryCtxRetain(&raw mut handle, device) })?;
        Ok(Self { handle, device })
    }

    /// Makes it the calling thread's context until the guard is dropped, which restores the one before: the CUDA runtime's
    /// current device, and so torch's, is the current context's.
    fn make_current(&self) -> Result<Current> {
        // SAFETY: the context is held.
        call("cuCtxPushCurrent", unsafe { sys::cuCtxPushCurrent_v2(self.handle) })?;
        Ok(Current { thread: PhantomData })
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained once, released once. A failure leaves it held, which harms nobody.
        let _ = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}

/// A context that is current on this thread.
struct Current {
    thread: PhantomData<*mut ()>,
}

impl Drop for Current {
    fn drop(&mut self) {
        let _ = self.thread;
        let mut popped = std::ptr::null_mut();
        // SAFETY: pushed on this thread by the one who made this guard.
        let _ = unsafe { sys::cuCtxPopCurrent_v2(&raw mut popped) };
    }
}

/// What a driver answers to an image that it will never load.
const REFUSALS: [CUresult; 6] = [
    CUresult::CUDA_ERROR_INVALID_IMAGE,
    CUresult::CUDA_ERROR_INVALID_PTX,
    CUresult::CUDA_ERROR_INVALID_SOURCE,
    CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU,
    CUresult::CUDA_ERROR_JIT_COMPILER_NOT_FOUND,
    CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION,
];

/// Loads an image in the current context.
fn load(image: &Image) -> Result<CUmodule> {
    let (bytes, mut module) = (image.read()?, std::ptr::null_mut());
    // SAFETY: a context is current; the bytes are a whole image, which the driver copies.
    let result = unsafe { sys::cuModuleLoadData(&raw mut module, bytes.as_ptr().cast()) };
    check("cuModuleLoadData", result).map(|()| module).map_err(|failure| {
        if REFUSALS.into_iter().any(|refusal| refusal as u32 == failure.code) {
            return Error::Load { image: image.name(), driver: driver_version().unwrap_or(0), failure };
        }
        explain(failure)
    })
}

/// Gives a module back. A failure leaves it loaded, which harms nobody.
///
/// # Safety
/// Its context must be current, and its handle not used again.
unsafe fn unload(module: CUmodule) {
    // SAFETY: as the caller promises.
    let _ = unsafe { sys::cuModuleUnload(module) };
}
