"""A whole model through a method, sweeps, claims."""

import copy
import json
from itertools import pairwise

import pytest
import torch
import typer
from torch import nn
from torch.nn.utils import prune

from labsupport import checkpoint
from labsupport.cli import app
from labsupport.evidence import claims, sweep
from labsupport.model import evaluate, models, text
from labsupport.pipeline import calibrate
from labsupport.pipeline.quantize import quantize_model
from labsupport.quant import int8, nf4, rtn


@pytest.mark.slow
def test_every_linear_holds_what_is_stored_and_nothing_else_moves(tiny):
    before = {k: v.clone() for k, v in tiny.state_dict().items()}
    quantized, report = quantize_model(tiny, "rtn", bits=3, group_size=16)
    linears = models.linears(tiny)
    nbytes = 0
    for name, value in quantized.state_dict().items():
        layer = name.removesuffix(".weight")
        if layer in linears:
            stored = rtn.quantize(before[name], 3, 16)
            nbytes += stored.nbytes
            assert torch.equal(value, stored.dequantize()), name
        else:
            assert torch.equal(value, before[name]), name
    assert report.nbytes == nbytes
    assert report.bits_per_weight == 8 * nbytes / sum(layer.weight.numel() for layer in linears.values())
    assert all(torch.equal(v, before[k]) for k, v in tiny.state_dict().items())


def test_in_place_per_tensor_and_overrides(tiny):
    model = models.duplicate(tiny)
    same, _ = quantize_model(model, "rtn", in_place=True, bits=4, group_size="tensor")
    assert same is model
    weight = models.linears(tiny)["model.layers.0.mlp.up_proj"].weight
    wanted = rtn.quantize(weight.reshape(1, -1), 4, None).dequantize().view_as(weight)
    assert torch.equal(models.linears(model)["model.layers.0.mlp.up_proj"].weight, wanted)

    changed, report = quantize_model(
        tiny, "rtn", bits=4, group_size=None, overrides={"down_proj": {"bits": 8}, "1.mlp.up_proj": None}
    )
    linears = models.linears(changed)
    down = models.linears(tiny)["model.layers.1.mlp.down_proj"].weight
    assert torch.equal(linears["model.layers.1.mlp.down_proj"].weight, rtn.quantize(down, 8, None).dequantize())
    assert torch.equal(linears["model.layers.1.mlp.up_proj"].weight, models.linears(tiny)["model.layers.1.mlp.up_proj"].weight)
    assert report.layers["model.layers.1.mlp.up_proj"].bits_per_weight == 16


def test_nf4_leaves_what_is_stored_and_counts_it(tiny):
    quantized, report = quantize_model(tiny, "nf4", codebook="fp4", block_size=32, double_quant=True)
    nbytes = 0
    for name, layer in models.linears(tiny).items():
        stored = nf4.quantize(layer.weight, "fp4", 32, True)
        assert torch.equal(models.linears(quantized)[name].weight, stored.dequantize()), name
        nbytes += stored.nbytes
    assert report.nbytes == nbytes


@pytest.mark.parametrize("paper", [False, True])
def test_int8_puts_other_layers_in_place_and_weights_alone_do_not(tiny, paper):
    names = models.linears(tiny).keys()
    quantized, report = quantize_model(tiny, "int8", threshold=1.0, paper=paper, overrides={"o_proj": None})
    for name in names:
        module = quantized.get_submodule(name)
        if name.endswith("o_proj"):
            assert isinstance(module, nn.Linear)
            assert report.layers[name].bits_per_weight == 16
        else:
            assert isinstance(module, int8.Int8Linear)
            assert module.threshold == 1.0
            rows, columns = module.codes.shape
            assert report.layers[name].bits_per_weight == 8 * (rows * columns * (3 if paper else 1) + 4 * rows) / (rows * columns)
    assert models.linears(tiny).keys() == names  # the model that was given is as it was

    ids = torch.arange(12)[None]
    weights, _ = quantize_model(tiny, "int8-weights")
    both, _ = quantize_model(tiny, "int8", threshold=0.0)
    with torch.no_grad():
        exact, rounded, twice = (m(input_ids=ids).logits for m in (tiny, weights, both))
    assert 0 < (rounded - exact).abs().mean() < (twice - exact).abs().mean()
    for name, layer in models.linears(weights).items():
        assert torch.equal(layer.weight, int8.quantize(models.linears(tiny)[name].weight).dequantize())


