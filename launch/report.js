"use strict";
const data = JSON.parse(document.getElementById("data").textContent), runs = data.runs;
const $ = id => document.getElementById(id);

// Adds an element. Data of the runs becomes text or an attribute, never markup.
function add(parent, tag, given = {}, text = null) {
  const svg = parent instanceof SVGElement || tag === "svg";
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  set(made, given);
  if (text !== null) made.textContent = text;
  parent.append(made);
  return made;
}

function set(element, given) {
  for (const [key, value] of Object.entries(given)) element.setAttribute(key, value);
}

const round = value => {
  if (Number.isInteger(value)) return Math.abs(value) < 1e15 ? value.toLocaleString("en") : value.toExponential(3);
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-4) return value.toExponential(3);
  return size >= 1000 ? value.toLocaleString("en", {maximumFractionDigits: 0}) : String(Number(value.toPrecision(4)));
};
const clock = seconds => {
  const parts = [Math.floor(seconds / 3600), Math.floor(seconds / 60) % 60, seconds % 60]
    .map(part => String(part).padStart(2, "0"));
  return parts[0] === "00" ? `${Number(parts[1])}:${parts[2]}` : parts.join(":");
};

// ---------------------------------------------------------------------------------------------------- colors
const COLORS = [
  "#3b78d8", "#e0772b", "#35a05f", "#cc4f86", "#8a63d2",
  "#b8901a", "#20a3ad", "#d64a44", "#78889a", "#749c2b",
];
const DASHES = ["none", "7 4", "2 4"];
const few = runs.length <= COLORS.length * DASHES.length;
const shade = (index, all) => all <= COLORS.length ? COLORS[index] : `hsl(${Math.round(300 * index / all)} 60% 52%)`;
runs.forEach((run, index) => { run.index = index; run.swatches = []; });
function swatch(parent, color, dash) {
  const svg = add(parent, "svg", {class: "swatch", width: 22, height: 12, "aria-hidden": "true"});
  return add(svg, "line", {x1: 1, x2: 21, y1: 6, y2: 6, stroke: color, "stroke-width": 3, "stroke-dasharray": dash});
}
// Sorts the values of an override: numbers, then texts, then missing values.
const rank = value => value === null ? 2 : typeof value === "number" ? 0 : 1;
const order = (x, y) =>
  rank(x) - rank(y) || (rank(x) ? String(x).localeCompare(String(y), "en", {numeric: true}) : x - y);
const valuesOf = key => [...new Set(runs.map(run => run.overrides[key]))].sort(order);
// Colors each run differently, or by the value of an override.
function paint(key) {
  const values = key === null ? null : valuesOf(key);
  for (const run of runs) {
    const alone = key === null && few;
    run.color = alone ? COLORS[run.index % COLORS.length]
      : values ? shade(values.indexOf(run.overrides[key]), values.length) : shade(run.index, runs.length);
    run.dash = alone ? DASHES[Math.floor(run.index / COLORS.length)] : "none";
    for (const line of run.swatches) set(line, {stroke: run.color, "stroke-dasharray": run.dash});
  }
  $("legend").replaceChildren();
  for (const run of runs) run.key = null;
  if (values && values.length <= 40) values.forEach((value, index) => {
    const item = add($("legend"), "li");
    swatch(item, shade(index, values.length), "none");
    add(item, "span", {}, `${data.varied[key].short}=${value === null ? "–" : value}`);
  });
  const having = runs.filter(run => Object.keys(run.curve).length > 1);
  if (key === null && having.length <= 14) having.forEach(run => {
    run.key = add($("legend"), "li");
    swatch(run.key, run.color, run.dash);
    add(run.key, "span", {}, run.label);
    run.key.addEventListener("mouseenter", () => light(run.index));
    run.key.addEventListener("mouseleave", () => light(pinned));
  });
  if (!$("legend").children.length)
    add($("legend"), "li", {class: "soft"},
      "Colors match the rows of the table; hover over a curve or a row to identify it.");
}

// ---------------------------------------------------------------------------------------------------- top
$("counts").textContent = `${runs.length} run${runs.length === 1 ? "" : "s"}: ${data.counts}`;
$("about").textContent = [
  data.config && `config ${data.config}`, data.sweep && `sweep ${data.sweep}`,
  data.commit &&
    `commit ${String(data.commit).slice(0, 12)}${data.clean === false ? " with uncommitted changes" : ""}`,
  `written ${data.written}`,
].filter(Boolean).join("  ·  ");
const same = Object.entries(data.shared).map(([key, value]) => `${key}=${value}`).join("  ");
$("shared").textContent = same && runs.length > 1 ? `Shared by all runs: ${same}` : same;

