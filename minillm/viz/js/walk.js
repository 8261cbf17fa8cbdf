// One decode step on a device's roof. Every position of the sliders was worked out by the kernel; here it is only drawn.

const W = 900, H = 400, L = 84, R = 250, T = 16, B = 48;

function render({ model, el }) {
  const { box, title } = card(el, model.get("question"));
  const bar = element("div", { display: "flex", flexWrap: "wrap", gap: "8px 22px", alignItems: "center", margin: "4px 0 6px" }, box);
  const picker = (label, names, chosen) => {
    const line = element("label", {}, bar, `${label} `);
    const select = element("select", { font: "inherit", maxWidth: "220px" }, line);
    names.forEach((name) => element("option", {}, select, name));
    select.selectedIndex = chosen;
    select.addEventListener("change", draw);
    return select;
  };
  const slider = (label, values, chosen, key) => {
    const line = element("label", { display: "flex", alignItems: "center", gap: "6px" }, bar, label);
    const range = element("input", { width: "150px" }, line);
    Object.assign(range, { type: "range", min: 0, max: values.length - 1, step: 1, value: chosen, className: `minillm-${key}` });
    const shown = element("b", { width: "56px" }, line);
    const tell = () => { shown.textContent = plain(values[+range.value]); };
    range.addEventListener("input", () => {
      tell();
      if (key === "batch" && +range.value === values.length - 1) title.textContent = model.get("finding"); // seen by now
      draw();
    });
    tell();
    return range;
  };
  const devices = model.get("devices"), models = model.get("models"), batches = model.get("batches"), contexts = model.get("contexts");
  const device = picker("device", devices.map((each) => each.name), 0);
  const shape_ = picker("model", Object.keys(models), 0);
  const batch = slider("batch", batches, 0, "batch");
  const context = slider("context", contexts, 3, "context");
  const svg = shape("svg", { viewBox: `0 0 ${W} ${H}`, width: "100%", role: "img", "aria-label": model.get("finding"), style: "background:white;display:block" }, box);
  const words = element("div", { lineHeight: "1.5", minHeight: "60px" }, box);
  words.className = "minillm-words";
  const caption = captionLine(box, "");

  function draw() {
    const on = devices[device.selectedIndex], table = models[shape_.value], b = +batch.value, c = +context.value;
    const work = ([flops, moved]) => {
      const count = moved * on.element_bytes, intensity = flops / count;
      return { intensity, rate: Math.min(on.flops, intensity * on.bytes_per_s), time: Math.max(flops / on.flops, count / on.bytes_per_s) };
    };
    const products = work(table.products[b]), attention = work(table.attention[b][c]);
    const ridge = on.flops / on.bytes_per_s;
    // both axes stay where they are while batch and context move
    const low = 0.2, high = Math.max(2000, 4 * ridge), roofLow = low * on.bytes_per_s, top = on.flops * 3;
    const x = (v) => L + (Math.log(v / low) / Math.log(high / low)) * (W - L - R);
    const y = (v) => H - B - (Math.log(v / roofLow) / Math.log(top / roofLow)) * (H - T - B);
    svg.replaceChildren();
    axes(x, y, low, high, roofLow, top);
    shape("polyline", { points: [[low, roofLow], [ridge, on.flops], [high, on.flops]].map(([u, v]) => `${x(u)},${y(v)}`).join(" "), fill: "none", stroke: LOOK.ink, "stroke-width": 2.5 }, svg);
    shape("line", { x1: x(ridge), x2: x(ridge), y1: y(on.flops), y2: H - B, stroke: LOOK.faint, "stroke-dasharray": "2 4" }, svg);
    text(x(ridge) + (x(ridge) > W / 2 ? -5 : 5), H - B - 7, `computing is the limit from ${plain(ridge)} on`, LOOK.faint, x(ridge) > W / 2 ? "end" : "start", 12);
    text(x(high), y(on.flops) - 8, `at most ${rate(on.flops)}`, LOOK.ink, "end", 12);
    text(L + 10, T + 12, `the roof: memory gives ${plain(on.bytes_per_s / 1e9)} GB/s`, LOOK.ink, "start", 12);
    table.products.forEach((pair) => { const { intensity, rate: v } = work(pair); shape("circle", { cx: x(intensity), cy: y(v), r: 3, fill: LOOK.weights, opacity: 0.55 }, svg); });
    const lower = products.intensity < attention.intensity; // whose words go below the slope, whose above
    dot(x(products.intensity), y(products.rate), LOOK.weights, "products with weights", lower ? 24 : -14);
    dot(x(attention.intensity), y(attention.rate), LOOK.kv, "attention", lower ? -14 : 24);
    bars(products, attention, batches[b]);
    tell(on, table, products, attention, b, c, ridge);
  }

  const text = (x, y, words_, fill, anchor, size) => shape("text", { x, y, fill, "text-anchor": anchor, "font-size": size, "font-family": "DejaVu Sans, Verdana, sans-serif" }, svg, words_);
  const rate = (v) => (v >= 1e12 ? `${plain(v / 1e12)} TFLOP/s` : `${plain(v / 1e9)} GFLOP/s`);
  function dot(x, y, fill, name, drop) {
    shape("circle", { cx: x, cy: y, r: 9, fill, stroke: "white", "stroke-width": 2 }, svg);
    const label = text(x + (drop > 0 ? 13 : -13), y + drop, name, LOOK.ink, drop > 0 ? "start" : "end", 13);
    label.setAttribute("font-weight", "bold");
    label.setAttribute("paint-order", "stroke");
    label.setAttribute("stroke", "white");
    label.setAttribute("stroke-width", "4");
  }
  function axes(x, y, low, high, bottom, top) {
    shape("path", { d: `M${L} ${T} V${H - B} H${W - R}`, fill: "none", stroke: "#9a9a9a" }, svg);
    for (const v of decades(low, high)) { shape("line", { x1: x(v), x2: x(v), y1: H - B, y2: H - B + 5, stroke: "#9a9a9a" }, svg); text(x(v), H - B + 18, plain(v), LOOK.ink, "middle", 12); }
    for (const v of decades(bottom, top)) { shape("line", { x1: L - 5, x2: L, y1: y(v), y2: y(v), stroke: "#9a9a9a" }, svg); text(L - 8, y(v) + 4, plain(v / 1e9), LOOK.ink, "end", 12); }
    text((L + W - R) / 2, H - 10, "operations per byte of memory traffic", LOOK.ink, "middle", 12.5);
    const side = text(12, (T + H - B) / 2, "GFLOP/s", LOOK.ink, "middle", 12.5);
    side.setAttribute("transform", `rotate(-90 12 ${(T + H - B) / 2})`);
  }
  // How long the two take: the bar of the longer one fills the room.
  function bars(products, attention, requests) {
    const left = W - R + 40, room = R - 60, longest = Math.max(products.time, attention.time);
    text(left, 60, "time of one decode step", LOOK.ink, "start", 13).setAttribute("font-weight", "bold");
    [[products, LOOK.weights, "products"], [attention, LOOK.kv, "attention"]].forEach(([work, fill, name], row) => {
      const y = 84 + row * 62;
      text(left, y, `${name} ${timeText(work.time)}`, LOOK.ink, "start", 13);
      shape("rect", { x: left, y: y + 8, width: Math.max(1, (work.time / longest) * room), height: 22, fill }, svg);
    });
    const step = products.time + attention.time;
    text(left, 236, `TPOT ${timeText(step)}`, LOOK.ink, "start", 13);
    text(left, 258, `${plain(requests / step)} tokens/s in all`, LOOK.ink, "start", 13);
  }
  function tell(on, table, products, attention, b, c, ridge) {
    words.replaceChildren();
    const bound = (work) => (work.intensity < ridge ? "memory" : "computing");
    const longer = products.time > attention.time ? "products" : "attention";
    element("div", {}, words, `Products wait for ${bound(products)}, attention for ${bound(attention)}; ${longer} take${longer === "attention" ? "s" : ""} most of the step.`);
    const weights = table.weights * on.element_bytes, kv = table.kv_per_token * on.element_bytes * batches[b] * contexts[c];
    const fits = weights + kv <= on.memory_bytes;
    const memory = element("div", { color: fits ? LOOK.ink : LOOK.culprit, fontWeight: fits ? "normal" : "bold" }, words,
      `Weights ${bytesText(weights)} + KV cache ${bytesText(kv)}: ${fits ? "fit" : "do NOT fit"} into ${bytesText(on.memory_bytes)}.`);
    if (contexts[c] > table.room) memory.textContent += ` (The model was trained for ${plain(table.room)} tokens of context only.)`;
    caption.textContent = `planned: formulas on the roof · ${on.name} · ${on.dtype} · ${shape_.value} · roof: ${on.source}`;
  }
  draw();
}
export default { render };
