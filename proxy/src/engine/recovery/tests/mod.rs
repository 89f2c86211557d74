//! Recovery in the simulator: killed and cut at every operation, with damaged and missing parts.

mod abandoned;
mod cases;
mod crash;
mod rig;
