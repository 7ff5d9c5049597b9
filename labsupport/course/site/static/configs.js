// From a config.json to the sizes of a model: labsupport/evidence/configs.py and shapes.py, line for line.
// A test compares both on every family and on configs that are refused.

// What a reader gave cannot be planned with: one line that says why.
class Refused extends Error {}

// A whole number in JSON that is written 4096.0 is none to Python. Browsers that do not show how it was written let it pass.
class Float extends Number {}

function parseConfig(text) {
  let config;
  try {
    config = JSON.parse(text, (key, value, how) => (typeof value === "number" && /[.eE]/.test(how?.source ?? "") ? new Float(value) : value));
  } catch (error) {
    throw new Refused(`config.json cannot be read: ${error.message}`);
  }
  if (!isMapping(config)) throw new Refused("config.json holds no config of a model");
  return config;
}

const isMapping = (value) => typeof value === "object" && value !== null && !Array.isArray(value) && !(value instanceof Float);

// What Python's repr prints of a value from JSON.
function repr(value) {
  if (value === undefined || value === null) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (typeof value === "string") return value.includes("'") && !value.includes('"') ? `"${value}"` : `'${value.replaceAll("\\", "\\\\").replaceAll("'", "\\'")}'`;
  if (value instanceof Float) return Number.isInteger(+value) ? (+value).toFixed(1) : String(+value);
  if (Array.isArray(value)) return `[${value.map(repr).join(", ")}]`;
  if (isMapping(value)) return `{${Object.entries(value).map(([key, each]) => `${repr(key)}: ${repr(each)}`).join(", ")}}`;
  return String(value);
}

// What Python takes for false.
const falsy = (value) => value === undefined || value === null || value === false || value === "" || +value === 0 ||
  (Array.isArray(value) ? value.length === 0 : isMapping(value) && Object.keys(value).length === 0);

const range = (count) => Array.from({ length: count }, (_, i) => i);

function shapeOf(config, name) {
  const native = config.quantization_config?.quant_method ?? null;
  if (isMapping(config.text_config)) config = config.text_config;
  const kind = config.model_type;
  if (typeof kind !== "string" || !Object.hasOwn(FAMILIES, kind)) {
    throw new Refused(`model_type is ${repr(kind)}, whose sizes are not known here; known are ${TABLES.families.join(", ")}`);
  }
  return withSizes(FAMILIES[kind](config, { name, native }));
}

// The first of the names that the config has.
function whole(config, names, fallback) {
  const found = names.map((name) => config[name]).find((value) => value !== undefined && value !== null) ?? fallback;
  if (typeof found !== "number" || !Number.isInteger(found) || found < 1) {
    throw new Refused(`${names[0]} is ${repr(found)} in the config, wanted a whole number above 0`);
  }
  return found;
}

// What nearly all configs say by the same names; small tensors are still a Llama's.
function common(config, fields, { tied = false, width = null } = {}) {
  const heads = whole(config, ["num_attention_heads"]);
  const hidden = whole(config, ["hidden_size"]);
  const headWidth = whole(config, ["head_dim"], width ?? Math.max(1, Math.floor(hidden / heads)));
  const layers = whole(config, ["num_hidden_layers"]);
  const vocab = whole(config, ["vocab_size"]);
  return {
    layers, vocab, hidden, heads, width: headWidth,
    intermediate: whole(config, ["intermediate_size", "ffn_dim"], 4 * hidden),
    kvHeads: whole(config, ["num_key_value_heads", "num_kv_heads"], heads),
    tied: config.tie_word_embeddings === undefined ? tied : !falsy(config.tie_word_embeddings),
    gated: true, experts: null, latent: null, windows: [], small: (2 * layers + 1) * hidden, ...fields,
  };
}

function windowsOf(config, shape, seesAll = () => false) {
  if (falsy(config.sliding_window) || config.use_sliding_window === false) return [];
  const window = whole(config, ["sliding_window"]);
  const kinds = falsy(config.layer_types) ? range(shape.layers).map((i) => (seesAll(i) ? "full" : "sliding_attention")) : config.layer_types;
  if (kinds.length !== shape.layers) {
    throw new Refused(`layer_types has ${kinds.length} entries, wanted one for each of ${shape.layers} layers`);
  }
  const windows = kinds.map((kind) => (kind === "sliding_attention" ? window : 0));
  return windows.some(Boolean) ? windows : [];
}