// ---------------------------------------------------------------------------------------------------- table
const number = (name, title, of, show = round, better = null) => ({name, title, of, show, better});
const columns = [
  {name: "run", of: run => run.name, kind: "name"},
  {name: "state", of: run => run.state, kind: "state"},
  ...data.varied.map((key, i) => ({
    name: key.short, title: key.name, of: run => run.overrides[i],
    show: value => typeof value === "number" ? String(value) : value,
  })),
  {name: "step", of: run => run.step, kind: "step"},
  ...data.metrics.map(({name, better}, i) =>
    number(name, better ? `${better} is better` : "", run => run.metrics[i], round, better)),
  number("time", "total of all starts", run => run.seconds || null, clock),
  ...(runs.some(run => run.starts > 1) ? [number("starts", "", run => run.starts || null)] : []),
];
columns.forEach(column => {
  const values = runs.map(column.of).filter(value => value !== null);
  column.text = values.some(value => typeof value !== "number");
  column.best = column.better && values.length > 1 && Math.min(...values) < Math.max(...values)
    ? (column.better === "lower" ? Math.min(...values) : Math.max(...values)) : null;
});
const states = Object.fromEntries(data.states.map((state, i) => [state, i]));
// Missing values come last in both sort directions.
function compare(column, sign) {
  return (a, b) => {
    let x = column.of(a), y = column.of(b);
    if (x === null || y === null) return (x === null) - (y === null) || a.index - b.index;
    if (column.kind === "state") [x, y] = [states[x], states[y]];
    return sign * order(x, y) || a.index - b.index;
  };
}

const body = document.querySelector("#runs tbody"), head = add(document.querySelector("#runs thead"), "tr");
columns.forEach(column => {
  const left = column.text || column.kind === "state" ? "text" : "";
  column.th = add(head, "th", {scope: "col", "aria-sort": "none", class: column.kind === "name" ? "name" : left});
  const button = add(column.th, "button", {type: "button", title: column.title || column.name}, column.name);
  button.addEventListener("click", () => sort(column));
});
runs.forEach(run => {
  run.tr = add(body, "tr");
  run.tr.dataset.index = run.index;
  columns.forEach(column => {
    const value = column.of(run), td = add(run.tr, "td");
    if (column.kind === "name") {
      td.className = "name";
      const cell = add(td, "div");
      run.swatches.push(swatch(cell, "none", "none"));
      add(cell, "a", {href: run.folder, title: run.name}, run.name);
    } else if (column.kind === "state") {
      td.className = "text";
      add(td, "span", {class: "state"}, run.state).classList.add(run.state);
      if (run.note) add(td, "small", {}, run.note);
    } else if (value === null) {
      add(td, "span", {class: "none", title: "none"}, "–");
    } else if (column.kind === "step") {
      td.textContent = run.steps ? `${round(value)} / ${round(run.steps)}` : round(value);
    } else {
      const best = column.best !== null && value === column.best;
      td.textContent = (best ? "★ " : "") + (typeof value === "number" ? column.show(value) : value);
      td.title = String(value);
      td.className = [column.text && "text", best && "best"].filter(Boolean).join(" ");
    }
  });
});
$("hint").textContent = columns.some(column => column.best !== null)
  ? "★ marks the best value of a column. Click a column's name to sort, a run's name to open its folder."
  : "Click a column's name to sort, a run's name to open its folder.";
function sort(column) {
  const up = column.th.getAttribute("aria-sort") !== "ascending";
  columns.forEach(other => other.th.setAttribute("aria-sort", "none"));
  column.th.setAttribute("aria-sort", up ? "ascending" : "descending");
  const sorted = [...runs].sort(compare(column, up ? 1 : -1));
  body.append(...sorted.map(run => run.tr));
  $("sheets").append(...sorted.filter(run => run.sheet).map(run => run.sheet));
}

