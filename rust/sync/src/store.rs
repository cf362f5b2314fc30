//! Room for weights that are being verified, which nobody else can reach: small ones in memory, larger ones in a file
//! without a name, whose pages the system can write to disk when memory is short.
use crate::folder::beside;
use crate::{Error, Result};
use memmap2::MmapMut;
use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// What is kept in memory: a head or an adapter, and never a language model.
const MOST_IN_MEMORY: usize = 32 << 20;

/// Private bytes.
#[derive(Debug)]
pub(crate) enum Store {
    Memory(Vec<u8>),
    File(MmapMut),
}

impl Store {
    /// Room for `bytes` bytes, all zero; a file lies in the folder `place`.
    ///
    /// # Errors
    /// The disk is full, or the folder cannot be written.
    pub(crate) fn new(bytes: usize, place: &Path) -> Result<Self> {
        if bytes <= MOST_IN_MEMORY {
            return Ok(Self::Memory(vec![0; bytes]));
        }
        let file = nameless(place)?;
        reserve(&file, bytes).map_err(Error::at(place))?;
        // SAFETY: nobody else can open the file, so that it neither shrinks nor changes under the mapping.
        let map = unsafe { MmapMut::map_mut(&file) }.map_err(Error::at(place))?;
        Ok(Self::File(map))
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        match self {
            Self::Memory(bytes) => bytes,
            Self::File(map) => map,
        }
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Self::Memory(bytes) => bytes,
            Self::File(map) => map,
        }
    }
}

/// A file that is gone as soon as this process has closed it, however that ends.
fn nameless(place: &Path) -> Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600);
    #[cfg(target_os = "linux")]
    if let Ok(file) = options.clone().custom_flags(libc::O_TMPFILE).open(place) {
        return Ok(file);
    }
    let path = place.join(beside("vhead-sync")?);
    let file = options.create_new(true).open(&path).map_err(Error::at(&path))?;
    fs::remove_file(&path).map_err(Error::at(&path))?;
    Ok(file)
}

/// Takes the room now, so that a full disk is an error here and no signal later.
fn reserve(file: &File, bytes: usize) -> std::io::Result<()> {
    file.set_len(bytes as u64)?;
    #[cfg(target_os = "linux")]
    {
        // SAFETY: an open descriptor.
        match unsafe { libc::posix_fallocate(file.as_raw_fd(), 0, bytes as libc::off_t) } {
            0 | libc::EOPNOTSUPP | libc::EINVAL => Ok(()),
            code => Err(std::io::Error::from_raw_os_error(code)),
        }
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = file.as_raw_fd();
        Ok(())
    }
}
