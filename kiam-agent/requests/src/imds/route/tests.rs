use super::*;

const VERSIONS: [&str; 4] = ["latest", "1.0", "2007-01-19", "2024-04-11"];

/// Paths, after a version, that hold what is the node's alone.
const DENIED: [&str; 17] = [
    "user-data",
    "user-data/",
    "api/token",
    "meta-data/iam/security-credentials-x",
    "meta-data/iam/security-credentials-extended-x/node",
    "meta-data/iam/info/x",
    "meta-data/iam/anything",
    "meta-data/identity-credentials",
    "meta-data/identity-credentials/",
    "meta-data/identity-credentials/ec2/info",
    "meta-data/identity-credentials/ec2/security-credentials/ec2-instance",
    "meta-data/managed-ssh-keys/signer-cert",
    "meta-data/public-keys/",
    "meta-data/public-keys/0/openssh-key",
    "dynamic/instance-identity/pkcs7",
    "dynamic/instance-identity/signature",
    "dynamic/instance-identity/rsa2048",
];

fn routes(allowed: &[&str]) -> Routes {
    shut(allowed, &[])
}

fn shut(allowed: &[&str], denied: &[&str]) -> Routes {
    Routes::new(
        allowed.iter().map(|text| text.parse().unwrap()).collect(),
        denied.iter().map(|text| text.parse().unwrap()).collect(),
    )
}

/// As open as an operator can make it without naming a signature.
fn wide_open() -> Routes {
    routes(&["/latest/*", "/latest/meta-data/*", "/latest/dynamic/*"])
}

fn get(routes: &Routes, path: &str) -> Option<Readable> {
    match routes.parse(&Method::GET, path) {
        Ok(Route::Read(what)) => Some(what),
        Ok(Route::Token) => panic!("{path} is a token"),
        // The token's path is not for reading.
        Err(Error::Path | Error::Method { allow: ISSUE }) => None,
        Err(error) => panic!("{path}: {error}"),
    }
}

fn credentials(form: Form, role: &str) -> Readable {
    Readable::Credentials(form, RequestedRole(role.to_owned()))
}