// ---------------------------------------------------------------------------------------------------- curves
const logged = [...new Set(runs.flatMap(run => Object.keys(run.curve)))].filter(name => name !== "step");
let drawn = null, pinned = null;
function ticks(low, high, most) {
  const raw = (high - low) / most, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map(x => x * power).find(x => x >= raw * .999), found = [];
  // The limit also ends the loop for i beyond 2^53, where adding 1 has no effect.
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-6 && found.length < 50; i++)
    found.push(Number((i * step).toPrecision(12)));
  return found;
}
function logTicks(low, high) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
    for (const lead of Math.log10(high / low) > 2.5 ? [1] : [1, 2, 5]) {
      const value = Number((lead * 10 ** power).toPrecision(6));
      if (value >= low && value <= high) found.push(value);
    }
  const every = Math.ceil(found.length / 9);
  return found.length > 1 ? found.filter((_, i) => i % every === 0) : ticks(low, high, 4).filter(value => value > 0);
}
const positive = value => value !== null && value > 0;
function draw() {
  const metric = $("metric").value, log = $("log").checked, plot = $("plot");
  const width = Math.max(plot.clientWidth, 200), height = width < 640 ? 260 : 360;
  const box = {left: 62, right: width - 14, top: 10, bottom: height - 40};
  plot.replaceChildren();
  const svg = add(plot, "svg", {
    viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": `${metric} by step, ${runs.length} runs`,
  });
  const lines = runs.map(run => {
    const values = run.curve[metric] || [];
    return {run, points: values.map((y, i) => (log ? positive(y) : y !== null) ? [run.curve.step[i], y] : null)};
  }).filter(line => line.points.some(Boolean));
  let xs = [Infinity, -Infinity], ys = [Infinity, -Infinity];
  for (const line of lines) for (const p of line.points) if (p) {
    xs = [Math.min(xs[0], p[0]), Math.max(xs[1], p[0])];
    ys = [Math.min(ys[0], p[1]), Math.max(ys[1], p[1])];
  }
  if (!lines.length) {
    add(svg, "text", {x: width / 2, y: height / 2, "text-anchor": "middle"},
      log ? "No value above 0 to show on a log scale" : "No values");
    drawn = null;
    return;
  }
  if (xs[0] === xs[1]) xs = [xs[0] - 1, xs[1] + 1];
  const apart = (Math.abs(ys[0]) || 1) * .1;
  if (ys[0] === ys[1]) ys = log ? [ys[0] / 1.1, ys[1] * 1.1] : [ys[0] - apart, ys[1] + apart];
  const u = log ? Math.log : y => y, pad = (u(ys[1]) - u(ys[0])) * .04, low = u(ys[0]) - pad, high = u(ys[1]) + pad;
  const X = x => box.left + (x - xs[0]) / (xs[1] - xs[0]) * (box.right - box.left);
  const Y = y => box.bottom - (u(y) - low) / (high - low) * (box.bottom - box.top);
  const shown = log ? logTicks(Math.exp(low), Math.exp(high)) : ticks(low, high, 6);
  for (const y of shown) {
    add(svg, "line", {class: "grid", x1: box.left, x2: box.right, y1: Y(y), y2: Y(y)});
    add(svg, "text", {x: box.left - 8, y: Y(y) + 4, "text-anchor": "end"}, round(y));
  }
  for (const x of ticks(xs[0], xs[1], Math.max(2, Math.floor(width / 130)))) {
    const end = X(x) > box.right - 24;
    add(svg, "line", {class: "axis", x1: X(x), x2: X(x), y1: box.bottom, y2: box.bottom + 5});
    add(svg, "text", {x: end ? box.right : X(x), y: box.bottom + 19, "text-anchor": end ? "end" : "middle"}, round(x));
  }
  add(svg, "line", {class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom});
  add(svg, "text", {x: (box.left + box.right) / 2, y: height - 4, "text-anchor": "middle"}, "step");
  for (const line of lines) {
    let path = "", open = false;
    line.points = line.points.map(p => p && [X(p[0]), Y(p[1]), ...p]);
    for (const p of line.points) {
      if (p) path += `${open ? "L" : "M"}${p[0].toFixed(1)} ${p[1].toFixed(1)}`;
      if (p && !open) path += "h0";  // a single point becomes a dot
      open = Boolean(p);
    }
    line.path = add(svg, "path", {
      class: "curve", d: path, stroke: line.run.color, "stroke-dasharray": line.run.dash,
      "stroke-width": few ? 1.8 : 1.1, opacity: few ? 1 : .6,
    });
  }
  const mark = add(svg, "circle", {r: 4.5, fill: "none", "stroke-width": 2, visibility: "hidden"});
  drawn = {svg, lines, mark, width, height, metric};
  svg.addEventListener("pointermove", near);
  svg.addEventListener("pointerleave", () => light(pinned));
  light(pinned);
}
function near(event) {
  const frame = drawn.svg.getBoundingClientRect();
  const x = (event.clientX - frame.left) * drawn.width / frame.width;
  const y = (event.clientY - frame.top) * drawn.height / frame.height;
  let found = null, least = 60 ** 2;
  for (const line of drawn.lines) for (const p of line.points) if (p) {
    const distance = (p[0] - x) ** 2 + (p[1] - y) ** 2;
    if (distance < least) [found, least] = [{line, p}, distance];
  }
  light(found ? found.line.run.index : pinned, found && found.p);
}
// Highlights one run in the table, the legend and the curves, and optionally one of its points.
function light(index, point = null) {
  document.querySelectorAll(".on").forEach(one => one.classList.remove("on"));
  $("highlighted").textContent = index === null ? "" : runs[index].label;
  if (index !== null) for (const one of [runs[index].tr, runs[index].key]) if (one) one.classList.add("on");
  if (!drawn) return;
  const line = drawn.lines.find(one => one.run.index === index);
  drawn.svg.classList.toggle("lit", Boolean(line));
  drawn.mark.setAttribute("visibility", line && point ? "visible" : "hidden");
  if (!line) return;
  line.path.classList.add("on");
  drawn.mark.before(line.path);
  const p = point || line.points.filter(Boolean).at(-1);
  $("highlighted").textContent = `${runs[index].label}:  ${drawn.metric} ${round(p[3])} at step ${round(p[2])}`;
  if (point) set(drawn.mark, {cx: p[0], cy: p[1], stroke: line.run.color});
}
const indexOf = event => { const tr = event.target.closest("tr"); return tr ? Number(tr.dataset.index) : pinned; };
for (const kind of ["mouseover", "focusin"]) body.addEventListener(kind, event => light(indexOf(event)));
for (const kind of ["mouseleave", "focusout"]) body.addEventListener(kind, () => light(pinned));
body.addEventListener("click", event => {
  if (event.target.closest("a")) return;
  const index = indexOf(event);
  light(pinned = index === pinned ? null : index);
});

