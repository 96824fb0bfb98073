// Data, figures as text, elements, theme and tooltip. Text reaches the page as text nodes only, never as markup.
const D = JSON.parse(document.getElementById('data').textContent);
const N = D.ids.length;
const METRIC = new Map(D.metrics.map((m) => [m.name, m]));

// The same rules as units.py: smallest and largest exponent of the SI prefix that a unit takes.
const PREFIXED = {B: [0, 12], s: [-9, 0], J: [-6, 9], W: [-3, 6], g: [-6, 6], Hz: [0, 9], FLOP: [0, 18], 'FLOP/s': [0, 18],
  'B/s': [0, 15], 'tokens/s': [0, 12], 'J/token': [-9, 6], parameters: [0, 12]};
const LETTERS = {'-9': 'n', '-6': 'µ', '-3': 'm', 0: '', 3: 'k', 6: 'M', 9: 'G', 12: 'T', 15: 'P', 18: 'E'};

function prefix(value, unit) {
  const bounds = PREFIXED[unit];
  if (!bounds || !value) return [1, ''];
  const exponent = 3 * Math.floor(Math.log10(Math.abs(value) * (1 + 1e-9)) / 3);
  const held = Math.min(Math.max(exponent, bounds[0]), bounds[1]);
  return [10 ** held, LETTERS[held]];
}
function digits(value, significant = 4) {
  if (value === 0) return '0';
  const magnitude = Math.floor(Math.log10(Math.abs(value)));
  if (magnitude < -5 || magnitude >= 9) return value.toExponential(significant - 1);
  const fixed = value.toFixed(Math.max(significant - 1 - magnitude, 0)).split('.');
  fixed[0] = fixed[0].replace(/\B(?=(\d{3})+$)/g, '\u202f');
  return fixed.join('.');
}
// Near 1 a ratio is read closely: a digit more.
const near = (ratio) => (ratio > 0.9 && ratio < 1.1 ? ratio.toFixed(3) : digits(ratio, 3));
function quantity(value, unit, significant = 4) {
  if (value === null || value === undefined) return '';
  if (unit === 'USD') return '$' + digits(value, significant);
  const [factor, letter] = prefix(value, unit);
  const shown = unit === 'parameters' ? letter : letter + (unit || '');
  return digits(value / factor, significant) + (shown ? ' ' + shown : '');
}
// One prefix and one number of decimals a column or an axis, so that figures line up and compare by eye.
function scaleOf(metric) {
  const values = metric.value.filter((v) => v !== null && v !== 0).map(Math.abs).sort((a, b) => a - b);
  const middle = values[values.length >> 1] || 0, [factor, letter] = prefix(middle, metric.unit);
  const decimals = middle ? Math.min(Math.max(3 - Math.floor(Math.log10(middle / factor)), 0), 6) : 0;
  return {factor, decimals, unit: metric.unit === 'parameters' ? letter : metric.unit ? letter + metric.unit : ''};
}
function aligned(value, scale) {
  const shown = value / scale.factor, size = Math.abs(shown);
  if (size && (size < 10 ** -scale.decimals || size >= 1e9)) return digits(shown);
  const whole = Number.isInteger(value) && scale.factor === 1 ? 0 : scale.decimals;
  const [left, right] = shown.toFixed(whole).split('.');
  return left.replace(/\B(?=(\d{3})+$)/g, '\u202f') + (right ? '.' + right : '');
}
const measured = (metric) => metric.value.some((v) => v !== null);
const end = (metric, which, i) => (metric[which] ? metric[which][i] : null);

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === 'on') for (const [name, fn] of Object.entries(value)) node.addEventListener(name, fn);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value === true ? '' : value);
  }
  node.append(...children.filter((c) => c !== null && c !== undefined));
  return node;
}
function svg(tag, attributes = {}, text) {
  const node = document.createElementNS('http://www.w3.org/2000/svg', tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
}
function choose(names, selected, change, label) {
  const box = el('select', {on: {change: () => change(box.value)}, 'aria-label': label}, ...names.map((n) => el('option', {value: n}, n)));
  box.value = selected;
  return el('label', {}, label, box);
}
function place(id, ...children) {
  const node = document.getElementById(id);
  if (node) node.replaceChildren(...children);
  return node;
}

// Theme: as the system says until the reader says otherwise; plots are drawn again with the other config.
const system = window.matchMedia('(prefers-color-scheme: dark)');
let chosen = null;
try { chosen = localStorage.getItem('dyno-theme'); } catch { chosen = null; }  // a file:// page may have no storage
const drawers = [];
const isDark = () => (chosen ? chosen === 'dark' : system.matches);
function paint() {
  if (chosen) document.documentElement.dataset.theme = chosen; else delete document.documentElement.dataset.theme;
  document.getElementById('theme').textContent = chosen ? `Theme: ${chosen}` : 'Theme: system';
  for (const draw of drawers) draw();
}
document.getElementById('theme').addEventListener('click', () => {
  const [other, same] = system.matches ? ['light', 'dark'] : ['dark', 'light'];
  chosen = chosen === null ? other : chosen === other ? same : null;
  try { if (chosen) localStorage.setItem('dyno-theme', chosen); else localStorage.removeItem('dyno-theme'); } catch { /* not kept */ }
  paint();
});
system.addEventListener('change', () => paint());

document.addEventListener('click', (event) => {
  const button = event.target.closest('[data-copy]');
  if (!button) return;
  const done = (word) => { button.textContent = word; setTimeout(() => { button.textContent = 'Copy'; }, 1200); };
  if (!navigator.clipboard) { done('Select and copy'); return; }
  navigator.clipboard.writeText(button.dataset.copy).then(() => done('Copied'), () => done('Select and copy'));
});

const tip = document.body.appendChild(el('div', {id: 'tip', role: 'tooltip'}));
let tipMetrics = [];
function showTip(handler, event, item, value) {
  const i = Number(value);
  if (value === null || value === undefined || value === '' || !(i >= 0 && i < N)) { tip.style.display = 'none'; return; }
  const lines = tipMetrics.map((name) => METRIC.get(name)).filter(Boolean).map((m) => {
    const low = end(m, 'low', i), high = end(m, 'high', i);
    const range = low !== null && high !== null ? ` (${quantity(low, m.unit)} – ${quantity(high, m.unit)})` : '';
    return el('div', {}, el('span', {}, m.name), el('span', {}, m.value[i] === null ? D.notes[m.note[i]] : quantity(m.value[i], m.unit) + range));
  });
  const broken = D.violates[i].length ? [el('div', {}, el('span', {}, 'violates'), el('span', {}, D.violates[i].join(', ')))] : [];
  tip.replaceChildren(el('b', {}, nameOf(i)), ...lines, ...broken, el('div', {}, el('span', {}, 'run'), el('span', {}, D.ids[i])));
  tip.style.display = 'block';
  const box = tip.getBoundingClientRect();
  tip.style.left = Math.max(4, Math.min(event.clientX + 14, innerWidth - box.width - 8)) + 'px';
  tip.style.top = Math.max(4, event.clientY + 16 + box.height > innerHeight ? event.clientY - box.height - 10 : event.clientY + 16) + 'px';
}
