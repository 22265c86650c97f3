//! What the kernel programs and the agent share: addresses, decisions, map layouts, names.
#![no_std]
#![forbid(unsafe_code)]