#[test]
fn paths_are_routed_alike_at_every_version() {
    let upstream =
        |path: &str, lifetime| Readable::Upstream(UpstreamPath { path: path.to_owned(), lifetime });
    let arn = "arn:aws:iam::123456789012:role/team/reader";
    let cases = [
        ("", Readable::Listing("meta-data")),
        ("meta-data", Readable::Listing("iam/\ninstance-id\nplacement/")),
        ("meta-data/", Readable::Listing("iam/\ninstance-id\nplacement/")),
        ("meta-data/iam", Readable::Listing("info\nsecurity-credentials/")),
        ("meta-data/iam/", Readable::Listing("info\nsecurity-credentials/")),
        ("meta-data/iam/info", Readable::InstanceProfile),
        ("meta-data/iam/security-credentials", Readable::RoleName),
        ("meta-data/iam/security-credentials/", Readable::RoleName),
        ("meta-data/iam/security-credentials-extended", Readable::RoleName),
        ("meta-data/iam/security-credentials-extended/", Readable::RoleName),
        ("meta-data/iam/security-credentials/reader", credentials(Form::Plain, "reader")),
        ("meta-data/iam/security-credentials//reader", credentials(Form::Plain, "reader")),
        (
            "meta-data/iam/security-credentials/a.b_c+d=e,f@g-h",
            credentials(Form::Plain, "a.b_c+d=e,f@g-h"),
        ),
        ("meta-data/iam/security-credentials/team/reader", credentials(Form::Plain, "team/reader")),
        (&format!("meta-data/iam/security-credentials/{arn}"), credentials(Form::Plain, arn)),
        (
            "meta-data/iam/security-credentials-extended/reader",
            credentials(Form::Extended, "reader"),
        ),
        (
            "meta-data/iam/security-credentials-extended//reader",
            credentials(Form::Extended, "reader"),
        ),
        ("meta-data/instance-id", upstream("meta-data/instance-id", Lifetime::Instance)),
        ("meta-data/placement/region", upstream("meta-data/placement/region", Lifetime::Instance)),
        (
            "meta-data/placement/availability-zone/",
            upstream("meta-data/placement/availability-zone", Lifetime::Instance),
        ),
        (
            "dynamic/instance-identity/document",
            upstream("dynamic/instance-identity/document", Lifetime::Instance),
        ),
        (
            "meta-data/spot/instance-action",
            upstream("meta-data/spot/instance-action", Lifetime::Moment),
        ),
        ("meta-data/mac", upstream("meta-data/mac", Lifetime::Request)),
        ("meta-data/tags", upstream("meta-data/tags", Lifetime::Request)),
        ("meta-data/tags/instance/", upstream("meta-data/tags/instance/", Lifetime::Request)),
    ];
    let routes = routes(&["/latest/meta-data/mac", "/latest/meta-data/tags/*"]);
    for version in VERSIONS {
        for (rest, expected) in &cases {
            let path = format!("/{version}/{rest}");
            assert_eq!(get(&routes, &path).as_ref(), Some(expected), "{path}");
            // Slashes in a row are one, and one at the end is none, but in what is below an open folder.
            let doubled = format!("/{path}").replace('/', "//");
            assert_eq!(get(&routes, &doubled).as_ref(), Some(expected), "{doubled}");
            let ended = format!("{path}/");
            if !rest.starts_with("meta-data/tags") {
                assert_eq!(get(&routes, &ended).as_ref(), Some(expected), "{ended}");
                assert_eq!(get(&routes, &format!("{ended}//")).as_ref(), Some(expected));
            }
        }
        assert_eq!(get(&routes, &format!("/{version}")), Some(Readable::Listing("meta-data")));
    }
    assert_eq!(get(&routes, "/"), Some(Readable::Listing("latest")));
}

#[test]
fn what_is_neither_ours_nor_allowed_is_no_path() {
    let cases = [
        "",
        "*",
        "latest",
        "latest/meta-data/",
        "latest//meta-data/",
        "/Latest/meta-data/",
        "/LATEST",
        "/1.1/meta-data/",
        "/2007-1-19/meta-data/",
        "/2007-01-1a/meta-data/",
        "/20070119/meta-data/",
        "/meta-data/",
        "/latest/meta-data/mac",
        "/latest/meta-data/tags",
        "/latest/meta-data/placement",
        "/latest/meta-data/placement/",
        "/latest/meta-data/instance-id/x",
        "/latest/meta-data/iam/security-credentials/../reader",
        "/latest/meta-data/iam/security-credentials/.",
        "/latest/meta-data/spot",
        "/latest/meta-data/spot/",
        "/latest/dynamic/",
        "/latest/dynamic/instance-identity",
        "/latest/dynamic/instance-identity/",
        "/latest/dynamic/instance-identity/document/x",
        "/latest/dynamic/instance-identity/Document",
        "/latest/api/token",
        "/latest/api/token/",
    ];
    for path in cases {
        assert_eq!(get(&routes(&[]), path), None, "{path}");
    }
}

