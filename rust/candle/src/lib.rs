//! The value head for candle.
