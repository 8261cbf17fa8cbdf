// Controls, and a picture that the kernel draws again when one of them moves. While it draws, later moves wait for it:
// only the last one is sent.

function render({ model, el }) {
  const { box, title } = card(el, model.get("question"));
  const bar = element("div", { display: "flex", flexWrap: "wrap", gap: "6px 22px", marginBottom: "6px" }, box);
  const problem = element("div", { color: LOOK.culprit, fontWeight: "bold" }, box);
  const image = element("img", { maxWidth: "100%", display: "block" }, box);
  image.alt = model.get("question");
  const values = { ...model.get("first") };
  let busy = false, again = false;

  function send() {
    if (busy) { again = true; return; }
    busy = true;
    model.set("asked", { number: model.get("drawn") + 1, values: { ...values } }); // never equal to the last one
    model.save_changes();
  }
  const strip = model.get("strip");
  if (strip.sizes) {
    const place = element("div", { marginBottom: "4px" });
    box.insertBefore(place, bar);
    cutStrip(place, strip.sizes, strip.ends, (sizes) => { values.sizes = sizes; send(); });
  }
  for (const [name, choices] of Object.entries(model.get("controls"))) {
    const line = element("label", { display: "flex", alignItems: "center", gap: "6px" }, bar, name);
    if (typeof choices === "string") {
      line.style.flex = "1 1 100%";
      const words = element("input", { font: "inherit", flex: "1", maxWidth: "700px", padding: "1px 5px" }, line);
      Object.assign(words, { type: "text", value: values[name], maxLength: 400 });
      words.addEventListener("input", () => { values[name] = words.value; send(); });
      words.addEventListener("keydown", (event) => event.stopPropagation()); // the notebook has commands of one key
      continue;
    }
    const numbers = choices.every((choice) => typeof choice === "number");
    if (numbers) {
      const range = element("input", { width: "150px" }, line);
      Object.assign(range, { type: "range", min: 0, max: choices.length - 1, step: 1, value: choices.indexOf(values[name]) });
      const shown = element("b", { minWidth: "40px" }, line, plain(values[name]));
      range.addEventListener("input", () => { values[name] = choices[+range.value]; shown.textContent = plain(values[name]); send(); });
    } else {
      const select = element("select", { font: "inherit" }, line);
      choices.forEach((choice) => element("option", {}, select, String(choice)));
      select.selectedIndex = choices.indexOf(values[name]);
      select.addEventListener("change", () => { values[name] = choices[select.selectedIndex]; send(); });
    }
  }
  function draw() {
    title.textContent = model.get("question");
    const picture = model.get("picture");
    image.style.visibility = picture ? "visible" : "hidden"; // its place stays, so that nothing jumps
    if (picture) image.src = `data:image/png;base64,${picture}`;
    problem.textContent = model.get("problem");
    busy = false;
    if (again) { again = false; send(); }
  }
  model.on("change:drawn", draw);
  draw();
}
export default { render };
