//! Recovery points: what people write ([`PointSpec`]), what it means ([`resolve()`]), and what there
//! is ([`PointList`]).
//!
//! What always holds: whatever is listed or resolved can be opened. What cannot be decided is
//! refused with the choices: a label that several checkpoints carry, a time that the primary's
//! clock showed twice, an LSN that several epochs have.

mod beyond;
mod list;
mod resolve;
mod spec;

#[cfg(test)]
mod tests;

pub use beyond::Beyond;
pub use list::{Gap, GapCause, PendingPass, Point, PointList, Range};
pub use resolve::{PointError, resolve, time_of};
pub use spec::{PointSpec, SpecError, label_is_usable};
