//! What the benches share: payloads that compress as disks do, and a primary that cuts segments
//! without a disk.

pub mod payload;
pub mod primary;
