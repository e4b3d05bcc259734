#!/usr/bin/env python3
"""popup-notifier: a phone rings at the PBX, and every agent's browser shows who is calling.

    PBX      -- POST /api/trigger -->  Server --> Stream --> Log --> Hub --frame-->  browsers
    Asterisk -- manager events ---->  Asterisk --^
    browser  -- GET /crmws --------->  Server --Browser-->  Hub (owns the socket from here on)

Read it from top to bottom, or look up where something is:

    1. Configuration   KEYS, where a new key begins; Config, load_config
    2. Access lists    AccessList, client_address (behind a proxy), Origins, check_visitor
    3. WebSocket       RFC 6455 without I/O: handshake, frames, WebSocketProtocol (answers Close)
    4. Calls           Call, CallTracker (who gets an answer or an end), Log, LocalStream
    5. Event loop      Loop, DeadlineQueue
    6. Hub             Browser, Hub: delivery, pings; stalled, silent or no longer admitted: closed
    7. HTTP            RFC 9112 without I/O: parse_head, parse_parameters, serialize_response
    8. Server          Connection, Server, RequestHandler, ROUTES (what answers which path)
    9. TLS             make_tls_context, begin_tls
    10. Redis          RedisStream: calls shared by several daemons, and while Redis is away
    11. Asterisk       Channel (AMI_TRUNKS says which calls come in), Switchboard, Asterisk
    12. Monitoring     HubMetrics, RefusalLog, metrics_lines, Supervisor, ServiceManager
    13. The desk       DESK_PAGE, the page at /; cards and their states are in popup-sample.js
    14. Command line   the log, limits, Daemon (start, reload on SIGHUP, stop), --check, main

Before them come the errors, and quote(), which makes a caller ID safe for the log.

Of http.server.ThreadingHTTPServer we use the listening socket and the request threads. Threads are
for what may wait, a file or another thread (Route.is_slow); every other request is answered by the
accepting thread, which costs less than starting one. serve_forever and the parser are our own,
because the library's wait for whoever is slow.

Who may touch what:

    The main thread accepts connections, gathers requests without ever blocking, and answers them.
    A slow peer costs it a descriptor and a small buffer, never a wait. A second port, CLIENT_PORT,
    has a thread of its own for the same.
    The Hub's thread owns every browser's socket from Hub.subscribe() on: nobody else reads, writes
    or closes it. It takes calls from the Log, which any thread may touch.
    With REDIS_URL two more threads talk to Redis: one reads calls into the Log, one writes them.
    With AMI_URL one more follows Asterisk's events.
"""

from __future__ import annotations

import argparse
import base64
import bisect
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
import pwd
import random
import re
import resource
import select
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
from collections.abc import Hashable, Iterable, Iterator, Mapping
from functools import lru_cache, partial
from http import HTTPStatus
from pathlib import Path
from typing import Any, BinaryIO, Callable, Generic, NamedTuple, TypeVar, Union
from urllib.parse import SplitResult, parse_qsl, unquote, unquote_to_bytes, urlsplit

VERSION = "1.1.0"
DEFAULT_CONFIG = "/usr/local/etc/popup-notifier.conf"

log = logging.getLogger("popup-notifier")

IPAddress = Union[ipaddress.IPv4Address, ipaddress.IPv6Address]
IPNetwork = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]


# Errors:
#
#     ConfigError         the configuration can't be used; `lines` says why
#     RequestError        this request is answered with `status`
#     ProtocolError       this WebSocket connection is failed with `close_code`
#     RedisError          Redis refused a command
#       ReplyError        or does not speak its protocol
#     ManagerError        Asterisk does not let us in, or what answers is not Asterisk


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


class ProtocolError(Exception):
    """A WebSocket connection to fail with `close_code` (RFC 6455 section 7.1.7)."""

    def __init__(self, close_code: CloseCode, reason: str) -> None:
        super().__init__(reason)
        self.close_code = close_code


class RedisError(Exception):
    """Redis refused a command."""


class ReplyError(RedisError):
    """What answers is not Redis, or not in its protocol."""


class ManagerError(Exception):
    """Asterisk does not let us in, or what answers is not Asterisk."""


def quote(text: str, limit: int = 64) -> str:
    """Return foreign text, such as a caller ID, made safe for a log line or an error.

    It is in quotes, on one line, escaped, and cut after `limit` characters.
    """
    escaped = []
    for char in text[:limit]:
        if char in '"\\':
            escaped.append("\\" + char)
        elif char.isprintable():
            escaped.append(char)
        else:
            escaped.append(char.encode("unicode_escape").decode("ascii"))
    return '"{}"{}'.format("".join(escaped), "..." if len(text) > limit else "")


def quote_unless_plain(text: str) -> str:
    """Return foreign text made safe for the log: without quotes if it is letters and digits."""
    return text if re.fullmatch(r"[\w.+-]+", text) else quote(text)


# --- 1. Configuration --------------------------------------------------------------------------
#
# A new key is a row in KEYS, below the parsers, and a field of Config; popup-notifier.conf and
# the README have it, as tests check. A Config never changes, so any thread may read it: a reload
# makes another.
# A parser raises ValueError with the rest of a sentence that begins with the value.


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
    open_url: str | None
    ami_url: ManagerURL | None
    ami_trunks: Trunks


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
        raise ValueError("is neither yes nor no (the Go daemon took it for no)")
    return words[text.lower()]


def parse_path(text: str) -> Path:
    """Return an absolute path: the admin does not know the daemon's working directory."""
    if not text.startswith("/"):
        raise ValueError("is not an absolute path such as /etc/popup-notifier/privkey.pem")
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
    """Return the access list of comma-separated addresses and CIDR networks."""
    entries = [entry.strip() for entry in text.split(",")]
    return AccessList([parse_network(entry) for entry in entries if entry])


def parse_origins(text: str) -> Origins:
    """Return the origins of comma-separated entries."""
    entries = [entry.strip() for entry in text.split(",")]
    return Origins([parse_origin(entry) for entry in entries if entry])


def parse_origin(text: str) -> str:
    """Return one origin as a browser writes it, or a pattern such as https://*.example.com."""
    if text != "null" and not ORIGIN_PATTERN.fullmatch(text.lower()):
        raise ValueError(f"holds {quote(text)}, no origin like https://crm.example.com (no path)")
    return normalize_origin(text)


def parse_open_url(text: str) -> str:
    """Return the address of a caller's page, with {phone}, {exten} and {name} in it."""
    if not re.fullmatch(r"https?://[^\s/?#{}]+([/?#]\S*)?", text) or not text.isprintable():
        raise ValueError("is not an address like https://crm.example.com/search?phone={phone}")
    for name in re.findall(r"\{(.*?)\}", text):
        if name not in ("phone", "exten", "name"):
            raise ValueError(
                f"holds {{{name}}}, which is none of {{phone}}, {{exten}} and {{name}}"
            )
    return text


class RedisURL(NamedTuple):
    """Where Redis is, and the account that we use there."""

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


def split_url(text: str, default_port: int) -> tuple[SplitResult, str, int]:
    """Return a URL's parts, its host and its port."""
    try:
        url = urlsplit(text)
        host, port = url.hostname or "", url.port or default_port
        host.encode("idna")  # as the look-up of the name will do
    except ValueError:
        hint = "signs such as / ? # @ : in a password are written in percent form"
        raise ValueError(f"is not a URL that can be read: {hint}") from None
    return url, host, port


def parse_redis_url(text: str) -> RedisURL:
    """Return what redis://[user:password@]host:port/db, rediss:// or unix:///path?db=0 means."""
    scheme = text.partition("://")[0].lower()
    if scheme not in ("redis", "rediss", "unix"):
        raise ValueError("does not begin with redis://, rediss:// or unix:///")
    url, host, port = split_url(text, 6379)
    options = dict(parse_qsl(url.query, keep_blank_values=True))
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


class ManagerURL(NamedTuple):
    """Where Asterisk's manager interface is, and the account that we use there."""

    host: str
    port: int
    user: str
    secret: str

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.user}@{host}:{self.port}"


def parse_manager_url(text: str) -> ManagerURL:
    """Return what ami://user:secret@host:port means."""
    if not text.lower().startswith("ami://"):
        raise ValueError("does not begin with ami:// (there is no TLS: use 127.0.0.1 or a VPN)")
    url, host, port = split_url(text, 5038)
    user, secret = unquote(url.username or ""), unquote(url.password or "")
    if not (host and user and secret) or url.path.strip("/") or url.query or url.fragment:
        raise ValueError("is not ami://user:secret@host:port; in a secret / ? # are %2F %3F %23")
    if not (user + secret).isprintable():
        raise ValueError("holds a line end or another control character")
    return ManagerURL(host, port, user, secret)


class Trunks(frozenset[str]):
    """The trunks that calls come in by, as provider or PJSIP/provider, in lower case."""

    def __str__(self) -> str:
        return ",".join(sorted(self))


def parse_trunks(text: str) -> Trunks:
    """Return the trunks of comma-separated names."""
    channel = re.search(r"([^\s,]+)-[0-9a-f]{8}(?![^\s,])", text, re.IGNORECASE)
    if channel:
        raise ValueError(f"holds the name of a channel; its trunk is {quote(channel[1])}")
    return Trunks(each.strip().lower() for each in text.split(",") if each.strip())


def parse_network(text: str) -> IPNetwork:
    """Return an address or network; the error offers what was probably meant."""
    try:
        network = ipaddress.ip_network(text)
    except ValueError:
        try:
            interface = ipaddress.ip_interface(text)
        except ValueError:
            raise ValueError(
                f"holds {quote(text)}, no IP address or CIDR network (a comma between two)"
            ) from None
        raise ValueError(
            f"holds {quote(text)}, whose host bits are set: "
            f"write {interface.network} for the network, as the Go daemon took it, "
            f"or {interface.ip} for the one address"
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
    Key("OPEN_URL", "", parse_optional(parse_open_url)),
    Key("AMI_URL", "", parse_optional(parse_manager_url), is_secret=True, needs_restart=True),
    Key("AMI_TRUNKS", "", parse_trunks, needs_restart=True),
)
SAMPLE_TOKEN = "mytoken"  # in popup-notifier.conf: everybody can read it
KEY_BY_NAME = {name: key for key in KEYS for name in (key.name, key.alias) if name}


def load_config(path: Path) -> tuple[Config, list[str]]:
    """Return a file's configuration and warnings; raises ConfigError with all mistakes."""
    try:
        data = path.read_bytes()
        mode = path.stat().st_mode
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the configuration: {error.strerror}") from None
    config, warnings = parse_config(data, str(path))
    if config.secret_token == SAMPLE_TOKEN:
        warnings.append(f"{path}: SECRET_TOKEN is the sample's: everybody knows it")
    for name, whom in (
        ("TRIGGER_ALLOW", "PBX may trigger"),
        ("CRMWS_ALLOW", "browser may connect"),
    ):
        if not getattr(config, name.lower()).networks:
            warnings.append(f"{path}: {name} names no address: no {whom}")
    if mode & stat.S_IROTH:
        warnings.append(f"{path}: everybody on this machine can read the token: chmod o-r {path}")
    return config, warnings


def parse_config(data: bytes, source: str) -> tuple[Config, list[str]]:
    """Return what load_config() does, for the bytes of a file that messages call `source`."""
    values: dict[str, Any] = {}
    seen: dict[str, int] = {}
    names: set[str] = set()
    errors: list[str] = []
    warnings: list[str] = []
    for number, name, raw in config_lines(data):
        where = f"{source}:{number}"
        key = KEY_BY_NAME.get(name)
        if raw is None:
            # Only a key is shown: the rest may be a token.
            shown = f"{quote(name)} begins a line that" if key else "the line"
            errors.append(f"{where}: {shown} is not KEY=value; a comment begins with #")
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
            names.add(name)
            is_quoted = len(raw) > 1 and raw[:1] == raw[-1:] and raw[:1] in b"\"'"
            try:
                values[key.name.lower()] = parse_value(key, raw)
                if is_quoted:
                    warnings.append(f"{where}: {name}: the quotes are part of the value")
            except ValueError as error:
                hint = "; write it without quotes" if is_quoted else ""
                errors.append(f"{where}: {name}: {error}{hint}")
    warnings += [f"{source}: {difference}" for difference in changed_defaults(names)]
    for key in KEYS:
        if key.name not in seen and key.default is None:
            errors.append(f"{source}: {key.name} is missing and has no default")
        elif key.name not in seen:
            values[key.name.lower()] = key.parse(key.default or "")
    if not errors:
        config = Config(**values)
        mistakes = (*check_tls_keys(config), *check_manager_keys(config))
        errors += [f"{source}: {mistake}" for mistake in mistakes]
    if errors:
        raise ConfigError(*errors)
    return Config(**values), warnings


def changed_defaults(names: set[str]) -> Iterator[str]:
    """Yield which missing keys had another default in the Go daemon of two ports (version 2)."""
    has_client_port = not names.isdisjoint({"CLIENT_PORT", "WSS_PORT"})
    if not has_client_port and not names.isdisjoint({"HTTP_PORT", "USE_SSL"}):
        yield "CLIENT_PORT is missing: the Go daemon had browsers at CLIENT_PORT=8990 then"
    if has_client_port and names.isdisjoint({"PORT", "HTTP_PORT"}):
        yield "PORT is missing and is 8080: the Go daemon had triggers at PORT=8989 then"


def check_tls_keys(config: Config) -> Iterator[str]:
    """Yield what is wrong with the keys for ports and TLS when taken together."""
    if config.client_port == config.port:
        yield f"CLIENT_PORT: {config.port} is PORT already"
    if not config.use_ssl:
        return
    if config.client_port is None:
        yield "USE_SSL is for CLIENT_PORT, which is missing (the Go daemon's was 8990)"
    for name in ("CERT_FILE", "KEY_FILE"):
        if getattr(config, name.lower()) is None:
            yield f"USE_SSL needs {name}, which is missing"


def check_manager_keys(config: Config) -> Iterator[str]:
    """Yield what is wrong with the keys for Asterisk when taken together."""
    if config.ami_url is not None and not config.ami_trunks:
        example = "AMI_TRUNKS=provider for channels such as PJSIP/provider-0000001a"
        yield f"AMI_URL needs the names of the trunks that calls come in by: {example}"
    if config.ami_trunks and config.ami_url is None:
        yield "AMI_TRUNKS is for AMI_URL, which is missing"


def describe_config(config: Config) -> Iterator[str]:
    """Yield a line for each key: what it is set to, secrets hidden."""
    for key in KEYS:
        value = getattr(config, key.name.lower())
        # A URL shows itself without its password.
        shown = "(hidden)" if key.is_secret and isinstance(value, str) else value
        if isinstance(value, bool):
            shown = "yes" if value else "no"
        yield f"{key.name}={'' if shown is None else shown}"


