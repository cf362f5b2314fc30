//! The compiled kernels that this crate carries, and which of them runs on a device.
//!
//! `tools/cuda_images.py` makes them from `rust/cuda/kernels` and keeps them as zlib streams. An image for an architecture
//! runs on devices of the same major version and the same or a later minor one. PTX runs on every later architecture, which
//! the driver compiles it for when it is loaded.
use crate::{Error, Result};

/// A device's or an image's architecture: major and minor version.
pub type Capability = (u32, u32);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Machine,
    Ptx,
}

/// The kernels, compiled for one architecture.
#[derive(Debug)]
pub(crate) struct Image {
    name: &'static str,
    kind: Kind,
    capability: Capability,
    compressed: &'static [u8],
}

macro_rules! image {
    ($kind:ident, $capability:expr, $name:literal, $extension:literal) => {
        Image {
            name: $name,
            kind: Kind::$kind,
            capability: $capability,
            compressed: include_bytes!(concat!("../images/", $name, $extension)),
        }
    };
}

static IMAGES: [Image; 5] = [
    image!(Machine, (8, 0), "sm_80", ".cubin.zlib"),
    image!(Machine, (9, 0), "sm_90", ".cubin.zlib"),
    image!(Machine, (10, 0), "sm_100", ".cubin.zlib"),
    image!(Machine, (12, 0), "sm_120", ".cubin.zlib"),
    image!(Ptx, (8, 0), "compute_80", ".ptx.zlib"),
];

/// Names of the images that there are.
pub fn images() -> impl Iterator<Item = &'static str> {
    IMAGES.iter().map(|image| image.name)
}

/// The image for devices of `capability`: the nearest of its major version, else PTX; `None` where neither runs there.
pub(crate) fn choose(capability: Capability) -> Option<&'static Image> {
    let machine = |image: &&Image| image.kind == Kind::Machine && image.capability.0 == capability.0;
    let nearest = IMAGES.iter().filter(machine).filter(|image| image.capability <= capability);
    let ptx = |image: &&Image| image.kind == Kind::Ptx && image.capability <= capability;
    nearest.max_by_key(|image| image.capability).or_else(|| IMAGES.iter().find(ptx))
}

impl Image {
    /// The architecture as the compiler calls it: `sm_90` is machine code, `compute_80` is PTX.
    pub(crate) fn name(&self) -> &'static str {
        self.name
    }

    /// What `cuModuleLoadData` takes.
    ///
    /// # Errors
    /// [`Error::Damaged`] where the bytes are no zlib stream.
    pub(crate) fn read(&self) -> Result<Vec<u8>> {
        miniz_oxide::inflate::decompress_to_vec_zlib(self.compressed).map_err(|_| Error::Damaged(self.name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(major: u32, minor: u32) -> Option<&'static str> {
        choose((major, minor)).map(Image::name)
    }

    #[test]
    fn a_device_gets_the_image_of_its_major_version() {
        for (major, minor, image) in
            [(8, 0, "sm_80"), (8, 6, "sm_80"), (8, 9, "sm_80"), (9, 0, "sm_90"), (10, 3, "sm_100"), (12, 1, "sm_120")]
        {
            assert_eq!(chosen(major, minor), Some(image), "{major}.{minor}");
        }
    }

    #[test]
    fn other_majors_get_ptx() {
        assert_eq!(chosen(11, 0), Some("compute_80"));
        assert_eq!(chosen(13, 0), Some("compute_80"));
    }

    #[test]
    fn older_devices_get_none() {
        assert_eq!(chosen(7, 5), None);
        assert_eq!(chosen(0, 0), None);
    }

    #[test]
    fn images_hold_what_their_names_say() {
        for image in &IMAGES {
            let bytes = image.read().unwrap();
            match image.kind {
                Kind::Machine => assert!(bytes.starts_with(b"\x7fELF"), "{}", image.name),
                Kind::Ptx => {
                    assert!(bytes.ends_with(b"\0"), "the driver reads up to a closing NUL");
                    assert!(String::from_utf8_lossy(&bytes).contains(&format!(".target sm_{}", &image.name[8..])));
                }
            }
        }
    }

    #[test]
    fn a_damaged_image_is_an_error() {
        let image = Image { name: "sm_1", kind: Kind::Machine, capability: (1, 0), compressed: b"no stream" };
        assert_eq!(image.read(), Err(Error::Damaged("sm_1")));
    }
}
