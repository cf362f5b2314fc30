//! The kernels' promises, on every instruction set that the processor has.
mod accuracy;
mod dropout;
mod errors;
mod init;
mod invariance;
mod layouts;
mod levels;
mod model;
mod nonfinite;
mod returns;
mod support;
mod token_statistics;
mod two_layer;
