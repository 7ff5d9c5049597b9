// `labs plan` in the browser: labsupport/evidence/planner.py and choosing.py, line for line. Tables and constants are TABLES, which
// `labs site` writes from Python. A test compares every figure with `labs plan`.

const FORMATS = Object.fromEntries(TABLES.formats.map((form) => [form.name, form]));
const rateOf = (card, units) => card.rates[units] ?? card.rates.half ?? null;
const sum = (values) => values.reduce((total, value) => total + value, 0);

// Bits of a weight in a row of so many columns.
const bitsOf = (form, bits, columns) => (form.block && columns % form.block ? (TABLES.fallback[String(bits)] ?? bits) : bits);

// The format's groups, halved until they divide the inputs of every linear.
function groupSize(shape, form) {
  let group = form.group;
  while (typeof group === "number" && group > 1 && shape.linears.some((each) => each.columns % group)) group = Math.floor(group / 2);
  return group;
}

// llama.cpp's use_more_bits: the first and last eighth of the layers, and every third between.
function getsMore(layer, layers) {
  const eighth = Math.floor(layers / 8);
  return layer < eighth || layer >= Math.floor((7 * layers) / 8) || (layer - eighth) % 3 === 2;
}

// Of every kind of linear, with scales and zero-points.
function linearBytes(shape, form) {
  const group = groupSize(shape, form), found = {};
  for (const each of shape.linears) {
    if (form.only === "experts" && !each.name.startsWith("experts.")) {
      found[each.name] = 2 * each.values * each.times;
      continue;
    }
    let bits = bitsOf(form, form.bits, each.columns);
    if (form.more && form.more.names.includes(each.name.split(".").at(-1))) {
      const share = range(shape.layers).filter((layer) => getsMore(layer, shape.layers)).length / shape.layers;
      bits += share * (bitsOf(form, form.more.bits, each.columns) - bits);
    }
    const groups = group === null ? 0 : typeof group === "string" ? each.rows : each.values / group;
    found[each.name] = (each.times * (each.values * bits + groups * (form.scale + form.zero))) / 8;
  }
  return found;
}

function bytesByPart(shape, card, form, context, users, cache) {
  const head = bitsOf(form, form.head, shape.hidden), embedding = bitsOf(form, form.embedding, shape.hidden);
  return {
    linears: sum(Object.values(linearBytes(shape, form))),
    "embedding and head": (shape.embedding * (shape.tied ? head : embedding + head) + 16 * shape.small) / 8,
    "KV cache": cacheBytes(shape, context, users, TABLES.caches[cache]),
    activations: activationBytes(shape, context, users),
    reserve: card.reserve * card.memory,
  };
}

function cacheBytes(shape, context, users, bits) {
  const tokens = shape.windows.length ? sum(shape.windows.map((window) => (window ? Math.min(context, window) : context))) : shape.layers * context;
  return (users * tokens * shape.cachedNumbers * bits) / 8;
}

function activationBytes(shape, context, users) {
  const tokens = Math.max(users, Math.min(TABLES.chunk, users * context)), e = shape.experts;
  const attention = (2 * shape.heads + 2 * shape.kvHeads) * shape.width;
  let width = e === null ? shape.intermediate : e.active * e.width + e.shared;
  if (e !== null && e.layers < shape.layers) width = Math.max(width, shape.intermediate);
  return 2 * tokens * (2 * shape.hidden + Math.max(attention, 3 * width)) + 4 * users * shape.vocab;
}

// Bytes of weights that a step reads: of experts those that a token of the batch asks for; of the input table nothing.
function readBytes(shape, form, batch) {
  const stored = linearBytes(shape, form);
  const read = sum(shape.linears.map((each) => stored[each.name] * (1 - (1 - each.used / each.times) ** batch)));
  return read + (shape.embedding * bitsOf(form, form.head, shape.hidden) + 16 * shape.small) / 8;
}

// The largest number up to 2**30 for which `fits` is true.
function most(fits) {
  if (!fits(1)) return 0;
  let low = 1, high = 2 ** 30;
  while (low < high) {
    const middle = Math.floor((low + high + 1) / 2);
    if (fits(middle)) low = middle;
    else high = middle - 1;
  }
  return low;
}

function plan(shape, card, form, context, users, cache) {
  const rate = rateOf(card, form.arithmetic), parts = bytesByPart(shape, card, form, context, users, cache);
  const total = sum(Object.values(parts));
  const read = readBytes(shape, form, users) + cacheBytes(shape, context, users, TABLES.caches[cache]);
  const reading = read / card.bandwidth, computing = rate ? (2 * shape.active * users) / rate : 0;
  const wouldFit = (tokens, people) => sum(Object.values(bytesByPart(shape, card, form, tokens, people, cache))) <= card.memory;
  return {
    form, parts, total, fits: total <= card.memory,
    tokensPerSecond: users / Math.max(reading, computing),
    limit: reading >= computing ? "memory" : "compute",
    prefillSeconds: rate ? (2 * shape.active * context) / rate : null,
    mostUsers: most((people) => wouldFit(context, people)),
    longestContext: most((tokens) => wouldFit(tokens, users)),
  };
}

