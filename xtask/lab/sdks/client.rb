# What programs in Ruby do to be somebody, as client.py.
endpoint = ENV.fetch("ENDPOINT")
case ARGV[0]
when "aws-sdk"
  require "aws-sdk-core"
  Aws::STS::Client.new(endpoint: endpoint).get_caller_identity
when "fog"
  require "fog/aws"
  storage = Fog::Storage.new(
    provider: "AWS", use_iam_profile: true, region: ENV["AWS_REGION"], endpoint: endpoint, path_style: true
  )
  storage.get_bucket(ENV.fetch("BUCKET"))
end
