//! Publications by somebody who knows the format and signs what is wrong anew, so that no digest of a manifest gives them
//! away: each is refused, and weights in use are not touched.
#![expect(clippy::unwrap_used, clippy::panic, reason = "helpers of tests, which clippy does not count as tests")]
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use vhead_sync::{Description, Digest, Publisher, Settings, Stage, Staged, Target, folder_of};

const OPENING: &str = "{\"digest\":\"";
const FILE: &str = "model.safetensors";

/// A directory with the publications of steps 1 and 2, which goes with the test.
struct Published(PathBuf);

impl Drop for Published {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn weights(step: u64) -> Vec<(Description, Vec<u8>)> {
    let tensor = |name: &str, dtype: &str, shape: Vec<usize>| {
        let description = Description::new(name.to_owned(), dtype, shape).unwrap();
        let scrambled = (0..description.bytes() as u64).map(|at| (((at + 3) * (step + 7) * 2_654_435_761) >> 11) as u8);
        (description, scrambled.collect())
    };
    vec![tensor("bias", "F32", vec![9]), tensor("weight", "BF16", vec![33, 8])]
}

impl Published {
    fn new(delta: bool) -> Self {
        let mut random = [0; 8];
        std::io::Read::read_exact(&mut fs::File::open("/dev/urandom").unwrap(), &mut random).unwrap();
        let place = std::env::temp_dir().join(format!("vhead-sync-test-{:016x}", u64::from_ne_bytes(random)));
        fs::create_dir(&place).unwrap();
        let settings = Settings { delta, full_every: 9, keep: 9, staging: std::env::temp_dir() };
        let mut publisher = Publisher::open(&place, settings).unwrap();
        for step in [1, 2] {
            let tensors = weights(step);
            let described = tensors.iter().map(|(tensor, _)| (tensor.clone(), "model".to_owned())).collect();
            for tensor in publisher.begin(step, described, vec!["model".to_owned()], "{}").unwrap() {
                publisher.append(&tensors.iter().find(|(other, _)| *other == tensor).unwrap().1).unwrap();
            }
            publisher.finish(&[]).unwrap();
        }
        Self(place)
    }

    fn newest(&self) -> PathBuf {
        self.0.join(folder_of(2))
    }

    fn manifest(&self) -> Value {
        let text = fs::read_to_string(self.newest().join("manifest.json")).unwrap();
        serde_json::from_str(&text).unwrap()
    }

    /// Writes a manifest with the digest of all tensors' digests, and its own, as they should be.
    fn sign(&self, mut manifest: Value) {
        let mut hasher = blake3::Hasher::new();
        for (name, tensor) in manifest["tensors"].as_object().unwrap() {
            let shape: Vec<u64> = serde_json::from_value(tensor["shape"].clone()).unwrap_or_default();
            let (dtype, digest) = (tensor["dtype"].as_str().unwrap(), tensor["digest"].as_str().unwrap());
            hasher.update(&(name.len() as u64).to_le_bytes());
            hasher.update(name.as_bytes());
            hasher.update(format!("{dtype} {shape:?} {digest}\n").as_bytes());
        }
        manifest["weights"] = json!(hasher.finalize().to_hex().to_string());
        manifest.as_object_mut().unwrap().remove("digest");
        self.sign_text(&manifest.to_string());
    }

    /// Writes a manifest of this text, and has `LATEST` name it.
    fn sign_text(&self, body: &str) {
        let rest = format!("\",{}", body.strip_prefix('{').unwrap());
        let digest = Digest::of(rest.as_bytes());
        fs::write(self.newest().join("manifest.json"), format!("{OPENING}{digest}{rest}")).unwrap();
        fs::write(self.0.join("LATEST"), format!("{} {digest}\n", folder_of(2))).unwrap();
    }

    /// The step that a follower with other weights has afterwards, or what is wrong; and its weights.
    fn follow(&self) -> (Result<u64, String>, Vec<Vec<u8>>) {
        let mut own: Vec<Vec<u8>> = weights(0).into_iter().map(|(_, bytes)| bytes).collect();
        let step = install(&self.0, &mut own).map_err(|error| error.to_string());
        (step, own)
    }