#[test]
fn odd_spellings_of_good_paths_are_no_paths() {
    let cases = [
        "//169.254.169.254/latest/meta-data/placement/region",
        "/latest/meta-data/placement/.//region",
        "/latest/meta-data/placement//../region",
        "/latest/meta-data/%2f/placement/region",
        "/./latest/meta-data/placement/region",
        "/latest/./meta-data/placement/region",
        "/latest/x/../meta-data/placement/region",
        "/latest/meta-data/placement/region/.",
        "/latest/meta-data/placement/region/..",
        "/../latest/meta-data/placement/region",
        "/latest/meta-data/placement/%72egion",
        "/latest/meta-data/placement%2fregion",
        "/latest/meta-data/placement%2Fregion",
        "/latest/meta-data/%2e/placement/region",
        "/latest/meta-data/%2E%2e/meta-data/placement/region",
        "/latest/meta-data/placement/region%00",
        "/latest/meta-data/placement/region%",
        "/latest/meta-data/placement/region;x",
        "/latest/meta-data;x=1/placement/region",
        "/latest\\meta-data\\placement\\region",
        "/latest/meta-data/placement/region\\",
        "/latest/meta-data/placement/region ",
        "/latest/meta-data/placement/region\t",
        "/latest/meta-data/placement/r\u{e9}gion",
        "/latest/meta-data/placement/region\u{ff0f}",
        "/l\u{430}test/meta-data/placement/region",
        "/latest/meta-data/placement/region#x",
        "/latest/meta-data/placement/region?x",
        "/latest/meta-data/placement/REGION",
        "http://169.254.169.254/latest/meta-data/placement/region",
        "/latest/meta-data/iam/security-credentials/%72eader",
        "/latest/meta-data/iam/security-credentials/rea\"der",
        "/latest/meta-data/iam/security-credentials/rea'der",
        "/latest/meta-data/iam/security-credentials/rea{der}",
        "/latest/meta-data/iam/security-credentials/rea|der",
    ];
    for routes in [routes(&[]), wide_open()] {
        for path in cases {
            let routed = get(&routes, path);
            // Another case is another path, which an operator may open.
            let other = Some("meta-data/placement/REGION");
            match routed {
                Some(Readable::Upstream(path)) => assert_eq!(Some(path.as_str()), other),
                routed => assert_eq!(routed, None, "{path}"),
            }
        }
    }
}

#[test]
fn no_allow_list_opens_what_is_the_nodes() {
    for version in VERSIONS {
        for denied in DENIED {
            let path = format!("/{version}/{denied}");
            assert_eq!(get(&wide_open(), &path), None, "{path}");
            assert_eq!(get(&wide_open(), &path.to_uppercase().replace("LATEST", "latest")), None);
        }
    }
}

#[test]
fn what_is_denied_is_shut_in_every_spelling_and_nothing_else_is() {
    let document = "/latest/dynamic/instance-identity/document";
    let spot = "/latest/meta-data/spot/instance-action";
    let everything = ["/latest/*", "common", document, spot];
    for denied in [document, "/latest/dynamic/*", "/latest/dynamic"] {
        for allowed in [&[][..], &everything] {
            let routes = shut(allowed, &[denied]);
            for version in VERSIONS {
                for path in
                    [document.to_owned(), format!("{document}/"), document.replace('/', "//")]
                {
                    let path = path.replace("latest", version);
                    assert_eq!(get(&routes, &path), None, "{denied} {path}");
                }
            }
            assert!(get(&routes, spot).is_some(), "{denied}");
        }
    }
    // What is answered here is not the real service's to give.
    let routes = shut(&["/latest/*"], &["/latest/*"]);
    assert_eq!(get(&routes, spot), None);
    assert!(get(&routes, "/latest/meta-data/iam/security-credentials/").is_some());
}

#[test]
fn the_common_set_opens_what_programs_ask_and_nothing_of_the_nodes() {
    let common = routes(&["common"]);
    let mac = "network/interfaces/macs/02:29:96:8f:6a:2d/vpc-id";
    for (path, sent) in [
        ("instance-type", "instance-type"),
        ("instance-type/", "instance-type"),
        ("network/interfaces/macs", "network/interfaces/macs"),
        ("network/interfaces/macs/", "network/interfaces/macs/"),
        (mac, mac),
        ("placement/", "placement/"),
        ("placement/region", "placement/region"),
        ("events/maintenance/scheduled", "events/maintenance/scheduled"),
    ] {
        let path = format!("/latest/meta-data/{path}");
        let Some(Readable::Upstream(found)) = get(&common, &path) else { panic!("{path}") };
        assert_eq!(found.as_str(), format!("meta-data/{sent}"));
        if !sent.starts_with("placement/region") {
            assert_eq!(get(&routes(&[]), &path), None, "{path}");
        }
    }
    for shut in ["tags/instance/Name", "network/interfaces", "macs", "spot/", "instance-type/x"] {
        assert_eq!(get(&common, &format!("/latest/meta-data/{shut}")), None, "{shut}");
    }
    for denied in DENIED {
        assert_eq!(get(&common, &format!("/latest/{denied}")), None, "{denied}");
    }
}

