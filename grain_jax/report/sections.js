// The sections that are chosen from: classes, confusions, regions, queries, attention.
const union = (lists) => [...new Set(lists.flat())];
const plain = (values) => values.map((value) => ({ value, label: value.replaceAll("_", " ") }));
const chosenWords = (name, alpha) => `${name.replaceAll("_", " ")}, alpha ${alpha}`; // for who sees no pickers, as on paper
const keep = (value, values) => (values.includes(value) ? value : values[0]);

// Two pickers that depend on each other, an evaluation and its alpha, and what is drawn for the choice.
function evaluationPickers(id, field, extra, draw) {
  const names = union(RUNS.map((run) => Object.keys(run[field])));
  if (!names.length) return into(id, perRun((run) => missing(run, "zeroshot")));
  const alphasOf = (name) => union(RUNS.map((run) => Object.keys(run[field][name]?.alphas || {})))
    .sort((a, b) => parseFloat(b) - parseFloat(a)); // keys that are whole numbers come first in any object
  const choice = { name: names[0], alpha: alphasOf(names[0])[0] };
  const box = el("div", {});
  const alphas = el("span", {});
  const body = () => box.replaceChildren(draw(choice));
  const showAlphas = () => {
    const found = alphasOf(choice.name);
    choice.alpha = keep(choice.alpha, found);
    alphas.replaceChildren(picker("alpha", plain(found), choice.alpha, (alpha) => { choice.alpha = alpha; body(); }));
  };
  const name = picker("Evaluation", plain(names), choice.name, (chosen) => { choice.name = chosen; showAlphas(); body(); });
  showAlphas();
  into(id, tools(name, alphas, extra(body)), box);
  body();
}

function classesSection() {
  let words = "", order = "worst", all = false;
  const most = 60;
  const orders = [["worst", "worst first"], ["best", "best first"], ["name", "by name"]];
  if (SEVERAL) orders.push(["apart", "most different"]);
  const extra = (body) => [
    picker("Order", orders.map(([value, label]) => ({ value, label })), order, (chosen) => { order = chosen; body(); }),
    search("Filter", (text) => { words = text; body(); }),
  ];
  evaluationPickers("classes-content", "perClass", extra, ({ name, alpha }) => {
    const tables = RUNS.map((run) => run.perClass[name]?.alphas[alpha] || {});
    const share = (table, c) => (Object.hasOwn(table, c) ? table[c][0] : null);
    const known = (c) => tables.map((table) => share(table, c)).filter((x) => x !== null);
    const mean = (c) => known(c).reduce((a, b) => a + b, 0) / known(c).length;
    const spread = (c) => Math.max(...known(c)) - Math.min(...known(c));
    const key = { worst: mean, best: (c) => -mean(c), name: () => 0, apart: (c) => -spread(c) }[order];
    const found = union(tables.map(Object.keys)).filter((c) => c.toLowerCase().includes(words));
    found.sort((a, b) => key(a) - key(b) || a.localeCompare(b));
    const shown = all ? found : found.slice(0, most);
    const row = (c) => el("li", { style: `--runs:${RUNS.length}` }, el("span", { class: "name" }, c),
      tables.flatMap((table, r) => {
        const value = share(table, c);
        const count = value === null ? null : table[c][1];
        const said = value === null ? "none" : count ? `${number(value * count)} of ${count}` : percent(value);
        const bar = el("i", { style: `width:${100 * (value || 0)}%;background:${colour(r)}` });
        return [el("span", { class: "track", "aria-hidden": "true" }, bar), el("span", { class: "number" }, said)];
      }));
    const notes = RUNS.map((run) => run.perClass[name] && `${SEVERAL ? `${run.label}: ` : ""}${run.perClass[name].note}`).filter(Boolean);
    const legend = SEVERAL ? el("p", { class: "tools" }, RUNS.map((run, r) =>
      el("span", { style: `color:${colour(r)}` }, `\u25A0 ${run.label}`))) : null;
    const more = found.length > shown.length
      ? el("button", { type: "button", onclick: () => { all = true; document.querySelector("#classes input[type=search]").dispatchEvent(new Event("input")); } }, `Show all ${found.length}`)
      : null;
    return el("div", {}, soft(`${chosenWords(name, alpha)}: ${found.length} classes; ${union(notes).join("; ")}.`), legend,
      found.length ? el("ul", { class: "classes" }, shown.map(row)) : soft("No class has this in its name."), more);
  });
}

