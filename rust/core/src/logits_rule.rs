//! What makes a logit of a product: scale, cap, temperature.

/// How a product becomes a logit over temperature: `cap * tanh(scale * (product + bias) / cap) / temperature`, or
/// `scale * (product + bias) / temperature` without a cap.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LogitsRule {
    pub(crate) inner: f32,
    pub(crate) outer: Option<f32>,
}

impl LogitsRule {
    /// The rule; factors are combined in float64 and rounded once.
    #[must_use]
    pub fn new(scale: f64, softcap: Option<f64>, temperature: f64) -> Self {
        match softcap {
            Some(cap) => Self { inner: (scale / cap) as f32, outer: Some((cap / temperature) as f32) },
            None => Self { inner: (scale / temperature) as f32, outer: None },
        }
    }

    /// What a product, with its bias, is multiplied by first.
    #[must_use]
    pub fn inner(&self) -> f32 {
        self.inner
    }

    /// What the hyperbolic tangent is multiplied by, where there is a cap.
    #[must_use]
    pub fn outer(&self) -> Option<f32> {
        self.outer
    }

    pub(crate) fn is_identity(&self) -> bool {
        self.inner == 1.0 && self.outer.is_none()
    }
}
