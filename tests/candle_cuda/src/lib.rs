//! Nothing: compiling the dependency is the check.
