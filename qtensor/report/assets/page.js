"use strict";
// Fills the page from the report's JSON. Text only ever goes in as textContent: a name cannot become markup.
const report = JSON.parse(document.getElementById("report").textContent);
const at = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

function add(parent, tag, text, attributes = {}) {
  const svg = parent.namespaceURI === SVG || tag === "svg";
  const element = svg ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined && text !== null) element.textContent = text;
  return parent.appendChild(element);
}

const whole = (n) => n.toLocaleString("en-US");
function bytes(n) {
  for (const [unit, size] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]])
    if (n >= size) return (n / size).toFixed(n >= 100 * size ? 0 : n >= 10 * size ? 1 : 2) + " " + unit;
  return n + " B";
}
const seconds = (s) => (s >= 100 ? s.toFixed(0) : s >= 1 ? s.toFixed(2) : (1000 * s).toFixed(s < 0.01 ? 2 : 0) + " m") + (s >= 1 ? " s" : "s");
const decibels = (layer) => (layer.lossless ? "∞" : layer.sqnr === null ? "–" : layer.sqnr.toFixed(1));
const plural = (n, word) => `${whole(n)} ${word}${n === 1 ? "" : "s"}`;

// Theme: the system's, unless chosen here.
const THEMES = ["auto", "light", "dark"];
let theme = "auto";
try { theme = localStorage.getItem("qtensor-theme") || "auto"; } catch { /* storage may be forbidden for files */ }
function applyTheme() {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  at("theme").textContent = `Theme: ${theme}`;
}
at("theme").addEventListener("click", () => {
  theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
  try { localStorage.setItem("qtensor-theme", theme); } catch { /* as above */ }
  applyTheme();
});
applyTheme();

// Summary.
const source = report.layers.reduce((sum, layer) => sum + layer.source_bytes, 0);
const missing = Object.entries(report.missing);
at("subtitle").textContent =
  `${report.scheme || "no scheme"} · session ${report.state} · ${seconds(report.seconds)}` +
  (report.settings.qtensor ? ` · qtensor ${report.settings.qtensor}` : "");

function tile(value, label, exact, bad) {
  const item = add(at("tiles"), "li", null, bad ? { class: "bad" } : {});
  add(item, "b", value, exact === undefined ? {} : { title: exact });
  add(item, "span", label);
}
const inBytes = (n) => `${whole(n)} bytes`;
tile(whole(report.layers.length), "weights quantized");
tile(bytes(report.quantized_bytes), source ? `quantized, from ${bytes(source)}` : "quantized", inBytes(report.quantized_bytes));
tile(bytes(report.passthrough_bytes), "left as they are", inBytes(report.passthrough_bytes));
tile(bytes(report.peak_staged_bytes), "staging at its peak", inBytes(report.peak_staged_bytes));
if (report.peak_second_copy_bytes)
  tile(bytes(report.peak_second_copy_bytes), "second copies at their peak", inBytes(report.peak_second_copy_bytes));
tile(whole(report.lossy_reads), "lossy reads", undefined, report.lossy_reads > 0);
tile(whole(missing.length), "weights with gaps", undefined, missing.length > 0);

// What needs a look.
const problems = [...report.warnings];
for (const [name, boxes] of missing) {
  const shown = boxes.slice(0, 4).map((box) => "[" + box.map(([a, b]) => `${a}:${b}`).join(", ") + "]").join("; ");
  const more = boxes.length > 4 ? ` and ${boxes.length - 4} more` : "";
  const never = report.untouched.includes(name) ? "nobody wrote to it" : `never written: ${shown}${more}`;
  problems.push(`${name}: ${never}`);
}
for (const layer of report.layers)
  if (layer.lossy_reads)
    problems.push(`${layer.name}: ${plural(layer.lossy_reads, "read")} of elements that were quantized already`);
