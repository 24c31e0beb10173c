"use strict";
// The page's script: theme, folds, the table of runs, and the chart. Text is only ever set as text.
document.documentElement.classList.add("js");

const SVG = "http://www.w3.org/2000/svg";
const byId = (id) => document.getElementById(id);

function make(parent, name, attributes = {}, text = "") {
  const svg = parent.namespaceURI === SVG || name === "svg";
  const element = svg ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.textContent = text;
  parent.append(element);
  return element;
}

function remembered(store, key, value) {  // private windows may refuse
  try {
    if (value === undefined) return store().getItem(key);
    store().setItem(key, value);
  } catch { /* then it is not remembered */ }
  return null;
}

// --- theme, folds, refresh --------------------------------------------------------------------------

function theme() {
  const root = document.documentElement, button = byId("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const chosen = remembered(() => localStorage, "mmsweep-theme");
  if (chosen === "dark" || chosen === "light") root.dataset.theme = chosen;
  const isDark = () => (root.dataset.theme || (system.matches ? "dark" : "light")) === "dark";
  const show = () => {
    button.textContent = isDark() ? "Light" : "Dark";
    button.setAttribute("aria-label", `Switch to ${isDark() ? "light" : "dark"} colours`);
    button.setAttribute("aria-pressed", String(isDark()));
  };
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    remembered(() => localStorage, "mmsweep-theme", root.dataset.theme);
    show();
  });
  system.addEventListener("change", show);
  show();
}

function folds(hasChart) {
  const all = [...document.querySelectorAll("details.fold")];
  const before = remembered(() => sessionStorage, "mmsweep-folds");
  if (before !== null) {
    const open = new Set(JSON.parse(before));
    for (const fold of all) fold.open = open.has(fold.id);
    sessionStorage.removeItem("mmsweep-folds");
  } else if (hasChart) {
    const still = document.querySelector("#figures details.fold");  // the chart above shows the same
    if (still) still.open = false;
  }
  for (const button of document.querySelectorAll(".unfold")) {
    button.addEventListener("click", () => {
      const own = all.filter((fold) => byId(button.dataset.folds).contains(fold)), open = own.some((fold) => !fold.open);
      for (const fold of own) fold.open = open;
      button.textContent = open ? "Close all" : "Open all";
    });
  }
  const reveal = () => {
    const target = location.hash.includes("=") ? null : byId(decodeURIComponent(location.hash.slice(1)));
    const fold = target && target.closest("details.fold");
    if (fold && !fold.open) { fold.open = true; target.scrollIntoView(); }
  };
  addEventListener("hashchange", reveal);
  reveal();
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = all.filter((fold) => !fold.open);
    for (const fold of closed) fold.open = true;
  });
  addEventListener("afterprint", () => { for (const fold of closed) fold.open = false; });
}

function refresh() {
  const seconds = Number(document.body.dataset.refresh);
  if (!seconds) return;
  const again = () => {
    const busy = document.activeElement && document.activeElement.matches("input, select");
    if (document.hidden || busy || !byId("tip").hidden) { setTimeout(again, 2000); return; }
    const open = [...document.querySelectorAll("details.fold[open]")].map((fold) => fold.id);
    remembered(() => sessionStorage, "mmsweep-folds", JSON.stringify(open));
    location.reload();
  };
  setTimeout(again, 1000 * seconds);
}

// --- the table of runs ------------------------------------------------------------------------------

