//! The clients: where each comes from, and how it is made to sign a request.

use super::home::Home;

/// One client. Its words may have `{endpoint}`, `{host}` (with the port), `{sources}` (the folder of the programs that are
/// written here; `/mnt` where Debian's are) and `{folder}` (where it is installed).
#[derive(Clone, Copy, Debug)]
pub(super) struct Row {
    pub(super) name: &'static str,
    /// What it does AWS's work with, where its name does not say so.
    pub(super) by: &'static str,
    pub(super) home: Home,
    /// A command that makes it ready, among Debian's packages.
    pub(super) setup: &'static [&'static str],
    /// How it is run.
    pub(super) words: &'static [&'static str],
    pub(super) environment: &'static [(&'static str, &'static str)],
    pub(super) tokens: Tokens,
    pub(super) region: Region,
    pub(super) ends: Ends,
    /// A part of what it prints where it finds no credentials, which `docs/migrating.md` shows; empty where it does not.
    pub(super) says: &'static str,
}

/// Whether it asks for session tokens (IMDSv2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tokens {
    Yes,
    Never,
}

/// Whether it finds the region by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Region {
    Finds,
    Given,
}

/// Whether it ends when it has asked.
#[derive(Clone, Copy, Debug)]
pub(super) enum Ends {
    Yes,
    /// It does where it finds no credentials, and goes on with those that it has found.
    Unserved,
    /// It goes on, and prints this when it finds no credentials.
    Never {
        gives_up: &'static str,
    },
}

const CLIENT_PY: &str = "{sources}/client.py";
const CLIENT_MJS: &str = "{sources}/client.mjs";
const V2_ONLY: &[(&str, &str)] = &[("AWS_EC2_METADATA_V1_DISABLED", "true")];

const PYTHON_SAYS: &str = "Unable to locate credentials";
const JAVASCRIPT_3_SAYS: &str =
    "CredentialsProviderError: Could not load credentials from any providers";
const JAVASCRIPT_2_SAYS: &str = "Missing credentials in config";
const GO_1_SAYS: &str = "NoCredentialProviders: no valid providers in chain";

