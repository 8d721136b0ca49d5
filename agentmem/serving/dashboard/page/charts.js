// Charts as SVG: lines, stacked areas and points over linear or logarithmic axes, with what the pointer is at.

const NS = "http://www.w3.org/2000/svg";
const TICK = 64; // pixels between two labels of the horizontal axis, at least

/** An SVG element with attributes. */
function draw(name, attributes = {}, text = "") {
  const made = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.textContent = text;
  return made;
}

/** Round numbers from `low` to `high`, about `count` of them; round in units of a power of 1,024 where they are `binary`. */
export function ticks(low, high, count, binary = false) {
  const unit = binary && high > low ? 1024 ** Math.floor(Math.log2(high - low) / 10) : 1;
  const span = (high - low || 1) / unit;
  const power = 10 ** Math.floor(Math.log10(span / count));
  const step = unit * [1, 2, 5, 10].map((each) => each * power).find((each) => span / each <= count);
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step / 1e6; at += step) found.push(Number(at.toPrecision(12)));
  return found;
}

/** Powers of ten around `low` to `high`, both positive. */
function powers(low, high) {
  const found = [];
  for (let at = Math.floor(Math.log10(low)); at <= Math.ceil(Math.log10(high)); at += 1) found.push(10 ** at);
  return found.length > 1 ? found : [found[0], found[0] * 10];
}

/** Where a value lies between `from` and `to` pixels. */
function scale(low, high, from, to, log) {
  const turn = log ? Math.log10 : (value) => value;
  const span = turn(high) - turn(low) || 1;
  return (value) => from + ((turn(value) - turn(low)) / span) * (to - from);
}

/** The range of values: zero to the largest round number, or whole powers of ten. */
function range(values, chart) {
  const high = Math.max(...values, chart.limit ?? 0, chart.least ?? 0);
  if (!chart.log) return { low: 0, high: high * 1.06 || 1, marks: ticks(0, high || 1, 4, chart.binary) };
  const marks = powers(Math.min(...values), high);
  return { low: marks[0], high: marks.at(-1), marks };
}

const path = (points, x, y) => points.map(([a, b], at) => `${at ? "L" : "M"}${x(a).toFixed(1)} ${y(b).toFixed(1)}`).join("");

/**
 * Draw a chart into `box`, in place of what is there.
 *
 * chart: {label, series: [{name, kind: "line" | "area" | "dots", points: [[x, y], …], style, under: [[x, y], …]}],
 *         height, log, binary, limit, limitText, least, empty, xFrom, xText(x), yText(y), xMarks(first, last, count), tip(at)}
 */
export function plot(box, chart) {
  const all = chart.series.flatMap((each) => each.points);
  if (!all.length) return empty(box, chart.empty ?? "Nothing yet");
  const width = Math.max(160, box.clientWidth), height = chart.height ?? 150;
  const { low, high, marks } = range(all.map((point) => point[1]), chart);
  const left = 8 + 6.2 * Math.max(...marks.map((mark) => chart.yText(mark).length));
  const first = Math.min(chart.xFrom ?? Infinity, ...all.map((point) => point[0]));
  const last = Math.max(...all.map((point) => point[0]));
  const x = scale(first, last > first ? last : first + 1, left, width - 8), y = scale(low, high, height - 20, 8, chart.log);
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": chart.label });
  axes(svg, chart, { x, y, marks, left, width, height, first, last });
  for (const each of chart.series) series(svg, { filled: chart.series.length === 1, ...each }, x, y);
  limit(svg, chart, y, left, width);
  box.replaceChildren(svg);
  follow(box, svg, chart, x, height);
}

function empty(box, text) {
  const made = document.createElement("p");
  made.className = "empty";
  made.textContent = text;
  box.replaceChildren(made);
  box.onpointermove = box.onpointerleave = null;
}

function axes(svg, chart, { x, y, marks, left, width, height, first, last }) {
  for (const mark of marks) {
    svg.append(draw("line", { class: "grid", x1: left, x2: width - 8, y1: y(mark), y2: y(mark) }));
    svg.append(draw("text", { x: left - 5, y: y(mark) + 3.5, "text-anchor": "end" }, chart.yText(mark)));
  }
  svg.append(draw("line", { class: "axis", x1: left, x2: width - 8, y1: height - 20, y2: height - 20 }));
  const count = Math.max(2, Math.min(6, Math.floor((width - left) / TICK)));
  for (const mark of (chart.xMarks ?? ticks)(first, last, count)) {
    const at = x(mark);
    if (at < left - 1 || at > width - 7) continue;
    const anchor = at > width - 24 ? "end" : at < left + 12 ? "start" : "middle";
    svg.append(draw("text", { x: at, y: height - 6, "text-anchor": anchor }, chart.xText(mark)));
  }
}

function series(svg, { kind, points, style, under, filled }, x, y) {
  if (kind === "dots") {
    const group = draw("g", { class: `f-${style}`, "data-points": points.length });
    for (const [a, b] of points) group.append(draw("circle", { cx: x(a), cy: y(b), r: 3.2 }));
    return svg.append(group);
  }
  const line = path(points, x, y);
  if (kind === "area") {
    const below = under ?? [[points.at(-1)[0], 0], [points[0][0], 0]].reverse();
    const back = path([...below].reverse(), x, y).replace("M", "L");
    svg.append(draw("path", { class: `f-${style} solid`, d: `${line}${back}Z`, "data-points": points.length }));
    return undefined;
  }
  const base = `L${x(points.at(-1)[0]).toFixed(1)} ${y(0)}L${x(points[0][0]).toFixed(1)} ${y(0)}Z`;
  if (filled) svg.append(draw("path", { class: `f-${style} soft`, d: line + base }));
  svg.append(draw("path", { class: `s-${style} stroke`, d: line, "data-points": points.length }));
  const [a, b] = points.at(-1);
  svg.append(draw("circle", { class: `f-${style} now`, cx: x(a), cy: y(b), r: 4 }));
  return undefined;
}

function limit(svg, chart, y, left, width) {
  if (!chart.limit) return;
  const at = y(chart.limit);
  svg.append(draw("line", { class: "limit", x1: left, x2: width - 8, y1: at, y2: at }));
  svg.append(draw("text", { class: "limit-text", x: left + 4, y: at + 12 }, chart.limitText));
}

/** Show the point that is nearest to the pointer. */
function follow(box, svg, chart, x, height) {
  const tip = document.getElementById("tip"), places = chart.series[0].points.map((point) => x(point[0]));
  const cross = svg.appendChild(draw("line", { class: "cross", y1: 8, y2: height - 20, visibility: "hidden" }));
  box.onpointermove = (event) => {
    const offset = event.clientX - svg.getBoundingClientRect().left;
    const at = places.reduce((best, place, each) => (Math.abs(place - offset) < Math.abs(places[best] - offset) ? each : best), 0);
    for (const name of ["x1", "x2"]) cross.setAttribute(name, places[at]);
    cross.setAttribute("visibility", "visible");
    tip.textContent = chart.tip(at);
    tip.hidden = false;
    tip.style.left = `${Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 6)}px`;
    tip.style.top = `${Math.max(4, event.clientY - tip.offsetHeight - 10)}px`;
  };
  box.onpointerleave = () => {
    tip.hidden = true;
    cross.setAttribute("visibility", "hidden");
  };
}
