// The planner's form, and its answer: the lines that `labs plan` prints.

const OWN = "own";
const field = Object.fromEntries(["model", "card", "memory", "context", "users", "quality", "cache", "config"].map((id) => [id, document.getElementById(id)]));
const gigabytes = (bytes, digits = 1) => fixed(bytes / 1e9, digits);

function fill(select, entries, chosen) {
  select.replaceChildren(...entries.map(([value, label]) => new Option(label, value, value === chosen, value === chosen)));
}

fill(field.model, [...TABLES.models.map(({ name }) => [name, name]), [OWN, "another: its config.json"]], "Llama-3.1-8B");
fill(field.card, TABLES.cards.map(({ name, memory }) => [name, `${name}, ${gigabytes(memory, 0)} GB`]), "RTX 4090");
fill(field.quality, TABLES.qualities.map((name) => [name, name]), "little-loss");
fill(field.cache, Object.keys(TABLES.caches).map((name) => [name, name]), "bf16");

function wanted(input, least) {
  const value = Number(input.value);
  if (input.value === "" || value < least || !(Number.isInteger(value) || input.step === "any")) {
    throw new Refused(`${input.id} is ${input.value || "empty"}, wanted ${input.step === "any" ? "a number" : "a whole number"}, at least ${least}`);
  }
  return value;
}

function chosenShape() {
  if (field.model.value !== OWN) {
    const { name, config } = TABLES.models.find(({ name }) => name === field.model.value);
    return shapeOf(config, name);
  }
  if (!field.config.value.trim()) throw new Refused("Copy the config.json of your model into the field above.");
  const config = parseConfig(field.config.value);
  try {
    return shapeOf(config, "your model");
  } catch (error) {
    if (error instanceof Refused) error.message = `config.json: ${error.message}`;
    throw error;
  }
}

function calculate() {
  const shape = chosenShape(), card = { ...TABLES.cards.find(({ name }) => name === field.card.value) };
  if (field.memory.value !== "") card.memory = 1e9 * wanted(field.memory, 0.001);
  const context = wanted(field.context, 1), users = wanted(field.users, 1);
  const quality = field.quality.value, cache = field.cache.value;
  const choice = recommend(shape, card, context, users, quality, cache);
  return { shape, card, context, users, quality, choice, others: options(shape, card, context, users, cache) };
}

function element(name, content, attributes = {}) {
  const made = document.createElement(name);
  made.append(...[content].flat());
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function table(caption, head, rows, attributes = {}) {
  const cells = (name, values) => values.map((value) => element(name, value, name === "th" ? { scope: "col" } : {}));
  const body = rows.map(({ values: [first, ...rest], ...more }) => element("tr", [element("th", first, { scope: "row" }), ...cells("td", rest)], more));
  const made = element("table", [element("caption", caption), element("thead", element("tr", cells("th", head))), element("tbody", body)], attributes);
  return element("div", made, { class: "scrolls" });
}

function optionRow(each, chosen) {
  const weights = each.parts.linears + each.parts["embedding and head"];
  const sizes = [weights, each.parts["KV cache"], each.total - weights - each.parts["KV cache"], each.total];
  const values = [each.form.name, ...sizes.map((size) => gigabytes(size)), each.fits ? fixed(each.tokensPerSecond, 0) : "too large", fixed(each.mostUsers, 0)];
  return { values, class: each.form.name === chosen ? "chosen" : each.fits ? "" : "too-large" };
}

function partRow(part, size, memory) {
  return { values: [part, gigabytes(size, 2), element("span", "", { class: "bar", style: `width: ${(100 * size) / memory}%` })] };
}

// "claim 3 (depends): ...": its number leads to what came of it.
function linked(line) {
  const [, number, rest] = line.match(/^claim (\d+)( .*)$/) ?? [];
  return number ? [element("a", `claim ${number}`, { href: `claims.html#claim-${number}` }), rest] : line;
}

const list = (lines) => element("ul", lines.map((line) => element("li", line)));

function show({ shape, card, context, users, quality, choice, others }) {
  const { plan: chosen, rule, passedOver } = choice, form = chosen.form, who = plural(users, "user");
  const parts = Object.entries(chosen.parts).map(([part, size]) => partRow(part, size, card.memory));
  const group = groupSize(shape, form);
  const lines = [
    `Use ${form.name}: ${form.title}. ${rule.reason}.`,
    `Made with: ${form.made_with}.`,
    ...passedOver.map(([name, size]) => `${name} would come before it, but takes ${gigabytes(size)} GB.`),
    ...(group === form.group ? [] : [`Groups of ${group} here: ${form.group} does not divide the inputs of every linear.`]),
    ...(chosen.prefillSeconds === null ? [] : [`A prompt of ${fixed(context, 0)} tokens takes at least ${twoDigits(chosen.prefillSeconds)} s; ${chosen.limit} limits steps.`]),
    `With ${who} a sequence can have ${fixed(chosen.longestContext, 0)} tokens.`,
  ];
  const about = [
    `${shape.name}, ${gigabytes(shape.parameters, 2)} billion parameters, ${gigabytes(shape.active, 2)} for each token`,
    `${card.name}, ${gigabytes(card.memory, 0)} GB at ${gigabytes(card.bandwidth, 0)} GB/s (${card.source})`,
    `${who}, ${fixed(context, 0)} tokens each; quality ${quality}`,
  ];
  return [
    element("h2", "What to use"),
    element("div", lines.map((line) => element("p", line)), { class: "recommended", id: "recommended" }),
    list(about),
    element("h2", "What each format takes"),
    table("GB; tokens a second of all users together, at most", ["format", "weights", "cache", "rest", "total GB", "tokens/s <=", "most users"], others.map((each) => optionRow(each, form.name)), { id: "options" }),
    element("h2", "Bytes by part"),
    table(`${form.name}; the whole width is the memory of the card`, ["part", "GB", ""], [...parts, { values: ["total", gigabytes(chosen.total, 2), ""] }], { id: "parts" }),
    element("h2", "Evidence"), list(rule.evidence.map(linked)),
    element("h2", "Assumptions"), list(TABLES.assumptions),
  ];
}

function answer() {
  document.getElementById("own").hidden = field.model.value !== OWN;
  const place = document.getElementById("plan"), announced = document.getElementById("answer");
  try {
    const found = calculate(), { plan: chosen } = found.choice;
    announced.className = "";
    announced.textContent = `${chosen.form.name}: ${gigabytes(chosen.total)} of ${gigabytes(found.card.memory, 0)} GB, at most ${fixed(chosen.tokensPerSecond, 0)} tokens a second.`;
    place.replaceChildren(...show(found));
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    announced.className = "problem";
    announced.textContent = error.message;
    place.replaceChildren();
  }
  if (typeof markScrolling === "function") markScrolling();
}

let waiting;
document.getElementById("planner").addEventListener("submit", (event) => event.preventDefault());
document.getElementById("planner").addEventListener("input", (event) => {
  clearTimeout(waiting); // while somebody types, a screen reader is not told of every digit
  waiting = setTimeout(answer, event.target.tagName === "SELECT" ? 0 : 300);
});
document.getElementById("planner").hidden = false;
answer();
