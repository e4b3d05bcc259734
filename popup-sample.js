/*
 * popup-sample.js: shows who is calling, in any web page. / 着信をウェブページに表示します。貼り付ける行:
 *
 *   <script src="http://pbx:8989/popup-sample.js" data-exten="201"
 *           data-open="https://crm.example/search?phone={phone}"></script>
 *
 * data-exten      my extensions, "201" or "201,202"; without it every call is shown
 * data-open       link in the popup; {phone}, {exten}, {name} are filled in (data-target: its window)
 * data-normalise  how the CRM writes {phone}: "0" makes 0312345678 of +81312345678, "+81" the reverse
 * data-url        the daemon, if this script comes from elsewhere: "wss://pbx.example/crmws"
 * data-token      browser token, if the daemon wants one (never SECRET_TOKEN: every reader sees it)
 * data-manual     do not connect: the page does it by code, with the same options and two functions:
 *
 *   const n = PopupNotifier.connect({ exten: '201', onCall: (call) => {}, onStatus: (status) => {} });
 *
 * onCall runs in every tab for each call that concerns it; false: no popup. call = { id, phone, exten, name, time,
 *   event: 'ring' | 'answer' | 'end', replayed, missed, data }. onStatus: { state: 'connecting' | 'open' | 'waiting' |
 *   'closed', reason, text, since }; false: no notice in the page. Also n.status, n.show({ phone, exten, name }),
 *   n.close(), and on a click n.askPermission(): desktop notifications while the page is hidden.
 */
