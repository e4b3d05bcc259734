/*
 * popup-sample.js: shows who is calling, in any web page. / 着信をウェブページに表示します。貼り付ける行:
 *
 *   <script async src="http://pbx:8989/popup-sample.js" data-exten="201"
 *           data-open="https://crm.example/search?phone={phone}"></script>
 *
 * data-exten      my extensions, "201" or "201,202"; "ask": each agent is asked once; none: every call
 * data-open       link on the card; {phone}, {exten} and {name} are filled in, percent-encoded
 * data-target     where it opens: "_self", or a window's name; a new tab without it
 * data-lookup     asks the CRM who it is: "/customers?tel={phone}" gives JSON {name, open, note}
 * data-create     link for a number that the CRM does not know: "/customers/new?tel={phone}"
 * data-alert      more than the card, until the agent chooses: any of "title sound notification"
 * data-normalise  how {phone} begins there: "0" makes 0312345678 of +81312345678, "+81" the reverse
 * data-url        the daemon, if this script comes from elsewhere: "wss://pbx.example/crmws"
 * data-token      browser token, if the daemon wants one (never SECRET_TOKEN: every reader sees it)
 * data-manual     wait for the page's own code, which may give the same options and these:
 *
 *   const n = PopupNotifier.connect({ exten: '201', onCall(call) {}, onStatus(status) {}, draw(calls) {} });
 *
 * onCall    gets every event of a call, in every tab: { phone, exten, name, event, time, mine, missed, ... };
 *           it may return false (no card), or { name, open, note }, or a promise of either
 * onStatus  gets { state: 'connecting' or 'open', reason, text }; if it returns false, the page shows nothing
 * draw      gets n.calls, at every change and every second, and draws them in place of the cards
 * history   true: begins with the last calls that the daemon remembers, not with the next one
 *
 * n.calls: all calls as plain data, see render(); n.exten = '202'; n.alert = 'title sound';
 * n.askPermission(), on a click: desktop notifications; n.close() takes everything away.
 * Options may also stand in the address: popup-sample.js?exten=201&manual
 */