/// The page names each open path, and each of the common set as `--allow-path` would have it.
#[test]
fn the_page_of_paths_has_those_that_are_open_and_those_that_are_common() {
    let page = include_str!("../../../../../docs/paths.md");
    let section = |head: &str| {
        let after = page.split(head).nth(1).unwrap_or_else(|| panic!("no {head}"));
        let lines = after.split("\n## ").next().unwrap().lines().map(str::to_owned);
        lines.filter(|line| line.starts_with("| `")).collect::<Vec<_>>()
    };
    let named = |rows: Vec<String>| -> Vec<String> {
        let cells = rows.iter().map(|row| row.split('|').nth(1).unwrap().to_owned());
        let mut paths: Vec<String> = cells
            .flat_map(|cell| {
                cell.split('`').skip(1).step_by(2).map(str::to_owned).collect::<Vec<_>>()
            })
            .collect();
        paths.sort();
        paths
    };
    let mut open: Vec<_> = paths::OPEN.map(|open| open.path.to_owned()).into();
    open.sort();
    assert_eq!(named(section("## Open by default")), open);
    let common = paths::COMMON.map(|path| match path.ends_with('/') {
        true => format!("{path}*"),
        false => path.to_owned(),
    });
    assert_eq!(named(section("## The common set")), common);
}

#[test]
fn signatures_of_the_instance_are_opened_by_exact_paths_only() {
    let document = "/latest/dynamic/instance-identity/document";
    let signature = "/latest/dynamic/instance-identity/rsa2048";
    for folder in ["/latest/*", "/latest/dynamic/*", "/latest/dynamic/instance-identity/*"] {
        assert!(get(&routes(&[folder]), document).is_some(), "{folder}");
        for name in
            ["rsa2048", "rsa2048/", "pkcs7", "signature", "RSA2048", "rsa2048.", "document/x"]
        {
            let signature = format!("/latest/dynamic/instance-identity/{name}");
            assert!(get(&routes(&[folder]), &signature).is_none(), "{folder} {signature}");
            let doubled = signature.replace('/', "//");
            assert!(get(&routes(&[folder]), &doubled).is_none(), "{folder} {doubled}");
        }
    }
    assert!(get(&routes(&[signature]), signature).is_some());
    assert!(get(&routes(&[signature]), "/latest/dynamic/instance-identity/pkcs7").is_none());
}

#[test]
fn methods_have_their_paths() {
    let token = "/latest/api/token";
    let list = "/latest/meta-data/iam/security-credentials/";
    let routes = routes(&[]);
    let parse = |method: &str, path: &str| {
        routes.parse(&Method::from_bytes(method.as_bytes()).unwrap(), path)
    };
    assert_eq!(parse("PUT", token).unwrap(), Route::Token);
    assert!(matches!(parse("HEAD", list), Ok(Route::Read(Readable::RoleName))));
    for dated in ["/1.0/api/token", "/2021-03-23/api/token"] {
        assert!(matches!(parse("PUT", dated), Err(Error::DatedToken)), "{dated}");
    }
    for joined in ["/latest//api/token", "//latest/api/token", "/latest/api/token/"] {
        assert_eq!(parse("PUT", joined).unwrap(), Route::Token, "{joined}");
    }
    for odd in ["/latest/api/%74oken", "/latest/./api/token", "/latest/api/.//token"] {
        assert!(matches!(parse("PUT", odd), Err(Error::Path)), "{odd}");
    }
    for version in VERSIONS {
        for method in ["GET", "HEAD"] {
            let path = format!("/{version}/api/token");
            assert!(matches!(parse(method, &path), Err(Error::Method { allow: ISSUE })), "{path}");
        }
    }
    for method in ["POST", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "get", "PROPFIND"] {
        assert!(matches!(parse(method, list), Err(Error::Method { allow: READ })), "{method}");
        assert!(matches!(parse(method, token), Err(Error::Method { allow: ISSUE })), "{method}");
    }
    assert!(matches!(parse("PUT", list), Err(Error::Method { allow: READ })));
}

