//! Harnesses of the benches.