// A model that was published in few bits has no other form to start from: where a rule is for it, no other rule speaks.
function speaking(shape, card, quality) {
  const rules = TABLES.rules.filter((rule) => rule.task === "serve" && (rule.quality === null || rule.quality === quality) &&
    (!rule.families.length || rule.families.includes(card.family)) && (!rule.kinds.length || rule.kinds.includes(card.kind)) &&
    (rule.native === null || rule.native === shape.native));
  const native = rules.filter((rule) => rule.native);
  return native.length ? native : rules;
}

// The first rule that speaks of this and whose bytes fit, or Refused, whose one line says what would fit.
function recommend(shape, card, context, users, quality, cache) {
  const passedOver = [];
  for (const rule of speaking(shape, card, quality)) {
    const found = plan(shape, card, FORMATS[rule.format], context, users, cache);
    if (found.fits) return { rule, plan: found, passedOver };
    passedOver.push([rule.format, found.total]);
  }
  throw new Refused(whatWouldFit(shape, card, context, users, quality, cache, passedOver));
}

// A plan for 16 bits and for each format that a rule for this card names, largest first.
function options(shape, card, context, users, cache) {
  const names = new Set(TABLES.qualities.flatMap((quality) => speaking(shape, card, quality).map((rule) => rule.format)));
  const plans = TABLES.formats.filter((form) => form.name === "bf16" || names.has(form.name)).map((form) => plan(shape, card, form, context, users, cache));
  return plans.sort((one, other) => other.total - one.total);
}

const plural = (count, word) => `${count} ${word}${count > 1 ? "s" : ""}`;

function whatWouldFit(shape, card, context, users, quality, cache, tried) {
  if (!tried.length) {
    const known = [...new Set(TABLES.rules.filter((rule) => rule.task === "serve").flatMap((rule) => rule.families))].sort();
    return `no rule is about serve on ${card.name} (${card.family}); there are rules for ${known.join(", ")}`;
  }
  const [name, least] = tried.reduce((best, each) => (each[1] < best[1] ? each : best));
  const takes = `${name} with ${plural(users, "user")} of ${fixed(context, 0)} tokens takes ${fixed(least / 1e9, 1)} of ${fixed(card.memory / 1e9, 0)} GB`;
  const fits = whatFits(shape, card, context, users, quality, cache, FORMATS[name]);
  return `${shape.name} does not fit ${card.name}: ${takes}. What would fit: ${fits.length ? fits.join("; ") : "nothing on one card of the table"}`;
}

function whatFits(shape, card, context, users, quality, cache, form) {
  const found = [], here = plan(shape, card, form, context, users, cache);
  if (here.mostUsers) found.push(`${plural(here.mostUsers, "user")} of ${fixed(context, 0)} tokens`);
  if (here.longestContext) found.push(`${fixed(here.longestContext, 0)} tokens each`);
  if (cache === "bf16" && plan(shape, card, form, context, users, "fp8").fits) found.push("an fp8 cache");
  const fitting = (other, level) => speaking(shape, other, level).find((rule) => plan(shape, other, FORMATS[rule.format], context, users, cache).fits);
  for (const lower of TABLES.qualities.slice(TABLES.qualities.indexOf(quality) + 1)) {
    const smaller = fitting(card, lower);
    if (smaller) {
      found.push(`${smaller.format}, where the quality may be ${lower}`);
      break;
    }
  }
  const larger = [...TABLES.cards].sort((one, other) => one.memory - other.memory).find((other) => other.memory > card.memory && fitting(other, quality));
  if (larger) found.push(`${larger.name} (${fixed(larger.memory / 1e9, 0)} GB)`);
  return found;
}

// As Python's f"{value:,.{digits}f}": a number that is halfway goes to the even digit, where toFixed goes up.
function fixed(value, digits) {
  let text = value.toFixed(digits);
  const halves = value * 2 ** (digits + 1);
  const halfway = Number.isInteger(halves) && Math.abs(halves) % 2 === 1;
  if (halfway && Number(text.at(-1)) % 2) text = (value - 10 ** -digits / 2).toFixed(digits);
  const [before, after] = text.split(".");
  return before.replace(/\B(?=(\d{3})+$)/g, ",") + (after === undefined ? "" : `.${after}`);
}

// As Python's f"{value:.2g}".
function twoDigits(value) {
  const [digits, exponent] = value.toExponential(1).split("e").map(Number);
  if (exponent >= -4 && exponent < 2) return String(Number(value.toPrecision(2)));
  return `${digits}e${exponent < 0 ? "-" : "+"}${String(Math.abs(exponent)).padStart(2, "0")}`;
}
