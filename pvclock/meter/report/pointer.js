/* What the pointer and the keys do with a plot, and what is told of the place that they are at: in no Python file. */

const READINGS_MAX = 10, HAPPENED_MAX = 6, NEAR_PIXELS = 6, DRAGGED_PIXELS = 6;
const tooltip = document.createElement("div");
tooltip.className = "tooltip";
tooltip.setAttribute("role", "status");
tooltip.hidden = true;
document.body.append(tooltip);

function pointOf(view, event) {
  const box = view.svg.getBoundingClientRect();
  const size = view.layout.width / box.width;
  return [(event.clientX - box.left) * size, (event.clientY - box.top) * size];
}

function measureAt(view, pixel) {
  const [begin, end] = view.shown.map((it) => along(view, it));
  const { left, right } = view.frame;
  const part = (Math.min(Math.max(pixel, left), right) - left) / (right - left);
  return begin + part * (end - begin);
}

function listen(view) {
  const { pointer, svg } = view;
  pointer.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    pointer.setPointerCapture(event.pointerId);
    view.dragFrom = pointOf(view, event)[0];
    hover(view, event);
  });
  pointer.addEventListener("pointermove", (event) => (isDragged(view, event) ? select(view, event) : hover(view, event)));
  pointer.addEventListener("pointerup", (event) => {
    const from = view.dragFrom, wasDragged = isDragged(view, event);
    view.dragFrom = null;
    if (!wasDragged) return;
    const ends = [from, pointOf(view, event)[0]].map((it) => measureAt(view, it)).sort((a, b) => a - b);
    show(view, ...ends);
  });
  pointer.addEventListener("pointercancel", () => { view.dragFrom = null; leave(view); });
  pointer.addEventListener("pointerleave", (event) => { if (event.pointerType !== "touch") leave(view); });
  pointer.addEventListener("dblclick", () => showAll(view));
  svg.addEventListener("wheel", (event) => {
    if (!event.ctrlKey) return;
    event.preventDefault();
    zoom(view, Math.exp(-Math.max(-1, Math.min(1, event.deltaY / 100)) * 0.4), measureAt(view, pointOf(view, event)[0]));
  }, { passive: false });
  svg.addEventListener("keydown", (event) => press(view, event));
  svg.addEventListener("blur", () => leave(view));
}

function isDragged(view, event) {
  return view.dragFrom !== null && Math.abs(pointOf(view, event)[0] - view.dragFrom) > DRAGGED_PIXELS;
}

function press(view, event) {
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  const actions = {
    "+": () => zoom(view, STEP),
    "=": () => zoom(view, STEP),
    "-": () => zoom(view, 1 / STEP),
    "0": () => showAll(view),
    Escape: () => { view.dragFrom = null; showAll(view); },
    ArrowLeft: () => (event.shiftKey ? walk(view, -1) : pan(view, -PAN)),
    ArrowRight: () => (event.shiftKey ? walk(view, 1) : pan(view, PAN)),
  };
  if (!Object.hasOwn(actions, event.key)) return;
  event.preventDefault();
  actions[event.key]();
}

/* Move the crosshair by 1 % of the plot, as Shift with an arrow key does. */
function walk(view, direction) {
  const { left, right, top, bottom } = view.frame;
  const from = view.at === null ? (left + right) / 2 : view.at;
  const x = Math.min(Math.max(from + (direction * (right - left)) / 100, left), right);
  const box = view.svg.getBoundingClientRect();
  const size = box.width / view.layout.width;
  read(view, x, (top + bottom) / 2, box.left + x * size, box.top + ((top + bottom) / 2) * size);
}

function leave(view) {
  view.over.replaceChildren();
  view.at = null;
  tooltip.hidden = true;
}

function select(view, event) {
  const { left, right, top, bottom } = view.frame;
  const ends = [view.dragFrom, pointOf(view, event)[0]].map((it) => Math.min(Math.max(it, left), right));
  const [begin, end] = ends.sort((a, b) => a - b);
  tooltip.hidden = true;
  const area = { class: "selection", x: begin, y: top, width: end - begin, height: bottom - top };
  view.over.replaceChildren(make("rect", area));
}

function hover(view, event) {
  const [x, y] = pointOf(view, event);
  read(view, x, y, event.clientX, event.clientY);
}

// --- What is under the pointer

/* The index of a line's point that is nearest to a pixel along x, of those that are shown; -1: none is. */
function nearest(line, part, x, frame) {
  let best = -1, bestDistance = Infinity;
  const middle = firstFrom(line.x, back({ plot: { x: frame.x } }, frameMeasure(frame, x)));
  for (let it = Math.max(middle - 2, part.begin); it < Math.min(middle + 2, part.end); it++) {
    const distance = Math.abs(frame.xPixel(line.x[it]) - x);
    if (distance < bestDistance) [best, bestDistance] = [it, distance];
  }
  if (best < 0 && part.end > part.begin) return middle <= part.begin ? part.begin : part.end - 1;
  return best;
}

