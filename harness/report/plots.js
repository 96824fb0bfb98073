// The plots: specifications come from charts.py without data; here they get rows, titles and the theme.
function draw(id, spec) {
  const node = document.getElementById(id);
  if (!node) return;
  // `ast` interprets expressions rather than compiling them: the page's policy forbids eval.
  vegaEmbed(node, spec, {config: D.themes[isDark() ? 'dark' : 'light'], renderer: 'svg', actions: false, ast: true, logLevel: 1, tooltip: showTip})
    .catch((error) => { node.textContent = `This plot could not be drawn: ${error.message}`; });
}
const copyOf = (spec) => JSON.parse(JSON.stringify(spec));
const usable = D.metrics.filter(measured).map((m) => m.name);
const titleOf = (metric, scale) => metric.name + (scale.unit ? ` (${scale.unit})` : '');
const nameOf = (i) => D.names[i] + (i === D.baseline && D.names[i] !== 'baseline' ? ' (baseline)' : '');
const compact = (text, most = 44) => (text.length > most ? text.slice(0, most - 1) + '…' : text);

// Trade-off --------------------------------------------------------------------------------------------------------
const view = {};
function frontOf(points, downX, downY) {
  const sign = (down, v) => (down ? v : -v);
  const sorted = points.slice().sort((a, b) => sign(downX, a.x) - sign(downX, b.x) || sign(downY, a.y) - sign(downY, b.y));
  let best = Infinity;
  return sorted.filter((p) => { const y = sign(downY, p.y); if (y < best) { best = y; return true; } return false; });
}
function setupPareto() {
  if (!document.getElementById('pareto')) return;
  if (usable.length < 2) {
    place('pareto-controls');
    place('pareto-plot', el('p', {class: 'empty'}, 'Two measured metrics are needed to draw a trade-off.'));
    return;
  }
  const goals = D.objectives.map((o) => o[0]).filter((n) => usable.includes(n));
  view.y = goals[0] || usable[0];
  view.x = goals[1] || usable.find((n) => n !== view.y);
  view.down = Object.fromEntries(D.metrics.map((m) => [m.name, m.direction === 'minimize']));
  view.logX = view.logY = false;
  drawers.push(drawPareto);
}
function controlsOf(letter) {
  const name = view[letter], log = 'log' + letter.toUpperCase();
  const flip = el('button', {type: 'button', title: 'Which direction is better', on: {click: () => { view.down[name] = !view.down[name]; drawPareto(); }}}, view.down[name] ? '↓ lower is better' : '↑ higher is better');
  const box = el('input', {type: 'checkbox', on: {change: () => { view[log] = box.checked; drawPareto(); }}});
  box.checked = view[log];
  return el('span', {class: 'group'}, choose(usable, name, (v) => { view[letter] = v; drawPareto(); }, letter), flip, el('label', {}, box, 'log'));
}
function drawPareto() {
  const mx = METRIC.get(view.x), my = METRIC.get(view.y), sx = scaleOf(mx), sy = scaleOf(my);
  const shown = (v, s) => (v === null || v === undefined ? null : v / s.factor);
  const points = [];
  for (let i = 0; i < N; i++) {
    const x = shown(mx.value[i], sx), y = shown(my.value[i], sy);
    if (x === null || y === null || (view.logX && x <= 0) || (view.logY && y <= 0)) continue;
    points.push({i, x, y, xl: shown(end(mx, 'low', i), sx) ?? x, xh: shown(end(mx, 'high', i), sx) ?? x, yl: shown(end(my, 'low', i), sy) ?? y, yh: shown(end(my, 'high', i), sy) ?? y});
  }
  const feasible = points.filter((p) => !D.violates[p.i].length);
  const front = frontOf(feasible, view.down[view.x], view.down[view.y]).sort((a, b) => a.x - b.x);
  const on = new Set(front.map((p) => p.i));
  const spec = copyOf(D.specs.pareto), limit = (metric, scale) => D.limits.filter((c) => c.metric === metric && c.bound !== null);
  spec.datasets = {
    front, others: feasible.filter((p) => !on.has(p.i) && p.i !== D.baseline), infeasible: points.filter((p) => D.violates[p.i].length && p.i !== D.baseline),
    baseline: points.filter((p) => p.i === D.baseline),
    limits_x: limit(view.x).map((c) => ({x: c.bound / sx.factor, text: compact(c.text)})).filter((c) => !view.logX || c.x > 0),
    limits_y: limit(view.y).map((c) => ({y: c.bound / sy.factor, text: compact(c.text)})).filter((c) => !view.logY || c.y > 0),
    labels: points.filter((p) => p.i === D.baseline).map((p) => ({...p, text: 'baseline'})),
  };
  for (const layer of spec.layer) {
    for (const [channel, metric, scale, log] of [['x', mx, sx, view.logX], ['y', my, sy, view.logY]]) {
      const encoding = layer.encoding[channel];
      if (!encoding || !encoding.field) continue;
      encoding.title = titleOf(metric, scale);
      if (log) encoding.scale = {type: 'log', nice: false, padding: 12};
    }
    if (layer.mark.type === 'line') layer.mark.interpolate = view.down[view.x] ? 'step-after' : 'step-before';
  }
  tipMetricsFor('pareto-plot', [view.y, view.x]);
  draw('pareto-plot', spec);
  const key = (name, color, cls, edge) => el('span', {class: cls || '', style: `--key:${color}` + (edge ? `;--edge:${edge}` : '')}, name);
  place('pareto-controls', controlsOf('y'), controlsOf('x'), el('span', {class: 'legend'}, key('front', 'var(--accent)'), key('other', 'var(--muted)'),
    D.limits.some((c) => c.bound !== null) ? key('violates a constraint', 'transparent', '', 'var(--muted)') : null, D.baseline !== null ? key('baseline', 'var(--warm)', 'diamond') : null));
  const missing = D.status.filter((s) => s === 'ok').length - points.length;
  const list = front.slice().sort((a, b) => (view.down[view.y] ? a.y - b.y : b.y - a.y)).slice(0, 12).map(({i}) => el('tr', {}, el('td', {class: 'recipe'}, D.names[i]),
    el('td', {class: 'num'}, quantity(my.value[i], my.unit)), el('td', {class: 'num'}, quantity(mx.value[i], mx.unit)),
    el('td', {class: 'num'}, el('button', {type: 'button', class: 'copy', 'data-copy': D.command[i], title: D.command[i]}, 'Copy'))));
  place('pareto-front', el('table', {}, el('thead', {}, el('tr', {}, el('th', {}, `On the front (${front.length})`), el('th', {class: 'num'}, view.y), el('th', {class: 'num'}, view.x), el('th', {class: 'num'}, 'Command'))), el('tbody', {}, ...list)),
    el('p', {class: 'note'}, missing > 0 ? `${missing} run${missing > 1 ? 's' : ''} without both figures ${missing > 1 ? 'are' : 'is'} not drawn.` : ''));
}
// Each plot has its own pair of metrics in the tooltip.
function tipMetricsFor(id, names) {
  const node = document.getElementById(id);
  if (node) node.onpointerenter = () => { tipMetrics = names; };
  if (node) node.onpointerleave = () => { tip.style.display = 'none'; };
}

