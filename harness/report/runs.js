// The effect of every axis as a forest table, the table of runs, and the start of everything.
function setupEffects() {
  const host = document.getElementById('effects-table');
  if (!host) return;
  const metrics = [...new Set(D.effects.map((e) => e.metric))];
  if (!metrics.length) {
    place('effects-table', el('p', {class: 'empty'}, D.effects_untold || 'No axis was varied in the runs that ended well.'));
    return;
  }
  let metric = (D.objectives.find((o) => metrics.includes(o[0])) || [metrics[0]])[0];
  const show = () => {
    place('effects-controls', choose(metrics, metric, (v) => { metric = v; show(); }, 'metric'), METRIC.get(metric)?.direction === 'minimize' ? 'lower is better' : 'higher is better');
    const rows = D.effects.filter((e) => e.metric === metric);
    // From the lowest to the highest pair, 1 always among them; a wide interval may run out of the picture.
    const all = [1, ...rows.flatMap((e) => [e.ratio, ...e.points])].map(Math.log);
    const room = Math.max((Math.max(...all) - Math.min(...all)) * 0.12, 0.01);
    const reach = rows.flatMap((e) => [e.low, e.high]).filter((v) => v > 0).map(Math.log);
    const from = Math.max(Math.min(...all, ...reach), Math.min(...all) - 4 * room) - room, to = Math.min(Math.max(...all, ...reach), Math.max(...all) + 4 * room) + room;
    const x = (v) => `${Math.min(Math.max(100 * (Math.log(v) - from) / (to - from), 0), 100).toFixed(2)}%`;
    const marks = [1 / 8, 1 / 4, 1 / 2, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 1, 1.005, 1.01, 1.02, 1.05, 1.1, 1.2, 1.5, 2, 3, 4, 6, 8, 16].filter((v) => Math.log(v) >= from && Math.log(v) <= to);
    const spaced = [1];
    for (const v of marks.sort((p, q) => Math.abs(Math.log(q)) - Math.abs(Math.log(p)))) if (spaced.every((w) => Math.abs(Math.log(v / w)) > (to - from) * 0.12)) spaced.push(v);
    const scale = svg('svg', {class: 'scale'});
    for (const v of spaced) scale.append(svg('text', {x: x(v), y: 18, 'text-anchor': 'middle'}, `${v}×`));
    let last = '';
    const body = rows.map((e) => {
      const verdict = e.verdict, few = e.few ? ' few' : '';
      const plot = svg('svg', {role: 'img', 'aria-label': `${digits(e.ratio, 3)} times`});
      plot.append(svg('line', {x1: x(1), x2: x(1), y1: 0, y2: 26, class: 'one'}));
      if (e.pairs > 1) for (const p of e.points) plot.append(svg('line', {x1: x(p), x2: x(p), y1: 8, y2: 18, class: 'tick'}));
      if (e.low !== null && e.high !== null) plot.append(svg('line', {x1: x(e.low), x2: x(e.high), y1: 13, y2: 13, class: `bar ${verdict}${few}`}));
      plot.append(svg('circle', {cx: x(e.ratio), cy: 13, r: 4, class: verdict + few}));
      const fresh = e.axis !== last;
      last = e.axis;
      return el('tr', {class: fresh ? 'first' : ''}, el('td', {class: 'axis'}, fresh ? e.axis : ''), el('td', {}, e.option, ' ', el('span', {class: 'unit'}, `over ${e.reference}`)),
        el('td', {class: 'num'}, String(e.pairs)), el('td', {class: `num ${verdict}`}, near(e.ratio) + '×'),
        el('td', {class: 'num unit'}, e.low === null ? 'no interval' : `${near(e.low)} – ${near(e.high)}`), el('td', {class: 'forest'}, plot));
    });
    place('effects-table', el('table', {class: 'effects'}, el('thead', {}, el('tr', {}, el('th', {}, 'Axis'), el('th', {}, 'Option'), el('th', {class: 'num'}, 'Pairs'), el('th', {class: 'num'}, 'Ratio'), el('th', {class: 'num'}, '95% interval'), el('th', {class: 'forest'}, scale))), el('tbody', {}, ...body)));
  };
  show();
  place('effects-notes', ...[D.effects.some((e) => e.few) ? D.effects_few : '', D.effects_untold].filter(Boolean).map((text) => el('p', {class: 'note'}, text)));
}

