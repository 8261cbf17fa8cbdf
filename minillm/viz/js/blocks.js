// The blocks of a KV cache as a grid, step by step: who holds which, how far it is filled, what is shared or kept.

function render({ model, el }) {
  const { box, title } = card(el, model.get("finding"));
  const bar = element("div", { display: "flex", alignItems: "center", gap: "8px", marginBottom: "4px" }, box);
  const label = element("label", { display: "flex", alignItems: "center", gap: "8px" }, bar, "step");
  const range = element("input", { width: "260px" }, label);
  Object.assign(range, { type: "range", min: 0, max: 0, step: 1, value: 0 });
  const told = element("span", { color: LOOK.faint }, bar);
  const picture = shape("svg", { width: "100%", role: "img" }, box);
  const caption = captionLine(box, "");
  let follow = true;

  function cell(x, y, size, [owner, holders, filled]) {
    const group = shape("g", {}, picture);
    const free = holders === 0;
    shape("rect", { x, y, width: size, height: size, fill: free && filled > 0 ? "#d9efe7" : free ? "#f4f4f4" : "white",
      stroke: free ? "#dddddd" : LOOK.kv, "stroke-width": free ? 1 : 1.5 }, group);
    if (!free && filled > 0)
      shape("rect", { x, y: y + size * (1 - filled), width: size, height: size * filled, fill: LOOK.kv,
        opacity: holders > 1 ? 1 : 0.45 }, group);
    const text = holders > 1 ? `×${holders}` : holders === 1 ? String(owner) : "";
    if (text && size > 13)
      shape("text", { x: x + size / 2, y: y + size / 2 + 4, "text-anchor": "middle", "font-size": Math.min(12, size * 0.5),
        fill: holders > 1 ? "white" : LOOK.ink }, group, text);
    const says = free ? (filled > 0 ? "kept for a prompt that begins alike" : "free")
      : `${holders > 1 ? `shared by ${holders} requests` : `request ${owner}`}, ${Math.round(filled * 100)} % filled`;
    shape("title", {}, group, says);
  }
  function draw() {
    title.textContent = model.get("finding");
    caption.textContent = model.get("caption");
    const steps = model.get("steps");
    range.max = Math.max(0, steps.length - 1);
    if (follow) range.value = range.max;
    const cells = steps[+range.value] || [];
    const columns = model.get("columns"), width = 936, gap = 3;
    const size = Math.min(44, (width - gap * (columns - 1)) / columns), rows = Math.ceil(cells.length / columns);
    picture.setAttribute("viewBox", `0 0 ${width} ${Math.max(1, rows) * (size + gap)}`);
    picture.replaceChildren();
    cells.forEach((each, number) =>
      cell((number % columns) * (size + gap) + 1, Math.floor(number / columns) * (size + gap) + 1, size - 2, each));
    const held = cells.filter(([, holders]) => holders > 0), full = held.reduce((sum, [, , filled]) => sum + filled, 0);
    told.textContent = steps.length
      ? `${+range.value + 1} of ${steps.length}: ${held.length} of ${cells.length} blocks held, ${held.length ? Math.round(100 * full / held.length) : 0} % of that filled`
      : "nothing has run yet";
  }
  range.addEventListener("input", () => { follow = range.value === range.max; draw(); });
  function stand() {
    if (model.get("at") >= 0) { follow = false; range.max = model.get("steps").length - 1; range.value = model.get("at"); }
    draw();
  }
  model.on("change:at", stand);
  for (const name of ["steps", "finding", "caption"]) model.on(`change:${name}`, draw);
  stand();
}
export default { render };
