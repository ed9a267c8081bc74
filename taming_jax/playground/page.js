// The page of the playground. The server computes everything; see actions.py.

const token = new URLSearchParams(location.hash.slice(1)).get("token");
const $ = (selector, root = document) => root.querySelector(selector);
const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];

let run; // the description of the run
let sheet; // the tiles of the codes: {image, columns, count}
let usage; // the counts of the codes in the validation split, once they are known
let edited; // the picture whose codes are edited: {original, image, codes, first, cell}
let completing; // the picture to complete, as a data URL
const pictures = { sample: [], complete: [] }; // on this page, by section

// ---- Requests ----------------------------------------------------------------------------------

async function ask(action, values = {}) {
  const headers = { "Content-Type": "application/json", Authorization: `Bearer ${token}` };
  const options = { method: "POST", headers, body: JSON.stringify(values) };
  const response = await fetch(`api/${action}`, options).catch(() => {
    throw new Error("the playground cannot be reached; check that its command still runs.");
  });
  if (!response.ok) throw new Error(await response.text());
  return response.json();
}

let last = Promise.resolve();

/** Runs a task after those that were started before. Shows that it runs, and its error. */
function work(message, task) {
  last = last.then(async () => {
    const start = Date.now();
    const timer = setInterval(async () => {
      const { waiting } = await ask("queue").catch(() => ({ waiting: 0 }));
      const others = waiting > 1 ? ` Requests in the queue: ${waiting}.` : "";
      $("#status").textContent = `${message} ${Math.round((Date.now() - start) / 1000)} s.${others}`;
    }, 2000);
    $("#error").textContent = "";
    $("#status").textContent = message;
    try {
      await task();
    } catch (error) {
      $("#error").textContent = error.message[0].toUpperCase() + error.message.slice(1);
    }
    clearInterval(timer);
    $("#status").textContent = "";
  });
}

// ---- Elements ----------------------------------------------------------------------------------

function create(name, properties = {}, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
}

const button = (content, onclick, properties = {}) =>
  create("button", { type: "button", onclick, ...properties }, content);
const download = (name, url) => create("a", { href: url, download: name }, `Download ${name}`);

async function loadImage(url) {
  const image = Object.assign(new Image(), { src: url });
  await image.decode();
  return image;
}

function paint(canvas, image) {
  canvas.width = canvas.height = run.size;
  canvas.getContext("2d").drawImage(image, 0, 0);
}

function press(container, chosen) {
  for (const child of container.children) child.ariaPressed = child === chosen;
}

/** Makes one of the buttons in a container the tab stop. Arrow keys move between them. */
function enableArrowKeys(container) {
  container.onkeydown = (event) => {
    const cells = [...container.children];
    const columns = cells.filter((cell) => cell.offsetTop === cells[0].offsetTop).length;
    const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns };
    if (!(event.key in moves)) return;
    event.preventDefault();
    cells[cells.indexOf(event.target) + moves[event.key]]?.focus();
  };
  container.addEventListener("focusin", (event) => {
    for (const cell of container.children) cell.tabIndex = cell === event.target ? 0 : -1;
  });
}

/** Fills a container with a button per place in the grid of codes. */
function fillCells(container, make) {
  container.style.gridTemplateColumns = `repeat(${run.grid}, 1fr)`;
  const cells = Array.from({ length: run.grid ** 2 }, (_, i) =>
    make(Math.floor(i / run.grid), i % run.grid));
  cells.forEach((cell, i) => { cell.tabIndex = i ? -1 : 0; });
  container.replaceChildren(...cells);
}

/** Fills a container with a button per code, the most used ones first. */
function fillPalette(container, pick) {
  const codes = Array.from({ length: sheet.count }, (_, code) => code);
  if (usage) codes.sort((a, b) => usage.counts[b] - usage.counts[a]);
  const rows = Math.ceil(sheet.count / sheet.columns);
  const percent = (i, n) => `${n > 1 ? (100 * i) / (n - 1) : 0}%`;
  container.replaceChildren(...codes.map((code, i) => {
    const title = `code ${code}${usage ? `, ${usage.counts[code]} times in the validation split` : ""}`;
    const tile = button("", () => { press(container, tile); pick(code); }, { title });
    Object.assign(tile, { ariaLabel: title, tabIndex: i ? -1 : 0 });
    tile.style.backgroundSize = `${100 * sheet.columns}% ${100 * rows}%`;
    tile.style.backgroundPosition = `${percent(code % sheet.columns, sheet.columns)} ` +
      percent(Math.floor(code / sheet.columns), rows);
    return tile;
  }));
}

