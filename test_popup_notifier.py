#!/usr/bin/env python3
"""Tests of popup-notifier; run them with `python3 test_popup_notifier.py`.

The sections mirror the daemon's. The protocol is tested by bytes, all else from outside: the real
process, real sockets, real browsers. What needs a program that is not installed is skipped, and
says which; with POPUP_TEST_REQUIRE=1 it fails instead.
"""

from __future__ import annotations

import ast
import base64
import collections
import contextlib
import ctypes
import gc
import io
import itertools
import json
import math
import multiprocessing
import os
import queue
import random
import re
import resource
import select
import selectors
import shlex
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed, wait
from functools import partial
from html import escape
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from operator import attrgetter
from pathlib import Path
from typing import Any, Callable, ClassVar, NamedTuple, cast
from unittest import mock
from urllib.parse import quote

import popup_notifier
from popup_notifier import (
    CloseCode,
    ConfigError,
    Opcode,
    ProtocolError,
    RedisError,
    RequestError,
    WebSocketProtocol,
    check_handshake,
    parse_config,
    parse_head,
    parse_network,
    serialize_frame,
)

HERE = Path(__file__).resolve().parent
PROGRAM = HERE / "popup_notifier.py"
TIMEOUT = 20.0  # seconds for anything that must happen; reached only when it does not
TOKEN = "a-token-that-no-log-may-show"
CONFIG = {
    "SECRET_TOKEN": TOKEN,
    "TRIGGER_ALLOW": "127.0.0.1",
    "CRMWS_ALLOW": "127.0.0.0/24",
}


# --- Tools -------------------------------------------------------------------------------------


def needs(*programs: str) -> Callable[[Any], Any]:
    """Skip a test, aloud, where a program is missing; fail it where all must be installed."""
    missing = [name for name in programs if shutil.which(name) is None]
    if os.environ.get("POPUP_TEST_REQUIRE"):
        return lambda test: test
    return unittest.skipIf(missing, f"install {' and '.join(missing)} to run this")


def needs_root(test: Any) -> Any:
    """Skip a test that makes network namespaces where that is not allowed."""
    if os.environ.get("POPUP_TEST_REQUIRE"):
        return test
    return unittest.skipIf(os.geteuid() != 0, "run it as root: it makes network namespaces")(test)


def faketime() -> str:
    """Return the library that lets a process see another time."""
    command = ["faketime", "-f", "+0", "printenv", "LD_PRELOAD"]
    return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()


CLAIMS: collections.deque[int] = collections.deque()  # descriptors of the last ports' claims


def free_port() -> int:
    """Return a port that nobody listens on, below those that the kernel gives to connections.

    An abstract socket claims it from other runs of these tests until a daemon listens there.
    """
    while True:
        port = random.randrange(10000, 32000)
        with socket.socket(socket.AF_UNIX) as claim, socket.socket() as probe:
            with contextlib.suppress(OSError):
                claim.bind(f"\0popup-notifier-test-port-{port}")
                probe.bind(("", port))
                CLAIMS.append(claim.detach())
                if len(CLAIMS) > 50:
                    os.close(CLAIMS.popleft())
                return port


class Daemon:
    """The real process on a port of its own, and every line that it logs."""

    def __init__(
        self,
        *,
        text: str | None = None,
        program: str | Path = PROGRAM,
        reads_log: bool = True,
        command: Iterable[str] = (),
        environ: dict[str, str] | None = None,
        has_bug: bool = False,
        **keys: object,
    ) -> None:
        self.port = free_port()
        self._has_bug = has_bug  # a traceback must be in its log, not must not
        self.folder = tempfile.TemporaryDirectory()
        self.config = Path(self.folder.name, "popup-notifier.conf")
        self.config.touch(0o600)
        self.write_config(**keys) if text is None else self.config.write_text(text)
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self.process = subprocess.Popen(
            [*command, sys.executable, str(program), "--config", str(self.config)],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environ or {})},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reads_log = reads_log
        if reads_log:
            self._reader.start()

    def read_log(self) -> None:
        """Read the log that nobody has read so far."""
        self._reader.start()

    def write_config(self, **keys: object) -> None:
        """Write the configuration file anew."""
        values = {"PORT": self.port, **CONFIG, **keys}
        self.config.write_text("".join(f"{key}={value}\n" for key, value in values.items()))

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._changed:
                self.lines.append(line.rstrip("\n"))
                self._changed.notify_all()

    def __enter__(self) -> Daemon:
        with contextlib.ExitStack() as stack:
            stack.callback(self._end)
            if self._reads_log:
                self.wait_for_log("listens on")
            else:
                assert self.process.stderr is not None
                self.lines.append(self.process.stderr.readline())
            stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        log = "\n".join(self.lines)
        assert ("Traceback" in log) is self._has_bug, log
        assert TOKEN not in log, log

    def _end(self) -> None:
        try:
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGCONT)
                self.stop()
        finally:
            self.process.kill()
            self.process.wait()
            self._reader.join()
            assert self.process.stderr is not None
            self.process.stderr.close()
            self.folder.cleanup()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End the daemon; return its exit status."""
        self.process.send_signal(number)
        return self.process.wait(TIMEOUT)

    def wait_for_log(self, pattern: str, count: int = 1) -> list[str]:
        """Return the lines that hold the pattern once there are `count` of them."""
        deadline = time.monotonic() + TIMEOUT

        def found() -> list[str]:
            return [line for line in self.lines if re.search(pattern, line)]

        with self._changed:
            while len(found()) < count:
                if self.process.poll() is not None and not self._reader.is_alive():
                    raise AssertionError(f"the daemon ended: {self.lines}")
                if time.monotonic() > deadline:
                    raise AssertionError(f"{count} times {pattern!r} not in {self.lines[-20:]}")
                self._changed.wait(0.2)
            return found()

    def connect(
        self,
        host: str = "127.0.0.1",
        source: str = "",
        receive_buffer: int = 0,
        port: int | None = None,
    ) -> socket.socket:
        """Return a connection to the daemon."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = socket.socket(family)
        sock.settimeout(TIMEOUT)
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            # Segments on loopback are huge, and hide that a peer does not read.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1400)
        if source:
            sock.bind((source, 0))
        try:
            sock.connect((host, port or self.port))
        except OSError:
            sock.close()
            raise
        return sock

    def exchange(self, request: bytes, **options: Any) -> bytes:
        """Send bytes and return all that comes back until the daemon hangs up."""
        with self.connect(**options) as sock:
            with contextlib.suppress(ConnectionError):
                sock.sendall(request)
            return receive_all(sock)

    def trigger(self, query: str = "", phone: str = "0312345678", token: str = TOKEN) -> int:
        """Trigger a call; return the status."""
        target = f"/api/trigger?phone={phone}&token={token}{query}"
        answer = self.exchange(f"POST {target} HTTP/1.1\r\nHost: pbx\r\n\r\n".encode())
        return status_of(answer)

    def get(self, path: str, **options: Any) -> str:
        """Return the whole answer to a GET."""
        return self.exchange(
            f"GET {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode(), **options
        ).decode()

    def browser(self, query: str = "", **options: Any) -> Browser:
        """Return a connected browser."""
        sock = self.connect(**options)
        try:
            return Browser(sock, "/crmws" + query)
        except (OSError, EOFError, AssertionError):
            sock.close()
            raise

    def status(self, field: str) -> int:
        """Return a number from /proc/PID/status, such as VmRSS (in KiB) or Threads."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(text.partition(f"\n{field}:")[2].split()[0])

    def descriptors(self) -> int:
        """Return how many descriptors the daemon has open."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def cpu_seconds(self) -> float:
        """Return the CPU time that the daemon has used."""
        text = Path(f"/proc/{self.process.pid}/stat").read_text()
        user, system = text.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def metric(self, name: str) -> float:
        """Return a figure of /metrics."""
        answer = self.exchange(b"GET /metrics HTTP/1.1\r\nHost: h\r\n\r\n").decode()
        return float(answer.partition(f"\npopup_notifier_{name} ")[2].split()[0])

    def connected(self) -> int:
        """Return how many browsers the last line about browsers counts."""
        counts = [re.search(r"\((\d+) connected\)", line) for line in self.lines]
        return int([match[1] for match in counts if match][-1])


@contextlib.contextmanager
def patched(*statements: str) -> Iterator[Path]:
    """Give a program that is the daemon (p) after some statements, such as `p.LIMIT = 1`."""
    for name in re.findall(r"^p\.([\w.]+) =", "\n".join(statements), re.MULTILINE):
        attrgetter(name)(popup_notifier)  # AttributeError: the test's subject is missing
    head = f"import os, sys, threading, time\nsys.path.insert(0, {str(HERE)!r})\n"
    text = "\n".join(["import popup_notifier as p", *statements, "sys.exit(p.main())", ""])
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "patched.py")
        program.write_text(head + text)
        yield program


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for what gives no sign of itself, such as a count in /proc."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.01)


def receive_all(sock: socket.socket) -> bytes:
    """Return what arrives until the other side hangs up."""
    parts = []
    with contextlib.suppress(ConnectionError):
        while True:
            part = sock.recv(65536)
            if not part:
                break
            parts.append(part)
    return b"".join(parts)


def status_of(answer: bytes) -> int:
    """Return a response's status; 0 when there is none."""
    return int(answer.split()[1]) if answer.startswith(b"HTTP/1.1 ") else 0


def trigger_request(query: str, head: str, body: bytes) -> bytes:
    """Return the bytes of a trigger; {token} stands for the right one."""
    length = f"Content-Length: {len(body.replace(b'{token}', TOKEN.encode()))}\r\n" if body else ""
    text = f"POST /api/trigger{query} HTTP/1.1\r\nHost: pbx\r\n{head}{length}\r\n"
    return text.encode().replace(b"{token}", TOKEN.encode()) + body.replace(
        b"{token}", TOKEN.encode()
    )


KEY = base64.b64encode(b"0123456789abcdef").decode()
HANDSHAKE = (
    "GET {target} HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    f"Sec-WebSocket-Key: {KEY}\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


def handshake(target: str = "/crmws", host: str = "pbx") -> bytes:
    """Return the bytes of an opening handshake."""
    return HANDSHAKE.format(target=target, host=host).encode()


def masked(
    opcode: int, payload: bytes = b"", fin: bool = True, key: bytes = b"\x01\x02\x03\x04"
) -> bytes:
    """Return a frame as a browser sends it."""
    size = len(payload)
    head = bytes([(0x80 if fin else 0) | opcode])
    if size < 126:
        head += bytes([0x80 | size])
    elif size < 65536:
        head += bytes([0x80 | 126]) + struct.pack("!H", size)
    else:
        head += bytes([0x80 | 127]) + struct.pack("!Q", size)
    return head + key + popup_notifier.apply_mask(payload, key)


class Browser:
    """A browser as the wire sees it."""

    def __init__(self, sock: socket.socket, target: str = "/crmws", host: str = "pbx") -> None:
        self.sock = sock
        self.buffer = b""
        sock.sendall(handshake(target, host))
        while b"\r\n\r\n" not in self.buffer:
            self._more()
        head, self.buffer = self.buffer.split(b"\r\n\r\n", 1)
        self.head = head.decode()
        assert self.head.startswith("HTTP/1.1 101 "), self.head

    def _more(self) -> None:
        data = self.sock.recv(65536)
        if not data:
            raise EOFError
        self.buffer += data

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def frame(self) -> tuple[int, bytes]:
        """Return the next frame's opcode and payload; EOFError when there is none."""
        while True:
            if len(self.buffer) >= 2:
                size = self.buffer[1]
                head = 2
                if size >= 126:
                    head = 4 if size == 126 else 10
                    size = int.from_bytes(self.buffer[2:head], "big")
                if len(self.buffer) >= max(head + size, head):
                    first, payload = self.buffer[0], self.buffer[head : head + size]
                    assert first & 0xF0 == 0x80, hex(first)
                    self.buffer = self.buffer[head + size :]
                    return first & 0x0F, payload
            self._more()

    def message(self) -> dict[str, Any]:
        """Return the next text message, answering pings."""
        while True:
            opcode, payload = self.frame()
            if opcode == Opcode.PING:
                self.send(Opcode.PONG, payload)
            elif opcode == Opcode.TEXT:
                message = dict(json.loads(payload))
                if message.get("type") != "ALIVE":
                    return message
            else:
                raise AssertionError(f"frame {opcode}: {payload!r}")

    def hello(self) -> dict[str, Any]:
        """Return the HELLO that a browser gets which recovers."""
        message = self.message()
        assert message["type"] == "HELLO", message
        return message

    def phones(self, count: int) -> list[str]:
        """Return the numbers of the next calls."""
        return [self.message()["phone"] for _ in range(count)]

    def send(self, opcode: int, payload: bytes = b"", fin: bool = True) -> None:
        """Send a frame."""
        self.sock.sendall(masked(opcode, payload, fin))

    def closed_with(self) -> tuple[int, str]:
        """Return the code and reason of the Close that comes; the connection must end then."""
        while True:
            opcode, payload = self.frame()
            if opcode == Opcode.CLOSE:
                break
        self.send(Opcode.CLOSE, payload[:2])
        assert receive_all(self.sock) == b"", "something behind Close"
        return int.from_bytes(payload[:2], "big"), payload[2:].decode()


def call_id(message: dict[str, Any]) -> tuple[int, ...]:
    """Return a message's ID so that it compares."""
    return tuple(map(int, message["id"].split("-")))


def reset(sock: socket.socket) -> None:
    """Close a connection by RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def wait_for_reset(sock: socket.socket) -> None:
    """Wait until a connection is gone, whether or not what came before was read."""
    poll = select.poll()
    poll.register(sock, 0)
    assert poll.poll(TIMEOUT * 1000), "the connection stands"


def readme_halves() -> list[str]:
    """Return the README's halves, Japanese and English."""
    return (HERE / "README.md").read_text().split("\n# English\n")


def documents() -> dict[str, tuple[str, str]]:
    """Return the README and its longer pages by name, each in Japanese and English."""
    japanese, english = readme_halves()
    pages = {"README.md": (japanese, english)}
    for path in sorted((HERE / ".readme").glob("*.ja.md")):
        name = path.name.removesuffix(".ja.md")
        pages[name] = path.read_text(), path.with_name(f"{name}.en.md").read_text()
    return pages


def readme_blocks(language: str) -> list[str]:
    """Return the code blocks in a language, of the README and then its pages."""
    text = "".join(japanese for japanese, _ in documents().values())
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


# --- 1. Configuration --------------------------------------------------------------------------

GO_CONFIG_1 = """\
# listenするポート番号。デフォルトは8080。
PORT=8989

# triggerを使用する際のtoken
SECRET_TOKEN=mytoken

#ACL設定。デフォルト挙動は全てdenyなので注意。
#ACLを設定しないとどこからも接続できない。

# /api/trigger の許可リスト
# 複数のIP/CIDRをカンマ区切りで
# 例:ローカルホストのみ許可
TRIGGER_ALLOW=127.0.0.1

# /crmws (WebSocket) の許可リスト
# 例: ローカルホストと社内LAN全体を許可
CRMWS_ALLOW=127.0.0.1,192.168.0.0/16
"""

# A configuration of the Go daemon's second version, with a port for browsers.
GO_CONFIG_2 = """
# トリガー用ポート (HTTP)
HTTP_PORT=8989
# クライアント用ポート (WS/WSS)
WSS_PORT=8990
USE_SSL=false
CERT_FILE=/etc/ssl/certs/server.crt
KEY_FILE=/etc/ssl/private/server.key
SECRET_TOKEN=mytoken
TRIGGER_ALLOW=127.0.0.1
CRMWS_ALLOW=127.0.0.1,192.168.0.0/16
"""

# (what stands in the file, what the error must say)
CONFIG_MISTAKES = [
    ("", "SECRET_TOKEN is missing"),
    ("SECRET_TOKEN=", "SECRET_TOKEN: must be"),
    ("SECRET_TOKEN=to ken", "SECRET_TOKEN: must be"),
    ("SECRET_TOKEN=日本", "SECRET_TOKEN: must be"),
    ("SECRET_TOKEN", '"SECRET_TOKEN" begins a line that is not KEY=value'),
    ("PORT=80a", 'f:2: PORT: "80a" is not a whole number from 1 to 65535'),
    ("PORT=0", 'PORT: "0" is not'),
    ("PORT=65536", 'PORT: "65536" is not'),
    ("PORT=８９８９", 'PORT: "８９８９" is not'),
    ("HTTP_PORT=", 'HTTP_PORT: "" is not'),
    ("LISTEN=localhost", 'LISTEN: "localhost" is not an IP address'),
    ("TRIGGER_ALLOW=10.0.0.300", 'TRIGGER_ALLOW: "10.0.0.300" holds "10.0.0.300", no IP'),
    (
        "TRIGGER_ALLOW=192.168.1.5/24",
        "write 192.168.1.0/24 for the network, as the Go daemon took it, or 192.168.1.5 for",
    ),
    ("TRIGGER_ALLOW=127.0.0.1;10.0.0.1", "no IP address or CIDR network"),
    ("CRMWS_ALLOW=::ffff:10.0.0.0/104", "write it as 10.0.0.0/8"),
    ("CRMWS_ALLOW=::ffff:10.0.0.7", "write it as 10.0.0.7/32"),
    ("PING_INTERVAL=0", 'PING_INTERVAL: "0" is not'),
    ("PING_INTERVAL=2.5", 'PING_INTERVAL: "2.5" is not'),
    ("MAX_BROWSERS=-1", 'MAX_BROWSERS: "-1" is not'),
    ("HISTORY=1d", 'HISTORY: "1d" is not'),
    ("USE_SSL=maybe", 'USE_SSL: "maybe" is neither yes nor no (the Go daemon took it for no)'),
    ("USE_SSL=", 'USE_SSL: "" is neither yes nor no'),
    ("CERT_FILE=cert.pem", 'CERT_FILE: "cert.pem" is not an absolute path such as /etc/'),
    ('PORT="8989"', "from 1 to 65535; write it without quotes"),
    ("CRMWS_ALLOW='10.0.0.1'", "CIDR network (a comma between two); write it without quotes"),
    ("port 8989", "the line is not KEY=value; a comment begins with #"),
    ("CRMWS_ORIGINS=crm.example.com", 'holds "crm.example.com", no origin'),
    ("CRMWS_ORIGINS=https://crm.example.com/", "no origin like https://crm.example.com (no path)"),
    ("CRMWS_ORIGINS=https://*.*.example.com", "no origin"),
    ("OPEN_URL=javascript:alert(1)", "is not an address like https://crm.example.com/"),
    ("OPEN_URL=//crm.example/{phone}", "is not an address like"),
    ("OPEN_URL=https://{phone}.example/", "is not an address like"),
    ("OPEN_URL=https://crm.example/a b", "is not an address like"),
    ("OPEN_URL=https://crm.example/?q={number}", "holds {number}, which is none of {phone},"),
    ("AMI_TRUNKS=a-b, PJSIP/x-y-0000001a", 'of a channel; its trunk is "PJSIP/x-y"'),
    ("TRUSTED_PROXIES=nginx", 'holds "nginx", no IP address'),
    ("SECRET_TOKEN=t\nCLIENT_PORT=8080", "CLIENT_PORT: 8080 is PORT already"),
    ("SECRET_TOKEN=t\nUSE_SSL=yes", "USE_SSL needs KEY_FILE, which is missing"),
    (
        "SECRET_TOKEN=t\nUSE_SSL=true",
        "USE_SSL is for CLIENT_PORT, which is missing (the Go daemon's was 8990)",
    ),
    ("MAX_BROWSERS=many\x07", r'MAX_BROWSERS: "many\x07" is not'),
]


class TestConfig(unittest.TestCase):
    """The configuration file."""

    def parse(self, text: str | bytes) -> tuple[popup_notifier.Config, list[str]]:
        return parse_config(text.encode() if isinstance(text, str) else text, "f")

    def test_configuration_of_the_go_daemon_with_one_port(self) -> None:
        config, oddities = self.parse(GO_CONFIG_1)
        self.assertEqual((config.port, config.secret_token), (8989, "mytoken"))
        self.assertEqual(str(config.trigger_allow), "127.0.0.1/32")
        self.assertEqual(str(config.crmws_allow), "127.0.0.1/32, 192.168.0.0/16")
        self.assertEqual(oddities, [])

    def test_keys_that_are_not_given_have_their_defaults(self) -> None:
        config, _ = self.parse("SECRET_TOKEN=t")
        self.assertEqual((config.port, config.listen), (8080, None))
        self.assertEqual((config.ping_interval, config.max_browsers), (25, 10000))
        self.assertEqual(config.history, 60)
        self.assertFalse(config.trigger_allow.allows(ip_address("127.0.0.1")))
        self.assertFalse(config.crmws_allow.allows(ip_address("::1")))

    def test_numbers_outside_their_bounds_are_refused(self) -> None:
        for name, low, high in (
            ("PORT", 1, 65535),
            ("CLIENT_PORT", 1, 65535),
            ("PING_INTERVAL", 1, 3600),
            ("MAX_BROWSERS", 1, 1_000_000),
            ("HISTORY", 0, 86400),
        ):
            for number in (low, high):
                config, _ = self.parse(f"SECRET_TOKEN=t\n{name}={number}")
                self.assertEqual(getattr(config, name.lower()), number)
            for number in (low - 1, high + 1):
                with self.subTest(name, number=number), self.assertRaises(ConfigError):
                    self.parse(f"SECRET_TOKEN=t\n{name}={number}")

    def test_yes_and_no_may_be_said_in_several_words(self) -> None:
        files = "CLIENT_PORT=1\nCERT_FILE=/c\nKEY_FILE=/k"
        for words, expected in (("yes true 1 on YES", True), ("no false 0 off No", False)):
            for word in words.split():
                with self.subTest(word):
                    config, _ = self.parse(f"SECRET_TOKEN=t\nUSE_SSL={word}\n{files}")
                    self.assertIs(config.use_ssl, expected)

    def test_any_encoding_of_comments_and_any_line_end_can_be_read(self) -> None:
        for label, data in [
            ("BOM", b"\xef\xbb\xbfPORT=81\nSECRET_TOKEN=t\n"),
            ("CR LF", b"PORT=81\r\nSECRET_TOKEN=t\r\n"),
            ("no line end", b"SECRET_TOKEN=t\nPORT=81"),
            ("blanks", b"  PORT = 81 \n\tSECRET_TOKEN=t\n"),
            ("Shift_JIS comment", "# 設定\nPORT=81\nSECRET_TOKEN=t".encode("shift_jis")),
            ("EUC-JP comment", "# 設定\nPORT=81\nSECRET_TOKEN=t".encode("euc_jp")),
            ("alias", b"HTTP_PORT=81\nSECRET_TOKEN=t\nCLIENT_PORT="),
        ]:
            with self.subTest(label):
                config, oddities = self.parse(data)
                self.assertEqual((config.port, config.secret_token, oddities), (81, "t", []))

    def test_token_may_hold_equal_and_number_signs(self) -> None:
        self.assertEqual(self.parse("SECRET_TOKEN=a=b#c")[0].secret_token, "a=b#c")

    def test_mistakes_name_line_key_and_value(self) -> None:
        for text, expected in CONFIG_MISTAKES:
            with self.subTest(text), self.assertRaises(ConfigError) as caught:
                self.parse("# f\n" + text)
            self.assertIn(expected, "\n".join(caught.exception.lines))

    def test_all_mistakes_are_named_at_once(self) -> None:
        with self.assertRaises(ConfigError) as caught:
            self.parse("PORT=x\nLISTEN=y\n")
        self.assertEqual(len(caught.exception.lines), 3)

    def test_mistake_in_a_secret_does_not_show_it(self) -> None:
        for text in (
            "SECRET_TOKEN=geheim geheim",
            "SECRET_TOKEN geheim",
            "SECRET_TOKEN:geheim",
            "SECRET_TOKEN: geheim=geheim",
            "geheim",
            b"SECRET_TOKEN=geheim\xff",
        ):
            with self.subTest(text), self.assertRaises(ConfigError) as caught:
                self.parse(text)
            self.assertNotIn("geheim", str(caught.exception))

    def test_unknown_and_repeated_keys_are_warned_of(self) -> None:
        _, oddities = self.parse("SECRET_TOKEN=t\nPORT=1\nPROT=2\nPORT=3\nwhat=4")
        self.assertEqual(
            oddities,
            [
                'f:3: "PROT" is not a key and is ignored; did you mean PORT?',
                "f:4: PORT is given again; line 2 does not count",
                'f:5: "what" is not a key and is ignored',
            ],
        )

    def test_quotes_around_a_token_are_warned_of(self) -> None:
        for sign in ("'", '"'):
            config, oddities = self.parse(f"SECRET_TOKEN={sign}geheim{sign}")
            self.assertEqual(config.secret_token, f"{sign}geheim{sign}")
            self.assertEqual(oddities, ["f:1: SECRET_TOKEN: the quotes are part of the value"])
        for token in ('"', "'geheim", "a'b'"):
            self.assertEqual(self.parse(f"SECRET_TOKEN={token}")[1], [])

    def test_configuration_of_the_go_daemon_with_two_ports(self) -> None:
        config, oddities = self.parse(GO_CONFIG_2)
        self.assertEqual((config.port, config.client_port), (8989, 8990))
        self.assertEqual(config.secret_token, "mytoken")
        self.assertEqual(oddities, [])
        for word, is_on in (("true", True), ("1", True), ("YES", True), ("false", False)):
            config, _ = self.parse(GO_CONFIG_2.replace("=false", f"={word}"))
            self.assertEqual(config.use_ssl, is_on)
            self.assertEqual(str(config.cert_file), "/etc/ssl/certs/server.crt")

    def test_defaults_of_the_go_daemon_are_named(self) -> None:
        browsers = "f: CLIENT_PORT is missing: the Go daemon had browsers at CLIENT_PORT=8990 then"
        triggers = "f: PORT is missing and is 8080: the Go daemon had triggers at PORT=8989 then"
        for lines, expected in (
            ("", []),
            ("PORT=8989", []),
            ("PORT=8989\nCLIENT_PORT=8990", []),
            ("HTTP_PORT=8989", [browsers]),
            ("PORT=8989\nUSE_SSL=false", [browsers]),
            ("WSS_PORT=8990", [triggers]),
        ):
            with self.subTest(lines):
                self.assertEqual(self.parse(f"SECRET_TOKEN=t\n{lines}")[1], expected)


# (URL, address, TLS, login, database, stream)
GOOD_URLS: list[tuple[str, Any, bool, tuple[str, ...], int, str]] = [
    ("redis://h", ("h", 6379), False, (), 0, "popup-notifier"),
    ("redis://h:1/2", ("h", 1), False, (), 2, "popup-notifier"),
    ("rediss://:p@h/", ("h", 6379), True, ("p",), 0, "popup-notifier"),
    ("redis://u:p%40%2F%25@[::1]:7/3", ("::1", 7), False, ("u", "p@/%"), 3, "popup-notifier"),
    ("redis://h?stream=calls", ("h", 6379), False, (), 0, "calls"),
    ("unix:///run/r.sock", "/run/r.sock", False, (), 0, "popup-notifier"),
    ("unix://u:p@/run/r.sock?db=4", "/run/r.sock", False, ("u", "p"), 4, "popup-notifier"),
]

BAD_URLS = [
    ("h:6379", "does not begin with"),
    ("http://h", "does not begin with"),
    ("redis://", "names no host"),
    ("redis://redis..local", "percent form"),
    ("redis://h:x", "percent form"),
    ("redis://h:99999", "percent form"),
    ("redis://:geheim/geheim@h", "percent form"),
    ("redis://[::1", "percent form"),
    ("redis://h/x", "number of a database"),
    ("redis://h/0?geheim=1", "something unknown"),
    ("redis://h/0#geheim", "something unknown"),
    ("redis://h/0?stream=", "something unknown"),
    ("redis://h/0?geheim=", "something unknown"),
    ("redis://geheim@h", "user without a password"),
    ("unix://run/r.sock", "is not unix:///"),
    ("unix:///run/r.sock?db=x", "number of a database"),
]


class TestRedisURL(unittest.TestCase):
    """REDIS_URL."""

    def test_url_says_where_redis_is_and_who_we_are_there(self) -> None:
        for text, *expected in GOOD_URLS:
            with self.subTest(text):
                self.assertEqual([*popup_notifier.parse_redis_url(text)], expected)

    def test_bad_url_is_a_mistake_that_shows_no_password(self) -> None:
        for text, expected in BAD_URLS:
            with self.subTest(text), self.assertRaises(ConfigError) as caught:
                parse_config(f"SECRET_TOKEN=t\nREDIS_URL={text}".encode(), "f")
            self.assertIn("f:2: REDIS_URL: ", str(caught.exception))
            self.assertIn(expected, str(caught.exception))
            self.assertNotIn("geheim", str(caught.exception))


# (URL, host, port, user, secret)
GOOD_MANAGER_URLS = [
    ("ami://popup:secret@127.0.0.1", "127.0.0.1", 5038, "popup", "secret"),
    ("AMI://u:p%40%2F%25%3A@[::1]:7/", "::1", 7, "u", "p@/%:"),
]

BAD_MANAGER_URLS = [
    ("127.0.0.1:5038", "does not begin with ami://"),
    ("amis://u:geheim@h", "there is no TLS"),
    ("ami://u:geheim", "is not a URL that can be read"),
    ("ami://h", "is not ami://user:secret@host:port"),
    ("ami://geheim@h", "is not ami://user:secret@host:port"),
    ("ami://u:geheim@h/geheim", "is not ami://user:secret@host:port"),
    ("ami://u:ge#heim@h", "percent form"),
    ("ami://u:geheim@h:x", "percent form"),
    ("ami://u:geheim%0d%0aAction:%20Logoff@h", "a line end"),
    ("ami://u%0a:geheim@h", "a line end"),
]


class TestManagerURL(unittest.TestCase):
    """AMI_URL and AMI_TRUNKS."""

    def parse(self, text: str) -> popup_notifier.Config:
        return parse_config(f"SECRET_TOKEN=t\n{text}".encode(), "f")[0]

    def test_url_says_where_asterisk_is_and_who_we_are_there(self) -> None:
        for text, *expected in GOOD_MANAGER_URLS:
            with self.subTest(text):
                self.assertEqual([*popup_notifier.parse_manager_url(text)], expected)

    def test_bad_url_is_a_mistake_that_shows_no_secret(self) -> None:
        for text, expected in BAD_MANAGER_URLS:
            with self.subTest(text), self.assertRaises(ConfigError) as caught:
                self.parse(f"AMI_TRUNKS=p\nAMI_URL={text}")
            self.assertIn("f:3: AMI_URL: ", str(caught.exception))
            self.assertIn(expected, str(caught.exception))
            self.assertNotIn("heim", str(caught.exception))

    def test_ami_url_needs_ami_trunks_and_the_reverse(self) -> None:
        with self.assertRaisesRegex(ConfigError, "AMI_URL needs .* AMI_TRUNKS=provider for"):
            self.parse("AMI_URL=ami://u:p@h")
        with self.assertRaisesRegex(ConfigError, "AMI_TRUNKS is for AMI_URL, which is missing"):
            self.parse("AMI_TRUNKS=provider")

    def test_check_shows_user_address_and_trunks_but_no_secret(self) -> None:
        config = self.parse("AMI_URL=ami://u:geheim@[::1]\nAMI_TRUNKS= B-2, a")
        lines = [*popup_notifier.describe_config(config)]
        self.assertIn("AMI_URL=u@[::1]:5038", lines)
        self.assertIn("AMI_TRUNKS=a,b-2", lines)


# --- 2. Access lists ---------------------------------------------------------------------------

# (list, peer, allowed)
ACCESS = [
    ("", "127.0.0.1", False),
    (" , ", "127.0.0.1", False),
    ("127.0.0.1", "127.0.0.1", True),
    ("127.0.0.1", "127.0.0.2", False),
    ("127.0.0.1", "::1", True),
    ("127.0.0.1", "::ffff:127.0.0.1", True),
    ("127.0.0.1", "::2", False),
    ("::1", "::1", True),
    ("::1", "127.0.0.1", False),
    ("127.0.0.0/8", "::1", True),
    ("10.0.0.0/8", "::ffff:10.1.2.3", True),
    ("10.0.0.0/8", "11.0.0.1", False),
    ("192.168.0.0/16, 10.1.1.1", "10.1.1.1", True),
    ("192.168.0.0/16,10.1.1.1", "192.168.255.255", True),
    ("192.168.0.0/16,10.1.1.1", "192.169.0.0", False),
    ("0.0.0.0/0", "203.0.113.9", True),
    ("0.0.0.0/0", "2001:db8::1", False),
    ("2001:db8::/32", "2001:db8::1", True),
    ("fe80::/10", "fe80::1%eth0", True),
]


class TestAccessList(unittest.TestCase):
    """Who may do what."""

    def test_addresses_in_a_network_of_the_list_are_allowed(self) -> None:
        for text, peer, allowed in ACCESS:
            with self.subTest(list=text, peer=peer):
                networks = popup_notifier.parse_networks(text)
                self.assertIs(networks.allows(popup_notifier.peer_address(peer)), allowed)

    def test_mapped_network_below_96_bits_is_refused(self) -> None:
        # Read as IPv4 it would be everybody.
        with self.assertRaises(ValueError):
            parse_network("::ffff:0:0/90")


# (peer, X-Forwarded-For, trusted proxies, who it is; None: refused)
FORWARDED: list[tuple[str, str | None, str, str | None]] = [
    ("10.0.0.1", None, "", "10.0.0.1"),
    ("10.0.0.1", "192.0.2.7", "", "10.0.0.1"),
    ("10.0.0.1", "192.0.2.7", "10.0.0.2", "10.0.0.1"),
    ("10.0.0.1", None, "10.0.0.1", "10.0.0.1"),
    ("10.0.0.1", "192.0.2.7", "10.0.0.1", "192.0.2.7"),
    ("10.0.0.1", "127.0.0.1, 192.0.2.7", "10.0.0.1", "192.0.2.7"),
    ("10.0.0.1", "192.0.2.7,10.0.0.2", "10.0.0.0/8", "192.0.2.7"),
    ("10.0.0.1", "192.0.2.7, 198.51.100.1, 10.0.0.2", "10.0.0.0/8", "198.51.100.1"),
    ("10.0.0.1", "10.0.0.3, 10.0.0.2", "10.0.0.0/8", "10.0.0.3"),
    ("10.0.0.1", "::ffff:192.0.2.7", "10.0.0.1", "192.0.2.7"),
    ("::1", "2001:db8::7", "127.0.0.1", "2001:db8::7"),
    ("10.0.0.1", "", "10.0.0.1", None),
    ("10.0.0.1", "unknown", "10.0.0.1", None),
    ("10.0.0.1", "192.0.2.7,", "10.0.0.1", None),
    ("10.0.0.1", "garbage, 192.0.2.7", "10.0.0.1", "192.0.2.7"),
]

# (list, Origin, allowed)
ORIGINS: list[tuple[str, str | None, bool]] = [
    ("", "https://anything.example", True),
    ("", "null", True),
    ("https://crm.example.com", None, True),
    ("https://crm.example.com", "https://crm.example.com", True),
    ("https://crm.example.com", "https://CRM.example.com", True),
    ("https://crm.example.com", "https://crm.example.com:443", True),
    ("https://crm.example.com:443", "https://crm.example.com", True),
    ("https://crm.example.com", "https://crm.example.com:8443", False),
    ("https://crm.example.com", "http://crm.example.com", False),
    ("https://crm.example.com", "https://crm.example.com.evil.example", False),
    ("https://crm.example.com", "https://evilcrm.example.com", False),
    ("https://crm.example.com", "null", False),
    ("https://crm.example.com, null", "null", True),
    ("https://*.example.com", "https://a.example.com", True),
    ("https://*.example.com", "https://a.b.example.com", False),
    ("https://*.example.com", "https://example.com", False),
    ("https://*.example.com", "https://aexample.com", False),
    ("http://*.example.com:81", "http://a.example.com:81", True),
    ("http://*.example.com:81", "http://a.example.com", False),
    ("http://crm:80", "http://crm", True),
    ("http://[::1]:81", "http://[::1]:81", True),
]


class TestClientAddress(unittest.TestCase):
    """X-Forwarded-For, believed only from trusted proxies."""

    def test_x_forwarded_for_is_believed_of_trusted_proxies_alone(self) -> None:
        for peer, forwarded, proxies, expected in FORWARDED:
            with self.subTest(peer=peer, forwarded=forwarded, proxies=proxies):
                arguments = (ip_address(peer), forwarded, popup_notifier.parse_networks(proxies))
                if expected is None:
                    with self.assertRaises(RequestError):
                        popup_notifier.client_address(*arguments)
                else:
                    address = popup_notifier.client_address(*arguments)
                    self.assertEqual(address, ip_address(expected))

    def test_access_lists_apply_to_the_address_behind_the_proxy(self) -> None:
        with Daemon(TRIGGER_ALLOW="192.0.2.7", TRUSTED_PROXIES="127.0.0.8") as daemon:
            for forwarded, source, status in [
                ("192.0.2.7", "127.0.0.8", 200),
                ("192.0.2.8", "127.0.0.8", 403),
                ("192.0.2.7\r\nX-Forwarded-For: 192.0.2.8", "127.0.0.8", 403),
                ("192.0.2.8\r\nX-Forwarded-For: 192.0.2.7", "127.0.0.8", 200),
                ("192.0.2.7", "127.0.0.1", 403),
            ]:
                with self.subTest(forwarded, source=source):
                    head = f"X-Forwarded-For: {forwarded}\r\n"
                    request = trigger_request("?phone=1&token={token}", head, b"")
                    answer = daemon.exchange(request, source=source)
                    self.assertEqual(status_of(answer), status)
            daemon.wait_for_log("call .* from 192.0.2.7 to 0 browsers")
            lines = daemon.wait_for_log("a proxy at 127.0.0.1 sends X-Forwarded-For but is not in")
            self.assertEqual(len(lines), 1)

    def test_misconfigured_proxy_is_warned_of_once(self) -> None:
        with Daemon() as daemon:
            request = trigger_request(
                "?phone=1&token={token}", "X-Forwarded-For: 1.2.3.4\r\n", b""
            )
            for _ in range(3):
                self.assertEqual(status_of(daemon.exchange(request)), 200)
            daemon.wait_for_log("call ", 3)
            self.assertEqual(len(daemon.wait_for_log("not in TRUSTED_PROXIES")), 1)


class TestOrigins(unittest.TestCase):
    """Whose pages may connect."""

    def test_origins_that_match_an_entry_or_pattern_are_allowed(self) -> None:
        for text, origin, allowed in ORIGINS:
            with self.subTest(list=text, origin=origin):
                self.assertIs(popup_notifier.parse_origins(text).allows(origin), allowed)

    def test_foreign_page_is_refused(self) -> None:
        with Daemon(CRMWS_ORIGINS="https://crm.example.com") as daemon:
            for origin, status in (
                ("https://crm.example.com", 101),
                ("https://evil.example", 403),
            ):
                request = handshake()[:-2] + f"Origin: {origin}\r\n\r\n".encode()
                with daemon.connect() as sock:
                    sock.sendall(request)
                    self.assertEqual(status_of(sock.recv(4096)), status)
            daemon.wait_for_log('403 origin "https://evil.example" is not in CRMWS_ORIGINS')


# --- 3. WebSocket ------------------------------------------------------------------------------

GOOD_HANDSHAKE = {
    "upgrade": "websocket",
    "connection": "Upgrade",
    "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
    "sec-websocket-version": "13",
}

# (fields that differ, status)
HANDSHAKES = [
    ({}, 101),
    ({"upgrade": "WebSocket"}, 101),
    ({"connection": "keep-alive, Upgrade"}, 101),
    ({"connection": "keep-alive,UPGRADE ,x"}, 101),
    ({"upgrade": "h2c, websocket"}, 101),
    ({"upgrade": "websocketx"}, 426),
    ({"upgrade": ""}, 426),
    ({"connection": "keep-alive"}, 426),
    ({"connection": "Upgraded"}, 426),
    ({"sec-websocket-version": "8"}, 426),
    ({"sec-websocket-version": "13, 8"}, 426),
    ({"sec-websocket-version": ""}, 426),
    ({"sec-websocket-key": ""}, 400),
    ({"sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ"}, 400),
    ({"sec-websocket-key": "dGhlIHNhbXBsZSBub25jZSE="}, 400),
    ({"sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==, dGhlIHNhbXBsZSBub25jZQ=="}, 400),
]

TEXT = "日本語😀"
LONG = b"x" * 126
VERY_LONG = b"y" * 65536

# (what it is, bytes from the browser, events, bytes back)
GOOD_STREAMS: list[tuple[str, bytes, list[tuple[int, bytes]], bytes]] = [
    ("text", masked(1, b"hello"), [(1, b"hello")], b""),
    ("empty text", masked(1), [(1, b"")], b""),
    ("UTF-8", masked(1, TEXT.encode()), [(1, TEXT.encode())], b""),
    ("binary", masked(2, b"\x00\xff"), [(2, b"\x00\xff")], b""),
    ("16-bit length", masked(2, LONG), [(2, LONG)], b""),
    ("64-bit length", masked(2, VERY_LONG), [(2, VERY_LONG)], b""),
    (
        "fragments",
        masked(1, b"a", False) + masked(0, b"b", False) + masked(0, b"c"),
        [(1, b"abc")],
        b"",
    ),
    (
        "empty fragments",
        masked(1, b"", False) + masked(0, b"", False) + masked(0),
        [(1, b"")],
        b"",
    ),
    (
        "a character over two fragments",
        masked(1, TEXT.encode()[:4], False) + masked(0, TEXT.encode()[4:]),
        [(1, TEXT.encode())],
        b"",
    ),
    ("ping", masked(9, b"!"), [(9, b"!")], b"\x8a\x01!"),
    ("longest ping", masked(9, b"p" * 125), [(9, b"p" * 125)], b"\x8a\x7d" + b"p" * 125),
    ("pong nobody asked for", masked(10, b"?"), [(10, b"?")], b""),
    (
        "control frames between fragments",
        masked(1, b"a", False) + masked(9, b"1") + masked(10) + masked(0, b"b"),
        [(9, b"1"), (10, b""), (1, b"ab")],
        b"\x8a\x011",
    ),
    ("close", masked(8), [(8, b"")], b"\x88\x00"),
    ("close with code", masked(8, b"\x03\xe8bye"), [(8, b"\x03\xe8bye")], b"\x88\x02\x03\xe8"),
    ("nothing counts behind close", masked(8) + b"\xff\xff" + masked(9), [(8, b"")], b"\x88\x00"),
]

# (what it is, bytes from the browser, close code that fails the connection)
BAD_STREAMS = [
    ("not masked", b"\x81\x01a", 1002),
    ("not masked, and zeros behind", b"\x81\x00\0\0\0\0", 1002),
    ("RSV1", b"\xc1\x80\0\0\0\0", 1002),
    ("RSV2", b"\xa1\x80\0\0\0\0", 1002),
    ("RSV3", b"\x91\x80\0\0\0\0", 1002),
    *[
        (f"opcode {code}", bytes([0x80 | code, 0x80, 0, 0, 0, 0]), 1002)
        for code in (3, 4, 5, 6, 7)
    ],
    *[(f"opcode {code}", bytes([0x80 | code, 0x80, 0, 0, 0, 0]), 1002) for code in range(11, 16)],
    ("ping in fragments", masked(9, b"a", False), 1002),
    ("ping too long", b"\x89\xfe\x00\x7e" + b"\0" * 4, 1002),
    ("continuation of nothing", masked(0, b"a"), 1002),
    ("continuation behind a message", masked(1, b"a") + masked(0, b"a"), 1002),
    ("message in a message", masked(1, b"a", False) + masked(1, b"b"), 1002),
    ("16-bit length for 125", b"\x82\xfe\x00\x7d" + b"\0" * 4, 1002),
    ("64-bit length for 65535", b"\x82\xff" + struct.pack("!Q", 65535) + b"\0" * 4, 1002),
    ("64-bit length with its top bit", b"\x82\xff" + b"\x80" + b"\0" * 11, 1002),
    ("bad UTF-8", masked(1, b"\xff"), 1007),
    ("overlong UTF-8", masked(1, b"\xc0\xaf"), 1007),
    ("surrogate in UTF-8", masked(1, b"\xed\xa0\x80"), 1007),
    ("beyond Unicode", masked(1, b"\xf4\x90\x80\x80"), 1007),
    ("half a character at the end", masked(1, b"\xe6\x97"), 1007),
    (
        "half a character at the end of fragments",
        masked(1, b"\xe6", False) + masked(0, b"\x97"),
        1007,
    ),
    ("over the limit", b"\x82\xff" + struct.pack("!Q", (1 << 16) + 1) + b"\0" * 4, 1009),
    ("over the limit in fragments", masked(2, VERY_LONG, False) + masked(0, b"1"), 1009),
    ("close with one byte", masked(8, b"\x03"), 1002),
    *[
        (f"close with {code}", masked(8, struct.pack("!H", code)), 1002)
        for code in (0, 999, 1004, 1005, 1006, 1015, 1016, 2999, 5000, 65535)
    ],
    ("close reason not UTF-8", masked(8, b"\x03\xe8\xff"), 1007),
]


def feed(stream: bytes, size: int) -> tuple[list[tuple[int, bytes]], bytes, WebSocketProtocol]:
    """Return the events and the bytes back of a stream fed in chunks of `size`."""
    protocol = WebSocketProtocol()
    for start in range(0, len(stream), size):
        protocol.receive_data(stream[start : start + size])
    events = [(int(event.opcode), event.payload) for event in protocol.events_received()]
    return events, protocol.data_to_send(), protocol


class TestHandshake(unittest.TestCase):
    """RFC 6455 section 4."""

    def test_accept_key_of_the_rfc(self) -> None:
        self.assertEqual(check_handshake(GOOD_HANDSHAKE), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=")

    def test_fields_that_break_the_rfc_are_refused(self) -> None:
        for different, status in HANDSHAKES:
            with self.subTest(different):
                try:
                    check_handshake({**GOOD_HANDSHAKE, **different})
                    answered = 101
                except RequestError as error:
                    answered = error.status.value
                    if status == 426:
                        self.assertEqual(error.fields["Sec-WebSocket-Version"], "13")
                        self.assertEqual(error.fields["Upgrade"], "websocket")
                self.assertEqual(answered, status)

    def test_missing_field_is_refused(self) -> None:
        for name in GOOD_HANDSHAKE:
            with self.subTest(name), self.assertRaises(RequestError):
                check_handshake(
                    {key: GOOD_HANDSHAKE[key] for key in GOOD_HANDSHAKE if key != name}
                )


class TestFrame(unittest.TestCase):
    """RFC 6455 section 5.2."""

    def test_payload_length_takes_7_16_or_64_bits(self) -> None:
        for size, head in [
            (0, b"\x81\x00"),
            (125, b"\x81\x7d"),
            (126, b"\x81\x7e\x00\x7e"),
            (65535, b"\x81\x7e\xff\xff"),
            (65536, b"\x81\x7f\x00\x00\x00\x00\x00\x01\x00\x00"),
        ]:
            with self.subTest(size):
                frame = serialize_frame(Opcode.TEXT, b"x" * size)
                self.assertEqual(frame, head + b"x" * size)

    def test_mask_of_the_rfc(self) -> None:
        # RFC 6455 section 5.7: a masked "Hello".
        masking_key = b"\x37\xfa\x21\x3d"
        self.assertEqual(popup_notifier.apply_mask(b"\x7f\x9f\x4d\x51\x58", masking_key), b"Hello")

    def test_mask_at_every_offset(self) -> None:
        data = bytes(range(23))
        whole = popup_notifier.apply_mask(data, b"wxyz")
        for cut in range(len(data)):
            parts = popup_notifier.apply_mask(data[:cut], b"wxyz")
            parts += popup_notifier.apply_mask(data[cut:], b"wxyz", cut)
            self.assertEqual(parts, whole)

    def test_close_reason_is_cut_between_characters(self) -> None:
        frame = popup_notifier.serialize_close(CloseCode.GOING_AWAY, "語" * 100)
        self.assertEqual(frame[:4], b"\x88\x7d\x03\xe9"[:1] + bytes([2 + 123]) + b"\x03\xe9")
        frame[4:].decode("utf-8")


class TestWebSocketProtocol(unittest.TestCase):
    """RFC 6455 section 5, by bytes."""

    def test_good_streams_in_chunks_of_any_size(self) -> None:
        for label, stream, events, reply in GOOD_STREAMS:
            for size in (len(stream), 1, 2, 3, 7):
                if len(stream) > 1000 and size < 7:
                    size *= 499
                with self.subTest(label, size=size):
                    got, back, protocol = feed(stream, size)
                    self.assertEqual((got, back), (events, reply))
                    self.assertIsNone(protocol.error)

    def test_bad_streams_in_chunks_of_any_size(self) -> None:
        for label, stream, code in BAD_STREAMS:
            for size in (len(stream), 1, 5):
                if len(stream) > 1000 and size < 7:
                    size *= 499
                with self.subTest(label, size=size):
                    _, back, protocol = feed(stream + masked(9), size)
                    self.assertIsInstance(protocol.error, ProtocolError)
                    self.assertTrue(protocol.is_closed)
                    # One Close with the code, no answer to the ping behind.
                    self.assertEqual(back[:1] + back[2:4], b"\x88" + struct.pack("!H", code))
                    self.assertEqual(len(back), 2 + back[1])

    def test_bad_utf8_fails_at_once(self) -> None:
        # The first half of a message is enough: nobody waits for the rest (section 8.1).
        for stream in (masked(1, b"ab\xff" + b"c" * 50)[:9], masked(1, b"\xf4\x90", False)):
            protocol = WebSocketProtocol()
            protocol.receive_data(stream)
            self.assertTrue(protocol.is_closed)

    def test_every_valid_close_code_is_echoed(self) -> None:
        for code in (1000, 1001, 1002, 1003, *range(1007, 1015), 3000, 3999, 4000, 4999):
            with self.subTest(code):
                _, back, protocol = feed(masked(8, struct.pack("!H", code) + b"why"), 99)
                self.assertEqual(back, b"\x88\x02" + struct.pack("!H", code))
                self.assertEqual((protocol.close_code, protocol.is_closed), (code, True))

    def test_our_close_waits_for_the_peer(self) -> None:
        protocol = WebSocketProtocol()
        protocol.send_close(CloseCode.GOING_AWAY, "x")
        self.assertEqual(protocol.data_to_send(), b"\x88\x03\x03\xe9x")
        protocol.send(Opcode.TEXT, b"not any more")
        protocol.receive_data(masked(9, b"late"))
        self.assertEqual(protocol.data_to_send(), b"")
        self.assertFalse(protocol.is_closed)
        protocol.receive_data(masked(8, b"\x03\xe9"))
        self.assertEqual((protocol.data_to_send(), protocol.is_closed), (b"", True))

    def test_echo_server_needs_no_socket(self) -> None:
        # What a conformance suite needs: no socket, no change to the file.
        protocol = WebSocketProtocol(max_message=1 << 24)
        protocol.receive_data(masked(1, b"a" * 100_000) + masked(2, b"b"))
        for event in protocol.events_received():
            protocol.send(event.opcode, event.payload)
        expected = serialize_frame(Opcode.TEXT, b"a" * 100_000) + b"\x82\x01b"
        self.assertEqual(protocol.data_to_send(), expected)

    def test_fuzzed_streams_mean_the_same_in_any_chunks(self) -> None:
        chance = random.Random(6455)
        pieces = [stream for _, stream, _, _ in GOOD_STREAMS if len(stream) < 1000]
        pieces += [stream for _, stream, _ in BAD_STREAMS if len(stream) < 1000]
        for _ in range(1500):
            stream = bytearray(b"".join(chance.choices(pieces, k=chance.randint(1, 6))))
            for _ in range(chance.choice((0, 0, 1, 3))):
                stream[chance.randrange(len(stream))] = chance.randrange(256)
            whole = feed(bytes(stream), len(stream))
            parts = feed(bytes(stream), chance.randint(1, 9))
            self.assertEqual(parts[:2], whole[:2], bytes(stream))
            self.assertEqual(str(parts[2].error), str(whole[2].error), bytes(stream))

    def test_section_knows_no_socket_and_no_clock(self) -> None:
        text = PROGRAM.read_text()
        section = text[text.index("# --- 3. ") : text.index("# --- 4. ")]
        names = {node.id for node in ast.walk(ast.parse(section)) if isinstance(node, ast.Name)}
        self.assertFalse(names & {"socket", "selectors", "threading", "time", "log", "logging"})


# --- 4. Calls ----------------------------------------------------------------------------------


class TestCall(unittest.TestCase):
    """What a browser gets."""

    def test_message_of_a_call_holds_all_that_was_triggered(self) -> None:
        with Daemon() as daemon, daemon.browser() as browser:
            daemon.trigger("&exten=201&name=%E5%B1%B1%E7%94%B0&uniqueid=1.2")
            message = browser.message()
        self.assertRegex(message.pop("id"), r"^\d{13}-1$")
        self.assertTrue(message.pop("key"))
        self.assertLess(abs(message.pop("time") / 1000 - time.time()), TIMEOUT)
        self.assertEqual(
            message,
            {
                "type": "CALL_IN",
                "phone": "0312345678",
                "exten": "201",
                "data": {
                    "phone": "0312345678",
                    "exten": "201",
                    "name": "山田",
                    "uniqueid": "1.2",
                },
            },
        )

    def test_exten_is_all_by_default(self) -> None:
        with Daemon() as daemon, daemon.browser() as browser:
            for query in ("", "&exten="):
                daemon.trigger(query)
                message = browser.message()
                self.assertEqual((message["exten"], message["data"]["exten"]), ("all", "all"))

    def test_ids_increase(self) -> None:
        with Daemon() as daemon, daemon.browser() as browser:
            for _ in range(50):
                daemon.trigger()
            ids = [tuple(map(int, browser.message()["id"].split("-"))) for _ in range(50)]
        self.assertEqual(ids, sorted(set(ids)))

    def test_log_says_who_was_called_and_how_many_got_it(self) -> None:
        with Daemon() as daemon:
            with daemon.browser(), daemon.browser():
                daemon.trigger("&exten=201")
                daemon.trigger("&exten=202&event=answer&uniqueid=1.5")
                first, second = daemon.wait_for_log("call ", 2)
        to_both = r"from 127\.0\.0\.1 to 2 browsers$"
        self.assertRegex(first, r'call \d+-1: ring phone="0312345678" exten="201" ' + to_both)
        self.assertRegex(second, r'-2: answer phone="0.*" exten="202" uniqueid="1.5" ' + to_both)

    def test_foreign_text_stands_in_quotes_in_the_log(self) -> None:
        with Daemon() as daemon, daemon.browser() as browser:
            hostile = quote('\x1b[2J"\u202e\n1 browser', safe="")
            daemon.trigger(f"&exten={hostile}&uniqueid={hostile}", hostile)
            browser.message()
            (line,) = daemon.wait_for_log("call ")
        told = r'"\x1b[2J\"\u202e\n1 browser"'
        self.assertIn(
            f" phone={told} exten={told} uniqueid={told} from 127.0.0.1 to 1 browser", line
        )
        self.assertTrue(line.isprintable())


class TestCallTracker(unittest.TestCase):
    """Who is told of a call: whoever saw it ring hears of its answer and its end."""

    # (what it is, [(event, exten, seconds after the one before, who is told)])
    TABLE: ClassVar[list[tuple[str, list[tuple[str, str, float, str]]]]] = [
        ("one phone", [("ring", "201", 0, "201"), ("answer", "201", 9, "201")]),
        (
            "a group",
            [
                ("ring", "201", 0, "201"),
                ("ring", "202", 0.1, "202"),
                ("answer", "202", 9, "201,202"),
                ("end", "all", 9, "201,202"),
            ],
        ),
        ("a pick-up", [("ring", "201", 0, "201"), ("answer", "209", 5, "201,209")]),
        (
            "a transfer",
            [
                ("ring", "all", 0, "all"),
                ("answer", "201", 5, "all,201"),
                ("ring", "202", 30, "202"),
                ("answer", "202", 5, "all,201,202"),
                ("end", "201", 30, "all,201,202"),
            ],
        ),
        ("an end of which nobody knows", [("end", "all", 0, "all")]),
        (
            "answer before ring",
            [("answer", "201", 0, "201"), ("ring", "all", 0.1, "201"), ("ring", "202", 0.1, "")],
        ),
        (
            "end before ring",
            [
                ("end", "all", 0, "all"),
                ("ring", "201", 0.1, "201"),
                ("answer", "201", 0.1, "all,201"),
            ],
        ),
        (
            "end before answer",
            [("ring", "201", 0, "201"), ("end", "all", 9, "201"), ("answer", "201", 1, "201")],
        ),
        ("ring long after an answer", [("answer", "201", 0, "201"), ("ring", "202", 3, "202")]),
        (
            "forgotten at its end",
            [
                ("ring", "201", 0, "201"),
                ("end", "all", 9, "201"),
                ("ring", "202", 3.1, "202"),
                ("answer", "202", 9, "202"),
            ],
        ),
        (
            "a group whose phones ring for half an hour",
            [("ring", "201,202", 0, "201,202"), ("answer", "202", 1800, "201,202")],
        ),
        (
            "forgotten after an hour",
            [("ring", "201", 0, "201"), ("answer", "202", 3601, "202"), ("end", "all", 1, "202")],
        ),
    ]

    def test_who_got_the_ring_gets_answer_and_end(self) -> None:
        for label, events in self.TABLE:
            tracker, now = popup_notifier.CallTracker(), 1000.0
            for event, exten, delay, told in events:
                now += delay
                parameters = {"phone": "1", "exten": exten, "uniqueid": "9.1", "event": event}
                with self.subTest(label, event=event, exten=exten):
                    extens = popup_notifier.split_extens(told)
                    self.assertEqual(tracker.track(parameters, now), extens)

    def test_oldest_calls_are_forgotten_first(self) -> None:
        tracker = popup_notifier.CallTracker()
        for now, unique in ((0.0, "old"), (3000.0, "new"), (6000.0, "last")):
            tracker.track({"exten": "201", "uniqueid": unique}, now)
        answer = {"exten": "202", "event": "answer"}
        for unique, told in (("new", {"201", "202"}), ("old", {"202"})):
            self.assertEqual(tracker.track({**answer, "uniqueid": unique}, 6000.0), told)

    def test_calls_that_never_end_do_not_fill_the_memory(self) -> None:
        tracker = popup_notifier.CallTracker()
        for number in range(popup_notifier.MAX_HISTORY + 9):
            tracker.track({"exten": "201", "uniqueid": str(number)}, 0.0)
        answer = {"exten": "202", "event": "answer"}
        for unique, told in (("9999", {"201", "202"}), ("0", {"202"})):
            self.assertEqual(tracker.track({**answer, "uniqueid": unique}, 1.0), told)


class TestLog(unittest.TestCase):
    """The only copy of a call."""

    def test_frame_is_the_same_live_late_and_again(self) -> None:
        with Daemon() as daemon, daemon.browser() as live:
            with daemon.browser("?since=") as browser:
                position = browser.hello()["id"]
            for number in range(3):
                daemon.trigger("&exten=201&name=x", phone=str(number))
            frames = [live.frame() for _ in range(3)]
            for query in ("", "&exten=201"):
                with daemon.browser(f"?since={position}{query}") as again:
                    again.hello()
                    self.assertEqual([again.frame() for _ in range(3)], frames)
                    alive = json.loads(again.frame()[1])
                    last = json.loads(frames[-1][1])["id"]
                    self.assertEqual((alive["type"], alive["id"]), ("ALIVE", last))

    def test_reader_at_the_oldest_call_gets_it(self) -> None:
        stream = popup_notifier.LocalStream(60)
        trigger = popup_notifier.Trigger("k", 1, {"phone": "1", "exten": "all"}, "", 0.0)
        now = time.monotonic()
        for number, age in enumerate((65, 59.99, 1)):
            call_id = popup_notifier.CallID(1, number)
            stream.log.append(call_id, trigger._replace(began=now - age))
        place = stream.log.resume(popup_notifier.BEGINNING).cursor
        self.assertEqual(place, 1)
        stream.log.forget(3, popup_notifier.STALL_TIMEOUT)  # a moment later, while it lags
        slice_ = stream.log.read(place)
        assert slice_ is not None
        self.assertEqual([call.id.sequence for call in slice_.calls], [1, 2])

    def test_browsers_that_never_read_cost_no_memory(self) -> None:
        with Daemon(HISTORY=600) as daemon, contextlib.ExitStack() as stack:
            for number in range(4000):
                daemon.trigger(TestSlowBrowsers.KILOBYTE, str(number))
            before = daemon.status("VmRSS")
            for _ in range(30):
                stack.enter_context(daemon.browser("?since=0-0", receive_buffer=2048))
            daemon.trigger(phone="last")
            daemon.wait_for_log('call .*"last".* to 30 browsers')
            self.assertLess(daemon.status("VmHWM") - before, 10 * 1024)  # they ask for 120 MB


# --- 5. Event loop -----------------------------------------------------------------------------


class TestDeadlineQueue(unittest.TestCase):
    """Who is due when."""

    def test_first_due_comes_first(self) -> None:
        queue: popup_notifier.DeadlineQueue[str] = popup_notifier.DeadlineQueue(10)
        for now, item in enumerate("abcd"):
            queue.add(item, now)
        queue.add("a", 5)  # anew
        queue.discard("c")
        self.assertEqual((len(queue), queue.first(), queue.next_deadline()), (3, "b", 11))
        self.assertEqual(list(queue.expired(13)), ["b", "d"])
        self.assertEqual(list(queue.expired(14)), [])
        queue.change_timeout(1, 9)
        self.assertEqual(queue.next_deadline(), 10)
        self.assertEqual(list(queue.expired(10)), ["a"])
        self.assertEqual(queue.next_deadline(), math.inf)


# --- 6. Hub ------------------------------------------------------------------------------------


class TestHub(unittest.TestCase):
    """The browsers and the thread that serves them."""

    def test_call_right_after_the_handshake_arrives(self) -> None:
        with Daemon() as daemon:
            for number in range(300):
                with daemon.browser() as browser:
                    self.assertEqual(daemon.trigger(phone=f"{number:010}"), 200)
                    self.assertEqual(browser.phones(1), [f"{number:010}"])

    def test_broadcast_reaches_all_in_one_order(self) -> None:
        with Daemon() as daemon, contextlib.ExitStack() as stack:
            browsers = [stack.enter_context(daemon.browser()) for _ in range(40)]

            def call(caller: int) -> None:
                for number in range(10):
                    daemon.trigger(phone=f"{caller:02}{number:02}")

            callers = [threading.Thread(target=call, args=(caller,)) for caller in range(20)]
            for thread in callers:
                thread.start()
            came = 0
            while came < 30 or any(thread.is_alive() for thread in callers):
                guest = daemon.browser(source="127.0.0.9")
                if came % 3 == 0:
                    guest.send(Opcode.CLOSE)
                (reset if came % 3 == 1 else socket.socket.close)(guest.sock)
                came += 1
            heard = [browser.phones(200) for browser in browsers]
            daemon.wait_for_log(r"browser gone: 127\.0\.0\.9 .*\(40 connected\)")
            daemon.trigger(phone="last")
            for browser in browsers:
                self.assertEqual(browser.phones(1), ["last"])
            (last,) = daemon.wait_for_log('call .*"last"')
            self.assertTrue(last.endswith("to 40 browsers"), last)
        self.assertEqual(len(set(heard[0])), 200)
        for each in heard:
            self.assertEqual(each, heard[0])

    def test_bytes_behind_the_handshake_are_kept(self) -> None:
        behind = masked(9, b"early") + masked(1, b"ignored") + masked(9, b"second")
        head = handshake()
        stream = head + behind
        with Daemon() as daemon:
            for cut in [*range(len(head) - 4, len(stream) + 1), 1, 20]:
                with self.subTest(cut), daemon.connect() as sock:
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
                    sock.sendall(stream[:cut])
                    sock.sendall(stream[cut:])
                    answer = b""
                    while not answer.endswith(b"\x8a\x05early\x8a\x06second"):
                        part = sock.recv(4096)
                        self.assertTrue(part, answer)
                        answer += part

    def test_ping_is_answered_and_text_ignored(self) -> None:
        with Daemon() as daemon, daemon.browser() as browser:
            browser.send(1, "こんにちは".encode())
            browser.send(2, b"\0" * 5000)
            browser.send(9, b"you?")
            self.assertEqual(browser.frame(), (Opcode.PONG, b"you?"))
            daemon.trigger()
            self.assertEqual(browser.phones(1), ["0312345678"])
            browser.send(9, b"and now?")
            self.assertEqual(browser.frame(), (Opcode.PONG, b"and now?"))

    def test_close_is_echoed_and_the_connection_ends(self) -> None:
        # Cleanly, by FIN; not by the reset that comes when time is up.
        with patched(f"p.CLOSE_TIMEOUT = {2 * TIMEOUT}") as program:
            with Daemon(program=program) as daemon, daemon.browser() as browser:
                browser.send(8, b"\x0f\xa0")
                self.assertEqual(browser.frame(), (Opcode.CLOSE, b"\x0f\xa0"))
                self.assertEqual(browser.sock.recv(1), b"")
                daemon.wait_for_log(r"browser gone: 127.0.0.1 closed with 4000 \(0 connected\)")

    def test_call_goes_before_what_other_browsers_sent(self) -> None:
        with patched(
            "serve, calls = p.Hub._receive, iter('12')",
            "def receive(self, browser):",
            "    facts = {'phone': next(calls, '3'), 'exten': 'all'}",
            "    self.stream.publish(facts, '', lambda: None)",
            "    serve(self, browser)",
            "p.Hub._receive = receive",
        ) as program:
            with Daemon(program=program) as daemon, contextlib.ExitStack() as stack:
                browsers = [stack.enter_context(daemon.browser()) for _ in range(2)]
                daemon.wait_for_log(r"\(2 connected\)")
                daemon.process.send_signal(signal.SIGSTOP)
                os.waitpid(daemon.process.pid, os.WUNTRACED)  # it stands
                for browser in browsers:  # both are ready in one turn
                    browser.send(Opcode.PING)
                daemon.process.send_signal(signal.SIGCONT)
                first = sorted(browser.frame()[0] for browser in browsers)
            self.assertEqual(first, [Opcode.TEXT, Opcode.PONG])

    def test_browsers_have_tcp_nodelay(self) -> None:
        with patched(
            "subscribe = p.Hub.subscribe",
            "def show(self, browser, greeting):",
            "    level, option = p.socket.IPPROTO_TCP, p.socket.TCP_NODELAY",
            "    p.log.info('TCP_NODELAY is %d', browser.sock.getsockopt(level, option))",
            "    return subscribe(self, browser, greeting)",
            "p.Hub.subscribe = show",
        ) as program:
            with Daemon(program=program) as daemon, daemon.browser():
                daemon.wait_for_log("TCP_NODELAY is 1")

    def test_log_names_some_of_many_browsers(self) -> None:
        hold = "p.Hub.admit_arrivals = lambda self: len(self._arrivals) == 6 and self.loop.wake()"
        with patched(hold) as program, contextlib.ExitStack() as stack:
            daemon = stack.enter_context(Daemon(program=program))
            for number in range(6):
                stack.enter_context(daemon.browser(f"?exten=20{number}"))
            (line,) = daemon.wait_for_log("browser connected")
            self.assertTrue(line.endswith('exten="203" and 2 more (6 connected)'), line)
            for extens, more in (("206,207,208,209", ""), ("210", " and 1 more")):
                stack.enter_context(daemon.browser(f"?exten={extens}"))
                daemon.trigger("&exten=9")
                daemon.wait_for_log(rf"to 0 browsers: . connected, for 200(, 2\d\d){{9}}{more}$")

    def test_broken_protocol_is_closed_and_logged_in_one_line(self) -> None:
        with Daemon() as daemon:
            for stream, code in [(b"\x81\x01a", 1002), (masked(1, b"\xff"), 1007)]:
                with self.subTest(code), daemon.browser() as browser:
                    browser.sock.sendall(stream)
                    self.assertEqual(browser.closed_with()[0], code)
            lines = daemon.wait_for_log("browser dropped", 2)
            self.assertIn("127.0.0.1 sent a frame that is not masked", lines[0])

    def test_hanging_up_is_noticed(self) -> None:
        with Daemon() as daemon:
            before = daemon.descriptors()
            with daemon.browser() as browser:
                browser.sock.shutdown(socket.SHUT_WR)
                daemon.wait_for_log("browser gone: 127.0.0.1 hung up without Close")
                until(lambda: daemon.descriptors() == before, "its socket is closed")
            with daemon.browser() as browser:
                reset(browser.sock)
                daemon.wait_for_log("browser gone: 127.0.0.1 connection lost")

    def test_browser_that_is_gone_before_its_close_is_answered_is_logged(self) -> None:
        with patched(
            "begin = p.Browser.__init__",
            "def begin_broken(self, sock, *args):",
            "    begin(self, sock, *args)",
            "    def send(data):",
            "        if data[:1] == b'\\x88': raise BrokenPipeError",
            "        return sock.send(data)",
            "    self.send = send",
            "p.Browser.__init__ = begin_broken",
        ) as program:
            with Daemon(program=program) as daemon, daemon.browser() as browser:
                browser.send(Opcode.CLOSE)
                daemon.wait_for_log(r"browser gone: 127.0.0.1 closed with 1005 \(0 connected\)")

    def test_bug_in_serving_a_browser_drops_that_one_alone(self) -> None:
        with patched(
            "serve = p.Hub._receive",
            "def receive(self, browser):",
            "    if '2' in browser.extens: raise KeyError('a bug')",
            "    serve(self, browser)",
            "p.Hub._receive = receive",
        ) as program:
            with Daemon(program=program, has_bug=True) as daemon:
                with daemon.browser("?exten=1") as stays, daemon.browser("?exten=2") as goes:
                    for browser in (stays, goes):
                        browser.send(Opcode.PING, b"you?")
                    wait_for_reset(goes.sock)
                    self.assertEqual(stays.frame(), (Opcode.PONG, b"you?"))
                    daemon.trigger("&exten=1,2")
                    self.assertEqual(stays.phones(1), ["0312345678"])
                    daemon.wait_for_log("browser dropped: 127.0.0.1 hit a bug")
                    daemon.wait_for_log("call .* to 1 browser$")
                    metrics = daemon.get("/metrics")
                    self.assertIn('dropped_browsers_total{reason="bug"} 1\n', metrics)

    def test_browsers_over_the_limit_get_503(self) -> None:
        with Daemon(MAX_BROWSERS=2) as daemon:
            with daemon.browser(), daemon.browser() as second:
                # The page that was refused asks by fetch() why.
                self.assertEqual(status_of(daemon.get("/crmws").encode()), 503)
                answer = daemon.exchange(handshake())
                self.assertEqual(status_of(answer), 503)
                self.assertIn(b"\r\nRetry-After: 30\r\n", answer)
                second.send(8)
                daemon.wait_for_log("browser gone")
                daemon.browser().sock.close()

    def test_silent_browser_is_gone_and_one_that_answers_stays(self) -> None:
        with Daemon(PING_INTERVAL=1) as daemon:
            silent, alive = daemon.browser(source="127.0.0.2"), daemon.browser()
            with silent, alive:
                start = time.monotonic()
                while time.monotonic() < start + 4:
                    opcode, payload = alive.frame()
                    self.assertEqual(opcode, Opcode.PING)
                    alive.send(Opcode.PONG, payload)
                lines = daemon.wait_for_log("browser dropped: 127.0.0.2 was silent for 2 s")
                self.assertEqual(len(lines), 1)
                wait_for_reset(silent.sock)
                daemon.trigger()
                self.assertEqual(alive.phones(1), ["0312345678"])


class TestSubscription(unittest.TestCase):
    """exten= in the address."""

    # (a browser's query, a call's exten, does it hear it)
    TABLE = (
        ("", "201", True),
        ("?exten=", "201", True),
        ("?exten=201", "201", True),
        ("?exten=201", "202", False),
        ("?exten=201", "2011", False),
        ("?exten=201", "all", True),
        ("?exten=201", "", True),
        ("?exten=201", "200,201,202", True),
        ("?exten=201", "202, all", True),
        ("?exten=201&exten=202", "202", True),
        ("?exten=201,202", "202", True),
        ("?exten=201&exten=202", "201,202", True),
        ("?exten=Alice", "alice", True),
        ("?exten=%E5%B1%B1", "山", True),
        ("?x=201", "202", True),
    )

    def test_browser_gets_calls_to_its_extensions_and_to_all(self) -> None:
        with Daemon() as daemon:
            for query, exten, is_heard in self.TABLE:
                with self.subTest(query, exten=exten), daemon.browser(query) as browser:
                    daemon.trigger("&exten=" + quote(exten), phone="1")
                    daemon.trigger("&exten=all", phone="2")
                    heard = browser.phones(1 + is_heard)
                    self.assertEqual(heard, ["1", "2"] if is_heard else ["2"])

    def test_calls_in_one_batch_keep_their_order(self) -> None:
        with Daemon() as daemon, contextlib.ExitStack() as stack:
            browsers = [
                stack.enter_context(daemon.browser(query))
                for query in ("", "?exten=1", "?exten=2", "?exten=1,2")
            ]
            # All triggers are there before the first is answered.
            callers = []
            for number in range(60):
                sock = stack.enter_context(daemon.connect())
                exten = ("1", "2", "1,2", "all")[number % 4]
                sock.sendall(
                    trigger_request(f"?phone={number}&exten={exten}&token={TOKEN}", "", b"")
                )
                callers.append(sock)
            for sock in callers:
                self.assertEqual(status_of(receive_all(sock)), 200)
            everything = browsers[0].phones(60)
            for browser, missed in zip(browsers[1:], (1, 0, None)):
                expected = [phone for phone in everything if int(phone) % 4 != missed]
                self.assertEqual(browser.phones(len(expected)), expected)

    def test_log_says_why_no_browser_got_a_call(self) -> None:
        with Daemon() as daemon:
            daemon.trigger("&exten=7")
            daemon.wait_for_log("call ")
            with daemon.browser("?exten=201"), daemon.browser("?exten=202"):
                daemon.trigger("&exten=7")
                lines = daemon.wait_for_log("call ", 2)
            daemon.wait_for_log("browser gone", 2)
            daemon.trigger("&exten=202")
            lines = daemon.wait_for_log("call ", 3)
        self.assertIn("to 0 browsers: none is connected", lines[0])
        self.assertIn("to 0 browsers: 2 connected, for 201, 202", lines[1])
        self.assertIn("to 0 browsers: none is connected", lines[2])

    def test_answer_is_heard_where_it_rang(self) -> None:
        with Daemon() as daemon, daemon.browser("?exten=202") as browser:
            daemon.trigger("&exten=201,202&uniqueid=9.1&event=ring", phone="1")
            daemon.trigger("&exten=201&uniqueid=9.1&event=answer", phone="1")
            daemon.trigger("&exten=201&uniqueid=9.2&event=answer", phone="2")
            daemon.trigger("&exten=201&uniqueid=9.1&event=end", phone="1")
            events = [browser.message()["data"]["event"] for _ in range(3)]
        self.assertEqual(events, ["ring", "answer", "end"])

    def test_end_is_heard_by_who_saw_it_ring_whatever_its_exten(self) -> None:
        with Daemon() as daemon, contextlib.ExitStack() as stack:
            one, other = (
                stack.enter_context(daemon.browser(f"?exten={exten}")) for exten in (201, 202)
            )
            for query in ("&exten=201", "&event=end", "&exten=201&event=ring"):
                daemon.trigger(f"{query}&uniqueid=9.1", phone="1")
            daemon.trigger("&exten=201&event=end&uniqueid=9.1", phone="1")
            daemon.trigger("&exten=202", phone="2")
            events = [one.message()["data"].get("event") for _ in range(4)]
            self.assertEqual(events, [None, "end", "ring", "end"])
            self.assertEqual(other.phones(1), ["2"])

    def test_log_names_the_page_of_a_browser(self) -> None:
        head = handshake("/crmws?exten=202,201").replace(
            b"\r\n\r\n", b"\r\nOrigin: https://crm\x01.example\r\n\r\n"
        )
        with Daemon() as daemon, daemon.connect() as sock, daemon.browser("?exten=%07"):
            sock.sendall(head.replace(b"\x01", b""))
            sock.recv(4096)
            text = r'127\.0\.0\.1 origin="https://crm.example" exten="201,202"'
            daemon.wait_for_log(f"browser connected: .*{text}")
            daemon.trigger("&exten=9")
            daemon.wait_for_log(r'0 browsers: 2 connected, for .*"\\x07"')

    def test_ring_that_its_answer_overtook_is_heard_by_who_answered(self) -> None:
        with Daemon() as daemon, contextlib.ExitStack() as stack:
            one, other = (
                stack.enter_context(daemon.browser(f"?exten={exten}")) for exten in (201, 202)
            )
            daemon.trigger("&exten=201&uniqueid=9.1&event=answer", phone="1")
            daemon.trigger("&exten=all&uniqueid=9.1&event=ring", phone="1")
            daemon.trigger("&exten=all&uniqueid=9.2", phone="2")
            self.assertEqual((one.phones(3), other.phones(1)), ([*"112"], ["2"]))

    def test_bad_query_is_refused(self) -> None:
        with Daemon() as daemon:
            for query in (
                "?since=yesterday",
                "?since=1",
                "?exten=" + "x" * 65,
                "?exten=" + ",".join(map(str, range(101))),
                "?since=&last=0",
                "?since=&last=many",
            ):
                with self.subTest(query):
                    answer = daemon.exchange(handshake("/crmws" + query))
                    self.assertEqual(status_of(answer), 400)
            extens = ",".join([*map(str, range(99)), "x" * 64])  # the most, and the longest
            daemon.browser(f"?exten={extens}").sock.close()


class TestRecovery(unittest.TestCase):
    """since= in the address."""

    def test_hello_says_where_the_browser_stands(self) -> None:
        with Daemon(PING_INTERVAL=7) as daemon:
            with daemon.browser("?since=") as browser:
                hello = browser.hello()
                self.assertEqual((hello["complete"], hello["interval"]), (True, 7))
                daemon.trigger()
                first = browser.message()
                self.assertGreater(call_id(first), call_id(hello))
            with daemon.browser("?since=") as browser:
                self.assertEqual(browser.hello()["id"], first["id"])

    def test_browser_that_keeps_up_gets_the_calls_and_nothing_else(self) -> None:
        with Daemon() as daemon, daemon.browser("?since=") as browser:
            browser.hello()
            self.assertEqual(json.loads(browser.frame()[1])["type"], "ALIVE")  # once, at first
            daemon.wait_for_log("browser connected")
            for number in range(3):
                daemon.trigger(phone=str(number))
                browser.send(Opcode.PING)
                frames = [browser.frame() for _ in range(2)]
                self.assertEqual([opcode for opcode, _ in frames], [Opcode.TEXT, Opcode.PONG])
                self.assertEqual(json.loads(frames[0][1])["phone"], str(number))

    def test_missed_calls_come_first_and_once(self) -> None:
        with Daemon() as daemon:
            with daemon.browser("?since=") as browser:
                position = browser.hello()["id"]
            for number in range(5):
                daemon.trigger(f"&exten={201 + number % 2}", phone=str(number))
            for query, expected in (("", "01234"), ("&exten=202", "13"), ("&exten=9", "")):
                with daemon.browser(f"?since={position}{query}") as browser:
                    self.assertTrue(browser.hello()["complete"])
                    daemon.trigger(phone="9")
                    messages = [browser.message() for _ in range(len(expected) + 1)]
                self.assertEqual([each["phone"] for each in messages], [*expected, "9"])
                # The next one has a later position to begin with.
                position = messages[-1]["id"]
                for number in range(5):
                    daemon.trigger(f"&exten={201 + number % 2}", phone=str(number))

    def test_browser_may_begin_with_the_last_calls(self) -> None:
        with Daemon() as daemon:
            sent = [(str(number), str(201 + number % 3)) for number in range(9)]
            for phone, exten in sent:
                daemon.trigger(f"&exten={exten}", phone=phone)
            for last, exten in ((100, ""), (4, ""), (2, "202"), (2, "9")):
                wanted = [phone for phone, each in sent if each in (exten or each, "all")][-last:]
                query = f"&last={last}" + (f"&exten={exten}" if exten else "")
                with self.subTest(query), daemon.browser(f"?since={query}") as browser:
                    hello = browser.hello()
                    self.assertTrue(hello["complete"])
                    self.assertEqual(browser.phones(len(wanted)), wanted)
                    daemon.trigger("&exten=all", phone="x")
                    sent.append(("x", "all"))
                    self.assertEqual(browser.phones(1), ["x"])
                # Who was cut off before the first of them gets the last of all that it missed.
                with daemon.browser(f"?since={hello['id']}{query}") as browser:
                    self.assertEqual(browser.hello()["id"], hello["id"])
                    self.assertEqual(browser.phones(1), ([*wanted, "x"][-last:])[:1])

    def test_reload_tells_browsers_of_a_new_interval_and_url_at_once(self) -> None:
        with Daemon(PING_INTERVAL=3000) as daemon, daemon.browser("?since=") as browser:
            hello = browser.hello()
            self.assertEqual((hello["interval"], "open" in hello), (3000, False))
            url = "https://crm.example/?q={phone}&n={name}"
            daemon.write_config(PING_INTERVAL=3600, OPEN_URL=url)
            daemon.process.send_signal(signal.SIGHUP)
            while True:
                _, payload = browser.frame()
                if json.loads(payload).get("open"):
                    break
            alive = json.loads(payload)
            self.assertEqual(
                (alive["type"], alive["interval"], alive["open"]), ("ALIVE", 3600, url)
            )
            with daemon.browser("?since=") as other:
                self.assertEqual(other.hello()["open"], url)

    def test_large_calls_shorten_the_history(self) -> None:
        body = b"token=%s&phone=1&text=" % TOKEN.encode()
        # In the message each of these letters takes six bytes for two.
        parts = [b"%02d=" % number + 2_000 * "é".encode() for number in range(16)]
        body += b"x&" + b"&".join(parts)
        head = "POST /api/trigger HTTP/1.1\r\nHost: h\r\n"
        head += "Content-Type: application/x-www-form-urlencoded\r\n"
        request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        with Daemon(HISTORY=3600) as daemon:
            with daemon.browser("?since=") as browser:
                start = browser.hello()["id"]
                self.assertEqual(status_of(daemon.exchange(request)), 200)
                size = len(json.dumps(browser.message()))
            for is_complete in (True, False):
                with daemon.browser(f"?since={start}") as browser:
                    self.assertIs(browser.hello()["complete"], is_complete)
                for _ in range(popup_notifier.MAX_HISTORY_SIZE // size):
                    self.assertEqual(status_of(daemon.exchange(request)), 200)

    def test_position_before_the_history_is_said_to_be_incomplete(self) -> None:
        with Daemon(HISTORY=0) as daemon:
            with daemon.browser("?since=") as browser:
                position = browser.hello()["id"]
            daemon.trigger()
            daemon.trigger()
            for since, is_complete in ((position, False), ("0-0", False)):
                with self.subTest(since), daemon.browser(f"?since={since}") as browser:
                    self.assertIs(browser.hello()["complete"], is_complete)
                    daemon.trigger(phone="3")
                    self.assertEqual(browser.phones(1), ["3"])

    def test_alive_comes_with_the_pings_to_those_who_recover(self) -> None:
        with Daemon(PING_INTERVAL=1) as daemon:
            with daemon.browser("?since=") as one, daemon.browser() as other:
                hello = one.hello()
                for _ in range(2):  # it is up to date; a second later it is still
                    alive = json.loads(one.frame()[1])
                    self.assertEqual((alive["type"], alive["id"]), ("ALIVE", hello["id"]))
                    self.assertLess(abs(alive["time"] / 1000 - time.time()), TIMEOUT)
                self.assertEqual(one.frame()[0], Opcode.PING)
                self.assertEqual(other.frame()[0], Opcode.PING)

    def test_alive_moves_the_position_of_who_hears_little(self) -> None:
        with Daemon(PING_INTERVAL=1, HISTORY=0) as daemon:
            with daemon.browser("?since=&exten=201") as browser:
                first = browser.hello()
                for _ in range(3):
                    daemon.trigger("&exten=202")
                alive: dict[str, Any] = first
                while call_id(alive)[1] < 3:
                    opcode, payload = browser.frame()
                    if opcode == Opcode.TEXT:
                        alive = json.loads(payload)
            for position, is_complete in ((first["id"], False), (alive["id"], True)):
                with daemon.browser(f"?since={position}&exten=201") as browser:
                    self.assertIs(browser.hello()["complete"], is_complete)

    def test_reconnecting_all_the_time_loses_and_repeats_nothing(self) -> None:
        total = 1500
        with Daemon() as daemon:
            with daemon.browser("?since=") as browser:
                position = browser.hello()["id"]

            def call() -> None:
                for number in range(total):
                    daemon.trigger(phone=str(number))

            caller = threading.Thread(target=call)
            caller.start()
            heard: list[str] = []
            chance = random.Random(4)
            while len(heard) < total:
                with daemon.browser(f"?since={position}") as browser:
                    self.assertTrue(browser.hello()["complete"])
                    for _ in range(min(chance.randrange(40), total - len(heard))):
                        message = browser.message()
                        heard.append(message["phone"])
                        position = message["id"]
            caller.join()
        self.assertEqual(heard, [str(number) for number in range(total)])

    def test_position_of_another_run_brings_all_that_is_remembered(self) -> None:
        with Daemon() as daemon:
            with daemon.browser() as browser:
                daemon.trigger(phone="1")
                begin = browser.message()["id"].partition("-")[0]
            others = ("1763870000000-7", "9999999999999-0", f"1-{10**300}", f"{begin}-9")
            for since in others:
                with self.subTest(since), daemon.browser(f"?since={since}") as browser:
                    hello = browser.hello()
                    self.assertEqual((hello["complete"], hello["id"]), (False, since))
                    self.assertEqual(browser.phones(1), ["1"])


# --- 7. HTTP -----------------------------------------------------------------------------------

# (what it is, head without the empty line, status or None when it is a request)
HEADS: list[tuple[str, bytes, int | None]] = [
    ("plain", b"GET / HTTP/1.1\r\nHost: h", None),
    ("HTTP/1.0 without Host", b"GET / HTTP/1.0", None),
    ("absolute form", b"GET http://h:1/x?y HTTP/1.1\r\nHost: h", None),
    ("raw UTF-8 in the target", "GET /?n=山田 HTTP/1.1\r\nHost: h".encode(), None),
    ("empty value", b"GET / HTTP/1.1\r\nHost:\r\nX:", None),
    ("no target", b"GET HTTP/1.1\r\nHost: h", 400),
    ("blank in the target", b"GET /a b HTTP/1.1\r\nHost: h", 400),
    ("two blanks", b"GET  / HTTP/1.1\r\nHost: h", 400),
    ("other protocol", b"GET / RTSP/1.0\r\nHost: h", 400),
    ("HTTP/2", b"GET / HTTP/2.0\r\nHost: h", 400),
    ("TLS", b"\x16\x03\x01\x02\x00\x01\x00", 400),
    ("no Host", b"GET / HTTP/1.1", 400),
    ("two Hosts", b"GET / HTTP/1.1\r\nHost: a\r\nHost: b", 400),
    ("host and port", b"GET / HTTP/1.1\r\nHost: pbx-1.example_:8989", None),
    ("IPv6 address", b"GET / HTTP/1.1\r\nHost: [::1]:8989", None),
    ("blank in Host", b"GET / HTTP/1.1\r\nHost: a b", 400),
    ("path in Host", b"GET / HTTP/1.1\r\nHost: a/b", 400),
    ("user in Host", b"GET / HTTP/1.1\r\nHost: u@a", 400),
    ("quotes in Host, HTTP/1.0", b'GET / HTTP/1.0\r\nHost: "a"', 400),
    ("blank before the colon", b"GET / HTTP/1.1\r\nHost : h", 400),
    ("folded line", b"GET / HTTP/1.1\r\nHost: h\r\n folded", 400),
    ("no colon", b"GET / HTTP/1.1\r\nHost: h\r\nwhat", 400),
    ("NUL in a value", b"GET / HTTP/1.1\r\nHost: h\0", 400),
    ("NUL in a name", b"GET / HTTP/1.1\r\nHost: h\r\nX\0: y", 400),
    ("NUL in the target", b"GET /\0 HTTP/1.1\r\nHost: h", 400),
    ("bare CR", b"GET / HTTP/1.1\r\nHost: h\r\nX: a\rb", 400),
    ("bare LF", b"GET / HTTP/1.1\r\nHost: h\r\nX: a\nContent-Length: 3", 400),
    (
        "both lengths",
        b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\nTransfer-Encoding: chunked",
        400,
    ),
    ("chunks", b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked", 411),
    ("two lengths", b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\nContent-Length: 3", 400),
    ("length with a sign", b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: +3", 400),
    ("negative length", b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: -3", 400),
    ("endless length", b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: " + b"9" * 5000, 400),
    ("the longest body", b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 65536", None),
    ("too long a body", b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 65537", 413),
    ("too many fields", b"GET / HTTP/1.1\r\nHost: h" + b"\r\nX: y" * 64, 431),
]

FORM_TYPE = "Content-Type: application/x-www-form-urlencoded\r\n"
JSON_TYPE = "Content-Type: application/json\r\n"

# (what it is, query, further head, body, data as the browser gets it)
GOOD_TRIGGERS: list[tuple[str, str, str, bytes, dict[str, str]]] = [
    ("query", "?phone=1&exten=2&token={token}", "", b"", {"phone": "1", "exten": "2"}),
    (
        "raw plus in phone",
        "?phone=+8131&token={token}",
        "",
        b"",
        {"phone": "+8131", "exten": "all"},
    ),
    ("encoded plus", "?phone=%2B8131&token={token}", "", b"", {"phone": "+8131", "exten": "all"}),
    (
        "plus elsewhere is a blank",
        "?phone=1&name=A+B&token={token}",
        "",
        b"",
        {"phone": "1", "exten": "all", "name": "A B"},
    ),
    ("raw UTF-8", "?phone=非通知&token={token}", "", b"", {"phone": "非通知", "exten": "all"}),
    (
        "Asterisk's CURL(url,x)",
        "?phone=1&token={token}",
        FORM_TYPE,
        b"x",
        {"phone": "1", "exten": "all"},
    ),
    (
        "form body",
        "",
        FORM_TYPE,
        b"phone=%2B81&name=%E5%B1%B1&token={token}",
        {"phone": "+81", "exten": "all", "name": "山"},
    ),
    ("form body without a type", "", "", b"phone=1&token={token}", {"phone": "1", "exten": "all"}),
    (
        "JSON body",
        "",
        JSON_TYPE,
        b'{"phone": "1", "exten": 201, "x": "\\u00e9", "token": "{token}"}',
        {"phone": "1", "exten": "201", "x": "é"},
    ),
    (
        "JSON with charset",
        "?token={token}",
        JSON_TYPE[:-2] + "; charset=utf-8\r\n",
        b'{"phone":"1"}',
        {"phone": "1", "exten": "all"},
    ),
    (
        "bearer",
        "?phone=1",
        "Authorization: Bearer {token}\r\n",
        b"",
        {"phone": "1", "exten": "all"},
    ),
    (
        "bearer in lower case",
        "?phone=1",
        "authorization: bearer {token}\r\n",
        b"",
        {"phone": "1", "exten": "all"},
    ),
    (
        "a list of extensions",
        "?phone=1&exten=201,202&token={token}",
        "",
        b"",
        {"phone": "1", "exten": "201,202"},
    ),
    ("no value", "?phone=1&vip&token={token}", "", b"", {"phone": "1", "exten": "all", "vip": ""}),
    (
        "a name cut in the middle of a character",
        "?phone=1&name=%E5%B1%B1%E7%94&x%ff=1&token={token}",
        "",
        b"",
        {"phone": "1", "exten": "all", "name": "山\ufffd", "x\ufffd": "1"},
    ),
    (
        "a name in JSON that is not UTF-8",
        "?token={token}",
        JSON_TYPE,
        b'{"phone":"1","name":"\x83\x65\\ud800"}',
        {"phone": "1", "exten": "all", "name": "\ufffde\ufffd"},
    ),
    ("stray signs", "?&&phone=1&=x&token={token}&", "", b"", {"phone": "1", "exten": "all"}),
    (
        "the longest value",
        "?token={token}",
        FORM_TYPE,
        b"phone=" + b"1" * 2048,
        {"phone": "1" * 2048, "exten": "all"},
    ),
]

# (what it is, query, further head, body, status, what the answer must name)
BAD_TRIGGERS: list[tuple[str, str, str, bytes, int, str]] = [
    ("no token", "?phone=1", "", b"", 401, "token is missing"),
    ("wrong token", "?phone=1&token=x", "", b"", 401, "token is not SECRET_TOKEN"),
    ("longer token", "?phone=1&token={token}x", "", b"", 401, "token"),
    ("token not ASCII", "?phone=1&token=%ff%E5%B1%B1", "", b"", 401, "token"),
    ("wrong bearer", "?phone=1", "Authorization: Bearer x\r\n", b"", 401, "token"),
    ("other scheme", "?phone=1", "Authorization: Basic {token}\r\n", b"", 401, "token is missing"),
    ("the token goes first", "?token=x", "", b"", 401, "token"),
    ("the token goes before a broken body", "?token=x", JSON_TYPE, b"{", 401, "token"),
    ("no phone", "?token={token}", "", b"", 400, "phone is missing"),
    ("nested token", "", JSON_TYPE, b'{"token":' + b"[" * 900 + b"]" * 900 + b"}", 401, "token"),
    (
        "deeply nested",
        "",
        JSON_TYPE,
        b'{"token":' + b"[" * 9000 + b"]" * 9000 + b"}",
        401,
        "token",
    ),
    ("nested phone", "?token={token}", JSON_TYPE, b'{"phone":[[1]]}', 400, "not a text"),
    ("truth", "?token={token}", JSON_TYPE, b'{"phone":true}', 400, "not a text"),
    ("empty phone", "?phone=&token={token}", "", b"", 400, "phone is missing"),
    ("phone twice", "?phone=1&phone=2&token={token}", "", b"", 400, '"phone" is given twice'),
    (
        "exten twice",
        "?phone=1&exten=999&exten=all&token={token}",
        "",
        b"",
        400,
        '"exten" is given twice',
    ),
    (
        "twice once it is text",
        "?phone=1&a%ff=x&a%fe=y&token={token}",
        "",
        b"",
        400,
        '"a\ufffd" is given twice',
    ),
    ("token twice", "?phone=1&token=x&token={token}", "", b"", 400, '"token" is given twice'),
    (
        "query and body",
        "?phone=1&token={token}",
        FORM_TYPE,
        b"phone=2",
        400,
        '"phone" is given twice',
    ),
    (
        "twice in JSON",
        "?token={token}",
        JSON_TYPE,
        b'{"phone":"1","phone":"2"}',
        400,
        '"phone" is given twice',
    ),
    (
        "too many parameters",
        "?phone=1&token={token}" + "".join(f"&x{number}=1" for number in range(31)),
        "",
        b"",
        400,
        "more than 32 parameters",
    ),
    ("phone not UTF-8", "?phone=%ff&token={token}", "", b"", 400, '"phone" is not UTF-8'),
    ("exten not UTF-8", "?phone=1&exten=%83%65&token={token}", "", b"", 400, '"exten" is not'),
    ("event", "?phone=1&event=hangup&token={token}", "", b"", 400, "none of ring, answer, end"),
    (
        "half a surrogate pair",
        "?token={token}",
        JSON_TYPE,
        b'{"phone":"\\ud800"}',
        400,
        '"phone" is not UTF-8',
    ),
    ("too long", "?phone=" + "1" * 2049 + "&token={token}", "", b"", 400, '"phone" has over 2048'),
    ("too long a name", "?phone=1&" + "n" * 65 + "=1&token={token}", "", b"", 400, "has over 64"),
    (
        "too many",
        "?phone=1&token={token}" + "".join(f"&p{n}=" for n in range(31)),
        "",
        b"",
        400,
        "more than 32",
    ),
    ("broken JSON", "?token={token}", JSON_TYPE, b"{", 400, "not JSON"),
    ("JSON list", "?token={token}", JSON_TYPE, b"[]", 400, "not a JSON object"),
    ("deep JSON", "?token={token}", JSON_TYPE, b"[" * 60000, 400, "not JSON"),
    ("JSON null", "?token={token}", JSON_TYPE, b'{"phone":null}', 400, '"phone" is not a text'),
    ("JSON number", "?token={token}", JSON_TYPE, b'{"phone":1.5}', 400, '"phone" is not a text'),
    (
        "JSON object within",
        "?phone=1&token={token}",
        JSON_TYPE,
        b'{"x":{"y":1}}',
        400,
        '"x" is not a text',
    ),
    ("JSON not UTF-8", "?token={token}", JSON_TYPE, b'{"phone":"\xff"}', 400, '"phone" is not'),
    (
        "other body",
        "?phone=1&token={token}",
        "Content-Type: text/xml\r\n",
        b"<a/>",
        415,
        "body must be",
    ),
]

HOSTILE = [
    '"quotes"\\back\\',
    "CR\rLF\nCRLF\r\n",
    "\x1b]0;owned\x07\x1b[31m",
    "line\u2028and\u2029separators",
    "😀 emoji",
    "<script>alert(1)</script>",
    "9" * 200,
    "\0nul",
    "\u202eright to left",
    "$(touch /tmp/x)`id`",
    "1&exten=999",
    '","exten":"999","x":"',
    "%0d%0a%00 100%",
    "\x7f\x80\x85\x9b2J controls",
    "\ufeff\uffff\U0010ffff",
    "👩\u200d👩\u200d👧 e\u0301",
    "山田" * 100,
]


class TestHead(unittest.TestCase):
    """RFC 9112, strictly."""

    def test_heads_that_two_parsers_read_differently_are_refused(self) -> None:
        for label, head, status in HEADS:
            with self.subTest(label):
                try:
                    parse_head(head)
                    answered = None
                except RequestError as error:
                    answered = error.status.value
                self.assertEqual(answered, status)

    def test_target_and_fields_of_a_head(self) -> None:
        request = parse_head(
            b"POST http://pbx:1/a/b?c=d?e HTTP/1.1\r\nHost: h\r\nX-Y: \t z \r\nx-y: 2"
        )
        self.assertEqual((request.method, request.path, request.query), ("POST", "/a/b", b"c=d?e"))
        self.assertEqual(request.fields["x-y"], "z, 2")


class TestTrigger(unittest.TestCase):
    """POST /api/trigger."""

    def test_trigger_by_query_form_or_json_is_delivered(self) -> None:
        with Daemon() as daemon, daemon.browser() as browser:
            for label, query, head, body, data in GOOD_TRIGGERS:
                with self.subTest(label):
                    answer = daemon.exchange(trigger_request(query, head, body))
                    self.assertEqual((status_of(answer), answer[-6:]), (200, b"\r\n\r\nOK"))
                    self.assertEqual(browser.message()["data"], data)

    def test_refused_trigger_says_why_and_delivers_nothing(self) -> None:
        with Daemon() as daemon, daemon.browser() as browser:
            for label, query, head, body, status, text in BAD_TRIGGERS:
                with self.subTest(label):
                    answer = daemon.exchange(trigger_request(query, head, body))
                    self.assertEqual(status_of(answer), status, answer)
                    self.assertIn(text, answer.decode())
                    self.assertNotIn(TOKEN, answer.decode())
            self.assertEqual(daemon.trigger(phone="42"), 200)
            self.assertEqual(browser.phones(1), ["42"])

    def test_path_method_address_and_token_are_checked_in_this_order(self) -> None:
        with Daemon(TRIGGER_ALLOW="127.0.0.2", CRMWS_ALLOW="127.0.0.3") as daemon:
            for request, source, status in [
                ("GET /nowhere", "127.0.0.9", 404),
                ("POST /api/trigger/", "127.0.0.2", 404),
                ("GET /api/trigger", "127.0.0.9", 405),
                ("PUT /api/trigger", "127.0.0.2", 405),
                ("POST /crmws", "127.0.0.9", 405),
                ("POST /api/trigger", "127.0.0.9", 403),
                ("POST /api/trigger", "127.0.0.3", 403),
                ("GET /crmws", "127.0.0.2", 403),
                ("POST /api/trigger", "127.0.0.2", 401),
                ("GET /crmws", "127.0.0.3", 426),
            ]:
                with self.subTest(request, source=source):
                    head = f"{request} HTTP/1.1\r\nHost: h\r\n\r\n".encode()
                    answer = daemon.exchange(head, source=source)
                    self.assertEqual(status_of(answer), status)
                    self.assertEqual(b"\r\nAllow: " in answer, status == 405)

    def test_hostile_caller_ids_arrive_as_sent(self) -> None:
        with Daemon() as daemon, daemon.browser() as browser:
            for value in HOSTILE:
                encoded = f"phone={quote(value)}&name={quote(value)}"
                as_json = json.dumps({"phone": value, "name": value}, ensure_ascii=False)
                for kind, query, head, body in [
                    ("query", "&" + encoded, "", ""),
                    ("form", "", FORM_TYPE, encoded),
                    ("JSON", "", JSON_TYPE, as_json),
                ]:
                    with self.subTest(value, kind=kind):
                        request = trigger_request("?token={token}" + query, head, body.encode())
                        self.assertEqual(status_of(daemon.exchange(request)), 200)
                        _, payload = browser.frame()
                        self.assertTrue(payload.isascii())
                        message = json.loads(payload)
                        self.assertEqual(
                            (message["phone"], message["data"]["name"]), (value, value)
                        )
            lines = daemon.wait_for_log("call ", 3 * len(HOSTILE))
        self.assertEqual(len(lines), 3 * len(HOSTILE))
        for line in daemon.lines:
            self.assertTrue(line.isprintable(), line)
            self.assertRegex(line, r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} [A-Z]+ ")

    def test_localhost_is_ipv4_and_ipv6(self) -> None:
        with Daemon() as daemon:
            for host in ("127.0.0.1", "::1"):
                with self.subTest(host):
                    request = trigger_request("?phone=1&token={token}", "", b"")
                    self.assertEqual(status_of(daemon.exchange(request, host=host)), 200)

    def test_body_may_come_byte_by_byte_and_after_100_continue(self) -> None:
        body = f"phone=1&token={TOKEN}".encode()
        head = f"POST /api/trigger HTTP/1.1\r\nHost: h\r\nContent-Length: {len(body)}\r\n"
        with Daemon() as daemon:
            with daemon.connect() as sock:
                for byte in head.encode() + b"\r\n" + body:
                    sock.sendall(bytes([byte]))
                self.assertEqual(status_of(receive_all(sock)), 200)
            for expectation in ("100-continue", "100-Continue"):
                with self.subTest(expectation), daemon.connect() as sock:
                    sock.sendall(f"{head}Expect: {expectation}\r\n\r\n".encode())
                    self.assertEqual(sock.recv(100), b"HTTP/1.1 100 Continue\r\n\r\n")
                    for byte in body:
                        sock.sendall(bytes([byte]))
                    self.assertEqual(status_of(receive_all(sock)), 200)
            # What ends the lines of a head has no meaning in a body.
            text = json.dumps({"phone": "1", "token": TOKEN}, indent=1) + "\r\n\r\n"
            head = f"POST /api/trigger HTTP/1.1\r\nHost: h\r\n{JSON_TYPE}"
            with daemon.connect() as sock:
                for byte in f"{head}Content-Length: {len(text)}\r\n\r\n{text}".encode():
                    sock.sendall(bytes([byte]))
                self.assertEqual(status_of(receive_all(sock)), 200)

    @needs("curl")
    def test_one_line_of_curl_triggers_a_call(self) -> None:
        with Daemon(SECRET_TOKEN="mytoken") as daemon, daemon.browser() as browser:
            url = f"http://127.0.0.1:{daemon.port}/api/trigger?phone=0312345678&exten=201&token=mytoken"
            command = ["curl", "-s", "-X", "POST", url, "-m", "1"]
            self.assertEqual(
                subprocess.run(command, capture_output=True, check=True).stdout, b"OK"
            )
            message = browser.message()
        self.assertEqual((message["phone"], message["exten"]), ("0312345678", "201"))


# --- 8. Server ---------------------------------------------------------------------------------


class TestCrossSite(unittest.TestCase):
    """What a foreign page can have a browser send."""

    def test_trigger_sent_by_a_foreign_page_is_refused(self) -> None:
        with Daemon() as daemon, daemon.browser() as browser:
            for head, status in [
                ("Origin: https://evil.example\r\n", 403),
                ("Origin: null\r\n", 403),
                ("Sec-Fetch-Site: cross-site\r\n", 403),
                ("Sec-Fetch-Site: same-site\r\n", 403),
                ("Origin: http://pbx\r\nSec-Fetch-Site: same-origin\r\n", 200),
                ("Sec-Fetch-Site: none\r\n", 200),
            ]:
                with self.subTest(head):
                    request = trigger_request("?phone=7&token={token}", head, b"")
                    self.assertEqual(status_of(daemon.exchange(request)), status)
            self.assertEqual(browser.phones(2), ["7", "7"])


class TestBrowserToken(unittest.TestCase):
    """CRMWS_TOKEN."""

    def test_browser_without_the_right_token_gets_401(self) -> None:
        token = "for-browsers"
        with Daemon(CRMWS_TOKEN=token) as daemon:
            for query, offered, status, chosen in [
                ("", "", 401, ""),
                ("?token=wrong", "", 401, ""),
                (f"?token={token}", "", 101, ""),
                (f"?since=&token={token}", "", 101, ""),
                ("", f"popup-notifier, {token}", 101, "popup-notifier"),
                ("", token, 101, token),
                ("", "popup-notifier, wrong", 401, ""),
            ]:
                with self.subTest(query, offered=offered), daemon.connect() as sock:
                    field = f"Sec-WebSocket-Protocol: {offered}\r\n" if offered else ""
                    sock.sendall(handshake("/crmws" + query)[:-2] + f"{field}\r\n".encode())
                    answer = sock.recv(4096).decode("latin-1")
                    self.assertEqual(status_of(answer.encode()), status)
                    found = re.search("Sec-WebSocket-Protocol: (.*)\r", answer)
                    self.assertEqual(found[1] if found else "", chosen)
            daemon.wait_for_log("401 token is not CRMWS_TOKEN")
            self.assertNotIn(token, "\n".join(daemon.lines))


class TestClientPort(unittest.TestCase):
    """CLIENT_PORT."""

    def test_client_port_serves_browsers_only(self) -> None:
        port = free_port()
        with Daemon(CLIENT_PORT=port) as daemon:
            main_port, daemon.port = daemon.port, port
            for path in ("/api/trigger", "/healthz", "/metrics"):
                request = f"GET {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode()
                self.assertEqual(status_of(daemon.exchange(request)), 404)
            with daemon.browser() as browser:
                daemon.port = main_port
                daemon.trigger()
                self.assertEqual(browser.phones(1), ["0312345678"])


class TestServer(unittest.TestCase):
    """Accepting, waiting, refusing."""

    def test_refusals_repeated_are_summed_up(self) -> None:
        with Daemon() as daemon:
            for _ in range(50):
                daemon.exchange(b"GET /admin.php HTTP/1.1\r\nHost: h\r\n\r\n")
            daemon.trigger()
            daemon.wait_for_log("call ")
            self.assertEqual(len(daemon.wait_for_log("refused: 127.0.0.1 404")), 3)

    def test_refusals_are_all_counted_in_the_log_sooner_or_later(self) -> None:
        def refused(daemon: Daemon, source: str) -> int:
            """Return how many the log tells of, one by one or summed up."""
            lines = [line for line in daemon.lines if f"refused: {source} 404" in line]
            more = [re.search(r" 404, (\d+) times more$", line) for line in lines]
            return sum(int(each[1]) if each else 1 for each in more)

        for limit in ("p.REPORT_PERIOD = 0.5", "p.REPORT_PAIRS = 2"):
            with self.subTest(limit), patched(limit) as program, Daemon(program=program) as daemon:
                for _ in range(20):
                    daemon.get("/admin.php")
                daemon.get("/admin.php", source="127.0.0.2")  # the second that is counted
                until(lambda: refused(daemon, "127.0.0.1") == 20, "all are told of")
                self.assertEqual(refused(daemon, "127.0.0.2"), 1)

    def test_probe_that_says_nothing_is_not_logged(self) -> None:
        with Daemon() as daemon:
            daemon.connect().close()
            reset(daemon.connect())
            daemon.trigger()
            daemon.wait_for_log("call ")
            self.assertEqual(len(daemon.lines), 2, daemon.lines)

    def test_connection_that_is_gone_before_it_is_accepted_harms_nobody(self) -> None:
        with patched(
            "accept, fails = p.socket.socket.accept, iter([1] * 3)",
            "def accept_some(sock):",
            "    if next(fails, 0): raise ConnectionAbortedError",
            "    return accept(sock)",
            "p.socket.socket.accept = accept_some",
        ) as program:
            with Daemon(program=program) as daemon:
                self.assertEqual(daemon.trigger(), 200)

    def test_answer_has_a_date(self) -> None:
        with Daemon() as daemon:
            answer = daemon.get("/healthz")
        day = r"\r\nDate: [A-Z][a-z]{2}, \d\d [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d GMT\r\n"
        self.assertRegex(answer, day)

    def test_too_long_a_head_is_refused(self) -> None:
        with Daemon() as daemon:
            answer = daemon.exchange(b"GET /" + b"a" * 20000)
            self.assertEqual(status_of(answer), 431)

    def test_bare_line_feed_is_refused_at_once(self) -> None:
        with Daemon() as daemon:
            self.assertEqual(status_of(daemon.exchange(b"GET / HTTP/1.1\nHost: h\n\n")), 400)

    def test_refused_body_does_not_swallow_the_answer(self) -> None:
        head = b"POST /api/trigger HTTP/1.1\r\nHost: h\r\nContent-Length: 9999999\r\n\r\n"
        with Daemon() as daemon:
            self.assertEqual(status_of(daemon.exchange(head + b"x" * 1_000_000)), 413)

    def test_handshake_with_a_body_is_refused(self) -> None:
        request = handshake()[:-2] + b"Content-Length: 2\r\n\r\nhi"
        with Daemon() as daemon:
            self.assertEqual(status_of(daemon.exchange(request)), 400)

    def test_handshake_over_http_1_0_is_refused(self) -> None:
        request = handshake().replace(b"HTTP/1.1", b"HTTP/1.0")
        with Daemon() as daemon:
            self.assertEqual(status_of(daemon.exchange(request)), 426)

    def test_request_thread_that_cannot_start_is_answered_with_503(self) -> None:
        with patched(
            "start, fails = p.Server.process_request, iter([1] * 40)",
            "def process_request(*args):",
            "    if next(fails, 0): raise RuntimeError('no thread')",
            "    start(*args)",
            "p.Server.process_request = process_request",
        ) as program:
            with Daemon(program=program) as daemon:
                request = b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n"
                statuses = [status_of(daemon.exchange(request)) for _ in range(41)]
        self.assertEqual(statuses, [503] * 40 + [200])

    def test_bug_in_a_request_is_answered_with_500_and_harms_no_other(self) -> None:
        bug = "= lambda *args: 1 / 0"
        handlers = ("/metrics", "metrics_lines"), ("/healthz", "Supervisor.stalled")
        statements = [f"p.{what} {bug}" for _, what in handlers]
        with patched(*statements) as program:
            with Daemon(program=program, has_bug=True) as daemon, daemon.browser() as browser:
                before = daemon.descriptors()
                for path, _ in handlers:  # the one in the port's thread, the other in its own
                    for _ in range(popup_notifier.MAX_THREADS + 1):
                        answer = daemon.get(path)
                        self.assertEqual(status_of(answer.encode()), 500)
                        self.assertIn("popup-notifier's log says more", answer)
                self.assertEqual(daemon.trigger(), 200)
                self.assertEqual(browser.phones(1), ["0312345678"])
                until(lambda: daemon.descriptors() == before, "their descriptors are free")
                daemon.wait_for_log("a request from 127.0.0.1 hit a bug", 2)
                daemon.wait_for_log("ZeroDivisionError", 2)

    def test_slow_requests_over_the_limit_get_503(self) -> None:
        hang = "p.Supervisor.stalled = lambda *args: threading.Event().wait()"
        with patched("p.MAX_THREADS = 1", hang) as program, Daemon(program=program) as daemon:
            threads = daemon.status("Threads")
            with daemon.connect() as sock:
                sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n")
                until(lambda: daemon.status("Threads") > threads, "it is being answered")
                answer = daemon.get("/healthz")
                self.assertEqual(status_of(answer.encode()), 503)
                self.assertIn("\r\nRetry-After: 1\r\n", answer)
                self.assertEqual(daemon.trigger(), 200)

    def test_slow_readers_take_no_thread(self) -> None:
        request = b"GET /%s HTTP/1.1\r\nHost: h\r\n\r\n"
        with Daemon() as daemon, contextlib.ExitStack() as stack:
            for _ in range(2 * popup_notifier.MAX_THREADS):
                sock = stack.enter_context(daemon.connect(receive_buffer=1))
                sock.sendall(request % b"popup-sample.js")
            self.assertEqual(status_of(daemon.exchange(request % b"healthz")), 200)
            body = receive_all(sock).partition(b"\r\n\r\n")[2]
            self.assertEqual(body, (HERE / "popup-sample.js").read_bytes())


# --- 9. TLS ------------------------------------------------------------------------------------


class Certificates:
    """A private CA, and certificates for 127.0.0.1 that it signed, made by openssl."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        # Python 3.13 insists on the key usage, and on the authority's key identifier below.
        subject = ("-subj", "/CN=popup-notifier test CA", "-addext", "keyUsage=keyCertSign")
        self.openssl(
            "req", "-x509", *self.new_key("ca.key"), *subject, "-out", self.path("ca.pem")
        )

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def new_key(self, name: str) -> tuple[str, ...]:
        options = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout".split()
        return (*options, self.path(name))

    def openssl(self, *args: str) -> None:
        subprocess.run(["openssl", *args], check=True, capture_output=True, cwd=self.folder)

    def make(self, name: str, days: int = 2) -> dict[str, str]:
        """Make a certificate; return the configuration that uses it."""
        request, extensions = self.path(f"{name}.csr"), self.path("extensions")
        names = "subjectAltName=IP:127.0.0.1,DNS:localhost"
        Path(extensions).write_text(f"{names}\nauthorityKeyIdentifier=keyid\n")
        self.openssl("req", *self.new_key(f"{name}.key"), "-subj", f"/CN={name}", "-out", request)
        self.openssl(
            *("x509", "-req", "-in", request, "-CA", self.path("ca.pem")),
            *("-CAkey", self.path("ca.key"), "-CAcreateserial", "-days", str(days)),
            *("-extfile", extensions, "-out", self.path(f"{name}.pem")),
        )
        return {"CERT_FILE": self.path(f"{name}.pem"), "KEY_FILE": self.path(f"{name}.key")}

    def client(self) -> ssl.SSLContext:
        """Return what a browser is that trusts this CA."""
        return ssl.create_default_context(cafile=self.path("ca.pem"))


@needs("openssl")
class TestTLS(unittest.TestCase):
    """CLIENT_PORT with USE_SSL."""

    @classmethod
    def setUpClass(cls) -> None:
        cls.folder = tempfile.TemporaryDirectory()
        cls.certificates = Certificates(cls.folder.name)
        cls.keys = cls.certificates.make("good")

    @classmethod
    def tearDownClass(cls) -> None:
        cls.folder.cleanup()

    folder: tempfile.TemporaryDirectory[str]
    certificates: Certificates
    keys: dict[str, str]

    @contextlib.contextmanager
    def daemon(self, **keys: object) -> Iterator[tuple[Daemon, int]]:
        """Run a daemon; yield it and its port for browsers."""
        port = free_port()
        settings: dict[str, Any] = {"CLIENT_PORT": port, "USE_SSL": "yes", **self.keys, **keys}
        with Daemon(**settings) as daemon:
            yield daemon, port

    def browser(self, port: int, query: str = "") -> Browser:
        sock = socket.create_connection(("127.0.0.1", port), TIMEOUT)
        secure = self.certificates.client().wrap_socket(sock, server_hostname="127.0.0.1")
        return Browser(secure, "/crmws" + query)

    def test_calls_arrive_in_order_and_missed_ones_first(self) -> None:
        with self.daemon() as (daemon, port):
            with self.browser(port, "?since=") as browser:
                hello = browser.hello()
                for number in range(200):
                    daemon.trigger(phone=str(number))
                self.assertEqual(browser.phones(200), [str(number) for number in range(200)])
                browser.send(9, b"you?")
                self.assertEqual(browser.frame(), (Opcode.PONG, b"you?"))
            with self.browser(port, f"?since={hello['id']}") as browser:
                browser.hello()
                self.assertEqual(len(set(browser.phones(200))), 200)

    def test_old_versions_are_refused(self) -> None:
        with self.daemon() as (_, port):
            for version, is_spoken in (
                (ssl.TLSVersion.TLSv1_1, False),
                (ssl.TLSVersion.TLSv1_2, True),
                (ssl.TLSVersion.TLSv1_3, True),
            ):
                context = self.certificates.client()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", DeprecationWarning)
                    context.minimum_version = ssl.TLSVersion.TLSv1
                    context.maximum_version = version
                context.set_ciphers("ALL:@SECLEVEL=0")
                with self.subTest(version), socket.create_connection(("127.0.0.1", port)) as sock:
                    if is_spoken:
                        context.wrap_socket(sock, server_hostname="127.0.0.1").close()
                    else:
                        with self.assertRaises(OSError):
                            context.wrap_socket(sock, server_hostname="127.0.0.1")

    def test_renegotiation_is_refused(self) -> None:
        # OpenSSL 3 refuses it by itself; the 1.1 of Debian 11 does as it is told.
        with self.daemon() as (_, port):
            command = ["openssl", "s_client", "-tls1_2", "-connect", f"127.0.0.1:{port}"]
            done = subprocess.run(command, input=b"R\n", capture_output=True, timeout=TIMEOUT)
            self.assertIn(b"no renegotiation", done.stderr)

    def test_stalled_handshakes_harm_nobody_and_end(self) -> None:
        with self.daemon() as (daemon, port), contextlib.ExitStack() as stack:
            stalled = []
            for number in range(100):
                sock = stack.enter_context(socket.create_connection(("127.0.0.1", port), TIMEOUT))
                sock.sendall(b"\x16\x03\x01\x02\x00\x01"[: number % 7])
                stalled.append(sock)
            with self.browser(port) as browser:
                self.assertEqual(daemon.trigger(), 200)
                self.assertEqual(browser.phones(1), ["0312345678"])
            for sock in stalled:
                self.assertEqual(receive_all(sock), b"")

    def test_client_that_gives_up_is_named(self) -> None:
        with self.daemon() as (daemon, port):
            with socket.create_connection(("127.0.0.1", port), TIMEOUT) as sock:
                with self.assertRaises(ssl.SSLError):
                    ssl.create_default_context().wrap_socket(sock, server_hostname="127.0.0.1")
                daemon.wait_for_log("TLS: does not trust our certificate")
            with socket.create_connection(("127.0.0.1", port), TIMEOUT) as sock:
                sock.sendall(handshake())
                receive_all(sock)
            daemon.wait_for_log("plain http on the https port")
            answer = daemon.exchange(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n" * 99, port=port)
            self.assertEqual(status_of(answer), 400)
            self.assertIn(b"the address begins with https:// or wss://", answer)

    def test_certificate_that_cannot_be_used_is_a_mistake(self) -> None:
        other = self.certificates.make("other")
        garbage = self.certificates.path("garbage.pem")
        Path(garbage).write_text("garbage")
        for keys, expected in [
            ({"CERT_FILE": "/nowhere.pem"}, "CERT_FILE: cannot read /nowhere.pem: No such file"),
            ({"KEY_FILE": "/nowhere.key"}, "KEY_FILE: cannot read /nowhere.key: No such file"),
            ({"KEY_FILE": other["KEY_FILE"]}, "is not that of CERT_FILE"),
            ({"CERT_FILE": garbage}, "is not in PEM form"),
        ]:
            with self.subTest(expected), self.assertRaises(AssertionError) as caught:
                with self.daemon(**keys):
                    self.fail("it started")
            self.assertIn(expected, str(caught.exception))

    def test_renewed_certificate_is_for_new_connections(self) -> None:
        with self.daemon() as (daemon, port), self.browser(port) as old:
            renewed = self.certificates.make("renewed")
            daemon.write_config(CLIENT_PORT=port, USE_SSL="yes", **renewed)
            daemon.process.send_signal(signal.SIGHUP)
            daemon.wait_for_log("configuration reloaded")
            with self.browser(port) as new:
                assert isinstance(new.sock, ssl.SSLSocket)
                self.assertIn("'renewed'", str(new.sock.getpeercert()))
                daemon.trigger()
                self.assertEqual(new.phones(1) + old.phones(1), ["0312345678"] * 2)

    def test_reload_without_tls_leaves_the_port_its_tls(self) -> None:
        with self.daemon() as (daemon, port):
            for number, use_ssl in enumerate(("no", "yes"), 1):
                daemon.write_config(CLIENT_PORT=port, **{**self.keys, "USE_SSL": use_ssl})
                daemon.process.send_signal(signal.SIGHUP)
                daemon.wait_for_log("configuration reloaded", number)
                with self.browser(port) as browser:
                    daemon.trigger()
                    self.assertEqual(browser.phones(1), ["0312345678"])
            self.assertEqual(len(daemon.wait_for_log("USE_SSL has changed: that needs")), 1)

    def test_browsers_that_come_and_go_leave_no_descriptor(self) -> None:
        with self.daemon() as (daemon, port):
            before = daemon.descriptors()
            chance = random.Random(19)
            for number in range(60):
                browser = self.browser(port)
                daemon.trigger(phone=str(number))
                if chance.random() < 0.5:
                    self.assertEqual(browser.phones(1), [str(number)])
                browser.sock.close() if chance.random() < 0.5 else reset(browser.sock)
            daemon.wait_for_log("browser gone", 60)
            until(lambda: daemon.descriptors() == before, "their descriptors are free")


# --- 10. Redis ---------------------------------------------------------------------------------


def redis_metrics(daemon: Daemon) -> dict[str, float]:
    """Return what /metrics says of Redis."""
    answer = daemon.exchange(b"GET /metrics HTTP/1.1\r\nHost: h\r\n\r\n").decode()
    found = re.findall(r"^popup_notifier_(redis\S*) (\S+)$", answer, re.MULTILINE)
    return {name: float(value) for name, value in found}


def waiting_calls(daemon: Daemon) -> float:
    """Return how many of a daemon's calls are not in the stream."""
    return redis_metrics(daemon)["redis_waiting_calls"]


REDIS_PASSWORD = "p@ss/word:that#no?log may show"

# (what it is, bytes from Redis, replies)
GOOD_REPLIES: list[tuple[str, bytes, list[Any]]] = [
    ("status", b"+OK\r\n+QUEUED\r\n", ["OK", "QUEUED"]),
    ("integers", b":0\r\n:-1\r\n:9223372036854775807\r\n", [0, -1, 2**63 - 1]),
    ("string", b"$5\r\nhello\r\n", [b"hello"]),
    ("string with line ends", b"$6\r\n\r\n$-1\r\r\n", [b"\r\n$-1\r"]),
    ("empty string", b"$0\r\n\r\n", [b""]),
    ("nothing", b"$-1\r\n*-1\r\n", [None, None]),
    ("empty list", b"*0\r\n", [[]]),
    ("lists in lists", b"*2\r\n*1\r\n:1\r\n*2\r\n*0\r\n$1\r\na\r\n:2\r\n", [[[1], [[], b"a"]], 2]),
    (
        "a stream's entry",
        b"*1\r\n*2\r\n$1\r\ns\r\n*1\r\n*2\r\n$3\r\n1-0\r\n*2\r\n$1\r\nk\r\n$1\r\nv\r\n",
        [[[b"s", [[b"1-0", [b"k", b"v"]]]]]],
    ),
]

# (what it is, bytes that Redis never sends)
BAD_REPLIES = [
    ("other protocol", b"HTTP/1.1 200 OK\r\n"),
    ("no number", b":one\r\n"),
    ("endless line", b"+" + b"x" * 20_000),
    ("endless number", b"$" + b"9" * 30 + b"\r\n"),
    ("too long a string", b"$1048577\r\n"),
    ("too long a list", b"*65537\r\n"),
    ("too deep", b"*1\r\n" * 9),
]


class TestReply(unittest.TestCase):
    """Redis's protocol, by bytes."""

    def replies(self, data: bytes) -> list[Any]:
        stream = io.BytesIO(data)
        replies = []
        while stream.tell() < len(data):
            replies.append(popup_notifier.read_reply(stream))
        return replies

    def test_replies_of_each_kind(self) -> None:
        for label, stream, expected in GOOD_REPLIES:
            with self.subTest(label):
                self.assertEqual(self.replies(stream), expected)

    def test_errors_are_replies(self) -> None:
        error, (inner, number) = self.replies(b"-ERR no\r\n*2\r\n-OOM\r\n:1\r\n")
        self.assertEqual((str(error), str(inner), number), ("ERR no", "OOM", 1))
        self.assertIsInstance(error, popup_notifier.RedisError)

    def test_what_redis_never_sends_is_refused(self) -> None:
        for label, stream in BAD_REPLIES:
            with self.subTest(label), self.assertRaises(popup_notifier.ReplyError):
                self.replies(stream)

    def test_reply_that_ends_too_early_is_refused(self) -> None:
        _, stream, _ = GOOD_REPLIES[-1]
        for cut in range(1, len(stream)):
            with (
                self.subTest(cut),
                self.assertRaises((ConnectionError, popup_notifier.ReplyError)),
            ):
                self.replies(stream[:cut])

    def test_command_counts_bytes_not_characters(self) -> None:
        self.assertEqual(
            popup_notifier.serialize_command("XADD", "\r\n", 5, "é"),
            b"*4\r\n$4\r\nXADD\r\n$2\r\n\r\n\r\n$1\r\n5\r\n$2\r\n\xc3\xa9\r\n",
        )


class Redis:
    """A real redis-server in a folder of its own, which survives being killed."""

    def __init__(self, *options: str) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.port = free_port()
        self.path = str(Path(self.folder.name, "redis.sock"))
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.options = options
        self.start()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        self.process = subprocess.Popen(
            [
                *("redis-server", "--port", str(self.port), "--bind", "127.0.0.1"),
                *("--unixsocket", self.path, "--dir", self.folder.name, "--save", ""),
                # With everysec it may keep a write to itself while the disk is busy.
                *("--appendonly", "yes", "--appendfsync", "always", *self.options),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + TIMEOUT
        while True:
            try:
                self.ask("PING")
            except (OSError, RedisError) as error:
                if str(error).startswith("NOAUTH"):
                    return
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError(f"redis-server does not answer: {error}") from None
                time.sleep(0.01)
            else:
                return

    def __enter__(self) -> Redis:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.folder.cleanup()

    def kill(self) -> None:
        """End it without warning."""
        self.process.kill()
        self.process.wait()

    def ask(self, *words: object) -> Any:
        """Return the reply to a command."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(TIMEOUT)
            sock.connect(self.path)
            sock.sendall(popup_notifier.serialize_command(*words))
            with sock.makefile("rb") as replies:
                reply = popup_notifier.read_reply(replies)
            if isinstance(reply, RedisError):
                raise reply
            return reply


UP = "Redis is up"
AWAY = "Redis is away"


@needs("redis-server")
class TestRedisStream(unittest.TestCase):
    """Several daemons and a real Redis."""

    def pair(
        self, stack: contextlib.ExitStack, redis: Redis, program: Path = PROGRAM
    ) -> tuple[Daemon, Daemon]:
        one, other = (
            stack.enter_context(Daemon(program=program, REDIS_URL=redis.url)) for _ in range(2)
        )
        for daemon in (one, other):
            daemon.wait_for_log(UP)
        return one, other

    def test_call_reaches_the_browsers_of_every_daemon_in_one_order(self) -> None:
        # On a busy machine a call may take long through Redis.
        patience = f"p.REDIS_PATIENCE = {TIMEOUT}"
        with Redis() as redis, patched(patience) as program, contextlib.ExitStack() as stack:
            daemons = self.pair(stack, redis, program)
            browsers = [stack.enter_context(each.browser()) for each in daemons]
            with ThreadPoolExecutor(8) as pool:
                numbers = range(200)
                done = [pool.submit(daemons[n % 2].trigger, phone=str(n)) for n in numbers]
            self.assertEqual({each.result() for each in done}, {200})
            first, second = ([each.message() for _ in numbers] for each in browsers)
            self.assertEqual(first, second)
            self.assertEqual(len({each["phone"] for each in first}), len(numbers))
            _, *entries = [
                name.decode() for name, _ in redis.ask("XRANGE", "popup-notifier", "-", "+")
            ]
            self.assertEqual([each["id"] for each in first], entries)
            health = daemons[0].exchange(b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n").decode()
            self.assertIn(f"\nRedis up: calls are shared by 127.0.0.1:{redis.port}\n", health)
            metrics = redis_metrics(daemons[1])
            self.assertEqual(
                [name for name, value in metrics.items() if value], ['redis{state="up"}']
            )
            self.assertEqual(len(metrics), 5)

    def test_position_is_the_same_on_every_daemon(self) -> None:
        with Redis() as redis, contextlib.ExitStack() as stack:
            one, other = self.pair(stack, redis)
            with one.browser("?since=") as browser, other.browser() as there:
                browser.hello()
                for number in range(4):
                    (one, other)[number % 2].trigger(
                        f"&exten={201 + number % 2}", phone=str(number)
                    )
                position = browser.message()["id"]
                browser.phones(3)
                there.phones(4)
            for daemon in (one, other):
                for query, expected in (("", "123"), ("&exten=202", "13")):
                    with daemon.browser(f"?since={position}{query}") as browser:
                        self.assertTrue(browser.hello()["complete"])
                        messages = [browser.message() for _ in expected]
                    self.assertEqual([each["phone"] for each in messages], [*expected])

    def test_browser_that_has_heard_more_than_its_node_hears_nothing_twice(self) -> None:
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            program = stack.enter_context(
                patched(
                    "receive = p.RedisStream._receive",
                    "def wait(*args):",
                    f"    while os.path.exists({folder + '/hold'!r}): time.sleep(0.01)",
                    "    receive(*args)",
                    "p.RedisStream._receive = wait",
                )
            )
            redis = stack.enter_context(Redis())
            one = stack.enter_context(Daemon(REDIS_URL=redis.url))
            slow = stack.enter_context(Daemon(REDIS_URL=redis.url, program=program))
            for daemon in (one, slow):
                daemon.wait_for_log(UP)
            hold = Path(folder, "hold")
            hold.touch()
            with one.browser("?since=") as browser:
                browser.hello()
                one.trigger(phone="1")
                position = browser.message()["id"]
            with slow.browser(f"?since={position}") as moved, slow.browser() as stays:
                hello = moved.hello()
                self.assertEqual((hello["id"], hello["complete"]), (position, True))
                hold.unlink()
                one.trigger(phone="2")
                self.assertEqual(stays.phones(2), ["1", "2"])
                self.assertEqual(moved.phones(1), ["2"])

    def test_position_ahead_of_the_clocks_is_complete(self) -> None:
        with Redis() as redis, contextlib.ExitStack() as stack:
            one = stack.enter_context(Daemon(REDIS_URL=redis.url))
            one.wait_for_log(UP)
            # As the stream goes on when Redis's clock has been put forward, or is put back next.
            ahead = int(time.time() * 1000) + 60_000
            redis.ask("XADD", "popup-notifier", f"{ahead}-0", "resumed", "1")
            with one.browser() as browser:
                one.trigger(phone="0")
                position = browser.message()["id"]
            self.assertEqual(position, f"{ahead}-1")
            one.trigger(phone="1")
            one.trigger(phone="2")
            other = stack.enter_context(Daemon(REDIS_URL=redis.url))
            other.wait_for_log(UP)
            for daemon, times in ((one, 1), (other, 1), (one, 2)):
                daemon.wait_for_log(UP, times)
                with daemon.browser(f"?since={position}") as browser:
                    self.assertTrue(browser.hello()["complete"])
                    self.assertEqual(browser.phones(2), ["1", "2"])
                redis.ask("CLIENT", "KILL", "TYPE", "normal")

    def test_history_survives_a_restart_of_all_daemons(self) -> None:
        with Redis() as redis:
            with Daemon(REDIS_URL=redis.url) as daemon:
                daemon.wait_for_log(UP)
                daemon.trigger()
                with daemon.browser("?since=") as browser:
                    position = browser.hello()["id"]
                for number in range(3):
                    daemon.trigger(phone=str(number))
            with Daemon(REDIS_URL=redis.url) as daemon:
                daemon.wait_for_log(UP)
                with daemon.browser(f"?since={position}") as browser:
                    self.assertTrue(browser.hello()["complete"])
                    self.assertEqual(browser.phones(3), ["0", "1", "2"])
                with daemon.browser("?since=1-0") as browser:
                    self.assertFalse(browser.hello()["complete"])
                with daemon.browser() as browser:
                    daemon.trigger(phone="3")
                    self.assertEqual(browser.phones(1), ["3"])

    def test_without_redis_calls_are_delivered_here_and_shared_later(self) -> None:
        with Redis() as redis, contextlib.ExitStack() as stack:
            one, other = self.pair(stack, redis)
            here = stack.enter_context(one.browser("?since="))
            there = stack.enter_context(other.browser("?exten=201"))
            here.hello()
            redis.kill()
            for daemon in (one, other):
                daemon.wait_for_log(AWAY)
            start = time.monotonic()
            for number in range(20):
                self.assertEqual(one.trigger(f"&exten={201 + number % 2}", phone=str(number)), 200)
                message = here.message()
                self.assertEqual(message["phone"], str(number))
            self.assertLess(time.monotonic() - start, 20 * popup_notifier.REDIS_PATIENCE)
            self.assertEqual(redis_metrics(one)["redis_waiting_calls"], 20)
            # On a daemon that has not heard of them, they come again: under the same keys.
            moved = stack.enter_context(other.browser(f"?since={message['id']}"))
            self.assertTrue(moved.hello()["complete"])
            redis.start()
            one.wait_for_log(UP, 2)
            self.assertEqual(there.phones(10), [str(number) for number in range(0, 20, 2)])
            *_, last = [moved.message() for _ in range(20)]
            self.assertEqual(last, {**message, "id": last["id"], "time": last["time"]})
            other.wait_for_log(UP, 2)
            other.trigger(phone="last")
            for browser in (here, there, moved):
                self.assertEqual(browser.phones(1), ["last"])
            # Who comes back now gets them once, from the stream.
            for daemon in (one, other):
                with daemon.browser(f"?since={message['id']}") as browser:
                    self.assertTrue(browser.hello()["complete"])
                    expected = [*(str(number) for number in range(20)), "last"]
                    self.assertEqual(browser.phones(21), expected)
            for daemon in (one, other):
                self.assertEqual(len(daemon.wait_for_log(AWAY)), 1)

    def test_time_of_a_late_call_is_when_it_was_triggered(self) -> None:
        with Redis() as redis, contextlib.ExitStack() as stack:
            one, other = self.pair(stack, redis)
            here = stack.enter_context(one.browser())
            there = stack.enter_context(other.browser())
            redis.kill()
            one.wait_for_log(AWAY)
            one.trigger()
            first = here.message()
            # Late is whatever has waited for longer than a second.
            until(lambda: time.time() * 1000 > first["time"] + 1100, "a second later")
            redis.start()
            late = there.message()
        self.assertEqual(late["key"], first["key"])
        self.assertLess(abs(late["time"] - first["time"]), 1000)
        self.assertLess(late["time"], call_id(late)[0] - 1000)

    def test_start_without_redis_serves_those_who_come_back(self) -> None:
        with Redis() as redis, contextlib.ExitStack() as stack:
            one = stack.enter_context(Daemon(REDIS_URL=redis.url))
            one.wait_for_log(UP)
            with one.browser("?since=") as browser:
                position = browser.hello()["id"]
                one.trigger(phone="1")
                browser.phones(1)
            until(lambda: not waiting_calls(one), "the call is in the stream")
            redis.kill()
            other = stack.enter_context(Daemon(REDIS_URL=redis.url))
            other.wait_for_log(AWAY)
            with other.browser(f"?since={position}") as browser:
                self.assertFalse(browser.hello()["complete"])
                other.trigger(phone="2")
                self.assertEqual(browser.phones(1), ["2"])
                redis.start()  # what was there before this daemon is brought in then
                self.assertEqual(browser.phones(1), ["1"])
                other.trigger(phone="3")
                phones = [browser.message()["phone"]]
                while phones[-1] != "3":  # 2 may come again, under its key
                    phones += browser.phones(1)
                self.assertLessEqual(set(phones), {"2", "3"})

    def test_the_most_parameters_reach_every_daemon(self) -> None:
        with Redis() as redis, contextlib.ExitStack() as stack:
            one, other = self.pair(stack, redis)
            more = "".join(f"&x{number}=1" for number in range(popup_notifier.MAX_PARAMETERS - 2))
            with other.browser() as browser:
                self.assertEqual(one.trigger(more), 200)
                self.assertEqual(len(browser.message()["data"]), popup_notifier.MAX_PARAMETERS)
                self.assertEqual(one.trigger(f"{more}&y=1"), 400)

    def test_call_that_waits_longer_than_the_history_is_given_up(self) -> None:
        # Nobody asks how it is meanwhile, and no other call comes.
        with patched("p.REDIS_KEEP = 0.01") as program, Redis() as redis:
            with Daemon(program=program, REDIS_URL=redis.url, HISTORY=0) as daemon:
                daemon.wait_for_log(UP)
                redis.kill()
                daemon.wait_for_log(AWAY)
                daemon.trigger()
                redis.start()
                daemon.wait_for_log("1 calls did not reach the other nodes")
                self.assertEqual(redis_metrics(daemon)["redis_lost_calls_total"], 1)
                # The one that is no call.
                self.assertEqual(redis.ask("XLEN", "popup-notifier"), 1)

    def test_entry_that_comes_again_after_many_others_is_skipped(self) -> None:
        with patched("p.MAX_HISTORY = 3") as program, Redis() as redis:
            with Daemon(program=program, REDIS_URL=redis.url) as daemon:
                daemon.wait_for_log(UP)
                now = int(time.time() * 1000)
                with daemon.browser() as browser:
                    for number in (1, 2, 3, 4, 5, 5, 6):
                        parameters = json.dumps({"phone": str(number), "exten": "all"})
                        words = ("key", f"k-{number}", "time", now, "source", "x")
                        redis.ask("XADD", "popup-notifier", "*", *words, "parameters", parameters)
                    self.assertEqual(browser.phones(6), [*"123456"])

    def test_browser_that_is_silent_before_the_history_is_here_is_gone_too(self) -> None:
        url = f"redis://127.0.0.1:{free_port()}"
        with patched(
            "p.MAX_UNANSWERED = 1",
            "p.REDIS_START = 0.1",
            "load = p.load_config",
            "def quick(path):",
            "    config, warnings = load(path)",
            "    return config._replace(ping_interval=0.2), warnings",
            "p.load_config = quick",
        ) as program:
            with Daemon(program=program, REDIS_URL=url) as daemon:
                with daemon.browser("?since=1-1") as browser:
                    browser.hello()
                    alive = json.loads(browser.frame()[1])
                    self.assertEqual((alive["type"], alive["id"]), ("ALIVE", "1-1"))
                    self.assertEqual(browser.frame(), (Opcode.PING, b""))
                    daemon.wait_for_log("browser dropped: 127.0.0.1 was silent for 0 s")
                    wait_for_reset(browser.sock)

    def test_link_that_fails_is_tried_again_less_and_less_often(self) -> None:
        with patched(
            "sleep = time.sleep",
            "def nap(seconds):",
            "    p.log.info('next attempt in %.3f s', seconds)",
            "    sleep(seconds)",
            "time.sleep = nap",
        ) as program:
            url = f"redis://127.0.0.1:{free_port()}"
            with Daemon(program=program, REDIS_URL=url) as daemon:
                lines = daemon.wait_for_log("next attempt in", 6)  # three of each link
                seconds = sorted(float(line.split()[-2]) for line in lines)
                self.assertGreaterEqual(seconds[0], 0.05)
                self.assertGreaterEqual(seconds[-1], 0.2)

    def test_quiet_stream_has_lost_no_calls(self) -> None:
        with patched("p.REDIS_BLOCK = 0.1") as program, Redis() as redis:
            with Daemon(program=program, REDIS_URL=redis.url) as daemon:
                daemon.wait_for_log(UP)
                daemon.trigger()

                def looks() -> int:
                    """Return how often the daemon has looked at the stream."""
                    statistics = redis.ask("INFO", "commandstats").decode()
                    return int((re.findall(r"xrevrange:calls=(\d+)", statistics) or [0])[0])

                first = looks()
                until(lambda: looks() >= first + 3, "it looks again")
                self.assertNotIn("has lost calls", "".join(daemon.lines))

    @needs("faketime")
    def test_time_of_a_call_is_that_of_redis(self) -> None:
        environ = {"LD_PRELOAD": faketime(), "FAKETIME": "+2h", "DONT_FAKE_MONOTONIC": "1"}
        with Redis() as redis, Daemon(REDIS_URL=redis.url, environ=environ) as daemon:
            daemon.wait_for_log(UP)
            with daemon.browser() as browser:
                daemon.trigger()
                self.assertLess(abs(browser.message()["time"] / 1000 - time.time()), TIMEOUT)

    def test_calls_that_are_given_up_leave_the_memory(self) -> None:
        with Redis() as redis, Daemon(REDIS_URL=redis.url, HISTORY=0) as daemon:
            daemon.wait_for_log(UP)
            redis.kill()
            daemon.wait_for_log(AWAY)
            sizes = []
            for _ in range(3):
                for number in range(1000):
                    daemon.trigger(f"&name={'x' * 2000}&more={'x' * 2000}", phone=str(number))
                until(lambda: not waiting_calls(daemon), "all are given up")
                sizes.append(daemon.status("VmRSS"))
            # KiB. The calls of two rounds have 32,000; how many wait at a time is chance.
            self.assertLess(sizes[2] - sizes[0], 16 * 1024)

    def test_stopped_redis_delays_nobody(self) -> None:
        with Redis() as redis, contextlib.ExitStack() as stack:
            one, other = self.pair(stack, redis)
            here = stack.enter_context(one.browser())
            there = stack.enter_context(other.browser())
            redis.process.send_signal(signal.SIGSTOP)
            try:
                delays = []
                for number in range(10):
                    start = time.monotonic()
                    self.assertEqual(one.trigger(phone=str(number)), 200)
                    self.assertEqual(here.phones(1), [str(number)])
                    delays.append(time.monotonic() - start)
                one.wait_for_log("Redis is slow")
            finally:
                redis.process.send_signal(signal.SIGCONT)
            self.assertGreater(delays[0], 0.09)  # REDIS_PATIENCE, for one call only
            self.assertLess(delays[0], 0.5)
            self.assertLess(sorted(delays[1:])[4], 0.05)
            one.wait_for_log("shared by .* again")
            self.assertEqual(there.phones(10), [str(number) for number in range(10)])
            other.trigger(phone="last")
            self.assertEqual((here.phones(1), there.phones(1)), (["last"], ["last"]))

    def test_waiting_trigger_keeps_nobody_else_waiting(self) -> None:
        with Redis() as redis, Daemon(REDIS_URL=redis.url) as daemon:
            daemon.wait_for_log(UP)
            redis.process.send_signal(signal.SIGSTOP)
            try:
                with daemon.connect() as sock:
                    sock.sendall(trigger_request("?phone=1&token={token}", "", b""))
                    daemon.browser().sock.close()
                    sock.setblocking(False)
                    self.assertRaises(BlockingIOError, sock.recv, 1)
                    sock.settimeout(TIMEOUT)
                    self.assertEqual(status_of(receive_all(sock)), 200)
            finally:
                redis.process.send_signal(signal.SIGCONT)

    def test_refusals_are_one_clear_line_and_the_daemon_runs(self) -> None:
        options = ("--requirepass", REDIS_PASSWORD)
        with Redis(*options) as redis:
            password = quote(REDIS_PASSWORD, safe="")
            address = f"127.0.0.1:{redis.port}"
            for login, expected in [
                ("", "NOAUTH Authentication required."),
                (":wrong@", "WRONGPASS "),
                (f"nobody:{password}@", "WRONGPASS "),
            ]:
                with self.subTest(login), Daemon(REDIS_URL=f"redis://{login}{address}") as daemon:
                    daemon.wait_for_log(f'{AWAY}: {address} refuses: "{expected}')
                    with daemon.browser() as browser:
                        self.assertEqual(daemon.trigger(), 200)
                        self.assertEqual(browser.phones(1), ["0312345678"])
                    self.assertEqual(len(daemon.wait_for_log(AWAY)), 1)
                    self.assertNotIn("wrong", "".join(daemon.lines))
            url = f"redis://:{password}@{address}/3?stream=calls"
            with Daemon(REDIS_URL=url) as daemon:
                daemon.wait_for_log(UP)
                self.assertEqual(daemon.trigger(), 200)
                self.assertNotIn(REDIS_PASSWORD, "".join(daemon.lines))
            done = subprocess.run(
                [sys.executable, str(PROGRAM), "--check", "--config", str(self.config(url))],
                capture_output=True,
                text=True,
            )
            self.assertIn(f"REDIS_URL={popup_notifier.parse_redis_url(url)}\n", done.stdout)
            self.assertNotIn(password, done.stdout + done.stderr)

    def test_refusal_that_repeats_the_password_is_not_shown(self) -> None:
        with Redis("--rename-command", "AUTH", "") as redis:
            url = f"redis://someone:geheim@127.0.0.1:{redis.port}"
            with Daemon(REDIS_URL=url) as daemon:
                daemon.wait_for_log(f"{AWAY}: .* refuses: .*unknown command .AUTH")
                health = daemon.exchange(b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n")
                self.assertNotIn("geheim", health.decode() + "".join(daemon.lines))

    def config(self, url: str) -> Path:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        path = Path(folder.name, "popup-notifier.conf")
        path.touch(0o600)
        path.write_text(f"SECRET_TOKEN=t\nREDIS_URL={url}\n")
        return path

    def test_readme_configuration_of_redis(self) -> None:
        (block,) = (block for block in readme_blocks("text") if "appendonly" in block)
        (line,) = (block for block in readme_blocks("ini") if "REDIS_URL" in block)
        user = next(row for row in block.splitlines() if row.startswith("user popup "))
        poor = user.replace("user popup ", "user poor ").replace(" +xadd", "")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "redis.conf")
            path.write_text(block.replace("192.0.2.20", "127.0.0.2") + poor + "\n")
            with Redis("--include", str(path)) as redis:
                address = f"127.0.0.2:{redis.port}"
                url = line.strip().partition("=")[2].replace("redis.example.com:6379", address)
                with Daemon(REDIS_URL=url) as daemon:
                    daemon.wait_for_log(UP)
                    self.assertEqual(daemon.trigger(), 200)
                    with daemon.browser("?since=0-0") as browser:
                        browser.hello()
                        self.assertEqual(browser.phones(1), ["0312345678"])
                with Daemon(REDIS_URL=url.replace("popup:", "poor:")) as daemon:
                    with daemon.browser() as browser:
                        self.assertEqual(daemon.trigger(), 200)
                        self.assertEqual(browser.phones(1), ["0312345678"])
                    daemon.wait_for_log(f'{AWAY}: {address} refuses: "NOPERM')

    def test_peer_that_is_no_redis_is_named(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            with Daemon(REDIS_URL=f"redis://127.0.0.1:{server.getsockname()[1]}") as daemon:
                # The two that connect are the one that reads and the one that writes.
                with server.accept()[0] as one, server.accept()[0] as other:
                    for sock in (one, other):
                        sock.sendall(b"+OK\r\n" + 3 * b":5\r\n")
                    daemon.wait_for_log(f"{AWAY}: .* answers as no Redis does: ")
                self.assertEqual(daemon.trigger(), 200)

    def test_key_that_is_no_stream_is_named(self) -> None:
        with Redis() as redis:
            redis.ask("SET", "popup-notifier", "a text")
            with Daemon(REDIS_URL=redis.url) as daemon:
                daemon.wait_for_log(f'{AWAY}: .* refuses: "WRONGTYPE')
                self.assertEqual(daemon.trigger(), 200)
                redis.ask("DEL", "popup-notifier")
                daemon.wait_for_log(UP)
                until(
                    lambda: "parameters" in str(redis.ask("XRANGE", "popup-notifier", "-", "+")),
                    "the call is in the stream",
                )

    def test_entries_that_are_not_ours_are_passed_over(self) -> None:
        strange = [("a", "b"), ("key", "a-1"), ("key", "é", "time", "1", "parameters", "{}")]
        ours = ("key", "a-1", "time", "1", "source", "", "parameters")
        with Redis() as redis, Daemon(REDIS_URL=redis.url) as daemon:
            daemon.wait_for_log(UP)
            with daemon.browser() as browser:
                long = json.dumps({"phone": "1", "exten": "all", "name": "x" * 2049})
                strange += [(*ours, text) for text in ("{", "[]", '{"phone": []}', "{}", long)]
                # Of the right shape: each of them would end the relay, or begin a log line.
                good = '{"phone": "1", "exten": "all"}'
                for at, source in [("9" * 400, ""), ("-1", ""), ("0", "x\nforged"), ("0", "é")]:
                    odd = ("key", "a-1", "time", at, "source", source)
                    strange.append((*odd, "parameters", good))
                for words in strange:
                    redis.ask("XADD", "popup-notifier", "*", *words)
                daemon.trigger()
                self.assertEqual(browser.phones(1), ["0312345678"])
            said = r"(\d+) stream entries are not calls, the first is \d+-"

            def counted() -> int:
                return sum(map(int, re.findall(said, "\n".join(daemon.lines))))

            until(lambda: counted() == len(strange), "each is counted")  # also if Redis was slow

    def test_ids_increase_when_redis_has_forgotten_all(self) -> None:
        with Redis() as redis, contextlib.ExitStack() as stack:
            daemons = self.pair(stack, redis)
            browser = stack.enter_context(daemons[1].browser())
            # A clock that is decades ahead, as far as the stream's order goes.
            redis.ask("XADD", "popup-notifier", "4000000000000-5", "resumed", "1")
            daemons[0].trigger()
            first = browser.message()
            self.assertEqual(first["id"], "4000000000000-6")
            redis.kill()
            shutil.rmtree(Path(redis.folder.name, "appendonlydir"), ignore_errors=True)
            Path(redis.folder.name, "appendonly.aof").unlink(missing_ok=True)
            redis.start()
            for daemon in daemons:
                daemon.wait_for_log("Redis has lost calls|Redis is away")
                daemon.wait_for_log(UP, 2)
            daemons[0].trigger()
            self.assertEqual(browser.message()["id"], "4000000000000-7")

    def test_calls_after_a_stream_began_anew_arrive(self) -> None:
        # The other way: one node pushes the stream on before the other looks there, and reads what
        # it has written before it writes that again.
        slow = "lambda self: [setattr(each, 'written', -1e9) for each in self._pending.values()]"
        with (
            patched(f"p.RedisStream._mark_unwritten = {slow}") as first,
            patched("p.REDIS_BLOCK = 4") as later,
        ):
            for programs in ((PROGRAM, PROGRAM), (first, later)):
                with self.subTest(programs):
                    self.begin_anew(*programs)

    def begin_anew(self, *programs: Path) -> None:
        with Redis() as redis, contextlib.ExitStack() as stack:
            one, other = (
                stack.enter_context(Daemon(program=each, REDIS_URL=redis.url)) for each in programs
            )
            for daemon in (one, other):
                daemon.wait_for_log(UP)
            here, there = (stack.enter_context(each.browser()) for each in (one, other))
            redis.ask("XADD", "popup-notifier", "4000000000000-5", "resumed", "1")
            one.trigger(phone="0")
            self.assertEqual((here.phones(1), there.phones(1)), (["0"], ["0"]))
            redis.ask("FLUSHALL")
            one.trigger(phone="1")
            self.assertEqual((here.phones(1), there.phones(1)), (["1"], ["1"]))
            # Who sees it first pushes the stream on; the other one then finds nothing amiss.
            lines = (one.lines, other.lines)
            until(lambda: "has lost calls" in str(lines), "one of them has seen it")
            one.trigger(phone="2")
            self.assertEqual((here.phones(1), there.phones(1)), (["2"], ["2"]))

    def test_redis_at_a_unix_socket(self) -> None:
        with Redis() as redis, Daemon(REDIS_URL=f"unix://{redis.path}?db=2") as daemon:
            daemon.wait_for_log(f"calls are shared by {redis.path}")
            self.assertEqual(daemon.trigger(), 200)
            databases = redis.ask("INFO", "keyspace").decode()
            self.assertEqual(re.findall(r"^db\d+", databases, re.MULTILINE), ["db2"])

    @needs("openssl")
    def test_rediss_url_needs_a_certificate_that_is_trusted(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            certificates = Certificates(folder)
            keys = certificates.make("redis")
            tls_port = free_port()
            options = ["--tls-port", str(tls_port), "--tls-auth-clients", "no"]
            options += ["--tls-cert-file", keys["CERT_FILE"], "--tls-key-file", keys["KEY_FILE"]]
            url = f"rediss://127.0.0.1:{tls_port}"
            trust = {"SSL_CERT_FILE": certificates.path("ca.pem")}
            with Redis(*options), Daemon(REDIS_URL=url, environ=trust) as daemon:
                daemon.wait_for_log(UP)
                with daemon.browser() as browser:
                    for number in range(30):
                        self.assertEqual(
                            daemon.trigger(f"&name={'x' * 2000}", phone=str(number)), 200
                        )
                    self.assertEqual(browser.phones(30), [str(number) for number in range(30)])
                self.assertNotIn("Redis is away", "".join(daemon.lines))
            with Redis(*options), Daemon(REDIS_URL=url) as daemon:
                daemon.wait_for_log(f"{AWAY}: .*certificate")

    def test_without_redis_url_there_is_no_thread_metric_or_log_line(self) -> None:
        with Daemon() as daemon, daemon.browser() as browser:
            daemon.trigger()
            self.assertRegex(browser.message()["id"], r"^\d{13}-1$")
            self.assertEqual(daemon.status("Threads"), 2)
            self.assertEqual(redis_metrics(daemon), {})
            self.assertNotIn("Redis", "".join(daemon.lines))


class Agent(threading.Thread):
    """A browser that recovers: it loses its connection all the time, here and there."""

    def __init__(self, home: int, daemons: list[Daemon], chance: random.Random) -> None:
        super().__init__(daemon=True)
        self.home = home
        self.daemons = daemons
        self.chance = chance
        self.messages: list[dict[str, Any]] = []
        self.heard: set[str] = set()
        self.keys: set[str] = set()
        self.is_complete = True
        self.position = ""

    def run(self) -> None:
        while "end" not in self.heard:
            daemon = self.daemons[self.home]
            if self.chance.random() < 0.3:
                daemon = self.chance.choice(self.daemons)
            try:
                with daemon.browser(f"?since={self.position}") as browser:
                    self.listen(browser, self.chance.choice((3, 30, 300)))
            except (OSError, EOFError, AssertionError):
                time.sleep(0.02)  # its back-off

    def listen(self, browser: Browser, count: int) -> None:
        hello = browser.hello()
        self.is_complete &= hello["complete"]
        self.position = hello["id"]
        while count and "end" not in self.heard:
            message = browser.message()
            self.position = message["id"]
            if message["key"] not in self.keys:
                self.keys.add(message["key"])
                self.messages.append(message)
                self.heard.add(message["phone"])
                count -= 1


@needs("redis-server")
class TestRedisUnderFire(unittest.TestCase):
    """Three daemons, sixty browsers, and everything is killed."""

    def test_every_browser_gets_every_call_exactly_once(self) -> None:
        with Redis() as redis, contextlib.ExitStack() as stack:
            # While Redis is up, what is answered is in the stream: also if a busy machine is slow.
            program = stack.enter_context(patched(f"p.REDIS_PATIENCE = {TIMEOUT}"))
            keys: dict[str, Any] = {"REDIS_URL": redis.url, "PING_INTERVAL": 1, "program": program}
            daemons = [stack.enter_context(Daemon(**keys)) for _ in range(3)]
            for daemon in daemons:
                daemon.wait_for_log(UP)
            agents = [Agent(n % 3, daemons, random.Random(n)) for n in range(60)]
            for agent in agents:
                agent.start()
            self.wait_until(lambda: all(agent.position for agent in agents))
            is_over = threading.Event()
            answered: list[set[str]] = [set() for _ in daemons]
            callers = [
                threading.Thread(target=self.call, args=(daemons, n, answered[n], is_over))
                for n in range(3)
            ]
            for caller in callers:
                caller.start()
            for _ in range(2):
                self.wait_for_calls(answered, 30)
                self.lose_redis(redis, daemons, answered)
            self.lose_daemon(daemons, stack, keys, answered)
            is_over.set()
            for caller in callers:
                caller.join()
            self.wait_until(lambda: not any(waiting_calls(each) for each in daemons))
            self.assertEqual(daemons[0].trigger(phone="end"), 200)
            for agent in agents:
                agent.join(TIMEOUT)
            for agent in agents:
                self.check(agent, set().union(*answered))
            names = {message["key"]: message["phone"] for a in agents for message in a.messages}
            self.assertEqual(len(names), len(set(names.values())))

    def call(
        self, daemons: list[Daemon], index: int, answered: set[str], is_over: threading.Event
    ) -> None:
        for number in itertools.count():
            if is_over.wait(0.01):
                return
            phone = f"{index}{number:05}"
            try:
                if daemons[index].trigger(phone=phone) == 200:
                    answered.add(phone)
            except OSError:
                continue  # it is being killed; nobody has promised anything

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + TIMEOUT
        while not condition():
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.01)

    def wait_for_calls(self, answered: list[set[str]], count: int) -> None:
        """Wait until each daemon has answered so many more triggers."""
        wanted = [len(each) + count for each in answered]
        self.wait_until(lambda: all(len(a) >= n for a, n in zip(answered, wanted)))

    def lose_redis(self, redis: Redis, daemons: list[Daemon], answered: list[set[str]]) -> None:
        ups = [len(daemon.wait_for_log(UP)) for daemon in daemons]
        redis.kill()
        self.wait_for_calls(answered, 30)
        redis.start()
        for daemon, count in zip(daemons, ups):
            daemon.wait_for_log(UP, count + 1)

    def lose_daemon(
        self,
        daemons: list[Daemon],
        stack: contextlib.ExitStack,
        keys: dict[str, Any],
        answered: list[set[str]],
    ) -> None:
        """Kill a daemon while calls go on; let it come back a little later."""
        self.wait_until(lambda: not waiting_calls(daemons[2]))
        self.wait_for_calls(answered, 10)
        daemons[2].process.kill()
        daemons[2].process.wait()
        self.wait_for_calls(answered[:2], 30)
        port = daemons[2].port
        again = Daemon(**keys, PORT=port)
        again.port = port
        daemons[2] = stack.enter_context(again)
        self.wait_for_calls(answered, 30)

    def check(self, agent: Agent, answered: set[str]) -> None:
        self.assertIn("end", agent.heard)
        self.assertTrue(agent.is_complete)
        phones = [message["phone"] for message in agent.messages]
        self.assertEqual(len(phones), len(set(phones)), "a call came twice")
        self.assertEqual(answered - agent.heard, set(), "calls are missing")


# --- 11. Asterisk ------------------------------------------------------------------------------

# What Asterisk 22 sent of real calls, and 16 where it is said, in the order in which it came. A
# channel is called by its name without PJSIP/, which is its uniqueid here, too; `of` is followed
# by its linkedid where that changes; the letter is a bridge. (what it is, events, what is told)
RECORDED = [
    (
        "direct",
        """
        new provider-1, new 201-2 of provider-1, dial provider-1 201-2, dialled provider-1 201-2,
        enter 201-2 a, enter provider-1 a, leave provider-1 a, leave 201-2 a, hangup provider-1,
        hangup 201-2
        """,
        "ring 201, answer 201, end 201",
    ),
    (
        "caller gives up",
        """
        new provider-1, new 201-2 of provider-1, dial provider-1 201-2, dialled provider-1 201-2,
        hangup 201-2, hangup provider-1
        """,
        "ring 201, end",
    ),
    (
        "group",
        """
        new provider-1, new 201-2 of provider-1, new 202-3 of provider-1, dial provider-1 201-2,
        dial provider-1 202-3, dialled provider-1 201-2, dialled provider-1 202-3, hangup 201-2,
        enter 202-3 a, enter provider-1 a, leave provider-1 a, leave 202-3 a, hangup 202-3, hangup
        provider-1
        """,
        "ring 201, ring 202, answer 202, end 202",
    ),
    (
        "queue, both members answer",
        """
        new provider-1, new Local/201-2;1 of provider-1, new Local/201-2;2 of provider-1, dial
        provider-1 Local/201-2;1, new Local/202-3;1 of provider-1, new Local/202-3;2 of
        provider-1, dial provider-1 Local/202-3;1, new 202-4 of provider-1, new 201-5 of
        provider-1, dial Local/202-3;2 202-4, dial Local/201-2;2 201-5, dialled Local/202-3;2
        202-4, dialled provider-1 Local/202-3;1, dialled provider-1 Local/201-2;1, dialled
        provider-1 Local/201-2;1, dialled Local/201-2;2 201-5, hangup Local/201-2;2, hangup
        Local/201-2;1, enter 202-4 a, enter Local/202-3;2 a, hangup 201-5, enter Local/202-3;1 b,
        enter provider-1 b, leave provider-1 b, hangup provider-1, leave Local/202-3;1 b, hangup
        Local/202-3;1, leave Local/202-3;2 a, hangup Local/202-3;2, leave 202-4 a, hangup 202-4
        """,
        "ring 202, ring 201, answer 202, end 202",
    ),
    (
        "the same on Asterisk 16",
        """
        new provider-1, new Local/201-2;1 of provider-1, new Local/201-2;2 of provider-1, dial
        provider-1 Local/201-2;1, new Local/202-3;1 of provider-1, new Local/202-3;2 of
        provider-1, dial provider-1 Local/202-3;1, new 201-4 of provider-1, dial Local/201-2;2
        201-4, new 202-5 of provider-1, dial Local/202-3;2 202-5, dialled Local/201-2;2 201-4,
        enter 201-4 a, dialled provider-1 Local/201-2;1, dialled provider-1 Local/202-3;1, dialled
        provider-1 Local/202-3;1, hangup Local/202-3;1, dialled Local/202-3;2 202-5, hangup
        Local/202-3;2, enter Local/201-2;1 b, enter Local/201-2;2 a, enter provider-1 b, hangup
        202-5, leave provider-1 b, leave Local/201-2;1 b, hangup Local/201-2;1, hangup provider-1,
        leave Local/201-2;2 a, leave 201-4 a, hangup Local/201-2;2, hangup 201-4
        """,
        "ring 201, ring 202, answer 201, end 201",
    ),
    (
        "Local channels that go away",
        """
        new provider-1, new Local/202-2;1 of provider-1, new Local/202-2;2 of provider-1, new
        Local/203-3;1 of provider-1, new Local/203-3;2 of provider-1, dial provider-1
        Local/202-2;1, dial provider-1 Local/203-3;1, new 203-4 of provider-1, dial Local/203-3;2
        203-4, new 202-5 of provider-1, dial Local/202-2;2 202-5, dialled Local/203-3;2 203-4,
        dialled provider-1 Local/202-2;1, hangup Local/202-2;1, dialled provider-1 Local/203-3;1,
        enter 203-4 a, dialled Local/202-2;2 202-5, hangup Local/202-2;2, hangup 202-5, enter
        Local/203-3;2 a, enter Local/203-3;1 b, enter provider-1 b, leave provider-1 b, leave
        Local/203-3;1 b, hangup Local/203-3;1, leave Local/203-3;2 a, hangup Local/203-3;2, leave
        203-4 a, hangup 203-4, hangup provider-1
        """,
        "ring 203, ring 202, answer 203, end 203",
    ),
    (
        "follow-me",
        """
        new provider-1, new Local/202-2;1 of provider-1, new Local/202-2;2 of provider-1, dial
        provider-1 Local/202-2;1, new 202-3 of provider-1, dial Local/202-2;2 202-3, dialled
        Local/202-2;2 202-3, enter 202-3 a, dialled provider-1 Local/202-2;1, enter Local/202-2;2
        a, enter Local/202-2;1 b, enter provider-1 b, leave provider-1 b, leave Local/202-2;1 b,
        hangup Local/202-2;1, leave Local/202-2;2 a, leave 202-3 a, hangup Local/202-2;2, hangup
        202-3, hangup provider-1
        """,
        "ring 202, answer 202, end 202",
    ),
    (
        "follow-me on Asterisk 16",
        """
        new provider-1, new Local/202-2;1 of provider-1, new Local/202-2;2 of provider-1, dial
        provider-1 Local/202-2;1, new 202-3 of provider-1, dial Local/202-2;2 202-3, enter
        Local/202-2;1 a, enter provider-1 a, dialled Local/202-2;2 202-3, dialled - Local/202-2;1,
        enter 202-3 b, enter Local/202-2;2 b, leave provider-1 a, leave Local/202-2;1 a, hangup
        provider-1, hangup Local/202-2;1, leave Local/202-2;2 b, hangup Local/202-2;2, leave 202-3
        b, hangup 202-3
        """,
        "ring 202, answer 202, end 202",
    ),
    (
        "forwarding",
        """
        new provider-1, new 201-2 of provider-1, dial provider-1 201-2, new Local/203-3;1 of
        provider-1, new Local/203-3;2 of provider-1, dialled provider-1 201-2, new 203-4 of
        provider-1, dial provider-1 Local/203-3;1, hangup 201-2, dial Local/203-3;2 203-4, dialled
        Local/203-3;2 203-4, dialled provider-1 Local/203-3;1, enter 203-4 a, enter Local/203-3;2
        a, enter Local/203-3;1 b, enter provider-1 b, leave provider-1 b, leave Local/203-3;1 b,
        hangup Local/203-3;1, leave Local/203-3;2 a, hangup Local/203-3;2, leave 203-4 a, hangup
        203-4, hangup provider-1
        """,
        "ring 201, ring 203, answer 203, end 203",
    ),
    (
        "blind transfer",
        """
        new provider-1, new 201-2 of provider-1, dial provider-1 201-2, dialled provider-1 201-2,
        enter 201-2 a, enter provider-1 a, leave 201-2 a, leave provider-1 a, hangup 201-2, new
        203-3 of provider-1, dial provider-1 203-3, dialled provider-1 203-3, enter 203-3 b, enter
        provider-1 b, leave provider-1 b, leave 203-3 b, hangup provider-1, hangup 203-3
        """,
        "ring 201, answer 201, ring 203, answer 203, end 203",
    ),
    (
        "attended transfer",
        """
        new provider-1, new 201-2 of provider-1, dial provider-1 201-2, dialled provider-1 201-2,
        enter 201-2 a, enter provider-1 a, new 201-3, new 203-4 of 201-3, dial 201-3 203-4,
        dialled 201-3 203-4, enter 203-4 b, enter 201-3 b, leave provider-1 a, leave 201-3 b,
        enter provider-1 b, leave 201-2 a, hangup 201-2, hangup 201-3, leave provider-1 b, leave
        203-4 b of provider-1, hangup 203-4, hangup provider-1
        """,
        "ring 201, answer 201, answer 203, end 203",
    ),
    (
        "attended transfer into an older call",
        """
        new 203-1, new 201-2 of 203-1, dial 203-1 201-2, dialled 203-1 201-2, new provider-3, new
        201-4 of provider-3, enter 201-2 a, enter 203-1 a, dial provider-3 201-4, dialled
        provider-3 201-4, enter 201-4 b, enter provider-3 b, leave provider-3 b, leave 201-2 a,
        enter provider-3 a of 203-1, leave 201-4 b, hangup 201-2, hangup 201-4, leave provider-3
        a, leave 203-1 a, hangup 203-1, hangup provider-3
        """,
        "ring 201, answer 201, answer 203, end 203",
    ),
    (
        "pick-up",
        """
        new provider-1, new 201-2 of provider-1, dial provider-1 201-2, new 203-3, dialled
        provider-1 203-3, hangup 201-2, enter 203-3 a, enter provider-1 a, leave provider-1 a,
        leave 203-3 a of provider-1, hangup provider-1, hangup 203-3
        """,
        "ring 201, answer 203, end 203",
    ),
    (
        "parking and retrieval",
        """
        new provider-1, new 201-2 of provider-1, dial provider-1 201-2, dialled provider-1 201-2,
        enter 201-2 a, enter provider-1 a, leave provider-1 a, enter provider-1 b-holding, leave
        201-2 a, hangup 201-2, new 202-3, leave provider-1 b-holding, enter provider-1 c, enter
        202-3 c of provider-1, leave provider-1 c, hangup provider-1, leave 202-3 c, hangup 202-3
        """,
        "ring 201, answer 201, answer 202, end 202",
    ),
    (
        "voicemail",
        """
        new provider-1, new 201-2 of provider-1, dial provider-1 201-2, dialled provider-1 201-2,
        hangup 201-2, hangup provider-1
        """,
        "ring 201, end",
    ),
    (
        "menu without a phone",
        """
        new provider-1, hangup provider-1
        """,
        "",
    ),
    (
        "internal",
        """
        new 201-1, new 202-2 of 201-1, dial 201-1 202-2, dialled 201-1 202-2, enter 202-2 a, enter
        201-1 a, leave 201-1 a, hangup 201-1, leave 202-2 a, hangup 202-2
        """,
        "",
    ),
    (
        "outgoing",
        """
        new 201-1, new provider-2 of 201-1, dial 201-1 provider-2, dialled 201-1 provider-2, enter
        provider-2 a, enter 201-1 a, leave 201-1 a, leave provider-2 a, hangup 201-1, hangup
        provider-2
        """,
        "",
    ),
    (
        "out again to a mobile phone",
        """
        new provider-1, new provider-2 of provider-1, dial provider-1 provider-2, dialled
        provider-1 provider-2, enter provider-2 a, enter provider-1 a, leave provider-1 a, leave
        provider-2 a, hangup provider-1, hangup provider-2
        """,
        "",
    ),
]


class TestManagerParser(unittest.TestCase):
    """The manager interface's messages, by bytes."""

    STREAM = b"Event: A\r\nX:  y: z \r\nX: again\r\nEmpty: \r\n\r\n\r\nNo colon\r\n\r\n"
    MESSAGES: ClassVar = [{"Event": "A", "X": "y: z", "Empty": ""}, {"No colon": ""}]

    def messages(self, *parts: bytes) -> list[dict[str, str]]:
        parser = popup_notifier.ManagerParser()
        return [message for part in parts for message in parser.receive_data(part)]

    def test_messages_whole_and_byte_by_byte(self) -> None:
        self.assertEqual(self.messages(self.STREAM), self.MESSAGES)
        self.assertEqual(self.messages(*(bytes([byte]) for byte in self.STREAM)), self.MESSAGES)

    def test_bytes_that_are_not_utf8_are_replaced(self) -> None:
        (message,) = self.messages(b"Name: a\xe5\xb1\nb\rc\r\n\r\n")
        self.assertEqual(message, {"Name": "a\ufffd\nb\rc"})

    def test_endless_lines_and_messages_are_cut(self) -> None:
        parser = popup_notifier.ManagerParser()
        for _ in range(1000):
            self.assertEqual(parser.receive_data(b"x" * 10_000), [])
        (message,) = parser.receive_data(
            b"\r\n" + b"".join(b"%d: 1\r\n" % n for n in range(999)) + b"\r\n"
        )
        self.assertEqual(len(message), popup_notifier.MAX_MESSAGE_FIELDS)
        self.assertLess(max(map(len, message)), 50_000)


def channel_fields(name: str, prefix: str = "") -> dict[str, str]:
    """Return the fields of an event that name a channel."""
    full = name if "/" in name else f"PJSIP/{name}"
    return {f"{prefix}Channel": full, f"{prefix}Uniqueid": name}


def manager_event(words: str, linked: dict[str, str]) -> dict[str, str]:
    """Return the event that a few words of RECORDED stand for."""
    verb, name, *rest = words.split()
    if "of" in rest:
        linked[rest[1] if verb.startswith("dial") else name] = rest.pop()
        rest.pop()
    if verb in ("dial", "dialled"):
        (phone,) = rest
        event = {"Event": "DialBegin" if verb == "dial" else "DialEnd"}
        event.update(channel_fields(phone, "Dest"), DestLinkedid=linked[phone])
    else:
        kinds = {"new": "Newchannel", "enter": "BridgeEnter", "leave": "BridgeLeave"}
        event = {"Event": kinds.get(verb, "Hangup")}
        event["ChannelState"] = "4" if name == linked.setdefault(name, name) else "0"
    if name != "-":
        event.update(channel_fields(name), Linkedid=linked.setdefault(name, name))
        event.update(CallerIDNum="0312345678", CallerIDName="<unknown>", Exten="0311110001")
    if rest:
        bridge, _, kind = rest[0].partition("-")
        event.update(BridgeUniqueid=bridge, BridgeTechnology=f"{kind or 'simple'}_bridge")
    return event


class TestSwitchboard(unittest.TestCase):
    """What is told of the events of a PBX."""

    def setUp(self) -> None:
        self.withheld: set[str] = set()
        trunks = popup_notifier.parse_trunks("provider, SIP/Branch-Office-2")
        self.board = popup_notifier.Switchboard(trunks, self.withheld.__contains__)
        self.linked: dict[str, str] = {}

    def receive(self, words: str, **fields: str) -> list[dict[str, str]]:
        """Return what is told of some events."""
        told = []
        for each in words.replace("\n", " ").split(","):
            event = {**manager_event(each, self.linked), **fields}
            told += self.board.receive_event(event)
        return told

    def short(self, told: Iterable[dict[str, str]]) -> str:
        return ", ".join(f"{each['event']} {each.get('exten', '')}".strip() for each in told)

    def list(self, *channels: dict[str, str]) -> str:
        """Return what is told after a list of all channels."""
        self.board.begin_list()
        for channel in channels:
            self.assertEqual(self.board.receive_event({"Event": "CoreShowChannel", **channel}), [])
        return self.short(self.board.receive_event({"Event": "CoreShowChannelsComplete"}))

    def test_list_that_crosses_a_call_neither_ends_nor_revives_it(self) -> None:
        self.receive("new provider-1, new 201-2 of provider-1, dial provider-1 201-2")
        old = [
            {**channel_fields(each), "Linkedid": "provider-1"} for each in ("provider-1", "201-2")
        ]
        self.board.begin_list()
        rings = "new provider-7, new 203-8 of provider-7, dial provider-7 203-8"
        self.assertEqual(self.short(self.receive(rings)), "ring 203")
        self.assertEqual(self.short(self.receive("hangup provider-1, hangup 201-2")), "end")
        for channel in old:
            self.board.receive_event({"Event": "CoreShowChannel", **channel})
        end = {"Event": "CoreShowChannelsComplete"}
        self.assertEqual(self.short(self.board.receive_event(end)), "")
        self.assertEqual(
            self.short(self.receive("enter 203-8 b, enter provider-7 b")), "answer 203"
        )
        self.assertEqual(self.short(self.receive("dial provider-1 201-2")), "")

    def test_recorded_calls_give_ring_answer_and_end(self) -> None:
        for label, events, expected in RECORDED:
            with self.subTest(label):
                self.setUp()
                told = self.receive(events)
                self.assertEqual(self.short(told), expected)
                caller = next((word for word in events.split() if "provider" in word), "")
                self.assertLessEqual({each["uniqueid"] for each in told}, {caller.strip(",")})
                self.assert_empty()

    def assert_empty(self) -> None:
        for kept in (self.board._channels, self.board._groups, self.board._calls):
            self.assertEqual(len(kept), 0)

    def test_number_and_name_of_a_caller(self) -> None:
        for fields, phone, name in (
            ({"CallerIDNum": "+81-3 (1234)"}, "+8131234", None),
            ({"CallerIDNum": "<unknown>"}, "anonymous", None),
            ({"CallerIDNum": ""}, "anonymous", None),
            ({"CallerIDNum": "非通知"}, "非通知", None),
            ({"CallerIDNum": "alice"}, "alice", None),
            ({"CallerIDName": "山田"}, "0312345678", "山田"),
            ({"CallerIDName": r"O\'Neil \"x\" \\ \n\t"}, "0312345678", 'O\'Neil "x" \\'),
            ({"CallerIDName": "<b>$(x)</b>"}, "0312345678", "<b>$(x)</b>"),
        ):
            with self.subTest(fields):
                self.setUp()
                self.receive("new provider-1", **fields)
                (told,) = self.receive("new 201-2 of provider-1, dial provider-1 201-2", **fields)
                self.assertEqual((told["phone"], told.get("name")), (phone, name))
                self.assertEqual((told["did"], told["uniqueid"]), ("0311110001", "provider-1"))

    def test_name_that_the_dialplan_sets_later_counts(self) -> None:
        self.receive("new provider-1, new 201-2 of provider-1")
        self.receive("NewCallerid provider-1", CallerIDName="Sales: 山田", Event="NewCallerid")
        (told,) = self.board.receive_event(
            {
                k: v
                for k, v in manager_event("dial provider-1 201-2", self.linked).items()
                if "CallerID" not in k
            }
        )
        self.assertEqual(told["name"], "Sales: 山田")

    def test_withheld_number_is_anonymous_without_a_name(self) -> None:
        self.withheld.add("PJSIP/provider-1")
        name = {"CallerIDName": "Yamada"}
        self.receive("new provider-1", **name)
        told = self.receive(
            "new 201-2 of provider-1, dial provider-1 201-2, hangup provider-1", **name
        )
        self.assertEqual([each["phone"] for each in told], ["anonymous"] * 2)
        self.assertNotIn("name", told[0])

    def test_trunk_is_named_with_or_without_its_technology(self) -> None:
        for channel, is_trunk in (
            ("PJSIP/provider-1", True),
            ("IAX2/Provider-1", True),
            ("DAHDI/provider/0312345678-1", True),
            ("SIP/branch-office-2-0a", True),
            ("PJSIP/branch-office-2-0a", False),
            ("PJSIP/provider-2-0a", False),
            ("Local/provider@x-1;1", False),
            ("Surrogate/PJSIP/provider-1", False),
        ):
            with self.subTest(channel):
                self.setUp()
                self.receive("new x", Channel=channel)
                self.assertEqual(len(self.board._calls), is_trunk)

    def test_outgoing_call_over_a_trunk_is_not_shown(self) -> None:
        self.receive("new provider-1", ChannelState="0")
        self.assertEqual(self.receive("new 201-2 of provider-1, dial provider-1 201-2"), [])

    def test_phone_with_two_contacts_rings_once(self) -> None:
        self.receive("new provider-1, new 201-2 of provider-1, new 201-3 of provider-1")
        told = self.receive("dial provider-1 201-2, dial provider-1 201-3")
        self.assertEqual(self.short(told), "ring 201")
        told = self.receive(
            "dialled provider-1 201-2, dialled provider-1 201-3, dial provider-1 201-3"
        )
        self.assertEqual(self.short(told), "ring 201")  # the queue's next attempt

    def test_call_that_goes_out_again_leaves_the_phone(self) -> None:
        self.receive("new provider-1, new 201-2 of provider-1, dial provider-1 201-2")
        told = self.receive("new provider-3 of provider-1, dial provider-1 provider-3")
        told += self.receive("enter provider-3 a, enter provider-1 a, hangup provider-1")
        self.assertEqual(self.short(told), "answer provider, end provider")

    def test_parked_callers_talk_to_nobody(self) -> None:
        self.receive("new provider-1, new 201-2")
        self.assertEqual(self.receive("enter 201-2 lot-holding, enter provider-1 lot-holding"), [])

    def test_parked_call_that_comes_back_rings_and_is_answered_again(self) -> None:
        self.receive("new provider-1, new 201-2 of provider-1, dial provider-1 201-2")
        told = self.receive("enter 201-2 a, enter provider-1 a, leave 201-2 a, hangup 201-2")
        told += self.receive("new 201-3 of provider-1, dial provider-1 201-3, enter 201-3 a")
        self.assertEqual(self.short(told), "answer 201, ring 201, answer 201")

    def test_call_transferred_into_an_older_one_goes_on(self) -> None:
        self.receive("new 203-1, new provider-2, new 202-3 of 203-1")
        self.receive("enter 203-1 a, enter provider-2 a of 203-1")
        self.assertEqual(self.short(self.receive("dial 203-1 202-3")), "ring 202")

    def test_leaving_another_bridge_changes_nothing(self) -> None:
        self.receive("new provider-1, new 201-2, new 202-3")
        told = self.receive("enter 201-2 a, enter provider-1 b, leave 201-2 z, enter provider-1 a")
        self.assertEqual(self.short(told), "answer 201")

    def test_conference_is_no_answer(self) -> None:
        self.receive("new provider-1, new 201-2 of provider-1, new 202-3 of provider-1")
        told = self.receive("enter 201-2 a, enter 202-3 a, enter provider-1 a")
        self.assertEqual(told, [])
        self.assertEqual(self.short(self.receive("leave 201-2 a")), "answer 202")

    def test_list_ends_what_was_missed(self) -> None:
        self.receive("new provider-1, new 201-2 of provider-1, dial provider-1 201-2")
        self.receive("new provider-3, new 201-4 of provider-3")
        living = channel_fields("provider-3")
        self.assertEqual(self.list(living), "end")
        self.assertEqual(self.list(), "")  # nobody had heard of the other
        self.assert_empty()

    def test_calls_outlive_the_connection(self) -> None:
        self.receive("new provider-1, new 201-2 of provider-1, dial provider-1 201-2")
        self.receive("dialled provider-1 201-2, enter 201-2 a, enter provider-1 a")
        self.board.disconnect()
        caller = {**channel_fields("provider-1"), "Linkedid": "provider-1", "BridgeId": "a"}
        phone = {**channel_fields("202-3"), "Linkedid": "provider-1", "BridgeId": "a"}
        self.assertEqual(self.list(caller, phone), "answer 202")  # transferred meanwhile
        self.assertEqual(self.list(caller, phone), "")
        self.board.disconnect()
        self.assertEqual(self.list(), "end 202")  # Asterisk began anew
        self.assert_empty()

    def test_first_list_shows_ringing_calls_and_ends_others(self) -> None:
        caller = {**channel_fields("provider-1"), "Linkedid": "provider-1", "BridgeId": "a"}
        phone = {**channel_fields("201-2"), "Linkedid": "provider-1", "BridgeId": "a"}
        second = {**channel_fields("provider-3"), "Linkedid": "provider-3"}
        ringing = {**channel_fields("202-4"), "Linkedid": "provider-3", "ChannelState": "5"}
        waiting = {**channel_fields("provider-5"), "Linkedid": "provider-5"}
        own = {**channel_fields("201-6"), "Linkedid": "201-6"}
        outgoing = {**channel_fields("provider-7"), "Linkedid": "201-6"}
        told = self.list(caller, phone, second, ringing, waiting, own, outgoing)
        self.assertEqual(told, "ring 202")
        self.assertEqual(self.short(self.receive("hangup provider-1")), "end 201")
        self.assertEqual(self.short(self.receive("hangup provider-5")), "end")
        self.assertEqual(self.receive("hangup provider-7"), [])

    def test_event_after_its_list_completes_the_call(self) -> None:
        self.list({**channel_fields("provider-1"), "Linkedid": "provider-1"})
        self.receive("new provider-1, new 201-2 of provider-1")
        (told,) = self.receive("dial provider-1 201-2")
        self.assertEqual((told["event"], told["did"]), ("ring", "0311110001"))

    def test_channels_without_events_show_that_the_account_lacks_a_right(self) -> None:
        for number in range(3):
            self.assertFalse(self.board.lacks_events)
            self.list(channel_fields(f"201-{number}"))
        self.assertTrue(self.board.lacks_events)
        self.board.disconnect()
        self.assertFalse(self.board.lacks_events)
        for number in range(3):
            self.list(channel_fields(f"201-{number}"))
            self.receive(f"new 202-{number}")
        self.assertFalse(self.board.lacks_events)

    def test_forged_events_do_nothing(self) -> None:
        self.receive("new provider-1, new 201-2 of provider-1, dial provider-1 201-2")
        for event in (
            {"Event": "Hangup", "Uniqueid": "provider-1"},
            {"Event": "Hangup", "Uniqueid": "provider-1", "Channel": "PJSIP/201-2"},
            {"Event": "BridgeEnter", "Uniqueid": "201-2", "BridgeUniqueid": "a"},
            {"Event": "CoreShowChannel"},
            {"Event": "DialBegin", "DestLinkedid": "provider-1"},
        ):
            self.assertEqual(self.board.receive_event(event), [], event)
        self.assertEqual(len(self.board._channels), 2)

    def test_no_sequence_of_events_breaks_it_or_lets_it_grow(self) -> None:
        chance = random.Random(1)
        names = [f"{who}-{n}" for who in ("provider", "201", "202") for n in range(9)]
        names += [f"Local/201-{n};{half}" for n in range(9) for half in (1, 2)]
        values = [*names, *(f"PJSIP/{name}" for name in names), "a", "b", "", "4", "5", "0"]
        kinds = ["Newchannel", "DialBegin", "DialEnd", "BridgeEnter", "BridgeLeave", "Hangup"]
        kinds += ["CoreShowChannel", "CoreShowChannelsComplete", "Other"]
        fields = ["Channel", "Uniqueid", "Linkedid", "DestChannel", "DestUniqueid", "DestLinkedid"]
        fields += ["BridgeUniqueid", "ChannelState", "CallerIDNum", "BridgeId", "Exten"]
        for step in range(50_000):
            name = chance.choice(names)
            event = {"Event": chance.choice(kinds), **channel_fields(name), "Linkedid": name}
            event.update(channel_fields(chance.choice(names), "Dest"))
            for field in chance.sample(fields, chance.randrange(6)):
                event[field] = chance.choice(values)
            if chance.random() < 0.1:
                event.pop(chance.choice(fields), None)
            for told in self.board.receive_event(event):
                popup_notifier.parse_parameters(told.items())
            if step % 1000 == 0:
                self.board.disconnect()
        self.list()  # what stood in the list until now
        self.list()
        self.assert_empty()

    def test_channels_that_never_hang_up_do_not_fill_the_memory(self) -> None:
        with_patch = mock.patch.object(popup_notifier, "MAX_CHANNELS", 100)
        with with_patch:
            for number in range(5000):
                self.receive(
                    f"new provider-{number}, new Local/201-{number};1 of provider-{number}"
                )
                self.receive(f"enter provider-{number} {number}")
                self.board.receive_event({"Event": "CoreShowChannel", "Uniqueid": str(number)})
            for kept in (
                self.board._channels,
                self.board._groups,
                self.board._calls,
                self.board._listed,
            ):
                self.assertLessEqual(len(kept), 150)


class FakeAsterisk:
    """A manager interface that says what a test wants, on a real socket."""

    def __init__(self, banner: bytes = b"Asterisk Call Manager/5.0.4\r\n") -> None:
        self.banner = banner
        self.refused: tuple[str, ...] = ()  # actions
        self.variables: dict[str, str] = {"CALLERID(pres)": "allowed_not_screened"}
        self.listed: list[dict[str, str]] = []
        self.actions: queue.Queue[dict[str, str]] = queue.Queue()
        self.connections: queue.Queue[None] = queue.Queue()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        url = f"ami://popup:ge%40heim@127.0.0.1:{self.port}"
        self.keys: dict[str, Any] = {"AMI_URL": url, "AMI_TRUNKS": "provider"}
        self.sock: socket.socket | None = None

    def __enter__(self) -> FakeAsterisk:
        threading.Thread(target=self.run, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.hang_up()
        self.listener.close()

    def hang_up(self) -> None:
        """Break the connection."""
        if self.sock is not None:
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_RDWR)

    def run(self) -> None:
        """Serve one connection after the other."""
        with contextlib.suppress(OSError):
            while True:
                self.sock = self.listener.accept()[0]
                self.connections.put(None)
                with self.sock, contextlib.suppress(OSError):
                    self.sock.sendall(self.banner)
                    parser = popup_notifier.ManagerParser()
                    while data := self.sock.recv(65536):
                        for action in parser.receive_data(data):
                            self.answer(action)

    def answer(self, action: dict[str, str]) -> None:
        """Answer an action, and note it."""
        name, own = action["Action"], {"ActionID": action["ActionID"]}
        if name in self.refused:
            self.send({"Response": "Error", **own, "Message": "Permission denied"})
        elif name == "Login" and action["Secret"] != "ge@heim":
            self.send({"Response": "Error", **own, "Message": "Authentication failed"})
        elif name == "Getvar":
            value = self.variables.get(action["Variable"], "")
            self.send({"Response": "Success", **own, "Value": value})
        elif name == "CoreShowChannels":
            self.send({"Response": "Success", **own, "EventList": "start"})
            self.send(*({"Event": "CoreShowChannel", **own, **each} for each in self.listed))
            self.send({"Event": "CoreShowChannelsComplete", **own})
        else:
            self.send(
                {"Response": "Success", **own, **({"Ping": "Pong"} if name == "Ping" else {})}
            )
        self.actions.put(action)

    def send(self, *messages: dict[str, str]) -> None:
        """Send messages."""
        assert self.sock is not None
        for message in messages:
            lines = [f"{name}: {value}\r\n" for name, value in message.items()]
            self.sock.sendall("".join([*lines, "\r\n"]).encode("utf-8", "surrogateescape"))

    def tell(self, words: str, **fields: str) -> None:
        """Send events as in RECORDED."""
        linked: dict[str, str] = {}
        for each in words.split(","):
            self.send({**manager_event(each, linked), **fields})

    def wait_for(self, name: str) -> dict[str, str]:
        """Return the next action of a name."""
        while True:
            action = self.actions.get(timeout=TIMEOUT)
            if action["Action"] == name:
                return action


RING = "new provider-1, new 201-2 of provider-1, dial provider-1 201-2"


class TestAsterisk(unittest.TestCase):
    """The daemon and a manager interface."""

    QUICK = "p.AMI_DELAYS = (0.01, 0.05)"

    def get(self, daemon: Daemon, path: str) -> str:
        request = f"GET {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode()
        return daemon.exchange(request).decode().partition("\r\n\r\n")[2]

    def test_call_from_its_ring_to_its_end(self) -> None:
        with FakeAsterisk() as pbx, Daemon(**pbx.keys) as daemon, daemon.browser() as browser:
            daemon.wait_for_log(f"Asterisk is up: logged in as popup@127.0.0.1:{pbx.port}$")
            login = pbx.wait_for("Login")
            self.assertEqual((login["Username"], login["Events"]), ("popup", "call"))
            pbx.tell(f"{RING}, dialled provider-1 201-2, enter 201-2 a, enter provider-1 a")
            pbx.tell("hangup provider-1")
            data = [browser.message()["data"] for _ in range(3)]
            self.assertEqual([each["event"] for each in data], ["ring", "answer", "end"])
            expected = {"phone": "0312345678", "exten": "201", "event": "ring"}
            expected |= {"did": "0311110001", "uniqueid": "provider-1"}
            self.assertEqual(data[0], expected)
            daemon.wait_for_log(
                'ring phone="0312345678" exten="201" .* from asterisk to 1 browser'
            )
            health = self.get(daemon, "/healthz")
            pattern = r"Asterisk up since 20.*: logged in as popup@.*, \d+ events, 3 triggers\n"
            self.assertRegex(health, pattern)
            status = json.loads(self.get(daemon, "/status"))
            self.assertRegex(status["asterisk"] + "\n", pattern)
            metrics = self.get(daemon, "/metrics")
            for line in (
                'asterisk{state="up"} 1',
                'asterisk{state="away"} 0',
                "asterisk_calls_total 3",
            ):
                self.assertIn(f"\npopup_notifier_{line}\n", metrics)
            self.assertNotIn("heim", health + metrics + "".join(daemon.lines))

    def test_name_that_is_not_utf8_arrives(self) -> None:
        with FakeAsterisk() as pbx, Daemon(**pbx.keys) as daemon, daemon.browser() as browser:
            pbx.wait_for("CoreShowChannels")
            pbx.tell(RING, CallerIDName="a\udce5\udcb1")
            self.assertEqual(browser.message()["data"]["name"], "a\ufffd")

    def test_very_long_name_is_cut(self) -> None:
        with FakeAsterisk() as pbx, Daemon(**pbx.keys) as daemon, daemon.browser() as browser:
            pbx.wait_for("CoreShowChannels")
            pbx.tell(RING, CallerIDName="n" * 10_000)
            self.assertEqual(set(browser.message()["data"]["name"]), {"n"})

    def test_withheld_number_is_anonymous(self) -> None:
        for variable in popup_notifier.PRESENTATION:
            with FakeAsterisk() as pbx, Daemon(**pbx.keys) as daemon, daemon.browser() as browser:
                pbx.wait_for("CoreShowChannels")
                pbx.variables[variable] = "prohib_not_screened"
                pbx.tell(RING, CallerIDName="Yamada")
                data = browser.message()["data"]
                self.assertEqual((data["phone"], data.get("name")), ("anonymous", None))
                self.assertEqual(pbx.wait_for("Getvar")["Channel"], "PJSIP/provider-1")

    def test_forged_list_ends_nothing(self) -> None:
        with FakeAsterisk() as pbx, Daemon(**pbx.keys) as daemon, daemon.browser() as browser:
            pbx.wait_for("CoreShowChannels")
            pbx.tell(RING)
            pbx.send({"Event": "CoreShowChannelsComplete"})
            pbx.send({"Event": "CoreShowChannelsComplete", "ActionID": ""})
            pbx.tell("enter 201-2 a of provider-1, enter provider-1 a")
            self.assertEqual(
                [browser.message()["data"]["event"] for _ in "12"], ["ring", "answer"]
            )

    def test_line_end_in_a_channel_name_forges_no_action(self) -> None:
        with FakeAsterisk() as pbx, Daemon(**pbx.keys):
            pbx.wait_for("CoreShowChannels")
            pbx.tell("new x", Channel="DAHDI/provider/0\rAction: Logoff-1")
            name = "DAHDI/provider/0Action: Logoff-1"
            self.assertEqual(pbx.wait_for("Getvar")["Channel"], name)

    def test_ring_does_not_wait_for_ever_for_the_presentation(self) -> None:
        with FakeAsterisk() as pbx, Daemon(**pbx.keys) as daemon, daemon.browser() as browser:
            pbx.wait_for("CoreShowChannels")
            with mock.patch.object(pbx, "answer"):
                pbx.tell(RING)
                self.assertEqual(browser.phones(1), ["0312345678"])

    def test_account_that_lacks_rights_is_named(self) -> None:
        with FakeAsterisk() as pbx:
            pbx.refused = ("Getvar", "CoreShowChannels")
            with (
                patched("p.AMI_PERIOD = 1") as program,
                Daemon(program=program, **pbx.keys) as daemon,
                daemon.browser() as browser,
            ):
                daemon.wait_for_log("refuses CoreShowChannels to popup@.* write = reporting")
                for number in (1, 3):
                    pbx.tell(RING.replace("-1", f"-{number}"))
                    self.assertEqual(browser.phones(1), ["0312345678"])
                    pbx.wait_for("Ping")
                lines = [line for line in daemon.lines if "refuses" in line]
                self.assertEqual(len(lines), 2, lines)
                self.assertIn("refuses Getvar to popup@", lines[1])
                pbx.refused, pbx.variables = (), {"CALLERID(pres)": "prohib"}
                pbx.hang_up()
                daemon.wait_for_log("Asterisk is up", 2)
                self.assertEqual(browser.message()["data"]["event"], "end")
                pbx.wait_for("CoreShowChannels")
                pbx.tell(RING.replace("-1", "-5"))
                self.assertEqual(browser.phones(2), ["0312345678", "anonymous"])

    def test_account_that_gets_no_events_is_named(self) -> None:
        with (
            FakeAsterisk() as pbx,
            patched("p.AMI_PERIOD = 1") as program,
            Daemon(program=program, **pbx.keys) as daemon,
        ):
            for number in range(4):
                pbx.wait_for("CoreShowChannels")
                pbx.listed = [channel_fields(f"201-{number}")]
            daemon.wait_for_log("refuses events to popup@.* read = call")

    def test_peers_that_are_no_manager_interface_are_named(self) -> None:
        for banner, secret, line in (
            (b"SSH-2.0-x\r\n", "ge%40heim", 'is no manager interface, .*it says "SSH-2.0-x"'),
            (b"", "ge%40heim", "is no manager interface, or has TLS: it says nothing"),
            (b"x" * 20_000, "ge%40heim", 'is no manager interface, .*it says "xxx'),
            (
                b"Asterisk Call Manager/2\r\n",
                "heimlich",
                "refuses the login: .Authentication failed",
            ),
        ):
            with self.subTest(line), FakeAsterisk(banner) as pbx:
                keys = {**pbx.keys, "AMI_URL": pbx.keys["AMI_URL"].replace("ge%40heim", secret)}
                seconds = 5 if banner else 0.1  # whoever says something says it in time
                statements = (f"p.AMI_TIMEOUT = {seconds}", "p.AMI_DELAYS = (0.01, 0.02)")
                with patched(*statements) as program, Daemon(program=program, **keys) as daemon:
                    daemon.wait_for_log(f"Asterisk is away: popup@.*{line}")
                    self.assertRegex(self.get(daemon, "/healthz"), f"Asterisk away since .*{line}")
                    for _ in range(5):
                        pbx.connections.get(timeout=TIMEOUT)
                    self.assertEqual(daemon.trigger(), 200)
                    self.assertEqual(len([each for each in daemon.lines if "away" in each]), 1)
                    self.assertNotIn("heim", "".join(daemon.lines))

    def test_peer_that_never_ends_a_line_is_named(self) -> None:
        with FakeAsterisk(b"") as pbx, patched("p.AMI_TIMEOUT = 1") as program:

            def drip() -> None:
                with contextlib.suppress(OSError):
                    pbx.connections.get(timeout=TIMEOUT)
                    while pbx.sock is not None:
                        pbx.sock.sendall(b"x")
                        time.sleep(0.01)

            threading.Thread(target=drip, daemon=True).start()
            with Daemon(program=program, **pbx.keys) as daemon:
                daemon.wait_for_log('Asterisk is away: .* is no manager interface, .* "xx')

    def test_calls_go_on_while_asterisk_is_away(self) -> None:
        pbx = FakeAsterisk()
        with (
            patched(self.QUICK) as program,
            Daemon(
                program=program, **{**pbx.keys, "AMI_URL": "ami://u:geheim@127.0.0.1:1"}
            ) as daemon,
        ):
            daemon.wait_for_log(
                "Asterisk is away: u@127.0.0.1:1 cannot be reached: Connection refused"
            )
        with (
            pbx,
            patched(self.QUICK) as program,
            Daemon(program=program, **pbx.keys) as daemon,
            daemon.browser() as browser,
        ):
            pbx.wait_for("CoreShowChannels")
            pbx.tell(f"{RING}, enter 201-2 a, enter provider-1 a")
            self.assertEqual(
                [browser.message()["data"]["event"] for _ in "12"], ["ring", "answer"]
            )
            caller = {**channel_fields("provider-1"), "Linkedid": "provider-1", "BridgeId": "b"}
            pbx.listed = [caller, {**channel_fields("202-2"), "BridgeId": "b"}]
            pbx.hang_up()
            data = browser.message()["data"]  # it was transferred meanwhile, and goes on
            self.assertEqual((data["event"], data["exten"]), ("answer", "202"))
            pbx.listed = []
            pbx.hang_up()
            self.assertEqual(browser.message()["data"]["event"], "end")
            daemon.wait_for_log("Asterisk is up", 3)
            self.assertEqual(len(daemon.wait_for_log("Asterisk is away", 2)), 2)

    def test_silent_asterisk_is_away(self) -> None:
        with (
            FakeAsterisk() as pbx,
            patched(self.QUICK, "p.AMI_PERIOD = 0.1") as program,
            Daemon(program=program, **pbx.keys) as daemon,
        ):
            pbx.wait_for("CoreShowChannels")
            with mock.patch.object(pbx, "answer"):
                daemon.wait_for_log("Asterisk is away: .* no answer for 0.1 seconds")

    def test_50000_events_do_not_fill_the_memory(self) -> None:
        with (
            FakeAsterisk() as pbx,
            Daemon(HISTORY=0, **pbx.keys) as daemon,
            daemon.browser() as browser,
        ):
            pbx.refused = ("Getvar",)
            pbx.wait_for("CoreShowChannels")
            grown = []
            for begin in range(0, 6250, 625):
                for number in range(begin, begin + 625):
                    call, phone = f"provider-{number}", f"201-{number}"
                    pbx.tell(
                        f"new {call}, new {phone} of {call}, dial {call} {phone},"
                        f"dialled {call} {phone}, enter {phone} a, enter {call} a,"
                        f"hangup {call}, hangup {phone}"
                    )
                for _ in range(3 * 625):
                    browser.message()
                grown.append(daemon.status("VmRSS"))
            self.assertRegex(self.get(daemon, "/healthz"), "5000[0-9] events, 18750 triggers")
            self.assertLess(grown[-1] - grown[0], 10_000)

    def test_stop_does_not_wait_for_asterisk(self) -> None:
        with FakeAsterisk() as pbx, Daemon(**pbx.keys) as daemon:
            pbx.wait_for("CoreShowChannels")
            self.assertEqual(daemon.stop(), 0)

    def test_changed_ami_trunks_need_a_restart(self) -> None:
        with FakeAsterisk() as pbx, Daemon(**pbx.keys) as daemon:
            daemon.write_config(**{**pbx.keys, "AMI_TRUNKS": "other"})
            daemon.process.send_signal(signal.SIGHUP)
            daemon.wait_for_log("AMI_TRUNKS has changed: that needs a restart")
            daemon.wait_for_log("configuration reloaded")


# --- 12. Monitoring ----------------------------------------------------------------------------


class TestMonitoring(unittest.TestCase):
    """GET /healthz and GET /metrics."""

    def test_healthz_says_how_many_browsers_are_connected(self) -> None:
        with Daemon() as daemon, daemon.browser():
            answer = daemon.exchange(b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n")
            self.assertEqual((status_of(answer), answer[-14:]), (200, b"OK\n1 browsers\n"))

    def test_metrics_count_calls_deliveries_and_refusals(self) -> None:
        with Daemon() as daemon, daemon.browser() as browser, daemon.browser("?exten=9"):
            daemon.trigger("&exten=201")
            daemon.trigger("&exten=all")
            daemon.trigger(token="wrong")
            browser.phones(2)
            daemon.wait_for_log("call ", 2)
            answer = daemon.exchange(b"GET /metrics HTTP/1.1\r\nHost: h\r\n\r\n").decode()
        for line in (
            "browsers 2",
            "calls_total 2",
            "deliveries_total 3",
            'refused_requests_total{status="401"} 1',
            'dropped_browsers_total{reason="too slow"} 0',
            "delivery_seconds_count 2",
        ):
            self.assertIn(f"\npopup_notifier_{line}\n", answer)

    def test_status_names_browsers_and_refusals(self) -> None:
        head = handshake("/crmws?exten=202,201").replace(
            b"\r\n\r\n", b"\r\nOrigin: https://crm.example\r\n\r\n"
        )
        with Daemon() as daemon, daemon.connect() as sock, daemon.browser():
            sock.sendall(head)
            sock.recv(4096)
            daemon.trigger(token="secret-of-another")
            answer = daemon.exchange(b"GET /status HTTP/1.1\r\nHost: h\r\n\r\n")
            status = json.loads(answer.partition(b"\r\n\r\n")[2])
        self.assertEqual((status["count"], status["redis"]), (2, None))
        named = {"address": "127.0.0.1", "origin": "https://crm.example"}
        self.assertIn({**named, "extens": ["201", "202"]}, status["browsers"])
        (refusal,) = status["refusals"]
        self.assertEqual(refusal["reason"], "token is not SECRET_TOKEN")
        self.assertNotIn(b"secret-of-another", answer)

    def test_monitoring_is_for_the_addresses_of_trigger_allow(self) -> None:
        with Daemon() as daemon:
            for path in ("/healthz", "/metrics", "/status"):
                request = f"GET {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode()
                self.assertEqual(status_of(daemon.exchange(request, source="127.0.0.2")), 403)


class TestServiceManager(unittest.TestCase):
    """sd_notify(3), by a socket that plays systemd."""

    def test_systemd_gets_ready_status_watchdog_reloading_and_stopping(self) -> None:
        name = f"popup-notifier-test-{os.urandom(8).hex()}"
        for address, shown in ((f"\0{name}", f"@{name}"), ("", "")):
            with self.subTest(shown), tempfile.TemporaryDirectory() as folder:
                path = address or str(Path(folder, "notify"))
                with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
                    manager.bind(path)
                    manager.settimeout(TIMEOUT)
                    environ = {"NOTIFY_SOCKET": shown or path, "WATCHDOG_USEC": "200000"}
                    self.play(manager, environ)

    def play(self, manager: socket.socket, environ: dict[str, str]) -> None:
        def told(pattern: str) -> None:
            while not re.search(pattern, manager.recv(4096).decode()):
                pass

        with Daemon(environ=environ) as daemon:
            told("^READY=1$")
            self.assertEqual(daemon.trigger(), 200)
            told(r"^STATUS=0 browsers connected, 1 calls so far\nWATCHDOG=1$")
            told("WATCHDOG=1")
            daemon.process.send_signal(signal.SIGHUP)
            told(r"^RELOADING=1\nMONOTONIC_USEC=\d+$")
            told("^READY=1$")
            daemon.process.send_signal(signal.SIGTERM)
            told("^STOPPING=1$")
            self.assertEqual(daemon.process.wait(TIMEOUT), 0)

    def test_thread_that_hangs_feeds_no_watchdog_and_is_not_healthy(self) -> None:
        hang = "lambda *args: threading.Event().wait()"
        for name, what in (("hub", "Hub._deliver"), ("clients", "parse_subscription")):
            with self.subTest(name), patched(f"p.{what} = {hang}") as program:
                self.hang(name, program)

    def test_port_that_hangs_feeds_no_watchdog(self) -> None:
        with patched(
            "p.parse_form = lambda *args: threading.Event().wait()",
            "look = p.Supervisor.stalled",
            "def stalled(*args):",
            "    found = look(*args)",
            "    p.log.info('stalled: %s', found)",
            "    return found",
            "p.Supervisor.stalled = stalled",
        ) as program:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
                manager.bind(str(program.parent / "notify"))
                environ = {"NOTIFY_SOCKET": manager.getsockname(), "WATCHDOG_USEC": "100000"}
                with Daemon(program=program, environ=environ) as daemon, daemon.connect() as sock:
                    sock.sendall(trigger_request("?phone=1&token={token}", "", b""))
                    seen = len(daemon.wait_for_log(r"stalled: \['main'\]"))
                    manager.setblocking(False)
                    with contextlib.suppress(BlockingIOError):
                        while True:
                            manager.recv(4096)
                    daemon.wait_for_log(r"stalled: \['main'\]", seen + 3)
                    with self.assertRaises(BlockingIOError):
                        manager.recv(4096)
                    daemon.process.kill()

    def test_systemd_that_does_not_listen_is_no_reason_to_end(self) -> None:
        with Daemon(environ={"NOTIFY_SOCKET": "/nowhere/notify"}) as daemon:
            daemon.wait_for_log("cannot tell systemd READY=1: No such file or directory")
            self.assertEqual(daemon.trigger(), 200)

    def hang(self, name: str, program: Path) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.bind(str(program.parent / "notify"))
            manager.settimeout(TIMEOUT)
            environ = {"NOTIFY_SOCKET": manager.getsockname(), "WATCHDOG_USEC": "100000"}
            port = free_port()
            with Daemon(program=program, environ=environ, CLIENT_PORT=port) as daemon:
                self.assertIn("200 OK", self.health(daemon))
                with daemon.connect(port=port) as sock:
                    if name == "clients":
                        sock.sendall(handshake())
                    self.assertEqual(daemon.trigger(), 200)
                    # A probe may be answered just before the thread hangs.
                    text = f"no sign of life from the thread {name}"
                    until(lambda: text in self.health(daemon), "a 503 that names the thread")
                    self.assertIn("503 Service Unavailable", self.health(daemon))
                    manager.setblocking(False)
                    with contextlib.suppress(BlockingIOError):
                        while True:
                            manager.recv(4096)
                    # Some beats later: the health check alone waits for twenty.
                    self.health(daemon)
                    with self.assertRaises(BlockingIOError):
                        manager.recv(4096)
                daemon.process.kill()

    def test_thread_that_ends_by_a_bug_ends_the_daemon(self) -> None:
        bug = "lambda *args: 1 / 0"
        for what in ("Hub._deliver", "Server._until_deadline", "RedisStream._keep_connected"):
            with self.subTest(what), patched(f"p.{what} = {bug}") as program:
                with tempfile.TemporaryFile() as log:
                    config = Path(program.parent, "popup-notifier.conf")
                    port = free_port()
                    keys = {**CONFIG, "PORT": port, "CLIENT_PORT": free_port()}
                    if what.startswith("Redis"):
                        keys["REDIS_URL"] = f"redis://127.0.0.1:{free_port()}"
                    config.touch(0o600)
                    config.write_text("".join(f"{key}={value}\n" for key, value in keys.items()))
                    command = [sys.executable, str(program), "--config", str(config)]
                    process = subprocess.Popen(command, stderr=log)
                    self.addCleanup(process.kill)
                    deadline = time.monotonic() + TIMEOUT
                    while process.poll() is None and time.monotonic() < deadline:
                        with contextlib.suppress(OSError), socket.socket() as sock:
                            sock.settimeout(TIMEOUT)
                            sock.connect(("127.0.0.1", port))
                            sock.sendall(trigger_request("?phone=1&token={token}", "", b""))
                            receive_all(sock)
                    self.assertEqual(process.wait(TIMEOUT), 1)
                    log.seek(0)
                    self.assertIn("ZeroDivisionError", log.read().decode())

    def health(self, daemon: Daemon) -> str:
        return daemon.exchange(b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n").decode()


# --- 13. The desk ------------------------------------------------------------------------------


class TestResources(unittest.TestCase):
    """GET / and GET /popup-sample.js."""

    def get(
        self, daemon: Daemon, path: str, head: str = "", **options: Any
    ) -> tuple[int, str, bytes]:
        request = f"GET {path} HTTP/1.1\r\nHost: pbx\r\n{head}\r\n".encode()
        answer = daemon.exchange(request, **options)
        fields, _, body = answer.partition(b"\r\n\r\n")
        return status_of(answer), fields.decode(), body

    def test_desk_and_its_header_fields(self) -> None:
        with Daemon() as daemon:
            status, head, body = self.get(daemon, "/")
        self.assertEqual(status, 200)
        self.assertIn("\r\nContent-Type: text/html; charset=utf-8", head)
        self.assertIn("\r\nContent-Security-Policy: default-src 'none'; script-src 'self' ", head)
        self.assertIn("\r\nX-Content-Type-Options: nosniff", head)
        self.assertIn(b"<title>popup-notifier", body)
        self.assertNotIn("unsafe-inline", head)

    def test_admins_part_of_the_desk_is_for_admins_alone(self) -> None:
        port = free_port()
        with Daemon(CRMWS_ALLOW="127.0.0.0/8", CLIENT_PORT=port) as daemon:
            pages = [self.get(daemon, "/"), self.get(daemon, "/", source="127.0.0.2")]
            daemon.port, main = port, daemon.port
            pages.append(self.get(daemon, "/"))  # where /status is not served
            daemon.port = main
        self.assertEqual([b"/status" in body for *_, body in pages], [True, False, False])
        self.assertEqual([b"admin -->" in body for *_, body in pages], [True, False, False])

    def test_script_is_sent_again_only_when_it_has_changed(self) -> None:
        with Daemon() as daemon:
            status, head, body = self.get(daemon, "/popup-sample.js")
            self.assertEqual((status, body), (200, (HERE / "popup-sample.js").read_bytes()))
            self.assertIn("\r\nContent-Type: text/javascript; charset=utf-8", head)
            self.assertIn("\r\nCache-Control: no-cache", head)
            matched = re.search(r"\r\nETag: (\S+)", head)
            assert matched is not None
            again = self.get(daemon, "/popup-sample.js", f"If-None-Match: {matched[1]}\r\n")
            self.assertEqual((again[0], again[2]), (304, b""))

    def test_head_is_get_without_the_body(self) -> None:
        with Daemon() as daemon:
            for path in ("/", "/popup-sample.js", "/healthz"):
                with self.subTest(path):
                    _, head, body = self.get(daemon, path)
                    request = f"HEAD {path} HTTP/1.1\r\nHost: pbx\r\n\r\n".encode()
                    answer = daemon.exchange(request).decode()
                    plain = re.compile(r"Date: .*")
                    self.assertEqual(plain.sub("", answer), plain.sub("", f"{head}\r\n\r\n"))
                    self.assertIn(f"Content-Length: {len(body)}\r\n", answer)
            for path, allowed in (("/crmws", "GET"), ("/api/trigger", "POST")):
                request = f"HEAD {path} HTTP/1.1\r\nHost: pbx\r\n\r\n".encode()
                refusal = daemon.exchange(request)
                self.assertEqual((status_of(refusal), refusal[-4:]), (405, b"\r\n\r\n"))
                self.assertIn(f"\r\nAllow: {allowed}\r\n".encode(), refusal)

    def test_missing_script_is_404_and_names_its_folders(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            copy = shutil.copy(PROGRAM, Path(folder, "popup-notifier"))
            with Daemon(program=copy) as daemon:
                status, _, body = self.get(daemon, "/popup-sample.js")
        self.assertEqual(status, 404)
        self.assertIn(f"in none of the folders {folder} and /usr/local/share", body.decode())

    def test_pages_are_for_the_addresses_of_crmws_allow(self) -> None:
        with Daemon(CRMWS_ALLOW="127.0.0.2") as daemon:
            for path in ("/", "/popup-sample.js", "/crmws"):
                with self.subTest(path):
                    self.assertEqual(self.get(daemon, path)[0], 403)

    def test_page_may_read_why_its_handshake_is_refused(self) -> None:
        with Daemon(CRMWS_ALLOW="127.0.0.2") as daemon:
            for source, status in (("127.0.0.1", 403), ("127.0.0.2", 426)):
                answered, head, body = self.get(daemon, "/crmws?since=", source=source)
                self.assertEqual(answered, status)
                self.assertIn("\r\nAccess-Control-Allow-Origin: *", head)
                self.assertEqual(len(body.decode().splitlines()), 1)


# --- 14. Command line --------------------------------------------------------------------------


MINIMUM = "SECRET_TOKEN=t\nTRIGGER_ALLOW=127.0.0.1\nCRMWS_ALLOW=127.0.0.1\n"


class TestCommandLine(unittest.TestCase):
    """Start, stop, mistakes."""

    def run_with(self, *args: str, program: Path = PROGRAM) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(program), *args], capture_output=True, text=True, timeout=TIMEOUT
        )

    def fails_with(self, text: str, *args: str) -> None:
        done = self.run_with(*args)
        self.assertEqual(done.returncode, 1)
        self.assertEqual(len(done.stderr.splitlines()), 1, done.stderr)
        self.assertIn(text, done.stderr)

    def config(self, text: str) -> str:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        path = Path(folder.name, "popup-notifier.conf")
        path.touch(0o600)
        path.write_text(text)
        return str(path)

    def test_missing_configuration_is_one_line_and_exit_1(self) -> None:
        self.fails_with("/nowhere/x.conf: cannot read", "--config", "/nowhere/x.conf")

    def test_mistake_in_the_configuration_is_one_line_and_exit_1(self) -> None:
        path = self.config("PORT=x\nSECRET_TOKEN=t")
        self.fails_with(f'{path}:1: PORT: "x" is not a whole number', "--config", path)

    def test_port_in_use_is_one_line_and_exit_1(self) -> None:
        with Daemon() as daemon:
            path = self.config(f"PORT={daemon.port}\n{MINIMUM}")
            self.fails_with(f"port {daemon.port}: Address already in use", "-config", path)

    def test_thread_that_cannot_start_is_named(self) -> None:
        path = self.config(f"PORT={free_port()}\nSECRET_TOKEN=t")
        fail = "def start(*args): raise RuntimeError('no more threads')"
        with patched(fail, "threading.Thread.start = start") as program:
            done = subprocess.run(
                [sys.executable, str(program), "--config", path],
                capture_output=True,
                text=True,
                timeout=TIMEOUT,
            )
        self.assertEqual(done.returncode, 1)
        self.assertIn("cannot start a thread: no more threads; raise TasksMax", done.stderr)
        self.assertNotIn("Traceback", done.stderr)

    def test_address_that_is_not_here_is_one_line_and_exit_1(self) -> None:
        path = self.config(f"PORT={free_port()}\nLISTEN=192.0.2.1\n{MINIMUM}")
        self.fails_with("cannot listen on 192.0.2.1", f"-config={path}")

    def test_defaults_of_the_command_line(self) -> None:
        done = self.run_with("--help")
        self.assertEqual(done.returncode, 0)
        self.assertIn("/usr/local/etc/popup-notifier.conf", re.sub(r"\s+", "", done.stdout))
        self.assertIn(popup_notifier.VERSION, self.run_with("--version").stdout)

    def test_listen_names_one_address(self) -> None:
        with Daemon(LISTEN="127.0.0.1") as daemon:
            self.assertEqual(daemon.trigger(), 200)
            with self.assertRaises(ConnectionRefusedError):
                daemon.connect("::1")

    def test_signals_end_it_with_1001_and_exit_0(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            with self.subTest(number), Daemon() as daemon, daemon.browser() as browser:
                daemon.trigger()
                daemon.process.send_signal(number)
                self.assertEqual(browser.phones(1), ["0312345678"])
                self.assertEqual(browser.closed_with()[0], 1001)
                self.assertEqual(daemon.process.wait(TIMEOUT), 0)

    def test_browser_has_time_to_answer_close_after_a_long_silence(self) -> None:
        for number, code in ((signal.SIGTERM, 1001), (signal.SIGHUP, 1008)):
            with self.subTest(code), tempfile.TemporaryDirectory() as folder:
                sign = Path(folder, "later")
                with (
                    patched(
                        "p.CLOSE_TIMEOUT = p.STOP_TIMEOUT = 60",
                        f"path, now = {str(sign)!r}, time.monotonic",
                        "p.time.monotonic = lambda: now() + 3000 * os.path.exists(path)",
                    ) as program,
                    Daemon(program=program, PING_INTERVAL=3600) as daemon,
                    daemon.browser() as browser,
                ):
                    daemon.write_config(PING_INTERVAL=3600, CRMWS_ALLOW="192.0.2.1")
                    browser.send(Opcode.PING, b"")
                    self.assertEqual(browser.frame()[0], Opcode.PONG)  # now all is quiet
                    sign.touch()
                    daemon.process.send_signal(number)
                    opcode, payload = browser.frame()
                    self.assertEqual(
                        (opcode, payload[:2]), (Opcode.CLOSE, struct.pack("!H", code))
                    )
                    browser.send(Opcode.CLOSE, payload[:2])
                    self.assertEqual(browser.sock.recv(1), b"")  # not a reset

    def test_browser_that_came_just_before_the_end_gets_what_it_missed(self) -> None:
        with patched(
            "subscribe = p.Hub.subscribe",
            "def last(*args):",
            "    subscribe(*args)",
            "    os.kill(os.getpid(), p.signal.SIGTERM)",
            "    return True",
            "p.Hub.subscribe = last",
        ) as program:
            with Daemon(program=program) as daemon:
                for number in range(3):
                    daemon.trigger(phone=str(number))
                with daemon.browser("?since=0-0") as browser:
                    browser.hello()
                    self.assertEqual(browser.phones(3), ["0", "1", "2"])
                    self.assertEqual(browser.closed_with()[0], 1001)
                self.assertEqual(daemon.process.wait(TIMEOUT), 0)

    def test_port_is_free_again_at_once(self) -> None:
        with Daemon() as daemon:
            browsers = [daemon.browser() for _ in range(20)]
            self.assertEqual(daemon.stop(), 0)
            with Daemon(PORT=daemon.port) as again:
                again.port = daemon.port
                self.assertEqual(again.trigger(), 200)
            for browser in browsers:
                browser.sock.close()

    def test_journal_gets_priorities_instead_of_times(self) -> None:
        with tempfile.TemporaryFile("w+") as log:
            status = os.fstat(log.fileno())
            path = self.config("SECRET_TOKEN=")
            subprocess.run(
                [sys.executable, str(PROGRAM), "--config", path],
                stderr=log,
                timeout=TIMEOUT,
                env={**os.environ, "JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"},
            )
            log.seek(0)
            self.assertRegex(log.read(), r"^<3>/\S+:1: SECRET_TOKEN: must be .*\n$")

    def test_log_that_nobody_reads_stops_nothing(self) -> None:
        total = 2000  # their lines fill a pipe three times over
        with Daemon(reads_log=False) as daemon, daemon.browser() as browser:
            for number in range(total):
                self.assertEqual(daemon.trigger(phone=str(number)), 200)
            self.assertEqual(browser.phones(total), [str(number) for number in range(total)])
            daemon.read_log()
            daemon.wait_for_log('phone="0"')  # from here on there is room in the pipe
            daemon.trigger()
            daemon.wait_for_log(r"WARNING \d+ log lines were lost: nobody reads them")

    def test_closed_standard_error_stops_nothing(self) -> None:
        port = free_port()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "popup-notifier.conf")
            path.touch(0o600)
            keys = {**CONFIG, "PORT": port}
            path.write_text("".join(f"{key}={value}\n" for key, value in keys.items()))
            shell = f"exec {sys.executable} {PROGRAM} --config {path} <&- >&- 2>&-"
            process = subprocess.Popen(["sh", "-c", shell])
            try:
                until(lambda: self.answers(port), "it runs without a log")
                descriptors = Path(f"/proc/{process.pid}/fd")
                for number in (0, 1, 2):
                    self.assertEqual(os.readlink(descriptors / str(number)), "/dev/null")
            finally:
                process.terminate()
                self.assertEqual(process.wait(TIMEOUT), 0)

    def answers(self, port: int) -> bool:
        with socket.socket() as sock:
            sock.settimeout(TIMEOUT)
            if sock.connect_ex(("127.0.0.1", port)):
                return False
            sock.sendall(trigger_request("?phone=1&token={token}", "", b""))
            return status_of(receive_all(sock)) == 200

    def test_pages_that_may_listen_are_named(self) -> None:
        text = "CRMWS_ORIGINS is empty: any page open on an admitted PC can listen"
        for origins, is_said in (("", True), ("https://crm.example", False)):
            with self.subTest(origins), Daemon(CRMWS_ORIGINS=origins) as daemon:
                self.assertEqual(text in daemon.wait_for_log("listens on")[0], is_said)
                done = self.run_with("--check", "--config", str(daemon.config))
                self.assertEqual(text in done.stderr, is_said)
                self.assertIn("INFO the configuration can be used", done.stderr)

    def test_no_name_is_looked_up(self) -> None:
        poison = (
            "import socket, runpy\n"
            "def fail(*args): raise SystemExit('a name was looked up')\n"
            "socket.getfqdn = socket.gethostbyaddr = socket.gethostbyname = fail\n"
            "socket.getaddrinfo = socket.getnameinfo = fail\n"
            f"runpy.run_path({str(PROGRAM)!r}, run_name='__main__')\n"
        )
        with tempfile.TemporaryDirectory() as folder:
            program = Path(folder, "poisoned.py")
            program.write_text(poison)
            with Daemon(program=program) as daemon:
                self.assertEqual(daemon.trigger(), 200)

    def test_check_says_what_the_configuration_means(self) -> None:
        path = self.config(
            "SECRET_TOKEN=geheim\nCRMWS_TOKEN=auch\nTRIGGER_ALLOW=10.0.0.7\nPROT=1\n"
        )
        done = self.run_with("--check", "--config", path)
        self.assertEqual(done.returncode, 0)
        self.assertIn("\nSECRET_TOKEN=(hidden)\nTRIGGER_ALLOW=10.0.0.7/32\n", done.stdout)
        self.assertIn("\nLISTEN=\n", done.stdout)
        self.assertIn("\nUSE_SSL=no\n", done.stdout)
        self.assertIn("did you mean PORT?", done.stderr)
        self.assertNotRegex(done.stdout + done.stderr, "geheim|auch")
        self.assertEqual(len(done.stdout.splitlines()), len(popup_notifier.KEYS))
        self.fails_with(
            "is not a whole number", "--check", "--config", self.config("PORT=x\nSECRET_TOKEN=t")
        )

    def test_sample_token_and_readable_file_are_warned_of(self) -> None:
        path = self.config("SECRET_TOKEN=mytoken")
        Path(path).chmod(0o644)
        done = self.run_with("--check", "--config", path)
        self.assertIn("SECRET_TOKEN is the sample's", done.stderr)
        self.assertIn(f"chmod o-r {path}", done.stderr)

    def test_empty_access_lists_are_warned_of(self) -> None:
        for name, whom in (("TRIGGER_ALLOW", "PBX may trigger"), ("CRMWS_ALLOW", "browser may")):
            for lines in (MINIMUM.replace(f"{name}=127.0.0.1", ""), f"{MINIMUM}{name}= , \n"):
                with self.subTest(lines):
                    path = self.config(lines)
                    done = self.run_with("--check", "--config", path)
                    self.assertEqual(done.returncode, 0)
                    self.assertIn(f"{path}: {name} names no address: no {whom}", done.stderr)
        done = self.run_with("--check", "--config", self.config(MINIMUM))
        self.assertNotIn("names no address", done.stderr)

    @needs_root
    def test_port_of_another_program_is_warned_of(self) -> None:
        # Our own user's is the daemon itself, so the service's is somebody else here.
        with patched("p.SERVICE_USER = 'nobody'") as program, Daemon() as daemon:
            for name, others in (("PORT", ""), ("CLIENT_PORT", f"PORT={free_port()}\n")):
                path = self.config(f"{MINIMUM}{others}{name}={daemon.port}\n")
                Path(path).chmod(0o644)
                Path(path).parent.chmod(0o755)
                done = self.run_with("--check", "--config", path, program=program)
                self.assertEqual(done.returncode, 0, done.stderr)
                self.assertIn(f"{name}={daemon.port} is in use by a program of", done.stderr)
                self.assertIn("(uid 0)", done.stderr)
        with patched("p.SERVICE_USER = 'nobody'") as program, socket.create_server(("", 0)) as own:
            port = own.getsockname()[1]
            path = self.config(f"{MINIMUM}PORT={port}\n")
            Path(path).chmod(0o644)
            Path(path).parent.chmod(0o755)
            # A connection that outlives its listener takes no port from anybody.
            with socket.create_connection(("127.0.0.1", port)), own.accept()[0]:
                own.close()
                done = self.run_with("--check", "--config", path, program=program)
        self.assertEqual((done.returncode, "in use" in done.stderr), (0, False))

    def test_configuration_of_the_go_daemon_runs_as_it_stands(self) -> None:
        port, client_port = free_port(), free_port()
        text = GO_CONFIG_2.replace("8989", str(port)).replace("8990", str(client_port))
        with Daemon(text=text) as daemon:
            daemon.port = port
            with daemon.browser(port=client_port) as browser:
                self.assertEqual(daemon.trigger(token="mytoken"), 200)
                self.assertEqual(browser.phones(1), ["0312345678"])

    def test_own_port_is_not_warned_of(self) -> None:
        with patched("p.SERVICE_USER = 'no such user'") as program, Daemon() as daemon:
            done = self.run_with("--check", "--config", str(daemon.config), program=program)
            self.assertEqual((done.returncode, "in use" in done.stderr), (0, False))

    @needs_root
    @needs("openssl")
    def test_what_the_user_of_the_service_cannot_read_is_a_mistake(self) -> None:
        with (
            patched("p.SERVICE_USER = 'nobody'") as program,
            tempfile.TemporaryDirectory() as name,
        ):
            folder = Path(name)
            tls = Certificates(name).make("one")
            keys = {"CLIENT_PORT": 8443, "USE_SSL": "yes", **tls}
            config = Path(self.config(MINIMUM + "".join(f"{k}={v}\n" for k, v in keys.items())))
            files = [config, *map(Path, tls.values())]
            for path in [folder, config.parent]:
                path.chmod(0o755)
            for path in files:
                path.chmod(0o644)
            check = partial(self.run_with, "--check", "--config", str(config), program=program)
            self.assertEqual(check().returncode, 0)
            for path in files:
                path.chmod(0o640)
                with self.subTest(path.name):
                    done = check()
                    self.assertEqual(done.returncode, 1)
                    self.assertIn(f"{path}: user nobody, whom the service runs as", done.stderr)
                    self.assertNotIn("can be used", done.stderr)
                path.chmod(0o644)
            folder.chmod(0o700)
            self.assertEqual(check().returncode, 1)

    def test_copied_alone_it_runs(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(shutil.copy(PROGRAM, Path(folder, "popup-notifier")))
            done = subprocess.run(
                [sys.executable, "-I", str(copy), "--version"],
                capture_output=True,
                timeout=TIMEOUT,
            )
        self.assertEqual(done.returncode, 0)


class TestReload(unittest.TestCase):
    """SIGHUP."""

    def reload(self, daemon: Daemon, expected: str, **keys: object) -> None:
        daemon.write_config(**keys)
        daemon.process.send_signal(signal.SIGHUP)
        daemon.wait_for_log(expected)

    def test_reload_keeps_browsers_but_those_no_longer_admitted(self) -> None:
        with (
            Daemon() as daemon,
            daemon.browser() as stays,
            daemon.browser(source="127.0.0.2") as goes,
        ):
            self.reload(
                daemon, "configuration reloaded", CRMWS_ALLOW="127.0.0.1", SECRET_TOKEN="new"
            )
            self.assertEqual(goes.closed_with()[0], CloseCode.POLICY_VIOLATION)
            daemon.wait_for_log("127.0.0.2 is no longer admitted: 127.0.0.2 is not in CRMWS_ALLOW")
            self.assertEqual(daemon.trigger(), 401)
            self.assertEqual(daemon.trigger(token="new"), 200)
            self.assertEqual(stays.phones(1), ["0312345678"])
            self.assertEqual(status_of(daemon.exchange(handshake(), source="127.0.0.2")), 403)

    def test_reload_closes_pages_and_tokens_no_longer_admitted(self) -> None:
        crm = handshake("/crmws?token=one").replace(b"\r\n\r\n", b"\r\nOrigin: http://crm\r\n\r\n")
        for key, value, why in (
            ("CRMWS_ORIGINS", "http://other", 'origin "http://crm" is not in CRMWS_ORIGINS'),
            ("CRMWS_TOKEN", "two", "token is not CRMWS_TOKEN"),
        ):
            with self.subTest(key), Daemon() as daemon, daemon.browser("?token=two") as stays:
                with daemon.connect() as sock:
                    sock.sendall(crm)
                    self.assertEqual(status_of(sock.recv(4096)), 101)
                    self.reload(daemon, "configuration reloaded", **{key: value})
                    self.assertEqual(sock.recv(4096)[:4], b"\x88\x17\x03\xf0")
                    daemon.wait_for_log(f"browser dropped: .*: {why}")
                daemon.trigger()
                self.assertEqual(stays.phones(1), ["0312345678"])

    def test_shorter_interval_drops_nobody(self) -> None:
        with Daemon(PING_INTERVAL=3600) as daemon, daemon.browser() as browser:
            time.sleep(2.5)  # longer than two of the new intervals
            self.reload(daemon, "configuration reloaded", PING_INTERVAL=1)
            for _ in range(3):
                opcode, payload = browser.frame()
                self.assertEqual(opcode, Opcode.PING)
                browser.send(Opcode.PONG, payload)
            self.assertEqual(daemon.connected(), 1)

    def test_reload_of_a_mistake_leaves_the_old_configuration_in_force(self) -> None:
        with Daemon() as daemon, daemon.browser() as browser:
            self.reload(daemon, "the old one stays in force", TRIGGER_ALLOW="nobody")
            self.assertIn('"nobody", no IP address', "\n".join(daemon.lines))
            self.assertEqual(daemon.trigger(), 200)
            self.assertEqual(browser.phones(1), ["0312345678"])

    def test_reload_changes_max_browsers_and_ping_interval(self) -> None:
        with Daemon() as daemon, daemon.browser("?since=") as browser:
            browser.hello()
            self.reload(daemon, "configuration reloaded", MAX_BROWSERS=1, PING_INTERVAL=1)
            self.assertEqual(status_of(daemon.exchange(handshake())), 503)
            while browser.frame()[0] != Opcode.PING:  # a second later, not 25
                pass

    def test_reload_of_a_shorter_history_forgets_calls(self) -> None:
        with Daemon(HISTORY=3600) as daemon:
            with daemon.browser("?since=") as browser:
                position = browser.hello()["id"]
            daemon.trigger(phone="1")
            with daemon.browser(f"?since={position}") as browser:
                self.assertTrue(browser.hello()["complete"])
                self.assertEqual(browser.phones(1), ["1"])
            self.reload(daemon, "configuration reloaded", HISTORY=0)
            with daemon.browser(f"?since={position}") as browser:
                self.assertFalse(browser.hello()["complete"])
                daemon.trigger(phone="2")
                self.assertEqual(browser.phones(1), ["2"])

    def test_changed_port_needs_a_restart(self) -> None:
        with Daemon() as daemon:
            self.reload(daemon, "PORT has changed: that needs a restart", PORT=free_port())
            self.assertEqual(daemon.trigger(), 200)


# --- Load and faults ---------------------------------------------------------------------------
#
# What happens when browsers stall, cables are pulled, peers are hostile and limits are reached.
# Nothing here measures how long something takes: what must happen is waited for.

ROUNDS = int(os.environ.get("POPUP_TEST_ROUNDS", "25"))  # SIGTERM at so many random moments
OURS = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} [A-Z]+ [^\x00-\x1f\x7f-\x9f]+")


def allow_files(count: int) -> None:
    """Let this process have so many open files; skip the test, aloud, where that is forbidden."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count:
        raise unittest.SkipTest(f"{count} open files are needed, the hard limit is {hard}")
    if soft != resource.RLIM_INFINITY and soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


class TestSlowBrowsers(unittest.TestCase):
    """Browsers that do not read, or not fast enough."""

    KILOBYTE = "&name=" + "x" * 880  # makes a frame of about 1 KB
    QUICK_VERDICT = f"p.STALL_TIMEOUT, p.CLOSE_TIMEOUT = 1, {TIMEOUT}"

    def test_stalled_browsers_are_dropped_and_harm_nobody(self) -> None:
        calls = [f"{number:04}" for number in range(4000)]
        with contextlib.ExitStack() as stack:
            program = stack.enter_context(patched("p.STALL_TIMEOUT = 2"))
            daemon = stack.enter_context(Daemon(program=program))
            pool = stack.enter_context(ThreadPoolExecutor(40))
            others = [stack.enter_context(daemon.browser()) for _ in range(3)]
            stalled = [
                stack.enter_context(daemon.browser(source="127.0.0.2", receive_buffer=2048))
                for _ in range(5)
            ]
            before = daemon.status("VmRSS")
            heard = [pool.submit(browser.phones, len(calls)) for browser in others]
            for phone in calls:
                self.assertEqual(daemon.trigger(self.KILOBYTE, phone), 200)
            for each in heard:
                self.assertEqual(each.result(TIMEOUT), calls)
            for browser in stalled:
                wait_for_reset(browser.sock)
            daemon.trigger()
            (last,) = daemon.wait_for_log("call .*0312345678")
            self.assertTrue(last.endswith("to 3 browsers"), last)
            dropped = daemon.wait_for_log("browser dropped: ")
            self.assertEqual(len(dropped), 5, dropped)
            for line in dropped:
                self.assertRegex(line, r"127\.0\.0\.2 is too slow: it took nothing for \d+ s$")
            self.assertLess(daemon.status("VmHWM") - before, 20 * 1024)

    def test_stalled_browser_that_reads_again_gets_whole_frames_and_1008(self) -> None:
        with patched(self.QUICK_VERDICT) as program, Daemon(program=program) as daemon:
            with daemon.browser(receive_buffer=2048) as browser:
                self.stall_and_wake_up(daemon, browser)

    @needs("openssl")
    def test_stalled_browser_over_tls_gets_whole_frames_and_1008(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            make = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost"
            command = [*make.split(), "-keyout", f"{folder}/key", "-out", f"{folder}/cert"]
            subprocess.run(command, check=True, capture_output=True)
            port = free_port()
            keys: dict[str, Any] = {"USE_SSL": "yes", "CLIENT_PORT": port}
            keys |= {"CERT_FILE": f"{folder}/cert", "KEY_FILE": f"{folder}/key"}
            with (
                patched(self.QUICK_VERDICT) as program,
                Daemon(program=program, **keys) as daemon,
            ):
                context = ssl.create_default_context(cafile=f"{folder}/cert")
                sock = daemon.connect(port=port, receive_buffer=2048)
                with Browser(context.wrap_socket(sock, server_hostname="localhost")) as browser:
                    self.stall_and_wake_up(daemon, browser)

    def stall_and_wake_up(self, daemon: Daemon, browser: Browser) -> None:
        """Call a browser that does not read until it is dropped; then let it read."""
        sent = 5000  # more than the kernel takes
        for number in range(sent):
            daemon.trigger(self.KILOBYTE, f"{number:04}")
        daemon.wait_for_log("is too slow")
        # It wakes up: there is room now for all that is on its way.
        browser.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        heard = []
        opcode, payload = browser.frame()
        while opcode == Opcode.TEXT:
            heard.append(json.loads(payload)["phone"])
            opcode, payload = browser.frame()
        self.assertEqual((opcode, payload), (Opcode.CLOSE, b"\x03\xf0too slow"))
        self.assertEqual(heard, [f"{number:04}" for number in range(len(heard))])
        self.assertLess(len(heard), sent)  # the rest is in the log alone
        browser.send(Opcode.CLOSE, payload[:2])
        self.assertEqual(receive_all(browser.sock), b"")
        self.assertEqual(len(daemon.wait_for_log("browser ")), 2)  # connected, dropped

    def test_frames_stay_whole_however_little_a_socket_takes(self) -> None:
        with patched(
            "begin = p.Browser.__init__",
            "def begin_slowly(self, sock, *args):",
            "    begin(self, sock, *args)",
            "    sizes = p.itertools.cycle((7, 0, 1000, 0, 1, 100_000, 0, 300))",
            "    def send(data):",
            "        size = next(sizes)",
            "        if not size: raise BlockingIOError",
            "        return sock.send(data[:size])",
            "    self.send = send",
            "p.Browser.__init__ = begin_slowly",
        ) as program:
            with Daemon(program=program) as daemon, daemon.browser("?exten=201") as live:
                for number in range(100):
                    daemon.trigger("&exten=201", phone=str(number))
                with daemon.browser("?since=0-0") as late:
                    late.hello()
                    for number in range(100, 200):
                        daemon.trigger("&exten=201", phone=str(number))
                    expected = [str(number) for number in range(200)]
                    self.assertEqual((live.phones(200), late.phones(200)), (expected, expected))
                    daemon.process.terminate()
                    for browser in (live, late):
                        self.assertEqual(browser.closed_with()[0], 1001)

    def test_slow_browser_within_the_bound_loses_nothing(self) -> None:
        # What it takes shows that it is there: its pongs are stuck behind the calls.
        calls = [f"{number:04}" for number in range(400)]
        with contextlib.ExitStack() as stack:
            program = stack.enter_context(patched("p.STALL_TIMEOUT = 3"))
            daemon = stack.enter_context(Daemon(program=program, PING_INTERVAL=1))
            browser = stack.enter_context(daemon.browser(receive_buffer=2048))
            for phone in calls:
                daemon.trigger(self.KILOBYTE, phone)
            for phone in calls:
                self.assertEqual(browser.phones(1), [phone])
                time.sleep(0.01)
            daemon.trigger(phone="last")
            self.assertEqual(browser.phones(1), ["last"])

    def test_flood_of_pings_from_one_that_does_not_read_harms_nobody(self) -> None:
        with Daemon() as daemon, daemon.browser() as other:
            with daemon.browser(source="127.0.0.2", receive_buffer=2048) as flood:
                before = daemon.status("VmRSS")
                pings = masked(Opcode.PING, b"p" * 125) * 100
                with contextlib.suppress(ConnectionError):
                    while True:
                        flood.sock.sendall(pings)
                daemon.wait_for_log("browser dropped: 127.0.0.2 is too slow")
                daemon.trigger()
                self.assertEqual(other.phones(1), ["0312345678"])
                self.assertLess(daemon.status("VmHWM") - before, 20 * 1024)


class Namespace:
    """A network of its own, and mounts of its own; both end with the last process in them."""

    def __init__(self) -> None:
        self.holder = subprocess.Popen(
            ["unshare", "--net", "--mount", "sh", "-c", "ip link set lo up && echo && exec cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.enter = ["nsenter", f"--target={self.holder.pid}", "--net", "--mount"]

    def __enter__(self) -> Namespace:
        assert self.holder.stdout is not None
        assert self.holder.stdout.readline() == b"\n"
        return self

    def __exit__(self, *_: object) -> None:
        self.holder.communicate(timeout=TIMEOUT)

    def run(self, command: str) -> None:
        """Run a command in it."""
        subprocess.run([*self.enter, *command.split()], check=True)

    def call(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Return what a function returns in a thread whose sockets are in this network."""

        def inside() -> Any:
            with Path(f"/proc/{self.holder.pid}/ns/net").open() as handle:
                failed = ctypes.CDLL(None, use_errno=True).setns(handle.fileno(), 0)
                assert not failed, os.strerror(ctypes.get_errno())
            return function(*args, **options)

        with ThreadPoolExecutor(1) as pool:
            return pool.submit(inside).result()


def needs_namespaces(test: Any) -> Any:
    """Skip a test, aloud, where no network namespaces can be made."""
    return needs_root(needs("ip", "nsenter", "unshare")(test))


class TestVanishedBrowsers(unittest.TestCase):
    """Browsers whose connection ends without a word."""

    @needs_namespaces
    def test_browser_behind_a_dead_link_is_gone_and_one_that_answers_stays(self) -> None:
        with contextlib.ExitStack() as stack:
            here, there = (stack.enter_context(Namespace()) for _ in range(2))
            here.run(f"ip link add v type veth peer name v netns {there.holder.pid}")
            for number, side in enumerate((here, there), 1):
                side.run(f"ip address add 198.51.100.{number}/24 dev v")
                side.run("ip link set v up")
            allowed = "127.0.0.1,198.51.100.0/24"
            daemon = stack.enter_context(
                Daemon(command=here.enter, PING_INTERVAL=1, CRMWS_ALLOW=allowed)
            )
            pool = stack.enter_context(ThreadPoolExecutor(40))
            stays = stack.enter_context(here.call(daemon.browser))
            before = daemon.descriptors()
            vanish = [
                stack.enter_context(there.call(daemon.browser, host="198.51.100.1"))
                for _ in range(3)
            ]
            heard = pool.submit(stays.phones, 1)
            for browser in vanish:  # until now they answer
                self.assertEqual(browser.frame(), (Opcode.PING, b""))
                browser.send(Opcode.PONG)
            there.run("ip link set v down")
            daemon.wait_for_log(r"browser dropped: 198\.51\.100\.2 was silent for \d s$", 3)
            until(lambda: daemon.descriptors() == before, "their descriptors are free")
            self.assertEqual(here.call(daemon.trigger), 200)
            self.assertEqual(heard.result(TIMEOUT), ["0312345678"])
            self.assertEqual(len(daemon.wait_for_log("browser dropped")), 3)


class TestSlowRequests(unittest.TestCase):
    """Connections that take their time."""

    @staticmethod
    def trickle(socks: list[socket.socket]) -> list[bytes]:
        """Send a byte a second on each until the daemon ends it; return the answers."""
        answers = dict.fromkeys(socks, b"")
        with selectors.DefaultSelector() as selector:
            for sock in socks:
                selector.register(sock, selectors.EVENT_READ)
            tick = time.monotonic()
            deadline = tick + TIMEOUT
            while selector.get_map():
                assert tick < deadline, f"{len(selector.get_map())} are there still"
                for key, _ in selector.select(max(tick - time.monotonic(), 0)):
                    sock = cast(socket.socket, key.fileobj)
                    try:
                        part = sock.recv(65536)
                    except ConnectionError:
                        part = b""
                    answers[sock] += part
                    if not part:
                        selector.unregister(sock)
                        sock.close()
                if time.monotonic() >= tick:
                    tick += 1
                    for key in selector.get_map().values():
                        with contextlib.suppress(ConnectionError):
                            os.write(key.fd, b"G")
        return list(answers.values())

    def test_trickling_connections_end_at_a_deadline_and_triggers_go_on(self) -> None:
        allow_files(1500)
        sources = {"trigger": "127.0.0.1", "browser": "127.0.0.2", "nobody": "127.0.1.1"}
        with Daemon(CRMWS_ALLOW="127.0.0.2") as daemon, contextlib.ExitStack() as stack:
            browser = stack.enter_context(daemon.browser(source="127.0.0.2"))
            pool = stack.enter_context(ThreadPoolExecutor(40))
            before = daemon.descriptors(), daemon.status("Threads")
            ended = {
                kind: pool.submit(
                    self.trickle, [daemon.connect(source=source) for _ in range(400)]
                )
                for kind, source in sources.items()
            }
            calls = 0
            while not all(each.done() for each in ended.values()):
                self.assertEqual(daemon.trigger(phone=str(calls)), 200)
                calls += 1
                self.assertEqual(daemon.status("Threads"), before[1])
                wait(ended.values(), 0.05)
            self.assertEqual(browser.phones(calls), [str(number) for number in range(calls)])
            for kind, each in ended.items():
                with self.subTest(kind):
                    self.assertLessEqual(
                        set(map(status_of, each.result())), {408, 0} if kind == "nobody" else {408}
                    )
            until(lambda: daemon.descriptors() == before[0], "all descriptors are free")
            self.assertEqual(len(daemon.wait_for_log("refused: 127.0.0.1 408")), 3)


class TestDescriptors(unittest.TestCase):
    """Limits of open files."""

    @staticmethod
    def limited(soft: int, hard: int) -> list[str]:
        return ["sh", "-c", f'ulimit -Sn {soft} && ulimit -Hn {hard} && exec "$@"', "sh"]

    def test_soft_limit_is_raised_and_too_many_browsers_are_warned_of(self) -> None:
        with Daemon(command=self.limited(100, 300), MAX_BROWSERS=250) as daemon:
            limits = Path(f"/proc/{daemon.process.pid}/limits").read_text()
            self.assertRegex(limits, r"Max open files +300 +300 ")
            (line,) = daemon.wait_for_log("WARNING")
            self.assertRegex(line, "MAX_BROWSERS is 250, but the limit of 300 open files allows ")
        with Daemon(command=self.limited(100, 300), MAX_BROWSERS=200) as daemon:
            self.assertEqual(len(daemon.lines), 1, daemon.lines)

    def test_browsers_and_idle_connections_leave_room_for_triggers(self) -> None:
        with Daemon(command=self.limited(64, 64)) as daemon, contextlib.ExitStack() as stack:
            browsers, refused = [], 0
            for _ in range(75):
                stack.enter_context(daemon.connect())
                sock = stack.enter_context(daemon.connect())
                try:
                    browsers.append(Browser(sock))
                except AssertionError as error:
                    self.assertRegex(str(error), r"^HTTP/1.1 503 [^\0]+\nRetry-After: 30\r\n")
                    refused += 1
            self.assertEqual(daemon.trigger(), 200)
            for browser in browsers:
                self.assertEqual(browser.phones(1), ["0312345678"])
            self.assertGreater(len(browsers), 30)
            self.assertEqual(len(browsers) + refused, 75)
            self.assertFalse([line for line in daemon.lines if "cannot accept" in line])

    def test_browsers_that_do_not_hang_up_make_room(self) -> None:
        with Daemon(command=self.limited(64, 64)) as daemon, contextlib.ExitStack() as stack:
            stays = [stack.enter_context(daemon.browser()) for _ in range(20)]
            for _ in range(100):
                browser = stack.enter_context(daemon.browser())
                browser.send(Opcode.CLOSE)
                self.assertEqual(browser.frame(), (Opcode.CLOSE, b""))  # and does not hang up
            self.assertEqual(daemon.trigger(), 200)
            for browser in stays:
                self.assertEqual(browser.phones(1), ["0312345678"])
            self.assertFalse([line for line in daemon.lines if "cannot accept" in line])

    def test_service_resumes_when_descriptors_are_free_again(self) -> None:
        with contextlib.ExitStack() as stack:
            daemon = stack.enter_context(Daemon(command=self.limited(64, 64), PING_INTERVAL=1))
            pool = stack.enter_context(ThreadPoolExecutor(40))
            browsers = [stack.enter_context(daemon.browser()) for _ in range(30)]
            taken = daemon.descriptors() + 1
            early = stack.enter_context(daemon.connect())
            early.sendall(b"POST /api")
            until(lambda: daemon.descriptors() == taken, "the connection is let in")
            # As if something else had the rest: whatever is accepted now is one too many.
            resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, (taken, 64))
            crowd = [stack.enter_context(daemon.connect()) for _ in range(120)]
            daemon.wait_for_log("cannot accept connections: Too many open files")
            heard = [pool.submit(browser.phones, 1) for browser in browsers[1:]]
            self.ping(browsers[0])
            start, cpu = time.monotonic(), daemon.cpu_seconds()
            for _ in range(2):
                self.ping(browsers[0])
            share = (daemon.cpu_seconds() - cpu) / (time.monotonic() - start)
            self.assertLess(share, 0.5)
            self.assertEqual(len(daemon.wait_for_log("cannot accept")), 1)
            early.sendall(f"/trigger?phone=1&token={TOKEN} HTTP/1.0\r\n\r\n".encode())
            self.assertEqual(status_of(receive_all(early)), 200)
            self.assertEqual([each.result(TIMEOUT) for each in heard], [["1"]] * 29)
            self.assertEqual(browsers[0].phones(1), ["1"])
            for browser in browsers[:10]:
                browser.sock.close()
            self.assertEqual(daemon.trigger(), 200)
            self.assertEqual(len(crowd), 120)
            (last,) = daemon.wait_for_log("call .*0312345678")
            self.assertTrue(last.endswith("to 20 browsers"), last)

    def ping(self, browser: Browser) -> None:
        """Wait for the next ping and answer it."""
        self.assertEqual(browser.frame(), (Opcode.PING, b""))
        browser.send(Opcode.PONG)


class TestHostileBytes(unittest.TestCase):
    """What scanners and worse send."""

    def requests(self, chance: random.Random) -> Iterator[bytes]:
        """Yield random bytes, and real requests that were tampered with."""
        real = [trigger_request(query, head, body) for _, query, head, body, _ in GOOD_TRIGGERS]
        real += [trigger_request(query, head, body) for _, query, head, body, _, _ in BAD_TRIGGERS]
        real += [head + b"\r\n\r\n" for _, head, _ in HEADS]
        real += [handshake() + stream for _, stream, _ in BAD_STREAMS[:5]]
        real += [handshake("/crmws?" + "x" * 9000), b"\r\n" * 4000, b"A: b\r\n" * 3000]
        special = (
            b"\0",
            b"\n",
            b"\r",
            b"\r\n\r\n",
            b":",
            b" ",
            b"%",
            b"\xff",
            b"&phone=",
            b"HTTP/1.1",
        )
        for _ in range(200):
            yield chance.randbytes(chance.randrange(1, 3000))
        for _ in range(400):
            request = bytearray(chance.choice(real))
            for _ in range(chance.randint(1, 4)):
                start = chance.randrange(len(request) + 1)
                end = start + chance.choice((0, 0, 1, 1, 40))
                request[start:end] = chance.choice(
                    (b"", chance.choice(special), chance.randbytes(3), bytes(request[-end:]))
                )
            yield bytes(request)

    def test_fuzz_is_answered_with_4xx_or_closed_and_leaves_nothing(self) -> None:
        statuses: collections.Counter[int] = collections.Counter()
        with Daemon() as daemon, daemon.browser() as browser:
            before = daemon.descriptors(), daemon.status("Threads")
            for request in self.requests(random.Random(9112)):
                with daemon.connect() as sock:
                    with contextlib.suppress(OSError):
                        sock.sendall(request)
                        sock.shutdown(socket.SHUT_WR)
                    status = status_of(receive_all(sock))
                # What was tampered with can be a good request still.
                self.assertTrue(status in (0, 101, 200) or 400 <= status < 500, request)
                statuses[status] += 1
            until(lambda: daemon.descriptors() == before[0], "all descriptors are free")
            self.assertEqual(daemon.status("Threads"), before[1])
            self.assertEqual(daemon.trigger(phone="42"), 200)
            while browser.phones(1) != ["42"]:
                pass
            daemon.wait_for_log('call .*"42"')
            for line in daemon.lines:
                self.assertTrue(OURS.fullmatch(line) and line.isprintable(), line)
        self.assertEqual(statuses.total() if hasattr(statuses, "total") else 600, 600)
        self.assertGreater(statuses[400], 100, statuses)


class TestStartStopClock(unittest.TestCase):
    """Moments at which things go wrong."""

    def test_sigterm_at_random_moments_under_load(self) -> None:
        chance = random.Random(15)
        for number in range(ROUNDS):
            with self.subTest(number), Daemon() as daemon, contextlib.ExitStack() as stack:
                self.end_at_a_random_moment(daemon, stack, chance.randrange(60))

    def end_at_a_random_moment(
        self, daemon: Daemon, stack: contextlib.ExitStack, moment: int
    ) -> None:
        """Send SIGTERM after so many calls: what was answered with OK reaches every browser."""
        browsers = [stack.enter_context(daemon.browser()) for _ in range(4)]
        answered: list[str] = []

        def call(caller: int) -> None:
            with contextlib.suppress(ConnectionError):
                for phone in itertools.count(1000 * caller):
                    if daemon.trigger(phone=str(phone)) != 200:
                        return
                    answered.append(str(phone))
                    if len(answered) == moment:
                        daemon.process.terminate()

        def come_and_go() -> None:
            with contextlib.suppress(ConnectionError, EOFError):
                while True:
                    reset(daemon.browser(source="127.0.0.9").sock)
                    daemon.browser(source="127.0.0.9").sock.close()

        with ThreadPoolExecutor(40) as pool:
            work = [pool.submit(call, caller) for caller in range(3)] + [pool.submit(come_and_go)]
            heard = [pool.submit(self.heard_until_1001, browser) for browser in browsers]
            if moment == 0:
                daemon.process.terminate()
            self.assertEqual(daemon.process.wait(5), 0, daemon.lines[-5:])
            for each in work:
                each.result(TIMEOUT)
            phones = heard[0].result(TIMEOUT)
            self.assertLessEqual(set(answered), set(phones))
            for other in heard:
                self.assertEqual(other.result(TIMEOUT), phones)

    def test_signal_that_the_main_thread_sleeps_over_ends_it_too(self) -> None:
        # The same as one that comes just as the main thread begins to wait.
        script = (
            "import runpy, signal, sys, threading\n"
            "threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
            "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])\n"
            f"runpy.run_path({str(PROGRAM)!r}, run_name='__main__')\n"
        )
        with tempfile.NamedTemporaryFile("w", suffix=".py") as program:
            program.write(script)
            program.flush()
            with Daemon(program=program.name) as daemon:
                until(lambda: self.waits_for_descriptor(daemon), "the main thread sleeps")
                self.assertEqual(daemon.stop(), 0)

    @staticmethod
    def waits_for_descriptor(daemon: Daemon) -> bool:
        """Tell whether the main thread sleeps in epoll_wait(), not for the interpreter's lock."""
        number, *arguments = Path(f"/proc/{daemon.process.pid}/syscall").read_text().split()
        return number != "running" and int(arguments[0], 16) < 1000

    @staticmethod
    def heard_until_1001(browser: Browser) -> list[str]:
        """Return the calls that come before the daemon says goodbye."""
        phones = []
        opcode, payload = browser.frame()
        while opcode == Opcode.TEXT:
            phones.append(json.loads(payload)["phone"])
            opcode, payload = browser.frame()
        assert (opcode, payload[:2]) == (Opcode.CLOSE, b"\x03\xe9"), (opcode, payload)
        browser.send(Opcode.CLOSE, payload[:2])
        assert receive_all(browser.sock) == b""
        browser.sock.close()
        return phones

    @needs_namespaces
    def test_name_server_that_never_answers_is_never_asked(self) -> None:
        with Namespace() as here, tempfile.TemporaryDirectory() as folder:
            for name, text in [
                ("resolv.conf", "nameserver 127.0.0.1\n"),
                ("nsswitch.conf", "hosts: files dns\n"),
                ("hosts", ""),
            ]:
                Path(folder, name).write_text(text)
                if Path("/etc", name).exists():
                    here.run(f"mount --bind {folder}/{name} /etc/{name}")
            with here.call(socket.socket, type=socket.SOCK_DGRAM) as name_server:
                name_server.bind(("127.0.0.1", 53))
                name_server.setblocking(False)
                with Daemon(command=here.enter) as daemon:
                    with here.call(daemon.browser) as browser:
                        self.assertEqual(here.call(daemon.trigger), 200)
                        self.assertEqual(browser.phones(1), ["0312345678"])
                with self.assertRaises(BlockingIOError):
                    name_server.recv(512)

    @needs("faketime")
    def test_clock_set_back_an_hour_breaks_neither_order_nor_deadlines(self) -> None:
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            clock = Path(folder, "clock")
            clock.write_text("+0")
            environ = {
                "LD_PRELOAD": faketime(),
                "FAKETIME_TIMESTAMP_FILE": str(clock),
                "FAKETIME_NO_CACHE": "1",
                "DONT_FAKE_MONOTONIC": "1",
            }
            daemon = stack.enter_context(Daemon(environ=environ, PING_INTERVAL=1))
            pool = stack.enter_context(ThreadPoolExecutor(40))
            alive = stack.enter_context(daemon.browser())
            answers = pool.submit(lambda: [alive.message()["id"] for _ in range(200)])
            for _ in range(100):
                self.assertEqual(daemon.trigger(), 200)
            later = Path(folder, "later")
            later.write_text("-3600")
            later.replace(clock)
            before = daemon.descriptors()
            silent = stack.enter_context(daemon.browser(source="127.0.0.2"))
            refused = stack.enter_context(daemon.connect())
            refused.sendall(b"GET / HTTP/1.1\r\nHost: h\r\nContent-Length: 9999999\r\n\r\n")
            for _ in range(99):
                self.assertEqual(daemon.trigger(), 200)
            # Neither the one that is silent nor the one that does not hang up stays.
            until(lambda: daemon.descriptors() == before, "both are gone")
            daemon.wait_for_log("browser dropped: 127.0.0.2 was silent for 2 s")
            wait_for_reset(silent.sock)
            self.assertEqual(daemon.trigger(), 200)
            ids = [tuple(map(int, each.split("-"))) for each in answers.result(TIMEOUT)]
            self.assertEqual(ids, sorted(set(ids)))
            calls = daemon.wait_for_log("call ", 200)
            self.assertLess(min(calls), calls[0])  # it was indeed set back


# --- Browsers ----------------------------------------------------------------------------------
#
# Real browsers, driven as their makers mean it: Chromium by the DevTools protocol over a pipe,
# Firefox by WebDriver BiDi over a WebSocket.

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
FIREFOX = ("firefox-esr", "firefox")


def find_program(names: Iterable[str]) -> str | None:
    """Return the first of these programs that is installed."""
    return next((name for name in names if shutil.which(name)), None)


class WebBrowser:
    """A headless browser with a fresh profile; ended with all its processes."""

    names: tuple[str, ...]

    def __init__(self) -> None:
        self.profile = tempfile.mkdtemp()
        self.program = find_program(self.names) or self.names[0]
        self._ids = itertools.count(1)
        self._answers: dict[int, queue.Queue[dict[str, Any]]] = {}
        self.console: list[str] = []

    def __enter__(self) -> WebBrowser:
        with contextlib.ExitStack() as stack:
            stack.push(self)
            self.start()
            threading.Thread(target=self._read, daemon=True).start()
            self.begin()
            stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.hang_up()
        # Its helpers may still be writing for a moment after they were killed.
        shutil.rmtree(self.profile, ignore_errors=True)

    def launch(self, *args: str, **options: Any) -> None:
        """Start the program in a process group of its own."""
        self.process = subprocess.Popen(
            [self.program, *args],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "HOME": self.profile},
            **options,
        )

    def _read(self) -> None:
        for message in self.messages():
            if "id" in message:
                self._answers.pop(message["id"]).put(message)
            else:
                self.note(message.get("method", ""), message.get("params", {}))

    def call(self, method: str, params: dict[str, Any], **top: Any) -> dict[str, Any]:
        """Send a command; return its result."""
        number = next(self._ids)
        answer = self._answers[number] = queue.Queue()
        self.send({"id": number, "method": method, "params": params, **top})
        try:
            message = answer.get(timeout=3 * TIMEOUT)
        except queue.Empty:
            raise AssertionError(f"{self.program} does not answer {method}") from None
        if "error" in message:
            raise AssertionError(f"{method}: {message['error']} {message.get('message', '')}")
        return dict(message["result"])

    # What each browser does in its own way.

    def start(self) -> None: ...
    def begin(self) -> None: ...
    def hang_up(self) -> None: ...
    def send(self, message: dict[str, Any]) -> None: ...
    def messages(self) -> Iterator[dict[str, Any]]:
        raise NotImplementedError

    def note(self, method: str, params: dict[str, Any]) -> None: ...
    def open(self, url: str, before: str = "") -> Tab:
        """Return a new tab with the page; the script `before` runs ahead of the page's own."""
        raise NotImplementedError

    def permit(self, name: str, state: str, origin: str) -> None:
        """Answer for the agent what pages are to be asked for: granted or denied."""


class Tab:
    """A page in a browser."""

    def __init__(self, browser: Any, handle: str) -> None:
        self.browser = browser
        self.handle = handle

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression, awaited."""
        text = self.run(f"(async () => JSON.stringify(await ({expression})))()")
        return None if text is None else json.loads(text)

    def wait_for(self, expression: str, seconds: float = TIMEOUT) -> Any:
        """Return the expression's value once it is true."""
        loop = """(async () => {
            const cards = () => [...document.querySelectorAll('popup-notifier')]
              .map((host) => host.shadowRoot.querySelector('section').innerText);
            const end = performance.now() + %d;
            for (;;) {
              const value = await (%s);
              if (value) return value;
              if (performance.now() > end)
                throw new Error(`never: ${document.body.innerText} ${cards()}`);
              await new Promise((done) => setTimeout(done, 20));
            }
        })()"""
        try:
            return self.evaluate(loop % (seconds * 1000, expression))
        except AssertionError as error:
            raise AssertionError(
                f"{expression}: {error}; console: {self.browser.console}"
            ) from None

    # What each browser does in its own way.

    def run(self, expression: str) -> Any: ...
    def navigate(self, url: str) -> None: ...
    def press(self, key: str) -> None: ...
    def click(self, x: float, y: float) -> None: ...
    def picture(self) -> bytes:
        raise NotImplementedError

    def resize(self, width: int, height: int, ratio: float = 1) -> None:
        """Give the page so many CSS pixels; `ratio` device pixels each, as a zoom does."""

    def emulate(self, **features: str) -> bool:
        """Have media queries hold, such as forced_colors="active"; False where none can be set."""
        return False

    def activate(self) -> None: ...
    def close(self) -> None: ...


class Chromium(WebBrowser):
    """Chromium, by the DevTools protocol."""

    names = CHROMIUM

    def __init__(self, *flags: str) -> None:
        super().__init__()
        self.flags = flags

    def start(self) -> None:
        """Give the browser descriptors 3 (to read) and 4 (to write)."""
        its_input, self._output = os.pipe()
        self._input, its_output = os.pipe()

        def plumb() -> None:
            # By way of high numbers: a pipe may have been given 3 or 4 already.
            high = [os.dup2(its_input, 200), os.dup2(its_output, 201)]
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        self.launch(
            *"--headless=new --no-sandbox --disable-gpu --disable-background-networking".split(),
            *"--no-first-run --disable-component-update --disable-sync".split(),
            *("--remote-debugging-pipe", f"--user-data-dir={self.profile}", *self.flags),
            stderr=subprocess.DEVNULL,
            preexec_fn=plumb,
            close_fds=False,
        )
        os.close(its_input)
        os.close(its_output)

    def hang_up(self) -> None:
        os.close(self._output)

    def send(self, message: dict[str, Any]) -> None:
        os.write(self._output, json.dumps(message).encode() + b"\0")

    def messages(self) -> Iterator[dict[str, Any]]:
        with os.fdopen(self._input, "rb", buffering=0) as pipe:
            buffer = b""
            while part := pipe.read(1 << 20):
                *whole, buffer = (buffer + part).split(b"\0")
                yield from map(json.loads, whole)

    def note(self, method: str, params: dict[str, Any]) -> None:
        if method == "Runtime.consoleAPICalled":
            self.console.append(" ".join(str(each.get("value")) for each in params["args"]))
        elif method == "Runtime.exceptionThrown":
            self.console.append(json.dumps(params["exceptionDetails"]))
        elif method == "Log.entryAdded" and params["entry"]["source"] == "network":
            self.console.append("{text} {url}".format_map(params["entry"]))

    def open(self, url: str, before: str = "") -> Tab:
        target = self.call("Target.createTarget", {"url": "about:blank"})["targetId"]
        attached = self.call("Target.attachToTarget", {"targetId": target, "flatten": True})
        tab = ChromiumTab(self, attached["sessionId"])
        tab.target = target
        for domain in ("Page", "Runtime", "Log"):
            tab.call(f"{domain}.enable")
        tab.call("Page.addScriptToEvaluateOnNewDocument", source=before)
        tab.navigate(url)
        return tab

    def permit(self, name: str, state: str, origin: str) -> None:
        permission = {"permission": {"name": name}, "setting": state}
        self.call("Browser.setPermission", {**permission, "origin": origin})


class ChromiumTab(Tab):
    target: str

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return dict(self.browser.call(method, params, sessionId=self.handle))

    def navigate(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete' && location.href !== 'about:blank'")

    def run(self, expression: str) -> Any:
        for _ in range(10):
            try:
                done = self.call(
                    "Runtime.evaluate",
                    expression=expression,
                    awaitPromise=True,
                    returnByValue=True,
                )
            except AssertionError as error:
                # The page was left while the expression ran.
                if "context" not in str(error) and "navigated" not in str(error):
                    raise
                continue
            if "exceptionDetails" in done:
                raise AssertionError(done["exceptionDetails"]["exception"].get("description"))
            return done["result"].get("value")
        raise AssertionError("the page does not come to rest")

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            text = {"text": "\r"} if key == "Enter" and kind == "keyDown" else {}
            code = {"Enter": 13, "Escape": 27, "Tab": 9}.get(key, 0)
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=code,
                **text,
            )

    def click(self, x: float, y: float) -> None:
        for kind in ("mousePressed", "mouseReleased"):
            button = {"button": "left", "clickCount": 1}
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **button)

    def picture(self) -> bytes:
        return base64.b64decode(self.call("Page.captureScreenshot")["data"])

    def resize(self, width: int, height: int, ratio: float = 1) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=ratio,
            mobile=False,
        )

    def emulate(self, **features: str) -> bool:
        pairs = [{"name": k.replace("_", "-"), "value": v} for k, v in features.items()]
        self.call("Emulation.setEmulatedMedia", features=pairs)
        return True

    def activate(self) -> None:
        self.call("Page.bringToFront")

    def close(self) -> None:
        self.browser.call("Target.closeTarget", {"targetId": self.target})


class Firefox(WebBrowser):
    """Firefox, by WebDriver BiDi."""

    names = FIREFOX
    # There is no desktop that would show its notifications.
    preferences: ClassVar[dict[str, str]] = {"alerts.useSystemBackend": "false"}
    link: Browser | None = None
    stderr: threading.Thread | None = None

    def start(self) -> None:
        lines = [f'user_pref("{name}", {value});\n' for name, value in self.preferences.items()]
        Path(self.profile, "user.js").write_text("".join(lines))
        self.launch(
            *("--headless", "--no-remote", "--profile", self.profile),
            *("--remote-debugging-port", "0"),
            stderr=subprocess.PIPE,
        )
        assert self.process.stderr is not None
        for line in self.process.stderr:
            matched = re.search(rb"WebDriver BiDi listening on ws://127.0.0.1:(\d+)", line)
            if matched:
                break
        else:
            raise AssertionError("Firefox ended at once")
        # What it says later must not fill the pipe.
        self.stderr = threading.Thread(target=self.process.stderr.read, daemon=True)
        self.stderr.start()
        sock = socket.create_connection(("127.0.0.1", int(matched[1])), TIMEOUT)
        sock.settimeout(None)
        self.link = Browser(sock, "/session", f"127.0.0.1:{matched[1].decode()}")

    def begin(self) -> None:
        # Like Chromium's --ignore-certificate-errors.
        self.call("session.new", {"capabilities": {"alwaysMatch": {"acceptInsecureCerts": True}}})
        self.call("session.subscribe", {"events": ["log.entryAdded"]})

    def hang_up(self) -> None:
        if self.link is not None:
            self.link.sock.close()
        if self.stderr is not None:
            self.stderr.join()
        if self.process.stderr is not None:
            self.process.stderr.close()

    def send(self, message: dict[str, Any]) -> None:
        assert self.link is not None
        self.link.send(Opcode.TEXT, json.dumps(message).encode())

    def messages(self) -> Iterator[dict[str, Any]]:
        assert self.link is not None
        with contextlib.suppress(EOFError, OSError):
            while True:
                yield self.link.message()

    def note(self, method: str, params: dict[str, Any]) -> None:
        if method == "log.entryAdded":
            self.console.append(str(params.get("text")))

    def open(self, url: str, before: str = "") -> Tab:
        context = self.call("browsingContext.create", {"type": "tab"})["context"]
        tab = FirefoxTab(self, context)
        script = {"functionDeclaration": f"() => {{ {before} }}", "contexts": [context]}
        self.call("script.addPreloadScript", script)
        tab.navigate(url)
        return tab

    def permit(self, name: str, state: str, origin: str) -> None:
        permission = {"descriptor": {"name": name}, "state": state}
        self.call("permissions.setPermission", {**permission, "origin": origin})


class FirefoxTab(Tab):
    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return dict(self.browser.call(method, {"context": self.handle, **params}))

    def navigate(self, url: str) -> None:
        self.call("browsingContext.navigate", url=url, wait="complete")

    def run(self, expression: str) -> Any:
        done = self.browser.call(
            "script.evaluate",
            {"expression": expression, "target": {"context": self.handle}, "awaitPromise": True},
        )
        if done["type"] == "exception":
            raise AssertionError(done["exceptionDetails"]["text"])
        return done["result"].get("value")

    def press(self, key: str) -> None:
        value = {"Enter": "\ue007", "Escape": "\ue00c", "Tab": "\ue004"}.get(key, key)
        actions = [{"type": kind, "value": value} for kind in ("keyDown", "keyUp")]
        self.call(
            "input.performActions", actions=[{"type": "key", "id": "keys", "actions": actions}]
        )

    def click(self, x: float, y: float) -> None:
        move = {"type": "pointerMove", "x": round(x), "y": round(y)}
        buttons = [{"type": kind, "button": 0} for kind in ("pointerDown", "pointerUp")]
        pointer = {"type": "pointer", "id": "mouse", "actions": [move, *buttons]}
        self.call("input.performActions", actions=[pointer])

    def picture(self) -> bytes:
        return base64.b64decode(self.call("browsingContext.captureScreenshot")["data"])

    def resize(self, width: int, height: int, ratio: float = 1) -> None:
        viewport = {"width": width, "height": height}
        self.call("browsingContext.setViewport", viewport=viewport, devicePixelRatio=ratio)

    def emulate(self, **features: str) -> bool:
        """Have the cards' rule for a dark system hold; BiDi has no command for any feature."""
        is_dark = features.get("prefers_color_scheme") == "dark"
        self.evaluate(
            "[...document.querySelector('popup-notifier').shadowRoot.adoptedStyleSheets[0].cssRules]"
            f".find((rule) => rule.media).media.mediaText = {'all' if is_dark else 'not all'!r}"
        )
        return is_dark

    def activate(self) -> None:
        self.call("browsingContext.activate")

    def close(self) -> None:
        self.call("browsingContext.close")


class Site(ThreadingHTTPServer):
    """The CRM: a web server with pages that hold the script tag."""

    daemon_threads = True

    def __init__(self, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None) -> None:
        super().__init__((host, 0), SiteHandler)
        if tls is not None:
            # The thread of a request shakes hands: others do not wait for it.
            self.socket = tls.wrap_socket(
                self.socket, server_side=True, do_handshake_on_connect=False
            )
        self.url = f"{'http' if tls is None else 'https'}://{host}:{self.server_port}"
        self.pages: dict[str, str] = {}
        self.headers: dict[str, str] = {}
        self.asked_for: queue.Queue[str] = queue.Queue()

    def __enter__(self) -> Site:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of browsers that hang up amid a handshake."""

    def page(
        self, port: int, lang: str = "ja", code: str = "", body: str = "", **data: str
    ) -> str:
        """Return the address of a new page, whose script connects to the daemon at a port."""
        data.setdefault("url", f"ws://127.0.0.1:{port}/crmws")
        attributes = "".join(f' data-{name}="{escape(value)}"' for name, value in data.items())
        path = f"/{len(self.pages)}"
        self.pages[path] = (
            f"<!doctype html><html lang={lang}><meta charset=utf-8><title>CRM</title><body>{body}"
            f"<script src=/popup-sample.js{attributes}></script><script>{code}</script>"
        )
        return self.url + path

    def coded_page(self, port: int, lang: str = "ja", **data: str) -> str:
        """Return a page that keeps what it is told: `calls` and `seen`, the states."""
        code = """
            const calls = [], seen = [];
            function onCall(call) { calls.push(call) }
            function onStatus(status) { seen.push(status) }
            const n = PopupNotifier.connect({ onCall, onStatus });"""
        return self.page(port, lang, code, manual="", **data)


class SiteHandler(BaseHTTPRequestHandler):
    server: Site

    def do_GET(self) -> None:
        self.server.asked_for.put(self.path)
        status, kind, text = HTTPStatus.OK, "text/html", self.server.pages.get(self.path, "")
        if self.path == "/popup-sample.js":
            kind, text = "text/javascript", (HERE / "popup-sample.js").read_text()
        elif self.path.startswith("/crmws"):  # like a proxy that does not pass the upgrade on
            status, kind, text = HTTPStatus.UPGRADE_REQUIRED, "text/plain", "no upgrade here"
        content = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None: ...


class FakeDaemon:
    """Sends the same messages to every browser, then nothing; keeps what each asked for."""

    def __init__(self, *messages: dict[str, Any]) -> None:
        texts = [json.dumps(each).encode() for each in messages]
        self.frames = b"".join(serialize_frame(Opcode.TEXT, text) for text in texts)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.browsers: list[socket.socket] = []
        self.asked_for: queue.Queue[str] = queue.Queue()

    def __enter__(self) -> FakeDaemon:
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.drop()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self.listener.accept()
                head = sock.recv(65536).decode()
                matched = re.search(r"(?i)\r\nsec-websocket-key: (\S+)", head)
                if matched:
                    accept = popup_notifier.accept_key(matched[1])
                    head_101 = (
                        "HTTP/1.1 101 \r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                        f"Sec-WebSocket-Accept: {accept}\r\n\r\n"
                    )
                    sock.sendall(head_101.encode() + self.frames)
                    self.asked_for.put(head.split()[1])
                self.browsers.append(sock)

    def drop(self) -> None:
        """Cut all browsers off."""
        while self.browsers:
            self.browsers.pop().close()


TOASTS = "[...document.querySelector('popup-notifier').shadowRoot.querySelectorAll('article')]"
PHONE = "each.querySelectorAll('p')[1].textContent"
LINES = "[...each.querySelectorAll('p')].map((line) => line.textContent)"
MARK = "document.querySelector('popup-notifier').shadowRoot.querySelector('.mark')"
FOCUSED = "document.querySelector('popup-notifier').shadowRoot.activeElement"
MIDDLE = """((node) => {
    const { left, top, width, height } = node.getBoundingClientRect();
    return [left + width / 2, top + height / 2];
})"""
# Whether nothing covers a node: of the cards, or of the page.
ON_TOP = f"""((node) => {{
    const [x, y] = {MIDDLE}(node);
    const root = node.getRootNode();
    const hit = document.elementFromPoint(x, y);
    return root === document ? node.contains(hit)
      : root.host === hit && node.contains(root.elementFromPoint(x, y));
}})"""
# Listens to what the page plays: `heard` is its audio context.
TAP = """
    window.AudioContext = class extends AudioContext {
      constructor() {
        super();
        window.heard = this;
        this.analyser = new AnalyserNode(this);
        this.analyser.connect(super.destination);
      }
      get destination() { return this.analyser; }
      loudest() {
        const samples = new Float32Array(this.analyser.fftSize);
        this.analyser.getFloatTimeDomainData(samples);
        return Math.max(...samples);
      }
    };"""
# The same where there is no sound card, without which Firefox plays nothing: what it would play.
RENDER = """
    window.AudioContext = class extends OfflineAudioContext {
      constructor() {
        super(1, 44100, 44100);
        window.heard = this;
        this.samples = [0];
      }
      get state() { return this.isClosed ? 'closed' : this.isRunning ? 'running' : 'suspended'; }
      async resume() {
        if (this.isRunning) return;
        this.isRunning = true;
        this.samples = (await this.startRendering()).getChannelData(0);
      }
      async close() { this.isClosed = true; }
      loudest() { return this.samples.reduce((a, b) => Math.max(a, b)); }
    };"""
OPEN = (
    "document.readyState === 'complete' && seen.length && seen[seen.length - 1].state === 'open'"
)
LOST = "seen.length && seen[seen.length - 1].state === 'connecting'"
NO_CHANCE = "Math.random = () => 0.01;"  # the delay before a new attempt is short
FROZEN = "const began = Date.now(); Date.now = () => began;"  # no card ages
MARKUP = "\"><img src=x onerror='window.bad=1'><script>window.bad=1</script>\u202e${window.bad=1}"
WITHHELD = "anonymous Anonymous private unknown unavailable restricted withheld 非通知".split()


def cause(tab: Tab) -> str:
    """Return why there is no connection, once the mark in the corner says it."""
    said = tab.wait_for(f"/ \\d\\d:\\d\\d (.+)/s.exec({MARK}?.textContent)?.[1]")
    return str(said)


def toasts(tab: Tab, count: int) -> list[list[str]]:
    """Return the lines of each card once there are so many, the newest last."""
    lines = f"{TOASTS}.length === {count} && {TOASTS}.map((each) => {LINES}).reverse()"
    return [list(each) for each in tab.wait_for(lines)]


def wait_for_phones(tab: Tab, *phones: str) -> None:
    """Wait until the cards are of these numbers, the newest last."""
    shown = f"{TOASTS}.map((each) => {PHONE}).reverse()"
    tab.wait_for(f"JSON.stringify({shown}) === JSON.stringify({json.dumps(phones)})")


class Callers:
    """Who calls on the day in the office: numbers and names."""

    LONG = "国立研究開発法人さくら総合技術開発センター東日本事業本部お客様相談窓口第二課 " * 3
    NAMES: ClassVar[dict[int, tuple[str, str]]] = {
        1: ("0312345678", "株式会社サンプル 山田様"),
        2: ("0662345678", "例示商店 鈴木様"),
        5: ("0451112222", "みなと図書館"),
        8: ("anonymous", ""),
        9: ("+97142345678", "مكتب الاستيراد والتصدير (دبي)"),
        10: ("0805556666", "🍣 すし処 築地 🐟"),
        11: ("0662345678", "例示商店 鈴木様"),
        12: ("0120000000", LONG),
        13: ("+97235556666", "חברת הייבוא בע״מ"),
        14: ("0358765432", "Wolfeschlegelsteinhausenbergerdorff" * 3),
        17: ("+442079460000", "Smith & Sons <b>Ltd</b>"),
        18: ("Anonymous", ""),
    }

    def __getitem__(self, number: int) -> tuple[str, str]:
        return self.NAMES.get(number, (f"03{number:08}", f"顧客 {number}" if number % 3 else ""))


# A day in the office of 201 to 205: when, what, whom, and which call; `look` says what is on each
# screen, the newest last, and of which a picture is taken.
DAY = """
    09:00:00 ring 201 1
    09:00:05 look bright 201 | 201: ringing 1
    09:00:08 answer 201 1
    09:01:00 ring 202 2
    09:01:20 end - 2
    09:01:30 ring 203 3
    09:01:34 answer 203 3
    09:02:00 ring 204 4
    09:02:05 answer 204 4
    09:02:10 ring 205 5
    09:02:15 look dark 203 | 201: talking 1 | 202: missed 2 | 203: talking 3 | 204: talking 4
        | 205: ringing 5
    09:02:20 answer 205 5
    09:03:00 end - 1
    09:03:05 end - 3
    09:03:08 end - 4
    09:03:10 end - 5
    09:03:12 look crm 205 | 201: ended 1 | 202: missed 2 | 203: ended 3 | 204: ended 4
        | 205: ended 5
    09:05:00 ring 201,202,203 6
    09:05:04 answer 202 6
    09:05:10 ring 201 7
    09:05:25 ring 203 7
    09:05:30 answer 203 7
    09:05:35 look calm 202 | 202: missed 2, talking 6 | 203: talking 7
    09:06:00 ring 204 6
    09:06:10 answer 204 6
    09:06:20 ring 205 8
    09:06:30 end - 8
    09:06:40 ring 205 9
    09:06:45 ring 205 10
    09:06:50 look low 205 | 202: missed 2 | 203: talking 7 | 204: talking 6
        | 205: missed 8, ringing 9, ringing 10
    09:06:55 answer 205 10
    09:07:00 end - 9
    09:07:10 end - 7
    09:07:20 end - 6
    09:07:30 end - 10
    09:10:00 ring 202 11
    09:10:05 ring 202 12
    09:10:08 ring 202 13
    09:10:10 ring 202 14
    09:10:12 ring 202 15
    09:10:14 ring 202 16
    09:10:20 look zoomed 202 | 202: ringing 12, ringing 13, ringing 14, ringing 15, ringing 16
        | 205: missed 8, missed 9
    09:10:25 answer 202 12
    09:11:00 end - 11
    09:11:01 end - 13
    09:11:02 end - 14
    09:11:03 end - 15
    09:11:04 end - 16
    09:11:05 look dark-low 202 | 202: missed 13, missed 14, missed 15, missed 16, talking 12
        | 205: missed 8, missed 9
    09:12:00 end - 12
    09:12:10 close 202
    09:15:00 ring 204 17
    09:15:05 ring 204 18
    09:15:10 answer 204 17
    09:15:20 look forced 204 | 204: ringing 18, talking 17 | 205: missed 8, missed 9
    09:15:30 end - 18
    09:16:00 end - 17
    10:00:00 ring all 19
    10:00:05 answer 201 19
    10:00:30 ring all 20
    10:01:40 look aged 203 | 201: rang 20, talking 19 | 202: rang 20 | 203: rang 20
        | 204: missed 18, rang 20 | 205: missed 8, missed 9, rang 20
    10:02:00 end - 19
    10:03:00 close 205
"""
REST_OF_DAY = range(21, 41)  # calls of a minute each: every fifth is missed


# A page of a CRM.
CUSTOMERS = (
    '<meta name=color-scheme content="light dark"><style>body { margin: 24px; '
    'font: 16px/1.6 "Noto Sans CJK JP", sans-serif } td { padding: 4px 24px 4px 0 }</style>'
    "<h2>顧客一覧</h2><table><tr><td>株式会社サンプル<td>03-1234-5678<td>東京都千代田区"
    "<tr><td>例示商店<td>06-1234-5678<td>大阪府大阪市</table>"
)


class Clock:
    """What a daemon takes for the time: it stands still until it is set."""

    def __init__(self, folder: str) -> None:
        self.path = Path(folder, "clock")
        self.set("00:00:00")

    @property
    def statement(self) -> str:
        return f"p.LocalStream.clock = lambda self: int(open({str(self.path)!r}).read())"

    def set(self, text: str, day: int = 25) -> None:
        """Have it be this time of a day."""
        moment = time.mktime(time.strptime(f"2025-11-{day} {text}", "%Y-%m-%d %H:%M:%S"))
        draft = self.path.with_suffix(".new")
        draft.write_text(str(int(moment * 1000)))
        draft.replace(self.path)


class Office(contextlib.ExitStack):
    """Five agents, each with a page of its own origin: they share no storage."""

    def __init__(self, browser: WebBrowser) -> None:
        super().__init__()
        self.clock = Clock(self.enter_context(tempfile.TemporaryDirectory()))
        self.clock.set("08:59:00")
        program = self.enter_context(patched(self.clock.statement))
        self.daemon = self.enter_context(Daemon(program=program, PING_INTERVAL=1, HISTORY=60))
        self.told = 0  # events
        self.pages: dict[str, Tab] = {}
        for agent in ("201", "202", "203", "204", "205"):
            site = self.enter_context(Site(f"127.0.0.{agent[1:]}"))
            site.pages["/who/0451112222"] = (
                '{"name": "みなと図書館 (会員)", "note": "先月の見積もりの件"}'
            )
            options = {"exten": agent, "open": "https://crm.example/search?phone={phone}"}
            if agent == "205":
                options |= {"lookup": "/who/{phone}", "create": "https://crm.example/new"}
            lang = "en" if agent == "204" else "ja"
            url = site.coded_page(self.daemon.port, lang, body=CUSTOMERS, **options)
            page = self.pages[agent] = browser.open(url, NO_CHANCE)
            self.callback(page.close)
            page.wait_for(OPEN)

    def tell(self, event: str, exten: str, number: int) -> None:
        """Have the PBX trigger an event of a call."""
        phone, name = Callers()[number]
        query = f"&event={event}&uniqueid=day.{number}&name={quote(name)}"
        query += "" if exten == "-" else f"&exten={exten}"
        assert self.daemon.trigger(query, quote(phone)) == 200
        self.told += 1

    def wait_until_heard(self) -> None:
        """Wait until each page has heard of every event that the daemon sent to it."""

        def all_heard() -> bool:
            sent = re.findall(r"call .* to (\d+) browser", "\n".join(self.daemon.lines))
            heard = sum(page.evaluate("calls.length") for page in self.pages.values())
            return len(sent) == self.told and heard == sum(map(int, sent))

        until(all_heard, "every event is heard")

    def screens(self) -> dict[str, list[str]]:
        """Return what is on each screen, such as "ringing 0312345678", the newest last."""
        text = f"{TOASTS}.map((each) => `${{each.className}} ${{{PHONE}}}`).reverse()"
        return {agent: page.evaluate(text) for agent, page in self.pages.items()}

    def close_all(self, agent: str) -> None:
        """Have an agent close all cards, the newest first."""
        page = self.pages[agent]
        newest = f"{TOASTS}[0]?.querySelector('button')"
        page.wait_for(f"{newest} ? {newest}.click() : true")


# How the pictures of the day are taken: the window, the zoom, and what the system is set to.
LOOKS: dict[str, tuple[tuple[int, int, float], dict[str, str]]] = {
    "bright": ((1280, 720, 1), {}),
    "dark": ((1280, 720, 1), {"prefers_color_scheme": "dark"}),
    "crm": ((1024, 600, 1), {}),
    "calm": ((1024, 600, 1), {"prefers_reduced_motion": "reduce"}),
    "low": ((820, 480, 1), {}),
    "zoomed": ((640, 360, 2), {}),
    "dark-low": ((820, 480, 1), {"prefers_color_scheme": "dark"}),
    "forced": ((800, 480, 1), {"forced_colors": "active"}),
    "aged": ((1280, 480, 1), {}),
    "evening": ((800, 480, 1), {}),
}

README_PICTURES = {"chromium-low.png": "cards.png"}


def contrast(one: str, other: str) -> float:
    """Return the contrast of two colours as WCAG 2.2 defines it; both are rgb(R, G, B)."""
    lights = []
    for color in (one, other):
        parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(lights) + 0.05) / (min(lights) + 0.05)


class BrowserTests(unittest.TestCase):
    """popup-sample.js and the desk in a real browser; below there is a class for each."""

    browser_class: type[WebBrowser]
    keeps_pages = True  # in the back/forward cache
    listens = TAP
    browser: WebBrowser
    site: Site
    stack: contextlib.ExitStack

    @classmethod
    def setUpClass(cls) -> None:
        with contextlib.ExitStack() as stack:
            cls.site = stack.enter_context(Site())
            cls.browser = stack.enter_context(cls.browser_class())
            cls.stack = stack.pop_all()

    @classmethod
    def tearDownClass(cls) -> None:
        cls.stack.close()

    def open(self, url: str, before: str = "") -> Tab:
        tab = self.browser.open(url, before)
        self.addCleanup(tab.close)
        return tab

    def opened(self, port: int, lang: str, **data: str) -> contextlib.closing[Tab]:
        """Return a page that will not connect; Firefox makes others wait for such a one."""
        return contextlib.closing(self.browser.open(self.site.page(port, lang, **data), NO_CHANCE))

    def open_connected(self, daemon: Daemon | FakeDaemon, lang: str = "ja", **data: str) -> Tab:
        """Return a page of the CRM that is connected."""
        tab = self.open(self.site.coded_page(daemon.port, lang, **data), NO_CHANCE)
        tab.wait_for(OPEN)
        return tab

    # The popup.

    @needs("curl")
    def test_one_line_of_curl_pops_up(self) -> None:
        with Daemon(SECRET_TOKEN="mytoken") as daemon:
            tab = self.open(self.site.page(daemon.port))
            daemon.wait_for_log("browser connected")
            url = f"http://127.0.0.1:{daemon.port}/api/trigger?phone=0312345678&exten=201&token=mytoken"
            subprocess.run(
                ["curl", "-s", "-X", "POST", url, "-m", "1"], capture_output=True, check=True
            )
            wait_for_phones(tab, "0312345678")

    def test_readme_tags_connect_and_fill_in_the_link(self) -> None:
        with Daemon() as daemon:
            for number, block in enumerate(readme_blocks("html")):
                tags = block.replace("http://192.0.2.10:8989", f"http://127.0.0.1:{daemon.port}")
                self.site.pages["/crm"] = f"<!doctype html><meta charset=utf-8><body>{tags}"
                page = self.browser.open(self.site.url + "/crm", NO_CHANCE)
                with self.subTest(block), contextlib.closing(page) as tab:
                    daemon.wait_for_log("browser connected", 1 + number)
                    daemon.trigger("&exten=201")
                    toasts(tab, 1)
                    link = tab.evaluate(f"{TOASTS}[0].querySelector('a').href")
                    self.assertEqual(link, "https://crm.example.com/search?phone=0312345678")
            self.assertEqual(number, 1)

    def test_popup_in_both_languages(self) -> None:
        with Daemon() as daemon:
            for lang, ring, exten, close, link in (
                ("ja", "着信", "内線", "閉じる", "開く"),
                ("en", "Incoming call", "ext.", "Close", "Open"),
            ):
                with self.subTest(lang):
                    options = {"exten": "201,202", "open": "https://crm.example/?q={phone}"}
                    tab = self.open_connected(daemon, lang, **options)
                    daemon.trigger("&exten=203", phone="1")
                    daemon.trigger("&exten=202&name=" + quote("山田 太郎"), phone="2")
                    [[head, phone, name]] = toasts(tab, 1)
                    self.assertRegex(head, rf"^{re.escape(ring)} {exten} 202 \d\d:\d\d$")
                    self.assertEqual((phone, name), ("2", "山田 太郎"))
                    rest = f"({TOASTS}[0])"
                    self.assertEqual(tab.evaluate(f"{rest}.getAttribute('role')"), "alert")
                    self.assertEqual(tab.evaluate(f"{rest}.querySelector('a').textContent"), link)
                    label = f"{rest}.querySelector('button').getAttribute('aria-label')"
                    self.assertEqual(tab.evaluate(label), close)

    def test_hostile_caller_is_shown_as_text(self) -> None:
        text = quote(MARKUP)
        with Daemon() as daemon:
            tab = self.open_connected(daemon)
            desk = self.open_desk(daemon, "?exten=")
            daemon.trigger(f"&name={text}&exten={text},all", phone=text)
            [[head, phone, name]] = toasts(tab, 1)
            self.assertEqual((phone, name), (MARKUP, MARKUP))
            self.assertIn("<script>window.bad=1</script>\u202e${window.bad=1}", head)
            desk.wait_for("document.querySelector('#calls .number')")
            for part in ("who", "number"):
                shown = desk.evaluate(f"document.querySelector('#calls .{part}').textContent")
                self.assertEqual(shown, MARKUP)
            for page in (tab, desk):
                self.assertTrue(page.evaluate("window.bad === undefined"))
                self.assertTrue(page.evaluate("document.images.length === 0"))

    def test_withheld_numbers_have_no_link(self) -> None:
        with Daemon() as daemon:
            tab = self.open_connected(daemon, open="https://crm.example/?q={phone}")
            for word in (*WITHHELD, "0312345678"):
                with self.subTest(word):
                    daemon.trigger(phone=quote(word))
                    is_number = word.isdigit()
                    self.assertEqual(toasts(tab, 1)[0][1], word if is_number else "非通知")
                    links = tab.evaluate(f"{TOASTS}[0].querySelectorAll('a').length")
                    self.assertEqual(links, int(is_number))
                    tab.press("Escape")
                    toasts(tab, 0)

    # (data-open, data-normalise, phone, the link)
    LINKS = (
        (
            "https://crm.example/?q={phone}&n={name}",
            "",
            "+81 3&4",
            "?q=%2B81%203%264&n=%E5%B1%B1%22",
        ),
        ("https://crm.example/{exten}", "", "1", "/a%2Fb%2C201"),
        ("https://crm.example/?q={phone}", "0", "+81312345678", "?q=0312345678"),
        ("https://crm.example/?q={phone}", "+81", "0312345678", "?q=%2B81312345678"),
        ("https://crm.example/?q={phone}", "+81", "01012125551234", "?q=01012125551234"),
        ("/customers/{phone}", "", "..", "/customers/.."),
        ("javascript:alert({phone})", "", "1", None),
        ("data:text/html,{phone}", "", "1", None),
        ("{phone}", "", "javascript:alert(1)", "/javascript%3Aalert(1)"),
        ("http://[{phone}", "", "1", None),
    )

    def test_link_is_filled_in_normalised_and_encoded(self) -> None:
        with Daemon() as daemon:
            tab = self.open_connected(daemon)
            for template, normalise, phone, expected in self.LINKS:
                with self.subTest(template, phone=phone):
                    options = json.dumps({"open": template, "normalise": normalise})
                    tab.evaluate(
                        "n.close(), window.again?.close(), seen.length = 0, window.again = "
                        f"PopupNotifier.connect(Object.assign({options}, {{ onStatus }})), 0"
                    )
                    tab.wait_for(OPEN)
                    query = f"&name={quote('山')}%22&exten=a/b,201"
                    daemon.trigger(query, phone=quote(phone))
                    toasts(tab, 1)
                    link = tab.evaluate(f"{TOASTS}[0].querySelector('a')?.getAttribute('href')")
                    if expected is None:
                        self.assertIsNone(link)
                    else:
                        self.assertTrue(link.endswith(expected.lstrip("/")), link)
                    tab.press("Escape")
                    toasts(tab, 0)

    def test_card_is_reached_opened_and_closed_by_keys(self) -> None:
        with Daemon() as daemon:
            options = {"open": self.site.url + "/customer?q={phone}"}
            url = self.site.coded_page(daemon.port, **options)
            tab = self.open(url)
            tab.wait_for(OPEN)
            daemon.trigger(phone="1")
            toasts(tab, 1)
            daemon.trigger(phone="2")
            daemon.trigger(phone="3")
            toasts(tab, 3)
            tab.press("Escape")  # the newest
            wait_for_phones(tab, "1", "2")
            tab.press("Tab")  # past the sign of being connected
            for _ in range(2):
                tab.press("Tab")
                tab.wait_for(f"/^(A|BUTTON)$/.test({FOCUSED}?.tagName)")
            tab.wait_for(f"{FOCUSED}?.tagName === 'BUTTON'")
            tab.press("Enter")  # closes 2
            wait_for_phones(tab, "1")
            for _ in range(9):
                tab.press("Tab")
                if tab.evaluate(f"{FOCUSED}?.tagName") == "A":
                    break
            tab.press("Enter")
            while self.site.asked_for.get(timeout=TIMEOUT) != "/customer?q=1":
                pass

    def test_styles_and_policy_of_the_page_do_not_matter(self) -> None:
        self.site.headers["Content-Security-Policy"] = (
            "default-src 'none'; script-src 'self'; style-src 'unsafe-inline'; connect-src ws:"
        )
        self.addCleanup(self.site.headers.clear)
        rules = "display: none !important; position: static !important"
        style = f"<style>popup-notifier, section, article, p {{ {rules} }}</style>"
        with Daemon() as daemon:
            tab = self.open(self.site.page(daemon.port, body=style))
            daemon.wait_for_log("browser connected")
            daemon.trigger()
            toasts(tab, 1)
            self.assertGreater(tab.evaluate(f"{TOASTS}[0].offsetHeight"), 30)
            position = f"getComputedStyle({TOASTS}[0].closest('section')).position"
            self.assertEqual(tab.evaluate(position), "fixed")

    def test_answer_elsewhere_takes_the_popup_away(self) -> None:
        with Daemon() as daemon:
            tab = self.open(self.site.coded_page(daemon.port, exten="202"), FROZEN + NO_CHANCE)
            tab.wait_for(OPEN)
            daemon.trigger("&exten=201,202&uniqueid=9.1&event=ring", phone="1")
            daemon.trigger("&exten=201,202&uniqueid=9.2&event=ring", phone="2")
            toasts(tab, 2)
            daemon.trigger("&exten=202&uniqueid=9.2&event=answer", phone="2")
            daemon.trigger("&exten=201&uniqueid=9.1&event=answer", phone="1")
            wait_for_phones(tab, "2")
            daemon.trigger("&exten=202&uniqueid=9.2&event=end", phone="2")
            daemon.trigger("&exten=202&uniqueid=9.3&event=answer", phone="3")
            wait_for_phones(tab, "2", "3")
            events = tab.evaluate("calls.map((call) => call.event)")
            self.assertEqual(events, ["ring", "ring", "answer", "answer", "end", "answer"])
            mine = tab.evaluate("calls.map((call) => call.mine)")
            self.assertEqual(mine, [True, True, True, False, True, True])
            # One that I dismissed, and one that was answered before its popup was there.
            tab.press("Escape")
            toasts(tab, 1)
            daemon.trigger("&exten=202&uniqueid=9.3&event=answer", phone="3")
            tab.wait_for("calls.length === 7")
            daemon.trigger("&exten=201,202&uniqueid=9.4&event=ring", phone="4")
            daemon.trigger("&exten=201&uniqueid=9.4&event=answer", phone="4")
            daemon.trigger("&exten=202", phone="5")
            wait_for_phones(tab, "2", "5")

    def test_card_follows_its_call_from_ring_to_end(self) -> None:
        ring, talking, missed, ended = "着信", "通話中", "不在着信", "終了"
        with Daemon() as daemon:
            tab, reception = (
                self.open(self.site.coded_page(daemon.port, **options), FROZEN + NO_CHANCE)
                for options in ({"exten": "201"}, {})
            )
            tab.wait_for(OPEN)
            reception.wait_for(OPEN)

            def tell(event: str, exten: str, number: int) -> None:
                daemon.trigger(f"&event={event}&exten={exten}&uniqueid=5.{number}", str(number))

            def states(tab: Tab, *expected: tuple[str, str]) -> list[str]:
                kinds = f"{TOASTS}.map((each) => [each.querySelector('b').textContent, {PHONE}])"
                shown = json.dumps([list(each) for each in expected[::-1]])
                tab.wait_for(f"JSON.stringify({kinds}) === JSON.stringify({shown})")
                return [lines[0] for lines in toasts(tab, len(expected))]

            tab.activate()
            tab.wait_for("!document.hidden")
            tell("ring", "201", 1)
            states(tab, (ring, "1"))
            tell("answer", "201", 1)
            states(tab, (talking, "1"))
            tell("end", "", 1)
            states(tab, (ended, "1"))
            tell("ring", "201", 2)  # nobody answers
            tell("end", "", 2)
            states(tab, (ended, "1"), (missed, "2"))
            tell("ring", "all", 3)  # a group, answered elsewhere
            states(tab, (ended, "1"), (missed, "2"), (ring, "3"))
            tell("answer", "202", 3)
            states(tab, (ended, "1"), (missed, "2"))
            tell("answer", "201", 3)  # and transferred to me
            states(tab, (ended, "1"), (missed, "2"), (talking, "3"))
            tell("answer", "203", 3)  # and on to somebody else
            states(tab, (ended, "1"), (missed, "2"))
            # Another tab had shown those: reception is not in front.
            tab.evaluate("n.close()")
            reception.activate()
            reception.wait_for("!document.hidden")
            tell("ring", "201", 4)
            tell("answer", "202", 4)
            self.assertIn("応答 202", states(reception, (talking, "4"))[0])
            tell("end", "", 4)
            states(reception)

    def test_ended_call_goes_after_20_s_and_a_ring_becomes_rang_after_60_s(self) -> None:
        with Daemon(PING_INTERVAL=3600) as daemon:  # no ALIVE corrects the clock
            tab = self.open_connected(daemon, exten="201")
            daemon.trigger("&event=answer&uniqueid=6.1", "1")
            daemon.trigger("&event=end&uniqueid=6.1", "1")
            daemon.trigger(phone="2")
            daemon.trigger(phone="2")
            tab.wait_for(f"{TOASTS}.some((each) => each.textContent.includes('2回目'))")
            [_, [head, *_]] = toasts(tab, 2)
            self.assertRegex(head, r"^着信 \d\d:\d\d 2回目$")
            tab.evaluate("[window.now = Date.now, Date.now = () => now.call(Date) + 61000].length")
            [[head, *_]] = toasts(tab, 1)
            self.assertRegex(head, r"^着信あり \d\d:\d\d 2回目$")

    def test_caller_who_calls_again_has_one_card(self) -> None:
        with Daemon() as daemon:
            tab = self.open_connected(daemon, exten="201")
            for unique, phone in (("6.1", "1"), ("6.2", "anonymous"), ("6.3", "anonymous")):
                daemon.trigger(f"&exten=201&uniqueid={unique}", phone)
                daemon.trigger(f"&event=end&uniqueid={unique}", phone)
            toasts(tab, 3)
            daemon.trigger("&exten=201&uniqueid=6.4", "1")
            again = f"{TOASTS}[0].textContent.includes('2回目')"
            tab.wait_for(f"{again} && {TOASTS}.length === 3")
            wait_for_phones(tab, "非通知", "非通知", "1")

    def test_at_most_five_cards_and_those_of_calls_that_go_on_lowest(self) -> None:
        with Daemon() as daemon:
            tab = self.open_connected(daemon, exten="201")
            daemon.trigger("&event=answer&exten=201&uniqueid=6.1", "1")
            for number in range(2, 8):
                daemon.trigger(f"&exten=201&uniqueid=6.{number}", str(number))
                daemon.trigger(f"&event=end&uniqueid=6.{number}", str(number))
            wait_for_phones(tab, "4", "5", "6", "7", "1")

    def test_call_whose_end_was_lost_is_over_after_three_hours(self) -> None:
        now = 1763870000000
        messages: list[dict[str, Any]] = [
            {"type": "HELLO", "id": "5-0", "complete": True, "interval": 25, "time": now}
        ]
        for phone, hours in (("1", 3.01), ("2", 2.99)):
            data = {"event": "answer", "exten": "201", "phone": phone, "uniqueid": phone}
            fields = {"type": "CALL_IN", "id": "5-1", "key": phone, "data": data}
            messages.append({**fields, "time": now - int(hours * 3600000)})
        with FakeDaemon(*messages) as daemon:
            code = "const n = PopupNotifier.connect();"
            tab = self.open(self.site.page(daemon.port, code=code, manual="", exten="201"))
            wait_for_phones(tab, "2")
            states = tab.evaluate("n.calls.map(({ phone, state }) => [phone, state])")
        self.assertEqual(states, [["1", "ended"], ["2", "talking"]])

    # (what it is, [(event, exten, seconds)], the state for 201, its extensions)
    CALLS: ClassVar[list[tuple[str, list[tuple[str, str, int]], str, str]]] = [
        ("answered", [("ring", "201", 0), ("answer", "201", 9)], "talking", "201"),
        ("ended", [("ring", "201", 0), ("answer", "201", 5), ("end", "all", 9)], "ended", "201"),
        ("missed", [("ring", "201", 0), ("end", "all", 9)], "missed", "201"),
        ("a group", [("ring", "201,202", 0), ("answer", "202", 9)], "elsewhere", "202"),
        (
            "a queue",
            [("ring", "201", 0), ("ring", "202", 1), ("answer", "201", 5), ("end", "201", 9)],
            "ended",
            "201",
        ),
        (
            "transferred to me",
            [("ring", "202", 0), ("answer", "202", 3), ("ring", "201", 9), ("answer", "201", 12)],
            "talking",
            "201",
        ),
        (
            "transferred by me",
            [("ring", "201", 0), ("answer", "201", 3), ("answer", "202", 9), ("end", "all", 12)],
            "elsewhere",
            "202",
        ),
        ("a headset that picks up", [("ring", "201", 1), ("answer", "201", 0)], "talking", "201"),
        ("given up at once", [("ring", "201", 1), ("end", "all", 0)], "missed", "201"),
        ("only a ring", [("ring", "all", 9)], "ringing", ""),
    ]

    def test_events_in_any_order_give_the_same(self) -> None:
        start = 1763870000000
        hello = {"type": "HELLO", "id": "5-0", "complete": True, "interval": 25}
        messages: list[dict[str, Any]] = [{**hello, "time": start + 13000}]
        expected = []
        for label, events, state, exten in self.CALLS:
            for number, order in enumerate(itertools.permutations(range(len(events)))):
                unique = f"{label} {number}"
                expected.append([unique, state, exten])
                for index in (*order, order[0]):  # one comes twice, under another key
                    event, to, at = events[index]
                    data = {"event": event, "exten": to, "phone": "1", "uniqueid": unique}
                    fields = {"type": "CALL_IN", "id": "5-1", "key": f"k-{len(messages)}"}
                    messages.append({**fields, "time": start + at * 1000, "data": data})
        code = "const n = PopupNotifier.connect({ onCall: () => false });"
        with FakeDaemon(*messages) as daemon:
            tab = self.open(self.site.page(daemon.port, code=code, manual="", exten="201"))
            tab.wait_for(f"n.calls.length === {len(expected)}", 3 * TIMEOUT)
            calls = tab.evaluate("n.calls.map((call) => [call.uniqueid, call.state, call.exten])")
        self.assertEqual(sorted(calls), sorted(expected))

    def test_cards_stay_over_a_reload_and_a_call_meanwhile_is_shown(self) -> None:
        with Daemon(HISTORY=600) as daemon:
            url = self.site.page(daemon.port, exten="201")
            tab = self.open(url)
            daemon.wait_for_log("browser connected")
            daemon.trigger("&exten=201&uniqueid=7.1&event=ring", "1")
            toasts(tab, 1)
            tab.evaluate("(document.title = 'old', location.reload(), 0)")
            daemon.trigger("&exten=201", "2")  # while it loads
            tab.wait_for("document.title === 'CRM' && document.querySelector('popup-notifier')")
            wait_for_phones(tab, "1", "2")
            daemon.trigger("&exten=201&uniqueid=7.1&event=answer", "1")
            tab.wait_for(f"{TOASTS}.some((each) => each.className === 'talking')")
            # A page that replaces all that it has.
            tab.evaluate(
                "(document.documentElement.replaceChildren(document.createElement('body')), 0)"
            )
            tab.wait_for("document.querySelector('popup-notifier')?.matches(':popover-open')")
            self.assertEqual(len(toasts(tab, 2)), 2)

    def test_lookup_shows_who_it_is_and_a_link_to_create(self) -> None:
        answers = {"1": '{"name": "山田様", "open": "/c/7", "note": "VIP"}', "2": "{}"}
        for phone, answer in answers.items():
            self.site.pages[f"/who/{phone}"] = answer
        options = {"lookup": "/who/{phone}", "create": "/new?tel={phone}", "open": "/c?q={phone}"}
        with Daemon() as daemon:
            tab = self.open_connected(daemon, **options)
            for phone, lines, links in (
                ("1", ["山田様", "VIP"], ["/c/7"]),
                ("2", ["", "登録なし"], ["/new?tel=2", "/c?q=2"]),
                ("3", ["", "登録なし"], ["/new?tel=3", "/c?q=3"]),
            ):
                with self.subTest(phone):
                    daemon.trigger(phone=phone)
                    tab.wait_for(f"{TOASTS}[0]?.querySelectorAll('p').length === 4")
                    self.assertEqual(toasts(tab, 1)[0][2:], lines)
                    anchors = f"[...{TOASTS}[0].querySelectorAll('a')]"
                    hrefs = tab.evaluate(f"{anchors}.map((a) => a.getAttribute('href'))")
                    self.assertEqual(hrefs, links)
                    tab.press("Escape")
                    toasts(tab, 0)

    def test_code_of_the_page_may_answer_or_hide_a_card_and_may_fail(self) -> None:
        code = """
            const answers = {
              1: () => { throw new Error('of the page') }, 2: () => false,
              3: async () => ({ name: 'found', note: 'by code' }), 4: async () => { throw 4 },
              5: (call) => { setTimeout(call.update, 0, { name: 'later' }) },
            };
            PopupNotifier.connect({ onCall: (call) => answers[call.phone](call) });"""
        with Daemon() as daemon:
            tab = self.open(self.site.page(daemon.port, code=code, manual=""))
            daemon.wait_for_log("browser connected")
            for phone in "12345":
                daemon.trigger(phone=phone)
            tab.wait_for(f"{TOASTS}.some((each) => each.textContent.includes('later'))")
            shown = [lines[1:] for lines in toasts(tab, 4)]
            self.assertEqual(
                shown, [["1", ""], ["3", "found", "by code"], ["4", ""], ["5", "later"]]
            )

    def test_agent_is_asked_for_the_extension_once(self) -> None:
        with Daemon() as daemon:
            url = self.site.page(daemon.port, exten="ask", alert="title")
            tab = self.open(url, "sessionStorage.length || localStorage.clear();")
            field = (
                "document.querySelector('popup-notifier').shadowRoot.querySelector('form input')"
            )
            tab.wait_for(field)
            tab.evaluate(f"({field}.focus(), {field}.value = '203', 0)")
            tab.press("Enter")
            daemon.wait_for_log('browser connected: .* exten="203"')
            daemon.trigger("&exten=201", "1")
            daemon.trigger("&exten=203&uniqueid=8.1&event=ring", "2")
            wait_for_phones(tab, "2")
            tab.wait_for("document.title === '☎ 2'")
            daemon.trigger("&uniqueid=8.1&event=end", "2")
            tab.wait_for("document.title === 'CRM'")
            again = self.open(url)
            daemon.wait_for_log('browser connected: .* exten="203"', 2)
            again.evaluate("localStorage.clear()")

    def test_one_of_several_tabs_shows_a_call(self) -> None:
        with Daemon() as daemon:
            tabs = [self.open_connected(daemon) for _ in range(3)]
            tabs[1].activate()
            for tab, is_hidden in zip(tabs, (True, False, True)):
                tab.wait_for(f"document.hidden === {json.dumps(is_hidden)}")
            for number in range(3):
                daemon.trigger(phone=str(number))
            wait_for_phones(tabs[1], "0", "1", "2")
            self.assertEqual(self.shown_in_all(tabs, 3), 3)
            # All are hidden, and the one that showed the calls has ended.
            self.open("about:blank#").activate()
            tabs[1].evaluate("n.close()")
            for tab in (tabs[0], tabs[2]):
                tab.wait_for("document.hidden")
            daemon.trigger(phone="3")
            self.assertEqual(self.shown_in_all([tabs[0], tabs[2]], 4), 1)

    def shown_in_all(self, tabs: list[Tab], calls: int) -> int:
        """Return how many popups the tabs show in all, once they have decided on each call."""
        for tab in tabs:
            tab.wait_for(f"calls.length === {calls}")
            # Set now, this timer comes behind all those that the calls have set.
            tab.evaluate("new Promise((done) => setTimeout(done, 2000))")
        return sum(tab.evaluate(f"{TOASTS}.length") for tab in tabs)

    def test_notifications_denied_and_popups_blocked(self) -> None:
        self.browser.permit("notifications", "denied", self.site.url)
        with Daemon() as daemon:
            url = self.site.coded_page(daemon.port)
            tab = self.open(url, "window.open = () => null; window.localStorage.clear();")
            self.assertEqual(tab.evaluate("Notification.permission"), "denied")
            tab.wait_for(OPEN)
            daemon.trigger()
            toasts(tab, 1)
            self.assertEqual(tab.evaluate("n.askPermission()"), "denied")

    def test_desktop_notification_of_a_hidden_page(self) -> None:
        listen = """
            window.told = [];
            window.Notification = class extends Notification {
              constructor(title, options) {
                super(title, options);
                window.notification = this;
                for (const type of ['show', 'error', 'close']) {
                  const keep = () => told.push(`${type} ${this.title} ${this.body}`);
                  this.addEventListener(type, keep);
                }
              }
            };"""
        with Daemon() as daemon:
            self.browser.permit("notifications", "granted", self.site.url)
            self.addCleanup(self.browser.permit, "notifications", "prompt", self.site.url)
            options = {"exten": "201", "open": "https://crm.example/{phone}"}
            tab = self.open(self.site.coded_page(daemon.port, **options), listen)
            tab.wait_for(OPEN)
            daemon.trigger("&exten=201", phone="1")
            toasts(tab, 1)
            self.open("about:blank#").activate()
            tab.wait_for("document.hidden")
            daemon.trigger("&exten=201,202&uniqueid=7&name=Yamada", phone="2")
            tab.wait_for("told.length === 1")
            daemon.trigger("&exten=202&uniqueid=7&event=answer", phone="2")
            tab.wait_for("told.length === 2")
            for event, told in zip(("show", "close"), tab.evaluate("told")):
                self.assertEqual(told, f"{event} Yamada 着信 内線 201,202 2")
            self.assertEqual(tab.evaluate("notification.tag"), "7")
            # The page is seen, but the agent works in another window.
            tab.activate()
            tab.wait_for("!document.hidden")
            tab.evaluate("(document.hasFocus = () => false, n.alert = 'notification', 0)")
            self.addCleanup(tab.evaluate, "localStorage.clear()")
            daemon.trigger("&exten=201&uniqueid=8&name=Suzuki", phone="3")
            tab.wait_for("told.length === 3")
            self.assertEqual(tab.evaluate("told[2]"), "show Suzuki 着信 内線 201 3")
            tab.evaluate("(window.open = (...words) => { window.opened = words }, 0)")
            tab.evaluate("(notification.dispatchEvent(new Event('click')), 0)")
            link = ["https://crm.example/3", "_blank", "noopener"]
            self.assertEqual(tab.evaluate("opened"), link)

    # Where the agent looks, and where not.

    def click(self, tab: Tab, node: str) -> None:
        """Click with the mouse on what is seen in the middle of a node of the cards."""
        tab.wait_for(f"{ON_TOP}({node})")
        x, y = tab.evaluate(f"{MIDDLE}({node})")
        tab.click(x, y)

    def test_cards_are_above_a_dialog_and_a_full_screen(self) -> None:
        body = (
            "<dialog>Delete this customer?</dialog><main style='background: gray'>"
            "<button onclick='document.querySelector(`main`).requestFullscreen()'>full</button>"
        )
        with Daemon() as daemon:
            tab = self.open(self.site.page(daemon.port, body=body), NO_CHANCE)
            daemon.wait_for_log("browser connected")
            daemon.trigger(phone="1")
            toasts(tab, 1)
            dialog = "document.querySelector('dialog')"
            tab.evaluate(f"({dialog}.showModal(), 0)")
            daemon.trigger(phone="2")
            toasts(tab, 2)
            tab.press("Escape")  # is the dialog's
            tab.wait_for(f"!{dialog}.open")
            tab.evaluate(f"({dialog}.showModal(), 0)")
            for phone in ("2", "1"):
                with self.subTest(phone):
                    self.click(tab, f"{TOASTS}[0].querySelector('button')")
                    tab.wait_for(f"!{TOASTS}.some((each) => {PHONE} === '{phone}')")
                    self.assertTrue(tab.evaluate(f"{dialog}.open"))
            daemon.trigger(phone="3")
            toasts(tab, 1)
            tab.evaluate(f"({dialog}.close(), 0)")
            tab.wait_for(f"{ON_TOP}({TOASTS}[0])")
            tab.wait_for("document.querySelector('popup-notifier').matches('html > *')")
            x, y = tab.evaluate(f"{MIDDLE}(document.querySelector('main button'))")
            tab.click(x, y)
            tab.wait_for("document.fullscreenElement")
            tab.wait_for(f"{ON_TOP}({TOASTS}[0])")

    def test_sound_until_the_call_is_answered(self) -> None:
        with Daemon() as daemon:
            page = self.site.coded_page(daemon.port, alert="sound")
            tab = self.open(page, self.listens + NO_CHANCE)
            tab.wait_for(OPEN)
            daemon.trigger("&uniqueid=4.1&event=ring")
            toasts(tab, 1)
            tab.wait_for("window.heard")
            if self.listens is TAP:
                self.assertEqual(tab.evaluate("heard.state"), "suspended")
            tab.click(5, 5)
            tab.wait_for("heard.state === 'running' && heard.loudest() > 0.05", 2 * TIMEOUT)
            tab.evaluate("(window.first = heard, 0)")
            tab.evaluate("(n.alert = '', 0)")  # the agent has had enough
            tab.wait_for("first.state === 'closed'")
            tab.evaluate("(n.alert = 'sound', 0)")
            tab.wait_for("heard !== first && heard.loudest() > 0.05", 2 * TIMEOUT)
            daemon.trigger("&uniqueid=4.1&event=answer")
            tab.wait_for("heard.state === 'closed'")
            tab.evaluate("localStorage.clear()")

    def test_agent_chooses_sound_and_title_in_the_corner(self) -> None:
        with Daemon() as daemon:
            tab = self.open_connected(daemon, alert="title")
            self.addCleanup(tab.evaluate, "localStorage.clear()")
            self.click(tab, MARK)
            box = (
                "document.querySelector('popup-notifier').shadowRoot.querySelector('[name=sound]')"
            )
            tab.wait_for(f"{box} === {FOCUSED}")
            self.click(tab, box)
            tab.press("Enter")
            tab.wait_for("n.alert === 'title sound'")
            tab.wait_for(f"!{box}.checkVisibility()")
            again = self.open_connected(daemon, alert="title")
            self.assertEqual(again.evaluate("n.alert"), "title sound")
            self.click(again, MARK)
            again.wait_for(f"{box} === {FOCUSED}")
            self.assertTrue(again.evaluate(f"{box}.checked"))
            again.press("Escape")
            again.wait_for(f"!{box}.checkVisibility()")

    def test_page_of_the_back_forward_cache_connects_again_and_once(self) -> None:
        with Daemon() as daemon:
            was_kept = []  # whether the page came back as it was; a busy Chrome may load it again
            first = self.site.coded_page(daemon.port, exten="201")
            second = self.site.coded_page(daemon.port, exten="201")
            tab = self.open(first, NO_CHANCE)
            tab.wait_for(OPEN)
            daemon.trigger("&exten=201&uniqueid=3.1&event=ring", "1")
            toasts(tab, 1)
            for number in range(2, 5):
                tab.evaluate("(window.isKept = true, 0)")
                tab.navigate(second)
                tab.wait_for(OPEN)
                until(lambda: daemon.connected() == 1, "one connection")
                daemon.trigger(f"&exten=201&uniqueid=3.{number}&event=ring", str(number))
                toasts(tab, number)
                tab.evaluate("(document.title = 'left', setTimeout(() => history.back()), 0)")
                daemon.trigger(f"&exten=202&uniqueid=3.{number}&event=answer", str(number))
                daemon.trigger(f"&exten=201&uniqueid=3.{number}&event=answer", str(number))
                back = f"location.href === '{first}' && document.title !== 'left'"
                tab.wait_for(f"{back} && {OPEN}")
                was_kept.append(tab.evaluate("Boolean(window.isKept)"))
                tab.wait_for(f"{TOASTS}[0]?.className === 'talking'")
                wait_for_phones(tab, *list("1234")[:number])
                until(lambda: daemon.connected() == 1, "one connection")
            self.assertEqual(any(was_kept), self.keeps_pages)
            tab.press("Escape")
            toasts(tab, 3)
            self.assertEqual(daemon.metric("browsers"), 1)

    def test_hidden_tab_comes_back_by_itself(self) -> None:
        with Daemon(PING_INTERVAL=1) as daemon:
            tab = self.open_connected(daemon)
            self.open("about:blank#").activate()
            tab.wait_for("document.hidden")
            daemon.process.send_signal(signal.SIGSTOP)  # as if the link had died in silence
            tab.wait_for(LOST, 3 * TIMEOUT)
            daemon.process.send_signal(signal.SIGCONT)
            tab.wait_for(OPEN, 3 * TIMEOUT)
            daemon.trigger(phone="1")
            toasts(tab, 1)
            self.assertTrue(tab.evaluate("document.hidden"))

    @needs("openssl")
    def test_readme_content_security_policy(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        keys = Certificates(folder.name).make("crm")
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(keys["CERT_FILE"], keys["KEY_FILE"])
        port = free_port()
        [line] = (each for each in readme_blocks("text") if "Content-Security-Policy" in each)
        name, _, policy = line.strip().partition(": ")
        tag = readme_blocks("html")[0].replace(" data-", ' data-lookup="/who/{phone}" data-', 1)
        settings: dict[str, Any] = {"CLIENT_PORT": port, "USE_SSL": "yes", **keys}
        with Daemon(**settings) as daemon, Site(tls=tls) as secure:
            for site, letter, its_port in ((self.site, "", daemon.port), (secure, "s", port)):

                def adapt(text: str, letter: str = letter, its_port: int = its_port) -> str:
                    text = re.sub(r"\b(http|ws)://192", rf"\g<1>{letter}://192", text)
                    return text.replace("192.0.2.10:8989", f"127.0.0.1:{its_port}")

                site.pages["/csp"] = f"<!doctype html><html lang=ja><body>{adapt(tag)}"
                site.pages["/who/0312345678"] = '{"name": "山田様"}'
                allowed = adapt(policy)
                self.addCleanup(site.headers.clear)
                for is_whole in (True, False):
                    with self.subTest(site.url, is_whole=is_whole):
                        site.headers[name] = allowed if is_whole else allowed.replace("ws", "x")
                        with contextlib.closing(
                            self.browser.open(site.url + "/csp", NO_CHANCE)
                        ) as tab:
                            if is_whole:
                                tab.wait_for(f"{MARK}?.textContent === '201 接続中'")
                                daemon.trigger("&exten=201")
                                tab.wait_for(f"{TOASTS}[0]?.textContent.includes('山田様')")
                            else:
                                self.assertIn("connect-src", cause(tab))

    def open_every_kind_of_card(self, daemon: FakeDaemon) -> Tab:
        """Return a page with a card in each state, and the settings open."""
        options = {"exten": "201", "open": "/c?q={phone}", "lookup": "/x", "create": "/new"}
        tab = self.open(self.site.coded_page(daemon.port, **options), FROZEN + NO_CHANCE)
        kinds = ["ringing", "talking", "ended", "rang", "missed"]
        tab.wait_for(f"{TOASTS}.map((each) => each.className).join() === '{','.join(kinds)}'")
        tab.wait_for(f"{TOASTS}.every((each) => each.textContent.includes('登録する'))")
        return tab

    @contextlib.contextmanager
    def every_kind_of_call(self) -> Iterator[FakeDaemon]:
        start = 1763870000000
        hello = {"type": "HELLO", "id": "5-0", "complete": True, "interval": 3600, "time": start}
        calls: list[dict[str, Any]] = []
        for event, number, age in (
            ("ring", 1, 40),
            ("end", 1, 35),
            ("ring", 2, 34),
            ("ring", 3, 12),
            ("answer", 3, 11),
            ("end", 3, 10),
            ("answer", 4, 9),
            ("ring", 5, 1),
        ):
            data = {"event": event, "exten": "201", "phone": str(number), "uniqueid": str(number)}
            # Other tests have claimed other keys.
            fields = {"type": "CALL_IN", "id": "5-1", "key": f"{self.id()} {len(calls)}"}
            calls.append({**fields, "data": data, "time": start - age * 1000})
        with FakeDaemon(hello, *calls) as daemon:
            yield daemon

    def test_text_can_be_read_bright_and_dark(self) -> None:
        shades = """(() => {
            const root = document.querySelector('popup-notifier').shadowRoot;
            const texts = [...root.querySelectorAll('p, b, a, button, label, input')];
            return texts.filter((node) => node.textContent || node.value).map((node) => {
              let behind = node;
              while (/, 0\\)$|transparent/.test(getComputedStyle(behind).backgroundColor)) {
                behind = behind.parentNode;
              }
              const { color } = getComputedStyle(node);
              return [node.textContent, color, getComputedStyle(behind).backgroundColor];
            });
        })()"""
        with self.every_kind_of_call() as daemon:
            tab = self.open_every_kind_of_card(daemon)
            self.click(tab, MARK)
            for scheme in ("light", "dark"):
                tab.emulate(prefers_color_scheme=scheme)
                shown = tab.evaluate(shades)
                self.assertGreater(len(shown), 30)
                for text, color, behind in shown:
                    with self.subTest(text, scheme=scheme, color=color, behind=behind):
                        self.assertGreaterEqual(contrast(color, behind), 4.5)

    def test_keyboard_reaches_every_control_from_the_newest_card_on(self) -> None:
        with self.every_kind_of_call() as daemon:
            tab = self.open_every_kind_of_card(daemon)
            for _ in range(99):
                tab.press("Tab")
                if tab.evaluate(f"{FOCUSED} === {MARK}"):
                    break
            order = []
            for _ in range(1 + 3 * 5):
                node = (
                    "((node) => [node.textContent, node.offsetWidth, node.offsetHeight, "
                    f"getComputedStyle(node).outlineStyle])({FOCUSED})"
                )
                text, width, height, outline = tab.evaluate(node)
                order.append(text)
                self.assertGreaterEqual(min(width, height), 24, text)
                self.assertNotEqual(outline, "none", text)
                tab.press("Tab")
            # From the lowest upwards: the newest comes first.
            self.assertEqual(order, ["201 接続中", *["登録する", "開く", "×"] * 5])
            roles = tab.evaluate(f"{TOASTS}.map((each) => each.getAttribute('role'))")
            self.assertEqual(roles, ["alert", *["status"] * 4])
            self.assertEqual(tab.evaluate("document.getAnimations().length"), 0)
            label = f"{TOASTS}.every((each) => each.lastChild.ariaLabel === '閉じる')"
            self.assertTrue(tab.evaluate(label))

    # A page that draws calls by itself.

    def test_page_draws_the_calls_itself(self) -> None:
        code = """
            let drawn = [];
            const draw = (calls) => { drawn = calls; };
            const n = PopupNotifier.connect({ history: true, draw });"""
        with Daemon(HISTORY=600, PING_INTERVAL=3600) as daemon:  # no ALIVE corrects the clock
            for event, exten, number in (
                ("ring", "201", 1),
                ("answer", "201", 1),
                ("end", "all", 1),
                ("ring", "201", 2),
                ("end", "all", 2),
                ("ring", "201,202", 3),
                ("answer", "202", 3),
                ("ring", "203", 4),  # not mine
            ):
                daemon.trigger(f"&event={event}&exten={exten}&uniqueid=2.{number}", str(number))
            options = {"exten": "201", "open": "https://crm.example/{phone}", "manual": ""}
            url = self.site.page(daemon.port, code=code, **options)
            tab = self.open(url, NO_CHANCE)
            tab.wait_for("drawn.length === 3")
            daemon.trigger("&exten=201&event=ring&uniqueid=2.5&name=Yamada", "anonymous")
            states = "drawn.map(({ state, number, whose }) => [state, number, whose])"
            expected = [
                ["ended", "1", "内線 201"],
                ["missed", "2", "内線 201"],
                ["elsewhere", "3", "応答 202"],
                ["ringing", "非通知", "内線 201"],
            ]
            tab.wait_for(f"JSON.stringify({states}) === JSON.stringify({json.dumps(expected)})")
            call = tab.evaluate(
                "(({ title, name, links, began, since, ended }) => "
                "[title, name, links, began <= since, since <= ended])(drawn[0])"
            )
            link = [{"text": "開く", "href": "https://crm.example/1"}]
            self.assertEqual(call, ["終了", "", link, True, True])
            self.assertEqual(
                tab.evaluate("JSON.stringify(drawn) === JSON.stringify(n.calls)"), True
            )
            self.assertEqual(tab.evaluate(f"{TOASTS}.length"), 0)
            tab.evaluate("(window.now = Date.now, Date.now = () => now.call(Date) + 61000, 0)")
            tab.wait_for("drawn[3].state === 'rang'")
            tab.evaluate("(location.reload(), 0)")  # all of it is there again
            tab.wait_for("!window.now && document.readyState === 'complete' && drawn.length === 4")

    # A day in the office.

    def test_day_in_an_office_shows_the_right_cards_on_each_screen(self) -> None:
        with Office(self.browser) as office:
            for line in re.sub(r"\n +\|", " |", DAY.strip()).splitlines():
                head, *screens = line.split(" | ")
                moment, what, *words = head.split()
                with self.subTest(line.strip()):
                    office.clock.set(moment)
                    if what == "look":
                        self.check_screens(office, screens)
                        self.keep_picture(office.pages[words[1]], words[0])
                    elif what == "close":
                        office.close_all(words[0])
                    else:
                        office.tell(what, words[0], int(words[1]))
            for number in REST_OF_DAY:
                agent = str(201 + number % 5)
                office.clock.set(f"10:{number}:00")
                office.tell("ring", agent, number)
                if number % 5:
                    office.tell("answer", agent, number)
                office.clock.set(f"10:{number}:40")
                office.tell("end", "-", number)
            office.clock.set("17:30:00")
            rest = "rang 20, missed 25, missed 30, missed 35, missed 40"
            screens = [f"201: {rest}", "202: rang 20", "203: rang 20", "204: missed 18, rang 20"]
            self.check_screens(office, screens)
            office.daemon.stop()
            page = office.pages["201"]
            page.wait_for(f"{MARK}.className === 'mark connecting'")
            self.keep_picture(page, "evening")

    def check_screens(self, office: Office, screens: list[str]) -> None:
        """See that the screens are, or soon become, as they should be."""
        expected: dict[str, list[str]] = {each: [] for each in office.pages}
        for each in screens:
            owner, _, cards = each.strip().partition(": ")
            for card in cards.split(", "):
                state, _, number = card.partition(" ")
                phone = Callers()[int(number)][0]
                is_withheld = phone in WITHHELD
                shown = ("withheld" if owner == "204" else "非通知") if is_withheld else phone
                expected[owner].append(f"{state} {shown}")
        office.wait_until_heard()
        deadline = time.monotonic() + TIMEOUT
        while office.screens() != expected and time.monotonic() < deadline:
            time.sleep(0.05)
        self.assertEqual(office.screens(), expected)

    def keep_picture(self, page: Tab, look: str) -> None:
        """Take a picture; see that the newest card and the mark are wholly in it."""
        (width, height, ratio), features = LOOKS[look]
        page.activate()
        page.wait_for("!document.hidden")
        page.resize(width, height, ratio)
        page.emulate(**features)
        page.wait_for(f"innerWidth === {width} && innerHeight === {height}")
        for node in (f"{TOASTS}[0]", MARK):
            box = page.evaluate(f"{node}.getBoundingClientRect().toJSON()")
            self.assertGreaterEqual(min(box["left"], box["top"]), 0, (look, box))
            self.assertLessEqual(box["right"], width, (look, box))
            self.assertLessEqual(box["bottom"], height, (look, box))
        folder = os.environ.get("POPUP_TEST_PICTURES")
        if folder:
            name = f"{type(self).__name__[4:].lower()}-{look}.png"
            Path(folder).mkdir(exist_ok=True)
            Path(folder, name).write_bytes(page.picture())
            if name in README_PICTURES:
                Path(HERE, ".readme", README_PICTURES[name]).write_bytes(page.picture())

    # The connection.

    def test_page_connects_again_after_a_restart_of_the_daemon(self) -> None:
        with Daemon() as daemon:
            tab = self.open_connected(daemon)
            daemon.trigger(phone="1")
            toasts(tab, 1)
        tab.wait_for(LOST)
        with Daemon(PORT=daemon.port) as again:
            again.port = daemon.port
            tab.wait_for(OPEN, 3 * TIMEOUT)
            again.trigger(phone="2")
            wait_for_phones(tab, "1", "2")

    def test_calls_missed_while_the_connection_was_dead_come_after_it(self) -> None:
        with Daemon(PING_INTERVAL=1) as daemon, contextlib.ExitStack() as stack:
            tab = self.open_connected(daemon)
            daemon.trigger(phone="1")
            toasts(tab, 1)
            daemon.process.send_signal(signal.SIGSTOP)
            tab.wait_for(LOST)
            for phone in ("2", "3"):
                # The kernel takes these connections; the daemon answers once it runs again.
                sock = stack.enter_context(daemon.connect())
                query = f"/api/trigger?phone={phone}&token={TOKEN}"
                sock.sendall(f"POST {query} HTTP/1.1\r\nHost: pbx\r\n\r\n".encode())
            daemon.process.send_signal(signal.SIGCONT)
            tab.wait_for("calls.length === 3", 3 * TIMEOUT)
            tab.wait_for(OPEN)
            daemon.trigger(phone="4")
            toasts(tab, 4)
            phones = tab.evaluate("calls.map((call) => call.phone)")
            self.assertEqual(sorted(phones), ["1", "2", "3", "4"])
            self.assertEqual(phones[-1], "4")

    def test_wake_up_looks_at_the_age_of_the_last_message(self) -> None:
        hello = {"type": "HELLO", "id": "1763870000000-0", "complete": True, "interval": 25}
        with FakeDaemon(hello) as daemon:
            tab = self.open_connected(daemon)
            self.assertTrue(daemon.asked_for.get(timeout=TIMEOUT).endswith("?since="))
            # An hour passes while the PC sleeps; nothing closes.
            tab.evaluate(
                "[window.now = Date.now, Date.now = () => now.call(Date) + 3600000].length"
            )
            tab.evaluate("window.dispatchEvent(new Event('pageshow'))")
            again = daemon.asked_for.get(timeout=TIMEOUT)
            self.assertTrue(again.endswith("?since=1763870000000-0"), again)
            tab.wait_for(OPEN)
            tab.evaluate("window.dispatchEvent(new Event('pageshow'))")  # all is well
            tab.evaluate("window.dispatchEvent(new Event('online'))")  # another network
            daemon.asked_for.get(timeout=TIMEOUT)
            tab.wait_for(OPEN)
            self.assertTrue(daemon.asked_for.empty())

    def test_missed_calls_are_listed_and_do_not_ring(self) -> None:
        start = 1763870000000

        def call(age: int, phone: str) -> dict[str, Any]:
            fields = {"type": "CALL_IN", "id": f"{start - age}-0", "key": f"m-{phone}"}
            data = {"phone": phone, "exten": "all"}
            return {**fields, "time": start - age, "phone": phone, "data": data}

        hello = {"type": "HELLO", "id": f"{start}-0", "complete": False, "interval": 25}
        old, new = call(31000, "1"), call(29000, "2")
        with FakeDaemon({**hello, "time": start}, old, new, call(-1, "3")) as daemon:
            tab = self.open_connected(daemon)
            kinds = ["着信あり ", "着信 ", "着信 "]
            for lines, kind in zip(toasts(tab, 3), kinds):
                self.assertTrue(lines[0].startswith(kind), lines)
            roles = tab.evaluate(f"{TOASTS}.map((each) => each.getAttribute('role'))")
            self.assertEqual(roles, ["alert", "alert", "status"])
            self.assertEqual(
                tab.evaluate("calls.map((call) => call.missed)"), [True, False, False]
            )
            self.assertEqual(tab.evaluate("seen[seen.length - 1].reason"), "gap")
            daemon.drop()
            daemon.asked_for.get(timeout=TIMEOUT)
            again = daemon.asked_for.get(timeout=TIMEOUT)
            self.assertTrue(again.endswith(f"?since={start + 1}-0"), again)

    def test_call_that_comes_again_is_dropped_by_its_key(self) -> None:
        start = 1763870000000
        hello = {"type": "HELLO", "id": "5-0", "complete": True, "interval": 25, "time": start}

        def call(number: int, key: str, phone: str) -> dict[str, Any]:
            fields = {"type": "CALL_IN", "id": f"5-{number}", "key": key, "time": start}
            return {**fields, "data": {"phone": phone, "exten": "all"}}

        alive = {"type": "ALIVE", "id": "5-9", "time": start}
        calls = [call(1, "a-1", "1"), call(1, "b-1", "2"), call(2, "a-1", "1")]
        with FakeDaemon(hello, *calls, alive, call(9, "a-2", "3")) as daemon:
            tab = self.open_connected(daemon)
            wait_for_phones(tab, "1", "2", "3")
            self.assertEqual(tab.evaluate("calls.length"), 3)
            daemon.drop()  # all of it comes once more
            daemon.asked_for.get(timeout=TIMEOUT)
            again = daemon.asked_for.get(timeout=TIMEOUT)
            self.assertTrue(again.endswith("?since=5-9"), again)
            tab.wait_for(OPEN)
            self.assertEqual(tab.evaluate("calls.length"), 3)

    def test_call_that_comes_late_has_the_time_when_it_rang(self) -> None:
        start = 1763870000000
        hello = {"type": "HELLO", "id": f"{start}-0", "complete": True, "interval": 25}

        def call(age: int, phone: str) -> dict[str, Any]:
            fields = {"type": "CALL_IN", "id": f"{start}-{10**30 + age}", "time": start - age}
            return {**fields, "key": f"l-{phone}", "data": {"phone": phone, "exten": "all"}}

        with FakeDaemon({**hello, "time": start}, call(31000, "1"), call(1000, "2")) as daemon:
            tab = self.open_connected(daemon)
            for lines, kind in zip(toasts(tab, 2), ["着信あり ", "着信 "]):
                self.assertTrue(lines[0].startswith(kind), lines)
            times = tab.evaluate("calls.map((call) => call.time.getTime())")
            self.assertEqual(times, [start - 31000, start - 1000])
            daemon.drop()
            daemon.asked_for.get(timeout=TIMEOUT)
            again = daemon.asked_for.get(timeout=TIMEOUT)
            self.assertTrue(again.endswith(f"?since={start}-{10**30 + 1000}"), again)

    def test_messages_of_the_go_daemon_are_understood(self) -> None:
        def call(phone: str, exten: str, **more: str) -> dict[str, Any]:
            return {"type": "CALL_IN", "data": {"phone": phone, "exten": exten, **more}}

        calls = [
            call("1", "202"),
            call("0312345678", "201"),
            call("2", "201"),
            call("2", "202", event="answer"),
            call("3", "201"),
            call("3", "201", event="answer"),
            call("4", "201"),
            call("4", "all", event="end"),
        ]
        with FakeDaemon(*calls) as daemon:
            # Each call is on one of two pages.
            tabs = [self.open_connected(daemon, exten="201") for _ in range(2)]
            cards = f"{TOASTS}.map((each) => `${{each.className}} ${{{PHONE}}}`)"

            def shown() -> list[str]:
                return sorted(card for tab in tabs for card in tab.evaluate(cards))

            expected = ["missed 4", "ringing 0312345678", "talking 3"]
            until(lambda: shown() == expected, "three cards")
            self.shown_in_all(tabs, len(calls))
            self.assertEqual(shown(), expected)

    def test_refusal_is_said_in_words(self) -> None:
        self.site.headers["Access-Control-Allow-Origin"] = "*"
        self.addCleanup(self.site.headers.clear)
        with Daemon(CRMWS_ALLOW="127.0.0.2") as daemon:
            for lang, port, text in (
                ("ja", daemon.port, "このアドレスからの接続は許可されていません (403): "),
                ("en", daemon.port, "The PBX refuses this address (403): "),
                (
                    "ja",
                    self.site.server_port,
                    "WebSocket が通りません (リバースプロキシの設定?): no upgrade",
                ),
                ("en", self.site.server_port, "WebSocket does not pass (proxy?): no upgrade"),
            ):
                with self.subTest(lang, port=port), self.opened(port, lang) as tab:
                    said = cause(tab)
                    self.assertTrue(said.startswith(text), said)
                    if port == daemon.port:
                        self.assertIn("127.0.0.1 is not in CRMWS_ALLOW", said)

    def test_other_refusals_are_said_in_words(self) -> None:
        with Daemon(MAX_BROWSERS=1) as daemon, daemon.browser():
            for url, text in (
                (
                    f"ws://127.0.0.1:{daemon.port}/crmws",
                    "1 browsers are connected, no more may be",
                ),
                (f"ws://127.0.0.1:{daemon.port}/wrong", "/wrong"),
            ):
                with self.subTest(url), self.opened(daemon.port, "ja", url=url) as tab:
                    said = cause(tab)
                    self.assertTrue(said.startswith("PBX に接続を拒否されました: "), said)
                    self.assertIn(text, said)

    def test_wrong_token_is_said_in_words(self) -> None:
        with Daemon(CRMWS_TOKEN="for-browsers") as daemon:
            self.open_connected(daemon, token="for-browsers")
            for lang, text in (
                ("ja", "トークンが違います (401): "),
                ("en", "The PBX refuses the token (401): "),
            ):
                with self.subTest(lang), self.opened(daemon.port, lang, token="wrong") as tab:
                    self.assertTrue(cause(tab).startswith(text))

    def test_daemon_that_is_not_there_is_said_until_it_is(self) -> None:
        port = free_port()
        for lang, text in (("ja", "PBX に接続できません"), ("en", "The PBX cannot be reached")):
            with self.subTest(lang), self.opened(port, lang) as tab:
                self.assertEqual(cause(tab), text)
        tab = self.open(self.site.coded_page(port), NO_CHANCE)
        cause(tab)
        with Daemon(PORT=port):
            tab.wait_for(OPEN, 3 * TIMEOUT)
            tab.wait_for(f"{MARK}.textContent === '接続中'")

    # The desk.

    def open_desk(self, daemon: Daemon, query: str = "?exten=201", before: str = "") -> Tab:
        before += """
            window.violations = [];
            document.addEventListener('securitypolicyviolation', (event) => {
              violations.push(event.violatedDirective);
            });"""
        tab = self.open(f"http://127.0.0.1:{daemon.port}/{query}", before + NO_CHANCE)
        tab.wait_for("document.querySelector('#state').className === 'open'")
        return tab

    def wait_for_rows(self, tab: Tab, *rows: tuple[str, str]) -> None:
        """Wait for these rows: their states and numbers."""
        facts = "[row.className, row.querySelector('.number').textContent]"
        shown = f"[...document.querySelectorAll('#calls tbody tr')].map((row) => {facts})"
        expected = json.dumps([list(each) for each in rows], separators=(",", ":"))
        tab.wait_for(f"JSON.stringify({shown}) === {json.dumps(expected)}")

    def test_longer_interval_after_a_reload_is_no_silence(self) -> None:
        with Daemon(PING_INTERVAL=20) as daemon:
            tab = self.open_connected(daemon)
            daemon.write_config(PING_INTERVAL=3600)
            daemon.process.send_signal(signal.SIGHUP)
            daemon.wait_for_log("configuration reloaded")
            daemon.trigger(phone="1")  # behind the ALIVE that says the interval
            toasts(tab, 1)
            shifted = "(window.looks += 1, now.call(Date) + 61000)"  # beyond the silence of before
            tab.evaluate(
                f"(window.now = Date.now, window.looks = 0, Date.now = () => {shifted}, 0)"
            )
            tab.wait_for("looks > 20")  # the page has compared its clock several times
            daemon.trigger(phone="2")
            toasts(tab, 2)
            connected = [line for line in daemon.lines if "browser connected" in line]
            self.assertEqual(len(connected), 1)

    def test_desk_has_a_row_for_each_call(self) -> None:
        for lang, missed, states, lost in (
            ("ja", "不在", ["他で応答", "不在着信", "終了"], "PBX に接続できません"),
            ("en", "missed", ["Taken by", "Missed call", "Call ended"], "cannot be reached"),
        ):
            before = f"Object.defineProperty(navigator, 'language', {{ value: '{lang}' }});"
            with self.subTest(lang), Daemon() as daemon:
                tab = self.open_desk(daemon, before=before)
                name = quote("<b>山田" * 20)
                daemon.trigger(f"&exten=201&uniqueid=1.1&event=ring&name={name}", "0312345678")
                daemon.trigger("&exten=201&uniqueid=1.2&event=ring", "0612345678")
                self.wait_for_rows(tab, ("ringing", "0612345678"), ("ringing", "0312345678"))
                spoken = tab.evaluate("document.querySelector('#aloud').textContent")
                self.assertIn("0612345678", spoken)
                daemon.trigger("&exten=201&uniqueid=1.1&event=answer", "0312345678")
                daemon.trigger("&uniqueid=1.2&event=end", "0612345678")
                self.wait_for_rows(tab, ("missed new", "0612345678"), ("talking", "0312345678"))
                tab.wait_for(f"document.title === '(1) {missed} – 201'")
                daemon.trigger("&uniqueid=1.1&event=end", "0312345678")
                daemon.trigger("&exten=201,202&uniqueid=1.3&event=ring", "1")
                daemon.trigger("&exten=202&uniqueid=1.3&event=answer", "1")
                rows = [("elsewhere", "1"), ("missed new", "0612345678"), ("ended", "0312345678")]
                self.wait_for_rows(tab, *rows)
                words = "[...document.querySelectorAll('.state')].map((each) => each.textContent)"
                self.assertEqual(tab.evaluate(words), states)
                tab.evaluate("dispatchEvent(new Event('focus'))")
                self.wait_for_rows(tab, rows[0], ("missed", "0612345678"), rows[2])
                self.assertEqual(tab.evaluate("document.title"), "201")
                for width in (320, 700):
                    tab.resize(width, 640)
                    wide = tab.evaluate("document.documentElement.scrollWidth")
                    self.assertLessEqual(wide, width)
                self.assertEqual(tab.evaluate(f"{TOASTS}.length"), 0)
                daemon.stop()
                tab.wait_for(f"document.title.includes('{lost}')", 3 * TIMEOUT)
                state = tab.evaluate("document.querySelector('#state').className")
                self.assertEqual((state, tab.evaluate("violations")), ("bad", []))

    def test_desk_has_the_calls_of_today_after_a_reload_and_on_another_computer(self) -> None:
        with Daemon(HISTORY=600) as daemon:
            daemon.trigger("&exten=201&uniqueid=2.1&event=ring", "1")
            daemon.trigger("&uniqueid=2.1&event=end", "1")
            daemon.trigger("&exten=202&uniqueid=2.2&event=ring", "2")
            tab = self.open_desk(daemon)
            self.wait_for_rows(tab, ("missed new", "1"))
            daemon.write_config(HISTORY=0)  # now the page alone remembers it
            daemon.process.send_signal(signal.SIGHUP)
            daemon.wait_for_log("configuration reloaded")
            tab.evaluate("(document.title = 'old', location.reload(), 0)")
            tab.wait_for("document.title !== 'old' && document.querySelector('#calls tr.new')")
            self.wait_for_rows(tab, ("missed new", "1"))

    def test_desk_says_what_was_missed_after_a_look(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            clock = Clock(folder)
            with patched(clock.statement) as program, Daemon(program=program) as daemon:
                tabs = [self.open_desk(daemon), self.open_desk(daemon)]
                clock.set("00:00:10")  # which the pages do not know yet
                daemon.trigger("&exten=201&uniqueid=1.1", "1")
                for tab in tabs:
                    self.wait_for_rows(tab, ("ringing", "1"))
                    tab.evaluate("dispatchEvent(new Event('focus'))")
                daemon.trigger("&uniqueid=1.1&event=end", "1")
                for tab in tabs:
                    self.wait_for_rows(tab, ("missed new", "1"))

                def is_seen_there() -> bool:
                    tabs[0].evaluate("dispatchEvent(new Event('focus'))")
                    row = "document.querySelector('#calls tbody tr').className"
                    return bool(tabs[1].evaluate(row) == "missed")

                until(is_seen_there, "the other tab knows that its agent has looked")

    def test_desk_at_midnight_keeps_calls_that_go_on_or_are_unseen(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            clock = Clock(folder)
            clock.set("23:59:00")
            with (
                patched(clock.statement) as program,
                Daemon(program=program, PING_INTERVAL=1) as d,
            ):
                tab = self.open_desk(d)
                for number in "123":
                    d.trigger(f"&exten=201&uniqueid=1.{number}", number)
                for number, event in ("1", "answer"), ("2", "end"), ("3", "answer"), ("3", "end"):
                    d.trigger(f"&exten=201&uniqueid=1.{number}&event={event}", number)
                self.wait_for_rows(tab, ("ended", "3"), ("missed new", "2"), ("talking", "1"))
                clock.set("00:01:00", day=26)
                self.wait_for_rows(tab, ("missed new", "2"), ("talking", "1"))
                tab.evaluate("dispatchEvent(new Event('focus'))")
                self.wait_for_rows(tab, ("talking", "1"))

    def test_desk_shows_calls_though_the_computers_clock_is_a_day_ahead(self) -> None:
        before = """
            window.Date = class extends Date {
              constructor(...parts) { super(...(parts.length ? parts : [Date.now()])); }
              static now() { return super.now() + 864e5; }
            };"""
        with Daemon() as daemon:
            tab = self.open_desk(daemon, before=before)
            daemon.trigger("&exten=201", "1")
            self.wait_for_rows(tab, ("ringing", "1"))

    def test_desk_asks_for_the_extension_once(self) -> None:
        with Daemon() as daemon:
            tab = self.open_desk(daemon, "")
            self.assertNotEqual(tab.evaluate("document.querySelector('#hint').textContent"), "")
            tab.evaluate("document.querySelector('#exten').value = '201', 1")
            tab.press("Enter")
            tab.wait_for("location.search === '?exten=201'")
            daemon.wait_for_log('browser connected.* exten="201"')
            self.open_desk(daemon, "")
            daemon.wait_for_log('browser connected.* exten="201"', 2)

    @needs("openssl")
    def test_desk_over_https(self) -> None:
        port = free_port()
        with tempfile.TemporaryDirectory() as folder:
            settings: dict[str, Any] = {"USE_SSL": "yes", **Certificates(folder).make("pbx")}
            with Daemon(CLIENT_PORT=port, **settings) as daemon:
                tab = self.open(f"https://127.0.0.1:{port}/?exten=201", NO_CHANCE)
                tab.wait_for("document.querySelector('#state.open')")
                daemon.trigger("&exten=201&uniqueid=1.1")
                self.wait_for_rows(tab, ("ringing", "0312345678"))

    def test_desk_takes_an_extension_as_an_agent_writes_it(self) -> None:
        with Daemon() as daemon:
            for text, exten in (
                ("２０１、２０２", "201,202"),  # by a Japanese input method
                ("すべて", ""),
                ("All", ""),
                ("a&b <c", "a&b,<c"),
            ):
                tab = self.open_desk(daemon, "?exten=1")
                field = "document.querySelector('#exten')"
                tab.evaluate(f"{field}.value = {json.dumps(text)}, {field}.form.requestSubmit()")
                tab.wait_for(f"{field}.value === n.exten && n.exten === {json.dumps(exten)}")
                self.open_desk(daemon, f"?exten={quote(text)}").wait_for(f"n.exten === '{exten}'")

    def test_desk_gives_the_token_of_its_address(self) -> None:
        with Daemon(CRMWS_TOKEN="for+pages") as daemon:
            tab = self.open_desk(daemon, "?token=for%2Bpages&exten=201")
            tab.evaluate("document.querySelector('form').requestSubmit()")
            tab.wait_for("location.search === '?token=for%2Bpages&exten=201'")
            manifest = tab.evaluate(
                "decodeURIComponent(document.querySelector('[rel=manifest]').href)"
            )
            self.assertIn('/?token=for%2Bpages&exten=201"', manifest)

    def test_desk_says_that_its_script_is_missing(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            copy = shutil.copy(PROGRAM, Path(folder, "popup-notifier"))
            with Daemon(program=copy) as daemon:
                tab = self.open(f"http://127.0.0.1:{daemon.port}/")
                tab.wait_for("document.querySelector('#state.bad')?.textContent.includes('.js')")

    def test_desk_keeps_the_row_of_a_long_name_low(self) -> None:
        with Daemon(OPEN_URL="https://crm.example/{phone}") as daemon:
            tab = self.open_desk(daemon)
            daemon.trigger(f"&exten=201&name={quote('山田' * 100)}", "5" * 300)
            tab.wait_for("document.querySelector('#calls a')")
            for width in (320, 700):
                tab.resize(width, 640)
                tall = tab.evaluate("document.querySelector('#calls tbody tr').offsetHeight")
                self.assertLess(tall, 320)

    def test_desk_opens_the_page_of_a_caller(self) -> None:
        url = "https://crm.example/{}?q={{phone}}"
        link = "document.querySelector('#calls a')?.href"
        with Daemon(PING_INTERVAL=1, OPEN_URL=url.format("a")) as daemon:
            tab = self.open_desk(daemon)
            daemon.trigger("&exten=201", "+81312345678")
            tab.wait_for(f"{link} === 'https://crm.example/a?q=%2B81312345678'")
            daemon.write_config(PING_INTERVAL=1, OPEN_URL=url.format("b"))
            daemon.process.send_signal(signal.SIGHUP)
            tab.wait_for(f"{link} === 'https://crm.example/b?q=%2B81312345678'")

    def test_desk_alerts_are_switched_on_by_buttons(self) -> None:
        pressed = "document.querySelector('#{}').getAttribute('aria-pressed') === '{}'"
        hint = "document.querySelector('#hint').textContent"
        insecure = "Object.defineProperty(window, 'isSecureContext', { value: false });"
        with Daemon() as daemon:
            origin = f"http://127.0.0.1:{daemon.port}"
            tab = self.open_desk(daemon, before=insecure)
            tab.evaluate("document.querySelector('#sound').click()")
            tab.evaluate("document.querySelector('#notification').click()")
            tab.wait_for(f"{hint}.includes('https')")
            self.assertTrue(tab.evaluate(pressed.format("sound", "true")))
            self.assertTrue(tab.evaluate(pressed.format("notification", "false")))
            for state in ("denied", "granted"):
                self.browser.permit("notifications", state, origin)
                tab = self.open_desk(daemon)
                self.assertTrue(tab.evaluate(pressed.format("sound", "true")))  # is remembered
                tab.evaluate("document.querySelector('#notification').click()")
                is_granted = "true" if state == "granted" else "false"
                tab.wait_for(pressed.format("notification", is_granted))
                tab.wait_for(f"{hint} {'=' if is_granted == 'true' else '!'}== ''")

    def test_desk_shows_the_admin_browsers_refusals_and_a_curl_line(self) -> None:
        with Daemon() as daemon:
            tab = self.open_desk(daemon)
            tab.evaluate("document.querySelector('#admin').open = true")
            tab.wait_for("document.querySelector('#browsers td')?.textContent === '127.0.0.1'")
            facts = tab.evaluate("document.querySelector('#facts').textContent")
            self.assertEqual(facts.splitlines()[0], f"popup-notifier {popup_notifier.VERSION}")
            tab.evaluate("document.querySelector('#copy').click()")
            example = tab.evaluate("getSelection().toString()")
            self.assertIn(f"127.0.0.1:{daemon.port}/api/trigger?phone=0312345678&", example)
            hostile = quote("$(touch${IFS}x)`id`\"!!\\'")
            tab = self.open_desk(daemon, f"?exten={hostile}")
            example = tab.evaluate("document.querySelector('#curl').textContent")
            self.assertRegex(example, r'^curl -m 1 -X POST "[\w:/.?=&%]+"$')
            tab.evaluate("document.querySelector('#admin').open = true")
            daemon.trigger(token="wrong")
            refused = "document.querySelector('#refusals')?.textContent.includes('SECRET_TOKEN')"
            tab.wait_for(refused, 3 * TIMEOUT)
            daemon.stop()
            silent = "document.querySelector('#facts').textContent === say('silent')"
            tab.wait_for(f"{silent} && !document.querySelector('#browsers td')", 3 * TIMEOUT)


class LenientChromium(Chromium):
    """Chromium that takes any certificate."""

    def __init__(self) -> None:
        super().__init__("--ignore-certificate-errors")


@needs("chromium")
class TestChromium(BrowserTests):
    browser_class = LenientChromium

    def test_desk_can_be_installed(self) -> None:
        with Daemon() as daemon:
            tab = self.open_desk(daemon)
            assert isinstance(tab, ChromiumTab)
            errors = tab.call("Page.getInstallabilityErrors")["installabilityErrors"]
            manifest = tab.call("Page.getAppManifest")
            self.assertEqual((errors, manifest["errors"]), ([], []))
            self.assertIn(f"127.0.0.1:{daemon.port}/?exten=201", manifest["data"])

    def test_cards_are_dark_on_a_dark_system(self) -> None:
        with Daemon() as daemon:
            tab = self.open_connected(daemon)
            daemon.trigger()
            toasts(tab, 1)
            color = f"getComputedStyle({TOASTS}[0]).backgroundColor"
            before = tab.evaluate(color)
            tab.emulate(prefers_color_scheme="dark")
            self.assertNotEqual(tab.evaluate(color), before)

    def test_pictures_for_the_readme(self) -> None:
        with Daemon() as daemon:
            options = {"open": "https://crm.example/search?phone={phone}"}
            tab = self.open(self.site.page(daemon.port, body=CUSTOMERS, **options))
            daemon.wait_for_log("browser connected")
            japanese = "Object.defineProperty(navigator, 'language', { value: 'ja' });"
            desk = self.open_desk(daemon, before=japanese)
            desk.resize(820, 380)
            tab.activate()
            tab.resize(820, 470)
            tab.wait_for("!document.hidden")
            name = quote("株式会社サンプル 山田様")
            for unique, phone, events in (
                ("1.1", "0612345678", ("answer", "end")),
                ("1.2", "anonymous", ("end",)),
                ("1.3", "09012345678", ("answer",)),
                ("1.4", "0312345678", ()),
            ):
                for event in ("ring", *events):
                    query = f"&exten=201&uniqueid={unique}&event={event}"
                    daemon.trigger(query + (f"&name={name}" if not events else ""), phone)
            toasts(tab, 3)
            desk.wait_for("document.querySelectorAll('#calls tbody tr').length === 4")
            for each, name, size in ((tab, "popup", (820, 470)), (desk, "desk", (820, 380))):
                each.activate()
                each.wait_for("!document.hidden")
                picture = each.picture()
                self.assertEqual(struct.unpack("!II", picture[16:24]), size)
                if os.environ.get("POPUP_TEST_PICTURES"):
                    folder = HERE / ".readme"
                    folder.mkdir(exist_ok=True)
                    (folder / f"{name}.png").write_bytes(picture)


@needs("firefox-esr")
class TestFirefox(BrowserTests):
    browser_class = Firefox
    listens = RENDER
    keeps_pages = False  # it loads a page again that held a WebSocket when it was left


del BrowserTests  # unittest would run it by itself


# --- Other programs ----------------------------------------------------------------------------


def daemon_behind_a_proxy() -> Daemon:
    """Return a daemon that trusts a proxy as the README has it, and admits one PC behind it."""
    (trusted,) = (block for block in readme_blocks("ini") if "TRUSTED_PROXIES" in block)
    key, _, value = trusted.strip().partition("=")
    assert key == "TRUSTED_PROXIES"
    # The proxy connects from 127.0.0.1, which is not in the list itself.
    return Daemon(TRUSTED_PROXIES=value, CRMWS_ALLOW="127.0.0.5")


def check_proxy(
    test: unittest.TestCase, daemon: Daemon, port: int, tls: ssl.SSLContext | None = None
) -> None:
    """See that a proxy hands on who is admitted, with calls and the script, and nobody else."""
    script = b"GET /popup-sample.js HTTP/1.1\r\nHost: crm\r\nConnection: close\r\n\r\n"
    for source, status, found in (("127.0.0.5", 101, 200), ("127.0.0.6", 403, 403)):

        def connect(source: str = source) -> socket.socket:
            sock = socket.create_connection(("127.0.0.1", port), TIMEOUT, (source, 0))
            return tls.wrap_socket(sock, server_hostname="127.0.0.1") if tls else sock

        with test.subTest(port=port, source=source):
            with connect() as sock:
                sock.sendall(handshake())
                test.assertEqual(status_of(sock.recv(4096)), status)
                if status == 101:
                    daemon.trigger()
                    test.assertIn(b"0312345678", sock.recv(4096))
            with connect() as sock:
                sock.sendall(script)
                test.assertEqual(status_of(receive_all(sock)), found)


@needs("nginx", "openssl")
class TestNginx(unittest.TestCase):
    """The README's configuration in a real nginx, plain and TLS."""

    CONFIG = """
        daemon off; pid {folder}/nginx.pid; error_log {folder}/error.log; user root;
        events {{}}
        http {{
            {upstream}
            access_log {folder}/access.log;
            client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
            fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
            server {{
                listen 127.0.0.1:{plain};
                listen 127.0.0.1:{tls} ssl;
                ssl_certificate {CERT_FILE};
                ssl_certificate_key {KEY_FILE};
                {block}
            }}
        }}
    """

    @contextlib.contextmanager
    def nginx(
        self, folder: str, certificates: Certificates, *daemons: Daemon
    ) -> Iterator[tuple[int, int]]:
        """Run nginx with the README's configuration; yield its ports, plain and TLS."""
        block, upstream = readme_blocks("nginx")
        plain, tls = free_port(), free_port()
        config = Path(folder, "nginx.conf")
        values = {"folder": folder, "plain": plain, "tls": tls, **certificates.make("nginx")}
        for address, daemon in zip(("192.0.2.11", "192.0.2.12"), (daemons[0], daemons[-1])):
            upstream = upstream.replace(f"{address}:8989", f"127.0.0.1:{daemon.port}")
        target = f"127.0.0.1:{daemons[0].port}" if len(daemons) == 1 else "popup"
        block = block.replace("127.0.0.1:8989", target)
        config.write_text(self.CONFIG.format(block=block, upstream=upstream, **values))
        command = ["nginx", "-e", f"{folder}/error.log", "-p", folder, "-c", str(config)]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            try:
                deadline = time.monotonic() + TIMEOUT
                while not Path(folder, "nginx.pid").exists() and time.monotonic() < deadline:
                    select.select([], [], [], 0.02)
                yield plain, tls
            finally:
                process.terminate()

    def test_readme_configuration_of_nginx(self) -> None:
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            certificates = Certificates(folder)
            daemon = stack.enter_context(daemon_behind_a_proxy())
            plain, tls = stack.enter_context(self.nginx(folder, certificates, daemon))
            check_proxy(self, daemon, plain)
            check_proxy(self, daemon, tls, certificates.client())
            daemon.wait_for_log("browser connected: 127.0.0.5", 2)

    def test_readme_configuration_of_nginx_for_several_daemons(self) -> None:
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            daemons = [
                stack.enter_context(Daemon(TRUSTED_PROXIES="127.0.0.1", CRMWS_ALLOW="127.0.0.5"))
                for _ in range(2)
            ]
            certificates = Certificates(folder)
            port, _ = stack.enter_context(self.nginx(folder, certificates, *daemons))

            def subscribe() -> Browser:
                sock = socket.create_connection(("127.0.0.1", port), TIMEOUT, ("127.0.0.5", 0))
                return stack.enter_context(Browser(sock, "/crmws"))

            browsers = [subscribe() for _ in range(4)]
            for number, daemon in enumerate(daemons):
                daemon.wait_for_log(r"\(2 connected\)")
                daemon.trigger(phone=str(number))
            self.assertEqual(sorted(each.message()["phone"] for each in browsers), [*"0011"])
            # Whoever loses one daemon finds the other.
            daemons[0].stop()
            again = [subscribe() for _ in range(2)]
            daemons[1].trigger(phone="2")
            self.assertEqual([each.message()["phone"] for each in again], [*"22"])


@needs("apache2", "openssl")
class TestApache(unittest.TestCase):
    """The README's configuration in a real Apache, in a virtual host with TLS."""

    CONFIG = """
        ServerName 127.0.0.1
        ServerRoot {folder}
        DocumentRoot {folder}
        PidFile {folder}/apache.pid
        Mutex file:{folder}
        ErrorLog {folder}/error.log
        User nobody
        Group nogroup
        {modules}
        Listen 127.0.0.1:{port}
        <VirtualHost *:{port}>
            SSLEngine on
            SSLCertificateFile {CERT_FILE}
            SSLCertificateKeyFile {KEY_FILE}
            {block}
        </VirtualHost>
    """

    def test_readme_configuration_of_apache(self) -> None:
        (block,) = readme_blocks("apache")
        (enabled,) = (text for text in readme_blocks("sh") if text.startswith("a2enmod"))
        # Beside what Debian's own configuration has.
        names = ["mpm_event", "authz_core", "ssl", *enabled.splitlines()[0].split()[1:]]
        modules = "\n".join(f"LoadModule {name}_module {self.module(name)}" for name in names)
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            certificates = Certificates(folder)
            daemon = stack.enter_context(daemon_behind_a_proxy())
            port = free_port()
            values = {"folder": folder, "port": port, "modules": modules}
            block = block.replace("127.0.0.1:8989", f"127.0.0.1:{daemon.port}")
            config = Path(folder, "apache.conf")
            config.write_text(
                self.CONFIG.format(block=block, **values, **certificates.make("apache"))
            )
            command = ["apache2", "-f", str(config), "-DFOREGROUND"]
            process = stack.enter_context(subprocess.Popen(command, stderr=subprocess.DEVNULL))
            stack.callback(process.terminate)
            until(lambda: Path(folder, "apache.pid").exists(), "Apache runs")
            check_proxy(self, daemon, port, certificates.client())
            daemon.wait_for_log("browser connected: 127.0.0.5")

    @staticmethod
    def module(name: str) -> str:
        """Return where Debian keeps a module."""
        return f"/usr/lib/apache2/modules/mod_{name}.so"


@needs("promtool")
class TestPrometheus(unittest.TestCase):
    """What Prometheus's own tool says of our metrics."""

    def test_metrics_pass_the_check_of_promtool(self) -> None:
        with Daemon() as daemon, daemon.browser() as browser:
            daemon.trigger()
            daemon.trigger(token="wrong")
            browser.sock.sendall(b"\x81\x01a")
            daemon.wait_for_log("browser dropped")
            answer = daemon.exchange(b"GET /metrics HTTP/1.1\r\nHost: h\r\n\r\n")
        done = subprocess.run(
            ["promtool", "check", "metrics"],
            input=answer.partition(b"\r\n\r\n")[2],
            capture_output=True,
        )
        self.assertEqual((done.returncode, done.stdout + done.stderr), (0, b""))

    def test_readme_alerts_pass_the_check_of_promtool(self) -> None:
        with Daemon(REDIS_URL="redis://127.0.0.1:1") as daemon:
            metrics = daemon.exchange(b"GET /metrics HTTP/1.1\r\nHost: h\r\n\r\n").decode()
        with tempfile.TemporaryDirectory() as folder:
            for block in readme_blocks("yaml"):
                name = re.match(r"# /etc/prometheus/(\S+)\n", block)
                assert name is not None, block
                Path(folder, name[1]).write_text(block)
                for metric in re.findall(r"popup_notifier_\w+", block):
                    self.assertIn(f"\n# TYPE {metric.removesuffix('_bucket')} ", metrics)
            done = subprocess.run(
                ["promtool", "check", "config", "prometheus.yml"],
                cwd=folder,
                capture_output=True,
                text=True,
            )
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        self.assertIn("5 rules found", done.stdout)


# --- The files ---------------------------------------------------------------------------------


class TestFiles(unittest.TestCase):
    """What the files promise one another."""

    def test_sections_are_the_same_in_both_files(self) -> None:
        def sections(path: Path) -> list[str]:
            return re.findall(r"^# --- (\d+\. [^-]+) -+$", path.read_text(), re.MULTILINE)

        self.assertEqual(sections(Path(__file__)), sections(PROGRAM))

    def test_functions_fit_on_a_screen(self) -> None:
        for node in ast.walk(ast.parse(PROGRAM.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = (node.end_lineno or 0) - node.lineno + 1
                self.assertLessEqual(length, 50, node.name)

    def test_sample_configuration_runs_as_it_stands(self) -> None:
        text = (HERE / "popup-notifier.conf").read_text()
        config, oddities = parse_config(text.encode(), "popup-notifier.conf")
        self.assertEqual(oddities, [])
        self.assertTrue(config.trigger_allow.allows(ip_address("127.0.0.1")))
        self.assertTrue(config.crmws_allow.allows(ip_address("127.0.0.1")))
        self.assertEqual((config.port, config.secret_token), (8989, "mytoken"))

    def test_sample_configuration_names_every_key(self) -> None:
        text = (HERE / "popup-notifier.conf").read_text()
        for key in popup_notifier.KEYS:
            with self.subTest(key.name):
                matched = re.search(rf"^#?{key.name}=(.*)$", text, re.MULTILINE)
                assert matched is not None
                # What is commented out shows the default, where there is one to show.
                if matched[0].startswith("#") and key.default:
                    self.assertEqual(matched[1], key.default)
                elif matched[1]:
                    key.parse(matched[1])


class TestReadme(unittest.TestCase):
    """What the README and its longer pages promise, in both languages."""

    BLOCK = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
    LINES = 280  # in one language
    # Commands that need more than an account, and the lab that runs them.
    RUN_BY = (
        (
            r"getent |install -|test -e /usr|ch(grp|mod) |useradd |userdel |rm |cp -a |systemctl "
            r"|journalctl |popup-notifier --check|ufw |firewall-cmd ",
            ".ci/systemd",
        ),
        (r"asterisk -r|\(umask 027; |chgrp asterisk ", ".ci/asterisk"),
        (r"a2enmod ", "test_popup_notifier.py"),  # its modules are those that Apache gets there
    )

    def test_both_languages_say_the_same(self) -> None:
        self.assertGreater(len(documents()), 1)
        for name, languages in documents().items():
            with self.subTest(name):
                japanese, english = map(self.shape, languages)
                for one, other in zip(japanese, english):
                    self.assertEqual(one, other)

    def shape(self, document: str) -> tuple[list[str], list[str], list[str]]:
        """Return its code blocks, its headings, tables, lists and steps, and its pictures."""
        text = self.BLOCK.sub("", document)
        marks = r"^(##+ |\| |- |[0-9]+\. |\*\*[0-9]\. |!\[|<!-- .*)"
        pictures = re.findall(r"^!\[.*\]\((.*)\)$", text, re.MULTILINE)
        return self.BLOCK.findall(document), re.findall(marks, text, re.MULTILINE), pictures

    def test_readme_is_read_in_one_sitting(self) -> None:
        for half in readme_halves():
            self.assertLessEqual(len(half.splitlines()), self.LINES)

    def test_links_lead_somewhere(self) -> None:
        for path in [HERE / "README.md", *(HERE / ".readme").glob("*.md")]:
            text = self.BLOCK.sub("", path.read_text())
            for target, anchor in re.findall(r"\]\(([^)#:]*)#?([^)]*)\)", text):
                with self.subTest(path=path.name, target=target, anchor=anchor):
                    page = path.parent / target if target else path
                    self.assertTrue(page.is_file())
                    if anchor:
                        self.assertIn(anchor, self.anchors(page))

    def anchors(self, page: Path) -> set[str]:
        """Return the names of a page's headings, as GitHub makes them."""
        names: collections.Counter[str] = collections.Counter()
        anchors = set()
        for heading in re.findall(
            r"^#+ (.*)$", self.BLOCK.sub("", page.read_text()), re.MULTILINE
        ):
            name = re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
            # The second of a name gets -1.
            anchors.add(f"{name}-{names[name]}" if names[name] else name)
            names[name] += 1
        return anchors

    def test_pages_are_in_the_language_of_who_links_to_them(self) -> None:
        for languages in documents().values():
            for text, other in zip(languages, ("en", "ja")):
                for target in re.findall(r"\]\(([^)#]*\.md)", text):
                    # Only the line at the head of a page leads to the other language.
                    if target.endswith(f".{other}.md"):
                        self.assertEqual(text.count(target), 1, target)
                        self.assertIn(f"]({target})", text.splitlines()[2])

    def test_reference_has_every_key_and_default(self) -> None:
        for page in documents()["reference"]:
            for key in popup_notifier.KEYS:
                names = f"`{key.name}`" + (f" (`{key.alias}`)" if key.alias else "")
                default = f"`{key.default}`" if key.default else ""
                row = rf"^\| {re.escape(names)} \| {re.escape(default)} ?\| [^|]+ \| "
                row += r"`(\S+)` \| `(\w+)` \|$"
                matched = re.search(row, page, re.MULTILINE)
                assert matched is not None, names
                key.parse(matched[1])
                self.assertEqual(matched[2], "restart" if key.needs_restart else "reload", names)

    def test_every_log_line_is_explained(self) -> None:
        lines = set()
        for node in ast.walk(ast.parse(PROGRAM.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("log."):
                texts = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
                if ast.unparse(node.func) != "log.debug":
                    lines |= {text for text in texts if isinstance(text, str)}
        self.assertGreater(len(lines), 20)
        for page in documents()["operations"]:
            rows = "".join(re.findall(r"^\| `.*$", page, re.MULTILINE))
            for line in lines - {"%s"}:  # what is odd about the configuration
                # Its first words, between the values.
                words = [part.strip() for part in re.split(r"%\S+|[:;,(]", line)]
                with self.subTest(line):
                    self.assertIn(next(part for part in words if len(part) > 3), rows)

    def test_readme_has_every_attribute_of_the_script(self) -> None:
        script = (HERE / "popup-sample.js").read_text()
        attributes = set(re.findall(r"^ \* (data-\w+)", script, re.MULTILINE))
        for half in readme_halves():
            self.assertEqual(set(re.findall(r"^\| `(data-\w+)`", half, re.MULTILINE)), attributes)

    def test_message_of_the_readme_is_what_a_browser_gets(self) -> None:
        (shown,) = (json.loads(block) for block in readme_blocks("json") if "CALL_IN" in block)
        with Daemon() as daemon, daemon.browser() as browser:
            daemon.trigger("&exten=201&event=answer")
            own = {name: shown[name] for name in ("id", "key", "time")}
            self.assertEqual({**browser.message(), **own}, shown)

    def test_readme_configurations_can_be_used(self) -> None:
        for block in readme_blocks("ini"):
            if not block.startswith(";"):  # those are Asterisk's
                parse_config(b"SECRET_TOKEN=x\nCLIENT_PORT=8443\n" + block.encode(), "README.md")

    @needs("curl", "openssl")
    def test_commands_of_the_readme_work(self) -> None:
        port = str(free_port())
        commands = "".join(readme_blocks("sh")).replace("\\\n", "").splitlines()
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            for path in HERE.glob("popup*"):
                shutil.copy(path, folder)
            shutil.copy(__file__, folder)
            config = Path(folder, "popup-notifier.conf")
            config.write_text(config.read_text().replace("8989", port))
            for command in commands:
                with self.subTest(command):
                    self.run_command(command.replace("8989", port), Path(folder), stack)
            popup_notifier.make_tls_context(
                Path(folder, "fullchain.pem"), Path(folder, "privkey.pem")
            )

    def test_commands_of_an_admin_are_run_on_a_real_systemd(self) -> None:
        lab = (HERE / ".ci/systemd").read_text()
        named = re.findall(r"\b(?:by_readme|readme_block) (?:'([^']+)'|([\w-]+))", lab)
        beginnings = ["".join(each) for each in named]
        pattern = next(pattern for pattern, lab in self.RUN_BY if lab == ".ci/systemd")
        blocks = [
            block
            for block in readme_blocks("sh")
            if all(re.match(f"{pattern}|curl ", line) for line in block.splitlines())
            and re.search(f"^(?:{pattern})", block, re.MULTILINE)
        ]
        self.assertGreater(len(blocks), 5)
        for block in blocks:
            with self.subTest(block):
                self.assertTrue(any(block.startswith(each) for each in beginnings))

    def run_command(self, command: str, folder: Path, stack: contextlib.ExitStack) -> None:
        """Run a command of the README, or see that it is another's to run."""
        lab = [lab for pattern, lab in self.RUN_BY if re.match(pattern, command)]
        lab += re.findall(r"^(?:bash|python3) (\.ci/\w+(?:\.py)?)", command)
        if lab:
            self.assertTrue((HERE / lab[0]).is_file(), lab)
            return
        words = shlex.split(command)
        if words[0] == "python3":
            words[0] = sys.executable
        if command == "python3 test_popup_notifier.py":
            words.append("TestAccessList")  # all of them are what runs here
        process = subprocess.Popen(
            words,
            cwd=folder,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "XDG_STATE_HOME": str(folder)},
        )
        assert process.stdout is not None
        if "--config" in words:
            stack.enter_context(process)
            stack.callback(process.terminate)
            self.assertTrue(any("listens on" in line for line in process.stdout))
            return
        output = process.communicate(timeout=TIMEOUT)[0]
        self.assertEqual(process.returncode, 0, output)
        if words[0] == "curl":
            self.assertIn("OK", output)


# --- Running them all --------------------------------------------------------------------------

CHUNK = 8  # tests that one process runs in a row; a browser is started once for each
WORKERS = 4  # processes at a time: most tests wait most of the time


class Outcome(NamedTuple):
    """What a chunk of tests came to."""

    ran: int
    failures: list[str]  # each with its heading
    skipped: list[str]  # the reasons


def tests_of(suite: unittest.TestSuite) -> Iterator[unittest.TestCase]:
    """Yield the tests of a suite."""
    for each in suite:
        if isinstance(each, unittest.TestSuite):
            yield from tests_of(each)
        else:
            yield each


def chunks() -> list[list[str]]:
    """Return the names of all tests, each list of one class; browsers first, for they are slow."""
    found = []
    for suite in unittest.defaultTestLoader.loadTestsFromModule(sys.modules[__name__]):
        names = [".".join(each.id().split(".")[-2:]) for each in tests_of(cast(Any, suite))]
        count = -(-len(names) // CHUNK)
        found += [names[index::count] for index in range(count)]
    return sorted(
        found, key=lambda names: "Chromium" not in names[0] and "Firefox" not in names[0]
    )


def run_chunk(names: list[str]) -> Outcome:
    """Run tests in this process, quietly. What they leave open is a failure, too."""
    suite = unittest.defaultTestLoader.loadTestsFromNames(names, sys.modules[__name__])
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", ResourceWarning)
        result = unittest.TextTestRunner(io.StringIO(), verbosity=0).run(suite)
        gc.collect()
    troubles = [("FAIL", *each) for each in result.failures]
    troubles += [("ERROR", *each) for each in result.errors]
    failures = [f"{kind}: {test}\n{text}" for kind, test, text in troubles]
    left = [each for each in warned if issubclass(each.category, ResourceWarning)]
    failures += [f"FAIL: one of {', '.join(names)}\n{each}" for each in left]
    return Outcome(result.testsRun, failures, [reason for _, reason in result.skipped])


def run_all() -> bool:
    """Run all tests, several at a time; print what failed, and what to install for the others."""
    began = time.monotonic()
    count, failed, reasons = 0, 0, collections.Counter[str]()
    with ProcessPoolExecutor(WORKERS, multiprocessing.get_context("fork")) as pool:
        for job in as_completed([pool.submit(run_chunk, names) for names in chunks()]):
            outcome = job.result()
            for failure in outcome.failures:
                print(f"\n{'=' * 70}\n{failure}", flush=True)
            print("." * (outcome.ran - len(outcome.failures)), end="", flush=True)
            count += outcome.ran
            failed += len(outcome.failures)
            reasons.update(outcome.skipped)
    print(f"\n\nRan {count} tests in {time.monotonic() - began:.0f} s")
    for reason, number in reasons.most_common():
        print(f"{number} skipped: {reason}")
    facts = [
        f"{word}={number}"
        for word, number in (("failures", failed), ("skipped", sum(reasons.values())))
        if number
    ]
    print(f"\n{'FAILED' if failed else 'OK'}{' (' + ', '.join(facts) + ')' if facts else ''}")
    return not failed


if __name__ == "__main__":
    if len(sys.argv) > 1:
        unittest.main()
    sys.exit(not run_all())