// What is shown is in the address, as #status=running&sort=step: it can be sent, and Back undoes a link.
function runTable() {
  const table = byId("run-table"), heads = [...table.tHead.rows[0].cells];
  const selects = [...document.querySelectorAll("#runs select")], text = byId("text");
  const runs = [...table.tBodies].map((body, place) => ({
    body, place,
    row: body.rows[0], details: body.rows[1], button: body.querySelector(".more"),
    facts: { arm: body.dataset.arm, status: body.dataset.status, ...JSON.parse(body.dataset.axes) },
    words: body.textContent.toLowerCase(),
  }));
  let state;

  const read = () => {
    const asked = new URLSearchParams(location.hash.includes("=") ? location.hash.slice(1) : "");
    const listed = (name) => (asked.get(name) || "").split(",").filter(Boolean);
    state = { of: listed("of"), open: listed("open"), text: asked.get("text") || "", sort: asked.get("sort") || "",
              down: asked.get("down") === "1", facts: {} };
    for (const { dataset } of selects) state.facts[dataset.key] = asked.get(dataset.key) || "";
  };
  const address = () => {
    const asked = new URLSearchParams();
    const plain = { ...state.facts, text: state.text, sort: state.sort, down: state.down ? "1" : "" };
    for (const [key, value] of Object.entries(plain)) if (value) asked.set(key, value);
    for (const key of ["of", "open"]) if (state[key].length) asked.set(key, state[key].join(","));
    const hash = asked.toString().replaceAll("%2C", ",");
    return location.href.split("#")[0] + (hash ? `#${hash}` : "");
  };

  const show = () => {
    const of = new Set(state.of), open = new Set(state.open), wanted = state.text.toLowerCase();
    let count = 0;
    for (const run of runs) {
      const fits = (!of.size || of.has(run.body.dataset.run)) && run.words.includes(wanted)
        && Object.entries(state.facts).every(([key, value]) => !value || run.facts[key] === value);
      run.body.hidden = !fits;
      run.body.classList.toggle("hit", of.size > 0 && fits);
      run.details.hidden = !open.has(run.body.dataset.run);
      run.button.setAttribute("aria-expanded", String(!run.details.hidden));
      count += fits;
    }
    const filtered = of.size > 0 || wanted || Object.values(state.facts).some(Boolean);
    byId("count").textContent = (filtered ? `${count} of ${runs.length} runs` : `${runs.length} runs`)
      + (of.size ? ": those behind the number" : "");
    byId("all").hidden = !filtered;
    text.value = state.text;
    for (const select of selects) select.value = state.facts[select.dataset.key];
    order();
  };

  const order = () => {
    const column = heads.findIndex((head) => head.dataset.key === state.sort);
    heads.forEach((head, i) => head.setAttribute("aria-sort", i !== column ? "none" : state.down ? "descending" : "ascending"));
    const word = column >= 0 && heads[column].classList.contains("word"), sign = state.down ? -1 : 1;
    const key = (run) => run.row.cells[column].dataset.v;
    const sorted = column < 0 ? runs : [...runs].sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === "" || y === "") return (x === "") - (y === "") || a.place - b.place;  // what is missing stands last
      const way = word || Number.isNaN(Number(x)) || Number.isNaN(Number(y)) ? x.localeCompare(y, undefined, { numeric: true }) : x - y;
      return sign * way || a.place - b.place;
    });
    table.append(...sorted.map((run) => run.body));
  };

  const change = (how, push = false) => {
    how();
    history[push ? "pushState" : "replaceState"](null, "", address());
    show();
  };
  const clear = () => { state.of = []; state.text = ""; for (const key of Object.keys(state.facts)) state.facts[key] = ""; };

  text.addEventListener("input", () => change(() => { state.text = text.value; }));
  for (const select of selects) {
    select.addEventListener("change", () => change(() => { state.facts[select.dataset.key] = select.value; }));
  }
  byId("all").addEventListener("click", () => change(clear));
  for (const head of heads) {
    head.querySelector("button").addEventListener("click", () => change(() => {
      const key = head.dataset.key;
      if (state.sort !== key) { state.sort = key; state.down = false; }
      else if (!state.down) state.down = true;
      else { state.sort = ""; state.down = false; }
    }));
  }
  for (const { body, button } of runs) {
    button.addEventListener("click", () => change(() => {
      const id = body.dataset.run;
      state.open = state.open.includes(id) ? state.open.filter((one) => one !== id) : [...state.open, id];
    }));
  }
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a.of");
    if (!link) return;
    event.preventDefault();
    change(() => {
      clear();
      if (link.dataset.of) state.of = link.dataset.of.split(" ");
      if (link.dataset.status) state.facts.status = link.dataset.status;
    }, true);
    const head = document.querySelector("#runs h2");
    head.scrollIntoView();
    head.focus({ preventScroll: true });
  });
  addEventListener("popstate", () => { read(); show(); });
  const printed = (on) => { for (const run of runs) run.details.hidden = !on && !state.open.includes(run.body.dataset.run); };
  addEventListener("beforeprint", () => printed(true));
  addEventListener("afterprint", () => printed(false));
  read();
  show();
}

