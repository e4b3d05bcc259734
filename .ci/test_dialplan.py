#!/usr/bin/env python3
"""Make real SIP calls to a real Asterisk that runs the README's dialplan; see what browsers get.

Started by .ci/asterisk, in namespaces of its own, with the folder that Asterisk is installed in.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import unittest
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from test_popup_notifier import Browser, Daemon, readme_blocks

REPOSITORY = Path(__file__).resolve().parent.parent
ROOT = Path(sys.argv.pop(1)) if __name__ == "__main__" else Path("/")
SIP_PORT = 5060
TRUNK, SILENT_PHONE, PHONE = 5070, 5071, 5072  # UDP ports
CALLER = "0312345678"
CALL_TIMEOUT = 10.0  # seconds for anything to happen
RINGING = 0.3  # seconds until a phone is picked up
QUIET = 0.4  # seconds: what has not come by then does not come

# Caller IDs that someone may send to make the PBX do more than tell us of a call.
HOSTILE = (
    '";touch /tmp/pwned;"',
    "$(touch /tmp/pwned)",
    "`touch /tmp/pwned`",
    "';touch /tmp/pwned;'",
    "1\ntouch /tmp/pwned\n",
    '" -o /tmp/pwned "',
    "${SHELL(touch /tmp/pwned)}",
    "1),a):0:9}$(touch /tmp/pwned)",
    '1\\"$(touch /tmp/pwned)',
    "1^POPUP_EXTEN=999)",
    "1&exten=999&token=x",
    "1,999)",
)

PJSIP = f"""
[transport]
type=transport
protocol=udp
bind=127.0.0.1:{SIP_PORT}
[phone](!)
type=endpoint
context=lab
disallow=all
allow=ulaw
[trunk](phone)
trust_id_inbound=yes
[trunk]
type=identify
endpoint=trunk
match=127.0.0.1
[201](phone)
aors=201
[201]
type=aor
contact=sip:201@127.0.0.1:{SILENT_PHONE}
[202](phone)
aors=202
[202]
type=aor
contact=sip:202@127.0.0.1:{PHONE}
"""

# Those that Asterisk complains of when they are missing.
EMPTY = "acl ccss cel features http indications manager pjproject sorcery stasis udptl"

# What stands around the README's dialplan: the trunk's context, FreePBX's, and a control.
DIALPLAN = """
[lab]
exten => _did.,1,Goto(incoming,${EXTEN:3},1)
exten => _trk.,1,Goto(from-trunk-popup,${EXTEN:3},1)
exten => queue,1,Answer()
 same => n,Queue(support,,,,10)
exten => local,1,Dial(Local/202@phones/n,10,U(popup-answered^202))
exten => _held-popup-.,1,Gosub(${EXTEN:5},s,1)
 same => n,Answer()
 same => n,Wait(1)
exten => held-unsafe,1,System(curl "http://localhost:8989/?phone=${CALLERID(num)}" -m 1)
 same => n,Answer()
 same => n,Wait(1)

[from-trunk]
exten => _X.,1,Dial(PJSIP/202,10,Hhtr)
exten => s,1,Dial(PJSIP/202,10,Hhtr)

