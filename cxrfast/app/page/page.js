// The page: reads what the user does, asks one question at a time, and shows what is known.

import { add, ask, bytes, films, mapKey, nextTask, remove, sentence, use } from "./films.js";
import { element, probability, remarks, table, verdictOf } from "./findings.js";
import { clear, drawFilm, drawHeat, drawLegend, strongest, zoomBy } from "./viewer.js";

const $ = (id) => document.getElementById(id);

let model = null;
let chosen = null; // the film looked at
let finding = 0;
let is_own_choice = false; // of the finding: until then, the likeliest one of the film is shown
let is_asking = false;
let shown = null; // the picture in the canvas

const scale = () => model.scales[Number($("scale").value)];
const opacity = () => Number($("opacity").value);

// Questions

async function work() {
  if (is_asking || !model) return;
  const task = nextTask(chosen, finding, scale(), model.scales, opacity() > 0);
  if (!task) {
    showProgress();
    return;
  }
  is_asking = true;
  if (task.question === "scores") task.film.state = "working";
  showList();
  showProgress();
  showSays();
  try {
    keep(task, await ask(task, model.film_bytes));
  } catch (error) {
    if (task.question === "map") task.film.maps.set(mapKey(task.finding, task.scale), { error: error.message });
    else Object.assign(task.film, { state: "error", error: error.message, scores: null, pictures: null });
  }
  is_asking = false;
  if (task.film === chosen) show();
  showList();
  work();
}

function keep({ film, question, finding, scale }, found) {
  if (film.state === "removed") return;
  if (question === "scores") {
    Object.assign(film, { scores: found, state: "done" });
    if (film === chosen) chooseLikeliest();
  } else if (question === "pictures") {
    const pictures = found.pictures.map((one) => new Blob([bytes(one)], { type: "image/jpeg" }));
    film.pictures = { ...found, pictures };
  } else {
    film.maps.set(mapKey(finding, scale), found.undefined ? found : { ...found, values: bytes(found.values) });
  }
}

// What is shown

function chooseLikeliest() {
  if (is_own_choice || !chosen?.scores) return;
  const rank = (one) => (verdictOf(one) === "positive" ? 1 : 0) + ((one.ensemble ?? one.scales[0]).p ?? 0);
  const ranks = chosen.scores.findings.map(rank);
  finding = ranks.indexOf(Math.max(...ranks));
}

function choose(film) {
  chosen = film;
  if (film) use(film);
  chooseLikeliest();
  shown = null;
  zoomBy(0);
  show();
  showList();
  work();
}

function show() {
  const has_error = Boolean(chosen?.error);
  $("view-title").textContent = chosen ? chosen.name : "No film yet";
  $("notice").hidden = !has_error;
  $("notice").textContent = has_error ? chosen.error : "";
  $("hint").textContent = !chosen ? "Choose a film to see what each resolution makes of it." : has_error ? "This film cannot be shown." : "Reading the film…";
  const scores = chosen?.scores;
  $("no-scores").hidden = Boolean(scores);
  $("no-scores").textContent = !chosen || has_error ? "Probabilities appear here." : "Computing probabilities…";
  $("remarks").replaceChildren(...(scores ? remarks(scores) : []));
  $("table").hidden = !scores;
  $("rule").hidden = !scores;
  const focused = document.activeElement?.dataset?.finding;
  $("table").replaceChildren(...(scores ? [table(model, scores, finding, Number($("scale").value), chooseFinding)] : []));
  if (focused !== undefined) $("table").querySelector(`[data-finding="${focused}"]`)?.focus();
  showFilm();
}

function showFilm() {
  const pictures = chosen?.pictures;
  $("controls").hidden = !pictures;
  if (!pictures) {
    shown = null;
    clear();
    return;
  }
  const n = $("coarse").checked ? Number($("scale").value) : model.scales.length - 1;
  const picture = pictures.pictures[n];
  if (picture !== shown) {
    shown = picture;
    drawFilm(picture, pictures.width, pictures.height);
  }
  $("film").classList.toggle("inverted", $("invert").checked);
  const map = chosen.maps.get(mapKey(finding, scale()));
  drawHeat(map?.values && opacity() ? map : null);
  $("heat").style.opacity = opacity() / 100;
  $("opacity-text").textContent = opacity() ? `${opacity()} %` : "off";
  $("scale-text").textContent = `${scale()} × ${scale()} px`;
  $("scale").setAttribute("aria-valuetext", `${scale()} pixels`);
  [...$("ticks").children].forEach((tick, i) => tick.classList.toggle("now", i === Number($("scale").value)));
  $("film").setAttribute("aria-label", `${chosen.name} at ${model.scales[n]} pixels. ${$("says").textContent}`);
  showSays();
}

// One line on the finding at this scale: the numbers, and where the heat map is.
function showSays() {
  if (!chosen?.pictures) return;
  const label = model.labels[finding];
  const found = chosen.scores?.findings[finding].scales[Number($("scale").value)];
  const parts = [];
  if (found) {
    const verdict = found.verdict ? `, ${found.verdict} (threshold ${probability(found.threshold)})` : "";
    parts.push(`${label} at ${scale()} px: ${probability(found.p)}${verdict}.`);
  }
  if (opacity()) {
    const map = chosen.maps.get(mapKey(finding, scale()));
    if (!map) parts.push("Computing the heat map…");
    else if (map.undefined) parts.push(`Heat map not defined: ${sentence(map.undefined)}`);
    else if (map.error) parts.push(`No heat map: ${map.error}`);
    else if (map.is_zero) parts.push("The heat map is empty: no part of the film supports the finding.");
    else parts.push(`The heat map is strongest ${strongest(map)}.`);
  }
  const words = parts.join(" ");
  if ($("says").textContent !== words) $("says").textContent = words;
}