def config_lines(data: bytes) -> Iterator[tuple[int, str, bytes | None]]:
    """Yield (line number, key, value) of each line with a setting; without "=" the value is None.

    Comments are skipped as bytes, for old ones are in Shift_JIS or EUC-JP.
    """
    for number, line in enumerate(data.removeprefix(codecs.BOM_UTF8).splitlines(), 1):
        line = line.strip()
        if line and not line.startswith(b"#"):
            name, equals, value = line.partition(b"=")
            # What follows a name by another sign than "=" may be a token, which may hold one.
            word = re.split(rb"[\s:]", name)[0]
            is_pair = equals and word == name.strip()
            yield number, word.decode("utf-8", "replace"), value.strip() if is_pair else None


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
#
# Who may do what, by address, origin and token. Plain functions of the configuration: any thread.


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
    """Return who sent a request: the peer or, behind trusted proxies, the client they name.

    `forwarded` is X-Forwarded-For, all its lines joined. It is read from the right: each proxy
    adds whom it saw. What stands left of an address that is not a proxy's may be forged. Raises
    RequestError (400) for anything but an address.
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


def normalize_origin(text: str) -> str:
    """Return an origin as it is compared: in lower case, without its default port."""
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

    def allows(self, origin: str | None) -> bool:
        """Tell whether a page of this origin may connect; None, from other programs, may."""
        if not self.patterns or origin is None:
            return True
        # A star stands for one label: https://*.example.com is https://a.example.com.
        scheme, _, host = normalize_origin(origin).partition("://")
        parent = host.partition(".")[2]
        return (
            normalize_origin(origin) in self.patterns or f"{scheme}://*.{parent}" in self.patterns
        )


class Visitor(NamedTuple):
    """What decides whether a browser is admitted."""

    address: IPAddress
    origin: str | None  # of its page
    tokens: tuple[str, ...]  # that it sent


def check_address(config: Config, access_list: str, address: IPAddress) -> None:
    """Raise RequestError (403) for an address that is not in an access list, a field of Config."""
    if not getattr(config, access_list).allows(address):
        reason = f"{address} is not in {access_list.upper()}"
        raise RequestError(HTTPStatus.FORBIDDEN, reason)


def check_visitor(config: Config, visitor: Visitor) -> None:
    """Raise RequestError (403, 401) for a browser that may not come: address, origin, token."""
    check_address(config, "crmws_allow", visitor.address)
    if not config.crmws_origins.allows(visitor.origin):
        origin = quote(normalize_origin(visitor.origin or ""))
        raise RequestError(HTTPStatus.FORBIDDEN, f"origin {origin} is not in CRMWS_ORIGINS")
    if config.crmws_token is not None and not matches_token(config.crmws_token, visitor.tokens):
        raise RequestError(HTTPStatus.UNAUTHORIZED, "token is not CRMWS_TOKEN")


def matches_token(token: str, given: Iterable[str]) -> bool:
    """Tell whether one of the given texts is the token; each is compared in constant time."""
    secret = token.encode()
    return any(hmac.compare_digest(each.encode("utf-8", "replace"), secret) for each in given)


# --- 3. WebSocket ------------------------------------------------------------------------------
#
# RFC 6455 as plain functions and one class that turn bytes into messages and back. Nothing here
# knows a socket, a clock, a thread or the log.

MAX_MESSAGE = 64 * 1024  # bytes
MAX_CONTROL = 125  # bytes, RFC 6455 section 5.5


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
    RequestError: 426 for anything but WebSocket version 13, 400 for a bad key.
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
        raise RequestError(
            HTTPStatus.BAD_REQUEST, f"Sec-WebSocket-Key: {quote(key)} is not 16 bytes in base64"
        )
    return accept_key(key)


def upgrade_required(reason: str) -> RequestError:
    """Return the 426 that names what is spoken here (RFC 6455 section 4.4)."""
    return RequestError(
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

    def events_received(self) -> list[Message]:
        """Return what has arrived since the last call, in order."""
        events, self._events = self._events, []
        return events

    def data_to_send(self) -> bytes:
        """Return the bytes to send since the last call."""
        data, self._outgoing = self._outgoing, b""
        return data

    def send(self, opcode: Opcode, payload: bytes) -> None:
        """Send a message or a control frame; nothing follows our Close (section 5.5.1)."""
        if self.state is State.OPEN:
            self._outgoing += serialize_frame(opcode, payload)

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
            self.send(Opcode.PONG, payload)
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
        self.send(Opcode.CLOSE, payload[:2])
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


# --- 4. Calls ----------------------------------------------------------------------------------
#
# A phone call has three kinds of events: ring, answer, end. Each of them is triggered, and becomes
# a Call in the log, which is the only copy of it and of its frame.
#
# A place in the log is a number. A cursor is the place that a reader has come to: the Hub has sent
# everything before its cursor to the browsers that keep up; a browser that does not, because its
# socket is full or because it has just come back, has a cursor of its own. A position is what a
# browser remembers to come back with, an ID; it means the same to every daemon of a stream.
#
# Calls get into the log by a stream: LocalStream for a daemon on its own, RedisStream (section 10)
# for several that share their calls. Nobody else knows where calls come from.
#
# Any thread may use the streams and the log. A stream's lock is taken before the log's, and the
# Hub's before both.

MAX_HISTORY = 20_000  # calls remembered at most, whatever HISTORY says: some 30 MB
MAX_HISTORY_SIZE = 32 << 20  # bytes of their frames: they may be 200 KiB each
MAX_KEPT = 22_000  # calls, and bytes in proportion: whoever begins at the oldest must get it
SLICE_SIZE = 64 * 1024  # bytes sent to a browser that lags before the others have their turn
SLICE_CALLS = 1000  # calls looked at for it: most may be for other extensions
TRACKED = 3600.0  # seconds that a phone call is known by its uniqueid after its last event
# A PBX sends each event by a process or channel of its own: an answer within the first moment, as
# of a headset that picks up by itself, can overtake the ring, and so can the end.
OVERTAKING = 3.0  # seconds

ALL = "all"
NO_EXTENS: frozenset[str] = frozenset()  # shared by all: each empty set takes 216 bytes
EVENTS = ("ring", "answer", "end")
ID_PATTERN = re.compile(r"([0-9]{1,15})-([0-9]{1,400})")


class CallID(NamedTuple):
    """The ID of a call, and the position of a browser that has had every call up to it.

    A daemon on its own counts the calls since its start: START-COUNT, the start in milliseconds
    since 1970. With Redis it is the ID of the call's entry in the stream.
    """

    milliseconds: int
    sequence: int

    def __str__(self) -> str:
        return f"{self.milliseconds}-{self.sequence}"


BEGINNING = CallID(0, 0)  # the position before every call


def parse_id(text: str) -> CallID:
    """Return the ID that a text holds; raises ValueError."""
    matched = ID_PATTERN.fullmatch(text)
    if matched is None:
        raise ValueError(f"{quote(text)} is no id that a message had")
    return CallID(int(matched[1]), int(matched[2]))


class Trigger(NamedTuple):
    """An event of a phone call, as the PBX reported it."""

    key: str  # of this message, the same however often it is sent
    time: int  # milliseconds since 1970, by the stream's clock
    parameters: Mapping[str, str]  # phone, exten and all else that was sent, but the token
    source: str  # the address that triggered it
    began: float  # the same time in monotonic seconds


class Call(NamedTuple):
    """A trigger in the log, and the frame that browsers get."""

    id: CallID
    trigger: Trigger
    extens: frozenset[str]  # of the browsers that get it, in lower case; "all": every browser
    frame: bytes
    place: int  # in the log
    logged: float  # when it was added, monotonic seconds
    is_early: bool = False  # delivered before it is in Redis; its ID is the call's before it
    is_history: bool = False  # not delivered live: only to browsers that come back


def serialize_call(call_id: CallID, trigger: Trigger) -> bytes:
    """Return the frame of a call. It is ASCII, so no caller ID can break it on its way."""
    message = {
        "type": "CALL_IN",
        "id": str(call_id),
        "key": trigger.key,
        "time": trigger.time,
        "phone": trigger.parameters["phone"],
        "exten": trigger.parameters["exten"],
        "data": trigger.parameters,
    }
    return serialize_frame(Opcode.TEXT, json.dumps(message).encode("ascii"))


def serialize_position(kind: str, position: CallID, now: int, facts: str) -> bytes:
    """Return the frame that tells a browser its position: HELLO, or ALIVE once it is up to date.

    `facts` are further members of the JSON object, as text.
    """
    text = f'{{"type": "{kind}", "id": "{position}", "time": {now}, {facts}}}'
    return serialize_frame(Opcode.TEXT, text.encode("ascii"))


def split_extens(text: str) -> frozenset[str]:
    """Return the extensions of a comma-separated list, in lower case."""
    return frozenset(each.strip().lower() for each in text.split(",") if each.strip())


class TrackedCall:
    """Which extensions have got events of one phone call, which has one uniqueid."""

    __slots__ = ("extens", "is_over", "settled", "time")

    def __init__(self) -> None:
        self.extens: frozenset[str] = NO_EXTENS  # that got one
        self.time = -math.inf  # of the last event, monotonic seconds
        self.settled = -math.inf  # when it was last answered, or ended
        self.is_over = False

    def recipients(self, event: str, extens: frozenset[str], now: float) -> frozenset[str]:
        """Return which extensions get an event that the PBX addressed to `extens`.

        Whoever got the ring gets the answer and the end: their cards must go. A ring that one of
        these has overtaken is only for those who got that one: others would see it ring on.
        """
        if event == "ring" and now - self.settled >= OVERTAKING:
            return extens
        if ALL in extens:
            return self.extens if self.extens and event != "answer" else extens
        if event != "ring":
            return extens | self.extens
        return extens if ALL in self.extens else extens & self.extens


class CallTracker:
    """Knows who got events of which phone call. Belongs to a Log, and is guarded by its lock."""

    def __init__(self) -> None:
        self._calls: collections.OrderedDict[str, TrackedCall] = collections.OrderedDict()

    def track(self, parameters: Mapping[str, str], now: float) -> frozenset[str]:
        """Return which extensions get an event, at a time in monotonic seconds."""
        extens = split_extens(parameters["exten"]) or frozenset([ALL])
        unique, event = parameters.get("uniqueid"), parameters.get("event", "ring")
        if not unique:
            return extens
        while self._calls and next(iter(self._calls.values())).time < now - TRACKED:
            self._calls.popitem(last=False)
        call = self._calls.pop(unique, None)
        # One that is over is known for as long as its events may overtake each other.
        if call is None or (call.is_over and now - call.time > OVERTAKING):
            call = TrackedCall()
        recipients = call.recipients(event, extens, now)
        call.extens |= recipients
        call.time = now
        if event != "ring":
            call.settled = now
            call.is_over |= event == "end"
        self._calls[unique] = call
        if len(self._calls) > MAX_HISTORY:
            self._calls.popitem(last=False)
        return recipients


class Slice(NamedTuple):
    """Calls that stand in the log one after another."""

    calls: list[Call]
    end: int  # the place behind them
    position: CallID  # of a browser that has had all up to there


class Resumption(NamedTuple):
    """Where a browser that comes back goes on."""

    cursor: int  # the place to go on from
    since: CallID  # it has had the calls up to this position
    is_complete: bool  # all calls since then are in the log


class Log:
    """The calls of the last seconds, in the order in which everybody gets them. Any thread.

    A call's place is the number of calls before it. The history, for browsers that come back, is
    the calls of the last `seconds`, at most MAX_HISTORY calls and MAX_HISTORY_SIZE bytes; a little
    more is kept for browsers that lag.
    """

    def __init__(self, seconds: float, position: CallID) -> None:
        self.seconds = seconds  # that calls are in the history
        self.is_complete = True  # it has every call of that time
        self._lock = threading.Lock()
        # Written under the lock, read by any thread.
        self.start = 0  # the place of the first call
        self.end = 0  # the place behind the last one
        self.position = position  # of a browser that has had every call
        # Guarded by the lock. Three lists in step: calls, their IDs, and where their frames would
        # end if all frames ever stood one after another.
        self._calls: list[Call] = []
        self._ids: list[CallID] = []
        self._ends: list[int] = []
        self._offset = 0  # where the first call's frame begins
        self._history_start = 0  # the place of the history's first call
        self._complete_since = position  # the history has every call after this position
        self._tracker = CallTracker()

    def append(
        self,
        call_id: CallID,
        trigger: Trigger,
        extens: frozenset[str] | None = None,
        is_early: bool = False,
        is_history: bool = False,
    ) -> Call:
        """Add a call for `extens`; by default, for those that the CallTracker names."""
        with self._lock:
            now = time.monotonic()
            if extens is None:
                extens = self._tracker.track(trigger.parameters, trigger.began)
            frame = serialize_call(call_id, trigger)
            call = Call(call_id, trigger, extens, frame, self.end, now, is_early, is_history)
            self._ids.append(call_id)
            self._ends.append((self._ends[-1] if self._ends else self._offset) + len(frame))
            self.position = max(self.position, call_id)
            self._calls.append(call)
            self.end += 1
            return call

    def advance(self, position: CallID) -> None:
        """Move the position on: no further call will come up to there."""
        with self._lock:
            self.position = max(self.position, position)

    def begin_after(self, position: CallID) -> None:
        """Record that calls up to a position are not known here."""
        with self._lock:
            self._complete_since = max(self._complete_since, position)

    def resume(self, since: CallID) -> Resumption:
        """Return where a browser goes on that has had every call up to a position."""
        with self._lock:
            oldest = time.monotonic() - self.seconds
            while self._history_start < self.end:
                index = self._history_start - self.start
                call = self._calls[index]
                if call.trigger.began >= oldest and not self._is_over_limit(index, MAX_HISTORY):
                    break
                self._retire(call)
            place = self.start + bisect.bisect_right(self._ids, since)
            return Resumption(
                max(place, self._history_start), since, since >= self._complete_since
            )

    def find_last(self, count: int, place: int, wants: Callable[[Call], bool]) -> int:
        """Return where the last `count` wanted calls begin; `place` if fewer follow it."""
        with self._lock:
            for call in reversed(self._calls[max(place - self.start, 0) :]):
                count -= wants(call)
                if not count:
                    return call.place
        return place

    def read(self, place: int, stop: int | None = None) -> Slice | None:
        """Return some calls from a place on, up to `stop`; None when they are forgotten."""
        with self._lock:
            first = place - self.start
            if first < 0:
                return None
            last = len(self._calls) if stop is None else stop - self.start
            limit = (self._ends[first - 1] if first else self._offset) + SLICE_SIZE
            last = min(bisect.bisect_left(self._ends, limit, first, last) + 1, last)
            last = min(last, first + SLICE_CALLS)
            is_all = last == len(self._calls)
            position = self.position if is_all else self._ids[last - 1]
            return Slice(self._calls[first:last], self.start + last, position)

    def forget(self, place: int, seconds: float) -> None:
        """Forget calls before a place: those over the limits, or `seconds` out of the history."""
        with self._lock:
            oldest = time.monotonic() - self.seconds - seconds
            count = 0
            while count < place - self.start and (
                self._calls[count].logged < oldest or self._is_over_limit(count, MAX_KEPT)
            ):
                self._retire(self._calls[count])
                count += 1
            if count:
                self._offset = self._ends[count - 1]
                self.start += count
                del self._calls[:count], self._ids[:count], self._ends[:count]

    def _retire(self, call: Call) -> None:
        """Take a call, and those before it, out of the history."""
        if call.place >= self._history_start:
            self._history_start = call.place + 1
            self._complete_since = max(self._complete_since, call.id)

    def _is_over_limit(self, count: int, limit: int) -> bool:
        """Tell whether calls or bytes are over a limit of calls, without the first `count`."""
        size = self._ends[-1] - (self._ends[count - 1] if count else self._offset)
        return len(self._calls) - count > limit or size * MAX_HISTORY > MAX_HISTORY_SIZE * limit


class LocalStream:
    """The calls of a daemon on its own. Any thread."""

    def __init__(self, seconds: float) -> None:
        self._run = self.clock()
        self._count = 0  # of the last call; guarded by the lock
        self._lock = threading.Lock()
        self.log = Log(seconds, CallID(self._run, 0))

    def start(self, supervisor: Supervisor, deliver: Callable[[], None]) -> None:
        """Begin; `deliver` is called by any thread when there are new calls in the log."""
        self._deliver = deliver

    def clock(self) -> int:
        """Return the time that calls are triggered by, in milliseconds since 1970."""
        return int(time.time() * 1000)

    def publish(
        self, parameters: Mapping[str, str], source: str, answer: Callable[[], None]
    ) -> None:
        """Put a call into the log; call `answer` when it is there."""
        with self._lock:
            self._count += 1
            call_id = CallID(self._run, self._count)
            began = time.monotonic()
            self.log.append(
                call_id, Trigger(str(call_id), self.clock(), parameters, source, began)
            )
        self._deliver()
        answer()

    def resume(self, since: CallID) -> Resumption:
        """Return where a browser goes on: of another run's position nothing is known."""
        is_ours = since.milliseconds == self._run and since <= self.log.position
        return self.log.resume(since if is_ours else BEGINNING)

    def may_hold(self, since: CallID) -> bool:
        """Tell whether a position is, or will soon be, one of this stream."""
        return since <= self.log.position

    def status(self) -> None:
        """Return how Redis is: there is none."""

    def close(self) -> None:
        """End."""


# --- 5. Event loop -----------------------------------------------------------------------------
#
# The Hub's thread and each port's have a Loop. Only that thread waits for its sockets, changes and
# forgets them; other threads may add one, wake the loop or hand it a task.

# Taken from one browser before the next has its turn: a whole TLS record, so that none of it stays
# where the selector can't see it.
READ_SIZE = 16 * 1024  # bytes

# What a non-blocking socket raises when it has nothing to read or no room to write.
WOULD_BLOCK = (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
Item = TypeVar("Item", bound=Hashable)


class Loop:
    """One thread's wait for its sockets, and for the tasks that other threads hand to it."""

    def __init__(self) -> None:
        self.now = time.monotonic()  # when the last wait ended
        self._selector = selectors.DefaultSelector()
        self._tasks: collections.deque[Callable[[], None]] = collections.deque()
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._selector.register(self._reader, READ)

    def watch(self, sock: socket.socket, events: int, owner: object) -> None:
        """Let wait() return a socket's owner when it is ready for READ or WRITE. Any thread."""
        self._selector.register(sock, events, owner)

    def change(self, sock: socket.socket, events: int, owner: object) -> None:
        """Watch a socket for something else."""
        self._selector.modify(sock, events, owner)

    def forget(self, sock: socket.socket) -> None:
        """Stop watching a socket, before it is closed."""
        self._selector.unregister(sock)

    def wait(self, timeout: float | None) -> list[tuple[Any, int]]:
        """Do the tasks, and return (owner, events) of the sockets that are ready by then."""
        ready = []
        selected = self._selector.select(timeout)
        self.now = time.monotonic()
        for key, events in selected:
            if key.data is not None:
                ready.append((key.data, events))
            else:
                with contextlib.suppress(BlockingIOError):
                    self._reader.recv(4096)
        while self._tasks:
            self._tasks.popleft()()
        return ready

    def wake(self) -> None:
        """End the wait, or the next one. Any thread, and signal handlers."""
        # If the pipe is full, it will wake anyway.
        with contextlib.suppress(BlockingIOError):
            self._writer.send(b"\0")

    def call_soon(self, task: Callable[[], None]) -> None:
        """Have something done by the loop's thread. Any thread, and signal handlers."""
        self._tasks.append(task)
        self.wake()

    def probe(self) -> threading.Event:
        """Return an event that is set by the loop's next turn. Any thread."""
        turned = threading.Event()
        self.call_soon(turned.set)
        return turned

    def wake_on_signals(self) -> None:
        """Let every signal wake the loop, too. Main thread.

        A handler runs between two steps of the main thread: a signal that comes as its wait
        begins, or that the system hands to another thread, would not end that wait.
        """
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)


class DeadlineQueue(Generic[Item]):
    """Items that have `timeout` seconds each, the first due first; its user minds `size`."""

    def __init__(self, timeout: float, size: int = sys.maxsize) -> None:
        self.timeout = timeout
        self.size = size
        self._deadlines: collections.OrderedDict[Item, float] = collections.OrderedDict()

    def __len__(self) -> int:
        return len(self._deadlines)

    def __contains__(self, item: object) -> bool:
        return item in self._deadlines

    def add(self, item: Item, now: float) -> None:
        """Give an item its time, anew if it is here."""
        self._deadlines[item] = now + self.timeout
        self._deadlines.move_to_end(item)

    def discard(self, item: Item) -> None:
        """Take an item out, if it is here."""
        self._deadlines.pop(item, None)

    def first(self) -> Item:
        """Return the item that is due first."""
        return next(iter(self._deadlines))

    def next_deadline(self) -> float:
        """Return when that is, math.inf when there is none."""
        return next(iter(self._deadlines.values()), math.inf)

    def expired(self, now: float) -> Iterator[Item]:
        """Take out the items whose time is over, one by one."""
        while self.next_deadline() <= now:
            yield self._deadlines.popitem(last=False)[0]

    def change_timeout(self, timeout: float, now: float) -> None:
        """Give those who are here no more than the new time."""
        self.timeout = timeout
        for item, deadline in self._deadlines.items():
            self._deadlines[item] = min(deadline, now + timeout)


def seconds_until(deadline: float) -> float | None:
    """Return the seconds to wait for a deadline, in monotonic seconds; None: for ever."""
    return None if deadline == math.inf else max(deadline - time.monotonic(), 0)


# --- 6. Hub ------------------------------------------------------------------------------------
#
# One thread owns all browsers. It neither waits for one of them nor keeps calls for it: what a
# browser has yet to get is in the log. A stalled browser, and one that falls behind the log, gets
# Close 1008 "too slow"; one that is silent, or does not hang up after Close, gets a reset.

LOGGED_EXTENS = 10  # extensions named in the log when nobody wanted a call
LOGGED_ARRIVALS = 4  # browsers named in the log when many come at once
MAX_BROWSER_MESSAGE = 8 * 1024  # bytes: no page has to say anything
MAX_JOINED = 64  # slices kept joined, 4 MiB: many browsers come back at one place
TURN_SLICES = 4  # sent to one browser before the others have their turn
MAX_UNANSWERED = 2  # pings; then a browser is gone
# Share of the interval: pings that are due within it leave together. To wake for each of 10,000
# browsers, and again for its answer, costs three times as much.
PING_SLACK = 0.01
STALL_TIMEOUT = 10.0  # seconds that a socket may take nothing; a change of radio cell takes 3
CLOSE_TIMEOUT = 1.0  # seconds that a browser has to take its Close frame and hang up
STOP_TIMEOUT = 3.0  # seconds that the thread has to close all of them when the daemon ends
PING = serialize_frame(Opcode.PING, b"")


class Subscription(NamedTuple):
    """What a browser asks for in its handshake."""

    extens: frozenset[str] = NO_EXTENS  # whose calls; none: every call
    recovers: bool = False  # it sent since=, and gets its position by HELLO and ALIVE
    since: CallID | None = None  # the position that it comes back with
    last: int = 0  # of the calls that it missed, so many at most; 0: all


class Browser:
    """A connected browser. All of it belongs to the Hub's thread once the Hub has it."""

    __slots__ = (
        "cursor",
        "extens",
        "last",
        "protocol",
        "recovers",
        "send",
        "since",
        "sock",
        "unanswered",
        "unread",
        "unsent",
        "visitor",
    )

    def __init__(
        self,
        sock: socket.socket,
        visitor: Visitor,
        subscription: Subscription,
        unread: bytes = b"",
    ) -> None:
        self.sock = sock  # non-blocking
        self.send = sock.send
        self.visitor = visitor
        # `since` is the position that it came with, and None once it is up to date.
        self.extens, self.recovers, self.since, self.last = subscription
        self.unread = unread  # bytes that came behind the handshake
        self.cursor = 0  # the place in the log that it has come to, while it does not keep up
        self.unsent: bytes | memoryview = b""  # rest of the last send; it ends with a whole frame
        self.unanswered = 0  # pings
        self.protocol = WebSocketProtocol(MAX_BROWSER_MESSAGE)

    def __str__(self) -> str:
        text = str(self.visitor.address)
        if self.visitor.origin is not None:
            text += f" origin={quote(self.visitor.origin)}"
        if self.extens:
            text += f" exten={quote(','.join(sorted(self.extens)))}"
        return text

    @property
    def is_gone(self) -> bool:
        """Tell whether its socket is closed."""
        return self.sock.fileno() < 0

    def wants(self, call: Call) -> bool:
        """Tell whether this browser is to get the call at its cursor."""
        if self.since is None:
            if call.is_history:
                return False
        elif call.id <= self.since and not call.is_early:
            return False
        return not self.extens or ALL in call.extens or not self.extens.isdisjoint(call.extens)


class BrowserIndex:
    """Browsers by extension: a call costs time for those who get it, not for all who are here."""

    def __init__(self) -> None:
        self.unfiltered: dict[Browser, None] = {}  # want every call
        self._filtered: dict[Browser, None] = {}
        self._by_exten: dict[str, dict[Browser, None]] = {}

    def __len__(self) -> int:
        return len(self.unfiltered) + len(self._filtered)

    def __iter__(self) -> Iterator[Browser]:
        return itertools.chain(self.unfiltered, self._filtered)

    def __contains__(self, browser: object) -> bool:
        return browser in self.unfiltered or browser in self._filtered

    def add(self, browser: Browser) -> None:
        """Take a browser in."""
        (self._filtered if browser.extens else self.unfiltered)[browser] = None
        for exten in browser.extens:
            self._by_exten.setdefault(exten, {})[browser] = None

    def discard(self, browser: Browser) -> None:
        """Let a browser go, if it is here."""
        self.unfiltered.pop(browser, None)
        if self._filtered.pop(browser, self) is self:
            return
        for exten in browser.extens:
            del self._by_exten[exten][browser]
            if not self._by_exten[exten]:
                del self._by_exten[exten]

    def filtered(self, extens: frozenset[str]) -> dict[Browser, None]:
        """Return those who asked for one of these extensions; do not change it."""
        if ALL in extens:
            return self._filtered
        found = [self._by_exten[exten] for exten in extens if exten in self._by_exten]
        return found[0] if len(found) == 1 else dict.fromkeys(itertools.chain(*found))

    def count(self, extens: frozenset[str]) -> int:
        """Return how many want a call to these extensions."""
        return len(self.unfiltered) + len(self.filtered(extens))

    def extens(self) -> Iterable[str]:
        """Return the extensions that somebody asked for."""
        return self._by_exten


class DropReason(enum.Enum):
    """Why we end a browser's connection, as the log and /metrics name it."""

    TOO_SLOW = "too slow"
    SILENT = "silent"
    PROTOCOL_ERROR = "protocol error"
    NOT_ADMITTED = "not admitted"
    BUG = "bug"


def describe_settings(config: Config) -> str:
    """Return the settings that pages get in HELLO and ALIVE, as members of a JSON object."""
    settings: dict[str, object] = {"interval": config.ping_interval}
    if config.open_url is not None:
        settings["open"] = config.open_url
    return json.dumps(settings)[1:-1]