(() => {
  'use strict';
  if (window.PopupNotifier) return; // the page loads this script twice

  // --- 1. Options -----------------------------------------------------------
  // Limits, the words in both languages, and helpers for all sections.
  const FIRST_DELAY = 2000;       // ms: a new attempt comes at a random moment up to this; it doubles,
  const LONGEST_DELAY = 30000;    // ms: but not beyond this
  const GOOD_CONNECTION = 10000;  // ms: after a connection that held this long, the delay is short again
  const CONNECT_TIMEOUT = 20000;  // ms: Firefox itself holds attempts back after a failure
  const BEATS = 2.5;              // intervals of silence that mean a dead connection
  const ANSWER_TIMEOUT = 5000;    // ms that the CRM or the daemon may take to answer a request
  const RINGING = 60000;          // ms without news after which a call no longer counts as ringing
  const LATE = 30000;             // ms: a call that is older than this on arrival never does
  const OVERTAKING = 3000;        // ms: a ring this soon after an answer or an end was sent before it
  const ENDED = 20000;            // ms that a card stays once its call has ended
  const LONGEST_CALL = 10800000;  // ms without news after which a call is over: its end was lost
  const FORGOTTEN = 43200000;     // ms without news after which a call is not known any more
  const CLAIM_LIFE = 600000;      // ms that a tab keeps a call from the others, which may hear of it late
  const REPEAT = 3000;            // ms: the same for a call without a key, which may well come again
  const OWNER_FIRST = 200;        // ms that other tabs leave to the one that already shows the call
  const SHORT_GAP = 5000;         // ms without a connection that nobody is told of
  const MAX_KEYS = 20000;         // messages recognised when they come again: those of a whole outage
  const MAX_CALLS = 200;          // calls known at a time
  const HISTORY = 3000;           // events to begin with: a call has three or more
  const MAX_CARDS = 5;
  const WITHHELD = /^(anonymous|private|unknown|unavailable|restricted|withheld|非通知)?$/i;
  const WORDS = {
    ringing: ['Incoming call', '着信'], talking: ['On the phone', '通話中'], missed: ['Missed call', '不在着信'],
    rang: ['Rang', '着信あり'], ended: ['Call ended', '終了'], elsewhere: ['Taken by', '他で応答'],
    exten: ['ext.', '内線'], answered: ['answered by', '応答'], times: [' times', '回目'],
    withheld: ['withheld', '非通知'], link: ['Open', '開く'], create: ['Add to the CRM', '登録する'],
    stranger: ['not in the CRM', '登録なし'], failed: ['the CRM does not answer', '照会できません'],
    dismiss: ['Close', '閉じる'], save: ['OK', '設定'], ask: ['My extension', '自分の内線'],
    sound: ['Sound', '着信音'], notification: ['Desktop notifications', 'デスクトップ通知'],
    open: ['Connected', '接続中'], since: ['Offline since', '切断'],
    connecting: ['Not connected, trying again', '接続が切れています。再接続します'],
    gap: ['Connected; calls may be missing', '接続中 (受け取れなかった着信があるかもしれません)'],
    unreachable: ['The PBX cannot be reached', 'PBX に接続できません'],
    permission: ['The browser keeps this page from the local network',
      'ブラウザでローカルネットワークへの接続を許可してください'],
    mixed: ['An https page needs a wss: address', 'https のページからは wss: で接続してください'],
    policy: ['This page\'s Content-Security-Policy forbids', 'ページの Content-Security-Policy で禁止されています'],
    refused: ['The PBX refuses the connection', 'PBX に接続を拒否されました'],
    401: ['The PBX refuses the token (401)', 'トークンが違います (401)'],
    403: ['The PBX refuses this address (403)', 'このアドレスからの接続は許可されていません (403)'],
    426: ['WebSocket does not pass (proxy?)', 'WebSocket が通りません (リバースプロキシの設定?)'],
  };

  const script = document.currentScript;
  const scriptOptions = { ...Object.fromEntries(new URL(script.src).searchParams), ...script.dataset };
  const language = () => document.documentElement.lang || navigator.language;
  const say = (key) => WORDS[key][/^ja\b/i.test(language()) ? 1 : 0];
  const clock = (time) => new Date(time).toTimeString().slice(0, 5);
  // Input methods write digits and commas full-width.
  const splitList = (text) => String(text || '').normalize('NFKC').toLowerCase()
    .split(/[\s,、]+/).filter(Boolean);
  const joinWords = (...words) => words.filter(Boolean).join(' ');
  const sleep = (ms) => new Promise((resolve) => { setTimeout(resolve, ms); });
  const complain = (error) => console.error('popup-notifier:', error);
  // Whatever the page's own code throws, or the browser forbids, stops nothing here.
  function guard(call, ...args) {
    try { return call(...args); } catch (error) { return complain(error); }
  }
  // What is kept for this tab, or for this browser; the storage of either may be forbidden or full.
  const recall = (storage, key) => guard(() => JSON.parse(window[storage].getItem(key)));
  const remember = (storage, key, value) => guard(() => window[storage].setItem(key, JSON.stringify(value)));

  // --- 2. Connection --------------------------------------------------------
  // One WebSocket that reconnects by itself, and the reason when it cannot.

  // Each attempt asks address() where to, if anywhere; receive() gets every message, report() every change of
  // state, until `ending` is aborted.
  function keepConnected(address, receive, report, ending) {
    let socket, url;
    let timer;        // of the next attempt: there is one, or a socket, unless the page is left
    let openedAt;     // 0: not yet
    let heardAt;      // the time of the last message
    let patience;     // ms of silence that mean a dead connection
    let failures = 0; // connections in a row that did not hold
    let cause = {};   // why there is none: reason and text, once known
    let obstacle;     // the same, when the browser itself forbids it
    const DEAF = { onopen: null, onmessage: null, onclose: null, onerror: null };

    function open() {
      drop();
      url = address();
      if (!url) return;
      openedAt = 0;
      heardAt = Date.now();
      patience = CONNECT_TIMEOUT;
      try {
        socket = new WebSocket(url);
        Object.assign(socket, { onopen, onmessage, onclose, onerror: onclose }); // a policy: only an error
      } catch (error) { // ws: from an https page; or, in Firefox, what a policy forbids
        const isMixed = window.location.protocol === 'https:' && url.protocol === 'ws:';
        if (isMixed) obstacle = { reason: 'mixed', text: say('mixed') };
        onclose();
      }
    }
    // Closing a dead connection may take minutes: nobody waits for that, or listens to it any more.
    function drop() {
      timer = clearTimeout(timer);
      if (socket) Object.assign(socket, DEAF).close();
      socket = null;
    }
    function onopen() {
      openedAt = heardAt = Date.now();
      patience = Infinity; // until HELLO promises a beat: the Go daemon has none
      cause = {};
      report('open', cause);
    }
    function onmessage(event) {
      const message = JSON.parse(event.data);
      heardAt = Date.now();
      if (message.interval) patience = message.interval * 1000 * BEATS; // a reload may change it
      receive(message);
    }
    function onclose() {
      drop();
      const hasHeld = openedAt && Date.now() - openedAt > GOOD_CONNECTION;
      failures = hasHeld ? 0 : failures + 1;
      // A restart cuts all browsers off at the same moment; chance spreads their return.
      timer = setTimeout(open, Math.random() * Math.min(FIRST_DELAY * 2 ** failures, LONGEST_DELAY));
      if (failures > 1 && !openedAt) explain();
      report('connecting', cause);
    }
    async function explain() {
      const found = obstacle || await findCause(url);
      if (openedAt) return;
      cause = obstacle || found; // Firefox tells late of what a policy forbids
      report('connecting', cause);
    }
    // After a sleep readyState says OPEN for a long time; the age of the last message tells the truth.
    function check() {
      if (socket && Date.now() - heardAt > patience) onclose();
    }
    // Somebody is looking at the page again.
    function hurry() {
      if (timer && !document.hidden) open();
    }
    function restart() {
      drop();
      timer = setTimeout(open); // not at once: the page has no `n` yet
    }
    function onViolation({ effectiveDirective, blockedURI }) {
      if (!url || !/^(wss?|https?):/.test(blockedURI) || !blockedURI.includes(url.host)) return;
      obstacle = { reason: 'policy', text: `${say('policy')}: ${effectiveDirective} ${url.origin}` };
      explain();
    }
    window.addEventListener('online', open, ending); // the network has changed
    window.addEventListener('pagehide', drop, ending); // a page that may come back holds no connection
    document.addEventListener('visibilitychange', hurry, ending);
    document.addEventListener('securitypolicyviolation', onViolation, ending);
    ending.signal.addEventListener('abort', drop);
    return { restart, check };
  }

  // The browser hides why a handshake was refused; the daemon's answer to a plain GET tells.
  async function findCause({ href }) {
    const request = fetch(href.replace('ws', 'http'), { signal: AbortSignal.timeout(ANSWER_TIMEOUT) });
    const answer = await request.catch(() => null);
    if (answer) {
      const reason = answer.status in WORDS ? answer.status : 'refused';
      return { reason, text: `${say(reason)}: ${(await answer.text()).slice(0, 200)}` };
    }
    // A public page may reach a private address only with permission, which has two names. Plain http pages
    // are told "denied" of any address, also of those that they may reach.
    const isDenied = async (name) => (await navigator.permissions.query({ name })).state === 'denied';
    const names = window.isSecureContext ? ['local-network-access', 'local-network'] : [];
    const denials = await Promise.all(names.map((name) => isDenied(name).catch(() => false)));
    const reason = denials.includes(true) ? 'permission' : 'unreachable';
    return { reason, text: say(reason) };
  }

  // --- 3. The life of a call ------------------------------------------------
  // What is known of a call are facts: who rang, who answered, the end, each with its time. They add up to
  // the same state in whatever order they come, and however often. Nothing here reads the page or the clock.
  const newCall = (id, isNamed) => ({
    id, isNamed, phone: '', name: '', details: {},
    began: Infinity, seen: 0, ended: 0, // when: its first event, its last, and its end
    rings: {}, answers: {},             // when: the last one of each extension
  });
  function learn(call, { event, exten, phone, name, time, isLate }) {
    if (time < call.began) Object.assign(call, { began: time, phone, exten, name: name || call.name });
    if (time > call.seen) Object.assign(call, { seen: time, isLate });
    call.name = call.name || name;
    if (event === 'end') call.ended = Math.max(call.ended, time);
    const facts = { ring: call.rings, answer: call.answers }[event] || {};
    splitList(exten).forEach((one) => { facts[one] = Math.max(facts[one] || 0, time); });
  }
  const concerns = (mine, exten) => !mine.length || exten === 'all' || mine.includes(exten);

  // The first that holds is the state. The most important come first, should there be no room for all cards.
  const STATES = [
    // kind, when it holds, since when, the extensions that it names, ms that its card stays
    ['ringing', (is) => is.ringing && is.fresh, 'rangAt', 'called', Infinity],
    ['talking', (is) => is.here && !is.ended && !is.ringing, 'answeredAt', 'holders', Infinity],
    ['missed', (is) => is.rangAt && is.ended && !is.answeredAt && !is.ringing, 'rangAt', 'called', Infinity],
    ['rang', (is) => is.ringing, 'rangAt', 'called', Infinity],
    ['ended', (is) => is.here, 'ended', 'holders', ENDED],
    ['elsewhere', (is) => is.rangAt, 'answeredAt', 'holders', 0],
    ['foreign', () => true, 'seen', 'called', 0], // it never concerned me
  ];
  const KINDS = STATES.map(([kind]) => kind);
  function stateOf({ rings, answers, ended, seen, isLate }, mine, now) {
    const isMine = (exten) => concerns(mine, exten);
    const called = Object.keys(rings);
    const rangAt = Math.max(0, ...called.filter(isMine).map((exten) => rings[exten]));
    const answeredAt = Math.max(0, ...Object.values(answers));
    const holders = Object.keys(answers).filter((exten) => answers[exten] === answeredAt);
    const settledAt = Math.max(answeredAt, ended);
    const ringing = rangAt && (!settledAt || rangAt - settledAt >= OVERTAKING);
    const fresh = now - rangAt < RINGING && !isLate;
    const here = holders.some(isMine);
    const over = ended || (now - seen > LONGEST_CALL && seen);
    const is = { rangAt, called, answeredAt, holders, ended: over, seen, ringing, fresh, here };
    const [kind, , since, extens, stays] = STATES.find(([, holds]) => holds(is));
    const isOver = kind === 'ended' && !mine.length; // who watches all calls need not see them end
    return {
      kind, since: is[since], hasCard: stays > 0 && !isOver && now - is[since] < stays,
      extens: is[extens].filter((exten) => exten !== 'all'),
    };
  }
  // Whether a call gives way to a later one of the same caller, who then has one card.
  function isRepeated(call, later) {
    const { kind } = call.state;
    const isOver = ['missed', 'rang', 'ended'].includes(kind) || (kind === 'ringing' && !call.isNamed);
    const isOlder = call !== later && call.seen <= later.seen;
    return isOver && isOlder && call.phone === later.phone && !WITHHELD.test(call.phone);
  }
  // Returns the calls that have a card, those that go on first; both are sorted, the latest first.
  function pickCards(calls) {
    const isRepeat = (call, index) => calls.slice(0, index).some((later) => isRepeated(call, later));
    const picked = calls.filter((call, index) => call.state.hasCard && !isRepeat(call, index));
    const rank = ({ state }) => KINDS.indexOf(state.kind);
    const first = [...picked].sort((a, b) => rank(a) - rank(b)).slice(0, MAX_CARDS);
    const isLive = ({ state }) => ['ringing', 'talking'].includes(state.kind);
    return picked.filter((call) => first.includes(call)).sort((a, b) => isLive(b) - isLive(a));
  }

  // --- 4. Dispatch ----------------------------------------------------------
  // From messages to cards: what connect() gives a page, and which of several tabs shows a call.
  function connect(given) {
    const options = { onCall() {}, onStatus() {}, ...scriptOptions, ...given };
    const isAsking = options.exten === 'ask';
    const daemon = new URL(options.url || '/crmws', script.src);
    const memory = `popup-notifier ${daemon}`;
    const calls = new Map(); // by id
    const keys = new Set();  // of the messages that came
    const alertAgent = makeAlerts();
    const ending = new AbortController();
    const n = {
      get exten() { return mine.join(','); },
      set exten(text) {
        const isGiven = text !== 'ask';
        if (isGiven && isAsking) remember('localStorage', 'popup-notifier exten', text);
        mine = splitList(isGiven ? text : recall('localStorage', 'popup-notifier exten'));
        connection.restart();
        change();
      },
      get alert() { return alerts.join(' '); },
      set alert(text) {
        alerts = splitList(text);
        remember('localStorage', 'popup-notifier alert', n.alert);
        change();
      },
      get calls() { return refresh().filter(({ state }) => state.kind !== 'foreign').map(view).reverse(); },
      get now() { return Date.now() + ahead; },
      askPermission: async () => Notification.requestPermission(),
      close() {
        ending.abort();
        clearInterval(ticker);
        remember('sessionStorage', memory, null);
        panel.remove();
        guard(alertAgent, [], []);
      },
    };
    const mark = makeMark(n, isAsking);
    const panel = stack.appendChild(element('div', { class: 'panel', lang: language() }, mark));
    let mine = [];
    let alerts = splitList(recall('localStorage', 'popup-notifier alert') ?? options.alert);
    let position = '';       // the last id of any message: all calls up to it have arrived
    let ahead = 0;           // ms that the server's clock is ahead of ours
    let status = { state: 'connecting', since: Date.now(), isQuiet: true }; // until the page has had its say
    let daemonOptions = {};  // what it says of itself: OPEN_URL
    let drawing;             // the timer, if a drawing is due

    function address() {
      if (ending.signal.aborted) return null;
      if (isAsking && !mine.length) return null; // who has not answered is not shown everybody's calls
      const url = new URL(daemon);
      url.protocol = url.protocol.replace('http', 'ws');
      mine.forEach((exten) => url.searchParams.append('exten', exten));
      if (options.token) url.searchParams.set('token', options.token);
      url.searchParams.set('since', position);
      if (options.history) url.searchParams.set('last', HISTORY);
      return url;
    }
    function report(state, cause) {
      if (ending.signal.aborted) return;
      const since = state === status.state ? status.since : Date.now();
      const answer = guard(options.onStatus, { state, reason: '', text: say(state), ...cause });
      status = { state, since, isQuiet: answer === false, cause: cause.text };
      change();
    }
    function receive({ type, id, key, time, complete, open, data }) {
      position = id || position;
      if (type !== 'CALL_IN' && time) ahead = time - Date.now();
      if (type !== 'CALL_IN') daemonOptions = { open };
      if (type === 'HELLO' && !complete) report('open', { reason: 'gap', text: say('gap') });
      // A call may come again after an outage, also from another daemon: its key is the same.
      if (type === 'CALL_IN' && !(key && keys.has(key))) take(data, key, time || n.now);
      if (key) keys.add(key);
      if (keys.size > MAX_KEYS) keys.delete(keys.values().next().value);
    }
    // The Go daemon's calls have no key, no time, and their fields in `data` alone.
    function take(data, key, time) {
      const { exten = 'all', event = 'ring', name = '', uniqueid } = data;
      const phone = (data.phone || '').trim();
      // An answer or end without uniqueid belongs to the last call of that caller.
      const findLast = () => refresh().find((one) => !one.isNamed && one.phone === phone)?.id;
      const id = uniqueid || (event !== 'ring' && findLast()) || key || `${phone} ${time}`;
      const isLate = n.now - time > LATE;
      const isMine = splitList(exten).some((one) => concerns(mine, one));
      const call = calls.get(id) || newCall(id, Boolean(uniqueid));
      learn(call, { event, exten, phone, name, time, isLate });
      calls.set(id, call);
      call.state = stateOf(call, mine, n.now);
      const answer = guard(options.onCall, {
        key, phone, exten, name, event, data, uniqueid: id, time: new Date(time), mine: isMine,
        missed: isLate && event === 'ring',
        update: (details) => enrich(call, details),
      });
      const wanted = isMine || answer !== false ? answer : null; // a call of others may yet become mine
      Promise.resolve(wanted).then((details) => enrich(call, details)).catch(complain);
      if (wanted !== false) show(call, event, key ? [key, CLAIM_LIFE] : [`${phone} ${exten}`, REPEAT]);
    }
    // Takes what onCall or the CRM says of a call.
    function enrich(call, details) {
      if (details === false) call.isHidden = true;
      ['name', 'open', 'note'].forEach((field) => {
        if (details && details[field]) call.details[field] = details[field];
      });
      change();
    }
    // Shows a call unless another tab does; the one that is looked at waits least.
    async function show(call, event, claimed) {
      const isNew = call.isOurs === undefined && call.state.hasCard;
      if (isNew) {
        call.isOurs = null; // not known yet
        const patience = (document.hidden ? 300 : 0) + (document.hasFocus() ? 0 : 100 * Math.random());
        await sleep(patience + (event === 'ring' ? 0 : OWNER_FIRST));
      } else if (!call.isOurs) return;
      // Claimed again with each event: other tabs may hear only of this one.
      const isFree = await claim(...claimed).catch(() => true); // storage is blocked: better twice than never
      if (isNew) call.isOurs = isFree;
      change();
    }
    // Asks the CRM who it is; again on the next page, if this one is left before the answer.
    async function lookUp(call) {
      if (!options.lookup || call.lookup || WITHHELD.test(call.phone)) return;
      call.lookup = 'asked';
      try {
        const url = new URL(fillIn(options.lookup, call, options), document.baseURI);
        const answer = await fetch(url, { signal: AbortSignal.timeout(ANSWER_TIMEOUT) });
        if (!answer.ok && answer.status !== 404) throw new Error(`${url} answers ${answer.status}`);
        const text = answer.ok ? await answer.text() : '';
        const found = (text && JSON.parse(text)) || {};
        call.lookup = found.name || found.open || found.note ? 'known' : 'stranger';
        enrich(call, { ...found, ...call.details });
      } catch (error) {
        call.lookup = 'failed';
        complain(error);
        change();
      }
    }
    // Brings the state of each call up to date; returns them, the latest first.
    function refresh() {
      const times = new Map(); // how often each caller has called
      const sorted = [...calls.values()].sort((a, b) => a.seen - b.seen);
      sorted.forEach((call, index) => {
        if (n.now - call.seen > FORGOTTEN || index < sorted.length - MAX_CALLS) calls.delete(call.id);
        if (call.isOurs) times.set(call.phone, (times.get(call.phone) || 0) + 1);
        call.times = times.get(call.phone) || 1;
        call.state = stateOf(call, mine, n.now);
      });
      return sorted.reverse();
    }
    const view = (call) => render(call, { ...daemonOptions, ...options }, mine);
    function draw() {
      drawing = clearTimeout(drawing);
      if (ending.signal.aborted) return;
      const picked = pickCards(refresh().filter(({ isOurs, isHidden }) => isOurs && !isHidden));
      picked.forEach(lookUp);
      const views = picked.map(view);
      if (options.draw) guard(options.draw, n.calls);
      fillMark(mark, n.exten, isAsking && !mine.length, status);
      showCards(panel, options.draw ? [] : views, close);
      guard(alertAgent, views.filter(({ state }) => state === 'ringing'), alerts);
    }
    // A thousand calls that were missed are drawn once.
    function change() {
      drawing = drawing || setTimeout(draw);
    }
    function close(id) {
      const closed = calls.get(id);
      calls.forEach((call) => { call.isHidden ||= call === closed || isRepeated(call, closed); });
      draw();
    }
    function leave() {
      remember('sessionStorage', memory, { position, ahead, calls: [...calls.values()] });
    }
    // Takes over from the page before; or from the one after, when the agent comes back to this one.
    function restore() {
      const kept = recall('sessionStorage', memory);
      if (!kept) return;
      ({ position, ahead } = kept);
      calls.clear();
      kept.calls.forEach((call) => {
        if (call.isOurs === null) call.isOurs = true; // left amid its claim: better twice than never
        if (call.lookup === 'asked' || call.lookup === 'failed') delete call.lookup;
        calls.set(call.id, call);
      });
    }
    async function comeBack({ persisted }) {
      if (!persisted) return;
      await sleep(300); // Chrome shows this page before it hides the other
      restore();
      connection.restart();
    }

    window.addEventListener('pagehide', leave, ending);
    window.addEventListener('pageshow', comeBack, ending);
    const connection = keepConnected(address, receive, report, ending);
    const ticker = setInterval(() => { connection.check(); draw(); }, 1000);
    restore();
    n.exten = options.exten;
    mark.open = isAsking && !mine.length;
    return n;
  }

  // Whether this tab may show a call. A database's transactions come one after the other, whichever tab they
  // are from; plain http pages have them, too (but no Web Locks).
  async function claim(name, life) {
    const done = (request) => new Promise((resolve, reject) => {
      request.onsuccess = () => resolve(request.result);
      request.onerror = () => reject(request.error);
    });
    const opening = indexedDB.open('popup-notifier claims');
    opening.onupgradeneeded = () => opening.result.createObjectStore('claims');
    const database = await done(opening);
    const claims = database.transaction('claims', 'readwrite').objectStore('claims');
    database.close(); // when the transaction is over
    const times = await done(claims.get('times')) || new Map(); // of each claim
    const age = (one) => Date.now() - times.get(one);
    if (age(name) < life) return false;
    [...times.keys()].filter((one) => age(one) > CLAIM_LIFE).forEach((one) => times.delete(one));
    await done(claims.put(times.set(name, Date.now()), 'times'));
    return true;
  }

  // --- 5. Cards -------------------------------------------------------------
  // What the agent sees: the cards, the newest lowest, and below them the state of the connection.

  // Turns a call into plain data, of which a card, a row of a table or a notification is drawn.
  function render(call, options, mine) {
    const { kind, since, extens } = call.state;
    const { name, note, open } = call.details;
    const isWithheld = WITHHELD.test(call.phone);
    const links = [['link', open || (!isWithheld && fillIn(options.open, call, options))]];
    if (call.lookup === 'stranger') links.unshift(['create', fillIn(options.create, call, options)]);
    const exten = extens.join(',');
    const isTheirs = kind === 'elsewhere' || (kind === 'talking' && !mine.length);
    return {
      uniqueid: call.id, state: kind, title: say(kind), phone: call.phone,
      began: new Date(call.began), since: new Date(since), ended: call.ended ? new Date(call.ended) : null,
      exten, whose: exten && `${say(isTheirs ? 'answered' : 'exten')} ${exten}`,
      number: isWithheld ? say('withheld') : call.phone, times: isWithheld ? 1 : call.times,
      name: name || call.name, note: note || (call.lookup in WORDS ? say(call.lookup) : ''),
      links: links.filter(([, href]) => isWebAddress(href))
        .map(([word, href]) => ({ text: say(word), href })),
      target: options.target || '_blank',
    };
  }

  // +81312345678 and 0312345678 are one number, but a CRM may know only one of them.
  function fillIn(template = '', { phone, name, exten }, { normalise }) {
    const values = { phone, exten, name };
    if (normalise === '0') values.phone = phone.replace(/^\+81/, '0');
    if (normalise === '+81') values.phone = phone.replace(/^0(?!0|10)/, '+81');
    return template.replace(/\{(phone|exten|name)\}/g, (_, key) => encodeURIComponent(values[key]));
  }

  const STYLE = `
    :host { all: initial !important }
    section { position: fixed; inset: auto 0 0 auto; z-index: 2147483647; box-sizing: border-box;
      width: min(400px, 100vw); max-height: 100vh; padding: 12px 16px 12px 32px; overflow: auto;
      scrollbar-width: thin; pointer-events: none; color-scheme: light dark; color: CanvasText;
      font: 15px/1.45 system-ui }
    @media print { section { display: none } }
    [hidden], p:empty { display: none !important }
    section, .panel, details { display: flex; flex-direction: column-reverse; gap: 10px }
    article, form { flex: none; position: relative; padding: 12px 48px 12px 16px; border: 1px solid #8886;
      border-radius: 8px; background: Canvas; box-shadow: 0 6px 20px #0004; pointer-events: auto }
    article { border-left: 5px solid var(--line); overflow-wrap: anywhere }
    .ringing { --line: light-dark(#1a7f37, #3fb950) } .talking { --line: light-dark(#0969da, #58a6ff) }
    .missed { --line: light-dark(#cf222e, #ff7b72) } .rang { --line: light-dark(#9a6700, #d29922) }
    .ended { --line: light-dark(#59636e, #9198a1) }
    .missed, .rang, .ended { padding-block: 8px }
    p { margin: 0; unicode-bidi: isolate; display: -webkit-box; -webkit-box-orient: vertical;
      -webkit-line-clamp: 3; overflow: hidden }
    .number { font-size: 1.15em; font-weight: 600 }
    .ringing .number, .talking .number { font-size: 1.5em }
    a, b { color: var(--line) }
    a { display: inline-block; min-width: 44px; padding: 8px 14px 2px 0; font-weight: 600 }
    button, input { min-height: 32px; border: 1px solid; border-radius: 6px; background: none;
      color: inherit; font: inherit }
    article > button { position: absolute; top: 4px; right: 6px; width: 36px; height: 36px; border: 0;
      font-size: 20px; cursor: pointer }
    form { padding-right: 16px }
    form, label { display: grid; gap: 8px }
    input { min-width: 0; padding: 4px 8px }
    [type=checkbox] { width: 24px; min-height: 24px; margin: 0 }
    label:has([type=checkbox]) { grid-template-columns: auto 1fr; align-items: center }
    .mark { align-self: flex-end; box-sizing: border-box; min-height: 24px; padding: 3px 10px;
      border-radius: 12px; background: #1f2328cc; color: #fff; font-size: 12px; list-style: none;
      cursor: pointer; pointer-events: auto }
    .mark::before { content: '●'; margin-right: 6px; color: #4ac26b }
    .mark.connecting::before { color: #ff8182 }`;

  const host = element('popup-notifier', { popover: 'manual' });
  const root = host.attachShadow({ mode: 'open' }); // where the page's styles do not reach
  const stack = root.appendChild(element('section', {}));
  root.adoptedStyleSheets = [new CSSStyleSheet()]; // which no Content-Security-Policy of the page stops
  root.adoptedStyleSheets[0].replaceSync(STYLE);
  document.documentElement.append(host);
  // Escape closes what has the focus, or the newest card: but not behind a dialog that takes it, too.
  document.addEventListener('keydown', (event) => {
    if (event.key !== 'Escape' || event.isComposing || event.defaultPrevented) return;
    const focused = root.activeElement?.closest('article, details[open]');
    const top = focused || (!document.querySelector(':modal') && stack.querySelector('article'));
    if (top) top.querySelector('button, summary').click();
  });

  // Strings become text nodes: nothing that a caller sends is ever read as markup.
  function element(tag, attributes, ...children) {
    const node = document.createElement(tag);
    Object.keys(attributes).forEach((name) => node.setAttribute(name, attributes[name]));
    node.append(...children.filter(Boolean));
    return node;
  }
  // The CRM, or the page's template, must not smuggle in javascript: and the like.
  const isWebAddress = (href) => href && /^https?:$/.test(element('a', { href }).protocol);

  // The top layer belongs to what opened last. And a modal dialog, or a full screen, leaves nothing outside
  // of it that can be clicked: then the cards are inside.
  function surface() {
    const lowest = stack.querySelector('details:not([hidden]) .mark, article');
    if (!lowest) return;
    const { left, top } = lowest.getBoundingClientRect();
    if (document.elementFromPoint(left + 12, top + 12) === host) return;
    const modal = [...document.querySelectorAll(':modal:not(video, iframe)')].pop();
    const home = modal || document.documentElement;
    if (host.parentNode !== home) home.append(host);
    try {
      host.hidePopover();
      host.showPopover();
    } catch (error) { /* an older browser: the z-index has to do */ }
  }
  // Draws the cards of a panel, the latest first; the views are what render() returns.
  function showCards(panel, views, close) {
    const focused = root.activeElement; // whatever is replaced or moved loses the focus
    const old = [...panel.querySelectorAll('article')];
    const cards = views.map((view) => {
      const text = JSON.stringify(view);
      return old.find((card) => card.text === text) || Object.assign(makeCard(view, close), { text });
    });
    old.filter((card) => !cards.includes(card)).forEach((card) => card.remove());
    cards.forEach((card, index) => {
      const place = panel.children[index + 1]; // behind the mark
      if (card !== place) panel.insertBefore(card, place);
    });
    surface();
    if (focused === root.activeElement) return;
    const isSame = ({ textContent, parentNode }) => textContent === focused.textContent
      && parentNode.id === focused.parentNode.id;
    [...panel.querySelectorAll('a, button')].find(isSame)?.focus();
  }
  function makeCard(view, close) {
    const { uniqueid, state, title, whose, since, number, name, note, links, target } = view;
    const times = view.times > 1 && `${view.times}${say('times')}`;
    const head = element('p', {}, element('b', {}, title), ` ${joinWords(whose, clock(since), times)}`);
    const lines = [head, element('p', { class: 'number' }, number), element('p', {}, name)];
    if (note) lines.push(element('p', {}, note));
    const rel = target === '_blank' ? 'noopener' : ''; // with noopener a named window is never reused
    const anchors = links.map(({ text, href }) => element('a', { href, target, rel }, text));
    const button = element('button', { 'aria-label': say('dismiss'), type: 'button' }, '×');
    button.onclick = () => close(uniqueid);
    const role = state === 'ringing' ? 'alert' : 'status';
    const attributes = { class: state, role, lang: language(), id: uniqueid };
    return element('article', attributes, ...lines, ...anchors, button);
  }

  // A small mark says whether we are connected, and why not; a click on it shows what can be set.
  function makeMark(n, isAsking) {
    const field = element('input', { placeholder: '201' });
    const boxes = ['sound', 'notification'].map((name) => element('input', { type: 'checkbox', name }));
    const labels = boxes.map((box) => element('label', {}, box, say(box.name)));
    if (!canNotify()) labels.pop();
    const question = isAsking && element('label', {}, say('ask'), field);
    const form = element('form', {}, question, ...labels, element('button', {}, say('save')));
    const details = element('details', {}, element('summary', { class: 'mark' }), form);
    details.ontoggle = () => {
      field.value = n.exten;
      boxes.forEach((box) => { box.checked = splitList(n.alert).includes(box.name); });
      if (details.open) form.querySelector('input').focus();
    };
    form.onsubmit = (event) => {
      event.preventDefault();
      details.open = false;
      const chosen = boxes.filter(({ checked }) => checked).map(({ name }) => name);
      if (chosen.includes('notification')) n.askPermission();
      n.alert = joinWords(n.alert.includes('title') && 'title', ...chosen);
      if (isAsking) n.exten = field.value;
    };
    return details;
  }
  function fillMark(details, exten, isMissing, { state, since, isQuiet, cause }) {
    const isShort = state !== 'open' && !cause && Date.now() - since < SHORT_GAP;
    const text = state === 'open' ? say('open') : joinWords(say('since'), clock(since), cause);
    const mark = details.firstChild;
    mark.textContent = joinWords(isMissing ? `${say('ask')}?` : exten, isShort ? '…' : text);
    mark.className = `mark ${isShort ? '' : state}`;
    details.hidden = isQuiet && !isMissing;
  }

  // --- 6. Alerts ------------------------------------------------------------
  // For an agent who looks elsewhere: the page's title, a sound, and desktop notifications.

  // Returns a function that is told, again and again, which calls ring, the latest first, and what to use.
  function makeAlerts() {
    const notifications = new Map(); // by the call's id; null: the agent is looking
    let sound = null;

    return (ringing, kinds) => {
      const uses = (kind) => ringing.length > 0 && kinds.includes(kind);
      setTitle(uses('title') ? `${BELL} ${ringing[0].number}` : '');
      if (uses('sound')) {
        sound = sound || playTones();
        sound.resume().catch(() => {}); // browsers wait until the agent has clicked anywhere in the page
      } else if (sound) {
        sound.close();
        sound = null;
      }
      const isElsewhere = document.hidden || (uses('notification') && !document.hasFocus());
      ringing.filter(({ uniqueid }) => !notifications.has(uniqueid)).forEach((view) => {
        notifications.set(view.uniqueid, isElsewhere ? guard(notify, view) : null);
      });
      notifications.forEach((notification, id) => {
        if (ringing.some(({ uniqueid }) => uniqueid === id)) return;
        notification?.close();
        notifications.delete(id);
      });
    };
  }

  // The page's own title comes back, even if the page has changed it meanwhile.
  const BELL = '☎';
  let pageTitle = '';
  function setTitle(text) {
    const isOurs = document.title.startsWith(BELL);
    if (!isOurs) pageTitle = document.title;
    if (text || isOurs) document.title = text || pageTitle;
  }

  // Two tones every three seconds, until the context is closed.
  function playTones() {
    const context = new AudioContext();
    const tone = context.createOscillator();
    const volume = new GainNode(context, { gain: 0 });
    for (let start = 0; start < RINGING / 1000; start += 3) {
      [[start, 660], [start + 0.35, 880]].forEach(([time, frequency]) => {
        tone.frequency.setValueAtTime(frequency, time);
        volume.gain.setTargetAtTime(0.1, time, 0.005);
        volume.gain.setTargetAtTime(0, time + 0.3, 0.005);
      });
    }
    tone.connect(volume).connect(context.destination);
    tone.start();
    return context;
  }

  const canNotify = () => window.isSecureContext && 'Notification' in window;
  function notify({ uniqueid, title, whose, number, name, links, target }) {
    if (!canNotify() || Notification.permission !== 'granted') return null;
    const body = joinWords(title, whose, name && number);
    const notification = new Notification(name || number, { body, tag: uniqueid, requireInteraction: true });
    notification.onclick = () => {
      window.focus();
      const [link] = links.slice(-1);
      if (link) window.open(link.href, target, target === '_blank' ? 'noopener' : '');
    };
    return notification;
  }

  window.PopupNotifier = { connect };
  if (!('manual' in scriptOptions)) connect();
})();
