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
 * data-alert      more than the card, for an agent who looks elsewhere: "title sound notification"
 * data-normalise  how {phone} begins there: "0" makes 0312345678 of +81312345678, "+81" the reverse
 * data-url        the daemon, if this script comes from elsewhere: "wss://pbx.example/crmws"
 * data-token      browser token, if the daemon wants one (never SECRET_TOKEN: every reader sees it)
 * data-manual     wait for the page's own code, which may give the same options and two functions:
 *
 *   const n = PopupNotifier.connect({ exten: '201', onCall: (call) => {}, onStatus: (status) => {} });
 *
 * onCall gets every event of a call, in every tab: { phone, exten, name, event, time, mine, missed, ... };
 * it may return false (no card), or { name, open, note }, or a promise of either. onStatus gets
 * { state: 'connecting' or 'open', reason, text }; if it returns false, the page shows none of it.
 * n.calls: what is known; n.exten = '202'; n.askPermission(), on a click: desktop notifications;
 * n.close() takes everything away. Options may also stand in the address: popup-sample.js?exten=201&manual
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
  const FORGOTTEN = 43200000;     // ms after which a call is not carried over to the next page
  const CLAIM_LIFE = 600000;      // ms that a tab keeps a call from the others, which may hear of it late
  const REPEAT = 3000;            // ms: the same for a call without a key, which may well come again
  const OWNER_FIRST = 200;        // ms that other tabs leave to the one that already shows the call
  const SHORT_GAP = 5000;         // ms without a connection that nobody is told of
  const MAX_KEYS = 20000;         // messages recognised when they come again: those of a whole outage
  const MAX_CALLS = 200;          // calls known at a time
  const MAX_CARDS = 5;
  const WITHHELD = /^(anonymous|private|unknown|unavailable|restricted|withheld|非通知)?$/i;
  const WORDS = {
    ringing: ['Incoming call', '着信'], rang: ['Rang', '着信あり'], talking: ['On the phone', '通話中'],
    missed: ['Missed call', '不在着信'], ended: ['Call ended', '終了'],
    exten: ['ext.', '内線'], answered: ['answered by', '応答'], times: ['times', '回目'],
    withheld: ['withheld', '非通知'], link: ['Open', '開く'], dismiss: ['Close', '閉じる'],
    create: ['Add to the CRM', '登録する'], stranger: ['not in the CRM', '登録なし'],
    failed: ['the CRM does not answer', '照会できません'],
    ask: ['My extension', '自分の内線'], save: ['OK', '設定'],
    allow: ['Desktop notifications', 'デスクトップ通知を許可'],
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
  const isJapanese = () => /^ja\b/i.test(language());
  const say = (key) => WORDS[key][isJapanese() ? 1 : 0];
  const clock = (time) => new Date(time).toTimeString().slice(0, 5);
  const splitList = (text) => String(text || '').toLowerCase().split(/[\s,]+/).filter(Boolean);
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
    let socket, timer, url;
    let openedAt;     // 0: not yet
    let heardAt;      // the time of the last message
    let patience;     // ms of silence that mean a dead connection
    let failures = 0; // connections in a row that did not hold
    let cause = {};   // why there is none: reason and text, once known
    let obstacle;     // the same, when the browser itself forbids it

    function open() {
      drop();
      url = address();
      if (!url || ending.signal.aborted) return;
      openedAt = 0;
      heardAt = Date.now();
      patience = CONNECT_TIMEOUT;
      try {
        socket = Object.assign(new WebSocket(url), { onopen, onmessage, onclose });
      } catch (error) { // ws: from an https page, unless Chrome lets it pass to a private address
        obstacle = { reason: 'mixed', text: say('mixed') };
        onclose();
      }
    }
    // Closing a dead connection may take minutes: nobody waits for that, or listens to it any more.
    function drop() {
      clearTimeout(timer);
      if (socket) Object.assign(socket, { onopen: null, onmessage: null, onclose: null }).close();
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
      if (message.type === 'HELLO') patience = message.interval * 1000 * BEATS;
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
      if (openedAt || found.reason === cause.reason || ending.signal.aborted) return;
      cause = found;
      report('connecting', cause, true);
    }
    // After a sleep readyState says OPEN for a long time; the age of the last message tells the truth.
    function check() {
      if (socket && Date.now() - heardAt > patience) onclose();
    }
    // Somebody is looking at the page again, or the network has changed.
    function wake({ type }) {
      check();
      if (type === 'online' || (!socket && !document.hidden)) open();
    }
    function restart() {
      drop();
      timer = setTimeout(open, 0); // not at once: the page has no `n` yet
    }
    function onViolation({ effectiveDirective, blockedURI }) {
      if (!url || !/^(wss?|https?):/.test(blockedURI) || !blockedURI.includes(url.host)) return;
      obstacle = { reason: 'policy', text: `${say('policy')}: ${effectiveDirective} ${url.origin}` };
    }
    window.addEventListener('online', wake, ending);
    window.addEventListener('pageshow', wake, ending);
    window.addEventListener('pagehide', drop, ending); // a page that may come back holds no connection
    document.addEventListener('visibilitychange', wake, ending);
    document.addEventListener('securitypolicyviolation', onViolation, ending);
    return { restart, check, drop };
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
  const KINDS = ['ringing', 'talking', 'missed', 'rang', 'ended']; // the last go first when there is no room
  const newCall = (id, isNamed) => ({
    id, isNamed, phone: '', name: '', times: 1, details: {},
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

  // Returns { kind, since, extens }; the kind is one of KINDS, or 'gone' where nothing is to be shown.
  function stateOf(call, mine, now) {
    const isMine = (exten) => concerns(mine, exten);
    const rang = Object.keys(call.rings);
    const rangAt = Math.max(0, ...rang.filter(isMine).map((exten) => call.rings[exten]));
    const answeredAt = Math.max(0, ...Object.values(call.answers));
    const holders = Object.keys(call.answers).filter((exten) => call.answers[exten] === answeredAt);
    const isHere = holders.some(isMine);
    const settledAt = Math.max(answeredAt, call.ended);
    if (rangAt && (!settledAt || rangAt - settledAt >= OVERTAKING)) {
      const isRinging = now - rangAt < RINGING && !call.isLate;
      return { kind: isRinging ? 'ringing' : 'rang', since: rangAt, extens: rang };
    }
    if (rangAt && call.ended && !answeredAt) return { kind: 'missed', since: rangAt, extens: rang };
    if (isHere && !call.ended) return { kind: 'talking', since: answeredAt, extens: holders };
    const isNew = now - call.ended < ENDED;
    if (isHere && isNew && mine.length) return { kind: 'ended', since: call.ended, extens: holders };
    return { kind: 'gone', since: 0, extens: [] };
  }
  // The same caller again is the same card, unless the first call is still on somebody's phone.
  function isRepetition(call, other, { kind }) {
    const isOver = ['rang', 'missed', 'ended'].includes(kind) || (kind === 'ringing' && !other.isNamed);
    return isOver && other !== call && other.phone === call.phone && !WITHHELD.test(call.phone);
  }

  // --- 4. Dispatch ----------------------------------------------------------
  // From messages to cards: what connect() gives a page, and which of several tabs shows a call.
  function connect(given) {
    const options = { onCall() {}, onStatus() {}, ...scriptOptions, ...given };
    const isAsking = options.exten === 'ask';
    const daemon = new URL(options.url || '/crmws', script.src);
    const memory = `popup-notifier ${daemon}`;
    const calls = new Map(); // by id, the latest last
    const keys = new Set();  // of the messages that came
    const cards = new Map(); // by the call's id
    const corner = element('div', { class: 'corner', lang: language() });
    const alertAgent = makeAlerts(options);
    const ending = new AbortController();
    let mine = [];
    let position = '';       // the last id of any message: all calls up to it have arrived
    let ahead = 0;           // ms that the server's clock is ahead of ours
    let tellsEnds = false;   // this PBX says when a call is over
    let status = { state: 'connecting', since: Date.now(), isQuiet: true }; // until the page has had its say
    let notice = '';         // what the agent is told about a lost connection

    const now = () => Date.now() + ahead;
    const currentState = (call) => stateOf(call, mine, now());
    function address() {
      if (isAsking && !mine.length) return null; // who has not answered is not shown everybody's calls
      const url = new URL(daemon);
      url.protocol = url.protocol.replace('http', 'ws');
      mine.forEach((exten) => url.searchParams.append('exten', exten));
      if (options.token) url.searchParams.set('token', options.token);
      url.searchParams.set('since', position);
      return url;
    }
    function report(state, cause, isNews) {
      const since = state === status.state ? status.since : Date.now();
      const answer = guard(options.onStatus, { state, reason: '', text: say(state), ...cause });
      status = { state, since, isQuiet: answer === false };
      // A PBX that was there may be gone for a while: that is not worth a notice.
      const isUsual = position && cause.reason === 'unreachable';
      if (status.isQuiet || state === 'open') notice = '';
      else if (isNews) notice = isUsual ? '' : cause.text;
      draw();
    }
    function receive(message) {
      const { type, id, key, time, complete } = message;
      position = id || position;
      if (type !== 'CALL_IN' && time) ahead = time - Date.now();
      if (type === 'HELLO' && !complete) report('open', { reason: 'gap', text: say('gap') });
      // A call may come again after an outage, also from another daemon: its key is the same.
      if (type === 'CALL_IN' && !(key && keys.has(key))) take(message);
      if (key) keys.add(key);
      if (keys.size > MAX_KEYS) keys.delete(keys.values().next().value);
    }
    // The Go daemon's calls have no key, no time, and their fields in `data` alone.
    function take({ key, time = now(), data }) {
      const { exten = 'all', event = 'ring', name = '', uniqueid } = data;
      const phone = (data.phone || '').trim();
      const id = uniqueid || (event !== 'ring' && unnamedCall(phone)) || key || `${phone} ${time}`;
      const isLate = now() - time > LATE;
      const isMine = splitList(exten).some((one) => concerns(mine, one));
      const call = calls.get(id) || newCall(id, Boolean(uniqueid));
      learn(call, { event, exten, phone, name, time, isLate });
      tellsEnds = tellsEnds || event === 'end';
      if (event === 'answer' && !tellsEnds) endOlder(call, splitList(exten), time);
      calls.delete(id);
      calls.set(id, call);
      if (calls.size > MAX_CALLS) calls.delete(calls.keys().next().value);
      const answer = guard(options.onCall, {
        key, phone, exten, name, event, data, uniqueid: id, time: new Date(time), mine: isMine,
        missed: isLate && event === 'ring',
        update: (details) => enrich(call, details),
      });
      const wanted = isMine || answer !== false ? answer : null; // a call of others may yet become mine
      Promise.resolve(wanted).then((details) => enrich(call, details)).catch(complain);
      const claimed = key ? [key, CLAIM_LIFE] : [`${phone} ${exten}`, REPEAT];
      if (call.isOurs) claim(...claimed).catch(complain); // other tabs may hear only of this event
      else if (wanted !== false) show(call, claimed, event === 'ring' ? 0 : OWNER_FIRST);
    }
    // An answer or end without uniqueid belongs to the last call of that caller.
    function unnamedCall(phone) {
      const found = [...calls.values()].filter((call) => !call.isNamed && call.phone === phone);
      return found.length && found.pop().id;
    }
    // Whoever answers the next call has ended the one before, if the PBX does not say so itself.
    function endOlder(answered, extens, time) {
      calls.forEach((call) => {
        const { kind, since, extens: holders } = currentState(call);
        const isSame = call !== answered && holders.some((exten) => extens.includes(exten));
        if (kind === 'talking' && isSame && since < time) call.ended = time;
      });
    }
    function enrich(call, details) {
      if (details === false) call.isHidden = true;
      ['name', 'open', 'note'].forEach((field) => {
        if (details && details[field]) call.details[field] = details[field];
      });
      draw();
    }
    // Shows a call unless another tab does (the visible one waits least), in place of the same caller's last.
    async function show(call, claimed, delay) {
      if (call.isOurs !== undefined || call.isHidden || currentState(call).kind === 'gone') return;
      call.isOurs = null; // not known yet
      await sleep(delay + (document.hidden ? 300 : 0) + (document.hasFocus() ? 0 : 100 * Math.random()));
      if (ending.signal.aborted) return;
      call.isOurs = await claim(...claimed).catch(() => true); // storage is blocked: better twice than never
      if (!call.isOurs || call.isHidden) return;
      calls.forEach((other) => {
        if (!other.isOurs || !isRepetition(call, other, currentState(other))) return;
        call.times += other.times;
        call.details = { ...other.details, ...call.details };
        calls.delete(other.id);
      });
      draw();
    }
    // Asks the CRM who it is; again on the next page, if this one is left before the answer.
    async function lookUp(call) {
      if (!options.lookup || call.isAsked || WITHHELD.test(call.phone)) return;
      call.isAsked = true;
      try {
        const url = new URL(fillIn(options.lookup, call, options), document.baseURI);
        const answer = await fetch(url, { signal: AbortSignal.timeout(ANSWER_TIMEOUT) });
        if (!answer.ok && answer.status !== 404) throw new Error(`${url} answers ${answer.status}`);
        const text = answer.ok ? await answer.text() : '';
        const found = (text && JSON.parse(text)) || {};
        call.isStranger = !(found.name || found.open || found.note);
        enrich(call, { ...found, ...call.details });
      } catch (error) {
        call.hasFailed = true;
        complain(error);
        draw();
      }
    }
    // Brings the page up to date with what is known.
    function draw() {
      if (ending.signal.aborted) return;
      const views = [...calls.values()].sort((a, b) => a.seen - b.seen)
        .filter((call) => call.isOurs && !call.isHidden && currentState(call).kind !== 'gone')
        .map((call) => render(call, currentState(call), options, mine));
      const ranked = [...views].reverse().sort((a, b) => KINDS.indexOf(a.kind) - KINDS.indexOf(b.kind));
      const shown = views.filter((view) => ranked.indexOf(view) < MAX_CARDS);
      const notices = notice ? [{ id: 'notice', kind: 'notice', head: notice }] : [];
      showCards(cards, [...shown, ...notices], closeCard);
      showMark(corner, { ...status, isAsking, extens: mine, setExten });
      shown.forEach(({ id }) => lookUp(calls.get(id)));
      guard(alertAgent, shown.filter(({ kind }) => kind === 'ringing'));
    }
    function closeCard(id) {
      if (id === 'notice') notice = '';
      else calls.get(id).isHidden = true;
      draw();
    }
    function setExten(text) {
      const isGiven = text !== 'ask';
      if (isGiven && isAsking) remember('localStorage', 'popup-notifier exten', text);
      mine = splitList(isGiven ? text : recall('localStorage', 'popup-notifier exten'));
      connection.restart();
      draw();
    }
    function save() {
      remember('sessionStorage', memory, { position, ahead, tellsEnds, calls: [...calls.values()] });
    }
    // Takes over from the page before; or from the one after, when the agent comes back to this one.
    function restore() {
      const kept = recall('sessionStorage', memory);
      if (!kept) return;
      ({ position, ahead = 0, tellsEnds } = kept);
      calls.clear();
      kept.calls.filter((call) => now() - call.seen < FORGOTTEN).forEach((call) => {
        if (call.isOurs === null) call.isOurs = true; // left amid its claim: better twice than never
        Object.assign(call, { isAsked: call.isStranger !== undefined, hasFailed: false });
        calls.set(call.id, call);
      });
    }

    window.addEventListener('pagehide', save, ending);
    window.addEventListener('pageshow', ({ persisted }) => {
      if (persisted) setTimeout(restore, 300); // Chrome shows this page before it hides the other
    }, ending);
    const connection = keepConnected(address, receive, report, ending);
    const ticker = setInterval(() => { connection.check(); draw(); }, 1000);
    stack.prepend(corner);
    restore();
    setExten(options.exten);
    return {
      get exten() { return mine.join(','); },
      set exten(text) { setExten(String(text)); },
      get calls() {
        return [...calls.values()].map((call) => {
          const { kind, since, extens } = currentState(call);
          const { id: uniqueid, phone, name } = call;
          return { uniqueid, phone, name, state: kind, since: new Date(since), exten: extens.join(',') };
        });
      },
      askPermission: async () => Notification.requestPermission(),
      close() {
        ending.abort();
        connection.drop();
        clearInterval(ticker);
        remember('sessionStorage', memory, null);
        showCards(cards, [], closeCard);
        corner.remove();
        guard(alertAgent, []);
      },
    };
  }

  // Whether this tab may show a call. A database's transactions come one after the other, whichever tab they
  // are from; plain http pages have them, too (but no Web Locks).
  async function claim(name, life) {
    const done = (request) => new Promise((resolve, reject) => {
      request.onsuccess = () => resolve(request.result);
      request.onerror = () => reject(request.error);
    });
    const opening = indexedDB.open('popup-notifier');
    opening.onupgradeneeded = () => opening.result.createObjectStore('claims');
    const database = await done(opening);
    const claims = database.transaction('claims', 'readwrite').objectStore('claims');
    database.close(); // when the transaction is over
    const names = await done(claims.getAllKeys());
    const times = await done(claims.getAll());
    const age = (index) => Date.now() - times[index];
    names.filter((_, index) => age(index) > CLAIM_LIFE).forEach((old) => claims.delete(old));
    const isTaken = age(names.indexOf(name)) < life;
    if (!isTaken) await done(claims.put(Date.now(), name));
    return !isTaken;
  }

  // --- 5. Cards -------------------------------------------------------------
  // What the agent sees: the cards, the newest lowest, and below them the state of the connection.

  // Turns a call into the plain data of its card.
  function render(call, { kind, since, extens }, options, mine) {
    const { name, note, open } = call.details;
    const isWithheld = WITHHELD.test(call.phone);
    const number = isWithheld ? say('withheld') : call.phone;
    const hint = (call.isStranger && say('stranger')) || (call.hasFailed && say('failed'));
    const lines = [number, name || call.name].concat(note || hint || []);
    const called = extens.filter((exten) => exten !== 'all').join(',');
    const who = say(kind === 'talking' && !mine.length ? 'answered' : 'exten');
    const whose = called && `${who} ${called}`;
    const times = `${call.times}${isJapanese() ? '' : ' '}${say('times')}`;
    const head = joinWords(whose, clock(since), call.times > 1 && times);
    const links = [{ word: 'link', href: open || (!isWithheld && fillIn(options.open, call, options)) }];
    if (call.isStranger) links.unshift({ word: 'create', href: fillIn(options.create, call, options) });
    const target = options.target || '_blank';
    return { id: call.id, kind, title: say(kind), whose, head, lines, links, target };
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
      width: min(380px, 100vw); max-height: 100vh; padding: 12px 16px; overflow: auto; display: flex;
      flex-direction: column-reverse; gap: 10px; pointer-events: none; font: 15px/1.45 system-ui }
    article, form { --line: #1a7f37; position: relative; flex: none; padding: 12px 48px 12px 16px;
      border: 1px solid #8886; border-left: 5px solid var(--line); border-radius: 8px; background: #fff;
      color: #1f2328; box-shadow: 0 6px 24px #0004; overflow-wrap: anywhere; pointer-events: auto }
    .talking { --line: #0969da } .missed, .notice { --line: #cf222e }
    .rang { --line: #9a6700 } .ended { --line: #59636e }
    a, b { color: var(--line) } p { margin: 0; unicode-bidi: isolate } p:empty { display: none }
    p:nth-of-type(2) { font-size: 1.5em; font-weight: 600 }
    .ended p:nth-of-type(2), .rang p:nth-of-type(2) { font-size: 1.15em }
    a { display: inline-block; min-width: 44px; padding: 8px 14px 2px 0; font-weight: 600 }
    button, input { min-height: 32px; border: 1px solid #8886; border-radius: 6px; background: none;
      color: inherit; font: inherit }
    article > button { position: absolute; top: 6px; right: 6px; width: 36px; height: 36px; border: 0;
      font-size: 20px; cursor: pointer }
    .corner { display: contents }
    .mark { align-self: flex-end; min-height: 24px; padding: 2px 10px; border: 0; border-radius: 12px;
      background: #1f2328cc; color: #fff; font-size: 12px; pointer-events: auto; cursor: pointer }
    .mark::before { content: '●'; margin-right: 6px; color: #4ac26b } .connecting::before { color: #ff8182 }
    form, label { display: grid; gap: 8px } form { padding-right: 16px } input { padding: 4px 8px }
    @media (prefers-color-scheme: dark) {
      article, form { --line: #3fb950; background: #1c2128; color: #e6edf3 }
      .talking { --line: #58a6ff } .missed, .notice { --line: #ff7b72 }
      .rang { --line: #d29922 } .ended { --line: #9198a1 } }
    @media print { section { display: none } }`;

  const host = element('popup-notifier', { popover: 'manual' });
  const root = host.attachShadow({ mode: 'open' }); // where the page's styles do not reach
  const stack = root.appendChild(element('section', {}));
  root.adoptedStyleSheets = [new CSSStyleSheet()]; // which no Content-Security-Policy of the page stops
  root.adoptedStyleSheets[0].replaceSync(STYLE);
  // Escape closes the card that has the focus, or the newest: but not behind a dialog that takes it, too.
  document.addEventListener('keydown', (event) => {
    if (event.key !== 'Escape' || event.isComposing || event.defaultPrevented) return;
    const focused = root.activeElement?.closest('article');
    const isTaken = document.fullscreenElement || document.querySelector('dialog:modal');
    const card = focused || (!isTaken && stack.querySelector('article'));
    if (card) card.lastChild.click();
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

  // The top layer belongs to what opened last: a dialog, a full screen, or these cards.
  function surface() {
    if (!host.isConnected) document.documentElement.append(host);
    try {
      host.hidePopover();
      host.showPopover();
    } catch (error) { /* an older browser: the z-index has to do */ }
  }
  // Draws what has changed; the views are what render() returns, the newest last.
  function showCards(cards, views, close) {
    if (!host.isConnected) surface(); // the page may have replaced everything
    cards.forEach((card, id) => {
      if (views.some((view) => view.id === id)) return;
      card.remove();
      cards.delete(id);
    });
    views.forEach((view) => {
      if (!cards.has(view.id)) cards.set(view.id, addCard(() => close(view.id)));
      updateCard(cards.get(view.id), view);
    });
    const wanted = views.map(({ id }) => cards.get(id)).reverse();
    const placed = [...stack.children].filter((card) => wanted.includes(card));
    if (wanted.every((card, index) => card === placed[index])) return;
    const focused = root.activeElement; // whatever is moved loses the focus
    stack.append(...wanted);
    focused?.focus();
  }
  function addCard(close) {
    const button = element('button', { 'aria-label': say('dismiss'), type: 'button' }, '×');
    const card = element('article', { lang: language() }, element('div', {}), button);
    button.onclick = close;
    stack.insertBefore(card, stack.querySelector('article'));
    surface();
    return card;
  }
  function updateCard(card, view) {
    const text = JSON.stringify(view);
    if (card.text === text) return;
    card.text = text;
    const { kind, title, head, lines = [], links = [], target } = view;
    const first = element('p', {}, title && element('b', {}, title), title && ' ', head);
    const rel = target === '_blank' ? 'noopener' : ''; // with noopener a named window is never reused
    const anchors = links.filter(({ href }) => isWebAddress(href))
      .map(({ word, href }) => element('a', { href, target, rel }, say(word)));
    const focused = card.contains(root.activeElement) && root.activeElement.textContent;
    card.className = kind;
    card.setAttribute('role', kind === 'ringing' ? 'alert' : 'status');
    card.firstChild.replaceChildren(first, ...lines.map((line) => element('p', {}, line)), ...anchors);
    anchors.filter((link) => link.textContent === focused).forEach((link) => link.focus());
  }

  // A small mark says whether we are connected; a click on it shows what can be set.
  function showMark(corner, status) {
    const { state, since, isQuiet, isAsking, extens } = status;
    const isMissing = isAsking && !extens.length;
    if (isQuiet && !isMissing) return corner.replaceChildren();
    const mark = corner.firstChild || corner.appendChild(element('button', { type: 'button' }));
    const isShort = state !== 'open' && Date.now() - since < SHORT_GAP;
    const text = state === 'open' ? say('open') : `${say('since')} ${clock(since)}`;
    mark.textContent = joinWords(isMissing ? `${say('ask')}?` : extens.join(','), isShort ? '…' : text);
    mark.className = `mark ${isShort ? '' : state}`;
    mark.onclick = () => toggleSettings(corner, status);
    if (isMissing && !corner.querySelector('form')) mark.click();
  }
  function toggleSettings(corner, { extens, isAsking, setExten }) {
    const shown = corner.querySelector('form');
    if (shown) return shown.remove();
    const canAllow = window.isSecureContext && window.Notification && Notification.permission === 'default';
    const input = element('input', { value: extens.join(','), placeholder: '201' });
    const save = isAsking && element('button', {}, say('save'));
    const allow = canAllow && element('button', { type: 'button' }, say('allow'));
    const form = element('form', {}, isAsking && element('label', {}, say('ask'), input), save, allow);
    form.onsubmit = (event) => {
      event.preventDefault();
      form.remove();
      setExten(input.value);
    };
    if (allow) allow.onclick = () => Notification.requestPermission().then(() => form.remove());
    if (form.firstChild) corner.append(form);
  }

  // --- 6. Alerts ------------------------------------------------------------
  // For an agent who looks elsewhere: the page's title, a sound, and desktop notifications.

  // Returns a function that is told, again and again, which cards ring; the newest is the last.
  function makeAlerts(options) {
    const kinds = splitList(options.alert);
    const notifications = new Map(); // by the call's id; null: the agent is looking
    let hasTitle = false;
    let sound = null;

    return (ringing) => {
      const [newest] = ringing.slice(-1);
      if (kinds.includes('title') && (newest || hasTitle)) setTitle(newest && `☎ ${newest.lines[0]}`);
      hasTitle = Boolean(newest);

      if (kinds.includes('sound') && newest) {
        sound = sound || playTones();
        sound.resume().catch(() => {}); // browsers wait until the agent has clicked anywhere in the page
      } else if (sound) {
        sound.close();
        sound = null;
      }

      const isElsewhere = document.hidden || (kinds.includes('notification') && !document.hasFocus());
      ringing.filter(({ id }) => !notifications.has(id)).forEach((view) => {
        notifications.set(view.id, isElsewhere ? guard(notify, view) : null);
      });
      notifications.forEach((notification, id) => {
        if (ringing.some((view) => view.id === id)) return;
        notification?.close();
        notifications.delete(id);
      });
    };
  }

  // The page's own title comes back, even if the page has changed it meanwhile.
  let pageTitle = '';
  let shownTitle = null;
  function setTitle(text) {
    if (document.title !== shownTitle) pageTitle = document.title;
    document.title = text || pageTitle;
    shownTitle = document.title; // which has no double spaces
  }

  // Two tones every three seconds, until the context is closed.
  function playTones() {
    const context = new AudioContext();
    const rate = context.sampleRate;
    const buffer = context.createBuffer(1, 3 * rate, rate);
    const samples = buffer.getChannelData(0);
    [[660, 0], [880, 0.35]].forEach(([frequency, start]) => {
      for (let i = 0; i < 0.3 * rate; i += 1) {
        samples[Math.round(start * rate) + i] = 0.1 * Math.sin(2 * Math.PI * frequency * i / rate);
      }
    });
    const source = Object.assign(context.createBufferSource(), { buffer, loop: true });
    source.connect(context.destination);
    source.start();
    return context;
  }

  function notify({ id, title, whose, lines, links, target }) {
    if (!window.Notification || Notification.permission !== 'granted') return null;
    const [number, name] = lines;
    const { href } = links.find(({ word }) => word === 'link');
    const body = joinWords(title, whose, name && number);
    const notification = new Notification(name || number, { body, tag: id, requireInteraction: true });
    notification.onclick = () => {
      window.focus();
      if (isWebAddress(href)) window.open(href, target, target === '_blank' ? 'noopener' : '');
    };
    return notification;
  }

  window.PopupNotifier = { connect };
  if (!('manual' in scriptOptions)) connect();
})();
