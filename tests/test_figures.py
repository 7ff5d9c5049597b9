"""Every figure of the course: drawn from data alone, said in words, labelled with units, without pyplot."""

from __future__ import annotations

import base64
import inspect
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations
from xml.etree import ElementTree

import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.text import Text

from labsupport import figures
from labsupport.evidence import planner, tables
from labsupport.evidence.roofline import Device
from labsupport.figures import (
    base,
    cache,
    calibration,
    compensate,
    course,
    curves,
    grids,
    groups,
    kernels,
    layouts,
    levels,
    listening,
    merging,
    outliers,
    planning,
    roofline,
    saliency,
    shootout,
    straight_through,
)
from labsupport.figures.base import CourseFigure
from labsupport.model.evaluate import Evaluation

MODULES = tuple(getattr(figures, name) for name in figures.__all__)
# Weights, codes and ratios of them have no unit.
UNITLESS = re.compile(
    r"^(weight|value|value read back|magnitude of the value|gap|error|density|squared error / weight²|in_features)$"
)
UNITS = re.compile(r"\(.+\)|%|\b(GB|MB|bits|nats|tokens?|operations|times|block|group size|layer|dB)\b")

WEIGHT = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
CODES = torch.arange(48).view(6, 8) % 8
ROWS = [{"bits_per_weight": b + 0.2, "change": 0.5**b, "low": 0.4**b, "high": 0.6**b} for b in (2, 3, 4, 8)]
LAYERS = {f"model.layers.{i}.{m}": 1.0 + i for i in range(2) for m in ("self_attn.q_proj", "mlp.up_proj")}
DEVICES = [Device("here", 2e10, 1e11, 2**34, "measured"), Device("card", 1e12, 1e14, 2**36, "data sheet")]


def evaluation(loss: float) -> Evaluation:
    tokens = torch.tensor([400, 0, 900, 100])
    noise = torch.tensor([1.0, 1.0, 1.1, 0.9], dtype=torch.float64)
    return Evaluation(loss * noise * tokens, tokens, windows=3, length=512, tokens_per_byte=0.3, sha256="x")


