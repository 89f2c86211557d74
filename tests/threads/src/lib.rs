//! What threads share and is written by hand, under every interleaving that the memory model
//! allows: the worker's mailbox with its sleep, and the budget for payloads. The code under test is
//! the product's own file (see `build.rs`). What else threads share goes through channels, locks
//! and cells of tokio, crossbeam and the standard library; `docs/testing.md` lists it.

#[cfg(test)]
mod kernel;

#[cfg(test)]
#[allow(
    dead_code,
    missing_docs,
    unreachable_pub,
    reason = "included from the product"
)]
mod mailbox {
    include!(concat!(env!("OUT_DIR"), "/mailbox.rs"));
}

#[cfg(test)]
#[allow(
    dead_code,
    missing_docs,
    unreachable_pub,
    reason = "included from the product"
)]
mod budget {
    include!(concat!(env!("OUT_DIR"), "/budget.rs"));
}

#[cfg(test)]
mod tests;
