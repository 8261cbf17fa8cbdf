// A guess, made before the measurement is shown. The measurement may already be here: it stays hidden until the guess is
// fixed, or the reader skips. All of that happens in the browser, so running every cell at once spoils nothing.

const W = 880, H = 92, L = 40, R = 40;

function render({ model, el }) {
  const { box } = card(el, model.get("question"));
  const body = element("div", {}, box);
  const [low, high, unit] = [model.get("low"), model.get("high"), model.get("unit")];
  const choices = model.get("choices");
  const x = (v) => L + (Math.log(Math.min(Math.max(v, low), high) / low) / Math.log(high / low)) * (W - L - R);
  const late = model.get("truth") !== null; // this view stands where the measurement was made: only here is the picture
  const fixed = () => model.get("locked") || model.get("skipped");
  const revealed = () => fixed() && model.get("truth") !== null;
  const text = (svg, at, y, words, fill, size, anchor = "middle") => shape("text", { x: at, y, fill, "font-size": size, "text-anchor": anchor, "font-family": "DejaVu Sans, Verdana, sans-serif" }, svg, words);

  function draw() {
    body.replaceChildren();
    choices.length ? drawChoices() : drawAxis();
    const line = element("div", { marginTop: "6px", display: "flex", alignItems: "center", flexWrap: "wrap", gap: "6px" }, body);
    if (!fixed()) controls(line);
    else if (!revealed()) element("span", { color: LOOK.faint }, line, model.get("locked") ? "Your guess is fixed. It comes back with the measurement." : "Skipped. The measurement comes further down.");
    else element("b", {}, line, verdict());
    if (late && revealed() && model.get("why")) element("div", { marginTop: "4px" }, body, model.get("why"));
    if (late && revealed() && model.get("picture")) {
      const image = element("img", { maxWidth: "100%", marginTop: "8px", display: "block" }, body);
      image.src = `data:image/png;base64,${model.get("picture")}`;
      image.alt = "the measurement";
    }
  }

  function controls(line) {
    if (!choices.length) {
      const field = element("input", { width: "110px", font: "inherit" }, line);
      Object.assign(field, { type: "number", min: low, max: high, step: "any", value: model.get("guess") ?? "" });
      field.setAttribute("aria-label", "your guess");
      field.addEventListener("input", () => { // the button stays where it is while one types
        const inside = +field.value >= low && +field.value <= high;
        if (inside) model.set("guess", +field.value);
        lock.disabled = !inside;
        lock.style.opacity = inside ? 1 : 0.5;
        note.textContent = inside || field.value === "" ? "" : `give a number from ${plain(low)} to ${plain(high)}`;
      });
      field.addEventListener("keydown", (event) => { if (event.key === "Enter" && !lock.disabled) set({ locked: true }); });
      element("span", {}, line, `${unit} `);
    }
    const lock = button(line, "That is my guess", "fix the guess", () => { if (model.get("guess") !== null) set({ locked: true }); });
    lock.disabled = model.get("guess") === null;
    lock.style.opacity = lock.disabled ? 0.5 : 1;
    button(line, "skip", "see the measurement without a guess", () => set({ skipped: true }));
    const note = element("span", { color: LOOK.faint }, line, !choices.length && model.get("guess") === null ? "click on the axis, or type a number" : "");
  }

  function set(values) {
    for (const [name, value] of Object.entries(values)) model.set(name, value);
    model.save_changes();
    draw();
  }

  function verdict() {
    const truth = model.get("truth"), guess = model.get("locked") ? model.get("guess") : null;
    if (choices.length) return `${guess === null ? "It is" : guess === truth ? "Right:" : "No. It is"} (${"abcdef"[truth]}) ${choices[truth]}.`;
    const how = model.get("how"), measured = `${how[0].toUpperCase()}${how.slice(1)}: ${plain(truth)} ${unit}.`;
    if (guess === null) return measured;
    const factor = guess > truth ? guess / truth : truth / guess;
    return `${measured} You said ${plain(guess)}: ${factor < 1.25 ? "very close" : `${plain(factor)} times too ${guess > truth ? "high" : "low"}`}.`;
  }

  function drawChoices() {
    choices.forEach((words, number) => {
      const chosen = model.get("guess") === number, right = revealed() && model.get("truth") === number;
      const line = button(body, `(${"abcdef"[number]}) ${words}${right ? "   ✓" : ""}`, words, () => { if (!fixed()) set({ guess: number }); });
      Object.assign(line.style, { display: "block", margin: "4px 0", textAlign: "left", maxWidth: "100%",
        border: chosen ? `2px dashed ${LOOK.guess}` : "1px solid #b5b5b5", fontWeight: right ? "bold" : "normal", background: right ? "#d9efe7" : "#f3f3f3" });
    });
  }

  function drawAxis() {
    const svg = shape("svg", { viewBox: `0 0 ${W} ${H}`, width: "100%", style: `display:block;background:white;cursor:${fixed() ? "default" : "crosshair"}` }, body);
    svg.setAttribute("class", "minillm-guess-axis");
    shape("rect", { x: 0, y: 0, width: W, height: H, fill: "white" }, svg);
    shape("line", { x1: L, x2: W - R, y1: 62, y2: 62, stroke: "#9a9a9a", "stroke-width": 1.5 }, svg);
    for (const v of roundTicks(low, high)) {
      shape("line", { x1: x(v), x2: x(v), y1: 62, y2: 69, stroke: "#9a9a9a" }, svg);
      text(svg, x(v), 84, `${plain(v)} ${unit}`, LOOK.ink, 12.5);
    }
    const anchor = (at) => (at > W - 160 ? "end" : at < 160 ? "start" : "middle");
    if (revealed()) {
      const truth = model.get("truth");
      shape("line", { x1: x(truth), x2: x(truth), y1: 30, y2: 62, stroke: LOOK.ink, "stroke-width": 4 }, svg);
      text(svg, x(truth), 22, `${model.get("how")} ${plain(truth)} ${unit}`, LOOK.ink, 13, anchor(x(truth)));
    }
    if (model.get("guess") !== null) {
      const guess = model.get("guess"), clash = revealed() && Math.abs(x(guess) - x(model.get("truth"))) < 150;
      shape("line", { x1: x(guess), x2: x(guess), y1: 30, y2: 62, stroke: LOOK.guess, "stroke-width": 2.5, "stroke-dasharray": "5 4" }, svg);
      const right = clash && guess > model.get("truth"), left = clash && !right;
      text(svg, x(guess) + (right ? 8 : left ? -8 : 0), clash ? 46 : 22, `your guess ${plain(guess)}`, LOOK.guess, 13, right ? "start" : left ? "end" : anchor(x(guess)));
    }
    svg.addEventListener("click", (event) => {
      if (fixed()) return;
      const area = svg.getBoundingClientRect(), at = ((event.clientX - area.left) / area.width) * W;
      const share = Math.min(1, Math.max(0, (at - L) / (W - L - R)));
      set({ guess: Number((low * (high / low) ** share).toPrecision(2)) });
    });
  }
  for (const name of ["locked", "skipped", "truth", "picture", "why"]) model.on(`change:${name}`, draw);
  draw();
}
export default { render };
