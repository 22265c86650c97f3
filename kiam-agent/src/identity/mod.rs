//! 4-tuple to cgroup to pod UID.
