"use strict";
// The logic of the report: sorting, McNemar's test, and the replay of decodes. Functions down to `mount` touch no page; node tests them.

/** Rows in the order of a column (`of` gives its value); missing values come last whichever way it is sorted. */
function sortRows(rows, of, descending) {
  const missing = (v) => v === null || v === undefined || Number.isNaN(v);
  return rows
    .map((row, place) => ({ row, place, value: of(row) }))
    .sort((a, b) => {
      if (missing(a.value) || missing(b.value)) return missing(a.value) - missing(b.value) || a.place - b.place;
      const order = typeof a.value === "string" ? a.value.localeCompare(b.value) : a.value - b.value;
      return (descending ? -order : order) || a.place - b.place;
    })
    .map((entry) => entry.row);
}

/** McNemar's exact test of two strings of digits, one a problem: how many only the first solves, only the second, and p. */
function mcnemar(first, second) {
  if (first.length !== second.length) return null;
  let better = 0;
  let worse = 0;
  for (let i = 0; i < first.length; i++) {
    if (first[i] > second[i]) better++;
    if (first[i] < second[i]) worse++;
  }
  const n = better + worse;
  let term = Math.pow(0.5, n);
  let tail = term;
  for (let k = 1; k <= Math.min(better, worse); k++) {
    term *= (n - k + 1) / k;
    tail += term;
  }
  return { better, worse, p: Math.min(1, 2 * tail) };
}

/** What decided a position: a draft filled by the rule is "confident" above the threshold (if there is one), else the step's "fallback". */
function decidedBy(how, confidence, threshold) {
  if (how !== "unmasked") return how === "kept" ? "fallback" : how;
  if (threshold === null) return "fallback";
  return confidence > threshold ? "confident" : "fallback";
}

/** The steps of a decode in order: positions decided (in their order), edits, the verifies as `[span, accepted]` together or null, and the forwards spent after it. */
function framesOf(replay) {
  const verified = new Map();
  for (const [step, span, accepted] of replay.verified) {
    const before = verified.get(step) || [0, 0, 0];
    verified.set(step, [before[0] + span, before[1] + accepted, before[2] + 1]);
  }
  const edits = replay.edits || [];
  const last = Math.max(-1, ...replay.step, ...verified.keys(), ...edits.map((e) => e[0]));
  const frames = [];
  let forwards = 0;
  for (let step = 0; step <= last; step++) {
    const positions = replay.step.map((s, at) => [s, at]).filter(([s]) => s === step).map(([, at]) => at);
    positions.sort((a, b) => replay.rank[a] - replay.rank[b]);
    const [span, accepted, verifies] = verified.get(step) || [0, 0, 0];
    const verify = verifies ? [span, accepted] : null;
    forwards += 1 + verifies;
    frames.push({ positions, edits: edits.filter((e) => e[0] === step), verify, forwards });
  }
  return frames;
}

/** How many frames are done when `forwards` have been spent. */
function framesDone(frames, forwards) {
  let done = 0;
  while (done < frames.length && frames[done].forwards <= forwards) done++;
  return done;
}

/** The tokens as they stand after `done` frames: null where masked, else `{piece, by, fresh, confidence}`. */
function tokensAfter(replay, frames, done) {
  const tokens = replay.pieces.map(() => null);
  const firstPiece = new Map();
  for (const [, at, before] of replay.edits || []) if (!firstPiece.has(at)) firstPiece.set(at, before);
  frames.slice(0, done).forEach((frame, k) => {
    const fresh = k === done - 1;
    for (const at of frame.positions) {
      const piece = firstPiece.has(at) ? firstPiece.get(at) : replay.pieces[at];
      const by = decidedBy(replay.how[at], replay.confidence[at], replay.threshold);
      tokens[at] = { piece, by, fresh, confidence: replay.confidence[at] };
    }
    for (const [, at, , after] of frame.edits) tokens[at] = { piece: after, by: "edited", fresh, confidence: null };
  });
  return tokens;
}

