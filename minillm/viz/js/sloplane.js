// The SLO plane: dots move from one way of serving to the next; the corner of the rectangle is dragged, or moved by arrow keys.

const W = 880, H = 400, L = 64, R = 262, T = 16, B = 48;

function render({ model, el }) {
  const { box, title } = card(el, model.get("question"));
  const svg = shape("svg", { viewBox: `0 0 ${W} ${H}`, width: "100%", style: "display:block;background:white;touch-action:none" }, box);
  svg.setAttribute("class", "minillm-sloplane");
  captionLine(box, model.get("caption"));
  const names = model.get("names"), dots = model.get("dots"), long = model.get("long"), seconds = model.get("seconds");
  const all = dots.flat(), span = (side) => [Math.min(...all.map((d) => d[side])) / 1.5, Math.max(...all.map((d) => d[side])) * 1.5];
  const [lowX, highX] = span(0), [lowY, highY] = span(1);
  const log = (v, low, high) => Math.log(v / low) / Math.log(high / low);
  const x = (v) => L + log(v, lowX, highX) * (W - L - R), y = (v) => H - B - log(v, lowY, highY) * (H - T - B);
  const unX = (at) => lowX * (highX / lowX) ** ((at - L) / (W - L - R)), unY = (at) => lowY * (highY / lowY) ** ((H - B - at) / (H - T - B));
  const slo = [...model.get("slo")];
  let way = 0, dragging = false;
  const words = (parent, at, height, text, fill = LOOK.ink, anchor = "middle", size = 12.5, weight = "normal") =>
    shape("text", { x: at, y: height, fill, "font-size": size, "text-anchor": anchor, "font-weight": weight, "font-family": "DejaVu Sans, Verdana, sans-serif" }, parent, text);

  shape("rect", { x: 0, y: 0, width: W, height: H, fill: "white" }, svg);
  const rectangle = shape("rect", { fill: "#eeeeee", stroke: LOOK.ink }, svg);
  for (const v of roundTicks(lowX, highX)) { shape("line", { x1: x(v), x2: x(v), y1: H - B, y2: H - B + 5, stroke: "#9a9a9a" }, svg); words(svg, x(v), H - B + 20, plain(v)); }
  for (const v of roundTicks(lowY, highY)) { shape("line", { x1: L - 5, x2: L, y1: y(v), y2: y(v), stroke: "#9a9a9a" }, svg); words(svg, L - 9, y(v) + 4, plain(v), LOOK.ink, "end"); }
  shape("path", { d: `M ${L} ${T} V ${H - B} H ${W - R}`, fill: "none", stroke: "#9a9a9a" }, svg);
  words(svg, (L + W - R) / 2, H - 8, "time to first token (s)");
  const label = words(svg, 16, (T + H - B) / 2, "P99 gap between tokens (s)");
  label.setAttribute("transform", `rotate(-90 16 ${(T + H - B) / 2})`);
  const circles = dots[0].map((_, n) => {
    const made = shape("circle", { r: 6, "stroke-width": 2, stroke: long[n] ? LOOK.kinds.prefill : LOOK.kinds.decode }, svg);
    made.style.transition = "cx 0.7s, cy 0.7s";
    return made;
  });
  const goal = words(svg, 0, 0, "", LOOK.ink, "end", 12);
  const handle = shape("circle", { r: 9, fill: LOOK.guess, stroke: "white", "stroke-width": 2, tabindex: 0 }, svg);
  handle.style.cursor = "grab";
  handle.dataset.lmSuppressShortcuts = "true";
  handle.setAttribute("aria-label", "corner of the goals: drag it, or use the arrow keys");
  const rows = names.map((name, n) => {
    const row = shape("g", { tabindex: 0, role: "button", "aria-label": `show ${name}` }, svg), top = T + 34 + n * 78;
    row.style.cursor = "pointer";
    row.dataset.lmSuppressShortcuts = "true";
    const frame = shape("rect", { x: W - R + 22, y: top - 22, width: R - 26, height: 66, rx: 5, stroke: "#b5b5b5" }, row);
    const text = words(row, W - R + 34, top, name, LOOK.ink, "start", 13.5, "bold");
    const told = words(row, W - R + 34, top + 18, "", LOOK.ink, "start", 12.5), rate = words(row, W - R + 34, top + 35, "", LOOK.ink, "start", 12.5);
    row.addEventListener("click", () => { way = n; draw(); });
    row.addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); way = n; draw(); } });
    return { frame, text, told, rate };
  });
  const key = T + 34 + names.length * 78;
  [["short prompt", LOOK.kinds.decode], ["long prompt", LOOK.kinds.prefill]].forEach(([name, colour], n) => {
    shape("circle", { cx: W - R + 34, cy: key + n * 20, r: 6, fill: colour }, svg);
    words(svg, W - R + 46, key + n * 20 + 4, `${name}; full: both goals met`, LOOK.ink, "start", 12);
  });
  words(svg, W - R + 28, key + 44, "Click a way; drag the corner.", LOOK.faint, "start", 12);

  const met = (n) => dots[n].filter(([first, gap]) => first <= slo[0] && gap <= slo[1]).length;

  function draw() {
    const counts = names.map((_, n) => met(n)), rates = counts.map((count, n) => count / seconds[n]), most = Math.max(...rates);
    const best = names.filter((_, n) => rates[n] > 0.95 * most); // within 5 % they are alike
    rectangle.setAttribute("x", L); rectangle.setAttribute("y", y(slo[1]));
    rectangle.setAttribute("width", Math.max(0, x(slo[0]) - L)); rectangle.setAttribute("height", Math.max(0, H - B - y(slo[1])));
    handle.setAttribute("cx", x(slo[0])); handle.setAttribute("cy", y(slo[1]));
    const right = x(slo[0]) - L < 190;
    goal.setAttribute("x", x(slo[0]) + (right ? 14 : -14)); goal.setAttribute("text-anchor", right ? "start" : "end");
    goal.setAttribute("y", y(slo[1]) < T + 30 ? y(slo[1]) + 24 : y(slo[1]) - 10);
    goal.textContent = `TTFT ≤ ${plain(slo[0])} s, gaps ≤ ${plain(slo[1])} s`;
    circles.forEach((circle, n) => {
      const [first, gap] = dots[way][n], inside = first <= slo[0] && gap <= slo[1];
      circle.setAttribute("cx", x(first)); circle.setAttribute("cy", y(gap));
      circle.style.cx = `${x(first)}px`; circle.style.cy = `${y(gap)}px`;
      circle.setAttribute("fill", inside ? (long[n] ? LOOK.kinds.prefill : LOOK.kinds.decode) : "white");
    });
    rows.forEach(({ frame, text, told, rate }, n) => {
      frame.setAttribute("fill", n === way ? "#f6e9d8" : "white");
      text.textContent = names[n] + (most > 0 && best.length === 1 && names[n] === best[0] ? "  ★ most" : "");
      told.textContent = `${counts[n]} of ${dots[n].length} meet both goals:`;
      rate.textContent = `${Number(rates[n].toPrecision(2))} requests/s`;
    });
    title.textContent = most === 0 ? "Nobody meets these goals" : best.length === 1 ? `With these goals “${best[0]}” serves most` : `With these goals ${best.map((name) => `“${name}”`).join(" and ")} serve as many`;
  }

  function put(at, height) {
    slo[0] = Math.min(highX, Math.max(lowX * 1.05, unX(at)));
    slo[1] = Math.min(highY, Math.max(lowY * 1.05, unY(height)));
    draw();
  }
  function move(event) {
    const area = svg.getBoundingClientRect();
    put(((event.clientX - area.left) / area.width) * W, ((event.clientY - area.top) / area.height) * H);
  }
  handle.addEventListener("pointerdown", (event) => { dragging = true; handle.setPointerCapture(event.pointerId); });
  handle.addEventListener("pointermove", (event) => { if (dragging) move(event); });
  for (const end of ["pointerup", "pointercancel"]) handle.addEventListener(end, () => { dragging = false; });
  handle.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: [-8, 0], ArrowRight: [8, 0], ArrowUp: [0, -8], ArrowDown: [0, 8] }[event.key];
    if (!by) return;
    event.preventDefault();
    put(x(slo[0]) + by[0], y(slo[1]) + by[1]);
  });
  draw();
}
export default { render };