class Hub:
    """The browsers, and the one thread that talks to them.

    A browser that is present keeps up or lags. Those that keep up get each call as it comes. Those
    that lag have a cursor; when their socket has room they are sent the next slice of the log,
    between new calls. They are not read from meanwhile, or the replies would pile up. Those that
    are ahead, for they have had more from another daemon than this one has read, lag too, but are
    read from. Those that leave have been sent Close, and have CLOSE_TIMEOUT to hang up.

    Other threads call the methods without an underscore, which never wait for a browser.
    """

    def __init__(self, config: Config, max_browsers: int, stream: Stream) -> None:
        self.max_browsers = max_browsers
        self.metrics = HubMetrics()
        self.stream = stream
        self.loop = Loop()
        self._thread: threading.Thread | None = None
        self._log = stream.log
        self._lock = threading.Lock()
        # Guarded by the lock.
        self._registry: dict[Browser, None] = {}  # who is here, but for those that leave
        self._arrivals: list[Browser] = []  # of these: in no group yet
        self._is_closing = False
        self._settings = describe_settings(config)  # for HELLO and ALIVE; set by the Hub's thread
        # Set by any thread when the log has grown; cleared by the Hub's before it looks there.
        self._has_new_calls = False
        # The Hub's thread's own.
        self._cursor = self._log.end  # all before it was sent to those who keep up
        self._position = self._log.position  # theirs
        self._present = BrowserIndex()  # keep up or lag
        self._lagging: dict[Browser, None] = {}  # of these
        self._ahead: dict[Browser, None] = {}  # of those: have had more than the log has
        self._ping_deadlines: DeadlineQueue[Browser] = DeadlineQueue(config.ping_interval)
        self._stall_deadlines: DeadlineQueue[Browser] = DeadlineQueue(STALL_TIMEOUT)
        self._leaving: DeadlineQueue[Browser] = DeadlineQueue(CLOSE_TIMEOUT)
        self._joined: dict[tuple[object, ...], tuple[bytes, int]] = {}  # slices, see _load_slice()
        self._is_stopping = False

    # For other threads.

    def start(self, supervisor: Supervisor) -> None:
        """Start the Hub's thread."""
        self._thread = supervisor.run("hub", self._run, self.loop)

    def deliver(self) -> None:
        """Have the new calls in the log delivered."""
        if not self._has_new_calls:
            self._has_new_calls = True
            self.loop.wake()

    def subscribe(self, browser: Browser, greeting: bytes) -> bool:
        """Take over a browser: it gets the greeting (its 101), then every call from now on.

        False when there is no room for it: then its socket is still the caller's.
        """
        with self._lock:
            if self._is_closing or len(self._registry) >= self.max_browsers:
                return False
            if browser.recovers:
                greeting += self._resume(browser)
            else:
                browser.cursor = self._log.end
            self._registry[browser] = None
            self._arrivals.append(browser)
            browser.unsent = greeting
            with contextlib.suppress(OSError):  # no room, or it is gone: the Hub's thread will see
                browser.unsent = greeting[browser.send(greeting) :]
            # Done here, it costs no change of threads: epoll may be told of a socket while another
            # thread waits for it, and the selector's table is a dict.
            self.loop.watch(browser.sock, READ, browser)
        return True

    def admit_arrivals(self) -> None:
        """Have those who have arrived admitted now, not when the Hub's thread wakes anyway.

        For a port that has nothing else to do: if it woke the Hub for each of 10,000 browsers,
        the two threads would fight for the interpreter's lock most of the time.
        """
        if self._arrivals:
            self.loop.wake()

    def reconfigure(self, config: Config, max_browsers: int) -> None:
        """Use a reloaded configuration; browsers that it does not admit are closed with 1008."""
        self.max_browsers = max_browsers
        self._log.seconds = config.history
        self.loop.call_soon(partial(self._reconfigure, config))

    def count(self) -> int:
        """Return how many browsers are connected."""
        return len(self._registry)

    def browsers(self) -> list[Browser]:
        """Return the connected browsers in order of arrival; only to look at."""
        with self._lock:
            return list(self._registry)

    def close(self) -> None:
        """Close all with 1001 and end the Hub's thread, within STOP_TIMEOUT."""
        with self._lock:
            self._is_closing = True
        self.loop.call_soon(self._close_all)
        if self._thread is not None:
            self._thread.join(STOP_TIMEOUT)

    def _resume(self, browser: Browser) -> bytes:
        """Set a returning browser's cursor; return HELLO, and ALIVE if it is up to date."""
        # In this order: a call that comes between is sent after HELLO, not skipped.
        end, position = self._log.end, self._log.position
        hello_id, is_complete, browser.cursor = position, True, end
        is_new = browser.since is None
        if is_new and browser.last:
            browser.since = BEGINNING
        if browser.since is not None:
            hello_id = browser.since
            browser.cursor, browser.since, is_complete = self.stream.resume(browser.since)
        if browser.last:
            browser.cursor = self._log.find_last(browser.last, browser.cursor, browser.wants)
        now = self.stream.clock()
        facts = f'"complete": {json.dumps(is_new or is_complete)}, {self._settings}'
        frames = serialize_position("HELLO", hello_id, now, facts)
        if browser.cursor >= end and self._is_up_to_date(browser, position):
            browser.since = None
            frames += serialize_position("ALIVE", position, now, self._settings)
        return frames

    def _alive(self, position: CallID) -> bytes:
        """Return ALIVE for a browser that has had every call up to a position."""
        return serialize_position("ALIVE", position, self.stream.clock(), self._settings)

    def _is_up_to_date(self, browser: Browser, position: CallID) -> bool:
        """Tell whether a browser whose cursor is at the log's end has had all up to a position."""
        return browser.since is None or (self._log.is_complete and browser.since <= position)

    # The Hub's thread: its turns.

    def _run(self) -> None:
        while not self._is_stopping or self._leaving:
            self._turn()

    def _turn(self) -> None:
        """Serve what is ready, and what is due."""
        ready = self.loop.wait(self._until_deadline())
        # Before all else, for one that has just arrived may be ready, too.
        self._deliver_and_admit()
        for browser, events in ready:
            self._serve(browser, events)
            # A call does not wait for all those who lag, or for 10,000 answers to a ping.
            if self._cursor != self._log.end:
                self._deliver_and_admit()
        self._ping()
        for browser in self._stall_deadlines.expired(self.loop.now):
            self._evict(browser, f"it took nothing for {STALL_TIMEOUT:.0f} s")
        for browser in self._leaving.expired(self.loop.now):
            self._abort(browser)

    def _until_deadline(self) -> float | None:
        """Return the seconds until something is due."""
        queues = (self._ping_deadlines, self._stall_deadlines, self._leaving)
        return seconds_until(min(queue.next_deadline() for queue in queues))

    def _serve(self, browser: Browser, events: int) -> None:
        """Write and read what one browser's socket is ready for."""
        try:
            if events & WRITE and not browser.is_gone:
                self._send_backlog(browser)
            if events & READ and not browser.is_gone:
                self._receive(browser)
        except Exception:
            self.metrics.drops[DropReason.BUG] += 1
            log.exception("browser dropped: %s hit a bug", browser.visitor.address)
            self._abort(browser)

    def _reconfigure(self, config: Config) -> None:
        """Close browsers that a reloaded configuration does not admit; use its settings."""
        self._deliver_and_admit()
        self._settings = describe_settings(config)
        self._ping_deadlines.change_timeout(config.ping_interval, self.loop.now)
        alive = self._alive(self._position)
        for browser in [each for each in self._present if each.recovers and self._keeps_up(each)]:
            self._send(browser, alive)  # a longer interval must not look like silence
        for browser in list(self._present):
            try:
                check_visitor(config, browser.visitor)
            except RequestError as error:
                self._log_drop(browser, DropReason.NOT_ADMITTED, f"is no longer admitted: {error}")
                self._close(browser, CloseCode.POLICY_VIOLATION, "not admitted any more")

    def _close_all(self) -> None:
        """Deliver the last calls, and close all with 1001."""
        self._deliver_and_admit()
        # Those who have just arrived lag, for calls that came meanwhile.
        for browser in list(self._lagging):
            self._serve(browser, WRITE)
        self._is_stopping = True
        for browser in list(self._present):
            self._close(browser, CloseCode.GOING_AWAY, "popup-notifier is stopping")

    # The Hub's thread: calls.

    def _deliver_and_admit(self) -> None:
        """Deliver new calls to those who keep up, then let those who have arrived join them."""
        has_grown, self._has_new_calls = self._has_new_calls, False
        with self._lock:
            arrivals, self._arrivals = self._arrivals, []
        before = self._cursor
        delivered: list[tuple[Call, int]] = []
        while True:
            slice_ = self._log.read(self._cursor)
            assert slice_ is not None, "nothing is forgotten that the Hub has not seen"
            self._cursor, self._position = slice_.end, slice_.position
            if not slice_.calls:
                break
            calls = [call for call in slice_.calls if not call.is_history]
            if calls:
                delivered += zip(calls, self._deliver(calls))
        for browser in arrivals:
            self._admit(browser)
        if self._cursor != before:
            with self._lock:  # nobody is between getting a cursor and arriving
                is_needed = self._lagging or self._arrivals
                self._log.forget(self._cursor, STALL_TIMEOUT if is_needed else 0)
        for call, count in delivered:
            count += sum(each.cursor <= call.place and each.wants(call) for each in arrivals)
            self._log_call(call, count)
        if arrivals:
            self._make_room()
            self._log_arrivals(arrivals)
        if has_grown:
            for browser in list(self._ahead):
                self._start_lagging(browser)

    def _deliver(self, calls: list[Call]) -> list[int]:
        """Send calls, those for one browser in one go; return how many browsers get each."""
        frames = b"".join([call.frame for call in calls])
        for browser in list(self._present.unfiltered):
            if browser not in self._lagging:
                self._send(browser, frames)
        shares: dict[Browser, bytes] = {}
        counts = []
        for extens, group in itertools.groupby(calls, lambda call: call.extens):
            alike = list(group)
            counts += [self._present.count(extens)] * len(alike)
            frames = b"".join([call.frame for call in alike])
            for browser in self._present.filtered(extens):
                if browser not in self._lagging:
                    shares[browser] = shares[browser] + frames if browser in shares else frames
        for browser, frames in shares.items():
            self._send(browser, frames)
        return counts

    def _send(self, browser: Browser, frames: bytes) -> None:
        """Send whole frames to a browser of which nothing is left to send."""
        sent = 0
        try:
            sent = browser.send(frames)
        except WOULD_BLOCK:
            pass
        except OSError as error:
            self._lose(browser, error)
            return
        if sent == len(frames):
            return
        browser.unsent = memoryview(frames)[sent:]
        if browser in self._leaving:
            self.loop.change(browser.sock, READ | WRITE, browser)
        else:
            browser.cursor = self._cursor
            self._start_lagging(browser)

    def _admit(self, browser: Browser) -> None:
        """Put a browser that has arrived into its group."""
        self._ping_deadlines.add(browser, self.loop.now)
        self._present.add(browser)
        if browser.cursor < self._cursor or browser.since is not None or browser.unsent:
            self._start_lagging(browser)
        elif browser.unread:
            self._start_reading(browser)

    def _keeps_up(self, browser: Browser) -> bool:
        """Tell whether a browser is here and does not lag: nothing is left to send to it."""
        return browser in self._present and browser not in self._lagging

    def _start_lagging(self, browser: Browser) -> None:
        """From now on, send a browser the log from its cursor when its socket has room."""
        self._ahead.pop(browser, None)
        self._lagging[browser] = None
        self._stall_deadlines.add(browser, self.loop.now)
        self.loop.change(browser.sock, WRITE, browser)

    def _start_keeping_up(self, browser: Browser) -> None:
        """From now on, send a browser each call as it comes, and read from it."""
        browser.since = None
        del self._lagging[browser]
        self._start_reading(browser)
        if browser.recovers and self._keeps_up(browser):
            self._send(browser, self._alive(self._position))

    def _start_reading(self, browser: Browser) -> None:
        """Read from a browser, first what came behind its handshake."""
        self._stall_deadlines.discard(browser)
        self.loop.change(browser.sock, READ, browser)
        unread, browser.unread = browser.unread, b""
        if unread:
            self._data_received(browser, unread)

    def _send_backlog(self, browser: Browser) -> None:
        """Send a browser whose socket has room some slices; then it is the others' turn."""
        if browser in self._leaving:
            if self._flush(browser):
                self.loop.change(browser.sock, READ, browser)
                self._hang_up_if_closed(browser)
            return
        for _ in range(TURN_SLICES):
            if not browser.unsent and not self._load_slice(browser):
                self._evict(browser, "it fell behind the log")
                return
            if not self._flush(browser):
                return
            if browser.cursor == self._cursor:
                break
        else:
            return
        if self._is_up_to_date(browser, self._position):
            self._start_keeping_up(browser)
        else:
            self._ahead[browser] = None
            self._start_reading(browser)

    def _flush(self, browser: Browser) -> bool:
        """Send what is unsent; tell whether all of it went."""
        if browser.unsent:
            try:
                browser.unsent = browser.unsent[browser.send(browser.unsent) :]
            except WOULD_BLOCK:
                return False
            except OSError as error:
                self._lose(browser, error)
                return False
            if browser in self._stall_deadlines:
                self._stall_deadlines.add(browser, self.loop.now)  # it takes what we send
        return not browser.unsent

    def _load_slice(self, browser: Browser) -> bool:
        """Make a browser's next slice its unsent bytes; False when the log has forgotten it."""
        if browser.since is not None and not self.stream.may_hold(browser.since):
            browser.since = BEGINNING  # its position will never come: it gets all there is
        # Those who come back together share the slice that is joined for the first of them.
        key = (browser.cursor, self._cursor, browser.extens, browser.since)
        joined = self._joined.get(key)
        if joined is None:
            slice_ = self._log.read(browser.cursor, self._cursor)
            if slice_ is None:
                return False
            frames = b"".join([call.frame for call in slice_.calls if browser.wants(call)])
            joined = frames, slice_.end
            if len(self._joined) == MAX_JOINED:
                self._joined.clear()
            self._joined[key] = joined
        frames, browser.cursor = joined
        browser.unsent = memoryview(frames)
        return True

    # The Hub's thread: what browsers send, and whether they answer pings.

    def _receive(self, browser: Browser) -> None:
        """Read what a browser sent."""
        try:
            data = browser.sock.recv(READ_SIZE)
        except WOULD_BLOCK:
            return
        except OSError as error:
            self._lose(browser, error)
            return
        if data:
            browser.unanswered = 0
            self._data_received(browser, data)
        else:
            if browser not in self._leaving:
                self._unregister(browser)
                self._log_gone(browser, "hung up without Close")
            self._remove(browser)

    def _data_received(self, browser: Browser, data: bytes) -> None:
        """Let the protocol answer; a browser's messages are checked and ignored."""
        protocol = browser.protocol
        was_closed = protocol.is_closed
        protocol.receive_data(data)
        protocol.events_received()
        is_leaving = browser in self._leaving
        if protocol.is_closed and not is_leaving:
            self._leave(browser)
        self._reply(browser, protocol.data_to_send())
        if protocol.is_closed and not was_closed:
            self._hang_up_if_closed(browser)
            if protocol.error is not None:
                self._log_drop(browser, DropReason.PROTOCOL_ERROR, f"sent {protocol.error}")
            elif not is_leaving:
                self._log_gone(browser, f"closed with {protocol.close_code}")

    def _reply(self, browser: Browser, frames: bytes) -> None:
        """Send control frames, behind what is unsent."""
        if browser.unsent:
            browser.unsent = b"".join((browser.unsent, frames))
        elif frames:
            self._send(browser, frames)

    def _ping(self) -> None:
        """Ping those whose turn it is; reset those that left MAX_UNANSWERED pings unanswered."""
        if self._ping_deadlines.next_deadline() > self.loop.now:
            return
        interval = self._ping_deadlines.timeout
        alive = self._alive(self._position)
        for browser in self._ping_deadlines.expired(self.loop.now + PING_SLACK * interval):
            if browser.unanswered == MAX_UNANSWERED:
                silence = MAX_UNANSWERED * interval
                self._log_drop(browser, DropReason.SILENT, f"was silent for {silence:.0f} s")
                self._abort(browser)
                continue
            self._ping_deadlines.add(browser, self.loop.now)
            if browser not in self._lagging:
                browser.unanswered += 1
                self._send(browser, alive + PING if browser.recovers else PING)
            elif browser in self._ahead and browser.since is not None:
                browser.unanswered += 1
                self._send(browser, self._alive(browser.since) + PING)

    # The Hub's thread: how browsers leave. _evict and _close send Close, _leave waits for the
    # answer, _hang_up_if_closed sends FIN. _lose and _abort wait for nothing. All end in _remove.

    def _log_drop(self, browser: Browser, reason: DropReason, text: str) -> None:
        """Log and count that we end a browser's connection."""
        self.metrics.drops[reason] += 1
        log.warning("browser dropped: %s %s", browser.visitor.address, text)

    def _evict(self, browser: Browser, why: str) -> None:
        """Close a browser that is too slow with 1008; it can come back."""
        self._log_drop(browser, DropReason.TOO_SLOW, f"is too slow: {why}")
        self._close(browser, CloseCode.POLICY_VIOLATION, "too slow")

    def _close(self, browser: Browser, code: CloseCode, reason: str) -> None:
        """Send Close, and let the browser leave."""
        self._leave(browser)
        browser.protocol.send_close(code, reason)
        self._reply(browser, browser.protocol.data_to_send())

    def _leave(self, browser: Browser) -> None:
        """Send a browser no more calls; it has CLOSE_TIMEOUT to hang up."""
        self._unregister(browser)
        self._leaving.add(browser, self.loop.now)
        self.loop.change(browser.sock, READ | WRITE if browser.unsent else READ, browser)

    def _hang_up_if_closed(self, browser: Browser) -> None:
        """Send FIN once Close frames went both ways, or the connection was failed.

        The socket is closed when the peer's FIN arrives: closing it before with bytes unread
        would send a reset, which can overtake our Close frame (RFC 6455 section 7.1.1).
        """
        if browser.protocol.is_closed and not browser.unsent:
            with contextlib.suppress(OSError):
                browser.sock.shutdown(socket.SHUT_WR)

    def _make_room(self) -> None:
        """Reset those who are slow to leave when there are too many with those who stay."""
        while self._leaving and len(self._present) + len(self._leaving) > self.max_browsers:
            self._abort(self._leaving.first())

    def _lose(self, browser: Browser, error: OSError) -> None:
        """Remove a browser whose connection broke."""
        if browser not in self._leaving:
            self._unregister(browser)
            self._log_gone(browser, f"connection lost, {error.strerror}")
        self._abort(browser)

    def _abort(self, browser: Browser) -> None:
        """Reset a browser's connection: the kernel drops at once what is unsent."""
        with contextlib.suppress(OSError):
            linger = struct.pack("ii", 1, 0)
            browser.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self._remove(browser)

    def _remove(self, browser: Browser) -> None:
        if not browser.is_gone:
            self._unregister(browser)
            self._leaving.discard(browser)
            self.loop.forget(browser.sock)
            browser.sock.close()

    def _unregister(self, browser: Browser) -> None:
        self._present.discard(browser)
        self._lagging.pop(browser, None)
        self._ahead.pop(browser, None)
        self._ping_deadlines.discard(browser)
        self._stall_deadlines.discard(browser)
        with self._lock:
            self._registry.pop(browser, None)

    # The Hub's thread: the log lines.

    def _count_text(self) -> str:
        return f"{len(self._present)} connected"

    def _log_call(self, call: Call, count: int) -> None:
        """Log and count who called whom, and how many browsers got it; if none did, why."""
        trigger = call.trigger
        self.metrics.observe(count, time.monotonic() - trigger.began)
        unique = trigger.parameters.get("uniqueid")
        log.info(
            "call %s: %s phone=%s exten=%s%s from %s to %d browser%s%s",
            call.id,
            trigger.parameters.get("event", "ring"),
            quote(trigger.parameters["phone"]),
            quote(trigger.parameters["exten"]),
            f" uniqueid={quote(unique)}" if unique else "",
            trigger.source,
            count,
            "" if count == 1 else "s",
            "" if count else f": {self._describe_subscribers()}",
        )

    def _describe_subscribers(self) -> str:
        """Return who is here, for the log."""
        known = list(self._present.extens())
        if not known:
            return "none is connected"
        names = ", ".join([quote_unless_plain(each) for each in known[:LOGGED_EXTENS]])
        more = len(known) - LOGGED_EXTENS
        return f"{self._count_text()}, for {names}" + (f" and {more} more" if more > 0 else "")

    def _log_arrivals(self, arrivals: list[Browser]) -> None:
        """Log who came, in one line: after a restart all come within a second."""
        named = ", ".join([str(each) for each in arrivals[:LOGGED_ARRIVALS]])
        more = len(arrivals) - LOGGED_ARRIVALS
        if more > 0:
            named += f" and {more} more"
        log.info("browser connected: %s (%s)", named, self._count_text())

    def _log_gone(self, browser: Browser, why: str) -> None:
        log.info("browser gone: %s %s (%s)", browser.visitor.address, why, self._count_text())


# --- 7. HTTP -----------------------------------------------------------------------------------
#
# RFC 9112 and a trigger's parameters as plain functions, for any thread: bytes in, and out comes a
# Request or a RequestError. Limits are in bytes, unless they say otherwise. Other servers allow
# heads of 8 to 64 KiB; a browser with many cookies sends 4, a dialplan 0.3.

MAX_HEAD = 16 * 1024
MAX_FIELDS = 64
MAX_BODY = 64 * 1024
MAX_PARAMETERS = 32
MAX_NAME = 64  # characters, of extensions too
MAX_VALUE = 2048  # characters; the longest caller ID that Asterisk keeps has 256

# Heads are read as Latin-1: every byte is a character. A PBX may put a caller's name into the
# request line as raw UTF-8.
TOKEN_CHARS = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
REQUEST_LINE = re.compile(rf"({TOKEN_CHARS}) ([!-~\x80-\xff]+) HTTP/1\.([0-9])")
FIELD_LINES = re.compile(rf"(?:{TOKEN_CHARS}:[^\x00-\x08\x0a-\x1f\x7f]*\r\n)*")
HOST = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~!$&'()*+;=%-]*)(?::[0-9]*)?")
AUTHORITY = re.compile(r"https?://[^/?#]*", re.IGNORECASE)
HEAD_END = b"\r\n\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
SURROGATES = re.compile("[\ud800-\udfff]+")  # what stands for bytes that are not UTF-8
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
    """Return the 400 for a malformed request."""
    return RequestError(HTTPStatus.BAD_REQUEST, reason)


def parse_head(head: bytes) -> Request:
    """Return the request whose head this is, without the empty line that ends it.

    Strict where two parsers could see two requests (smuggling): raises RequestError.
    """
    first, _, lines = head.decode("latin-1").partition("\r\n")
    matched = REQUEST_LINE.fullmatch(first)
    if matched is None:
        raise bad_request("the request line is not METHOD TARGET HTTP/1.1")
    method, target, minor = matched.groups()
    fields = parse_fields(lines)
    hosts = fields.get("host")
    if hosts is None and minor != "0":
        raise bad_request("there must be one Host field")
    if hosts is not None and not HOST.fullmatch(hosts):  # two are joined by a comma
        raise bad_request(f"Host: {quote(hosts)} is not one host and port (RFC 9112 section 3.2)")
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
    for piece in encoded.split(b"&") if encoded else ():
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
        text = body.decode("utf-8", "surrogateescape")
        pairs = json.loads(text, object_pairs_hook=JSONObject)
    except (ValueError, RecursionError):
        raise bad_request("the body is not JSON") from None
    if not isinstance(pairs, JSONObject):
        raise bad_request("the body is not a JSON object")
    return pairs


