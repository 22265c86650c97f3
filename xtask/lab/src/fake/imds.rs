//! The EC2 instance metadata service: what the node's own credentials come from, and what no pod may reach.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use anyhow::Result;
use http::{Method, Response, StatusCode};
use jiff::{Timestamp, ToSpan};

use super::{
    fault::{Call, Faults},
    http::{Answer, Body, Place, Server, full},
    packets::Packets,
};
use crate::{IMDS_V4, IMDS_V6, NODE_V4, Netns, has_ipv6, pod_client::attack::TOS};

/// The node's own access key, which only the real service gives out. A pod that shows it has broken through.
pub const NODE_ACCESS_KEY: &str = "ASIANODE000000000000";
/// The node's own role.
pub const NODE_ROLE: &str = "lab-node-role";
/// The account of the node and of every role.
pub const ACCOUNT: &str = "123456789012";
/// The node's region.
pub const REGION: &str = "eu-west-1";
/// The node's instance id.
pub const INSTANCE_ID: &str = "i-0123456789abcdef0";

const TOKEN: &str = "lab-imds-token";
const TOKEN_HEADER: &str = "x-aws-ec2-metadata-token";
const TTL_HEADER: &str = "x-aws-ec2-metadata-token-ttl-seconds";

/// The server, on both of its addresses, and a count of every packet to them.
#[derive(Debug)]
pub struct Imds {
    server: Server<Service>,
    requests: Arc<Mutex<Requests>>,
    credentials: Arc<Mutex<NodeCredentials>>,
    needs_token: Arc<AtomicBool>,
    /// Without root, packets can't be counted.
    packets: Option<Packets>,
}

type Requests = BTreeMap<(IpAddr, String), u64>;

#[derive(Debug)]
struct Service {
    requests: Arc<Mutex<Requests>>,
    credentials: Arc<Mutex<NodeCredentials>>,
    needs_token: Arc<AtomicBool>,
}

/// What it gives out as the node's own.
#[derive(Debug)]
struct NodeCredentials {
    access_key: String,
    secret_key: String,
    token: String,
}

// === impl Imds ===

impl Imds {
    /// Starts it in `netns`, which must hold both addresses ([`Node::imds_netns`](crate::Node::imds_netns) does).
    pub fn start(netns: &Netns) -> Result<Self> {
        let addresses = [IpAddr::from(IMDS_V4), IMDS_V6.into()];
        let usable = addresses.into_iter().filter(|address| address.is_ipv4() || has_ipv6());
        let places = usable.map(|address| Place::inside(netns, (address, 80).into())).collect();
        Self::serve(places, Some(Packets::watch(netns)?))
    }

    /// Starts it on loopback, where no packets are counted.
    pub fn on_loopback() -> Result<Self> {
        Self::serve(vec![Place::loopback()], None)
    }

    fn serve(places: Vec<Place>, packets: Option<Packets>) -> Result<Self> {
        let requests = Arc::default();
        let credentials = Arc::default();
        let needs_token = Arc::default();
        let service = Service {
            requests: Arc::clone(&requests),
            credentials: Arc::clone(&credentials),
            needs_token: Arc::clone(&needs_token),
        };
        let server = Server::start(places, Arc::new(service))?;
        Ok(Self { server, requests, credentials, needs_token, packets })
    }

