// Charts that stand still, and boxes on images of which one is pointed at.
function histogram({ bars, what }) {
  const width = 360, height = 150, left = 8, right = 8, top = 16, bottom = 20;
  const most = Math.max(0, ...bars.map(([, , count]) => count));
  if (!most) return soft("none");
  const base = height - bottom, step = Math.min((width - left - right) / bars.length, 48);
  const parts = bars.map(([, meaning, count], i) => {
    const tall = (count / most) * (base - top);
    return svg("rect", { class: "bar", x: left + i * step, y: base - tall, width: Math.max(step - 1, 0.6), height: tall },
      svg("title", {}, `${meaning}: ${count.toLocaleString("en")}`));
  });
  const every = step < 40 ? Math.ceil(bars.length / 8) : 1;
  for (let i = (bars.length - 1) % every; i < bars.length; i += every) // the last one always
    parts.push(svg("text", { x: left + (i + 0.5) * step, y: height - 5, "text-anchor": "middle" }, bars[i][0]));
  return svg("svg", { class: "chart", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": what },
    svg("path", { class: "axis", d: `M${left} ${base + 0.5}H${width - right}` }),
    svg("text", { x: left, y: 11 }, most.toLocaleString("en")), parts);
}

function boxed([x1, y1, x2, y2], attributes) {
  return svg("rect", { x: x1, y: y1, width: x2 - x1, height: y2 - y1, ...attributes });
}

// A square of cells with values in [0, 1], the darker the larger; `over` is drawn on top of them.
function heatMap({ cells, what, fromBelow = false, tell = percent, over = [] }) {
  const side = 1 / cells.length;
  const most = Math.max(...cells.flat()) || 1;
  const rows = fromBelow ? [...cells].reverse() : cells;
  const parts = rows.flatMap((row, y) => row.map((value, x) => (value ? svg("rect", {
    class: "cell", x: x * side, y: y * side, width: side, height: side, "fill-opacity": ((0.9 * value) / most).toFixed(2) },
    svg("title", {}, tell(value))) : null)));
  return svg("svg", { class: "map", viewBox: "0 0 1 1", role: "img", "aria-label": what },
    parts, over, boxed([0, 0, 1, 1], { class: "edge" }));
}

for (const place of document.querySelectorAll("[data-chart]")) {
  const spec = JSON.parse(place.dataset.chart);
  place.replaceWith({ histogram, "heat map": heatMap }[spec.kind](spec));
}

// In a card whose parts have a data-region: pointing at a region, or the up and down arrows, leave it alone bright.
function pointAtRegions(card) {
  const parts = [...card.querySelectorAll("[data-region]")];
  const regions = [...new Set([...card.querySelectorAll("li[data-region]")].map((line) => line.dataset.region))];
  let chosen = -1; // all
  const choose = (i) => {
    chosen = i;
    card.toggleAttribute("data-one", i >= 0);
    parts.forEach((part) => part.classList.toggle("one", i >= 0 && part.dataset.region === regions[i]));
  };
  for (const part of parts.filter((p) => regions.includes(p.dataset.region))) {
    part.addEventListener("pointerenter", () => choose(regions.indexOf(part.dataset.region)));
    part.addEventListener("pointerleave", () => choose(-1));
  }
  card.addEventListener("blur", () => choose(-1));
  card.addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (event.key === "Escape") choose(-1);
    if (!step || !regions.length) return;
    event.preventDefault();
    choose(((chosen + 1 + step + regions.length + 1) % (regions.length + 1)) - 1);
  });
}
