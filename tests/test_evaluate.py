"""Perplexity against its definition, written out; divergence and agreement; the paired bootstrap."""

import dataclasses
import math

import pytest
import torch

from labsupport.model import evaluate
from labsupport.model.text import TextError, TokenStream
from labsupport.pipeline import budget


@pytest.fixture(scope="module")
def model():
    return tiny_llama(seed=0)


@pytest.fixture(scope="module")
def other():
    return tiny_llama(seed=1)


def tiny_llama(seed: int):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def stream():
    """Five documents of unequal length, 130 tokens: 8 windows of 16 and a tail of 2."""
    lengths = torch.tensor([40, 3, 50, 20, 17])
    ids = torch.randint(0, 50, (130,), generator=torch.Generator().manual_seed(2))
    document = torch.repeat_interleave(torch.arange(5), lengths)
    return TokenStream(ids, document, tuple("abcde"), bytes=400, sha256="s", source="test")


@torch.no_grad()
def losses_by_hand(model, stream, length):
    """(document, nats) of every predicted token, one forward pass for each: the definition, without batches or shifts."""
    found = []
    for start in range(0, len(stream) - length + 1, length):
        for place in range(start + 1, start + length):
            logits = model(input_ids=stream.ids[start:place][None], use_cache=False).logits[0, -1].double()
            probability = logits.exp()[stream.ids[place]] / logits.exp().sum()
            found.append((stream.document[place].item(), -math.log(probability.item())))
    return found


@pytest.mark.slow
def test_perplexity_is_its_definition(model, stream):
    by_hand = losses_by_hand(model, stream, 16)
    assert len(by_hand) == 8 * 15
    result = evaluate.evaluate(model, stream, length=16)
    # 120 float32 log-softmaxes, each within a few units of 2**-23 of numbers below 10.
    assert result.perplexity == pytest.approx(math.exp(sum(nll for _, nll in by_hand) / len(by_hand)), rel=1e-5)
    for document in range(5):
        mine = [nll for d, nll in by_hand if d == document]
        assert result.tokens[document] == len(mine)
        assert result.loss[document].item() == pytest.approx(sum(mine), rel=1e-5, abs=1e-6)
    assert result.windows == 8
    assert evaluate.perplexity(model, stream, length=16) == result.perplexity
    assert result.bits_per_byte == pytest.approx(result.mean_loss / math.log(2) * 130 / 400)


def test_windows_are_spread_and_counted(model, stream):
    some = evaluate.evaluate(model, stream, length=16, windows=3)
    assert some.windows == 3
    assert some.tokens.sum() == 3 * 15
    assert evaluate.evaluate(model, stream, length=16, windows=99).windows == 8


def test_text_shorter_than_a_window_is_refused(model, stream):
    with pytest.raises(TextError, match="fewer than one window of 200"):
        evaluate.evaluate(model, stream, length=200)
    with pytest.raises(ValueError, match="length is 1"):
        evaluate.evaluate(model, stream, length=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 1}, "length is 1, wanted at least 2 tokens"),
        ({"length": 2.5}, "length is 2.5"),
        ({"length": None}, "length is None"),
        ({"windows": 0}, "windows is 0, wanted a whole number from 1 up"),
        ({"windows": "4"}, "windows is '4'"),
        ({"stream": None}, "stream is NoneType, wanted a TokenStream"),
        ({"model": None}, "model is NoneType"),
    ],
)
def test_what_cannot_be_evaluated(model, stream, changes, message):
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        evaluate.evaluate(**{"model": model, "stream": stream, "length": 16, "windows": 2} | changes)


def test_tokens_that_the_model_does_not_know(model, stream):
    for ids, words in ((stream.ids + 100, "100 to 149"), (stream.ids - 3, "-3 to ")):
        strange = dataclasses.replace(stream, ids=ids)
        for call in (evaluate.evaluate, lambda *rest: evaluate.divergence(model, *rest)):
            with pytest.raises(ValueError, match=rf"^stream holds tokens {words}.*, the model knows 0 to 49"):
                call(model, strange, 16, 8)


def test_a_broken_model_has_an_infinite_perplexity():
    broken = tiny_llama(seed=3)
    broken.lm_head.weight.data.mul_(1e6)
    stream = TokenStream(torch.arange(32), torch.zeros(32, dtype=torch.int64), ("a",), bytes=32, sha256="s", source="test")
    assert evaluate.perplexity(broken, stream, 16) == math.inf


def test_divergence_of_a_model_from_itself_is_nothing(model, stream):
    kl, agreement = evaluate.divergence(model, model, stream, length=16)
    assert kl == 0
    assert agreement == 1


def test_divergence_by_hand(model, other, stream):
    kl, agreement = evaluate.divergence(model, other, stream, length=16)
    total = agreed = 0.0
    for start in range(0, 128, 16):
        ids = stream.ids[start : start + 16][None]
        with torch.no_grad():
            p, q = (m(input_ids=ids).logits[0, :-1].double().softmax(-1) for m in (model, other))
        total += (p * (p / q).log()).sum().item()
        agreed += (p.argmax(-1) == q.argmax(-1)).sum().item()
    assert kl == pytest.approx(total / 120, rel=1e-5)
    assert agreement == agreed / 120
    # It is not symmetric: the reference's probabilities are the weights.
    assert evaluate.divergence(other, model, stream, length=16)[0] != pytest.approx(kl, rel=1e-3)


