//! Speaks EC2 instance metadata v1 and v2 to pods.
