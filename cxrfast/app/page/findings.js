// The table of findings: one row per finding, one column per scale, the ensemble, and the way from scale to scale.

const SVG = "http://www.w3.org/2000/svg";

export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "text") made.textContent = value;
    else if (value !== null && value !== false) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

export const probability = (p) => (p === null ? "–" : p > 0 && p < 0.005 ? "<0.01" : p < 1 && p >= 0.995 ? ">0.99" : p.toFixed(2));

// Roles are said, since a narrow page shows the table as a grid, and browsers then forget what it is.
const head = (attributes, ...children) => element("th", { role: "columnheader", scope: "col", ...attributes }, ...children);

const SIGNS = { positive: "▲", negative: "▽" };

// A probability, its threshold and verdict. Two numbers that look the same get a third digit.
function cell(score, is_chosen) {
  const { p, threshold, verdict } = score;
  const has_verdict = verdict !== null && threshold !== null;
  const is_close = has_verdict && probability(p) === probability(threshold);
  const text = (value) => (is_close ? value.toFixed(3) : probability(value));
  return element(
    "td",
    { role: "cell", class: [verdict ?? "none", is_chosen ? "chosen" : ""].join(" ") },
    element("span", { class: "p", text: p === null ? "NaN" : text(p) }),
    element("small", { text: has_verdict ? `${verdict === "positive" ? "≥" : "<"} ${text(threshold)}` : "" }),
  );
}

// The ensemble's verdict, or the scale's where there is one scale.
export const verdictOf = (finding) => (finding.ensemble ?? finding.scales[0]).verdict;

// Builds the table. `choose(finding)` is called with an index; `scale` is the index of the scale shown.
export function table(model, scores, finding, scale, choose) {
  const has_ensemble = scores.findings.some((one) => one.ensemble);
  const heads = [
    head({ text: "Finding" }),
    ...model.scales.map((side, i) => head({ class: i === scale ? "chosen" : null }, `${side}`, element("small", { text: " px" }))),
    ...(has_ensemble ? [head({ text: "Ensemble" })] : []),
    ...(model.scales.length > 1 ? [head({ class: "trend", text: "By scale" })] : []),
  ];
  const rows = scores.findings.map((one, i) => {
    const verdict = verdictOf(one);
    const name = element(
      "button",
      { type: "button", class: "finding", "aria-pressed": String(i === finding), "data-finding": i },
      element("span", { class: "name", text: model.labels[i] }),
      element("span", { class: `verdict ${verdict ?? "none"}`, text: verdict ? `${SIGNS[verdict]} ${verdict}` : model.rule ? "no threshold" : "" }),
    );
    name.addEventListener("click", () => choose(i));
    return element(
      "tr",
      { role: "row", class: i === finding ? "chosen" : null },
      element("th", { role: "rowheader", scope: "row" }, name),
      ...one.scales.map((score, s) => cell(score, s === scale)),
      ...(has_ensemble ? [cell(one.ensemble, false)] : []),
      ...(model.scales.length > 1 ? [element("td", { role: "cell", class: "trend" }, trend(one, scale))] : []),
    );
  });
  const made = element(
    "table",
    { role: "table" },
    element("caption", { class: "hidden", text: "Probabilities of every finding by scale and of the ensemble" }),
    element("thead", { role: "rowgroup" }, element("tr", { role: "row" }, ...heads)),
    element("tbody", { role: "rowgroup" }, ...rows),
  );
  made.style.setProperty("--columns", model.scales.length + (has_ensemble ? 1 : 0));
  return made;
}

// Probability by scale as a line from 0 (bottom) to 1 (top), thresholds as a dashed line.
function trend(finding, scale) {
  const [width, height, edge] = [84, 32, 4];
  const n = finding.scales.length;
  const x = (i) => edge + (i * (width - 2 * edge)) / (n - 1);
  const y = (p) => edge + (1 - p) * (height - 2 * edge);
  const draw = (name, attributes) => {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  };
  const line = (key) => finding.scales.map((score, i) => [i, score[key]]).filter(([, p]) => p !== null);
  const points = (found) => found.map(([i, p]) => `${x(i)},${y(p)}`).join(" ");
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, width, height, "aria-hidden": "true", focusable: "false" });
  svg.append(
    draw("rect", { x: 0.5, y: 0.5, width: width - 1, height: height - 1, rx: 3, class: "frame" }),
    draw("polyline", { points: points(line("threshold")), class: "threshold" }),
    draw("polyline", { points: points(line("p")), class: "line" }),
    ...line("p").map(([i, p]) => draw("circle", { cx: x(i), cy: y(p), r: i === scale ? 3.5 : 2, class: i === scale ? "dot now" : "dot" })),
  );
  return svg;
}

// What is unusual about a film: why it is unlike the training set, and the decoder's remarks.
export function remarks(scores) {
  const { assessed, reasons } = scores.unlike;
  const found = [];
  if (reasons.length) {
    found.push(
      element("div", { class: "unlike", role: "note" }, element("strong", { text: "⚠ Unlike the training set" }), list(reasons), element("p", { text: "Read the probabilities with care: the networks have not learned such films." })),
    );
  } else {
    found.push(element("p", { class: "quiet", id: "likeness", text: assessed ? "✓ Like the films of the training set, as far as grey values and shape tell." : "Whether this film is like the training set is not assessed: the model holds no reference." }));
  }
  if (scores.remarks.length) {
    found.push(element("div", { class: "remarks" }, element("strong", { text: "Decoder" }), list(scores.remarks)));
  }
  return found;
}

const list = (texts) => element("ul", {}, ...texts.map((text) => element("li", { text })));
