"""Recommendations: which rule speaks, what is said where nothing fits, and whether the evidence is there."""

import re

import pytest
import yaml

from labsupport.evidence import choosing, measurements, planner, tables
from labsupport.model import models


@pytest.mark.parametrize(
    ("gpu", "quality", "wanted"),
    [
        ("h100", "little-loss", "fp8"), ("h200", "near-lossless", "fp8"), ("b200", "little-loss", "nvfp4"),
        ("rtx 5090", "little-loss", "nvfp4"), ("a100 80", "little-loss", "w4a16-g128"), ("3090", "little-loss", "w4a16-g128"),
        ("4090", "little-loss", "w4a16-g128"), ("4090", "near-lossless", "fp8"), ("t4", "near-lossless", "int8"),
        ("m2 ultra", "little-loss", "q4_k_m"), ("cpu", "near-lossless", "q8_0"), ("cpu", "smallest", "q3_k_s"),
        ("l4", "smallest", "w3a16-g128"), ("mi300x", "near-lossless", "fp8"),
    ],
)  # fmt: skip
def test_what_is_recommended(gpu, quality, wanted):
    choice = choosing.recommend(tables.model("llama-3.1-8b"), tables.card(gpu), 4096, quality=quality)
    assert choice.plan.form.name == choice.rule.format == wanted
    assert choice.plan.fits
    assert choice.passed_over == ()
    assert choice.evidence


def test_every_card_and_quality_has_a_rule():
    for card in tables.cards().values():
        for quality in tables.QUALITIES:
            assert choosing.recommend(tables.model("smollm2-135m"), card, 1024, quality=quality).plan.fits


def test_a_model_published_in_four_bits_stays_as_it_is():
    for gpu in ("b200", "h100", "4090", "a100 80", "m4 max"):
        for quality in tables.QUALITIES:
            choice = choosing.recommend(tables.model("gpt-oss-20b"), tables.card(gpu), quality=quality)
            assert choice.plan.form.name == "mxfp4-experts"


def test_a_format_that_does_not_fit_is_passed_over():
    choice = choosing.recommend(tables.model("llama-3.1-70b"), tables.card("h100"), 8192)
    assert choice.plan.form.name == "w4a16-g128"
    assert [name for name, _ in choice.passed_over] == ["fp8"]
    assert choice.passed_over[0][1] > tables.card("h100").memory


def test_fine_tuning_is_planned_by_the_count_of_a_training_step():
    choice = choosing.recommend(tables.model("llama-3.1-8b"), tables.card("3090"), 512, task="finetune")
    assert choice.plan.form.name == "nf4"
    assert choice.plan.parts["gradients"] < choice.plan.parts["weights"]
    assert choice.plan.total == sum(choice.plan.parts.values())
    with pytest.raises(choosing.Impossible, match=r"no rule is about finetune on CPU \(cpu\); there are rules for ada"):
        choosing.recommend(tables.model("llama-3.1-8b"), tables.card("cpu"), task="finetune")
    with pytest.raises(choosing.Impossible, match=r"does not fit T4: nf4 with a batch of 64 of 4,096 tokens"):
        choosing.recommend(tables.model("llama-3.1-8b"), tables.card("t4"), 4096, users=64, task="finetune")
    with pytest.raises(ValueError, match="Mixtral-8x7B has other blocks than a Llama"):
        choosing.recommend(tables.model("mixtral-8x7b"), tables.card("h100"), task="finetune")


def test_where_nothing_fits_the_line_says_what_would():
    shape, card = tables.model("llama-3.1-8b"), tables.card("rtx 4090")
    with pytest.raises(choosing.Impossible) as refused:
        choosing.recommend(shape, card, 8192, users=400)
    message = str(refused.value)
    assert "\n" not in message
    assert message.startswith("Llama-3.1-8B does not fit RTX 4090: w4a16-g128 with 400 users of 8,192 tokens takes")
    users = int(re.search(r"What would fit: (\d+) users of 8,192 tokens", message)[1])
    tokens = int(re.search(r"; ([\d,]+) tokens each", message)[1].replace(",", ""))
    for context, many in ((8192, users), (tokens, 400)):
        assert choosing.recommend(shape, card, context, many).plan.fits
    for context, many in ((8192, users + 1), (tokens + 1, 400)):
        with pytest.raises(choosing.Impossible):
            choosing.recommend(shape, card, context, many)


def test_the_line_names_another_quality_an_fp8_cache_and_a_larger_card():
    near = tables.model("llama-3.1-70b"), tables.card("a100 80"), 8192
    with pytest.raises(choosing.Impossible, match="w4a16-g128, where the quality may be little-loss; ") as refused:
        choosing.recommend(*near, quality="near-lossless")
    larger = re.search(r"; ([^;]+) \(\d+ GB\)$", str(refused.value))[1]
    assert choosing.recommend(near[0], tables.card(larger), 8192, quality="near-lossless").plan.fits
    full = planner.plan(tables.model("llama-3.1-8b"), tables.card("4090"), "w4a16-g128").most_users + 5
    with pytest.raises(choosing.Impossible, match="an fp8 cache"):
        choosing.recommend(tables.model("llama-3.1-8b"), tables.card("4090"), users=full)
    assert choosing.recommend(tables.model("llama-3.1-8b"), tables.card("4090"), users=full, cache="fp8").plan.fits
    with pytest.raises(choosing.Impossible, match="nothing on one card of the table"):
        choosing.recommend(tables.model("llama-3.1-405b"), tables.card("t4"))


