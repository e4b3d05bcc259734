#!/usr/bin/env python3
"""Make real SIP calls to a real Asterisk; see what browsers are told by its manager events.

Started by .ci/asterisk, in namespaces of its own, with the folder that holds Asterisk.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import select
import socket
import statistics
import subprocess
import sys
import threading
import time
import unittest
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import popup_notifier
from test_popup_notifier import Browser, Daemon, patched, readme_blocks

ROOT = Path(sys.argv.pop(1)) if __name__ == "__main__" else Path("/")
PBX = ("127.0.0.1", 5060)
CALLER = "0312345678"
TIMEOUT = 10.0  # seconds for anything to happen
QUIET = 0.4  # seconds: what has not come by then does not come
PHONES = {"201": 5201, "202": 5202, "203": 5203}  # UDP ports
PROVIDER = ("127.0.0.2", 5070)  # the trunk "provider"
BRANCH = ("127.0.0.3", 5070)  # the trunk "branch-office-2"


def readme_block(beginning: str) -> str:
    """Return what the README shows behind a first line."""
    (text,) = {each for each in readme_blocks("ini") if each.startswith(beginning)}
    return text


GENERAL = readme_block("; manager.conf")
ACCOUNT = readme_block("; manager_custom.conf")
KEYS = dict(line.split("=", 1) for line in readme_block("AMI_URL=").splitlines())
OTHER_ACCOUNTS = """
[mute]
secret = x
read =
write = reporting
[curious]
secret = x
read = call
write =
"""
LIST_END = "Event: CoreShowChannelsComplete"
URL = KEYS["AMI_URL"]

PJSIP = f"""
[transport]
type=transport
protocol=udp
bind=0.0.0.0:5060
[line](!)
type=endpoint
disallow=all
allow=ulaw
direct_media=no
[phone](!,line)
context=phones
call_group=1
pickup_group=1
[trunk](!,line)
context=from-provider
trust_id_inbound=yes
[provider](trunk)
aors=provider
[provider]
type=aor
contact=sip:{PROVIDER[0]}:{PROVIDER[1]}
[provider]
type=identify
endpoint=provider
match={PROVIDER[0]}
[branch-office-2](trunk)
[branch-office-2]
type=identify
endpoint=branch-office-2
match={BRANCH[0]}
""" + "".join(
    f"[{name}](phone)\naors={name}\n[{name}]\ntype=aor\ncontact=sip:{name}@127.0.0.1:{port}\n"
    for name, port in PHONES.items()
)

DIALPLAN = """
[from-provider]
exten => direct,1,Dial(PJSIP/201,20)
exten => 0311110001,1,Goto(direct,1)
exten => group,1,Dial(PJSIP/201&PJSIP/202,20)
exten => queue,1,Answer()
 same => n,Queue(support,,,,20)
exten => local,1,Dial(Local/202@phones/n&Local/203@phones,20)
exten => follow,1,Answer()
 same => n,FollowMe(201,d)
exten => voicemail,1,Dial(PJSIP/201,1)
 same => n,Answer()
 same => n,Wait(20)
exten => ivr,1,Answer()
 same => n,Wait(20)
exten => freepbx,1,Set(__CALLINGNUMPRES_SV=${CALLERID(num-pres)})
 same => n,Set(CALLERID(num-pres)=allowed_not_screened)
 same => n,Set(CALLERID(name)=Sales:${CALLERID(name)})
 same => n,Dial(PJSIP/201,20)
exten => mobile,1,Dial(PJSIP/0901111@provider,20)

[phones]
exten => _20X,1,Dial(PJSIP/${EXTEN},20,tT)
exten => _0X.,1,Dial(PJSIP/${EXTEN}@provider,20)
exten => *8,1,Pickup()
"""
CONFIGURATION = {
    "manager.conf": f"{GENERAL}#include manager_custom.conf\n",  # as FreePBX does
    "manager_custom.conf": ACCOUNT + OTHER_ACCOUNTS,
    "pjsip.conf": PJSIP,
    "extensions.conf": DIALPLAN,
    "queues.conf": """
[general]
[support]
strategy=ringall
timeout=15
member => Local/201@phones/n
member => Local/202@phones/n
""",
    "followme.conf": """
