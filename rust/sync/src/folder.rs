//! Folders held open: what is in them is reached from their descriptor, so that no name of a manifest leads elsewhere.
use crate::{Error, Result};
use std::ffi::{CString, OsString};
use std::fs::{self, File};
use std::io::{Error as IoError, Read};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Names that have not taken their place end like this.
pub(crate) const UNFINISHED: &str = ".unfinished";

/// An open folder.
#[derive(Debug)]
pub(crate) struct Folder {
    file: File,
    path: PathBuf,
}

impl Folder {
    /// The folder at a path that the caller gave, which may lead through links.
    pub(crate) fn at(path: &Path) -> Result<Self> {
        Self::open(libc::AT_FDCWD, path, path.to_owned(), 0)
    }

    /// A folder in this one; never a link.
    pub(crate) fn folder(&self, name: &str) -> Result<Self> {
        Self::open(self.file.as_raw_fd(), Path::new(name), self.path.join(name), libc::O_NOFOLLOW)
    }

    fn open(near: RawFd, name: &Path, path: PathBuf, flags: i32) -> Result<Self> {
        let file = open_at(near, name, libc::O_RDONLY | libc::O_DIRECTORY | flags).map_err(|error| {
            match error.raw_os_error() {
                Some(libc::ENOTDIR | libc::ELOOP) => Error::damaged(&path, "a folder", "something else of that name"),
                _ => Error::at(&path)(error),
            }
        })?;
        Ok(Self { file, path })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The path of something in this folder, for messages.
    pub(crate) fn place(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// A regular file in this folder, to be read, and its length.
    pub(crate) fn file(&self, name: &str) -> Result<(File, u64)> {
        let place = self.place(name);
        // Without waiting: opening a pipe would, for whoever writes to it.
        let flags = libc::O_RDONLY | libc::O_NOFOLLOW | libc::O_NONBLOCK;
        let file =
            open_at(self.file.as_raw_fd(), Path::new(name), flags).map_err(|error| match error.raw_os_error() {
                Some(libc::ELOOP) => Error::damaged(&place, "a file", "a link"),
                _ => Error::at(&place)(error),
            })?;
        let found = file.metadata().map_err(Error::at(&place))?;
        if found.is_file() { Ok((file, found.len())) } else { Err(Error::damaged(&place, "a file", "something else")) }
    }

    /// The whole content of a small file.
    pub(crate) fn read(&self, name: &str, most: u64) -> Result<Vec<u8>> {
        let (file, length) = self.file(name)?;
        if length > most {
            return Err(Error::damaged(&self.place(name), format!("at most {most} bytes"), length));
        }
        let mut bytes = Vec::new();
        file.take(most).read_to_end(&mut bytes).map_err(Error::at(&self.place(name)))?;
        Ok(bytes)
    }

    /// A new file in this folder, to be written and read back.
    pub(crate) fn create(&self, name: &str) -> Result<File> {
        let flags = libc::O_RDWR | libc::O_CREAT | libc::O_EXCL | libc::O_NOFOLLOW;
        open_at(self.file.as_raw_fd(), Path::new(name), flags).map_err(Error::at(&self.place(name)))
    }

    /// A new file with this content, on its way to the disk.
    pub(crate) fn put(&self, name: &str, bytes: &[u8]) -> Result<File> {
        let file = self.create(name)?;
        file.write_all_at(bytes, 0).map_err(Error::at(&self.place(name)))?;
        begin_flush(&file, 0, bytes.len());
        Ok(file)
    }

    /// A new file with this content, on disk when this returns.
    pub(crate) fn write(&self, name: &str, bytes: &[u8]) -> Result<()> {
        self.put(name, bytes)?.sync_all().map_err(Error::at(&self.place(name)))
    }

    /// A new folder in this one.
    pub(crate) fn make(&self, name: &str) -> Result<Self> {
        let text = c_name(Path::new(name)).map_err(Error::at(&self.place(name)))?;
        // SAFETY: an open descriptor and a string that ends in a zero.
        checked(unsafe { libc::mkdirat(self.file.as_raw_fd(), text.as_ptr(), 0o777) })
            .map_err(Error::at(&self.place(name)))?;
        self.folder(name)
    }

    /// Gives something in this folder another name, replacing a file or an empty folder of that name.
    pub(crate) fn rename(&self, from: &str, to: &str) -> std::io::Result<()> {
        let (from, to) = (c_name(Path::new(from))?, c_name(Path::new(to))?);
        let folder = self.file.as_raw_fd();
        // SAFETY: an open descriptor and strings that end in a zero.
        checked(unsafe { libc::renameat(folder, from.as_ptr(), folder, to.as_ptr()) }).map(|_| ())
    }

    /// Waits until the folder's list of names is on disk.
    pub(crate) fn sync(&self) -> Result<()> {
        self.file.sync_all().map_err(Error::at(&self.path))
    }

    /// What is in the folder, in no order. Names that are no text belong to nobody here.
    pub(crate) fn names(&self) -> Result<Vec<String>> {
        let entries = fs::read_dir(&self.path).map_err(Error::at(&self.path))?;
        let names = entries.map(|entry| entry.map(|entry| entry.file_name()));
        let names: std::io::Result<Vec<OsString>> = names.collect();
        Ok(names.map_err(Error::at(&self.path))?.into_iter().filter_map(|name| name.into_string().ok()).collect())
    }

    /// Removes a folder with all that is in it, or a file, if it is there.
    pub(crate) fn remove(&self, name: &str) -> Result<()> {
        let place = self.place(name);
        let Ok(found) = fs::symlink_metadata(&place) else { return Ok(()) };
        let removed = if found.is_dir() { fs::remove_dir_all(&place) } else { fs::remove_file(&place) };
        match removed.map_err(Error::at(&place)) {
            Err(Error::Vanished { .. }) => Ok(()),
            other => other,
        }
    }

    /// Holds the right to publish in this folder until the result is dropped; `None` where another process has it.
    ///
    /// A file system without locks gives everybody the right: there, publishers notice each other by `LATEST` alone.
    pub(crate) fn lock(&self, name: &str) -> Result<Option<File>> {
        let flags = libc::O_RDWR | libc::O_CREAT | libc::O_NOFOLLOW | libc::O_NONBLOCK;
        let place = self.place(name);
        let file = open_at(self.file.as_raw_fd(), Path::new(name), flags).map_err(Error::at(&place))?;
        if !file.metadata().map_err(Error::at(&place))?.is_file() {
            return Err(Error::damaged(&place, "a file", "something else"));
        }
        // SAFETY: an open descriptor.
        match checked(unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) }) {
            Ok(_) => Ok(Some(file)),
            Err(error) => match error.raw_os_error() {
                Some(libc::EWOULDBLOCK) => Ok(None),
                Some(libc::ENOLCK | libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL) => Ok(Some(file)),
                _ => Err(Error::at(&place)(error)),
            },
        }
    }
}

