"""LoRA through packed bases: gradients against float64 finite differences, bytes that stay packed, merging, refusals."""

from __future__ import annotations

import pytest
import torch
from architectures import make
from torch import nn

from labsupport.model import files, models, peers
from labsupport.pipeline import lora, qat, training
from labsupport.pipeline.quantize import quantize_model
from labsupport.quant import awq, gptq, nf4, rtn

IDS = torch.randint(1, 300, (3, 24), generator=torch.Generator().manual_seed(0))
SETTINGS = {
    "rtn": {"group_size": 32}, "nf4": {"double_quant": True}, "gptq": {"group_size": 32, "calibration": IDS},
    "awq": {"group_size": 32, "calibration": IDS},
}  # fmt: skip


def quantized(method: str) -> tuple[nn.Module, nn.Module, dict]:
    """A tiny Llama, the same by a method, and what is stored of it."""
    model, stored = make("llama").eval(), {}
    return model, quantize_model(model, method, stored=stored, **SETTINGS[method])[0], stored


def stored_by(method: str, linear: nn.Linear):
    """The weight of a linear by a method, as quantize_model stores it. awq multiplies columns by a scale and stores the product."""
    weight = linear.weight.detach().float()
    x = torch.randn(64, weight.shape[1], generator=torch.Generator().manual_seed(1)) * torch.linspace(0.1, 3, weight.shape[1])
    hessian = 2 / len(x) * x.t() @ x
    match method:
        case "rtn":
            return rtn.quantize(weight, 4, 16)
        case "nf4":
            return nf4.quantize(weight, double_quant=True)
        case "gptq":
            return gptq.quantize(weight, hessian, 4, 16, act_order=True)
        case "awq":
            scale = awq.search([weight], hessian, x.abs().mean(0), bits=4, group_size=16).scale
            assert not torch.equal(scale, torch.ones_like(scale))
            return rtn.quantize(weight * scale, 4, 16)


@pytest.mark.parametrize("method", ["rtn", "nf4", "gptq", "awq", "float"])
def test_gradients_equal_finite_differences(method):
    """Of x, A and B, in float64: the layer is linear in each, so central differences are exact but for rounding."""
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(32, 12).double()
    layer = lora.LoRALinear(linear, stored_by(method, linear), 3, 6.0, generator)
    layer.lora_b.data = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    x = torch.randn(5, 32, generator=generator, dtype=torch.float64, requires_grad=True)

    def of(x, a, b):
        return torch.func.functional_call(layer, {"lora_a": a, "lora_b": b}, (x,))

    # An output is a sum of 32 products and three more: each of two is rounded by at most 35 u sum |terms|; they are 2e-6 apart.
    weight, a, b, s = layer.base_weight().double(), layer.lora_a.detach(), layer.lora_b.detach(), layer.scaling
    terms = x.detach().abs() @ weight.abs().t() + s * x.detach().abs() @ a.abs().t() @ b.abs().t()
    bound = 35 * torch.finfo(torch.float64).eps / 2 * terms.max().item() / 1e-6
    assert bound < 1e-6
    assert torch.autograd.gradcheck(of, (x, layer.lora_a, layer.lora_b), eps=1e-6, atol=bound, rtol=0)
    assert list(training.trainable(layer)) == ["lora_a", "lora_b"]
    # And the backward pass as it is written out in the module's docstring.
    gradient = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    layer(x).backward(gradient)
    assert s == 2
    assert torch.allclose(x.grad, gradient @ weight + s * gradient @ b @ a, rtol=1e-12)
    assert torch.allclose(layer.lora_b.grad, s * gradient.t() @ (x @ a.t()), rtol=1e-12)
    assert torch.allclose(layer.lora_a.grad, s * (gradient @ b).t() @ x, rtol=1e-12)


@pytest.mark.parametrize("method", SETTINGS)
def test_a_model_begins_as_its_base_learns_and_stays_packed(method):
    _, base, stored = quantized(method)
    model = lora.add(models.duplicate(base), stored, rank=4)
    with torch.no_grad():
        # The same weights in one product more: sums of at most 96 products in another order.
        assert torch.allclose(model(IDS).logits, base(IDS).logits, atol=1e-4)
    floats = sum(p.numel() for name, p in model.named_parameters() if name.rpartition(".")[0] in lora.adapters(model))
    assert floats == sum(layer.lora_a.numel() + layer.lora_b.numel() for layer in lora.adapters(model).values())
    assert sum(layer.base_nbytes for layer in lora.adapters(model).values()) == sum(tensor.nbytes for tensor in stored.values())
    optimizer = torch.optim.AdamW(training.trainable(model).values(), lr=1e-2)
    before = {name: layer.base_weight().clone() for name, layer in lora.adapters(model).items()}
    losses = []
    for _ in range(5):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    assert all(torch.equal(layer.base_weight(), before[name]) for name, layer in lora.adapters(model).items())


def test_merging_into_the_base_that_it_was_trained_on_changes_nothing():
    original, _, stored = quantized("rtn")
    model = lora.add(quantized("rtn")[1], stored, rank=4)
    for layer in lora.adapters(model).values():
        layer.lora_b.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        trained = model(IDS).logits
        own = lora.merge(models.duplicate(model))
        assert not lora.adapters(own)
        assert torch.allclose(own(IDS).logits, trained, atol=1e-3)
        weights = {name: layer.weight for name, layer in models.linears(original).items()}
        other = lora.merge(models.duplicate(model), weights)
        assert not torch.allclose(other(IDS).logits, trained, atol=1e-3)
        name, layer = next(iter(lora.adapters(model).items()))
        assert torch.allclose(models.linears(other)[name].weight, weights[name] + layer.update, atol=1e-6)