/// One change that a lenient server might undo, or a careless filter not see through.
fn mutate(random: &mut fastrand::Rng, path: &str) -> String {
    let at = random.usize(..=path.len());
    let (before, after) = path.split_at(at);
    let first = after.chars().next();
    match (random.u8(..14), first) {
        (0, Some(c)) => format!("{before}%{:02x}{}", u32::from(c), &after[1..]),
        (1, Some(c)) => format!("{before}%{:02X}{}", u32::from(c), &after[1..]),
        (2, Some(c)) => format!("{before}%25{:02x}{}", u32::from(c), &after[1..]),
        (3, Some(c)) => format!("{before}{}{}", c.to_ascii_uppercase(), &after[1..]),
        (4, _) => path.replacen('/', "//", 1 + random.usize(..4)),
        (5, _) => path.replace('/', "/./"),
        (6, _) => {
            format!("/latest/meta-data/placement/../..{}", path.trim_start_matches("/latest"))
        }
        (7, _) => path.replace('/', "\\"),
        (8, _) => format!(
            "{path}{}",
            ["/", "//", "/.", "/..", ".", ";", ";a", "%00", "?", "#"][random.usize(..10)]
        ),
        (9, _) => format!("{before};x={after}"),
        (10, _) => format!("{before}\u{200b}{after}"),
        (11, Some(c)) => {
            let wide = char::from_u32(u32::from(c) + 0xfee0).unwrap_or('x');
            format!("{before}{wide}{}", &after[1..])
        }
        (12, _) => path.replace('/', ["%2f", "%2F", "%5c", "%252f"][random.usize(..4)]),
        _ => format!("/latest/meta-data/tags/../{}", path.trim_start_matches("/latest/meta-data/")),
    }
}

#[test]
fn no_spelling_of_a_denied_path_is_ever_proxied() {
    let mut random = fastrand::Rng::with_seed(169_254);
    let routes = wide_open();
    let mut proxied = 0;
    for _ in 0..200_000 {
        let version = random.choice(VERSIONS).unwrap();
        let mut path = format!("/{version}/{}", random.choice(DENIED).unwrap());
        for _ in 0..random.usize(1..4) {
            path = mutate(&mut random, &path);
            while !path.is_ascii() && random.bool() {
                path.retain(|c| c.is_ascii());
            }
            if !path.is_ascii() {
                break;
            }
        }
        let Ok(Route::Read(Readable::Upstream(sent))) = routes.parse(&Method::GET, &path) else {
            continue;
        };
        proxied += 1;
        // What is sent has but one meaning, and that is not denied: judged here by other means than
        // the code's own.
        let sent = sent.as_str();
        assert!(
            sent.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.~+=,@:/".contains(&b)),
            "{path}"
        );
        assert!(!sent.split('/').any(|segment| [".", ".."].contains(&segment)), "{path}");
        let folded = sent.to_lowercase();
        for node in [
            "user-data",
            "api",
            "meta-data/iam",
            "meta-data/identity-credentials",
            "meta-data/managed-ssh-keys",
            "meta-data/public-keys",
        ] {
            let after = folded.strip_prefix(node).map(|rest| rest.trim_start_matches('.'));
            let inside = after.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
            assert!(!inside, "{path} is sent as {sent}");
        }
        if let Some(name) = folded.strip_prefix("dynamic/instance-identity/") {
            assert_eq!(name, "document", "{path}");
        }
    }
    // The spellings must come close enough to be worth trying.
    assert!(proxied > 0, "nothing was proxied at all");
}

