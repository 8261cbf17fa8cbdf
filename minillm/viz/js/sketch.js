// A curve that the learner draws before it is measured: one dot for each place, dragged up and down. Dots that were not
// touched follow none; arrow keys move a dot too. Once the guess is fixed, what was computed and measured appears beside it.

const W = 880, H = 300, L = 62, R = 190, T = 14, B = 46;

function render({ model, el }) {
  const { box } = card(el, model.get("question"));
  const body = element("div", {}, box);
  const places = model.get("places"), [low, high] = [model.get("low"), model.get("high")];
  const x = (n) => L + (places.length > 1 ? n / (places.length - 1) : 0.5) * (W - L - R);
  const y = (v) => T + (1 - (v - low) / (high - low)) * (H - T - B);
  const fixed = () => model.get("locked") || model.get("skipped");
  const revealed = () => fixed() && Object.keys(model.get("truths")).length > 0;
  let dragged = -1;
  const text = (svg, at, height, words, fill, anchor = "middle", size = 12.5) => shape("text", { x: at, y: height, fill, "font-size": size, "text-anchor": anchor, "font-family": "DejaVu Sans, Verdana, sans-serif" }, svg, words);

  function draw() {
    body.replaceChildren();
    const svg = shape("svg", { viewBox: `0 0 ${W} ${H}`, width: "100%", style: `display:block;background:white;touch-action:none;cursor:${fixed() ? "default" : "ns-resize"}` }, body);
    svg.setAttribute("class", "minillm-sketch");
    shape("rect", { x: 0, y: 0, width: W, height: H, fill: "white" }, svg);
    for (let step = 0; step <= 4; step++) {
      const v = low + ((high - low) * step) / 4;
      shape("line", { x1: L, x2: W - R, y1: y(v), y2: y(v), stroke: step ? "#ececec" : "#9a9a9a" }, svg);
      text(svg, L - 8, y(v) + 4, `${plain(v)} ${model.get("unit")}`, LOOK.ink, "end");
    }
    places.forEach((place, n) => text(svg, x(n), H - B + 18, plain(place), LOOK.ink));
    text(svg, (L + W - R) / 2, H - 8, model.get("place_label"), LOOK.ink);
    if (revealed()) Object.entries(model.get("truths")).forEach(([name, values], number) => truth(svg, name, values, number));
    guess(svg);
    if (!fixed()) {
      svg.addEventListener("pointerdown", (event) => { dragged = nearest(svg, event); move(svg, event); });
      svg.addEventListener("pointermove", (event) => { if (dragged >= 0) move(svg, event); });
      svg.addEventListener("pointerup", () => { if (dragged >= 0) { dragged = -1; model.save_changes(); draw(); } });
    }
    const line = element("div", { marginTop: "6px", display: "flex", alignItems: "center", flexWrap: "wrap", gap: "6px" }, body);
    if (!fixed()) controls(line);
    else if (revealed()) element("span", {}, line, model.get("why"));
    else element("span", { color: LOOK.faint }, line, model.get("locked") ? "Your drawing is fixed. It comes back with the measurement." : "Skipped. The measurement comes further down.");
  }

  function truth(svg, name, values, number) { // the first is a line, the others are dots
    const colour = number ? LOOK.kinds.decode : LOOK.ink;
    const points = values.map((v, n) => `${x(n)},${y(v)}`).join(" ");
    if (number === 0) shape("polyline", { points, fill: "none", stroke: colour, "stroke-width": 2 }, svg);
    else values.forEach((v, n) => shape("circle", { cx: x(n), cy: y(v), r: 5.5, fill: colour }, svg));
    const last = values[values.length - 1];
    text(svg, W - R + 12, y(last) + (number ? 14 - 18 * number : 18), name, colour, "start", 13);
  }

  function guess(svg) {
    const values = model.get("guess");
    if (model.get("skipped")) return;
    const points = values.map((v, n) => `${x(n)},${y(v)}`).join(" ");
    shape("polyline", { points, fill: "none", stroke: LOOK.guess, "stroke-width": 2, "stroke-dasharray": "6 4" }, svg);
    values.forEach((v, n) => {
      const dot = shape("circle", { cx: x(n), cy: y(v), r: 8, fill: "white", stroke: LOOK.guess, "stroke-width": 2, tabindex: fixed() ? -1 : 0 }, svg);
      dot.setAttribute("aria-label", `${plain(places[n])}: ${plain(v)} ${model.get("unit")}`);
      dot.dataset.lmSuppressShortcuts = "true";
      dot.addEventListener("keydown", (event) => {
        const by = { ArrowUp: 1, ArrowDown: -1 }[event.key];
        if (!by || fixed()) return;
        event.preventDefault();
        put(n, model.get("guess")[n] + (by * (high - low)) / 50);
        model.save_changes();
        draw();
        body.querySelectorAll("circle[tabindex='0']")[n]?.focus();
      });
    });
    if (!revealed()) text(svg, W - R + 12, y(values[values.length - 1]) + 4, "your drawing", LOOK.guess, "start", 13);
  }

  function nearest(svg, event) {
    const area = svg.getBoundingClientRect(), at = ((event.clientX - area.left) / area.width) * W;
    return places.reduce((best, _, n) => (Math.abs(x(n) - at) < Math.abs(x(best) - at) ? n : best), 0);
  }

  function move(svg, event) {
    const area = svg.getBoundingClientRect(), at = ((event.clientY - area.top) / area.height) * H;
    put(dragged, low + (1 - (at - T) / (H - T - B)) * (high - low));
    const again = dragged;
    draw();
    dragged = again;
  }

  function put(n, value) {
    const values = [...model.get("guess")];
    values[n] = Math.round(Math.min(high, Math.max(low, value)) * 10) / 10;
    model.set("guess", values);
    model.set("touched", true);
  }

  function controls(line) {
    const lock = button(line, "That is my drawing", "fix the drawing", () => { if (model.get("touched")) set({ locked: true }); });
    lock.disabled = !model.get("touched");
    lock.style.opacity = lock.disabled ? 0.5 : 1;
    button(line, "skip", "see the measurement without a drawing", () => set({ skipped: true }));
    element("span", { color: LOOK.faint }, line, "drag the dots up and down");
  }

  function set(values) {
    for (const [name, value] of Object.entries(values)) model.set(name, value);
    model.save_changes();
    draw();
  }
  for (const name of ["locked", "skipped", "truths", "why"]) model.on(`change:${name}`, draw);
  draw();
}
export default { render };