def test_unknown_wishes_are_refused():
    shape, card = tables.model("llama-3.1-8b"), tables.card("t4")
    with pytest.raises(ValueError, match="quality is 'best', wanted one of near-lossless"):
        choosing.recommend(shape, card, quality="best")
    with pytest.raises(ValueError, match="task is 'train', wanted one of serve"):
        choosing.recommend(shape, card, task="train")


@pytest.mark.parametrize("name", tables.formats())
def test_measured_rows_are_there(name):
    for row in choosing.measured(tables.formats()[name]):
        assert row.low <= row.change <= row.high
        assert str(row).endswith(f"(data/measurements/{row.file})")


def test_rows_of_the_shootout_come_first(tmp_path, monkeypatch):
    form = tables.formats()["w4a16-g32"]
    for sweep in ("awq", "gptq"):
        path = models.data_dir() / "measurements" / f"{sweep}.json"
        measurements.write(tmp_path / "measurements" / f"{sweep}.json", *measurements.read(path))
    monkeypatch.setattr(models, "data_dir", lambda: tmp_path)
    before = choosing.measured.__wrapped__(form)
    assert [each.file for each in before] == ["awq.json", "gptq.json"]
    row = {"method": "gptq", "bits": 4, "group_size": 32, "change": 0.5, "low": 0.4, "high": 0.6}
    planted = row | {"planted": 8, "change": 0.1}
    measurements.write(tmp_path / "measurements" / "shootout.json", {}, [row, planted])
    after = choosing.measured.__wrapped__(form)
    assert after[0] == before[0]  # the shootout has no row of AWQ
    assert (after[1].change, after[1].settings, after[1].file) == (0.5, 1, "shootout.json")
    measurements.write(tmp_path / "measurements" / "awq.json", {}, [row])
    with pytest.raises(ValueError, match=r"data/measurements/awq.json has no row with \{'method': 'awq'"):
        choosing.measured.__wrapped__(form)


ROW = {
    "name": "x", "hub": "a/x", "published": {"parameters": 6738415616, "source": "s"},
    "config": dict(tables.architectures()["Llama-2-7B"].config),
}  # fmt: skip
CARD = {
    "name": "x", "family": "ada", "kind": "consumer", "memory": 8, "bandwidth": 100, "rates": {"half": 10}, "source": "a maker",
}  # fmt: skip
RULE = {"task": "serve", "format": "fp8", "reason": "r", "evidence": [{"claim": 3}]}
BROKEN = {
    "a count that differs": (
        "architectures",
        "architectures",
        ROW,
        {"published": {"parameters": 7e9, "source": "s"}},
        "6,738,415,616",
    ),
    "an unknown field": ("cards", "cards", CARD, {"colour": "red"}, "colour"),
    "a card without a source": ("cards", "cards", CARD, {"source": ""}, "have a source"),
    "no bandwidth": ("cards", "cards", CARD, {"bandwidth": 0}, "above 0"),
    "unknown units": ("cards", "cards", CARD, {"rates": {"fp5": 1}}, "rates is 'fp5', wanted one of half"),
    "an unknown format": ("rules", "rules", RULE, {"format": "int5"}, "format is 'int5'"),
    "a claim that is not there": ("rules", "rules", RULE, {"evidence": [{"claim": 999}]}, "there is no claim 999"),
    "no evidence": ("rules", "rules", RULE, {"evidence": []}, "a reason and evidence"),
    "a family that is not there": ("rules", "rules", RULE, {"families": ["pascal"]}, "families is 'pascal'"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_table_with_a_fault_is_refused_with_its_row(what, tmp_path, monkeypatch):
    file, table, good, change, message = BROKEN[what]
    tables.formats(), choosing.claims.claims()  # read once, from where they are
    (tmp_path / "planner").mkdir()
    path = tmp_path / "planner" / f"{file}.yaml"
    monkeypatch.setattr(models, "data_dir", lambda: tmp_path)
    read = getattr(tables, table).__wrapped__
    path.write_text(yaml.safe_dump([good]))
    assert len(read()) == 1
    path.write_text(yaml.safe_dump([good, good | change | ({"name": "y"} if "name" in good else {})]))
    with pytest.raises(ValueError, match=rf"{file}.yaml, row 2 .*{re.escape(message)}"):
        read()
    if "name" in good:
        path.write_text(yaml.safe_dump([good, good]))
        with pytest.raises(ValueError, match="has a name twice"):
            read()


@pytest.mark.parametrize(
    ("find", "name", "message"),
    [
        (tables.card, "rtx 5080", "gpu is 'rtx 5080', which is not in the table; nearest: RTX 5090"),
        (tables.card, "a100", "gpu is 'a100', which may be A100 40GB, A100 80GB SXM"),
        (tables.card, "", "gpu is '', which is not in the table"),
        (tables.model, "llama-9-8b", r"model is 'llama-9-8b', which is not in the table; nearest: Llama-3.1-8B"),
        (tables.model, "gemma-3", "model is 'gemma-3', which may be Gemma-3-1B, Gemma-3-4B; or name a config.json"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(find, name, message):
    with pytest.raises(ValueError, match=message):
        find(name)
