#!/usr/bin/env python3
"""popup-notifier: a phone rings at the PBX, and every agent's browser shows who is calling.

    PBX      -- POST /api/trigger -->  Server --Call-------->  Hub --frame-->  every browser
    browser  -- GET /crmws --------->  Server --Subscriber-->  Hub (owns the socket from here on)

Read it from top to bottom:

    1. Configuration   KEYS, Config, load_config
    2. Access lists    AccessList, peer_address, client_address, Origins
    3. WebSocket       RFC 6455 without I/O: check_handshake, serialize_frame, WebSocketProtocol
    4. Hub             Call, Backlog, Subscriber, Hub
    5. HTTP            RFC 9112: parse_head, check_parameters, Server, RequestHandler
    6. TLS             make_tls_context
    7. Redis           RESP, Cursor, SharedHub, Relay
    8. systemd         ServiceManager
    9. Command line    log, limits, signals, main

Who may touch what:

    The main thread accepts connections, gathers requests without ever blocking, and answers them.
    A slow peer costs it a descriptor and a small buffer, never a wait. A second port, CLIENT_PORT,
    has a thread of its own for the same. What waits for a disk gets a request thread.
    The Hub's I/O thread owns every browser's socket from Hub.subscribe() on: nobody else reads,
    writes or closes it. What other threads hand to the Hub passes through its lock.
    With REDIS_URL two more threads, the Relay's, talk to Redis, and hand calls to the Hub.
"""

from __future__ import annotations

import argparse
import base64
import calendar
import codecs
import collections
import contextlib
import difflib
import email.utils
import enum
import errno
import hashlib
import hmac
import http.server
import ipaddress
import itertools
import json
import logging
import math
import os
import random
import re
import resource
import selectors
import signal
import socket
import socketserver
import ssl
import stat
import struct
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache, partial
from http import HTTPStatus
from pathlib import Path
from typing import Any, Callable, NamedTuple, Union
from urllib.parse import parse_qsl, unquote, unquote_to_bytes, urlsplit

VERSION = "1.0.0"
STATUS_INTERVAL = 10.0  # seconds between two status lines to systemd
DEFAULT_CONFIG = "/usr/local/etc/popup-notifier.conf"

# Limits of section 3, in bytes.
MAX_MESSAGE = 64 * 1024  # no page has to send us anything; one that does sends little
MAX_CONTROL = 125  # RFC 6455 section 5.5

# Limits of section 4, in bytes and seconds.
MAX_BACKLOG = 512 * 1024  # may wait for one browser: some 2,000 calls
FLUSH_SIZE = 64 * 1024  # offered to a slow browser's socket at once
# Taken from one browser before the next has its turn: a whole TLS record, so that none of it stays
# where the selector can't see it.
READ_SIZE = 16 * 1024
LOGGED_EXTENS = 10  # this many are named when nobody wanted a call
LOGGED_ARRIVALS = 4  # of browsers that come at once, this many are named in the log
# Of the interval: pings that are due within it leave together. To wake for each of 10,000
# browsers, and again for its answer, costs three times as much.
PING_SLACK = 0.01
CLOSE_TIMEOUT = 1.0  # a browser has this long to take its Close frame and hang up
ID_RESERVE = 60_000  # milliseconds that IDs are reserved ahead: one file written a minute
MAX_HISTORY = 20_000  # calls remembered at most, whatever HISTORY says: some 30 MB
MAX_HISTORY_SIZE = 32 << 20  # bytes of their messages: they may be 200 KiB each
# A PBX sends each message by a process or channel of its own: an answer within the first moment,
# as of a headset that picks up by itself, can overtake the ring. Seconds.
OVERTAKING = 3.0
DELIVERY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)  # seconds
STOP_TIMEOUT = 3.0  # all of them together have this long when the daemon ends

# Limits of section 5, in bytes, counts and seconds. Other servers allow heads of 8 to 64 KiB; a
# browser with many cookies sends 4, a dialplan 0.3.
MAX_HEAD = 16 * 1024
MAX_FIELDS = 64
MAX_BODY = 64 * 1024
MAX_PARAMETERS = 32
MAX_NAME = 64  # characters, of extensions too
MAX_EXTENS = 100  # that one browser may ask for
MAX_VALUE = 2048  # characters; the longest caller ID that Asterisk keeps has 256
REQUEST_TIMEOUT = 10.0  # from the first byte of a request to its last
DRAIN_TIMEOUT = 1.0  # a refused peer has this long to take our answer and hang up
# socketserver asks for a queue of 5 connections: a restart with 10,000 browsers would lose most
# of their handshakes. The kernel cuts this down to net.core.somaxconn.
LISTEN_QUEUE = 4096
HEALTH_TIMEOUT = 2.0  # the hub has this long to show that it turns
MAX_THREADS = 32  # requests that are answered in threads at a time
ACCEPT_BATCH = 64  # connections accepted before those that wait are looked at again
ACCEPT_PAUSE = 0.1  # no accepting for this long when descriptors have run out
MAX_FILES = 1 << 20  # open files we ask for at most: some systems have no limit but want one
ROOM_SIZES = (512, 512, 64, 256)  # connections that wait for more bytes, see Rooms
REPORT_PERIOD = 60.0  # refusals of an address with a status: the first REPORT_LINES of a period
REPORT_LINES = 3  # are logged, the others summed up at its end, or when REPORT_KEYS are counted
REPORT_KEYS = 1000

# Limits of section 7, in seconds, counts and bytes.
REDIS_PATIENCE = 0.1  # seconds that a call may take through Redis before it is delivered here
REDIS_TIMEOUT = 5.0  # seconds for an answer
REDIS_BLOCK = 2.0  # seconds that a read waits for calls; then both links show a sign of life
REDIS_DELAYS = (0.1, 5.0)  # seconds between two attempts to connect: the first, the longest
REDIS_WAITING = 256  # triggers that may wait at a time
REDIS_BATCH = 100  # calls written or read at a time
REDIS_START = 1.0  # seconds that the start waits for the history
STREAM_LENGTH = 100_000  # entries kept: five times MAX_HISTORY, some 20 MB
LATE = 1.0  # seconds after which a call is shown as one that was missed
MAX_MARKS = 20  # of a cursor: nodes that were cut off at a time
MAX_AGE = 10**6  # seconds that a call may have waited: HISTORY ends before
MAX_NODES = 1000  # whose last number is remembered
MAX_BULK = 1 << 20  # bytes of a string that Redis sends; a call has 200 KiB at most
MAX_ELEMENTS = 1 << 16  # of a list; a batch has hundreds
MAX_DEPTH = 8  # of lists in lists; XREAD's reply has 5
MAX_LINE = 16 * 1024  # bytes; it is an error's text at most

log = logging.getLogger("popup-notifier")

IPAddress = Union[ipaddress.IPv4Address, ipaddress.IPv6Address]
IPNetwork = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]


# Errors:
#
#     ConfigError         the configuration can't be used; `lines` says why
#     RequestError        this request is answered with `status`
#       HandshakeError    so is this opening handshake
#     ProtocolError       this WebSocket connection is failed with `close_code`
#     RedisError          Redis refused a command, or does not speak its protocol


class ConfigError(Exception):
    """The configuration can't be used: one line for each mistake."""

    def __init__(self, *lines: str) -> None:
        super().__init__("; ".join(lines))
        self.lines = lines


class RequestError(Exception):
    """A request to refuse with `status`, the reason as body and further header `fields`."""

    def __init__(self, status: HTTPStatus, reason: str, **fields: str) -> None:
        super().__init__(reason)
        self.status = status
        self.fields = {name.replace("_", "-"): value for name, value in fields.items()}


class HandshakeError(RequestError):
    """An opening handshake to refuse (RFC 6455 section 4.2.2)."""


class ProtocolError(Exception):
    """A WebSocket connection to fail with `close_code` (RFC 6455 section 7.1.7)."""

    def __init__(self, close_code: CloseCode, reason: str) -> None:
        super().__init__(reason)
        self.close_code = close_code


class RedisError(Exception):
    """Redis refused a command, or does not speak its protocol."""


def quote(text: str, limit: int = 64) -> str:
    """Return foreign text for a log line or an error: in quotes, cut at `limit`, one line."""
    escaped = []
    for char in text[:limit]:
        if char in '"\\':
            escaped.append("\\" + char)
        elif char.isprintable():
            escaped.append(char)
        else:
            escaped.append(char.encode("unicode_escape").decode("ascii"))
    return '"{}"{}'.format("".join(escaped), "..." if len(text) > limit else "")


# --- 1. Configuration --------------------------------------------------------------------------


class Config(NamedTuple):
    """The configuration, checked. A field is named as its key, in lower case."""

    port: int
    listen: IPAddress | None  # None: every address, IPv6 and IPv4
    secret_token: str
    trigger_allow: AccessList
    crmws_allow: AccessList
    ping_interval: int  # seconds
    max_browsers: int
    history: int  # seconds
    client_port: int | None
    use_ssl: bool
    cert_file: Path | None
    key_file: Path | None
    crmws_origins: Origins
    crmws_token: str | None
    trusted_proxies: AccessList
    redis_url: RedisURL | None


class Key(NamedTuple):
    """A key of the configuration file; `parse` raises ValueError saying what is wrong."""

    name: str
    default: str | None  # as it would stand in the file; None: the key is required
    parse: Callable[[str], Any]
    alias: str = ""  # the Go daemon's name for it
    is_secret: bool = False
    needs_restart: bool = False  # SIGHUP does not change it


def parse_number(low: int, high: int) -> Callable[[str], int]:
    """Return a parser of whole numbers from `low` to `high`."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,9}", text) or not low <= int(text) <= high:
            raise ValueError(f"is not a whole number from {low} to {high}")
        return int(text)

    return parse


def parse_optional(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return a parser that takes an empty value for None."""
    return lambda text: parse(text) if text else None


def parse_bool(text: str) -> bool:
    """Return what yes and no mean, in the words of the Go daemon too."""
    words = {"yes": True, "true": True, "1": True, "on": True}
    words.update({"no": False, "false": False, "0": False, "off": False})
    if text.lower() not in words:
        raise ValueError("is neither yes nor no")
    return words[text.lower()]


def parse_path(text: str) -> Path:
    """Return an absolute path: the daemon's working directory is nobody's business."""
    if not text.startswith("/"):
        raise ValueError("is not an absolute path")
    return Path(text)


def parse_listen(text: str) -> IPAddress | None:
    """Return the address to listen on, None for all. A name would need a name server."""
    if not text:
        return None
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        raise ValueError("is not an IP address (without LISTEN it is every address)") from None


def parse_token(text: str) -> str:
    """Return a token that fits into a URL as it is and into a header field."""
    if not re.fullmatch(r"[!-~]+", text):
        raise ValueError("must be one or more ASCII letters, digits and signs, no blanks")
    return text


def parse_networks(text: str) -> AccessList:
    """Return the access list that comma-separated addresses and CIDR networks make."""
    entries = [entry.strip() for entry in text.split(",")]
    return AccessList([parse_network(entry) for entry in entries if entry])


def parse_origins(text: str) -> Origins:
    """Return the origins that comma-separated entries name."""
    entries = [entry.strip() for entry in text.split(",")]
    return Origins([parse_origin(entry) for entry in entries if entry])


def parse_origin(text: str) -> str:
    """Return one origin as a browser writes it, or a pattern such as https://*.example.com."""
    if text != "null" and not ORIGIN_PATTERN.fullmatch(text.lower()):
        raise ValueError(f"holds {quote(text)}, no origin like https://crm.example.com (no path)")
    return plain_origin(text)


class RedisURL(NamedTuple):
    """Where Redis is, and as whom we speak to it."""

    address: str | tuple[str, int]  # the path of a Unix socket, or host and port
    is_tls: bool
    login: tuple[str, ...]  # the password, or user and password, or nothing
    database: int
    stream: str  # the key that holds our stream

    def __str__(self) -> str:
        if isinstance(self.address, str):
            return self.address
        host, port = self.address
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_redis_url(text: str) -> RedisURL:
    """Return what redis://[user:password@]host:port/db, rediss:// or unix:///path?db=0 means."""
    scheme = text.partition("://")[0].lower()
    if scheme not in ("redis", "rediss", "unix"):
        raise ValueError("does not begin with redis://, rediss:// or unix:///")
    try:
        url = urlsplit(text)
        options = dict(
            parse_qsl(url.query, keep_blank_values=True, strict_parsing=bool(url.query))
        )
        host, port = url.hostname or "", url.port or 6379
    except ValueError:
        hint = "signs such as / ? # @ : in a password are written in percent form"
        raise ValueError(f"is not a URL that can be read: {hint}") from None
    if scheme == "unix" and (host or not url.path.startswith("/")):
        raise ValueError("is not unix:///path/of/the/socket")
    if scheme != "unix" and not host:
        raise ValueError("names no host")
    database = options.pop("db", "") if scheme == "unix" else url.path.strip("/")
    stream = options.pop("stream", "popup-notifier")
    if not re.fullmatch(r"[0-9]{0,4}", database):
        raise ValueError("does not end with the number of a database, such as /0")
    if options or url.fragment or not stream:
        raise ValueError("asks for something unknown behind ? or #; stream=NAME may stand there")
    if url.username and not url.password:
        raise ValueError("names a user without a password")
    return RedisURL(
        unquote(url.path) if scheme == "unix" else (host, port),
        scheme == "rediss",
        tuple(unquote(each) for each in (url.username, url.password) if each),
        int(database or 0),
        stream,
    )


def parse_network(text: str) -> IPNetwork:
    """Return one address or network; the error offers what was probably meant."""
    try:
        network = ipaddress.ip_network(text)
    except ValueError:
        try:
            interface = ipaddress.ip_interface(text)
        except ValueError:
            raise ValueError(f"holds {quote(text)}, no IP address or CIDR network") from None
        raise ValueError(
            f"holds {quote(text)}, whose host bits are set: "
            f"write {interface.network} for the network or {interface.ip} for the one address"
        ) from None
    if isinstance(network, ipaddress.IPv6Network) and network.network_address.ipv4_mapped:
        bits = max(network.prefixlen - 96, 0)
        plain = f"{network.network_address.ipv4_mapped}/{bits}"
        raise ValueError(f"holds {quote(text)}, IPv4 in IPv6 form: write it as {plain}")
    return network


ORIGIN_PATTERN = re.compile(r"https?://(\*\.)?([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?")
KEYS = (
    Key("PORT", "8080", parse_number(1, 65535), alias="HTTP_PORT", needs_restart=True),
    Key("LISTEN", "", parse_listen, needs_restart=True),
    Key("SECRET_TOKEN", None, parse_token, is_secret=True),
    Key("TRIGGER_ALLOW", "", parse_networks),
    Key("CRMWS_ALLOW", "", parse_networks),
    Key("PING_INTERVAL", "25", parse_number(1, 3600)),
    Key("MAX_BROWSERS", "10000", parse_number(1, 1_000_000)),
    Key("HISTORY", "60", parse_number(0, 86400)),
    Key(
        "CLIENT_PORT",
        "",
        parse_optional(parse_number(1, 65535)),
        alias="WSS_PORT",
        needs_restart=True,
    ),
    Key("USE_SSL", "no", parse_bool, needs_restart=True),
    Key("CERT_FILE", "", parse_optional(parse_path)),
    Key("KEY_FILE", "", parse_optional(parse_path)),
    Key("CRMWS_ORIGINS", "", parse_origins),
    Key("CRMWS_TOKEN", "", parse_optional(parse_token), is_secret=True),
    Key("TRUSTED_PROXIES", "", parse_networks),
    Key("REDIS_URL", "", parse_optional(parse_redis_url), is_secret=True, needs_restart=True),
)
SAMPLE_TOKEN = "mytoken"  # the one that everybody can read in the sample
KEY_BY_NAME = {name: key for key in KEYS for name in (key.name, key.alias) if name}


def load_config(path: Path) -> tuple[Config, list[str]]:
    """Read the file; return what it says and a warning for each oddity, raise ConfigError."""
    try:
        data = path.read_bytes()
        mode = path.stat().st_mode
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the configuration: {error.strerror}") from None
    config, warnings = parse_config(data, str(path))
    if config.secret_token == SAMPLE_TOKEN:
        warnings.append(f"{path}: SECRET_TOKEN is the sample's: everybody knows it")
    if mode & stat.S_IROTH:
        warnings.append(f"{path}: everybody on this machine can read the token: chmod o-r {path}")
    return config, warnings