    #[track_caller]
    fn is_refused(&self, why: &str) {
        let (step, own) = self.follow();
        match step {
            Ok(step) => panic!("step {step} was taken"),
            Err(error) => assert!(error.contains(why), "{error:?} does not say {why:?}"),
        }
        assert!(own.iter().zip(weights(0)).all(|(own, (_, before))| *own == before));
    }
}

fn install(place: &Path, own: &mut [Vec<u8>]) -> vhead_sync::Result<u64> {
    let Staged::Found(mut stage) = Stage::open(place, None, None, &std::env::temp_dir(), false)? else { return Ok(0) };
    while stage.next().is_some() {
        stage.verify_next(None)?;
    }
    let mut targets: Vec<_> = own.iter_mut().enumerate().map(|(tensor, bytes)| Target { tensor, bytes }).collect();
    stage.install(&mut targets)?;
    Ok(stage.manifest().unwrap().step())
}

/// A forgery of a full publication: what is changed in the manifest, and what the error says.
#[track_caller]
fn forged(change: impl FnOnce(&mut Value), why: &str) {
    let published = Published::new(false);
    let mut manifest = published.manifest();
    change(&mut manifest);
    published.sign(manifest);
    published.is_refused(why);
}

#[test]
fn a_manifest_that_is_signed_anew_without_a_change_is_taken() {
    for delta in [false, true] {
        let published = Published::new(delta);
        published.sign(published.manifest());
        let (step, own) = published.follow();
        assert_eq!(step, Ok(2));
        assert!(own.iter().zip(weights(2)).all(|(own, (_, after))| *own == after));
    }
}

#[test]
fn names_that_lead_outside_are_refused() {
    for name in
        ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".hidden", "", "manifest.json", "ü", "a b"]
    {
        let plain = "which is no plain name in its folder";
        forged(
            |manifest| {
                let files = manifest["files"].as_object_mut().unwrap();
                let entry = files.remove(FILE).unwrap();
                files.insert(name.to_owned(), entry);
                for (_, tensor) in manifest["tensors"].as_object_mut().unwrap() {
                    tensor["file"] = json!(name);
                }
            },
            plain,
        );
    }
    forged(|manifest| manifest["tensors"]["bias"]["file"] = json!("../../etc/passwd"), "without its bytes");
}

#[test]
fn links_are_refused_wherever_they_lead() {
    for name in [FILE, "manifest.json"] {
        let published = Published::new(false);
        fs::rename(published.newest().join(name), published.0.join("elsewhere")).unwrap();
        symlink(published.0.join("elsewhere"), published.newest().join(name)).unwrap();
        published.is_refused("expected a file, got a link");
    }
    let published = Published::new(false);
    fs::rename(published.newest(), published.0.join("elsewhere")).unwrap();
    symlink("elsewhere", published.newest()).unwrap();
    published.is_refused("expected a folder");
    let published = Published::new(false);
    fs::rename(published.0.join("LATEST"), published.0.join("elsewhere")).unwrap();
    symlink("elsewhere", published.0.join("LATEST")).unwrap();
    published.is_refused("expected a file, got a link");
}

#[test]
fn what_is_no_file_is_refused_and_not_waited_for() {
    let published = Published::new(false);
    for place in [published.newest().join(FILE), published.newest().join("manifest.json"), published.0.join("LATEST")] {
        fs::remove_file(&place).unwrap();
        make_pipe(&place);
        published.is_refused("expected a file, got something else");
        fs::remove_file(&place).unwrap();
        fs::create_dir(&place).unwrap();
        published.is_refused("expected a file, got something else");
    }
}

#[test]
fn a_lock_that_is_no_file_is_refused_and_not_waited_for() {
    let published = Published::new(false);
    let place = published.0.join(".publisher");
    fs::remove_file(&place).unwrap();
    make_pipe(&place);
    let refused = vhead_sync::collect(&published.0, 1).unwrap_err().to_string();
    assert!(refused.contains("expected a file, got something else"), "{refused}");
}