/** The next moment, in forwards, at which one of the decodes changes; the end where none does. */
function nextMoment(decodes, now, direction) {
  const moments = decodes.flatMap((frames) => frames.map((f) => f.forwards));
  if (direction > 0) {
    const later = moments.filter((m) => m > now);
    return later.length ? Math.min(...later) : now;
  }
  const earlier = moments.filter((m) => m < now);
  return earlier.length ? Math.max(...earlier) : 0;
}

/** A probability for people. */
function shownP(p) {
  if (p === null || p === undefined) return "";
  return p < 0.001 ? "< 0.001" : p.toFixed(p < 0.1 ? 3 : 2);
}

function mount(page, data) {
  const make = (tag, attributes, ...children) => {
    const node = page.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) {
      if (name === "text") node.textContent = value;
      else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (value !== null && value !== false) node.setAttribute(name, value);
    }
    node.append(...children);
    return node;
  };
  const find = (id) => page.getElementById(id);
  const fill = (select, values, chosen) => {
    select.replaceChildren(...values.map((v) => make("option", { value: v, text: v, selected: v === chosen ? "" : null })));
  };
  const unique = (values) => [...new Set(values)];
  const named = (row) => (many ? `${row.family}: ${row.setting}` : row.setting);
  const many = unique(data.rows.map((r) => r.family)).length > 1;
  mountTable(data, { make, find, fill, unique, named });
  mountReplay(data, { make, find, fill, unique, named });
}

/** Accuracy with its interval, on a scale that begins at the lowest of the task. */
function accuracyCell(make, rows, row) {
  const floor = Math.min(...rows.map((r) => r.low));
  const scale = (x) => `${Math.max(0, Math.min(100, ((x - floor) / (1 - floor)) * 100))}%`;
  const bar = make("span", { class: "interval" },
    make("i", { style: `left:${scale(row.low)};right:calc(100% - ${scale(row.high)})` }),
    make("b", { style: `left:${scale(row.accuracy)}` }));
  const title = `95 % interval ${(100 * row.low).toFixed(1)} to ${(100 * row.high).toFixed(1)}`;
  return make("td", { class: "number", title }, make("span", { text: (100 * row.accuracy).toFixed(1) }), bar);
}

/** Forwards per token with a bar of their kinds, as wide as the dearest of the task. */
function forwardsCell(make, rows, row) {
  const widest = Math.max(...rows.map((r) => r.forwards_per_token));
  const kinds = Object.entries(row.by_kind);
  const parts = kinds.map(([kind, n]) => make("i", { class: kind, style: `width:${(100 * n) / widest}%` }));
  const title = kinds.map(([kind, n]) => `${kind} ${n.toFixed(3)}`).join(", ");
  const bar = make("span", { class: "kinds" }, ...parts);
  return make("td", { class: "number", title }, make("span", { text: row.forwards_per_token.toFixed(3) }), bar);
}

/** Forwards per token of each lane. */
function byLane(row) {
  return Object.entries(row.lane_forwards_per_token || {}).map(([lane, n]) => `${lane} ${n.toFixed(3)}`).join(", ");
}

/** Whether the text keeps what it is compared with, and why or why not. */
function losslessTitle(row) {
  if (!row.lossless_reason) return null;
  return `${row.lossless ? "as" : "not as"} ${row.lossless_relative_to}: ${row.lossless_reason}`;
}

/** A number with so many digits, or nothing. */
function plainCell(make, value, digits) {
  return make("td", { class: "number", text: value === null || value === undefined ? "" : value.toFixed(digits) });
}

