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
    accepts_loss: bool,
    receiver: OnceCell<Receiver>,
}

impl Place {
    /// The repository of this URL, not opened yet; as for [`Receiver::accepting_loss`].
    #[must_use]
    pub fn new(url: &str, accepts_loss: bool) -> Self {
        Self {
            url: url.to_owned(),
            accepts_loss,
            receiver: OnceCell::new(),
        }
    }

    /// A repository that is open.
    #[must_use]
    pub fn of(receiver: Receiver) -> Self {
        Self {
            url: receiver.repository().url().to_owned(),
            accepts_loss: receiver.accepts_loss,
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
        let open = || async {
            let repository = Repository::open(&self.url).await?;
            Ok(Receiver::new(repository).accepting_loss(self.accepts_loss))
        };
        self.receiver.get_or_try_init(open).await
    }
}
