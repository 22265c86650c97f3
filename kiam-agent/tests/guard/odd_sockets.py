"""Sends one packet to the metadata service by a way that no hook at connect sees.

odd_sockets.py KIND SOURCE_V4 SOURCE_V6 NODE_V4 INTERFACE; it ends once the packet has gone through the pod's link.
"""
import socket
import struct
import sys

kind, source4, source6, node4, interface = sys.argv[1:6]
IMDS4, IMDS6 = "169.254.169.254", "fd00:ec2::254"
GATEWAY = b"\xee" * 6
IPV4, IPV6, VLAN = 0x0800, 0x86DD, 0x8100


def checksum(data):
    total = sum(struct.unpack("!%dH" % (len(data) // 2), data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def syn():
    return struct.pack("!HHIIBBHHH", 40000, 80, 1, 0, 5 << 4, 2, 65535, 0, 0)


def ipv4():
    ends = socket.inet_aton(source4) + socket.inet_aton(IMDS4)
    head = struct.pack("!BBHHHBBH", 0x45, 0, 40, 1, 0, 64, socket.IPPROTO_TCP, 0) + ends
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + syn()


def ipv6():
    ends = socket.inet_pton(socket.AF_INET6, source6) + socket.inet_pton(socket.AF_INET6, IMDS6)
    return struct.pack("!IHBB", 6 << 28, 20, socket.IPPROTO_TCP, 64) + ends + syn()


def raw(family, protocol, data, to):
    with socket.socket(family, socket.SOCK_RAW, protocol) as sender:
        sender.sendto(data, to)


def packet(sort, kind_of_ip, data):
    with socket.socket(socket.AF_PACKET, sort) as sender:
        if sort == socket.SOCK_RAW:
            sender.bind((interface, 0))
            sender.send(GATEWAY + sender.getsockname()[4] + struct.pack("!H", kind_of_ip) + data)
        else:
            sender.sendto(data, (interface, kind_of_ip, 0, 0, GATEWAY))


def connect(to):
    with socket.socket() as sender:
        sender.settimeout(5)
        sender.connect((to, 80))


ECHO4 = struct.pack("!BBHHH", 8, 0, checksum(struct.pack("!BBHHH", 8, 0, 0, 7, 1)), 7, 1)
ECHO6 = struct.pack("!BBHHH", 128, 0, 0, 7, 1)
ways = {
    "tcp from a raw socket": lambda: raw(socket.AF_INET, socket.IPPROTO_RAW, ipv4(), (IMDS4, 0)),
    "icmp": lambda: raw(socket.AF_INET, socket.IPPROTO_ICMP, ECHO4, (IMDS4, 0)),
    "icmpv6": lambda: raw(socket.AF_INET6, socket.IPPROTO_ICMPV6, ECHO6, (IMDS6, 0)),
    "ipv4 packet": lambda: packet(socket.SOCK_DGRAM, IPV4, ipv4()),
    "ipv4 frame": lambda: packet(socket.SOCK_RAW, IPV4, ipv4()),
    "ipv4 tagged frame": lambda: packet(socket.SOCK_RAW, VLAN, struct.pack("!HH", 0, IPV4) + ipv4()),
    "ipv6 tagged frame": lambda: packet(socket.SOCK_RAW, VLAN, struct.pack("!HH", 0, IPV6) + ipv6()),
    "ipv6 packet": lambda: packet(socket.SOCK_DGRAM, IPV6, ipv6()),
    "ipv6 frame": lambda: packet(socket.SOCK_RAW, IPV6, ipv6()),
    "connect": lambda: connect(IMDS4),
}
try:
    ways[kind]()
    print("sent")
except OSError as error:
    print(error.strerror)
# Refused by the node, and behind the packet on the same link: when this is answered, that was dealt with.
try:
    connect(node4)
except OSError:
    pass
