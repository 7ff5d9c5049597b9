"""The package's pieces on a CUDA device, compared with the CPU.

    pytest tests/pretend_cuda/on_cuda.py                                                      with a GPU
    PRETEND_CUDA=1 PYTHONPATH=tests/pretend_cuda pytest tests/pretend_cuda/on_cuda.py        without one

What the device computes by operations of one value at a time is equal to the last bit. Sums are taken in another order, so codes
next to a tie may differ where a method calibrates: there the error of a weight is compared, within a fiftieth.
"""

import sys

import pytest
import torch
from test_figures import DRAWERS, SAMPLES, named, tensors
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM

from labsupport import kernels
from labsupport.checkpoint import load, quantize
from labsupport.course import train
from labsupport.evidence import bench, finetuning, machine, planner, retraining, sweep, timing, training_memory
from labsupport.model import evaluate, models, text
from labsupport.pipeline import cache, calibrate, fold, lora, training
from labsupport.pipeline.quantize import quantize_model
from labsupport.quant import awq, bnb_format, gptq, grid, int8, kv, lattice, nf4, obq, packing, qat, rtn

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
GPU = torch.device("cuda", 0)
PRETENDED = "pretend_cuda" in sys.modules
CALIBRATED = 0.02


@pytest.fixture(scope="module")
def here():
    """A Llama of two blocks on the CPU, wide enough for groups of 32 in its cache, with the course model's vocabulary."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def there(here):
    return models.duplicate(here).to(GPU)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 300, (4, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def stream():
    tokens = torch.randint(0, 300, (640,), generator=torch.Generator().manual_seed(1))
    return text.TokenStream(tokens, torch.arange(640) // 128, tuple("abcde"), 2000, "digest", "made up")


@pytest.fixture(scope="module")
def weight():
    return 0.1 * torch.randn(32, 128, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def inputs():
    return torch.randn(256, 128, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("refused", "error"),
    [
        (lambda: torch.ones(2, device=GPU) + torch.ones(2), RuntimeError),
        (lambda: torch.cat([torch.ones(2, device=GPU), torch.ones(2)]), RuntimeError),
        (lambda: torch.nn.functional.embedding(torch.tensor([0]), torch.ones(2, 2, device=GPU)), RuntimeError),
        (lambda: torch.ones(2)[torch.tensor([0], device=GPU)], RuntimeError),
        (lambda: torch.ones(2, device=GPU).numpy(), TypeError),
        (lambda: torch.rand(2, device=GPU, generator=torch.Generator()), RuntimeError),
        (lambda: torch.ones(2, 2, dtype=torch.int32, device=GPU) @ torch.ones(2, 2, dtype=torch.int32, device=GPU), RuntimeError),
        (lambda: torch.histogram(torch.ones(3, device=GPU), 3), RuntimeError),
    ],
    ids=["two devices", "joined", "looked up", "indexed", "numpy", "generator", "whole numbers", "of CPUs"],
)
def test_the_device_refuses_what_a_gpu_refuses(refused, error):
    with pytest.raises(error):
        refused()


def test_the_device_takes_what_a_gpu_takes():
    tensor = torch.arange(6.0, device=GPU).view(2, 3)
    assert (tensor * torch.tensor(2.0)).sum().item() == 30
    assert tensor[torch.tensor([1, 0])].tolist() == [[3, 4, 5], [0, 1, 2]]
    tensor.t()[0] = 7  # through a view
    assert tensor.cpu().tolist() == [[7, 1, 2], [7, 4, 5]]
    layer = torch.nn.Linear(3, 2).to(GPU)
    layer(tensor).sum().backward()
    assert layer.weight.grad.device == GPU


def test_the_course_model_is_float32_and_computes_what_the_cpu_computes(course, held_out):
    model, _ = models.load_model(str(models.course_model_dir()))
    parameter = next(model.parameters())
    assert (parameter.device, parameter.dtype) == (GPU, torch.float32)
    kl, agreement = evaluate.divergence(course[0], model, held_out, 64, 1)
    # Logits of float32 sums in another order: relative 1e-6 each, and the divergence goes with the square.
    assert abs(kl) < 1e-6
    assert agreement > 0.98


METHODS = [
    ("rtn", {"group_size": 16}), ("rtn", {"group_size": "tensor", "symmetric": True}), ("nf4", {"block_size": 32}),
    ("nf4", {"double_quant": True}), ("int8", {}), ("int8", {"paper": True, "threshold": 2.0}), ("int8-weights", {}),
    ("gptq", {"group_size": 16}), ("gptq", {"act_order": True, "static_groups": True, "mse": True}),
    ("gptq", {"overrides": {"down_proj": {"bits": 8}}}), ("awq", {"group_size": 16}),
    ("awq", {"base": "gptq", "group_size": None}), ("awq", {"loss": "block", "clip": False}),
]  # fmt: skip


@pytest.mark.parametrize(("method", "settings"), METHODS, ids=lambda value: value if isinstance(value, str) else "-".join(value))
def test_every_method(here, there, ids, stream, method, settings):
    given = {"calibration": ids} if method in ("gptq", "awq") else {}
    settings = {"group_size": None} | settings if method in ("gptq", "awq") else settings
    pair = [quantize_model(model, method, **given, **settings)[0] for model in (here, there)]
    assert {parameter.device for parameter in pair[1].parameters()} == {GPU}
    losses = [evaluate.evaluate(model, stream, 64).mean_loss for model in pair]
    assert losses[1] == pytest.approx(losses[0], rel=CALIBRATED if given else 1e-4)


@pytest.mark.parametrize(
    "scheme",
    [
        kv.Scheme(kv.Part(4, "token", 16), kv.Part("fp8")),
        kv.Scheme(kv.Part(2, "channel", 16, residual=16), kv.Part(2, "token", 16, residual=16), before_rope=True),
    ],
    ids=["token, fp8", "channel, before RoPE"],
)
def test_a_quantized_cache(here, there, ids, stream, scheme):
    losses = [cache.evaluate_cached(model, stream, scheme, 64).mean_loss for model in (here, there)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    given = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": 299}
    held = cache.QuantizedCache(there, scheme)
    assert there.generate(ids.to(GPU), past_key_values=held, **given).shape == (4, 38)
    assert cache.losses_by_place(there, stream, scheme, 4, 64, 2).shape == (2, 4)


def test_statistics_folding_and_planting(there, ids):
    fed = calibrate.blockwise(there, ids, lambda name, layer, fed: fed, true_sequential=False)
    assert {statistics.gram.device for statistics in fed.values()} == {GPU}
    assert {statistics.to("cpu").hessian.device.type for statistics in fed.values()} == {"cpu"}
    planted = models.plant_key_outliers(models.plant_outliers(there))
    for group in fold.groups(planted):
        statistics = fed[group.linears[0]]
        weights = [planted.get_submodule(name).weight for name in group.linears]
        fold.fold(planted, group, awq.search(weights, statistics.gram, statistics.mean_abs, group_size=16).scale.cpu())
    with torch.no_grad():
        before, after = (model(input_ids=ids.to(GPU)).logits for model in (there, planted))
    # Factors that are multiplied and divided by: float32 rounding of a few products, grown over two blocks.
    assert (after - before).abs().max() < 1e-3 * before.abs().max()


@pytest.mark.parametrize("name", sweep.SWEEPS)
def test_a_sweep(there, ids, stream, name, tmp_path, monkeypatch):
    fits = [row for row in sweep.SWEEPS[name](there) if row.get("group_size") not in (64, 128)]  # some layers have 96 inputs
    rows = [fits[0], fits[-1]] if fits else [{"method": "rtn", "bits": 4, "group_size": 32}]
    monkeypatch.setitem(sweep.SWEEPS, name, lambda model: iter(rows))
    for module in (finetuning, retraining):
        monkeypatch.setattr(module, "SCHEDULE", training.Schedule(steps=2, batch=2, length=16))
        monkeypatch.setattr(module, "SAMPLES", 1)
    given = {"calibration": lambda domain, count: ids.view(2, 64), "texts": lambda domain, split: stream}
    measured = sweep.run(name, there, stream, tmp_path / "rows.json", "tiny", 2, 64, **given)
    assert len(measured.rows) == len(rows)
    assert (measured.about["device"], measured.about["dtype"]) == ("cuda", "float32")


EXACT = {
    "rtn": lambda w: rtn.quantize(w, 3, 32).dequantize(),
    "rtn, written for GPTQ": lambda w: packing.read_gptq(packing.write_gptq(rtn.quantize(w, 4, 32)), 4).dequantize(),
    "rtn, written for AWQ": lambda w: packing.read_awq(packing.write_awq(rtn.quantize(w, 4, 32))).dequantize(),
    "nf4": lambda w: nf4.quantize(w, double_quant=True).dequantize(),
    "nf4, written": lambda w: bnb_format.read_4bit(bnb_format.write_4bit(nf4.quantize(w))).dequantize(),
    "int8": lambda w: int8.quantize(w).dequantize(),
    "int8, written": lambda w: bnb_format.read_8bit(bnb_format.write_8bit(int8.quantize(w.half()))).dequantize(),
    "as AutoAWQ": lambda w: awq.quantize_as_autoawq(w, group_size=32).dequantize(),
    "best clip": lambda w: grid.best_clip(w, 3, torch.linspace(0.5, 1, 6)),
}


def test_a_lattice_is_found(weight):
    on_one = rtn.quantize(weight, 4, 32).dequantize()
    assert lattice.find(on_one) == lattice.Lattice(32, has_zero=True)
    for x in (weight, on_one):
        assert lattice.find(x.to(GPU)) == lattice.find(x)


@pytest.mark.parametrize("work", EXACT.values(), ids=EXACT)
def test_a_tensor_alone_is_quantized_to_the_same_bits(weight, work):
    there = work(weight.to(GPU))
    assert there.device == GPU
    if work is EXACT["nf4"]:  # absmax is centered by its mean, a sum
        assert torch.allclose(there.cpu(), work(weight), atol=1e-3 * weight.abs().max())
    else:
        assert torch.equal(there.cpu(), work(weight))


def test_what_needs_a_hessian(weight, inputs):
    hessian = inputs.t() @ inputs * (2 / len(inputs))

    def error(quantized):
        return gptq.output_error(weight, quantized.dequantize().cpu(), hessian)

    for given in (hessian, hessian.to(GPU)):
        for choices in ({}, {"autogptq": True}):
            there = gptq.quantize(weight.to(GPU), given, 3, 32, **choices)
            assert there.scale.device == GPU
            assert error(there) == pytest.approx(error(gptq.quantize(weight, hessian, 3, 32, **choices)), rel=CALIBRATED)
    few = weight[:2, :32].contiguous(), hessian[:32, :32]
    codes = [obq.quantize(*(part.to(device) for part in few), 3, 32).codes.cpu() for device in ("cpu", GPU)]
    assert (codes[0] != codes[1]).float().mean() <= CALIBRATED
    limits = awq.search_clip(weight.to(GPU), (inputs.t() @ inputs).to(GPU), bits=3, group_size=32)
    assert limits.device == GPU
    assert awq.saliency(inputs.to(GPU)).device == GPU
    x = 4 * inputs.half()
    here, there = (int8.linear(x.to(device), int8.quantize(weight.half().to(device))).float().cpu() for device in ("cpu", GPU))
    assert (here - there).norm() < 2e-3 * here.norm()  # rounded to float16 once, to 2**-11 of a value


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", [None, "twin", "triton"])
def test_a_product_with_packed_weights(weight, inputs, backend, dtype):
    stored = rtn.quantize(weight, 4, 32)
    x = inputs[:3].to(dtype)
    exact = x.double() @ stored.dequantize().double().t()
    found = kernels.matmul(x.to(GPU), kernels.prepare(stored, dtype, backend, device=GPU)).cpu().double()
    # Rounded to 16 bits once at the end, and sums in float32.
    assert (found - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()
    with pytest.raises(ValueError, match="PyTorch's int4 product for CPUs runs on a CPU"):
        kernels.prepare(stored, dtype, "cpu", device=GPU)


def test_timing(monkeypatch):
    # Without a GPU, Triton's kernels are slow, and large products too.
    monkeypatch.setattr(timing, "MOST_COPIES", 2)
    monkeypatch.setattr(machine, "SQUARES", (256,))
    monkeypatch.setattr(machine, "SMALLEST_BUFFER", 2**24)
    assert machine.describe().device == "cuda"
    for measure in (machine.copy_bandwidth, machine.read_bandwidth, machine.matmul_rate):
        assert measure(budget=0.01) > 0
    rows = list(bench.products([(32, 128)], [1, 2], 0.01))
    assert {row.kernel for row in rows} >= {"bf16", "int4", "int4, unfused", "bitsandbytes int8 mixed"}
    assert bench.about("labs bench", machine.describe(), 0.01)["bandwidth"] > 0

    def waits():
        return torch.ones(2, device=GPU).sum().item()

    assert timing.seconds([waits], GPU, 0.01, graph=False) > 0


@pytest.mark.skipif(not PRETENDED, reason="a GPU stays in the error that this makes")
def test_a_graph_holds_nothing_that_waits():
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        timing.seconds([lambda: torch.ones(2, device=GPU).sum().item()], GPU, 0.01)


def test_a_checkpoint_is_written_on_the_device(here, course, tmp_path):
    here.save_pretrained(tmp_path / "tiny")
    course[1].save_pretrained(tmp_path / "tiny")
    out = quantize(tmp_path / "tiny", tmp_path / "out", "nf4", windows=1, length=16, device="cuda")
    assert load(out) is not None


@pytest.mark.parametrize("method", ["rtn", "nf4", "gptq"])
def test_an_adapter_learns_beside_a_packed_base(here, ids, method):
    stored = {}
    given = {"calibration": ids, "group_size": 32} if method == "gptq" else {}
    base = quantize_model(here, method, stored=stored, **given)[0]
    losses = {}
    for device in ("cpu", GPU):
        model = lora.add(models.duplicate(base), stored, rank=2).to(device)
        loss = model(input_ids=ids.to(device), labels=ids.to(device)).loss
        loss.backward()
        losses[device] = loss.item()
        for layer in lora.adapters(model).values():
            assert layer.stored.dequantize().device == layer.lora_b.grad.device == model.device
    assert losses[GPU] == pytest.approx(losses["cpu"], rel=1e-4)


def test_an_adapter_goes_through_its_file_to_the_device_and_trains_there(here, ids, tmp_path):
    stored = {}
    base = quantize_model(here, "nf4", double_quant=True, stored=stored)[0]
    model = lora.add(models.duplicate(base), stored, rank=2)
    schedule = training.Schedule(steps=3, batch=2, length=16)
    there = models.duplicate(model).to(GPU)
    losses = training.fit(there, ids.flatten(), schedule, tmp_path / "state")
    assert losses == pytest.approx(training.fit(model, ids.flatten(), schedule), rel=1e-4)
    lora.save(there, tmp_path / "adapter")
    for device in ("cpu", GPU):
        again = lora.load(models.duplicate(base).to(device), tmp_path / "adapter", stored)
        assert all(torch.equal(p.cpu(), training.trainable(there)[name].cpu()) for name, p in training.trainable(again).items())
    counted = training_memory.totals(
        training_memory.count(
            planner.shape_of(here.config, "tiny"), training_memory.Step("qlora", 2, 16, 2, "float32", attention="math")
        )
    )
    window = training.batch_at(ids.flatten(), 2, 16, 0, 0)
    with sdpa_kernel(SDPBackend.MATH):
        found = training_memory.measure_step(there, window.to(GPU))
    assert found == {kind: counted[kind] for kind in found}


def test_fake_quantizers(weight):
    step = qat.first_steps(weight, 4, 32)
    for work in (lambda w, s: qat.fake_quantize(w, 4, 32), lambda w, s: qat.learned_step(w, s), lambda w, s: qat.ternary(w, 32)):
        assert torch.allclose(work(weight.to(GPU), step.to(GPU)).cpu(), work(weight, step), rtol=1e-6, atol=0)
    for made in (qat.ternary_tensor(weight.to(GPU), 32), qat.uniform(weight.to(GPU), step.to(GPU))):
        assert made.dequantize().device == GPU


def test_the_state_of_a_training_run_comes_back_to_the_device(ids, tmp_path):
    model = train.build_model(train.Recipe(layers=1, hidden=64, intermediate=128)).to(GPU)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step():
        model(input_ids=ids.to(GPU), labels=ids.to(GPU)).loss.backward()
        optimizer.step()
        return optimizer.state[next(model.parameters())]["step"].item()

    assert step() == 1
    training.save_state(tmp_path / "state", dict(model.named_parameters()), optimizer, 1, {})
    assert training.load_state(tmp_path / "state", dict(model.named_parameters()), optimizer) == 1
    assert step() == 2


@pytest.mark.parametrize("draw", [draw for draw in DRAWERS if list(tensors(SAMPLES[draw]))], ids=named)
def test_a_figure_of_what_is_on_the_device(draw):
    def moved(value):
        match value:
            case torch.Tensor():
                return value.to(GPU)
            case dict():
                return {key: moved(entry) for key, entry in value.items()}
            case list() | tuple():
                return type(value)(moved(entry) for entry in value)
        return value

    draw(*moved(SAMPLES[draw]))