function stateOf(film) {
  if (film.error) return film.error;
  if (film.state === "working") return "computing…";
  if (!film.scores) return "waiting";
  const positive = film.scores.findings.filter((one) => verdictOf(one) === "positive").length;
  const has_verdicts = film.scores.findings.some(verdictOf);
  return [has_verdicts ? `${positive} positive` : "done", ...(film.scores.unlike.reasons.length ? ["⚠ unlike"] : [])].join(" · ");
}

const items = new Map();

function showList() {
  for (const [film, item] of items) {
    if (!films.includes(film)) {
      item.remove();
      items.delete(film);
    }
  }
  for (const film of films) {
    if (!items.has(film)) {
      items.set(film, newItem(film));
      $("list").append(items.get(film));
    }
    const item = items.get(film);
    item.classList.toggle("chosen", film === chosen);
    item.classList.toggle("error", Boolean(film.error));
    item.querySelector(".open").setAttribute("aria-current", String(film === chosen));
    const state = item.querySelector(".state");
    if (state.textContent !== stateOf(film)) state.textContent = stateOf(film);
  }
  $("clear").hidden = films.length < 2;
}

function newItem(film) {
  const open = element("button", { type: "button", class: "open", title: film.name }, element("span", { class: "title", text: film.name }), element("span", { class: "state" }));
  const off = element("button", { type: "button", class: "off", "aria-label": `Remove ${film.name}`, text: "✕" });
  open.addEventListener("click", () => choose(film));
  off.addEventListener("click", () => drop(film));
  return element("li", {}, open, off);
}

function drop(film) {
  const at = films.indexOf(film);
  remove(film);
  showList();
  if (film === chosen) choose(films[Math.min(at, films.length - 1)] ?? null);
  (items.get(chosen)?.querySelector(".open") ?? $("files")).focus();
  showProgress();
}

function showProgress(left_out = "") {
  const waiting = films.filter((film) => film.state === "waiting" || film.state === "working").length;
  const words = waiting ? `${films.length - waiting} of ${films.length} films done` : films.length ? `${films.length} ${films.length === 1 ? "film" : "films"}` : "";
  const text = [words, left_out].filter(Boolean).join(". ");
  if ($("progress").textContent !== text) $("progress").textContent = text;
}

function chooseFinding(index) {
  finding = index;
  is_own_choice = true;
  show();
  work();
}

// What the user does

function take(files) {
  const before = films.length;
  const left_out = add([...files]);
  showList();
  if (films.length > before && (!chosen || chosen.error)) choose(films[before]);
  else work();
  showProgress(left_out);
}

$("files").addEventListener("change", (event) => {
  take(event.target.files);
  event.target.value = ""; // so that the same file can be chosen again
});

let depth = 0;
for (const [type, change] of [["dragenter", 1], ["dragleave", -1]]) {
  addEventListener(type, () => {
    depth += change;
    document.body.classList.toggle("over", depth > 0);
  });
}
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  event.preventDefault(); // else the browser would open the film
  depth = 0;
  document.body.classList.remove("over");
  take(event.dataTransfer.files);
});

$("scale").addEventListener("input", () => {
  show();
  work();
});
for (const id of ["opacity", "coarse", "invert"]) {
  $(id).addEventListener("input", () => {
    showFilm();
    work();
  });
}
$("smaller").addEventListener("click", () => zoomBy(-1));
$("larger").addEventListener("click", () => zoomBy(1));
$("clear").addEventListener("click", () => {
  for (const film of [...films]) remove(film);
  showList();
  choose(null);
  showProgress();
  $("files").focus();
});

const RULES = { youden: "Youden's index", sensitivity: "a sensitivity of", specificity: "a specificity of" };

function ruleText(rule) {
  if (!rule) return "This model has no thresholds, so there are no verdicts.";
  const [kind, value] = rule.split("=");
  return `Under each probability: its threshold, chosen on validation films by ${RULES[kind]}${value ? ` ${value}` : ""}. At or above it, a film is positive.`;
}

async function start() {
  drawLegend();
  zoomBy(0);
  const answer = await fetch("api/model").catch(() => null);
  if (!answer?.ok) {
    $("model").textContent = "The app does not answer. Is it still running in its terminal?";
    return;
  }
  model = await answer.json();
  const { scales, labels, networks } = model;
  $("model").textContent = `${labels.length} ${labels.length === 1 ? "finding" : "findings"}, ${scales.join(", ")} px, ${networks} ${networks === 1 ? "network" : "networks"}`;
  $("scale").max = scales.length - 1;
  $("scale").value = scales.length - 1;
  $("scale").disabled = scales.length === 1;
  $("ticks").replaceChildren(...scales.map((side) => element("span", { text: side })));
  $("rule").textContent = ruleText(model.rule);
  work();
}

start();