for (const [name, why] of Object.entries(report.passthrough)) if (why) problems.push(`${name}: not quantized: ${why}`);
for (const text of problems) add(at("problem-list"), "li", text);
at("problems").hidden = problems.length === 0;

// Charts. Drawn for the width there is, so that text keeps its size on a phone.
function steps(max, count) {
  const rough = max / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((f) => f * power).find((s) => s >= rough);
  return Array.from({ length: Math.floor(max / step + 1e-9) + 1 }, (_, i) => i * step);
}
function frame(host, height, label) {
  host.replaceChildren();
  const width = Math.max(260, host.clientWidth);
  const box = { left: 62, right: width - 12, top: 10, bottom: height - 24 };
  const svg = add(host, "svg", null, { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": label });
  return { svg, width, box };
}

const SERIES = [["quantized_bytes", "quantized", "Quantized"], ["passthrough_bytes", "plain", "Left as they are"], ["staged_bytes", "staged", "Staging"]];
const points = report.timeline;
function drawMemory() {
  const total = source + report.passthrough_bytes;
  const label = `Memory over ${seconds(report.seconds)}: ends at ${bytes(report.quantized_bytes + report.passthrough_bytes)}, staging peak ${bytes(report.peak_staged_bytes)}`;
  const { svg, box } = frame(at("memory-chart"), 260, label);
  const sums = points.map((p) => SERIES.map((_, i) => SERIES.slice(0, i + 1).reduce((s, [key]) => s + p[key], 0)));
  const top = 1.04 * Math.max(1, total, ...sums.map((s) => s[2])), end = Math.max(1e-9, points[points.length - 1].seconds);
  const x = (s) => box.left + (s / end) * (box.right - box.left), y = (n) => box.bottom - (n / top) * (box.bottom - box.top);
  for (const n of steps(top, 5)) {
    add(svg, "line", null, { class: n ? "grid" : "axis", x1: box.left, x2: box.right, y1: y(n), y2: y(n) });
    add(svg, "text", n ? bytes(n) : "0", { x: box.left - 8, y: y(n) + 4, "text-anchor": "end" });
  }
  for (const s of steps(end, box.right - box.left > 420 ? 6 : 3))
    add(svg, "text", s ? seconds(s) : "0", { x: x(s), y: box.bottom + 17, "text-anchor": s > 0.95 * end ? "end" : "middle" });
  for (let i = SERIES.length - 1; i >= 0; i--) {
    let d = `M${box.left},${box.bottom}`;
    points.forEach((p, k) => { d += `H${x(p.seconds).toFixed(2)}V${y(sums[k][i]).toFixed(2)}`; });
    add(svg, "path", null, { class: SERIES[i][1], d: `${d}V${box.bottom}Z` });
  }
  if (source) add(svg, "line", null, { class: "source", x1: box.left, x2: box.right, y1: y(total), y2: y(total) });
  const cursor = add(svg, "line", null, { class: "cursor", y1: box.top, y2: box.bottom, visibility: "hidden" });
  let chosen = points.length - 1;
  function show(k) {
    chosen = Math.min(points.length - 1, Math.max(0, k));
    const p = points[chosen];
    cursor.setAttribute("visibility", "visible");
    cursor.setAttribute("x1", x(p.seconds)); cursor.setAttribute("x2", x(p.seconds));
    at("memory-readout").textContent =
      `${seconds(p.seconds)}: ` + SERIES.map(([key, , name]) => `${name.toLowerCase()} ${bytes(p[key])}`).join(", ");
  }
  svg.setAttribute("tabindex", "0");
  svg.addEventListener("pointermove", (event) => {
    const area = svg.getBoundingClientRect();
    const s = ((event.clientX - area.left - box.left) / (box.right - box.left)) * end;
    let nearest = 0;
    points.forEach((p, k) => { if (Math.abs(p.seconds - s) < Math.abs(points[nearest].seconds - s)) nearest = k; });
    show(nearest);
  });
  svg.addEventListener("pointerleave", () => cursor.setAttribute("visibility", "hidden"));
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step) { event.preventDefault(); show(chosen + step); }
  });
}
const measured = report.layers.filter((layer) => layer.sqnr !== null);
function drawNoise() {
  const values = measured.map((layer) => layer.sqnr);
  const { svg, box } = frame(at("noise-chart"), 240, `Histogram of the SQNR of ${plural(values.length, "weight")}`);
  const low = Math.min(...values), high = Math.max(...values);
  // Bins on round decibels; at most about twenty.
  const width = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50].find((w) => (high - low) / w <= 20) || 100;
  const first = Math.floor(low / width + 1e-9), bins = new Array(Math.floor(high / width + 1e-9) - first + 1).fill(0);
  for (const v of values) bins[Math.floor(v / width + 1e-9) - first] += 1;
  const top = Math.max(...bins), y = (n) => box.bottom - (n / (1.06 * top)) * (box.bottom - box.top);
  const left = box.left - 22, step = (box.right - left) / bins.length;
  for (const n of steps(top, 4).filter(Number.isInteger)) {
    add(svg, "line", null, { class: n ? "grid" : "axis", x1: left, x2: box.right, y1: y(n), y2: y(n) });
    add(svg, "text", whole(n), { x: left - 8, y: y(n) + 4, "text-anchor": "end" });
  }
  const digits = width < 1 ? 1 : 0, every = Math.ceil(bins.length / Math.max(2, Math.floor((box.right - left) / 52)));
  bins.forEach((n, i) => {
    const bar = add(svg, "rect", null, { class: "quantized", x: left + i * step + 1, width: Math.max(1, step - 2), y: y(n), height: box.bottom - y(n) });
    add(bar, "title", `${((first + i) * width).toFixed(digits)} to ${((first + i + 1) * width).toFixed(digits)} dB: ${plural(n, "weight")}`);
    if (i % every === 0) add(svg, "text", ((first + i) * width).toFixed(digits) + (i ? "" : " dB"), { x: left + i * step, y: box.bottom + 17, "text-anchor": "middle" });
  });
  const worst = measured.find((layer) => layer.sqnr === low), lossless = report.layers.filter((l) => l.lossless).length;
  at("noise-summary").textContent =
    `${plural(values.length, "weight")}, in dB; the lowest is ${low.toFixed(1)}, of ${worst.name}` +
    (lossless ? `; ${plural(lossless, "weight")} lost nothing` : "");
}
function drawAll() {
  if (points.length > 1) drawMemory();
  if (measured.length) drawNoise();
}
at("memory").hidden = points.length < 2;
at("noise").hidden = measured.length === 0;
for (const [, kind, name] of SERIES) {
  const item = add(at("memory-legend"), "li");
  add(item, "i", null, { class: kind });
  item.append(name);
}
if (source) {
  const item = add(at("memory-legend"), "li");
  add(item, "i", null, { class: "line" });
  item.append("The same weights unquantized");
}
let drawnAt = 0;
new ResizeObserver(() => {
  if (document.body.clientWidth !== drawnAt) { drawnAt = document.body.clientWidth; drawAll(); }
}).observe(document.body);