// Runs -----------------------------------------------------------------------------------------------------------------
const FIRST = ['tokens_per_s', 'decode_tokens_per_s', 'validation_loss', 'perplexity', 'peak_memory_bytes', 'energy_j_per_token', 'mfu'];
const PAGE = 200;
const table = {filter: '', status: 'all', sort: null, down: false, shown: PAGE, open: new Set(), columns: []};
function setupRuns() {
  if (!document.getElementById('runs-table')) return;
  const goals = D.objectives.map((o) => o[0]);
  const wanted = [...new Set([...goals, ...FIRST])].filter((n) => METRIC.has(n)).filter((n) => measured(METRIC.get(n)) || goals.includes(n));
  // Perplexity says what the loss says: one of them is enough to begin with.
  table.columns = wanted.filter((n) => goals.includes(n) || n !== 'perplexity' || !wanted.includes('validation_loss')).slice(0, 6);
  const statuses = ['all', ...new Set(D.status)];
  const box = el('input', {type: 'search', placeholder: 'Filter: int8 sdpa, out_of_memory …', size: 30, 'aria-label': 'Filter runs', on: {input: () => { table.filter = box.value; table.shown = PAGE; drawRuns(); }}});
  const picks = D.metrics.map((m) => {
    const tick = el('input', {type: 'checkbox', on: {change: () => { table.columns = D.metrics.map((o) => o.name).filter((n) => (n === m.name ? tick.checked : table.columns.includes(n))); drawRuns(); }}});
    tick.checked = table.columns.includes(m.name);
    return el('label', {}, tick, m.name);
  });
  place('runs-controls', box, choose(statuses, 'all', (v) => { table.status = v; drawRuns(); }, 'status'), el('details', {class: 'columns-menu'}, el('summary', {}, 'Columns'), el('div', {}, ...picks)), el('span', {id: 'runs-count'}));
  drawRuns();
}
const searched = [...Array(N).keys()].map((i) => [D.ids[i], D.names[i], D.status[i], D.reason[i], D.command[i], ...D.flags[i]].join(' ').toLowerCase());
function columnsOf() {
  const words = (key, title, values) => ({key, title, text: (i) => values[i], order: (i) => values[i]});
  return [
    {key: 'status', title: 'Status', order: (i) => D.status[i], cell: (i) => el('td', {class: 'wrap'}, el('span', {class: `chip ${D.status[i] === 'ok' ? 'ok' : ''}`}, D.status[i].replaceAll('_', ' ')), ...chipsOf(i))},
    ...Object.keys(D.axes).map((name) => words('axis ' + name, name, D.axes[name])),
    ...Object.keys(D.knobs).slice(0, 8).map((name) => words('knob ' + name, name, D.knobs[name])),
    ...(table.columns.length ? [] : [{key: 'reason', title: 'Reason', order: (i) => D.reason[i], cell: (i) => el('td', {class: 'why wide'}, D.reason[i])}]),
    ...table.columns.map((name) => {
      const m = METRIC.get(name), scale = scaleOf(m);
      return {key: 'metric ' + name, title: name, unit: scale.unit, numeric: true, order: (i) => m.value[i], cell: (i) => figureOf(m, scale, i)};
    }),
  ];
}
// A long name may break after an underscore or a dot.
const breakable = (name) => name.split(/(?<=[_.])/).flatMap((part, k) => (k ? [el('wbr'), part] : [part]));
function chipsOf(i) {
  const out = [];
  if (i === D.baseline) out.push(' ', el('span', {class: 'chip base'}, 'baseline'));
  if (D.best.includes(i)) out.push(' ', el('span', {class: 'chip front'}, 'best'));
  if (D.violates[i].length) out.push(' ', el('span', {class: 'chip breaks', title: D.violates[i].join('\n')}, 'violates'));
  if (D.flags[i].length) out.push(' ', el('span', {class: 'chip breaks', title: D.flags[i].join('\n')}, `${D.flags[i].length} flag${D.flags[i].length > 1 ? 's' : ''}`));
  return out;
}
function figureOf(m, scale, i) {
  const note = D.notes[m.note[i]];
  if (m.value[i] === null) return el('td', {class: 'num none', title: note, 'aria-label': `not measured: ${note}`});
  const low = end(m, 'low', i), high = end(m, 'high', i), range = low !== null && high !== null;
  const half = range ? Math.max(high - m.value[i], m.value[i] - low) / Math.abs(m.value[i] || 1) * 100 : 0;
  const title = [range ? `95%: ${quantity(low, m.unit)} to ${quantity(high, m.unit)}` : 'no interval', note].filter(Boolean).join('\n');
  return el('td', {class: 'num', title}, aligned(m.value[i], scale), range ? el('span', {class: 'pm'}, `±${half < 0.1 ? '<0.1' : digits(half, half < 1 ? 1 : 2)}%`) : null);
}
function cellsOf(i, columns) {
  const cells = (some) => some.map((c) => (c.cell ? c.cell(i) : el('td', {}, c.text(i))));
  const figures = columns.filter((c) => c.numeric);
  if (D.status[i] === 'ok' || !figures.length) return cells(columns);
  // A failed run has no figures: its reason stands in their place.
  const why = D.reason[i] || 'no reason was recorded';
  return [...cells(columns.filter((c) => !c.numeric)), el('td', {class: 'none why wide', colspan: figures.length, title: why}, why)];
}
function detailOf(i, width) {
  const facts = D.metrics.map((m) => el('div', {}, el('dt', {}, m.name), el('dd', {class: m.value[i] === null ? 'why' : '', title: D.notes[m.note[i]]}, m.value[i] === null ? D.notes[m.note[i]] : quantity(m.value[i], m.unit))));
  const flags = D.flags[i].map((f) => el('div', {class: 'why'}, `flag ${f}`));
  return el('tr', {class: 'detail'}, el('td', {colspan: width}, el('code', {class: 'cmd'}, D.command[i]), el('button', {type: 'button', class: 'copy', 'data-copy': D.command[i]}, 'Copy'),
    el('div', {class: 'why'}, `run ${D.ids[i]}, ${D.created[i]}`), ...flags, D.status[i] === 'ok' ? el('dl', {class: 'facts'}, ...facts) : null));
}
function drawRuns() {
  const words = table.filter.toLowerCase().split(/\s+/).filter(Boolean), columns = columnsOf();
  let rows = [...Array(N).keys()].filter((i) => (table.status === 'all' || D.status[i] === table.status) && words.every((w) => searched[i].includes(w)));
  const column = columns.find((c) => c.key === table.sort), sign = table.down ? -1 : 1;
  if (column) {
    // Empty cells stay last in either direction: not measured is not small.
    rows.sort((a, b) => {
      const p = column.order(a), q = column.order(b), noP = p === null || p === '', noQ = q === null || q === '';
      if (noP || noQ) return noP - noQ;
      return sign * (column.numeric ? p - q : String(p).localeCompare(String(q), 'en', {numeric: true}));
    });
  }
  const sortBy = (c) => { if (table.sort === c.key) table.down = !table.down; else { table.sort = c.key; table.down = Boolean(c.numeric) && METRIC.get(c.title).direction === 'maximize'; } drawRuns(); };
  const head = columns.map((c) => el('th', {class: c.numeric ? 'num' : '', tabindex: 0, scope: 'col', 'aria-sort': c.key === table.sort ? (table.down ? 'descending' : 'ascending') : null,
    on: {click: () => sortBy(c), keydown: (event) => { if (event.key === 'Enter') sortBy(c); }}}, ...breakable(c.title), c.numeric ? el('span', {class: 'unit'}, c.unit) : null));
  const body = rows.slice(0, table.shown).flatMap((i) => {
    const toggle = (event) => { if (event.target.closest('button')) return; if (table.open.has(i)) table.open.delete(i); else table.open.add(i); drawRuns(); };
    const line = el('tr', {on: {click: toggle}}, ...cellsOf(i, columns));
    return table.open.has(i) ? [line, detailOf(i, columns.length)] : [line];
  });
  place('runs-table', el('table', {}, el('thead', {}, el('tr', {}, ...head)), el('tbody', {}, ...body)));
  place('runs-count', `${rows.length} of ${N}`);
  const more = rows.length > table.shown ? el('button', {type: 'button', on: {click: () => { table.shown += PAGE; drawRuns(); }}}, `Show ${Math.min(PAGE, rows.length - table.shown)} more`) : '';
  place('runs-note', more, ' A click on a heading sorts, on a row opens it. A hatched cell was not measured; its reason is its tooltip. ± is the wider half of the 95% interval.');
}

setupPareto();
setupEffects();
setupParallel();
setupDots('energy', D.metrics.map((m) => m.name).filter((n) => ENERGY.test(n)), false);
setupDots('memory', MEMORY, true);
setupRuns();
paint();
