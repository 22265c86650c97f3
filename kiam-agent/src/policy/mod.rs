//! Decides whether a pod may have a role, and explains itself.
