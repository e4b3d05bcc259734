#!/usr/bin/env python3
"""Run Autobahn|Testsuite, the conformance suite of the field, against WebSocketProtocol.

    python3 .ci/conformance.py [--wstest COMMAND] [--report FOLDER] [CASE ...]

It needs `wstest` (PyPI: autobahntestsuite, Python 2.7; .ci/wstest.txt has the releases it runs
with). The class knows no socket, so an echo server around it stands here. Exits 1 if a case is
neither OK, NON-STRICT (a SHOULD is left out; each is listed) nor INFORMATIONAL.
"""

from __future__ import annotations

import argparse
import collections
import json
import shlex
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from popup_notifier import Opcode, WebSocketProtocol, accept_key

CASES = ("*",)
COMPRESSION = ["12.*", "13.*"]  # permessage-deflate, which the daemon does not offer
MAX_MESSAGE = 16 * 1024 * 1024  # the largest one that group 9 sends
IDLE_TIMEOUT = 30.0  # seconds; no case pauses for longer
RUN_TIMEOUT = 600.0  # seconds for all cases
PASSED = {"OK", "NON-STRICT", "INFORMATIONAL"}

ANSWER = (
    "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Server: popup-notifier\r\nSec-WebSocket-Accept: {}\r\n\r\n"
)


class Echo(socketserver.StreamRequestHandler):
    """One connection: a handshake, then every message goes back to where it came from."""

    timeout = IDLE_TIMEOUT
    disable_nagle_algorithm = True

    def handle(self) -> None:
        """Serve it to its end; a peer that breaks it off is what some cases are about."""
        try:
            self.shake_hands()
            self.echo()
            self.hang_up()
        except OSError:
            pass

    def shake_hands(self) -> None:
        """Answer the opening handshake; wstest sends a good one."""
        key = ""
        while (line := self.rfile.readline().decode("latin-1").strip()) != "":
            name, _, value = line.partition(":")
            if name.lower() == "sec-websocket-key":
                key = value.strip()
        self.connection.sendall(ANSWER.format(accept_key(key)).encode())

    def echo(self) -> None:
        """Return messages until the connection is closed."""
        protocol = WebSocketProtocol(max_message=MAX_MESSAGE)
        while not protocol.is_closed:
            data = self.rfile.read1(1 << 16)
            if not data:
                break
            protocol.receive_data(data)
            for message in protocol.events_received():
                if message.opcode in (Opcode.TEXT, Opcode.BINARY):
                    protocol.send(message.opcode, message.payload)
            self.connection.sendall(protocol.data_to_send())

    def hang_up(self) -> None:
        """Let the peer read what was sent last: closing with bytes unread would reset it."""
        self.connection.shutdown(socket.SHUT_WR)
        while self.rfile.read1(1 << 16):
            pass


class EchoServer(socketserver.ThreadingTCPServer):
    """The server that wstest connects to, a thread per connection."""

    daemon_threads = True
    request_queue_size = 16


def run_wstest(
    command: str, url: str, cases: list[str], folder: Path
) -> dict[str, dict[str, str]]:
    """Run the cases and return the suite's verdicts by case; its pages stay in the folder."""
    spec = {
        "outdir": str(folder),
        "servers": [{"agent": "popup-notifier", "url": url}],
        "cases": cases,
        "exclude-cases": COMPRESSION,
    }
    path = folder / "spec.json"
    path.write_text(json.dumps(spec), encoding="utf-8")
    log = folder / "wstest.log"
    with log.open("wb") as output:
        subprocess.run(
            [*shlex.split(command), "--mode", "fuzzingclient", "--spec", str(path)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=RUN_TIMEOUT,
            check=False,
        )
    index = folder / "index.json"
    if not index.exists():
        sys.exit(f"wstest made no report:\n{log.read_text(errors='replace')}")
    verdicts: dict[str, dict[str, str]] = next(iter(json.loads(index.read_text()).values()))
    return verdicts


def summarize(verdicts: dict[str, dict[str, str]]) -> int:
    """Print what the verdicts come to and return how many cases failed."""
    counts: collections.Counter[str] = collections.Counter()
    failed = 0
    for case, verdict in sorted(verdicts.items(), key=lambda item: case_number(item[0])):
        behavior, closing = verdict["behavior"], verdict["behaviorClose"]
        counts[behavior] += 1
        failed += not {behavior, closing} <= PASSED
        if behavior == "NON-STRICT" or not {behavior, closing} <= PASSED:
            print(f"{case}: {behavior}, closing {closing}")
    print(", ".join(f"{count} {behavior}" for behavior, count in counts.most_common()))
    print(f"{len(verdicts) - failed} passed, {failed} failed")
    return failed


def case_number(case: str) -> list[int]:
    """Return what sorts 9.10 after 9.9."""
    return [int(part) for part in case.split(".")]


def parse_args() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--wstest", default="wstest", metavar="COMMAND", help="how to start it")
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="keep the pages here")
    parser.add_argument("cases", nargs="*", default=CASES, metavar="CASE", help="such as 7.*")
    return parser.parse_args()


def main() -> int:
    """Start the echo server, run the suite against it, tell the outcome."""
    args = parse_args()
    with tempfile.TemporaryDirectory() as temporary, EchoServer(("127.0.0.1", 0), Echo) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        folder = args.report or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        url = f"ws://127.0.0.1:{server.server_address[1]}"
        verdicts = run_wstest(args.wstest, url, list(args.cases), folder)
        server.shutdown()
    if not verdicts:
        sys.exit("no case was run")
    return 1 if summarize(verdicts) else 0


if __name__ == "__main__":
    sys.exit(main())
