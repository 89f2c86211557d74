//! Which stores the probe lets through.

use std::sync::Arc;

use futures::StreamExt as _;
use object_store::ObjectStore;
use object_store::memory::InMemory;

use super::{Repository, RepositoryError};
use crate::testing::careless::{Care, CarelessStore};
use crate::testing::faults::{Fault, FaultyStore};

async fn probe(store: Arc<dyn ObjectStore>) -> Result<(), RepositoryError> {
    Repository::on(store, "s3://bucket").probe().await
}

#[tokio::test]
async fn a_store_that_creates_atomically_passes_and_keeps_nothing() {
    let store = Arc::new(InMemory::new());
    probe(store.clone()).await.expect("sound");
    assert_eq!(store.list(None).count().await, 0);
}

#[tokio::test]
async fn a_store_that_does_not_is_refused() {
    for care in [Care::None, Care::LookThenWrite, Care::LoserOverwrites] {
        let refused = probe(Arc::new(CarelessStore::new(care))).await;
        assert!(
            matches!(&refused, Err(RepositoryError::NoCreateIfAbsent { url }) if url == "s3://bucket"),
            "{care:?}: {refused:?}"
        );
        assert!(refused.is_err_and(|error| error.is_lasting()));
    }
}

#[tokio::test]
async fn a_missing_bucket_is_another_matter_than_one_that_is_away() {
    let missing = probe(Arc::new(CarelessStore::new(Care::NoBucket))).await;
    assert!(
        matches!(missing, Err(RepositoryError::NoBucket { .. })),
        "{missing:?}"
    );
    let store = FaultyStore::new(Arc::new(InMemory::new()), 0, Fault::Before);
    let away = probe(Arc::new(store)).await;
    assert!(
        matches!(&away, Err(error @ RepositoryError::Store { .. }) if !error.is_lasting()),
        "{away:?}"
    );
}
