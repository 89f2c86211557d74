//! Afterimage's other side: what receives segments, keeps them, and gives disks back as they were.
//!
//! A segment walks through the folders in this order: [`receive`] checks and commits it into the
//! [`repository`], [`history`] takes it over, [`index`] remembers where each version of each block
//! is, and [`image`] reads a group's disks as they were at one point.
#![deny(unsafe_code)]

mod aside;
pub mod compare;
pub mod group;
pub mod history;
pub mod image;
pub mod index;
pub mod layers;
pub mod points;
pub mod receive;
pub mod repository;
pub mod restore;
pub mod verify;

#[cfg(test)]
mod testing;