[general]
enable_callee_prompt=no
[201]
context=phones
number => 202,10
""",
    "features.conf": "[featuremap]\natxfer=*2\n",
    "res_parking.conf": """
[general]
[default]
parkext=700
parkpos=701-709
context=phones
parkingtime=45
comebacktoorigin=yes
""",
    "asterisk.conf": "[options]\nentityid=02:00:00:00:00:01\n",
    "logger.conf": "[logfiles]\nfull => notice,warning,error,verbose(3)\n",
    "rtp.conf": "[general]\nrtpstart=18000\nrtpend=18099\n",
}
# Those that Asterisk complains of when they are missing.
EMPTY = "acl ccss cel cdr http indications musiconhold pjproject sorcery stasis udptl"
MODULES = """
pbx_config app_dial app_exec app_stack app_queue app_verbose app_followme app_directed_pickup
res_clioriginate func_callerid func_channel func_logic func_strings codec_ulaw
res_timing_timerfd res_parking res_sorcery_config res_sorcery_memory res_sorcery_astdb
res_pjproject res_musiconhold
res_pjsip res_pjsip_session res_pjsip_pubsub res_pjsip_authenticator_digest res_pjsip_refer
res_pjsip_endpoint_identifier_ip res_pjsip_endpoint_identifier_user res_pjsip_caller_id
res_pjsip_sdp_rtp res_pjsip_nat res_rtp_asterisk chan_pjsip bridge_simple
bridge_builtin_features bridge_native_rtp bridge_holding bridge_softmix app_playback format_pcm
res_pjsip_diversion
""".split()


class Dialog:
    """One call of a phone (RFC 3261 section 12)."""

    def __init__(self, phone: Phone, call_id: str, ours: str, theirs: str) -> None:
        self.phone = phone
        self.call_id = call_id
        self.ours, self.theirs = ours, theirs  # what stands in From of our requests, and in To
        self.target = f"sip:{PBX[0]}:{PBX[1]}"
        self.sequence = 0
        self.invite: list[str] = []  # the head of theirs
        self.branch = ""
        self.is_up, self.is_over = threading.Event(), threading.Event()

    def request(self, method: str, *fields: str, body: str = "", number: int = 0) -> None:
        """Send a request."""
        if not number:
            self.sequence += 1
        if method not in ("ACK", "CANCEL"):
            self.branch = f"z9hG4bK{self.call_id}-{self.sequence}"
        self.phone.send(
            [
                f"{method} {self.target} SIP/2.0",
                f"Via: SIP/2.0/UDP {self.phone.host}:{self.phone.port};branch={self.branch}",
                f"From: {self.ours}",
                f"To: {self.theirs}",
                f"Call-ID: {self.call_id}",
                f"CSeq: {number or self.sequence} {method}",
                f"Contact: <sip:{self.phone.user}@{self.phone.host}:{self.phone.port}>",
                "Max-Forwards: 70",
                *fields,
            ],
            body,
        )

    def answer(self) -> None:
        """Pick up."""
        if not self.is_over.is_set():
            self.phone.reply(self.invite, "200 OK", self.phone.sdp)
            self.is_up.set()

    def hang_up(self) -> None:
        """End the call, or give up."""
        if not self.is_over.is_set():
            self.request(
                *("BYE",) if self.is_up.is_set() else ("CANCEL",),
                number=0 if self.is_up.is_set() else self.sequence,
            )

    def refer(self, exten: str, other: Dialog | None = None) -> None:
        """Transfer the peer: blind, or to the peer of another call of ours (RFC 3891)."""
        to = f"sip:{exten}@{PBX[0]}"
        if other is not None:
            tags = [each.partition(";tag=")[2] for each in (other.theirs, other.ours)]
            to += f"?Replaces={other.call_id}%3Bto-tag%3D{tags[0]}%3Bfrom-tag%3D{tags[1]}"
        self.request("REFER", f"Refer-To: <{to}>", f"Referred-By: <sip:{self.phone.user}@x>")


class Phone:
    """A SIP phone of few words; a thread reads its socket."""

    numbers = itertools.count(1)

    def __init__(self, user: str, port: int, host: str = "127.0.0.1") -> None:
        self.user, self.port, self.host = user, port, host
        self.delay: float | None = None  # seconds until it answers; None: it rings on
        self.forwards_to = ""
        self.dialogs: dict[str, Dialog] = {}
        self.rings: queue.Queue[tuple[float, Dialog]] = queue.Queue()
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.bind((host, port))
        self.sdp = (
            f"v=0\r\no=- 1 1 IN IP4 {host}\r\ns=-\r\nc=IN IP4 {host}\r\nt=0 0\r\n"
            f"m=audio {port + 10000} RTP/AVP 0 101\r\na=rtpmap:0 PCMU/8000\r\n"
            "a=rtpmap:101 telephone-event/8000\r\na=sendrecv\r\n"
        )
        threading.Thread(target=self.run, daemon=True).start()

    def send(self, lines: list[str], body: str = "") -> None:
        """Send a message."""
        kind = ["Content-Type: application/sdp"] if body else []
        text = "\r\n".join([*lines, *kind, f"Content-Length: {len(body)}"])
        data = f"{text}\r\n\r\n{body}".encode("utf-8", "surrogateescape")
        with contextlib.suppress(OSError):
            self.sock.sendto(data, PBX)

    def reply(self, head: list[str], status: str, body: str = "", *fields: str) -> None:
        """Send a response."""
        kept = ("via:", "from:", "call-id:", "cseq:", "record-route:")
        lines = [line for line in head[1:] if line.lower().startswith(kept)]
        to = field(head, "To")
        lines.append(f"To: {to}" if ";tag=" in to else f"To: {to};tag={self.user}")
        contact = f"Contact: <sip:{self.user}@{self.host}:{self.port}>"
        self.send([f"SIP/2.0 {status}", *lines, *(fields or [contact])], body)

    def call(self, exten: str, caller: str = "", *fields: str) -> Dialog:
        """Call somebody; `caller` is what From says, with <sip:...>."""
        number = next(self.numbers)
        ours = f"{caller or f'<sip:{self.user}@{self.host}>'};tag=t{number}"
        dialog = Dialog(self, f"{os.getpid()}-{number}", ours, f"<sip:{exten}@{PBX[0]}>")
        dialog.target = f"sip:{exten}@{PBX[0]}:{PBX[1]}"
        self.dialogs[dialog.call_id] = dialog
        dialog.request("INVITE", *fields, body=self.sdp)
        return dialog

    def run(self) -> None:
        """Take what comes, until the socket is closed."""
        with contextlib.suppress(OSError):
            while data := self.sock.recv(65536):
                head = data.decode("utf-8", "replace").partition("\r\n\r\n")[0].split("\r\n")
                dialog = self.dialogs.get(field(head, "Call-ID"))
                if head[0].startswith("SIP/2.0"):
                    if dialog is not None:
                        self.take_response(dialog, head)
                else:
                    self.take_request(dialog, head)

    def take_response(self, dialog: Dialog, head: list[str]) -> None:
        """Acknowledge what answers an INVITE."""
        status, method = int(head[0].split()[1]), field(head, "CSeq").split()[1]
        if method != "INVITE" or status < 200:
            return
        dialog.theirs = field(head, "To")
        if status == 200:
            dialog.target = field(head, "Contact").strip("<>")
        dialog.request("ACK", number=int(field(head, "CSeq").split()[0]))
        (dialog.is_up if status == 200 else dialog.is_over).set()

    def take_request(self, dialog: Dialog | None, head: list[str]) -> None:
        """Answer a request."""
        method = head[0].split()[0]
        if method == "INVITE" and dialog is None:
            call_id = field(head, "Call-ID")
            dialog = Dialog(
                self, call_id, f"{field(head, 'To')};tag={self.user}", field(head, "From")
            )
            dialog.target, dialog.invite = field(head, "Contact").strip("<>"), head
            self.dialogs[call_id] = dialog
            self.rings.put((time.monotonic(), dialog))
            if self.forwards_to:
                contact = f"Contact: <sip:{self.forwards_to}@{PBX[0]}>"
                self.reply(head, "302 Moved Temporarily", "", contact)
                return
            self.reply(head, "180 Ringing")
            if self.delay is not None:
                threading.Timer(self.delay, dialog.answer).start()
        elif method == "INVITE":
            self.reply(head, "200 OK", self.sdp)
        elif method != "ACK":
            self.reply(head, "200 OK")
            if dialog is not None and method in ("BYE", "CANCEL"):
                if method == "CANCEL" and not dialog.is_up.is_set():
                    self.reply(dialog.invite, "487 Request Terminated")
                dialog.is_over.set()

    def ringing(self) -> Dialog:
        """Wait until it rings."""
        return self.rings.get(timeout=TIMEOUT)[1]


def field(head: list[str], name: str) -> str:
    """Return a header field."""
    found = (line for line in head if line.lower().startswith(f"{name.lower()}:"))
    return next(found, "").partition(":")[2].strip()


def write_configuration() -> None:
    """Give Asterisk its files."""
    folder = ROOT / "etc/asterisk"
    modules = "[modules]\nautoload=no\n" + "".join(f"load={name}.so\n" for name in MODULES)
    for name, text in {**CONFIGURATION, "modules.conf": modules}.items():
        (folder / name).write_text(text)
    for name in EMPTY.split():
        (folder / f"{name}.conf").touch()
    for name in ("var/lib", "var/log", "var/spool"):
        for sub in ("outgoing", "tmp"):
            (ROOT / name / "asterisk" / sub).mkdir(exist_ok=True)
            (ROOT / name / "asterisk" / sub).chmod(0o777)
    (ROOT / "run/asterisk").mkdir(exist_ok=True)
    (ROOT / "run/asterisk").chmod(0o777)


class PBXProcess:
    """Asterisk."""

    def start(self) -> None:
        """Start it, and wait until it is there."""
        command = ["chroot", str(ROOT), "asterisk", "-f", "-U", "asterisk", "-G", "asterisk"]
        null = subprocess.DEVNULL
        self.process = subprocess.Popen(command, stdin=null, stdout=null, stderr=null)
        deadline = time.monotonic() + 30
        while "fully booted" not in self.cli("core waitfullybooted"):
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise AssertionError(f"Asterisk did not come up:\n{self.log()}")
            time.sleep(0.2)

    def cli(self, command: str) -> str:
        """Return what Asterisk says to a command."""
        words = ["chroot", str(ROOT), "asterisk", "-rx", command]
        return subprocess.run(words, capture_output=True, text=True).stdout

    def log(self) -> str:
        """Return Asterisk's log."""
        with contextlib.suppress(FileNotFoundError):
            return (ROOT / "var/log/asterisk/full").read_text(errors="replace")
        return ""