def parse_parameters(pairs: Iterable[tuple[str, object]]) -> dict[str, str]:
    """Return a trigger's parameters as browsers get them, without the token; or raise a 400.

    A parameter given twice is refused: a caller ID may have brought one with it.
    """
    given: dict[str, str] = {}
    for name, value in pairs:
        name = SURROGATES.sub("\ufffd", name)
        if name in given:
            raise bad_request(f"{quote(name)} is given twice")
        given[name] = check_value(name, value)
    event = given.get("event", "ring")
    if event not in EVENTS:
        raise bad_request(f"event: {quote(event)} is none of {', '.join(EVENTS)}")
    if not given.get("phone"):
        raise bad_request("phone is missing or empty; a withheld number is phone=anonymous")
    given.pop("token", None)
    return {"phone": given.pop("phone"), "exten": given.pop("exten", "") or ALL, **given}


def is_text(value: object) -> bool:
    """Tell whether a value can be a parameter's: text, or a number in JSON."""
    return isinstance(value, (str, int)) and not isinstance(value, bool)


def check_value(name: str, value: object) -> str:
    """Return the text of one parameter; raises RequestError (400)."""
    if not is_text(value):
        raise bad_request(f"{quote(name)} is not a text")
    given = str(value)
    if len(name) > MAX_NAME:
        raise bad_request(f"the name {quote(name)} has over {MAX_NAME} characters")
    if len(given) > MAX_VALUE:
        raise bad_request(f"{quote(name)} has over {MAX_VALUE} characters")
    text = SURROGATES.sub("\ufffd", given)
    # Asterisk 16 cuts names in the middle of a character, and a refused call is a lost one.
    if text != given and name in ("phone", "exten", "token"):
        raise bad_request(f"{quote(name)} is not UTF-8")
    return text


# --- 8. Server ---------------------------------------------------------------------------------
#
# A thread for each port accepts connections, gathers their requests and answers them. It never
# waits: whoever is slow stands in a queue of bounded size until a deadline. Times are in seconds.
#
# A Connection is the port's thread's. What may wait is answered by a request thread, which hands
# the answer back. A trigger's is answered by whoever puts the call into the log, with Redis often
# another thread; a browser's is the Hub's from Hub.subscribe() on.

MAX_EXTENS = 100  # that one browser may ask for
REQUEST_TIMEOUT = 10.0  # from the first byte of a request to its last
DRAIN_TIMEOUT = 1.0  # a refused peer has this long to take our answer and hang up
# socketserver asks for a queue of 5 connections: a restart with 10,000 browsers would lose most
# of their handshakes. The kernel cuts this down to net.core.somaxconn.
LISTEN_QUEUE = 4096
MAX_THREADS = 32  # requests that are answered in threads at a time
ACCEPT_BATCH = 64  # connections accepted before those that wait are looked at again
ACCEPT_PAUSE = 0.1  # no accepting for this long when descriptors have run out
QUEUE_SIZES = (512, 512, 64, 256)  # connections that wait for more bytes, see Queues

SWITCHING_PROTOCOLS = (
    "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
)
SUBPROTOCOL = "popup-notifier"  # that a page offers beside its token
SCRIPT_NAME = "popup-sample.js"
SCRIPT_FOLDERS = (Path(__file__).resolve().parent, Path("/usr/local/share/popup-notifier"))
INTERNAL_ERROR = serialize_response(
    HTTPStatus.INTERNAL_SERVER_ERROR, "Internal Server Error: popup-notifier's log says more\n"
)


class Connection:
    """A peer whose request arrives, or whose answer leaves. Belongs to its port's thread."""

    def __init__(self, sock: socket.socket, address: IPAddress, is_tls: bool) -> None:
        self.sock = sock  # non-blocking
        self.address = address  # of the peer, until a trusted proxy says who is behind it
        self.awaits_client_hello = is_tls  # whose first byte shows that it speaks TLS
        self.is_shaking_hands = False
        self.received = bytearray()
        self.request: Request | None = None  # known once its head is here
        self.route: Route | None = None  # known once its address may ask for it
        self.head_size = 0  # bytes, with the empty line
        self.awaits_continue = False  # its body comes when we ask for it
        self.answer = b""  # what is left to send
        self.queue: DeadlineQueue[Connection] | None = None  # where it waits

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

    @property
    def is_closed(self) -> bool:
        """Tell whether we have closed it, perhaps since the loop found it ready."""
        return self.sock.fileno() < 0

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
            expected = self.request.fields.get("expect", "")
            self.awaits_continue = expected.lower() == "100-continue"


class Queues(NamedTuple):
    """Where connections wait for the rest of their request, by what their address may do.

    Each kind can fill only its own queue. A full one ends the connection that has waited longest:
    whoever is quick is never that one.
    """

    trigger: DeadlineQueue[Connection]  # in TRIGGER_ALLOW
    browser: DeadlineQueue[Connection]  # in CRMWS_ALLOW
    unlisted: DeadlineQueue[Connection]  # in neither
    draining: DeadlineQueue[Connection]  # refused ones that may still be sending


