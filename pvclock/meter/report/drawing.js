/* What of a plot is shown, as SVG: paths by the rules of outlines.py, the drawing by those of svg.py.

   The whole range, drawn again, is the same drawing. Texts are set as text, never as markup. */

const SVG = "http://www.w3.org/2000/svg";
const { dots, shapes } = rules;
const { colours, dashes, dottedMax, dotRoom, hairlinesMax } = rules.limits;
const { trimmed, margin, farOut, kindShownMax, kindRoom, titleCharacter } = rules.limits;

// --- Paths (outlines.py)

const pixels = (number) => String(Math.floor(number * 10 + 0.5) / 10);
const path = (points) => `M${points.map(([x, y]) => `${pixels(x)} ${pixels(y)}`).join("L")}`;

/* [begin, end) of each piece between points that are NaN. */
function runs(points) {
  const found = [];
  let begin = -1;
  points.forEach(([x, y], index) => {
    if (Number.isNaN(x) || Number.isNaN(y)) {
      if (begin >= 0) found.push([begin, index]);
      begin = -1;
    } else if (begin < 0) begin = index;
  });
  if (begin >= 0) found.push([begin, points.length]);
  return found;
}

function linePath(points) {
  return runs(points).map(([begin, end]) => path(points.slice(begin, end)) + (end - begin === 1 ? "h0" : "")).join("");
}

function bandPath(lows, highs) {
  const both = lows.map(([x, low], index) => [x, low + highs[index][1]]);
  return runs(both).map(([begin, end]) => {
    let forth = highs.slice(begin, end), back = lows.slice(begin, end).reverse();
    if (end - begin === 1) {
      const [[x, high]] = forth, [[, low]] = back;
      [forth, back] = [[[x - 1, high], [x + 1, high]], [[x + 1, low], [x - 1, low]]];
    }
    return `${path([...forth, ...back])}Z`;
  }).join("");
}

function stepped(points) {
  return points.flatMap((point, index) => (index ? [[point[0], points[index - 1][1]], point] : [point]));
}

// --- What of a line is within a part of the x axis

/* The index of the first x that is not less. */
function firstFrom(xs, limit) {
  let begin = 0, end = xs.length;
  while (begin < end) {
    const middle = (begin + end) >> 1;
    if (xs[middle] < limit) begin = middle + 1;
    else end = middle;
  }
  return begin;
}

function firstAfter(xs, limit) {
  let index = firstFrom(xs, limit);
  while (index < xs.length && xs[index] === limit) index++;
  return index;
}

/* A line's points within a span, and where it crosses the ends of that. */
function within(line, [least, most], plot) {
  const begin = firstFrom(line.x, least), end = Math.max(firstAfter(line.x, most), begin);
  const part = { isStepped: line.isStepped, begin, end };
  const before = begin > 0 && begin < line.x.length, after = end > 0 && end < line.x.length;
  for (const name of ["x", "y", "low", "high"]) {
    const column = line[name].slice(begin, end);
    if (line[name].length) {
      if (before) column.unshift(name === "x" ? least : crossing(line, name, begin - 1, least, plot));
      if (after) column.push(name === "x" ? most : crossing(line, name, end - 1, most, plot));
    }
    part[name] = column;
  }
  return part;
}

function crossing(line, name, index, x, plot) {
  const column = line[name];
  if (line.isStepped) return column[index];
  const along = (value) => (plot.x.isLog ? Math.log10(value) : value);
  const part = (along(x) - along(line.x[index])) / (along(line.x[index + 1]) - along(line.x[index]));
  if (!plot.y.isLog) return column[index] + part * (column[index + 1] - column[index]);
  return 10 ** (Math.log10(column[index]) + part * (Math.log10(column[index + 1]) - Math.log10(column[index])));
}

// --- The drawing (svg.py)

function make(name, attributes, content) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (typeof content === "string") element.textContent = content;
  else if (content) element.append(...content);
  return element;
}

function clipped(text, most) {
  const characters = [...text];
  return characters.length <= most ? text : `${characters.slice(0, most - 1).join("").trimEnd()}\u2026`;
}