function mountTable(data, { make, find, fill, unique, named }) {
  const ofTask = () => data.rows.filter((r) => r.task === find("task").value);
  const rival = () => ofTask().find((r) => named(r) === find("against").value);
  const test = (row) => (rival() && rival() !== row ? mcnemar(row.solved, rival().solved) : null);
  const columns = [
    { title: "setting", of: (r) => named(r), cell: (r) => make("td", { class: "name", text: named(r) }) },
    { title: "accuracy %", of: (r) => r.accuracy, cell: (r) => accuracyCell(make, ofTask(), r), down: true },
    { title: "forwards / token", of: (r) => r.forwards_per_token, cell: (r) => forwardsCell(make, ofTask(), r) },
    ...(data.by_lane ? [
      { title: "by lane", of: byLane, cell: (r) => make("td", { text: byLane(r) }) },
      { title: "floor ms / token", of: (r) => (r.floor_seconds_per_token === null ? null : 1000 * r.floor_seconds_per_token), digits: 4 },
    ] : []),
    { title: "accepted / verify", of: (r) => r.accepted_per_verify, digits: 1, down: true },
    { title: "tokens / verify", of: (r) => r.mean_acceptance_length, digits: 1, down: true },
    { title: "tokens/s", of: (r) => r.tokens_per_second, digits: 0, down: true },
    { title: "solves and the other does not", of: (r) => (test(r) || {}).better, digits: 0, down: true },
    { title: "the other way round", of: (r) => (test(r) || {}).worse, digits: 0 },
    { title: "p", of: (r) => (test(r) || {}).p, cell: (r) => make("td", { class: "number", text: shownP((test(r) || {}).p) }) },
    { title: "texts as baseline", of: (r) => r.same, digits: 0, down: true },
    { title: "lossless", of: (r) => String(r.lossless), cell: (r) => make("td", { text: r.lossless ? "yes" : "", title: losslessTitle(r) }) },
  ];
  const cost = data.by_lane ? "floor ms / token" : "forwards / token";
  let sorted = { column: columns.find((c) => c.title === cost), descending: false };

  function draw() {
    const wanted = find("filter").value.toLowerCase();
    const rows = ofTask().filter((r) => named(r).toLowerCase().includes(wanted));
    const head = columns.map((column) => make("th", {
      "aria-sort": column === sorted.column ? (sorted.descending ? "descending" : "ascending") : null,
      onclick: () => {
        sorted = { column, descending: column === sorted.column ? !sorted.descending : Boolean(column.down) };
        draw();
      },
    }, make("button", { type: "button", text: column.title })));
    const body = sortRows(rows, sorted.column.of, sorted.descending).map((row) =>
      make("tr", { class: row === rival() ? "rival" : null }, ...columns.map((c) => (c.cell ? c.cell(row) : plainCell(make, c.of(row), c.digits)))));
    find("rows").replaceChildren(make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...body));
  }

  function choose() {
    const names = ofTask().map(named);
    const first = data.rows.find((r) => r.setting === data.grid.baseline);
    fill(find("against"), names, names.includes(find("against").value) ? find("against").value : first ? named(first) : names[0]);
    draw();
  }
  fill(find("task"), unique(data.rows.map((r) => r.task)));
  find("task").addEventListener("change", choose);
  find("against").addEventListener("change", draw);
  find("filter").addEventListener("input", draw);
  choose();
}

/** One decode as it stands after so many forwards. */
function drawDecode({ make, find }, side, replay, frames, now) {
  const done = framesDone(frames, now);
  const tokens = tokensAfter(replay, frames, done);
  const text = tokens.map((t, at) => make("span", {
    class: t ? `token ${t.by}${t.fresh ? " fresh" : ""}` : "token masked",
    title: t ? `${t.by}${t.confidence === null ? "" : `, confidence ${t.confidence}`}, position ${at}` : `position ${at}`,
    text: t ? t.piece : "▒",
  }));
  const frame = done ? frames[done - 1] : null;
  const known = tokens.filter(Boolean).length;
  const spent = frame ? frame.forwards : 0;
  const verify = frame && frame.verify ? `, verified ${frame.verify[0]}, accepted ${frame.verify[1]}` : "";
  find(`${side}-text`).replaceChildren(...text);
  find(`${side}-count`).textContent = `${known} of ${tokens.length} tokens after ${spent} of ${frames.length ? frames[frames.length - 1].forwards : 0} forwards${verify}`;
  find(`${side}-verdict`).textContent = done === frames.length ? (replay.solved ? "solved" : "not solved") : "";
}

