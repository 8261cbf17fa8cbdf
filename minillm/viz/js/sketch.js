// A curve that the learner draws before it is measured: one dot for each place, dragged up and down or moved by arrow
// keys; all of them before the drawing counts. Once the guess is fixed, what was computed and measured appears beside it.

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

  const svg = shape("svg", { viewBox: `0 0 ${W} ${H}`, width: "100%" }, body);
  svg.setAttribute("class", "minillm-sketch");
  const line = element("div", { marginTop: "6px", display: "flex", alignItems: "center", flexWrap: "wrap", gap: "6px" }, body);
  const below = captionLine(body, "");
  svg.addEventListener("pointerdown", (event) => { if (!fixed()) { dragged = nearest(event); svg.setPointerCapture(event.pointerId); move(event); } });
  svg.addEventListener("pointermove", (event) => { if (dragged >= 0) move(event); });
  for (const end of ["pointerup", "pointercancel"]) svg.addEventListener(end, () => { if (dragged >= 0) { dragged = -1; model.save_changes(); draw(); } });

  function draw() {
    svg.replaceChildren();
    svg.setAttribute("style", `display:block;background:white;touch-action:none;cursor:${fixed() ? "default" : "ns-resize"}`);
    shape("rect", { x: 0, y: 0, width: W, height: H, fill: "white" }, svg);
    for (let step = 0; step <= 4; step++) {
      const v = low + ((high - low) * step) / 4;
      shape("line", { x1: L, x2: W - R, y1: y(v), y2: y(v), stroke: step ? "#ececec" : "#9a9a9a" }, svg);
      text(svg, L - 14, y(v) + 4, `${plain(v)} ${model.get("unit")}`, LOOK.ink, "end");
    }
    places.forEach((place, n) => text(svg, x(n), H - B + 24, plain(place), LOOK.ink));
    text(svg, (L + W - R) / 2, H - 6, model.get("place_label"), LOOK.ink);
    const names = []; // [height, words, colour], beside the curves' ends
    if (revealed()) Object.entries(model.get("truths")).forEach(([name, values], number) => names.push(truth(svg, name, values, number)));
    if (!model.get("skipped")) names.push(guess(svg));
    names.sort((a, b) => a[0] - b[0]);
    names.forEach((each, n) => { if (n && each[0] < names[n - 1][0] + 17) each[0] = names[n - 1][0] + 17; });
    const down = Math.max(0, (names.at(-1)?.[0] ?? 0) - (H - B + 8)); // none below the axis
    names.forEach(([height, words, colour]) => text(svg, W - R + 14, height - down + 4, words, colour, "start", 13));
    line.replaceChildren();
    below.textContent = revealed() ? model.get("caption") : "";
    if (!fixed()) controls(line);
    else if (revealed()) element("span", {}, line, `${verdict()} ${model.get("why")}`);
    else element("span", { color: LOOK.faint }, line, model.get("locked") ? "Your drawing is fixed. It comes back with the measurement." : "Skipped. The measurement comes further down.");
  }

  function verdict() { // where the drawing is furthest off
    if (!model.get("locked")) return "";
    const right = Object.values(model.get("truths"))[0], drawn = model.get("guess"), unit = model.get("unit");
    const worst = drawn.reduce((most, v, n) => (Math.abs(v - right[n]) > Math.abs(drawn[most] - right[most]) ? n : most), 0);
    return `Furthest off at ${plain(places[worst])}: you drew ${plain(drawn[worst])} ${unit}, it is ${plain(right[worst])} ${unit}.`;
  }

  function truth(svg, name, values, number) { // the first is a line, the others are dots
    const colour = number ? LOOK.kinds.decode : LOOK.ink;
    const points = values.map((v, n) => `${x(n)},${y(v)}`).join(" ");
    if (number === 0) shape("polyline", { points, fill: "none", stroke: colour, "stroke-width": 2 }, svg);
    else values.forEach((v, n) => shape("circle", { cx: x(n), cy: y(v), r: 5.5, fill: colour }, svg));
    return [y(values[values.length - 1]), name, colour];
  }

  function guess(svg) {
    const values = model.get("guess"), touched = model.get("touched");
    const points = values.map((v, n) => `${x(n)},${y(v)}`).join(" ");
    shape("polyline", { points, fill: "none", stroke: LOOK.guess, "stroke-width": 2, "stroke-dasharray": "6 4" }, svg);
    values.forEach((v, n) => {
      const dot = shape("circle", { cx: x(n), cy: y(v), r: 8, fill: fixed() || touched.includes(n) ? "white" : "#f6d9c6", stroke: LOOK.guess, "stroke-width": 2, tabindex: fixed() ? -1 : 0 }, svg);
      dot.setAttribute("aria-label", `${plain(places[n])}: ${plain(v)} ${model.get("unit")}`);
      dot.dataset.lmSuppressShortcuts = "true";
      dot.addEventListener("keydown", (event) => {
        const by = { ArrowUp: 1, ArrowDown: -1 }[event.key];
        if (!by || fixed()) return;
        event.preventDefault();
        put(n, model.get("guess")[n] + (by * (high - low)) / 50);
        model.save_changes();
        draw();
        svg.querySelectorAll("circle[tabindex='0']")[n]?.focus();
      });
    });
    return [y(values[values.length - 1]), "your drawing", LOOK.guess];
  }

  function nearest(event) {
    const area = svg.getBoundingClientRect(), at = ((event.clientX - area.left) / area.width) * W;
    return places.reduce((best, _, n) => (Math.abs(x(n) - at) < Math.abs(x(best) - at) ? n : best), 0);
  }

  function move(event) {
    const area = svg.getBoundingClientRect(), at = ((event.clientY - area.top) / area.height) * H;
    put(dragged, low + (1 - (at - T) / (H - T - B)) * (high - low));
    draw();
  }

  function put(n, value) {
    const values = [...model.get("guess")];
    values[n] = Math.round(Math.min(high, Math.max(low, value)) * 10) / 10;
    model.set("guess", values);
    if (!model.get("touched").includes(n)) model.set("touched", [...model.get("touched"), n]);
  }

  function controls(line) {
    const left = places.length - model.get("touched").length;
    const lock = button(line, "That is my drawing", "fix the drawing", () => { if (!left) set({ locked: true }); });
    lock.disabled = left > 0;
    lock.style.opacity = left ? 0.5 : 1;
    button(line, "skip", "see the measurement without a drawing", () => set({ skipped: true }));
    element("span", { color: LOOK.faint }, line, left ? `drag the dots up and down: ${left} to go` : "");
  }

  function set(values) {
    for (const [name, value] of Object.entries(values)) model.set(name, value);
    model.save_changes();
    draw();
  }
  for (const name of ["locked", "skipped", "truths", "why", "caption"]) model.on(`change:${name}`, draw);
  draw();
}
export default { render };
