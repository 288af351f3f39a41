"use strict";
/* Hover, zoom and pan for the plots of a report. The page is complete without it.

   A part of a plot is drawn by the rules that axes.py, outlines.py and svg.py draw all of it by, so that the whole
   range, drawn again, is the same drawing. Texts are set as text, never as markup. */
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const rules = JSON.parse(document.getElementById("drawing-rules").textContent);
  const { units, dots, shapes } = rules;

  // --- axes.py: spans, ticks, labels ---------------------------------------------------------------------------

  const MAGNITUDE_MAX = 1e300, GRAIN = 1e-14, DIGITS_MAX = 1e5, LABEL_MAX = 1e7, LABEL_STEP_MIN = 0.99e-5;
  const NARROW_SPACE = "\u202f", MINUS = "\u2212", SUPERSCRIPT = "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079";
  const HOURS = [1, 2, 3, 6, 12, 24];

  const exponentOf = (number) => Math.floor(Math.log10(number) + 1e-9);
  const powerOfTen = (exponent) => Number(`1e${exponent}`);
  const superscript = (number) => [...String(number)].map((it) => (it === "-" ? "\u207b" : SUPERSCRIPT[it])).join("");
  const joined = (...words) => words.filter(Boolean).join(" ");

  function bounded(number, isLog) {
    const within = Math.max(Math.min(number, MAGNITUDE_MAX), -MAGNITUDE_MAX);
    if (isLog) return Math.max(within, 1 / MAGNITUDE_MAX);
    return Math.abs(within) >= 1 / MAGNITUDE_MAX ? within : 0;
  }

  function knownOf(values, isLog) {
    return values.filter((it) => Number.isFinite(it) && (it > 0 || !isLog));
  }

  function spanOf(values, isLog, margin) {
    let least = Infinity, most = -Infinity;
    for (const it of knownOf(values, isLog)) {
      if (it < least) least = it;
      if (it > most) most = it;
    }
    if (least > most) return isLog ? [1, 10] : [0, 1];
    [least, most] = [bounded(least, isLog), bounded(most, isLog)];
    if (isLog) {
      const room = most > least * 1.01 ? (most / least) ** margin : 10;
      return [bounded(least / room, true), bounded(most * room, true)];
    }
    const greatest = Math.max(Math.abs(least), Math.abs(most));
    let room = (most - least) * margin;
    if (most - least <= greatest * GRAIN) room = (most === least ? greatest * 0.1 : greatest * GRAIN * 10) || 1;
    return [bounded(least - room, false), bounded(most + room, false)];
  }

  function shownUnit(unit, greatest, step) {
    const fitting = units[unit].filter((it) => greatest >= it.since && (it.exponent !== null || step >= 0.08 * it.factor));
    return fitting.length ? fitting[fitting.length - 1] : units[unit][0];
  }

  function inPowerOfTen(shown, exponent) {
    const name = joined(`10${superscript(exponent)}`, shown.name);
    return { factor: shown.factor * powerOfTen(exponent), name, exponent: null };
  }

  function roundStep(least, unitName) {
    if (unitName === "h" && 0.5 < least && least <= 24) return HOURS.find((it) => it >= least * 0.999999);
    const power = powerOfTen(exponentOf(least));
    return [power, 2 * power, 5 * power, 10 * power].find((it) => it >= least * 0.999999);
  }

  function decimal(number, places) {
    const digits = Math.abs(number).toFixed(places);
    let [whole, rest] = digits.split(".");
    if (whole.length > 4) whole = whole.replace(/\B(?=(\d{3})+$)/g, NARROW_SPACE);
    const sign = number < 0 && /[1-9]/.test(digits) ? MINUS : "";
    return sign + whole + (rest ? `.${rest}` : "");
  }

  const withoutZeros = (text) => (text.includes(".") ? text.replace(/0+$/, "").replace(/\.$/, "") : text);

  function plain(unit, number) {
    const decimalUnits = units[unit].filter((it) => it.exponent !== null);
    const reached = decimalUnits.filter((it) => Math.abs(number) >= it.since);
    const shown = reached.length ? reached[reached.length - 1] : decimalUnits[0];
    const value = number / shown.factor;
    if (Math.abs(value) >= 1e15) {
      const [mantissa, exponent] = value.toExponential(14).split("e");
      return joined(`${withoutZeros(mantissa).replace("-", MINUS)}\u00d710${superscript(Number(exponent))}`, shown.name);
    }
    const places = Math.max(0, 14 - Math.max(exponentOf(Math.abs(value)), 0));
    return joined(withoutZeros(decimal(value, places)), shown.name);
  }

  function linearTicks(unit, [least, most], wanted) {
    const width = most - least;
    let greatest = Math.max(Math.abs(least), Math.abs(most));
    let shown = shownUnit(unit, greatest, width / wanted);
    let step = roundStep(width / shown.factor / wanted, shown.name);
    let base = 0;
    if (greatest / shown.factor / step > DIGITS_MAX) {
      const grain = powerOfTen(exponentOf(width) + 1);
      base = Math.floor((least / 2 + most / 2) / grain + 0.5) * grain;
      greatest = Math.max(Math.abs(least - base), Math.abs(most - base));
      shown = shownUnit(unit, greatest, width / wanted);
      step = roundStep(width / shown.factor / wanted, shown.name);
    }
    if (greatest / shown.factor >= LABEL_MAX || step < LABEL_STEP_MIN) {
      shown = inPowerOfTen(shown, exponentOf(greatest / shown.factor));
      step = roundStep(width / shown.factor / wanted, shown.name);
    }
    const places = Math.max(0, -exponentOf(step));
    const end = Math.floor((most - base) / shown.factor / step + 1e-6);
    const ticks = [];
    for (let it = Math.ceil((least - base) / shown.factor / step - 1e-6); it <= end; it++) {
      ticks.push({ at: base + it * step * shown.factor, label: decimal(it * step, places) });
    }
    if (ticks.length < 2) return linearTicks(unit, [least, most], wanted * 2);
    return [ticks, joined(shown.name, base ? `from ${plain(unit, base)}` : "")];
  }

  function logTicks(unit, [least, most], wanted) {
    const begin = Math.ceil(Math.log10(least) - 1e-9), end = Math.floor(Math.log10(most) + 1e-9);
    const pairs = [];
    if (end - begin >= 2) {
      const every = Math.max(1, Math.ceil((end - begin) / wanted));
      for (let it = Math.ceil(begin / every) * every; it <= end; it += every) pairs.push([1, it]);
    } else {
      for (let it = begin - 1; it <= end; it++) for (const mantissa of [1, 2, 5]) pairs.push([mantissa, it]);
    }
    return pairs
      .map(([mantissa, exponent]) => ({ at: mantissa * powerOfTen(exponent), label: logLabel(unit, mantissa, exponent) }))
      .filter((it) => least * 0.999999 <= it.at && it.at <= most * 1.000001);
  }

  function logLabel(unit, mantissa, exponent) {
    const decimalUnits = units[unit].filter((it) => it.exponent !== null);
    const reached = decimalUnits.filter((it) => it.exponent <= exponent);
    const shown = reached.length ? reached[reached.length - 1] : decimalUnits[0];
    const zeros = exponent - shown.exponent;
    let number = (mantissa === 1 ? "" : `${mantissa}\u00d7`) + `10${superscript(zeros)}`;
    if (0 <= zeros && zeros <= 4) number = mantissa + "0".repeat(zeros);
    else if (-3 <= zeros && zeros < 0) number = `0.${"0".repeat(-zeros - 1)}${mantissa}`;
    return unit === "s/s" || unit === "" ? number : `${number} ${shown.name}`;
  }

  const titled = (label, unit) => (unit && label ? `${label} (${unit})` : label || unit);

  function scaleOf(axis, span, wanted) {
    if (axis.isLog) {
      const ticks = logTicks(axis.unit, span, wanted);
      if (ticks.length > 1) return { span, isLog: true, ticks, title: titled(axis.label, axis.unit === "s/s" ? axis.unit : "") };
    }
    const [ticks, unit] = linearTicks(axis.unit, span, wanted);
    return { span, isLog: axis.isLog, ticks, title: titled(axis.label, unit) };
  }

  function position({ span, isLog }, value, begin, end) {
    let [least, most] = span;
    if (isLog) {
      if (!(value > 0)) return NaN;
      [least, most, value] = [Math.log10(least), Math.log10(most), Math.log10(value)];
    }
    return begin + ((value - least) / (most - least)) * (end - begin);
  }

  // --- outlines.py: paths --------------------------------------------------------------------------------------

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

  // --- What of a line is within a part of the x axis --------------------------------------------------------------

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

  // --- svg.py: the drawing ---------------------------------------------------------------------------------------

  const { colours, dashes, dottedMax, dotRoom, hairlinesMax } = rules.limits;
  const { trimmed, margin, farOut, kindShownMax, kindRoom, titleCharacter } = rules.limits;

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

  // --- Numbers in words --------------------------------------------------------------------------------------------

  /* A number with its unit, to the digit that a part of the plot as small as `grain` shows. */
  function written(axis, value, grain) {
    if (value === Infinity || value === -Infinity) return value > 0 ? "unbounded" : `${MINUS}unbounded`;
    const reached = units[axis.unit].filter((it) => it.exponent !== null && Math.abs(value) >= it.since);
    const shown = reached[reached.length - 1] || units[axis.unit][0];
    const number = value / shown.factor;
    const size = Math.abs(number);
    if (size >= LABEL_MAX * 1e3 || (size > 0 && size < 1e-4)) {
      const [mantissa, exponent] = number.toExponential(3).split("e");
      return joined(`${mantissa.replace("-", MINUS)}\u00d710${superscript(Number(exponent))}`, shown.name);
    }
    const places = Math.max(0, Math.min(12, -exponentOf((axis.isLog ? Math.abs(value) * 1e-3 : grain) / shown.factor || 1)));
    return joined(decimal(number, places), shown.name);
  }

  const grainOf = ({ span }) => (span[1] - span[0]) / 500;

  // --- One plot, and what is shown of it -----------------------------------------------------------------------------

  const READINGS_MAX = 10, HAPPENED_MAX = 6, NEAR_PIXELS = 6, DRAGGED_PIXELS = 6, NARROWEST = 1e-7;
  const STEP = 1.6, PAN = 0.2;
  const tooltip = document.createElement("div");
  tooltip.className = "tooltip";
  tooltip.setAttribute("role", "status");
  tooltip.hidden = true;
  document.body.append(tooltip);

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

  // --- Pointer and keys ----------------------------------------------------------------------------------------------

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

  // --- What is under the pointer -------------------------------------------------------------------------------------

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

  // --- The page --------------------------------------------------------------------------------------------------

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
})();
