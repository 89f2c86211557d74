//! What the tests of this crate share: a primary without disks, and stores that fail.

pub(crate) mod careless;
pub(crate) mod faults;
pub(crate) mod primary;
pub(crate) mod puts;