function trimmedBounds(bounds, least, greatest) {
  const known = bounds.filter(Number.isFinite).sort((a, b) => a - b);
  return known.slice(Math.floor(known.length * least), known.length - Math.floor(known.length * greatest));
}

const kindsOf = (plot) => [...new Set(plot.marks.map((it) => it.kind))];

function xSpan(plot) {
  const ends = plot.marks.flatMap((it) => [it.x, it.until === null ? it.x : it.until]);
  return spanOf([...plot.lines.flatMap((it) => it.x), ...ends], plot.x.isLog, 0);
}

function ySpan(parts, axis) {
  const whole = ySpanWithout(0, parts, axis), most = ySpanWithout(trimmed, parts, axis);
  return widthOf(whole, axis) > farOut * widthOf(most, axis) ? most : whole;
}

function ySpanWithout(part, parts, axis) {
  const bounds = parts.flatMap((it) => [...trimmedBounds(it.low, part, 0), ...trimmedBounds(it.high, 0, part)]);
  return spanOf([...parts.flatMap((it) => it.y), ...bounds], axis.isLog, margin);
}

const widthOf = ([least, most], axis) => (axis.isLog ? Math.log10(most / least) : most - least);

/* Both axes of what is shown, from numbers to pixels. */
function frameOf(plot, layout, span) {
  const parts = plot.lines.map((it) => within(it, span, plot));
  const isKnown = parts.some((it) => knownOf([...it.y, ...it.low, ...it.high], plot.y.isLog).length);
  const width = layout.width - layout.left - layout.right;
  const frame = {
    layout, parts, left: layout.left, right: layout.width - layout.right,
    top: layout.top, bottom: layout.top + layout.height,
    x: scaleOf(plot.x, span, Math.max(2, Math.floor(width / layout.x_tick))),
    y: scaleOf(plot.y, ySpan(isKnown ? parts : plot.lines, plot.y), Math.max(2, Math.floor(layout.height / layout.y_tick))),
  };
  frame.xPixel = (value) => position(frame.x, value, frame.left, frame.right);
  frame.yPixel = (value) => {
    const pixel = position(frame.y, value, frame.bottom, frame.top);
    return Number.isNaN(pixel) ? pixel : Math.max(Math.min(pixel, 5000), -5000);
  };
  frame.points = (part, column) => {
    const points = part.x.map((x, index) => [frame.xPixel(x), frame.yPixel(column[index])]);
    return part.isStepped ? stepped(points) : points;
  };
  frame.lanesBottom = frame.bottom + layout.lane * kindsOf(plot).length;
  return frame;
}

function drawingOf(plot, name, frame) {
  const bands = frame.parts.flatMap((part, index) => (plot.lines[index].low.length ? [bandOf(part, index, frame)] : []));
  const lines = plot.lines.flatMap((line, index) => lineOf(line, frame.parts[index], index, frame));
  const inside = make("g", { "clip-path": `url(#${name}-area)` }, [...bands, ...hairlines(plot, frame), ...lines]);
  return [grid(frame), inside, ...axes(frame), ...lanes(plot, frame), ...labels(frame)];
}

function grid(frame) {
  const across = frame.y.ticks.map((it) => `M${frame.left} ${pixels(frame.yPixel(it.at))}H${frame.right}`);
  const down = frame.x.ticks.map((it) => `M${pixels(frame.xPixel(it.at))} ${frame.top}V${frame.bottom}`);
  return make("path", { class: "grid", d: [...across, ...down].join("") });
}

function axes(frame) {
  const axis = make("path", { class: "axis", d: `M${frame.left} ${frame.bottom}H${frame.right}` });
  const [least, most] = frame.y.span;
  if (frame.y.isLog || !(least < 0 && 0 < most)) return [axis];
  return [make("path", { class: "zero", d: `M${frame.left} ${pixels(frame.yPixel(0))}H${frame.right}` }), axis];
}