// Energy and memory --------------------------------------------------------------------------------------------------
const ENERGY = /(_j$|_j_per_|power_w$|^carbon|^cost|_usd)/;
const MEMORY = ['peak_memory_bytes', 'process_memory_bytes', 'device_memory_bytes'];
function setupDots(what, names, whole) {
  if (!document.getElementById('energy')) return;
  const have = names.filter((n) => METRIC.has(n) && measured(METRIC.get(n)));
  if (!have.length) {
    const reasons = new Map();
    for (const m of names.map((n) => METRIC.get(n)).filter(Boolean)) m.note.forEach((k, i) => { if (D.status[i] === 'ok') reasons.set(D.notes[k], (reasons.get(D.notes[k]) || new Set()).add(i)); });
    const told = [...reasons].map(([why, rows]) => `${why} (${rows.size} row${rows.size > 1 ? 's' : ''})`).slice(0, 4).join('; ');
    place(what + '-plot', el('p', {class: 'empty'}, `No ${what} was measured${told ? ': ' + told : ' in these rows'}.`));
    return;
  }
  let metric = have.find((n) => n === 'energy_j_per_token') || have[0];
  const drawDots = () => {
    const series = whole ? have : [metric], scale = scaleOf(METRIC.get(series[0])), first = METRIC.get(series[0]);
    const order = [...Array(N).keys()].filter((i) => series.some((n) => METRIC.get(n).value[i] !== null));
    order.sort((a, b) => (first.value[a] ?? Infinity) - (first.value[b] ?? Infinity));
    let keep = order.slice(0, 24);
    if (D.baseline !== null && order.includes(D.baseline) && !keep.includes(D.baseline)) keep = [...keep.slice(0, 23), D.baseline];
    const names = new Map(), seen = new Map();
    for (const i of keep) { const base = compact(nameOf(i)), n = (seen.get(base) || 0) + 1; seen.set(base, n); names.set(i, n > 1 ? `${base} #${n}` : base); }
    const spec = copyOf(D.specs.intervals);
    spec.datasets.dots = keep.flatMap((i) => series.map((n) => [n, METRIC.get(n)]).filter(([, m]) => m.value[i] !== null).map(([n, m]) => ({
      i, name: names.get(i), series: whole ? n.replace(/_memory_bytes$/, '') : n, v: m.value[i] / scale.factor, l: (end(m, 'low', i) ?? m.value[i]) / scale.factor, h: (end(m, 'high', i) ?? m.value[i]) / scale.factor})));
    for (const layer of spec.layer) {
      layer.encoding.x.title = whole ? `memory (${scale.unit})` : titleOf(first, scale);
      if (layer.encoding.color && !whole) { delete layer.encoding.color; delete layer.encoding.shape; layer.mark.style = 'front'; }
    }
    tipMetricsFor(what + '-plot', series);
    draw(what + '-plot', spec);
    const note = order.length > keep.length ? `lowest ${keep.length} of ${order.length}` : '';
    place(what + '-controls', ...(whole || have.length < 2 ? [] : [choose(have, metric, (v) => { metric = v; drawDots(); }, 'metric')]), note);
  };
  drawers.push(drawDots);
}