class Relay:
    """Stands between the daemon and Asterisk, and cuts the line."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.pairs: list[socket.socket] = []
        self.is_broken = False

    def __enter__(self) -> Relay:
        threading.Thread(target=self.run, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.cut()
        self.listener.close()

    def run(self) -> None:
        """Accept connections."""
        with contextlib.suppress(OSError):
            while True:
                near = self.listener.accept()[0]
                if self.is_broken:
                    near.close()
                    continue
                far = socket.create_connection(("127.0.0.1", 5038))
                self.pairs += [near, far]
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self.copy, args=pair, daemon=True).start()

    def copy(self, source: socket.socket, target: socket.socket) -> None:
        """Pass on what comes."""
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)

    def cut(self) -> None:
        """Break the connections."""
        for sock in self.pairs:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        self.pairs.clear()

    @contextlib.contextmanager
    def broken(self) -> Iterator[None]:
        """Break the connections, and let none through."""
        self.is_broken = True
        self.cut()
        yield
        self.is_broken = False


class TestManagerInterface(unittest.TestCase):
    """What a browser is told of calls that nobody's dialplan tells of."""

    maxDiff = None
    pbx: ClassVar[PBXProcess]
    phones: ClassVar[dict[str, Phone]]
    provider: ClassVar[Phone]
    branch: ClassVar[Phone]
    daemon: Daemon
    browser: Browser

    @classmethod
    def setUpClass(cls) -> None:
        write_configuration()
        cls.pbx = PBXProcess()
        cls.pbx.start()
        print(cls.pbx.cli("core show version").split(" built")[0], file=sys.stderr)
        cls.phones = {name: Phone(name, port) for name, port in PHONES.items()}
        cls.provider = Phone("provider", PROVIDER[1], PROVIDER[0])
        cls.branch = Phone("branch-office-2", BRANCH[1], BRANCH[0])

    @classmethod
    def tearDownClass(cls) -> None:
        cls.pbx.process.terminate()
        cls.pbx.process.wait(10)

    def setUp(self) -> None:
        self.dialogs: list[Dialog] = []
        if self.pbx.process.poll() is not None:
            self.pbx.start()
        for phone in (*self.phones.values(), self.provider):
            phone.delay, phone.forwards_to = None, ""
            while not phone.rings.empty():
                phone.rings.get()
        self.daemon = self.start_daemon()
        self.browser = self.enter(self.daemon.browser())

    def tearDown(self) -> None:
        for dialog in self.dialogs:
            dialog.hang_up()
        self.wait_for_the_end_of_calls()

    def enter(self, manager: Any) -> Any:
        """Enter a context until the test is over."""
        self.addCleanup(manager.__exit__, None, None, None)
        return manager.__enter__()

    def start_daemon(self, url: str = URL) -> Daemon:
        """Return a daemon that listens to Asterisk."""
        keys: dict[str, Any] = {
            "AMI_URL": url,
            "AMI_TRUNKS": "provider,Branch-Office-2",
            "PING_INTERVAL": 3600,
        }
        daemon: Daemon = self.enter(Daemon(**keys))
        daemon.wait_for_log("Asterisk is up: logged in as")
        deadline = time.monotonic() + TIMEOUT
        while " 0 events" in self.health(daemon):  # the first list is still to come
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.01)
        return daemon

    def health(self, daemon: Daemon) -> str:
        """Return what /healthz says."""
        return daemon.exchange(b"GET /healthz HTTP/1.1\r\nHost: pbx\r\n\r\n").decode()

    def wait_for_the_end_of_calls(self) -> None:
        """Return when no channel is left."""
        for _ in range(100):
            if "\n0 active channels" in "\n" + self.pbx.cli("core show channels count"):
                return
            time.sleep(0.1)
        self.fail(self.pbx.cli("core show channels"))

    def call(self, exten: str, number: str = CALLER, name: str = "", *fields: str) -> Dialog:
        """Call from outside."""
        caller = f'"{name}" ' if name else ""
        return self.keep(self.provider.call(exten, f"{caller}<sip:{number}@x>", *fields))

    def keep(self, dialog: Dialog) -> Dialog:
        """Have a call ended with the test."""
        self.dialogs.append(dialog)
        return dialog

    def talk(self, exten: str = "direct") -> tuple[Dialog, Dialog]:
        """Return a call that 201 has answered, for longer than events may overtake each other."""
        self.phones["201"].delay = 0
        caller = self.call(exten)
        phone = self.phones["201"].ringing()
        self.expect("ring 201", "answer 201")
        time.sleep(popup_notifier.OVERTAKING)
        return caller, phone

    def messages(self, count: int) -> list[dict[str, Any]]:
        """Return the data of so many messages and no more."""
        seen: list[dict[str, Any]] = []
        while len(seen) < count or self.more():
            seen.append(self.browser.message()["data"])
            self.assertLessEqual(len(seen), count, seen)
        return seen

    def more(self) -> bool:
        """Tell whether something comes that is not expected."""
        return bool(self.browser.buffer or select.select([self.browser.sock], [], [], QUIET)[0])

    def expect(self, *expected: str) -> list[dict[str, Any]]:
        """Check what comes: event and extension; those that stand together in any order."""
        seen = self.messages(sum(len(each.split(" + ")) for each in expected))
        said = [f"{each['event']} {each['exten']}" for each in seen]
        place = 0
        for each in expected:
            together = each.split(" + ")
            self.assertEqual(sorted(said[place : place + len(together)]), sorted(together), said)
            place += len(together)
        self.assertLessEqual(len({each["uniqueid"] for each in seen}), 1, seen)
        return seen

    def test_direct(self) -> None:
        self.phones["201"].delay = 0.1
        caller = self.call("0311110001", name="山田")
        seen = self.expect("ring 201", "answer 201")
        shown = {"phone": CALLER, "name": "山田", "did": "0311110001"}
        self.assertEqual([{**each, **shown} for each in seen], seen)
        caller.hang_up()
        self.expect("end 201")
        self.daemon.wait_for_log(
            f'ring phone="{CALLER}" exten="201" .* from asterisk to 1 browser'
        )

    def test_commands_of_the_readme(self) -> None:
        self.pbx.cli("manager reload")
        self.call("direct")
        self.expect("ring 201")
        self.assertIn("PJSIP/provider-", self.pbx.cli("core show channels"))
        self.assertIn("popup", self.pbx.cli("manager show users"))

    def test_trunk_with_dashes_in_its_name(self) -> None:
        caller = self.keep(self.branch.call("direct", f"<sip:{CALLER}@x>"))
        self.expect("ring 201")
        caller.hang_up()
        self.expect("end all")

    def test_agent_hangs_up(self) -> None:
        _, phone = self.talk()
        phone.hang_up()
        self.expect("end 201")

    def test_group(self) -> None:
        self.phones["202"].delay = 0.3
        self.call("group").is_up.wait(TIMEOUT)
        self.expect("ring 201 + ring 202", "answer 202")

    def test_caller_gives_up(self) -> None:
        caller = self.call("group")
        self.expect("ring 201 + ring 202")
        caller.hang_up()
        self.expect("end all")

    def test_queue_with_local_members(self) -> None:
        self.phones["202"].delay = 0.3
        caller = self.call("queue")
        self.expect("ring 201 + ring 202", "answer 202")
        caller.hang_up()
        self.expect("end 202")

    def test_queue_whose_members_answer_together(self) -> None:
        self.phones["201"].delay = self.phones["202"].delay = 0.3
        self.call("queue")
        seen = self.messages(3)
        (talking,) = (each["exten"] for each in seen if each["event"] == "answer")
        channels = self.pbx.cli("core show channels concise")
        self.assertIn(f"PJSIP/{talking}-", channels)

    def test_local_channels_that_go_away(self) -> None:
        self.phones["203"].delay = 0.2
        self.call("local")
        self.expect("ring 202 + ring 203", "answer 203")

    def test_follow_me(self) -> None:
        self.phones["202"].delay = 0.2
        self.call("follow")
        self.expect("ring 202", "answer 202")

    def test_forwarding(self) -> None:
        self.phones["201"].forwards_to = "203"
        self.phones["203"].delay = 0.2
        self.call("direct")
        self.expect("ring 201", "ring 203", "answer 203")

    def test_blind_transfer(self) -> None:
        caller, phone = self.talk()
        self.phones["203"].delay = 0.3
        phone.refer("203")
        self.expect("ring 203", "answer 203")
        caller.hang_up()
        self.expect("end 203")

    def test_blind_transfer_that_nobody_answers(self) -> None:
        caller, phone = self.talk()
        phone.refer("203")
        self.expect("ring 203")
        caller.hang_up()
        self.expect("end all")

    def test_attended_transfer(self) -> None:
        caller, phone = self.talk()
        self.phones["203"].delay = 0.1
        second = self.keep(self.phones["201"].call("203"))
        second.is_up.wait(TIMEOUT)
        self.expect()  # an internal call
        phone.refer("203", second)
        self.expect("answer 203")
        caller.hang_up()
        self.expect("end 203")

    def test_attended_transfer_into_an_older_call(self) -> None:
        self.phones["201"].delay = 0
        first = self.keep(self.phones["203"].call("201"))
        first.is_up.wait(TIMEOUT)
        older = self.phones["201"].ringing()
        caller, phone = self.talk()
        phone.refer("203", older)
        self.expect("answer 203")
        time.sleep(popup_notifier.OVERTAKING)
        first.refer("202")  # the linkedid is that of the older call now
        self.expect("ring 202")
        caller.hang_up()
        self.expect("end all")

    def test_pick_up(self) -> None:
        caller = self.call("direct")
        self.phones["201"].ringing()
        self.expect("ring 201")
        self.keep(self.phones["203"].call("*8"))
        self.expect("answer 203")
        caller.hang_up()
        self.expect("end 203")

    def test_parking_and_retrieval(self) -> None:
        caller, phone = self.talk()
        phone.refer("700")
        phone.is_over.wait(1)
        phone.hang_up()
        self.expect()
        self.keep(self.phones["202"].call("701"))
        self.expect("answer 202")
        caller.hang_up()
        self.expect("end 202")

    def test_two_calls_of_one_caller(self) -> None:
        self.phones["201"].delay = 0
        first = self.call("direct")
        began = self.expect("ring 201", "answer 201")
        second = self.call("group")
        (ring, other) = self.messages(3)[:2]
        self.assertEqual({ring["event"], other["event"]}, {"ring"})
        self.assertNotEqual(ring["uniqueid"], began[0]["uniqueid"])
        first.hang_up()
        self.assertEqual(self.expect("end 201")[0]["uniqueid"], began[0]["uniqueid"])
        second.hang_up()
        self.assertEqual(self.expect("end 201")[0]["uniqueid"], ring["uniqueid"])

    def test_voicemail_is_no_agent(self) -> None:
        caller = self.call("voicemail")
        caller.is_up.wait(TIMEOUT)
        self.expect("ring 201")
        caller.hang_up()
        self.expect("end all")

    def test_menu_without_a_phone(self) -> None:
        caller = self.call("ivr")
        caller.is_up.wait(TIMEOUT)
        caller.hang_up()
        self.expect()

    def test_withheld(self) -> None:
        identity = f'P-Asserted-Identity: "x" <sip:{CALLER}@127.0.0.1>'
        for exten in ("direct", "freepbx"):
            with self.subTest(exten):
                caller = self.call(exten, "anonymous", "Anonymous", identity, "Privacy: id")
                (ring,) = self.expect("ring 201")
                self.assertEqual((ring["phone"], "name" in ring), ("anonymous", False))
                caller.hang_up()
                self.expect("end all")

    def test_name_that_the_dialplan_gives(self) -> None:
        self.call("freepbx", name="山田")
        self.assertEqual(self.expect("ring 201")[0]["name"], "Sales:山田")

    def test_names_and_numbers(self) -> None:
        for number, name, phone, shown in (
            (CALLER, "山田" * 20, CALLER, "山田" * 13),
            (CALLER, "a\udce5\udcb1", CALLER, "a�"),
            (CALLER, "O'Neil $(id) ${x} <b>", CALLER, "O'Neil $(id) ${x} <b>"),
            ("03-1234-5678", "x", CALLER, "x"),
            ("%2B81312345678", "x", "+81312345678", "x"),
            ("%E9%9D%9E%E9%80%9A%E7%9F%A5", "x", "非通知", "x"),
            ("alice", "x", "alice", "x"),
            ("1%0Atouch", "x", "1", "x"),
        ):
            with self.subTest(number, name=name):
                caller = self.call("direct", number, name)
                (ring,) = self.expect("ring 201")
                self.assertEqual(ring["phone"], phone)
                self.assertEqual(ring["name"].rstrip("\ufffd")[:30], shown.rstrip("\ufffd")[:30])
                caller.hang_up()
                self.expect("end all")

    def test_number_that_forges_an_event(self) -> None:
        """Asterisk sends line ends in a caller ID as they are."""
        victim = self.call("direct")
        uniqueid = self.expect("ring 201")[0]["uniqueid"]
        for lines in (f"Event: Hangup\r\nUniqueid: {uniqueid}", f"{LIST_END}\r\nActionID: "):
            number = "".join(f"%{ord(char):02X}" for char in f"1\r\n\r\n{lines}\r\nx: ")
            forger = self.call("group", number)
            self.phones["202"].ringing()
            forger.hang_up()
            self.expect()  # neither an end nor the forger's call
        victim.hang_up()
        self.expect("end all")

    def test_internal_and_outgoing_calls_are_silent(self) -> None:
        self.phones["202"].delay = self.provider.delay = 0
        for exten in ("202", "0901234567"):
            call = self.keep(self.phones["201"].call(exten))
            call.is_up.wait(TIMEOUT)
            call.hang_up()
        self.expect()

    def test_call_that_goes_out_again(self) -> None:
        self.provider.delay = 0.1
        caller = self.call("mobile")
        caller.is_up.wait(TIMEOUT)
        caller.hang_up()
        self.expect()

    def test_forwarding_to_a_mobile_phone(self) -> None:
        self.phones["201"].forwards_to = "0901234567"
        self.provider.delay = 0.1
        caller = self.call("direct")
        self.expect("ring 201", "answer provider")
        caller.hang_up()
        self.expect("end provider")

    def test_call_that_the_pbx_makes(self) -> None:
        self.provider.delay = 0
        self.pbx.cli("channel originate PJSIP/0905555@provider extension 202@phones")
        self.phones["202"].ringing()
        self.pbx.cli("channel request hangup all")
        self.expect()

    def test_asterisk_restarts(self) -> None:
        self.talk()
        self.pbx.process.kill()
        self.pbx.process.wait()
        self.daemon.wait_for_log("Asterisk is away: ")
        self.expect()  # nobody knows what became of it
        (ROOT / "run/asterisk/asterisk.ctl").unlink(missing_ok=True)
        self.pbx.start()
        self.daemon.wait_for_log("Asterisk is up: ", 2)
        self.expect("end 201")
        self.dialogs.clear()
        self.phones["201"].delay = 0
        self.call("direct")
        self.expect("ring 201", "answer 201")

    def test_link_that_breaks_ends_no_call(self) -> None:
        with Relay() as relay:
            self.daemon = self.start_daemon(URL.replace("5038", str(relay.port)))
            self.browser = self.enter(self.daemon.browser())
            caller, phone = self.talk()
            relay.cut()
            self.daemon.wait_for_log("Asterisk is up: ", 2)
            self.expect()
            self.phones["203"].delay = 0.1
            phone.refer("203")
            self.expect("ring 203", "answer 203")
            caller.hang_up()
            self.expect("end 203")

    def test_call_that_ends_while_the_link_is_broken(self) -> None:
        with Relay() as relay:
            self.daemon = self.start_daemon(URL.replace("5038", str(relay.port)))
            self.browser = self.enter(self.daemon.browser())
            caller, _ = self.talk()
            with relay.broken():
                self.daemon.wait_for_log("Asterisk is away: ")
                caller.hang_up()
                self.wait_for_the_end_of_calls()
            self.expect("end 201")

    def test_daemon_that_starts_in_the_middle(self) -> None:
        caller, _ = self.talk()
        second = self.start_daemon()
        self.browser = self.enter(second.browser())
        self.expect()
        caller.hang_up()
        self.expect("end 201")

    def test_login_that_is_refused(self) -> None:
        url = URL.replace("popup-secret", "wrong")
        daemon = self.enter(Daemon(AMI_URL=url, AMI_TRUNKS="provider"))
        daemon.wait_for_log(
            "Asterisk is away: .* refuses the login: .*see secret, permit and deny"
        )

    def test_account_that_may_not_ask(self) -> None:
        url = URL.replace("popup:popup-secret", "curious:x")
        daemon = self.enter(Daemon(AMI_URL=url, AMI_TRUNKS="provider"))
        self.browser = self.enter(daemon.browser())
        daemon.wait_for_log("refuses CoreShowChannels to curious@")
        self.call("direct")
        self.expect("ring 201")
        daemon.wait_for_log("refuses Getvar to curious@")

    def test_account_that_may_not_read(self) -> None:
        with patched("p.AMI_PERIOD = 0.3") as program:
            url = URL.replace("popup:popup-secret", "mute:x")
            daemon = self.enter(Daemon(program=program, AMI_URL=url, AMI_TRUNKS="provider"))
            daemon.wait_for_log("Asterisk is up")
            for exten in ("direct", "group", "ivr"):
                self.call(exten)
                time.sleep(0.5)
            daemon.wait_for_log("refuses events to mute@.*read = call")

    def test_delay_from_the_phone_to_the_browser(self) -> None:
        delays = []
        for _ in range(20):
            caller = self.call("direct")
            began, _ = self.phones["201"].rings.get(timeout=TIMEOUT)
            self.browser.message()
            delays.append((time.monotonic() - began) * 1000)
            caller.hang_up()
            self.expect("end all")
            self.wait_for_the_end_of_calls()
        print(
            f"\nms from the phone's INVITE to the browser's frame, of {len(delays)}:"
            f" median {statistics.median(delays):.1f}, most {max(delays):.1f}",
            file=sys.stderr,
        )
        self.assertLess(statistics.median(delays), 500)


if __name__ == "__main__":
    unittest.main(verbosity=2)