class Server(http.server.ThreadingHTTPServer):
    """Accepts connections, gathers their requests and has them answered, in one thread.

    Of ThreadingHTTPServer it uses the listening socket and the request threads, with their hooks
    (process_request, finish_request, handle_error, shutdown_request). serve_forever and shutdown
    are its own. A request is answered as soon as it is whole; a peer that is slow waits in a queue
    of bounded size until a deadline; an answer that may have to wait gets a thread.
    """

    daemon_threads = True
    block_on_close = False  # else ThreadingMixIn remembers every thread for ever
    request_queue_size = LISTEN_QUEUE

    def __init__(
        self,
        config: Config,
        port: int,
        hub: Hub,
        supervisor: Supervisor,
        queues: Queues,
        refusals: RefusalLog,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.config = config
        self.hub = hub
        self.supervisor = supervisor
        self.refusals = refusals
        self.tls = tls  # None: this port speaks plain HTTP
        self.asterisk: Asterisk | None = None  # for /healthz and /metrics
        self.loop = Loop()
        is_for_browsers = port == config.client_port
        self._routes = {
            path: route
            for path, route in ROUTES.items()
            if route.access_list == "crmws_allow" or not is_for_browsers
        }
        self._queues = queues
        self._is_stopping = False
        self._accept_again = math.inf  # when a pause of accepting ends; math.inf: there is none
        self._next_complaint = 0.0  # of descriptors that ran out; monotonic seconds
        self._has_warned_of_proxy = False
        self._free_threads = threading.BoundedSemaphore(MAX_THREADS)
        host = "::" if config.listen is None and socket.has_dualstack_ipv6() else "0.0.0.0"
        if config.listen is not None:
            host = str(config.listen)
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        # Our own RequestHandler is called where the parent would call this one.
        super().__init__((host, port), socketserver.BaseRequestHandler)
        self.socket.setblocking(False)
        # Accepted sockets inherit it: a frame must not wait for the last one's acknowledgement.
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        self.loop.watch(self.socket, READ, self)

    def server_bind(self) -> None:
        """Bind without HTTPServer's look-up of the host's name: name servers can be away."""
        if self.address_family == socket.AF_INET6:
            is_one = self.config.listen is not None
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, is_one)
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def has_route(self, path: str) -> bool:
        """Tell whether a path is served at this port."""
        return path in self._routes

    def serve_forever(self, poll_interval: float = 0) -> None:
        """Accept and answer until shutdown(). poll_interval is the parent's: nothing is polled."""
        if threading.current_thread() is threading.main_thread():
            self.loop.wake_on_signals()
        while not self._is_stopping:
            ready = self.loop.wait(0)
            if not ready and not self._is_stopping:
                self.hub.admit_arrivals()
                ready = self.loop.wait(self._until_deadline())
            for owner, events in ready:
                if owner is self:
                    self._accept()
                elif not owner.is_closed:
                    (self._write if events & WRITE else self._read)(owner)
            self._expire()

    def shutdown(self) -> None:
        """Let serve_forever return, without waiting for it. Any thread, and signal handlers."""
        self._is_stopping = True
        self.loop.wake()

    def _until_deadline(self) -> float | None:
        """Return the seconds until something is due."""
        due = [queue.next_deadline() for queue in self._queues]
        return seconds_until(min(*due, self._accept_again, self.refusals.deadline))

    def _expire(self) -> None:
        """Do what is due: time out slow peers, accept again after a pause, report refusals."""
        now = time.monotonic()
        self.refusals.report(now)
        for queue in self._queues:
            while queue.next_deadline() <= now:
                self._time_out(queue.first())
        if self._accept_again <= now:
            self._accept_again = math.inf
            self.loop.watch(self.socket, READ, self)

    def _time_out(self, connection: Connection) -> None:
        """Answer 408 to a peer that was too slow; one that sent nothing was only a probe."""
        is_answered = connection.queue is self._queues.draining or connection.answer
        if is_answered or not connection.received:
            self._hang_up(connection)
        else:
            reason = f"the request did not arrive within {REQUEST_TIMEOUT:.0f} s"
            self._refuse(connection, RequestError(HTTPStatus.REQUEST_TIMEOUT, reason))

    def _accept(self) -> None:
        """Accept the connections that wait, and read what they have sent."""
        for _ in range(ACCEPT_BATCH):
            try:
                sock, peer = self.socket.accept()
            except WOULD_BLOCK:
                return
            except ConnectionError:
                continue  # it left before it was accepted
            except OSError as error:
                self._pause_accepting(error)
                return
            sock.setblocking(False)
            self._read(Connection(sock, peer_address(peer[0]), self.tls is not None))

    def _pause_accepting(self, error: OSError) -> None:
        """Accept nobody for a moment: a listener that stays ready would keep us spinning."""
        now = time.monotonic()
        if now >= self._next_complaint:
            log.error("cannot accept connections: %s", error.strerror)
            self._next_complaint = now + REPORT_PERIOD
        self.loop.forget(self.socket)
        self._accept_again = now + ACCEPT_PAUSE

    def _read(self, connection: Connection) -> None:
        """Read what is there; answer a whole request, wait for the rest of another."""
        try:
            if connection.awaits_client_hello:
                begin_tls(connection, self.tls)
            if connection.is_shaking_hands:
                shake_hands(connection)
            data = connection.sock.recv(READ_SIZE)
        except WOULD_BLOCK:
            self._wait(connection)
            return
        except RequestError as error:
            self._refuse(connection, error)
            return
        except ssl.SSLError as error:
            self.refusals.add(connection.address, tls_refusal(error))
            data = b""
        except OSError:
            data = b""
        if not data:
            self._hang_up(connection)  # without a whole request: a probe, or it gave up
        elif connection.queue is not self._queues.draining:
            try:
                connection.feed(data)
                self._advance(connection)
            except RequestError as error:
                self._refuse(connection, error)
            except Exception:
                log.exception("a request from %s hit a bug", connection.address)
                self._reply(connection, INTERNAL_ERROR)

    def _advance(self, connection: Connection) -> None:
        """Answer a request that is whole; refuse early what will be refused anyway."""
        request = connection.request
        if request is not None:
            if connection.route is None:
                if "x-forwarded-for" in request.fields:
                    self._apply_forwarded_for(connection, request.fields["x-forwarded-for"])
                connection.route = self._find_route(request, connection.address)
            if connection.is_complete:
                self._leave_queue(connection)
                self._answer(connection)
                return
            if connection.awaits_continue:
                connection.awaits_continue = False
                with contextlib.suppress(OSError):
                    connection.sock.send(CONTINUE)
        self._wait(connection)

    def _wait(self, connection: Connection, events: int = READ) -> None:
        """Let a connection wait for more bytes, or for room, in the queue for its kind."""
        if connection.queue is None:
            address = connection.address
            if self.config.trigger_allow.allows(address):
                queue = self._queues.trigger
            elif self.config.crmws_allow.allows(address):
                queue = self._queues.browser
            else:
                queue = self._queues.unlisted
            self._enter_queue(connection, queue, events)

    def _enter_queue(
        self, connection: Connection, queue: DeadlineQueue[Connection], events: int = READ
    ) -> None:
        if len(queue) >= queue.size:
            self._hang_up(queue.first())
        connection.queue = queue
        queue.add(connection, time.monotonic())
        self.loop.watch(connection.sock, events, connection)

    def _leave_queue(self, connection: Connection) -> None:
        if connection.queue is not None:
            self.loop.forget(connection.sock)
            connection.queue.discard(connection)
            connection.queue = None

    def _apply_forwarded_for(self, connection: Connection, forwarded: str) -> None:
        """Set the address of the client behind a trusted proxy; warn once of an untrusted one."""
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
        if request.method not in route.methods:
            allowed = ", ".join(route.methods)
            reason = f"{request.path} takes {allowed} only"
            raise RequestError(HTTPStatus.METHOD_NOT_ALLOWED, reason, Allow=allowed)
        check_address(self.config, route.access_list, address)
        return route

    def _answer(self, connection: Connection) -> None:
        """Answer a whole request, here or, if that may take a while, by a request thread."""
        assert connection.route is not None
        if not connection.route.is_slow:
            response = RequestHandler(connection, self).respond()
            if response is not None:
                self._reply(connection, response)
            return
        busy = RequestError(HTTPStatus.SERVICE_UNAVAILABLE, "busy", Retry_After="1")
        if not self._free_threads.acquire(blocking=False):
            raise busy
        try:
            self.process_request(connection.sock, connection)
        except RuntimeError:  # no thread can be started
            self._free_threads.release()
            raise busy from None

    # What ThreadingMixIn's request threads call; `client_address` is the Connection.

    def finish_request(self, request: object, client_address: Any) -> None:
        """Work out the answer to a whole request, and have it sent."""
        connection: Connection = client_address
        try:
            response = RequestHandler(connection, self).respond()
        except RequestError as error:
            self.loop.call_soon(partial(self._refuse, connection, error))
        else:
            self.loop.call_soon(partial(self._reply, connection, response or b""))

    def handle_error(self, request: object, client_address: Any) -> None:
        """Log a bug, and answer 500."""
        connection: Connection = client_address
        log.exception("a request from %s hit a bug", connection.address)
        self.loop.call_soon(partial(self._reply, connection, INTERNAL_ERROR))

    def shutdown_request(self, request: object) -> None:
        """Free the slot of a thread that ends; the connection is not closed here."""
        self._free_threads.release()

    # Answers.

    def _refuse(self, connection: Connection, error: RequestError) -> None:
        """Answer with an error; a peer that is still sending gets time to read it."""
        self.refusals.add(connection.address, error)
        path = connection.request.path if connection.request is not None else None
        if path == "/crmws" or error.status is HTTPStatus.NOT_FOUND:
            # A page can't see why its handshake was refused, but may ask for the same by fetch().
            error.fields["Access-Control-Allow-Origin"] = "*"
        self._reply(connection, serialize_refusal(error))

    def _reply(self, connection: Connection, response: bytes) -> None:
        """Send an answer, which is the last thing that a connection gets."""
        request = connection.request
        if request is not None and request.method == "HEAD":
            response = response[: response.index(HEAD_END) + len(HEAD_END)]
        connection.answer = response
        self._leave_queue(connection)
        self._write(connection)

    def _write(self, connection: Connection) -> None:
        """Send what a peer takes of its answer; hang up when that was all."""
        try:
            connection.answer = connection.answer[connection.sock.send(connection.answer) :]
        except WOULD_BLOCK:
            pass
        except OSError:
            connection.answer = b""
        if connection.answer:
            self._wait(connection, WRITE)
        elif connection.is_complete:
            self._hang_up(connection)
        else:
            # Closing with bytes unread would reset the connection, and the answer be lost.
            with contextlib.suppress(OSError):
                connection.sock.shutdown(socket.SHUT_WR)
            self._leave_queue(connection)
            self._enter_queue(connection, self._queues.draining)

    def answer_trigger(self, connection: Connection) -> None:
        """Answer a trigger. Any thread: nothing else knows its connection any more."""
        with contextlib.suppress(OSError):
            connection.sock.send(serialize_response(HTTPStatus.OK, "OK"))
        connection.sock.close()

    def _hang_up(self, connection: Connection) -> None:
        self._leave_queue(connection)
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
        if len(pairs) > MAX_PARAMETERS:
            raise bad_request(f"more than {MAX_PARAMETERS} parameters")
        answer = partial(self.server.answer_trigger, self.connection)
        source = str(self.connection.address)
        self.server.hub.stream.publish(parse_parameters(pairs), source, answer)

    def check_site(self) -> None:
        """Refuse a trigger that a foreign page had a browser send (CSRF), whatever its address."""
        fields = self.request.fields
        site, origin = fields.get("sec-fetch-site", "none"), fields.get("origin")
        own = [
            normalize_origin(f"{scheme}://{fields.get('host')}") for scheme in ("http", "https")
        ]
        if site not in ("none", "same-origin") or (origin and normalize_origin(origin) not in own):
            source = quote(origin or site)
            raise RequestError(HTTPStatus.FORBIDDEN, f"a page of {source} may not trigger")

    def check_token(self, pairs: Iterable[tuple[str, object]]) -> None:
        """Refuse a trigger without the right token, in constant time."""
        given = [str(value) for name, value in pairs if name == "token" and is_text(value)]
        scheme, _, bearer = self.request.fields.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            given.append(bearer.strip())
        if not matches_token(self.server.config.secret_token, given):
            reason = "token is not SECRET_TOKEN" if given else "token is missing"
            raise RequestError(HTTPStatus.UNAUTHORIZED, reason, WWW_Authenticate="Bearer")

    def handle_upgrade(self) -> None:
        """Hand a browser over to the Hub: GET /crmws."""
        connection, hub = self.connection, self.server.hub
        fields = self.request.fields
        offered = [each.strip() for each in fields.get("sec-websocket-protocol", "").split(",")]
        offered = [each for each in offered if each]
        # First what a page may learn by a plain GET, when its handshake was refused. It may give
        # its token as a subprotocol.
        pairs = parse_form(self.request.query)
        given = [str(value) for name, value in pairs if name == "token"]
        visitor = Visitor(connection.address, fields.get("origin"), (*given, *offered))
        check_visitor(self.server.config, visitor)
        subscription = parse_subscription(pairs)
        if hub.count() >= hub.max_browsers:
            raise too_many_browsers(hub)
        if self.request.minor == 0:
            raise upgrade_required("WebSocket needs HTTP/1.1, also from a proxy on the way")
        accept = check_handshake(fields)
        if self.request.content_length:
            raise bad_request("a handshake has no body")
        greeting = f"{SWITCHING_PROTOCOLS}Sec-WebSocket-Accept: {accept}\r\n"
        if offered:
            # A browser gives up unless one of those that it offered is chosen.
            chosen = SUBPROTOCOL if SUBPROTOCOL in offered else offered[0]
            greeting += f"Sec-WebSocket-Protocol: {chosen}\r\n"
        browser = Browser(connection.sock, visitor, subscription, connection.rest)
        if not hub.subscribe(browser, f"{greeting}\r\n".encode("latin-1")):
            raise too_many_browsers(hub)

    def handle_health(self) -> bytes:
        """Say whether every Loop turns, and how Redis and Asterisk are: GET /healthz."""
        hub, stalled = self.server.hub, self.server.supervisor.stalled(HEALTH_TIMEOUT)
        if stalled:
            reason = f"no sign of life from the thread {' and '.join(stalled)}"
            raise RequestError(HTTPStatus.SERVICE_UNAVAILABLE, reason)
        text = f"OK\n{hub.count()} browsers\n"
        redis = hub.stream.status()
        if redis is not None:
            text += f"Redis {redis.state.value}: {redis.reason}\n"
        if self.server.asterisk is not None:
            text += f"{self.server.asterisk.status()}\n"
        return serialize_response(HTTPStatus.OK, text)

    def handle_metrics(self) -> bytes:
        """Count what happened, for Prometheus: GET /metrics."""
        server = self.server
        lines = metrics_lines(server.hub, server.refusals, server.asterisk)
        text = "\n".join(lines) + "\n"
        fields = {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        return serialize_response(HTTPStatus.OK, text, fields)

    def handle_status(self) -> bytes:
        """Return the daemon's state for the admin's part of the desk: GET /status."""
        server = self.server
        status = describe_status(server.hub, server.refusals, server.asterisk)
        return serialize_response(HTTPStatus.OK, json.dumps(status), {"Content-Type": JSON})

    def handle_desk(self) -> bytes:
        """Serve the desk, with the admin's part for addresses in TRIGGER_ALLOW: GET /."""
        is_admin = self.server.config.trigger_allow.allows(self.connection.address)
        page = desk_page(is_admin and self.server.has_route("/status"))
        fields = {"Content-Security-Policy": page_policy(page)}
        return self.serve(page.encode(), "text/html; charset=utf-8", fields)

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
        """Return a resource, or 304 if the browser has it (RFC 9110 section 13.1.2)."""
        tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
        fields = {"Content-Type": kind, "Cache-Control": "no-cache", "ETag": tag, **fields}
        if tag in [
            each.strip() for each in self.request.fields.get("if-none-match", "").split(",")
        ]:
            return serialize_response(HTTPStatus.NOT_MODIFIED, b"", fields)
        return serialize_response(HTTPStatus.OK, content, fields)


def too_many_browsers(hub: Hub) -> RequestError:
    """Return the 503 for a browser over the limit."""
    reason = f"{hub.max_browsers} browsers are connected, no more may be"
    return RequestError(HTTPStatus.SERVICE_UNAVAILABLE, reason, Retry_After="30")


def parse_subscription(pairs: Iterable[tuple[str, object]]) -> Subscription:
    """Return what the query of a handshake asks for: exten, since, last."""
    extens: set[str] = set()
    recovers, since, last = False, None, 0
    for name, value in pairs:
        text = str(value)
        if name == "exten":
            extens |= split_extens(text)
        elif name == "since":
            recovers = True
            try:
                since = parse_id(text) if text else None
            except ValueError as error:
                raise bad_request(f"since: {error}") from None
        elif name == "last":
            if not re.fullmatch(r"[1-9][0-9]{0,5}", text):
                raise bad_request(f"last: {quote(text)} is no number of calls")
            last = int(text)
    if len(extens) > MAX_EXTENS or any(len(each) > MAX_NAME for each in extens):
        raise bad_request(f"more than {MAX_EXTENS} extensions, or of over {MAX_NAME} characters")
    wanted = frozenset(map(sys.intern, extens)) if extens else NO_EXTENS
    return Subscription(wanted, recovers, since, last if recovers else 0)


class Route(NamedTuple):
    """Which methods a path takes, who may ask for it, and what answers."""

    methods: tuple[str, ...]
    access_list: str  # the field of Config
    handle: Callable[[RequestHandler], bytes | None]
    is_slow: bool = False  # it may wait, so a request thread answers


SAFE_METHODS = ("GET", "HEAD")
ROUTES = {
    "/api/trigger": Route(("POST",), "trigger_allow", RequestHandler.handle_trigger),
    "/crmws": Route(("GET",), "crmws_allow", RequestHandler.handle_upgrade),
    "/healthz": Route(SAFE_METHODS, "trigger_allow", RequestHandler.handle_health, is_slow=True),
    "/metrics": Route(SAFE_METHODS, "trigger_allow", RequestHandler.handle_metrics),
    "/status": Route(SAFE_METHODS, "trigger_allow", RequestHandler.handle_status),
    "/": Route(SAFE_METHODS, "crmws_allow", RequestHandler.handle_desk),
    f"/{SCRIPT_NAME}": Route(
        SAFE_METHODS, "crmws_allow", RequestHandler.handle_script, is_slow=True
    ),
}


# --- 9. TLS ------------------------------------------------------------------------------------
#
# CLIENT_PORT's thread goes on with a handshake as bytes come: it never waits. The main thread
# loads certificates, at start and at a reload.


def make_tls_context(cert_file: Path, key_file: Path) -> ssl.SSLContext:
    """Return the TLS context of CLIENT_PORT; raises ConfigError saying what is wrong."""
    for name, path in (("CERT_FILE", cert_file), ("KEY_FILE", key_file)):
        try:
            path.read_bytes()
        except OSError as error:
            raise ConfigError(f"{name}: cannot read {path}: {error.strerror}") from None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION  # else a send may have to wait for a read
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


TLS_HANDSHAKE = b"\x16"  # the first byte of a TLS connection (RFC 8446 section 5.1)


def begin_tls(connection: Connection, context: ssl.SSLContext | None) -> None:
    """Begin a TLS handshake; raises RequestError for plain HTTP, or one of WOULD_BLOCK."""
    first = connection.sock.recv(1, socket.MSG_PEEK)
    if not first:
        raise ConnectionAbortedError
    connection.awaits_client_hello = False
    if first != TLS_HANDSHAKE or context is None:
        raise bad_request(
            "plain http on the https port: the address begins with https:// or wss://"
        )
    connection.sock = context.wrap_socket(
        connection.sock, server_side=True, do_handshake_on_connect=False
    )
    connection.is_shaking_hands = True


def shake_hands(connection: Connection) -> None:
    """Go on with a TLS handshake; raises one of WOULD_BLOCK until it is done, or SSLError."""
    assert isinstance(connection.sock, ssl.SSLSocket)
    connection.sock.do_handshake()
    connection.is_shaking_hands = False


def tls_refusal(error: ssl.SSLError) -> RequestError:
    """Return what the log says of a failed TLS handshake; no answer can be sent."""
    reasons = {
        "TLSV1_ALERT_UNKNOWN_CA": "does not trust our certificate",
        "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "does not trust our certificate",
        "SSLV3_ALERT_BAD_CERTIFICATE": "does not trust our certificate",
        "SSLV3_ALERT_CERTIFICATE_EXPIRED": "finds our certificate expired",
    }
    reason = error.reason or "connection lost"
    return RequestError(HTTPStatus.BAD_REQUEST, f"TLS: {reasons.get(reason, reason)}")


# --- 10. Redis ---------------------------------------------------------------------------------
#
# With REDIS_URL several daemons ("nodes") act as one: each call goes into a Redis stream, and each
# node puts into its log what it reads from there, its own calls too. An ID is that of an entry.
#
# 1. A call gets a key at its trigger. Its entry in the stream carries it, and its message does.
# 2. A node delivers what it reads, in the stream's order and under the stream's ID. An entry whose
#    key it has read before is skipped.
# 3. No call waits for Redis. One that has not come back within REDIS_PATIENCE, or any while Redis
#    is away, is delivered early: at once, by its own node alone. It has the ID of the last call
#    read, so no browser's position moves. Once it is read it goes into the history.
# 4. Calls that do not come back are written again, until they are as old as the history. Then they
#    are lost to the other nodes, and counted.
# 5. No browser misses a call: its position says what its node had read, and it has had that node's
#    early calls. Around an outage some come twice: it drops a key that it has had.
# 6. An entry says when its call was triggered, by Redis's clock. Clocks of nodes are not compared.
#
# Lost to the other nodes, too, are the calls of a node that dies before Redis is back. If Redis
# itself forgot entries (no appendonly), its stream is moved on to where we were, so IDs never go
# back. A node that finds the stream empty begins it with an entry that is not a call: it says how
# far back the history goes.
#
# Two threads, each with a link to Redis of its own, wait for it: one reads, one writes. What they
# share is guarded by RedisStream's lock, and any thread may call its public methods.

REDIS_PATIENCE = 0.1  # seconds that a call may take through Redis before it is delivered here
REDIS_TIMEOUT = 5.0  # seconds for an answer
REDIS_BLOCK = 2.0  # seconds without a call after which both links show a sign of life
REDIS_DELAYS = (0.1, 5.0)  # seconds between two attempts to connect: the first, the longest
REDIS_WAITING = 256  # triggers that may wait at a time
REDIS_BATCH = 100  # calls written or read at a time
REDIS_START = 1.0  # seconds that the start waits for the history, and the end for the last calls
STREAM_LENGTH = 100_000  # entries kept: five times MAX_HISTORY, some 20 MB
REDIS_AHEAD = 10.0  # seconds that a position may be ahead of what this node has read
REDIS_KEEP = 1.0  # seconds that calls are kept for other nodes, if HISTORY is less
MAX_TIME = 10**14  # milliseconds since 1970: the year 5138
MAX_BULK = 1 << 20  # bytes of a string that Redis sends; a call has 200 KiB at most
MAX_ELEMENTS = 1 << 16  # of a list; a batch has hundreds
MAX_DEPTH = 8  # of lists in lists; XREAD's reply has 5
MAX_LINE = 16 * 1024  # bytes; it is an error's text at most

MARKER = ("resumed", 1)  # the fields of an entry that is not a call
CALL_KEY = re.compile(r"[!-~]{1,64}")


def read_reply(stream: BinaryIO, depth: int = 0) -> Any:
    """Read one reply in Redis's protocol, version 2.

    It is bytes, str (a status), int, None, a list of replies, or a RedisError. What Redis would
    never send raises ReplyError, the end of the stream ConnectionError.
    """
    line = stream.readline(MAX_LINE)
    kind, text = line[:1], line[1:-2]
    if not line.endswith(b"\r\n"):
        raise ReplyError("a line that does not end") if line else ConnectionError("it hung up")
    if kind in (b"+", b"-"):
        message = text.decode("utf-8", "replace")
        return message if kind == b"+" else RedisError(message)
    if kind not in (b":", b"$", b"*") or not re.fullmatch(rb"-?[0-9]{1,19}", text):
        raise ReplyError(f"{quote(line.decode('latin-1'))} is not Redis's protocol")
    number = int(text)
    if kind == b":":
        return number
    if number < 0:
        return None
    if number > (MAX_BULK if kind == b"$" else MAX_ELEMENTS) or depth == MAX_DEPTH:
        raise ReplyError(
            f"a reply of {number} bytes or parts, or nested too deep: that is no call"
        )
    if kind == b"*":
        return [read_reply(stream, depth + 1) for _ in range(number)]
    data = stream.read(number + 2)
    if len(data) < number + 2:
        raise ConnectionError("it hung up")
    return data[:-2]


def serialize_command(*words: object) -> bytes:
    """Return a command for Redis."""
    encoded = [str(each).encode() for each in words]
    parts = [b"$%d\r\n%b\r\n" % (len(each), each) for each in encoded]
    return b"*%d\r\n" % len(parts) + b"".join(parts)


class RedisLink:
    """A connection to Redis for one thread, which it blocks; raises OSError, RedisError."""

    def __init__(self, url: RedisURL) -> None:
        with contextlib.ExitStack() as stack:
            self._sock = connect(url)
            self._replies = self._sock.makefile("rb")
            stack.callback(self.close)
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
            stack.pop_all()

    def close(self) -> None:
        """Hang up."""
        self._replies.close()
        self._sock.close()

    def send(self, *commands: tuple[object, ...]) -> None:
        """Send commands; receive() gives their replies."""
        self._sock.settimeout(REDIS_TIMEOUT)
        self._sock.sendall(b"".join([serialize_command(*each) for each in commands]))

    def answers_within(self, seconds: float) -> bool:
        """Wait for the first reply to what was sent; tell whether it came within `seconds`."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def receive(self, count: int, patience: float = 0.0) -> list[Any]:
        """Return `count` replies, or raise the first error among them.

        Waits for each part of them REDIS_TIMEOUT seconds longer than `patience`.
        """
        self._sock.settimeout(patience + REDIS_TIMEOUT)
        replies = [read_reply(self._replies) for _ in range(count)]
        for reply in replies:
            if isinstance(reply, RedisError):
                raise reply
        return replies

    def ask(self, *commands: tuple[object, ...], patience: float = 0.0) -> list[Any]:
        """Send commands and return their replies."""
        self.send(*commands)
        return self.receive(len(commands), patience)


def connect(url: RedisURL) -> socket.socket:
    """Return a socket that is connected to Redis; raises OSError."""
    if isinstance(url.address, str):
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(REDIS_TIMEOUT)
        with contextlib.ExitStack() as stack:
            stack.callback(sock.close)
            sock.connect(url.address)
            stack.pop_all()
        return sock
    sock = socket.create_connection(url.address, REDIS_TIMEOUT)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
    if url.is_tls:
        return ssl.create_default_context().wrap_socket(sock, server_hostname=url.address[0])
    return sock


@contextlib.contextmanager
def expecting(what: str) -> Iterator[None]:
    """Raise ReplyError for the errors of reading a reply that has not the right form."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ReplyError(f"{what} in another form than Redis's: {error}") from None


def parse_time(reply: Any) -> int:
    """Return the milliseconds since 1970 that TIME says."""
    with expecting("TIME"):
        return int(reply[0]) * 1000 + int(reply[1]) // 1000


def parse_bounds(newest: Any, oldest: Any) -> tuple[CallID, CallID] | None:
    """Return the first and the last ID of a stream, None when it is empty."""
    if not newest or not oldest:
        return None
    with expecting("a stream"):
        return parse_id(oldest[0][1][0][0].decode()), parse_id(newest[0][0].decode())


class Entry(NamedTuple):
    """A call in the stream."""

    position: CallID
    key: str
    time: int  # of its trigger: Redis's milliseconds
    source: str
    parameters: dict[str, str]


def parse_entry(position: CallID, words: list[bytes]) -> Entry:
    """Return an entry of the stream; raises ValueError when it is not a call of ours."""
    named = dict(zip(words[::2], words[1::2]))
    try:
        key, source = (named[name].decode("ascii") for name in (b"key", b"source"))
        milliseconds = int(named[b"time"])
        parameters = parse_parameters(json.loads(named[b"parameters"]).items())
    except (KeyError, AttributeError, RecursionError, RequestError) as error:
        raise ValueError(str(error)) from None
    if not CALL_KEY.fullmatch(key) or not source.isprintable():
        raise ValueError("key or source is none of ours")
    if not 0 <= milliseconds < MAX_TIME:
        raise ValueError("time is none of ours")
    return Entry(position, key, milliseconds, source, parameters)


def parse_stream(reply: Any) -> tuple[CallID, list[Entry]]:
    """Return the last ID and our entries in the reply to XREAD for one stream."""
    entries, strange = [], []
    with expecting("a stream"):
        ((_, items),) = reply
        position = parse_id(items[-1][0].decode())
        for name, words in items:
            try:
                entries.append(parse_entry(parse_id(name.decode()), words))
            except ValueError as error:
                if words[:1] != [MARKER[0].encode()]:
                    strange.append(f"{name.decode()}: {error}")
    if strange:
        log.warning("%d stream entries are not calls, the first is %s", len(strange), strange[0])
    return position, entries


class RedisState(enum.Enum):
    """How Redis is."""

    UP = "up"
    SLOW = "slow"  # calls are delivered early until one comes back in time
    AWAY = "away"  # not connected, or refused: calls are delivered early


class RedisStatus(NamedTuple):
    """How Redis is, for /healthz and /metrics."""

    state: RedisState
    reason: str
    waiting: int  # calls of this node that have not come back through the stream
    lost: int  # calls of this node that other nodes never get


class Pending:
    """A call of this node that has not come back through the stream yet."""

    __slots__ = (
        "answer",
        "began",
        "extens",
        "key",
        "parameters",
        "place",
        "size",
        "source",
        "written",
    )

    def __init__(
        self, key: str, parameters: Mapping[str, str], source: str, answer: Callable[[], None]
    ) -> None:
        self.key = key
        self.parameters = parameters
        self.source = source
        self.answer = answer
        self.began = time.monotonic()
        self.size = sum(len(name) + len(value) for name, value in parameters.items())
        self.place = 0  # in the log, once it is delivered early
        self.extens: frozenset[str] | None = None  # that got it then; None: not delivered
        self.written = -math.inf  # when it was last written into the stream


class RedisStream:
    """The calls of all nodes, with LocalStream's methods. Whoever publishes never waits."""

    def __init__(self, url: RedisURL, seconds: float) -> None:
        self.log = Log(seconds, BEGINNING)
        self.log.is_complete = False  # until the stream was read
        self._url = url
        self._start = time.monotonic()
        self._has_tried = threading.Event()  # the history was read, or can't be
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)  # _pending has
        # Guarded by the lock.
        self._state, self._reason = RedisState.AWAY, f"connecting to {url}"
        self._broken_links = {"read", "write"}  # links
        self._is_synchronized = False  # it is known where the history begins
        # Milliseconds from our monotonic clock to Redis's; at first, to our own clock.
        self._offset = int((time.time() - self._start) * 1000)
        self._live_after = BEGINNING  # calls up to here go into the history, later ones are live
        self._pushed_to = BEGINNING  # the stream, when it had lost calls
        self._node, self._number = os.urandom(4).hex(), 0  # make the last key
        self._pending: collections.OrderedDict[str, Pending] = collections.OrderedDict()
        self._pending_size = 0  # characters of what was sent to us
        self._undelivered: collections.deque[Pending] = (
            collections.deque()
        )  # of these: not early yet
        self._keys: collections.OrderedDict[str, None] = collections.OrderedDict()  # read
        self._lost = self._reported = 0  # calls that waited for too long

    # For other threads.

    def start(self, supervisor: Supervisor, deliver: Callable[[], None]) -> None:
        """Begin, and wait REDIS_START at most for the history: browsers come back at once."""
        self._deliver = deliver
        supervisor.run("redis-read", partial(self._keep_connected, self._read))
        supervisor.run("redis-write", partial(self._keep_connected, self._write))
        self._has_tried.wait(REDIS_START)

    def clock(self) -> int:
        """Return the time that calls are triggered by: Redis's, in milliseconds since 1970."""
        return self._offset + int(time.monotonic() * 1000)

    def publish(
        self, parameters: Mapping[str, str], source: str, answer: Callable[[], None]
    ) -> None:
        """Send a call through Redis, if it is up; call `answer` when it is in the log."""
        with self._lock:
            self._number += 1
            pending = Pending(f"{self._node}-{self._number}", parameters, source, answer)
            self._pending[pending.key] = pending
            self._pending_size += pending.size
            self._undelivered.append(pending)
            self._expire_pending()
            is_up = self._state is RedisState.UP and len(self._undelivered) <= REDIS_WAITING
            done = [] if is_up else self._deliver_early(math.inf)
            self._changed.notify_all()
        if done:
            self._deliver_and_answer(done)

    def resume(self, since: CallID) -> Resumption:
        """Return where a browser goes on; it may have had more than this node has read yet."""
        with self._lock:
            resumption = self.log.resume(since if self.may_hold(since) else BEGINNING)
            early = (each.place for each in self._pending.values() if each.extens is not None)
            place = min(resumption.cursor, next(early, resumption.cursor))
        is_complete = resumption.is_complete and self.log.is_complete
        return Resumption(max(place, self.log.start), resumption.since, is_complete)

    def may_hold(self, since: CallID) -> bool:
        """Tell whether a position is one of this stream; other nodes may have read further."""
        # What is far ahead of us is another stream's, or was lost.
        is_near = abs(since.milliseconds - self.clock()) < 1000 * REDIS_AHEAD
        return since <= self.log.position or is_near or not self.log.is_complete

    def status(self) -> RedisStatus:
        """Return how Redis is."""
        with self._lock:
            self._expire_pending()
            return RedisStatus(self._state, self._reason, len(self._pending), self._lost)

    def close(self) -> None:
        """Give calls a moment to get into the stream."""
        with self._lock:
            self._changed.wait_for(lambda: not self._pending, REDIS_START)
            done = self._deliver_early(math.inf)
            if self._pending:
                log.warning("%d calls did not reach the other nodes", len(self._pending))
        self._deliver_and_answer(done)

    def _deliver_and_answer(self, answers: list[Callable[[], None]]) -> None:
        """Have the log's new calls delivered, and answer their triggers. Not under the lock."""
        self._deliver()
        for answer in answers:
            answer()

    # Either link's thread.

    def _keep_connected(self, work: Callable[[RedisLink], None]) -> None:
        """Do `work` with a link, and with a new one when that breaks."""
        delay, longest = REDIS_DELAYS
        while True:
            began = time.monotonic()
            try:
                with contextlib.closing(RedisLink(self._url)) as link:
                    work(link)
            except (OSError, RedisError) as error:
                self._link_broke(error)
            if time.monotonic() - began > longest:
                delay = REDIS_DELAYS[0]
            time.sleep(delay * random.uniform(0.5, 1))
            delay = min(2 * delay, longest)

    def _link_is_up(self, name: str) -> None:
        """Record that a link works; if both do, Redis is up."""
        with self._lock:
            self._broken_links.discard(name)
            if not self._broken_links and self._state is RedisState.AWAY:
                self._set_state(RedisState.UP, f"calls are shared by {self._url}")
                lost, self._reported = self._lost - self._reported, self._lost
                if lost:
                    log.warning("%d calls did not reach the other nodes", lost)

    def _end_slowness(self) -> None:
        """Record that Redis has caught up. Under the lock."""
        if self._state is RedisState.SLOW:
            self._set_state(RedisState.UP, f"calls are shared by {self._url} again")

    def _link_broke(self, error: Exception) -> None:
        """Record why a link broke, log it unless it is known, and deliver what waits early."""
        is_refusal = isinstance(error, RedisError) and not str(error).startswith("LOADING")
        verb = "refuses" if isinstance(error, RedisError) else "cannot be reached"
        if isinstance(error, ReplyError):
            verb = "answers as no Redis does"
        text = getattr(error, "strerror", None) or str(error)
        reason = f"{self._url} {verb}: {quote(text, 200)}"
        with self._lock:
            self._broken_links = {"read", "write"}  # the other one has to show that it works, too
            is_first = self._state is not RedisState.AWAY or not self._has_tried.is_set()
            self._has_tried.set()
            if is_first or (is_refusal and reason != self._reason):
                self._set_state(RedisState.AWAY, reason)
            done = self._deliver_early(math.inf)
            self._mark_unwritten()
        self._deliver_and_answer(done)

    def _set_state(self, state: RedisState, reason: str) -> None:
        self._state, self._reason = state, reason
        level = logging.INFO if state is RedisState.UP else logging.WARNING
        log.log(level, "Redis is %s: %s", state.value, reason)

    # The thread that reads.

    def _read(self, link: RedisLink) -> None:
        """Read what was missed, then what comes; check the stream again when nothing does."""
        head = ("XREAD", "COUNT", REDIS_BATCH, "BLOCK")
        position, block = self._check_stream(link), 1  # milliseconds: at first, take what is there
        while True:
            command = (*head, block, "STREAMS", self._url.stream, position)
            (reply,) = link.ask(command, patience=REDIS_BLOCK)
            if reply is not None:
                position, entries = parse_stream(reply)
                self._receive(position, entries)
            else:
                position, block = self._check_stream(link), int(REDIS_BLOCK * 1000)
            if block > 1:
                if not self.log.is_complete:
                    self.log.is_complete = True
                    self._deliver()  # to those who wait for it
                self._link_is_up("read")
                self._has_tried.set()

    def _check_stream(self, link: RedisLink) -> CallID:
        """Find out where the stream begins and ends; return where to read on."""
        stream, position = self._url.stream, self.log.position
        clock, newest, oldest = link.ask(
            ("TIME",),
            ("XREVRANGE", stream, "+", "-", "COUNT", 1),
            ("XREAD", "COUNT", 1, "STREAMS", stream, "0-0"),
        )
        bounds = parse_bounds(newest, oldest)
        if bounds is not None:
            first, last = bounds
            if last >= position:
                return self._synchronize(parse_time(clock), first, last)
            log.warning("Redis has lost calls: its stream %s ended before %s", stream, position)
        try:
            link.ask(("XADD", stream, position if any(position) else "*", *MARKER))
        except ReplyError:
            raise
        except RedisError as error:
            log.debug("another node has done it already: %s", error)
        with self._lock:
            self._mark_unwritten()
            self._pushed_to = position
            # Others may have gone on: what is known already is passed over.
            self._live_after = self._history_start(parse_time(clock))
            return self._live_after

    def _history_start(self, now: int) -> CallID:
        """Return the position where the history begins."""
        return CallID(max(now - int(self._retention() * 1000), 0), 0)

    def _synchronize(self, now: int, first: CallID, last: CallID) -> CallID:
        """Record where the stream begins and ends; return where to read on."""
        with self._lock:
            now = max(now, last.milliseconds)  # the clock was set back, or is another machine's
            age = int((time.monotonic() - self._start) * 1000)
            self._live_after = max(self._history_start(now), CallID(max(now - age, 0), 0))
            position = self.log.position
            if not self._is_synchronized:
                position = min(self._history_start(now), last)
            if not self._is_synchronized or first > position:
                self.log.begin_after(max(first, position))
                self.log.advance(position)
            self._is_synchronized = True
            return position

    def _receive(self, position: CallID, entries: Iterable[Entry]) -> None:
        """Put the stream's next entries into the log; they end at `position`."""
        done: list[Callable[[], None]] = []
        with self._lock:
            for entry in entries:
                done += self._receive_entry(entry)
            self.log.advance(position)
            ahead = self.log.position.milliseconds - int(time.monotonic() * 1000)
            self._offset = max(self._offset, ahead)
            self._changed.notify_all()
        self._deliver_and_answer(done)

    def _receive_entry(self, entry: Entry) -> list[Callable[[], None]]:
        """Put a call of the stream into the log; return the answer to a trigger that waits."""
        if entry.key in self._pending and entry.position < self._pushed_to:
            return []  # others read on behind it: it is written once more
        pending = self._pending.pop(entry.key, None)
        self._pending_size -= pending.size if pending else 0
        if not self._add_key(entry.key):
            return []
        delay = max(self.clock() - entry.time, 0) / 1000
        began = pending.began if pending else time.monotonic() - delay
        trigger = Trigger(entry.key, entry.time, entry.parameters, entry.source, began)
        position = max(
            entry.position, self.log.position
        )  # an old entry, read again, does not move it back
        if pending is None:
            self.log.append(position, trigger, is_history=entry.position <= self._live_after)
            return []
        if not self._pending or time.monotonic() - pending.written < REDIS_PATIENCE:
            self._end_slowness()
        if pending.extens is not None:
            self.log.append(position, trigger, pending.extens, is_history=True)
            return []
        self._undelivered.remove(pending)
        self.log.append(position, trigger)
        return [pending.answer]

    # The thread that writes.

    def _write(self, link: RedisLink) -> None:
        """Put calls into the stream until they come back; deliver early what takes too long."""
        head = ("XADD", self._url.stream, "MAXLEN", "~", STREAM_LENGTH, "*")
        self._set_clock(parse_time(link.ask(("TIME",))[0]))
        seconds = 0.0  # at first, write what is there
        while True:
            commands = [(*head, *fields) for fields in self._next_batch(seconds)]
            seconds = REDIS_BLOCK
            began = time.monotonic()
            link.send(("TIME",), *commands)
            if not link.answers_within(REDIS_PATIENCE):
                self._begin_slowness()
            clock, *_ = link.receive(1 + len(commands))
            if time.monotonic() - began < REDIS_PATIENCE:  # else it may be an old one
                self._set_clock(parse_time(clock))
            self._link_is_up("write")

    def _set_clock(self, now: int) -> None:
        """Set our clock by Redis's, in milliseconds since 1970; its stream may be ahead."""
        with self._lock:
            now = max(now, self.log.position.milliseconds)
            self._offset = now - int(time.monotonic() * 1000)
            if not self._pending:
                self._end_slowness()

    def _next_batch(self, seconds: float) -> list[tuple[object, ...]]:
        """Wait for calls to put into the stream, `seconds` at most; return their fields."""
        deadline = time.monotonic() + seconds
        while True:
            self._begin_slowness(REDIS_PATIENCE)
            with self._lock:
                self._expire_pending()
                batch = self._due()
                now = time.monotonic()
                if batch or now >= deadline:
                    return [self._entry_fields(pending) for pending in batch]
                until = deadline
                if self._undelivered:
                    until = min(until, self._undelivered[0].began + REDIS_PATIENCE)
                self._changed.wait(max(until - now, 0))

    def _begin_slowness(self, patience: float = 0.0) -> None:
        """Deliver early what has waited for `patience` seconds, and all from now on."""
        with self._lock:
            done = self._deliver_early(time.monotonic() - patience)
            if (done or not patience) and self._state is RedisState.UP:
                self._set_state(
                    RedisState.SLOW, "calls are delivered here first until it has caught up"
                )
        if done:
            self._deliver_and_answer(done)

    # Under the lock: calls that have not come back.

    def _due(self) -> list[Pending]:
        """Return calls that are not written, or have not come back within REDIS_TIMEOUT."""
        before = time.monotonic() - REDIS_TIMEOUT
        due = (each for each in self._pending.values() if each.written < before)
        return list(itertools.islice(due, REDIS_BATCH))

    def _entry_fields(self, pending: Pending) -> tuple[object, ...]:
        """Return the fields of a call's entry, and record that it is written now."""
        pending.written = time.monotonic()
        text = json.dumps(pending.parameters, ensure_ascii=False, separators=(",", ":"))
        call = ("source", pending.source, "parameters", text)
        return ("key", pending.key, "time", self._trigger_time(pending), *call)

    def _trigger_time(self, pending: Pending) -> int:
        return max(self._offset + int(pending.began * 1000), 0)

    def _mark_unwritten(self) -> None:
        """Have all calls written again: what was written may not have arrived."""
        for pending in self._pending.values():
            pending.written = -math.inf
        self._changed.notify_all()

    def _deliver_early(self, until: float) -> list[Callable[[], None]]:
        """Deliver early what was triggered up to then (monotonic seconds); return the answers."""
        answers = []
        while self._undelivered and self._undelivered[0].began <= until:
            pending = self._undelivered.popleft()
            facts = (pending.parameters, pending.source, pending.began)
            trigger = Trigger(pending.key, self._trigger_time(pending), *facts)
            call = self.log.append(self.log.position, trigger, is_early=True)
            pending.place, pending.extens = call.place, call.extens
            answers.append(pending.answer)
        return answers

    def _retention(self) -> float:
        """Return the seconds that calls are kept for other nodes and returning browsers."""
        return max(self.log.seconds, REDIS_KEEP)

    def _expire_pending(self) -> None:
        """Drop calls that waited for too long to get into the stream, and count them as lost."""
        oldest = time.monotonic() - self._retention()
        while self._pending:
            pending = next(iter(self._pending.values()))
            is_full = len(self._pending) > MAX_HISTORY or self._pending_size > MAX_HISTORY_SIZE
            if pending.extens is None or not (is_full or pending.began < oldest):
                break
            del self._pending[pending.key]
            self._pending_size -= pending.size
            self._add_key(pending.key)
            self._lost += 1

    def _add_key(self, key: str) -> bool:
        """Record a key; tell whether it is new."""
        is_new = key not in self._keys
        self._keys[key] = None
        if len(self._keys) > MAX_HISTORY:
            self._keys.popitem(last=False)
        return is_new


