// The ring board: a row of chunks for each rank, each with a stripe for every rank whose numbers are in. Click a chunk, then
// the same chunk of another rank: it is sent there, and added, or takes the place of what is part of it.

function render({ model, el }) {
  const n = model.get("ranks"), colours = model.get("colours");
  const { box } = card(el, "Let every rank have the sum of all numbers");
  const W = 900, LEFT = 74, TOP = 28, CELL = Math.min(130, 520 / n), ROW = 46, GAP = 8, H = TOP + n * ROW + 16, BAR = LEFT + n * CELL + 30;
  const svg = shape("svg", { viewBox: `0 0 ${W} ${H}`, width: "100%", style: "display:block;background:white" }, box);
  svg.setAttribute("class", "minillm-ringboard");
  const line = element("div", { marginTop: "4px", display: "flex", alignItems: "center", flexWrap: "wrap", gap: "6px" }, box);
  const said = element("div", { marginTop: "6px", minHeight: "36px" }, box);
  said.setAttribute("aria-live", "polite");
  let chosen = null, words = "Click a chunk, then the same chunk of another rank.";
  const text = (x, y, what, fill = LOOK.ink, anchor = "middle", size = 12.5) => shape("text", { x, y, fill, "font-size": size, "text-anchor": anchor, "font-family": "DejaVu Sans, Verdana, sans-serif" }, svg, what);

  function play(moves) { // whose numbers are in each chunk, as bits; how many chunks each rank has sent
    const held = [...Array(n)].map((_, rank) => Array(n).fill(1 << rank)), sent = Array(n).fill(0);
    for (const [from, to, chunk] of moves) { held[to][chunk] |= held[from][chunk]; sent[from]++; }
    return { held, sent };
  }
  const ring = [];
  for (let half = 0; half < 2; half++)
    for (let step = 0; step < n - 1; step++)
      ring.push([...Array(n)].map((_, rank) => [rank, (rank + 1) % n, (rank + half - step + 2 * n) % n]));
  const ranksIn = (bits) => [...Array(n).keys()].filter((rank) => bits & (1 << rank));
  const done = (held) => held.every((row) => row.every((bits) => bits === (1 << n) - 1));

  function send(from, to, chunk) {
    const { held } = play(model.get("moves")), coming = held[from][chunk], there = held[to][chunk];
    if ((coming | there) === there) words = `rank ${to} has all of that already: nothing to send`;
    else if (coming & there && (coming | there) !== coming) words = `Not so: rank ${ranksIn(coming & there)[0]}'s numbers would count twice in chunk ${chunk} of rank ${to}.`;
    else {
      words = `rank ${from} sends chunk ${chunk} to rank ${to}, ` + (coming & there ? "which takes it in place of its own" : "which adds it");
      moved([...model.get("moves"), [from, to, chunk]]);
    }
  }
  function moved(moves) { model.set("moves", moves); model.save_changes(); }

  function click(rank, chunk) {
    if (chosen === null || chosen[1] !== chunk) { chosen = [rank, chunk]; words = `chunk ${chunk} of rank ${rank}: to which rank?`; }
    else if (chosen[0] === rank) { chosen = null; words = "Click a chunk, then the same chunk of another rank."; }
    else { const [from] = chosen; chosen = null; send(from, rank, chunk); }
    draw();
  }

  function draw() {
    const { held, sent } = play(model.get("moves")), goal = (2 * (n - 1)) / n, most = Math.max(...sent) / n;
    const focused = svg.contains(document.activeElement) ? [...svg.querySelectorAll("g")].indexOf(document.activeElement) : -1;
    svg.replaceChildren();
    for (let chunk = 0; chunk < n; chunk++) text(LEFT + (chunk + 0.5) * CELL - GAP / 2, 18, `chunk ${chunk}`);
    text(BAR, 18, "sent, in times its numbers", LOOK.ink, "start");
    for (let rank = 0; rank < n; rank++) {
      const y = TOP + rank * ROW;
      shape("rect", { x: 8, y: y + 9, width: 12, height: 18, fill: colours[rank] }, svg);
      text(26, y + 23, `rank ${rank}`, LOOK.ink, "start");
      for (let chunk = 0; chunk < n; chunk++) {
        const x = LEFT + chunk * CELL, wide = CELL - GAP, bits = held[rank][chunk], whole = bits === (1 << n) - 1;
        const cell = shape("g", { tabindex: 0, style: "cursor:pointer", role: "button" }, svg);
        cell.dataset.lmSuppressShortcuts = "true";
        cell.setAttribute("aria-label", `rank ${rank}, chunk ${chunk}: of ${ranksIn(bits).map((each) => `rank ${each}`).join(", ")}`);
        shape("rect", { x, y, width: wide, height: ROW - GAP, fill: "#f4f4f4" }, cell);
        for (const other of ranksIn(bits)) shape("rect", { x: x + (other * wide) / n, y, width: wide / n, height: ROW - GAP, fill: colours[other] }, cell);
        const picked = chosen && chosen[0] === rank && chosen[1] === chunk;
        shape("rect", { x, y, width: wide, height: ROW - GAP, fill: "none", stroke: picked ? LOOK.guess : whole ? LOOK.ink : "#b5b5b5", "stroke-width": picked ? 4 : whole ? 2.5 : 1 }, cell);
        if (whole) { shape("circle", { cx: x + wide / 2, cy: y + (ROW - GAP) / 2, r: 11, fill: "white" }, cell); text(x + wide / 2, y + (ROW - GAP) / 2 + 5, "Σ", LOOK.ink, "middle", 15).setAttribute("pointer-events", "none"); }
        cell.addEventListener("click", () => click(rank, chunk));
        cell.addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); click(rank, chunk); } });
      }
      const scale = (W - BAR - 60) / Math.max(goal * 1.5, most);
      shape("rect", { x: BAR, y: y + 6, width: Math.max(0.5, (sent[rank] / n) * scale), height: ROW - GAP - 12, fill: LOOK.faint }, svg);
      text(BAR + (sent[rank] / n) * scale + 6, y + 23, plain(sent[rank] / n), LOOK.ink, "start");
    }
    if (focused >= 0) svg.querySelectorAll("g")[focused]?.focus();
    const finished = done(held);
    said.textContent = finished
      ? `Everybody has every sum. The most that one rank sent: ${plain(most)} times its numbers; ` + (most <= goal + 1e-9 ? "nobody can do with less." : "it can be done with less.")
      : words;
    said.style.fontWeight = finished ? "bold" : "normal";
  }

  function nextOfRing() { // the next step of the ring's way, from its last whole step on
    const moves = model.get("moves"), whole = Math.floor(moves.length / n);
    const along = moves.length === whole * n && JSON.stringify(moves) === JSON.stringify(ring.slice(0, whole).flat());
    const step = along && whole < ring.length ? whole : 0;
    chosen = null;
    const anew = step === 0 && moves.length ? "The ring starts anew. " : "";
    words = anew + (step < n - 1 ? `Step ${step + 1} of the ring: each sends a chunk to the right, where it is added.` : `Step ${step + 1}: each sends a sum to the right.`);
    moved([...(step ? moves : []), ...ring[step]]);
  }
  button(line, "undo", "take the last send back", () => { chosen = null; words = "Taken back."; moved(model.get("moves").slice(0, -1)); });
  button(line, "start again", "clear the board", () => { chosen = null; words = "Click a chunk, then the same chunk of another rank."; moved([]); });
  button(line, "the ring's next step", "let all ranks send as the ring does", nextOfRing);
  model.on("change:moves", draw);
  draw();
}
export default { render };