// The table.
function addName(parent, name) {
  name.split(/(?<=[./])/).forEach((part) => { parent.append(part); add(parent, "wbr"); }); // it may break after a dot
}
const took = (layer) => (layer.began === null || layer.done === null ? null : layer.done - layer.began);
const time = (s) => (s === null ? "–" : seconds(s));
const COLUMNS = [
  ["Weight", (l) => l.name, (l) => l.name, "name"],
  ["Shape", (l) => l.shape.reduce((a, b) => a * b, 1), (l) => l.shape.join(" × "), "number"],
  ["Scheme", (l) => l.scheme, (l) => l.scheme, ""],
  ["Bytes", (l) => l.bytes, (l) => whole(l.bytes), "number"],
  ["Of source", (l) => (l.source_bytes ? l.bytes / l.source_bytes : null), (l) => (l.source_bytes ? ((100 * l.bytes) / l.source_bytes).toFixed(1) + " %" : "–"), "number"],
  ["SQNR dB", (l) => (l.lossless ? Infinity : l.sqnr), decibels, "number"],
  ["Complete at", (l) => l.done, (l) => time(l.done), "number"],
  ["Took", took, (l) => time(took(l)), "number"],
  ["Lossy reads", (l) => l.lossy_reads, (l) => whole(l.lossy_reads), "number"],
  ["Note", (l) => l.note, (l) => l.note, ""],
].filter(([title]) =>
  (title !== "SQNR dB" || report.layers.some((l) => l.lossless || l.sqnr !== null)) &&
  (title !== "Lossy reads" || report.lossy_reads) && (title !== "Note" || report.layers.some((l) => l.note)));