def evaluation(loss, tokens, sha256="s"):
    return evaluate.Evaluation(loss.double(), tokens, windows=1, length=2, tokens_per_byte=0.3, sha256=sha256)


def documents(count: int, seed: int = 0):
    """Documents of unequal length and difficulty, and a second model that is worse by 0.05 nats a token, give or take 0.02."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(20, 200, (count,), generator=g)
    loss = (2 + 3 * torch.rand(count, generator=g)) * tokens
    extra = (0.05 + 0.02 * torch.randn(count, generator=g)) * tokens
    return evaluation(loss, tokens), evaluation(loss + extra, tokens)


def test_bootstrap_of_a_model_with_itself_is_nothing():
    first, _ = documents(30)
    interval = evaluate.paired_bootstrap(first, first)
    assert (interval.change, interval.low, interval.high) == (0, 0, 0)


def test_bootstrap_change_is_the_ratio_of_perplexities():
    first, second = documents(30)
    interval = evaluate.paired_bootstrap(first, second)
    assert interval.change == pytest.approx(second.perplexity / first.perplexity - 1, rel=1e-9)
    assert interval.low < interval.change < interval.high


def test_bootstrap_interval_covers_the_truth_as_often_as_it_says():
    """Of 200 texts drawn from one population, 95 % of the intervals hold its value; binomial, four deviations either way."""
    truth = math.expm1(0.05)
    held = 0
    for seed in range(200):
        interval = evaluate.paired_bootstrap(*documents(60, seed), samples=500)
        held += interval.low <= truth <= interval.high
    assert 190 - 4 * math.sqrt(200 * 0.95 * 0.05) <= held < 200


def test_bootstrap_pairs():
    """What a hard document does to both models cancels: the interval does not widen with the spread of the documents."""
    first, second = documents(30)
    shift = 100 * torch.rand(30, dtype=torch.float64) * first.tokens
    harder = evaluate.paired_bootstrap(evaluation(first.loss + shift, first.tokens), evaluation(second.loss + shift, first.tokens))
    assert harder.low == pytest.approx(evaluate.paired_bootstrap(first, second).low, rel=1e-6)


def test_bootstrap_draws_documents_not_tokens():
    """A long document with an effect of its own counts once: the interval must reach from the others' effect towards its."""
    tokens = torch.tensor([1000] + [10] * 20)
    extra = torch.where(tokens == 1000, 0.5, 0.0) * tokens
    interval = evaluate.paired_bootstrap(evaluation(tokens * 3.0, tokens), evaluation(tokens * 3.0 + extra, tokens))
    assert interval.low == 0
    assert interval.high > math.expm1(0.4)


def test_bootstrap_refuses_what_cannot_be_paired():
    first, second = documents(30)
    with pytest.raises(ValueError, match="different tokens"):
        evaluate.paired_bootstrap(first, dataclasses.replace(second, sha256="t"))
    with pytest.raises(ValueError, match="different tokens"):
        evaluate.paired_bootstrap(first, dataclasses.replace(second, tokens=second.tokens + 1))


def test_bootstrap_ignores_documents_without_tokens():
    first, second = documents(30)
    padded = [
        evaluation(torch.cat([e.loss, torch.zeros(9)]), torch.cat([e.tokens, torch.zeros(9, dtype=torch.int64)]))
        for e in (first, second)
    ]
    assert evaluate.paired_bootstrap(*padded) == evaluate.paired_bootstrap(first, second)


def test_spend_refuses_a_budget_below_the_cheapest():
    nbytes = torch.tensor([[10, 20], [10, 20]])
    with pytest.raises(ValueError, match="budget is 19 bytes, the cheapest choices take 20"):
        budget.spend(torch.rand(2, 2), nbytes, 19)


def test_spend_jumps_over_an_upgrade_that_gains_nothing():
    error = torch.tensor([[1.0, 1.1, 0.2], [1.0, 0.9, 0.8]])
    nbytes = torch.tensor([[10, 11, 12], [10, 11, 12]])
    assert budget.spend(error, nbytes, 22).tolist() == [2, 0]
    assert budget.spend(error, nbytes, 24).tolist() == [2, 2]


def test_a_large_vocabulary_goes_through_in_smaller_pieces_with_the_same_losses(course, held_out, monkeypatch):
    model, _ = course
    whole = evaluate.evaluate(model, held_out, length=64, windows=4)
    assert evaluate.batch_size(model, 64) == evaluate.BATCH == 4
    monkeypatch.setattr(evaluate, "CHUNK", 10 * 4096)  # ten tokens at a time, and three at the end of a window
    assert torch.equal(evaluate.evaluate(model, held_out, length=64, windows=4).loss, whole.loss)
    monkeypatch.setattr(evaluate, "LOGITS", 2 * 64 * 4096)
    assert evaluate.batch_size(model, 64) == 2
    assert evaluate.batch_size(model, 512) == 1
    # Products of other shapes are summed in another order: logits move by some 1e-6 of their size, losses by less than 1e-4.
    torch.testing.assert_close(evaluate.evaluate(model, held_out, length=64, windows=4).loss, whole.loss, rtol=1e-4, atol=1e-4)
