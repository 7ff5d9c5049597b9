"""The first token in a model, block by block, against a plain computation from whole attention maps and the cache, in float64."""

from __future__ import annotations

import json

import pytest
import torch
from architectures import make

from labsupport.evidence import sink, sweep
from labsupport.model import models, text
from labsupport.quant import kv

WINDOWS, TOKENS, STORED = 3, 44, 32
IDS = torch.randint(1, 300, (WINDOWS, TOKENS), generator=torch.Generator().manual_seed(0))
# A row has five digits. What is rounded to float32 on the way, x and sums of 3 x 44 tokens, is 132 x 2**-24 = 8e-6 off at most.
DIGITS = 1e-4


def with_a_sink(name: str):
    """A tiny model, float64, that sends much attention to token 299, wherever it stands; and the text, which begins with it."""
    model = make(name).double().eval()
    with torch.no_grad():
        model.get_input_embeddings().weight[299] *= 30
        for layer, linear in models.linears(model).items():
            if layer.endswith(("q_proj", "k_proj")):
                linear.weight *= 4
    ids = IDS.clone()
    ids[:, 0] = 299
    return model, ids


def plainly(model, ids, index: int) -> dict:
    """What `sink.rows` says of a block, from the whole model in one pass."""
    fed, kinds = {}, ("q_proj", "o_proj", "gate_proj", "down_proj")
    prefix = f"layers.{index}."
    readers = [(n, m) for n, m in models.linears(model).items() if prefix in n and n.endswith(kinds)]
    hooks = [m.register_forward_pre_hook(lambda _, x, n=n: fed.update({n.rsplit(".")[-1]: x[0]})) for n, m in readers]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        whole = model(ids, use_cache=True, output_attentions=True, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    maps, layer = whole.attentions[index], whole.past_key_values.layers[index]
    fed["hidden"] = whole.hidden_states[index]
    received = maps[:, :, 8:, 0].mean((0, 2))
    row = {"block": index, "attention": received.mean().item(), "sinking_heads": (received > 0.3).double().mean().item()}
    others = maps[:, :, 8:, 1:].mean((1, 2))  # [windows, tokens]
    row["runner_up"] = {"attention": others.amax(1).mean().item(), "tokens": ids[:, 1:].gather(1, others.argmax(1)[:, None])[:, 0]}
    row["runner_up"]["tokens"] = row["runner_up"]["tokens"].tolist()
    row["inputs"] = {}
    for kind, x in fed.items():
        x = x.abs()
        parts = {"first": x[:, 0], "others": x[:, 1:].flatten(0, 1)}
        share = parts["first"].sum(0) / x.sum((0, 1))
        row["inputs"][kind] = {
            "largest": {where: part.max().item() for where, part in parts.items()},
            "loudest": {where: part.square().sum(0).argmax().item() for where, part in parts.items()},
            "channels": {
                where: next(
                    n
                    for n in range(1, x.shape[-1] + 1)
                    if part.square().sum(0).topk(n).values.sum() >= 0.9 * part.square().sum() * (1 - 1e-12)
                )
                for where, part in parts.items()
            },
            "mean_abs": (parts["first"].sum() / x.sum()).item(),
            "most_mean_abs": share.max().item(),
            "trace": (parts["first"].square().sum() / x.square().sum()).item(),
        }
    states = {"key": layer.keys, "value": layer.values}
    readers = maps.shape[1] // layer.keys.shape[1]
    queries = queries_of(model, ids, index)
    scale = layer.keys.shape[-1] ** -0.5
    given = maps @ layer.values.repeat_interleave(readers, 1)
    row["output_error"] = {f"{what}{which}": {} for what in ("keys", "values") for which in ("", "_but_first")}
    for kind, x in states.items():
        norm = x.norm(dim=-1)
        row[f"{kind}_norm"] = (norm[:, :, 0].mean() / norm[:, :, 1:].mean()).item()
        row[f"{kind}_error"] = {}
        for axis in ("channel", "token"):
            size = 32 if axis == "channel" else min(32, x.shape[-1])
            read = x.clone()
            read[:, :, :STORED] = kv.quantize(x[:, :, :STORED], kv.Part(4, axis, size)).dequantize().double()
            parts = {"first": slice(0, 1), "beside": slice(1, 32), "others": slice(1, STORED)}
            row[f"{kind}_error"][axis] = {
                where: ((read - x)[:, :, s].norm() / x[:, :, s].norm()).item() for where, s in parts.items()
            }
            for which, states_read in (("", read), ("_but_first", torch.cat([x[:, :, :1], read[:, :, 1:]], 2))):
                if kind == "value":
                    otherwise = maps @ states_read.repeat_interleave(readers, 1)
                else:
                    scores = scale * queries @ states_read.repeat_interleave(readers, 1).mT
                    scores = scores.masked_fill(torch.ones(TOKENS, TOKENS).triu(1).bool(), -torch.inf)
                    otherwise = scores.softmax(-1) @ layer.values.repeat_interleave(readers, 1)
                row["output_error"][f"{kind}s{which}"][axis] = ((otherwise - given).norm() / given.norm()).item()
    return row


def queries_of(model, ids, index: int) -> torch.Tensor:
    """After the rotary embedding, [windows, heads, tokens, width]: by rotating what q_proj gives."""
    given = []
    layer = next(m for n, m in models.linears(model).items() if f"layers.{index}." in n and n.endswith("q_proj"))
    hook = layer.register_forward_hook(lambda _, inputs, output: given.append(output))
    with torch.no_grad():
        model(ids, use_cache=False)
    hook.remove()
    heads = given[0].unflatten(2, (model.config.num_attention_heads, -1)).transpose(1, 2)
    frequencies = next(m.inv_freq for m in model.modules() if hasattr(m, "inv_freq"))
    return kv.rotate(heads, torch.arange(TOKENS), frequencies)


def close(found, wanted, path=""):
    """The same keys, whole numbers equal, and other numbers within DIGITS."""
    if isinstance(wanted, dict):
        assert set(found) == set(wanted), path
        for key in wanted:
            close(found[key], wanted[key], f"{path}/{key}")
    elif isinstance(wanted, int | list):
        assert found == wanted, path
    else:
        assert found == pytest.approx(wanted, rel=DIGITS, abs=1e-9), path


@pytest.mark.parametrize("name", ["llama", "llama-biases-tied"])
def test_equals_a_plain_computation(name):
    model, ids = with_a_sink(name)
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        found = list(sink.rows(model, ids, batch=2))
        assert len(found) == len(models.blocks(model))
        for row in found:
            close(row, plainly(model, ids, row["block"]))
    first, last = found[0], found[-1]
    assert first["inputs"]["hidden"]["trace"] > 0.5  # the embedding was made large
    assert first["key_error"]["token"]["first"] != first["key_error"]["token"]["others"]
    assert last["attention"] > 1 / TOKENS


def test_an_mlp_that_is_fed_all_tokens_in_one_row_is_seen_window_by_window():
    """OPT's: what fc1 is fed is what the norm before it gives, window by window, and the shares are of its first tokens."""
    model = make("opt").eval()
    (row, *_), norms = sink.rows(model, IDS), []
    block = models.blocks(model)[0]
    handle = block.final_layer_norm.register_forward_hook(lambda module, args, output: norms.append(output))
    with torch.no_grad():
        model(IDS)
    handle.remove()
    x = torch.cat([each.view(-1, IDS.shape[1], each.shape[-1]) for each in norms]).abs()
    assert row["inputs"]["fc1"]["mean_abs"] == pytest.approx((x[:, 0].sum() / x.sum()).item(), rel=1e-2)


def test_a_fused_layer_is_a_kind_of_its_own():
    rows = list(sink.rows(make("phi3").eval(), IDS))
    assert set(rows[0]["inputs"]) == {"hidden", "qkv_proj", "o_proj", "gate_up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("name", "ids", "error", "message"),
    [
        ("gpt-j", IDS, models.ModelError, "block 0 does not ask transformers for its attention: it cannot be watched"),
        ("llama", IDS[:, :31], ValueError, "the length of a window is 31, wanted a whole number from 32 up"),
    ],
)
def test_what_cannot_be_measured_is_one_line(name, ids, error, message):
    with pytest.raises(error, match=message):
        list(sink.rows(make(name).eval(), ids))


def test_an_attention_that_does_more_is_refused(monkeypatch):
    """Here: one that adds to its scores what no argument says."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def more(module, query, key, *args, **settings):
        return sdpa_attention_forward(module, 2 * query, key, *args, **settings)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", more)
    with pytest.raises(models.ModelError, match=r"the attention does more than softmax\(Q K\^T\) V"):
        list(sink.rows(make("llama").eval(), IDS))


def test_a_sentence_says_whether_there_is_a_sink():
    rows = [{"block": 0, "attention": 0.01, "sinking_heads": 0.0}, {"block": 1, "attention": 0.03, "sinking_heads": 0.0}]
    said = sink.summary(rows)
    assert said.startswith("no attention sink: the first token gets 2.0% of all attention, at most 3.0% (block 1)")
    rows[1]["sinking_heads"] = 0.5
    assert sink.summary(rows).startswith("an attention sink: ")
    assert sink.summary(rows).endswith("more than 30% in 25% of the heads")


def test_the_sweep_goes_on_where_it_was_stopped(tmp_path):
    model = make("llama").eval()
    ids = torch.randint(0, 300, (256,), generator=torch.Generator().manual_seed(0))
    stream = text.TokenStream(ids, torch.arange(256) // 64, tuple("abcd"), 2000, "digest", "made up")

    class Stop(Exception):
        pass

    def stop(done, total):
        if done:
            raise Stop

    path = tmp_path / "sink.json"
    with pytest.raises(Stop):
        sweep.run("sink", model, stream, path, "tiny", windows=2, length=64, on_row=stop)
    assert [row["block"] for row in json.loads(path.read_text())["rows"]] == [0]
    rows = sweep.run("sink", model, stream, path, "tiny", windows=2, length=64, short=True).rows
    assert rows == list(sink.rows(model, stream.ids[stream.positions(64, 2)]))
    assert all(set(row) == {"block", *sink.MEASURED} for row in rows)


def test_shipped_rows_of_the_published_model_are_of_every_block():
    measured = sweep.load("sink", "smollm2")
    assert [row["block"] for row in measured.rows] == list(range(30))
    assert measured.about["model_sha256"] == sweep.load("rtn", "smollm2").about["model_sha256"]
    assert all(set(row) == {"block", *sink.MEASURED} for row in measured.rows)