/** Shows texts with a button that copies them, and links that download files. */
function showTakeAway(container, texts, files) {
  const copies = Object.entries(texts).flatMap(([name, text]) => [
    create("pre", {}, text),
    button(`Copy the ${name}`, async () => {
      await navigator.clipboard.writeText(text);
      $("#status").textContent = "Copied.";
    }),
  ]);
  const links = Object.entries(files).flatMap(([name, url]) => [" ", download(name, url)]);
  container.replaceChildren(...copies, create("p", {}, ...links));
}

// ---- Drawn pictures ----------------------------------------------------------------------------

function drawTile(canvas, code, x, y) {
  const [context, side] = [canvas.getContext("2d"), run.factor];
  const [row, column] = [Math.floor(code / sheet.columns), code % sheet.columns];
  context.fillStyle = `hsl(${(code * 137) % 360} 50% 50%)`; // for codes without a tile
  context.fillRect(x, y, side, side);
  context.drawImage(sheet.image, column * side, row * side, side, side, x, y, side, side);
}

/** Shows the tiles of the codes in the order in which they were drawn, and then the pictures. */
async function play(shown, seconds) {
  const drawPass = (pass) => {
    for (const { canvas, codes, passes } of shown) {
      passes.forEach((row, i) => row.forEach((other, j) => {
        if (other === pass) drawTile(canvas, codes[i][j], j * run.factor, i * run.factor);
      }));
    }
  };
  const count = Math.max(...shown.flatMap(({ passes }) => passes.flat())) + 1;
  for (const { canvas } of shown) canvas.width = canvas.height = run.size; // clears it
  drawPass(-1); // the codes that were kept
  const start = performance.now();
  for (let pass = 0; pass < count;) {
    const share = (await new Promise(requestAnimationFrame) - start) / 1000 / seconds;
    for (; pass < count && pass < share * count; pass++) drawPass(pass);
  }
  for (const { canvas, loaded } of shown) paint(canvas, loaded);
}

/** Shows the pictures that an action returned, and what can be done with them. */
async function showPictures(section, result, files = {}) {
  const shown = pictures[section] = result.pictures;
  for (const picture of shown) {
    Object.assign(picture, { loaded: await loadImage(picture.image), canvas: create("canvas") });
  }
  const choice = create("p");
  const grid = create("div", { className: "pictures" }, ...shown.map((picture, i) => {
    const title = `${run.classes[picture.label] ?? "no class"}, picture ${i + 1}`;
    const choose = () => {
      press(grid, picture.canvas.parentElement);
      choice.replaceChildren(
        `Chosen: ${title}. `, button("Edit its codes", () => editCodes(picture)), " ",
        button("Complete it", () => startCompletion(picture.image)), " ",
        download("picture.png", picture.image),
      );
    };
    return button(picture.canvas, choose, { title, ariaLabel: title });
  }));
  const columns = Math.min(8, shown.length);
  const all = create("canvas", {
    width: columns * run.size, height: Math.ceil(shown.length / columns) * run.size,
  });
  shown.forEach(({ loaded }, i) => all.getContext("2d").drawImage(
    loaded, (i % columns) * run.size, Math.floor(i / columns) * run.size));
  const takeAway = create("div");
  showTakeAway(takeAway, { command: result.command, "notebook lines": result.python },
    { ...files, [`${section}.png`]: all.toDataURL() });
  const replay = button("Watch the codes again, slowly", () => play(shown, 5));
  $(`#${section} .results`).replaceChildren(grid, choice, replay, takeAway);
  play(shown, matchMedia("(prefers-reduced-motion: reduce)").matches ? 0 : 0.7);
}

// ---- Forms -------------------------------------------------------------------------------------

