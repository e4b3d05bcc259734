/*
 * popup-sample.js: shows who is calling, in any web page. / 着信をウェブページに表示します。貼り付ける行:
 *
 *   <script async src="http://pbx:8989/popup-sample.js" data-exten="201"
 *           data-open="https://crm.example/search?phone={phone}"></script>
 *
 * data-exten      my extensions, "201" or "201,202"; "ask": each agent is asked once; none: every call
 * data-open       link in the popup; {phone}, {exten} and {name} are filled in, percent-encoded
 * data-target     where it opens: "_self", or a window's name; a new tab without it
 * data-lookup     asks the CRM who it is: "/customers?tel={phone}" gives JSON {name, open, note}
 * data-create     link for a number that the CRM does not know: "/customers/new?tel={phone}"
 * data-alert      more than the popup, for who looks elsewhere: "title sound notification"
 * data-normalise  how {phone} begins there: "0" makes 0312345678 of +81312345678, "+81" the reverse
 * data-url        the daemon, if this script comes from elsewhere: "wss://pbx.example/crmws"
 * data-token      browser token, if the daemon wants one (never SECRET_TOKEN: every reader sees it)
 * data-manual     wait for the page's own code, which may give the same options and two functions:
 *
 *   const n = PopupNotifier.connect({ exten: '201', onCall: (call) => {}, onStatus: (status) => {} });
 *
 * onCall gets every event of a call, in every tab: { phone, exten, name, event, time, mine, missed, ... }; it may
 * return false (no popup), or { name, open, note }, or a promise of these. onStatus gets { state: 'connecting' or
 * 'open', reason, text }; it returns false: nothing of it in the page. n.calls: those that are known, with their state.
 * n.exten = '202'; n.askPermission(), on a click: desktop notifications; n.close() takes everything away.
 * Options may also stand in the script's own address: popup-sample.js?exten=201&manual
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
  const RINGING = 60000;         // ms without news: a call does not look like ringing any more
  const LATE = 30000;            // ms: one that is older when it comes never does
  const OVERTAKING = 3000;       // ms: a ring so close behind an answer or end was sent before that
  const ENDED = 20000;           // ms that a card stays when its call has ended
  const FORGOTTEN = 43200000;    // ms after which nothing is known of a call
  const LOOKUP_TIMEOUT = 5000;   // ms that the CRM may take to say who it is
  const CLAIM_LIFE = 600000;     // ms that a tab keeps a call from the others, which may hear of it late
  const REPEAT = 3000;           // ms: the same for a call without key, which may well come again
  const SHORT_GAP = 5000;        // ms without a connection that nobody is told of
  const OWNER_FIRST = 200;       // ms that other tabs leave to the one that shows the call already
  const MAX_KEYS = 20000;        // calls that are known when they come again: those of a whole outage
  const MAX_CALLS = 200;         // that are known
  const MAX_CARDS = 5;
  const WITHHELD = /^(anonymous|private|unknown|unavailable|restricted|withheld|非通知)?$/i;
  const WORDS = {
    ringing: ['Incoming call', '着信'], rang: ['Rang', '着信あり'], talking: ['On the phone', '通話中'],
    missed: ['Missed call', '不在着信'], ended: ['Call ended', '終了'],
    exten: ['ext.', '内線'], answered: ['answered by', '応答'], times: ['times', '回目'],
    withheld: ['withheld', '非通知'], link: ['Open', '開く'], dismiss: ['Close', '閉じる'],
    create: ['Add to the CRM', '登録する'], stranger: ['not in the CRM', '登録なし'],
    failed: ['the CRM does not answer', '照会できません'],
    open: ['Connected', '接続中'], connecting: ['Not connected, trying again', '接続が切れています。再接続します'],
    since: ['Offline since', '切断'], ask: ['My extension', '自分の内線'], save: ['OK', '設定'],
    allow: ['Desktop notifications', 'デスクトップ通知を許可'],
    gap: ['Connected; calls may be missing', '接続中 (受け取れなかった着信があるかもしれません)'],
    unreachable: ['The PBX cannot be reached', 'PBX に接続できません'],
    permission: ['The browser keeps this page from the local network', 'ブラウザでローカルネットワークへの接続を許可してください'],
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
  const splitList = (text = '') => text.toLowerCase().split(/[\s,]+/).filter(Boolean);
  function socketAddress({ url = '/crmws', token }, extens) {
    const address = new URL(url, script.src);
    address.protocol = address.protocol.replace('http', 'ws');
    extens.forEach((one) => address.searchParams.append('exten', one));
    if (token) address.searchParams.set('token', token);
    return address;
  }
  // What is kept for this tab, or for this browser; a page may forbid both.
  function keep(storage, key, value) {
    try {
      if (value === undefined) return JSON.parse(window[storage].getItem(key));
      window[storage].setItem(key, JSON.stringify(value));
    } catch (error) { /* it is not kept */ }
    return null;
  }

  // --- 2. Connection --------------------------------------------------------
  // Keeps one WebSocket open, from a position in the stream of calls on, until close() is called.
  function keepConnected(address, start, receive, report) {
    let socket, timer, notice, heardAt, openedAt, isMixed;
    let patience;         // ms of silence that mean a dead connection
    let position = start; // the last id of any message: all calls up to it have arrived
    let failures = 0;     // connections in a row that did not hold
    let cause = {};       // why there is none: reason and text, once known
    let blocked = '';     // what the page's policy forbade

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
      const found = await findCause(address, isMixed, blocked);
      if (openedAt < Infinity || found.reason === cause.reason) return;
      cause = found;
      if (report('connecting', cause) === false || (position && cause.reason === 'unreachable')) return;
      dismiss(notice);
      notice = showNotice(cause.text);
    }
    // After a sleep readyState says OPEN for a long time; the age of the last message tells.
    function look({ type }) {
      if (socket && Date.now() - heardAt > patience) onclose();
      if (type === 'online' || (type !== 'tick' && !document.hidden && !socket)) open();
    }
    function onViolation({ effectiveDirective, blockedURI }) {
      if (/^(wss?|https?):/.test(blockedURI) && blockedURI.includes(address.host)) blocked = effectiveDirective;
    }
    const ticker = setInterval(look, 1000, { type: 'tick' });
    const listening = new AbortController();
    ['online', 'pageshow', 'visibilitychange'].forEach((type) => window.addEventListener(type, look, listening));
    document.addEventListener('securitypolicyviolation', onViolation, listening);
    window.addEventListener('pagehide', drop, listening); // a page that may come back holds no connection
    timer = setTimeout(open, 0); // not at once: the page has no `n` yet
    return {
      position: () => position,
      close() {
        drop();
        clearInterval(ticker);
        listening.abort();
        dismiss(notice);
      },
    };
  }

  // The browser hides why a handshake was refused; the daemon's answer to a plain GET tells.
  async function findCause({ href }, isMixed, blocked) {
    if (blocked) return { reason: 'policy', text: `${say('policy')}: ${blocked} ${new URL(href).origin}` };
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

  // --- 3. The life of a call ------------------------------------------------
  // What is known of a call are facts: who rang, who answered, the end, each with its time. They add up to the
  // same state in whatever order they come, and however often.
  const newCall = (id, isNamed) => ({
    id, isNamed, phone: '', name: '', began: Infinity, seen: 0, rings: {}, answers: {}, ended: 0, times: 1, details: {},
  });

  function learn(call, { event, exten, phone, name, time, late }) {
    if (time < call.began) Object.assign(call, { began: time, phone, exten, name: name || call.name });
    call.name = call.name || name;
    call.seen = Math.max(call.seen, time);
    call.isLate = late;
    if (event === 'end') call.ended = Math.max(call.ended, time);
    const facts = { ring: call.rings, answer: call.answers }[event] || {};
    splitList(exten).forEach((one) => { facts[one] = Math.max(facts[one] || 0, time); });
  }

  // Returns [state, since when, extensions]; the state is a key of STATES, or 'gone' where nothing is to be shown.
  function stateOf(call, mine, now) {
    const isMine = (exten) => !mine.length || exten === 'all' || mine.includes(exten);
    const latest = (facts, test) => Math.max(0, ...Object.keys(facts).filter(test).map((exten) => facts[exten]));
    const answeredAt = latest(call.answers, () => true);
    const holders = Object.keys(call.answers).filter((exten) => call.answers[exten] === answeredAt);
    const isHere = holders.some(isMine);
    const rangAt = latest(call.rings, isMine);
    const rang = Object.keys(call.rings);
    const settledAt = Math.max(answeredAt, call.ended);
    if (rangAt && (!settledAt || rangAt - settledAt >= OVERTAKING)) {
      return [now - rangAt < RINGING && !call.isLate ? 'ringing' : 'rang', rangAt, rang];
    }
    if (call.ended && !answeredAt && rangAt) return ['missed', rangAt, rang];
    if (call.ended && isHere && mine.length && now - call.ended < ENDED) return ['ended', call.ended, holders];
    if (!call.ended && isHere) return ['talking', answeredAt, holders];
    return ['gone', 0, []];
  }
  const STATES = { // rank: who stays when there is no room
    ringing: { rank: 5, role: 'alert' },
    talking: { rank: 4, role: 'status' },
    missed: { rank: 3, role: 'status' },
    rang: { rank: 2, role: 'status' },
    ended: { rank: 1, role: 'status' },
  };

  // --- 4. Dispatch ----------------------------------------------------------
  function connect(given) {
    const options = { onCall() {}, onStatus() {}, alert: '', ...scriptOptions, ...given };
    const key = `popup-notifier ${new URL(options.url || '/crmws', script.src).href}`;
    const kept = keep('sessionStorage', key) || { position: '', calls: [] };
    const calls = new Map(kept.calls.map((call) => [call.id, call]));
    const keys = new Set(); // of the messages that came
    let ahead = 0;          // ms that the server's clock is ahead of ours
    let mine = [];
    let connection;
    let state = { state: 'connecting', since: Date.now() };
    let isQuiet = false;    // the page says itself how the connection is
    let isClosed = false;
    let tellsEnds = Boolean(kept.tellsEnds); // this PBX tells when a call is over

    const now = () => Date.now() + ahead;
    function report(name, cause) {
      if (name !== state.state) state = { state: name, since: Date.now() };
      isQuiet = guard(options.onStatus, { state: name, reason: '', text: say(name), ...cause }) === false;
      draw();
      return !isQuiet;
    }
    function receive(message) {
      if (message.type === 'CALL_IN' && !isRepeated(message.key)) take(message);
      if ((message.type === 'HELLO' || message.type === 'ALIVE') && message.time) ahead = message.time - Date.now();
      if (message.type === 'HELLO' && !message.complete) report('open', { reason: 'gap', text: say('gap') });
    }
    // A call may come again after an outage, also from another daemon: its key is the same.
    function isRepeated(name) {
      if (name && keys.has(name)) return true;
      if (name && keys.add(name).size > MAX_KEYS) keys.delete(keys.values().next().value);
      return false;
    }
    // The Go daemon's calls have no key, no time, and their fields in `data` alone.
    function take({ key: name, time = now(), data }) {
      const { phone = '', exten = 'all', event = 'ring' } = data;
      const id = data.uniqueid || (event !== 'ring' && unnamedCall(phone.trim())) || name || `${phone} ${time}`;
      const late = now() - time > LATE;
      const extens = splitList(exten);
      const isMine = !mine.length || extens.some((one) => one === 'all' || mine.includes(one));
      const call = calls.get(id) || newCall(id, Boolean(data.uniqueid));
      learn(call, { event, exten, phone: phone.trim(), name: data.name || '', time, late });
      tellsEnds = tellsEnds || event === 'end';
      if (event === 'answer' && !tellsEnds) endOlder(call, extens, time);
      calls.delete(id); // the latest last
      calls.set(id, call);
      if (calls.size > MAX_CALLS) calls.delete(calls.keys().next().value);
      const update = (more) => enrich(call, more);
      const heard = { key: name, phone: phone.trim(), exten, name: data.name || '', event, uniqueid: id, data };
      Object.assign(heard, { time: new Date(time), mine: isMine, missed: late && event === 'ring', update });
      const answer = guard(options.onCall, heard);
      decide(call, { key: name, phone, exten, event }, isMine || answer !== false ? answer : undefined);
    }
    // An answer or end without uniqueid belongs to the last call of that caller.
    function unnamedCall(phone) {
      const found = [...calls.values()].filter((call) => !call.isNamed && call.phone === phone).pop();
      return found && found.id;
    }
    // Whoever answers the next call has ended the one before, if the PBX does not tell so itself.
    function endOlder(answered, extens, time) {
      calls.forEach((call) => {
        const [was, since, holders] = stateOf(call, mine, now());
        const isSame = was === 'talking' && call !== answered && holders.some((one) => extens.includes(one));
        if (isSame && since < time) call.ended = time;
      });
    }
    // Whether this tab shows a call: not if the page says no, or another tab has it.
    async function decide(call, first, answer) {
      Promise.resolve(answer).then((more) => enrich(call, more)).catch(complain);
      if (call.isOurs) claim(first, true).catch(complain);
      if (answer === false || stateOf(call, mine, now())[0] === 'gone' || call.isOurs !== undefined) return;
      call.isOurs = null; // not known yet
      call.isOurs = await claim(first).catch(() => true); // storage is blocked: better twice than never
      if (!call.isOurs) return;
      calls.forEach((other) => { if (isRepeatedBy(call, other)) merge(call, other); });
      draw();
      if (options.lookup && !WITHHELD.test(call.phone)) lookUp(call);
    }
    function enrich(call, more) {
      if (more === false) call.isHidden = true;
      else Object.keys(more || {}).forEach((name) => { if (more[name]) call.details[name] = more[name]; });
      draw();
    }
    // The same caller again is the same card, unless the first call is still on somebody's phone.
    function isRepeatedBy(call, other) {
      const [was] = stateOf(other, mine, now());
      const isOver = was === 'rang' || was === 'missed' || was === 'ended' || (was === 'ringing' && !other.isNamed);
      return other !== call && other.isOurs && isOver && other.phone === call.phone && !WITHHELD.test(call.phone);
    }
    function merge(call, other) {
      call.times += other.times;
      call.details = { ...other.details, ...call.details };
      calls.delete(other.id);
    }
    async function lookUp(call) {
      try {
        const address = new URL(fillIn(call, options, options.lookup), document.baseURI);
        const answer = await fetch(address, { signal: AbortSignal.timeout(LOOKUP_TIMEOUT) });
        if (!answer.ok && answer.status !== 404) throw new Error(`${address} answers ${answer.status}`);
        const text = answer.ok ? await answer.text() : '';
        const found = text ? JSON.parse(text) : null;
        call.isStranger = !found || !(found.name || found.open || found.note);
        enrich(call, { ...found, ...call.details });
      } catch (error) {
        call.hasFailed = true;
        complain(error);
        draw();
      }
    }

    // Draws the cards of this tab anew, from what is known.
    function draw() {
      if (isClosed) return;
      const shown = [...calls.values()].reverse().map((call) => ({ call, state: stateOf(call, mine, now()) }))
        .filter(({ call, state: [name] }) => name !== 'gone' && call.isOurs && !call.isHidden)
        .sort((a, b) => STATES[b.state[0]].rank - STATES[a.state[0]].rank || b.call.seen - a.call.seen)
        .slice(0, MAX_CARDS)
        .sort((a, b) => b.call.seen - a.call.seen);
      showCards(shown.map(({ call, state: how }) => render(call, how, options, mine)), close);
      alertAgent(shown.filter(({ state: [name] }) => name === 'ringing').map(({ call }) => call), options);
      showMark(isQuiet ? null : { ...state, extens: mine, isAsking: options.exten === 'ask', setExten });
    }
    function close(id) {
      if (calls.has(id)) calls.get(id).isHidden = true;
      draw();
    }
    function save() {
      const fresh = [...calls.values()].filter((call) => now() - call.seen < FORGOTTEN);
      // One that no tab has claimed yet is ours then: better twice than never.
      fresh.filter((call) => call.isOurs === null).forEach((call) => { call.isOurs = true; });
      keep('sessionStorage', key, { position: connection ? connection.position() : '', calls: fresh, tellsEnds });
    }
    function setExten(text) {
      if (options.exten === 'ask' && text !== 'ask') keep('localStorage', 'popup-notifier exten', text);
      mine = splitList(text === 'ask' ? keep('localStorage', 'popup-notifier exten') || '' : text);
      const position = connection ? connection.position() : kept.position;
      if (connection) connection.close();
      const isUnknown = options.exten === 'ask' && !mine.length; // who has not answered is not shown everybody's
      connection = isUnknown ? null : keepConnected(socketAddress(options, mine), position, receive, report);
      draw();
    }

    setExten(options.exten);
    const ticker = setInterval(draw, 1000);
    window.addEventListener('pagehide', save);
    return {
      get exten() { return mine.join(','); },
      set exten(text) { setExten(String(text)); },
      get calls() {
        return [...calls.values()].map(({ id, phone, name, ...call }) => {
          const [how, since, extens] = stateOf(call, mine, now());
          return { uniqueid: id, phone, name, state: how, since: new Date(since), exten: extens.join(',') };
        });
      },
      askPermission: async () => Notification.requestPermission(),
      close() {
        if (connection) connection.close();
        clearInterval(ticker);
        window.removeEventListener('pagehide', save);
        keep('sessionStorage', key, null);
        isClosed = true; // what comes late, such as a look-up, draws nothing
        showCards([], close);
        alertAgent([], options);
        showMark(null);
      },
    };
  }
  // What the page's own code throws is the page's: it stops nothing here.
  function guard(call, ...args) {
    try { return call(...args); } catch (error) { return complain(error); }
  }
  function complain(error) { console.error('popup-notifier:', error); }

  // Of several tabs one shows the call; the visible one waits least. Transactions of a database come one after
  // the other, whichever tab they are of; plain http pages have them too (but no Web Locks).
  async function claim({ key, phone, exten, event }, isOwner = false) {
    const sleep = (ms) => new Promise((resolve) => { setTimeout(resolve, ms); });
    const done = (request) => new Promise((resolve, reject) => {
      Object.assign(request, { onsuccess: () => resolve(request.result), onerror: () => reject(request.error) });
    });
    const [call, life] = key ? [key, CLAIM_LIFE] : [`${phone} ${exten}`, REPEAT];
    const patience = (document.hidden ? 300 : 0) + (document.hasFocus() ? 0 : 100 * Math.random());
    if (!isOwner) await sleep(patience + (event === 'ring' ? 0 : OWNER_FIRST));
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

  // --- 5. Cards -------------------------------------------------------------
  // Turns a call into the plain data of its card: { id, kind, role, lines, links, target }.
  function render(call, [kind, since, extens], options, mine) {
    const { name, note = '', open = '' } = { ...call.details, name: call.details.name || call.name };
    const isWithheld = WITHHELD.test(call.phone);
    const called = extens.filter((exten) => exten !== 'all').join(',');
    const who = say(kind === 'talking' && !mine.length ? 'answered' : 'exten');
    const times = call.times > 1 && `${call.times}${isJapanese() ? '' : ' '}${say('times')}`;
    const head = [called && `${who} ${called}`, clock(since), times].filter(Boolean).join(' ');
    const hint = (call.isStranger && say('stranger')) || (call.hasFailed && say('failed')) || '';
    const links = [{ text: say('link'), href: open || (!isWithheld && fillIn(call, options, options.open)) }];
    if (call.isStranger) links.unshift({ text: say('create'), href: fillIn(call, options, options.create) });
    const lines = [isWithheld ? say('withheld') : call.phone, name, note || hint].map(String);
    if (!lines[2]) lines.pop();
    return { id: call.id, kind, role: STATES[kind].role, head, lines, links, target: options.target || '_blank' };
  }

  // +81312345678 and 0312345678 are one number, but a CRM may know only one of them.
  function fillIn({ phone, name, exten }, { normalise }, template = '') {
    const values = { phone, exten, name };
    if (normalise === '0') values.phone = phone.replace(/^\+81/, '0');
    if (normalise === '+81') values.phone = phone.replace(/^0(?!0|10)/, '+81');
    return template.replace(/\{(phone|exten|name)\}/g, (_, key) => encodeURIComponent(values[key]));
  }

  const STYLE = `
    :host { all: initial !important }
    section { position: fixed; inset: auto 0 0 auto; z-index: 2147483647; width: min(380px, 100vw); max-height: 100vh;
      box-sizing: border-box; padding: 12px 16px; overflow: auto; display: flex; flex-direction: column-reverse;
      gap: 10px; pointer-events: none; font: 15px/1.45 system-ui }
    article, form { --line: #1a7f37; position: relative; flex: none; padding: 12px 48px 12px 16px;
      border: 1px solid #8886; border-left: 5px solid var(--line); border-radius: 8px; background: #fff; color: #1f2328;
      box-shadow: 0 6px 24px #0004; overflow-wrap: anywhere; pointer-events: auto }
    .talking { --line: #0969da } .missed, .notice { --line: #cf222e } .rang { --line: #9a6700 }
    .ended { --line: #59636e }
    a, b { color: var(--line) } p { margin: 0; unicode-bidi: isolate } p:empty { display: none }
    article p:nth-of-type(2) { font-size: 1.5em; font-weight: 600 }
    .ended p:nth-of-type(2), .rang p:nth-of-type(2) { font-size: 1.15em }
    a { display: inline-block; min-width: 44px; padding: 8px 14px 2px 0; font-weight: 600 }
    button, input { min-height: 32px; border: 1px solid #8886; border-radius: 6px; background: none; color: inherit;
      font: inherit }
    article > button { position: absolute; top: 6px; right: 6px; width: 36px; height: 36px; border: 0;
      font-size: 20px; cursor: pointer }
    .mark { align-self: flex-end; min-height: 24px; padding: 2px 10px; border: 0; border-radius: 12px;
      background: #1f2328cc; color: #fff; font-size: 12px; pointer-events: auto; cursor: pointer }
    .mark::before { content: '●'; margin-right: 6px; color: #4ac26b } .mark.connecting::before { color: #ff8182 }
    form { padding-right: 16px; display: grid; gap: 8px } form input { padding: 4px 8px }
    @media (prefers-color-scheme: dark) {
      article, form { --line: #3fb950; background: #1c2128; color: #e6edf3 }
      .talking { --line: #58a6ff } .missed, .notice { --line: #ff7b72 } .rang { --line: #d29922 }
      .ended { --line: #9198a1 } }
    @media print { section { display: none } }`;

  const host = element('popup-notifier', { popover: 'manual' });
  const root = host.attachShadow({ mode: 'open' }); // where the page's styles do not reach
  const stack = root.appendChild(element('section', {}));
  const cards = new Map(); // by the call's id
  root.adoptedStyleSheets = [new CSSStyleSheet()]; // which no Content-Security-Policy of the page stops
  root.adoptedStyleSheets[0].replaceSync(STYLE);
  // Escape closes the card that has the focus, or the newest: but never one behind a dialog that takes it, too.
  document.addEventListener('keydown', (event) => {
    if (event.key !== 'Escape' || event.isComposing || event.defaultPrevented) return;
    const focused = root.activeElement && root.activeElement.closest('article');
    const isTaken = document.fullscreenElement || document.querySelector('dialog:modal');
    if (focused || !isTaken) dismiss(focused || stack.querySelector('article'));
  });

  // Strings become text nodes: nothing that a caller sends is ever read as markup.
  function element(tag, attributes, ...children) {
    const node = document.createElement(tag);
    Object.keys(attributes).forEach((name) => node.setAttribute(name, attributes[name]));
    node.append(...children);
    return node;
  }
  // A page may replace all that it has; and what opened last is on top: a dialog, a full screen, or we.
  function surface(isNew) {
    if (!host.isConnected) document.documentElement.append(host);
    else if (!isNew) return;
    try {
      host.hidePopover();
      host.showPopover();
    } catch (error) { /* an older browser: the z-index has to do */ }
  }

  function makeCard(kind, close, ...children) {
    const button = element('button', { 'aria-label': say('dismiss'), type: 'button' }, '×');
    const card = element('article', { class: kind, role: 'status', lang: language() }, ...children, button);
    card.close = button.onclick = close;
    stack.querySelector('article') ? stack.querySelector('article').before(card) : stack.append(card);
    surface(true);
    return card;
  }
  function showNotice(text) {
    const notice = makeCard('notice', () => notice.remove(), element('p', {}, text));
    return notice;
  }
  function dismiss(card) { if (card) card.close(); }

  // Draws what has changed; the newest card is the first, and stands lowest.
  function showCards(views, close) {
    const ids = new Set(views.map(({ id }) => id));
    cards.forEach((card, id) => { if (!ids.has(id) && card.owner === close) remove(card, id); });
    [...views].reverse().forEach((view) => {
      const text = JSON.stringify(view);
      const card = cards.get(view.id) || makeCard(view.kind, () => close(view.id));
      if (card.text !== text) fill(card, view);
      Object.assign(card, { text, owner: close });
      cards.set(view.id, card);
    });
    // Moved only if they have to be: a card that is moved loses the focus.
    const places = [...stack.querySelectorAll('article:not(.notice)')].filter((card) => card.owner === close);
    const wanted = views.map(({ id }) => cards.get(id));
    if (wanted.some((card, index) => card !== places[index])) stack.append(...wanted);
  }
  function remove(card, id) {
    card.remove();
    cards.delete(id);
  }
  function fill(card, { kind, role, head, lines, links, target }) {
    const rel = target === '_blank' ? 'noopener' : ''; // with it, a named window would be a new one each time
    const safe = links.map(({ text, href }) => element('a', { href: href || '', target, rel }, text))
      .filter((link, index) => links[index].href && /^https?:$/.test(link.protocol));
    const title = element('p', {}, element('b', {}, say(kind)), ` ${head}`);
    card.className = kind;
    card.setAttribute('role', role);
    card.replaceChildren(title, ...lines.map((line) => element('p', {}, line)), ...safe, card.lastChild);
  }

  // --- 6. For who looks elsewhere -------------------------------------------
  let title = '';       // the page's own, while ours stands there
  let ringTone = null;  // { context, timer }
  const notifications = new Map();

  function alertAgent(ringing, options) {
    const kinds = splitList(options.alert);
    alertByTitle(kinds.includes('title') ? ringing[0] : undefined);
    if (kinds.includes('sound')) alertBySound(ringing.length > 0);
    ringing.forEach((call) => {
      const isElsewhere = document.hidden || (kinds.includes('notification') && !document.hasFocus());
      if (isElsewhere && !call.isAnnounced) notify(call, options);
      call.isAnnounced = true;
    });
    const ids = ringing.map(({ id }) => id);
    notifications.forEach((shown, id) => {
      if (ids.includes(id)) return;
      shown.close();
      notifications.delete(id);
    });
  }
  function alertByTitle(call) {
    const ours = call && `☎ ${WITHHELD.test(call.phone) ? say('withheld') : call.phone}`;
    if (ours && document.title !== ours) title = document.title.startsWith('☎') ? title : document.title;
    if (ours) document.title = ours;
    else if (document.title.startsWith('☎')) document.title = title;
  }
  // Two tones every three seconds. Browsers allow it once the agent has clicked anywhere in the page.
  function alertBySound(isRinging) {
    if (!isRinging && ringTone) clearInterval(ringTone.timer);
    if (!isRinging || (ringTone && ringTone.timer)) { if (!isRinging && ringTone) ringTone.timer = 0; return; }
    ringTone = ringTone || { context: new AudioContext() };
    const ring = () => [660, 880].forEach((frequency, index) => {
      const { context } = ringTone;
      if (context.state !== 'running') return; // else all would sound at once after the click
      const [tone, gain] = [context.createOscillator(), context.createGain()];
      tone.frequency.value = frequency;
      gain.gain.value = 0.1;
      tone.connect(gain).connect(context.destination);
      tone.start(context.currentTime + index * 0.35);
      tone.stop(context.currentTime + index * 0.35 + 0.3);
    });
    ringTone.context.resume();
    ring();
    ringTone.timer = setInterval(ring, 3000);
  }
  function notify(call, options) {
    if (!window.Notification || Notification.permission !== 'granted') return;
    const name = call.details.name || call.name;
    const number = WITHHELD.test(call.phone) ? say('withheld') : call.phone;
    const exten = Object.keys(call.rings).filter((one) => one !== 'all').join(',');
    const body = [say('ringing'), exten && `${say('exten')} ${exten}`, name && number].filter(Boolean).join(' ');
    const shown = new Notification(name || number, { body, tag: call.id, requireInteraction: true });
    const href = call.details.open || fillIn(call, options, options.open);
    shown.onclick = () => {
      window.focus();
      if (/^https?:/.test(href)) window.open(href, options.target || '_blank', options.target ? '' : 'noopener');
    };
    notifications.set(call.id, shown);
  }

  // A small sign of being connected; a click shows what can be set.
  let mark = null;
  function showMark(status) {
    if (!status || !mark) {
      if (mark) mark.remove();
      mark = status && element('button', { class: 'mark', type: 'button' });
      if (mark) stack.prepend(mark);
      if (!status && stack.querySelector('form')) stack.querySelector('form').remove();
    }
    if (!status) return;
    const { state, since, extens, isAsking } = status;
    const isShort = state !== 'open' && Date.now() - since < SHORT_GAP;
    const text = isShort ? '…' : state === 'open' ? say('open') : `${say('since')} ${clock(since)}`;
    const label = [extens.join(',') || (isAsking && `${say('ask')}?`), text].filter(Boolean).join(' ');
    if (mark.textContent !== label) mark.textContent = label;
    mark.className = isShort ? 'mark' : `mark ${state}`;
    mark.onclick = () => showSettings(status);
    surface(false);
    if (isAsking && !extens.length && !stack.querySelector('form')) showSettings(status);
  }
  function showSettings({ extens, isAsking, setExten }) {
    const open = stack.querySelector('form');
    if (open) { open.remove(); return; }
    const input = element('input', { value: extens.join(','), 'aria-label': say('ask'), placeholder: '201' });
    const allow = element('button', { type: 'button' }, say('allow'));
    const form = element('form', { lang: language() });
    allow.onclick = () => Notification.requestPermission().then(() => form.remove());
    if (isAsking) form.append(element('label', {}, say('ask')), input, element('button', {}, say('save')));
    if (window.isSecureContext && window.Notification && Notification.permission === 'default') form.append(allow);
    form.onsubmit = (event) => {
      event.preventDefault();
      form.remove();
      setExten(input.value);
    };
    if (form.childElementCount) mark.after(form);
  }

  window.PopupNotifier = { connect };
  if (!('manual' in scriptOptions)) connect();
})();
