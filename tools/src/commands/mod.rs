//! One file per command. A command prints through [`crate::cli::output`] and returns an error that
//! says what to do; nothing here prints on its own.

pub mod attach_help;
pub mod cert;
pub mod checkpoint;
pub mod config_check;
pub mod detach;
pub mod export;
pub mod guest;
pub mod history;
pub mod log_inspect;
pub mod manual;
pub mod points;
pub mod recover;
pub mod restore;
pub mod segment_inspect;
pub mod status;
pub mod verify;
pub mod verify_disks;