Stream = Union[LocalStream, RedisStream]


# --- 11. Asterisk ------------------------------------------------------------------------------
#
# With AMI_URL a thread of its own follows the events of Asterisk's manager interface. Others may
# call Asterisk.status() alone.
#
# 1. A PBX has channels, and bridges that connect them. A Local channel is two channels that pass
#    everything on to each other. The name of a phone's channel says which phone it is.
# 2. An incoming call begins with a channel of a trunk, as AMI_TRUNKS names it (see Channel), that
#    comes in and is the first of its linkedid. It ends with that channel, wherever it was
#    transferred to meanwhile. Other calls are not shown. A trunk's channel is never a phone.
# 3. It rings at a phone that is dialled for it. A phone has answered it when it is the only one
#    that bridges connect with the caller. Asterisk's own answer says less: it may be a voicemail,
#    a phone that has yet to confirm, or the member of a queue who was too late.
# 4. No event says whether a number is withheld: Asterisk is asked as the call comes in, and other
#    events wait for the answer, AMI_PATIENCE seconds at most.
# 5. A list of all channels, when the connection begins and every AMI_PERIOD, says which are left.
#    While the connection is lost, calls go on; those that the next list lacks are over, which
#    after a restart of Asterisk are all.
# 6. A caller's number may hold line ends, and Asterisk sends them as they are: a stranger can
#    forge events. So an event must name a channel and its uniqueid as they belong together, which
#    is longer than a number can be, and answers are known by IDs that nobody can guess.

AMI_TIMEOUT = 5.0  # seconds to connect and to log in
AMI_PERIOD = 30.0  # seconds between two lists of all channels, which show that the link works, too
AMI_PATIENCE = 0.5  # seconds that Asterisk has to say whether a number is withheld
AMI_DELAYS = (0.5, 30.0)  # seconds between two attempts to connect: the first, the longest
MAX_CHANNELS = 10_000  # followed at a time; a PBX of 1,000 phones has some 2,000 when all talk
MAX_MESSAGE_FIELDS = 100  # of a message from Asterisk; the longest have 45

PHONE_CHANNEL = re.compile(r"(PJSIP|SIP|IAX2|DAHDI)/([^/]+)(?:/.+)?-[0-9a-f]+", re.IGNORECASE)
LOCAL_CHANNEL = re.compile(r"(Local/.+);[12]", re.IGNORECASE)
ESCAPED = re.compile(r"\\(.)")  # how Asterisk writes quotes and control characters in names
CHANNEL_DOWN, CHANNEL_RINGING = "0", "5"  # values of ChannelState; down: Asterisk makes it itself
# FreePBX allows every number to be shown, and keeps in the second what it was before.
PRESENTATION = ("CALLERID(pres)", "CALLINGNUMPRES_SV")
# What an account may lack, and what follows from that.
RIGHTS = {
    "events": "no calls are shown; give it read = call in manager.conf",
    "Getvar": "withheld numbers are shown; give it write = reporting in manager.conf",
    "CoreShowChannels": "a broken link ends all calls; give it write = reporting in manager.conf",
}


def caller_number(text: str) -> str:
    """Return a caller's number for a trigger: its digits, or the text in their place."""
    return re.sub(r"[^0-9+]", "", text) or text.replace("<unknown>", "") or "anonymous"


def caller_name(text: str) -> str:
    """Return a caller's name as it was before Asterisk escaped it for an event."""
    plain = ESCAPED.sub(lambda match: match[1] if match[1] in "\\\"'?" else " ", text)
    return plain.replace("<unknown>", "").strip()


class ManagerParser:
    """Parses what Asterisk sends: messages of lines such as `Event: Hangup`, and an empty one."""

    def __init__(self) -> None:
        self._rest = b""  # the beginning of a line
        self._message: dict[str, str] = {}

    def receive_data(self, data: bytes) -> list[dict[str, str]]:
        """Return the messages that are whole now. Lines that are too long or too many are cut."""
        messages = []
        *lines, rest = (self._rest + data).split(b"\r\n")
        self._rest = rest[:MAX_LINE]
        for line in lines:
            name, _, value = line.decode("utf-8", "replace").partition(":")
            if line and len(self._message) < MAX_MESSAGE_FIELDS:
                self._message.setdefault(name, value.strip())
            elif not line and self._message:
                messages.append(self._message)
                self._message = {}
        return messages


class Channel:
    """A channel of the PBX. Its name says whose it is: a phone's, or a trunk's (AMI_TRUNKS)."""

    def __init__(self, uniqueid: str, name: str, trunks: Trunks) -> None:
        self.uniqueid = uniqueid
        self.name = name
        self.bridge = ""  # the ID of the bridge that it is in
        local = LOCAL_CHANNEL.fullmatch(name)
        self.pair = local[1] if local else ""  # what both halves of a Local channel are called
        phone = PHONE_CHANNEL.fullmatch(name)
        technology, line = phone.groups() if phone else ("", "")
        self.exten = line  # of the phone, or the trunk's name; empty: neither
        self.is_trunk = not trunks.isdisjoint((line.lower(), f"{technology}/{line}".lower()))
        self.rings_for: IncomingCall | None = None


class IncomingCall:
    """A call that came in by a trunk."""

    def __init__(self, uniqueid: str, is_withheld: bool) -> None:
        self.uniqueid = uniqueid  # of the caller's channel
        self.linkedid = uniqueid  # a transfer may change it
        self.is_withheld = is_withheld
        self.number = self.name = self.did = ""
        self.is_notified = False  # browsers may show it
        self.exten = ""  # of the phone that answered it

    def describe(self, event: Mapping[str, str]) -> None:
        """Update the caller from an event: the dialplan may have looked up a name."""
        self.number = event.get("CallerIDNum", self.number)
        self.name = event.get("CallerIDName", self.name)
        self.linkedid = event.get("Linkedid", self.linkedid)

    def trigger(self, event: str, exten: str) -> dict[str, str]:
        """Return the parameters of the trigger for one of its events."""
        parameters = {
            "phone": "anonymous" if self.is_withheld else caller_number(self.number),
            "exten": exten,
            "event": event,
            "uniqueid": self.uniqueid,
            "name": "" if self.is_withheld else caller_name(self.name),
            "did": self.did,
        }
        # Who calls under a very long name is shown, too.
        return {name: value[:MAX_VALUE] for name, value in parameters.items() if value}


class Switchboard:
    """Follows the channels of a PBX, and makes triggers of its incoming calls.

    It has neither connection nor clock: events go in, the parameters of triggers come out. Calls
    `is_withheld` with a channel's name to learn whether its caller withholds the number.
    """

    def __init__(self, trunks: Trunks, is_withheld: Callable[[str], bool]) -> None:
        self.lacks_events = False  # there are new channels, but no events announce them
        self._trunks = trunks
        self._is_withheld = is_withheld
        self._channels: dict[str, Channel] = {}  # by uniqueid, the oldest first
        self._groups: dict[str, set[Channel]] = {}  # by bridge, or by pair: they hear each other
        self._calls: dict[str, IncomingCall] = {}  # by the uniqueid of the caller's channel
        # What the list that is coming has, what it should have, and what has ended since.
        self._listed: dict[str, Mapping[str, str]] = {}
        self._expected: list[str] = []
        self._ended: set[str] = set()
        self._unannounced_lists = -1  # that brought new channels; -1: none came
        self._triggers: list[dict[str, str]] = []

    def receive_event(self, event: Mapping[str, str]) -> list[dict[str, str]]:
        """Return the parameters of the triggers that follow from an event."""
        kind = event.get("Event")
        channel, phone = self._find_channel(event), self._find_channel(event, "Dest")
        call = self._calls.get(channel.uniqueid) if channel is not None else None
        if call is not None:
            call.describe(event)
        if kind == "Newchannel":
            self._begin_channel(event)
        elif kind == "DialBegin" and phone is not None:
            self._ring(call or self._find_call(event.get("DestLinkedid", "")), phone)
        elif kind == "DialEnd" and phone is not None:
            phone.rings_for = None
        elif kind == "BridgeEnter" and channel is not None:
            # All who are parked share a bridge, and none of them talks to another.
            is_holding = event.get("BridgeTechnology") == "holding_bridge"
            self._change_bridge(channel, "" if is_holding else event.get("BridgeUniqueid", ""))
        elif kind == "BridgeLeave" and channel is not None:
            if channel.bridge == event.get("BridgeUniqueid"):
                self._change_bridge(channel, "")
        elif kind == "Hangup" and channel is not None:
            self._remove_channel(channel)
        elif kind == "CoreShowChannel" and len(self._listed) < MAX_CHANNELS:
            self._listed[event.get("Uniqueid", "")] = event
        elif kind == "CoreShowChannelsComplete":
            self._apply_list()
        triggers, self._triggers = self._triggers, []
        return triggers

    def begin_list(self) -> None:
        """Take note that a list of all channels is asked for.

        It may lack those that begin from now on, and still have those that end.
        """
        self._listed, self._ended = {}, set()
        self._expected = [*self._channels, *self._calls]

    def disconnect(self) -> None:
        """Forget the channels, for the connection is lost: the next list says which are left."""
        for known in (self._channels, self._groups, self._listed):
            known.clear()
        self.lacks_events, self._unannounced_lists = False, -1

    def _notify(self, call: IncomingCall, event: str, exten: str) -> None:
        call.is_notified = True
        self._triggers.append(call.trigger(event, exten))

    def _find_channel(self, event: Mapping[str, str], prefix: str = "") -> Channel | None:
        """Return the channel that an event is about; None for one that is unknown or forged."""
        channel = self._channels.get(event.get(f"{prefix}Uniqueid", ""))
        is_it = channel is not None and channel.name == event.get(f"{prefix}Channel")
        return channel if is_it else None

    def _find_call(self, linkedid: str) -> IncomingCall | None:
        """Return the call that a linkedid belongs to, perhaps only since a transfer."""
        linked = (call for call in self._calls.values() if call.linkedid == linkedid)
        return self._calls.get(linkedid) or next(linked, None)

    def _begin_channel(self, event: Mapping[str, str]) -> None:
        self._unannounced_lists = 0
        self._add_channel(event)
        channel = self._find_channel(event)
        if channel is not None and channel.uniqueid in self._calls:
            self._calls[channel.uniqueid].did = re.sub(r"[^0-9+]", "", event.get("Exten", ""))

    def _add_channel(self, event: Mapping[str, str]) -> Channel | None:
        """Return the channel that an event names, if it is new."""
        uniqueid, name = event.get("Uniqueid"), event.get("Channel")
        if not uniqueid or not name or uniqueid in self._channels:
            return None
        if len(self._channels) >= MAX_CHANNELS:
            self._remove_channel(next(iter(self._channels.values())))
        channel = self._channels[uniqueid] = Channel(uniqueid, name, self._trunks)
        if channel.pair:
            self._groups.setdefault(channel.pair, set()).add(channel)
        is_first = event.get("Linkedid") == uniqueid and uniqueid not in self._calls
        if channel.is_trunk and is_first and event.get("ChannelState") != CHANNEL_DOWN:
            call = self._calls[uniqueid] = IncomingCall(uniqueid, self._is_withheld(name))
            call.describe(event)
        return channel

    def _remove_channel(self, channel: Channel) -> None:
        """Forget a channel; with a caller's, the call is over."""
        self._change_bridge(channel, "")
        self._leave_group(channel, channel.pair)
        self._ended.add(channel.uniqueid)
        del self._channels[channel.uniqueid]
        if channel.uniqueid in self._calls:
            self._end_call(self._calls[channel.uniqueid])

    def _end_call(self, call: IncomingCall) -> None:
        """Notify those who may show a call that it is over, and forget it."""
        if call.is_notified:
            self._notify(call, "end", call.exten)
        del self._calls[call.uniqueid]

    def _leave_group(self, channel: Channel, name: str) -> None:
        group = self._groups.get(name, set())
        group.discard(channel)
        if not group:
            self._groups.pop(name, None)

    def _set_bridge(self, channel: Channel, bridge: str) -> None:
        """Record the bridge that a channel is in now; empty: none."""
        self._leave_group(channel, channel.bridge)
        channel.bridge = bridge
        if bridge:
            self._groups.setdefault(bridge, set()).add(channel)

    def _change_bridge(self, channel: Channel, bridge: str) -> None:
        """Set a channel's bridge, and notify who has answered now, there or in the one it left."""
        left = channel.bridge
        self._set_bridge(channel, bridge)
        for each in (*itertools.islice(self._groups.get(left, ()), 1), channel):
            self._notify_answers(each)

    def _notify_answers(self, channel: Channel) -> None:
        """Tell who has the callers that a channel is connected with, unless known."""
        connected, fresh = {channel}, [channel]
        while fresh:
            each = fresh.pop()
            for name in (each.bridge, each.pair):
                near = self._groups.get(name, set()) - connected
                connected |= near
                fresh += near
        calls = [self._calls[each.uniqueid] for each in connected if each.uniqueid in self._calls]
        others = [each for each in connected if each.exten and each.uniqueid not in self._calls]
        phones = {each.exten for each in others if not each.is_trunk}
        extens = phones or {each.exten for each in others}
        for call in calls if len(extens) == 1 else ():
            # A caller who was sent out again, to a mobile phone, is taken from the screens, too.
            if call.exten not in extens and (phones or call.is_notified):
                (call.exten,) = extens
                self._notify(call, "answer", call.exten)

    def _ring(self, call: IncomingCall | None, phone: Channel) -> None:
        """Notify that a phone rings: once, though each of its contacts has a channel."""
        if call is None or phone.is_trunk or not phone.exten:
            return
        ringing = [each for each in self._channels.values() if each.rings_for is call]
        phone.rings_for = call
        if phone.exten not in {each.exten for each in ringing}:
            call.exten = ""  # the next answer is notified, even if it is the same phone's again
            self._notify(call, "ring", phone.exten)

    def _apply_list(self) -> None:
        """Remove channels that the list of all lacks, and add those that are new in it."""
        listed = {key: event for key, event in self._listed.items() if key not in self._ended}
        for key in [each for each in self._expected if each not in listed]:
            if key in self._channels:
                self._remove_channel(self._channels[key])
            if key in self._calls:
                self._end_call(self._calls[key])
        known = set(self._calls)
        added = [(self._add_channel(event), event) for event in listed.values()]
        missed = [(channel, event) for channel, event in added if channel is not None]
        for channel, event in missed:
            self._set_bridge(channel, event.get("BridgeId", ""))
        for channel, _ in missed:
            self._notify_answers(channel)
        # Answers of calls that began before we were connected may have been notified by the
        # daemon that ran then. They are not notified again; changes and the end are.
        older = self._calls.keys() - known
        self._triggers = [each for each in self._triggers if each["uniqueid"] not in older]
        for uniqueid in older:
            self._calls[uniqueid].is_notified = True
        for channel, event in missed:
            if event.get("ChannelState") == CHANNEL_RINGING:
                self._ring(self._find_call(event.get("Linkedid", "")), channel)
        self._unannounced_lists += 1 if missed or self._unannounced_lists < 0 else 0
        self.lacks_events = self._unannounced_lists > 1


