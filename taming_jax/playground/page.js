// The page of the playground. The server computes everything; see actions.py.

const token = new URLSearchParams(location.hash.slice(1)).get("token");
onhashchange = () => location.reload();
const $ = (selector, root = document) => root.querySelector(selector);
const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];

let run; // the description of the run
let sheet; // the tiles of the codes: {image, columns, count, total}
let usage; // the counts of the codes in the validation split, or null if they are not known
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
      const seconds = Math.round((Date.now() - start) / 1000);
      if (!isDone) $("#progress").textContent = `${seconds} s.${others}`;
    }, 2000);
    let isDone = false;
    $("#error").textContent = "";
    $("#status").textContent = message;
    try {
      await task();
    } catch ({ message }) {
      $("#error").textContent = message.charAt(0).toUpperCase() + message.slice(1);
    }
    isDone = true;
    clearInterval(timer);
    $("#status").textContent = $("#progress").textContent = "";
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
  const stop = [...container.children].findIndex((cell) => cell.tabIndex === 0);
  cells.forEach((cell, i) => { cell.tabIndex = i === Math.max(stop, 0) ? 0 : -1; });
  container.replaceChildren(...cells);
}

/** Reads the next tiles of the codes, until all of them are there. */
async function loadTiles() {
  const next = await ask("codebook");
  sheet = { ...next, image: await loadImage(next.sheet) };
  document.body.style.setProperty("--sheet", `url(${sheet.sheet})`);
  fillPalettes();
  if (sheet.count < sheet.total) work("Decoding the codebook.", loadTiles);
}

function fillPalettes() {
  fillPalette($("#replace .palette"), replaceCode);
  fillPalette($("#codebook .palette"), (code) => work("", () => showPlaces(code)));
}

/** Fills a container with a button per code, the most used ones first. */
function fillPalette(container, pick) {
  const codes = Array.from({ length: sheet.count }, (_, code) => code);
  if (usage) codes.sort((a, b) => usage.counts[b] - usage.counts[a]);
  container.replaceChildren(...codes.map((code, i) => {
    const title = `code ${code}${usage ? `, ${usage.counts[code]} times in the validation split` : ""}`;
    const tile = button("", () => { press(container, tile); pick(code); }, { title });
    Object.assign(tile, { ariaLabel: title, tabIndex: i ? -1 : 0 });
    const [row, column] = [Math.floor(code / sheet.columns), code % sheet.columns];
    tile.style.background = `var(--sheet) ${-2 * column}rem ${-2 * row}rem / ${2 * sheet.columns}rem`;
    return tile;
  }));
}

/** Shows texts with a button that copies them, and links that download files. */
function showTakeAway(container, texts, files) {
  const copies = Object.entries(texts).flatMap(([name, text]) => [
    create("pre", {}, text),
    button(`Copy the ${name}`, async (event) => {
      getSelection().selectAllChildren(event.target.previousElementSibling);
      // There is no clipboard on pages of other computers without https.
      await navigator.clipboard?.writeText(text);
      $("#status").textContent = navigator.clipboard ? `Copied the ${name}.` : "Selected.";
    }),
  ]);
  const links = Object.entries(files).flatMap(([name, url]) => [" ", download(name, url)]);
  container.replaceChildren(...copies, create("p", {}, ...links));
}

// ---- Drawn pictures ----------------------------------------------------------------------------

function drawTile(canvas, code, x, y) {
  const [context, side] = [canvas.getContext("2d"), run.factor];
  const [row, column] = [Math.floor(code / sheet.columns), code % sheet.columns];
  context.drawImage(sheet.image, column * side, row * side, side, side, x, y, side, side);
}

let plays = 0;

