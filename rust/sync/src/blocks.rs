//! What has changed between two versions of a tensor, block by block, and how it is put over the old one.
//!
//! A changed block is a frame: its number, how many elements have changed, the distances between them as LEB128, and their
//! new values. Distances and values are compressed. New values replace old ones, so that applying a frame twice is
//! applying it once. A block most of which has changed is kept whole.
use std::mem::size_of;
use zstd::bulk::{Compressor, Decompressor};

/// Bytes of a tensor that are compared, hashed and encoded at a time: a multiple of every dtype's width.
pub(crate) const BLOCK: usize = 4 << 20;

/// Bytes that are compared at a time: a multiple of every width, of no more elements than a word has bits.
const LINE: usize = 64;
const LEVEL: i32 = 1;
/// Blocks with more changes than one in so many elements are kept whole.
const SPARSEST: usize = 4;
/// Stands for the number of changes in a frame that holds a whole block.
const WHOLE: u32 = u32::MAX;
const HEADER_BYTES: usize = 4 * size_of::<u32>();
/// Bytes of the longest distance: a block has fewer elements than 2 to the 28.
const LONGEST_GAP: usize = 4;

/// Finds and encodes changes.
pub(crate) struct Encoder {
    compressor: Compressor<'static>,
    gaps: Vec<u8>,
    values: Vec<u8>,
}

impl Encoder {
    pub(crate) fn new() -> std::io::Result<Self> {
        Ok(Self { compressor: Compressor::new(LEVEL)?, gaps: Vec::new(), values: Vec::new() })
    }

    /// The frame of a block of elements of `width` bytes, and the new block in place of the old one; `None` where nothing
    /// has changed. Where this fails, the old block may hold anything.
    pub(crate) fn frame(
        &mut self,
        index: usize,
        new: &[u8],
        old: &mut [u8],
        width: usize,
    ) -> std::io::Result<Option<Vec<u8>>> {
        self.gaps.clear();
        self.values.clear();
        let most = new.len() / width / SPARSEST;
        let count = match width {
            1 => find::<1>(new, old, most, &mut self.gaps, &mut self.values),
            2 => find::<2>(new, old, most, &mut self.gaps, &mut self.values),
            4 => find::<4>(new, old, most, &mut self.gaps, &mut self.values),
            _ => find::<8>(new, old, most, &mut self.gaps, &mut self.values),
        };
        let (count, gaps, values) = match count {
            Some(0) => return Ok(None),
            Some(count) => {
                (count as u32, self.compressor.compress(&self.gaps)?, self.compressor.compress(&self.values)?)
            }
            None => {
                old.copy_from_slice(new);
                (WHOLE, Vec::new(), new.to_vec())
            }
        };
        let mut frame = Vec::with_capacity(HEADER_BYTES + gaps.len() + values.len());
        for number in [index as u32, count, gaps.len() as u32, values.len() as u32] {
            frame.extend_from_slice(&number.to_le_bytes());
        }
        frame.extend_from_slice(&gaps);
        frame.extend_from_slice(&values);
        Ok(Some(frame))
    }
}

/// Notes the elements that differ, and overwrites the old ones; their number, or `None` where there are more than `most`,
/// which leaves the rest of the old ones as they are.
fn find<const W: usize>(
    new: &[u8],
    old: &mut [u8],
    most: usize,
    gaps: &mut Vec<u8>,
    values: &mut Vec<u8>,
) -> Option<usize> {
    let (mut count, mut after) = (0, 0);
    let mut note = |place: usize, value: &[u8]| {
        write_gap(place - after, gaps);
        values.extend_from_slice(value);
        (count, after) = (count + 1, place + 1);
        count <= most
    };
    // Lines first: most of them hold no change, and a changed one is overwritten whole.
    let (lines, rest) = new.as_chunks::<LINE>();
    let (old_lines, old_rest) = old.as_chunks_mut::<LINE>();
    for (at, (new, old)) in lines.iter().zip(old_lines).enumerate() {
        if new == old {
            continue;
        }
        let mut differ = differences::<W>(new, old);
        *old = *new;
        while differ != 0 {
            let within = differ.trailing_zeros() as usize;
            differ &= differ - 1;
            if !note(at * (LINE / W) + within, &new[within * W..(within + 1) * W]) {
                return None;
            }
        }
    }
    let start = lines.len() * (LINE / W);
    for (at, (new, old)) in rest.as_chunks::<W>().0.iter().zip(old_rest.as_chunks_mut::<W>().0).enumerate() {
        if new != old && !note(start + at, new) {
            return None;
        }
        *old = *new;
    }
    Some(count)
}

