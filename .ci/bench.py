#!/usr/bin/env python3
"""Measure the daemon against the floor: what the kernel takes to write to every browser.

    python3 .ci/bench.py [--quick] [--floor-none] [--only NAME ...] [--beside FILE] [SCENARIO]

    all        all of these
    table      speed, memory and threads at 1,000 and 10,000 browsers (4 minutes; --quick: 1)
    extens     10,000 browsers, an extension each: what a call to one of them costs (1 minute)
    tls        a delivery over TLS against one in the clear (half a minute; needs openssl)
    stalled    what browsers that never read do to the others (1 minute)
    keepalive  what 10,000 idle browsers cost (1 minute)
    crowd      4,000 browsers come back at once to 1,800 calls each (20 seconds)
    replay     a live call beside browsers that ask for 20,000 calls over and over (half a minute)
    deaf       what is kept for 100 browsers that ask for 32 MB and never read (10 seconds)
    redis      what the trip over Redis adds, and 1, 2, 4 daemons (1 minute; needs redis-server)
    soak       200,000 calls, 20,000 connects and disconnects: what is left (2 minutes)

`floor.c` is a bare send() loop, `swarm.c` plays the browsers and the PBX, `crowd.c` browsers that
come back; all are compiled into a temporary folder. Machines differ and vary, so floor and daemon
take turns within one run and their ratio is what counts: the median of the pairs. With --beside,
another version of the daemon takes turns with them in `table`, which takes half as long again.
Prints a Markdown table; exits 1 if a must is missed. Loopback only.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import platform
import re
import resource
import selectors
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Callable, NamedTuple

HERE = Path(__file__).resolve().parent
PROGRAM = HERE.parent / "popup_notifier.py"

FEW, MANY, MOST = 100, 1_000, 10_000  # browsers
CONCURRENCY = 10  # triggers in flight during a burst
IDLE_CPU = 0.001  # seconds of CPU in a fifth of a second: nothing is being delivered any more
TLS_FACTOR = 3.0  # a delivery over TLS may cost so much of one in the clear: it encrypts each
EXTENS_GROWTH = 2.0  # what a call to one extension may cost more among ten times the browsers
START_TIMEOUT = 10.0  # seconds until a server listens, and until it has ended
FILES_NEEDED = MOST + 500

CONFIG = {
    "LISTEN": "127.0.0.1",
    "SECRET_TOKEN": "bench",
    "TRIGGER_ALLOW": "127.0.0.0/8",
    "CRMWS_ALLOW": "127.0.0.0/8",
    "MAX_BROWSERS": str(2 * MOST),
}
TRIGGER = "/api/trigger?phone={phone}&exten=100&token=bench"

Result = dict[str, Any]  # swarm's line, or a part of it


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    quick: bool
    with_floor: bool
    only: tuple[str, ...]
    beside: Path | None  # another version of the daemon


# --- Servers under test ------------------------------------------------------------------------


class Server(NamedTuple):
    """A running server."""

    pid: int
    port: int


class Bench:
    """The temporary folder, with what was compiled into it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("swarm", "floor", "crowd"):
            source = str(HERE / f"{name}.c")
            subprocess.run(["cc", "-O2", "-o", str(folder / name), source], check=True)

    @contextlib.contextmanager
    def floor(self, size: int = 0) -> Iterator[Server]:
        """Run the floor, which sends each browser that comes so many bytes."""
        port = free_port()
        command = [str(self.folder / "floor"), str(port), str(size)]
        with running(command, port, self.folder) as server:
            yield server

    @contextlib.contextmanager
    def daemon(self, program: Path | None = None, /, **keys: str) -> Iterator[Server]:
        """Run the daemon, or another version of it; `keys` add to its configuration."""
        port = free_port()
        config = self.folder / f"{port}.conf"
        lines = [f"{key}={value}\n" for key, value in {**CONFIG, "PORT": port, **keys}.items()]
        config.write_text("".join(lines), encoding="utf-8")
        command = [sys.executable, str(program or PROGRAM), "--config", str(config)]
        with running(command, port, self.folder) as server:
            yield server

    def swarm(self, server: Server, clients: int, **options: object) -> Result:
        """Let so many browsers connect and do what the options say; return what was measured."""
        command = [str(self.folder / "swarm"), "--spin", f"--clients={clients}"]
        command += [f"--port={server.port}", f"--pid={server.pid}", f"--trigger-path={TRIGGER}"]
        command += [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 1:
            raise RunError(done.stderr.strip())
        result: Result = json.loads(done.stdout)
        if not result["ok"]:
            raise RunError(f"{clients} browsers: {result['error']}")
        return result

    @contextlib.contextmanager
    def crowd(self, server: Server, browsers: int, size: int, target: str) -> Iterator[float]:
        """Let browsers come at once; yield the seconds until each has so many bytes.

        With a size of 0 they never read. They stay connected until the block ends.
        """
        command = [str(self.folder / "crowd"), *map(str, (server.port, browsers, size)), target]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
            assert process.stdout is not None and process.stderr is not None
            seconds = process.stdout.readline()
            if not seconds:
                raise RunError(f"{browsers} browsers at once: {process.stderr.read().strip()}")
            yield float(seconds)


class RunError(Exception):
    """A run that did not come to its end: a browser was refused, or lost, or missed a call."""


@contextlib.contextmanager
def running(command: list[str], port: int, folder: Path) -> Iterator[Server]:
    """Run a server until the block ends."""
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            # Where an older version that --beside names keeps its state.
            env={**os.environ, "XDG_STATE_HOME": str(folder)},
        )
    try:
        if not wait_for(lambda: process.poll() is not None or listens(port)) or process.poll():
            raise RunError(f"{command[0]} does not start:\n{log.read_text(errors='replace')}")
        yield Server(process.pid, port)
    finally:
        process.terminate()
        try:
            process.wait(START_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listens(port: int) -> bool:
    """Tell whether somebody listens on the port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_for(condition: Callable[[], bool]) -> bool:
    """Wait until the condition holds; tell whether it did in time."""
    deadline = time.monotonic() + START_TIMEOUT
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def raise_file_limit() -> None:
    """Make room for a descriptor per browser, here and in what is started from here."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < FILES_NEEDED:
        sys.exit(f"{FILES_NEEDED} open files are needed, the hard limit is {hard} (ulimit -Hn)")
    if soft != resource.RLIM_INFINITY and soft < FILES_NEEDED:
        resource.setrlimit(resource.RLIMIT_NOFILE, (FILES_NEEDED, hard))
        print(f"limit of open files raised from {soft} to {FILES_NEEDED}", file=sys.stderr)


# --- The table ---------------------------------------------------------------------------------


class Row(NamedTuple):
    """One thing that must hold; its figure is the median over the runs."""

    name: str
    what: str
    crowds: tuple[int, ...]  # at so many browsers
    field: str  # of swarm's result; a dot leads into a part of it
    must: float
    unit: str
    is_ratio: bool = True  # `must` is for the daemon's figure divided by the floor's
    at_least: bool = False


BIG = (MANY, MOST)
ROWS = (
    Row("latency", "last browser has the call", BIG, "last_ms.p50", 1.25, "ms"),
    Row("cpu", "CPU per delivery", BIG, "cpu_us_per_delivery", 1.3, "µs"),
    Row("memory", "memory per idle browser", BIG, "rss_kb_per_client", 1.5, "KB", is_ratio=False),
    Row("answer", "trigger answered, median", (MOST,), "http_ms.p50", 2, "ms", is_ratio=False),
    Row("burst", "deliveries in a burst", BIG, "deliveries_per_s", 5, "/s", at_least=True),
    Row("triggers", "triggers in a burst", (FEW,), "triggers_per_s", 1.5, "/s", at_least=True),
    Row("connect", "all connect at once, 128 in flight", BIG, "connect_s", 2.5, "s"),
    Row("threads", "threads, as at 100", (FEW, MOST), "threads", 0, "", is_ratio=False),
)
BURST_FIELDS = {"deliveries_per_s", "triggers_per_s"}
BESIDE = ("latency", "cpu", "memory", "burst", "connect")  # rows that tell versions apart


class Pair(NamedTuple):
    """What floor and daemon did one after the other, and the other version."""

    floor: Result | None
    daemon: Result
    beside: Result | None = None


def table(bench: Bench, options: Options) -> bool:
    """Print the table and tell whether every must is met."""
    rows = [row for row in ROWS if not options.only or row.name in options.only]
    pairs = {n: measure(bench, n, rows, options) for n in crowds_of(rows)}
    print_head("what", "N", "floor", "daemon", "ratio", "must", "verdict")
    verdicts = [
        judge_threads(row, pairs) if row.name == "threads" else judge(row, n, pairs[n])
        for row in rows
        for n in (row.crowds if row.name != "threads" else (MOST,))
    ]
    if options.beside is not None:
        print()
        print_head("what", "N", str(options.beside), "daemon", "ratio")
        for row in rows:
            for n in row.crowds if row.name in BESIDE else ():
                compare(row, n, pairs[n])
    return all(verdicts)


def crowds_of(rows: Iterable[Row]) -> list[int]:
    """Return the numbers of browsers that the rows need, in order."""
    return sorted({n for row in rows for n in row.crowds})


def measure(bench: Bench, clients: int, rows: list[Row], options: Options) -> list[Pair]:
    """Let floor and daemon take turns with so many browsers, each time in a new process."""
    load = {"rounds": 10 if options.quick else 30, "warmup": 2}
    if any(row.field in BURST_FIELDS and clients in row.crowds for row in rows):
        burst = 100 if options.quick else 300
        load |= {"burst": burst if clients > FEW else 10 * burst, "concurrency": CONCURRENCY}
    pairs = []
    for number in range(3 if options.quick else 5):
        print(f"{clients} browsers, pair {number + 1}", file=sys.stderr)
        floor = None
        if options.with_floor:
            with bench.floor() as server:
                floor = bench.swarm(server, clients, **load)
        with bench.daemon() as server:
            daemon = bench.swarm(server, clients, **load)
        beside = None
        if options.beside is not None:
            with bench.daemon(options.beside) as server:
                beside = bench.swarm(server, clients, **load)
        pairs.append(Pair(floor, daemon, beside))
    return pairs


def pick(result: Result, field: str) -> float:
    """Return a figure of swarm's result."""
    value: Any = result
    for part in field.split("."):
        value = value[part]
    return float(value)


def judge(row: Row, clients: int, pairs: list[Pair]) -> bool:
    """Print a row and tell whether its must is met; without the floor, no ratio is missed."""
    daemon = statistics.median(pick(pair.daemon, row.field) for pair in pairs)
    floors = [(pick(pair.floor, row.field), pair) for pair in pairs if pair.floor is not None]
    floor = statistics.median(figure for figure, _ in floors) if floors else None
    ratio = None
    if floors and row.is_ratio:
        ratio = statistics.median(pick(pair.daemon, row.field) / base for base, pair in floors)
    measured = ratio if row.is_ratio else daemon
    is_met = measured is None or (measured >= row.must if row.at_least else measured <= row.must)
    print_row(
        row.what,
        f"{clients:,}",
        show(floor, row.unit),
        show(daemon, row.unit),
        show(ratio, "x"),
        f"{'>=' if row.at_least else '<='} {row.must:g}{'x' if row.is_ratio else ' ' + row.unit}",
        "not judged" if measured is None else verdict(is_met),
    )
    return is_met


def compare(row: Row, clients: int, pairs: list[Pair]) -> None:
    """Print a row for the daemon beside the other version of it."""
    figures = [
        (pick(pair.beside, row.field), pick(pair.daemon, row.field))
        for pair in pairs
        if pair.beside is not None
    ]
    medians = [show(statistics.median(column), row.unit) for column in zip(*figures)]
    ratio = statistics.median(daemon / beside for beside, daemon in figures)
    print_row(row.what, f"{clients:,}", *medians, show(ratio, "x"))


def judge_threads(row: Row, pairs: dict[int, list[Pair]]) -> bool:
    """Print the row for the threads, of which there are no more for more browsers."""
    few, most = ({int(pair.daemon["threads"]) for pair in pairs[n]} for n in (FEW, MOST))
    is_met = few == most and len(few) == 1
    daemon = "/".join(map(str, sorted(most)))
    print_row(row.what, f"{MOST:,}", "", daemon, "", "/".join(map(str, few)), verdict(is_met))
    return is_met


# --- Single costs ------------------------------------------------------------------------------


def extens(bench: Bench, options: Options) -> bool:
    """Print what a call to one extension costs, by those who asked for it and by those here."""
    calls = 20 if options.quick else 100
    print_head("browsers, an extension each", "call to one", "call to all", "must", "verdict")
    costs = []
    for browsers in (MANY, MOST):
        with bench.daemon(MAX_BROWSERS=str(2 * MOST)) as server, contextlib.ExitStack() as stack:
            for number in range(browsers):
                stack.enter_context(subscribe(server.port, number))
            one = cpu_per_call(server, "7", calls)
            everybody = cpu_per_call(server, "all", max(calls // 10, 2))
        costs.append(one)
        is_met = one <= EXTENS_GROWTH * costs[0]
        must = f"<= {EXTENS_GROWTH:g}x that of {MANY:,}"
        print_row(f"{browsers:,}", show(one, "ms"), show(everybody, "ms"), must, verdict(is_met))
    return is_met


def tls(bench: Bench, options: Options) -> bool:
    """Print what a delivery costs over TLS and in the clear."""
    key, cert = bench.folder / "key.pem", bench.folder / "cert.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=bench".split()
    subprocess.run(
        [*command, "-keyout", str(key), "-out", str(cert)], check=True, capture_output=True
    )
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    port = free_port()
    keys = {"CLIENT_PORT": str(port), "USE_SSL": "yes"}
    costs = []
    for secure in (None, context):
        with contextlib.ExitStack() as stack:
            paths = {"CERT_FILE": str(cert), "KEY_FILE": str(key)}
            server = stack.enter_context(bench.daemon(**keys, **paths))
            for number in range(MANY):
                where = server.port if secure is None else port
                stack.enter_context(subscribe(where, number, secure))
            cost = cpu_per_call(server, "all", 5 if options.quick else 20)
            costs.append(cost / MANY * 1e3)
    ratio = costs[1] / costs[0]
    print_head("browsers", "in the clear", "over TLS", "ratio", "must", "verdict")
    is_met = ratio <= TLS_FACTOR
    must = f"<= {TLS_FACTOR:g}x"
    print_row(
        f"{MANY:,}",
        show(costs[0], "µs"),
        show(costs[1], "µs"),
        f"{ratio:.2f}x",
        must,
        verdict(is_met),
    )
    return is_met


STALLED = 5  # browsers that never read
STALLED_FACTOR = 1.25  # what the others may notice of them
STALLED_TRIGGER = TRIGGER + "&text=" + 1_000 * "x"


def stalled(bench: Bench, options: Options) -> bool:
    """Print what a hundred browsers and the PBX notice of five that never read."""
    load = {"rounds": 2_000 if options.quick else 4_000, "warmup": 20, "gap_ms": 0}
    alone: list[Result] = []
    beside: list[Result] = []
    for number in range(1 if options.quick else 3):
        print(f"{STALLED} stalled browsers, pair {number + 1}", file=sys.stderr)
        for results, count in ((alone, 0), (beside, STALLED)):
            with bench.daemon() as server:
                what = {"stalled": count, "trigger_path": STALLED_TRIGGER}
                results.append(bench.swarm(server, FEW, **load, **what))
    print_head(f"median, {FEW} browsers", "alone", f"with {STALLED} that stall", "must", "verdict")
    verdicts = []
    for name, field in (("trigger answered", "http_ms.p50"), ("last browser", "last_ms.p50")):
        before, after = (
            statistics.median([pick(each, field) for each in results])
            for results in (alone, beside)
        )
        verdicts.append(after <= STALLED_FACTOR * before)
        must = f"<= {STALLED_FACTOR:g}x"
        print_row(name, show(before, "ms"), show(after, "ms"), must, verdict(verdicts[-1]))
    open_still = max(each["stalled_open"] for each in beside)
    verdicts.append(open_still == 0)
    print_row("stalled ones still connected", "", f"{open_still}", "0", verdict(verdicts[-1]))
    return all(verdicts)


KEEPALIVE_SHARE = 2.0  # percent of a core that 10,000 idle browsers may cost
INTERVAL = 25  # the default PING_INTERVAL
MASKED_PONG = b"\x8a\x80mask"


def keepalive(bench: Bench, options: Options) -> bool:
    """Print what idle browsers cost: a ping and its answer, every interval."""
    intervals = 1 if options.quick else 4
    with bench.daemon(PING_INTERVAL="10") as server, contextlib.ExitStack() as stack:
        selector = stack.enter_context(selectors.DefaultSelector())
        for number in range(MOST):
            browser = stack.enter_context(subscribe(server.port, number))
            selector.register(browser, selectors.EVENT_READ)
        answer_pings(selector, MOST)
        before = cpu_seconds(server)
        answer_pings(selector, intervals * MOST)
        cost = (cpu_seconds(server) - before) / (intervals * MOST)
    share = cost * MOST / INTERVAL * 100
    print_head("idle browsers", "CPU per ping", f"of a core at {INTERVAL} s", "must", "verdict")
    is_met = share <= KEEPALIVE_SHARE
    must = f"<= {KEEPALIVE_SHARE:g} %"
    print_row(f"{MOST:,}", show(cost * 1e6, "µs"), show(share, "%"), must, verdict(is_met))
    return is_met


def answer_pings(selector: selectors.BaseSelector, count: int) -> None:
    """Answer as a browser does until so many pings have come."""
    deadline = time.monotonic() + 60
    while count > 0:
        if time.monotonic() > deadline:
            raise RunError(f"{count} pings are missing")
        for key, _ in selector.select(1):
            browser: Any = key.fileobj
            if not browser.recv(4096):
                raise RunError("an idle browser was dropped")
            browser.sendall(MASKED_PONG)
            count -= 1


def subscribe(port: int, number: int, context: ssl.SSLContext | None = None) -> socket.socket:
    """Return a browser that asked for one extension, its handshake done."""
    sock = socket.create_connection(("127.0.0.1", port), START_TIMEOUT)
    if context is not None:
        sock = context.wrap_socket(sock)
    sock.sendall(handshake(f"/crmws?exten={number}"))
    if not sock.recv(4096).startswith(b"HTTP/1.1 101 "):
        raise RunError(f"browser {number} was refused")
    return sock


def handshake(target: str) -> bytes:
    """Return a browser's opening handshake."""
    return (
        f"GET {target} HTTP/1.1\r\nHost: bench\r\nUpgrade: websocket\r\n"
        "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    ).encode()


def trigger(port: int, exten: str = "100", phone: str = "1", body: bytes = b"") -> None:
    """Trigger a call, whose further parameters are in the body; wait for the answer."""
    head = f"POST /api/trigger?phone={phone}&exten={exten}&token=bench HTTP/1.0\r\n"
    if body:
        head += f"Content-Length: {len(body)}\r\n"
    answer = exchange(port, f"{head}\r\n".encode() + body)
    if not answer.startswith(b"HTTP/1.1 200 "):
        raise RunError(f"a trigger was refused: {answer.decode(errors='replace')}")


def exchange(port: int, request: bytes) -> bytes:
    """Send a request; return the answer."""
    answer = b""
    with socket.create_connection(("127.0.0.1", port), START_TIMEOUT) as sock:
        sock.sendall(request)
        while data := sock.recv(4096):
            answer += data
    return answer


def cpu_seconds(server: Server) -> float:
    """Return the CPU time of a server so far."""
    return time.clock_gettime(~server.pid << 3 | 2)  # clock_getcpuclockid(3) of the process


def cpu_per_call(server: Server, exten: str, calls: int) -> float:
    """Return the CPU milliseconds that the daemon takes for a call, its answer included."""
    before = cpu_seconds(server)
    for _ in range(calls):
        trigger(server.port, exten)
    # What the last call costs is spent after its answer: another look tells when it is over.
    spent = cpu_seconds(server)
    while True:
        time.sleep(0.2)
        now = cpu_seconds(server)
        if now - spent < IDLE_CPU:
            break
        spent = now
    return (spent - before) / calls * 1e3


# --- Browsers that come back -------------------------------------------------------------------

HISTORY = "600"  # seconds: nothing is forgotten for its age
LOOK_BACK = 256  # bytes; an ALIVE has half of it
PHONE = re.compile(rb'"data": {"phone": "([0-9]+)"')
LIVE_EXTEN = 7

CROWD = 4_000  # browsers
CROWD_CALLS = 1_800  # that each of them missed
CROWD_TRIGGER = TRIGGER + "&text=" + 45 * "x"  # makes some 250 bytes
CROWD_GAP = 0.02  # seconds between two live calls
CROWD_SLOWEST = 250.0  # milliseconds that a trigger or a live call may take
CROWD_ROW = Row("crowd", "all have what they missed", (CROWD,), "seconds", 2, "s")

REPLAY_CALLS = 20_000  # the longest history
REPLAY_RATE = 60  # browsers a second that ask for all of it
REPLAY_GAP = 0.05  # seconds between two live calls
REPLAY_P99 = 100.0  # milliseconds that a live call may take

DEAF = 100  # browsers that ask for all of a history and never read
DEAF_CALLS = 170  # of 190 KB: the largest history
# In the message each of these letters takes six bytes for two.
DEAF_BODY = b"&".join(b"text%02d=" % number + 2_000 * "é".encode() for number in range(16))
DEAF_GROWTH = 20.0  # MB that the daemon may grow by
DEAF_TIMEOUT = 15.0  # seconds until the last one is dropped
TOO_SLOW = re.compile(rb'dropped_browsers_total{reason="too slow"} ([0-9]+)')


def catch_up(port: int, target: str) -> bytes:
    """Let a browser come back; return what it is sent behind its 101, up to its ALIVE."""
    received = bytearray()
    with contextlib.suppress(ConnectionError, TimeoutError):
        with socket.create_connection(("127.0.0.1", port), START_TIMEOUT) as sock:
            sock.sendall(handshake(target))
            while data := sock.recv(1 << 20):
                start = max(len(received) - LOOK_BACK, 0)
                received += data
                alive = received.find(b'"ALIVE"', start)
                end = received.find(b"}", alive) + 1
                if alive >= 0 and end:
                    return bytes(received[received.index(b"\r\n\r\n") + 4 : end])
    raise RunError(f"a browser that came back got {len(received):,} bytes and no ALIVE")


class Delays(NamedTuple):
    """The milliseconds that each of the live calls took."""

    triggers: list[float]  # until the answer
    calls: list[float]  # until the browser had it


@contextlib.contextmanager
def live_calls(port: int, gap: float) -> Iterator[Delays]:
    """Trigger a call every `gap` seconds while the block runs, and let a browser hear them."""
    delays = Delays([], [])
    began: dict[int, float] = {}  # by phone
    is_over = threading.Event()

    def call(phone: int) -> None:
        began[phone] = time.perf_counter()
        trigger(port, str(LIVE_EXTEN), str(phone))
        delays.triggers.append((time.perf_counter() - began[phone]) * 1e3)

    def call_on() -> None:
        start = time.monotonic()
        # A slow answer does not put off the next call: those who call know nothing of each other.
        with ThreadPoolExecutor(CONCURRENCY) as pool:
            calls = []
            for phone in itertools.count():
                calls.append(pool.submit(call, phone))
                if is_over.wait(max(start + (phone + 1) * gap - time.monotonic(), 0)):
                    break
        for each in calls:
            each.result()

    def listen() -> None:
        received = b""
        while data := browser.recv(1 << 16):
            now = time.perf_counter()
            received += data
            for found in PHONE.finditer(received):
                delays.calls.append((now - began[int(found[1])]) * 1e3)
            received = PHONE.split(received)[-1]

    with subscribe(port, LIVE_EXTEN) as browser, ThreadPoolExecutor(2) as pool:
        work = [pool.submit(listen), pool.submit(call_on)]
        try:
            yield delays
        finally:
            is_over.set()
            work[1].result()
            is_complete = wait_for(lambda: len(delays.calls) == len(began))
            browser.shutdown(socket.SHUT_RDWR)
        if not is_complete:
            raise RunError(f"of {len(began)} live calls {len(delays.calls)} were heard")
        work[0].result()


def crowd(bench: Bench, options: Options) -> bool:
    """Print what a live call takes while a crowd comes back, and how long all of them take."""
    with missed_calls(bench) as (server, target, size), contextlib.ExitStack() as stack:
        with live_calls(server.port, CROWD_GAP) as delays:
            stack.enter_context(bench.crowd(server, CROWD, size, target))
    print_head(f"while {CROWD:,} come back", "calls", "median", "slowest", "must", "verdict")
    verdicts = []
    for what, figures in (("trigger answered", delays.triggers), ("live call", delays.calls)):
        verdicts.append(max(figures) <= CROWD_SLOWEST)
        cells = [show(each, "ms") for each in (statistics.median(figures), max(figures))]
        must = f"<= {CROWD_SLOWEST:g} ms"
        print_row(what, f"{len(figures)}", *cells, must, verdict(verdicts[-1]))
    pairs = []
    for number in range(3 if options.quick else 5):
        print(f"{CROWD} browsers at once, pair {number + 1}", file=sys.stderr)
        with missed_calls(bench) as (server, target, size):
            floor = None
            if options.with_floor:
                with bench.floor(size) as bare, bench.crowd(bare, CROWD, size, target) as took:
                    floor = {"seconds": took}
            with bench.crowd(server, CROWD, size, target) as took:
                pairs.append(Pair(floor, {"seconds": took}))
    print()
    print_head(f"{size:,} bytes each", "N", "floor", "daemon", "ratio", "must", "verdict")
    verdicts.append(judge(CROWD_ROW, CROWD, pairs))
    return all(verdicts)


@contextlib.contextmanager
def missed_calls(bench: Bench) -> Iterator[tuple[Server, str, int]]:
    """Run a daemon; yield it, what who missed calls asks it for, and how many bytes that gets."""
    with bench.daemon(HISTORY=HISTORY) as server:
        position = re.search(rb'"id": "([^"]+)"', catch_up(server.port, "/crmws?since="))
        assert position is not None
        target = f"/crmws?exten=100&since={position[1].decode()}"
        remember(bench, server, CROWD_CALLS, CROWD_TRIGGER)
        yield server, target, len(catch_up(server.port, target))


def remember(bench: Bench, server: Server, calls: int, path: str) -> None:
    """Trigger so many calls."""
    bench.swarm(server, 1, burst=calls, concurrency=CONCURRENCY, settle=0, trigger_path=path)


def replay(bench: Bench, options: Options) -> bool:
    """Print what a live call takes while others ask for the longest history over and over."""
    seconds = 5 if options.quick else 20
    with bench.daemon(HISTORY=HISTORY) as server:
        remember(bench, server, REPLAY_CALLS, TRIGGER)
        size = len(catch_up(server.port, "/crmws?since=0-0"))
        reader, writer = multiprocessing.Pipe(duplex=False)
        asker = multiprocessing.get_context("fork").Process(
            target=ask_again, args=(server.port, seconds, writer)
        )
        asker.start()
        with live_calls(server.port, REPLAY_GAP) as delays:
            asker.join()
        if not reader.poll():
            raise RunError("the browsers that ask for the history failed")
        asked, cut_off = reader.recv()
    figures = statistics.quantiles(delays.calls, n=100, method="inclusive")
    is_met = figures[98] <= REPLAY_P99
    print_head("history", "replays", "cut off", "live call, median", "p99", "must", "verdict")
    print_row(
        f"{REPLAY_CALLS:,} calls, {size / 1e6:.1f} MB",
        show(asked / seconds, "/s"),
        str(cut_off),
        show(figures[49], "ms"),
        show(figures[98], "ms"),
        f"<= {REPLAY_P99:g} ms",
        verdict(is_met),
    )
    return is_met


def ask_again(port: int, seconds: float, writer: Connection) -> None:
    """Ask for all calls REPLAY_RATE times a second, or as often as it goes; tell how often."""
    start = time.monotonic()
    numbers = itertools.count()

    def work(_: int) -> tuple[int, int]:
        asked = cut_off = 0
        while (due := start + next(numbers) / REPLAY_RATE) < start + seconds:
            time.sleep(max(due - time.monotonic(), 0))
            if time.monotonic() > start + seconds:
                break
            asked += 1
            try:
                catch_up(port, "/crmws?since=0-0")
            except RunError:
                cut_off += 1
        return asked, cut_off

    with ThreadPoolExecutor(CONCURRENCY) as pool:
        counts = list(pool.map(work, range(CONCURRENCY)))
    writer.send((sum(asked for asked, _ in counts), sum(cut_off for _, cut_off in counts)))


def deaf(bench: Bench, options: Options) -> bool:
    """Print what the daemon keeps for those who ask for the largest history and never read."""
    with bench.daemon(HISTORY=HISTORY) as server:
        for _ in range(DEAF_CALLS):
            trigger(server.port, body=DEAF_BODY)
        before = holdings(server.pid).memory
        Path(f"/proc/{server.pid}/clear_refs").write_text("5", encoding="ascii")  # VmHWM
        start = time.monotonic()
        with bench.crowd(server, DEAF, 0, "/crmws?since=0-0"):
            while (dropped := drops(server)) < DEAF:
                if time.monotonic() > start + 2 * DEAF_TIMEOUT:
                    break
                time.sleep(0.2)
            seconds = time.monotonic() - start
        growth = (status(server.pid, "VmHWM") - before) / 1024
    print_head(f"{DEAF} browsers that never read", "figure", "must", "verdict")
    is_small, is_quick = growth <= DEAF_GROWTH, dropped == DEAF and seconds <= DEAF_TIMEOUT
    must = f"<= {DEAF_GROWTH:g} MB"
    print_row("memory grows by at most", show(growth, "MB"), must, verdict(is_small))
    figure = f"{dropped} in {show(seconds, 's')}"
    print_row("dropped", figure, f"{DEAF} in {DEAF_TIMEOUT:g} s", verdict(is_quick))
    return is_small and is_quick


def drops(server: Server) -> int:
    """Return how many browsers the daemon dropped for they were too slow."""
    found = TOO_SLOW.search(exchange(server.port, b"GET /metrics HTTP/1.0\r\n\r\n"))
    if found is None:
        raise RunError("/metrics does not tell how many were too slow")
    return int(found[1])


# --- Redis -------------------------------------------------------------------------------------

REDIS_ADDS = 1.5  # milliseconds that the trip over Redis may add to a call, median
REDIS_BURST = 500  # calls to every daemon's browsers
CALL = b'"CALL_IN"'


@contextlib.contextmanager
def redis_server(folder: Path) -> Iterator[str]:
    """Run Redis as a company would, on persistent storage; return its URL."""
    port = free_port()
    command = f"redis-server --port {port} --bind 127.0.0.1 --appendonly yes --save".split()
    with running([*command, "", "--dir", str(folder)], port, folder):
        yield f"redis://127.0.0.1:{port}"


def redis(bench: Bench, options: Options) -> bool:
    """Print what the trip over Redis adds to a call, and what several daemons deliver."""
    load = {"rounds": 300 if options.quick else 2000, "warmup": 20, "gap_ms": 2}
    with redis_server(bench.folder) as url:
        with bench.daemon() as server:
            local = bench.swarm(server, 10, **load)["last_ms"]
        with bench.daemon(REDIS_URL=url) as one, bench.daemon(REDIS_URL=url) as other:
            same = bench.swarm(one, 10, **load)["last_ms"]
            across = bench.swarm(one, 10, trigger_port=other.port, **load)["last_ms"]
        print_head(
            "trigger to the last of 10 browsers", "median", "p99", "adds", "must", "verdict"
        )
        print_row("without Redis", show(local["p50"], "ms"), show(local["p99"], "ms"), "", "", "")
        verdicts = []
        for name, figures in (("over Redis", same), ("over Redis, to another daemon", across)):
            added = figures["p50"] - local["p50"]
            verdicts.append(added <= REDIS_ADDS)
            cells = [show(each, "ms") for each in (figures["p50"], figures["p99"], added)]
            print_row(name, *cells, f"<= {REDIS_ADDS:g} ms", verdict(verdicts[-1]))
        print()
        print_head("daemons", "browsers", "calls", "deliveries", "CPU per delivery")
        for daemons in (1, 2, 4):
            redis_burst(bench, url, daemons, REDIS_BURST // 5 if options.quick else REDIS_BURST)
    return all(verdicts)


def redis_burst(bench: Bench, url: str, daemons: int, calls: int) -> None:
    """Print how fast so many daemons deliver calls that are triggered at all of them."""
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(bench.daemon(REDIS_URL=url)) for _ in range(daemons)]
        ports = [server.port for server in servers]
        browsers = [
            stack.enter_context(subscribe(port, 100)) for port in ports * (MANY // daemons)
        ]
        reader, writer = multiprocessing.Pipe(duplex=False)
        counter = multiprocessing.get_context("fork").Process(
            target=count_calls, args=(browsers, calls, writer)
        )
        before = sum(map(cpu_seconds, servers))
        start = time.monotonic()
        counter.start()
        with ThreadPoolExecutor(CONCURRENCY) as pool:
            list(pool.map(trigger, [ports[number % daemons] for number in range(calls)]))
        if not reader.poll(60):
            raise RunError(f"{daemons} daemons: calls are missing")
        seconds = time.monotonic() - start
        cpu = sum(map(cpu_seconds, servers)) - before
        counter.join()
    total = calls * len(browsers)
    cells = (f"{len(browsers):,}", f"{calls:,}", show(total / seconds, "/s"))
    print_row(str(daemons), *cells, show(cpu / total * 1e6, "µs"))


def count_calls(browsers: list[socket.socket], calls: int, writer: Connection) -> None:
    """Read until every browser has got so many calls; tell."""
    selector = selectors.DefaultSelector()
    heard = dict.fromkeys(browsers, 0)
    tails = dict.fromkeys(browsers, b"")
    for each in browsers:
        selector.register(each, selectors.EVENT_READ)
    waiting = len(browsers)
    while waiting:
        for key, _ in selector.select():
            browser: Any = key.fileobj
            data = tails[browser] + browser.recv(1 << 20)
            heard[browser] += data.count(CALL)
            tails[browser] = data[1 - len(CALL) :]
            if heard[browser] == calls:
                selector.unregister(browser)
                waiting -= 1
    writer.send(True)


# --- Soak --------------------------------------------------------------------------------------

SOAK_BROWSERS = 200
SOAK_CALLS = 2_000  # a slice; then the browsers hang up and others come
SOAK_SLICES = 100
SOAK_LIMIT = 300.0  # seconds
GROWTH = 1.1  # memory: what the allocator keeps differs by some percent from slice to slice


class Holdings(NamedTuple):
    """What a process holds."""

    descriptors: int
    threads: int
    memory: int  # KB


def holdings(pid: int) -> Holdings:
    """Return what a process holds now."""
    descriptors = len(os.listdir(f"/proc/{pid}/fd"))
    return Holdings(descriptors, status(pid, "Threads"), status(pid, "VmRSS"))


def status(pid: int, field: str) -> int:
    """Return a number that the kernel tells of a process: a count, or KB."""
    text = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    fields = dict(line.split(":", 1) for line in text.splitlines())
    return int(fields[field].split()[0])


def soak(bench: Bench, options: Options) -> bool:
    """Print what the daemon holds after a thousand calls and after all, and tell if it grew."""
    slices = SOAK_SLICES // 10 if options.quick else SOAK_SLICES
    deadline = time.monotonic() + SOAK_LIMIT
    # What is kept for a time (calls for recovery, who left until its next ping is due) is to be as
    # much after the first thousand as at the end, so the time is short.
    with bench.daemon(HISTORY="1", PING_INTERVAL="1") as server:
        idle = holdings(server.pid)
        first = soak_slice(bench, server, 1_000, idle)
        last = first
        for number in range(slices):
            if time.monotonic() > deadline:
                raise RunError(f"soak: {number} of {slices} slices in {SOAK_LIMIT:.0f} s")
            last = soak_slice(bench, server, SOAK_CALLS, idle)
            print(f"slice {number + 1} of {slices}: {last}", file=sys.stderr)
    calls, connects = slices * SOAK_CALLS, slices * SOAK_BROWSERS
    print(f"{calls:,} calls, {connects:,} connects and disconnects, {SOAK_BROWSERS} at a time\n")
    print_head("what", "after 1,000 calls", "at the end", "must", "verdict")
    verdicts = []
    for what, before, after, growth in zip(Holdings._fields, first, last, (1, 1, GROWTH)):
        verdicts.append(after <= before * growth)
        print_row(what, str(before), str(after), f"<= {growth:g}x", verdict(verdicts[-1]))
    return all(verdicts)


def soak_slice(bench: Bench, server: Server, calls: int, idle: Holdings) -> Holdings:
    """Connect, call, hang up; return what the daemon holds once it has seen all of them go."""
    bench.swarm(server, SOAK_BROWSERS, burst=calls, concurrency=CONCURRENCY, settle=0)
    wait_for(lambda: holdings(server.pid).descriptors <= idle.descriptors)
    return holdings(server.pid)


# --- Output and command line -------------------------------------------------------------------


def show(figure: float | None, unit: str) -> str:
    """Return a figure with three digits that count and its unit."""
    if figure is None:
        return ""
    digits = 0 if figure >= 100 else 1 if figure >= 10 else 2
    return f"{figure:,.{digits}f}{'' if unit in ('x', '/s') else ' '}{unit}"


def verdict(is_met: bool) -> str:
    """Return the word for it."""
    return "ok" if is_met else "MISSED"


def print_head(*names: str) -> None:
    """Print the head of a Markdown table."""
    print_row(*names)
    print_row(*("---" for _ in names))


def print_row(*cells: str) -> None:
    """Print a row of a Markdown table."""
    print(f"| {' | '.join(cells)} |", flush=True)


def everything(bench: Bench, options: Options) -> bool:
    """Print all tables, one after the other."""
    verdicts = [
        scenario(bench, options) for scenario in SCENARIOS.values() if scenario is not everything
    ]
    return all(verdicts)


SCENARIOS = {
    "table": table,
    "extens": extens,
    "tls": tls,
    "stalled": stalled,
    "keepalive": keepalive,
    "crowd": crowd,
    "replay": replay,
    "deaf": deaf,
    "redis": redis,
    "soak": soak,
    "all": everything,
}


def parse_args() -> tuple[str, Options]:
    """Return the scenario and the options from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer runs, shorter ones")
    parser.add_argument("--floor-none", action="store_true", help="the daemon alone, no ratios")
    names = [row.name for row in ROWS]
    parser.add_argument("--only", action="append", choices=names, default=[], help="a row's name")
    parser.add_argument("--beside", type=Path, metavar="FILE", help="another version's program")
    parser.add_argument("scenario", nargs="?", choices=SCENARIOS, default="table")
    args = parser.parse_args()
    if args.beside is not None and not args.beside.is_file():
        parser.error(f"--beside: there is no file {args.beside}")
    options = Options(args.quick, not args.floor_none, tuple(args.only), args.beside)
    return args.scenario, options


def main() -> int:
    """Compile, measure, print; return the exit status."""
    scenario, options = parse_args()
    raise_file_limit()
    print(f"Python {platform.python_version()}, Linux {platform.release()}, ", end="")
    print(f"{len(os.sched_getaffinity(0))} cores\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        try:
            is_met = SCENARIOS[scenario](Bench(Path(folder)), options)
        except RunError as error:
            print(f"MISSED: {error}")
            is_met = False
    return 0 if is_met else 1


if __name__ == "__main__":
    sys.exit(main())
