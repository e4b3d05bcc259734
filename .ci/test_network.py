#!/usr/bin/env python3
"""Real browsers that reach the daemon and the CRM over a network, as root.

The main suite has all on loopback, which browsers hold for secure and for as near as can be. Here
a PC and a PBX, each a network namespace, hang on a switch, which is one too. None has a name
outside, and all end with the processes in them.
"""

from __future__ import annotations

import contextlib
import json
import ssl
import sys
import tempfile
import time
import unittest
from pathlib import Path
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from test_popup_notifier import (
    LOST,
    NO_CHANCE,
    OPEN,
    TIMEOUT,
    Certificates,
    Chromium,
    Daemon,
    Firefox,
    Namespace,
    Site,
    Tab,
    cause,
    free_port,
    needs,
    needs_namespaces,
    toasts,
)

# The PBX and the PC, on a local network and on one that browsers hold for the internet.
LOCAL = "10.77.0.1", "10.77.0.2"
PUBLIC = "203.0.113.1", "203.0.113.2"
STILL_RINGING = 30.0  # seconds after which the page lists a call as missed

# Keeps every popup's number, also when the popup has gone.
WATCH_POPUPS = """
    window.shown = [];
    document.addEventListener('DOMContentLoaded', () => {
      const stack = document.querySelector('popup-notifier').shadowRoot.querySelector('section');
      const numbers = ({ addedNodes }) => [...addedNodes]
        .filter((node) => node.tagName === 'ARTICLE')
        .map((card) => card.querySelector('.number').textContent);
      const keep = (change) => shown.push(...numbers(change));
      const options = { childList: true, subtree: true };
      new MutationObserver((changes) => changes.forEach(keep)).observe(stack, options);
    });"""


class Office:
    """A PC and a PBX on a switch."""

    def __init__(self) -> None:
        with contextlib.ExitStack() as stack:
            self.switch, self.pbx, self.pc = (stack.enter_context(Namespace()) for _ in range(3))
            self.switch.run("ip link add name switch type bridge")
            self.switch.run("ip link set switch up")
            for number, (name, side) in enumerate((("pbx", self.pbx), ("pc", self.pc))):
                end = f"type veth peer name cable netns {side.holder.pid}"
                self.switch.run(f"ip link add name {name} {end}")
                self.switch.run(f"ip link set {name} master switch up")
                for addresses in (LOCAL, PUBLIC):
                    side.run(f"ip address add {addresses[number]}/24 dev cable")
                side.run("ip link set cable up")
            self.stack = stack.pop_all()

    def __enter__(self) -> Office:
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()


class OfficeChromium(Chromium):
    """Chromium that takes our certificate, and whose user has answered what pages will ask for."""

    opens_windows = False  # instead of tabs
    takes_ws = True  # from an https page to a private address, which can hardly have a certificate

    def __init__(self) -> None:
        super().__init__("--ignore-certificate-errors")

    def call(self, method: str, params: dict[str, Any], **top: Any) -> dict[str, Any]:
        if method == "Target.createTarget":
            params = {**params, "newWindow": self.opens_windows}
        return super().call(method, params, **top)

    def answer(self, name: str, is_yes: bool, origin: str) -> None:
        """Have the user's answer to a question that comes later.

        What DevTools set is not the same: there each name has a state of its own, whereas an
        answer shows under all names of the permission.
        """
        answer = {"setting": 1 if is_yes else 2}
        settings = {"exceptions": {name.replace("-", "_"): {f"{origin},*": answer}}}
        path = Path(self.profile, "Default", "Preferences")
        path.parent.mkdir()
        path.write_text(json.dumps({"profile": {"content_settings": settings}}))


class OfficeFirefox(Firefox):
    """Firefox whose user has answered what pages will ask for."""

    opens_windows = False  # instead of tabs
    takes_ws = False
    # It asks before WebSockets reach the local network, too, which so far is not the default.
    preferences: ClassVar[dict[str, str]] = {
        **Firefox.preferences,
        "network.lna.websocket.enabled": "true",
    }

    def __init__(self) -> None:
        super().__init__()
        self.answers: list[dict[str, Any]] = []

    def begin(self) -> None:
        super().begin()
        for each in self.answers:
            self.call("permissions.setPermission", each)

    def call(self, method: str, params: dict[str, Any], **top: Any) -> dict[str, Any]:
        if method == "browsingContext.create" and self.opens_windows:
            params = {"type": "window"}
        return super().call(method, params, **top)

    def answer(self, name: str, is_yes: bool, origin: str) -> None:
        """Have the user's answer to a question that comes later."""
        permission = {"descriptor": {"name": name}, "state": "granted" if is_yes else "denied"}
        self.answers.append({**permission, "origin": origin})