function llama(config, fields) {
  const kind = config.model_type;
  const shape = common(config, fields, { tied: kind === "smollm3" });
  const queries = shape.heads * shape.width, keys = shape.kvHeads * shape.width;
  if (kind === "qwen2") shape.small += shape.layers * (queries + 2 * keys);
  else if (!falsy(config.attention_bias)) shape.small += shape.layers * (queries + 2 * keys + shape.hidden);
  if (!falsy(config.mlp_bias)) shape.small += shape.layers * (2 * shape.intermediate + shape.hidden);
  if (kind === "qwen2" || kind === "qwen3") {
    const first = config.max_window_layers ?? 28;
    shape.windows = windowsOf(config, shape, (layer) => layer < first);
  } else if (kind === "mistral" || kind === "phi3") shape.windows = windowsOf(config, shape);
  return shape;
}

function qwen3(config, fields) {
  const shape = llama(config, fields);
  shape.width = whole(config, ["head_dim"], 128);
  shape.small += shape.layers * 2 * shape.width;
  return shape;
}

function qwen3Moe(config, fields) {
  const shape = qwen3(config, fields);
  const step = whole(config, ["decoder_sparse_step"], 1);
  const dense = falsy(config.mlp_only_layers) ? [] : config.mlp_only_layers;
  const sparse = range(shape.layers).filter((layer) => (layer + 1) % step === 0 && !dense.includes(layer)).length;
  const count = whole(config, ["num_experts", "num_local_experts"]);
  const active = whole(config, ["num_experts_per_tok"]);
  shape.experts = { layers: sparse, count, active, width: whole(config, ["moe_intermediate_size"]), shared: 0 };
  shape.small += sparse * count * shape.hidden;
  return shape;
}

function mixtral(config, fields) {
  const shape = common(config, fields);
  const count = whole(config, ["num_local_experts"]);
  shape.experts = { layers: shape.layers, count, active: whole(config, ["num_experts_per_tok"]), width: shape.intermediate, shared: 0 };
  shape.small += shape.layers * count * shape.hidden;
  shape.windows = windowsOf(config, shape);
  return shape;
}

function gemma(config, fields) {
  const three = config.model_type === "gemma3_text";
  const shape = common(config, fields, { tied: true, width: 256 });
  shape.small = (4 * shape.layers + 1) * shape.hidden + (three ? shape.layers * 2 * shape.width : 0);
  const turn = three ? whole(config, ["sliding_window_pattern", "_sliding_window_pattern"], 6) : 2;
  shape.windows = windowsOf(config, shape, (layer) => (layer + 1) % turn === 0);
  return shape;
}

function deepseek(config, fields) {
  const shape = common(config, fields);
  const rank = whole(config, ["kv_lora_rank"]);
  const latent = { rank, rope: whole(config, ["qk_rope_head_dim"]), nope: whole(config, ["qk_nope_head_dim"]), value: whole(config, ["v_head_dim"]) };
  latent.queryRank = (config.q_lora_rank ?? null) !== null ? whole(config, ["q_lora_rank"]) : null;
  shape.latent = latent;
  shape.small += shape.layers * (rank + (latent.queryRank ?? 0));
  if (falsy(config.n_routed_experts)) return shape;
  const width = whole(config, ["moe_intermediate_size"]), count = whole(config, ["n_routed_experts"]);
  const sparse = Math.max(0, shape.layers - Math.trunc(+(config.first_k_dense_replace ?? 0)));
  const active = whole(config, ["num_experts_per_tok"]);
  shape.experts = { layers: sparse, count, active, width, shared: width * Math.trunc(+(config.n_shared_experts ?? 0)) };
  shape.small += sparse * count * shape.hidden;
  return shape;
}

function gptOss(config, fields) {
  const shape = common(config, fields, { width: 64 });
  const count = whole(config, ["num_local_experts"]);
  const queries = shape.heads * shape.width, keys = shape.kvHeads * shape.width;
  shape.experts = { layers: shape.layers, count, active: whole(config, ["num_experts_per_tok"]), width: shape.intermediate, shared: 0 };
  const ofExperts = count * (shape.hidden + 1 + 2 * shape.intermediate + shape.hidden);
  shape.windows = windowsOf(config, shape, (layer) => layer % 2 === 1);
  shape.small += shape.layers * (queries + 2 * keys + shape.hidden + shape.heads + ofExperts);
  return shape;
}