const fn row(name: &'static str, home: Home, words: &'static [&'static str]) -> Row {
    Row {
        name,
        by: "",
        home,
        setup: &[],
        words,
        environment: &[],
        tokens: Tokens::Yes,
        region: Region::Given,
        ends: Ends::Yes,
        says: "",
    }
}

const BOTO3: Row = Row {
    says: PYTHON_SAYS,
    ..row("boto3", Home::Python(&["boto3==1.44.5"]), &[CLIENT_PY, "boto3"])
};
const RESTIC: &[&str] =
    &["sh", "-c", "RESTIC_PASSWORD=x restic --no-cache -r s3:$ENDPOINT/lab-bucket snapshots"];
const S3FS: Row = Row {
    ends: Ends::Unserved,
    ..row(
        "s3fs-fuse, role named",
        Home::Debian(&["s3fs"]),
        &[
            "sh",
            "-c",
            "exec s3fs lab-bucket /srv -f -o url=$ENDPOINT,use_path_request_style,iam_role=reader,endpoint=eu-west-1",
        ],
    )
};

pub(super) const ROWS: &[Row] = &[
    BOTO3,
    Row { name: "boto3, tokens only", environment: V2_ONLY, ..BOTO3 },
    Row {
        tokens: Tokens::Never,
        says: PYTHON_SAYS,
        ..row(
            "boto3, old",
            Home::Python(&["boto3==1.9.253", "botocore==1.12.253", "six==1.17.0"]),
            &[CLIENT_PY, "old_boto3"],
        )
    },
    Row {
        tokens: Tokens::Never,
        ..row("boto", Home::Debian(&["python3-boto"]), &["python3", "/mnt/client.py", "boto"])
    },
    row("aiobotocore", Home::Python(&["aiobotocore==3.10.0"]), &[CLIENT_PY, "aiobotocore"]),
    row("s3fs", Home::Python(&["s3fs==2026.9.0"]), &[CLIENT_PY, "s3fs"]),
    Row {
        says: PYTHON_SAYS,
        ..row(
            "AWS CLI 1",
            Home::Python(&["awscli==1.46.3"]),
            &["{folder}/bin/aws", "sts", "get-caller-identity"],
        )
    },
    Row {
        region: Region::Finds,
        says: PYTHON_SAYS,
        ..row(
            "AWS CLI 2",
            Home::Debian(&["awscli"]),
            &["aws", "--endpoint-url", "{endpoint}", "sts", "get-caller-identity"],
        )
    },
    row("minio-py", Home::Python(&["minio==7.2.20"]), &[CLIENT_PY, "minio"]),
    row(
        "google-auth",
        Home::Python(&["google-auth[requests]==2.63.0"]),
        &[CLIENT_PY, "google_auth"],
    ),
    Row {
        by: "AWS SDK for C++",
        ..row("pyarrow", Home::Python(&["pyarrow==26.0.1"]), &[CLIENT_PY, "pyarrow"])
    },
    Row {
        by: "AWS Common Runtime",
        ..row("awscrt", Home::Python(&["awscrt==0.38.1"]), &[CLIENT_PY, "awscrt"])
    },
    Row {
        by: "AWS Common Runtime",
        ..row(
            "Mountpoint for S3",
            Home::Python(&["s3torchconnectorclient==1.5.0"]),
            &[CLIENT_PY, "mountpoint"],
        )
    },
    Row {
        by: "object_store",
        ..row("obstore", Home::Python(&["obstore==0.12.1"]), &[CLIENT_PY, "obstore"])
    },
    row("OpenDAL", Home::Python(&["opendal==0.47.12"]), &[CLIENT_PY, "opendal"]),
    Row {
        says: JAVASCRIPT_3_SAYS,
        ..row(
            "SDK for JavaScript 3",
            Home::Node("@aws-sdk/client-sts@3.1177.0"),
            &[CLIENT_MJS, "{folder}", "v3"],
        )
    },
    Row {
        says: JAVASCRIPT_3_SAYS,
        ..row(
            "SDK for JavaScript 3, old",
            Home::Node("@aws-sdk/client-sts@3.100.0"),
            &[CLIENT_MJS, "{folder}", "v3"],
        )
    },
    Row {
        says: JAVASCRIPT_2_SAYS,
        ..row(
            "SDK for JavaScript 2",
            Home::Node("aws-sdk@2.1693.0"),
            &[CLIENT_MJS, "{folder}", "v2"],
        )
    },
    Row {
        tokens: Tokens::Never,
        says: JAVASCRIPT_2_SAYS,
        ..row(
            "SDK for JavaScript 2, old",
            Home::Node("aws-sdk@2.500.0"),
            &[CLIENT_MJS, "{folder}", "v2"],
        )
    },
    row(
        "google-auth-library",
        Home::Node("google-auth-library@11.3.4"),
        &[CLIENT_MJS, "{folder}", "google"],
    ),
    Row {
        says: GO_1_SAYS,
        ..row(
            "rclone",
            Home::Debian(&["rclone"]),
            &[
                "sh",
                "-c",
                "exec rclone lsd :s3,env_auth,provider=AWS,region=eu-west-1,endpoint='\"'$ENDPOINT'\"',force_path_style:",
            ],
        )
    },
    Row { says: "Access Denied", ..row("restic", Home::Debian(&["restic"]), RESTIC) },
    row(
        "s3cmd",
        Home::Debian(&["s3cmd"]),
        &["s3cmd", "--no-ssl", "--host={host}", "--host-bucket={host}", "--region=eu-west-1", "ls"],
    ),
    S3FS,
    Row {
        name: "s3fs-fuse",
        // To list the roles, though not to ask for one.
        tokens: Tokens::Never,
        words: &[
            "sh",
            "-c",
            "exec s3fs lab-bucket /srv -f -o url=$ENDPOINT,use_path_request_style,iam_role=auto,endpoint=eu-west-1",
        ],
        ..S3FS
    },
    row(
        "GDAL",
        Home::Debian(&["gdal-bin"]),
        &[
            "sh",
            "-c",
            "AWS_S3_ENDPOINT=$HOST:$PORT AWS_HTTPS=NO AWS_VIRTUAL_HOSTING=FALSE exec gdalinfo /vsis3/lab-bucket/none.tif",
        ],
    ),
    Row {
        region: Region::Finds,
        ends: Ends::Never { gives_up: "Unable to refresh target groups" },
        says: GO_1_SAYS,
        ..row("Prometheus", Home::Debian(&["prometheus"]), &["sh", "/mnt/prometheus.sh"])
    },
    Row {
        region: Region::Finds,
        setup: &[
            "sh",
            "-c",
            "GO111MODULE=off GOPATH=/usr/share/gocode GOCACHE=/tmp/go go build -o /root/go-v1 /mnt/go/v1.go",
        ],
        says: GO_1_SAYS,
        ..row(
            "SDK for Go 1",
            Home::Debian(&["golang-github-aws-aws-sdk-go-dev", "golang-go"]),
            &["/root/go-v1"],
        )
    },
    Row {
        region: Region::Finds,
        setup: &[
            "sh",
            "-c",
            "GO111MODULE=off GOPATH=/usr/share/gocode GOCACHE=/tmp/go go build -o /root/go-v2 /mnt/go/v2.go",
        ],
        says: "no EC2 IMDS role found",
        ..row(
            "SDK for Go 2",
            Home::Debian(&["golang-github-aws-aws-sdk-go-v2-dev", "golang-go"]),
            &["/root/go-v2"],
        )
    },
    Row {
        says: "Aws::Sigv4::Errors::MissingCredentialsError",
        ..row(
            "SDK for Ruby 3",
            Home::Debian(&["ruby-aws-sdk-core"]),
            &["ruby", "/mnt/client.rb", "aws-sdk"],
        )
    },
    row("fog-aws", Home::Debian(&["ruby-fog-aws"]), &["ruby", "/mnt/client.rb", "fog"]),
    Row {
        tokens: Tokens::Never,
        ..row(
            "AsyncAws",
            Home::Debian(&["php-async-aws-core", "php8.2-cli", "php8.2-xml"]),
            &["php8.2", "/mnt/client.php"],
        )
    },
    Row {
        region: Region::Finds,
        setup: &[
            "javac",
            "-cp",
            "/opt/aws-java-sdk-bundle-1.11.901.jar",
            "-d",
            "/root",
            "/mnt/Client.java",
        ],
        says: "Unable to load AWS credentials from any provider in the chain",
        ..row(
            "SDK for Java 1",
            Home::Jar {
                package: "sagemaker_pyspark==1.4.5",
                jar: "deps/jars/aws-java-sdk-bundle-1.11.901.jar",
            },
            &["java", "-cp", "/opt/aws-java-sdk-bundle-1.11.901.jar:/root", "Client"],
        )
    },
];

#[cfg(test)]
mod tests {
    use super::*;
    use xtask::command::workspace;

    #[test]
    fn the_page_for_those_who_migrate_shows_what_clients_say() {
        let page = std::fs::read_to_string(workspace().join("docs/migrating.md")).unwrap();
        let said = ROWS.iter().filter(|row| !row.says.is_empty());
        let missing: Vec<&str> = said
            .filter(|row| {
                let name = row.name.split(',').next().unwrap();
                let is_shown =
                    |line: &str| line.contains(name) && line.contains(&format!("`{}`", row.says));
                !page.lines().any(is_shown)
            })
            .map(|row| row.name)
            .collect();
        assert!(missing.is_empty(), "docs/migrating.md does not show what these say: {missing:?}");
    }
}
