//! The `kiam-agent` command.

fn main() {}