#[test]
fn random_paths_are_routed_or_not_but_never_panic() {
    let mut random = fastrand::Rng::with_seed(80);
    let routes = wide_open();
    let pieces = [
        "/",
        "//",
        "latest",
        "1.0",
        "2024-04-11",
        "meta-data",
        "iam",
        "security-credentials",
        "security-credentials-extended",
        "user-data",
        ".",
        "..",
        "%2e",
        "%",
        ";",
        "\\",
        "\u{e9}",
        "role",
        "api",
        "token",
        "*",
        "?",
        "#",
        "\0",
        "-extended",
    ];
    for _ in 0..100_000 {
        let path: String =
            (0..random.usize(..12)).map(|_| *random.choice(&pieces).unwrap()).collect();
        for method in [Method::GET, Method::PUT, Method::POST] {
            let _ = routes.parse(&method, &path);
        }
    }
}

/// One thing that an operator may allow, as open as it comes or close to what is the node's.
fn allowed(random: &mut fastrand::Rng) -> Option<AllowPath> {
    let path = corpus::mutated(random);
    let text = String::from_utf8(path).ok()?;
    let text = match random.u8(..4) {
        0 => {
            ["/latest/*", "/latest/meta-data/*", "/latest/dynamic/*"][random.usize(..3)].to_owned()
        }
        1 => format!("{}/*", text.trim_end_matches('/')),
        2 => text.rsplit_once('/').map(|(folder, _)| format!("{folder}/*"))?,
        _ => text,
    };
    text.parse().ok()
}

#[test]
fn no_mutation_is_forwarded_that_means_the_nodes_own_whatever_is_allowed() {
    // The first allows a signature by name, in another spelling.
    for seed in [1_008_402_891_288_439_998, fastrand::u64(..)] {
        forwards_nothing_of_the_nodes(seed);
    }
}

fn forwards_nothing_of_the_nodes(seed: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    let (mut forwarded, mut refused) = (0, 0);
    for _ in 0..1000 {
        let allow: Vec<AllowPath> = (0..8).filter_map(|_| allowed(&mut random)).collect();
        let routes = Routes::new(allow.clone(), Vec::new());
        for _ in 0..100 {
            let Ok(target) = String::from_utf8(corpus::mutated(&mut random)) else { continue };
            let path = target.split(['?', '#']).next().unwrap();
            let shown = || format!("seed {seed}: {path:?} with {allow:?}");
            match routes.parse(&Method::GET, path) {
                Ok(Route::Read(Readable::Upstream(sent))) => {
                    let sent = sent.as_str();
                    // A signature is opened by its exact path only.
                    let exact = format!("/latest/{sent}").parse::<AllowPath>();
                    let named = exact.is_ok_and(|exact| allow.contains(&exact))
                        && sent.to_lowercase().starts_with("dynamic/instance-identity/");
                    assert!(named || corpus::may_be_forwarded(sent), "{} as {sent}", shown());
                    // It means nothing else, and has no other spelling.
                    let joined = corpus::joined(path);
                    let (_, rest) = joined.split_once('/').unwrap();
                    assert_eq!(sent.trim_end_matches('/'), rest, "{} as {sent}", shown());
                    forwarded += 1;
                }
                Ok(Route::Read(Readable::Credentials(_, role))) => {
                    let role = role.as_str();
                    let whole = corpus::joined(path).ends_with(role) && !role.contains("//");
                    assert!(whole && !role.ends_with('/'), "{}: {role}", shown());
                }
                Ok(Route::Read(_)) => {}
                Err(Error::Path | Error::Method { allow: ISSUE }) => refused += 1,
                other => panic!("{}: {other:?}", shown()),
            }
        }
    }
    assert!(forwarded > 1000 && refused > 10_000, "seed {seed}: {forwarded} {refused}");
}