SAMPLES: dict[Callable[..., CourseFigure], tuple] = {
    cache.weights_and_cache: ([1024, 4096], {"MHA": [2.0**33, 2.0**35], "GQA": [2.0**31, 2.0**33]}, {"weights": 13e9}),
    cache.maps: ({"keys": WEIGHT, "values": 0.1 * WEIGHT}, "magnitude (no unit)"),
    cache.who_waits: ({"keys": [t // 4 * 4 for t in range(20)], "values": [max(0, t - 6) for t in range(20)]},),
    cache.by_bits: (
        {
            "as trained": {"per channel": {4: (0.01, 0.0, 0.02), 2: (0.1, 0.05, 0.2)}},
            "planted": {"per token": {4: (2.0, 1.0, 3.0)}},
        },
        ("as trained", 4, 0.012),
    ),
    cache.against_size: ({"fp8": (8.0, (0.001, -0.001, 0.002)), "4 bits": (5.5, (0.01, 0.0, 0.02))}, "Sizes"),
    cache.by_position: ([0, 128, 256], {"4 bits": [(0.0, -0.01, 0.01), (0.02, 0.01, 0.03)]}),
    cache.factorial: (
        {"16": {"16": 0.0, "4": 0.01}, "4": {"16": 0.03, "4": 0.045}},
        {"4; 4": (0.005, 0.001, 0.008)},
    ),
    compensate.two_weights: (
        torch.tensor([0.4, 0.4]),
        torch.tensor([[1.0, 0.9], [0.9, 1.0]]),
        {"rounding": torch.zeros(2), "GPTQ": torch.tensor([0.0, 1.0])},
        [torch.tensor([0.4, 0.4]), torch.tensor([0.0, 0.76])],
    ),
    compensate.spectrum: ({"q_proj": torch.logspace(-3, 2, 64), "o_proj": torch.logspace(-4, 1, 64)},),
    compensate.frames: ({1: WEIGHT[:, :8], 8: 0.5 * WEIGHT[:, :8]},),
    compensate.trade: ({"q_proj": [(1.3, 0.6), (1.2, 0.7)], "o_proj": [(1.9, 0.4)]},),
    compensate.by_sensitivity: ({"rounding": [0.29] * 10, "GPTQ": [0.5 - 0.02 * i for i in range(10)]},),
    compensate.run_times: ({"OPT": {13.0: 20.9, 175.0: 252.0}, "here": {0.005: 0.1}}, 30.0),
    calibration.writes: (256, [1, 4, 16, 64, 256]),
    calibration.by_turn: ({"column order": WEIGHT[0].abs(), "act-order": WEIGHT[1].abs()},),
    calibration.by_setting: ({"updated": LAYERS, "stale": LAYERS}, "When a grid is taken", "error / rounding's (times)"),
    calibration.group_strips: ({"act-order": torch.arange(64) * 7 % 4, "static groups": torch.arange(64) // 16},),
    calibration.against: (
        {"seen": {"code": [(64, 0.2), (256, 0.3)]}, "unseen": {"code": [(64, 2.0), (256, 0.5)]}},
        "By tokens",
        "text (tokens)",
        "error / rounding's (times)",
        128,
    ),
    calibration.domains: ({"code": {"code": 0.5, "prose": 0.6}, "prose": {"code": 0.7, "prose": 0.4}}, "Two domains"),
    course.map: (),
    course.parts: ({"stored": {"embedding": 2e6, "the rest": 1e4}, "loaded": {"embedding": 4e6, "the rest": 2e4}},),
    course.token_losses: (["def", " f", "(", "$x", "\n", "$"], [3.0, 1.0, 0.1, 5.0, 0.2, 1], 4096),
    course.yardsticks: ({"guessing": 8.0, "model": 1.2}, "model"),
    curves.bits_against_perplexity: ({"row": ROWS, "tensor": ROWS}, 12.0, "A method", (3.2, 0.1)),
    curves.by_block: ({"one": {"first": [1.0, 900.0], "others": [2.0, 3.0]}}, "largest magnitude (no unit)", True),
    grids.formats: (2.0,),
    grids.staircase: (WEIGHT[0], 0.7, 4, 3),
    grids.heatmaps: (WEIGHT[:, :8], CODES, WEIGHT[:, :8] + 0.1, 3),
    grids.error_histogram: ({8: WEIGHT.sigmoid() - 0.5, 2: (WEIGHT / 9).clamp(-0.5, 0.5)},),
    grids.sqnr: (range(2, 5), {"a row": [10.0, 16.0, 22.0]}),
    grids.clip_curve: (torch.linspace(0.3, 1, 8), torch.linspace(0.1, 1, 8), torch.linspace(2, 0, 8) ** 2, 3),
    groups.row_in_groups: (WEIGHT[0], 16, 4),
    groups.bill: ({"codes": [4.0, 4.0], "scales": [0.1, 1.0], "zero-points": [0.03, 0.25]}, ["128", "16"]),
    groups.by_layer: ({"Spread (times the mean)": LAYERS, "Gain (dB)": LAYERS},),
    groups.layer_map: (LAYERS, "Bits spent", "bits a weight"),
    groups.paired: (evaluation(2.0), evaluation(2.1), ("16 bits", "4 bits")),
    groups.intervals: ({"one": (0.01, 0.005, 0.02), "other": (0.0, -0.01, 0.01)}, "Changes"),
    kernels.traffic: ({"fused": {"codes": 4.1}, "unfused": {"codes": 4.1, "written": 33.0}}, "Moved"),
    kernels.programs: (10, 4, 4, "Programs"),
    kernels.times: ([1, 8, 64], {"16 bits": [1.0, 1.1, 3.0], "4 bits": [0.3, 0.8, 6.0]}, "Times", (14, "forecast")),
    kernels.rates: ([1, 8, 64], {"16 bits": [20.0, 19.0, 7.0], "4 bits": [18.0, 7.0, 1.0]}, 25.0, "Rates"),
    kernels.gains: ([1, 8, 64], {"forecast": [3.8, 2.0, 1.0], "measured": [3.5, 1.5, 0.5]}, "Gains"),
    kernels.errors: ({"16 bits": 0.0023, "4 bits": 0.0021}, 0.1, "Errors"),
    layouts.words: ({"GPTQ": [i // 4 for i in range(32)], "three": [i // 3 for i in range(32)]}, "Two words"),
    layouts.besides_codes: ({"scales": [0.12, 0.13], "tables": [0.0, 0.1]}, ["awq", "bitsandbytes"]),
    layouts.offsets: ({"right": 0.5 * WEIGHT, "one too high": 0.5 * WEIGHT - 1}, "Offsets"),
    listening.who_pays: (
        [0, 1, 2, 4],
        {"GPTQ": [3.0, 0.4, 0.4], "by who listens": [0.1, 0.6, 0.6]},
        [0.5, 0.2, 0.3],
        {"rounding": (0.3, 0.2, 0.4), "GPTQ": (0.4, 0.3, 0.5), "by who listens": (0.1, 0.05, 0.15)},
        "A model",
    ),
    merging.places: ({"dequantized": (0 * WEIGHT, 0.1 * WEIGHT), "float": (0.2 * WEIGHT, 0.3 * WEIGHT)}, "One linear"),
    merging.survival: ([0.25, 1, 4], {"own base": [0.0, 0.1, 0.9], "float base": [1.1, 1.0, 1.0]}, "times the update"),
    merging.arms: (
        {
            "on the new text": {"as trained": (-0.7, -0.75, -0.65, [-0.7, -0.71]), "merged": (-0.6, -0.7, -0.5, [-0.6])},
            "on the old text": {"as trained": (0.1, 0.05, 0.15, [0.1, 0.12]), "merged": (0.2, 0.1, 0.3, [0.2])},
        },
        "Arms",
    ),
    merging.memory: ({"full": {"weights": 13e9, "states": 50e9}, "LoRA": {"weights": 13.1e9, "states": 0.3e9}}, "A step", "GB"),
    levels.on_values: (WEIGHT / WEIGHT.abs().max(), torch.linspace(-1, 1, 16), "an even grid"),
    levels.slices: ({"even": torch.linspace(-1, 1, 16), "with 0": torch.linspace(-1.125, 0.75, 16)},),
    levels.code_use: ({"int4": [6.0] * 8 + [6.5] * 8, "NF4": [5.0] * 8 + [7.5] * 8}, "Use"),
    levels.densities: ({"one": WEIGHT, "other": WEIGHT / 3}, "Shapes"),
    levels.table: ({"normal": {"int4": 19.0, "NF4": 20.0}, "uniform": {"int4": 23.0, "NF4": 20.5}}, "Decibels"),
    levels.rises: ({"NF4": ROWS, "int4": ROWS}, "Rises", (4.1, 0.02)),
    levels.error_and_loss: ({"NF4": (20.7, 0.02, 0.01, 0.03), "int4": (19.7, 0.03, 0.02, 0.04)}, "Both"),
    outliers.by_block: ({f"model.layers.{i}.mlp.{kind}": 3 * WEIGHT for i in range(2) for kind in ("up_proj", "down_proj")}, 6.0),
    outliers.token_map: ({"one": 3 * WEIGHT, "other": WEIGHT}, 2.0),
    outliers.columns_against_tokens: ([1, 8, 64], {"down_proj": [1, 20, 60]}, {"down_proj": 64}),
    outliers.one_column: ([1, 8, 64], {"per tensor": [40.0, 20.0, 3.0], "per row": [42.0, 24.0, 7.0]}),
    outliers.rises: ({"int8": {"as trained": (0.02, 0.01, 0.03), "planted": (0.2, 0.1, 0.3)}}, "Rises"),
    outliers.against_threshold: (
        {"as trained": {3.0: (0.0, -0.001, 0.001), 6.0: (0.01, 0.0, 0.02)}},
        {"as trained": (0.1, 0.0, 0.2)},
    ),
    outliers.time_parts: ({"quantize": [0.1, 0.1], "int8 product": [0.3, 0.3]}, ["none", "8 columns"], {"float32": 1.0}),
    outliers.two_errors: (WEIGHT.std(0), {"loud": torch.tensor([0, 1])}, {"loud": (0.01, 0.02)}),
    planning.bytes_on_card: (
        [planner.plan(planner.LLAMA_7B, tables.card("rtx 4090"), name, 4096, users=6) for name in ("bf16", "w4a16-g128")],
    ),
    roofline.model_sizes: ({"7B": {16: (12.9, 0.0, 0.6), 4: (3.2, 0.1, 0.6)}}, (8, 24)),
    roofline.rooflines: (DEVICES, {"decode": 1.0, "prefill": 500.0}),
    roofline.intensity_against_batch: ([1, 8, 64], {"16 bits": [1.0, 8.0, 60.0]}, {"here": 5.0}, "Intensity"),
    roofline.gain_against_batch: ([1, 8], {"4 bits": [3.5, 2.0]}, "Gain"),
    roofline.throughput: ([1, 8], {"16 bits": [10.0, 70.0]}, {"16 bits": [12.0, 90.0]}, "Tokens a second"),
    saliency.channels: ({"as trained": (WEIGHT[0].abs(), WEIGHT[1].abs()), "planted": (WEIGHT[2].exp(), WEIGHT[3].exp())},),
    saliency.by_model: ({"rounded": {"as trained": (0.1, 0.05, 0.2), "planted": (4.0, 3.0, 5.0)}}, "Rises"),
    saliency.stretch: ([1.0, 2.0, 4.0], [60.0, 15.0, 10.0], [40.0, 41.0, 80.0], (1.5, 2.5), "One channel"),
    saliency.ratios: ({"as trained": {"a.q_proj": WEIGHT[0].exp(), "a.up_proj": WEIGHT[1].exp()}}, "Loss"),
    saliency.scales: (WEIGHT[0].exp(), WEIGHT[0].exp().sqrt(), "Scales"),
    saliency.clips: (WEIGHT.exp()[:, :10], torch.tensor([[1.0, 0.95], [0.55, 0.6]]), "Clips"),
    saliency.flip: (
        {"GPTQ": {"as trained": (0.02, 0.01, 0.03), "planted": (0.2, 0.1, 0.3)}},
        "Who wins",
        ("GPTQ", "planted", 0.25),
    ),
    shootout.fronts: (
        {
            "as trained": {"rounding": [(2e6, 0.3), (3e6, 0.02)], "GPTQ": [(2e6, 0.1), (3e6, -0.001)]},
            "planted": {"GPTQ": [(2e6, 0.9)]},
        },
        {"as trained": [(3e6, -0.001), (2e6, 0.1)], "planted": [(2e6, 0.9)]},
    ),
    shootout.spread: ({"GPTQ, 4 bits": (0.002, 0.01, 0.4), "8 bits": (1e-5, 3e-5, 0.002)}, "Divergence"),
    shootout.tasks: (
        {"identifiers": {"a": 0.99, "b": 0.7}, "parses": {"a": 1.01, "b": 0.2}},
        {"a": 0.02, "b": 0.9},
        "What is left",
    ),
    shootout.windows: ({"perplexity": 340.0, "KL": 12.0}, 128),
    shootout.families: (
        {
            "large": [("2 bits", 2e6, 40.0, (0.4, 0.3, 0.5)), ("8 bits", 5e6, 20.0, (-0.2, -0.3, -0.1))],
            "small": [("float", 4e6, 30.0, (0.0, 0.0, 0.0))],
        },
        "At equal bytes",
        "all stored bytes (MB)",
    ),
    straight_through.passes: (
        torch.linspace(-3, 3, 61),
        {"rounding": (torch.linspace(-3, 3, 61).round(), torch.zeros(61)), "soft": (torch.linspace(-3, 3, 61), torch.ones(61))},
    ),
    straight_through.restless: ([0.1, 0.3, 0.45, 0.52, 0.49, 0.53, 0.5, 0.51], 0.7, "A weight"),
    straight_through.step_slope: (torch.linspace(-5, 5, 21), torch.linspace(-4, 3, 21), torch.linspace(-4, 3, 21).round(), (-4, 3)),
    straight_through.losses: ({"straight-through": [0.5, 0.3, 0.2], "soft": [0.4, 0.3, 0.25]}, "Losses", "the float model"),
    straight_through.worth: (
        {"4 bits": {"GPTQ": (0.02, 0.01, 0.03), "QAT": (-0.01, -0.02, 0.0)}, "2 bits": {"GPTQ": (0.7, 0.6, 0.8)}},
        "Worth",
        {"GPTQ": "as it is", "QAT": "trained"},
    ),
    saliency.one_sided: (WEIGHT[0].abs() + 3, {"ours": WEIGHT[0].abs() + 3, "other": WEIGHT[0].abs()}, "One side"),
}


def drawers() -> Iterator[Callable[..., CourseFigure]]:
    for module in MODULES:
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ == module.__name__ and not name.startswith("_"):
                returned = inspect.signature(function).return_annotation
                if returned in ("CourseFigure", CourseFigure):
                    yield function


DRAWERS = list(drawers())


def named(function: Callable) -> str:
    return f"{function.__module__.rsplit('.', 1)[1]}.{function.__name__}"


def categorical(labels: list) -> bool:
    texts = [label.get_text() for label in labels]
    return bool(texts) and not all(re.fullmatch(r"[-\u2212\d.]*", text) for text in texts)


def unlabelled(figure: CourseFigure) -> Iterator[str]:
    """Axes that a reader could not name: no label, no names at the ticks, and nobody beside them who says it."""
    for axis in figure.axes:
        if not axis.axison or axis.get_label() == "<colorbar>":
            continue
        if not (axis.get_title(loc="left") or axis.get_title()):
            yield "a panel without a title"
        for which, shared in (("x", axis.get_shared_x_axes()), ("y", axis.get_shared_y_axes())):
            own = getattr(axis, f"get_{which}label")()
            beside = [getattr(other, f"get_{which}label")() for other in shared.get_siblings(axis)]
            bare = not len(getattr(axis, f"get_{which}ticks")()) or categorical(getattr(axis, f"get_{which}ticklabels")())
            if not (any(beside) or bare):
                yield f"{axis.get_title(loc='left')!r}: the {which} axis has no label"
            if own and not bare and not UNITLESS.match(own) and not UNITS.search(own):
                yield f"{axis.get_title(loc='left')!r}: {own!r} names no unit"


def tensors(value) -> Iterator[torch.Tensor]:
    match value:
        case torch.Tensor():
            yield value
        case dict():
            yield from tensors(list(value.values()))
        case list() | tuple():
            for entry in value:
                yield from tensors(entry)
        case Evaluation():
            yield value.loss


def words(figure: CourseFigure) -> Iterator[Text]:
    """All text that is drawn, without ticks beyond the ends of their axis."""
    beyond = set()
    for axis in figure.axes:
        for line in (axis.xaxis, axis.yaxis):
            low, high = sorted(line.get_view_interval())
            slack = 1e-6 * (high - low)
            for tick in [*line.get_major_ticks(), *line.get_minor_ticks()]:
                if not low - slack <= tick.get_loc() <= high + slack or not axis.axison:
                    beyond |= {tick.label1, tick.label2}
    for text in figure.findobj(Text):
        if text.get_visible() and text.get_text().strip() and text not in beyond:
            yield text


def illegible(figure: CourseFigure) -> Iterator[str]:
    """Of a figure that has been drawn: words that are small, cut off at its edge or over others; more width than a page has."""
    if figure.get_size_inches()[0] > base.WIDTH:
        yield f"{figure.get_size_inches()[0]} inches wide, wanted at most {base.WIDTH}"
    boxes = [(text, text.get_window_extent()) for text in words(figure)]
    for text, box in boxes:
        if text.get_fontsize() < base.SMALL:
            yield f"{text.get_text()!r} is {text.get_fontsize()} points high"
        if box.x0 < -1 or box.y0 < -1 or box.x1 > figure.bbox.x1 + 1 or box.y1 > figure.bbox.y1 + 1:
            yield f"{text.get_text()!r} is cut off"
    for (one, first), (other, second) in combinations(boxes, 2):
        width = min(first.x1, second.x1) - max(first.x0, second.x0)
        height = min(first.y1, second.y1) - max(first.y0, second.y0)
        if width > 1 and height > 1 and not one.get_rotation() % 90 and not other.get_rotation() % 90:
            yield f"{one.get_text()!r} is over {other.get_text()!r}"


@pytest.fixture(scope="module")
def drawn() -> dict[Callable, CourseFigure]:
    return {}


@pytest.fixture
def figure(request, drawn) -> CourseFigure:
    function = request.param
    assert function in SAMPLES, f"{named(function)} is a figure without a sample in this file"
    if function not in drawn:
        drawn[function] = function(*SAMPLES[function])
    return drawn[function]


every_figure = pytest.mark.parametrize("figure", DRAWERS, ids=named, indirect=True)


def test_every_module_is_looked_at():
    assert {module.__name__.rsplit(".", 1)[1] for module in MODULES} == set(figures.__all__)
    assert set(SAMPLES) == set(DRAWERS)


MANY = [f"part {i}" for i in range(12)]


@pytest.mark.parametrize(
    "draw",
    [
        lambda: groups.bill({part: [1.0] for part in MANY}, ["a"]),
        lambda: layouts.besides_codes({part: [1.0] for part in MANY}, ["a"]),
        lambda: kernels.traffic({"a": {part: 1.0 for part in MANY}}, "Moved"),
        lambda: cache.weights_and_cache([1, 2], {"a": [1.0, 2.0]}, {part: 1.0 for part in MANY[:3]}),
        lambda: cache.against_size({part: (4.0, (0.01, 0.0, 0.02)) for part in MANY}, "Caches"),
    ],
    ids=["bill", "besides_codes", "traffic", "weights_and_cache", "against_size"],
)
def test_more_parts_than_can_be_drawn_are_refused(draw):
    with pytest.raises(ValueError, match="wanted at most"):
        draw()


def test_a_bill_says_what_its_names_are():
    assert groups.bill({"codes": [4.0]}, ["64, double"], "block size").axes[0].get_xlabel() == "block size"


@every_figure
def test_is_said_in_words(figure):
    assert isinstance(figure, CourseFigure)
    assert len(figure.alt.split()) >= 6
    assert not re.search(r"\b(nan|inf)\b|tensor\(", figure.alt)


@every_figure
@pytest.mark.slow
def test_is_shown_as_png_with_its_words(figure):
    data, about = figure._repr_mimebundle_()
    assert data["image/png"].startswith(b"\x89PNG")
    assert about["image/png"]["alt"] == figure.alt
    assert figure.alt in data["text/plain"]
    image = ElementTree.fromstring(data["text/html"].removesuffix(">") + "/>")  # the same for JupyterLab, which drops metadata
    assert (image.tag, image.get("alt")) == ("img", figure.alt)
    assert base64.b64decode(image.get("src").removeprefix("data:image/png;base64,")) == data["image/png"]
    assert {side: int(image.get(side)) for side in ("width", "height")} == {
        side: about["image/png"][side] for side in ("width", "height")
    }


@every_figure
def test_axes_are_labelled_with_units(figure):
    assert list(unlabelled(figure)) == []


@every_figure
@pytest.mark.slow
def test_words_can_be_read(figure):
    figure.draw_without_rendering()
    assert list(illegible(figure)) == []


# What `.numpy()` refuses, both at once; and what might be mixed with float32.
@pytest.mark.parametrize(
    "form",
    [lambda t: t.bfloat16().requires_grad_(), pytest.param(lambda t: t.double(), marks=pytest.mark.slow)],
    ids=["bf16 and grad", "f64"],
)
@pytest.mark.parametrize("draw", [d for d in DRAWERS if list(tensors(SAMPLES[d]))], ids=named)
def test_a_tensor_of_any_kind_can_be_drawn(draw, form):
    def changed(value):
        match value:
            case torch.Tensor():
                return form(value.clone()) if value.is_floating_point() else value
            case dict():
                return {key: changed(entry) for key, entry in value.items()}
            case list() | tuple():
                return type(value)(changed(entry) for entry in value)
            case Evaluation():
                return replace(value, loss=changed(value.loss))
        return value

    draw(*changed(SAMPLES[draw]))  # what is drawn becomes NumPy here, not when it is shown


@every_figure
def test_nothing_is_drawn_at_no_number(figure):
    for axis in figure.axes:
        for line in axis.get_lines():
            assert all(math.isfinite(float(y)) for y in line.get_ydata()), axis.get_title(loc="left")


def broken(change: Callable[[Axes], object]) -> CourseFigure:
    figure, axis = base.new("A line that goes from one to two.")
    axis.plot([1, 2])
    base.label(axis, "A line", "batch (sequences)", "loss (nats)")
    change(axis)
    figure.draw_without_rendering()
    return figure


def test_a_good_figure_has_no_fault():
    assert list(unlabelled(broken(lambda axis: None))) == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda axis: axis.text(1, 1, "tiny", fontsize=7), "'tiny' is 7.0 points high"),
        (lambda axis: axis.text(0, 0, "gone", transform=axis.figure.transFigure, ha="right"), "'gone' is cut off"),
        (lambda axis: [axis.text(0.5, 1.5, word) for word in ("one", "other")], "'one' is over 'other'"),
        (lambda axis: axis.figure.set_size_inches(9, 3), "9.0 inches wide, wanted at most 7.6"),
    ],
)
def test_words_that_cannot_be_read_are_noticed(change, fault):
    assert fault in list(illegible(broken(change)))


def test_long_names_are_broken_into_lines():
    _, axes = base.new("Two panels.", 1, 2)
    base.label(axes[0], "A title that is longer than half of a small figure", "an axis with quite a long name (of columns)", "x")
    assert axes[0].get_title(loc="left").count("\n") == axes[0].get_xlabel().count("\n") == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda axis: axis.set_xlabel(""),
        lambda axis: axis.set_ylabel(""),
        lambda axis: axis.set_ylabel("speed"),
        lambda axis: axis.set_title("", loc="left"),
    ],
)
def test_a_fault_is_noticed(change):
    assert len(list(unlabelled(broken(change)))) == 1


@pytest.mark.slow
def test_figures_do_without_pyplot():
    """Its global state keeps figures alive, and IPython then shows them its own way, without the words."""
    code = "import sys; from labsupport import figures; figures.course.map().png(); print('matplotlib.pyplot' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_method_may_lower_the_perplexity(recwarn):
    """As it does of random weights: bars to the left of 0 and their labels stay inside."""
    found = {"rounded": {"as trained": (-0.034, -0.05, -0.02)}, "kept": {"as trained": (-0.001, -0.002, -0.0001)}}
    saliency.by_model(found, "Rises").png()
    assert not [str(warning.message) for warning in recwarn if "constrained_layout" in str(warning.message)]