[phones]
exten => _X.,1,Dial(PJSIP/${EXTEN},10,U(popup-answered))
"""
MODULES = """
pbx_config app_dial app_exec app_stack app_system app_originate app_queue app_verbose
func_callerid func_cdr func_channel func_curl func_logic func_strings func_uri cdr_csv codec_ulaw
res_curl res_timing_timerfd res_sorcery_config res_sorcery_memory res_sorcery_astdb res_pjproject
res_pjsip res_pjsip_session res_pjsip_pubsub res_pjsip_authenticator_digest
res_pjsip_endpoint_identifier_ip res_pjsip_caller_id res_pjsip_sdp_rtp res_pjsip_nat
res_rtp_asterisk chan_pjsip bridge_simple bridge_builtin_features bridge_native_rtp bridge_holding
""".split()


def readme_files() -> dict[str, str]:
    """Return the configuration files that the README shows, by name, the blocks of each joined."""
    files: dict[str, str] = {}
    for block in readme_blocks("ini"):
        head, _, text = block.partition("\n")
        if head.startswith("; "):
            files[head[2:]] = files.get(head[2:], "") + text
    return files


class Phone:
    """A SIP phone of few words: a UDP socket that a thread reads."""

    def __init__(self, port: int, is_answering: bool = True) -> None:
        self.is_answering = is_answering
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.bind(("127.0.0.1", port))
        self.port = port
        self.sdp = (
            "v=0\r\no=- 1 1 IN IP4 127.0.0.1\r\ns=-\r\nc=IN IP4 127.0.0.1\r\nt=0 0\r\n"
            f"m=audio {port + 1000} RTP/AVP 0\r\na=rtpmap:0 PCMU/8000\r\n"
        )

    def run(self) -> None:
        """Answer what comes, until the process ends."""
        while True:
            data, peer = self.sock.recvfrom(65536)
            head = data.decode("utf-8", "replace").partition("\r\n\r\n")[0].split("\r\n")
            method = head[0].split()[0]
            if method == "INVITE":
                self.reply(head, peer, "180 Ringing")
                if self.is_answering:
                    time.sleep(RINGING)
                    self.reply(head, peer, "200 OK", self.sdp)
            elif method in ("BYE", "CANCEL"):
                self.reply(head, peer, "200 OK")
                if method == "CANCEL":
                    invite = [line.replace("CANCEL", "INVITE") for line in head]
                    self.reply(invite, peer, "487 Request Terminated")

    def reply(self, head: list[str], peer: Any, status: str, body: str = "") -> None:
        """Send a response."""
        kept = ("via:", "from:", "to:", "call-id:", "cseq:", "record-route:")
        lines = [line for line in head[1:] if line.lower().startswith(kept)]
        lines = [f"{line};tag=1" if re.match("to:.*>$", line, re.I) else line for line in lines]
        lines += [f"Contact: <sip:127.0.0.1:{self.port}>", "Content-Type: application/sdp"]
        text = f"SIP/2.0 {status}\r\n" + "\r\n".join(lines)
        self.sock.sendto(f"{text}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode(), peer)


class Call(Phone):
    """One call by SIP over the trunk, `since` from the INVITE until the PBX answered."""

    number = 0

    def __init__(self, target: str, caller: str = CALLER, *fields: str) -> None:
        super().__init__(TRUNK)
        Call.number += 1
        self.target = f"sip:{target}@127.0.0.1:{SIP_PORT}"
        self.names = [
            f"From: <sip:{quote(caller, safe='')}@127.0.0.1>;tag={Call.number}".replace(":@", ":"),
            f"Call-ID: {os.getpid()}-{Call.number}",
            f"Contact: <sip:127.0.0.1:{TRUNK}>",
            "Max-Forwards: 70",
            *fields,
        ]
        self.to = f"To: <{self.target}>"
        self.send("INVITE", self.sdp)
        began = time.monotonic()
        while not (head := self.response())[0].startswith("SIP/2.0 200"):
            if not head[0].startswith("SIP/2.0 1"):
                raise AssertionError(head)
        self.waited = time.monotonic() - began
        self.to = next(line for line in head if line.startswith("To:"))
        self.send("ACK")

    def response(self) -> list[str]:
        """Return the next response to our INVITE."""
        while True:
            if not select.select([self.sock], [], [], CALL_TIMEOUT)[0]:
                raise AssertionError("the PBX did not answer the call")
            head = self.sock.recv(65536).decode().partition("\r\n\r\n")[0].split("\r\n")
            if head[0].startswith("SIP/2.0") and f"CSeq: {Call.number} INVITE" in head:
                return head

    def send(self, method: str, body: str = "") -> None:
        """Send a request."""
        lines = [
            f"{method} {self.target} SIP/2.0",
            f"Via: SIP/2.0/UDP 127.0.0.1:{TRUNK};branch=z9hG4bK{Call.number}{method}",
            *self.names,
            self.to,
            f"CSeq: {Call.number + (method == 'BYE')} {method}",
            "Content-Type: application/sdp",
            f"Content-Length: {len(body)}",
        ]
        text = "\r\n".join(lines) + f"\r\n\r\n{body}"
        self.sock.sendto(text.encode(), ("127.0.0.1", SIP_PORT))

    def __enter__(self) -> Call:
        return self

    def __exit__(self, *_: object) -> None:
        self.send("BYE")
        self.sock.close()


def write_configuration() -> None:
    """Give Asterisk the README's files and what a PBX has besides."""
    folder = ROOT / "etc/asterisk"
    files = readme_files()
    dialplan = files.pop("extensions.conf") + files.pop("extensions_custom.conf")
    modules = "[modules]\nautoload=no\n" + "".join(f"load={name}.so\n" for name in MODULES)
    given = {
        "extensions.conf": dialplan + DIALPLAN,
        "queues.conf": "[general]\n" + files.pop("queues.conf"),
        "pjsip.conf": PJSIP,
        "modules.conf": modules,
        "asterisk.conf": "[options]\nentityid=02:00:00:00:00:01\n",
        "logger.conf": "[logfiles]\nfull => notice,warning,error,verbose(3)\n",
        "cdr.conf": "[general]\nenable=yes\nunanswered=yes\n[csv]\nusegmtime=no\n",
        "rtp.conf": "[general]\nrtpstart=18000\nrtpend=18099\n",
    }
    if files:
        raise SystemExit(f"the README shows files that no test reads: {', '.join(files)}")
    for name, text in given.items():
        (folder / name).write_text(text)
    for name in EMPTY.split():
        (folder / f"{name}.conf").touch()
    for name in ("var/lib", "var/log", "var/spool"):
        for sub in ("cdr-csv", "outgoing", "tmp"):
            (ROOT / name / "asterisk" / sub).mkdir(exist_ok=True)
            (ROOT / name / "asterisk" / sub).chmod(0o777)
    (ROOT / "run/asterisk").mkdir()
    (ROOT / "run/asterisk").chmod(0o777)
    # The file that keeps the token, made as the README says.
    (token,) = (block for block in readme_blocks("sh") if "umask" in block)
    subprocess.run(["chroot", str(ROOT), "bash", "-ec", token], check=True)