    /// What `--upstream` names.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.server.address())
    }

    /// Gives these out as the node's own from now on, for an STS that knows them.
    pub fn set_node_credentials(&self, access_key: &str, secret_key: &str, token: &str) {
        let [access_key, secret_key, token] = [access_key, secret_key, token].map(str::to_owned);
        *lock(&self.credentials) = NodeCredentials { access_key, secret_key, token };
    }

    /// Answers only requests with a session token from now on, as `HttpTokens=required` has it.
    pub fn require_tokens(&self) {
        self.needs_token.store(true, Ordering::SeqCst);
    }

    /// How many packets to the service have come from `source`, of whatever protocol and port.
    #[must_use]
    pub fn packets_from(&self, source: IpAddr) -> u64 {
        self.packets().get(&source).copied().unwrap_or(0)
    }

    /// How many packets to the service have come, by source.
    #[must_use]
    pub fn packets(&self) -> BTreeMap<IpAddr, u64> {
        self.packets.as_ref().map(Packets::all).unwrap_or_default()
    }

    /// How many packets to the service have come from pods and other attackers, by source.
    ///
    /// Of those with the node's own address it is the ones that an attacker marked: the agent has that address too.
    #[must_use]
    pub fn attackers_packets(&self) -> BTreeMap<IpAddr, u64> {
        let mut all = BTreeMap::new();
        let kinds = self.packets.as_ref().map(Packets::kinds).unwrap_or_default();
        for ((source, tos), count) in kinds {
            let of_attacker = match source {
                IpAddr::V4(source) => source != NODE_V4 || tos == TOS,
                // Those never pass a router: it is the link's own neighbour discovery.
                IpAddr::V6(source) => !source.is_unicast_link_local(),
            };
            if of_attacker {
                *all.entry(source).or_default() += count;
            }
        }
        all
    }

    /// How many requests have come, by peer and path.
    #[must_use]
    pub fn requests(&self) -> BTreeMap<(IpAddr, String), u64> {
        self.counts().clone()
    }

    /// How many requests have come for `path`.
    #[must_use]
    pub fn requests_of(&self, path: &str) -> u64 {
        self.counts().iter().filter(|((_, asked), _)| asked == path).map(|(_, count)| count).sum()
    }

    /// The faults of its answers.
    #[must_use]
    pub fn faults(&self) -> &Faults {
        self.server.faults()
    }

    /// Goes away: connections are cut, new ones refused. Packets are still counted.
    pub fn stop(&self) {
        self.server.stop();
    }

    /// Comes back.
    pub fn restart(&self) -> Result<()> {
        self.server.restart()
    }

    fn counts(&self) -> MutexGuard<'_, Requests> {
        lock(&self.requests)
    }
}

fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

// === impl NodeCredentials ===

impl Default for NodeCredentials {
    fn default() -> Self {
        let [secret_key, token] = ["secret-of-the-node", "token-of-the-node"].map(str::to_owned);
        Self { access_key: NODE_ACCESS_KEY.to_owned(), secret_key, token }
    }
}

// === impl Service ===

impl Answer for Service {
    fn note(&self, peer: SocketAddr, call: &Call) {
        let key = (peer.ip().to_canonical(), call.path.clone());
        *lock(&self.requests).entry(key).or_default() += 1;
    }

    fn answer(&self, call: &Call) -> Response<Body> {
        if call.method == Method::PUT && call.path == "/latest/api/token" {
            return token(call);
        }
        let needs_token = self.needs_token.load(Ordering::SeqCst);
        if call.headers.get(TOKEN_HEADER).map_or(needs_token, |token| token != TOKEN) {
            return text(StatusCode::UNAUTHORIZED, "");
        }
        match content(&call.path, &lock(&self.credentials)) {
            Some(body) => text(StatusCode::OK, &body),
            None => text(StatusCode::NOT_FOUND, ""),
        }
    }

    fn refusal(&self, status: StatusCode, _code: &str) -> Response<Body> {
        text(status, "")
    }
}

fn token(call: &Call) -> Response<Body> {
    let ttl = call.headers.get(TTL_HEADER);
    let valid = ttl.and_then(|ttl| ttl.to_str().ok()?.parse().ok());
    match (ttl, valid) {
        (Some(ttl), Some(1..=21600_u32)) => {
            let mut answer = text(StatusCode::OK, TOKEN);
            answer.headers_mut().insert(TTL_HEADER, ttl.clone());
            answer
        }
        _ => text(StatusCode::BAD_REQUEST, ""),
    }
}

