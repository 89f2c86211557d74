//! Afterimage: replica.
