/*
 * popup-sample.js: shows who is calling, in any web page. / 着信をウェブページに表示します。貼り付ける行:
 *
 *   <script src="http://pbx:8989/popup-sample.js" data-exten="201"
 *           data-open="https://crm.example/search?phone={phone}"></script>
 *
 * data-exten      my extensions, "201" or "201,202"; without it every call is shown
 * data-open       link in the popup; {phone}, {exten} and {name} are filled in, percent-encoded
 * data-normalise  how {phone} begins there: "0" makes 0312345678 of +81312345678, "+81" the reverse
 * data-url        the daemon, if this script comes from elsewhere: "wss://pbx.example/crmws"
 * data-token      browser token, if the daemon wants one (never SECRET_TOKEN: every reader sees it)
 * data-manual     wait for the page's own code, which may give the same options and two functions:
 *
 *   const n = PopupNotifier.connect({ exten: '201', onCall: (call) => {}, onStatus: (status) => {} });
 * onCall gets { phone, exten, name, event, time, missed, data, ... } in every tab; it returns false: no popup.
 * onStatus gets { state: 'connecting' or 'open', reason, text }; it returns false: no notice in the page.
 * n.askPermission(), on a click: desktop notifications while the page is hidden. n.close() ends it.
 */
(() => {
  'use strict';
  if (window.PopupNotifier) return; // the page loads this script twice

  // --- 1. Options -----------------------------------------------------------
  const FIRST_DELAY = 2000;      // ms: a new attempt comes at a random moment up to this; it doubles
  const LONGEST_DELAY = 30000;   // ms
  const GOOD_CONNECTION = 10000; // ms: after one that held so long the delay is short again
  const CONNECT_TIMEOUT = 20000; // ms: Firefox itself holds attempts back after a failure
  const BEATS = 2.5;             // intervals of silence that mean a dead connection
  const STILL_RINGING = 30000;   // ms: a missed call older than this is listed, never popped up
  const CLAIM_LIFE = 600000;     // ms that a tab keeps a call from the others, which may hear of it late
  const REPEAT = 3000;           // ms: the same for a call without key, which may well come again
  const MAX_KEYS = 20000;        // calls that are known when they come again: those of a whole outage
  const MAX_TOASTS = 5;
  const MAX_RANG = 1000;         // calls that are remembered as mine
  const WITHHELD = /^(anonymous|private|unknown|unavailable|restricted|withheld|非通知)?$/i;
  const WORDS = {
    ring: ['Incoming call', '着信'], missed: ['Missed while offline', '切断中の着信'], exten: ['ext.', '内線'],
    withheld: ['withheld', '非通知'], link: ['Open', '開く'], dismiss: ['Close', '閉じる'],
    open: ['Connected', '接続中'], connecting: ['Not connected, trying again', '接続が切れています。再接続します'],
    gap: ['Connected; calls may be missing', '接続中 (受け取れなかった着信があるかもしれません)'],
    unreachable: ['The PBX cannot be reached', 'PBX に接続できません'],
    permission: ['The browser keeps this page from the local network', 'ブラウザでローカルネットワークへの接続を許可してください'],
    mixed: ['An https page needs a wss: address', 'https のページからは wss: で接続してください'],
    refused: ['The PBX refuses the connection', 'PBX に接続を拒否されました'],
    401: ['The PBX refuses the token (401)', 'トークンが違います (401)'],
    403: ['The PBX refuses this address (403)', 'このアドレスからの接続は許可されていません (403)'],
    426: ['WebSocket does not pass (proxy?)', 'WebSocket が通りません (リバースプロキシの設定?)'],
  };
  const script = document.currentScript;
  const language = () => document.documentElement.lang || navigator.language;
  const say = (key) => WORDS[key][/^ja\b/i.test(language()) ? 1 : 0];
  const splitList = (text = '') => text.toLowerCase().split(/[\s,]+/).filter(Boolean);
  function socketAddress({ url = '/crmws', exten, token }) {
    const address = new URL(url, script.src);
    address.protocol = address.protocol.replace('http', 'ws');
    splitList(exten).forEach((one) => address.searchParams.append('exten', one));
    if (token) address.searchParams.set('token', token);
    return address;
  }

  // --- 2. Connection --------------------------------------------------------
  // Keeps one WebSocket open, until the function that it returns is called.
  function keepConnected(address, receive, report) {
    let socket, timer, notice, heardAt, openedAt, isMixed;
    let patience;      // ms of silence that mean a dead connection
    let position = ''; // the last id of any message: all calls up to it have arrived
    let failures = 0;  // connections in a row that did not hold
    let cause = {};    // why there is none: reason and text, once known

    function open() {
      drop();
      openedAt = Infinity; // not yet
      heardAt = Date.now();
      patience = CONNECT_TIMEOUT;
      address.searchParams.set('since', position);
      try {
        socket = Object.assign(new WebSocket(address.href), { onopen, onmessage, onclose });
      } catch (error) { // ws: from an https page, unless Chrome lets it pass to a private address
        isMixed = true;
        onclose();
      }
    }
    // A dead connection may take minutes to close: nobody waits for it, or hears it again.
    function drop() {
      clearTimeout(timer);
      if (socket) Object.assign(socket, { onopen: null, onmessage: null, onclose: null }).close();
      socket = null;
    }
    function onopen() {
      openedAt = heardAt = Date.now();
      patience = Infinity; // until HELLO promises a beat: the Go daemon has none
      cause = {};
      dismiss(notice);
      report('open');
    }
    function onmessage(event) {
      const message = JSON.parse(event.data);
      heardAt = Date.now();
      if (message.type === 'HELLO') patience = message.interval * 1000 * BEATS;
      position = message.id || position;
      receive(message);
    }
    function onclose() {
      drop();
      failures = Date.now() - openedAt > GOOD_CONNECTION ? 0 : failures + 1;
      // A restart cuts all browsers off at the same moment; chance spreads their return.
      timer = setTimeout(open, Math.random() * Math.min(FIRST_DELAY * 2 ** failures, LONGEST_DELAY));
      if (failures > 1 && openedAt === Infinity) explain();
      report('connecting', cause);
    }
    // Says once why there is no connection; the agent is not told when a PBX is gone for a while.
    async function explain() {
      const found = await findCause(address, isMixed);
      if (openedAt < Infinity || found.reason === cause.reason) return;
      cause = found;
      if (report('connecting', cause) === false || (position && cause.reason === 'unreachable')) return;
      dismiss(notice);
      notice = showToast('notice', cause.text);
    }
    // After a sleep readyState says OPEN for a long time; the age of the last message tells.
    function look({ type }) {
      if (document.hidden && type !== 'online') return;
      if (socket && Date.now() - heardAt > patience) onclose();
      if (type === 'online' || (type !== 'tick' && !socket)) open();
    }
    const ticker = setInterval(look, 1000, { type: 'tick' });
    const listening = new AbortController();
    ['online', 'pageshow', 'visibilitychange'].forEach((type) => window.addEventListener(type, look, listening));
    timer = setTimeout(open, 0); // not at once: the page has no `n` yet
    return () => {
      drop();
      clearInterval(ticker);
      listening.abort();
      dismiss(notice);
    };
  }

  // The browser hides why a handshake was refused; the daemon's answer to a plain GET tells.
  async function findCause({ href }, isMixed) {
    const answer = await fetch(href.replace('ws', 'http'), { signal: AbortSignal.timeout(5000) }).catch(() => null);
    if (answer) {
      const reason = answer.status in WORDS ? answer.status : 'refused';
      return { reason, text: `${say(reason)}: ${(await answer.text()).slice(0, 200)}` };
    }
    // A public page may reach a private address only with permission, by either name. Plain http pages are told
    // "denied" of any address, also of those that they may reach.
    const isDenied = async (name) => (await navigator.permissions.query({ name })).state === 'denied';
    const names = window.isSecureContext ? ['local-network-access', 'local-network'] : [];
    const denials = await Promise.all(names.map((name) => isDenied(name).catch(() => false)));
    const reason = isMixed ? 'mixed' : denials.includes(true) ? 'permission' : 'unreachable';
    return { reason, text: say(reason) };
  }

  // --- 3. Dispatch ----------------------------------------------------------
  function connect(given) {
    const options = Object.assign({ onCall() {}, onStatus() {} }, script.dataset, given);
    const mine = splitList(options.exten);
    const rang = new Set(); // uniqueid of the calls that are mine
    const keys = new Set(); // of the messages that came
    let ahead = 0;          // ms that the server's clock is ahead of ours

    const report = (state, cause) => options.onStatus(Object.assign({ state, reason: '', text: say(state) }, cause));
    function receive(message) {
      if (message.type !== 'CALL_IN') ahead = message.time - Date.now();
      else if (!isRepeated(message.key)) callIn(readCall(message));
      if (message.type === 'HELLO' && !message.complete) report('open', { reason: 'gap', text: say('gap') });
    }
    // A call may come again after an outage, also from another daemon: its key is the same.
    function isRepeated(key) {
      if (key && keys.has(key)) return true;
      if (key && keys.add(key).size > MAX_KEYS) keys.delete(keys.values().next().value);
      return false;
    }
    // The Go daemon's calls have no key, no time, and their fields in `data` alone.
    function readCall({ key, time, data }) {
      const { phone = '', exten = 'all', name = '', event = 'ring', uniqueid = key } = data;
      const triggeredAt = time || Date.now() + ahead;
      const missed = Date.now() + ahead - triggeredAt > STILL_RINGING;
      return { key, phone: phone.trim(), exten, name, event, uniqueid, time: new Date(triggeredAt), missed, data };
    }
    function callIn(call) {
      const { event, exten, uniqueid } = call;
      if (!mine.length || splitList(exten).some((one) => one === 'all' || mine.includes(one))) {
        const isNew = event === 'ring' || (event === 'answer' && !(uniqueid && rang.has(uniqueid)));
        if (rang.add(uniqueid).size > MAX_RANG) rang.delete(rang.values().next().value);
        if (options.onCall(call) !== false && isNew) popUp(call);
      } else if (event !== 'ring') {
        rang.delete(uniqueid);
        toastsOf(uniqueid).forEach(dismiss);
      }
    }
    async function popUp(call) {
      const isOurs = await claim(call).catch(() => true); // storage is blocked: better twice than never
      if (!isOurs || !rang.has(call.uniqueid)) return;    // or somebody else has answered meanwhile
      toastsOf(call.uniqueid).forEach(dismiss);           // it rings again
      const toast = showCall(call, options);
      if (document.hidden && !call.missed) notify(toast);
    }
    const close = keepConnected(socketAddress(options), receive, report);
    return { close, askPermission: async () => Notification.requestPermission() };
  }

  // Of several tabs one shows the call; the visible one waits least. Transactions of a database come one after
  // the other, whichever tab they are of; plain http pages have them too (but no Web Locks).
  async function claim({ key, phone, exten }) {
    const sleep = (ms) => new Promise((resolve) => { setTimeout(resolve, ms); });
    const done = (request) => new Promise((resolve, reject) => {
      Object.assign(request, { onsuccess: () => resolve(request.result), onerror: () => reject(request.error) });
    });
    const [call, life] = key ? [key, CLAIM_LIFE] : [`${phone} ${exten}`, REPEAT];
    await sleep((document.hidden ? 300 : 0) + (document.hasFocus() ? 0 : 100 * Math.random()));
    const opening = indexedDB.open('popup-notifier');
    opening.onupgradeneeded = () => opening.result.createObjectStore('claims');
    const database = await done(opening);
    try {
      const claims = database.transaction('claims', 'readwrite').objectStore('claims');
      const [calls, times, now] = [await done(claims.getAllKeys()), await done(claims.getAll()), Date.now()];
      calls.filter((_, index) => now - times[index] > CLAIM_LIFE).forEach((old) => claims.delete(old));
      const isFree = !(now - times[calls.indexOf(call)] < life);
      if (isFree) await done(claims.put(now, call));
      return isFree;
    } finally { database.close(); }
  }

  // --- 4. Toast -------------------------------------------------------------
  const STYLE = `
    :host { all: initial !important }
    section { position: fixed; right: 0; bottom: 0; z-index: 2147483647; width: min(380px, 100vw); max-height: 100vh;
      box-sizing: border-box; padding: 16px; overflow: auto; display: grid; gap: 10px; pointer-events: none }
    article { --line: #1a7f37; position: relative; padding: 12px 44px 12px 16px; border: 1px solid #8886;
      border-left: 5px solid var(--line); border-radius: 8px; background: #fff; color: #1f2328;
      box-shadow: 0 6px 24px #0004; font: 15px/1.45 system-ui; overflow-wrap: anywhere; pointer-events: auto }
    .missed { --line: #9a6700 } .notice { --line: #cf222e } a, b { color: var(--line) }
    p { margin: 0; unicode-bidi: isolate } p:nth-of-type(2) { font-size: 1.5em; font-weight: 600 }
    button { position: absolute; top: 6px; right: 6px; width: 32px; height: 32px; border: 0; border-radius: 6px;
      background: none; color: inherit; font: 20px/1 system-ui; cursor: pointer }
    @media (prefers-color-scheme: dark) { article { --line: #3fb950; background: #1c2128; color: #e6edf3 }
      .missed { --line: #d29922 } .notice { --line: #ff7b72 } }`;

  const host = element('popup-notifier', {});
  const root = host.attachShadow({ mode: 'open' }); // where the page's styles do not reach
  const stack = root.appendChild(element('section', {}));
  const toasts = () => [...stack.children];
  const toastsOf = (uniqueid) => toasts().filter((toast) => uniqueid && toast.uniqueid === uniqueid);
  root.adoptedStyleSheets = [new CSSStyleSheet()]; // which no Content-Security-Policy of the page stops
  root.adoptedStyleSheets[0].replaceSync(STYLE);
  document.documentElement.append(host);
  document.addEventListener('keydown', (event) => {
    if (event.key !== 'Escape' || event.isComposing || event.defaultPrevented) return;
    dismiss(root.activeElement ? root.activeElement.closest('article') : toasts().pop());
  });

  // Strings become text nodes: nothing that a caller sends is ever read as markup.
  function element(tag, attributes, ...children) {
    const node = document.createElement(tag);
    Object.keys(attributes).forEach((name) => node.setAttribute(name, attributes[name]));
    node.append(...children);
    return node;
  }

  function showToast(kind, ...lines) {
    if (toasts().length >= MAX_TOASTS) dismiss(stack.querySelector('.missed') || stack.firstChild);
    const button = element('button', { 'aria-label': say('dismiss') }, '×');
    const attributes = { class: kind, role: kind === 'ring' ? 'alert' : 'status', lang: language() };
    const toast = element('article', attributes, ...lines.map((line) => element('p', {}, line)), button);
    button.onclick = () => dismiss(toast);
    return stack.appendChild(toast);
  }

  function showCall(call, options) {
    const { phone, exten, name, time, uniqueid } = call;
    const kind = call.missed ? 'missed' : 'ring';
    const called = exten === 'all' ? '' : `${say('exten')} ${exten}`;
    const isWithheld = WITHHELD.test(phone);
    const toast = showToast(kind, element('b', {}, say(kind)), isWithheld ? say('withheld') : phone, name);
    toast.firstChild.append(` ${called} ${time.toTimeString().slice(0, 5)}`);
    const link = element('a', { href: fillIn(call, options), target: '_blank', rel: 'noopener' }, say('link'));
    if (options.open && !isWithheld && /^https?:$/.test(link.protocol)) toast.append(link);
    return Object.assign(toast, { uniqueid });
  }

  // +81312345678 and 0312345678 are one number, but a CRM may know only one of them.
  function fillIn({ phone, exten, name }, { open = '', normalise }) {
    const values = { phone, exten, name };
    if (normalise === '0') values.phone = phone.replace(/^\+81/, '0');
    if (normalise === '+81') values.phone = phone.replace(/^0(?!0|10)/, '+81');
    return open.replace(/\{(phone|exten|name)\}/g, (_, key) => encodeURIComponent(values[key]));
  }

  function notify(toast) {
    if (!window.Notification || Notification.permission !== 'granted') return;
    const [title, phone, name] = [...toast.querySelectorAll('p')].map((line) => line.textContent);
    toast.notification = new Notification(title, { body: `${phone} ${name}`, tag: toast.uniqueid });
    toast.notification.onclick = () => window.focus();
  }

  function dismiss(toast) {
    if (!toast) return;
    toast.remove();
    if (toast.notification) toast.notification.close();
  }

  window.PopupNotifier = { connect };
  if (!('manual' in script.dataset)) connect();
})();
