// What programs in JavaScript do to be somebody: `client.mjs FOLDER NAME` signs one request with what the library finds
// that is installed in the folder, and sends it to $ENDPOINT.
import { createRequire } from "node:module";

const [, , folder, name] = process.argv;
const require = createRequire(folder + "/");
const endpoint = process.env.ENDPOINT;

const clients = {
  async v3() {
    const { STSClient, GetCallerIdentityCommand } = require("@aws-sdk/client-sts");
    await new STSClient({ endpoint }).send(new GetCallerIdentityCommand({}));
  },
  async v2() {
    const { STS } = require("aws-sdk");
    await new STS({ endpoint, region: process.env.AWS_REGION }).getCallerIdentity().promise();
  },
  async google() {
    // As google_auth of client.py.
    const { AwsClient } = require("google-auth-library");
    const imds = "http://169.254.169.254/latest";
    const client = new AwsClient({
      type: "external_account",
      audience: "//iam.googleapis.com/projects/1/locations/global/workloadIdentityPools/lab/providers/lab",
      subject_token_type: "urn:ietf:params:aws:token-type:aws4_request",
      token_url: "https://sts.googleapis.com/v1/token",
      credential_source: {
        environment_id: "aws1",
        region_url: `${imds}/meta-data/placement/availability-zone`,
        url: `${imds}/meta-data/iam/security-credentials`,
        imdsv2_session_token_url: `${imds}/api/token`,
        regional_cred_verification_url:
          "https://sts.{region}.amazonaws.com?Action=GetCallerIdentity&Version=2011-06-15",
      },
    });
    const signed = JSON.parse(decodeURIComponent(await client.retrieveSubjectToken()));
    const http = await import("node:http");
    const { search } = new URL(signed.url);
    const headers = Object.fromEntries(signed.headers.map(({ key, value }) => [key, value]));
    await new Promise((resolve, reject) => {
      const request = http.request(`${endpoint}/${search}`, { method: signed.method, headers }, resolve);
      request.on("error", reject).end();
    });
  },
};

try {
  await clients[name]();
} catch (error) {
  console.error(error);
  process.exit(1);
}
process.exit(0);
