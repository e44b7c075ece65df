// One cursor over all figures, the x axis of a comparison, the theme, and sortable tables. The page is complete without.
"use strict";

const page = { share: null, axis: "step", figures: [], axes: null };
const SVG = "http://www.w3.org/2000/svg";

const numbers = (text) => text.trim().split(/\s+/).map(Number);

function readFigure(element) {
  const svg = element.querySelector("svg.chart");
  const rows = [...element.querySelectorAll("tbody tr")];
  const steps = rows.map((row) => Number(row.cells[0].textContent));
  const items = [...element.querySelectorAll(".legend li")];
  const curves = items.map((item, index) => {
    const style = item.querySelector(".curve").getAttribute("class").split(" ")[1];
    const points = [];
    rows.forEach((row, number) => {
      const text = row.cells[index + 1].textContent;
      if (text !== "") points.push({ step: steps[number], y: Number(text), text });
    });
    return findPaths(svg, { output: item.querySelector(".value"), style, points });
  });
  const last = curves.map((curve) => curve.output.textContent);
  const original = [...svg.children].map((child) => child.cloneNode(true));
  return { element, svg, original, curves, last, stage: element.dataset.stage, range: numbers(svg.dataset.x) };
}

function findPaths(svg, curve) {
  curve.path = svg.querySelector(`.curve.${curve.style}`);
  curve.dots = svg.querySelector(`.dots.${curve.style}`);
  curve.run = Number((curve.path || curve.dots).dataset.run);
  return curve;
}

// The x of a step of a run: the step itself, or what the chosen axis shows there, between the points that are known.
function xOf(run, step, stage) {
  if (page.axis === "step" || stage !== "ppo") return step;
  const known = page.axes.runs[run];
  const after = known.step.findIndex((other) => other >= step);
  if (after < 0) return known[page.axis].at(-1);
  if (after === 0 || known.step[after] === step) return known[page.axis][after];
  const part = (step - known.step[after - 1]) / (known.step[after] - known.step[after - 1]);
  return known[page.axis][after - 1] + part * (known[page.axis][after] - known[page.axis][after - 1]);
}

function rangeOf(figure) {
  return page.axis !== "step" && figure.stage === "ppo" ? page.axes.ranges[page.axis] : figure.range;
}

function placeOf(figure, x, y) {
  const [left, right, top, bottom] = numbers(figure.svg.dataset.plot);
  const [xLow, xHigh] = rangeOf(figure);
  const [yLow, yHigh] = numbers(figure.svg.dataset.y);
  return [left + ((x - xLow) / (xHigh - xLow)) * (right - left), bottom + ((y - yLow) / (yHigh - yLow)) * (top - bottom)];
}

function moveCurves(figure) {
  if (page.axis === "step") {
    figure.svg.replaceChildren(...figure.original.map((child) => child.cloneNode(true)));
    figure.curves.forEach((curve) => findPaths(figure.svg, curve));
    return;
  }
  for (const curve of figure.curves) {
    let line = "";
    let dots = "";
    let drawing = false;
    for (const point of curve.points) {
      const finite = Number.isFinite(point.y);
      if (finite) {
        const place = placeOf(figure, xOf(curve.run, point.step, figure.stage), point.y).map((n) => n.toFixed(1)).join(" ");
        line += (drawing ? "L" : "M") + place;
        dots += `M${place}h0`;
      }
      drawing = finite;
    }
    if (curve.path) curve.path.setAttribute("d", line);
    if (curve.dots) curve.dots.setAttribute("d", dots);
  }
  figure.svg.querySelector(".axis").outerHTML = page.axes.markup[page.axis];
}

function chooseAxis(axis) {
  page.axis = axis;
  figures().filter((figure) => figure.stage === "ppo").forEach(moveCurves);
  showCursor();
}

const figures = () => (page.figures.length ? page.figures : (page.figures = [...document.querySelectorAll("figure")].map(readFigure)));

function nearest(figure, curve, x) {
  let best = null;
  let distance = Infinity;
  for (const point of curve.points) {
    const away = Math.abs(xOf(curve.run, point.step, figure.stage) - x);
    if (away < distance) [best, distance] = [point, away];
  }
  return best;
}

