//! The program for libFuzzer: runs the target that `FUZZ_TARGET` names. See `tests/fuzz/run`.
#![no_main]
#![allow(unsafe_code, missing_docs, reason = "what the macro makes")]

use std::sync::LazyLock;

static TARGET: LazyLock<afterimage_fuzz::Target> = LazyLock::new(|| {
    let name = std::env::var("FUZZ_TARGET").expect("FUZZ_TARGET names a target");
    afterimage_fuzz::target_of(&name).expect("a target of this name")
});

libfuzzer_sys::fuzz_target!(|data: &[u8]| (TARGET.run)(data));
