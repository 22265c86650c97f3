#!/bin/sh
# Makes the certificates that are here, all for tests alone and good until 2126. Needs OpenSSL 3.
set -eu
cd "$(dirname "$0")"
key() { openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$1.key.pem"; }
ca() {
  key "$1"
  openssl req -x509 -new -key "$1.key.pem" -subj "/CN=$1" -days 36500 -out "$1.pem" \
    -addext keyUsage=critical,keyCertSign
}
server() {
  openssl req -new -key server.key.pem -subj /CN=server |
    openssl x509 -req -CA "$1.pem" -CAkey "$1.key.pem" -days 36500 -out "server-of-$1.pem" \
      -extfile server.ext
}
printf 'basicConstraints=CA:FALSE\nsubjectAltName=DNS:kubernetes.test,DNS:sts.test,IP:127.0.0.1\n' >server.ext
ca old-ca
ca new-ca
key server
server old-ca
server new-ca
openssl req -x509 -new -key server.key.pem -subj /CN=server -days 36500 -out self-signed.pem \
  -addext subjectAltName=IP:127.0.0.1
openssl req -new -key server.key.pem -subj /CN=client |
  openssl x509 -req -CA old-ca.pem -CAkey old-ca.key.pem -days 36500 -out version-1.pem
rm server.ext old-ca.key.pem new-ca.key.pem
