//! The environment variables that containers of kiam and kube2iam have, most of them read by their AWS SDK or by Go.

/// A variable and what becomes of it.
#[derive(Clone, Copy, Debug)]
pub struct Variable {
    /// The name.
    pub name: &'static str,
    /// What becomes of it.
    pub fate: VariableFate,
    /// Why, or what to do.
    pub advice: &'static str,
}

/// What becomes of a variable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VariableFate {
    /// The agent's manifest sets it from the node.
    Manifest,
    /// The agent has this flag, named without dashes, and takes the value there.
    Flag(&'static str),
    /// The agent reads the same variable.
    Environment,
    /// The agent works without it.
    Unneeded,
}

use VariableFate::{Environment, Flag, Manifest, Unneeded};

const CHAIN: &str = "the agent's credentials for STS come from the same chain of the AWS SDK";
const PROXY: &str = "the agent reads it for the Kubernetes API and STS";
const GO: &str = "it configures Go's runtime";

/// Every known variable.
static VARIABLES: [Variable; 39] = [
    variable_of("HOST_IP", Manifest, "the manifest sets it from status.hostIP"),
    variable_of("NODE_NAME", Manifest, "the manifest sets it from spec.nodeName"),
    variable_of("AWS_REGION", Flag("region"), ""),
    variable_of("AWS_DEFAULT_REGION", Flag("region"), ""),
    variable_of("AWS_EC2_METADATA_SERVICE_ENDPOINT", Flag("upstream"), ""),
    variable_of("AWS_ENDPOINT_URL_STS", Flag("sts-endpoint"), ""),
    variable_of("AWS_ACCESS_KEY_ID", Environment, CHAIN),
    variable_of("AWS_SECRET_ACCESS_KEY", Environment, CHAIN),
    variable_of("AWS_SESSION_TOKEN", Environment, CHAIN),
    variable_of("AWS_PROFILE", Environment, CHAIN),
    variable_of("AWS_SHARED_CREDENTIALS_FILE", Environment, CHAIN),
    variable_of("AWS_CONFIG_FILE", Environment, CHAIN),
    variable_of("AWS_ROLE_ARN", Environment, CHAIN),
    variable_of("AWS_WEB_IDENTITY_TOKEN_FILE", Environment, CHAIN),
    variable_of("AWS_ROLE_SESSION_NAME", Environment, CHAIN),
    variable_of("HTTPS_PROXY", Environment, PROXY),
    variable_of("https_proxy", Environment, PROXY),
    variable_of("HTTP_PROXY", Environment, PROXY),
    variable_of("http_proxy", Environment, PROXY),
    variable_of("NO_PROXY", Environment, PROXY),
    variable_of("no_proxy", Environment, PROXY),
    variable_of("SSL_CERT_FILE", Environment, "the agent's TLS reads it"),
    variable_of("SSL_CERT_DIR", Environment, "the agent's TLS reads it"),
    variable_of("AWS_STS_REGIONAL_ENDPOINTS", Unneeded, "the region's own STS is always used"),
    variable_of("AWS_SDK_LOAD_CONFIG", Unneeded, "it configures the AWS SDK for Go"),
    variable_of("AWS_METADATA_SERVICE_TIMEOUT", Unneeded, "the agent has its own deadlines"),
    variable_of("AWS_METADATA_SERVICE_NUM_ATTEMPTS", Unneeded, "the agent retries by itself"),
    variable_of("AWS_ENDPOINT_URL_EC2", Unneeded, "the agent does not call EC2"),
    variable_of("AWS_MAX_ATTEMPTS", Unneeded, "the agent retries by itself"),
    variable_of("AWS_RETRY_MODE", Unneeded, "the agent retries by itself"),
    variable_of("GRPC_GO_LOG_SEVERITY_LEVEL", Unneeded, "there is no gRPC"),
    variable_of("GRPC_GO_LOG_VERBOSITY_LEVEL", Unneeded, "there is no gRPC"),
    variable_of("GODEBUG", Unneeded, GO),
    variable_of("GOGC", Unneeded, GO),
    variable_of("GOMAXPROCS", Unneeded, GO),
    variable_of("GOMEMLIMIT", Unneeded, GO),
    variable_of("GOTRACEBACK", Unneeded, GO),
    variable_of("POD_NAME", Unneeded, "the agent does not read it"),
    variable_of("POD_NAMESPACE", Unneeded, "the agent does not read it"),
];

/// The variable `name`, if it is known.
#[must_use]
pub fn variable(name: &str) -> Option<&'static Variable> {
    VARIABLES.iter().find(|variable| variable.name == name)
}

const fn variable_of(name: &'static str, fate: VariableFate, advice: &'static str) -> Variable {
    Variable { name, fate, advice }
}