def normed(model):
    torch.nn.utils.parametrizations.weight_norm(model.model.layers[1].mlp.up_proj)
    return model


def pruned(model):
    prune.l1_unstructured(model.model.layers[1].mlp.up_proj, "weight", 0.5)
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (normed, "the weight of model.layers.1.mlp.up_proj is computed from parametrizations.weight.original0, "),
        (pruned, "the weight of model.layers.1.mlp.up_proj is computed from weight_orig at each use"),
        (lambda model: model.to("meta"), "model.embed_tokens.weight is on the meta device, which holds shapes and no values"),
        (lambda model: None, "model is a NoneType, wanted a causal language model"),
        (lambda model: nn.Linear(4, 4), "model is a Linear, wanted a causal language model"),
    ],
)
def test_weights_that_cannot_be_replaced_are_refused(tiny, tmp_path, change, message):
    model, ids = change(copy.deepcopy(tiny)), torch.arange(16).view(2, 8)
    calls = [
        lambda: quantize_model(model, "rtn", group_size=16),
        lambda: quantize_model(model, "gptq", group_size=16, calibration=ids, in_place=True),
        lambda: calibrate.blockwise(model, ids, lambda *_: None),
        lambda: checkpoint.save(model, {}, tmp_path / "out", "gptq"),
    ]
    for call in calls:
        with pytest.raises(models.ModelError, match=f"^{message}"):
            call()


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([[1, 2]], "calibration is list"),
        ("code", "calibration is str"),
        (torch.ones(2, 8), "calibration is torch.float32"),
        (torch.ones(2, 8) > 0, "calibration is torch.bool"),
        (torch.ones(2, 8, dtype=torch.int64, device="meta"), "calibration is on the meta device"),
        (torch.full((2, 8), 300), "calibration holds tokens 300 to 300, the model knows 0 to 299"),
        (torch.full((2, 8), -1), "calibration holds tokens -1 to -1"),
        (torch.ones(8, dtype=torch.int64), "calibration text has shape"),
    ],
)
def test_calibration_that_is_no_text(tiny, calibration, message):
    for method in ("gptq", "awq"):
        with pytest.raises((ValueError, TypeError), match=f"^{message}"):
            quantize_model(tiny, method, group_size=16, calibration=calibration)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "magic"}, "method is 'magic', wanted one of rtn, nf4, int8-weights, int8, gptq, awq"),
        ({"method": "rtn", "overrides": {"nowhere": None}}, "overrides names 'nowhere'"),
        ({"method": "rtn", "bits": 4, "group_size": 48}, "group_size 48 does not divide in_features"),
    ],
)
def test_bad_settings(tiny, arguments, message):
    with pytest.raises(ValueError, match=message):
        quantize_model(tiny, **arguments)


