//! Harnesses of the tests.
