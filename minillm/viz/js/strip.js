// A strip of layers with the embedding before and the LM head after it, and cuts that are dragged, or moved by arrow keys.
// `moved(sizes)` is called whenever a cut has moved; every stage keeps a layer.

function cutStrip(box, first, ends, moved) {
  const W = 900, H = 64, END = 74, GAP = 6;
  const total = first.reduce((sum, size) => sum + size, 0), sizes = [...first];
  const cell = (W - 2 * (END + GAP)) / total, left = END + GAP;
  const shades = ["#cfe3f3", "#9cc9e8", "#cfe3f3", "#9cc9e8", "#cfe3f3", "#9cc9e8", "#cfe3f3", "#9cc9e8"];
  const svg = shape("svg", { viewBox: `0 0 ${W} ${H}`, width: "100%", style: "display:block;background:white;touch-action:none" }, box);
  svg.setAttribute("class", "minillm-strip");
  let dragged = -1;
  const label = (at, words, fill = LOOK.ink) => shape("text", { x: at, y: 58, fill, "font-size": 12.5, "text-anchor": "middle", "font-family": "DejaVu Sans, Verdana, sans-serif" }, svg, words);
  const upto = (n) => sizes.slice(0, n).reduce((sum, size) => sum + size, 0);

  function draw() {
    svg.replaceChildren();
    for (const [at, words] of [[0, ends[0]], [W - END, ends[1]]]) {
      shape("rect", { x: at, y: 10, width: END, height: 28, fill: "#f0e0bd", stroke: "white" }, svg);
      label(at + END / 2, words);
    }
    sizes.forEach((size, stage) => {
      for (let n = upto(stage); n < upto(stage + 1); n++)
        shape("rect", { x: left + n * cell, y: 10, width: cell, height: 28, fill: shades[stage % 8], stroke: "white" }, svg);
      const wide = size * cell > 70; // the number alone where there is no room for more
      label(left + (upto(stage) + size / 2) * cell, wide ? `rank ${stage}: ${size}` : String(size));
    });
    for (let cut = 1; cut < sizes.length; cut++) {
      const at = left + upto(cut) * cell;
      const handle = shape("g", { tabindex: 0, style: "cursor:ew-resize" }, svg);
      handle.dataset.lmSuppressShortcuts = "true";
      handle.setAttribute("aria-label", `cut ${cut}, after layer ${upto(cut)}`);
      shape("rect", { x: at - 9, y: 0, width: 18, height: 48, fill: "transparent" }, handle);
      shape("line", { x1: at, x2: at, y1: 2, y2: 46, stroke: LOOK.guess, "stroke-width": 4 }, handle);
      handle.addEventListener("pointerdown", (event) => { dragged = cut; svg.setPointerCapture(event.pointerId); });
      handle.addEventListener("keydown", (event) => {
        const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
        if (!by) return;
        event.preventDefault();
        put(cut, upto(cut) + by);
        svg.querySelectorAll("g")[cut - 1]?.focus();
      });
    }
  }

  function put(cut, place) { // between the cuts before and after, a layer from each
    const low = upto(cut - 1) + 1, high = upto(cut + 1) - 1;
    const to = Math.min(high, Math.max(low, Math.round(place))), by = to - upto(cut);
    if (!by) return;
    sizes[cut - 1] += by;
    sizes[cut] -= by;
    draw();
    moved([...sizes]);
  }
  svg.addEventListener("pointermove", (event) => {
    if (dragged < 0) return;
    const area = svg.getBoundingClientRect();
    put(dragged, (((event.clientX - area.left) / area.width) * W - left) / cell);
  });
  svg.addEventListener("pointerup", () => { dragged = -1; });
  draw();
}
