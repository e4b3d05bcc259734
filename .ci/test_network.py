#!/usr/bin/env python3
"""Real browsers on another machine than the PBX, or so it seems to them.

    python3 .ci/test_network.py

What a browser does depends on where a page and the daemon are: loopback counts as secure and as
local. So this process moves into a network of its own, the PBX's, and a cable leads from there to
a second one, where the browsers run. Needs root, Chromium, Firefox and openssl; whatever it makes
ends with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import ssl
import subprocess
import sys
import tempfile
import time
import unittest
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from test_popup_notifier import (  # noqa: E402
    LOST,
    OPEN,
    TIMEOUT,
    TOASTS,
    Certificates,
    Chromium,
    Daemon,
    Firefox,
    Site,
    Tab,
    WebBrowser,
    free_port,
    toasts,
)

LOCAL = "10.99.0"  # the office, as browsers see it
PUBLIC = "203.0.113"  # the internet, as browsers see it
HOSTS: dict[str, Any] = {"CRMWS_ALLOW": f"{LOCAL}.0/24,{PUBLIC}.0/24"}
NO_CHANCE = "Math.random = () => 0.01;"  # the delay before a new attempt is short
CLONE_NEWNET = 0x40000000
LIBC = ctypes.CDLL(None, use_errno=True)
AWAY = 30.0  # seconds that the cable is cut
PERMISSION = "ブラウザでローカルネットワークへの接続を許可してください"
MIXED = "https のページからは wss: で接続してください"


def run(command: str) -> None:
    """Run a command."""
    subprocess.run(command.split(), check=True)


class Cable:
    """Leads from the PBX's network, which is this process's, to that of the agents' PCs."""

    def __enter__(self) -> Cable:
        self.home = os.open("/proc/self/ns/net", os.O_RDONLY)
        # A network lives as long as a process in it.
        self.keeper = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
        there = f"/proc/{self.keeper.pid}/ns/net"
        while os.path.samefile(there, "/proc/self/ns/net"):  # until unshare has done its work
            time.sleep(0.01)
        self.away = os.open(there, os.O_RDONLY)
        run(f"ip link add pbx type veth peer name pc netns {self.keeper.pid}")
        for name, number in (("pbx", 1), ("pc", 2)):
            with self.pc() if name == "pc" else contextlib.nullcontext():
                for network in (LOCAL, PUBLIC):
                    run(f"ip address add {network}.{number}/24 dev {name}")
                run(f"ip link set {name} up")
                run("ip link set lo up")
        return self

    def __exit__(self, *_: object) -> None:
        self.keeper.kill()
        self.keeper.wait()
        os.close(self.home)
        os.close(self.away)

    @contextlib.contextmanager
    def pc(self) -> Iterator[None]:
        """Let what is started, or connects, in this block do so on the other side."""
        enter_network(self.away)
        try:
            yield
        finally:
            enter_network(self.home)

    def unplug(self) -> None:
        """Pull it out, as both sides can see."""
        run("ip link set pbx down")

    def plug_in(self) -> None:
        """Put it back."""
        run("ip link set pbx up")

    def cut(self) -> None:
        """Let all that is sent get lost, of which neither side hears."""
        run(f"ip neighbour replace {PUBLIC}.2 dev pbx lladdr 02:00:00:00:00:99 nud permanent")
        with self.pc():
            run(f"ip neighbour replace {PUBLIC}.1 dev pc lladdr 02:00:00:00:00:99 nud permanent")

    def mend(self) -> None:
        """Let it lead through again."""
        run(f"ip neighbour del {PUBLIC}.2 dev pbx")
        with self.pc():
            run(f"ip neighbour del {PUBLIC}.1 dev pc")


def enter_network(descriptor: int) -> None:
    """Move this thread into a network (setns(2))."""
    check(LIBC.setns(descriptor, CLONE_NEWNET))


def leave_network() -> None:
    """Move this process into a new network (unshare(2)); nothing else may run in it yet."""
    check(LIBC.unshare(CLONE_NEWNET))


def check(result: int) -> None:
    """Raise what a function of the C library failed with."""
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


