"""What programs in Python do to be somebody: `client.py NAME` signs one request with what the library of that name finds,
and sends it to $ENDPOINT."""

import asyncio
import json
import os
import sys
import urllib.parse
import urllib.request

ENDPOINT = os.environ["ENDPOINT"]
HOST = ENDPOINT.removeprefix("http://")
BUCKET = os.environ["BUCKET"]
REGION = os.environ.get("AWS_REGION")


def boto3():
    import boto3

    boto3.client("sts", endpoint_url=ENDPOINT).get_caller_identity()


def old_boto3():
    import collections
    import collections.abc

    # It is older than the Python that runs it.
    for name in ("Callable", "Mapping", "MutableMapping", "Sequence"):
        setattr(collections, name, getattr(collections.abc, name))
    boto3()


def boto():
    from boto.s3.connection import OrdinaryCallingFormat, S3Connection

    host, port = HOST.split(":")
    plain = OrdinaryCallingFormat()
    S3Connection(host=host, port=int(port), is_secure=False, calling_format=plain).get_all_buckets()


def s3fs():
    import s3fs

    s3fs.S3FileSystem(client_kwargs={"endpoint_url": ENDPOINT}).ls(BUCKET)


def aiobotocore():
    from aiobotocore.session import get_session

    async def ask():
        async with get_session().create_client("sts", endpoint_url=ENDPOINT) as sts:
            await sts.get_caller_identity()

    asyncio.run(ask())


def minio():
    from minio import Minio
    from minio.credentials import IamAwsProvider

    client = Minio(HOST, secure=False, region=REGION, credentials=IamAwsProvider())
    client.list_buckets()


def pyarrow():
    from pyarrow import fs

    s3 = fs.S3FileSystem(endpoint_override=HOST, scheme="http")
    s3.get_file_info(fs.FileSelector(BUCKET))


def awscrt():
    from awscrt import auth, http, io

    bootstrap = io.ClientBootstrap.get_or_create_static_default()
    provider = auth.AwsCredentialsProvider.new_default_chain(bootstrap)
    request = http.HttpRequest("GET", "/?Action=GetCallerIdentity&Version=2011-06-15")
    request.headers.add("host", HOST)
    config = auth.AwsSigningConfig(
        algorithm=auth.AwsSigningAlgorithm.V4,
        signature_type=auth.AwsSignatureType.HTTP_REQUEST_HEADERS,
        credentials_provider=provider,
        region=REGION,
        service="sts",
    )
    signed = auth.aws_sign_request(request, config).result(60)
    send(ENDPOINT + signed.path, dict(signed.headers))


def mountpoint():
    from s3torchconnectorclient._mountpoint_s3_client import MountpointS3Client

    client = MountpointS3Client(region=REGION, user_agent_prefix="lab", endpoint=ENDPOINT, force_path_style=True)
    list(client.list_objects(BUCKET))


def obstore():
    import obstore
    from obstore.store import S3Store

    store = S3Store(BUCKET, endpoint=ENDPOINT, client_options={"allow_http": True})
    list(obstore.list(store))


def opendal():
    from opendal import Operator

    list(Operator("s3", bucket=BUCKET, region=REGION, endpoint=ENDPOINT).list("/"))


def google_auth():
    """A pod that is somebody at Google by its AWS role: it shows Google a signed request, which is sent here instead."""
    import google.auth.aws
    from google.auth.transport.requests import Request

    imds = "http://169.254.169.254/latest"
    credentials = google.auth.aws.Credentials.from_info(
        {
            "audience": "//iam.googleapis.com/projects/1/locations/global/workloadIdentityPools/lab/providers/lab",
            "subject_token_type": "urn:ietf:params:aws:token-type:aws4_request",
            "token_url": "https://sts.googleapis.com/v1/token",
            "credential_source": {
                "environment_id": "aws1",
                "region_url": f"{imds}/meta-data/placement/availability-zone",
                "url": f"{imds}/meta-data/iam/security-credentials",
                "imdsv2_session_token_url": f"{imds}/api/token",
                "regional_cred_verification_url": "https://sts.{region}.amazonaws.com"
                "?Action=GetCallerIdentity&Version=2011-06-15",
            },
        }
    )
    signed = json.loads(urllib.parse.unquote(credentials.retrieve_subject_token(Request())))
    query = urllib.parse.urlsplit(signed["url"]).query
    send(f"{ENDPOINT}/?{query}", {each["key"]: each["value"] for each in signed["headers"]}, signed["method"])


def send(url, headers, method="GET"):
    body = b"" if method == "POST" else None
    with urllib.request.urlopen(urllib.request.Request(url, body, headers, method=method), timeout=10) as answer:
        answer.read()


if __name__ == "__main__":
    globals()[sys.argv[1]]()
