//! The bytes of format version 1. If one of these tests fails, stored layers become unreadable, and
//! groups open slowly until they are made anew: make a new version instead.

use super::tests::sample;
use super::*;
use crate::golden::golden;

const HEAD: &str = include_str!("../../golden/layer-v1.hex");
const PAGES: &str = include_str!("../../golden/layer-pages-v1.hex");

#[test]
fn layer_head() {
    let (head, _) = sample();
    assert_eq!(LayerHead::decode(&golden(HEAD)), Ok(head.clone()));
    assert_eq!(head.encode(), golden(HEAD));
}

/// Compressed bytes are read for ever; a later zstd may write others, so writing is not compared.
#[test]
fn layer_pages() {
    let (head, _) = sample();
    let file = golden(PAGES);
    let blocks: Vec<(u64, u64)> = head.runs[0]
        .pages
        .iter()
        .flat_map(|page| {
            let range = page.range();
            decode_page(page, &file[range.start as usize..range.end as usize]).unwrap()
        })
        .map(|extent| (extent.block, extent.lsn.0))
        .collect();
    assert_eq!(blocks, [(7, 12), (7, 13), (9, 11), (64, 14)]);
}