let sortColumn = -1, direction = 1;
const heads = COLUMNS.map(([title, , , kind], i) => {
  const head = add(at("table").tHead.rows[0], "th", null, { scope: "col", class: kind, "aria-sort": "none" });
  add(head, "button", title, { type: "button" }).addEventListener("click", () => {
    direction = sortColumn === i ? -direction : 1;
    sortColumn = i;
    heads.forEach((h, k) => h.setAttribute("aria-sort", k !== i ? "none" : direction > 0 ? "ascending" : "descending"));
    drawTable();
  });
  return head;
});
// Numbers in names count as numbers: layer 2 comes before layer 10.
const collator = new Intl.Collator("en", { numeric: true });
function compare(a, b) {
  if (a === null || b === null) return a === b ? 0 : a === null ? 1 : -1; // what is not known comes last, either way
  return direction * (typeof a === "string" ? collator.compare(a, b) : a < b ? -1 : a > b ? 1 : 0);
}
function drawTable() {
  const wanted = at("filter").value.trim().toLowerCase(), scheme = at("scheme").value;
  const rows = report.layers.filter(
    (l) => (!scheme || l.scheme === scheme) && [l.name, l.scheme, l.note].some((text) => text.toLowerCase().includes(wanted)));
  if (sortColumn >= 0) rows.sort((a, b) => compare(COLUMNS[sortColumn][1](a), COLUMNS[sortColumn][1](b)));
  const body = document.createElement("tbody");
  for (const layer of rows) {
    const row = add(body, "tr");
    for (const [, , show, kind] of COLUMNS) {
      const cell = add(row, "td", kind === "name" ? null : show(layer), kind ? { class: kind } : {});
      if (kind === "name") addName(cell, show(layer));
    }
  }
  at("table").tBodies[0].replaceWith(body);
  const sum = rows.reduce((s, l) => s + l.bytes, 0);
  at("shown").textContent = `${rows.length === report.layers.length ? "" : whole(rows.length) + " of "}${plural(report.layers.length, "weight")}, ${whole(sum)} bytes`;
}
const schemes = [...new Set(report.layers.map((l) => l.scheme))].sort();
if (schemes.length > 1) {
  add(at("scheme"), "option", "All schemes", { value: "" });
  for (const name of schemes) add(at("scheme"), "option", name, { value: name });
  at("scheme").hidden = false;
}
at("filter").addEventListener("input", drawTable);
at("scheme").addEventListener("change", drawTable);
drawTable();

// The rest.
const plain = Object.keys(report.passthrough);
at("plain").hidden = plain.length === 0;
at("plain-summary").textContent = `${plural(plain.length, "parameter")}; ${inBytes(report.passthrough_bytes)} with buffers`;
for (const name of plain) addName(add(at("plain-list"), "li"), name);
for (const [key, value] of Object.entries(report.settings)) {
  add(at("settings"), "dt", key);
  add(at("settings"), "dd", value);
}