function confusionsSection() {
  let words = "";
  const extra = (body) => search("Filter", (text) => { words = text; body(); });
  evaluationPickers("confusions-content", "zeroshot", extra, ({ name, alpha }) => perRun((run) => {
    const entry = run.zeroshot[name];
    const pairs = entry?.alphas[alpha]?.confusions;
    if (!pairs) return missing(run, name);
    const found = pairs.filter((p) => `${p.true} ${p.predicted}`.toLowerCase().includes(words));
    const image = (place, text, kind) => el("figure", { class: kind }, el("img", { src: run.thumbs[place], alt: text }));
    const card = (p) => el("article", { class: "card pair" },
      el("h3", {}, p.true, el("span", { class: "soft" }, " taken for "), p.predicted),
      el("div", { class: "images" },
        p.pictures.map((place) => image(place, `a ${p.true}, taken for ${p.predicted}`, "")),
        el("span", { class: "arrow", "aria-hidden": "true" }, "\u2192"), p.example === null ? "no image" : image(p.example, `a ${p.predicted}`, "example")),
      el("p", { class: "soft" }, `${p.count} of ${p.of} images of the class`));
    return el("div", {}, soft(`${chosenWords(name, alpha)}: ${entry.pictures} of ${entry.of} images were looked at.`),
      found.length ? el("div", { class: "cards" }, found.map(card)) : soft("No confusion to show."));
  }));
}

const query = (q, queries) => (q === queries ? "image query" : `query ${q + 1}`);

// An image with boxes in [0, 1]; the drawing is square, and stretched over the image.
function overlaid(src, alt, size, kind, ...parts) {
  return el("div", { class: "image", style: `aspect-ratio:${size[0]}/${size[1]}` },
    el("img", { src, alt, width: size[0], height: size[1] }),
    svg("svg", { class: kind, viewBox: "0 0 1 1", preserveAspectRatio: "none", "aria-hidden": "true" }, parts));
}

const marked = (right) => el("span", { class: right ? "right" : "wrong", "aria-label": right ? "right: " : "wrong: " }, right ? "\u2713 " : "\u2717 ");

// What the box head says of the annotated boxes; nothing for a model without one.
function givenBoxes(image, texts) {
  const lines = image.true.filter((truth) => truth.best).map(({ query, text, best: [[said, score], ...others] }) => {
    const next = others.map(([t, s]) => `${texts[t]} (${s.toFixed(2)})`).join("; ");
    return el("li", { "data-region": query },
      el("b", { class: "badge", style: `background:${query === null ? "#666" : REGION_COLOURS[query % REGION_COLOURS.length]}` }, "\u25a1"),
      el("span", {}, marked(said === text), `${texts[said]} (${score.toFixed(2)})`),
      said === text ? null : el("span", { class: "more" }, `annotated: ${texts[text]}`),
      next ? el("span", { class: "more next" }, `then: ${next}`) : null);
  });
  return lines.length ? [el("p", { class: "soft" }, "Annotated boxes, by the box head:"), el("ul", { class: "said given" }, lines)] : null;
}

function regionCard(run, image) {
  const texts = run.regions.texts;
  const lines = image.predicted.map((region, q) => {
    const tone = REGION_COLOURS[q % REGION_COLOURS.length];
    const [[said, score], ...others] = region.best;
    const right = region.own === said;
    const mark = region.own === null ? null : marked(right);
    const own = region.own === null ? "no annotated box" :
      `${right ? "" : `annotated: ${texts[region.own]} (${region.own_score.toFixed(2)}); `}IoU ${region.iou.toFixed(2)}`;
    const next = others.map(([t, s]) => `${texts[t]} (${s.toFixed(2)})`).join("; ");
    return el("li", { "data-region": q }, el("b", { class: "badge", style: `background:${tone}` }, q + 1),
      el("span", {}, mark, `${texts[said]} (${score.toFixed(2)})`),
      el("span", { class: "more" }, own), next ? el("span", { class: "more next" }, `then: ${next}`) : null);
  });
  const group = (q, kind, box) => svg("g", { class: kind, "data-region": q },
    boxed(box, { class: "halo" }), boxed(box, { class: "line", stroke: q === null ? "#fff" : REGION_COLOURS[q % REGION_COLOURS.length] }));
  // An annotated box has the colour of the query that it is matched to.
  const truths = image.true.map((truth) => group(truth.query, "true", truth.box));
  const predicted = image.predicted.map((region, q) => group(q, "predicted", region.box));
  const card = el("figure", { class: "card", tabindex: 0, "aria-label": `${image.name}: ${lines.length} regions; up and down arrows go through them` },
    overlaid(run.thumbs[image.thumb], image.name, image.size, "boxes", truths, predicted),
    el("figcaption", {}, image.name), el("ol", { class: "said" }, lines), givenBoxes(image, texts));
  pointAtRegions(card);
  return card;
}