class TestDialplan(unittest.TestCase):
    """What the README says of Asterisk and FreePBX."""

    maxDiff = None
    pbx: ClassVar[subprocess.Popen[bytes]]
    phones: ClassVar[list[Phone]]
    daemon: Daemon
    browser: Browser

    @classmethod
    def setUpClass(cls) -> None:
        write_configuration()
        cls.pbx = subprocess.Popen(
            ["chroot", str(ROOT), "asterisk", "-f", "-U", "asterisk", "-G", "asterisk"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 30
        while "fully booted" not in cls.cli("core waitfullybooted"):
            if time.monotonic() > deadline or cls.pbx.poll() is not None:
                raise AssertionError(f"Asterisk did not come up:\n{cls.log()}")
            time.sleep(0.2)
        print(cls.cli("core show version").strip(), file=sys.stderr)
        cls.phones = [Phone(PHONE), Phone(SILENT_PHONE, is_answering=False)]
        for phone in cls.phones:
            threading.Thread(target=phone.run, daemon=True).start()

    @classmethod
    def tearDownClass(cls) -> None:
        cls.pbx.terminate()
        cls.pbx.wait(10)
        for phone in cls.phones:
            phone.sock.close()

    @classmethod
    def cli(cls, command: str) -> str:
        """Return what Asterisk says to a command."""
        words = ["chroot", str(ROOT), "asterisk", "-rx", command]
        return subprocess.run(words, capture_output=True, text=True).stdout

    @classmethod
    def log(cls) -> str:
        """Return Asterisk's log."""
        with contextlib.suppress(FileNotFoundError):
            return (ROOT / "var/log/asterisk/full").read_text(errors="replace")
        return ""

    def setUp(self) -> None:
        self.logged = len(self.log())
        text = (REPOSITORY / "popup-notifier.conf").read_text()
        text += "\nPING_INTERVAL=3600\n"  # a ping is not what the tests wait for
        self.daemon = self.enterContext(Daemon(text=text))
        self.daemon.port = 8989
        self.browser = self.enterContext(self.daemon.browser())

    def tearDown(self) -> None:
        self.wait_for_the_end_of_calls()

    def wait_for_the_end_of_calls(self) -> None:
        """Return when no channel is left; their records are written by then."""
        for _ in range(100):
            if "\n0 active channels" in "\n" + self.cli("core show channels count"):
                break
            time.sleep(0.1)
        else:
            self.fail(self.cli("core show channels"))

    def enterContext(self, manager: Any) -> Any:
        """Do what unittest has from Python 3.11 on."""
        self.addCleanup(manager.__exit__, None, None, None)
        return manager.__enter__()

    def popups(self, count: int) -> list[tuple[str, str, str]]:
        """Return who called, which extension and the event of `count` popups and no more.

        Ends are passed over: that of the call before may come at any time.
        """
        seen: list[dict[str, Any]] = []
        while len(seen) < count or select.select([self.browser.sock], [], [], QUIET)[0]:
            message = self.browser.message()
            if message["data"].get("event") != "end":
                seen.append(message)
            if len(seen) > count:
                self.fail(f"one popup too many: {message}")
        self.uniqueids = {message["data"].get("uniqueid") for message in seen}
        return [(m["phone"], m["exten"], m["data"].get("event", "")) for m in seen]

    def complaints(self) -> str:
        """Return what Asterisk found wrong meanwhile."""
        lines = self.log()[self.logged :].splitlines()
        return "\n".join(line for line in lines if re.search(r"\] (WARNING|ERROR)\[", line))

    def test_commands_that_find_what_is_wrong(self) -> None:
        (block,) = (block for block in readme_blocks("sh") if "dialplan show" in block)
        for command in re.findall(r"^asterisk -rx '(.*)'$", block, re.MULTILINE):
            with self.subTest(command):
                self.assertRegex(self.cli(command), "Originate|CURL")

    def test_incoming_call_and_who_answered(self) -> None:
        with Call(f"did{CALLER}"):
            seen = self.popups(2)
        self.assertEqual(seen, [(CALLER, "all", "ring"), (CALLER, "202", "answer")])
        end = self.browser.message()
        self.assertEqual((end["phone"], end["data"]["event"]), (CALLER, "end"))
        self.assertEqual({end["data"]["uniqueid"]}, self.uniqueids)
        self.assertEqual(self.complaints(), "")
        self.wait_for_the_end_of_calls()
        records = (ROOT / "var/log/asterisk/cdr-csv/Master.csv").read_text()
        self.assertIn(f'"{CALLER}"', records)
        self.assertNotIn("popup-post", records)  # what sends is no call

    def test_who_answered_from_a_queue(self) -> None:
        with Call("queue"):
            self.assertEqual(self.popups(1), [(CALLER, "202", "answer")])

    def test_who_answered_on_a_local_channel(self) -> None:
        with Call("local"):
            seen = self.popups(2)  # the phone and, with its argument, the Local channel
        self.assertEqual(set(seen), {(CALLER, "202", "answer")})

    def test_freepbx_incoming_call(self) -> None:
        for target in ("trk0398765432", "trks"):
            with self.subTest(target), Call(target):
                self.assertEqual(self.popups(1), [(CALLER, "all", "ring")])
        self.assertEqual(self.complaints(), "")

    def test_numbers_that_people_have(self) -> None:
        for caller, phone in (
            ("+81312345678", "+81312345678"),
            ("03-1234-5678", CALLER),
            ("anonymous", "anonymous"),
            ("", "anonymous"),
            ("非通知", "anonymous"),
        ):
            for recipe in ("popup-incoming", "popup-line", "popup-line-file"):
                with self.subTest(caller, recipe=recipe), Call(f"held-{recipe}", caller):
                    self.assertEqual([seen[:2] for seen in self.popups(1)], [(phone, "all")])

    def test_number_that_the_carrier_withholds_but_sends(self) -> None:
        identity = f'P-Asserted-Identity: "x" <sip:{CALLER}@127.0.0.1>'
        with Call(f"did{CALLER}", "anonymous", identity, "Privacy: id"):
            seen = self.popups(2)
        self.assertEqual(seen, [("anonymous", "all", "ring"), ("anonymous", "202", "answer")])

    def attack(self, target: str) -> list[str]:
        """Return the caller IDs that made a file on the PBX."""
        made = []
        marker = ROOT / "tmp/pwned"
        for caller in HOSTILE:
            with self.subTest(caller, target=target), Call(target, caller):
                while select.select([self.browser.sock], [], [], QUIET)[0]:
                    message = self.browser.message()
                    self.assertRegex(message["phone"], r"^([0-9+]+|anonymous)$")
                    self.assertIn(message["exten"], ("all", "202"))
            if marker.exists():
                made.append(caller)
                marker.unlink()
        return made

    def test_hostile_caller_does_nothing(self) -> None:
        for target in ("did0312345678", "held-popup-line", "held-popup-line-file"):
            self.assertEqual(self.attack(target), [], target)

    def test_hostile_caller_owns_an_unfiltered_line(self) -> None:
        self.assertIn("$(touch /tmp/pwned)", self.attack("held-unsafe"))

    def held(self, target: str) -> float:
        """Return how many milliseconds a caller waits, the median of three."""
        waited = []
        for _ in range(3):
            with Call(target) as call:
                waited.append(call.waited * 1000)
        return sorted(waited)[1]

    def test_call_is_not_held_up(self) -> None:
        targets = ("held-popup-incoming", "held-popup-line", "held-popup-line-file")
        held = {"answers": [self.held(each) for each in targets]}
        self.daemon.process.send_signal(signal.SIGSTOP)
        held["hangs"] = [self.held(each) for each in targets]
        self.daemon.process.send_signal(signal.SIGCONT)
        self.daemon.stop()
        held["is down"] = [self.held(each) for each in targets]
        print("\nms that a call is held up by", *targets, file=sys.stderr)
        for state, figures in held.items():
            print(f"    the daemon {state}:", *map(round, figures), file=sys.stderr)
            self.assertLess(figures[0], 200, state)
        self.assertLess(max(held["hangs"]), 2000)

    def test_token_is_in_no_process_list(self) -> None:
        self.daemon.process.send_signal(signal.SIGSTOP)  # so that curl can be looked at
        for target, is_shown in (
            ("held-popup-incoming", False),
            ("held-popup-line-file", False),
            ("held-popup-line", True),
        ):
            lists = b""
            thread = threading.Thread(target=self.held, args=(target,))
            thread.start()
            while thread.is_alive():
                for path in Path("/proc").glob("[0-9]*/cmdline"):
                    with contextlib.suppress(OSError):
                        lists += path.read_bytes()
            thread.join()
            self.assertEqual(b"token=mytoken" in lists, is_shown, target)
            self.assertEqual(b"Bearer" in lists, False, target)
        self.daemon.process.send_signal(signal.SIGCONT)


if __name__ == "__main__":
    unittest.main(verbosity=2)