/** Adds the fields that both forms for drawing share, and what happens when they are sent. */
function prepareForm(form, firstClass, draw) {
  const options = run.trained.map((i) => create("option", { value: i }, run.classes[i]));
  if (firstClass) options.unshift(create("option", { value: "" }, firstClass));
  form.class.replaceChildren(...options);
  const seed = create("input", {
    name: "seed", type: "number", min: 0, max: 2 ** 32 - 1, value: 0, required: true,
  });
  const reseed = button("New seed", () => {
    seed.value = Math.floor(Math.random() * 2 ** 32);
    form.requestSubmit();
  });
  const fields = run.settings.map(({ name, value, choices }) => {
    let input = create("input", { name, type: "number", min: 0, step: "any" });
    if (name === "guidance_scale") {
      input = create("input", { name, className: "scales", pattern: "[0-9.]+( +[0-9.]+)?" });
      input.title = "one number, or two for the first and the last code";
    } else if (choices.length) {
      input = create("select", { name }, ...choices.map((x) => create("option", { value: x }, x)));
      input.value = value;
    }
    input.placeholder = [value ?? "all"].flat().join(" ");
    return create("label", {}, name.replace("top_", "top-").replaceAll("_", " "), input);
  });
  const submit = $("button:not([type])", form);
  submit.before(create("label", {}, "Seed", seed), create(
    "details", { className: "settings", open: innerWidth > 700 },
    create("summary", {}, "Decoding"), create("div", {}, ...fields)));
  submit.after(reseed);
  form.onsubmit = (event) => {
    event.preventDefault();
    work("Drawing.", () => draw(readForm(form)));
  };
}

function readForm(form) {
  const values = { seed: Number(form.seed.value), per_class: Number(form.per_class.value) };
  if (form.class.value !== "") values.classes = [Number(form.class.value)];
  for (const { name, value, choices } of run.settings) {
    const text = form.elements[name].value.trim();
    if (!text || text === value) continue; // the run's own setting
    const numbers = text.split(/ +/).map(Number);
    if (choices.length) values[name] = text;
    else values[name] = name === "guidance_scale" ? numbers : numbers[0];
  }
  return values;
}

/** Calls `use` with each file that is chosen in an input, as base64. */
function onFile(input, use) {
  input.onchange = () => work("Encoding the picture.", async () => {
    const file = input.files[0];
    if (file.size > 11 * 2 ** 20) throw new Error("the picture is larger than 11 MiB.");
    const reader = new FileReader();
    await new Promise((resolve) => {
      reader.onload = resolve;
      reader.readAsDataURL(file);
    });
    input.value = "";
    await use(reader.result.split(",")[1]);
  });
}

// ---- Reconstruct -------------------------------------------------------------------------------

async function reconstruct(picture) {
  const result = await ask("reconstruct", { picture });
  paint($("#error-map canvas"), await loadImage(result.error));
  $("#error-map figcaption").textContent =
    `error: PSNR ${result.psnr.toFixed(1)} dB, mean ${result.meanError.toFixed(3)}`;
  await showEdited({ ...result, first: result.codes });
  $("#error-map").hidden = false;
}

function editCodes({ codes, image }) {
  open("edit");
  work("Decoding.", async () =>
    showEdited({ ...(await ask("decode", { codes })), original: image, first: codes }));
}

async function showEdited(picture) {
  edited = picture;
  paint($("#original"), await loadImage(edited.original));
  $("#error-map").hidden = $("#replace").hidden = true;
  $("#edited").hidden = false;
  await showDecoded();
}

async function showDecoded() {
  paint($("#decoded"), await loadImage(edited.image));
  $("#codes").style.backgroundImage = `url(${edited.image})`;
  fillCells($("#codes"), (i, j) => {
    const code = edited.codes[i][j];
    const isChanged = code !== edited.first[i][j];
    const title = `row ${i + 1}, column ${j + 1}: code ${code}${isChanged ? ", changed" : ""}`;
    const cell = button(run.grid > 16 ? "" : code, () => {
      edited.cell = [i, j];
      press($("#codes"), cell);
      $("#replace").hidden = false;
      $("#chosen").textContent = `Chosen: ${title}. Choose its new code.`;
    }, { title, ariaLabel: title, className: isChanged ? "changed" : "" });
    cell.ariaPressed = edited.cell?.join() === `${i},${j}`;
    return cell;
  });
  showTakeAway($("#edited .take-away"), { "notebook lines": edited.python },
    { "picture.png": edited.original, "decoded.png": edited.image });
}