fn make_pipe(place: &Path) {
    let name = std::ffi::CString::new(place.to_str().unwrap()).unwrap();
    // SAFETY: a string that ends in a zero.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
}

#[test]
fn absurd_sizes_are_refused_before_memory_is_taken() {
    let huge = json!([1_u64 << 62, 1_u64 << 62]);
    forged(|manifest| manifest["tensors"]["weight"]["shape"] = huge, "without its bytes");
    forged(|manifest| manifest["tensors"]["weight"]["shape"] = json!([1_u64 << 42]), "got BF16 [33, 8]");
    forged(|manifest| manifest["tensors"]["weight"]["shape"] = json!([-1]), "invalid value");
    forged(|manifest| manifest["files"][FILE]["bytes"] = json!(1_u64 << 63), "expected 9223372036854775808 bytes");
    forged(|manifest| manifest["files"][FILE]["bytes"] = json!(1e300), "invalid type");
    forged(|manifest| manifest["step"] = json!(u64::MAX), "expected step 2");
    let published = Published::new(false);
    fs::File::options().write(true).open(published.newest().join("manifest.json")).unwrap().set_len(1 << 40).unwrap();
    published.is_refused("at most 134217728 bytes");
    let published = Published::new(false);
    fs::write(published.0.join("LATEST"), vec![b'1'; 300]).unwrap();
    published.is_refused("at most 256 bytes");
}

#[test]
fn a_header_that_says_it_is_longer_than_its_file_is_refused() {
    for length in [u64::MAX, 1 << 40, 24_000_000] {
        let published = Published::new(false);
        let place = published.newest().join(FILE);
        let mut bytes = fs::read(&place).unwrap();
        bytes[..8].copy_from_slice(&length.to_le_bytes());
        fs::write(&place, &bytes).unwrap();
        published.is_refused(if length > 25_000_000 { "at most 25000000" } else { "cut short" });
    }
}

#[test]
fn schemas_and_fields_that_this_release_does_not_know_are_refused() {
    forged(|manifest| manifest["schema"] = json!("vhead.sync/999"), "schema \"vhead.sync/999\"");
    forged(|manifest| manifest["schema"] = json!(7), "invalid type");
    forged(|manifest| manifest["more"] = json!(1), "unknown field `more`");
    forged(|manifest| manifest["tensors"]["bias"]["more"] = json!(1), "unknown field `more`");
    forged(|manifest| manifest["kind"] = json!("half"), "unknown variant `half`");
    forged(|manifest| drop(manifest.as_object_mut().unwrap().remove("files")), "missing field `files`");
    forged(|manifest| manifest["tensors"]["bias"]["dtype"] = json!("F32X"), "without its bytes");
    forged(|manifest| manifest["tensors"]["bias"]["dtype"] = json!("F4"), "without its bytes");
}

#[test]
fn names_that_come_twice_are_refused() {
    for (name, of) in [("bias", "tensors"), (FILE, "files")] {
        let published = Published::new(false);
        let manifest = published.manifest();
        let entry = format!("\"{name}\":{}", manifest[of][name]);
        let mut body = manifest;
        body.as_object_mut().unwrap().remove("digest");
        published.sign_text(&body.to_string().replacen(&entry, &format!("{entry},{entry}"), 1));
        published.is_refused("comes twice");
    }
    let published = Published::new(false);
    let mut body = published.manifest();
    body.as_object_mut().unwrap().remove("digest");
    published.sign_text(&body.to_string().replacen("\"step\":2", "\"step\":2,\"step\":2", 1));
    published.is_refused("duplicate field `step`");
}