/// The elements of a line that differ, a bit each.
fn differences<const W: usize>(new: &[u8; LINE], old: &[u8; LINE]) -> u64 {
    let pairs = new.as_chunks::<W>().0.iter().zip(old.as_chunks::<W>().0);
    pairs.enumerate().fold(0, |bits, (at, (new, old))| bits | u64::from(new != old) << at)
}

fn write_gap(mut gap: usize, out: &mut Vec<u8>) {
    while gap >= 0x80 {
        out.push(gap as u8 | 0x80);
        gap >>= 7;
    }
    out.push(gap as u8);
}

/// Decodes frames and puts them over blocks.
pub(crate) struct Decoder {
    decompressor: Decompressor<'static>,
    gaps: Vec<u8>,
    values: Vec<u8>,
}

/// A frame as it lies in a file.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Frame<'a> {
    pub(crate) index: usize,
    count: u32,
    gaps: &'a [u8],
    values: &'a [u8],
}

/// The frames of what a delta holds of a tensor, by rising number; then zeros up to a multiple of 8 bytes.
///
/// # Errors
/// What is wrong with the bytes.
pub(crate) fn frames(bytes: &[u8], blocks: usize) -> Result<Vec<Frame<'_>>, &'static str> {
    let (mut rest, mut found) = (bytes, Vec::<Frame<'_>>::new());
    while rest.len() >= HEADER_BYTES {
        let (header, after) = rest.split_at(HEADER_BYTES);
        let number = |at: usize| header[at * 4..].first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes));
        let (index, gaps, values) = (number(0) as usize, number(2) as usize, number(3) as usize);
        if index >= blocks || found.last().is_some_and(|last| last.index >= index) {
            return Err("blocks that the tensor does not have");
        }
        let (gaps, after) = after.split_at_checked(gaps).ok_or("a frame that is cut short")?;
        let (values, after) = after.split_at_checked(values).ok_or("a frame that is cut short")?;
        found.push(Frame { index, count: number(1), gaps, values });
        rest = after;
    }
    if rest.len() < 8 && rest.iter().all(|&byte| byte == 0) { Ok(found) } else { Err("bytes after the last frame") }
}

impl Decoder {
    pub(crate) fn new() -> std::io::Result<Self> {
        Ok(Self { decompressor: Decompressor::new()?, gaps: Vec::new(), values: Vec::new() })
    }

    /// Takes the memory that frames of elements of this width need, so that `overlay` asks for none.
    pub(crate) fn make_room(&mut self, width: usize) {
        let most = BLOCK / width / SPARSEST;
        self.gaps.clear();
        self.gaps.reserve(most * LONGEST_GAP);
        self.values.clear();
        self.values.reserve(most * width);
    }

