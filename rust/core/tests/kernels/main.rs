//! The kernels' promises, on every instruction set that the processor has.
mod accuracy;
mod dropout;
mod errors;
mod init;
mod invariance;
mod layouts;
mod levels;
mod linear;
mod model;
mod nonfinite;
mod statistics;
mod support;