// --- the chart --------------------------------------------------------------------------------------

function lastAt(steps, step) {  // index of the last recorded step up to `step`, or -1
  let low = -1, high = steps.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (steps[middle] <= step) low = middle; else high = middle - 1;
  }
  return low;
}

function median(values) {
  const sorted = [...values].sort((a, b) => a - b), half = sorted.length >> 1;
  return sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
}

function niceTicks(low, high, most) {
  const rough = (high - low) / most, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
  const ticks = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k++) ticks.push(Number((k * step).toPrecision(12)));
  return ticks;
}

function logTicks(low, high) {
  const ticks = [], factors = high < 1000 * low ? [1, 2, 5] : [1];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
    for (const factor of factors) {
      const tick = Number((factor * 10 ** power).toPrecision(3));
      if (tick >= low && tick <= high) ticks.push(tick);
    }
  }
  return ticks;
}

function plainNumber(value, places) {
  if (value !== 0 && (Math.abs(value) >= 1e6 || Math.abs(value) < 1e-4)) return value.toExponential(2);
  return value.toLocaleString("en", places ? { minimumFractionDigits: places } : { maximumSignificantDigits: 6 });
}

function chart(data) {
  const svg = byId("plot"), tip = byId("tip"), metricChoice = byId("metric"), spanChoice = byId("span");
  const LEFT = 60, RIGHT = 14, TOP = 30, BOTTOM = 40;
  const hiddenLabels = new Set();
  let curves = [], frame = null, cursor = null;

  for (const [name, metric] of Object.entries(data.metrics)) make(metricChoice, "option", { value: name }, metric.words);

  const isLoss = () => metricChoice.value.endsWith("loss");
  const value = (number) => number === undefined ? "–" : !Number.isFinite(number) ? "not finite"
    : isLoss() ? number.toFixed(4) : Number(number.toPrecision(3)).toLocaleString("en", { maximumSignificantDigits: 3 });

  // Value of a curve at a step: undefined where the run has not come so far, Infinity after it diverged.
  const at = (curve, step, horizon) => {
    const place = lastAt(curve.steps, step);
    if (place < 0) return undefined;
    if (step > curve.steps.at(-1)) return curve.run.state === "diverged" && curve.steps.at(-1) < horizon ? Infinity : undefined;
    return curve.values[place] ?? Infinity;
  };
  const those = (own, ...states) => own.filter((curve) => states.includes(curve.run.state));

  // [step, median over the runs that have a value there]: as `Group.median` of the figures.
  function medians(own, steps) {
    const held = those(own, "completed").length ? [] : those(own, "training");
    const first = Math.max(...own.map((curve) => curve.steps[0])), last = Math.min(...held.map((curve) => curve.steps.at(-1)));
    return steps.filter((step) => step >= first && step <= last).map((step) => {
      const values = own.map((curve) => at(curve, step, steps.at(-1))).filter((v) => v !== undefined);
      return [step, values.length ? median(values) : NaN];
    });
  }

  // The last finite median of the finished runs: as `Group.result` of the figures. A loss may end at Infinity.
  function result(own, steps, middle) {
    const finished = those(own, "completed", "diverged"), early = those(own, "training").length && !those(own, "completed").length;
    const points = (finished.length && !early ? medians(finished, steps) : middle).filter(([, v]) => !Number.isNaN(v));
    const end = isLoss() ? points.at(-1) : points.findLast(([, v]) => Number.isFinite(v));
    return end ? end[1] : undefined;
  }

  function groups() {
    return data.labels.map((label, index) => {
      const own = curves.filter((curve) => curve.run.label === index);
      const steps = [...new Set(own.flatMap((curve) => curve.steps))].sort((a, b) => a - b), middle = medians(own, steps);
      return { ...label, index, own, steps, horizon: steps.at(-1), middle, end: result(own, steps, middle) };
    }).filter((group) => group.own.length);
  }

  function choose() {
    const metric = data.metrics[metricChoice.value];
    curves = data.runs.filter((run) => run.id in metric.runs).map((run) => {
      const [steps, values, low, high] = metric.runs[run.id];
      return { run, steps: data.steps[steps], values, low: low || values, high: high || values, banded: Boolean(low) };
    });
    byId("thinned").hidden = !curves.some((curve) => curve.banded);
    svg.setAttribute("aria-label", `${metric.words} (${metric.unit}) by optimizer step`);
    legend();
    draw();
  }

  function legend() {
    const list = byId("legend");
    list.textContent = "";
    for (const group of groups()) {
      const button = make(make(list, "li"), "button", { type: "button", "aria-pressed": String(!hiddenLabels.has(group.index)) });
      const key = make(button, "svg", { viewBox: "0 0 24 10", "aria-hidden": "true" });
      make(key, "path", { d: "M0 5H24", stroke: group.colour, "stroke-width": "2.5", "stroke-dasharray": group.dash });
      button.append(group.name, " ");
      make(button, "span", {}, value(group.end));
      button.addEventListener("click", () => {
        if (!hiddenLabels.delete(group.index)) hiddenLabels.add(group.index);
        button.setAttribute("aria-pressed", String(!hiddenLabels.has(group.index)));
        draw();
      });
    }
  }

  // From the lowest value to the highest after a tenth of the steps; an explosion is cut at the start's loss.
  function limits(shown, from, to) {
    const all = [], late = [], first = [];
    for (const curve of shown) {
      curve.steps.forEach((step, i) => {
        if (step < from || step > to) return;
        for (const v of [curve.low[i], curve.high[i]]) {
          if (v === null) continue;
          all.push(v);
          if (step > 0.1 * to) late.push(v);
        }
      });
      const start = curve.values.find((v) => v !== null);
      if (start !== undefined) first.push(start);
    }
    const least = (values) => values.reduce((a, b) => Math.min(a, b), Infinity);
    const most = (values) => values.reduce((a, b) => Math.max(a, b), -Infinity);
    if (!all.length) return { low: 0, high: 1, log: false };
    let low = least(all), high = isLoss() && late.length ? Math.min(most(late), most(first)) : most(all);
    if (!isLoss() && low > 0 && high > 8 * low) {
      const pad = (high / low) ** 0.05;
      return { low: low / pad, high: high * pad, log: true };
    }
    if (!isLoss() && low >= 0) return { low: 0, high: 1.08 * high || 1, log: false };
    const pad = 0.06 * (high - low) || 0.05;
    return { low: low - pad, high: high + pad, log: false };
  }

  function draw() {
    const width = Math.max(svg.parentElement.clientWidth, 280), height = Math.round(Math.min(460, Math.max(300, 0.42 * width)));
    const reach = Math.max(1, ...curves.map((curve) => curve.steps.at(-1))), from = Number(spanChoice.value) * reach;
    const all = groups().filter((group) => !hiddenLabels.has(group.index)), shown = all.flatMap((group) => group.own);
    const { low, high, log } = limits(shown, from, reach), scale = log ? Math.log : (v) => v;
    const x = (step) => LEFT + (step - from) / (reach - from) * (width - LEFT - RIGHT);
    const y = (v) => TOP + (1 - (scale(v) - scale(low)) / (scale(high) - scale(low))) * (height - TOP - BOTTOM);
    frame = { width, height, from, reach, x, y, low, high, all, shown };
    svg.textContent = "";
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.setAttribute("height", height);
    axes(log ? logTicks(low, high) : niceTicks(low, high, height / 55), log);
    const clip = make(make(svg, "clipPath", { id: "inside" }), "rect", { x: LEFT, y: TOP - 6, width: width - LEFT - RIGHT, height: height - TOP - BOTTOM + 6 });
    const body = make(svg, "g", { "clip-path": `url(#${clip.parentElement.id})` });
    for (const group of all) for (const curve of group.own) drawRun(body, group, curve);
    for (const group of all) make(body, "path", { class: "median", d: path(group.middle), stroke: group.colour, "stroke-dasharray": group.dash });
    if (isLoss()) for (const group of all) for (const curve of group.own) cross(group, curve);
    make(svg, "g", { id: "cursor" });
    if (cursor !== null) point(cursor, null);
  }

  function axes(ticks, log) {
    const { width, height, from, reach, x, y } = frame, metric = data.metrics[metricChoice.value];
    const places = log ? 0 : Math.max(...ticks.map((tick) => (String(tick).split(".")[1] || "").length));
    for (const tick of ticks) {
      make(svg, "line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y(tick), y2: y(tick) });
      make(svg, "text", { class: "axis", x: LEFT - 8, y: y(tick) + 4, "text-anchor": "end" }, plainNumber(tick, places));
    }
    for (const tick of niceTicks(from, reach, Math.min(8, width / 90)).filter(Number.isInteger)) {
      make(svg, "text", { class: "axis", x: x(tick), y: height - BOTTOM + 18, "text-anchor": tick === reach ? "end" : "middle" }, tick.toLocaleString("en"));
    }
    make(svg, "text", { class: "axis", x: width - RIGHT, y: height - 4, "text-anchor": "end" }, "optimizer step");
    make(svg, "text", { class: "axis", x: 4, y: 12 }, metric.unit);
  }

  function path(points) {
    let d = "", pen = "M";
    for (const [step, v] of points) {
      if (v === null || !Number.isFinite(v) || step < frame.from) { pen = "M"; continue; }
      d += `${pen}${frame.x(step).toFixed(1)} ${Math.max(-9999, Math.min(9999, frame.y(v))).toFixed(1)}`;
      pen = "L";
    }
    return d;
  }

  function drawRun(body, group, curve) {
    if (curve.banded) {
      const there = curve.steps.map((step, i) => [step, curve.high[i]]), back = curve.steps.map((step, i) => [step, curve.low[i]]).reverse();
      const [up, down] = [path(there), path(back)];
      if (up && down) make(body, "path", { class: "band", d: `${up}L${down.slice(1).replaceAll("M", "L")}Z`, fill: group.colour });
    }
    const points = curve.steps.map((step, i) => [step, curve.values[i]]), bad = isLoss() ? curve.run.bad ?? Infinity : Infinity;
    const good = points.filter(([step]) => step <= bad), after = points.slice(Math.max(good.length - 1, 0));
    curve.paths = [make(body, "path", { class: "run", d: path(good), stroke: group.colour, "stroke-dasharray": group.dash })];
    if (bad < Infinity) curve.paths.push(make(body, "path", { class: "run", d: path(after), stroke: group.colour, "stroke-dasharray": "4 3" }));
  }

  function cross(group, curve) {
    const { bad } = curve.run;
    if (bad === null || bad < frame.from) return;
    const place = lastAt(curve.steps, bad), v = place < 0 || curve.values[place] === null ? frame.high : curve.values[place];
    const [cx, cy] = [frame.x(bad), frame.y(Math.min(v, frame.high))];
    make(svg, "path", { class: "bad", d: `M${cx - 4} ${cy - 4}l8 8m0-8l-8 8`, stroke: group.colour });
  }

  // Show the values at the recorded step nearest to `step`; `height` in pixels chooses the nearest run.
  function point(step, height) {
    const steps = [...new Set(frame.all.flatMap((group) => group.steps))].sort((a, b) => a - b);
    const before = lastAt(steps, step), after = Math.min(before + 1, steps.length - 1);
    if (!steps.length) return;
    cursor = before < 0 || Math.abs(steps[after] - step) < Math.abs(steps[before] - step) ? steps[after] : steps[before];
    const layer = byId("cursor"), cx = frame.x(cursor);
    layer.textContent = "";
    make(layer, "line", { class: "cross", x1: cx, x2: cx, y1: TOP, y2: frame.height - BOTTOM });
    const rows = frame.all.map((group) => {
      const values = group.own.map((curve) => at(curve, cursor, group.horizon)).filter((v) => v !== undefined);
      return { group, n: values.length, middle: values.length ? median(values) : undefined };
    }).filter((row) => row.n);
    for (const { group, middle } of rows) {
      if (middle <= frame.high && middle >= frame.low) make(layer, "circle", { cx, cy: frame.y(middle), r: 4, fill: group.colour });
    }
    tooltip(rows, height === null ? null : near(height), cx);
  }

  function near(height) {
    let best = null, least = 40;
    for (const group of frame.all) for (const curve of group.own) {
      const v = at(curve, cursor, group.horizon), away = Math.abs(frame.y(v) - height);
      if (Number.isFinite(v) && away < least) { best = curve; least = away; }
    }
    return best;
  }

  function tooltip(rows, nearest, cx) {
    for (const curve of frame.shown) for (const line of curve.paths || []) line.classList.toggle("near", curve === nearest);
    tip.textContent = "";
    make(tip, "b", {}, `step ${cursor.toLocaleString("en")}`);
    const table = make(tip, "table"), sorted = rows.sort((a, b) => a.middle - b.middle), most = 12;
    for (const { group, n, middle } of sorted.slice(0, most)) {
      const row = make(table, "tr"), name = make(row, "td");
      const key = make(name, "svg", { viewBox: "0 0 10 10", width: 10, height: 10, "aria-hidden": "true" });
      make(key, "circle", { cx: 5, cy: 5, r: 4, fill: group.colour });
      name.append(` ${group.name}`);
      make(row, "td", {}, value(middle));
      make(row, "td", {}, n > 1 ? `n = ${n}` : "");
    }
    if (sorted.length > most) make(tip, "p", {}, `and ${sorted.length - most} more`);
    if (nearest) make(tip, "p", {}, `${nearest.run.id}: ${value(nearest.values[lastAt(nearest.steps, cursor)] ?? Infinity)}`);
    tip.hidden = false;
    const room = frame.width - tip.offsetWidth, left = cx + 14 <= room ? cx + 14 : cx - 14 - tip.offsetWidth;
    tip.style.left = `${Math.max(0, Math.min(left, room))}px`;
    tip.style.top = `${TOP}px`;
  }

  function leave() {
    cursor = null;
    tip.hidden = true;
    byId("cursor").textContent = "";
    for (const curve of frame.shown) for (const line of curve.paths || []) line.classList.remove("near");
  }

  const follow = (event) => {
    const box = svg.getBoundingClientRect(), across = event.clientX - box.left;
    point(frame.from + (across - LEFT) / (frame.width - LEFT - RIGHT) * (frame.reach - frame.from), event.clientY - box.top);
  };
  svg.addEventListener("pointermove", follow);
  svg.addEventListener("pointerdown", follow);
  svg.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") leave(); });
  svg.addEventListener("blur", leave);
  svg.addEventListener("keydown", (event) => {
    const steps = [...new Set(frame.all.flatMap((group) => group.steps))].filter((s) => s >= frame.from).sort((a, b) => a - b);
    const here = cursor === null ? -1 : steps.indexOf(cursor);
    const to = { ArrowRight: Math.min(here + 1, steps.length - 1), ArrowLeft: Math.max(here - 1, 0), Home: 0, End: steps.length - 1 }[event.key];
    if (event.key === "Escape") leave();
    if (to === undefined || !steps.length) return;
    event.preventDefault();
    point(steps[to], null);
  });
  metricChoice.addEventListener("change", choose);
  spanChoice.addEventListener("change", draw);
  let width = 0;
  new ResizeObserver(([{ contentRect }]) => { if (contentRect.width !== width) { width = contentRect.width; draw(); } }).observe(svg.parentElement);
  choose();
}

document.addEventListener("DOMContentLoaded", () => {
  const data = JSON.parse(byId("data").textContent), hasChart = Object.keys(data.metrics).length > 0;
  byId("curves").hidden = !hasChart;
  theme();
  folds(hasChart);
  runTable();
  if (hasChart) chart(data);
  refresh();
});
