// A picture of the sheet: pointing at a description, or the arrow keys, leave only its box bright.
for (const figure of document.querySelectorAll(".sheet figure")) {
  const parts = [...figure.querySelectorAll("[data-region]")];
  const lines = [...figure.querySelectorAll("li")];
  let chosen = 0; // 0: all
  const choose = (number) => {
    chosen = number;
    figure.toggleAttribute("data-one", number > 0);
    parts.forEach((part) => part.classList.toggle("one", Number(part.dataset.region) === number));
  };
  for (const line of lines) {
    line.addEventListener("mouseenter", () => choose(Number(line.dataset.region)));
    line.addEventListener("mouseleave", () => choose(0));
  }
  figure.addEventListener("blur", () => choose(0));
  figure.addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (event.key === "Escape") choose(0);
    if (!step || !lines.length) return;
    event.preventDefault();
    choose((chosen + step + lines.length + 1) % (lines.length + 1));
  });
}
