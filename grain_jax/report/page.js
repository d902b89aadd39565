// The report's frame: pickers, navigation, theme, keys.
const DATA = JSON.parse(document.getElementById("data").textContent);
const RUNS = DATA.runs;
const SEVERAL = RUNS.length > 1;
const DASHES = ["", "6 4", "2 3", "9 3 2 3"];
const colour = (i) => `var(--c${i % 8})`;
const into = (id, ...children) => document.getElementById(id).replaceChildren(...children.flat().filter(Boolean));

function swatch(index, stroke) {
  const line = svg("line", { x1: 0, y1: 5, x2: 28, y2: 5, stroke, "stroke-dasharray": DASHES[index % 4] });
  return svg("svg", { class: "swatch", viewBox: "0 0 28 10", "aria-hidden": "true" }, line);
}

// One picker looks the same everywhere, and arrow keys go through it: a row of radio buttons, or a list where they are many.
let pickers = 0;
function picker(label, options, chosen, change, { thumbs = false } = {}) {
  if (options.length > 9 && !thumbs) {
    const list = el("select", { onchange: (event) => change(options[event.target.selectedIndex].value) });
    list.append(...options.map((o) => el("option", { selected: o.value === chosen }, o.label)));
    return el("label", {}, label, list);
  }
  const name = `picker${(pickers += 1)}`;
  const buttons = options.map((o) =>
    el("label", {},
      el("input", { type: "radio", name, checked: o.value === chosen, "aria-label": thumbs ? o.label : null, onchange: () => change(o.value) }),
      thumbs ? el("img", { src: o.src, alt: "", title: o.label }) : o.label));
  return el("fieldset", { class: thumbs ? "thumbs" : "" }, el("legend", {}, label), buttons);
}
function check(label, checked, change) {
  return el("label", {}, el("input", { type: "checkbox", checked, onchange: (event) => change(event.target.checked) }), label);
}
function search(label, change) {
  return el("label", {}, label, el("input", { type: "search", oninput: (event) => change(event.target.value.trim().toLowerCase()) }));
}
const tools = (...parts) => el("div", { class: "tools" }, parts);

// A cell for each run, side by side where there are several; what is missing is said in a line.
function perRun(draw) {
  return el("div", { class: "runs" }, RUNS.map((run, i) => {
    const content = draw(run, i);
    return el("div", {}, SEVERAL ? el("h3", {}, run.label) : null, content);
  }));
}
const missing = (run, part) => el("p", { class: "none" }, run.lines[part] || run.lines.model || "not measured");

function start() {
  const root = document.documentElement;
  const theme = document.getElementById("theme");
  const isDark = () => (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const named = () => { theme.textContent = isDark() ? "Light" : "Dark"; };
  theme.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; named(); });
  named();

  const help = document.getElementById("keys");
  document.getElementById("help").addEventListener("click", () => help.showModal());
  const sections = [...document.querySelectorAll("main section")];
  const links = [...document.querySelectorAll("nav a")];
  const seen = () => {
    const passed = sections.filter((s) => s.getBoundingClientRect().top < innerHeight / 3);
    const current = passed.length ? passed.length - 1 : 0;
    links.forEach((link, i) => (i === current ? link.setAttribute("aria-current", "true") : link.removeAttribute("aria-current")));
    return current;
  };
  addEventListener("scroll", seen, { passive: true });
  seen();
  const go = (i) => {
    sections[i].scrollIntoView();
    sections[i].querySelector("h2").focus({ preventScroll: true });
  };
  document.addEventListener("keydown", (event) => {
    const typing = event.target.matches("input[type=search], select");
    if (typing && event.key === "Escape") event.target.blur();
    if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "?") help.showModal();
    else if (event.key === "t") theme.click();
    else if (event.key === "/") {
      const here = sections.slice(seen()).concat(sections).map((s) => s.querySelector("input[type=search]"));
      here.find(Boolean)?.focus();
    } else if (sections[Number(event.key) - 1]) go(Number(event.key) - 1);
    else return;
    event.preventDefault();
  });
}

function configTable() {
  const rows = [...document.querySelectorAll("#config-table tbody tr")];
  if (!rows.length) return;
  let words = "", only = SEVERAL;
  const show = () => {
    let left = 0;
    for (const row of rows) {
      row.hidden = !row.textContent.toLowerCase().includes(words) || (only && !row.classList.contains("differs"));
      left += !row.hidden;
    }
    count.textContent = `${left} of ${rows.length} keys`;
  };
  const count = el("span", { class: "soft", role: "status" });
  const differences = SEVERAL ? check("only what differs", true, (on) => { only = on; show(); }) : null;
  into("config-tools", tools(search("Filter", (text) => { words = text; show(); }), differences, count));
  show();
}
