"""The AWS account of the acceptance test, in a moto server: `account.py ENDPOINT set-up ROLE…` makes the roles and the
node's credentials and turns authentication on; `account.py ENDPOINT records` prints whose each access key is."""

import json
import sys
import urllib.request

import boto3

REGION = "eu-west-1"
NODE = "node"


def client(endpoint, service):
    return boto3.client(
        service,
        endpoint_url=endpoint,
        region_name=REGION,
        aws_access_key_id="nobody",
        aws_secret_access_key="nothing",
    )


def statement(action, **rest):
    return json.dumps({"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": action, **rest}]})


def set_up(endpoint, roles):
    """`roles` are paths and names, such as `/team/reader`. The node may assume them, and nothing else."""
    iam = client(endpoint, "iam")
    trust = statement("sts:AssumeRole", Principal={"AWS": "*"})
    arns = []
    for role in [f"/{NODE}", *roles]:
        path, name = role.rsplit("/", 1)
        made = iam.create_role(RoleName=name, Path=f"{path}/", AssumeRolePolicyDocument=trust)
        arns.append(made["Role"]["Arn"])
    node, *others = arns
    policy = statement("sts:AssumeRole", Resource=others)
    iam.put_role_policy(RoleName=NODE, PolicyName="pods", PolicyDocument=policy)
    credentials = client(endpoint, "sts").assume_role(RoleArn=node, RoleSessionName="i-0123456789abcdef0")
    call(f"{endpoint}/moto-api/reset-auth", b"0")
    keys = credentials["Credentials"]
    return {name: keys[name] for name in ("AccessKeyId", "SecretAccessKey", "SessionToken")}


def records(endpoint):
    """Access key → what moto issued it for."""
    issued = json.loads(call(f"{endpoint}/moto-api/data.json"))["sts"]["AssumedRole"]
    return {one["access_key_id"]: {"role": one["role_arn"], "arn": one["arn"]} for one in issued}


def call(url, body=None):
    request = urllib.request.Request(url, data=body, headers={"Content-Type": "text/plain"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.read()


if __name__ == "__main__":
    endpoint, command, *arguments = sys.argv[1:]
    print(json.dumps(set_up(endpoint, arguments) if command == "set-up" else records(endpoint)))