/** Shows the tiles of the codes in the order in which they were drawn, and then the pictures. */
async function play(shown, seconds) {
  const number = ++plays; // a later one ends this one
  const drawPass = (pass) => {
    for (const { canvas, codes, passes } of shown) {
      passes.forEach((row, i) => row.forEach((other, j) => {
        if (other === pass) drawTile(canvas, codes[i][j], j * run.factor, i * run.factor);
      }));
    }
  };
  const all = shown.flatMap(({ passes }) => passes.flat());
  const count = all.reduce((a, b) => Math.max(a, b)) + 1;
  for (const { canvas } of shown) canvas.width = canvas.height = run.size; // clears it
  drawPass(-1); // the codes that were kept
  const start = performance.now();
  for (let pass = 0; pass < count;) {
    const share = (await new Promise(requestAnimationFrame) - start) / 1000 / seconds;
    if (number !== plays) break;
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
  const choice = create("p", {}, "Choose a picture to edit its codes, to complete or to download it.");
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
  const takeAway = create("div");
  showTakeAway(takeAway, { command: result.command, "notebook lines": result.python },
    { ...files, [`${section}.png`]: result.sheet });
  const replay = button("Watch the codes again, slowly", () => play(shown, 5));
  $(`#${section} .results`).replaceChildren(grid, choice, replay, takeAway);
  play(shown, matchMedia("(prefers-reduced-motion: reduce)").matches ? 0 : 0.5);
}

// ---- Forms -------------------------------------------------------------------------------------

/** Adds the fields that both forms for drawing share, and what happens when they are sent. */
function prepareForm(form, firstClass, draw) {
  const options = run.trained.map((i) => create("option", { value: i }, run.classes[i]));
  if (firstClass) options.unshift(create("option", { value: "" }, firstClass));
  form.class.replaceChildren(...options);
  form.per_class.max = run.maxImages;
  const seed = create("input", {
    name: "seed", type: "number", min: 0, max: 2 ** 32 - 1, value: 0, required: true,
  });
  const reseed = button("New seed", () => {
    seed.value = Math.floor(Math.random() * 2 ** 32);
    form.requestSubmit();
  });
  const fields = run.settings.map(([name, value, choices]) => {
    let input = create("input", { name, type: "number", min: 0, step: "any" });
    if (name === "guidance_scale") {
      input = create("input", { name, className: "scales", pattern: "[0-9.]+( +[0-9.]+)?" });
      input.title = "one number, or two for the first and the last code";
    } else if (choices.length) {
      input = create("select", { name }, ...choices.map((x) => create("option", { value: x }, x)));
      input.value = value;
    }
    input.placeholder = [value ?? (name === "guidance_scale" ? 1 : "all")].flat().join(" ");
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
  for (const [name, value, choices] of run.settings) {
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
  input.onclick = () => { input.value = ""; }; // so that the same file can be chosen again
  input.onchange = () => {
    const file = input.files[0];
    if (file) work("Encoding the picture.", async () => {
      if (file.size > 11 * 2 ** 20) throw new Error("the picture is larger than 11 MiB.");
      const reader = new FileReader();
      await new Promise((resolve) => {
        reader.onloadend = resolve;
        reader.readAsDataURL(file);
      });
      if (!reader.result) throw new Error("the file cannot be read.");
      await use(reader.result.split(",")[1]);
    });
  };
}

// ---- Reconstruct -------------------------------------------------------------------------------

async function reconstruct(picture) {
  const result = await ask("reconstruct", { picture });
  paint($("#error-map canvas"), await loadImage(result.error));
  $("#error-map figcaption").textContent =
    `absolute error: mean ${result.meanError.toFixed(3)} of 1, PSNR ${result.psnr.toFixed(1)} dB`;
  await showEdited({ ...result, first: result.codes });
  $("#error-map").hidden = false;
}

function editCodes({ codes, image }) {
  open("edit", true);
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

function changeCodes(change) {
  work("Decoding.", async () => {
    Object.assign(edited, await ask("decode", { codes: change(structuredClone(edited.codes)) }));
    $("#error-map").hidden = true; // it is that of the first codes
    await showDecoded();
  });
}

function replaceCode(code) {
  const [i, j] = edited.cell;
  changeCodes((codes) => {
    codes[i][j] = code;
    return codes;
  });
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
  let from; // the last point of a line
  pad.onpointerleave = () => { from = null; };
  pad.onpointerdown = pad.onpointermove = (event) => {
    if (event.buttons !== 1) return;
    const to = [event.offsetX, event.offsetY].map((x) => (x * pad.width) / pad.clientWidth);
    Object.assign(context, { lineWidth: 22, lineCap: "round", strokeStyle: $("#color").value });
    context.beginPath();
    context.moveTo(...(event.type === "pointermove" && from ? from : to));
    context.lineTo(...to);
    context.stroke();
    from = to;
  };
}

// ---- Complete ----------------------------------------------------------------------------------

// Whether the code in row i and column j is redrawn; `before` is whether it was until now.
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
    const cell = button("", toggle, { ariaLabel: `row ${i + 1}, column ${j + 1}: redraw` });
    cell.ariaPressed = shape(i, j, before[i * run.grid + j]);
    return cell;
  });
}

function enableMaskPainting() {
  const mask = $("#mask");
  let value = null; // of the codes that are painted, or null
  addEventListener("pointerup", () => { value = null; });
  mask.onpointerdown = mask.onpointermove = (event) => {
    const cell = document.elementFromPoint(event.clientX, event.clientY);
    if (event.buttons !== 1 || cell?.parentElement !== mask) return;
    if (event.type === "pointerdown") value = cell.ariaPressed !== "true";
    if (value !== null) cell.ariaPressed = value;
  };
}

function startCompletion(url) {
  completing = url;
  $("#mask").style.backgroundImage = `url(${url})`;
  open("complete", true);
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
  if (usage !== undefined) return;
  try {
    usage = await ask("usage");
    const used = usage.counts.filter((count) => count).length;
    $("#usage").textContent = `The ${usage.images} images of the validation split use ${used} of ` +
      `the ${run.codes} codes; the most used ones come first.`;
  } catch (error) { // the data may be elsewhere
    usage = null;
    $("#usage").textContent = `How often codes are used is not known: ${error.message}`;
  }
  fillPalettes();
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
    const canvas = create("canvas", { width: size, height: size, role: "img", ariaLabel: "" });
    const context = canvas.getContext("2d");
    Object.assign(context, { imageSmoothingEnabled: false, strokeStyle: "#ff6a1a", lineWidth: 4 });
    context.drawImage(await loadImage(image), 0, 0, size, size);
    codes.forEach((row, i) => row.forEach((other, j) => {
      if (other !== code) return;
      context.strokeRect(j * side + 2, i * side + 2, side - 4, side - 4);
      canvas.ariaLabel += `row ${i + 1}, column ${j + 1}; `;
    }));
    return canvas;
  })));
}