// A heading of two lines at most: a long name breaks after the underscore next to its middle, a short one before its unit.
function headed(name, unit) {
  const cuts = name.length > 14 ? [...name.matchAll(/_/g)].map((m) => m.index + 1) : [];
  const cut = cuts.sort((a, b) => Math.abs(a - name.length / 2) - Math.abs(b - name.length / 2))[0];
  const tail = unit ? `(${unit})` : '';
  return cut ? `${name.slice(0, cut)}\n${name.slice(cut)} ${tail}`.trimEnd() : tail ? `${name}\n${tail}` : name;
}
// Parallel coordinates ------------------------------------------------------------------------------------------------
function setupParallel() {
  if (!document.getElementById('parallel')) return;
  const goals = D.objectives.map((o) => o[0]).filter((n) => METRIC.has(n) && new Set(METRIC.get(n).value.filter((v) => v !== null)).size > 1);
  const memory = goals.includes('peak_memory_bytes') || !METRIC.has('peak_memory_bytes') || new Set(METRIC.get('peak_memory_bytes').value).size < 3 ? [] : ['peak_memory_bytes'];
  const figures = [...goals, ...memory].slice(0, 4), axes = Object.keys(D.axes).slice(0, 7);
  const rows = [...Array(N).keys()].filter((i) => figures.every((n) => METRIC.get(n).value[i] !== null) && D.status[i] === 'ok');
  if (!figures.length || axes.length + figures.length < 2 || rows.length < 2) {
    place('parallel-plot', el('p', {class: 'empty'}, 'Two runs that differ in an axis and in a figure are needed.'));
    return;
  }
  drawers.push(() => {
    const ticks = [], where = [];
    for (const name of axes) {
      const options = [...new Set(rows.map((i) => D.axes[name][i]))].sort(), at = new Map(options.map((o, k) => [o, (k + 0.5) / options.length]));
      options.slice(0, 12).forEach((o) => ticks.push({dim: name, pos: at.get(o), text: compact(o || '(unset)', 20)}));
      // A small fixed offset a row keeps lines through the same option apart.
      where.push([name, (i, k) => at.get(D.axes[name][i]) + ((k * 0.618) % 1 - 0.5) * Math.min(0.5 / options.length, 0.1)]);
    }
    for (const name of figures) {
      const m = METRIC.get(name), values = rows.map((i) => m.value[i]), low = Math.min(...values), high = Math.max(...values), scale = scaleOf(m);
      const label = headed(name, scale.unit), at = (v) => { const t = high > low ? (v - low) / (high - low) : 0.5; return 0.02 + 0.96 * (m.direction === 'minimize' ? 1 - t : t); };
      const marks = [low, (low + high) / 2, high], told = (v, n) => digits(v / scale.factor, n);
      const fine = [3, 4, 5].find((n) => new Set(marks.map((v) => told(v, n))).size === 3) || 6;  // figures that differ look different
      for (const v of marks) ticks.push({dim: label, pos: at(v), text: told(v, fine)});
      where.push([label, (i) => at(m.value[i])]);
    }
    const score = where[axes.length][1];
    const kept = rows.slice().sort((a, b) => score(a) - score(b)).slice(-300);
    const spec = copyOf(D.specs.parallel);
    spec.datasets.lines = kept.flatMap((i, k) => where.map(([dim, at]) => ({i, dim, pos: at(i, k), score: score(i)})));
    spec.datasets.ticks = ticks;
    spec.datasets.poles = where.map(([dim]) => ({dim, a: 0, b: 1}));
    tipMetricsFor('parallel-plot', figures);
    draw('parallel-plot', spec);
  });
}
