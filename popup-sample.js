/*
 * popup-sample.js: shows who is calling, in any web page.  / 着信を Web ページに表示します。
 *
 * Paste one line into the page (the address is that of this script):
 *
 *   <script src="http://pbx:8989/popup-sample.js" data-exten="201"
 *           data-open="https://crm.example/search?phone={phone}"></script>
 *
 *   data-exten   my extensions, "201" or "201,202"; without it every call is shown
 *   data-open    the link of the popup; {phone}, {exten} and {name} are filled in, percent-encoded
 *   data-url     address of the daemon, when the script comes from elsewhere: "wss://pbx.example/crmws"
 */
(() => {
  'use strict';

  // --- 1. Options -----------------------------------------------------------

  const script = document.currentScript;
  const language = document.documentElement.lang || navigator.language || 'en';
  const text = language.toLowerCase().startsWith('ja')
    ? { call: '着信', withheld: '非通知', exten: '内線', open: '開く', close: '閉じる' }
    : { call: 'Incoming call', withheld: 'withheld', exten: 'ext.', open: 'Open', close: 'Close' };

  const mine = splitList(script.dataset.exten);

  function splitList(value) {
    return String(value || '').split(',').map((item) => item.trim()).filter(Boolean);
  }

  function socketAddress() {
    const url = new URL(script.dataset.url || '/crmws', script.src);
    url.protocol = url.protocol.replace('http', 'ws');
    mine.forEach((exten) => url.searchParams.append('exten', exten));
    return url.href;
  }

  // --- 2. Connection --------------------------------------------------------

  const LONGEST_DELAY = 30000;   // ms between two attempts, at most
  const GOOD_CONNECTION = 10000; // ms after which the delay starts small again

  let delay = 500;

  function connect() {
    const socket = new WebSocket(socketAddress());
    let goodTimer = 0;
    socket.onopen = () => {
      goodTimer = setTimeout(() => { delay = 500; }, GOOD_CONNECTION);
    };
    socket.onmessage = (event) => receive(event.data);
    socket.onclose = () => {
      clearTimeout(goodTimer);
      // The random part keeps all browsers from coming back at the same moment.
      setTimeout(connect, delay * (0.5 + Math.random()));
      delay = Math.min(delay * 2, LONGEST_DELAY);
    };
  }

  // --- 3. Dispatch ----------------------------------------------------------

  function receive(message) {
    let call;
    try {
      call = JSON.parse(message);
    } catch (error) {
      return;
    }
    if (!call || call.type !== 'CALL_IN' || !call.data) return;
    const { phone = '', exten = 'all', name = '' } = call.data;
    if (concernsMe(String(exten))) showToast(String(phone), String(exten), String(name));
  }

  function concernsMe(exten) {
    const called = splitList(exten);
    return !mine.length || called.includes('all') || called.some((one) => mine.includes(one));
  }

  // --- 4. Toast -------------------------------------------------------------

  const TOAST_STYLE = 'position:fixed; right:16px; bottom:16px; z-index:2147483647; padding:12px 16px;'
    + 'border-left:4px solid #1a7f37; border-radius:6px; background:#fff; color:#1f2328;'
    + 'box-shadow:0 4px 16px rgba(0,0,0,.3); font:15px/1.5 system-ui, sans-serif';

  // Whatever the caller sent is put in as text, never as markup.
  function element(tag, content) {
    const node = document.createElement(tag);
    node.textContent = content;
    return node;
  }

  function showToast(phone, exten, name) {
    const toast = element('div', '');
    toast.style.cssText = TOAST_STYLE;
    toast.setAttribute('role', 'alert');
    const close = element('button', text.close);
    close.onclick = () => toast.remove();
    toast.append(
      element('div', `${text.call} (${text.exten} ${exten})`),
      element('strong', `${phone || text.withheld} ${name}`),
      element('div', ''),
    );
    const link = phone && linkFor({ phone, exten, name });
    if (link) {
      const anchor = element('a', text.open);
      Object.assign(anchor, { href: link, target: '_blank', rel: 'noopener' });
      toast.lastChild.append(anchor, ' ');
    }
    toast.lastChild.append(close);
    document.body.append(toast);
  }

  function linkFor(values) {
    const filled = (script.dataset.open || '')
      .replace(/\{(phone|exten|name)\}/g, (_, key) => encodeURIComponent(values[key]));
    return /^https?:\/\//i.test(filled) ? filled : '';
  }

  connect();
})();