function frameMeasure(frame, pixel) {
  const [least, most] = frame.x.span.map((it) => (frame.x.isLog ? Math.log10(it) : it));
  return least + ((pixel - frame.left) / (frame.right - frame.left)) * (most - least);
}

function readingsAt(view, x, y) {
  const { plot, frame } = view;
  const readings = plot.lines.flatMap((line, index) => {
    const at = nearest(line, frame.parts[index], x, frame);
    return at < 0 ? [] : [{ line, index, at, pixel: frame.yPixel(line.y[at]) }];
  });
  const away = (it) => (Number.isNaN(it.pixel) ? Infinity : Math.abs(it.pixel - y));
  const chosen = new Set([...readings].sort((a, b) => away(a) - away(b)).slice(0, READINGS_MAX));
  return readings.filter((it) => chosen.has(it));
}

function marksAt(view, x, y) {
  const { plot, frame } = view;
  const kinds = kindsOf(plot);
  const row = Math.floor((y - frame.bottom) / frame.layout.lane);
  return plot.marks.filter((mark) => {
    if (!isShown(mark, frame) || (y > frame.bottom && kinds[row] !== mark.kind)) return false;
    const begin = frame.xPixel(mark.x), end = mark.until === null ? begin : frame.xPixel(mark.until);
    return begin - NEAR_PIXELS <= x && x <= end + NEAR_PIXELS;
  });
}

function read(view, x, y, clientX, clientY) {
  const { plot, frame } = view;
  const readings = readingsAt(view, x, y), marks = marksAt(view, x, y);
  view.at = x;
  const found = readings.filter((it) => !Number.isNaN(it.pixel)).map(({ line, index, at, pixel }) =>
    shape(`dot colour-${index % colours}`, dots[index % dots.length], frame.xPixel(line.x[at]), pixel));
  const crosshair = make("path", { class: "crosshair", d: `M${pixels(x)} ${frame.top}V${frame.lanesBottom}` });
  view.over.replaceChildren(crosshair, ...found);
  const paragraphs = [paragraph("at", `${plot.x.label}: ${written(plot.x, back(view, measureAt(view, x)), grainOf(frame.x))}`)];
  paragraphs.push(...readings.map((it) => readingText(view, it)));
  const left = plot.lines.length - readings.length;
  if (left > 0) paragraphs.push(paragraph("at", `${left} more lines`));
  paragraphs.push(...marks.slice(0, HAPPENED_MAX).map((it) => paragraph("happened", `${it.kind}: ${it.text}`)));
  if (marks.length > HAPPENED_MAX) paragraphs.push(paragraph("happened", `${marks.length - HAPPENED_MAX} more marks`));
  tooltip.replaceChildren(...paragraphs);
  putTooltip(clientX, clientY);
}

function paragraph(look, text) {
  const element = document.createElement("p");
  element.className = look;
  element.textContent = clipped(text, 300);
  return element;
}

function readingText(view, { line, index, at }) {
  const { plot, frame } = view;
  const grain = grainOf(frame.y);
  const element = paragraph("reading", "");
  const sample = make("svg", { class: "plot-drawing", width: 20, height: 12, viewBox: "0 0 20 12" }, [
    make("path", { class: `line colour-${index % colours} dash-${index % dashes}`, d: "M1 6H19" }),
    shape(`dot colour-${index % colours}`, dots[index % dots.length], 10, 6),
  ]);
  const name = document.createElement("span"), number = document.createElement("span");
  name.textContent = clipped(line.name, 40);
  number.className = "number";
  const value = line.y[at];
  number.textContent = Number.isNaN(value) ? "unknown" : written(plot.y, value, grain);
  if (line.low.length && !Number.isNaN(line.low[at] + line.high[at])) {
    number.textContent += ` (${written(plot.y, line.low[at], grain)} to ${written(plot.y, line.high[at], grain)})`;
  }
  element.append(sample, name, number);
  return element;
}

/* Beside the pointer, and within the window. */
function putTooltip(x, y) {
  tooltip.hidden = false;
  tooltip.style.left = "0";
  tooltip.style.top = "0";
  const { width, height } = tooltip.getBoundingClientRect();
  const room = document.documentElement;
  const left = x + 16 + width > room.clientWidth - 8 ? x - 16 - width : x + 16;
  const top = y + 16 + height > room.clientHeight - 8 ? y - 16 - height : y + 16;
  tooltip.style.left = `${Math.max(8, Math.min(left, room.clientWidth - 8 - width))}px`;
  tooltip.style.top = `${Math.max(8, Math.min(top, room.clientHeight - 8 - height))}px`;
}
