"""A GPU against the CPU, each with the difference that float32 allows and no more. Run as on_cuda.py.

Both round each addition, product and quotient of two float32 numbers to the nearest, UNIT of the result off at most. So what is
computed number by number is equal to the last bit. What differs is the order in which sums are taken.
"""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from labsupport.model import evaluate, models, text
from labsupport.quant import gptq, int8, nf4, rtn

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device to compare with the CPU")
GPU = torch.device("cuda", 0)
UNIT, HALF_UNIT = 2.0**-24, 2.0**-11  # half the distance between neighbors just above 1, in float32 and in float16
ROWS, COLUMNS = 32, 128


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WEIGHT, INPUTS = 0.1 * normal(ROWS, COLUMNS, seed=2), normal(256, COLUMNS, seed=3)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounding_to_nearest_gives_the_same_codes(bits, symmetric):
    """Largest and smallest of a group, a quotient, a product, a rounding: nothing is summed."""
    here, there = (rtn.quantize(WEIGHT.to(device), bits, 32, symmetric) for device in ("cpu", GPU))
    for part in ("codes", "scale", "zero_point"):
        assert torch.equal(getattr(there, part).cpu(), getattr(here, part)), part


@pytest.mark.parametrize("codebook", ["nf4", "fp4"])
def test_codebooks_give_the_same_codes(codebook):
    """As above: a quotient, and comparisons."""
    here, there = (nf4.quantize(WEIGHT.to(device), codebook) for device in ("cpu", GPU))
    assert torch.equal(there.codes.cpu(), here.codes)
    assert torch.equal(there.absmax.cpu(), here.absmax)
    assert torch.equal(there.dequantize().cpu(), here.dequantize())


def test_double_quantization_moves_a_magnitude_by_one_step_at_most():
    """The mean of the magnitudes is a sum. It may move all a little, and one at a border to the next of the 8-bit levels."""
    here, there = (nf4.quantize(WEIGHT.to(device), double_quant=True).absmax for device in ("cpu", GPU))
    blocks = len(here.codes)
    offset = blocks * UNIT * here.dequantize().abs().max()  # of a sum of so many numbers, over their count
    step = nf4.dynamic_map().diff().max() * (here.absmax.max() + 2 * offset)
    assert (there.offset.cpu() - here.offset).abs() <= 2 * offset
    assert ((there.dequantize().cpu() - here.dequantize()).abs() <= step + 4 * offset).all()


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_a_product_in_int8(threshold):
    """Sums of integers are exact. With k outliers as many products of float16 are summed, each sum rounded on its way."""
    x = (4 * INPUTS).half()
    codes = [int8.quantize(part) for part in (x, WEIGHT.half())]
    exact = int8.matmul_int32(*(part.codes for part in codes))
    assert torch.equal(int8.matmul_int32(*(part.codes.to(GPU) for part in codes)).cpu(), exact)

    def product(device):
        return int8.linear(x.to(device), int8.quantize(WEIGHT.half().to(device)), threshold=threshold).float().cpu()

    here, there = product("cpu"), product(GPU)
    columns = int8.outlier_columns(x, threshold) if threshold else []
    assert bool(threshold) == (len(columns) > 0)
    sizes = x[:, columns].float().abs() @ WEIGHT[:, columns].abs().t() if threshold else torch.zeros_like(here)
    allowed = 2 * (len(columns) + 2) * HALF_UNIT * (here.abs() + 2 * sizes) if threshold else sizes
    assert ((there - here).abs() <= allowed).all()


def test_a_linear_by_gptq():
    """Grids are those of the weight as it came, and equal. A weight is rounded after up to COLUMNS corrections, each off by UNIT
    and by what the factor of H is off, UNIT times H's condition. These errors have either sign and add up as the root of their
    number: some 2e-5 of a step. So of all codes one in 20,000 lies so close to a border that it may fall on the other side, 0.2 of
    these 4,096; more than 4 happen once in a million. A code that falls otherwise changes the rest of its row, whose loss is then
    another draw: a sum of 128 squares, which at most doubles.
    """
    hessian = INPUTS.t() @ INPUTS * (2 / len(INPUTS))
    assert torch.linalg.cond(hessian) < 40
    given = {"bits": 3, "group_size": 32, "static_groups": True}
    here, there = (gptq.quantize(WEIGHT.to(device), hessian.to(device), **given) for device in ("cpu", GPU))
    assert torch.equal(there.scale.cpu(), here.scale)
    differing = (there.codes.cpu() != here.codes).any(1)
    assert differing.sum() <= 4

    def loss(quantized):
        error = quantized.dequantize().cpu().double() - WEIGHT.double()
        return ((error @ hessian.double()) * error).sum(1)

    before, after = loss(here), loss(there)
    assert torch.equal(after[~differing], before[~differing])
    assert (after <= 2 * before).all()
    assert after.sum() < loss(rtn.quantize(WEIGHT, 3, 32)).sum()


def test_the_loss_of_a_model():
    """A logit is off by UNIT, relative to the largest, for each of the terms that are summed one after the other on the way to it.
    In the loss of a token two logits count, its own and the largest of the others.
    """
    torch.manual_seed(0)
    blocks, hidden, intermediate, length = 2, 64, 96, 64
    config = LlamaConfig(
        vocab_size=300, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=blocks, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=None,
        initializer_range=0.3,
    )  # fmt: skip
    here = LlamaForCausalLM(config).eval()
    there = models.duplicate(here).to(GPU)
    tokens = torch.randint(0, 300, (640,), generator=torch.Generator().manual_seed(1))
    stream = text.TokenStream(tokens, torch.arange(640) // 128, tuple("abcde"), 2000, "digest", "made up")
    # Norm, queries and keys, scores, mixed values, output; norm, up, down. Then the last norm, the head, the softmax of all tokens.
    terms = blocks * (hidden + hidden + 32 + length + hidden + hidden + hidden + intermediate) + hidden + hidden + 300
    with torch.no_grad():
        largest = here(input_ids=tokens[None, :length]).logits.abs().max().item()
    allowed = 2 * terms * UNIT * largest
    losses = [evaluate.evaluate(model, stream, length) for model in (here, there)]
    each = [measured.loss / measured.tokens for measured in losses]  # of a document, nats a token
    assert (each[1] - each[0]).abs().max() <= allowed
    # The bound is narrow enough to tell float32 from 16 bits.
    rough = evaluate.evaluate(models.duplicate(here).bfloat16(), stream, length)
    assert (rough.loss / rough.tokens - each[0]).abs().max() > allowed
