//! Speaks Kubernetes: watches in. The only importer of kube.
