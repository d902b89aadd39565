// A box that is drawn on the image with mouse, pen or finger. Gradio runs this once as the body of a function of
// `element`, which holds the image, and `trigger`. The text field of the box has its corners, x1 y1 x2 y2 in percent of
// the image: what is drawn is written there, and what is typed there is drawn.
const SMALLEST = 4; // pixels along a side; less is a click
const field = () => document.querySelector("#box textarea, #box input");
let drag = null; // pointer, image, and the place where it began

function place(event, image) {
  const frame = image.getBoundingClientRect();
  const percent = (at, from, size) => Math.min(100, Math.max(0, (100 * (at - from)) / size));
  return [percent(event.clientX, frame.left, frame.width), percent(event.clientY, frame.top, frame.height)];
}

function corners(event) {
  const [x, y] = place(event, drag.image);
  return [Math.min(drag.x, x), Math.min(drag.y, y), Math.max(drag.x, x), Math.max(drag.y, y)];
}

function draw(box) {
  const outline = element.querySelector(".drawn");
  if (!outline) return;
  const [x1, y1, x2, y2] = box;
  const valid = 0 <= x1 && x1 < x2 && x2 <= 100 && 0 <= y1 && y1 < y2 && y2 <= 100;
  outline.hidden = box.length !== 4 || !valid;
  Object.assign(outline.style, {
    left: `${x1}%`, top: `${y1}%`, width: `${x2 - x1}%`, height: `${y2 - y1}%`,
  });
}

const drawTyped = () => draw(field().value.split(/[\s,;%]+/).filter(Boolean).map(Number));

element.addEventListener("pointerdown", (event) => {
  const canvas = event.target.closest(".canvas");
  if (!canvas || event.button !== 0 || drag) return;
  event.preventDefault();
  canvas.setPointerCapture(event.pointerId);
  const image = canvas.querySelector("img");
  const [x, y] = place(event, image);
  drag = { pointer: event.pointerId, image, x, y };
});

element.addEventListener("pointermove", (event) => {
  if (drag?.pointer === event.pointerId) draw(corners(event));
});

element.addEventListener("pointerup", (event) => {
  if (drag?.pointer !== event.pointerId) return;
  const box = corners(event), image = drag.image;
  drag = null;
  const [width, height] = [(box[2] - box[0]) * image.width, (box[3] - box[1]) * image.height];
  if (Math.min(width, height) < 100 * SMALLEST) return drawTyped();
  field().value = box.map((x) => x.toFixed(1)).join(" ");
  field().dispatchEvent(new Event("input", { bubbles: true })); // Gradio reads the field
  setTimeout(() => trigger("input"));
});

element.addEventListener("pointercancel", (event) => {
  if (drag?.pointer !== event.pointerId) return;
  drag = null;
  drawTyped();
});

document.addEventListener("input", (event) => {
  if (event.target === field()) drawTyped();
});