(() => {
  'use strict';
  if (window.PopupNotifier) return; // the page loads this script twice

  // --- 1. Options -----------------------------------------------------------

  const FIRST_DELAY = 2000, LONGEST_DELAY = 30000; // ms before a new attempt: random up to the first, then doubling
  const GOOD_CONNECTION = 10000; // ms: one that held so long makes the next delay short again
  const CONNECT_TIMEOUT = 20000; // ms: long, for Firefox itself holds attempts back after a failure
  const DEFAULT_BEAT = 25000;    // ms: PING_INTERVAL of the daemon, unless HELLO tells
  const TICK = 2000;             // ms between two looks at the silence; a hidden tab may look once a minute,
  const SLEPT = 90000;           // ms without a look, therefore: the PC slept
  const STILL_RINGING = 30000;   // ms: a missed call older than this is listed, never popped up
  const CLAIM_LIFE = 600000;     // ms that a tab keeps a call from the others, which may hear of it late
  const REPEAT = 3000;           // ms: the same for a call without id, which may well come again
  const SETTLE = 60;             // ms until all tabs read the same in localStorage
  const MAX_TOASTS = 5;

  const EN = {
    ring: 'Incoming call', answer: 'Answered', end: 'Ended', missed: 'Missed while offline', exten: 'ext.', link: 'Open',
    withheld: 'withheld', dismiss: 'Close', connecting: 'Connecting', open: 'Connected', closed: 'Closed',
    gap: 'Connected; calls may be missing', waiting: 'Connection lost, trying again', unreachable: 'The PBX cannot be reached',
    address: 'The PBX refuses this address (403)', token: 'The PBX refuses the token (401)', mixed: 'An https page needs wss:',
    full: 'The PBX takes no more browsers (503)', alien: 'What answers there is not popup-notifier (404)',
    proxy: 'The PBX answers, but WebSocket does not pass (proxy?)',
    permission: 'The PBX cannot be reached: allow this page the local network in the browser',
  };
  const JA = {
    ring: '着信', answer: '応答', end: '終了', missed: '切断中の着信', exten: '内線', link: '開く', withheld: '非通知',
    dismiss: '閉じる', connecting: '接続しています', open: '接続中', closed: '終了', waiting: '切断されました。再接続します',
    gap: '接続中 (受け取れなかった着信があるかもしれません)', unreachable: 'PBX に接続できません',
    address: 'このアドレスからの接続は許可されていません (403)', token: 'トークンが違います (401)',
    full: '接続数の上限に達しています (503)', alien: '接続先が popup-notifier ではありません (404)',
    proxy: 'WebSocket が通りません (逆プロキシの設定?)', mixed: 'https のページからは wss: で接続してください',
    permission: 'PBX に接続できません。ブラウザでローカルネットワークへのアクセスを許可してください',
  };
  const REFUSALS = { 401: 'token', 403: 'address', 426: 'proxy', 502: 'unreachable', 503: 'full', 504: 'unreachable' };
  const WITHHELD = /^(anonymous|private|unknown|unavailable|restricted|withheld|非通知)?$/i;

  const script = document.currentScript || { dataset: {}, src: location.href };
  const language = () => document.documentElement.lang || navigator.language;
  const say = (key) => (/^ja\b/i.test(language()) ? JA : EN)[key];
  const sleep = (ms) => new Promise((resolve) => { setTimeout(resolve, ms); });
  const splitList = (text) => String(text || '').toLowerCase().split(/[\s,]+/).filter(Boolean);

  function socketAddress({ url, exten, token }) {
    const address = new URL(url || '/crmws', script.src);
    address.protocol = address.protocol.replace('http', 'ws');
    if (address.pathname === '/') address.pathname = '/crmws';
    splitList(exten).forEach((one) => address.searchParams.append('exten', one));
    if (token) address.searchParams.set('token', token);
    return address;
  }

  // --- 2. Connection --------------------------------------------------------

  // Keeps one WebSocket open; `position` gives the id to continue from. Returns the way to end it.
  function keepConnected(address, position, receive, report) {
    let socket, timer, notice, cause; // cause: why it fails, once that is known
    let delay = FIRST_DELAY, failures = 0; // failures: attempts in a row that never opened
    let heardAt, openedAt, beat, lookedAt = Date.now(); // beat: time between signs of life, 0: none promised
    const retry = (wait) => { clearTimeout(timer); timer = setTimeout(open, wait); };

    function open() {
      drop();
      [heardAt, openedAt, beat] = [Date.now(), 0, 0];
      report('connecting');
      address.searchParams.set('since', position());
      try {
        socket = Object.assign(new WebSocket(address.href), { onopen: opened, onmessage: heard, onclose: lost });
      } catch (error) { lost(); } // ws: from an https page
    }
    function opened() {
      heardAt = openedAt = Date.now();
      [failures, cause, notice] = [0, '', dismiss(notice)];
      report('open');
    }
    function heard({ data }) {
      heardAt = Date.now();
      beat = receive(JSON.parse(data)) || beat;
    }
    // A dead connection may take minutes to close: nobody waits for it or hears it again.
    function drop() {
      clearTimeout(timer);
      if (socket) Object.assign(socket, { onopen: null, onmessage: null, onclose: null }).close();
      socket = null;
    }
    function lost() {
      drop();
      if (!openedAt) failures += 1;
      else if (Date.now() - openedAt > GOOD_CONNECTION) delay = FIRST_DELAY;
      // A restart cuts all browsers off at the same moment; chance spreads their return.
      retry(delay * (delay > FIRST_DELAY ? 0.5 + Math.random() / 2 : Math.random()));
      delay = Math.min(delay * 2, LONGEST_DELAY);
      report('waiting', cause);
      if (failures > 1) explain();
    }
    // Says once why there is no connection. What does not go away by itself is worth a long wait.
    async function explain() {
      const [found, detail] = await findCause(address);
      if (socket || !failures || (found === 'proxy' && failures < 4)) return;
      if (found !== 'unreachable') retry(LONGEST_DELAY * (1 + Math.random() / 2));
      if (report('waiting', found, detail) === false || found === cause) return;
      cause = found;
      notice = reveal(addToast('notice', 'status', element('p', {}, say(found) + detail)), dismiss(notice));
      console.warn('popup-notifier:', say(found) + detail);
    }
    // Asks how old the last message is: after a sleep, readyState says OPEN for a long time.
    function look({ type }) {
      const pause = Date.now() - lookedAt;
      lookedAt += pause;
      if (pause < 0) heardAt = lookedAt; // the clock was set back
      const isAwake = type === 'online' || pause > SLEPT;
      if (document.hidden && !isAwake) return;
      const patience = openedAt ? beat * 2.5 : CONNECT_TIMEOUT;
      const isDead = socket && patience && Date.now() - heardAt > patience;
      if (isDead && !openedAt) return lost();
      if (!isAwake && !isDead && (socket || type === 'tick')) return;
      delay = FIRST_DELAY;
      open();
    }
    const [ticker, end] = [setInterval(look, TICK, { type: 'tick' }), new AbortController()];
    ['online', 'pageshow', 'visibilitychange'].forEach((type) => window.addEventListener(type, look, end));
    retry(0); // not at once: the page has no `n` yet
    return () => { drop(); clearInterval(ticker); end.abort(); };
  }

  // The browser hides why a handshake was refused; the daemon's answer to a plain GET tells.
  async function findCause({ href, protocol, hostname }) {
    const isLocal = /^(localhost|127\..*|\[::1\])$/.test(hostname);
    if (location.protocol === 'https:' && protocol === 'ws:' && !isLocal) return ['mixed', ''];
    const get = (mode) => fetch(href.replace('ws', 'http'), { mode, signal: AbortSignal.timeout(2000) });
    try {
      const answer = await get('cors');
      const isSentence = /^text\/plain/.test(answer.headers.get('Content-Type'));
      return [REFUSALS[answer.status] || 'alien', isSentence ? `: ${(await answer.text()).trim().slice(0, 200)}` : ''];
    } catch (error) {
      if (await get('no-cors').catch(() => false)) return ['alien', '']; // an answer that no page may read
      // Chrome asks the user before a page may reach a private address; until then all waits.
      const ask = async (name) => (await navigator.permissions.query({ name })).state;
      const names = ['local-network-access', 'local-network', 'loopback-network'];
      const states = await Promise.all(names.map((name) => ask(name).catch(() => 'unknown')));
      const isBarred = states.includes('denied') || (states.includes('prompt') && error.name === 'TimeoutError');
      return [isBarred ? 'permission' : 'unreachable', ''];
    }
  }

  // --- 3. Dispatch ----------------------------------------------------------

  function connect(given) {
    const options = Object.assign({}, script.dataset, given);
    const [address, mine] = [socketAddress(options), splitList(options.exten)];
    let lastId = '', helloId = ''; // all calls up to lastId have arrived

    // A mistake in the page's own function must not cost the popup.
    function run(callback, argument) {
      try { return callback && callback(argument); } catch (error) { return console.error(error); }
    }
    function report(state, reason = '', detail = '') {
      n.status = { state, reason, text: say(reason || state) + detail, since: new Date() };
      return run(options.onStatus, n.status);
    }
    function receive(message) {
      if (message.type === 'CALL_IN') callIn(readCall(message));
      if (message.type === 'ALIVE') pass(message.id || helloId);
      if (message.type !== 'HELLO') return 0;
      helloId = message.id; // not yet passed: what was missed comes behind. But were the server's clock
      if (!lastId || rank(helloId) < rank(lastId)) lastId = helloId; // set back, every call would look old
      if (message.complete === false) report('open', 'gap');
      return message.interval * 1000 || DEFAULT_BEAT;
    }
    function pass(id) {
      const isNews = rank(id) > rank(lastId);
      if (isNews) lastId = id;
      return isNews;
    }
    // The Go daemon's calls have no id, and their fields in `data` alone.
    function readCall({ id = '', replayed = false, data }) {
      const { phone = '', exten = 'all', name = '', event } = data;
      const sentAt = parseInt(id, 10); // by the server's clock, as is the id of HELLO
      return {
        id, phone: String(phone).trim(), exten: String(exten), name: String(name), data, replayed,
        event: event === 'answer' || event === 'end' ? event : 'ring', time: new Date(sentAt || Date.now()),
        missed: replayed && parseInt(helloId, 10) - sentAt > STILL_RINGING,
      };
    }
    function callIn(call) {
      if (call.id && !pass(call.id)) return;
      const { event, exten, data: { uniqueid } } = call;
      const isMine = !mine.length || splitList(exten).some((one) => one === 'all' || mine.includes(one));
      // An answer or end takes the popup of that call away, or changes it where the call is mine.
      const same = event === 'ring' ? [] : toasts().filter((toast) => uniqueid && toast.uniqueid === uniqueid);
      same.forEach((toast) => (isMine ? mark(toast, event) : dismiss(toast)));
      if (!isMine || run(options.onCall, call) === false) return;
      if (!same.length && event !== 'end') present(call);
    }
    // The claim is also on the whole call, so that an answer pops up only where the ringing did not.
    async function present(call) {
      const { id, event, phone, exten, data: { uniqueid } } = call;
      const keys = event === 'answer' ? [uniqueid || id] : [id || `${phone} ${exten}`, uniqueid];
      const toast = callToast(call, options);
      const isOurs = await claim(keys.filter(Boolean).map((key) => `popup-notifier ${address.host} ${key}`), id);
      if (isOurs) reveal(toast, document.hidden && !call.missed);
      else dismiss(toast);
    }
    const n = {
      status: { state: 'connecting', reason: '', text: say('connecting'), since: new Date() },
      show: (call) => { reveal(callToast(readCall({ data: call }), options)); },
      askPermission: async () => window.Notification && Notification.requestPermission(),
      close: () => { report('closed', stop()); },
    };
    const stop = keepConnected(address, () => lastId, receive, report);
    return n;
  }

  // Ids are "milliseconds-sequence"; with zeros before each part they compare as text.
  const rank = (id) => String(id).split('-').map((part) => part.padStart(16, '0')).join('-');

  // Of several tabs one shows the call. The visible tab waits least; if two write at the same time, both
  // read the same winner a little later. (Web Locks would do it, but are missing on plain http pages.)
  async function claim(keys, id) {
    await sleep(document.hidden ? 300 + 300 * Math.random() : document.hasFocus() ? 0 : 100 * Math.random());
    try {
      const age = (key) => Date.now() - parseInt(localStorage.getItem(key), 10);
      if (age(keys[0]) < (id ? CLAIM_LIFE : REPEAT)) return false;
      const old = Object.keys(localStorage).filter((key) => /^popup-notifier /.test(key) && age(key) > CLAIM_LIFE);
      old.forEach((key) => localStorage.removeItem(key));
      const value = `${Date.now()} ${Math.random()}`;
      keys.forEach((key) => localStorage.setItem(key, value));
      await sleep(SETTLE);
      return localStorage.getItem(keys[0]) === value;
    } catch (error) { return true; } // storage is blocked: better twice than never
  }

  // --- 4. Toast -------------------------------------------------------------

  const STYLE = `:host { all: initial !important; position: fixed !important; z-index: 2147483647 !important;
      right: 0 !important; bottom: 0 !important; color-scheme: light dark !important }
    section { display: flex; flex-direction: column; gap: 10px; padding: 16px; max-height: 100vh; overflow: auto;
      box-sizing: border-box; width: min(380px, 100vw); font: 15px/1.45 system-ui, sans-serif }
    article { --line: #1a7f37; position: relative; padding: 12px 44px 12px 16px; border: 1px solid #8886;
      border-left: 5px solid var(--line); border-radius: 8px; overflow-wrap: anywhere; background: #fff; color: #1f2328;
      box-shadow: 0 6px 24px #0004 } .answer { --line: #0969da } .missed, .end { --line: #9a6700 } .notice { --line: #cf222e }
    [hidden] { display: none } p { margin: 0; unicode-bidi: isolate } b, a { color: var(--line) } a { display: inline-block; padding: 4px 0 }
    .who { font-size: 1.5em; font-weight: 600 } .name { font-size: 1.1em; max-height: 4.5em; overflow: hidden }
    button { position: absolute; top: 6px; right: 6px; width: 32px; height: 32px; border: 0; border-radius: 6px;
      background: none; color: inherit; font: 20px/1 system-ui; cursor: pointer } button:hover { background: #8883 }
    @media (prefers-color-scheme: dark) { article { --line: #3fb950; background: #1c2128; color: #e6edf3 }
      .answer { --line: #58a6ff } .missed, .end { --line: #d29922 } .notice { --line: #ff7b72 } }
    @media (prefers-reduced-motion: no-preference) { article { animation: come .2s } }
    @keyframes come { from { opacity: 0; transform: translateY(12px) } }`;

  let stack; // in a shadow root, where the page's styles do not reach
  const toasts = () => (stack ? [...stack.children] : []);
  const shown = () => toasts().filter((toast) => !toast.hidden);

  // Strings become text nodes: nothing that a caller sends is ever read as markup.
  function element(tag, attributes, ...children) {
    const node = document.createElement(tag);
    Object.keys(attributes).forEach((name) => node.setAttribute(name, attributes[name]));
    node.append(...children);
    return node;
  }

  function makeStack() {
    const root = element('popup-notifier', {}).attachShadow({ mode: 'open' });
    root.adoptedStyleSheets = [new CSSStyleSheet()]; // which no Content-Security-Policy of the page stops
    root.adoptedStyleSheets[0].replaceSync(STYLE);
    document.addEventListener('keydown', (event) => {
      if (event.key !== 'Escape' || event.isComposing || event.defaultPrevented) return;
      dismiss(root.activeElement ? root.activeElement.closest('article') : shown().pop());
    });
    return root.appendChild(element('section', { 'aria-label': say('ring') }));
  }

  function addToast(kind, role, ...children) {
    stack = stack || makeStack();
    const { host } = stack.getRootNode();
    if (!host.isConnected) (document.body || document.documentElement).append(host);
    const button = element('button', { 'aria-label': say('dismiss') }, '×');
    const toast = element('article', { class: kind, role, lang: language(), hidden: '' }, ...children, button);
    button.onclick = () => dismiss(toast);
    return stack.appendChild(toast);
  }

  function callToast(call, options) {
    const { id, phone, exten, name, event, time, missed, data: { uniqueid } } = call;
    const [kind, isWithheld] = [missed ? 'missed' : event, WITHHELD.test(phone)];
    const link = isWithheld ? '' : linkFor(call, options);
    const clock = time.toLocaleTimeString(language(), { hour: '2-digit', minute: '2-digit' });
    const toast = addToast(kind, missed ? 'status' : 'alert',
      element('p', {}, element('b', {}, say(kind)), exten === 'all' ? '' : ` ${say('exten')} ${exten}`, ` ${clock}`),
      element('p', { class: 'who' }, isWithheld ? say('withheld') : phone), element('p', { class: 'name' }, name),
      link && element('a', { href: link, target: options.target || '_blank', rel: 'noopener' }, say('link')));
    return Object.assign(toast, { id: `call-${id || phone}`, uniqueid });
  }

  function linkFor(call, { open, normalise: form }) {
    const values = Object.assign({}, call, { phone: form ? normalise(call.phone, form) : call.phone });
    try {
      const text = open.replace(/\{(phone|exten|name)\}/g, (_, key) => encodeURIComponent(values[key]));
      const url = new URL(text, document.baseURI);
      return /^https?:$/.test(url.protocol) ? url.href : '';
    } catch (error) { return ''; } // no `open`, or not an address
  }

  // +81312345678 and 0312345678 are one number; `form` is how the CRM begins it, or a function.
  function normalise(phone, form) {
    if (typeof form === 'function') return form(phone);
    const digits = phone.replace(/[^\d+]/g, '');
    return form === '+81' ? digits.replace(/^0(?!0|10)/, '+81') : digits.replace(/^\+810?/, '0');
  }

  function mark(toast, event) {
    toast.className = event;
    toast.querySelector('b').textContent = say(event);
  }

  // Shows a toast that was added hidden, while the tabs settled who shows it.
  function reveal(toast, isNotified) {
    if (!toast.parentNode) return toast; // answered by somebody else meanwhile
    shown().filter((other) => toast.uniqueid && other.uniqueid === toast.uniqueid).forEach(dismiss);
    if (shown().length >= MAX_TOASTS) dismiss(shown().find((other) => other.className === 'missed') || shown()[0]);
    toast.hidden = false;
    if (isNotified && window.Notification && Notification.permission === 'granted') notify(toast);
    return toast;
  }

  function notify(toast) {
    const [title, ...lines] = [...toast.querySelectorAll('p')].map((line) => line.textContent);
    try {
      toast.notification = new Notification(title, { body: lines.join(' '), tag: toast.id });
      toast.notification.onclick = () => window.focus();
    } catch (error) { console.warn(error); } // Android wants a service worker for this
  }

  function dismiss(toast) {
    if (!toast) return;
    const hadFocus = toast.contains(stack.getRootNode().activeElement);
    toast.remove();
    if (toast.notification) toast.notification.close();
    if (hadFocus && shown().length) shown().pop().querySelector('button').focus();
  }

  window.PopupNotifier = { connect, normalise };
  if (!('manual' in script.dataset)) connect({});
})();