class ManagerLink:
    """A connection to Asterisk's manager interface, logged in. Belongs to one thread."""

    def __init__(self, url: ManagerURL) -> None:
        self._run = os.urandom(8).hex()  # begins the ID of each action
        self._count = 0
        self._parser = ManagerParser()
        self._unread: list[dict[str, str]] = []  # came while an answer was waited for
        with contextlib.ExitStack() as stack:
            self._sock = socket.create_connection((url.host, url.port), AMI_TIMEOUT)
            stack.callback(self._sock.close)
            self._check_banner(url)
            login = self.request("Login", Username=url.user, Secret=url.secret, Events="call")
            answers = self.answers([login], AMI_TIMEOUT)
            if not answers:
                raise TimeoutError("no answer to the login")
            if answers[0].get("Response") != "Success":
                said = quote(answers[0].get("Message", ""))
                hint = "see secret, permit and deny in manager.conf"
                raise ManagerError(f"{url} refuses the login: {said}; {hint}")
            stack.pop_all()

    def close(self) -> None:
        """Hang up."""
        self._sock.close()

    def request(self, action: str, **fields: str) -> str:
        """Send an action; return the ID that its answers will have."""
        self._count += 1
        action_id = f"{self._run}-{self._count}"
        fields = {"Action": action, "ActionID": action_id, **fields}
        # Not even a channel's name is trusted to be one line.
        lines = [re.sub(r"[\r\n]", "", f"{name}: {value}") for name, value in fields.items()]
        self._sock.settimeout(AMI_TIMEOUT)
        self._sock.sendall("\r\n".join([*lines, "", ""]).encode())
        return action_id

    def answers(self, action_ids: list[str], seconds: float) -> list[dict[str, str]]:
        """Return the answers to actions that come within `seconds`, in any order."""
        found: list[dict[str, str]] = []
        deadline = time.monotonic() + seconds
        while len(found) < len(action_ids) and time.monotonic() < deadline:
            for message in self._read(deadline - time.monotonic()):
                is_answer = "Response" in message and message.get("ActionID") in action_ids
                (found if is_answer else self._unread).append(message)
        return found

    def receive(self, seconds: float) -> list[dict[str, str]]:
        """Return the next messages; none when nothing comes within `seconds`."""
        kept, self._unread = self._unread, []
        return kept or self._read(seconds)

    def _read(self, seconds: float) -> list[dict[str, str]]:
        self._sock.settimeout(max(seconds, 0.001))
        try:
            data = self._sock.recv(READ_SIZE)
        except socket.timeout:
            return []
        if not data:
            raise ConnectionError("it hung up")
        return self._parser.receive_data(data)

    def _check_banner(self, url: ManagerURL) -> None:
        banner, deadline = b"", time.monotonic() + AMI_TIMEOUT
        with contextlib.suppress(socket.timeout):
            while b"\n" not in banner and len(banner) < MAX_LINE and time.monotonic() < deadline:
                data = self._sock.recv(MAX_CONTROL)
                banner += data
                if not data:
                    break
        if not banner.startswith(b"Asterisk Call Manager/"):
            said = quote(banner.decode("utf-8", "replace").strip()) if banner else "nothing"
            raise ManagerError(f"{url} is no manager interface, or has TLS: it says {said}")


class AsteriskStatus(NamedTuple):
    """How the link to Asterisk is, for /healthz and /metrics."""

    is_up: bool
    since: float  # seconds since 1970
    reason: str
    events: int  # received
    calls: int  # triggers: rings, answers and ends

    def __str__(self) -> str:
        state = f"Asterisk {'up' if self.is_up else 'away'} since {local_time(int(self.since))}"
        return f"{state}: {self.reason}, {self.events} events, {self.calls} triggers"


class Asterisk:
    """Publishes the calls of a PBX. Belongs to its thread, but for status()."""

    def __init__(self, url: ManagerURL, trunks: Trunks, stream: Stream) -> None:
        self._url = url
        self._stream = stream
        self._board = Switchboard(trunks, self._is_withheld)
        self._status = AsteriskStatus(False, time.time(), f"connecting to {url}", 0, 0)
        self._has_tried = False
        self._link: ManagerLink | None = None
        self._list_id = ""  # of the action whose answer shows that the link works
        self._refused: set[str] = set()  # rights whose lack is logged

    def status(self) -> AsteriskStatus:
        """Return how the link is. Any thread."""
        return self._status

    def run(self) -> None:
        """Follow a connection, and a new one when that breaks."""
        shortest, longest = AMI_DELAYS
        delay = shortest
        while True:
            began = time.monotonic()
            try:
                with contextlib.closing(ManagerLink(self._url)) as self._link:
                    self._follow(self._link)
            except (OSError, ManagerError) as error:
                self._disconnected(error)
                if isinstance(error, ManagerError):
                    delay = longest  # fail2ban counts refused logins
                elif time.monotonic() - began > longest:
                    delay = shortest
            time.sleep(delay * random.uniform(0.5, 1))
            delay = min(2 * delay, longest)

    def _set_status(self, is_up: bool, reason: str) -> None:
        self._status = self._status._replace(is_up=is_up, since=time.time(), reason=reason)
        level = logging.INFO if is_up else logging.WARNING
        log.log(level, "Asterisk is %s: %s", "up" if is_up else "away", reason)

    def _disconnected(self, error: Exception) -> None:
        """Record why there is no link, and log it unless it is known."""
        self._board.disconnect()
        reason = str(error)
        if isinstance(error, OSError):
            reason = f"{self._url} cannot be reached: {error.strerror or error}"
        is_refusal = isinstance(error, ManagerError) and reason != self._status.reason
        if self._status.is_up or is_refusal or not self._has_tried:
            self._set_status(False, reason)
        self._has_tried = True

    def _follow(self, link: ManagerLink) -> None:
        """Process what comes; raises OSError when the link breaks or Asterisk is silent."""
        self._set_status(True, f"logged in as {self._url}")
        self._refused.clear()
        self._list_id, due = "", time.monotonic()
        while True:
            if time.monotonic() >= due:
                if self._list_id:
                    raise TimeoutError(f"no answer for {AMI_PERIOD:g} seconds")
                self._board.begin_list()
                may_list = "CoreShowChannels" not in self._refused
                self._list_id = link.request("CoreShowChannels" if may_list else "Ping")
                due = time.monotonic() + AMI_PERIOD
            for message in link.receive(due - time.monotonic()):
                self._receive(message)

    def _receive(self, message: Mapping[str, str]) -> None:
        """Process an event, or an answer to the last request for a list."""
        is_list = bool(self._list_id) and message.get("ActionID") == self._list_id
        kind = message.get("Event", "")
        if is_list and message.get("Message") == "Permission denied":
            self._warn_of_missing_right("CoreShowChannels")
            message, kind = {"Event": "CoreShowChannelsComplete"}, "CoreShowChannelsComplete"
        if is_list and (kind == "CoreShowChannelsComplete" or "Ping" in message):
            self._list_id = ""
        if kind and (is_list or not kind.startswith("CoreShowChannel")):
            triggers = self._board.receive_event(message)
            self._status = self._status._replace(events=self._status.events + 1)
            for parameters in triggers:
                self._publish(parameters)
        if self._board.lacks_events:
            self._warn_of_missing_right("events")

    def _is_withheld(self, channel: str) -> bool:
        """Ask Asterisk whether a caller withholds the number."""
        if self._link is None or "Getvar" in self._refused:
            return False
        request = partial(self._link.request, "Getvar", Channel=channel)
        action_ids = [request(Variable=each) for each in PRESENTATION]
        answers = self._link.answers(action_ids, AMI_PATIENCE)
        if any(each.get("Message") == "Permission denied" for each in answers):
            self._warn_of_missing_right("Getvar")
        values = [each.get("Value", "") for each in answers]
        return any(value and not value.startswith("allowed") for value in values)

    def _warn_of_missing_right(self, right: str) -> None:
        """Log once that the account lacks a right."""
        if right not in self._refused:
            self._refused.add(right)
            log.warning("Asterisk refuses %s to %s: %s", right, self._url, RIGHTS[right])

    def _publish(self, parameters: Mapping[str, str]) -> None:
        try:
            checked = parse_parameters(parameters.items())
        except RequestError as error:
            log.warning("Asterisk reported a call that is not accepted: %s", error)
        else:
            self._status = self._status._replace(calls=self._status.calls + 1)
            self._stream.publish(checked, "asterisk", lambda: None)


# --- 12. Monitoring ----------------------------------------------------------------------------
#
# How the daemon is: for Prometheus, for whoever reads the log, and for systemd. Any thread may use
# RefusalLog and Supervisor; only the Hub's counts in HubMetrics.

HEALTH_TIMEOUT = 2.0  # seconds that each Loop has to turn
# Refusals are counted by address and status. In each period (seconds) the first REPORT_LINES of a
# pair are logged, the others summed up at its end, or when there are REPORT_PAIRS pairs.
REPORT_PERIOD = 60.0
REPORT_LINES = 3
REPORT_PAIRS = 1000
LATEST = 20  # refusals that /status shows
SHOWN_BROWSERS = 500  # browsers that /status shows, at most
DELIVERY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)  # seconds
STATUS_INTERVAL = 10.0  # seconds between two status lines to systemd


class HubMetrics:
    """What the Hub's thread counts. Others only read it."""

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


class RefusalLog:
    """Logs who was refused, and why. Repetitions are summed up: a scan must not fill the disk."""

    def __init__(self) -> None:
        self.totals: collections.Counter[int] = collections.Counter()  # by status
        self._lock = threading.Lock()
        self._counts: collections.Counter[tuple[str, int]] = collections.Counter()
        self._latest: collections.deque[dict[str, object]] = collections.deque(maxlen=LATEST)
        self.deadline = math.inf  # when to report, monotonic seconds

    def add(self, address: IPAddress, error: RequestError) -> None:
        """Log a refusal, or only count it when its like were just logged. Any thread."""
        key = (str(address), error.status.value)
        fact = {"time": int(time.time() * 1000), "address": key[0], "status": key[1]}
        with self._lock:
            self._latest.append({**fact, "reason": str(error)})
            self.deadline = min(self.deadline, time.monotonic() + REPORT_PERIOD)
            self.totals[error.status.value] += 1
            self._counts[key] += 1
            count, is_full = self._counts[key], len(self._counts) >= REPORT_PAIRS
        if count <= REPORT_LINES:
            log.warning("refused: %s %d %s", *key, error)
        if is_full:
            self.report()

    def latest(self) -> list[dict[str, object]]:
        """Return the last refusals, the newest first. Any thread."""
        with self._lock:
            return list(reversed(self._latest))

    def report(self, now: float = math.inf) -> None:
        """Log what was only counted, if that is due, and begin anew. Any thread."""
        with self._lock:
            if self.deadline > now:
                return
            counts, self._counts = self._counts, collections.Counter()
            self.deadline = math.inf
        for (address, status), count in counts.items():
            if count > REPORT_LINES:
                more = count - REPORT_LINES
                log.warning("refused: %s %d, %d times more", address, status, more)


def metrics_lines(hub: Hub, refusals: RefusalLog, asterisk: Asterisk | None) -> Iterator[str]:
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
        "deliveries_total", "counter", "Calls sent, counted per browser.", ("", counted.deliveries)
    )
    yield from metric("dropped_browsers_total", "counter", "Connections we ended.", *drops)
    yield from metric("refused_requests_total", "counter", "Requests refused.", *refused)
    text = "From a trigger to the last browser's send."
    yield from metric("delivery_seconds", "histogram", text, *buckets)
    redis = hub.stream.status()
    if redis is not None:
        states = [(f'{{state="{each.value}"}}', float(each is redis.state)) for each in RedisState]
        yield from metric("redis", "gauge", "1 for the state that Redis is in.", *states)
        text = "Calls triggered here that are not in the stream yet."
        yield from metric("redis_waiting_calls", "gauge", text, ("", redis.waiting))
        yield from metric("redis_lost_calls_total", "counter", "Calls given up.", ("", redis.lost))
    if asterisk is not None:
        link = asterisk.status()
        states = [('{state="up"}', int(link.is_up)), ('{state="away"}', int(not link.is_up))]
        yield from metric("asterisk", "gauge", "1 for the state of the link to Asterisk.", *states)
        yield from metric(
            "asterisk_events_total", "counter", "Events received.", ("", link.events)
        )
        text = "Rings, answers and ends triggered by Asterisk."
        yield from metric("asterisk_calls_total", "counter", text, ("", link.calls))


def describe_status(
    hub: Hub, refusals: RefusalLog, asterisk: Asterisk | None
) -> dict[str, object]:
    """Return what /status says, as JSON: how the daemon is, for the admin's part of the desk."""
    redis = hub.stream.status()
    browsers = [
        {
            "address": str(browser.visitor.address),
            "origin": browser.visitor.origin,
            "extens": sorted(browser.extens),
        }
        for browser in itertools.islice(hub.browsers(), SHOWN_BROWSERS)
    ]
    return {
        "version": VERSION,
        "uptime": int(uptime()),
        "count": hub.count(),
        "browsers": browsers,
        "refusals": refusals.latest(),
        "redis": None if redis is None else f"Redis {redis.state.value}: {redis.reason}",
        "asterisk": None if asterisk is None else str(asterisk.status()),
    }


START = time.monotonic()


def uptime() -> float:
    """Return the seconds since the start."""
    return round(time.monotonic() - START, 3)


