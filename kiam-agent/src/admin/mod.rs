//! Speaks HTTP to operators.
