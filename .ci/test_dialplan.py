#!/usr/bin/env python3
"""Make real SIP calls to a real Asterisk that runs the README's dialplan; see what browsers get.

    python3 .ci/test_dialplan.py ROOT [TEST ...]

Started by .ci/asterisk, in namespaces of its own, with the folder that Asterisk is installed in.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import unittest
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote
from urllib.request import urlopen

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from test_popup_notifier import Browser, Daemon, readme_blocks

REPOSITORY = Path(__file__).resolve().parent.parent
DIALPLAN_FILE = "popup-notifier-asterisk.conf"
ROOT = Path(sys.argv.pop(1)) if __name__ == "__main__" else Path("/")
IS_OLD = (ROOT / "usr/lib/asterisk/modules/chan_sip.so").exists()  # 16: chan_sip and Macro()
SIP_PORT = 5060  # everybody's, each at an address of its own
PBX = {
    "PJSIP": ("127.0.0.1", SIP_PORT),
    "SIP": ("127.0.0.1", SIP_PORT + 20),
}  # two channel drivers
ADDRESSES = {name: f"127.0.0.{n}" for n, name in enumerate(("caller", "201", "202", "203"), 10)}
CALLER, NAME, DID = "0398765432", "山田 太郎", "0312345678"
TRIGGER = "http://127.0.0.1:8989/api/trigger"
CALL_TIMEOUT = 10.0  # seconds for anything to happen
HANG = (
    30  # seconds that a dialplan waits for the daemon, where a call that waited would be noticed
)

# Who does what: what all browsers get then. An `end` is told to whoever heard of the call.
TECHNOLOGIES = ("PJSIP", "SIP") if IS_OLD else ("PJSIP",)
MARKER = ROOT / "tmp/pwned"  # made by a caller who runs commands on the PBX
CALLS = {
    "0355550006": "no popup",
    "0312345678": "popup-incoming",
    "0311112222": "popup-begin, popup-ring",
    "0311113333": "queue",
    "0399990201": "FreePBX",
    "0355550007": "one line of curl",
}
RECIPES = {
    "everybody": (
        "caller dials 0312345678: ring all",
        "202 answers: answer 202",
        "caller hangs up: end",
    ),
    "only who rings": (
        "caller dials 0311112222: ring 201, ring 202",
        "201 answers: answer 201",
        "201 hangs up: end",
    ),
    "the caller gives up": ("caller dials 0311112222: ring 201, ring 202", "caller gives up: end"),
    "nobody but one": (
        "caller dials 0311112222: ring 201, ring 202",
        "201 is busy:",
        "202 answers: answer 202",
        "caller hangs up: end",
    ),
    "queue": (
        "caller dials 0311113333: ring 201, ring 202",
        "202 answers: answer 202",
        "caller hangs up: end",
    ),
    "the caller gives up in a queue": (
        "caller dials 0311113333: ring 201, ring 202",
        "caller gives up: end",
    ),
    "queue of Local members": (
        "caller dials 0355550001: ring 201, ring 202",
        "202 answers: answer 202",
        "caller hangs up: end",
    ),
    "follow-me through Local channels": (
        "caller dials 0355550002: ring 201",
        "201 is busy: ring 202",
        "202 answers: answer 202",
        "caller hangs up: end",
    ),
    "an extension that has another name": (
        "caller dials 0355550003: ring 801",
        "201 answers: answer 801",
        "caller hangs up: end",
    ),
    "a phone forwards": (
        "caller dials 0311112222: ring 201, ring 202",
        "201 forwards to 203: ring 203",
        "203 answers: answer 203",
        "caller hangs up: end",
    ),
    "blind transfer": (
        "caller dials 0311112222: ring 201, ring 202",
        "201 answers: answer 201",
        "201 transfers to 203: ring 203",
        "203 answers: answer 203",
        "caller hangs up: end",
    ),
    "attended transfer": (
        "caller dials 0311112222: ring 201, ring 202",
        "201 answers: answer 201",
        "201 dials 203:",
        "203 answers:",
        "201 hands over: answer 203",
        "caller hangs up: end",
    ),
    "pick-up": (
        "caller dials 0311112222: ring 201, ring 202",
        "203 dials *8201: answer 203",
        "caller hangs up: end",
    ),
    "between phones": ("201 dials 202:", "202 answers:", "201 hangs up:"),
    "answered by no phone": ("caller dials 0355550004: ring all", "caller hangs up: end"),
    "outgoing": (
        "201 dials 0398765432:",
        "caller answers: answer 201",
        "caller hangs up: end",
    ),
    "forwarded to outside": (
        "caller dials 0355550005:",
        "caller answers: answer provider",
        "caller hangs up: end",
    ),
}
FREEPBX_RECIPES = {
    "extension": (
        "caller dials 0399990201: ring 201",
        "201 answers: answer 201",
        "caller hangs up: end",
    ),
    "ring group": (
        "caller dials 0399990600: ring 201,202",
        "202 answers: answer 202",
        "caller hangs up: end",
    ),
    "hunt group": (
        "caller dials 0399990800: ring 201",
        "201 is busy: ring 202",
        "202 answers: answer 202",
        "caller hangs up: end",
    ),
    "queue": (
        "caller dials 0399990700: ring 201, ring 202",
        "202 answers: answer 202",
        "caller hangs up: end",
    ),
    "the caller gives up": ("caller dials 0399990700: ring 201, ring 202", "caller gives up: end"),
    "group whose members confirm": (
        "caller dials 0399990900: ring 201,202",
        "caller gives up: end",
    ),
    "blind transfer": (
        "caller dials 0399990201: ring 201",
        "201 answers: answer 201",
        "201 transfers to 9203: ring 203",
        "203 answers: answer 203",
        "caller hangs up: end",
    ),
    "attended transfer": (
        "caller dials 0399990201: ring 201",
        "201 answers: answer 201",
        "201 dials 9203:",
        "203 answers:",
        "201 hands over: answer 203",
        "caller hangs up: end",
    ),
    "between phones": ("201 dials 9202:", "202 answers:", "201 hangs up:"),
}

# What a caller writes for a number: what is told.
NUMBERS = {
    CALLER: CALLER,
    "+81312345678": "+81312345678",
    "03-1234-5678": "0312345678",
    "#31#0312345678": "#31#0312345678",
    "anonymous": "anonymous",
    "": "anonymous",
    "非通知": "anonymous",
    '";touch /tmp/pwned;"': "anonymous",
    "$(touch /tmp/pwned)": "anonymous",
    "`touch /tmp/pwned`": "anonymous",
    "1\ntouch /tmp/pwned\n": "1",
    "${SHELL(touch /tmp/pwned)}": "anonymous",
    "1),a):0:9}$(touch /tmp/pwned)": "109",
    "1^POPUP_QUERY=phone=999)": "1999",
    "1&exten=999&token=x": "1999",
    "1,999)": "1999",
}
NAMES = (
    NAME,
    "O'Brien & Söhne (Berlin), Ltd.",
    'say "hi" \\ bye',
    "100% + 1 = 101?",
    "a^POPUP_QUERY=phone=110^b",
    "x)C(9999",
    "((((",
    "&exten=999&token=x&event=end",
    "${SHELL(touch /tmp/pwned)}$(touch /tmp/pwned)`touch /tmp/pwned`",
    "📞 ☎️ 안녕하세요",
    "\u202e\u0645\u0631\u062d\u0628\u0627\u200f \u05e9\u05dc\u05d5\u05dd",  # right to left
    "<b>bold</b>;x:y|z~!*'_-.",
    "あいうえお" * 8,  # 120 bytes: 16 cuts it, in the middle of a character
)

PJSIP = f"""
[transport]
type=transport
protocol=udp
bind=127.0.0.1:{SIP_PORT}
[line](!)
type=endpoint
disallow=all
allow=ulaw
direct_media=no
trust_id_inbound=yes
"""
PJSIP_LINE = """
[{name}](line)
context={context}
aors={name}
[{name}]
type=aor
contact=sip:{name}@{address}:5060
[{name}]
type=identify
endpoint={name}
match={address}
"""
SIP = f"""
[general]
udpbindaddr=127.0.0.1:{PBX["SIP"][1]}
allowguest=no
alwaysauthreject=yes
[line](!)
type=peer
insecure=port,invite
disallow=all
allow=ulaw
directmedia=no
trustrpid=yes
sendrpid=no
"""
SIP_LINE = """
[{name}](line)
host={address}
port=5060
context={context}
"""

# What Asterisk complains of with us or without us: a phone that is given up, a 302, and macros.
USUAL = re.compile(
    r"Session already DISCONNECTED|can not parse name and number from sip header|"
    r"Macro\(\) is deprecated|updated to use Gosub"
)
# Those that Asterisk complains of when they are missing.
EMPTY = "acl ccss cel features http indications manager pjproject sorcery stasis udptl"

# What stands around the README's dialplan, for the two channel drivers alike, and a control.
DIALPLAN = """
[from-provider]
exten => 0355550001,1,Gosub(popup-begin,s,1(${EXTEN}))
 same => n,Queue(local,,,,60)
