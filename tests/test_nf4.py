"""Codebooks. What the quantizer makes of them is compared with bitsandbytes in test_bitsandbytes.py."""

import pytest
import torch

from labsupport.quant import nf4


@pytest.mark.parametrize("ask", [*(lambda name=name: nf4.levels_of(name) for name in nf4.CODEBOOKS), nf4.dynamic_map])
def test_whoever_changes_a_codebook_changes_their_own_copy(ask):
    before = ask().clone()
    ask().mul_(-3)
    assert torch.equal(ask(), before)


def test_an_unknown_codebook_is_named():
    with pytest.raises(ValueError, match="codebook is 'nf3', wanted one of nf4, fp4, int4"):
        nf4.levels_of("nf3")