def parse_config(data: bytes, source: str) -> tuple[Config, list[str]]:
    """Return what the bytes of a configuration file say, as load_config does."""
    values: dict[str, Any] = {}
    seen: dict[str, int] = {}
    errors: list[str] = []
    warnings: list[str] = []
    for number, name, raw in config_lines(data):
        where = f"{source}:{number}"
        key = KEY_BY_NAME.get(name)
        if raw is None:
            errors.append(f"{where}: {quote(name)} begins a line that is not KEY=value")
        elif key is None:
            near = difflib.get_close_matches(name.upper(), KEY_BY_NAME, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            warnings.append(f"{where}: {quote(name)} is not a key and is ignored{hint}")
        else:
            if key.name in seen:
                warnings.append(
                    f"{where}: {name} is given again; line {seen[key.name]} does not count"
                )
            seen[key.name] = number
            try:
                values[key.name.lower()] = parse_value(key, raw)
            except ValueError as error:
                errors.append(f"{where}: {name}: {error}")
    for key in KEYS:
        if key.name not in seen and key.default is None:
            errors.append(f"{source}: {key.name} is missing and has no default")
        elif key.name not in seen:
            values[key.name.lower()] = key.parse(key.default or "")
    if not errors:
        errors += [f"{source}: {mistake}" for mistake in check_tls_keys(Config(**values))]
    if errors:
        raise ConfigError(*errors)
    return Config(**values), warnings


def check_tls_keys(config: Config) -> Iterator[str]:
    """Yield what is wrong with the keys that go together."""
    if config.client_port == config.port:
        yield f"CLIENT_PORT: {config.port} is PORT already"
    if not config.use_ssl:
        return
    if config.client_port is None:
        yield "USE_SSL is for CLIENT_PORT, which is missing"
    for name in ("CERT_FILE", "KEY_FILE"):
        if getattr(config, name.lower()) is None:
            yield f"USE_SSL needs {name}, which is missing"


def describe_config(config: Config) -> Iterator[str]:
    """Yield a line for each key: what it is set to, secrets hidden."""
    for key, value in zip(KEYS, config):
        shown = "(hidden)" if key.is_secret and value else value
        if isinstance(value, bool):
            shown = "yes" if value else "no"
        yield f"{key.name}={'' if shown is None else shown}"


def config_lines(data: bytes) -> Iterator[tuple[int, str, bytes | None]]:
    """Yield (line number, key, value) of each line that says something; no '=': value None.

    Comments are passed over as bytes: old ones are in Shift_JIS or EUC-JP.
    """
    for number, line in enumerate(data.removeprefix(codecs.BOM_UTF8).splitlines(), 1):
        line = line.strip()
        if line and not line.startswith(b"#"):
            name, equals, value = line.partition(b"=")
            # Without '=' only the first word is shown: the rest may be a token.
            word = name.strip() if equals else name.split()[0]
            yield number, word.decode("utf-8", "replace"), value.strip() if equals else None


def parse_value(key: Key, raw: bytes) -> Any:
    """Return the parsed value of a key; the ValueError shows it, unless it is a secret."""
    shown = quote(raw.decode("utf-8", "backslashreplace")) + " "
    if key.is_secret:
        shown = ""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{shown}is not UTF-8") from None
    try:
        return key.parse(text)
    except ValueError as error:
        raise ValueError(f"{shown}{error}") from None


# --- 2. Access lists ---------------------------------------------------------------------------


class AccessList:
    """The networks that may use an endpoint. An empty list admits nobody."""

    def __init__(self, networks: Iterable[IPNetwork] = ()) -> None:
        self.networks = tuple(networks)

    def __str__(self) -> str:
        return ", ".join(map(str, self.networks)) or "nobody"

    def allows(self, address: IPAddress) -> bool:
        """Tell whether a peer's address (see peer_address) is in the list."""
        for network in self.networks:
            if address in network:
                return True
        # curl asks for localhost at ::1 first, and the sample admits 127.0.0.1: the same machine.
        return address == LOOPBACK_6 and self.allows(LOOPBACK_4)


LOOPBACK_4 = ipaddress.IPv4Address("127.0.0.1")
LOOPBACK_6 = ipaddress.IPv6Address("::1")


@lru_cache(maxsize=4096)
def peer_address(host: str) -> IPAddress:
    """Return the address of a socket's peer, IPv4-mapped ones as the IPv4 that they are."""
    address = ipaddress.ip_address(host.partition("%")[0])
    return getattr(address, "ipv4_mapped", None) or address


def client_address(peer: IPAddress, forwarded: str | None, proxies: AccessList) -> IPAddress:
    """Return who sent a request: the peer or, behind trusted proxies, whom they name.

    `forwarded` is X-Forwarded-For, all its lines joined. It is read from the right: each proxy
    adds whom it saw, and what stands left of an address that is no proxy was written by that one.
    Raises RequestError for what is no address.
    """
    address = peer
    hops = [] if forwarded is None else [hop.strip() for hop in forwarded.split(",")]
    while hops and proxies.allows(address):
        try:
            address = peer_address(hops[-1])
        except ValueError:
            reason = f"X-Forwarded-For: {quote(hops[-1])} is not an IP address"
            raise RequestError(HTTPStatus.BAD_REQUEST, reason) from None
        hops.pop()
    return address


def plain_origin(text: str) -> str:
    """Return an origin in the one form in which it is compared."""
    origin = text.lower()
    if origin.startswith("https:"):
        return origin.removesuffix(":443")
    return origin.removesuffix(":80") if origin.startswith("http:") else origin


class Origins:
    """The origins whose pages may connect; an empty list admits every page."""

    def __init__(self, patterns: Iterable[str] = ()) -> None:
        self.patterns = tuple(patterns)

    def __str__(self) -> str:
        return ", ".join(self.patterns) or "any"

    def allow(self, origin: str | None) -> bool:
        """Tell whether a page of this origin may connect; who sends none is no browser."""
        if not self.patterns or origin is None:
            return True
        # A star stands for one label: https://*.example.com is https://a.example.com.
        scheme, _, host = plain_origin(origin).partition("://")
        parent = host.partition(".")[2]
        return plain_origin(origin) in self.patterns or f"{scheme}://*.{parent}" in self.patterns


# --- 3. WebSocket ------------------------------------------------------------------------------
#
# RFC 6455 as plain functions and one class that turn bytes into messages and back. Nothing here
# knows a socket, a clock, a thread or the log.


class Opcode(enum.IntEnum):
    """RFC 6455 section 5.2."""

    CONTINUATION = 0x0
    TEXT = 0x1
    BINARY = 0x2
    CLOSE = 0x8
    PING = 0x9
    PONG = 0xA


class CloseCode(enum.IntEnum):
    """RFC 6455 section 7.4.1."""

    NORMAL_CLOSURE = 1000
    GOING_AWAY = 1001
    PROTOCOL_ERROR = 1002
    NO_STATUS_RECEIVED = 1005  # never on the wire
    ABNORMAL_CLOSURE = 1006  # never on the wire
    INVALID_DATA = 1007
    POLICY_VIOLATION = 1008
    MESSAGE_TOO_BIG = 1009


OPCODES = {opcode.value: opcode for opcode in Opcode}
FIN = 0x80
RESERVED_BITS = 0x70
OPCODE_BITS = 0x0F
MASKED = 0x80
LENGTH_BITS = 0x7F
LENGTH_16 = 126  # a 16-bit length follows
LENGTH_64 = 127  # a 64-bit length follows
CONTROL = 0x8  # the bit that control opcodes have

ACCEPT_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455 section 1.3
KEY_PATTERN = re.compile(r"[A-Za-z0-9+/]{22}==")  # 16 bytes in base64


def tokens(field: str) -> list[str]:
    """Return the members of a comma-separated header field, in lower case."""
    return [token.strip().lower() for token in field.split(",")]


def accept_key(key: str) -> str:
    """Return the Sec-WebSocket-Accept for a Sec-WebSocket-Key (RFC 6455 section 4.2.2)."""
    # Not for security: a machine in FIPS mode must not refuse it.
    digest = hashlib.sha1(key.encode() + ACCEPT_GUID, usedforsecurity=False).digest()
    return base64.b64encode(digest).decode()


def check_handshake(fields: Mapping[str, str]) -> str:
    """Check an opening handshake (RFC 6455 section 4.2.1) and return its Sec-WebSocket-Accept.

    `fields` are header fields by lower-case name, repeated ones joined by commas. Raises
    HandshakeError: 426 for anything but WebSocket version 13, 400 for a bad key.
    """
    if "websocket" not in tokens(fields.get("upgrade", "")):
        raise upgrade_required("only WebSocket is spoken here: Upgrade: websocket is missing")
    if "upgrade" not in tokens(fields.get("connection", "")):
        raise upgrade_required(
            "Connection: Upgrade is missing; a proxy on the way must pass it on with Upgrade"
        )
    if fields.get("sec-websocket-version") != "13":
        raise upgrade_required("only WebSocket version 13 is spoken here")
    key = fields.get("sec-websocket-key", "")
    if not KEY_PATTERN.fullmatch(key):
        raise HandshakeError(
            HTTPStatus.BAD_REQUEST, f"Sec-WebSocket-Key: {quote(key)} is not 16 bytes in base64"
        )
    return accept_key(key)


def upgrade_required(reason: str) -> HandshakeError:
    """Return the 426 that names what is spoken here (RFC 6455 section 4.4)."""
    return HandshakeError(
        HTTPStatus.UPGRADE_REQUIRED,
        reason,
        Upgrade="websocket",
        Connection="Upgrade",
        Sec_WebSocket_Version="13",
    )


def serialize_frame(opcode: Opcode, payload: bytes) -> bytes:
    """Return a whole message as one frame from a server, unmasked (RFC 6455 section 5.1)."""
    length = len(payload)
    if length < LENGTH_16:
        return struct.pack("!BB", FIN | opcode, length) + payload
    if length < 1 << 16:
        return struct.pack("!BBH", FIN | opcode, LENGTH_16, length) + payload
    return struct.pack("!BBQ", FIN | opcode, LENGTH_64, length) + payload


def frame_size(data: bytes, start: int) -> int:
    """Return the size in bytes of the frame from a server that begins at `start`."""
    length = data[start + 1]
    if length < LENGTH_16:
        return 2 + length
    if length == LENGTH_16:
        return 4 + int.from_bytes(data[start + 2 : start + 4], "big")
    return 10 + int.from_bytes(data[start + 2 : start + 10], "big")


def serialize_close(code: CloseCode, reason: str = "") -> bytes:
    """Return a Close frame; the reason is cut to what fits a control frame (section 5.5.1)."""
    text = reason.encode()[: MAX_CONTROL - 2].decode("utf-8", "ignore").encode()
    return serialize_frame(Opcode.CLOSE, struct.pack("!H", code) + text)


def is_valid_close_code(code: int) -> bool:
    """Tell whether a peer may send this close code (RFC 6455 section 7.4, IANA's registry)."""
    return 1000 <= code <= 1003 or 1007 <= code <= 1014 or 3000 <= code <= 4999


def apply_mask(data: bytes, masking_key: bytes, offset: int = 0) -> bytes:
    """Mask or unmask what stands `offset` bytes into a payload (RFC 6455 section 5.3)."""
    size = len(data)
    start = offset % 4
    mask = (masking_key * (size // 4 + 2))[start : start + size]
    number = int.from_bytes(data, "little") ^ int.from_bytes(mask, "little")
    return number.to_bytes(size, "little")


class FrameHead(NamedTuple):
    """What stands before a frame's payload, in bytes as received."""

    fin: bool
    opcode: Opcode
    length: int
    masking_key: bytes


class Message(NamedTuple):
    """A whole message (TEXT, BINARY) or a control frame (PING, PONG, CLOSE), as received."""

    opcode: Opcode
    payload: bytes  # of TEXT: valid UTF-8


class State(enum.Enum):
    """Where a connection stands; it only moves down this list."""

    OPEN = enum.auto()
    CLOSING = enum.auto()  # our Close is out, the peer's is awaited
    CLOSED = enum.auto()  # nothing more is read; what data_to_send() gives is the last


class WebSocketProtocol:
    """The server's side of one connection after its handshake, without I/O.

    Feed what arrived to receive_data(), then take its meaning from events_received() and the
    bytes to be sent from data_to_send(); once is_closed, send those and close the connection.
    Pings and Close are answered here. Chunks may be cut anywhere. A peer's mistake raises
    nothing: it fails the connection and stands in `error`. Belongs to one thread at a time.
    """

    __slots__ = (
        "_decode",
        "_events",
        "_head",
        "_message",
        "_message_opcode",
        "_outgoing",
        "_partial",
        "_received",
        "close_code",
        "error",
        "max_message",
        "state",
    )

    def __init__(self, max_message: int = MAX_MESSAGE) -> None:
        self.max_message = max_message
        self.state = State.OPEN
        self.close_code: int | None = None  # what the peer closed with
        self.error: ProtocolError | None = None  # why we failed the connection
        self._partial = b""  # the beginning of a frame's head, or of a control frame
        self._head: FrameHead | None = None  # of the frame whose payload is arriving
        self._received = 0  # bytes of that payload so far
        self._message_opcode: Opcode | None = None  # of the message whose fragments are arriving
        self._message: bytearray | None = None  # its payload so far
        self._decode: Callable[[bytes, bool], str] | None = None  # checks its UTF-8, if text
        self._events: list[Message] = []
        self._outgoing = b""

    # What a connection does with it.

    @property
    def is_closed(self) -> bool:
        """Tell whether nothing more is to be read: send what is left, then hang up."""
        return self.state is State.CLOSED

    def receive_data(self, data: bytes) -> None:
        """Take in bytes from the peer, in chunks of any size."""
        data, start = self._partial + data, 0
        try:
            while self.state is not State.CLOSED:
                end = self._receive_some(data, start)
                if end == start:
                    break
                start = end
        except ProtocolError as error:
            self.error = error
            self.fail(error.close_code, str(error))
        self._partial = data[start:] if self.state is not State.CLOSED else b""

    def receive_eof(self) -> None:
        """Take in that the peer hung up."""
        if self.close_code is None:
            self.close_code = CloseCode.ABNORMAL_CLOSURE
        self.state = State.CLOSED

    def events_received(self) -> list[Message]:
        """Return what has arrived since the last call, in order."""
        events, self._events = self._events, []
        return events

    def data_to_send(self) -> bytes:
        """Return the bytes to send since the last call."""
        data, self._outgoing = self._outgoing, b""
        return data

    def send_text(self, text: str | bytes) -> None:
        """Send a text message."""
        self._send(Opcode.TEXT, text.encode() if isinstance(text, str) else text)

    def send_binary(self, data: bytes) -> None:
        """Send a binary message."""
        self._send(Opcode.BINARY, data)

    def send_ping(self, payload: bytes = b"") -> None:
        """Send a Ping (RFC 6455 section 5.5.2)."""
        self._send(Opcode.PING, payload)

    def send_close(self, code: CloseCode, reason: str = "") -> None:
        """Begin the closing handshake (RFC 6455 section 7.1.2)."""
        if self.state is State.OPEN:
            self._outgoing += serialize_close(code, reason)
            self.state = State.CLOSING

    def fail(self, code: CloseCode, reason: str) -> None:
        """Fail the connection: send Close, read nothing more (RFC 6455 section 7.1.7)."""
        self.send_close(code, reason)
        self.state = State.CLOSED

    # How it works.

    def _send(self, opcode: Opcode, payload: bytes) -> None:
        # Nothing may follow our Close (RFC 6455 section 5.5.1).
        if self.state is State.OPEN:
            self._outgoing += serialize_frame(opcode, payload)

    def _receive_some(self, data: bytes, start: int) -> int:
        """Take a head or some payload from data[start:]; return where it ends, or `start`."""
        if self._head is None:
            parsed = parse_frame_head(data, start)
            if parsed is None:
                return start
            head, start = parsed
            self._check_sequence(head)
            self._head = head
            self._received = 0
        if self._head.opcode & CONTROL:
            return self._receive_control(self._head, data, start)
        return self._receive_payload(self._head, data, start)

    def _check_sequence(self, head: FrameHead) -> None:
        """Check a frame against those before it (section 5.4), and the message's size."""
        if head.opcode & CONTROL:
            return
        if head.opcode is Opcode.CONTINUATION:
            if self._message is None:
                raise ProtocolError(CloseCode.PROTOCOL_ERROR, "a continuation of no message")
        elif self._message is not None:
            raise ProtocolError(CloseCode.PROTOCOL_ERROR, "a message inside a fragmented one")
        else:
            self._message = bytearray()
            self._message_opcode = head.opcode
            if head.opcode is Opcode.TEXT:
                self._decode = codecs.getincrementaldecoder("utf-8")().decode
        if len(self._message) + head.length > self.max_message:
            raise ProtocolError(
                CloseCode.MESSAGE_TOO_BIG, f"a message of over {self.max_message} bytes"
            )

    def _receive_payload(self, head: FrameHead, data: bytes, start: int) -> int:
        assert self._message is not None and self._message_opcode is not None
        chunk = data[start : start + head.length - self._received]
        payload = apply_mask(chunk, head.masking_key, self._received)
        self._received += len(chunk)
        is_whole = self._received == head.length
        is_last = is_whole and head.fin
        if self._decode is not None:
            try:
                self._decode(payload, is_last)
            except UnicodeDecodeError:
                raise ProtocolError(CloseCode.INVALID_DATA, "text that is not UTF-8") from None
        self._message += payload
        if is_whole:
            self._head = None
        if is_last:
            self._events.append(Message(self._message_opcode, bytes(self._message)))
            self._message = self._message_opcode = self._decode = None
        return start + len(chunk)

    def _receive_control(self, head: FrameHead, data: bytes, start: int) -> int:
        end = start + head.length
        if len(data) < end:
            return start
        payload = apply_mask(data[start:end], head.masking_key)
        self._head = None
        if head.opcode is Opcode.PING:
            self._send(Opcode.PONG, payload)
        elif head.opcode is Opcode.CLOSE:
            self._receive_close(payload)
        self._events.append(Message(head.opcode, payload))
        return end

    def _receive_close(self, payload: bytes) -> None:
        """Check a Close frame and answer it with its own code (section 5.5.1)."""
        if not payload:
            self.close_code = CloseCode.NO_STATUS_RECEIVED
        else:
            code = int.from_bytes(payload[:2], "big")
            if len(payload) == 1 or not is_valid_close_code(code):
                raise ProtocolError(CloseCode.PROTOCOL_ERROR, "an invalid close code")
            try:
                payload[2:].decode()
            except UnicodeDecodeError:
                raise ProtocolError(
                    CloseCode.INVALID_DATA, "a close reason that is not UTF-8"
                ) from None
            self.close_code = code
        self._send(Opcode.CLOSE, payload[:2])
        self.state = State.CLOSED


def parse_frame_head(data: bytes, start: int) -> tuple[FrameHead, int] | None:
    """Return the head of the frame from a browser at `start`, and where its payload begins.

    None when more bytes are needed; ProtocolError when RFC 6455 section 5.2 is not kept.
    """
    if len(data) < start + 2:
        return None
    first, second = data[start], data[start + 1]
    opcode = OPCODES.get(first & OPCODE_BITS)
    fin = bool(first & FIN)
    length = second & LENGTH_BITS
    if first & RESERVED_BITS:
        raise ProtocolError(CloseCode.PROTOCOL_ERROR, "reserved bits without an extension")
    if opcode is None:
        raise ProtocolError(CloseCode.PROTOCOL_ERROR, f"unknown opcode {first & OPCODE_BITS}")
    if not second & MASKED:
        raise ProtocolError(CloseCode.PROTOCOL_ERROR, "a frame that is not masked")
    if opcode & CONTROL and (not fin or length > MAX_CONTROL):
        raise ProtocolError(CloseCode.PROTOCOL_ERROR, "a control frame in fragments or too long")
    extended = {LENGTH_16: 2, LENGTH_64: 8}.get(length, 0)
    end = start + 2 + extended + 4
    if len(data) < end:
        return None
    if extended:
        length = int.from_bytes(data[start + 2 : end - 4], "big")
        if length < (LENGTH_16 if extended == 2 else 1 << 16) or length >> 63:
            raise ProtocolError(CloseCode.PROTOCOL_ERROR, "a length not in its shortest form")
    return FrameHead(fin, opcode, length, data[end - 4 : end]), end


# --- 4. Hub ------------------------------------------------------------------------------------

# What a non-blocking socket raises when it has nothing to read or no room to write.
WOULD_BLOCK = (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
PING = serialize_frame(Opcode.PING, b"")


ALL = "all"
ID_PATTERN = re.compile(r"([0-9]{1,15})-([0-9]{1,400})")


class CallID(NamedTuple):
    """Names a call, and a position in the stream of calls: it is written milliseconds-sequence."""

    milliseconds: int
    sequence: int

    def __str__(self) -> str:
        return f"{self.milliseconds}-{self.sequence}"


def parse_id(text: str) -> CallID:
    """Return the ID that a text is; raises ValueError."""
    matched = ID_PATTERN.fullmatch(text)
    if matched is None:
        raise ValueError(f"{quote(text)} is not MILLISECONDS-SEQUENCE")
    return CallID(int(matched[1]), int(matched[2]))


class IDSource:
    """Gives IDs that strictly increase, over restarts and a clock that is set back too.

    A file keeps a time that no ID has reached yet, a minute ahead; a daemon that is started while
    the clock says less goes on from there. Without a file only this process is kept in order.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._reserved = 0
        if path is not None:
            with contextlib.suppress(OSError, ValueError):
                self._reserved = int(path.read_text()[:20])
        self.last = CallID(max(int(time.time() * 1000), self._reserved), 0)
        self._reserve(self.last.milliseconds + ID_RESERVE)

    def next(self) -> CallID:
        """Return a new ID."""
        now = int(time.time() * 1000)
        milliseconds, sequence = self.last
        self.last = CallID(now, 0) if now > milliseconds else CallID(milliseconds, sequence + 1)
        if self.last.milliseconds >= self._reserved:
            self._reserve(self.last.milliseconds + ID_RESERVE)
        return self.last

    def close(self) -> None:
        """Give back what was reserved."""
        self._reserve(self.last.milliseconds + 1)

    def _reserve(self, milliseconds: int) -> None:
        self._reserved = milliseconds
        if self._path is None:
            return
        try:
            draft = self._path.with_suffix(".new")
            draft.write_text(f"{milliseconds}\n")
            draft.replace(self._path)
        except OSError as error:
            log.warning("cannot write %s: %s", self._path, error.strerror)
            self._path = None


class Call(NamedTuple):
    """A call on its way to the browsers."""

    id: CallID
    parameters: Mapping[str, str]  # phone, exten and what else was sent, but for the token
    source: str  # the address that triggered it
    time: float  # when, monotonic seconds
    extens: frozenset[str]  # who is told: in lower case; "all" is everybody
    payload: bytes  # the message
    frame: bytes  # the same as it is sent
    # Of calls that several daemons share, see section 7.
    mark: Mark | None = None
    position: CallID | None = None
    is_late: bool = False
    is_news: bool = True  # to all but travellers

    def replay_frame(self) -> bytes:
        """Return the frame for a browser that missed the call."""
        return serialize_frame(Opcode.TEXT, self.payload[:-1] + b', "replayed": true}')


def split_extens(text: str) -> frozenset[str]:
    """Return the extensions of a comma-separated list, in lower case."""
    return frozenset(each.strip().lower() for each in text.split(",") if each.strip())


def make_call(
    call_id: CallID, parameters: Mapping[str, str], source: str, extens: frozenset[str]
) -> Call:
    """Return a call; its message is ASCII, so that no caller ID can break it on its way."""
    message = {
        "type": "CALL_IN",
        "id": str(call_id),
        "phone": parameters["phone"],
        "exten": parameters["exten"],
        "data": parameters,
    }
    payload = json.dumps(message).encode("ascii")
    frame = serialize_frame(Opcode.TEXT, payload)
    return Call(call_id, parameters, source, time.monotonic(), extens, payload, frame)


class Told(NamedTuple):
    """Who was told of what goes by one uniqueid."""

    extens: frozenset[str]
    answered: float  # when, if that was the first we heard of it: monotonic seconds


NOBODY = Told(frozenset(), -math.inf)


def serialize_alive(position: CallID) -> bytes:
    """Return the frame that says: all calls up to there have been sent."""
    return serialize_frame(Opcode.TEXT, f'{{"type": "ALIVE", "id": "{position}"}}'.encode())


class History:
    """The calls of the last seconds, for browsers that lost their connection meanwhile."""

    def __init__(self, seconds: float, begin: CallID) -> None:
        self.seconds = seconds
        self._calls: collections.deque[Call] = collections.deque()
        self._size = 0  # bytes of their messages
        self._forgotten = begin  # every call after it is remembered
        # By uniqueid, the latest last: who saw a call ring must hear that it was answered, even by
        # another extension.
        self._told: collections.OrderedDict[str, Told] = collections.OrderedDict()

    def add(self, call: Call) -> None:
        """Remember a call, and forget the old ones."""
        self._calls.append(call)
        self._size += len(call.payload)
        self._forget()
        self.note(call)

    def begin_at(self, position: CallID) -> None:
        """Take note that nothing is known of what came up to there."""
        self._forgotten = position

    def note(self, call: Call) -> None:
        """Remember who was told of a call."""
        unique = call.parameters.get("uniqueid")
        if unique:
            is_answer = call.parameters.get("event") == "answer"
            first = NOBODY._replace(answered=call.time) if is_answer else NOBODY
            told = self._told.pop(unique, first)
            self._told[unique] = told._replace(extens=told.extens | call.extens)
            if len(self._told) > MAX_HISTORY:
                self._told.popitem(last=False)

    def audience_of(self, parameters: Mapping[str, str]) -> frozenset[str]:
        """Return the extensions to be told.

        Of an answer or end, also who saw the call ring; of a ring that its answer has overtaken,
        only who answered.
        """
        extens = split_extens(parameters["exten"]) or frozenset([ALL])
        told = self._told.get(parameters.get("uniqueid", ""), NOBODY)
        if parameters.get("event") in ("answer", "end"):
            return extens | told.extens
        is_overtaken = time.monotonic() - told.answered < OVERTAKING
        return told.extens if is_overtaken else extens

    def since(self, position: CallID) -> tuple[list[Call], bool]:
        """Return the calls after a position, and whether these are all that there were."""
        self._forget()
        missed: list[Call] = []
        for call in reversed(self._calls):
            if call.id <= position:
                break
            missed.append(call)
        return missed[::-1], position >= self._forgotten

    def _forget(self) -> None:
        oldest = time.monotonic() - self.seconds
        while self._calls and (self._calls[0].time < oldest or self._is_too_long()):
            call = self._calls.popleft()
            self._size -= len(call.payload)
            self._forgotten = call.id

    def _is_too_long(self) -> bool:
        return len(self._calls) > MAX_HISTORY or self._size > MAX_HISTORY_SIZE


class Waker:
    """Lets other threads, and signal handlers, end a selector's wait."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)

    def fileno(self) -> int:
        """Return what to watch for reading."""
        return self._reader.fileno()

    def wake(self) -> None:
        """End the wait, or the next one. Any thread."""
        # A full pipe has wakings enough.
        with contextlib.suppress(BlockingIOError):
            self._writer.send(b"\0")

    def heed_signals(self) -> None:
        """Let every signal wake, too. Main thread.

        A handler runs between two steps of the main thread: a signal that comes as its wait
        begins, or that the system hands to another thread, would be slept over.
        """
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)

    def drain(self) -> None:
        """Forget the wakings so far."""
        with contextlib.suppress(BlockingIOError):
            self._reader.recv(4096)


class Backlog:
    """Frames that wait for one slow browser. The bytes are shared with all who wait for them."""

    __slots__ = ("_begun", "_chunks", "size")

    def __init__(self, frames: bytes, sent: int, pledged: int = 0) -> None:
        self._chunks: collections.deque[bytes] = collections.deque()
        # Bytes in front that must go out: they end a frame of which some did, or TLS has them
        # already, encrypted, and must be offered the same again (SSL_write(3)).
        self._begun = pledged
        self.size = len(frames)
        self._put_back(frames, sent)

    def append(self, frames: bytes) -> None:
        """Let whole frames wait."""
        self._chunks.append(frames)
        self.size += len(frames)

    def flush(self, send: Callable[[bytes], int]) -> None:
        """Send what the socket takes, many frames at once; `size` is 0 when all went."""
        while self._chunks:
            data = self._chunks.popleft()
            while self._chunks and len(data) < FLUSH_SIZE:
                data += self._chunks.popleft()
            try:
                sent = send(data)
            except ssl.SSLWantWriteError:
                sent, self._begun = 0, len(data)
            except WOULD_BLOCK:
                sent = 0
            self._put_back(data, sent)
            if sent < len(data):
                break

    def discard(self) -> None:
        """Drop every frame of which nothing went out."""
        begun = b"".join(self._chunks)[: self._begun]
        self._chunks = collections.deque([begun] if begun else [])
        self.size = len(begun)

    def _put_back(self, data: bytes, sent: int) -> None:
        end = self._begun
        while end < sent:
            end += frame_size(data, end)
        self._begun = end - sent
        self.size -= sent
        if sent < len(data):
            self._chunks.appendleft(data[sent:])


# Shared by all: each empty set takes 216 bytes.
NO_EXTENS: frozenset[str] = frozenset()
NO_NODES: frozenset[int] = frozenset()


class Subscriber:
    """A connected browser. All of it belongs to the I/O thread once the Hub has it."""

    __slots__ = (
        "address",
        "backlog",
        "calls_before",
        "cursor",
        "deadline",
        "extens",
        "is_gone",
        "last_heard",
        "leftover",
        "max_backlog",
        "missed",
        "next_ping",
        "protocol",
        "send",
        "since",
        "sock",
        "travels_until",
        "unsure",
    )

    def __init__(
        self,
        sock: socket.socket,
        address: IPAddress,
        extens: frozenset[str] = NO_EXTENS,
        since: CallID | str | None = None,
        leftover: bytes = b"",
    ) -> None:
        self.sock = sock  # non-blocking
        self.send = sock.send
        self.address = address
        self.extens = extens  # whose calls it wants; none: every call
        self.since = since  # recovers from there; "": from now on; None: it does not
        self.leftover = leftover  # what came behind the handshake
        self.calls_before = 0  # waiting calls that came before this browser
        self.missed: list[Call] = []  # calls since `since`
        self.cursor: Cursor | None = None  # of a traveller, see section 7
        self.travels_until = 0.0  # monotonic seconds
        self.unsure = NO_NODES  # those whose early calls it may have heard elsewhere
        self.max_backlog = MAX_BACKLOG
        self.protocol = WebSocketProtocol()
        self.backlog: Backlog | None = None  # None: all was sent
        self.last_heard = 0.0  # monotonic seconds
        self.next_ping = 0.0
        self.deadline: float | None = None  # set when it leaves: gone by then
        self.is_gone = False

    def wants(self, call: Call) -> bool:
        """Tell whether a call is for this browser."""
        return not self.extens or ALL in call.extens or not self.extens.isdisjoint(call.extens)


class Audience:
    """Browsers by what they want to hear: a call costs by who hears it, not by who is here."""

    def __init__(self) -> None:
        self.unfiltered: dict[Subscriber, None] = {}  # want every call
        self.travellers: dict[Subscriber, None] = {}  # heard other calls than the rest did
        self._filtered: dict[Subscriber, None] = {}
        self._by_exten: dict[str, dict[Subscriber, None]] = {}

    def __len__(self) -> int:
        return len(self.unfiltered) + len(self._filtered) + len(self.travellers)

    def __iter__(self) -> Iterator[Subscriber]:
        return itertools.chain(self.unfiltered, self._filtered, self.travellers)

    def add(self, subscriber: Subscriber) -> None:
        """Take a browser in."""
        if subscriber.cursor is not None:
            self.travellers[subscriber] = None
            return
        (self._filtered if subscriber.extens else self.unfiltered)[subscriber] = None
        for exten in subscriber.extens:
            self._by_exten.setdefault(exten, {})[subscriber] = None

    def discard(self, subscriber: Subscriber) -> None:
        """Let a browser go, if it is here."""
        self.unfiltered.pop(subscriber, None)
        self.travellers.pop(subscriber, None)
        if self._filtered.pop(subscriber, self) is self:
            return
        for exten in subscriber.extens:
            del self._by_exten[exten][subscriber]
            if not self._by_exten[exten]:
                del self._by_exten[exten]

    def filtered(self, extens: frozenset[str]) -> dict[Subscriber, None]:
        """Return those who asked for one of these extensions; do not change it."""
        if ALL in extens:
            return self._filtered
        found = [self._by_exten[exten] for exten in extens if exten in self._by_exten]
        return found[0] if len(found) == 1 else dict.fromkeys(itertools.chain(*found))

    def describe(self) -> str:
        """Return who is here, for the log."""
        if not len(self):
            return "none is connected"
        names = ", ".join(itertools.islice(self._by_exten, LOGGED_EXTENS))
        more = len(self._by_exten) - LOGGED_EXTENS
        return f"{len(self)} connected, for {names}" + (f" and {more} more" if more > 0 else "")


class DropReason(enum.Enum):
    """Why we end a browser's connection."""

    TOO_SLOW = "too slow"
    SILENT = "silent"
    PROTOCOL_ERROR = "protocol error"
    NOT_ADMITTED = "not admitted"
    BUG = "bug"


class HubMetrics:
    """What the I/O thread counts. Others only read it."""

    def __init__(self) -> None:
        self.calls = 0
        self.deliveries = 0
        self.drops = dict.fromkeys(DropReason, 0)
        self.seconds = 0.0  # from trigger to last browser, over all calls
        self.within = [0] * len(DELIVERY_BUCKETS)  # calls delivered within each bucket's time

    def observe(self, count: int, seconds: float) -> None:
        """Count a call that was sent to `count` browsers within `seconds`."""
        self.calls += 1
        self.deliveries += count
        self.seconds += seconds
        for index, limit in enumerate(DELIVERY_BUCKETS):
            self.within[index] += seconds <= limit


class Hub:
    """The browsers, and the one thread that talks to them.

    Other threads call start, subscribe, broadcast and close, which never wait for a browser.
    """

    def __init__(
        self, config: Config, max_browsers: int, ids: IDSource, manager: ServiceManager
    ) -> None:
        self.max_browsers = max_browsers
        self.has_failed = False
        self.metrics = HubMetrics()
        self._waker = Waker()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        # Guarded by the lock: who is here, and what waits for the I/O thread.
        self._registry: set[Subscriber] = set()
        self._arrivals: list[Subscriber] = []
        self._calls: list[Call] = []
        self._ids = ids
        self._history = History(config.history, ids.last)
        self._is_closing = False
        self._probes: list[threading.Event] = []
        self._new_config: Config | None = None
        # The I/O thread's own.
        self._now = time.monotonic()
        self._ping_interval = config.ping_interval
        self._manager = manager
        self._next_report = self._now if manager.interval < math.inf else math.inf
        self._selector = selectors.DefaultSelector()
        self._audience = Audience()  # the registry without the arrivals
        self._pings: collections.OrderedDict[Subscriber, None] = collections.OrderedDict()
        self._leaving: collections.deque[Subscriber] = collections.deque()  # by deadline
        self._stop_deadline: float | None = None

    # For other threads.

    def start(self, on_failure: Callable[[], None]) -> None:
        """Start the I/O thread; it calls `on_failure` should it ever end by a bug."""
        self._selector.register(self._waker, selectors.EVENT_READ)
        self._thread = threading.Thread(
            target=self._run, args=(on_failure,), name="hub", daemon=True
        )
        self._thread.start()

    def subscribe(self, subscriber: Subscriber, greeting: bytes) -> bool:
        """Take over a browser: it gets the greeting (its 101), then every call from now on.

        False when there is no place for it: its socket is the caller's still.
        """
        with self._lock:
            if self._is_closing or len(self._registry) >= self.max_browsers:
                return False
            subscriber.calls_before = len(self._calls)
            if subscriber.since is not None:
                greeting += self._recover(subscriber, subscriber.since)
            self._registry.add(subscriber)
            self._arrivals.append(subscriber)
            # A call triggered from here on waits for the lock, and so comes behind the greeting.
            # If the browser is gone already, the I/O thread will see it.
            try:
                subscriber.send(greeting)
            except OSError:
                log.debug("browser %s left during its handshake", subscriber.address)
            # Done here, it costs no change of threads: epoll may be told of a socket while another
            # thread waits for it, and the selector's table is a dict.
            self._selector.register(subscriber.sock, selectors.EVENT_READ, subscriber)
        return True

    def welcome(self) -> None:
        """Let the I/O thread take note of the arrivals, rather than when it turns anyway.

        Called when there is nothing else to do: woken for each of 10,000 browsers, the two
        threads would fight for the interpreter's lock most of the time.
        """
        if self._arrivals:
            self._waker.wake()

    def broadcast(
        self, parameters: Mapping[str, str], source: str, answer: Callable[[], None]
    ) -> None:
        """Queue a call for every browser here now; `answer` is called once it is on its way."""
        with self._lock:
            extens = self._history.audience_of(parameters)
            call = make_call(self._ids.next(), parameters, source, extens)
            self._history.add(call)
            self._calls.append(call)
            is_first = len(self._calls) == 1
        if is_first:
            self._waker.wake()
        answer()

    def relay_status(self) -> RelayStatus | None:
        """Return how Redis is; None when this daemon is on its own."""
        return None

    def reconfigure(self, config: Config, max_browsers: int) -> None:
        """Take over a new configuration; browsers that it does not admit are closed with 1008."""
        with self._lock:
            self.max_browsers = max_browsers
            self._history.seconds = config.history
            self._new_config = config
        self._waker.wake()

    def is_turning(self, timeout: float) -> bool:
        """Tell whether the I/O thread does its work, waiting `timeout` seconds for a sign."""
        probe = threading.Event()
        with self._lock:
            self._probes.append(probe)
        self._waker.wake()
        return probe.wait(timeout)

    def count(self) -> int:
        """Return how many browsers are connected."""
        return len(self._registry)

    def close(self) -> None:
        """Close all with 1001 and end the I/O thread, within STOP_TIMEOUT."""
        with self._lock:
            self._is_closing = True
        self._waker.wake()
        if self._thread is not None:
            self._thread.join(STOP_TIMEOUT + CLOSE_TIMEOUT)
        self._ids.close()

    def _recover(self, subscriber: Subscriber, since: CallID | str) -> bytes:
        """Note what a browser missed; return its HELLO. Under the lock: no gap, nothing twice."""
        is_complete = True
        if isinstance(since, CallID):
            is_complete = self._look_back(subscriber, since)
        hello = {
            "type": "HELLO",
            "id": str(self._last_id()),
            "complete": is_complete,
            "interval": self._ping_interval,
            "time": int(time.time() * 1000),
        }
        return serialize_frame(Opcode.TEXT, json.dumps(hello).encode("ascii"))

    def _look_back(self, subscriber: Subscriber, since: CallID) -> bool:
        """Note what a browser missed; tell whether that is all."""
        missed, is_complete = self._history.since(since)
        subscriber.missed = [call for call in missed if subscriber.wants(call)]
        return is_complete

    def _last_id(self) -> CallID:
        """Return the position of a browser that has heard all."""
        return self._ids.last

    # The I/O thread's.

    def _run(self, on_failure: Callable[[], None]) -> None:
        try:
            while self._turn():
                pass
        except Exception:
            log.critical("the hub failed: this is a bug", exc_info=True)
            self.has_failed = True
            on_failure()

    def _turn(self) -> bool:
        """Serve what is ready; False when there is nothing left to do."""
        events = self._selector.select(self._until_deadline())
        self._now = time.monotonic()
        # First of all, for an arrival may be among those that have something to say.
        self._take_over()
        for key, mask in events:
            if key.data is None:
                self._waker.drain()
            else:
                self._serve(key.data, mask)
            # A call does not wait for 10,000 answers to a ping.
            if self._calls:
                self._take_over()
        # Asked behind the drain, which may have swallowed its waking, and before the last calls
        # are taken over: nothing can come behind them.
        is_closing = self._is_closing
        self._take_over()
        self._ping()
        self._end_those_leaving()
        self._answer_others()
        if is_closing and self._stop_deadline is None:
            self._stop_deadline = self._now + STOP_TIMEOUT
            for subscriber in list(self._audience):
                self._close(subscriber, CloseCode.GOING_AWAY, "popup-notifier is stopping")
        return self._stop_deadline is None or (
            bool(self._leaving) and self._now < self._stop_deadline
        )

    def _until_deadline(self) -> float | None:
        """Return the seconds until something is due."""
        due = [self._next_report]
        if self._pings:
            due.append(next(iter(self._pings)).next_ping)
        if self._leaving:
            due.append(self._leaving[0].deadline or 0)
        return None if min(due) == math.inf else max(min(due) - time.monotonic(), 0)

    def _answer_others(self) -> None:
        """Show that this thread turns, and take over a new configuration."""
        with self._lock:
            probes, self._probes = self._probes, []
            config, self._new_config = self._new_config, None
        for probe in probes:
            probe.set()
        if config is not None:
            self._ping_interval = config.ping_interval
            for subscriber in list(self._audience):
                if not config.crmws_allow.allows(subscriber.address):
                    self._drop(subscriber, DropReason.NOT_ADMITTED, "is no longer in CRMWS_ALLOW")
                    self._close(subscriber, CloseCode.POLICY_VIOLATION, "not admitted any more")
        if self._now >= self._next_report:
            self._next_report = self._now + self._manager.interval
            status = f"{len(self._audience)} browsers connected, {self.metrics.calls} calls so far"
            self._manager.notify(f"STATUS={status}", "WATCHDOG=1")

    def _drop(self, subscriber: Subscriber, reason: DropReason, text: str) -> None:
        """Log and count that we end a browser's connection."""
        self.metrics.drops[reason] += 1
        log.warning("browser dropped: %s %s", subscriber.address, text)

    def _serve(self, subscriber: Subscriber, mask: int) -> None:
        """Write and read what one browser's socket is ready for."""
        try:
            if mask & selectors.EVENT_WRITE and not subscriber.is_gone:
                self._flush(subscriber)
            if mask & selectors.EVENT_READ and not subscriber.is_gone:
                self._receive(subscriber)
        except Exception:
            self.metrics.drops[DropReason.BUG] += 1
            log.exception("browser dropped: %s met a bug", subscriber.address)
            self._abort(subscriber)

    def _take_over(self) -> None:
        """Deliver the calls that wait to those who were here, then admit the arrivals."""
        with self._lock:
            calls, self._calls = self._calls, []
            arrivals, self._arrivals = self._arrivals, []
        counts = self._deliver(calls) if calls else []
        for subscriber in arrivals:
            self._admit(subscriber, calls[subscriber.calls_before :])
        if arrivals:
            self._make_room()
            self._log_arrivals(arrivals)
        for index, (call, count) in enumerate(zip(calls, counts)):
            late = [each for each in arrivals if each.calls_before <= index and each.wants(call)]
            self._log_call(call, count + len(late))

    def _deliver(self, calls: list[Call]) -> list[int]:
        """Send calls, those for one browser in one go; return how many browsers get each."""
        frames = b"".join([call.frame for call in calls])
        unfiltered = list(self._audience.unfiltered)
        for subscriber in unfiltered:
            self._write(subscriber, frames)
        shares: dict[Subscriber, bytes] = {}
        counts = []
        for extens, group in itertools.groupby(calls, lambda call: call.extens):
            alike = list(group)
            listeners = self._audience.filtered(extens)
            counts += [len(unfiltered) + len(listeners)] * len(alike)
            frames = b"".join([call.frame for call in alike])
            for subscriber in listeners:
                shares[subscriber] = (
                    shares[subscriber] + frames if subscriber in shares else frames
                )
        for subscriber, frames in shares.items():
            self._write(subscriber, frames)
        return counts

    def _admit(self, subscriber: Subscriber, calls: list[Call]) -> None:
        """Send a browser what it missed and the calls that came since its 101."""
        subscriber.last_heard = self._now
        subscriber.next_ping = self._now + self._ping_interval
        self._pings[subscriber] = None
        self._audience.add(subscriber)
        frames = b"".join([call.replay_frame() for call in subscriber.missed])
        subscriber.missed = []
        # It may be long: the bound is for what comes on top.
        subscriber.max_backlog += len(frames)
        frames += self._share_of(subscriber, calls)
        if frames:
            self._write(subscriber, frames)
        if subscriber.leftover and not subscriber.is_gone:
            self._digest(subscriber, subscriber.leftover)
        subscriber.leftover = b""

    def _share_of(self, subscriber: Subscriber, calls: list[Call]) -> bytes:
        """Return the frames of those calls that are for one browser."""
        return b"".join([call.frame for call in calls if subscriber.wants(call)])

    def _write(self, subscriber: Subscriber, frames: bytes) -> None:
        """Send whole frames, or let wait what the socket does not take."""
        if subscriber.backlog is not None:
            subscriber.backlog.append(frames)
        else:
            sent = pledged = 0
            try:
                sent = subscriber.send(frames)
            except ssl.SSLWantWriteError:
                pledged = len(frames)
            except WOULD_BLOCK:
                pass
            except OSError as error:
                self._lose(subscriber, error)
                return
            if sent == len(frames):
                return
            subscriber.backlog = Backlog(frames, sent, pledged)
            self._watch(subscriber, selectors.EVENT_READ | selectors.EVENT_WRITE)
        if subscriber.backlog.size > subscriber.max_backlog:
            self._evict(subscriber)

    def _flush(self, subscriber: Subscriber) -> None:
        """Send on what waits for a browser whose socket has room again."""
        if subscriber.backlog is None:
            return
        size = subscriber.backlog.size
        try:
            subscriber.backlog.flush(subscriber.send)
        except OSError as error:
            self._lose(subscriber, error)
            return
        if subscriber.backlog.size < size:
            # Its answers to pings may be late, but it takes what we send.
            subscriber.last_heard = self._now
        if not subscriber.backlog.size:
            subscriber.backlog = None
            self._watch(subscriber, selectors.EVENT_READ)
            self._hang_up_if_closed(subscriber)

    def _watch(self, subscriber: Subscriber, events: int) -> None:
        self._selector.modify(subscriber.sock, events, subscriber)

    def _receive(self, subscriber: Subscriber) -> None:
        """Read what a browser sent."""
        try:
            data = subscriber.sock.recv(READ_SIZE)
        except WOULD_BLOCK:
            return
        except OSError as error:
            self._lose(subscriber, error)
            return
        if data:
            subscriber.last_heard = self._now
            self._digest(subscriber, data)
        else:
            if subscriber.deadline is None:
                self._strike_off(subscriber)
                self._log_gone(subscriber, "hung up without Close")
            self._remove(subscriber)

    def _digest(self, subscriber: Subscriber, data: bytes) -> None:
        """Let the protocol answer; what a browser says is checked and ignored."""
        protocol = subscriber.protocol
        was_closed = protocol.is_closed
        protocol.receive_data(data)
        protocol.events_received()
        reply = protocol.data_to_send()
        if reply:
            self._write(subscriber, reply)
        if protocol.is_closed and not was_closed and not subscriber.is_gone:
            is_leaving = subscriber.deadline is not None
            self._leave(subscriber)
            self._hang_up_if_closed(subscriber)
            if protocol.error is not None:
                self._drop(subscriber, DropReason.PROTOCOL_ERROR, f"sent {protocol.error}")
            elif not is_leaving:
                self._log_gone(subscriber, f"closed with {protocol.close_code}")

    def _hang_up_if_closed(self, subscriber: Subscriber) -> None:
        """Send FIN once Close frames went both ways, or the connection was failed.

        The socket is closed when the peer's FIN arrives: closing it before with bytes unread
        would send a reset, which can overtake our Close frame (RFC 6455 section 7.1.1).
        """
        if subscriber.protocol.is_closed and subscriber.backlog is None:
            with contextlib.suppress(OSError):
                subscriber.sock.shutdown(socket.SHUT_WR)

    def _ping(self) -> None:
        """Ping those whose turn it is; who was silent for two intervals is gone."""
        if not self._pings or next(iter(self._pings)).next_ping > self._now:
            return
        with self._lock:
            if self._calls:
                return  # they go first, for ALIVE says that all calls up to its ID have been sent
            alive = serialize_alive(self._last_id())
        slack = PING_SLACK * self._ping_interval
        while self._pings:
            subscriber = next(iter(self._pings))
            if subscriber.next_ping > self._now + slack:
                break
            silence = self._now - subscriber.last_heard
            if silence >= 2 * (self._ping_interval - slack):
                self._drop(subscriber, DropReason.SILENT, f"was silent for {silence:.0f} s")
                self._abort(subscriber)
                continue
            subscriber.next_ping = self._now + self._ping_interval
            self._pings.move_to_end(subscriber)
            frames = PING if subscriber.since is None else alive + PING
            if subscriber.cursor is not None:
                frames = serialize_alive(subscriber.cursor.id) + PING
            self._write(subscriber, frames)

    def _evict(self, subscriber: Subscriber) -> None:
        """Give up on a browser that does not keep up; it can come back."""
        if subscriber.deadline is not None or subscriber.backlog is None:
            return
        text = f"is too slow, {subscriber.backlog.size} bytes wait for it"
        self._drop(subscriber, DropReason.TOO_SLOW, text)
        subscriber.backlog.discard()
        self._close(subscriber, CloseCode.POLICY_VIOLATION, "too slow")

    def _close(self, subscriber: Subscriber, code: CloseCode, reason: str) -> None:
        """Begin the closing handshake."""
        self._leave(subscriber)
        subscriber.protocol.send_close(code, reason)
        self._write(subscriber, subscriber.protocol.data_to_send())

    def _leave(self, subscriber: Subscriber) -> None:
        """Take a browser off the audience; it has CLOSE_TIMEOUT to hang up."""
        if subscriber.deadline is None:
            subscriber.deadline = self._now + CLOSE_TIMEOUT
            self._leaving.append(subscriber)
            self._strike_off(subscriber)

    def _make_room(self) -> None:
        """Reset those who take their time to leave when others need their places."""
        while self._leaving and len(self._audience) + len(self._leaving) > self.max_browsers:
            self._abort(self._leaving.popleft())

    def _end_those_leaving(self) -> None:
        """Reset the connections of those whose time to leave is over."""
        while self._leaving:
            subscriber = self._leaving[0]
            if not subscriber.is_gone:
                if (subscriber.deadline or 0) > self._now:
                    return
                self._abort(subscriber)
            self._leaving.popleft()

    def _lose(self, subscriber: Subscriber, error: OSError) -> None:
        """Give up on a browser whose connection broke."""
        if subscriber.deadline is None:
            self._strike_off(subscriber)
            self._log_gone(subscriber, f"connection lost, {error.strerror}")
        self._abort(subscriber)

    def _abort(self, subscriber: Subscriber) -> None:
        """Reset a browser's connection: the kernel drops at once what nobody takes any more."""
        with contextlib.suppress(OSError):
            linger = struct.pack("ii", 1, 0)
            subscriber.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self._remove(subscriber)

    def _remove(self, subscriber: Subscriber) -> None:
        if not subscriber.is_gone:
            subscriber.is_gone = True
            self._strike_off(subscriber)
            self._selector.unregister(subscriber.sock)
            subscriber.sock.close()

    def _log_call(self, call: Call, count: int) -> None:
        """Log and count who called whom, and how many browsers got it; if none did, why."""
        if not call.is_news:
            return
        self.metrics.observe(count, time.monotonic() - call.time)
        log.info(
            "call %s: phone=%s exten=%s from %s to %d browser%s%s",
            call.id,
            quote(call.parameters["phone"]),
            quote(call.parameters["exten"]),
            call.source,
            count,
            "" if count == 1 else "s",
            "" if count else f": {self._audience.describe()}",
        )

    def _log_arrivals(self, arrivals: list[Subscriber]) -> None:
        """Log who came, in one line: after a restart all come within a second."""
        named = ", ".join([str(each.address) for each in arrivals[:LOGGED_ARRIVALS]])
        more = len(arrivals) - LOGGED_ARRIVALS
        if more > 0:
            named += f" and {more} more"
        log.info("browser connected: %s (%d connected)", named, len(self._audience))

    def _log_gone(self, subscriber: Subscriber, why: str) -> None:
        log.info(
            "browser gone: %s %s (%d connected)", subscriber.address, why, len(self._audience)
        )

    def _strike_off(self, subscriber: Subscriber) -> None:
        self._audience.discard(subscriber)
        self._pings.pop(subscriber, None)
        with self._lock:
            self._registry.discard(subscriber)


# --- 5. HTTP -----------------------------------------------------------------------------------

# Heads are read as Latin-1: every byte is a character. A PBX may put a caller's name into the
# request line as raw UTF-8.
TOKEN_CHARS = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
REQUEST_LINE = re.compile(rf"({TOKEN_CHARS}) ([!-~\x80-\xff]+) HTTP/1\.([0-9])")
FIELD_LINES = re.compile(rf"(?:{TOKEN_CHARS}:[^\x00-\x08\x0a-\x1f\x7f]*\r\n)*")
AUTHORITY = re.compile(r"https?://[^/?#]*", re.IGNORECASE)
SWITCHING_PROTOCOLS = (
    "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
)
HEAD_END = b"\r\n\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
SUBPROTOCOL = "popup-notifier"  # what a page names beside its token
SCRIPT_NAME = "popup-sample.js"
SCRIPT_FOLDERS = (Path(__file__).resolve().parent, Path("/usr/local/share/popup-notifier"))
FORM = "application/x-www-form-urlencoded"
JSON = "application/json"


class Request(NamedTuple):
    """The head of a request (RFC 9112)."""

    method: str
    minor: int  # of HTTP/1.minor
    path: str  # as sent, not percent-decoded
    query: bytes
    fields: Mapping[str, str]  # by lower-case name; repeated ones are joined by ", "
    content_length: int  # bytes


def bad_request(reason: str) -> RequestError:
    """Return the 400 for a request that is not HTTP/1.1 as it should be."""
    return RequestError(HTTPStatus.BAD_REQUEST, reason)


def parse_head(head: bytes) -> Request:
    """Return the request whose head this is, without the empty line that ends it.

    Strict where two readers could see two requests: raises RequestError.
    """
    first, _, lines = head.decode("latin-1").partition("\r\n")
    matched = REQUEST_LINE.fullmatch(first)
    if matched is None:
        raise bad_request("the request line is not METHOD TARGET HTTP/1.1")
    method, target, minor = matched.groups()
    fields = parse_fields(lines)
    hosts = fields.get("host")
    if (hosts is None and minor != "0") or (hosts is not None and "," in hosts):
        raise bad_request("there must be one Host field")
    if not target.startswith("/"):
        target = AUTHORITY.sub("", target, 1)
    path, _, query = target.partition("?")
    length = content_length(fields)
    return Request(method, int(minor), path, query.encode("latin-1"), fields, length)


def parse_fields(lines: str) -> dict[str, str]:
    """Return header fields by lower-case name."""
    # Blanks before the colon, folded lines and NUL are how requests are smuggled.
    if lines and not FIELD_LINES.fullmatch(lines + "\r\n"):
        raise bad_request("a header field is not NAME: VALUE")
    fields: dict[str, str] = {}
    for count, line in enumerate(lines.split("\r\n") if lines else ()):
        if count == MAX_FIELDS:
            status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
            raise RequestError(status, f"more than {MAX_FIELDS} header fields")
        name, _, value = line.partition(":")
        name, value = name.lower(), value.strip(" \t")
        fields[name] = f"{fields[name]}, {value}" if name in fields else value
    return fields


def content_length(fields: Mapping[str, str]) -> int:
    """Return the size of the body in bytes (RFC 9112 section 6)."""
    if "content-length" not in fields and "transfer-encoding" not in fields:
        return 0
    length = fields.get("content-length", "0")
    if "transfer-encoding" in fields:
        if "content-length" in fields:
            raise bad_request("both Transfer-Encoding and Content-Length")
        raise RequestError(
            HTTPStatus.LENGTH_REQUIRED, "send the body with Content-Length, not in chunks"
        )
    if not re.fullmatch("[0-9]{1,15}", length):
        raise bad_request(f"Content-Length: {quote(length)} is not a number")
    if int(length) > MAX_BODY:
        raise RequestError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a body of over {MAX_BODY} bytes")
    return int(length)


def serialize_response(
    status: HTTPStatus, body: str | bytes, fields: Mapping[str, str] | None = None
) -> bytes:
    """Return a whole response; the connection ends with it."""
    content = body.encode() if isinstance(body, str) else body
    head = {
        "Date": http_date(int(time.time())),
        "Connection": "close",
        "Content-Type": "text/plain; charset=utf-8",
        "Content-Length": str(len(content)),
        "Cache-Control": "no-store",
        "X-Content-Type-Options": "nosniff",
        **(fields or {}),
    }
    return serialize_head(status, head) + content


@lru_cache(maxsize=1)
def http_date(second: int) -> str:
    """Return a Date field's value."""
    return email.utils.formatdate(second, usegmt=True)


def serialize_refusal(error: RequestError) -> bytes:
    """Return the response that says in one sentence what is wrong."""
    return serialize_response(error.status, f"{error.status.phrase}: {error}\n", error.fields)


def serialize_head(status: HTTPStatus, fields: Mapping[str, str]) -> bytes:
    """Return a response's status line and header fields."""
    lines = [f"HTTP/1.1 {status.value} {status.phrase}"]
    lines += [f"{name}: {value}" for name, value in fields.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def parse_body(request: Request, body: bytes) -> list[tuple[str, object]]:
    """Return the (name, value) pairs of a trigger's body, in order."""
    kind = request.fields.get("content-type", FORM).partition(";")[0].strip().lower()
    if not body:
        return []
    if kind == JSON:
        return parse_json(body)
    if kind != FORM:
        reason = f"the body must be {FORM} or {JSON}"
        raise RequestError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, reason)
    # Asterisk's CURL(url,x) has to post something: a body without any "=" says nothing.
    return parse_form(body) if b"=" in body else []


def parse_form(encoded: bytes) -> list[tuple[str, object]]:
    """Return the pairs of a query string or a form body; what is not UTF-8 as surrogates."""
    pairs: list[tuple[str, object]] = []
    for piece in encoded.split(b"&"):
        raw_name, _, raw_value = piece.partition(b"=")
        if raw_name:
            name = decode_form(raw_name.replace(b"+", b" "))
            # Dialplans send +81312345678 as it is; a number never holds a blank.
            blank = b"+" if name == "phone" else b" "
            pairs.append((name, decode_form(raw_value.replace(b"+", blank))))
    return pairs


def decode_form(encoded: bytes) -> str:
    """Return percent-encoded UTF-8 as text; other bytes become surrogates."""
    return unquote_to_bytes(encoded).decode("utf-8", "surrogateescape")


class JSONObject(list[tuple[str, object]]):
    """The pairs of a JSON object as they stand there, repeated names too."""


def parse_json(body: bytes) -> list[tuple[str, object]]:
    """Return the pairs of a JSON object."""
    try:
        pairs = json.loads(body.decode("utf-8"), object_pairs_hook=JSONObject)
    except (ValueError, RecursionError):
        raise bad_request("the body is not JSON in UTF-8") from None
    if not isinstance(pairs, JSONObject):
        raise bad_request("the body is not a JSON object")
    return pairs


def check_parameters(pairs: Iterable[tuple[str, object]]) -> dict[str, str]:
    """Return a trigger's parameters as the browser gets them, without the token; or a 400.

    A parameter given twice is refused: that is how a caller ID looks that brought its own.
    """
    given: dict[str, str] = {}
    for name, value in pairs:
        if name in given:
            raise bad_request(f"{quote(name)} is given twice")
        given[name] = check_value(name, value)
    if len(given) > MAX_PARAMETERS:
        raise bad_request(f"more than {MAX_PARAMETERS} parameters")
    if not given.get("phone"):
        raise bad_request("phone is missing or empty; a withheld number is phone=anonymous")
    given.pop("token", None)
    return {"phone": given.pop("phone"), "exten": given.pop("exten", "") or "all", **given}


def check_value(name: str, value: object) -> str:
    """Return the text of one parameter."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise bad_request(f"{quote(name)} is not a text")
    if len(name) > MAX_NAME:
        raise bad_request(f"the name {quote(name)} has over {MAX_NAME} characters")
    if len(value) > MAX_VALUE:
        raise bad_request(f"{quote(name)} has over {MAX_VALUE} characters")
    try:
        (name + value).encode("utf-8")
    except UnicodeEncodeError:
        raise bad_request(f"{quote(name)} is not UTF-8") from None
    return value


INTERNAL_ERROR = serialize_response(
    HTTPStatus.INTERNAL_SERVER_ERROR, "Internal Server Error: popup-notifier's log says more\n"
)


class Connection:
    """A peer whose request is arriving. Belongs to the accepting thread."""

    def __init__(self, sock: socket.socket, address: IPAddress) -> None:
        self.sock = sock  # non-blocking
        self.address = address  # of the peer, until a trusted proxy says who is behind it
        self.is_shaking_hands = isinstance(sock, ssl.SSLSocket)
        self.received = bytearray()
        self.request: Request | None = None  # known once its head is here
        self.route: Route | None = None  # known once it may ask for it
        self.head_size = 0  # bytes, with the empty line
        self.awaits_continue = False  # its body comes when we ask for it
        self.room: Room | None = None  # where it waits
        self.deadline = 0.0  # until when, monotonic seconds

    @property
    def is_complete(self) -> bool:
        """Tell whether the request is here to its last byte."""
        if self.request is None:
            return False
        return len(self.received) - self.head_size >= self.request.content_length

    @property
    def rest(self) -> bytes:
        """What came behind the head: the body, or first frames."""
        return bytes(self.received[self.head_size :])

    def feed(self, data: bytes) -> None:
        """Take in bytes; raises RequestError as soon as they can't become a request."""
        seen = max(len(self.received) - len(HEAD_END), 0)
        self.received += data
        if self.request is not None:
            return
        end = self.received.find(HEAD_END, seen)
        size = len(self.received) if end < 0 else end
        if self.received.count(b"\n", 0, size) != self.received.count(b"\r\n", 0, size):
            raise bad_request("lines must end with CR LF")
        if size > MAX_HEAD:
            raise RequestError(
                HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"a head of over {MAX_HEAD} bytes"
            )
        if end >= 0:
            self.request = parse_head(bytes(self.received[:end]))
            self.head_size = end + len(HEAD_END)
            self.awaits_continue = self.request.fields.get("expect") == "100-continue"


class Room(collections.OrderedDict[Connection, None]):
    """Connections that wait, the longest waiting first: at most `size`, `timeout` seconds each."""

    def __init__(self, size: int, timeout: float) -> None:
        super().__init__()
        self.size = size
        self.timeout = timeout


class Rooms(NamedTuple):
    """Where connections wait for the rest of their request, by what their address may do.

    Each kind fills its own room alone. The longest waiting goes when it is full: whoever is
    quick never waits long enough to be that one.
    """

    trigger: Room
    browser: Room
    nobody: Room
    draining: Room  # refused ones that may still be sending


class RefusalLog:
    """Logs who was refused why. What repeats is summed up: a scan must not fill the disk."""

    def __init__(self) -> None:
        self.totals: collections.Counter[int] = collections.Counter()  # by status
        self._lock = threading.Lock()
        self._counts: collections.Counter[tuple[str, int]] = collections.Counter()
        self.deadline: float | None = None  # when to report, monotonic seconds

    def add(self, address: IPAddress, error: RequestError) -> None:
        """Log a refusal, or count it when its like were logged just before. Any thread."""
        key = (str(address), error.status.value)
        with self._lock:
            if self.deadline is None:
                self.deadline = time.monotonic() + REPORT_PERIOD
            self.totals[error.status.value] += 1
            self._counts[key] += 1
            count, is_full = self._counts[key], len(self._counts) >= REPORT_KEYS
        if count <= REPORT_LINES:
            log.warning("refused: %s %d %s", *key, error)
        if is_full:
            self.report()

    def report(self, now: float = math.inf) -> None:
        """Log what was only counted, if that is due, and begin anew. Any thread."""
        with self._lock:
            if self.deadline is None or self.deadline > now:
                return
            counts, self._counts = self._counts, collections.Counter()
            self.deadline = None
        for (address, status), count in counts.items():
            if count > REPORT_LINES:
                more = count - REPORT_LINES
                log.warning("refused: %s %d, %d times more", address, status, more)


class Server(http.server.ThreadingHTTPServer):
    """Accepts connections, gathers their requests and has them answered, in one thread.

    The accepting thread never blocks: a request is answered from memory as soon as it is whole,
    and whoever is slow waits in a room of bounded size until a deadline.
    """

    daemon_threads = True
    block_on_close = False  # else ThreadingMixIn remembers every thread for ever
    request_queue_size = LISTEN_QUEUE

    def __init__(
        self,
        config: Config,
        port: int,
        hub: Hub,
        rooms: Rooms,
        refusals: RefusalLog,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.config = config
        self.hub = hub
        self.refusals = refusals
        self.tls = tls  # None: this port speaks plain HTTP
        is_for_browsers = port == config.client_port
        self._routes = {
            path: route
            for path, route in ROUTES.items()
            if route.access_list == "crmws_allow" or not is_for_browsers
        }
        self._rooms = rooms
        self._waker = Waker()
        self._is_stopping = False
        self._tasks: collections.deque[Callable[[], None]] = collections.deque()
        self._accept_again: float | None = None  # when accepting is paused: until then
        self._complain_again = 0.0  # monotonic seconds
        self._has_warned_of_proxy = False
        self._free_threads = threading.BoundedSemaphore(MAX_THREADS)
        self._selector = selectors.DefaultSelector()
        host = "::" if config.listen is None and socket.has_dualstack_ipv6() else "0.0.0.0"
        if config.listen is not None:
            host = str(config.listen)
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        # Our own RequestHandler is called where the parent would call this one.
        super().__init__((host, port), socketserver.BaseRequestHandler)
        self.socket.setblocking(False)
        # Accepted sockets inherit it: a frame must not wait for the last one's acknowledgement.
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        self._selector.register(self.socket, selectors.EVENT_READ, self._accept)
        self._selector.register(self._waker, selectors.EVENT_READ, self._waker.drain)

    def server_bind(self) -> None:
        """Bind without HTTPServer's look-up of the host's name: name servers can be away."""
        if self.address_family == socket.AF_INET6:
            is_one = self.config.listen is not None
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, is_one)
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def serve_forever(self, poll_interval: float = 0) -> None:
        """Accept and answer until stop(). Nothing is polled: `poll_interval` is the parent's."""
        if threading.current_thread() is threading.main_thread():
            self._waker.heed_signals()
        while not self._is_stopping:
            ready = self._selector.select(0)
            if not ready:
                self.hub.welcome()
                ready = self._selector.select(self._until_deadline())
            for key, _ in ready:
                key.data()
            while self._tasks:
                self._tasks.popleft()()
            self._expire()

    def stop(self) -> None:
        """Let serve_forever return. Any thread, and signal handlers."""
        self._is_stopping = True
        self._waker.wake()

    def call_soon(self, task: Callable[[], None]) -> None:
        """Have something done by the thread that serves. Any thread, and signal handlers."""
        self._tasks.append(task)
        self._waker.wake()

    def _until_deadline(self) -> float | None:
        """Return the seconds until something is due."""
        due = [next(iter(room)).deadline for room in self._rooms if room]
        due += [at for at in (self._accept_again, self.refusals.deadline) if at is not None]
        return max(min(due) - time.monotonic(), 0) if due else None

    def _expire(self) -> None:
        """Do what is due: end those who were too slow, accept again after a pause, report."""
        now = time.monotonic()
        self.refusals.report(now)
        for room in self._rooms:
            while room and next(iter(room)).deadline <= now:
                self._time_out(next(iter(room)))
        if self._accept_again is not None and self._accept_again <= now:
            self._accept_again = None
            self._selector.register(self.socket, selectors.EVENT_READ, self._accept)

    def _time_out(self, connection: Connection) -> None:
        """Tell a peer that was too slow; one that sent nothing is a probe and no news."""
        if connection.room is self._rooms.draining or not connection.received:
            self._hang_up(connection)
        else:
            reason = f"the request did not arrive within {REQUEST_TIMEOUT:.0f} s"
            self._refuse(connection, RequestError(HTTPStatus.REQUEST_TIMEOUT, reason))

    def _accept(self) -> None:
        """Accept those who knock and read what they say."""
        for _ in range(ACCEPT_BATCH):
            try:
                sock, peer = self.socket.accept()
            except WOULD_BLOCK:
                return
            except ConnectionError:
                continue  # it left before it was let in
            except OSError as error:
                self._pause(error)
                return
            sock.setblocking(False)
            try:
                if self.tls is not None:
                    # Wrapping the listener instead would let one silent peer stop us.
                    sock = self.tls.wrap_socket(
                        sock, server_side=True, do_handshake_on_connect=False
                    )
            except OSError:
                sock.close()  # it left already
                continue
            self._read(Connection(sock, peer_address(peer[0])))

    def _pause(self, error: OSError) -> None:
        """Accept nobody for a moment: the listener stays ready, and would keep us spinning."""
        now = time.monotonic()
        if now >= self._complain_again:
            log.error("cannot accept connections: %s", error.strerror)
            self._complain_again = now + REPORT_PERIOD
        self._selector.unregister(self.socket)
        self._accept_again = now + ACCEPT_PAUSE

    def _read(self, connection: Connection) -> None:
        """Read what is there; answer a whole request, wait for the rest of another."""
        try:
            if connection.is_shaking_hands:
                shake_hands(connection)
            data = connection.sock.recv(READ_SIZE)
        except WOULD_BLOCK:
            self._wait(connection)
            return
        except ssl.SSLError as error:
            self.refusals.add(connection.address, tls_refusal(error))
            data = b""
        except OSError:
            data = b""
        if not data:
            self._hang_up(connection)  # without a whole request: a probe, or it gave up
        elif connection.room is not self._rooms.draining:
            try:
                connection.feed(data)
                self._advance(connection)
            except RequestError as error:
                self._refuse(connection, error)
            except Exception:
                log.exception("a request from %s met a bug", connection.address)
                self._send(connection, INTERNAL_ERROR)
                self._hang_up(connection)

    def _advance(self, connection: Connection) -> None:
        """Answer a request that is whole; refuse early what will be refused anyway."""
        request = connection.request
        if request is not None:
            if connection.route is None:
                if "x-forwarded-for" in request.fields:
                    self._see_through_proxy(connection, request.fields["x-forwarded-for"])
                connection.route = self._find_route(request, connection.address)
            if connection.is_complete:
                self._leave_room(connection)
                self._answer(connection)
                return
            if connection.awaits_continue:
                connection.awaits_continue = False
                self._send(connection, CONTINUE)
        self._wait(connection)

    def _wait(self, connection: Connection) -> None:
        """Let a connection wait for more bytes, in the room for its kind."""
        if connection.room is None:
            address = connection.address
            if self.config.trigger_allow.allows(address):
                room = self._rooms.trigger
            elif self.config.crmws_allow.allows(address):
                room = self._rooms.browser
            else:
                room = self._rooms.nobody
            self._enter_room(connection, room)

    def _enter_room(self, connection: Connection, room: Room) -> None:
        if len(room) >= room.size:
            self._hang_up(next(iter(room)))
        connection.room = room
        connection.deadline = time.monotonic() + room.timeout
        room[connection] = None
        read = partial(self._read, connection)
        self._selector.register(connection.sock, selectors.EVENT_READ, read)

    def _leave_room(self, connection: Connection) -> None:
        if connection.room is not None:
            self._selector.unregister(connection.sock)
            del connection.room[connection]
            connection.room = None

    def _see_through_proxy(self, connection: Connection, forwarded: str) -> None:
        """Find out who is behind a trusted proxy; warn once of one that should be trusted."""
        peer, proxies = connection.address, self.config.trusted_proxies
        connection.address = client_address(peer, forwarded, proxies)
        if peer.is_loopback and not proxies.allows(peer) and not self._has_warned_of_proxy:
            self._has_warned_of_proxy = True
            log.warning(
                "a proxy at %s sends X-Forwarded-For but is not in TRUSTED_PROXIES: "
                "everybody behind it counts as %s",
                peer,
                peer,
            )

    def _find_route(self, request: Request, address: IPAddress) -> Route:
        """Return what a request asks for, if this address may: 404, then 405, then 403."""
        route = self._routes.get(request.path)
        if route is None:
            reason = f"{quote(request.path)} is not here; known are {', '.join(self._routes)}"
            raise RequestError(HTTPStatus.NOT_FOUND, reason)
        if request.method != route.method:
            reason = f"{request.path} takes {route.method} only"
            raise RequestError(HTTPStatus.METHOD_NOT_ALLOWED, reason, Allow=route.method)
        if not getattr(self.config, route.access_list).allows(address):
            reason = f"{address} is not in {route.access_list.upper()}"
            raise RequestError(HTTPStatus.FORBIDDEN, reason)
        return route

    def _answer(self, connection: Connection) -> None:
        """Answer a whole request, here or, if that may take a while, in a thread."""
        assert connection.route is not None
        if connection.route.is_slow:
            if not self._free_threads.acquire(blocking=False):
                raise RequestError(HTTPStatus.SERVICE_UNAVAILABLE, "busy", Retry_After="1")
            self.process_request(connection, connection.address)  # type: ignore[arg-type]
            return
        response = RequestHandler(connection, self).respond()
        if response is not None:
            self._send(connection, response)
            self._hang_up(connection)

    # ThreadingMixIn's process_request() runs this in a thread of its own.
    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer a whole request, waiting for the disk and the peer."""
        connection: Connection = request
        try:
            connection.sock.settimeout(REQUEST_TIMEOUT)
            connection.sock.sendall(RequestHandler(connection, self).respond() or b"")
        except RequestError as error:
            self.refusals.add(connection.address, error)
            with contextlib.suppress(OSError):
                connection.sock.sendall(serialize_refusal(error))
        except OSError as error:
            log.info("%s left before its answer was sent: %s", client_address, error)
        except Exception:
            log.exception("a request from %s met a bug", client_address)
        finally:
            connection.sock.close()
            self._free_threads.release()

    def _refuse(self, connection: Connection, error: RequestError) -> None:
        """Answer with an error; a peer that is still sending gets time to read it."""
        self.refusals.add(connection.address, error)
        path = connection.request.path if connection.request is not None else None
        if path == "/crmws" or error.status is HTTPStatus.NOT_FOUND:
            # A page can't see why its handshake was refused, but may ask for the same by fetch().
            error.fields["Access-Control-Allow-Origin"] = "*"
        self._send(connection, serialize_refusal(error))
        self._leave_room(connection)
        if connection.is_complete:
            self._hang_up(connection)
            return
        # Closing with bytes unread would reset the connection, and the answer be lost.
        with contextlib.suppress(OSError):
            connection.sock.shutdown(socket.SHUT_WR)
        self._enter_room(connection, self._rooms.draining)

    def conclude(self, connection: Connection) -> None:
        """Answer a trigger. Any thread: nothing else knows its connection any more."""
        self._send(connection, serialize_response(HTTPStatus.OK, "OK"))
        connection.sock.close()

    def _send(self, connection: Connection, data: bytes) -> None:
        """Send what fits any socket's buffer to a peer that may be gone."""
        with contextlib.suppress(OSError):
            connection.sock.send(data)

    def _hang_up(self, connection: Connection) -> None:
        self._leave_room(connection)
        connection.sock.close()


class RequestHandler:
    """Answers one whole request; raises RequestError for those it refuses."""

    def __init__(self, connection: Connection, server: Server) -> None:
        assert connection.request is not None and connection.route is not None
        self.connection = connection
        self.request = connection.request
        self.route = connection.route
        self.server = server

    def respond(self) -> bytes | None:
        """Return the response; None when the Hub has the connection, or answers it."""
        return self.route.handle(self)

    def handle_trigger(self) -> None:
        """Take a call from the PBX: POST /api/trigger."""
        self.check_site()
        pairs = parse_form(self.request.query)
        try:
            pairs += parse_body(self.request, self.connection.rest[: self.request.content_length])
        except RequestError:
            self.check_token(pairs)
            raise
        self.check_token(pairs)
        answer = partial(self.server.conclude, self.connection)
        self.server.hub.broadcast(check_parameters(pairs), str(self.connection.address), answer)

    def check_site(self) -> None:
        """Refuse what a foreign page had a browser send: its address may be in the list."""
        fields = self.request.fields
        site, origin = fields.get("sec-fetch-site", "none"), fields.get("origin")
        own = [plain_origin(f"{scheme}://{fields.get('host')}") for scheme in ("http", "https")]
        if site not in ("none", "same-origin") or (origin and plain_origin(origin) not in own):
            source = quote(origin or site)
            raise RequestError(HTTPStatus.FORBIDDEN, f"a page of {source} may not trigger")

    def check_token(self, pairs: Iterable[tuple[str, object]]) -> None:
        """Refuse a trigger without the right token, in constant time."""
        given = [str(value) for name, value in pairs if name == "token"]
        scheme, _, bearer = self.request.fields.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            given.append(bearer.strip())
        if not is_given(self.server.config.secret_token, given):
            reason = "token is not SECRET_TOKEN" if given else "token is missing"
            raise RequestError(HTTPStatus.UNAUTHORIZED, reason, WWW_Authenticate="Bearer")

    def handle_upgrade(self) -> None:
        """Hand a browser over to the Hub: GET /crmws."""
        connection, hub = self.connection, self.server.hub
        # First what a page may learn by a plain GET, when its handshake was refused.
        self.check_page()
        extens, since = parse_subscription(self.request.query)
        if hub.count() >= hub.max_browsers:
            raise no_room(hub)
        if self.request.minor == 0:
            raise upgrade_required("WebSocket needs HTTP/1.1, also from a proxy on the way")
        accept = check_handshake(self.request.fields)
        if self.request.content_length:
            raise bad_request("a handshake has no body")
        greeting = f"{SWITCHING_PROTOCOLS}Sec-WebSocket-Accept: {accept}\r\n"
        offered = self.subprotocols()
        if offered:
            # A browser gives up unless one of those that it offered is chosen.
            chosen = SUBPROTOCOL if SUBPROTOCOL in offered else offered[0]
            greeting += f"Sec-WebSocket-Protocol: {chosen}\r\n"
        subscriber = Subscriber(
            connection.sock, connection.address, extens, since, connection.rest
        )
        if not hub.subscribe(subscriber, f"{greeting}\r\n".encode("latin-1")):
            raise no_room(hub)

    def subprotocols(self) -> list[str]:
        """Return the subprotocols that a browser offers: a page may give its token as one."""
        field = self.request.fields.get("sec-websocket-protocol")
        if field is None:
            return []
        return [each.strip() for each in field.split(",") if each.strip()]

    def check_page(self) -> None:
        """Refuse a browser by its page's origin, 403, or its token, 401."""
        config, origin = self.server.config, self.request.fields.get("origin")
        if not config.crmws_origins.allow(origin):
            entry = plain_origin(origin or "")
            reason = f"origin {quote(entry)} is not in CRMWS_ORIGINS"
            raise RequestError(HTTPStatus.FORBIDDEN, reason)
        if config.crmws_token is not None:
            given = [
                str(value) for name, value in parse_form(self.request.query) if name == "token"
            ]
            given += self.subprotocols()
            if not is_given(config.crmws_token, given):
                raise RequestError(HTTPStatus.UNAUTHORIZED, "token is not CRMWS_TOKEN")

    def handle_health(self) -> bytes:
        """Say whether calls get through: GET /healthz."""
        if not self.server.hub.is_turning(HEALTH_TIMEOUT):
            reason = f"the hub has not turned for {HEALTH_TIMEOUT:.0f} s"
            raise RequestError(HTTPStatus.SERVICE_UNAVAILABLE, reason)
        text = f"OK\n{self.server.hub.count()} browsers\n"
        relay = self.server.hub.relay_status()
        if relay is not None:
            text += f"Redis {relay.state.value}: {relay.reason}\n"
        return serialize_response(HTTPStatus.OK, text)

    def handle_metrics(self) -> bytes:
        """Count what happened, for Prometheus: GET /metrics."""
        text = "\n".join(metrics_lines(self.server.hub, self.server.refusals)) + "\n"
        fields = {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        return serialize_response(HTTPStatus.OK, text, fields)

    def handle_status_page(self) -> bytes:
        """Show that it all works: GET /."""
        fields = {"Content-Security-Policy": status_page_policy(STATUS_PAGE)}
        return self.serve(STATUS_PAGE.encode(), "text/html; charset=utf-8", fields)

    def handle_script(self) -> bytes:
        """Serve the browser client: GET /popup-sample.js."""
        for folder in SCRIPT_FOLDERS:
            try:
                content = (folder / SCRIPT_NAME).read_bytes()
            except OSError:
                continue
            return self.serve(content, "text/javascript; charset=utf-8", {})
        places = " and ".join(map(str, SCRIPT_FOLDERS))
        reason = f"{SCRIPT_NAME} is in none of the folders {places}: copy it there"
        raise RequestError(HTTPStatus.NOT_FOUND, reason)

    def serve(self, content: bytes, kind: str, fields: dict[str, str]) -> bytes:
        """Return a resource, or that the browser has it already (RFC 9110 section 13.1.2)."""
        tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
        fields = {"Content-Type": kind, "Cache-Control": "no-cache", "ETag": tag, **fields}
        if tag in [
            each.strip() for each in self.request.fields.get("if-none-match", "").split(",")
        ]:
            return serialize_response(HTTPStatus.NOT_MODIFIED, b"", fields)
        return serialize_response(HTTPStatus.OK, content, fields)


def no_room(hub: Hub) -> RequestError:
    """Return the 503 for a browser too many."""
    reason = f"{hub.max_browsers} browsers are connected, no more may be"
    return RequestError(HTTPStatus.SERVICE_UNAVAILABLE, reason, Retry_After="30")


def is_given(token: str, given: Iterable[str]) -> bool:
    """Tell whether a secret is among what was given, in constant time each."""
    secret = token.encode()
    return any(hmac.compare_digest(each.encode("utf-8", "replace"), secret) for each in given)


def metrics_lines(hub: Hub, refusals: RefusalLog) -> Iterator[str]:
    """Yield the metrics in Prometheus's text format."""

    def metric(name: str, kind: str, text: str, *samples: tuple[str, float]) -> Iterator[str]:
        yield f"# HELP popup_notifier_{name} {text}"
        yield f"# TYPE popup_notifier_{name} {kind}"
        for suffix, value in samples:
            yield f"popup_notifier_{name}{suffix} {value}"

    counted = hub.metrics
    drops = [(f'{{reason="{reason.value}"}}', count) for reason, count in counted.drops.items()]
    refused = [(f'{{status="{status}"}}', count) for status, count in refusals.totals.items()]
    buckets: list[tuple[str, float]] = [
        (f'_bucket{{le="{limit}"}}', count)
        for limit, count in zip(DELIVERY_BUCKETS, counted.within)
    ]
    buckets += [
        ('_bucket{le="+Inf"}', counted.calls),
        ("_sum", counted.seconds),
        ("_count", counted.calls),
    ]
    yield from metric("info", "gauge", "The version that runs.", (f'{{version="{VERSION}"}}', 1))
    yield from metric("uptime_seconds", "gauge", "Time since the start.", ("", uptime()))
    yield from metric("browsers", "gauge", "Browsers connected now.", ("", hub.count()))
    yield from metric("calls_total", "counter", "Calls broadcast.", ("", counted.calls))
    yield from metric(
        "deliveries_total", "counter", "Calls times browsers.", ("", counted.deliveries)
    )
    yield from metric("dropped_browsers_total", "counter", "Connections we ended.", *drops)
    yield from metric("refused_requests_total", "counter", "Requests refused.", *refused)
    text = "From a trigger to the last browser's send."
    yield from metric("delivery_seconds", "histogram", text, *buckets)
    relay = hub.relay_status()
    if relay is not None:
        states = [(f'{{state="{each.value}"}}', float(each is relay.state)) for each in RelayState]
        yield from metric("redis", "gauge", "How Redis is: 1 for what holds.", *states)
        text = "Calls triggered here that are not in the stream yet."
        yield from metric("redis_waiting_calls", "gauge", text, ("", relay.waiting))
        yield from metric("redis_lag_seconds", "gauge", "For how long.", ("", relay.lag))
        yield from metric(
            "redis_lost_calls_total", "counter", "Never got there.", ("", relay.lost)
        )


START = time.monotonic()


def uptime() -> float:
    """Return the seconds since the start."""
    return round(time.monotonic() - START, 3)


def parse_subscription(query: bytes) -> tuple[frozenset[str], CallID | str | None]:
    """Return the extensions that a browser asks for, and from where it recovers."""
    if not query:
        return NO_EXTENS, None
    extens: set[str] = set()
    since: CallID | str | None = None
    for name, value in parse_form(query):
        text = str(value)
        if name == "exten":
            extens |= split_extens(text)
        elif name == "since":
            try:
                since = parse_id(text) if text else ""
            except ValueError as error:
                raise bad_request(f"since: {error}") from None
    if len(extens) > MAX_EXTENS or any(len(each) > MAX_NAME for each in extens):
        raise bad_request(f"more than {MAX_EXTENS} extensions, or of over {MAX_NAME} characters")
    return frozenset(extens) if extens else NO_EXTENS, since


def status_page_policy(page: str) -> str:
    """Return the Content-Security-Policy that admits the page's own script and style alone."""

    def hashes(tag: str) -> str:
        texts = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()) for text in texts]
        return " ".join(f"'sha256-{digest.decode()}'" for digest in digests)

    return (
        f"default-src 'none'; script-src 'self' {hashes('script')}; style-src {hashes('style')}; "
        "connect-src 'self' ws: wss:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    )


class Route(NamedTuple):
    """Who may ask for a path how, and what answers."""

    method: str
    access_list: str  # the field of Config
    handle: Callable[[RequestHandler], bytes | None]
    is_slow: bool = False  # answered in a thread


ROUTES = {
    "/api/trigger": Route("POST", "trigger_allow", RequestHandler.handle_trigger),
    "/crmws": Route("GET", "crmws_allow", RequestHandler.handle_upgrade),
    "/healthz": Route("GET", "trigger_allow", RequestHandler.handle_health, is_slow=True),
    "/metrics": Route("GET", "trigger_allow", RequestHandler.handle_metrics),
    "/": Route("GET", "crmws_allow", RequestHandler.handle_status_page, is_slow=True),
    f"/{SCRIPT_NAME}": Route("GET", "crmws_allow", RequestHandler.handle_script, is_slow=True),
}

STATUS_PAGE = r"""<!doctype html>
<html lang="ja">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>popup-notifier</title>
<style>
  :root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --paper: #f6f8fa;
    --card: #fff; --rule: #d1d9e0; --good: #1a7f37; --wait: #9a6700; --bad: #cf222e }
  @media (prefers-color-scheme: dark) {
    :root { --ink: #e6edf3; --soft: #9198a1; --paper: #0d1117;
      --card: #161b22; --rule: #3d444d; --good: #3fb950; --wait: #d29922; --bad: #ff7b72 }
  }
  body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui }
  main { max-width: 860px; margin: 0 auto; padding: 24px 16px }
  h1 { margin: 0 0 16px; font-size: 1.25rem }
  #state { margin: 0; padding: 16px; border: 1px solid var(--rule); border-radius: 8px;
    border-left: 6px solid var(--line); background: var(--card); font-size: 1.25rem;
    font-weight: 600; overflow-wrap: anywhere }
  #state { --line: var(--wait) }
  #state.open { --line: var(--good) } #state.bad { --line: var(--bad) }
  #state::before { margin-right: 12px; color: var(--line); content: "…" }
  #state.open::before { content: "✓" } #state.bad::before { content: "!" }
  form { display: flex; flex-wrap: wrap; align-items: center; gap: 8px; margin: 20px 0 }
  input, button { padding: 6px 10px; border: 1px solid var(--soft); border-radius: 6px;
    background: var(--card); color: inherit; font: inherit }
  input { flex: 0 1 10em; min-width: 0 }
  pre { padding: 12px; border: 1px solid var(--rule); border-radius: 8px;
    background: var(--card); white-space: pre-wrap; overflow-wrap: anywhere }
  table { width: 100%; border-collapse: collapse; background: var(--card) }
  th, td { padding: 8px; border-bottom: 1px solid var(--rule); text-align: left;
    vertical-align: top; overflow-wrap: anywhere }
  b, td { unicode-bidi: isolate }
  th { color: var(--soft); font-size: .875rem; font-weight: 600; white-space: nowrap }
  td:first-child { white-space: nowrap } td:nth-child(2) { width: 65% }
</style>
<main>
  <h1>popup-notifier</h1>
  <p id="state" role="status"></p>
  <form>
    <label for="exten" data-say="filter"></label>
    <input id="exten" name="exten" placeholder="201,202" autocomplete="off">
    <button data-say="apply"></button>
  </form>
  <section id="empty"><p data-say="empty"></p><pre tabindex="0"></pre></section>
  <table hidden>
    <thead><tr><th data-say="time"><th data-say="phone"><th data-say="exten">
    <tbody aria-live="polite">
  </table>
</main>
<script src="/popup-sample.js" data-manual></script>
<script>
  'use strict';
  const MAX_ROWS = 50;
  const WORDS = {
    start: ['Connecting', '接続しています'], apply: ['Show', '表示'],
    filter: ['Extension (empty: all)', '内線 (空欄: すべて)'],
    empty: ['No call yet. Try this on the PBX, with your token:',
      'まだ着信がありません。PBX で次のコマンドを試してください (token は設定ファイルの値)。'],
    time: ['Time', '時刻'], phone: ['Caller', '発信者'], exten: ['Extension', '内線'],
    withheld: ['withheld', '非通知'],
    missed: ['missed', '切断中'], answer: ['answered', '応答'], end: ['ended', '終了'],
  };
  const isJapanese = /^ja\b/i.test(navigator.language);
  const say = (key) => WORDS[key][isJapanese ? 1 : 0];
  const find = (selector) => document.querySelector(selector);
  const exten = new URLSearchParams(location.search).get('exten') || '';

  document.documentElement.lang = isJapanese ? 'ja' : 'en';
  for (const node of document.querySelectorAll('[data-say]')) {
    node.textContent = say(node.dataset.say);
  }
  find('#state').textContent = say('start');
  find('#exten').value = exten;
  find('pre').textContent = `curl -m 1 -X POST "${location.origin}/api/trigger`
    + `?phone=0312345678&exten=${exten.split(',')[0] || 'all'}&token=SECRET_TOKEN"`;

  function onStatus({ state, reason, text }) {
    find('#state').textContent = text;
    find('#state').className = state !== 'open' && reason ? 'bad' : reason ? 'gap' : state;
    document.title = `${state === 'open' ? '✓' : '!'} popup-notifier`;
    return false; // no notice: it is all said here
  }

  function onCall({ time, phone, name, exten: called, event, missed }) {
    const clock = time.toTimeString().slice(0, 8);
    const note = missed ? 'missed' : event;
    const row = find('tbody').insertRow(0);
    const number = document.createElement('b');
    number.textContent = phone || say('withheld');
    row.insertCell().append(clock);
    row.insertCell().append(number, ` ${name}`);
    row.insertCell().append(called);
    if (/^(missed|answer|end)$/.test(note)) row.lastChild.append(` ${say(note)}`);
    if (find('tbody').rows.length > MAX_ROWS) find('tbody').deleteRow(-1);
    find('#empty').hidden = true;
    find('table').hidden = false;
    return window.innerWidth > 700; // on a phone the popup would cover the list
  }

  PopupNotifier.connect({ exten, onStatus, onCall });
</script>
"""


# --- 6. TLS ------------------------------------------------------------------------------------


def make_tls_context(cert_file: Path, key_file: Path) -> ssl.SSLContext:
    """Return what CLIENT_PORT shows browsers; raises ConfigError saying what is wrong."""
    for name, path in (("CERT_FILE", cert_file), ("KEY_FILE", key_file)):
        try:
            path.read_bytes()
        except OSError as error:
            raise ConfigError(f"{name}: cannot read {path}: {error.strerror}") from None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(cert_file, key_file, password=lambda: "")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            why = f"the key of KEY_FILE {key_file} is not that of CERT_FILE {cert_file}"
        else:
            why = f"CERT_FILE {cert_file} or KEY_FILE {key_file} is not in PEM form, or needs a "
            why += f"password ({error.reason or error})"
        raise ConfigError(why) from None
    return context


def expiry(cert_file: Path) -> float | None:
    """Return when a certificate ends, in seconds since 1970; None if that can't be read."""
    try:
        text = cert_file.read_text("latin-1").partition(ssl.PEM_HEADER)[2]
        first = ssl.PEM_HEADER + text.partition(ssl.PEM_FOOTER)[0] + ssl.PEM_FOOTER
        der = ssl.PEM_cert_to_DER_cert(first)
        # RFC 5280 section 4.1: signature, issuer, validity, ... are the SEQUENCEs of it.
        outer = der_values(der)[0][1]
        fields = der_values(der_values(outer)[0][1])
        sequences = [value for tag, value in fields if tag == DER_SEQUENCE]
        kind, end = der_values(sequences[2])[1]
    except (OSError, ValueError, IndexError):
        return None
    pattern = "%y%m%d%H%M%SZ" if kind == DER_UTC_TIME else "%Y%m%d%H%M%SZ"
    return calendar.timegm(time.strptime(end.decode("ascii"), pattern))


DER_SEQUENCE = 0x30
DER_UTC_TIME = 0x17


def der_values(data: bytes) -> list[tuple[int, bytes]]:
    """Return the (tag, content) pairs that stand one after another in DER."""
    values = []
    start = 0
    while start < len(data):
        tag, size, head = data[start], data[start + 1], 2
        if size & 0x80:
            head += size & 0x7F
            size = int.from_bytes(data[start + 2 : start + head], "big")
        values.append((tag, data[start + head : start + head + size]))
        start += head + size
    return values


def shake_hands(connection: Connection) -> None:
    """Do what can be done of a TLS handshake now; raises one of WOULD_BLOCK, or SSLError."""
    assert isinstance(connection.sock, ssl.SSLSocket)
    connection.sock.do_handshake()
    connection.is_shaking_hands = False


def tls_refusal(error: ssl.SSLError) -> RequestError:
    """Return what the log says of a failed TLS handshake; no answer can be sent."""
    reasons = {
        "HTTP_REQUEST": "speaks http on the https port",
        "TLSV1_ALERT_UNKNOWN_CA": "does not trust our certificate",
        "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "does not trust our certificate",
        "SSLV3_ALERT_BAD_CERTIFICATE": "does not trust our certificate",
        "SSLV3_ALERT_CERTIFICATE_EXPIRED": "finds our certificate expired",
    }
    reason = error.reason or "connection lost"
    return RequestError(HTTPStatus.BAD_REQUEST, f"TLS: {reasons.get(reason, reason)}")


# --- 7. Redis ----------------------------------------------------------------------------------
#
# Several daemons ("nodes") act as one: each call goes into a Redis stream, and every node delivers
# what it reads from there, its own calls too. The IDs are the stream's, and so is the order.
#
# A call that has not come back through the stream within REDIS_PATIENCE is delivered here at once,
# under an ID of our own, and goes into the stream when it can. What a browser has heard is then no
# longer "all up to an ID": its node's calls came early. So an own ID says exactly what was heard:
#
#     1763870009123-1 1763870000000 0000000000 73550214 000000042      (without the blanks)
#     now             the stream's ID up to here  node  and its calls up to this number
#
# That is all that since= needs, on any node, whether or not that one has heard of those calls:
#
# 1. A node's calls are numbered as they come, delivered in that order, and stand in the stream in
#    that order (one batch at a time, all or nothing, sent again from the first that did not come
#    back). Every entry carries node and number, its mark. A repeated entry has a number that was
#    there before, and is passed over by everybody: who has heard "up to number n" has heard these.
# 2. A Cursor is a stream position and such marks. It has heard a call when the call's position is
#    not behind its own or its mark is covered. Each call delivered gives the browser's next cursor
#    (Cursor.after), whose ID goes out with the call: so the last ID that a browser got is true.
# 3. All who are here share the node's cursor. Who comes with since= gets what its own cursor has
#    not heard: from the history, which is in the stream's order, and then our calls that are not
#    in the stream yet. If it has heard more or other calls than the rest, it is a traveller: asked
#    call by call, under IDs of its own, until its cursor is the node's.
# 4. IDs strictly increase: an ID's milliseconds never go back, and are stepped up where the rest
#    would. As soon as all marks are in the stream and it has passed the last ID, the IDs are the
#    stream's again. A node's own clock is compared with nothing: if wrong, it makes IDs longer.
#    Redis's clock, which its IDs are made of, tells how far back the history goes.
#
# Lost to the other nodes are the calls of a node that dies before Redis is back, and those that
# wait for longer than HISTORY. If Redis itself forgot entries (no appendonly), its stream is
# pushed on to where we were, so that no ID comes twice.


class RESP:
    """Redis's protocol, version 2, as a client without I/O: bytes in, replies out.

    A reply is bytes, str (a status), int, None, a list of replies, or a RedisError. Chunks may be
    cut anywhere; what Redis would never send raises RedisError.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._bulk: int | None = None  # bytes of the string that is arriving
        self._arrays: list[tuple[int, list[Any]]] = []  # those arriving, the innermost last
        self._replies: list[Any] = []

    def receive_data(self, data: bytes) -> None:
        """Take in bytes from Redis, in chunks of any size."""
        self._buffer += data
        start = 0
        while True:
            if self._bulk is None:
                end = self._buffer.find(b"\r\n", start)
                if (len(self._buffer) if end < 0 else end) - start > MAX_LINE:
                    raise RedisError("a line that does not end")
                if end < 0:
                    break
                self._receive_line(bytes(self._buffer[start:end]))
                start = end + 2
            else:
                end = start + self._bulk
                if len(self._buffer) < end + 2:
                    break
                self._add(bytes(self._buffer[start:end]))
                self._bulk = None
                start = end + 2
        del self._buffer[:start]

    def replies_received(self) -> list[Any]:
        """Return what has arrived since the last call, in order."""
        replies, self._replies = self._replies, []
        return replies

    def _receive_line(self, line: bytes) -> None:
        kind, text = line[:1], line[1:]
        if kind in (b"+", b"-"):
            message = text.decode("utf-8", "replace")
            self._add(message if kind == b"+" else RedisError(message))
            return
        if kind not in (b":", b"$", b"*") or not re.fullmatch(rb"-?[0-9]{1,19}", text):
            raise RedisError(f"{quote(line.decode('latin-1'))} is not Redis's protocol")
        number = int(text)
        if kind == b":":
            self._add(number)
        elif number < 0:
            self._add(None)
        elif number > (MAX_BULK if kind == b"$" else MAX_ELEMENTS):
            raise RedisError(f"a reply with {number} bytes or parts: no call is so long")
        elif kind == b"$":
            self._bulk = number
        elif number == 0:
            self._add([])
        elif len(self._arrays) == MAX_DEPTH:
            raise RedisError("a reply that is nested too deep")
        else:
            self._arrays.append((number, []))

    def _add(self, value: Any) -> None:
        while self._arrays:
            size, array = self._arrays[-1]
            array.append(value)
            if len(array) < size:
                return
            self._arrays.pop()
            value = array
        self._replies.append(value)


def serialize_command(*words: object) -> bytes:
    """Return a command for Redis."""
    encoded = [each if isinstance(each, bytes) else str(each).encode() for each in words]
    parts = [b"$%d\r\n%b\r\n" % (len(each), each) for each in encoded]
    return b"*%d\r\n" % len(parts) + b"".join(parts)


def check_replies(replies: Iterable[Any]) -> None:
    """Raise the first error among replies, or in the list that EXEC returns."""
    for reply in replies:
        if isinstance(reply, RedisError):
            raise reply
        if isinstance(reply, list):
            check_replies(each for each in reply if isinstance(each, RedisError))


class Mark(NamedTuple):
    """Names a call by the daemon that was triggered."""

    node: int  # the daemon, by a number of its own
    number: int  # of the call: the daemon counts them


class Cursor(NamedTuple):
    """What a browser has heard: the stream up to `position`, and early calls by their marks."""

    id: CallID  # of the last call
    position: CallID
    marks: tuple[Mark, ...] = ()

    @classmethod
    def of(cls, call_id: CallID) -> Cursor:
        """Return the cursor that an ID says."""
        digits = str(call_id.sequence)
        if len(digits) < 24:  # Redis's own have 20 at most
            return cls(call_id, call_id)
        position = CallID(int(digits[1:14]), int(digits[14:24]))
        marks = re.findall("(.{8})(.{9})", digits[24:])
        return cls(call_id, position, tuple(Mark(int(a), int(b)) for a, b in marks))

    def has(self, call: Call) -> bool:
        """Tell whether a call was heard."""
        if call.position is not None and call.position <= self.position:
            return True
        return call.mark is not None and self._covers(call.mark)

    def after(self, call: Call) -> Cursor:
        """Return the cursor of a browser that has now heard a call too, or had before."""
        return self.moved(call.position, call.mark)

    def moved(self, position: CallID | None, mark: Mark | None) -> Cursor:
        """Return the cursor behind an entry of the stream, or a call that is not there yet."""
        marks, milliseconds = self.marks, self.id.milliseconds
        if mark is not None and position is None:
            marks = (*(each for each in marks if each.node != mark.node), mark)[-MAX_MARKS:]
            milliseconds = max(milliseconds, int(time.time() * 1000))
        elif mark is not None:
            marks = tuple(
                each for each in marks if each.node != mark.node or each.number > mark.number
            )
        position = max(position or self.position, self.position)
        if (position, marks) == (self.position, self.marks):
            return self
        if not marks and position > self.id:
            return Cursor(position, position)
        digits = f"1{position.milliseconds:013}{position.sequence:010}"
        digits += "".join([f"{each.node:08}{each.number:09}" for each in marks])
        call_id = CallID(max(milliseconds, position.milliseconds), int(digits))
        if call_id <= self.id:
            call_id = CallID(self.id.milliseconds + 1, call_id.sequence)
        return Cursor(call_id, position, marks)

    def agrees_with(self, other: Cursor) -> bool:
        """Tell whether both have heard the same, and the other's next ID is a later one, too."""
        same = self.position == other.position and set(self.marks) == set(other.marks)
        return same and self.id <= other.id

    def _covers(self, mark: Mark) -> bool:
        return any(each.node == mark.node and each.number >= mark.number for each in self.marks)


class Pending:
    """A call of this node that has not come back through the stream yet."""

    __slots__ = ("answer", "call", "mark", "parameters", "sent", "source", "time")

    def __init__(
        self,
        mark: Mark,
        parameters: Mapping[str, str],
        source: str,
        answer: Callable[[], None],
    ) -> None:
        self.mark = mark
        self.parameters = parameters
        self.source = source
        self.answer = answer
        self.time = time.monotonic()
        self.call: Call | None = None  # once delivered early; until then SharedHub._waiting has it
        self.sent = math.inf  # when it was last; it may be in the stream since

    def fields(self) -> tuple[object, ...]:
        """Return its entry in the stream."""
        age = int((time.monotonic() - self.time) * 1000)
        text = json.dumps(self.parameters, ensure_ascii=False, separators=(",", ":"))
        call = ("source", self.source, "parameters", text)
        return ("node", self.mark.node, "number", self.mark.number, "age", age, *call)


class Entry(NamedTuple):
    """What stands in the stream."""

    position: CallID
    mark: Mark
    age: float  # seconds between trigger and stream
    source: str
    parameters: dict[str, str]


def parse_entry(position: CallID, words: list[bytes]) -> Entry:
    """Return an entry of the stream; raises ValueError when it is not one of ours."""
    named = dict(zip(words[::2], words[1::2]))
    try:
        mark = Mark(int(named[b"node"]), int(named[b"number"]))
        age, source = int(named[b"age"]) / 1000, named[b"source"].decode("ascii")
        parameters = check_parameters(json.loads(named[b"parameters"]).items())
    except (KeyError, AttributeError, RecursionError, OverflowError, RequestError) as error:
        raise ValueError(str(error)) from None
    if not source.isprintable() or not 0 <= age < MAX_AGE:
        raise ValueError("source or age is none of ours")
    return Entry(position, mark, age, source, parameters)


def renamed(call: Call, call_id: CallID) -> Call:
    """Return a call under another ID, with its frame."""
    # The ID stands in the message before anything that was sent to us.
    payload = call.payload.replace(f'"id": "{call.id}"'.encode(), f'"id": "{call_id}"'.encode(), 1)
    call = call._replace(id=call_id, payload=payload)
    frame = call.replay_frame() if call.is_late else serialize_frame(Opcode.TEXT, payload)
    return call._replace(frame=frame)


class RelayState(enum.Enum):
    """How Redis is."""

    UP = "up"
    SLOW = "slow"  # calls are delivered early until it has caught up
    AWAY = "away"


class RelayStatus(NamedTuple):
    """How Redis is, for /healthz and /metrics."""

    state: RelayState
    reason: str
    waiting: int  # calls of ours that are not in the stream
    lag: float  # seconds that the oldest of them has waited
    lost: int  # calls that will never be there


# What a link can end with; the last four when somebody answers who is no Redis.
LINK_ERRORS = (OSError, RedisError, ValueError, TypeError, LookupError, AttributeError)


class Link:
    """A connection to Redis. ask() waits; send() and receive() are for a socket that does not."""

    def __init__(self, url: RedisURL) -> None:
        self._codec = RESP()
        self._outgoing = b""
        self.awaited = 0  # replies
        self.deadline = math.inf  # for the next one, monotonic seconds
        if isinstance(url.address, str):
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.settimeout(REDIS_TIMEOUT)
        else:
            self.sock = socket.create_connection(url.address, REDIS_TIMEOUT)
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        with contextlib.ExitStack() as stack:
            stack.callback(self.close)
            self._set_up(url)
            stack.pop_all()

    def close(self) -> None:
        """Hang up."""
        self.sock.close()

    def _set_up(self, url: RedisURL) -> None:
        if isinstance(url.address, str):
            self.sock.connect(url.address)
        elif url.is_tls:
            context = ssl.create_default_context()
            self.sock = context.wrap_socket(self.sock, server_hostname=url.address[0])
        if url.login:
            try:
                self.ask(("AUTH", *url.login))
            except RedisError as error:
                # A command that it does not know is repeated with its words.
                raise RedisError(str(error).partition(", with args")[0]) from None
        if url.database:
            self.ask(("SELECT", url.database))
        with contextlib.suppress(RedisError):  # for CLIENT LIST; may be forbidden
            self.ask(("CLIENT", "SETNAME", "popup-notifier"))

    def ask(self, *commands: tuple[object, ...]) -> list[Any]:
        """Send commands and wait for their replies; raises the first error among these."""
        deadline = time.monotonic() + REDIS_TIMEOUT
        self.sock.sendall(b"".join([serialize_command(*each) for each in commands]))
        replies: list[Any] = []
        while len(replies) < len(commands):
            self.sock.settimeout(max(deadline - time.monotonic(), 0.001))
            data = self.sock.recv(READ_SIZE)
            if not data:
                raise ConnectionError("it hung up")
            self._codec.receive_data(data)
            replies += self._codec.replies_received()
        check_replies(replies)
        return replies

    def send(self, *commands: tuple[object, ...], patience: float = REDIS_TIMEOUT) -> None:
        """Send commands, the answers to come within `patience` seconds."""
        self._outgoing += b"".join([serialize_command(*each) for each in commands])
        self.awaited += len(commands)
        self.deadline = time.monotonic() + patience
        self.flush()

    def flush(self) -> bool:
        """Send what the socket takes; tell whether that was all."""
        with contextlib.suppress(*WOULD_BLOCK):
            while self._outgoing:
                self._outgoing = self._outgoing[self.sock.send(self._outgoing) :]
        return not self._outgoing

    def receive(self) -> list[Any]:
        """Return the replies that are there; raises an error among them."""
        with contextlib.suppress(*WOULD_BLOCK):
            while True:
                data = self.sock.recv(READ_SIZE)
                if not data:
                    raise ConnectionError("it hung up")
                self._codec.receive_data(data)
        replies = self._codec.replies_received()
        check_replies(replies)
        self.awaited -= len(replies)
        if not self.awaited:
            self.deadline = math.inf
        return replies


class Relay:
    """Carries calls between the SharedHub and Redis, in two threads of its own.

    One sets up the links, which may wait for a name server or a firewall. The other one has them
    from then on and never waits for Redis alone: calls are delivered early in time.
    """

    def __init__(self, url: RedisURL, hub: SharedHub) -> None:
        self.state = RelayState.AWAY
        self._reason = f"connecting to {url}"
        self._lost = self._reported = 0  # calls that waited for too long
        self._url = url
        self._hub = hub
        self._waker = Waker()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._waker, selectors.EVENT_READ, self._waker.drain)
        self._position = CallID(0, 0)  # the stream was read up to here
        self._new_links: collections.deque[tuple[Link, Link]] = collections.deque()
        self._links: tuple[Link, Link] | None = None  # one writes, one reads
        self._has_tried = threading.Event()
        self._is_lost = threading.Event()  # the links are
        self._is_stopping = threading.Event()
        self._stop_deadline = math.inf
        self._thread: threading.Thread | None = None  # the one that relays

    # For other threads.

    def start(self, on_failure: Callable[[], None]) -> None:
        """Start; wait a moment for the history, so that those who come back find it.

        Should a thread ever end by a bug, `on_failure` is called.
        """
        for name, work in (("redis-connect", self._keep_connected), ("redis", self._relay)):
            args = (work, on_failure)
            self._thread = threading.Thread(target=self._run, args=args, name=name, daemon=True)
            self._thread.start()
        self._has_tried.wait(REDIS_START)

    def wake(self) -> None:
        """Let a call be sent, and its deadline be kept."""
        self._waker.wake()

    def status(self, waiting: int, lag: float) -> RelayStatus:
        """Return how Redis is."""
        return RelayStatus(self.state, self._reason, waiting, lag, self._lost)

    def close(self) -> None:
        """Give calls a moment to get into the stream, then end."""
        self._stop_deadline = time.monotonic() + REDIS_START
        self._is_stopping.set()
        self._is_lost.set()
        self._waker.wake()
        if self._thread is not None:
            self._thread.join(2 * REDIS_START)

    def _run(self, work: Callable[[], None], on_failure: Callable[[], None]) -> None:
        try:
            work()
        except Exception:
            log.critical("the relay failed: this is a bug", exc_info=True)
            self._hub.has_failed = True
            on_failure()

    def _enter(self, state: RelayState, reason: str) -> None:
        """Take note of how Redis is now, and log it."""
        self.state, self._reason = state, reason
        level = logging.INFO if state is RelayState.UP else logging.WARNING
        log.log(level, "Redis is %s: %s", state.value, reason)

    def _go_away(self, error: Exception) -> None:
        """Take note of why Redis is away, and log it when that is news to an admin."""
        is_refusal = isinstance(error, RedisError) and not str(error).startswith("LOADING")
        verb = "refuses" if isinstance(error, RedisError) else "answers as no Redis does"
        if isinstance(error, OSError):
            verb = "cannot be reached"
        text = getattr(error, "strerror", None) or str(error)
        reason = f"{self._url} {verb}: {quote(text, 200)}"
        is_first = self.state is not RelayState.AWAY or not self._has_tried.is_set()
        if is_first or (is_refusal and reason != self._reason):
            self._enter(RelayState.AWAY, reason)

    # The thread that connects.

    def _keep_connected(self) -> None:
        delay, longest = REDIS_DELAYS
        while not self._is_stopping.is_set():
            try:
                self._connect()
            except LINK_ERRORS as error:
                self._go_away(error)
                self._has_tried.set()
            else:
                began = time.monotonic()
                self._has_tried.set()
                self._is_lost.wait()
                if time.monotonic() - began > longest:
                    delay = REDIS_DELAYS[0]
            self._is_stopping.wait(delay * random.uniform(0.5, 1))
            delay = min(2 * delay, longest)

    def _connect(self) -> None:
        """Set up both links, learn what was missed, and put into the stream what waits."""
        with contextlib.ExitStack() as stack:
            writer = Link(self._url)
            stack.callback(writer.close)
            reader = Link(self._url)
            stack.callback(reader.close)
            self._catch_up(reader)
            for batch in iter(self._hub.next_batch, []):
                writer.ask(*self._commands(batch))
            writer.sock.setblocking(False)
            reader.sock.setblocking(False)
            self._is_lost.clear()
            self._new_links.append((writer, reader))
            self._waker.wake()
            stack.pop_all()

    def _catch_up(self, link: Link) -> None:
        stream = self._url.stream
        clock, newest = link.ask(("TIME",), ("XREVRANGE", stream, "+", "-", "COUNT", 1))
        now = int(clock[0]) * 1000 + int(clock[1]) // 1000
        last = parse_id(newest[0][0].decode()) if newest else CallID(0, 0)
        now = max(now, last.milliseconds)  # the clock was set back, or is another machine's
        position, is_lost = self._hub.catch_up_from(now, last)
        if is_lost:
            log.warning("Redis has lost calls: its stream %s ended before %s", stream, position)
            # Another node may have done it already: then Redis refuses.
            with contextlib.suppress(RedisError):
                link.ask(("XADD", stream, position, "resumed", "1"))
        while True:
            (reply,) = link.ask(("XREAD", "COUNT", REDIS_BATCH, "STREAMS", stream, position))
            if reply is None:
                break
            position, entries = parse_stream(reply)
            self._hub.receive(entries, now)
        self._position = position

    def _commands(self, batch: list[Pending]) -> list[tuple[object, ...]]:
        """Return what puts calls into the stream, all or nothing."""
        head = ("XADD", self._url.stream, "MAXLEN", "~", STREAM_LENGTH, "*")
        commands = [(*head, *pending.fields()) for pending in batch]
        return commands if len(batch) == 1 else [("MULTI",), *commands, ("EXEC",)]

    # The thread that relays.

    def _relay(self) -> None:
        while time.monotonic() < self._stop_deadline:
            self._turn()
            is_done = self._links is None or not self._hub.relay_status().waiting
            if self._is_stopping.is_set() and is_done:
                break
        self._drop_links()
        self._hub.deliver_early(math.inf)
        waiting = self._hub.relay_status().waiting
        if waiting:
            log.warning("%d calls did not reach the other nodes", waiting)

    def _turn(self) -> None:
        """Do what is ready or due."""
        for key, _ in self._selector.select(self._until_deadline()):
            key.data()
        while self._new_links:
            self._take_links(*self._new_links.popleft())
        now = time.monotonic()
        if self._hub.deliver_early(now - REDIS_PATIENCE) and self.state is RelayState.UP:
            self._enter(RelayState.SLOW, "calls are delivered here first until it has caught up")
        self._lost += self._hub.give_up()
        if self._links is not None:
            writer, _ = self._links
            try:
                if any(link.deadline < now for link in self._links):
                    raise TimeoutError(f"no answer for {REDIS_TIMEOUT:.0f} s")
                batch = [] if writer.awaited else self._hub.next_batch()
                if batch:
                    writer.send(*self._commands(batch))
                    self._watch(writer)
            except OSError as error:
                self._fail(error)

    def _until_deadline(self) -> float | None:
        due = [self._hub.next_deadline(), self._stop_deadline]
        due += [link.deadline for link in self._links or ()]
        return None if min(due) == math.inf else max(min(due) - time.monotonic(), 0)

    def _take_links(self, writer: Link, reader: Link) -> None:
        self._links = writer, reader
        self._selector.register(writer.sock, selectors.EVENT_READ, self._write)
        self._selector.register(reader.sock, selectors.EVENT_READ, self._read)
        self._enter(RelayState.UP, f"calls are shared by {self._url}")
        if self._lost > self._reported:
            log.warning("%d calls did not reach the other nodes", self._lost - self._reported)
            self._reported = self._lost
        self._request_entries(reader)

    def _request_entries(self, reader: Link) -> None:
        head = ("XREAD", "COUNT", REDIS_BATCH, "BLOCK", int(REDIS_BLOCK * 1000))
        command = (*head, "STREAMS", self._url.stream, self._position)
        reader.send(command, patience=REDIS_BLOCK + REDIS_TIMEOUT)

    def _write(self) -> None:
        """Send on, and take the replies of the link that writes."""
        if self._links is not None:
            try:
                self._links[0].receive()
                self._watch(self._links[0])
            except LINK_ERRORS as error:
                self._fail(error)

    def _watch(self, writer: Link) -> None:
        """Flush, and be told when there is room for the rest."""
        events = selectors.EVENT_READ | (0 if writer.flush() else selectors.EVENT_WRITE)
        if events != self._selector.get_key(writer.sock).events:
            self._selector.modify(writer.sock, events, self._write)

    def _read(self) -> None:
        """Take what has come into the stream."""
        if self._links is None:
            return
        writer, reader = self._links
        try:
            for reply in reader.receive():
                if reply is not None:
                    self._position, entries = parse_stream(reply)
                    if self._hub.receive(entries) and self.state is RelayState.SLOW:
                        self._enter(RelayState.UP, f"calls are shared by {self._url} again")
                elif not writer.awaited:
                    if self._hub.misses_a_call():
                        raise RedisError("it has calls that do not come back through the stream")
                    writer.send(("PING",))
                self._request_entries(reader)
        except LINK_ERRORS as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        """Go on without Redis until there are new links."""
        self._drop_links()
        self._go_away(error)
        self._hub.deliver_early(math.inf)
        self._is_lost.set()

    def _drop_links(self) -> None:
        for link in self._links or ():
            self._selector.unregister(link.sock)
            link.close()
        self._links = None


def parse_stream(reply: Any) -> tuple[CallID, list[Entry]]:
    """Return the last ID and our entries in the reply to XREAD for one stream."""
    entries, strange = [], []
    ((_, items),) = reply
    for name, words in items:
        position = parse_id(name.decode())
        try:
            entries.append(parse_entry(position, words))
        except ValueError as error:
            if words[:1] != [b"resumed"]:
                strange.append(f"{position}: {error}")
    if strange:
        log.warning("%d stream entries are no calls, the first is %s", len(strange), strange[0])
    return position, entries


class SharedHub(Hub):
    """A Hub whose calls are those of all nodes; also the Relay's threads call its methods."""

    def __init__(
        self, config: Config, max_browsers: int, url: RedisURL, manager: ServiceManager
    ) -> None:
        super().__init__(config, max_browsers, IDSource(None), manager)
        self.start_time = time.monotonic()
        # Guarded by the lock.
        self._cursor = Cursor.of(CallID(0, 0))  # of all who are no travellers
        self._is_synchronized = False  # the history is known
        self._clock = 0  # Redis's milliseconds when our monotonic ones are 0
        self._begin = CallID(0, 0)  # calls up to here are history, not news
        self._node, self._number = new_node(), 0  # the last mark
        self._pending: collections.OrderedDict[Mark, Pending] = collections.OrderedDict()
        self._waiting: collections.deque[Pending] = collections.deque()  # not delivered yet
        self._to_send: collections.deque[Pending] = collections.deque()
        self._highest: collections.OrderedDict[int, int] = collections.OrderedDict()  # by node
        self._relay = Relay(url, self)

    def start(self, on_failure: Callable[[], None]) -> None:
        """Start the I/O thread and the Relay's."""
        super().start(on_failure)
        self._relay.start(on_failure)

    def close(self) -> None:
        """Let what waits go into the stream, then close all."""
        self._relay.close()
        super().close()

    def relay_status(self) -> RelayStatus:
        """Return how Redis is."""
        with self._lock:
            oldest = next(iter(self._pending.values()), None)
            lag = time.monotonic() - oldest.time if oldest else 0.0
            return self._relay.status(len(self._pending), lag)

    def broadcast(
        self, parameters: Mapping[str, str], source: str, answer: Callable[[], None]
    ) -> None:
        """Let a call go through Redis; `answer` is called when it is delivered here."""
        with self._lock:
            self._number += 1
            pending = Pending(Mark(self._node, self._number), parameters, source, answer)
            self._pending[pending.mark] = pending
            self._to_send.append(pending)
            self._waiting.append(pending)
            is_hopeless = len(self._waiting) > REDIS_WAITING
        if is_hopeless or self._relay.state is not RelayState.UP:
            self.deliver_early(math.inf)
        self._relay.wake()

    # For the Relay.

    def deliver_early(self, until: float) -> bool:
        """Deliver what was triggered up to then and still waits; tell whether there was any."""
        with self._lock:
            done: list[Pending] = []
            while self._waiting and self._waiting[0].time <= until:
                pending = self._waiting.popleft()
                self._cursor = self._cursor.moved(None, pending.mark)
                extens = self._history.audience_of(pending.parameters)
                call = make_call(self._cursor.id, pending.parameters, pending.source, extens)
                pending.call = call._replace(mark=pending.mark, time=pending.time)
                self._history.note(call)
                self._calls.append(pending.call)
                done.append(pending)
        self._conclude(done)
        return bool(done)

    def receive(self, entries: Iterable[Entry], now: int = 0) -> bool:
        """Take in what stands in the stream; tell whether all of ours is there.

        `now` is Redis's time in milliseconds when these are entries that were missed, else 0.
        """
        with self._lock:
            done = [self._receive_entry(entry, now) for entry in entries]
            is_empty = not self._pending
        self._conclude([pending for pending in done if pending is not None])
        return is_empty

    def _receive_entry(self, entry: Entry, now: int) -> Pending | None:
        """Deliver a call of the stream, if it was not early; return ours that it answers."""
        position, mark = entry.position, entry.mark
        if position <= self._cursor.position:
            return None
        if mark.number <= self._highest.get(mark.node, 0):
            self._cursor = self._cursor.moved(position, mark)
            self._pending.pop(mark, None)  # too late: a later one came through before it
            return None
        self._clock = max(self._clock, position.milliseconds - int(time.monotonic() * 1000))
        self._highest[mark.node] = mark.number
        self._highest.move_to_end(mark.node)
        if len(self._highest) > MAX_NODES:
            self._highest.popitem(last=False)
        pending = self._pending.pop(mark, None)
        if pending is not None and pending.call is None:
            self._waiting.remove(pending)  # the first, unless Redis lost those before it
        was_early = pending is not None and pending.call is not None
        delay = max(now - position.milliseconds, 0) / 1000 if now else 0.0
        extens = self._history.audience_of(entry.parameters)
        call = make_call(position, entry.parameters, entry.source, extens)
        began = pending.time if pending and not was_early else call.time - delay
        call = call._replace(position=position, mark=mark, time=began)
        if entry.age + delay > LATE:
            since = position.milliseconds - int(entry.age * 1000)
            payload = call.payload[:-1] + b', "time": %d}' % since
            call = renamed(call._replace(payload=payload, is_late=True), position)
        self._history.add(call)
        is_news = position > self._begin and not was_early and not self._cursor.has(call)
        self._cursor = self._cursor.after(call)
        if call.id != self._cursor.id:
            call = renamed(call, self._cursor.id)
        self._calls.append(call._replace(is_news=is_news))
        return None if was_early else pending

    def _conclude(self, done: list[Pending]) -> None:
        """Let the I/O thread deliver, and answer those who triggered. Not under the lock."""
        if self._calls:
            self._waker.wake()
        for pending in done:
            pending.answer()

    def catch_up_from(self, now: int, last: CallID) -> tuple[CallID, bool]:
        """Return where to read on in a stream that ends at `last`, and whether that was lost."""
        with self._lock:
            seconds = self._history.seconds
            age = min(time.monotonic() - self.start_time, seconds)
            self._begin = CallID(max(now - int(age * 1000), 0), 0)
            # From twice as far back: an entry may be repeated behind what is remembered.
            window = CallID(max(now - int(seconds * 2000), 0), 0)
            position = min(last, window)
            is_lost = last < self._cursor.position
            if position > self._cursor.position or not self._is_synchronized:
                self._history.begin_at(position)
                self._cursor = self._cursor.moved(position, None)
            self._is_synchronized = True
            self._clock = now - int(time.monotonic() * 1000)
            self._to_send = collections.deque(self._pending.values())
            return self._cursor.position, is_lost

    def next_batch(self) -> list[Pending]:
        """Return calls to put into the stream now."""
        with self._lock:
            batch: list[Pending] = []
            while self._to_send and len(batch) < REDIS_BATCH:
                pending = self._to_send.popleft()
                if pending.mark in self._pending:
                    pending.sent = time.monotonic()
                    batch.append(pending)
            return batch

    def misses_a_call(self) -> bool:
        """Tell whether a call that Redis has taken is not in the stream behind our position.

        So it is when the stream is made anew, by a clock that is behind or by another Redis.
        """
        with self._lock:
            oldest = next(iter(self._pending.values()), None)
            return oldest is not None and oldest.sent < time.monotonic() - LATE

    def next_deadline(self) -> float:
        """Return when a call is to be delivered early or given up, math.inf for never."""
        with self._lock:
            if self._waiting:
                return self._waiting[0].time + REDIS_PATIENCE
            oldest = next(iter(self._pending.values()), None)
            return oldest.time + self._patience() if oldest else math.inf

    def give_up(self) -> int:
        """Forget the calls that waited for too long; return how many."""
        lost = 0
        with self._lock:
            oldest = time.monotonic() - self._patience()
            while self._pending:
                pending = next(iter(self._pending.values()))
                is_old = pending.time < oldest or len(self._pending) > MAX_HISTORY
                if pending.call is None or not is_old:
                    break
                self._pending.popitem(last=False)
                lost += 1
            # Each that was given up is the first of those to send, or is being sent.
            while self._to_send and self._to_send[0].mark not in self._pending:
                self._to_send.popleft()
        return lost

    def _patience(self) -> float:
        """Return the seconds after which a call is no news to anybody."""
        return max(self._history.seconds, LATE)

    # What travellers need.

    def _last_id(self) -> CallID:
        return self._cursor.id

    def _look_back(self, subscriber: Subscriber, since: CallID) -> bool:
        cursor = Cursor.of(since)
        now = self._clock + (time.monotonic() + LATE) * 1000
        is_possible = not self._is_synchronized or cursor.position.milliseconds < now
        if not is_possible:  # not this stream's: from a time before Redis, or made up
            cursor = Cursor(since, self._cursor.position)
        is_ahead = cursor.position > self._cursor.position
        missed, is_complete = self._history.since(cursor.position)
        early = [pending.call for pending in self._pending.values() if pending.call]
        if is_ahead:
            # What was sent may be among what it has heard: the stream will tell. Later calls are
            # not, and their marks must not speak for these.
            sent = [each for each in self._pending.values() if each.sent < math.inf]
            subscriber.unsure = frozenset(pending.mark.node for pending in sent)
            if self._node in subscriber.unsure:
                self._node, self._number = new_node(), 0
        if cursor.id == cursor.position and not early:
            # As nearly always: the stream's IDs are true for it, and there may be 20,000 calls.
            subscriber.missed = [call for call in missed if subscriber.wants(call)]
        else:
            cursor, unheard = sort_out(subscriber, cursor, itertools.chain(missed, early))
            subscriber.missed = [call for _, call in unheard]
        cursor = cursor.moved(self._cursor.position, None)
        if not cursor.agrees_with(self._cursor):
            subscriber.cursor = cursor
            subscriber.travels_until = time.monotonic() + 2 * self._history.seconds + LATE
        return is_complete and is_possible and self._is_synchronized

    # The I/O thread's.

    def _deliver(self, calls: list[Call]) -> list[int]:
        news = [call for call in calls if call.is_news]
        heard_by = iter(super()._deliver(news) if news else ())
        counts = [next(heard_by) if call.is_news else 0 for call in calls]
        for subscriber in list(self._audience.travellers):
            heard = self._travel(subscriber, calls)
            for index, _ in heard:
                counts[index] += 1
            if heard:
                self._write(subscriber, b"".join([frame for _, frame in heard]))
        return counts

    def _share_of(self, subscriber: Subscriber, calls: list[Call]) -> bytes:
        if subscriber.cursor is None:
            return super()._share_of(subscriber, [call for call in calls if call.is_news])
        return b"".join([frame for _, frame in self._travel(subscriber, calls)])

    def _travel(self, subscriber: Subscriber, calls: list[Call]) -> list[tuple[int, bytes]]:
        """Return the frames of a traveller, with the calls' indices; it may have arrived then."""
        if subscriber.cursor is None or not calls:
            return []
        cursor, unheard = sort_out(subscriber, subscriber.cursor, calls)
        rest = Cursor.of(calls[-1].id)
        cursor = cursor.moved(rest.position, None)
        subscriber.cursor = cursor
        if cursor.agrees_with(rest) or self._now > subscriber.travels_until:
            subscriber.cursor = None
            self._audience.discard(subscriber)
            self._audience.add(subscriber)
        return [(index, call.frame) for index, call in unheard]


def sort_out(
    subscriber: Subscriber, cursor: Cursor, calls: Iterable[Call]
) -> tuple[Cursor, list[tuple[int, Call]]]:
    """Return the cursor of a browser behind these calls, and what it has not heard of them.

    The latter with its indices, and under the IDs that the browser's cursor then had.
    """
    unheard = []
    for index, call in enumerate(calls):
        is_early = call.position is None
        if is_early and call.mark is not None and call.mark.node in subscriber.unsure:
            continue
        is_new = not cursor.has(call)
        if is_new or not is_early:
            cursor = cursor.after(call)
        if is_new and subscriber.wants(call):
            unheard.append((index, call if call.id == cursor.id else renamed(call, cursor.id)))
    return cursor, unheard


def new_node() -> int:
    """Return a number that no other node has."""
    return int.from_bytes(os.urandom(8), "big") % 10**8


# --- 8. systemd --------------------------------------------------------------------------------


class ServiceManager:
    """Tells systemd how we are (sd_notify(3)); does nothing when started by somebody else."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        address = environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) if address else None
        watchdog = int(environ.get("WATCHDOG_USEC") or 0) / 1_000_000
        # Seconds between two signs of life, math.inf for none; twice as often as is asked for.
        self.interval = min(watchdog / 2 or math.inf, STATUS_INTERVAL) if address else math.inf

    def notify(self, *lines: str) -> None:
        """Send assignments such as READY=1. Any thread."""
        if self._socket is not None:
            self._socket.setblocking(False)
            try:
                self._socket.sendto("\n".join(lines).encode(), self._address)
            except OSError as error:
                log.warning("cannot tell systemd %s: %s", lines[0], error.strerror)


# --- 9. Command line ---------------------------------------------------------------------------

BASE_FILES = 16  # descriptors for ourselves: listener, selectors, wakers, log, a file read
JOURNAL_PRIORITIES = {
    logging.DEBUG: 7,
    logging.INFO: 6,
    logging.WARNING: 4,
    logging.ERROR: 3,
    logging.CRITICAL: 2,
}


class JournalFormatter(logging.Formatter):
    """Begins every line with its priority as in sd-daemon(3); the journal knows the time."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a record's lines, a traceback's too."""
        prefix = f"<{JOURNAL_PRIORITIES.get(record.levelno, 5)}>"
        return "\n".join(prefix + line for line in super().format(record).splitlines())


class TimeFormatter(logging.Formatter):
    """Begins every record with the time and its level."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return a record's first line."""
        second = local_time(int(record.created))
        return f"{second}.{int(record.msecs):03d} {record.levelname} {record.message}"


@lru_cache(maxsize=1)
def local_time(second: int) -> str:
    """Return a time for the log."""
    return time.strftime("%F %T", time.localtime(second))


LOST = {"levelno": logging.WARNING, "levelname": "WARNING"}


class LogHandler(logging.Handler):
    """Writes to standard error, and never waits for whoever reads it: no log stops a popup."""

    def __init__(self) -> None:
        super().__init__()
        self._descriptor = sys.stderr.fileno()
        self._lost = 0
        mode = os.fstat(self._descriptor).st_mode
        # A terminal's descriptor is shared with the shell, and a file never blocks for long.
        if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
            os.set_blocking(self._descriptor, False)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, or count it when nobody has read those before it."""
        text = self.format(record)
        if self._lost:
            what = f"{self._lost} log lines were lost: nobody reads them"
            lost = logging.makeLogRecord({**LOST, "msg": what})
            text = f"{self.format(lost)}\n{text}"
        try:
            os.write(self._descriptor, f"{text}\n".encode("utf-8", "backslashreplace"))
            self._lost = 0
        except OSError:  # full, or nobody is there to read
            self._lost += 1


def set_up_log() -> None:
    """Log to standard error: with the time for a terminal or a file, for the journal without."""
    handler = LogHandler()
    is_for_journal = is_journal(sys.stderr.fileno())
    handler.setFormatter(JournalFormatter() if is_for_journal else TimeFormatter())
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    # What the lines do not show need not be found out: halves the cost of a line.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None  # as the logging manual has it


def is_journal(descriptor: int) -> bool:
    """Tell whether systemd connected this descriptor to its journal (systemd.exec(5))."""
    status = os.fstat(descriptor)
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def raise_file_limit() -> int:
    """Raise the limit of open files as far as it goes; return it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    return limit


def room_sizes(limit: int, servers: int) -> list[int]:
    """Return the sizes of each server's rooms under a limit of open files.

    They get at most a quarter of it: neither browsers nor slow peers can leave a trigger without
    a descriptor.
    """
    share = min((limit - BASE_FILES) / 4 / (sum(ROOM_SIZES) * servers), 1)
    return [max(int(size * share), 1) for size in ROOM_SIZES]


def make_rooms(sizes: list[int]) -> Rooms:
    """Return one server's rooms."""
    timeouts = (REQUEST_TIMEOUT, REQUEST_TIMEOUT, REQUEST_TIMEOUT, DRAIN_TIMEOUT)
    return Rooms(*map(Room, sizes, timeouts))


def bound_browsers(wanted: int, limit: int, waiting: int) -> int:
    """Return how many browsers there may be beside those that wait, and warn if it is fewer."""
    allowed = max(limit - BASE_FILES - waiting, 1)
    if allowed < wanted:
        log.warning(
            "MAX_BROWSERS is %d, but the limit of %d open files allows %d: raise LimitNOFILE",
            wanted,
            limit,
            allowed,
        )
    return min(wanted, allowed)


def state_file(port: int) -> Path | None:
    """Return where IDs are kept over a restart: systemd names a folder, else it is the user's."""
    folder = Path(os.environ.get("STATE_DIRECTORY", "").partition(":")[0])
    try:
        if not folder.is_absolute():
            home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state"
            folder = Path(home) / "popup-notifier"
            folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{port}.id"
    except (OSError, RuntimeError) as error:
        log.warning("no folder to keep IDs in over a restart: %s", error)
        return None


def parse_args(args: list[str] | None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(
        prog="popup-notifier",
        description="Shows who is calling in every agent's browser, as the phone rings.",
    )
    parser.add_argument(
        "--config",
        "-config",
        type=Path,
        default=Path(DEFAULT_CONFIG),
        metavar="FILE",
        help="the configuration (default: %(default)s)",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="say what the configuration means and whether it can be used, then end",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {VERSION}")
    return parser.parse_args(args)


def load_tls(config: Config) -> ssl.SSLContext | None:
    """Return the TLS context that a configuration asks for; warn of an expired certificate."""
    if not config.use_ssl or config.cert_file is None or config.key_file is None:
        return None
    context = make_tls_context(config.cert_file, config.key_file)
    end = expiry(config.cert_file)
    if end is not None and end < time.time():
        day = time.strftime("%F", time.gmtime(end))
        log.warning("CERT_FILE %s expired on %s: browsers will refuse it", config.cert_file, day)
    return context


class Daemon:
    """All that runs: the hub, a server for each port, and the configuration they have."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = self._load()
        self.manager = ServiceManager(os.environ)
        tls = load_tls(self.config)
        ports: list[tuple[int, ssl.SSLContext | None]] = [(self.config.port, None)]
        if self.config.client_port is not None:
            ports.append((self.config.client_port, tls))
        self.file_limit = raise_file_limit()
        self.sizes = room_sizes(self.file_limit, len(ports))
        self.waiting = sum(self.sizes) * len(ports)
        max_browsers = bound_browsers(self.config.max_browsers, self.file_limit, self.waiting)
        if self.config.redis_url is None:
            ids = IDSource(state_file(self.config.port))
            self.hub = Hub(self.config, max_browsers, ids, self.manager)
        else:
            url = self.config.redis_url
            self.hub = SharedHub(self.config, max_browsers, url, self.manager)
        refusals = RefusalLog()
        self.servers = [self._listen(port, refusals, context) for port, context in ports]

    def _load(self) -> Config:
        """Return the configuration; log what is odd."""
        config, warnings = load_config(self.path)
        for warning in warnings:
            log.warning("%s", warning)
        return config

    def _listen(self, port: int, refusals: RefusalLog, tls: ssl.SSLContext | None) -> Server:
        """Return a server that listens; raises ConfigError with what to do about it."""
        try:
            rooms = make_rooms(self.sizes)
            return Server(self.config, port, self.hub, rooms, refusals, tls)
        except OSError as error:
            where = f"{self.config.listen or 'every address'}, port {port}"
            hint = ""
            if error.errno == errno.EADDRINUSE:
                hint = f"; 'ss -ltnp sport = :{port}' shows by whom"
            elif error.errno == errno.EACCES:
                hint = "; ports below 1024 need CAP_NET_BIND_SERVICE"
            raise ConfigError(f"cannot listen on {where}: {error.strerror}{hint}") from None

    def run(self) -> int:
        """Serve until SIGTERM or SIGINT; return the exit status."""
        main, *others = self.servers
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: main.stop())
        signal.signal(signal.SIGHUP, lambda *_: main.call_soon(self.reload))
        self.hub.start(on_failure=main.stop)
        for server in others:
            threading.Thread(target=server.serve_forever, name="clients", daemon=True).start()
        self._log_start()
        self.manager.notify("READY=1")
        main.serve_forever()
        self.manager.notify("STOPPING=1")
        for server in others:
            server.stop()
        main.server_close()
        self.hub.close()
        log.info("popup-notifier stopped")
        return 1 if self.hub.has_failed else 0

    def _log_start(self) -> None:
        config = self.config
        ports = f"port {config.port}"
        if config.client_port is not None:
            ports += f" and {'https' if config.use_ssl else 'http'} port {config.client_port}"
        log.info(
            "popup-notifier %s listens on %s, %s: triggers from %s, browsers from %s",
            VERSION,
            config.listen or "every address",
            ports,
            config.trigger_allow,
            config.crmws_allow,
        )

    def reload(self) -> None:
        """Take over the configuration and the certificate as they are now; or keep the old."""
        self.manager.notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            config = self._load()
            tls = load_tls(config) if self.config.use_ssl else None
        except ConfigError as error:
            for line in error.lines:
                log.error("%s", line)
            log.error("the configuration was not reloaded: the old one stays in force")
        else:
            self._apply(config, tls)
        self.manager.notify("READY=1")

    def _apply(self, config: Config, tls: ssl.SSLContext | None) -> None:
        for key, old, new in zip(KEYS, self.config, config):
            if key.needs_restart and old != new:
                log.warning("%s has changed: that needs a restart", key.name)
                unchanged: dict[str, Any] = {key.name.lower(): old}
                config = config._replace(**unchanged)
        self.config = config
        for server in self.servers:
            server.config = config
            # Connections keep the context that they began with.
            server.tls = tls if server.tls is not None else None
        max_browsers = bound_browsers(config.max_browsers, self.file_limit, self.waiting)
        self.hub.reconfigure(config, max_browsers)
        log.info(
            "configuration reloaded: triggers from %s, browsers from %s",
            config.trigger_allow,
            config.crmws_allow,
        )


def check(path: Path) -> None:
    """Print what a configuration means; raises ConfigError when it can't be used."""
    config, warnings = load_config(path)
    for line in describe_config(config):
        print(line)
    for warning in warnings:
        log.warning("%s", warning)
    load_tls(config)


def main(args: list[str] | None = None) -> int:
    """Do what the command line says; return the exit status."""
    options = parse_args(args)
    set_up_log()
    try:
        if options.check:
            check(options.config)
            return 0
        daemon = Daemon(options.config)
    except ConfigError as error:
        for line in error.lines:
            log.error("%s", line)
        return 1
    return daemon.run()


if __name__ == "__main__":
    sys.exit(main())