class NetworkTests(unittest.TestCase):
    """popup-sample.js across a network; below there is a class for each browser."""

    browser_class: type[OfficeChromium | OfficeFirefox]
    browser: OfficeChromium | OfficeFirefox
    office: Office
    plain: Site  # http://, local
    secure: Site  # https://, local
    public: Site  # https://, in the internet
    keys: dict[str, str]
    stack: contextlib.ExitStack

    @classmethod
    def setUpClass(cls) -> None:
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            cls.keys = Certificates(folder).make("office")
            tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            tls.load_cert_chain(cls.keys["CERT_FILE"], cls.keys["KEY_FILE"])
            cls.office = stack.enter_context(Office())
            cls.plain, cls.secure, cls.public = (
                stack.enter_context(cls.office.pbx.call(Site, host, context))
                for host, context in ((LOCAL[0], None), (LOCAL[0], tls), (PUBLIC[0], tls))
            )
            cls.browser = cls.browser_class()
            cls.office.pc.call(stack.enter_context, cls.browser)
            cls.stack = stack.pop_all()

    @classmethod
    def tearDownClass(cls) -> None:
        cls.stack.close()

    def daemon(self, **keys: object) -> Daemon:
        """Return a daemon on the PBX that ends with the test; `wss_port` is for wss:."""
        self.wss_port = free_port()
        settings = {"CLIENT_PORT": self.wss_port, "USE_SSL": "yes", **self.keys, **keys}
        allowed = f"{LOCAL[1]},{PUBLIC[1]}"
        daemon: Daemon = self.office.pbx.call(Daemon, CRMWS_ALLOW=allowed, **settings)
        self.addCleanup(daemon.__exit__, None, None, None)
        return daemon.__enter__()

    def trigger(self, daemon: Daemon, *phones: str, query: str = "") -> None:
        """Trigger calls on the PBX itself, one after the other."""
        for phone in phones:
            self.assertEqual(self.office.pbx.call(daemon.trigger, query, phone=phone), 200)

    def open(self, site: Site, url: str, before: str = "", **data: str) -> Tab:
        """Return a page of the CRM, whose script connects to this address."""
        page = site.coded_page(0, data.pop("lang", "en"), url=url, **data)
        tab = self.browser.open(page, NO_CHANCE + before)
        self.addCleanup(tab.close)
        return tab

    def open_connected(self, site: Site, url: str, before: str = "", **data: str) -> Tab:
        """Return such a page once it is connected."""
        tab = self.open(site, url, before, **data)
        tab.wait_for(OPEN)
        return tab

    def hide(self, tab: Tab) -> None:
        """Bring another tab to the front."""
        other = self.browser.open("about:blank#")
        self.addCleanup(other.close)
        other.activate()
        tab.wait_for("document.hidden")

    # Pages that are, or are not, secure.

    def test_https_page_with_a_ws_address_is_said_in_words(self) -> None:
        daemon = self.daemon()
        for lang, text in (
            ("en", "An https page needs a wss: address"),
            ("ja", "https のページからは wss: で接続してください"),
        ):
            with self.subTest(lang):
                tab = self.open(self.public, f"ws://{PUBLIC[0]}:{daemon.port}/crmws", lang=lang)
                self.assertEqual(cause(tab), text)
                self.assertTrue(tab.evaluate("isSecureContext"))

    def test_https_page_with_a_wss_address(self) -> None:
        daemon = self.daemon()
        for site, host in ((self.secure, LOCAL[0]), (self.public, PUBLIC[0])):
            with self.subTest(site.url):
                tab = self.open_connected(site, f"wss://{host}:{self.wss_port}/crmws")
                self.trigger(daemon, "1")
                self.assertEqual(toasts(tab, 1)[0][1], "1")

    def open_plain(self, daemon: Daemon, before: str) -> list[Tab]:
        """Return three connected pages that no browser holds for secure."""
        pages = []
        for _ in range(3):  # they draw lots: not with NO_CHANCE
            address = self.plain.coded_page(0, url=f"ws://{LOCAL[0]}:{daemon.port}/crmws")
            page = self.browser.open(address, before)
            self.addCleanup(page.close)
            page.wait_for(OPEN)
            secure = page.evaluate("[isSecureContext, 'locks' in navigator]")
            self.assertEqual(secure, [False, False])
            pages.append(page)
        return pages

    def test_one_of_several_plain_http_tabs_shows_a_call(self) -> None:
        daemon = self.daemon()
        tabs = self.open_plain(daemon, WATCH_POPUPS)
        tabs[1].activate()
        for tab, is_hidden in zip(tabs, ("true", "false", "true")):
            tab.wait_for(f"document.hidden === {is_hidden}")
        self.share_calls(daemon, tabs)

    def test_one_of_several_plain_http_windows_shows_a_call(self) -> None:
        # All in front, they hurry alike; headless Chromium says of each that it has the focus.
        daemon = self.daemon()
        self.browser.opens_windows = True
        self.addCleanup(setattr, self.browser, "opens_windows", False)
        self.share_calls(daemon, self.open_plain(daemon, WATCH_POPUPS))

    def share_calls(self, daemon: Daemon, pages: list[Tab]) -> None:
        """Trigger ten calls, each of which one of the pages must show."""
        phones = [str(number) for number in range(10)]
        for count, phone in enumerate(phones, 1):
            self.trigger(daemon, phone)
            for page in pages:
                page.wait_for(f"calls.length === {count}")
        self.assertEqual(sorted(self.shown_in_all(pages)), phones)

    def shown_in_all(self, pages: list[Tab]) -> list[str]:
        """Return the numbers that popped up in any of the pages, once they have decided."""
        shown = []
        for page in pages:
            # Set now, this timer comes behind all those that the calls have set.
            page.evaluate("new Promise((done) => setTimeout(done, 2000))")
            shown += page.evaluate("shown")
        return shown

    def test_plain_http_page_of_a_pbx_that_is_not_there(self) -> None:
        tab = self.open(self.plain, f"ws://{LOCAL[0]}:{free_port()}/crmws")
        self.assertEqual(cause(tab), "The PBX cannot be reached")

    # A page from the internet, and its user's answer.

    def start(self, name: str, is_yes: bool) -> None:
        """Use a browser whose user has answered a question of the public page's."""
        browser = self.browser_class()
        browser.answer(name, is_yes, self.public.url)
        self.office.pc.call(browser.__enter__)
        self.addCleanup(browser.__exit__, None, None, None)
        self.browser = browser

    def local_urls(self, daemon: Daemon) -> list[str]:
        """Return the addresses of a daemon in the office that an https page may use."""
        urls = [f"wss://{LOCAL[0]}:{self.wss_port}/crmws", f"ws://{LOCAL[0]}:{daemon.port}/crmws"]
        return urls[: 1 + self.browser_class.takes_ws]

    def test_permission_for_the_local_network_is_granted(self) -> None:
        daemon = self.daemon()
        self.start("local-network", True)
        for url in self.local_urls(daemon):
            with self.subTest(url):
                tab = self.open_connected(self.public, url)
                self.trigger(daemon, "1")
                self.assertEqual(toasts(tab, 1)[0][1], "1")
        daemon.stop()
        tab = self.open(self.public, url)
        self.assertEqual(cause(tab), "The PBX cannot be reached")

    def test_permission_for_this_pc_is_granted(self) -> None:
        daemon: Daemon = self.office.pc.call(Daemon)
        self.addCleanup(daemon.__exit__, None, None, None)
        daemon.__enter__()
        self.start("loopback-network", True)
        tab = self.open_connected(self.public, f"ws://127.0.0.1:{daemon.port}/crmws")
        self.office.pc.call(daemon.trigger, phone="1")
        self.assertEqual(toasts(tab, 1)[0][1], "1")

    def test_permission_for_the_local_network_is_denied(self) -> None:
        urls = self.local_urls(self.daemon())
        self.start("local-network", False)
        for lang, text in (
            ("en", "The browser keeps this page from the local network"),
            ("ja", "ブラウザでローカルネットワークへの接続を許可してください"),
        ):
            for url in urls:
                with self.subTest(url, lang=lang):
                    tab = self.open(self.public, url, lang=lang)
                    self.assertEqual(cause(tab), text)

    # A cable that is pulled.

    def cut_and_mend(
        self, side: Namespace, link: str, *, is_noticed: bool = True, seconds: float = 0
    ) -> None:
        """Pull a cable while calls come; each must arrive once and in order after all."""
        daemon = self.daemon(PING_INTERVAL=1)
        tab = self.open_connected(self.plain, f"ws://{LOCAL[0]}:{daemon.port}/crmws")
        self.trigger(daemon, "1", "2")
        tab.wait_for("calls.length === 2")
        side.run(f"ip link set {link} down")
        try:
            if is_noticed:
                tab.wait_for(LOST)
            self.trigger(daemon, "3", "4", "5")
            time.sleep(seconds)
        finally:
            side.run(f"ip link set {link} up")
        tab.wait_for("calls.length >= 5", 3 * TIMEOUT)
        tab.wait_for(OPEN)
        self.trigger(daemon, "6")
        tab.wait_for("calls.length >= 6", 3 * TIMEOUT)
        self.assertEqual(tab.evaluate("calls.map((call) => call.phone)"), list("123456"))
        keys = tab.evaluate("calls.map((call) => call.key)")
        self.assertEqual(len(set(keys)), 6, keys)
        missed = tab.evaluate("calls.filter((call) => call.missed).map((call) => call.phone)")
        self.assertEqual(missed, list("345") if seconds > STILL_RINGING else [])

    def test_cable_of_the_pc_is_pulled(self) -> None:
        self.cut_and_mend(self.office.pc, "cable")

    def test_cable_of_the_pbx_is_pulled_for_half_a_minute(self) -> None:
        self.cut_and_mend(self.office.switch, "pbx", seconds=STILL_RINGING + 1)

    def test_cable_is_pulled_for_a_moment(self) -> None:
        self.cut_and_mend(self.office.switch, "pbx", is_noticed=False)


@needs_namespaces
@needs("chromium", "openssl")
class TestChromium(NetworkTests):
    browser_class = OfficeChromium


@needs_namespaces
@needs("firefox-esr", "openssl")
class TestFirefox(NetworkTests):
    browser_class = OfficeFirefox


del NetworkTests  # unittest would run it by itself


if __name__ == "__main__":
    unittest.main(verbosity=2)
