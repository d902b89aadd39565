// Curves: drawn anew at the width they get; a cursor by pointer or arrow keys; series and runs can be hidden.
const HEIGHT = 230, LEFT = 52, RIGHT = 16, TOP = 8, BOTTOM = 22;
const curves = { smooth: 0, hiddenRuns: new Set(), all: [] };

function smoothed(values, keep) {
  let total = 0, weight = 0;
  return values.map((value) => {
    total = keep * total + (1 - keep) * value;
    weight = keep * weight + (1 - keep);
    return total / weight;
  });
}

function ticks(low, high, log) {
  if (log) {
    const out = [];
    for (let decade = Math.floor(Math.log10(low)); decade <= Math.ceil(Math.log10(high)); decade += 1)
      for (const m of [1, 2, 5]) if (m * 10 ** decade >= low && m * 10 ** decade <= high) out.push(m * 10 ** decade);
    const every = Math.ceil(out.length / 7);
    return out.filter((_, i) => i % every === 0);
  }
  const rough = (high - low) / 5;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
  const out = [];
  for (let i = Math.ceil(low / step); i * step <= high + step * 1e-6; i += 1) out.push(i * step);
  return out;
}

function bounds(values, log) {
  let low = Math.min(...values), high = Math.max(...values);
  if (log) return [low / 1.15, high * 1.15];
  if (low >= 0 && low < 0.5 * high) low = 0;
  const room = (high - low || Math.abs(high) || 1) * 0.05;
  return [low === 0 ? 0 : low - room, high + room];
}

