//! Takes the product's own source of what threads share and puts loom's types in the place of the
//! standard library's, so that the model checks the very code that runs. A text that is to be
//! replaced and is not there fails the build: the code has changed, look at the model again.

use std::path::{Path, PathBuf};
use std::{env, fs};

/// A text and what stands in its place.
type Replacement = (&'static str, &'static str);

fn main() {
    let product = Path::new("../../proxy/src");
    let sources: [(&str, &str, &[Replacement]); 2] = [
        (
            "worker/mailbox.rs",
            "mailbox.rs",
            &[
                ("use std::sync::Arc;", "use loom::sync::Arc;"),
                ("use std::sync::atomic::{", "use loom::sync::atomic::{"),
                ("use crossbeam_channel::{", "use crate::kernel::{"),
                (
                    "= crossbeam_channel::unbounded",
                    "= crate::kernel::unbounded",
                ),
                ("use rustix::event::{", "use crate::kernel::{"),
                ("rustix::io::write(", "crate::kernel::write("),
                ("use std::os::fd::OwnedFd;", "use crate::kernel::OwnedFd;"),
            ],
        ),
        (
            "nbd/budget.rs",
            "budget.rs",
            &[
                ("use std::sync::Arc;", "use loom::sync::Arc;"),
                ("use std::sync::atomic::{", "use loom::sync::atomic::{"),
            ],
        ),
    ];
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    for (from, to, replacements) in sources {
        let path = product.join(from);
        println!("cargo::rerun-if-changed={}", path.display());
        let mut text = fs::read_to_string(&path).expect("the product's source");
        for (find, put) in replacements {
            let found = text.matches(find).count();
            assert_eq!(
                found,
                1,
                "{}: {find:?} is there {found} times",
                path.display()
            );
            text = text.replace(find, put);
        }
        // Its own tests are run where it stands; inner doc comments cannot be included.
        let text = text.split("#[cfg(test)]").next().unwrap_or_default();
        let text: Vec<&str> = text
            .lines()
            .filter(|line| !line.starts_with("//!"))
            .collect();
        fs::write(out.join(to), text.join("\n")).expect("written");
    }
}
