"""What a program in a pod does to be somebody. Prints the access key it got, or null, and who STS says it is."""

import json
import sys
import urllib.error
import urllib.request

LIST = "http://169.254.169.254/latest/meta-data/iam/security-credentials/"


def boto3_session():
    """The credential chain of an ordinary program, which asks with a token (IMDSv2)."""
    import boto3

    credentials = boto3.Session().get_credentials()
    if credentials is None:
        return None, None
    if credentials.method != "iam-role":
        sys.exit(f"the credentials came from {credentials.method}, not from the metadata service")
    return credentials.access_key, boto3.client("sts").get_caller_identity()["Arn"]


def boto3_key():
    """The same chain, up to the credentials: no STS is asked who they are."""
    import boto3

    credentials = boto3.Session().get_credentials()
    return credentials and credentials.access_key, None


def imdsv1():
    """Old programs and scripts: two GETs without a token. They sign by themselves, here with botocore's signer."""
    import boto3

    try:
        role = get(LIST)
    except urllib.error.HTTPError as error:
        if error.code != 404 or error.read():
            raise
        return None, None
    keys = json.loads(get(LIST + role))
    sts = boto3.client(
        "sts",
        aws_access_key_id=keys["AccessKeyId"],
        aws_secret_access_key=keys["SecretAccessKey"],
        aws_session_token=keys["Token"],
    )
    return keys["AccessKeyId"], sts.get_caller_identity()["Arn"]


def get(url):
    with urllib.request.urlopen(url, timeout=5) as answer:
        return answer.read().decode()


if __name__ == "__main__":
    access_key, arn = {"boto3": boto3_session, "boto3-key": boto3_key, "imdsv1": imdsv1}[sys.argv[1]]()
    print(json.dumps({"access_key": access_key, "arn": arn}))