fn content(path: &str, node: &NodeCredentials) -> Option<String> {
    let credentials = format!("meta-data/iam/security-credentials/{NODE_ROLE}");
    let path = path.strip_prefix("/latest/")?;
    Some(match path {
        "meta-data/placement/region" => REGION.to_owned(),
        "meta-data/placement/availability-zone" => format!("{REGION}a"),
        "meta-data/placement/availability-zone-id" => "euw1-az1".to_owned(),
        "meta-data/instance-id" => INSTANCE_ID.to_owned(),
        "meta-data/iam/info" => format!(
            "{{\"Code\":\"Success\",\"LastUpdated\":\"{}\",\"InstanceProfileArn\":\
             \"arn:aws:iam::{ACCOUNT}:instance-profile/{NODE_ROLE}\",\"InstanceProfileId\":\"AIPALAB\"}}",
            time(Timestamp::now())
        ),
        "meta-data/iam/security-credentials" | "meta-data/iam/security-credentials/" => {
            NODE_ROLE.to_owned()
        }
        path if path == credentials => node_credentials(node),
        "dynamic/instance-identity/document" => format!(
            "{{\"accountId\":\"{ACCOUNT}\",\"region\":\"{REGION}\",\"availabilityZone\":\"{REGION}a\",\
             \"instanceId\":\"{INSTANCE_ID}\"}}"
        ),
        "user-data" => "#!/bin/sh\necho the node's own secret\n".to_owned(),
        _ => return None,
    })
}

fn node_credentials(node: &NodeCredentials) -> String {
    let now = Timestamp::now();
    format!(
        "{{\"Code\":\"Success\",\"LastUpdated\":\"{}\",\"Type\":\"AWS-HMAC\",\"AccessKeyId\":\"{}\",\
         \"SecretAccessKey\":\"{}\",\"Token\":\"{}\",\"Expiration\":\"{}\"}}",
        time(now),
        node.access_key,
        node.secret_key,
        node.token,
        time(now + 6.hours())
    )
}

fn time(at: Timestamp) -> String {
    at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

fn text(status: StatusCode, body: &str) -> Response<Body> {
    let mut answer = full(status, "text/plain", body.to_owned());
    answer.headers_mut().insert("server", http::HeaderValue::from_static("EC2ws"));
    answer
}

#[cfg(test)]
mod tests {
    use std::net::{TcpStream, UdpSocket};

    use super::*;
    use crate::{Node, PodSpec, pod_client::wire::exchange};

    #[test]
    fn whatever_a_pod_gets_through_is_counted_and_answered() {
        if crate::skip!() {
            return;
        }
        let node = Node::start().unwrap();
        let imds = Imds::start(node.imds_netns()).unwrap();
        let pod = node.pod(PodSpec::new("shop", "reader")).unwrap();
        let [v4, v6] = pod.ips();
        assert_eq!((imds.packets_from(v4), imds.packets_from(v6)), (0, 0));
        let path = format!("/latest/meta-data/iam/security-credentials/{NODE_ROLE}");
        for address in [IpAddr::from(IMDS_V4), IMDS_V6.into()] {
            let stream = pod.netns().enter(|| TcpStream::connect((address, 80))).unwrap();
            let request = format!("GET {path} HTTP/1.1\r\nHost: imds\r\n\r\n");
            let reply = exchange(&mut stream.unwrap(), &request).unwrap();
            assert!(reply.body.contains(NODE_ACCESS_KEY), "{}", reply.body);
        }
        assert_eq!(imds.requests_of(&path), 2);
        assert_eq!(imds.requests().get(&(v4, path)), Some(&1));
        assert!(imds.packets_from(v4) > 3 && imds.packets_from(v6) > 3, "{:?}", imds.packets());
        let before = imds.packets_from(v4);
        let udp: UdpSocket = pod.netns().udp((v4, 0).into()).unwrap();
        udp.send_to(b"x", (IMDS_V4, 53)).unwrap();
        assert_eq!(imds.packets_from(v4), before + 1);
    }
}