def test_bad_input_is_named():
    model, _, stored = quantized("rtn")
    for rank in (0, 33, 2.5, True):
        with pytest.raises(ValueError, match=r"rank is .*wanted a whole number from 1 to 32, the smaller side"):
            lora.add(models.duplicate(model), stored, rank=rank)
    with pytest.raises(ValueError, match="stored names lm_head, which is no linear of the model's blocks"):
        lora.add(models.duplicate(model), {"lm_head": None})
    with pytest.raises(models.ModelError, match="no adapters to merge"):
        lora.merge(model)
    with_adapters = lora.add(models.duplicate(model), stored)
    with pytest.raises(models.ModelError, match="has adapters already"):
        lora.add(with_adapters)
    name = next(iter(stored))
    with pytest.raises(ValueError, match=f"base lacks {name}"):
        lora.merge(with_adapters, {})
    weights = {name: layer.base_weight() for name, layer in lora.adapters(with_adapters).items()}
    last = list(weights)[-1]
    for base, kind in ((stored[last], "UniformTensor"), (stored[last].codes, "torch.uint8")):
        with pytest.raises(ValueError, match=f"base has {last} packed, as {kind}: an adapter is added to a float weight"):
            lora.merge(with_adapters, weights | {last: base})
    assert lora.adapters(with_adapters).keys() == weights.keys()  # nothing was merged
    with pytest.raises(ValueError, match=rf"stored has {name} of shape \[96, 64\], and the model has it of \[64, 64\]"):
        lora.add(models.duplicate(model), stored | {name: rtn.quantize(torch.randn(96, 64), 4, 32)})
    with pytest.raises(ValueError, match=r"of shape \[2, 2\], and its adapter is for \[64, 64\]"):
        lora.merge(with_adapters, weights | {name: torch.zeros(2, 2)})
    shared = models.duplicate(model)
    shared.model.layers[1].self_attn.q_proj = shared.model.layers[0].self_attn.q_proj
    with pytest.raises(models.ModelError, match="are one weight: an adapter beside it would be two"):
        lora.add(shared)


def learned(seed: int = 0) -> tuple[nn.Module, dict]:
    """A model with adapters that are not as they began, and what is stored of its base."""
    _, base, stored = quantized("nf4")
    model = lora.add(models.duplicate(base), stored, rank=4, alpha=10.0)
    for layer in lora.adapters(model).values():
        layer.lora_b.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(seed))
    return model, stored


def test_an_adapter_comes_back_from_its_file(tmp_path):
    model, stored = learned()
    lora.save(model, tmp_path / "folder.with.dots.safetensors")
    base = quantized("nf4")[1]
    with torch.no_grad():
        loaded = lora.load(base, tmp_path / "folder.with.dots.safetensors", stored)
        assert loaded is base
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == training.trainable(model).keys()
    # One without a packed base, in float64.
    double = lora.add(make("llama").double(), rank=3)
    lora.save(double, tmp_path / "double")
    again = lora.load(make("llama").double(), tmp_path / "double")
    assert all(torch.equal(p, training.trainable(again)[name]) for name, p in training.trainable(double).items())


def test_an_adapter_of_another_model_is_refused(tmp_path):
    model, stored = learned()
    path = tmp_path / "adapter"
    lora.save(model, path)

    def refused(other, words, file=path, kept=None):
        before = dict(other.named_parameters())
        with pytest.raises(ValueError, match=words) as caught:
            lora.load(other, file, kept)
        assert "\n" not in str(caught.value)
        assert dict(other.named_parameters()) == before
        assert not lora.adapters(other)

    name = "model.layers.0.self_attn.q_proj"
    refused(make("llama-72-wide"), rf"is of another model: its {name} is \[64, 64\], the model's is \[72, 72\]")
    refused(make("gpt-neox"), f"is of another model: the model has no such linear, {name}")
    original, base, stored = quantized("nf4")
    refused(original, f"was trained on another base: it kept {name} as BlockTensor, here it is torch.float32")
    refused(base, f"it kept {name} as BlockTensor, here it is UniformTensor", kept=quantized("rtn")[2])
    other = stored[name]
    changed = stored | {name: nf4.quantize(other.dequantize() * 1.01, double_quant=True)}
    refused(base, "another base: its sizes are the model's, its weights are not", kept=changed)
    with torch.no_grad():
        base.model.norm.weight[0] += 1
    refused(base, "its weights are not", kept=stored)
    refused(make("llama"), "nothing is no file", tmp_path / "nothing")
    (tmp_path / "text").write_text("not a tensor")
    refused(make("llama"), "text holds no adapters, or is damaged", tmp_path / "text")
    files.save_tensors(tmp_path / "plain", {"w": torch.zeros(2)})
    refused(make("llama"), "plain holds no adapters, or is damaged", tmp_path / "plain")
    whole = path.read_bytes()
    (tmp_path / "half").write_bytes(whole[: len(whole) // 2])
    refused(base, "half holds no adapters, or is damaged", tmp_path / "half", stored)
    with pytest.raises(models.ModelError, match="has adapters already"):
        lora.load(model, path)
    with pytest.raises(models.ModelError, match="no adapters to save"):
        lora.save(base, path)


def test_layers_that_are_packed_already_are_refused():
    bnb = peers.bitsandbytes()
    model = make("llama").eval()
    model.model.layers[1].mlp.up_proj = bnb.nn.Linear4bit(64, 96, bias=False, quant_type="nf4").to("cpu")
    for work in (lora.add, lambda packed: qat.prepare(packed, qat.Grid(bits=4, group_size=32))):
        with pytest.raises(models.ModelError, match=r"model\.layers\.1\.mlp\.up_proj keeps its weight packed: "):
            work(model)
