"""Every architecture through every method, as README.md says it; and what calibration sums up, held to plain hooks."""

import matrix
import pytest
import torch
from architectures import CONFIGS, EVERY, VOCABULARY, make

from labsupport.model import models, opened
from labsupport.pipeline import calibrate

README = matrix.README.read_text("utf-8")
IDS = torch.arange(5 * 24).view(5, 24) * 37 % VOCABULARY


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_what_the_readme_says_of_a_model(name, tmp_path):
    assert matrix.row(name, tmp_path) == matrix.shown(README)[name], "run python tests/matrix.py"


def test_the_readme_has_every_model_and_no_other():
    rows = matrix.shown(README)
    assert rows.keys() == CONFIGS.keys()
    written = README.split(matrix.BEGIN)[1].split(matrix.END)[0].strip()
    assert matrix.block({name: rows[name] for name in CONFIGS}).strip() == written


@pytest.mark.parametrize("name", EVERY)
@torch.no_grad()
def test_calibration_sums_what_plain_hooks_see(name):
    """X^T X of every linear, block by block, and from hooks on one pass of the whole model."""
    model = make(name)
    opened.open_up(model)
    linears = models.linears(model)
    rows = {linear: [] for linear in linears}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, linear=linear: rows[linear].append(args[0].flatten(0, -2)))
        for linear, layer in linears.items()
    ]
    model(IDS, use_cache=False)
    for handle in handles:
        handle.remove()
    seen = 0
    for block in calibrate.blocks(model, IDS, batch=2):
        for linear, statistics in block.fed():
            x = torch.cat(rows[linear]).double()
            want = x.T @ x
            assert statistics.tokens == len(x)
            # Sums of len(x) products in float32, taken in parts: some units in the last place of the largest.
            assert (statistics.gram - want).abs().max() <= 1e-5 * max(want.diagonal().max().item(), 1e-6), linear
            seen += 1
    assert seen == len(linears) > 0
