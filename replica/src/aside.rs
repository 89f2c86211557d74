//! Work that is not to hold up the threads on which everything else runs.

use std::io;

use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::task::spawn_blocking;

/// Whether the runtime, if there is one, has more than one thread.
pub(crate) fn has_threads() -> bool {
    Handle::try_current()
        .is_ok_and(|runtime| runtime.runtime_flavor() == RuntimeFlavor::MultiThread)
}

/// Computes on a thread for such work, if the runtime has more than one; else here.
pub(crate) async fn compute<T: Send + 'static>(work: impl Fn() -> T + Clone + Send + 'static) -> T {
    if !has_threads() {
        return work();
    }
    match spawn_blocking(work.clone()).await {
        Ok(done) => done,
        // The runtime shuts down.
        Err(_) => work(),
    }
}

/// Does what waits for a file system on a thread that may wait, or here where there is no runtime.
///
/// # Errors
/// The runtime shuts down: nobody knows how far it came.
pub(crate) async fn wait<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<T> {
    match Handle::try_current() {
        Ok(runtime) => runtime.spawn_blocking(work).await.map_err(io::Error::other),
        Err(_) => Ok(work()),
    }
}