    /// Puts a frame over the block that it belongs to.
    ///
    /// # Errors
    /// What is wrong with the frame. The block may then hold anything.
    pub(crate) fn overlay(&mut self, frame: Frame<'_>, block: &mut [u8], width: usize) -> Result<(), &'static str> {
        if frame.count == WHOLE {
            let fits = frame.gaps.is_empty() && frame.values.len() == block.len();
            return if fits {
                block.copy_from_slice(frame.values);
                Ok(())
            } else {
                Err("a block of another length")
            };
        }
        let count = frame.count as usize;
        if count > block.len() / width {
            return Err("more changes than elements");
        }
        expand(&mut self.decompressor, frame.gaps, count * LONGEST_GAP, &mut self.gaps)?;
        expand(&mut self.decompressor, frame.values, count * width, &mut self.values)?;
        if self.values.len() != count * width {
            return Err("fewer values than changes");
        }
        match width {
            1 => put::<1>(&self.gaps, &self.values, block),
            2 => put::<2>(&self.gaps, &self.values, block),
            4 => put::<4>(&self.gaps, &self.values, block),
            _ => put::<8>(&self.gaps, &self.values, block),
        }
    }
}

/// Decompresses at most `most` bytes.
fn expand(from: &mut Decompressor<'_>, bytes: &[u8], most: usize, into: &mut Vec<u8>) -> Result<(), &'static str> {
    into.clear();
    into.reserve(most);
    from.decompress_to_buffer(bytes, into).map_err(|_| "bytes that do not decompress")?;
    if into.len() <= most { Ok(()) } else { Err("more bytes than there are changes") }
}

fn put<const W: usize>(gaps: &[u8], values: &[u8], block: &mut [u8]) -> Result<(), &'static str> {
    let elements = block.as_chunks_mut::<W>().0;
    let (mut gaps, mut after) = (gaps.iter(), 0_usize);
    for value in values.as_chunks::<W>().0 {
        let place = after + read_gap(&mut gaps).ok_or("fewer places than changes")?;
        *elements.get_mut(place).ok_or("a place behind the block")? = *value;
        after = place + 1;
    }
    if gaps.next().is_none() { Ok(()) } else { Err("more places than changes") }
}

fn read_gap(bytes: &mut std::slice::Iter<'_, u8>) -> Option<usize> {
    let mut gap = 0;
    for at in 0..LONGEST_GAP {
        let byte = *bytes.next()?;
        gap |= usize::from(byte & 0x7f) << (7 * at);
        if byte < 0x80 {
            return Some(gap);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scrambled(length: usize, seed: u64) -> Vec<u8> {
        let mut state = seed | 1;
        (0..length)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 56) as u8
            })
            .collect()
    }

    fn changed(old: &[u8], width: usize, every: usize) -> Vec<u8> {
        let mut new = old.to_vec();
        for element in (0..old.len() / width).filter(|element| (element * 7919 + 13) % every == 0) {
            new[element * width + width - 1] ^= 0x55;
        }
        new
    }

    #[test]
    fn what_is_put_over_the_old_block_is_the_new_one_and_twice_is_once() {
        for width in [1, 2, 4, 8] {
            for (length, every) in
                [(width, 1), (1000 * width, 100), (4096 * width + width, 3), (70_000 * width, 30_011)]
            {
                let old = scrambled(length, 3);
                let new = changed(&old, width, every);
                let mut held = old.clone();
                let frame = Encoder::new().unwrap().frame(5, &new, &mut held, width).unwrap().unwrap();
                assert!(held == new, "width {width}, length {length}");
                let read = frames(&frame, 6).unwrap();
                let mut block = old.clone();
                let mut decoder = Decoder::new().unwrap();
                decoder.overlay(read[0], &mut block, width).unwrap();
                assert!(block == new, "width {width}, length {length}");
                decoder.overlay(read[0], &mut block, width).unwrap();
                assert!(block == new);
            }
        }
    }

    #[test]
    fn nothing_changed_is_no_frame() {
        let old = scrambled(5000, 1);
        assert_eq!(Encoder::new().unwrap().frame(0, &old, &mut old.clone(), 2).unwrap(), None);
    }

    #[test]
    fn one_change_in_a_hundred_takes_less_than_a_twenty_fifth() {
        let old = scrambled(BLOCK, 9);
        let new = changed(&old, 2, 100);
        assert!(Encoder::new().unwrap().frame(0, &new, &mut old.clone(), 2).unwrap().unwrap().len() * 25 < BLOCK);
    }

    #[test]
    fn broken_frames_are_refused_or_stay_within_the_block() {
        let old = scrambled(8192, 5);
        let new = changed(&old, 2, 50);
        let whole = Encoder::new().unwrap().frame(2, &new, &mut old.clone(), 2).unwrap().unwrap();
        let mut decoder = Decoder::new().unwrap();
        let mut refused = 0;
        for bit in 0..whole.len() * 8 {
            let mut broken = whole.clone();
            broken[bit / 8] ^= 1 << (bit % 8);
            let mut block = old.clone();
            let read =
                frames(&broken, 3).and_then(|read| read.iter().try_for_each(|f| decoder.overlay(*f, &mut block, 2)));
            refused += usize::from(read.is_err());
        }
        assert!(refused > 0);
        for length in 1..whole.len() {
            assert!(frames(&whole[..length], 3).is_err() || length < HEADER_BYTES);
        }
    }
}
