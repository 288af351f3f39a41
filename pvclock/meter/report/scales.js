/* Spans, ticks and labels of axes, and numbers in words: by the rules of axes.py. */

const rules = JSON.parse(document.getElementById("drawing-rules").textContent);
const { units } = rules;

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
