//! Harnesses of the tests: the simulation of the whole system.

pub mod sim;