function bandOf(part, index, frame) {
  const least = frame.y.isLog ? 1e-300 : -Infinity;  // a bound of 0 is at the bottom of a logarithmic axis
  const d = bandPath(frame.points(part, part.low.map((it) => Math.max(it, least))), frame.points(part, part.high));
  return make("path", { class: `band colour-${index % colours}`, d });
}

function lineOf(line, part, index, frame) {
  const colour = `colour-${index % colours}`;
  const d = linePath(frame.points(part, part.y));
  const drawn = [make("path", { class: `line ${colour} dash-${index % dashes}`, d })];
  const known = [];
  for (let it = part.begin; it < part.end; it++) if (!Number.isNaN(line.y[it])) known.push(it);
  if (known.length > dottedMax) return drawn;
  for (const it of known) {
    const [x, y] = [frame.xPixel(line.x[it]), frame.yPixel(line.y[it])];
    if (!Number.isNaN(x + y)) drawn.push(shape(`dot ${colour}`, dots[index % dots.length], x, y));
  }
  return drawn;
}

function shape(look, outline, x, y, title) {
  const attributes = { class: look, transform: `translate(${pixels(x)} ${pixels(y)})`, d: outline };
  return make("path", attributes, title ? [make("title", {}, title)] : null);
}

function hairlines(plot, frame) {
  const [least, most] = frame.x.span;
  const shown = plot.marks.filter((it) => isShown(it, frame));
  if (!shown.length || shown.length > hairlinesMax) return [];
  const down = shown.filter((it) => least <= it.x && it.x <= most);
  const d = down.map((it) => `M${pixels(frame.xPixel(it.x))} ${frame.top}V${frame.bottom}`).join("");
  return [make("path", { class: "hairline", d })];
}

function isShown(mark, frame) {
  const [least, most] = frame.x.span;
  const until = mark.until === null ? mark.x : mark.until;
  return !Number.isNaN(frame.xPixel(mark.x)) && mark.x <= most && until >= least;
}

function lanes(plot, frame) {
  return kindsOf(plot).flatMap((kind, row) => {
    const { lane, left } = frame.layout;
    const y = frame.bottom + lane * row + Math.floor(lane / 2);
    const marks = plot.marks.filter((it) => it.kind === kind && isShown(it, frame));
    const label = make("text", { class: "kind", x: left - kindRoom, y: y + 4 }, clipped(kind, kindShownMax));
    const line = make("path", { class: "lane", d: `M${left} ${y}H${frame.right}` });
    return [label, line, ...marks.map((it) => markOf(it, shapes[row % shapes.length], y, frame))];
  });
}

function markOf(mark, outline, y, frame) {
  const look = `mark ${mark.look}`;
  const begin = Math.max(frame.xPixel(mark.x), frame.left);
  if (mark.until === null) return shape(look, outline, begin, y, mark.text);
  const end = Math.min(frame.xPixel(mark.until), frame.right);
  const place = { x: pixels(begin), y: pixels(y - 4), width: pixels(Math.max(end - begin, 3)), height: 8, rx: 2 };
  return make("rect", { class: look, ...place }, [make("title", {}, mark.text)]);
}

function labels(frame) {
  const beside = frame.y.ticks.map((it) =>
    make("text", { class: "tick y", x: frame.left - 10, y: pixels(frame.yPixel(it.at) + 4) }, it.label));
  const below = frame.x.ticks.map((it) =>
    make("text", { class: "tick x", x: pixels(frame.xPixel(it.at)), y: frame.lanesBottom + 18 }, it.label));
  const middle = pixels((frame.left + frame.right) / 2);
  const titleIn = ({ title }, room) => clipped(title, Math.floor(room / titleCharacter));
  const yTitle = make("text", { class: "title y", x: 0, y: 16 }, titleIn(frame.y, frame.layout.width));
  const place = { class: "title x", x: middle, y: frame.lanesBottom + 40 };
  const xTitle = make("text", place, titleIn(frame.x, frame.right - frame.left + 2 * frame.layout.right));
  return [...beside, ...below, yTitle, xTitle];
}