class Supervisor:
    """Runs the daemon's threads: one that fails ends the daemon, and no Loop hangs unseen."""

    def __init__(self, on_failure: Callable[[], None]) -> None:
        self.has_failed = False
        self._on_failure = on_failure
        self._loops: dict[str, Loop] = {}

    def watch(self, name: str, loop: Loop) -> None:
        """Look after a thread that was not started by run()."""
        self._loops[name] = loop

    def run(
        self, name: str, work: Callable[[], None], loop: Loop | None = None
    ) -> threading.Thread:
        """Start a thread, and look after its loop if it has one; raises ConfigError."""
        thread = threading.Thread(target=self._run, args=(name, work), name=name, daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            raise ConfigError(f"cannot start a thread: {error}; raise TasksMax") from None
        if loop is not None:
            self.watch(name, loop)
        return thread

    def _run(self, name: str, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception:
            log.critical("the thread %s failed: this is a bug", name, exc_info=True)
            self.has_failed = True
            self._on_failure()

    def stalled(self, timeout: float) -> list[str]:
        """Return the names of the Loops that do not turn within `timeout` seconds. Any thread."""
        deadline = time.monotonic() + timeout
        probes = [(name, loop.probe()) for name, loop in self._loops.items()]
        return [
            name for name, turned in probes if not turned.wait(max(deadline - time.monotonic(), 0))
        ]


class ServiceManager:
    """Tells systemd how we are (sd_notify(3)); does nothing when started by somebody else."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        address = environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) if address else None
        watchdog = int(environ.get("WATCHDOG_USEC") or 0) / 1_000_000
        # Seconds between two signs of life, None for none; twice as often as is asked for.
        self.interval = min(watchdog / 2 or math.inf, STATUS_INTERVAL) if address else None

    def notify(self, *lines: str) -> None:
        """Send assignments such as READY=1. Any thread."""
        if self._socket is not None:
            self._socket.setblocking(False)
            try:
                self._socket.sendto("\n".join(lines).encode(), self._address)
            except OSError as error:
                log.warning("cannot tell systemd %s: %s", lines[0], error.strerror)


# --- 13. The desk ------------------------------------------------------------------------------
#
# GET / for an agent whose CRM can't be edited: a row for each call of today, drawn from the plain
# data of popup-sample.js, which decides a call's state; and below, for the admin, how the daemon
# is. The page is in here because one file is copied to the server.

ADMIN_PART = re.compile(r"<!-- admin -->.*?<!-- /admin -->\n", re.DOTALL)
DESK_PAGE = r"""<!doctype html>
<html lang="ja">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>popup-notifier</title>
<link rel="icon" href="data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg'
 viewBox='0 0 64 64'%3E%3Crect width='64' height='64' rx='14' fill='%231a7f37'/%3E%3Cpath
 d='M20 14c-4 2-6 6-5 10 4 14 11 21 25 26 4 1 8-1 10-5l-9-8-6 4c-5-3-8-6-10-11l4-6z'
 fill='%23fff'/%3E%3C/svg%3E">
<style>
  :root { color-scheme: light dark; --ink: light-dark(#1f2328, #e6edf3);
    --soft: light-dark(#59636e, #9198a1); --paper: light-dark(#f6f8fa, #0d1117);
    --card: light-dark(#fff, #161b22); --rule: light-dark(#d1d9e0, #3d444d);
    --ringing: light-dark(#1a7f37, #3fb950); --talking: light-dark(#0969da, #58a6ff);
    --missed: light-dark(#cf222e, #ff7b72); --rang: light-dark(#9a6700, #d29922) }
  body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui }
  header, main { max-width: 1080px; margin: 0 auto; padding: 12px 16px }
  header, form { display: flex; flex-wrap: wrap; align-items: center; gap: 8px }
  #state { flex: 1 0 0; min-width: 9em; margin: 0; color: var(--soft); overflow-wrap: anywhere }
  #state::before { content: "● "; color: var(--ringing) }
  #state.bad { color: var(--missed); font-weight: 600 }
  #state.bad::before { content: "! "; color: inherit }
  #state.gap::before { color: var(--rang) }
  input, button { min-height: 36px; box-sizing: border-box; padding: 4px 12px; color: inherit;
    border: 1px solid var(--soft); border-radius: 6px; background: var(--card); font: inherit }
  input { width: 8em }
  button[aria-pressed=true] { border-color: var(--ringing); color: var(--ringing) }
  button[aria-pressed=true]::before { content: "✓ " }
  :focus-visible { outline: 2px solid var(--talking); outline-offset: 1px }
  #hint:empty, [hidden] { display: none }
  #hint, pre { margin: 0 0 12px; padding: 12px; border: 1px solid var(--rule); border-radius: 8px;
    background: var(--card); overflow-wrap: anywhere; white-space: pre-wrap }
  table { width: 100%; border-collapse: collapse; background: var(--card) }
  th, td { padding: 8px 12px; border-bottom: 1px solid var(--rule); text-align: left;
    vertical-align: top; overflow-wrap: anywhere }
  th { color: var(--soft); font-size: .875rem; white-space: nowrap }
  td, bdi { unicode-bidi: isolate } a, .state { color: var(--line, inherit) }
  .ringing { --line: var(--ringing) } .talking { --line: var(--talking) }
  .missed { --line: var(--missed) } .rang { --line: var(--rang) }
  #calls td:first-child { border-left: 6px solid var(--line, var(--rule)); white-space: nowrap }
  .ringing td { font-size: 1.25rem } .ended, .elsewhere { color: var(--soft) }
  .state, .who, .new td { font-weight: 600 } .length { font-variant-numeric: tabular-nums }
  .time { white-space: nowrap } .exten { min-width: 6em }
  .who, .number, .note { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 3;
    margin: -3px; padding: 3px; overflow: hidden } .who:empty, .note:empty { display: none }
  details { margin: 24px 0 } summary { padding: 8px 0; cursor: pointer }
  details table { margin-top: 12px; font-size: .875rem }
  .aloud { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%) }
  @media (max-width: 560px) {
    #calls thead { position: absolute; clip-path: inset(50%) }
    #calls tr { display: grid; grid-template-columns: 1fr auto; padding: 6px 0 6px 10px;
      border-bottom: 1px solid var(--rule); border-left: 6px solid var(--line, var(--rule)) }
    #calls td { padding: 2px 6px; border: 0 !important }
    #calls td:nth-child(2) { grid-column: 1 / 3; grid-row: 2 }
    #calls td:nth-child(3) { grid-column: 1 / 3; grid-row: 3; color: var(--soft) }
  }
</style>
<h1 class="aloud">popup-notifier</h1>
<header>
  <p id="state" role="status"></p>
  <form>
    <label for="exten" data-say="exten"></label>
    <input id="exten" autocomplete="off" inputmode="numeric">
    <button data-say="apply"></button>
  </form>
  <button id="notification" data-say="notification"></button>
  <button id="sound" data-say="sound"></button>
  <button id="small" data-say="small"></button>
</header>
<main>
  <p id="hint" role="alert"></p>
  <p class="aloud" id="aloud" role="alert"></p>
  <p id="empty" data-say="empty"></p>
  <table id="calls" hidden>
    <thead><tr><th data-say="call"><th data-say="caller"><th data-say="exten"><th data-say="time">
    <tbody>
  </table>
<!-- admin -->
  <details id="admin">
    <summary data-say="admin"></summary>
    <p data-say="try"></p>
    <pre id="curl" tabindex="0"></pre>
    <button id="copy" data-say="copy"></button>
    <pre id="facts"></pre>
    <table><thead><tr><th data-say="address"><th data-say="exten"><th data-say="origin">
      <tbody id="browsers"></table>
    <table><thead><tr><th data-say="time"><th data-say="address"><th data-say="refused">
      <tbody id="refusals"></table>
  </details>
<!-- /admin -->
</main>
<script src="/popup-sample.js" data-manual></script>
<script>
  'use strict';
  const WORDS = {
    exten: ['Extension', '内線'], apply: ['Show', '表示'], caller: ['Caller', '発信者'],
    call: ['Call', '着信'], time: ['Time', '時刻'],
    all: ['all', 'すべて'], notification: ['Notifications', '通知'], sound: ['Sound', '音'],
    small: ['Small window', '小さい窓'], missed: ['missed', '不在'],
    empty: ['No calls yet today.', '今日の着信はまだありません。'],
    ask: ['Which extension is yours? (empty: show all calls)',
      'あなたの内線番号を入力してください (空欄: すべての着信)'],
    https: ['Notifications need https: open this page by its https address.',
      '通知には https が必要です。https のアドレスでこのページを開いてください。'],
    denied: ['The browser forbids notifications: allow them in its settings of this page.',
      'ブラウザが通知を許可していません。このページの設定で許可してください。'],
    admin: ['For the administrator', '管理者向け'], copy: ['Copy', 'コピー'],
    try: ['A test call, on the PBX and with your token:',
      'テスト (PBX で実行します。token は設定ファイルの値です)'],
    silent: ['The daemon does not answer.', 'デーモンが応答しません。'],
    script: ['popup-sample.js is missing on the server: its log says where it belongs.',
      'サーバに popup-sample.js がありません。置き場所はサーバのログに出ています。'],
    address: ['Address', 'アドレス'], origin: ['Page', 'ページ'], refused: ['Refused', '拒否'],
  };
  const isJapanese = /^ja\b/i.test(navigator.language);
  const say = (word) => WORDS[word][isJapanese ? 1 : 0];
  const find = (selector) => document.querySelector(selector);
  const clock = (time) => new Date(time).toTimeString().slice(0, 5);
  const query = new URLSearchParams(location.search);
  let kept = {}; // for as long as the page is open, where the browser forbids more
  try { kept = localStorage; } catch (error) { /* the page works without */ }

  document.documentElement.lang = isJapanese ? 'ja' : 'en';
  for (const node of document.querySelectorAll('[data-say]')) {
    node.textContent = say(node.dataset.say);
  }
  find('#exten').placeholder = say('all');

  // The calls: a row each, the latest first, changed in place.
  const rows = new Map(); // by uniqueid
  let lookedAt = 0; // ms, by the server's clock: when the last call ended that was looked at
  let spoken;       // the call that a screen reader was told of
  let status = { state: 'connecting', text: '' };
  const isRinging = ({ state }) => state === 'ringing';
  const isNew = ({ state, ended }) => state === 'missed' && ended > lookedAt;
  const isOn = ({ state }) => state === 'ringing' || state === 'talking';

  function draw(calls) {
    lookedAt = Number(kept.lookedAt || 0); // in another tab, perhaps
    const today = new Date(n.now).setHours(0, 0, 0, 0);
    // What goes on at midnight, and what was missed and nobody has seen, stays.
    const shown = calls.filter((call) => call.began >= today || isOn(call) || isNew(call));
    shown.sort((a, b) => b.began - a.began || (b.uniqueid > a.uniqueid ? 1 : -1));
    const ids = shown.map(({ uniqueid }) => uniqueid);
    rows.forEach((row, id) => {
      if (ids.includes(id)) return;
      row.remove();
      rows.delete(id);
    });
    shown.forEach((call, index) => {
      const body = find('#calls tbody');
      if (!rows.has(call.uniqueid)) rows.set(call.uniqueid, newRow());
      const row = rows.get(call.uniqueid);
      if (body.rows[index] !== row) body.insertBefore(row, body.rows[index]);
      fill(row, call);
    });
    const { uniqueid, title, name: caller, number, whose } = shown.find(isRinging) || {};
    if (uniqueid && uniqueid !== spoken) {
      find('#aloud').textContent = `${title} ${caller} ${number} ${whose}`;
    }
    spoken = uniqueid;
    find('#empty').hidden = shown.length > 0;
    find('#calls').hidden = !shown.length;
    const missed = shown.filter(isNew);
    const name = n.exten || say('all');
    const count = missed.length ? `(${missed.length}) ${say('missed')}` : '';
    const fact = status.state === 'open' ? count : status.text;
    document.title = fact ? `${fact} – ${name}` : name;
  }
  function newRow() {
    const row = document.createElement('tr');
    row.innerHTML = '<td><span class="state"></span> <span class="length"></span>'
      + '<td><bdi class="who"></bdi><bdi class="number"></bdi><span class="note"></span>'
      + '<td class="exten"><td class="time">';
    return row;
  }
  function fill(row, call) {
    const { state, title, number, name, note, whose, times, links, target } = call;
    const { began, since, ended } = call;
    const ms = isOn(call) ? n.now - since : (ended || since) - began;
    const seconds = Math.max(0, Math.round(ms / 1000));
    const length = `${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, '0')}`;
    const put = (selector, text) => {
      const node = row.querySelector(selector);
      if (node.textContent !== text) node.textContent = text;
    };
    row.className = isNew(call) ? `${state} new` : state;
    put('.state', title);
    put('.length', isOn(call) || state === 'ended' ? length : '');
    put('.who', name);
    put('.note', times > 1 ? `${note} ×${times}` : note);
    put('.exten', whose);
    put('.time', clock(began));
    const cell = row.querySelector('.number');
    const text = JSON.stringify([number, links]);
    if (cell.dataset.text === text) return;
    cell.dataset.text = text;
    const anchors = links.map(({ href, text: label }, index) => {
      const anchor = document.createElement('a');
      return Object.assign(anchor, { href, target, textContent: index ? label : number });
    });
    cell.replaceChildren(...(anchors.length ? anchors : [number]));
  }
  // Whoever turns to this window has seen what was missed.
  for (const sign of ['focus', 'pointerdown', 'keydown']) {
    window.addEventListener(sign, () => {
      kept.lookedAt = Math.max(lookedAt, ...n.calls.map(({ ended }) => ended));
      draw(n.calls);
    });
  }

  function onStatus(latest) {
    status = latest;
    find('#state').textContent = status.text;
    find('#state').className = status.state !== 'open' ? 'bad' : status.reason || 'open';
    return false; // it is all said here
  }

  if (!window.PopupNotifier) onStatus({ state: 'connecting', text: say('script') });

  // What can be set, and is remembered.
  // Who types "all" does not mean an extension of that name.
  function plainExten(text) {
    return WORDS.all.includes(text.normalize('NFKC').trim().toLowerCase()) ? '' : text;
  }
  const remembered = query.get('exten') ?? kept.exten;
  const exten = plainExten(remembered || '');
  const token = query.get('token'); // CRMWS_TOKEN
  const n = PopupNotifier.connect({ exten, token, history: true, draw, onStatus });
  find('#exten').value = n.exten;
  if (remembered === undefined) {
    find('#hint').textContent = say('ask');
    find('#exten').focus();
  }
  find('form').onsubmit = (event) => {
    event.preventDefault();
    n.exten = plainExten(find('#exten').value);
    find('#exten').value = kept.exten = n.exten;
    offerInstallation();
    history.replaceState(null, '', `?${query}`);
    find('#hint').textContent = '';
  };
  function showAlerts() {
    for (const kind of ['notification', 'sound']) {
      find(`#${kind}`).setAttribute('aria-pressed', n.alert.split(' ').includes(kind));
    }
  }
  async function toggle(kind) {
    const kinds = new Set(n.alert.split(' '));
    const isOn = !kinds.delete(kind);
    if (isOn && kind === 'notification') {
      const answer = window.isSecureContext ? await n.askPermission() : 'https';
      const hint = { granted: '', https: say('https') }[answer] ?? say('denied');
      find('#hint').textContent = hint;
      if (hint) return;
    }
    n.alert = [...(isOn ? kinds.add(kind) : kinds)].join(' ');
    showAlerts();
  }
  find('#notification').onclick = () => toggle('notification');
  find('#sound').onclick = () => toggle('sound');
  find('#small').onclick = () => {
    window.open(location.href, 'popup-notifier', 'popup,width=340,height=640');
  };
  find('#small').hidden = window.name === 'popup-notifier';
  showAlerts();

  // Lets the browser install this page as an application, where it is served by https.
  function offerInstallation() {
    const icons = [{ src: find('[rel=icon]').href, sizes: 'any', type: 'image/svg+xml' }];
    query.set('exten', n.exten);
    const start_url = `${location.origin}/?${query}`;
    const scope = `${location.origin}/`;
    const name = `popup-notifier ${n.exten}`;
    const manifest = { name, start_url, scope, display: 'standalone', icons };
    const link = find('[rel=manifest]') || document.createElement('link');
    document.head.append(Object.assign(link, { rel: 'manifest' }));
    link.href = `data:application/manifest+json,${encodeURIComponent(JSON.stringify(manifest))}`;
  }
  offerInstallation();
</script>
<!-- admin -->
<script>
  'use strict';
  // Root pastes it into a shell, and whoever made the link to this page chose the extension.
  const wanted = encodeURIComponent(n.exten.split(',')[0] || 'all').replace(/[!'()*]/g, '');
  const trial = `phone=0312345678&exten=${wanted}&token=SECRET_TOKEN`;
  find('#curl').textContent = `curl -m 1 -X POST "${location.origin}/api/trigger?${trial}"`;
  find('#copy').onclick = () => {
    getSelection().selectAllChildren(find('#curl'));
    document.execCommand('copy'); // navigator.clipboard needs https
  };
  function list(selector, lines) {
    find(selector).replaceChildren(...lines.map((cells) => {
      const row = document.createElement('tr');
      cells.forEach((text) => { row.insertCell().textContent = text; });
      return row;
    }));
  }
  async function look() {
    if (!find('#admin').open || document.hidden) return;
    const answer = await fetch('/status').catch(Response.error);
    if (!answer.ok) {
      find('#facts').textContent = await answer.text() || say('silent');
      list('#browsers', []);
      return;
    }
    const { version, count, browsers, refusals, redis, asterisk } = await answer.json();
    const facts = [`popup-notifier ${version}`, `browsers: ${count}`];
    find('#facts').textContent = [...facts, redis, asterisk].filter(Boolean).join('\n');
    list('#browsers', browsers.map(({ address, extens, origin }) => (
      [address, extens.join(', ') || say('all'), origin])));
    list('#refusals', refusals.map(({ time, address, status: code, reason }) => (
      [clock(time), address, `${code} ${reason}`])));
  }
  find('#admin').ontoggle = look;
  setInterval(look, 5000);
</script>
<!-- /admin -->
"""


def desk_page(for_admin: bool) -> str:
    """Return the page, with or without the part for those who may trigger calls."""
    return DESK_PAGE if for_admin else ADMIN_PART.sub("", DESK_PAGE)


@lru_cache(maxsize=2)
def page_policy(page: str) -> str:
    """Return the Content-Security-Policy that admits the page's own script and style alone."""

    def hashes(tag: str) -> str:
        texts = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()) for text in texts]
        return " ".join(f"'sha256-{digest.decode()}'" for digest in digests)

    return (
        f"default-src 'none'; script-src 'self' {hashes('script')}; style-src {hashes('style')}; "
        "connect-src 'self' ws: wss:; img-src data:; manifest-src data:; base-uri 'none'; "
        "form-action 'self'; frame-ancestors 'none'"
    )


# --- 14. Command line --------------------------------------------------------------------------
#
# What main() needs: the log, limits, and Daemon, which starts, reloads and stops everything in the
# main thread. The log never blocks; only stop() is for other threads and signal handlers.

STDERR = 2
SERVICE_USER = "popup-notifier"  # of popup-notifier.service
TCP_LISTEN = "0A"  # a state in /proc/net/tcp
ANY_PAGE = "CRMWS_ORIGINS is empty: any page open on an admitted PC can listen"
MAX_FILES = 1 << 20  # open files we ask for at most: some systems have no limit but want one
BASE_FILES = 16  # descriptors for ourselves: listener, selectors, wakers, log, a file read
JOURNAL_PRIORITIES = {
    logging.DEBUG: 7,
    logging.INFO: 6,
    logging.WARNING: 4,
    logging.ERROR: 3,
    logging.CRITICAL: 2,
}


class JournalFormatter(logging.Formatter):
    """Begins every line with its priority, see sd-daemon(3); the journal adds the time."""

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
        self._descriptor = STDERR
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


def fill_standard_descriptors() -> None:
    """Open those of standard input, output and error that are closed: a socket would get them."""
    descriptor = STDERR
    while descriptor <= STDERR:
        descriptor = os.open(os.devnull, os.O_RDWR)
    os.close(descriptor)


def set_up_log() -> None:
    """Log to standard error, with the time unless it is the journal."""
    handler = LogHandler()
    is_for_journal = is_journal(STDERR)
    handler.setFormatter(JournalFormatter() if is_for_journal else TimeFormatter())
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    # Not to look up what no line shows halves the cost of a line.
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


def queue_sizes(limit: int, servers: int) -> list[int]:
    """Return the sizes of each server's queues under a limit of open files.

    They get at most a quarter of it: neither browsers nor slow peers can leave a trigger without
    a descriptor.
    """
    share = min((limit - BASE_FILES) / 4 / (sum(QUEUE_SIZES) * servers), 1)
    return [max(int(size * share), 1) for size in QUEUE_SIZES]


def make_queues(sizes: list[int]) -> Queues:
    """Return one server's queues."""
    timeouts = (REQUEST_TIMEOUT, REQUEST_TIMEOUT, REQUEST_TIMEOUT, DRAIN_TIMEOUT)
    return Queues(*map(DeadlineQueue, timeouts, sizes))


def bound_browsers(wanted: int, limit: int, waiting: int) -> int:
    """Return how many browsers a limit of open files allows; warn if they are not `wanted`."""
    allowed = max(limit - BASE_FILES - waiting, 1)
    if allowed < wanted:
        log.warning(
            "MAX_BROWSERS is %d, but the limit of %d open files allows %d: raise LimitNOFILE",
            wanted,
            limit,
            allowed,
        )
    return min(wanted, allowed)


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
    """Return the TLS context that a configuration asks for."""
    if not config.use_ssl or config.cert_file is None or config.key_file is None:
        return None
    return make_tls_context(config.cert_file, config.key_file)


class Daemon:
    """All that runs: the stream of calls, the Hub, a Server for each port, their Supervisor."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = self._load()
        self.manager = ServiceManager(os.environ)
        self.supervisor = Supervisor(on_failure=self.stop)
        tls = load_tls(self.config)
        ports: list[tuple[int, ssl.SSLContext | None]] = [(self.config.port, None)]
        if self.config.client_port is not None:
            ports.append((self.config.client_port, tls))
        self.file_limit = raise_file_limit()
        self.queue_sizes = queue_sizes(self.file_limit, len(ports))
        self.max_waiting = sum(self.queue_sizes) * len(ports)
        max_browsers = bound_browsers(self.config.max_browsers, self.file_limit, self.max_waiting)
        self.stream: Stream = LocalStream(self.config.history)
        if self.config.redis_url is not None:
            self.stream = RedisStream(self.config.redis_url, self.config.history)
        self.hub = Hub(self.config, max_browsers, self.stream)
        refusals = RefusalLog()
        self.servers = [self._listen(port, refusals, context) for port, context in ports]
        if self.config.ami_url is not None:
            asterisk = Asterisk(self.config.ami_url, self.config.ami_trunks, self.stream)
            for server in self.servers:
                server.asterisk = asterisk

    def _load(self) -> Config:
        """Return the configuration; log its warnings."""
        config, warnings = load_config(self.path)
        for warning in warnings:
            log.warning("%s", warning)
        return config

    def _listen(self, port: int, refusals: RefusalLog, tls: ssl.SSLContext | None) -> Server:
        """Return a server that listens; raises ConfigError with what to do about it."""
        try:
            queues = make_queues(self.queue_sizes)
            return Server(self.config, port, self.hub, self.supervisor, queues, refusals, tls)
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
            signal.signal(number, lambda *_: self.stop())
        signal.signal(signal.SIGHUP, lambda *_: main.loop.call_soon(self.reload))
        self.hub.start(self.supervisor)
        self.stream.start(self.supervisor, self.hub.deliver)
        if main.asterisk is not None:
            self.supervisor.run("asterisk", main.asterisk.run)
        for server in others:
            self.supervisor.run("clients", server.serve_forever, server.loop)
        self.supervisor.watch("main", main.loop)
        if self.manager.interval is not None:
            self.supervisor.run("watchdog", partial(self._report, self.manager.interval))
        self._log_start()
        self.manager.notify("READY=1")
        main.serve_forever()
        self.manager.notify("STOPPING=1")
        for server in others:
            server.shutdown()
        main.server_close()
        self.stream.close()
        self.hub.close()
        log.info("popup-notifier stopped")
        return 1 if self.supervisor.has_failed else 0

    def stop(self) -> None:
        """Let run() return. Any thread, and signal handlers."""
        self.servers[0].shutdown()

    def _report(self, interval: float) -> None:
        """Tell systemd every `interval` seconds how we are, unless a thread hangs."""
        while True:
            if not self.supervisor.stalled(interval):
                counts = f"{self.hub.count()} browsers connected, {self.hub.metrics.calls} calls"
                self.manager.notify(f"STATUS={counts} so far", "WATCHDOG=1")
            time.sleep(interval)

    def _log_start(self) -> None:
        config = self.config
        ports = f"port {config.port}"
        if config.client_port is not None:
            ports += f" and {'https' if config.use_ssl else 'http'} port {config.client_port}"
        log.info(
            "popup-notifier %s listens on %s, %s: triggers from %s, browsers from %s%s",
            VERSION,
            config.listen or "every address",
            ports,
            config.trigger_allow,
            config.crmws_allow,
            "" if config.crmws_origins.patterns else f"; {ANY_PAGE}",
        )

    def reload(self) -> None:
        """Read configuration and certificate again (SIGHUP); keep the old ones if they fail."""
        self.manager.notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            config = self._load()
            tls = load_tls(config) if self.config.use_ssl else None
        except ConfigError as error:
            for line in error.lines:
                log.error("%s", line)
            log.error("the configuration was not reloaded: the old one stays in force")
        else:
            self._apply_config(config, tls)
        self.manager.notify("READY=1")

    def _apply_config(self, config: Config, tls: ssl.SSLContext | None) -> None:
        """Use a reloaded configuration; Hub.reconfigure() closes browsers it does not admit."""
        for key in KEYS:
            old = getattr(self.config, key.name.lower())
            if key.needs_restart and old != getattr(config, key.name.lower()):
                log.warning("%s has changed: that needs a restart", key.name)
                unchanged: dict[str, Any] = {key.name.lower(): old}
                config = config._replace(**unchanged)
        self.config = config
        for server in self.servers:
            server.config = config
            # Connections keep the context that they began with, and the port its TLS.
            if server.tls is not None and tls is not None:
                server.tls = tls
        max_browsers = bound_browsers(config.max_browsers, self.file_limit, self.max_waiting)
        self.hub.reconfigure(config, max_browsers)
        log.info(
            "configuration reloaded: triggers from %s, browsers from %s",
            config.trigger_allow,
            config.crmws_allow,
        )


def check(path: Path) -> None:
    """Print what a configuration means; raises ConfigError when the service can't use it."""
    config, warnings = load_config(path)
    for line in describe_config(config):
        print(line)
    if not config.crmws_origins.patterns:
        warnings.append(ANY_PAGE)
    user = service_user()
    warnings += ports_taken(config, user.pw_uid if user else os.geteuid())
    for warning in warnings:
        log.warning("%s", warning)
    load_tls(config)
    if user and os.geteuid() == 0:
        files = [path]
        if config.use_ssl and config.cert_file and config.key_file:
            files += [config.cert_file, config.key_file]
        reader = f"user {user.pw_name}, whom the service runs as, cannot read it"
        hint = "give it to that group, with chgrp, and chmod g+r"
        unread = [f"{file}: {reader}: {hint}" for file in unreadable(user, files)]
        if unread:
            raise ConfigError(*unread)
    log.info("the configuration can be used")


def service_user() -> pwd.struct_passwd | None:
    """Return the user that the unit names, if there is one."""
    try:
        return pwd.getpwnam(SERVICE_USER)
    except KeyError:
        return None


def ports_taken(config: Config, own: int) -> Iterator[str]:
    """Yield which ports a program of another user than ours (`own`) listens on."""
    for name in ("PORT", "CLIENT_PORT"):
        port = getattr(config, name.lower())
        for uid in sorted(listeners(port) - {own}) if port else ():
            yield (
                f"{name}={port} is in use by a program of another user (uid {uid}): "
                f"'ss -ltnp sport = :{port}' shows by which"
            )


def listeners(port: int) -> set[int]:
    """Return the uids that listen on a TCP port (proc(5), /proc/net/tcp)."""
    users = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):  # IPv6 is off
            for line in Path("/proc/self/net", table).read_text().splitlines()[1:]:
                _, local, _, state, _, _, _, uid, *_ = line.split()
                if state == TCP_LISTEN and int(local.rpartition(":")[2], 16) == port:
                    users.add(int(uid))
    return users


def unreadable(user: pwd.struct_passwd, files: Iterable[Path]) -> list[Path]:
    """Return those files that a user can't open. Root only, while no thread runs."""
    groups = os.getgroups()
    os.setgroups(os.getgrouplist(user.pw_name, user.pw_gid))
    os.setegid(user.pw_gid)
    os.seteuid(user.pw_uid)
    try:
        return [path for path in files if not can_read(path)]
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)


def can_read(path: Path) -> bool:
    """Tell whether we can open a file; the folders above it may forbid it, too."""
    try:
        os.close(os.open(path, os.O_RDONLY))
    except OSError:
        return False
    return True


def main(args: list[str] | None = None) -> int:
    """Do what the command line says; return the exit status."""
    fill_standard_descriptors()
    options = parse_args(args)
    set_up_log()
    try:
        if options.check:
            check(options.config)
            return 0
        return Daemon(options.config).run()
    except ConfigError as error:
        for line in error.lines:
            log.error("%s", line)
        return 1


if __name__ == "__main__":
    sys.exit(main())
