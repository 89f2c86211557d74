//! The repository layer against a folder, memory, and stores that fail.
use super::*;