function decodeCodes(codes) {
  work("Decoding.", async () => {
    Object.assign(edited, await ask("decode", { codes }));
    await showDecoded();
  });
}

function replaceCode(code) {
  const codes = structuredClone(edited.codes);
  const [i, j] = edited.cell;
  codes[i][j] = code;
  decodeCodes(codes);
  $("#chosen").textContent = `Row ${i + 1}, column ${j + 1} now holds code ${code}.`;
}

/** Lets people draw on the board with a pointer. */
function enableDrawing() {
  const [pad, isGray] = [$("#pad"), run.channels === 1];
  const context = pad.getContext("2d");
  $("#color").value = isGray ? "#ffffff" : "#204080";
  $("#clear").onclick = () => {
    context.fillStyle = isGray ? "#000" : "#fff";
    context.fillRect(0, 0, pad.width, pad.height);
  };
  $("#clear").click();
  $("#use").onclick = () =>
    work("Encoding the drawing.", () => reconstruct(pad.toDataURL().split(",")[1]));
  let from;
  pad.onpointerdown = pad.onpointermove = (event) => {
    if (!event.buttons) return;
    const to = [event.offsetX, event.offsetY].map((x) => (x * pad.width) / pad.clientWidth);
    Object.assign(context, { lineWidth: $("#brush").value, strokeStyle: $("#color").value });
    context.lineCap = "round";
    context.beginPath();
    context.moveTo(...(event.type === "pointermove" && from ? from : to));
    context.lineTo(...to);
    context.stroke();
    from = to;
  };
}

// ---- Complete ----------------------------------------------------------------------------------

// Whether the code in row i and column j is drawn anew; `before` is whether it was until now.
const SHAPES = {
  "Lower half": (i) => i >= run.grid / 2,
  "Right half": (i, j) => j >= run.grid / 2,
  Hole: (i, j) => [i, j].every((x) => Math.abs(x - (run.grid - 1) / 2) < run.grid / 4),
  Invert: (i, j, before) => !before,
};

function fillMask(shape) {
  const before = $$("#mask button").map((cell) => cell.ariaPressed === "true");
  fillCells($("#mask"), (i, j) => {
    const toggle = (event) => { // the pointer paints instead
      if (!event.detail) event.target.ariaPressed = event.target.ariaPressed !== "true";
    };
    const cell = button("", toggle, { ariaLabel: `row ${i + 1}, column ${j + 1}: draw anew` });
    cell.ariaPressed = shape(i, j, before[i * run.grid + j]);
    return cell;
  });
}

function enableMaskPainting() {
  const mask = $("#mask");
  let value;
  mask.onpointerdown = mask.onpointermove = (event) => {
    const cell = document.elementFromPoint(event.clientX, event.clientY);
    if (!event.buttons || cell?.parentElement !== mask) return;
    if (event.type === "pointerdown") value = cell.ariaPressed !== "true";
    cell.ariaPressed = value;
  };
}

function startCompletion(url) {
  completing = url;
  $("#mask").style.backgroundImage = `url(${url})`;
  open("complete");
}

async function complete(values) {
  if (!completing) throw new Error("choose a picture first.");
  const cells = $$("#mask button").map((cell) => cell.ariaPressed !== "true");
  const keep = Array.from({ length: run.grid }, (_, i) =>
    cells.slice(i * run.grid, (i + 1) * run.grid));
  const result = await ask("complete", { ...values, picture: completing.split(",")[1], keep });
  await showPictures("complete", result, { "picture.png": result.original, "mask.png": result.mask });
}

// ---- Codebook and evaluation -------------------------------------------------------------------

async function countCodes() {
  if (usage) return;
  try {
    usage = await ask("usage");
    const used = usage.counts.filter((count) => count).length;
    $("#usage").textContent = `The ${usage.images} images of the validation split use ${used} of ` +
      `the ${run.codes} codes; the most used ones come first.`;
  } catch (error) { // the data may be elsewhere
    $("#usage").textContent = `How often codes are used is not known: ${error.message}`;
  }
  fillPalette($("#codebook .palette"), (code) => work("", () => showPlaces(code)));
}

