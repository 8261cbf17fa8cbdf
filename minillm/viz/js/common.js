// What every interactive picture shares: plain numbers, elements, logarithmic axes. `LOOK` comes from style.py.

function plain(x) {
  if (!isFinite(x)) return "–";
  if (x === 0) return "0";
  const size = Math.abs(x);
  if (size >= 100) return Math.round(x).toLocaleString("en-US");
  if (size >= 1e-4) return String(Number(x.toPrecision(3)));
  return x.toExponential(1);
}

function bytesText(x) {
  for (const [size, name] of [[1e12, "TB"], [1e9, "GB"], [1e6, "MB"], [1e3, "kB"]])
    if (x >= size) return `${plain(x / size)} ${name}`;
  return `${plain(x)} bytes`;
}

function timeText(s) {
  if (s >= 1) return `${plain(s)} s`;
  if (s >= 1e-3) return `${plain(s * 1e3)} ms`;
  return `${plain(s * 1e6)} µs`;
}

// An HTML element with style and text, put into `parent`.
function element(tag, style, parent, text) {
  const made = document.createElement(tag);
  Object.assign(made.style, style);
  if (text !== undefined) made.textContent = text;
  // JupyterLab takes arrow keys for itself unless the focused element says no
  if (["input", "select", "button"].includes(tag)) made.dataset.lmSuppressShortcuts = "true";
  parent?.appendChild(made);
  return made;
}

// An SVG element with attributes, put into `parent`.
function shape(tag, attributes, parent, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  parent?.appendChild(made);
  return made;
}

// A white card, so that pictures read alike on a light and a dark page; the finding above, the caption below.
function card(el, finding) {
  const box = element("div", {
    background: "white", color: LOOK.ink, fontFamily: "DejaVu Sans, Verdana, sans-serif", fontSize: "13px",
    padding: "10px 12px", maxWidth: "960px", boxSizing: "border-box", position: "relative",
  }, el);
  box.className = "minillm-card";
  const title = element("div", { fontWeight: "bold", fontSize: "16px", marginBottom: "6px" }, box, finding);
  return { box, title };
}

function captionLine(box, text) {
  return element("div", { color: LOOK.faint, fontSize: "12px", marginTop: "4px" }, box, text);
}

function button(parent, text, label, action) {
  const made = element("button", {
    font: "inherit", color: LOOK.ink, background: "#f3f3f3", border: "1px solid #b5b5b5", borderRadius: "4px",
    padding: "2px 9px", marginRight: "5px", cursor: "pointer",
  }, parent, text);
  made.title = label;
  made.setAttribute("aria-label", label);
  made.addEventListener("click", action);
  return made;
}

// Powers of ten between two numbers.
function decades(low, high) {
  const found = [];
  for (let e = Math.ceil(Math.log10(low) - 1e-9); e <= Math.floor(Math.log10(high) + 1e-9); e++) found.push(10 ** e);
  return found;
}

function roundTicks(low, high) { // 1, 2 and 5 times powers of ten, as viz/words.round_ticks
  const found = [];
  for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e++)
    for (const step of high < 1000 * low ? [1, 2, 5] : [1]) found.push(step * 10 ** e);
  return found.filter((v) => v >= low * (1 - 1e-9) && v <= high * (1 + 1e-9));
}

function niceStep(range, most) {
  const raw = range / most, size = 10 ** Math.floor(Math.log10(raw));
  return [1, 2, 5, 10].map((m) => m * size).find((step) => step >= raw);
}