function mountReplay(data, { make, find, fill, unique, named }) {
  const state = { now: 0, playing: false, timer: null };
  const offered = () => data.replays.filter((r) => r.task === find("replay-task").value && String(r.doc) === find("replay-doc").value);
  const sides = () => ["left", "right"].map((side) => {
    const replay = offered().find((r) => named(r) === find(`replay-${side}`).value);
    return replay ? { side, replay, frames: framesOf(replay) } : null;
  }).filter(Boolean);
  const end = () => Math.max(0, ...sides().flatMap((s) => s.frames.map((f) => f.forwards)));

  function draw() {
    for (const { side, replay, frames } of sides()) drawDecode({ make, find }, side, replay, frames, state.now);
    find("clock").max = end();
    find("clock").value = state.now;
    find("time").textContent = `${state.now} / ${end()} forwards`;
    find("play").textContent = state.playing ? "Pause" : "Play";
  }

  function pause() {
    state.playing = false;
    clearTimeout(state.timer);
  }

  function tick() {
    if (state.now >= end()) pause();
    else {
      state.now += 1;
      state.timer = setTimeout(tick, 1000 / Number(find("speed").value));
    }
    draw();
  }

  function move(direction) {
    pause();
    const over = direction > 0 && state.now >= end();
    state.now = over ? 0 : nextMoment(sides().map((s) => s.frames), state.now, direction);
    draw();
  }

  function start() {
    const first = offered()[0];
    find("prompt").textContent = first ? first.prompt : "";
    state.now = end();
    pause();
    draw();
  }

  function choose() {
    const names = offered().map(named);
    const keep = (side, fallback) => (names.includes(find(`replay-${side}`).value) ? find(`replay-${side}`).value : fallback);
    const verifies = offered().filter((r) => r.verified.length).map(named);
    const plain = offered().filter((r) => !r.verified.length && r.setting !== data.grid.baseline).map(named);
    fill(find("replay-left"), names, keep("left", plain[plain.length - 1] || names[0]));
    fill(find("replay-right"), names, keep("right", verifies[verifies.length - 1] || names[names.length - 1]));
    start();
  }

  function chooseTask() {
    fill(find("replay-doc"), unique(data.replays.filter((r) => r.task === find("replay-task").value).map((r) => String(r.doc))));
    choose();
  }

  if (!data.replays.length) {
    find("replay").hidden = true;
    return;
  }
  fill(find("replay-task"), unique(data.replays.map((r) => r.task)));
  find("replay-task").addEventListener("change", chooseTask);
  find("replay-doc").addEventListener("change", choose);
  for (const side of ["left", "right"]) find(`replay-${side}`).addEventListener("change", start);
  find("play").addEventListener("click", () => {
    if (state.playing) pause();
    else {
      if (state.now >= end()) state.now = 0;
      state.playing = true;
      state.timer = setTimeout(tick, 0);
    }
    draw();
  });
  find("back").addEventListener("click", () => move(-1));
  find("forward").addEventListener("click", () => move(1));
  find("clock").addEventListener("input", () => {
    pause();
    state.now = Number(find("clock").value);
    draw();
  });
  chooseTask();
}

if (typeof module !== "undefined") {
  module.exports = { sortRows, mcnemar, decidedBy, framesOf, framesDone, tokensAfter, nextMoment, shownP, byLane, losslessTitle };
} else {
  mount(document, JSON.parse(document.getElementById("data").textContent));
}