exten => 0355550002,1,Gosub(popup-begin,s,1(${EXTEN}))
 same => n,Dial(Local/201@internal/n,20)
 same => n,Dial(Local/202@internal,20)
exten => 0355550003,1,Gosub(popup-begin,s,1(${EXTEN}))
 same => n,Dial(PJSIP/201,20,b(popup-ring^s^1(801))U(popup-answered^801))
exten => 0355550004,1,Gosub(popup-incoming,s,1(${EXTEN}))
 same => n,Answer()
 same => n,Wait(60)
exten => 0355550005,1,Gosub(popup-begin,s,1(${EXTEN}))
 same => n,Goto(internal,0398765432,1)
exten => 0355550006,1,Dial(PJSIP/201,20)
exten => 0355550007,1,Gosub(popup-line,s,1)
 same => n,Dial(PJSIP/201,20)
exten => 0355550008,1,Set(URL=http://localhost:8989/api/trigger?phone=${CALLERID(num)}&exten=all)
 same => n,System(curl -X POST "${URL}&token=mytoken" -m 1)
 same => n,Wait(60)
exten => _039999XXXX,1,Goto(from-pstn,${EXTEN},1)

[internal]
exten => _*8.,1,PickupChan(PJSIP/${EXTEN:2})
exten => _92XX,1,Goto(from-internal,${EXTEN:1},1)
"""
QUEUES = """
[local]
strategy=ringall
member => Local/201@internal/n
member => Local/202@internal/n
[freepbx]
strategy=ringall
member => Local/201@from-internal/n
member => Local/202@from-internal/n
"""

# A dialplan of FreePBX's shape: what of it meets the hooks. So 17 has it; 15 and 16 use macros.
FREEPBX = """
[from-pstn]
exten => _X.,1,Set(__FROM_DID=${EXTEN})
 same => n,Set(__CALLINGNUMPRES_SV=${CALLERID(num-pres)})
 same => n,Set(CALLERID(name-pres)=allowed_not_screened)
 same => n,Set(CALLERID(num-pres)=allowed_not_screened)
 same => n,Goto(from-internal,${EXTEN:-3},1)

[from-internal]
exten => _20X,1,Gosub(macro-dial-one,s,1(20,HhTtr,${EXTEN}))
 same => n,Hangup()
exten => 600,1,Set(ds=PJSIP/201&PJSIP/202,20,HhtrU(macro-auto-blkvm))
 same => n,Gosub(macro-dial,s,1(201-202))
 same => n,Hangup()
exten => 900,1,Set(ds=PJSIP/201&PJSIP/202,20,HhtrU(macro-confirm^x))
 same => n,Gosub(macro-dial,s,1(201-202))
 same => n,Hangup()
exten => 700,1,Set(__NODEST=700)
 same => n,Queue(freepbx,t,,,60)
exten => 800,1,Set(ds=,20,HhtrU(macro-auto-blkvm))
 same => n,Gosub(macro-hunt,s,1(201))
 same => n,Gosub(macro-hunt,s,1(202))
 same => n,Hangup()

[macro-dial-one]
exten => s,1,Set(DEXTEN=${ARG3})
 same => n,Set(D_OPTIONS=${ARG2}${IF($["${NODEST}" = ""]?:U(macro-auto-blkvm))})
 same => n,Gosub(macro-dialout-one-predial-hook,s,1())
 same => n,Dial(PJSIP/${DEXTEN},${ARG1},${D_OPTIONS}Ib(func-apply-sipheaders^s^1))
 same => n,Return()

[macro-dial]
exten => s,1,Set(FILTERED_DIAL=${ARG1})
 same => n,Gosub(macro-dial-ringall-predial-hook,s,1())
 same => n,Dial(${ds}b(func-apply-sipheaders^s^1))
 same => n,Return()

[macro-hunt]
exten => s,1,Set(__EXTTOCALL=${ARG1})
 same => n,Gosub(macro-dial-hunt-predial-hook,s,1())
 same => n,Dial(PJSIP/${ARG1}${ds}b(func-apply-sipheaders^s^1))
 same => n,Return()

[macro-auto-blkvm]
exten => s,1,Log(NOTICE,auto-blkvm was run)
 same => n,Return()

[func-apply-sipheaders]
exten => s,1,Return()
"""
MODULES = (
    """
pbx_config app_dial app_exec app_stack app_system app_originate app_queue app_verbose
app_directed_pickup func_callerid func_cdr func_channel func_curl func_cut func_logic func_strings
func_uri cdr_csv codec_ulaw res_clioriginate
res_curl res_timing_timerfd res_sorcery_config res_sorcery_memory res_sorcery_astdb res_pjproject
res_pjsip res_pjsip_session res_pjsip_pubsub res_pjsip_authenticator_digest res_pjsip_refer
res_pjsip_endpoint_identifier_ip res_pjsip_caller_id res_pjsip_sdp_rtp res_pjsip_nat
res_rtp_asterisk chan_pjsip bridge_simple bridge_builtin_features bridge_native_rtp bridge_holding
""".split()
    + (["app_macro", "chan_sip"] if IS_OLD else [])
)


# --- Asterisk ------------------------------------------------------------------------------------


def readme_files() -> dict[str, str]:
    """Return the dialplan's files that the README shows, by name, the blocks of each joined."""
    files: dict[str, str] = {}
    for block in readme_blocks("ini"):
        head, _, text = block.partition("\n")
        if head.startswith("; ") and "manager" not in head:
            files[head[2:]] = files.get(head[2:], "") + text
    return files


def by_chan_sip(text: str) -> str:
    """Return a dialplan or queues that do by chan_sip what they did by PJSIP."""
    text = re.sub(r"^#include.*", "", text, flags=re.MULTILINE)
    text = re.sub(r"^\[(freepbx|popup-line)\]\n(?:(?!\[).*\n)*", "", text, flags=re.MULTILINE)
    text = re.sub(r"PJSIP/(\$\{EXTEN\})@provider", r"SIP/provider/\1", text)
    text = text.replace("PJSIP/", "SIP/")
    return re.sub(r"([[@(])(from-provider|internal|support|local)\b", r"\1\2-sip", text)


def by_macros(text: str) -> str:
    """Return a dialplan of FreePBX 17's shape as FreePBX 15 and 16 have it."""
    text = re.sub(r"Gosub\(macro-([\w-]+),s,1\((.*)\)\)", r"Macro(\1,\2)", text)
    macros = re.compile(r"^\[macro-.*?(?=^\[)", re.MULTILINE | re.DOTALL)
    text = macros.sub(lambda found: found[0].replace("Return()", "MacroExit()"), text)
    return text.replace("U(macro-auto-blkvm)", "M(auto-blkvm)")


def by_gosub(text: str) -> str:
    """Return a dialplan of FreePBX 17's shape as it is."""
    return text


def by_subs(text: str) -> str:
    """Return a dialplan of FreePBX 17's shape as its latest core has it."""
    return text.replace("macro-", "sub-")


SHAPES = {"15, 16": by_macros} if IS_OLD else {"17": by_gosub, "latest": by_subs}  # of FreePBX


def write_dialplan(shape: Callable[[str], str]) -> None:
    """Give Asterisk the README's dialplan, what stands around it, and one of FreePBX's shape."""
    dialplan = readme_files()["extensions.conf"] + DIALPLAN
    if IS_OLD:
        dialplan += by_chan_sip(dialplan)
    (ROOT / "etc/asterisk/extensions.conf").write_text(dialplan + shape(FREEPBX))


def install_by_readme() -> None:
    """Run the README's commands that put the dialplan's file and the token's into their places."""
    source = ROOT / "tmp/.readme"
    source.mkdir()
    shutil.copy(REPOSITORY / ".readme" / DIALPLAN_FILE, source)
    for block in readme_blocks("sh"):
        if "umask" in block:
            command = ["chroot", str(ROOT), "bash", "-ec", f"cd /tmp; {block}"]
            subprocess.run(command, check=True)


def write_configuration() -> None:
    """Give Asterisk the README's files and what a PBX has besides."""
    folder = ROOT / "etc/asterisk"
    files = readme_files()
    del files["extensions.conf"]
    write_dialplan(next(iter(SHAPES.values())))
    queues = files.pop("queues.conf") + QUEUES
    pjsip, sip = PJSIP, SIP
    for name, address in ADDRESSES.items():
        name, context = ("provider", "from-provider") if name == "caller" else (name, "internal")
        pjsip += PJSIP_LINE.format(name=name, address=address, context=context)
        sip += SIP_LINE.format(name=name, address=address, context=f"{context}-sip")
    if IS_OLD:
        queues += by_chan_sip(queues)
    given = {
        "queues.conf": "[general]\n" + queues,
        "pjsip.conf": pjsip,
        "sip.conf": sip,
        "modules.conf": "[modules]\nautoload=no\n"
        + "".join(f"load={name}.so\n" for name in MODULES),
        "asterisk.conf": "[options]\nentityid=02:00:00:00:00:01\n",
        "logger.conf": "[logfiles]\nfull => notice,warning,error,verbose(3)\n",
        "cdr.conf": "[general]\nenable=yes\nunanswered=yes\n[csv]\nusegmtime=no\n",
        "rtp.conf": "[general]\nrtpstart=18000\nrtpend=19999\n",
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
    install_by_readme()


# --- SIP phones ----------------------------------------------------------------------------------


class Message:
    """A SIP request or response."""

    def __init__(self, data: bytes) -> None:
        head, _, self.body = data.decode("utf-8", "replace").partition("\r\n\r\n")
        self.start, *self.fields = head.split("\r\n")
        words = self.start.split()
        self.status = int(words[1]) if words[0] == "SIP/2.0" else 0
        self.method = self.get("CSeq").split()[1]

    def get(self, name: str) -> str:
        """Return the value of a field."""
        return next((line.split(": ", 1)[1] for line in self.lines(name)), "")

    def lines(self, *names: str) -> list[str]:
        """Return the lines of these fields."""
        heads = tuple(f"{name.lower()}:" for name in names)
        return [line for line in self.fields if line.lower().startswith(heads)]


class Leg:
    """One call, as one phone has it. What its phone's thread writes is read under its lock."""

    def __init__(self, phone: Phone, peer: tuple[str, int], call_id: str, mine: str) -> None:
        self.phone, self.peer, self.call_id, self.mine = phone, peer, call_id, mine
        self.state = "new"  # "ringing", "up", "over"
        self.theirs = self.target = ""
        self.invite: Message | None = None  # the call that came in
        self.number = 0

    def request(self, method: str, *fields: str, body: str = "") -> None:
        """Send a request."""
        if method not in ("ACK", "CANCEL"):
            self.number += 1
        # A CANCEL, and the ACK of a refusal, belong to the INVITE (RFC 3261 9.1, 17.1.1.3).
        is_part = method == "CANCEL" or (method == "ACK" and self.state != "up")
        branch = f"{self.call_id}{self.number}{'INVITE' if is_part else method}"
        lines = (
            f"{method} {self.target} SIP/2.0",
            f"Via: SIP/2.0/UDP {self.phone.address}:{SIP_PORT};branch=z9hG4bK{branch}",
            f"From: {self.mine}",
            f"To: {self.theirs}",
            f"Call-ID: {self.call_id}",
            f"CSeq: {self.number} {method}",
            f"Contact: {self.phone.contact}",
            "Max-Forwards: 70",
            *fields,
        )
        self.phone.send(self.peer, lines, body)

    def reply(self, request: Message, status: str, *fields: str, body: str = "") -> None:
        """Send a response."""
        lines = request.lines("Via", "From", "Call-ID", "CSeq", "Record-Route")
        to = request.get("To") if "tag=" in request.get("To") else self.mine
        contact = () if fields else (f"Contact: {self.phone.contact}",)
        self.phone.send(
            self.peer, (f"SIP/2.0 {status}", *lines, f"To: {to}", *contact, *fields), body
        )

    def receive(self, message: Message) -> None:
        """Do what a message asks for. Called by the phone's thread."""
        if message.status:
            self.receive_response(message)
        elif message.method == "INVITE" and self.state == "new":
            self.invite, self.theirs = message, message.get("From")
            self.target = message.get("Contact").strip("<>")
            self.mine = f"{message.get('To')};tag={id(self)}"
            self.reply(message, "180 Ringing")
            self.state = "ringing"
        elif message.method == "INVITE" and self.state != "up":
            pass  # sent again: the answer was on its way
        elif message.method != "ACK":
            self.reply(
                message, "200 OK", body=self.phone.sdp if message.method == "INVITE" else ""
            )
            if message.method == "CANCEL" and self.invite is not None:
                self.reply(self.invite, "487 Request Terminated")
            if message.method in ("BYE", "CANCEL"):
                self.state = "over"
            elif message.body.startswith("SIP/2.0 200"):  # the NOTIFY of a transfer that was made
                self.hang_up()

    def receive_response(self, message: Message) -> None:
        """Take the answer to our own call."""
        if message.method != "INVITE" or message.status < 180:
            return
        self.theirs = message.get("To")
        if message.status < 200:
            self.state = "ringing"
        elif message.status < 300:
            self.target = message.get("Contact").strip("<>")
            self.state = "up"
            self.request("ACK")
        else:
            self.state = "over"
            self.request("ACK")

    def answer(self) -> None:
        """Pick the phone up."""
        assert self.invite is not None
        self.reply(self.invite, "200 OK", body=self.phone.sdp)
        self.state = "up"

    def refuse(self, status: str, *fields: str) -> None:
        """Do not take the call."""
        assert self.invite is not None
        self.reply(self.invite, status, *fields)
        self.state = "over"

    def hang_up(self) -> None:
        """End the call, or give up."""
        if self.state == "up":
            self.request("BYE")
        elif self.state != "over":
            self.request("CANCEL")
        self.state = "over"

    def transfer(self, number: str, other: Leg | None = None) -> None:
        """Have the PBX connect our peer to a number, or to whom we talk with on another leg."""
        uri = f"sip:{number}@{self.peer[0]}:{self.peer[1]}"
        if other is not None:
            tags = re.findall(r"tag=([^;>\s]*)", f"{other.theirs} {other.mine}")
            uri = other.theirs.partition("<")[2].partition(">")[0]
            uri += "?Replaces=" + quote(f"{other.call_id};to-tag={tags[0]};from-tag={tags[1]}")
        self.request("REFER", f"Refer-To: <{uri}>", f"Referred-By: {self.phone.contact}")


class Phone:
    """A SIP phone, or the provider: a UDP socket that a thread reads."""

    calls = 0

    def __init__(self, name: str) -> None:
        self.name, self.address = name, ADDRESSES[name]
        self.contact = f"<sip:{name}@{self.address}:{SIP_PORT}>"
        self.legs: dict[str, Leg] = {}
        self.changed = threading.Condition(threading.RLock())
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.bind((self.address, SIP_PORT))
        self.sdp = (
            f"v=0\r\no=- 1 1 IN IP4 {self.address}\r\ns=-\r\nc=IN IP4 {self.address}\r\nt=0 0\r\n"
            "m=audio 6000 RTP/AVP 0\r\na=rtpmap:0 PCMU/8000\r\n"
        )
        threading.Thread(target=self.run, daemon=True).start()

    def run(self) -> None:
        """Heed what comes, until the process ends."""
        while True:
            data, peer = self.sock.recvfrom(65536)
            message = Message(data)
            call_id = message.get("Call-ID")
            with self.changed:
                if call_id not in self.legs:
                    self.legs[call_id] = Leg(self, peer, call_id, "")
                self.legs[call_id].receive(message)
                self.changed.notify_all()

    def send(self, peer: tuple[str, int], lines: Any, body: str) -> None:
        """Send a message."""
        head = (*lines, "Content-Type: application/sdp", f"Content-Length: {len(body)}")
        self.sock.sendto(("\r\n".join(head) + f"\r\n\r\n{body}").encode(), peer)

    def dial(self, pbx: tuple[str, int], number: str, caller: str = "", *fields: str) -> Leg:
        """Call a number; the call has got through to the PBX when this returns."""
        Phone.calls += 1
        call_id = f"{Phone.calls}-{self.name}"
        leg = Leg(self, pbx, call_id, f"{caller or self.contact};tag={call_id}")
        leg.target = f"sip:{quote(number)}@{pbx[0]}:{pbx[1]}"
        leg.theirs = f"<{leg.target}>"
        with self.changed:
            self.legs[call_id] = leg
            leg.request("INVITE", *fields, body=self.sdp)
        return leg

    def leg(self, *states: str, newest: bool = True) -> Leg:
        """Wait until our newest call, or the oldest one, is in one of these states; return it."""

        def found() -> Leg | None:
            legs = [leg for leg in self.legs.values() if leg.state != "over"]
            return legs[-newest] if legs and legs[-newest].state in states else None

        with self.changed:
            if not self.changed.wait_for(found, CALL_TIMEOUT):
                states_now = [leg.state for leg in self.legs.values()]
                raise AssertionError(f"{self.name}: {' or '.join(states)} expected, {states_now}")
            return found() or self.leg(*states)

    def forget(self) -> None:
        """End what calls there are."""
        with self.changed:
            for leg in self.legs.values():
                if leg.state == "ringing" and leg.invite is not None:
                    leg.refuse("480 Temporarily Unavailable")
                elif leg.state != "over":
                    leg.hang_up()


def caller_id(number: str = CALLER, name: str = NAME) -> str:
    """Return the value of a From field."""
    escaped = name.replace("\\", "\\\\").replace('"', '\\"')
    user = f"{quote(number, safe='')}@" if number else ""
    return f'"{escaped}" <sip:{user}127.0.0.10>'


def as_asterisk_has_it(name: str, technology: str) -> str:
    """Return what Asterisk has for a name: PJSIP keeps 79 bytes, and escapes; 16 cuts anywhere."""
    if technology == "SIP":
        return name
    sent = caller_id(name=name)[1:].rpartition('"')[0]
    return sent.encode()[:79].decode(errors="replace" if IS_OLD else "ignore")


# --- Tests ---------------------------------------------------------------------------------------


class TestDialplan(unittest.TestCase):
    """What the README says of Asterisk and FreePBX."""

    maxDiff = None
    pbx: ClassVar[subprocess.Popen[bytes]]
    phones: ClassVar[dict[str, Phone]]
    text: str  # of the daemon's configuration
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
        cls.addClassCleanup(cls.stop_pbx)
        deadline = time.monotonic() + 30
        while "fully booted" not in cls.cli("core waitfullybooted"):
            if time.monotonic() > deadline or cls.pbx.poll() is not None:
                raise AssertionError(f"Asterisk did not come up:\n{cls.log()}")
            time.sleep(0.2)
        version = re.sub(" built by.*", "", cls.cli("core show version").strip())
        assert ("Asterisk 16." in version) == IS_OLD, version
        print(version, file=sys.stderr)
        cls.phones = {name: Phone(name) for name in ADDRESSES}

    @classmethod
    def stop_pbx(cls) -> None:
        cls.pbx.terminate()
        cls.pbx.wait(10)

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
        text = (REPOSITORY / "popup-notifier.conf").read_text()
        self.text = text + "\nPING_INTERVAL=3600\n"  # a ping is not what the tests wait for
        self.daemon = self.enterContext(Daemon(text=self.text))
        self.daemon.port = 8989
        self.browser = self.enterContext(self.daemon.browser())
        self.browser.sock.settimeout(CALL_TIMEOUT)
        self.addCleanup(self.end_calls)

    def enterContext(self, manager: Any) -> Any:
        """Do what unittest has from Python 3.11 on."""
        self.addCleanup(manager.__exit__, None, None, None)
        return manager.__enter__()

    def end_calls(self) -> None:
        """Hang up; return when no channel is left: all that was to be told has been told."""
        for phone in self.phones.values():
            phone.forget()
        for _ in range(300):  # an end that nobody answers is sent again for 10 s
            if "\n0 active channels" in "\n" + self.cli("core show channels count"):
                break
            time.sleep(0.1)
        else:
            self.fail(self.cli("core show channels"))

    def wait_for_bridges(self) -> None:
        """Return when each channel is in a bridge, or alone: who was answered talks."""
        for _ in range(100):
            channels = re.findall("^.*!.*$", self.cli("core show channels concise"), re.MULTILINE)
            if len(channels) == 1 or all(line.split("!")[-2] for line in channels):
                return
            time.sleep(0.1)
        self.fail(self.cli("core show channels"))

    def messages(self, count: int) -> list[dict[str, str]]:
        """Return what the next messages say."""
        told: list[dict[str, str]] = []
        with contextlib.suppress(socket.timeout):
            told += (self.browser.message()["data"] for _ in range(count))
        return told

    def leftover(self) -> list[dict[str, str]]:
        """End all calls; return what else was told of them."""
        self.end_calls()
        urlopen(f"{TRIGGER}?phone=1&uniqueid=leftover", b"token=mytoken", CALL_TIMEOUT).close()
        told = []
        while (data := self.browser.message()["data"]).get("uniqueid") != "leftover":
            told.append(data)
        return told

    def complaints(self, since: int) -> str:
        """Return what Asterisk has found wrong since its log had that length."""
        lines = re.findall(r".*\] (?:WARNING|ERROR)\[.*", self.log()[since:])
        return "\n".join(line for line in lines if not USUAL.search(line))

    def act(self, pbx: tuple[str, int], step: str) -> None:
        """Have somebody do something."""
        matched = re.fullmatch(
            r"(\w+) (dials|answers|hangs up|gives up|is busy|hands over|\w+ to) ?(.*)", step
        )
        assert matched is not None, step
        who, what, number = matched.groups()
        phone = self.phones[who]
        if what == "dials":
            phone.dial(pbx, number, caller_id() if who == "caller" else "")
        elif what == "answers":
            phone.leg("ringing").answer()
        elif what == "is busy":
            phone.leg("ringing").refuse("486 Busy Here")
        elif what == "forwards to":
            contact = f"Contact: <sip:{number}@{pbx[0]}:{pbx[1]}>"
            phone.leg("ringing").refuse("302 Moved Temporarily", contact)
        elif what == "transfers to":
            self.wait_for_bridges()
            phone.leg("up").transfer(number)
        elif what == "hands over":
            self.wait_for_bridges()
            other = phone.leg("up")
            phone.leg("up", newest=False).transfer("", other)
        elif what == "gives up":
            phone.leg("new", "ringing").hang_up()
        else:
            self.wait_for_bridges()
            phone.leg("up").hang_up()

    def run_recipe(self, pbx: tuple[str, int], steps: tuple[str, ...]) -> None:
        """Go through a recipe; see that all is told, no more, and of one call."""
        heard = []
        logged = len(self.log())
        for step in steps:
            action, _, expected = step.partition(":")
            self.act(pbx, action)
            wanted = sorted(filter(None, expected.strip().split(", ")))
            seen = self.messages(len(wanted))
            told = [m["event"] + ("" if m["event"] == "end" else f" {m['exten']}") for m in seen]
            self.assertEqual(sorted(told), wanted, action)
            heard += seen
        self.assertEqual(self.leftover(), [])
        self.assertEqual({m["phone"] for m in heard} - {CALLER}, set())
        self.assertLessEqual(len({m["uniqueid"] for m in heard}), 1)
        if steps[0].startswith("caller"):
            self.assertTrue(all(m["name"].endswith(NAME) for m in heard), heard)
            self.assertEqual({m["did"] for m in heard}, {steps[0].split()[2].rstrip(":")})
        self.assertEqual(self.complaints(logged), "")

    def run_recipes(self, technology: str, recipes: dict[str, tuple[str, ...]]) -> None:
        """Go through recipes; one that fails leaves no call behind."""
        for name, steps in recipes.items():
            with self.subTest(name, technology=technology):
                try:
                    self.run_recipe(PBX[technology], steps)
                finally:
                    self.leftover()

    def told(
        self, number: str, caller: str, *fields: str, technology: str = "PJSIP"
    ) -> dict[str, str]:
        """Return what is told of a call that the caller gives up."""
        leg = self.phones["caller"].dial(PBX[technology], number, caller, *fields)
        message, *_ = self.messages(1) or [{}]
        leg.hang_up()
        self.leftover()
        return message

    def test_recipes(self) -> None:
        self.run_recipes("PJSIP", RECIPES)

    def test_freepbx(self) -> None:
        for version, shape in SHAPES.items():
            with self.subTest(version):
                write_dialplan(shape)
                self.cli("dialplan reload")
                began = len(self.log())
                self.run_recipes("PJSIP", FREEPBX_RECIPES)
                # What FreePBX wants done at the answer is done too: in the groups and the queue.
                done = re.findall(r"NOTICE\[.*auto-blkvm was run", self.log()[began:])
                self.assertEqual(len(done), 3)

    def test_numbers(self) -> None:
        for number, phone in NUMBERS.items():
            for technology in TECHNOLOGIES:
                with self.subTest(number, technology=technology):
                    message = self.told("0312345678", caller_id(number), technology=technology)
                    self.assertEqual((message["phone"], message["exten"]), (phone, "all"))
            with self.subTest(number, recipe="one line"):
                message = self.told("0355550007", caller_id(number))
                self.assertEqual(message, {"phone": phone.replace("#", ""), "exten": "all"})
        self.assertFalse(MARKER.exists())

    def test_names(self) -> None:
        for name in NAMES:
            for technology in TECHNOLOGIES:
                with self.subTest(name, technology=technology):
                    message = self.told("0312345678", caller_id(name=name), technology=technology)
                    self.assertEqual(message["name"], as_asterisk_has_it(name, technology))
                    self.assertEqual((message["phone"], message["exten"]), (CALLER, "all"))
        self.assertFalse(MARKER.exists())

    def test_label(self) -> None:
        self.assertEqual(self.told("0311112222", caller_id())["name"], f"営業 {NAME}")
        self.assertEqual(self.told("0312345678", caller_id(name=""))["name"], "")

    def test_withheld_number_that_the_carrier_sends(self) -> None:
        identity = f'P-Asserted-Identity: "{NAME}" <sip:{CALLER}@127.0.0.10>'
        anonymous = '"Anonymous" <sip:anonymous@anonymous.invalid>'
        for number in ("0312345678", "0311112222", "0399990201"):
            with self.subTest(number):
                message = self.told(number, anonymous, identity, "Privacy: id")
                self.assertEqual(
                    (message["phone"], message["name"].strip()[2:]), ("anonymous", "")
                )

    def test_hostile_caller_owns_the_line_that_is_not_filtered(self) -> None:
        self.phones["caller"].dial(PBX["PJSIP"], "0355550008", caller_id("$(touch /tmp/pwned)"))
        self.messages(1)
        self.assertTrue(MARKER.exists())
        MARKER.unlink()

    def talk(self, number: str) -> tuple[float, float]:
        """Make a call that 201 answers; return the ms until it rang, and until it was through."""
        began = time.monotonic()
        call = self.phones["caller"].dial(PBX["PJSIP"], number, caller_id())
        leg = self.phones["201"].leg("ringing")
        rang = time.monotonic()
        leg.answer()
        self.assertIs(self.phones["caller"].leg("up"), call)
        through = time.monotonic()
        call.hang_up()
        return (rang - began) * 1000, (through - rang) * 1000

    def make_calls(self, state: str) -> None:
        """See that calls get through; print how long they took."""
        for number, recipe in CALLS.items():
            with self.subTest(recipe, state=state):
                rang, through = (
                    sorted(ms)[2] for ms in zip(*(self.talk(number) for _ in range(5)))
                )
                figures = f"{rang:5.1f} ms until it rings, {through:5.1f} ms to answer"
                print(f"{figures}: {recipe}, the daemon {state}", file=sys.stderr)

    def test_call_goes_on_without_the_daemon(self) -> None:
        path = ROOT / "etc/asterisk" / DIALPLAN_FILE
        given = path.read_text()
        self.addCleanup(lambda: (path.write_text(given), self.cli("dialplan reload")))
        path.write_text(given.replace("timeout)=1", f"timeout)={HANG}"))
        self.cli("dialplan reload")
        print(file=sys.stderr)
        self.make_calls("answers")
        self.end_calls()
        self.daemon.process.send_signal(signal.SIGSTOP)
        self.make_calls("hangs")
        self.daemon.process.send_signal(signal.SIGCONT)
        self.end_calls()
        self.daemon.stop()
        self.make_calls("is down")

    def test_end_of_a_call_outlasts_a_restart_of_the_daemon(self) -> None:
        call = self.phones["caller"].dial(PBX["PJSIP"], "0312345678", caller_id())
        self.phones["201"].leg("ringing").answer()
        (ring, _) = self.messages(2)
        self.daemon.stop()
        call.hang_up()
        deadline = time.monotonic() + CALL_TIMEOUT
        while "Wait(" not in self.cli("core show channels"):
            self.assertLess(time.monotonic(), deadline, "the end is not sent again")
        again = self.enterContext(Daemon(text=self.text))
        again.wait_for_log(f'call .*: end .* uniqueid="{ring["uniqueid"]}"')

    def curl(self) -> bytes:
        """Return the command line of a curl that runs."""
        deadline = time.monotonic() + CALL_TIMEOUT
        while time.monotonic() < deadline:
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):
                    if (line := path.read_bytes()).startswith(b"curl\0"):
                        return line
        raise AssertionError("no curl runs")

    def test_token_is_in_no_process_list_and_no_log(self) -> None:
        self.daemon.process.send_signal(signal.SIGSTOP)  # so that curl can be looked at
        self.phones["caller"].dial(PBX["PJSIP"], "0355550008", caller_id())
        self.assertIn(b"mytoken", self.curl())  # the line that the README warns of
        self.end_calls()
        logged = len(self.log())
        self.talk("0312345678")
        self.talk("0355550007")
        self.assertNotIn(b"mytoken", self.curl())
        self.daemon.process.send_signal(signal.SIGCONT)
        self.end_calls()
        self.daemon.stop()
        self.talk("0312345678")
        self.end_calls()
        self.assertIn("popup-notifier: no reply", self.log()[logged:])
        self.assertNotIn("mytoken", self.log()[logged:])

    def test_call_records_are_those_of_calls(self) -> None:
        self.talk("0312345678")
        self.end_calls()
        records = (ROOT / "var/log/asterisk/cdr-csv/Master.csv").read_text()
        self.assertIn(f'"{CALLER}"', records)
        self.assertNotIn("popup-post", records)

    def test_commands_of_the_readme(self) -> None:
        blocks = [each for each in readme_blocks("sh") if "manager reload" not in each]
        for block in blocks:  # the other is for test_ami.py
            for command in re.findall(r"^asterisk -rx '(.*)'$", block, re.MULTILINE):
                with self.subTest(command):
                    said = self.cli(command)
                    if "originate" in command:
                        (message,) = self.messages(1)
                        self.assertEqual((message["exten"], message["name"]), ("all", "TEST "))
                        self.cli("channel request hangup all")
                    else:
                        self.assertRegex(said, "Originate|CURL")

    if IS_OLD:

        def test_recipes_by_chan_sip(self) -> None:
            self.run_recipes("SIP", RECIPES)


if __name__ == "__main__":
    unittest.main(verbosity=2)
