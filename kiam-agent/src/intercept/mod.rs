//! Loads, attaches, pins and reads the kernel programs. The only importer of aya.
