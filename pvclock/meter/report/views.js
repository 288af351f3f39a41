/* The plots of a page, each with its data and the part of it that is shown: zoomed, panned, fitted, printed.

   The page is complete without it; html.py writes it, and the data. */

const NARROWEST = 1e-7, STEP = 1.6, PAN = 0.2;

const unknowns = (column) => column.map((it) => (it === null ? NaN : it));

function readPlot(figure) {
  const plot = JSON.parse(figure.querySelector("script.data").textContent);
  for (const line of plot.lines) for (const name of ["x", "y", "low", "high"]) line[name] = unknowns(line[name]);
  return plot;
}

function openPlot(figure) {
  const plot = readPlot(figure);
  const svg = figure.querySelector(".chart > svg");
  const view = {
    plot, svg, figure, name: svg.id, group: svg.querySelector(".drawing"),
    layout: { ...rules.layout, left: plot.left }, full: xSpan(plot), pointer: make("rect", { class: "pointer" }),
    over: make("g", { class: "over", "aria-hidden": "true" }), dragFrom: null, at: null,
  };
  view.shown = view.full;
  view.frame = frameOf(plot, view.layout, view.shown);
  svg.append(view.over, view.pointer);
  addTools(view);
  place(view);
  listen(view);
  fit(view);
  return view;
}

function place(view) {
  const { frame, svg } = view;
  const clip = svg.querySelector("clipPath rect");
  for (const [element, room, height] of [[view.pointer, 0, frame.lanesBottom - frame.top], [clip, dotRoom, frame.layout.height]]) {
    const area = { x: frame.left - room, y: frame.top, width: frame.right - frame.left + 2 * room, height };
    for (const [key, value] of Object.entries(area)) element.setAttribute(key, value);
  }
}

function draw(view) {
  view.frame = frameOf(view.plot, view.layout, view.shown);
  view.group.replaceChildren(...drawingOf(view.plot, view.name, view.frame));
  place(view);
  const isWhole = view.shown === view.full;
  for (const button of [view.tools.out, view.tools.all]) button.disabled = isWhole;
  leave(view);
}

/* On a narrow page a plot is drawn as wide as the page, so that its labels keep their size. */
function fit(view) {
  const room = view.svg.parentElement.clientWidth;
  const isNarrow = 0 < room && room < rules.narrowBelow;
  const width = isNarrow ? Math.max(room, 300) : rules.layout.width;
  if (width === view.layout.width) return;
  relayout(view, width);
}

function relayout(view, width) {
  view.layout = { ...view.layout, width };
  const height = view.svg.viewBox.baseVal.height;
  view.svg.classList.toggle("fitted", width !== rules.layout.width);
  view.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  view.svg.setAttribute("width", width);
  draw(view);
}

// An axis' own measure: equal parts of it are equally wide.
const along = (view, x) => (view.plot.x.isLog ? Math.log10(x) : x);
const back = (view, measure) => (view.plot.x.isLog ? 10 ** measure : measure);

/* Show the part of the x axis from one measure to another, or as much of it as there is. */
function show(view, begin, end) {
  const [least, most] = view.full.map((it) => along(view, it));
  const narrowest = Math.max((most - least) * NARROWEST, Math.max(Math.abs(least), Math.abs(most)) * 1e-11);
  const width = Math.min(Math.max(end - begin, narrowest), most - least);
  const from = Math.min(Math.max((begin + end) / 2 - width / 2, least), most - width);
  view.shown = width >= most - least ? view.full : [back(view, from), back(view, from + width)];
  draw(view);
}

function zoom(view, factor, around) {
  const [begin, end] = view.shown.map((it) => along(view, it));
  const fixed = around === undefined ? (begin + end) / 2 : around;
  show(view, fixed - (fixed - begin) / factor, fixed + (end - fixed) / factor);
}

function pan(view, part) {
  const [begin, end] = view.shown.map((it) => along(view, it));
  show(view, begin + (end - begin) * part, end + (end - begin) * part);
}

function showAll(view) {
  view.shown = view.full;
  draw(view);
}

function addTools(view) {
  const tools = document.createElement("div");
  tools.className = "tools";
  view.tools = {};
  const actions = [
    ["closer", "+", "Zoom in (+)", () => zoom(view, STEP)],
    ["out", MINUS, "Zoom out (-)", () => zoom(view, 1 / STEP)],
    ["all", "all", "Show all (Escape)", () => showAll(view)],
  ];
  for (const [name, text, title, act] of actions) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = text;
    button.title = title;
    button.setAttribute("aria-label", title);
    button.addEventListener("click", act);
    button.disabled = name !== "closer";
    tools.append(button);
    view.tools[name] = button;
  }
  view.figure.querySelector("h3").after(tools);
  view.svg.setAttribute("tabindex", "0");
  view.svg.setAttribute("aria-keyshortcuts", "+ - 0 Escape ArrowLeft ArrowRight Shift+ArrowLeft Shift+ArrowRight");
}

// --- The page

const views = [...document.querySelectorAll("figure.plot")].map(openPlot);
window.addEventListener("resize", () => views.forEach(fit));
document.addEventListener("pointerdown", (event) => {
  for (const view of views) if (!view.svg.contains(event.target)) leave(view);
});
window.addEventListener("scroll", () => views.forEach(leave), { passive: true });

// Paper gets the whole range, in the width that it has room for.
window.addEventListener("beforeprint", () => {
  for (const view of views) {
    view.beforePrint = { shown: view.shown, width: view.layout.width };
    view.shown = view.full;
    if (view.layout.width !== rules.layout.width) relayout(view, rules.layout.width);
    else draw(view);
  }
});
window.addEventListener("afterprint", () => {
  for (const view of views) {
    if (!view.beforePrint) continue;
    view.shown = view.beforePrint.shown;
    relayout(view, view.beforePrint.width);
    view.beforePrint = null;
  }
});