function regionsSection() {
  const able = RUNS.filter((run) => run.regions);
  if (!able.length) return into("regions-content", perRun((run) => missing(run, "regions")));
  const place = document.getElementById("regions-content");
  const cards = [];
  const most = SEVERAL ? 6 : 12; // then it goes on at a press
  let words = "", all = false;
  const body = perRun((run) => {
    if (!run.regions) return missing(run, "regions");
    const made = run.regions.pictures.map((image) => regionCard(run, image));
    cards.push(...made.map((card, i) => [card, i]));
    return el("div", {}, soft(`${made.length} of ${run.regions.of} images of ${run.regions.entry}; texts are the nearest of ${run.regions.chosen_from} descriptions, with cosines.`),
      el("div", { class: "cards" }, made));
  });
  const count = el("span", { class: "soft", role: "status" });
  const more = el("button", { type: "button", onclick: () => { all = true; show(); } }, "Show all");
  const show = () => {
    for (const [card, i] of cards) card.hidden = words ? !card.textContent.toLowerCase().includes(words) : !all && i >= most;
    more.hidden = all || words !== "" || cards.every(([card]) => !card.hidden);
    count.textContent = words ? `${cards.filter(([card]) => !card.hidden).length} of ${cards.length}` : "";
  };
  show();
  place.classList.add("no-next");
  into("regions-content", tools(
    check("predicted boxes (solid)", true, (on) => place.classList.toggle("no-predicted", !on)),
    check("annotated boxes (dashed)", true, (on) => place.classList.toggle("no-true", !on)),
    check("next best descriptions", false, (on) => place.classList.toggle("no-next", !on)),
    search("Filter", (text) => { words = text; show(); }), count), body, more);
}

function queriesSection() {
  into("queries-content", perRun((run) => {
    if (!run.queries) return missing(run, "regions");
    const { pictures, queries } = run.queries;
    const card = (found, q) => {
      const dots = found.centres.map(([x, y]) => svg("circle", { class: "dot", cx: x, cy: y, r: 0.008 }));
      const side = (a, b) => `${percent(found.mean_box[b] - found.mean_box[a])}`;
      const fact = (name, value) => [el("dt", {}, name), el("dd", {}, value)];
      return el("article", { class: "card" }, el("h3", {}, `Query ${q + 1}`),
        heatMap({ cells: found.map, what: `where the boxes of query ${q + 1} lie`,
          tell: (value) => `${percent(value)} of its boxes cover this place`, over: [dots, boxed(found.mean_box, { class: "mean" })] }),
        el("dl", { class: "facts" },
          fact("mean box", `${side(0, 2)} x ${side(1, 3)}, area ${percent(found.mean_area)}`),
          fact("matched", `${found.matched} of ${pictures}`),
          fact("matched IoU", found.iou === null ? "none" : found.iou.toFixed(3))),
        el("p", { class: "soft" }, `Says most often, of ${found.different} different:`),
        el("ol", { class: "words" }, found.says.map(([text, n]) => el("li", {}, text, el("span", {}, percent(n / pictures))))));
    };
    return el("div", {}, soft(`${pictures} images of ${run.regions.entry}. Sizes are shares of the image's.`), el("div", { class: "cards narrow" }, queries.map(card)));
  }));
}

// Weights of an image: 8 bits of the largest of their query, for each layer, head, query and token.
function attended(run, image, layer, head, q) {
  const a = run.attention;
  const tokens = a.first + a.side * a.side, queries = a.queries + 1;
  a.bytes ??= a.weights.map((text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0)));
  const of = (k) => {
    const row = (layer * a.heads + k) * queries + q;
    const scale = a.most[image][row] / 255;
    return Array.from(a.bytes[image].subarray(row * tokens, (row + 1) * tokens), (byte) => byte * scale);
  };
  if (head !== null) return of(head);
  const heads = Array.from({ length: a.heads }, (_, k) => of(k));
  return heads[0].map((_, i) => heads.reduce((sum, h) => sum + h[i], 0) / a.heads);
}

