// The page: asks for the state each second, with a key where the server wants one, and shows it.
import { plot } from "/dashboard/charts.js";

const EVERY = 1000; // milliseconds
const KEY = "agentmem-key";
const KINDS = [
  ["running_bytes", "run", "Running: held"],
  ["running_room_bytes", "run-room", "Running: room to write and work in"],
  ["idle_bytes", "idle", "Idle: held"],
  ["idle_room_bytes", "idle-room", "Idle: room that others can have"],
];
const $ = (id) => document.getElementById(id);

// ---- words

export function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  const power = count < 1 ? 0 : Math.min(units.length - 1, Math.floor(Math.log2(count) / 10));
  const value = count / 1024 ** power;
  return `${power && value < 100 ? Number(value.toFixed(1)) : Math.round(value)} ${units[power]}`;
}
const whole = (count) => Math.round(count).toLocaleString("en");
const short = (count) => (count < 10000 ? String(Number(count.toFixed(2))) : `${Number((count / 1000).toFixed(1))}k`);
const small = (value) => (value === null ? "–" : value && value < 0.001 ? value.toExponential(1) : String(Number(value.toPrecision(3))));
const seconds = (value) => (value < 1 ? `${Math.round(value * 1000)} ms` : `${Number(value.toFixed(1))} s`);
const clock = (at) => new Date(at * 1000).toLocaleTimeString("en-GB");
function ago(value) {
  if (value < 1) return "now";
  const [size, unit] = value < 90 ? [1, "s"] : value < 5400 ? [60, "min"] : [3600, "h"];
  return `${Math.round(value / size)} ${unit} ago`;
}

/** An HTML element; its text is text, whatever it looks like. */
function make(name, className = "", text = "") {
  const made = document.createElement(name);
  made.className = className;
  made.textContent = text;
  return made;
}

// ---- parts of the page

function showCap(now, moments) {
  $("charged").textContent = bytes(now.charged_bytes);
  $("cap").textContent = bytes(now.cap_bytes);
  const parts = [...KINDS.map(([name, style, text]) => [now[name], style, text]), [now.cap_bytes - now.charged_bytes, "free", "Free"]];
  $("bar").replaceChildren(...parts.map(([count, style]) => {
    const part = make("span", style);
    part.style.width = `${(100 * count) / now.cap_bytes}%`;
    return part;
  }));
  $("bar").setAttribute("aria-label", parts.map(([count, , text]) => `${text} ${bytes(count)}`).join(", "));
  $("kinds").replaceChildren(...parts.map(([count, style, text]) => legend(style, text, bytes(count))));
  plot($("bytes"), { ...overTime(moments), label: "Bytes charged to the cap, by kind", series: stacked(moments),
    limit: now.cap_bytes, limitText: `cap ${bytes(now.cap_bytes)}`, yText: bytes, binary: true,
    tip: (at) => [clock(moments.at[at]), ...KINDS.map(([name, , text]) => `${text} ${bytes(moments[name][at])}`)].join("\n") });
}

function legend(style, text, value) {
  const item = make("li");
  item.append(make("i", style), `${text} `, make("b", "", value));
  return item;
}

/** The kinds of bytes, each on top of those before it. */
function stacked(moments) {
  let under = moments.at.map((at) => [at, 0]);
  return KINDS.map(([name, style]) => {
    const points = moments.at.map((at, index) => [at, under[index][1] + moments[name][index]]);
    const made = { kind: "area", style, points, under };
    under = points;
    return made;
  });
}

/** What charts over the last minutes have in common. */
function overTime(moments) {
  const last = moments.at.at(-1);
  return { xFrom: last - 60, xText: (at) => (at >= last ? "now" : `−${Math.round(last - at)} s`), height: 140,
    xMarks: (first, end, count) => {
      const step = [10, 15, 30, 60, 120].find((each) => (end - first) / each <= count) ?? 300;
      return Array.from({ length: Math.floor((end - first) / step) + 1 }, (_, at) => end - at * step);
    } };
}

function showNow(now, state) {
  const tiles = [
    ["Running", now.active], ["Idle", now.idle], ["On disk", now.on_disk], ["Requests", now.requests],
    ["Wait for memory", now.waiting], ["Wait for a forward", now.feeding],
    ["Fed at once", Number(now.sequences_per_forward.toFixed(1))], ["Tokens in all", short(now.fed_tokens)],
    ["Compaction, p50", seconds(now.pause_p50_seconds)], ["Compaction, p95", seconds(now.pause_p95_seconds)],
  ];
  $("tiles").replaceChildren(...tiles.map(([name, value]) => {
    const tile = make("div");
    tile.append(make("dt", "", name), make("dd", "", String(value)));
    return tile;
  }));
  $("model").textContent = state.models[0];
}

function showRates(moments) {
  const line = (name, style) => ({ kind: "line", style, points: moments.at.map((at, index) => [at, moments[name][index]]) });
  plot($("rate"), { ...overTime(moments), label: "Tokens per second", series: [line("tokens_per_second", "run")], yText: short, least: 1,
    tip: (at) => `${clock(moments.at[at])}\n${short(moments.tokens_per_second[at])} tokens/s` });
  $("queue-legend").replaceChildren(legend("run", "running", moments.active.at(-1)), legend("idle", "waiting for memory", moments.waiting.at(-1)));
  plot($("queue"), { ...overTime(moments), label: "Turns that run and that wait for memory", series: [line("active", "run"), line("waiting", "idle")],
    yText: short, least: 4, tip: (at) => `${clock(moments.at[at])}\n${moments.active[at]} running\n${moments.waiting[at]} waiting` });
}

