"""Connects to the metadata service, then for each line of input sends a byte and says what came of it."""
import socket
import sys

family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
held = socket.socket(family)
held.settimeout(5)
held.connect((sys.argv[1], 80))
print("connected", flush=True)
for _ in sys.stdin:
    try:
        held.send(b"G")
        print("alive", flush=True)
    except OSError as error:
        print(error.strerror, flush=True)