function showCursor() {
  for (const figure of figures().filter((figure) => figure.stage)) {
    figure.svg.querySelectorAll(".cursor, .spot").forEach((mark) => mark.remove());
    figure.curves.forEach((curve, index) => (curve.output.textContent = figure.last[index]));
    if (page.share === null) continue;
    const [low, high] = rangeOf(figure);
    const x = low + page.share * (high - low);
    const [left, right, top, bottom] = numbers(figure.svg.dataset.plot);
    const place = left + page.share * (right - left);
    draw(figure.svg, "line", { class: "cursor", x1: place, x2: place, y1: top, y2: bottom });
    for (const curve of figure.curves) {
      const point = nearest(figure, curve, x);
      curve.output.textContent = point.text;
      if (!Number.isFinite(point.y)) continue;
      const [cx, cy] = placeOf(figure, xOf(curve.run, point.step, figure.stage), point.y);
      draw(figure.svg, "circle", { class: `spot ${curve.style}`, cx, cy, r: 3.5 });
    }
  }
}

function draw(svg, name, attributes) {
  const mark = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) mark.setAttribute(key, value);
  svg.append(mark);
}

// The slider moves the cursor by keyboard; its positions are the steps of PPO, or of the only stage that has any.
function setUpCursor() {
  const label = document.querySelector("#cursor");
  const slider = label.querySelector("input");
  const output = label.querySelector("output");
  const withSteps = figures().filter((figure) => figure.stage);
  if (!withSteps.length) return;
  const main = withSteps.find((figure) => figure.stage === "ppo") || withSteps[0];
  const [low, high] = main.range;
  [slider.min, slider.max] = [Math.ceil(low), Math.floor(high)];
  slider.value = page.share === null ? Math.floor(high) : Math.round(low + page.share * (high - low));
  const tell = () => {
    output.textContent = page.share === null ? "last" : Number(slider.value).toLocaleString("en");
    slider.setAttribute("aria-valuetext", `step ${slider.value}`);
    showCursor();
  };
  slider.oninput = () => {
    page.share = (slider.value - low) / (high - low);
    tell();
  };
  for (const figure of withSteps) {
    figure.svg.onpointermove = (event) => {
      const box = figure.svg.getBoundingClientRect();
      const [left, right] = numbers(figure.svg.dataset.plot);
      const place = ((event.clientX - box.left) / box.width) * figure.svg.viewBox.baseVal.width;
      page.share = Math.min(1, Math.max(0, (place - left) / (right - left)));
      slider.value = Math.round(low + page.share * (high - low));
      tell();
    };
    figure.svg.onpointerleave = () => {
      page.share = null;
      tell();
    };
  }
  label.hidden = false;
  tell();
}

function setUpAxes() {
  const data = document.querySelector("#axes-data");
  if (!data) return;
  page.axes = JSON.parse(data.textContent);
  const choices = document.querySelector("#axes");
  choices.hidden = false;
  choices.onchange = (event) => chooseAxis(event.target.value);
  if (page.axis !== "step") chooseAxis(page.axis);
}

function setUpTheme() {
  const button = document.querySelector("#theme");
  const themes = ["system", "light", "dark"];
  const show = (theme) => {
    if (theme === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    button.textContent = `Theme: ${theme}`;
  };
  button.onclick = () => {
    const next = themes[(themes.indexOf(document.documentElement.dataset.theme || "system") + 1) % 3];
    try { localStorage.setItem("align-theme", next); } catch { /* the choice holds for this page alone */ }
    show(next);
  };
  let chosen = null;
  try { chosen = localStorage.getItem("align-theme"); } catch { /* as above */ }
  show(themes.includes(chosen) ? chosen : "system");
  button.hidden = false;
}

function setUpSorting(table) {
  if (table.tHead.querySelector("button")) return;
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.onclick = () => {
      const rising = head.getAttribute("aria-sort") !== "ascending";
      [...table.tHead.rows[0].cells].forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", rising ? "ascending" : "descending");
      const compare = (a, b) => a.cells[column].textContent.localeCompare(b.cells[column].textContent, "en", { numeric: true });
      const byNumber = (a, b) => a.cells[column].textContent - b.cells[column].textContent;
      const order = [...table.tBodies[0].rows].sort(head.classList.contains("number") ? byNumber : compare);
      table.tBodies[0].append(...(rising ? order : order.reverse()));
    };
  });
}

function setUp() {
  page.figures = [];
  setUpAxes();
  setUpCursor();
  document.querySelectorAll("table.sortable").forEach(setUpSorting);
}

setUpTheme();
setUp();