class TestNetwork(unittest.TestCase):
    """popup-sample.js on a PC that is not the PBX."""

    stack: contextlib.ExitStack
    cable: Cable
    certificates: Certificates
    browsers: list[WebBrowser]

    @classmethod
    def setUpClass(cls) -> None:
        with contextlib.ExitStack() as stack:
            cls.cable = stack.enter_context(Cable())
            cls.certificates = Certificates(stack.enter_context(tempfile.TemporaryDirectory()))
            with cls.cable.pc():
                cls.browsers = [
                    stack.enter_context(Chromium("--ignore-certificate-errors")),
                    stack.enter_context(Firefox()),
                ]
            cls.stack = stack.pop_all()

    @classmethod
    def tearDownClass(cls) -> None:
        cls.stack.close()

    def open(self, browser: WebBrowser, url: str) -> Tab:
        tab = browser.open(url, NO_CHANCE)
        self.addCleanup(tab.close)
        return tab

    def secure_site(self) -> Site:
        """Return a CRM on the internet, https."""
        keys = self.certificates.make("crm")
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(keys["CERT_FILE"], keys["KEY_FILE"])
        return Site(f"{PUBLIC}.1", tls)

    def test_plain_websocket_from_an_https_page_is_said_in_words(self) -> None:
        with Daemon(**HOSTS) as daemon, self.secure_site() as site:
            for browser in self.browsers:
                with self.subTest(browser.program):
                    url = f"ws://{PUBLIC}.1:{daemon.port}/crmws"
                    tab = self.open(browser, site.page(daemon.port, url=url))
                    self.assertEqual(toasts(tab, 1), [[MIXED]])

    def test_calls_of_half_a_minute_without_network_arrive_once(self) -> None:
        with Daemon(PING_INTERVAL=2, **HOSTS) as daemon, Site(f"{PUBLIC}.1") as site:
            url = f"ws://{PUBLIC}.1:{daemon.port}/crmws"
            pages = [site.coded_page(daemon.port, url=url) for _ in self.browsers]
            tabs = [self.open(*each) for each in zip(self.browsers, pages)]
            self.wait_for_all(tabs, OPEN)
            expected = []
            for number, (lose, find) in enumerate(
                (
                    (self.cable.cut, self.cable.mend),
                    (self.cable.unplug, self.cable.plug_in),
                )
            ):
                with self.subTest(lose.__name__):
                    daemon.trigger(phone=f"{number}1")
                    self.wait_for_all(tabs, f"calls.length === {4 * number + 1}")
                    lose()
                    began = time.monotonic()
                    daemon.trigger(phone=f"{number}2")
                    self.wait_for_all(tabs, LOST)
                    if lose == self.cable.cut:
                        time.sleep(max(began + AWAY - time.monotonic(), 0))
                    daemon.trigger(phone=f"{number}3")
                    find()
                    self.wait_for_all(tabs, OPEN)
                    daemon.trigger(phone=f"{number}4")
                    self.wait_for_all(tabs, f"calls.length >= {4 * number + 4}")
                    expected += [f"{number}{each}" for each in range(1, 5)]
                    for tab in tabs:
                        phones = tab.evaluate("calls.map((call) => call.phone)")
                        self.assertEqual(phones, expected)
            missed = "calls.filter((call) => call.missed).map((call) => call.phone)"
            self.assertEqual([tab.evaluate(missed) for tab in tabs], [["02"]] * len(tabs))

    def wait_for_all(self, tabs: list[Tab], expression: str) -> None:
        for tab in tabs:
            tab.wait_for(expression, 4 * TIMEOUT)

    def test_one_of_several_tabs_shows_a_call_on_a_plain_page(self) -> None:
        with Daemon(**HOSTS) as daemon, Site(f"{PUBLIC}.1") as site:
            url = f"ws://{PUBLIC}.1:{daemon.port}/crmws"
            for browser in self.browsers:
                with self.subTest(browser.program):
                    page = site.coded_page(daemon.port, url=url)
                    tabs = [browser.open(page) for _ in range(3)]
                    for tab in tabs:
                        self.addCleanup(tab.close)
                        self.assertFalse(tab.evaluate("isSecureContext"))
                    self.wait_for_all(tabs, OPEN)
                    for number in range(1, 6):
                        daemon.trigger(phone=str(number))
                        self.wait_for_all(tabs, f"calls.length === {number}")
                        # Set now, this timer comes behind all those that the call has set.
                        for tab in tabs:
                            tab.evaluate(
                                "setTimeout(() => { window.decided = calls.length }, 2000)"
                            )
                        self.wait_for_all(tabs, f"window.decided === {number}")
                        shown = [tab.evaluate(f"{TOASTS}.length") for tab in tabs]
                        self.assertEqual(sum(shown), number, shown)

    def test_local_network_that_is_denied_is_said_in_words(self) -> None:
        keys = {**HOSTS, **self.certificates.make("daemon"), "USE_SSL": "yes"}
        keys["CLIENT_PORT"] = free_port()
        with Daemon(**keys) as daemon, self.secure_site() as site:
            chromium = self.browsers[0]
            url = f"wss://{LOCAL}.1:{keys['CLIENT_PORT']}/crmws"
            for state, seen in (("denied", PERMISSION), ("granted", None)):
                for name in ("local-network-access", "local-network"):
                    chromium.permit(name, state, site.url)
                tab = self.open(chromium, site.coded_page(daemon.port, url=url))
                if seen is None:
                    tab.wait_for(OPEN)
                else:
                    self.assertEqual(toasts(tab, 1), [[seen]])


if __name__ == "__main__":
    leave_network()
    unittest.main()