@pytest.fixture
def stream():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 300, (640,), generator=generator)
    return text.TokenStream(ids, torch.arange(640) // 128, tuple("abcde"), 2000, "digest", "made up")


@pytest.mark.slow
def test_sweep_goes_on_where_it_was_stopped(tiny, stream, tmp_path, monkeypatch):
    settings = [{"bits": b, "group_size": g, "symmetric": False} for b in (8, 2) for g in (16, "row", "tensor")]
    monkeypatch.setitem(sweep.SWEEPS, "rtn", lambda model: iter(settings))
    path = tmp_path / "rtn.json"

    class Stop(Exception):
        pass

    def stop(done, total):
        if done == 2:
            raise Stop

    with pytest.raises(Stop):
        sweep.run("rtn", tiny, stream, path, "tiny", windows=None, length=64, on_row=stop)
    half = json.loads(path.read_text())
    assert len(half["rows"]) == 2
    half["rows"][0]["perplexity"] = -1.0  # a row that is there is kept, not measured again
    path.write_text(json.dumps(half))
    measured = sweep.run("rtn", tiny, stream, path, "tiny", windows=None, length=64)
    assert [{k: r[k] for k in settings[0]} for r in measured.rows] == settings
    assert measured.rows[0]["perplexity"] == -1.0
    assert measured.rows[-1]["perplexity"] > 1
    with pytest.raises(ValueError, match="another windows"):
        sweep.run("rtn", tiny, stream, path, "tiny", windows=3, length=64)
    rounded = copy.deepcopy(tiny).half().float()  # the digest of weights is one for both dtypes
    sweep.run("rtn", rounded, stream, tmp_path / "32.json", "tiny", windows=None, length=64)
    with pytest.raises(ValueError, match="rows measured with another dtype:"):
        sweep.run("rtn", rounded.half(), stream, tmp_path / "32.json", "tiny", windows=None, length=64)
    on_gpu = json.loads(path.read_text())
    on_gpu["about"]["device"] = "cuda"
    path.write_text(json.dumps(on_gpu))
    with pytest.raises(ValueError, match="rows measured with another device:"):
        sweep.run("rtn", tiny, stream, path, "tiny", windows=None, length=64)
    with pytest.raises(ValueError, match="sweep is 'magic', wanted one of"):
        sweep.run("magic", tiny, stream, path, "tiny")


@pytest.mark.slow
def test_rows_are_planted_found_and_paired(tiny, stream, tmp_path, monkeypatch):
    settings = [
        {"planted": None, "method": "int8", "granularity": "tensor", "threshold": 0.0},
        {"planted": 40, "method": "int8", "granularity": "tensor", "threshold": 0.0},
        {"planted": None, "method": "nf4", "codebook": "nf4", "block_size": 32, "absmax": "double"},
        {"planted": None, "method": "nf4", "codebook": "nf4", "block_size": 32, "absmax": "float16"},
    ]
    monkeypatch.setitem(sweep.SWEEPS, "int8", lambda model: iter(settings))
    measured = sweep.run("int8", tiny, stream, tmp_path / "int8.json", "tiny", windows=None, length=64)
    trained, planted, double, half = measured.rows
    assert measured.find(planted=40) is planted
    for wanted, count in (({"method": "nf4"}, 2), ({"planted": 3}, 0)):
        with pytest.raises(LookupError, match=f"{count} rows have"):
            measured.find(**wanted)

    baseline = evaluate.evaluate(tiny, stream, 64)
    for row, model in ((trained, tiny), (planted, models.plant_outliers(tiny, factor=40))):
        quantized, _ = quantize_model(model, "int8", granularity="tensor", threshold=0.0)
        again = evaluate.evaluate(quantized, stream, 64)
        assert row["perplexity"] == again.perplexity
        assert row["change"] == evaluate.paired_bootstrap(baseline, again).change
    assert trained["perplexity"] != planted["perplexity"]
    assert double["bits_per_weight"] < half["bits_per_weight"] == 4.5

    pair = measured.paired(trained, planted)
    # Losses are kept to 1e-4 nats of a document of about 128 tokens; the change is the exponential of their difference.
    assert pair.change == pytest.approx(planted["perplexity"] / trained["perplexity"] - 1, abs=1e-5)
    assert pair.low <= pair.change <= pair.high
    assert measured.paired(trained, trained) == evaluate.Interval(0.0, 0.0, 0.0)


WEIGHTS = {"even": {}, "attention": {"token_weights": "attention"}, "not_first": {"token_weights": "not_first"}}


@pytest.mark.parametrize("name", ["rtn", "layers", "int8", "nf4", "gptq", "awq", "sink", "positions", "shootout"])
def test_shipped_measurements_are_of_the_shipped_model(name, course):
    measured = sweep.load(name)
    model, _ = course
    assert measured.about["model_sha256"] == sweep.model_digest(model)
    assert len(measured.rows) == len(list(sweep.SWEEPS[name](model)))
    settings = [sweep.setting_of(row) for row in measured.rows]
    one, other = (sorted(json.dumps(s, sort_keys=True) for s in some) for some in (settings, sweep.SWEEPS[name](model)))
    assert one == other
    for row in measured.rows:
        if "loss" in row:
            assert measured.paired(row, row).change == 0
    for key in ("command", "date", "torch", "python", "text_sha256", "processor"):
        assert measured.about[key]
    with pytest.raises(FileNotFoundError, match=r"no measurements 'magic'; there are .*rtn"):
        sweep.load("magic")


def test_the_help_of_token_weights_says_what_was_measured():
    options = {option.name: option for option in typer.main.get_command(app).commands["quantize"].params}
    published, course = sweep.load("gptq", "smollm2"), sweep.load("gptq")
    defaults = {"bits": 4, "method": "gptq", "act_order": True, "static_groups": True}
    rows = {name: published.only(samples=16, group_size=64, **defaults | chosen) for name, chosen in WEIGHTS.items()}
    ratio = {name: row["change"] / rows["even"]["change"] for name, row in rows.items()}
    assert f"attention loses {ratio['attention']:.1f} of the perplexity that even loses" in options["token_weights"].help
    assert f"not_first {ratio['not_first']:.1f} times as much" in options["token_weights"].help
    own = defaults | {"samples": 64, "group_size": 128, "planted": None}
    even, attention = (course.only(**own | WEIGHTS[name]) for name in ("even", "attention"))
    change = course.paired(even, attention)
    assert change.low < 0 < change.high
    for measured, setting in ((published, {"samples": 16, "group_size": 64}), (course, own)):
        usual = defaults | setting | WEIGHTS["attention"]
        change = measured.paired(measured.only(**usual), measured.only(**usual, damping=0.1))
        assert change.low < 0 < change.high  # "0.1 was no better"


def test_perplexity_falls_with_bits_and_with_smaller_groups():
    """Within the interval: a setting that stores more may not be worse beyond what the documents' spread allows."""
    rows = {(r["bits"], r["group_size"]): r for r in sweep.load("rtn").rows if not r["symmetric"]}
    sizes = [16, 32, 64, 128, "row"]
    for size in sizes:
        for bits in range(2, 8):
            assert rows[bits + 1, size]["low"] <= rows[bits, size]["high"], (bits, size)
    for bits in range(2, 9):
        for finer, coarser in pairwise(sizes):
            assert rows[bits, finer]["low"] <= rows[bits, coarser]["high"], (bits, finer, coarser)


def test_visible_loss():
    """The course needs a model to which 4 bits do something: 1 % and 5 % are the bars it was trained for."""
    rows = {(r["bits"], r["group_size"]): r for r in sweep.load("rtn").rows if not r["symmetric"]}
    assert rows[4, 128]["change"] >= 0.01
    assert rows[3, 128]["change"] >= 0.05


def test_settle_says_when_the_file_says_otherwise(capsys, monkeypatch):
    claim = claims.claims()[1]
    claims.settle(1, False, "as measured")
    assert f"1. {claim.claim}\n   fails: as measured\n   (On the course model it holds.)" in capsys.readouterr().out
    claims.settle(34, claims.CANNOT, "no count")
    assert "cannot be told here: no count\n" in capsys.readouterr().out
    monkeypatch.setenv("LABS_STRICT", "1")
    with pytest.raises(AssertionError, match=r"claim 1 fails here, but data/claims\.yaml says it holds"):
        claims.settle(1, False, "as measured")
    with pytest.raises(KeyError, match="no claim 99"):
        claims.settle(99, True, "")


def test_a_verdict_on_another_model_is_compared_with_that_model(capsys, monkeypatch):
    claim = claims.claims()[13]
    assert set(claim.elsewhere) == {"smollm2"}
    claims.settle(13, None, "stored rows", model="smollm2")
    assert capsys.readouterr().out == f"13. {claim.claim}\n   on smollm2, depends: stored rows\n"
    claims.settle(13, True, "stored rows", model="smollm2")
    assert "(On smollm2 it depends.)" in capsys.readouterr().out
    monkeypatch.setenv("LABS_STRICT", "1")
    with pytest.raises(AssertionError, match=r"claim 13 holds here, but data/claims\.yaml says it depends"):
        claims.settle(13, True, "stored rows", model="smollm2")
    with pytest.raises(KeyError, match="no verdict on claim 12 for the model 'smollm2'"):
        claims.settle(12, True, "stored rows", model="smollm2")


def test_a_clock_that_disagrees_is_told_and_never_fails(capsys, monkeypatch):
    """A verdict about time is of named machines. What this machine's clock says stands beside it."""
    monkeypatch.setenv("LABS_STRICT", "1")
    assert claims.claims()[4].verdict == "depends"
    for holds, relation in ((None, "depends, too\n"), (True, "holds, which is another"), (False, "fails, which is another")):
        claims.settle(4, None, "kept figures", here=claims.Timed(holds, "0.5 times the time"))
        printed = capsys.readouterr().out
        assert "   depends: kept figures\n   timed here, just now: 0.5 times the time\n" in printed
        assert f"by these times alone it {relation}" in printed
    with pytest.raises(AssertionError, match=r"claim 4 holds here, but data/claims\.yaml says it depends"):
        claims.settle(4, True, "kept figures", here=claims.Timed(None, ""))
