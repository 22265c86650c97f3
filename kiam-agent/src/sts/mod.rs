//! Issues credentials through AWS STS and classes its errors. The only importer of the AWS SDK.
