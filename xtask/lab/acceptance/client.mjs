// What a program with the AWS SDK for JavaScript in a pod does to be somebody. Prints as client.py does.
import { createRequire } from "node:module";

const require = createRequire(process.argv[2] + "/");
const { fromInstanceMetadata } = require("@smithy/credential-provider-imds");

// The SDK's defaults: one attempt of one second.
const credentials = await fromInstanceMetadata()().catch((error) => {
  console.error(error);
  return {};
});
console.log(JSON.stringify({ access_key: credentials.accessKeyId ?? null, arn: null }));
