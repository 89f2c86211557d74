//! A repository that may not answer yet.
//!
//! Owns the one receiver of a URL in this process. It is opened by whoever needs it first and, once
//! open, stays. A place that does not answer holds up nobody but those who ask for it: guests are
//! served while their repository is away.

use tokio::sync::OnceCell;

use super::Receiver;
use crate::repository::{Repository, RepositoryError};

/// Where a receiver is, or will be.
#[derive(Debug)]
pub struct Place {
    url: String,
    receiver: OnceCell<Receiver>,
}

impl Place {
    /// The repository of this URL, not opened yet.
    #[must_use]
    pub fn new(url: &str) -> Self {
        Self {
            url: url.to_owned(),
            receiver: OnceCell::new(),
        }
    }

    /// A repository that is open.
    #[must_use]
    pub fn of(receiver: Receiver) -> Self {
        Self {
            url: receiver.repository().url().to_owned(),
            receiver: OnceCell::new_with(Some(receiver)),
        }
    }

    /// Its URL.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The receiver, if it is open.
    #[must_use]
    pub fn opened(&self) -> Option<&Receiver> {
        self.receiver.get()
    }

    /// The receiver, opened now if it is not. One attempt at a time.
    ///
    /// # Errors
    /// The repository cannot be opened; the next call tries again.
    pub async fn receiver(&self) -> Result<&Receiver, RepositoryError> {
        let open = || async { Repository::open(&self.url).await.map(Receiver::new) };
        self.receiver.get_or_try_init(open).await
    }
}