#[test]
fn digests_that_do_not_belong_to_their_bytes_are_refused() {
    let zeros = "0".repeat(64);
    for tensor in ["bias", "weight"] {
        forged(|manifest| manifest["tensors"][tensor]["digest"] = json!(zeros), "other bytes");
    }
    forged(|manifest| manifest["tensors"]["bias"]["digest"] = json!("0".repeat(63)), "64 hexadecimal digits");
    forged(|manifest| manifest["files"][FILE]["digest"] = json!(zeros), "the header of the manifest's digest");
    let published = Published::new(false);
    let mut body = published.manifest();
    body["weights"] = json!(zeros);
    body.as_object_mut().unwrap().remove("digest");
    published.sign_text(&body.to_string());
    published.is_refused("the digest of all weights does not belong to");
    let published = Published::new(false);
    fs::write(published.0.join("LATEST"), format!("{} {zeros}\n", folder_of(2))).unwrap();
    published.is_refused("which LATEST names");
    let published = Published::new(false);
    let place = published.newest().join("manifest.json");
    let text = fs::read_to_string(&place).unwrap();
    fs::write(&place, text.replace("BF16", "F16")).unwrap();
    published.is_refused("its digest does not belong to");
}

#[test]
fn tensors_more_or_less_than_the_files_hold_are_refused() {
    let taken = |manifest: &mut Value| drop(manifest["tensors"].as_object_mut().unwrap().remove("bias"));
    forged(taken, "expected 1 tensors, got 2");
    forged(
        |manifest| {
            let tensor = manifest["tensors"]["bias"].clone();
            manifest["tensors"]["more"] = tensor;
        },
        "the tensor \"more\"",
    );
    forged(|manifest| manifest["tensors"]["bias"]["file"] = Value::Null, "without its bytes");
    forged(|manifest| manifest["tensors"]["weight"]["shape"] = json!([8, 33]), "expected \"weight\" as BF16 [8, 33]");
}

#[test]
fn bases_that_cannot_be_are_refused() {
    let base = json!({"step": 1, "weights": "0".repeat(64)});
    forged(|manifest| manifest["base"] = base.clone(), "a base of a full publication");
    forged(|manifest| manifest["kind"] = json!("delta"), "a delta without a base");
    for (step, weights, why) in
        [(1, Some("0".repeat(64)), "are not those of digest"), (0, None, "cannot be had"), (2, None, "not older")]
    {
        let published = Published::new(true);
        let mut manifest = published.manifest();
        assert_eq!(manifest["kind"], "delta");
        manifest["base"]["step"] = json!(step);
        if let Some(weights) = weights {
            manifest["base"]["weights"] = json!(weights);
        }
        published.sign(manifest);
        published.is_refused(why);
    }
}

#[test]
fn changes_that_are_forged_with_their_digest_are_refused() {
    let published = Published::new(true);
    let place = published.newest().join("changes.safetensors");
    let bytes = fs::read(&place).unwrap();
    let data = 8 + u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
    // The number of each changed tensor's first block, how many elements have changed, and the lengths of what follows.
    for field in 0..4 {
        let mut broken = bytes.clone();
        broken[data + 4 * field + 3] = 0x7f;
        fs::write(&place, &broken).unwrap();
        let header: Value = serde_json::from_slice(&bytes[8..data]).unwrap();
        let mut manifest = published.manifest();
        for name in ["bias", "weight"] {
            let offsets: [usize; 2] = serde_json::from_value(header[name]["data_offsets"].clone()).unwrap();
            let changes = Digest::of(&broken[data + offsets[0]..data + offsets[1]]);
            manifest["tensors"][name]["changes"] = json!(changes.to_string());
        }
        published.sign(manifest);
        published.is_refused("the changes of");
    }
}

#[test]
fn bytes_that_are_no_manifest_are_refused() {
    let published = Published::new(false);
    for text in ["", "{}", "{\"digest\":\"", "null", "\u{0}\u{0}", &"[".repeat(100_000)] {
        fs::write(published.newest().join("manifest.json"), text).unwrap();
        published.is_refused("a text without a digest");
        published.sign_text(&format!("{{{text}"));
        published.is_refused("expected a manifest of vhead.sync/1");
    }
    fs::write(published.newest().join("manifest.json"), [0xff; 90]).unwrap();
    published.is_refused("bytes that are no text");
}
