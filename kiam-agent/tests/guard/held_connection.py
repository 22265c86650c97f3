"""Connects to the metadata service, then for each line of input asks for something and says what came of it."""
import socket
import sys

family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
held = socket.socket(family)
held.settimeout(5)
held.connect((sys.argv[1], 80))
print("connected", flush=True)
for _ in sys.stdin:
    try:
        held.sendall(b"GET /latest/meta-data/instance-id HTTP/1.1\r\nHost: imds\r\n\r\n")
        print("alive" if held.recv(4096).startswith(b"HTTP/1.1 200") else "closed", flush=True)
    except OSError as error:
        print(error.strerror or error, flush=True)