function lookedAt(run, place, layer, head, q) {
  const a = run.attention;
  const shown = run.regions.pictures[a.pictures[place]];
  const weights = attended(run, place, layer, head, q);
  const patches = weights.slice(a.first);
  const most = Math.max(...patches);
  const cells = patches.map((w, i) => svg("rect", {
    x: (i % a.side) / a.side, y: Math.floor(i / a.side) / a.side, width: 1 / a.side, height: 1 / a.side,
    fill: `hsl(${(18 + (38 * w) / most).toFixed(0)} 100% ${(45 + (15 * w) / most).toFixed(0)}%)`, "fill-opacity": ((0.85 * w) / most).toFixed(2) },
    svg("title", {}, percent(w))));
  const box = q < a.queries ? boxed(shown.predicted[q].box, { class: "box" }) : null;
  const rest = a.first ? `; ${percent(weights.slice(0, a.first).reduce((x, y) => x + y, 0))} on the class token` : "";
  const text = `${query(q, a.queries)}, layer ${layer + 1}, ${head === null ? "mean of the heads" : `head ${head + 1}`}: at most ${percent(most)} on a patch${rest}`;
  return { image: overlaid(run.thumbs[shown.thumb], `${shown.name}: ${text}`, shown.size, "heat", cells, box), text, shown };
}

function attentionSection() {
  const able = RUNS.filter((run) => run.attention);
  if (!able.length) return into("attention-content", perRun((run) => missing(run, "regions")));
  const largest = (field) => Math.max(...able.map((run) => run.attention[field]));
  const a = able[0];
  const choice = { image: 0, query: 0, layer: largest("layers") - 1, head: null };
  const box = el("div", {});
  const range = (count, label) => Array.from({ length: count }, (_, i) => ({ value: i, label: label(i) }));
  const set = (key) => (value) => { choice[key] = value; body(); };
  const body = () => box.replaceChildren(perRun((run) => {
    if (!run.attention) return missing(run, "regions");
    const own = run.attention;
    const within = (value, count) => Math.min(value, count - 1);
    const at = [within(choice.image, own.pictures.length), within(choice.layer, own.layers), choice.head === null ? null : within(choice.head, own.heads)];
    const chosen = choice.query === null ? own.queries : within(choice.query, own.queries);
    const { image, text, shown } = lookedAt(run, ...at, chosen);
    const said = chosen < own.queries ? `It says: ${run.regions.texts[shown.predicted[chosen].best[0][0]]}.` : "It stands for the whole image.";
    const small = range(own.queries + 1, (q) => query(q, own.queries)).map(({ value, label }) =>
      el("button", { type: "button", "aria-pressed": String(value === chosen), onclick: () => chooseQuery(value === own.queries ? null : value) },
        lookedAt(run, ...at, value).image, label));
    return el("div", { class: "looks" }, image, el("div", {},
      el("p", { class: "soft", role: "status" }, `${shown.name}, ${text}. ${said}`), el("div", { class: "all" }, small)));
  }));
  const chooseQuery = (q) => { // by one of the small images, which are drawn anew
    choice.query = q;
    showQuery();
    body();
    box.querySelector("[aria-pressed=true]").focus();
  };
  const queryPicker = el("span", { id: "attention-query" });
  const showQuery = () => queryPicker.replaceChildren(picker("Query", queries, choice.query, set("query")));
  const thumbs = a.attention.pictures.map((place, value) => {
    const shown = a.regions.pictures[place];
    return { value, label: shown.name, src: a.thumbs[shown.thumb] };
  });
  const queries = [...range(largest("queries"), (q) => String(q + 1)), { value: null, label: "image" }];
  showQuery();
  into("attention-content", tools(picker("Image", thumbs, 0, set("image"), { thumbs: true })),
    tools(queryPicker,
      picker("Layer", range(largest("layers"), (i) => String(i + 1)), choice.layer, set("layer")),
      picker("Head", [{ value: null, label: "mean" }, ...range(largest("heads"), (i) => String(i + 1))], null, set("head"))),
    box);
  body();
}

curvesSection();
classesSection();
confusionsSection();
regionsSection();
queriesSection();
attentionSection();
configTable();
start();