// If there are too many runs to distinguish by color, color them by the first override with few values.
const first = few ? -1 : data.varied.findIndex((_, key) => valuesOf(key).length <= COLORS.length);
paint(first < 0 ? null : first);
if (logged.length) {
  $("curves").hidden = false;
  logged.forEach(name => add($("metric"), "option", {value: name}, name));
  if (logged.includes("loss")) $("metric").value = "loss";
  // Starts with a log scale if the values span more than a factor of 20.
  const choose = () => {
    const values = runs.flatMap(run => run.curve[$("metric").value] || []).filter(value => value !== null);
    const least = values.reduce((a, b) => Math.min(a, b), Infinity);
    const most = values.reduce((a, b) => Math.max(a, b), -Infinity);
    $("log").checked = least > 0 && most / least > 20;
    draw();
  };
  $("metric").addEventListener("change", choose);
  $("log").addEventListener("change", draw);
  add($("key"), "option", {value: ""}, "run");
  data.varied.forEach((key, index) => add($("key"), "option", {value: index, title: key.name}, key.short));
  $("by").hidden = !data.varied.length;
  $("key").addEventListener("change", () => { paint($("key").value === "" ? null : Number($("key").value)); draw(); });
  $("key").value = first < 0 ? "" : first;
  choose();
  let width = 0;
  new ResizeObserver(([entry]) => {
    if (Math.round(entry.contentRect.width) === width) return;
    width = Math.round(entry.contentRect.width);
    requestAnimationFrame(draw);
  }).observe($("plot"));
}

// ---------------------------------------------------------------------------------------------------- samples
runs.forEach(run => {
  if (!run.preview) return;
  const source = `data:image/png;base64,${run.preview}`;
  run.sheet = add($("sheets"), "figure");
  const button = add(run.sheet, "button", {type: "button", "aria-label": `Enlarge the samples of ${run.label}`});
  const picture = add(button, "img", {alt: `samples of ${run.label}`, decoding: "async", src: source});
  picture.addEventListener("load", () => picture.classList.toggle("small", picture.naturalWidth < 512));
  add(run.sheet, "figcaption", {}, run.label);
  button.addEventListener("click", () => {
    const [large, text] = $("large").children;
    large.src = source;
    large.className = picture.className;
    text.textContent = run.label;
    $("large").showModal();
  });
});
$("large").addEventListener("click", () => $("large").close());
const failed = runs.filter(run => run.problem);
const problems = failed.map(run => `${run.label}: ${run.problem}`).join("; ");
$("problems").textContent = problems && `Not shown: ${problems}`;
$("samples").hidden = !runs.some(run => run.preview || run.problem);