/** Shows where a code occurs in the pictures on this page. */
async function showPlaces(code) {
  const shown = [...pictures.sample, ...pictures.complete, ...(edited ? [edited] : [])];
  const holders = shown.filter(({ codes }) => codes.flat().includes(code));
  const total = usage?.counts.reduce((a, b) => a + b);
  const share = usage ? ` is ${((100 * usage.counts[code]) / total).toFixed(2)}% of the codes of ` +
    "the validation split. It" : "";
  $("#code").textContent =
    `Code ${code}${share} occurs in ${holders.length} of the ${shown.length} pictures on this page.`;
  const zoom = Math.ceil(224 / run.size);
  const [size, side] = [run.size * zoom, run.factor * zoom];
  $("#places").replaceChildren(...await Promise.all(holders.map(async ({ image, codes }) => {
    const canvas = create("canvas", { width: size, height: size });
    const context = canvas.getContext("2d");
    Object.assign(context, { imageSmoothingEnabled: false, strokeStyle: "#ff6a1a", lineWidth: 4 });
    context.drawImage(await loadImage(image), 0, 0, size, size);
    codes.forEach((row, i) => row.forEach((other, j) => {
      if (other === code) context.strokeRect(j * side + 2, i * side + 2, side - 4, side - 4);
    }));
    return canvas;
  })));
}

async function showReport() {
  const { problem, metrics, protocol, command, figures } = await ask("report");
  $("#problem").textContent = problem && `No metrics describe these weights, since ${problem}. ` +
    `Measure them with: ${command}`;
  $("#evaluate tbody").replaceChildren(...metrics.map((row) =>
    create("tr", {}, ...row.map((text) => create("td", {}, text)))));
  $("#evaluate dl").replaceChildren(...protocol.flatMap(([name, value]) =>
    [create("dt", {}, name), create("dd", {}, value)]));
  $("#evaluate table").hidden = $("#evaluate details").hidden = !metrics.length;
  $("#figures").replaceChildren(...figures.flatMap(([name, url]) => {
    const title = name.replaceAll("_", " ");
    return [create("h2", {}, title), create("img", { src: url, alt: `Figure: ${title}` })];
  }));
}

// ---- Start -------------------------------------------------------------------------------------

function open(section) {
  for (const element of $$("main > section")) element.hidden = element.id !== section;
  for (const tab of $$("nav button")) tab.ariaCurrent = tab.dataset.section === section ? "page" : null;
  if (section === "codebook") work("Counting the codes of the validation split.", countCodes);
  if (section === "evaluate") work("Reading the report.", showReport);
}

async function start() {
  run = await ask("describe");
  $("#name").textContent = document.title = run.name;
  $("#model").textContent = run.model;
  document.body.classList.toggle("smooth", run.size >= 64);
  sheet = await ask("codebook");
  document.body.style.setProperty("--sheet", `url(${sheet.sheet})`);
  sheet.image = await loadImage(sheet.sheet);
  for (const tab of $$("nav button")) tab.onclick = () => open(tab.dataset.section);
  for (const container of $$(".cells, .palette")) enableArrowKeys(container);
  enableDrawing();
  onFile($("#edit [name=file]"), reconstruct);
  fillPalette($("#replace .palette"), replaceCode);
  $("#undo").onclick = () => decodeCodes(edited.first);
  $("#to-complete").onclick = () => startCompletion(edited.original);
  if (!run.settings) { // without a prior
    for (const tab of $$("[data-section=sample], [data-section=complete], #to-complete")) tab.hidden = true;
    open("edit");
    return;
  }
  prepareForm($("#sample form"), "every class", async (values) =>
    showPictures("sample", await ask("sample", values)));
  prepareForm($("#complete form"), run.needsClass ? null : "no class", complete);
  $("#sample form").class.value = run.trained[0];
  $("#limits").textContent = run.limits;
  fillMask(SHAPES["Lower half"]);
  $("#shapes").append(...Object.entries(SHAPES).flatMap(([name, shape]) =>
    [button(name, () => fillMask(shape)), " "]));
  enableMaskPainting();
  onFile($("#complete [name=file]"), async (picture) =>
    startCompletion((await ask("reconstruct", { picture })).original));
  open("sample");
  $("#sample form").requestSubmit();
}

work("Loading the run and its codebook.", start);