function olmo2(config, fields) {
  const shape = common(config, fields);
  shape.small += shape.layers * (shape.heads + shape.kvHeads) * shape.width;
  return shape;
}

function falcon(config, fields) {
  if (!falsy(config.bias) || !falsy(config.alibi) || (config.parallel_attn !== undefined && falsy(config.parallel_attn))) {
    throw new Refused("a Falcon with bias, alibi or without parallel_attn is not known here");
  }
  const shape = common(config, fields, { tied: true });
  const newer = !falsy(config.new_decoder_architecture);
  const norms = newer && config.num_ln_in_parallel_attn !== 1 ? 2 : 1;
  if (!newer) shape.kvHeads = config.multi_query === undefined || !falsy(config.multi_query) ? 1 : shape.heads;
  shape.gated = false;
  shape.small = 2 * shape.hidden * (norms * shape.layers + 1);
  return shape;
}

function opt(config, fields) {
  const shape = common(config, fields, { tied: true });
  const embedded = config.word_embed_proj_dim === undefined ? shape.hidden : config.word_embed_proj_dim;
  if (embedded !== shape.hidden || (config.do_layer_norm_before !== undefined && falsy(config.do_layer_norm_before))) {
    throw new Refused("an OPT whose embedding has another width than its blocks, or with norms after them, is not known here");
  }
  const positions = (whole(config, ["max_position_embeddings"], 2048) + 2) * shape.hidden;
  shape.gated = false;
  shape.small = positions + 2 * shape.hidden + shape.layers * (9 * shape.hidden + shape.intermediate);
  return shape;
}

const FAMILIES = {
  llama, mistral: llama, phi3: llama, smollm3: llama, granite: llama, qwen2: llama, qwen3, qwen3_moe: qwen3Moe, mixtral,
  gemma2: gemma, gemma3_text: gemma, deepseek_v2: deepseek, deepseek_v3: deepseek, gpt_oss: gptOss, olmo2, falcon, opt,
};

// Linears inside the blocks: weights [rows, columns], `times` of them in the model, of which a token passes `used`.
function linearsOf(shape) {
  const { hidden, heads, latent, layers, experts } = shape, found = [];
  const add = (name, rows, columns, times = layers, used = times) => found.push({ name, rows, columns, times, used, values: rows * columns });
  if (latent === null) {
    const queries = heads * shape.width, keys = shape.kvHeads * shape.width;
    add("q_proj", queries, hidden);
    add("k_proj", keys, hidden);
    add("v_proj", keys, hidden);
    add("o_proj", hidden, queries);
  } else {
    const queries = heads * (latent.nope + latent.rope);
    if (latent.queryRank === null) add("q_proj", queries, hidden);
    else {
      add("q_a_proj", latent.queryRank, hidden);
      add("q_b_proj", queries, latent.queryRank);
    }
    add("kv_a_proj", latent.rank + latent.rope, hidden);
    add("kv_b_proj", heads * (latent.nope + latent.value), latent.rank);
    add("o_proj", hidden, heads * latent.value);
  }
  const mlps = (prefix, width, times, used) => {
    if (!width || !times) return;
    for (const name of shape.gated ? ["gate_proj", "up_proj"] : ["up_proj"]) add(prefix + name, width, hidden, times, used);
    add(prefix + "down_proj", hidden, width, times, used);
  };
  if (experts === null) mlps("", shape.intermediate, layers, layers);
  else {
    mlps("", shape.intermediate, layers - experts.layers, layers - experts.layers);
    mlps("experts.", experts.width, experts.layers * experts.count, experts.layers * experts.active);
    mlps("shared_expert.", experts.shared, experts.layers, experts.layers);
  }
  return found;
}

function withSizes(shape) {
  const linears = linearsOf(shape), embedding = shape.vocab * shape.hidden;
  const inLinears = linears.reduce((sum, each) => sum + each.values * each.times, 0);
  return {
    ...shape, linears, embedding,
    parameters: inLinears + embedding * (shape.tied ? 1 : 2) + shape.small,
    active: linears.reduce((sum, each) => sum + each.values * each.used, 0) + embedding,
    cachedNumbers: shape.latent === null ? 2 * shape.kvHeads * shape.width : shape.latent.rank + shape.latent.rope,
  };
}