/// A name beside `name` that nobody else has.
pub(crate) fn beside(name: &str) -> Result<String> {
    let mut random = [0_u8; 8];
    let source = Path::new("/dev/urandom");
    File::open(source).and_then(|mut file| file.read_exact(&mut random)).map_err(Error::at(source))?;
    Ok(format!(".{name}.{:016x}{UNFINISHED}", u64::from_ne_bytes(random)))
}

/// What is to replace a file of a folder in one step: written already, under a name that nobody reads.
#[derive(Debug)]
pub(crate) struct Replacement {
    name: &'static str,
    unfinished: String,
    file: Option<File>,
}

impl Replacement {
    pub(crate) fn new(folder: &Folder, name: &'static str, bytes: &[u8]) -> Result<Self> {
        let mut made = Self { name, unfinished: beside(name)?, file: None };
        match folder.put(&made.unfinished, bytes) {
            Ok(file) => made.file = Some(file),
            Err(error) => {
                made.abandon(folder);
                return Err(error);
            }
        }
        Ok(made)
    }

    /// Waits until it is on the disk, under the name that it has now.
    pub(crate) fn sync(&self, folder: &Folder) -> Result<()> {
        let synced = self.file.as_ref().map_or(Ok(()), File::sync_all);
        synced.map_err(Error::at(&folder.place(&self.unfinished)))
    }

    /// Replaces the file, and waits until that is on the disk.
    pub(crate) fn place(self, folder: &Folder) -> Result<()> {
        let placed = folder.rename(&self.unfinished, self.name).map_err(Error::at(&folder.place(self.name)));
        if placed.is_err() {
            self.abandon(folder);
        }
        placed.and_then(|()| folder.sync())
    }

    /// Removes it.
    pub(crate) fn abandon(&self, folder: &Folder) {
        // The first error is the one to report; what is left over is only a file that nobody names.
        let _ = folder.remove(&self.unfinished);
    }
}

/// Has the system begin to bring what was written to the disk, without waiting.
pub(crate) fn begin_flush(file: &File, start: u64, bytes: usize) {
    #[cfg(target_os = "linux")]
    // SAFETY: an open descriptor. That this is not begun is no error: whoever has to know that it is done waits later.
    unsafe {
        libc::sync_file_range(file.as_raw_fd(), start as i64, bytes as i64, libc::SYNC_FILE_RANGE_WRITE);
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (file, start, bytes);
}

fn open_at(near: RawFd, name: &Path, flags: i32) -> std::io::Result<File> {
    let text = c_name(name)?;
    // SAFETY: a descriptor, a string that ends in a zero, and the permissions that creating a file takes.
    let descriptor = checked(unsafe { libc::openat(near, text.as_ptr(), flags | libc::O_CLOEXEC, 0o666) })?;
    // SAFETY: just opened, and owned by nobody else.
    Ok(unsafe { File::from_raw_fd(descriptor) })
}

fn c_name(name: &Path) -> std::io::Result<CString> {
    CString::new(name.as_os_str().as_bytes()).map_err(|_| IoError::from_raw_os_error(libc::EINVAL))
}

fn checked(code: i32) -> std::io::Result<i32> {
    if code < 0 { Err(IoError::last_os_error()) } else { Ok(code) }
}
