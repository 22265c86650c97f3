//! Flags and environment into a tree of part configs, reporting all mistakes.