function showTalks(state) {
  const boxes = new Map([...$("talks").children].map((box) => [box.dataset.id, box]));
  const shown = state.conversations.map((talk) => [talk, boxes.get(talk.id) ?? newTalk(talk.id)]);
  $("talks").replaceChildren(...shown.map(([, box]) => box)); // in the page first: a chart is as wide as its box
  for (const [talk, box] of shown) showTalk(talk, box);
  if (!shown.length) $("talks").append(make("p", "empty", "No conversation of this key is held. Point an OpenAI client at this server."));
  $("hidden").textContent = state.hidden ? `and ${state.hidden} more, used longer ago` : "";
}

function newTalk(id) {
  const box = make("article", "talk"), head = make("header");
  box.dataset.id = id;
  head.append(make("span", "name", id), make("span", "state"));
  box.append(head, make("p"), make("div", "chart"));
  box.querySelector(".name").title = id;
  return box;
}

function showTalk(talk, box) {
  const state = box.querySelector(".state");
  state.dataset.state = talk.state;
  state.textContent = talk.state === "active" ? "running" : `${talk.state}, ${ago(talk.idle_seconds)}`;
  box.querySelector("p").textContent =
    `${whole(talk.tokens)} tokens in ${short(talk.slots)} of ${whole(talk.capacity)} slots · ${talk.compactions} compaction${talk.compactions === 1 ? "" : "s"}`;
  const points = talk.saw_tooth;
  plot(box.querySelector(".chart"), { label: `Slots a head of ${talk.id} holds, by tokens`, height: 112, xFrom: points[0]?.[0],
    series: points.length ? [{ kind: "line", style: talk.state === "active" ? "run" : "idle", points }] : [],
    limit: talk.capacity, limitText: "full", xText: short, yText: short, empty: "Not used since the server was started",
    tip: (at) => `after ${whole(points[at][0])} tokens\n${short(points[at][1])} slots` });
}

function showCuts(cuts) {
  const measured = cuts.filter((cut) => cut.output_error > 0), last = cuts.at(-1)?.at ?? 0;
  const time = { xText: clock, height: 140, empty: "No compaction yet", xFrom: last - 60,
    xMarks: (first, end) => [first, end] };
  plot($("errors"), { ...time, label: "Relative error of attention outputs on held-out queries", log: true, yText: small,
    series: dots(measured, "output_error", "run"), empty: cuts.length ? "This policy has nothing to hold out" : "No compaction yet",
    tip: (at) => `${clock(measured[at].at)}\noutput error ${small(measured[at].output_error)}` });
  plot($("seconds"), { ...time, label: "Seconds of compactions", yText: small, series: dots(cuts, "seconds", "idle"),
    tip: (at) => `${clock(cuts[at].at)}\n${seconds(cuts[at].seconds)}` });
  $("cuts").replaceChildren(...cuts.slice(-12).reverse().map(row));
}

const dots = (cuts, name, style) => (cuts.length ? [{ kind: "dots", style, points: cuts.map((cut) => [cut.at, cut[name]]) }] : []);

function row(cut) {
  const cells = [clock(cut.at), cut.conversation, small(cut.output_error), seconds(cut.seconds),
    `${whole(cut.slots_before)} → ${whole(cut.slots_after)}`, whole(cut.tokens_seen), small(cut.log_mass_error), cut.policy];
  const made = make("tr");
  made.append(...cells.map((text, at) => make("td", at > 1 ? "n" : at === 1 ? "name" : "", text)));
  return made;
}

function show(state) {
  $("main").hidden = false;
  $("ask").hidden = true;
  showCap(state.runtime, state.moments);
  showNow(state.runtime, state);
  showRates(state.moments);
  showTalks(state);
  showCuts(state.compactions);
}

// ---- the server

function link(state, text) {
  $("link").dataset.state = state;
  $("link").textContent = text;
}

/** Ask for a key; `wrong` if one was given. */
function askForKey(wrong) {
  sessionStorage.removeItem(KEY);
  $("main").hidden = $("forget").hidden = true;
  $("wrong").hidden = !wrong;
  if ($("ask").hidden) {
    $("ask").hidden = false;
    $("key").focus();
  }
  link("waiting", "needs a key");
}

async function ask() {
  const key = sessionStorage.getItem(KEY);
  if (key === null && document.body.dataset.key === "yes") return askForKey(false);
  const answer = await fetch("/dashboard/state", { headers: key ? { Authorization: `Bearer ${key}` } : {}, cache: "no-store" });
  if (answer.status === 401) return askForKey(key !== null);
  if (!answer.ok) throw new Error(`status ${answer.status}`);
  $("forget").hidden = key === null;
  show(await answer.json());
  return link("live", "live");
}

async function turn() {
  if (!document.hidden && $("ask").hidden) {
    try {
      await ask();
    } catch (error) {
      link("lost", `no answer (${error.message})`);
    }
  }
  setTimeout(turn, EVERY);
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, $("key").value.trim());
  $("key").value = "";
  $("ask").hidden = true;
  ask().catch((error) => link("lost", `no answer (${error.message})`));
});
$("forget").addEventListener("click", () => askForKey(false));
turn();