async function showReport() {
  const { problem, report, command, figures } = await ask("report");
  $("#problem").textContent = problem && `No metrics describe these weights, since ${problem}. ` +
    `Measure them with: ${command}`;
  $("#report").textContent = report;
  $("#report").hidden = !report;
  $("#figures").replaceChildren(...figures.flatMap(([name, url]) => {
    const title = name.replaceAll("_", " ");
    return [create("h2", {}, title), create("img", { src: url, alt: `Figure: ${title}` })];
  }));
}

// ---- Start -------------------------------------------------------------------------------------

function open(section, hasFocus) {
  for (const element of $$("main > section")) element.hidden = element.id !== section;
  const { ariaLabel } = $(`#${section}`);
  for (const tab of $$("nav button")) tab.ariaCurrent = tab.textContent === ariaLabel ? "page" : null;
  if (hasFocus) $(`#${section}`).focus();
  if (section === "codebook") work("Counting the codes of the validation split.", countCodes);
  if (section === "evaluate") work("Reading the report.", showReport);
}

async function start() {
  run = await ask("describe");
  addEventListener("invalid", ({ target }) => {
    $("#error").textContent = "";
    target.closest("details")?.setAttribute("open", ""); // so that the browser can show the field
  }, true);
  $("#name").textContent = document.title = run.name;
  $("#model").textContent = run.model;
  document.body.classList.toggle("smooth", run.size >= 64);
  await loadTiles();
  $("main").hidden = false;
  const sections = $$("main > section").filter(({ dataset }) => run.settings || !dataset.prior);
  $("nav").append(...sections.map(({ id, ariaLabel }) => button(ariaLabel, () => open(id))));
  for (const container of $$(".cells, .palette")) enableArrowKeys(container);
  enableDrawing();
  onFile($("#edit [name=file]"), reconstruct);
  $("#undo").onclick = () => changeCodes(() => edited.first);
  $("#to-complete").onclick = () => startCompletion(edited.image);
  $("#to-complete").hidden = !run.settings;
  if (!run.settings) return open("edit");
  prepareForm($("#sample form"), null, async (values) =>
    showPictures("sample", await ask("sample", values)));
  prepareForm($("#complete form"), run.needsClass ? null : "no class", complete);
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
