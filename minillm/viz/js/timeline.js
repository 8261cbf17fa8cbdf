// Ranks over time, and the memory of one of them below. Hover tells a span's name, bytes and time; buttons, ctrl + wheel
// or a drag choose the stretch that is seen. Draws what the model holds, again whenever that grows.

const ROW = 34, TOP = 8, LEFT = 74, RIGHT = 12, AXIS = 38, MEMORY = 96;

function render({ model, el }) {
  const { box, title } = card(el, model.get("finding"));
  const bar = element("div", { display: "flex", alignItems: "center", flexWrap: "wrap", marginBottom: "4px" }, box);
  button(bar, "+", "zoom in", () => zoom(0.5, pointed));
  button(bar, "−", "zoom out", () => zoom(2, pointed));
  button(bar, "all", "see the whole run", () => { view = null; draw(); });
  const hint = element("span", { color: LOOK.faint, fontSize: "12px", marginRight: "auto" }, bar, "drag to move, ctrl + wheel to zoom");
  const legend = element("span", { fontSize: "12px" }, bar);
  const canvas = element("canvas", { width: "100%", display: "block", touchAction: "pan-y" }, box);
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", model.get("finding"));
  const tip = element("div", {
    position: "absolute", pointerEvents: "none", background: LOOK.ink, color: "white", padding: "4px 8px",
    borderRadius: "4px", fontSize: "12px", whiteSpace: "pre", display: "none", zIndex: 10,
  }, box);
  tip.className = "minillm-tip";
  const caption = captionLine(box, model.get("caption"));
  let pointed = 0.5; // where the mouse was last, of the picture's width: the buttons zoom there
  let view = null; // [from, to] in seconds; null for the whole run

  const spans = () => model.get("spans");
  const lanes = () => model.get("lanes");
  const memory = () => model.get("memory");
  const whole = () => [0, spans().reduce((last, span) => Math.max(last, span[3]), 1e-9)];
  const seen = () => view ?? whole();
  const width = () => canvas.clientWidth || 900;
  const toX = (s) => LEFT + ((s - seen()[0]) / (seen()[1] - seen()[0])) * (width() - LEFT - RIGHT);
  const toS = (x) => seen()[0] + ((x - LEFT) / (width() - LEFT - RIGHT)) * (seen()[1] - seen()[0]);

  function zoom(factor, place) {
    const [from, to] = seen(), [first, last] = whole();
    const middle = from + place * (to - from), range = Math.min((to - from) * factor, last - first);
    if (range < (last - first) / 500) return;
    look(middle - place * range, range);
  }
  function look(from, range) {
    const [first, last] = whole();
    const start = Math.min(Math.max(from, first), last - range);
    view = range >= last - first ? null : [start, start + range];
    draw();
  }

  function draw() {
    const hasMemory = memory().length > 0;
    const lower = TOP + ROW * Math.max(1, lanes().length);
    const height = lower + (hasMemory ? MEMORY : 0) + AXIS;
    const ratio = window.devicePixelRatio || 1;
    canvas.style.height = `${height}px`;
    canvas.width = width() * ratio;
    canvas.height = height * ratio;
    const pen = canvas.getContext("2d");
    pen.scale(ratio, ratio);
    pen.fillStyle = "white";
    pen.fillRect(0, 0, width(), height);
    pen.font = "12px DejaVu Sans, Verdana, sans-serif";
    pen.textBaseline = "middle";
    pen.save();
    pen.beginPath();
    pen.rect(LEFT, 0, width() - LEFT - RIGHT, height);
    pen.clip();
    spans().forEach(([lane, kind, start, end, , letter]) => block(pen, kind, toX(start), TOP + lane * ROW + 4, toX(end), ROW - 10, letter));
    if (hasMemory) steps(pen, lower);
    pen.restore();
    pen.fillStyle = LOOK.ink;
    pen.textAlign = "right";
    lanes().forEach((name, lane) => pen.fillText(name, LEFT - 8, TOP + lane * ROW + ROW / 2 - 1));
    if (hasMemory) memoryAxis(pen, lower);
    timeAxis(pen, height - AXIS);
    title.textContent = model.get("finding");
    caption.textContent = model.get("caption");
    tellColours();
  }

  function block(pen, kind, x0, y, x1, height, letter) {
    if (x1 < LEFT || x0 > width()) return;
    const wide = Math.max(x1 - x0, 0.6);
    pen.fillStyle = LOOK.kinds[kind];
    pen.fillRect(x0, y, wide > 3 ? wide - 1 : wide, height);
    if (letter && wide > 14) {
      pen.fillStyle = "white";
      pen.textAlign = "center";
      pen.fillText(letter, x0 + wide / 2, y + height / 2);
    }
    if (kind !== "waiting") return;
    pen.strokeStyle = "white";
    pen.save();
    pen.beginPath();
    pen.rect(x0, y, wide, height);
    pen.clip();
    for (let x = x0 - height; x < x1; x += 8) { pen.beginPath(); pen.moveTo(x, y + height); pen.lineTo(x + height, y); pen.stroke(); }
    pen.restore();
  }

  // Categories stacked; each is a list of [time, bytes held from then on].
  const held = (series, s) => { let low = 0, high = series.length; while (low < high) { const mid = (low + high) >> 1; if (series[mid][0] <= s) low = mid + 1; else high = mid; } return low ? series[low - 1][1] : 0; };
  let levels = []; // [time, bytes of each category], worked out once per change
  function level() {
    const times = [...new Set(memory().flatMap(([, series]) => series.map(([time]) => time)))].sort((a, b) => a - b);
    levels = times.map((s) => [s, memory().map(([, series]) => held(series, s))]);
  }
  const most = () => levels.reduce((high, [, counts]) => Math.max(high, counts.reduce((a, b) => a + b, 0)), 1);
  function steps(pen, top) {
    const high = most(), room = MEMORY - 16, bottom = top + MEMORY;
    levels.forEach(([s, counts], i) => {
      let base = 0;
      const x0 = toX(s), x1 = toX(i + 1 < levels.length ? levels[i + 1][0] : whole()[1]);
      for (const [place, [category]] of memory().entries()) {
        const size = (counts[place] / high) * room;
        pen.fillStyle = LOOK.categories[category];
        pen.fillRect(x0, bottom - base - size, x1 - x0 + 0.5, size);
        base += size;
      }
    });
  }
  function memoryAxis(pen, top) {
    pen.fillText(bytesText(most()), LEFT - 8, top + 16);
    pen.fillText("0", LEFT - 8, top + MEMORY);
    pen.fillText(model.get("memory_label"), LEFT - 8, top + MEMORY / 2 + 8);
  }

  function timeAxis(pen, y) {
    const [from, to] = seen(), scale = to - from < 2e-3 ? [1e6, "µs"] : to - from < 2 ? [1e3, "ms"] : [1, "s"];
    pen.strokeStyle = "#9a9a9a";
    pen.beginPath(); pen.moveTo(LEFT, y + 2); pen.lineTo(width() - RIGHT, y + 2); pen.stroke();
    const step = niceStep((to - from) * scale[0], Math.max(3, width() / 110));
    pen.textAlign = "center";
    for (let tick = Math.ceil((from * scale[0]) / step) * step; tick <= to * scale[0] + 1e-9; tick += step) {
      const x = toX(tick / scale[0]);
      pen.beginPath(); pen.moveTo(x, y + 2); pen.lineTo(x, y + 6); pen.stroke();
      pen.fillText(String(Number(tick.toPrecision(6))), x, y + 14);
    }
    pen.fillText(`time (${scale[1]})`, (LEFT + width() - RIGHT) / 2, y + 30);
  }

  function tellColours() {
    legend.replaceChildren();
    const kinds = [...new Set(spans().map((span) => span[1]))].map((kind) => [LOOK.kinds[kind], kind]);
    for (const [colour, name] of [...kinds, ...memory().map(([category]) => [LOOK.categories[category], category])]) {
      const entry = element("span", { marginLeft: "12px", whiteSpace: "nowrap" }, legend);
      element("span", { display: "inline-block", width: "10px", height: "10px", background: colour, marginRight: "5px" }, entry);
      entry.append(name);
    }
  }

  canvas.addEventListener("mousemove", (event) => {
    pointed = Math.min(1, Math.max(0, (event.offsetX - LEFT) / (width() - LEFT - RIGHT)));
    const x = event.offsetX, y = event.offsetY, s = toS(x), lane = Math.floor((y - TOP) / ROW), slack = toS(x + 1) - s;
    const lower = TOP + ROW * lanes().length;
    const found = x > LEFT && spans().find(([on, , start, end]) => on === lane && start - slack <= s && s <= end + slack);
    let text = found ? found[4] : "";
    if (!found && x > LEFT && y > lower && y < lower + MEMORY && memory().length)
      text = memory().map(([category, series]) => `${category} ${bytesText(held(series, s))}`).join("\n");
    tip.style.display = text ? "block" : "none";
    tip.textContent = text;
    tip.style.left = `${Math.min(canvas.offsetLeft + x + 14, box.clientWidth - tip.offsetWidth - 4)}px`;
    tip.style.top = `${canvas.offsetTop + y + 16}px`;
  });
  canvas.addEventListener("mouseleave", () => { tip.style.display = "none"; });
  canvas.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.metaKey) return; // the page scrolls
    event.preventDefault();
    zoom(event.deltaY < 0 ? 0.8 : 1.25, (event.offsetX - LEFT) / (width() - LEFT - RIGHT));
  }, { passive: false });
  canvas.addEventListener("mousedown", (event) => {
    const grabbed = event.clientX, [from, to] = seen();
    const move = (now) => look(from - ((now.clientX - grabbed) / (width() - LEFT - RIGHT)) * (to - from), to - from);
    const drop = () => { window.removeEventListener("mousemove", move); window.removeEventListener("mouseup", drop); };
    window.addEventListener("mousemove", move);
    window.addEventListener("mouseup", drop);
  });

  const watcher = new ResizeObserver(draw);
  watcher.observe(canvas);
  let waiting = false;
  const soon = () => { if (!waiting) { waiting = true; requestAnimationFrame(() => { waiting = false; level(); draw(); }); } };
  for (const name of ["spans", "lanes", "memory", "finding", "caption"]) model.on(`change:${name}`, soon);
  level();
  return () => watcher.disconnect();
}
export default { render };
