//! Tokens of a row that are asked for besides its target: given ones, and the likeliest.
//!
//! Both are read from a block's logits while they are in the cache. Candidates are sorted once, so that a block looks at
//! those that lie in it and at no others. The likeliest are a short sorted list; a block whose largest logit is not above
//! the list's smallest, which is most of them, costs one comparison.
use crate::simd::WIDTH;
use crate::{Error, Result, allocation};

/// A token and its logit over temperature.
#[derive(Debug, Clone, Copy)]
struct Ranked {
    token: usize,
    logit: f32,
}

/// A token that was asked for by its id.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    token: usize,
    /// Its place among the row's candidates as they were given.
    place: usize,
    logit: f32,
}

/// What is known of a row's candidates and likeliest tokens so far.
#[derive(Debug, Clone)]
pub(crate) struct Selection {
    /// By rising token.
    candidates: Vec<Candidate>,
    /// The first candidate that no block has held yet.
    next: usize,
    /// By falling logit, equal ones by rising token.
    likeliest: Vec<Ranked>,
    /// How many likeliest tokens are asked for.
    top: usize,
}

impl Selection {
    /// Nothing known yet of row `row`.
    ///
    /// # Errors
    /// [`Error::Token`] for the first candidate outside the vocabulary, [`Error::Allocation`].
    pub(crate) fn new(row: usize, candidates: &[i64], top: usize, vocabulary: usize) -> Result<Self> {
        let mut sorted = allocation::reserved(candidates.len())?;
        for (place, &token) in candidates.iter().enumerate() {
            let Some(token) = usize::try_from(token).ok().filter(|token| *token < vocabulary) else {
                return Err(Error::Token { what: "candidates", row, token, vocabulary });
            };
            sorted.push(Candidate { token, place, logit: f32::NAN });
        }
        sorted.sort_unstable_by_key(|candidate| candidate.token);
        Ok(Self { candidates: sorted, next: 0, likeliest: allocation::reserved(top)?, top })
    }

    /// Takes note of a block: its largest logit, and the logits of the tokens from `first` on.
    pub(crate) fn meet(&mut self, peak: f32, line: &[f32], first: usize) {
        while let Some(candidate) = self.candidates.get_mut(self.next)
            && candidate.token < first + line.len()
        {
            if let Some(&logit) = candidate.token.checked_sub(first).and_then(|place| line.get(place)) {
                candidate.logit = logit;
            }
            self.next += 1;
        }
        if self.top > 0 && (self.likeliest.len() < self.top || peak > self.least()) {
            self.rank(line, first);
        }
    }

    /// What a logit has to be above, once the list is full.
    fn least(&self) -> f32 {
        self.likeliest.last().map_or(f32::NEG_INFINITY, |last| last.logit)
    }

    fn rank(&mut self, line: &[f32], first: usize) {
        for (group, logits) in line.chunks(WIDTH).enumerate() {
            let least = self.least();
            let is_full = self.likeliest.len() == self.top;
            // Without a branch for each logit, the compiler compares them side by side.
            if is_full && !logits.iter().fold(false, |any, logit| any | (*logit > least)) {
                continue;
            }
            for (lane, &logit) in logits.iter().enumerate() {
                self.insert(Ranked { token: first + group * WIDTH + lane, logit });
            }
        }
    }

    /// Tokens come in rising order, so that one which equals those in the list stands behind them. Where NaN stands
    /// does not matter: it makes the whole row NaN.
    fn insert(&mut self, ranked: Ranked) {
        let is_full = self.likeliest.len() == self.top;
        if is_full && ranked.logit <= self.least() {
            return;
        }
        if is_full {
            self.likeliest.pop();
        }
        let place = self.likeliest.partition_point(|other| other.logit >= ranked.logit);
        self.likeliest.insert(place, ranked);
    }

    /// Writes the candidates' logits, in the order in which they were given; NaN where no block held one.
    pub(crate) fn write_candidates(&self, logits: &mut [f32]) {
        for candidate in &self.candidates {
            logits[candidate.place] = candidate.logit;
        }
    }

    /// Writes the likeliest tokens and their logits; -1 and NaN where there are fewer.
    pub(crate) fn write_likeliest(&self, tokens: &mut [i64], logits: &mut [f32]) {
        tokens.fill(-1);
        logits.fill(f32::NAN);
        for ((token, logit), ranked) in tokens.iter_mut().zip(logits).zip(&self.likeliest) {
            (*token, *logit) = (ranked.token as i64, ranked.logit);
        }
    }
}