function chart(spec) {
  const state = { hidden: new Set(), log: spec.log, step: null };
  const plot = svg("svg", { class: "plot", height: HEIGHT, tabindex: 0, role: "img" });
  const at = el("div", { class: "at", role: "status" });
  const legend = el("div", { class: "series" });
  const alone = spec.series.length === 1; // then colours tell the runs apart
  const stroke = (s, r) => colour(alone ? r : s);
  let scale = null;

  const lines = () => spec.series.flatMap(([key, label], s) =>
    RUNS.flatMap((run, r) => {
      if (state.hidden.has(key) || curves.hiddenRuns.has(r) || !run.series[key]) return [];
      let [steps, values] = run.series[key];
      if (state.log) {
        const keep = values.map((v) => v > 0);
        [steps, values] = [steps.filter((_, i) => keep[i]), values.filter((_, i) => keep[i])];
      }
      return values.length ? [{ key, label, s, r, steps, values }] : [];
    }));

  function draw() {
    const shown = lines();
    const width = Math.max(plot.clientWidth || 420, 240);
    plot.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    if (!shown.length) {
      scale = null;
      plot.replaceChildren(svg("text", { x: width / 2, y: HEIGHT / 2, "text-anchor": "middle" }, "nothing to show"));
      return;
    }
    const steps = [...new Set(shown.flatMap((l) => l.steps))].sort((a, b) => a - b);
    const [low, high] = bounds(shown.flatMap((l) => l.values), state.log);
    const on = state.log ? Math.log : (v) => v;
    const first = steps[0], last = steps[steps.length - 1];
    const x = (step) => LEFT + (last > first ? (step - first) / (last - first) : 0.5) * (width - LEFT - RIGHT);
    const y = (value) => HEIGHT - BOTTOM - ((on(value) - on(low)) / (on(high) - on(low))) * (HEIGHT - TOP - BOTTOM);
    scale = { steps, x, y, width };
    const parts = ticks(low, high, state.log).flatMap((v) => [
      svg("line", { class: "rule", x1: LEFT, x2: width - RIGHT, y1: y(v), y2: y(v) }),
      svg("text", { x: LEFT - 6, y: y(v) + 4, "text-anchor": "end" }, number(v)),
    ]);
    const along = last > first ? ticks(first, last, false).filter(Number.isInteger) : [first];
    parts.push(...along.map((v) => svg("text", { x: x(v), y: HEIGHT - 6, "text-anchor": "middle" }, v.toLocaleString("en"))));
    const d = (line, values) => "M" + line.steps.map((step, i) => `${x(step).toFixed(1)} ${y(values[i]).toFixed(1)}`).join("L");
    for (const line of shown) {
      const look = { stroke: stroke(line.s, line.r), "stroke-dasharray": DASHES[line.r % 4] };
      if (line.steps.length === 1) {
        parts.push(svg("circle", { cx: x(line.steps[0]), cy: y(line.values[0]), r: 4, fill: look.stroke }));
      } else if (spec.noisy && curves.smooth > 0) {
        parts.push(svg("path", { class: "raw", ...look, "stroke-dasharray": "", d: d(line, line.values) }));
        parts.push(svg("path", { ...look, d: d(line, smoothed(line.values, curves.smooth)) }));
      } else parts.push(svg("path", { ...look, d: d(line, line.values) }));
    }
    plot.replaceChildren(...parts);
    point();
  }

  function point() {
    plot.querySelectorAll(".cursor").forEach((node) => node.remove());
    const step = state.step;
    const texts = [];
    if (scale && step !== null) {
      plot.append(svg("line", { class: "cursor", x1: scale.x(step), x2: scale.x(step), y1: TOP, y2: HEIGHT - BOTTOM }));
    }
    for (const button of legend.children) button.querySelector("b").textContent = "";
    for (const line of lines()) {
      const i = step === null ? line.values.length - 1 : line.steps.indexOf(step);
      if (i < 0) continue;
      const target = legend.children[line.s].querySelector("b");
      target.textContent += (target.textContent ? " / " : "") + number(line.values[i]);
      texts.push(`${line.label}${SEVERAL ? `, ${RUNS[line.r].label}` : ""} ${number(line.values[i])}`);
      if (scale && step !== null)
        plot.append(svg("circle", { class: "cursor", cx: scale.x(step), cy: scale.y(line.values[i]), r: 3, fill: stroke(line.s, line.r) }));
    }
    at.textContent = step === null ? "last values" : `step ${step.toLocaleString("en")}`;
    plot.setAttribute("aria-label", `${spec.title}, ${at.textContent}: ${texts.join("; ")}`);
  }

  plot.addEventListener("pointermove", (event) => {
    if (!scale) return;
    const px = ((event.clientX - plot.getBoundingClientRect().left) / plot.clientWidth) * scale.width;
    const near = (a, b) => (Math.abs(scale.x(b) - px) < Math.abs(scale.x(a) - px) ? b : a);
    state.step = scale.steps.reduce(near);
    point();
  });
  const leave = () => { state.step = null; point(); };
  plot.addEventListener("pointerleave", leave);
  plot.addEventListener("blur", leave);
  plot.addEventListener("keydown", (event) => {
    const far = scale ? scale.steps.length - 1 : -1;
    const here = state.step === null ? far : scale.steps.indexOf(state.step);
    const to = { ArrowLeft: here - 1, ArrowRight: here + 1, Home: 0, End: far, PageUp: here - 10, PageDown: here + 10 }[event.key];
    if (event.key === "Escape") leave();
    if (to === undefined || far < 0) return;
    event.preventDefault();
    state.step = scale.steps[Math.max(0, Math.min(far, state.step === null && event.key === "ArrowLeft" ? far : to))];
    point();
  });
  spec.series.forEach(([key, label], s) => {
    const toggle = (event) => {
      if (state.hidden.has(key)) state.hidden.delete(key);
      else state.hidden.add(key);
      event.currentTarget.setAttribute("aria-pressed", String(!state.hidden.has(key)));
      draw();
    };
    legend.append(el("button", { type: "button", "aria-pressed": "true", onclick: toggle },
      alone && SEVERAL ? null : swatch(0, stroke(s, 0)), label, el("b", {})));
  });
  curves.all.push(draw);
  new ResizeObserver(() => requestAnimationFrame(draw)).observe(plot);
  return el("figure", {},
    el("div", { class: "head" }, el("h3", {}, spec.title), check("log", state.log, (on) => { state.log = on; draw(); })),
    plot, at, legend);
}

function curvesSection() {
  if (!DATA.charts.length) return into("curves-content", el("p", { class: "none" }, "No run has logged a number yet."));
  // Of a few points the average would only lag behind them.
  const longest = Math.max(...RUNS.flatMap((run) => Object.values(run.series).map(([steps]) => steps.length)));
  curves.smooth = longest < 60 ? 0 : 0.6;
  const redraw = () => curves.all.forEach((draw) => draw());
  const slider = el("input", { type: "range", min: 0, max: 0.95, step: 0.05, value: curves.smooth,
    oninput: (event) => { curves.smooth = Number(event.target.value); redraw(); } });
  const runs = SEVERAL ? RUNS.map((run, r) =>
    el("label", {}, el("input", { type: "checkbox", checked: true, onchange: (event) => {
      if (event.target.checked) curves.hiddenRuns.delete(r);
      else curves.hiddenRuns.add(r);
      redraw();
    } }), swatch(r, colour(r)), run.label)) : [];
  const once = DATA.evaluations === 1 ? soft("Evaluated once: those numbers are in the table above.") : null;
  into("curves-content", once, tools(el("label", {}, "Smoothing", slider), runs), el("div", { class: "charts" }, DATA.charts.map(chart)));
}
