#!/bin/sh
# Prometheus that discovers EC2 instances at $ENDPOINT.
folder=$(mktemp -d)
cat >"$folder"/prometheus.yml <<END
scrape_configs:
- job_name: ec2
  ec2_sd_configs:
  - endpoint: $ENDPOINT
END
exec prometheus --config.file="$folder"/prometheus.yml --storage.tsdb.path="$folder" --web.listen-address=127.0.0.1:0
