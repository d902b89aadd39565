// Elements of a page. Every text of a run or a data set goes in as text, never as HTML.
function fill(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes || {})) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return node;
}
const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
const soft = (text) => el("p", { class: "soft" }, text);
const percent = (share) => `${(100 * share).toFixed(1)}%`;
const number = (x) => {
  if (x === 0) return "0";
  const size = Math.abs(x);
  if (size < 1e-3) return Number(x.toPrecision(3)).toExponential();
  const [unit, sign] = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e4, "k"]].find(([least]) => size >= least) || [1, ""];
  return Number((x / (sign === "k" ? 1e3 : unit)).toPrecision(4)) + sign;
};
