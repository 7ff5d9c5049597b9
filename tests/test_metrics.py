"""A model against the float model token by token; tasks with models whose answers are known; what the intervals cover."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from labsupport.evidence import sweep, tasks
from labsupport.evidence.tasks import Tasks, parses
from labsupport.model import comparison, evaluate, models, text
from labsupport.model.comparison import Reference
from labsupport.pipeline.quantize import quantize_model

LENGTH = 64


@pytest.fixture(scope="module")
def stream():
    ids = torch.randint(0, 300, (640,), generator=torch.Generator().manual_seed(0))
    document = torch.repeat_interleave(torch.arange(4), torch.tensor([30, 250, 200, 160]))
    return text.TokenStream(ids, document, tuple("abcd"), 2000, "digest", "made up")


@pytest.fixture(scope="module")
def rounded(tiny):
    return quantize_model(tiny, "rtn", bits=3, group_size=32)[0]


def test_one_pass_gives_what_separate_ones_give(tiny, rounded, stream):
    reference = Reference(tiny, stream, LENGTH)
    found = reference.compare(rounded)
    separate = evaluate.evaluate(rounded, stream, LENGTH)
    # The same float32 logits; the logarithm of a sum of 300 exponentials is within a few units in the last place of 6 nats.
    assert torch.allclose(found.evaluation.loss, separate.loss, rtol=1e-6)
    assert torch.equal(found.evaluation.tokens, separate.tokens)
    kl, agreement = evaluate.divergence(tiny, rounded, stream, LENGTH)
    assert (found.kl_mean, found.agreement) == (pytest.approx(kl, rel=1e-5), agreement)
    assert 0 < found.agreement < 1
    assert reference.own.kl.abs().max() == 0
    assert reference.own.agreement == 1
    assert found.by_document(found.kl).sum().item() / found.kl.numel() == pytest.approx(found.kl_mean)
    assert torch.equal(found.by_document(torch.ones_like(found.kl)).long(), separate.tokens)


def test_each_token_is_its_definition(tiny, rounded, stream):
    found = Reference(tiny, stream, LENGTH, 3).compare(rounded)
    starts = stream.windows(LENGTH, 3)
    for window, token in ((0, 0), (1, 30), (2, LENGTH - 2)):
        ids = stream.ids[starts[window] : starts[window] + token + 1][None]
        with torch.no_grad():
            p, q = (F.log_softmax(model(input_ids=ids).logits[0, -1].double(), -1) for model in (tiny, rounded))
        target = stream.ids[starts[window] + token + 1]
        assert found.ids[window, token] == target
        assert found.document[window, token] == stream.document[starts[window] + token + 1]
        # 300 products and sums in float32 of logits below 1.
        assert found.nll[window, token].item() == pytest.approx(-q[target].item(), abs=1e-5)
        assert found.kl[window, token].item() == pytest.approx((p.exp() * (p - q)).sum().item(), abs=1e-5)
        assert found.first[window, token] == q.argmax()
        assert found.agrees[window, token] == (p.argmax() == q.argmax())


def test_quantiles_are_exact(tiny, rounded, stream):
    found = Reference(tiny, stream, LENGTH).compare(rounded)
    for share, value in ((0.5, found.kl_median), (0.999, found.kl_p999), (0.0, found.kl_quantile(0)), (1.0, found.kl_quantile(1))):
        assert value == pytest.approx(torch.quantile(found.kl.flatten().double(), share).item(), rel=1e-12)
    with pytest.raises(ValueError, match="share is 2, wanted a share from 0 to 1"):
        found.kl_quantile(2)


class Capped(nn.Module):
    """A model whose logits are not what its head gives."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.get_output_embeddings, self.get_input_embeddings = model.get_output_embeddings, model.get_input_embeddings

    def forward(self, **given):
        return SimpleNamespace(logits=torch.tanh(self.model(**given).logits))


def test_hidden_states_are_kept_only_where_the_head_makes_the_logits(tiny, rounded, stream, monkeypatch):
    calls = []
    handle = tiny.model.register_forward_hook(lambda *_: calls.append(1))
    kept = Reference(tiny, stream, LENGTH)
    passes = len(calls)
    first = kept.compare(rounded)
    assert len(calls) == passes  # the float model was not run again
    monkeypatch.setattr(comparison, "KEPT", 0)
    again = Reference(tiny, stream, LENGTH).compare(rounded)
    assert len(calls) == 3 * passes
    handle.remove()
    assert torch.equal(first.kl, again.kl)
    monkeypatch.undo()
    capped, other = Capped(tiny), Capped(rounded)
    found = Reference(capped, stream, LENGTH).compare(other)
    kl, _ = evaluate.divergence(capped, other, stream, LENGTH)
    assert found.kl_mean == pytest.approx(kl, rel=1e-5)
    assert kl != pytest.approx(first.kl_mean, rel=1e-2)


# Tasks. Identifiers are written so that they have several tokens; "x.py" is Python, "story.txt" is not, "old.py" cannot be parsed.
SHORT = "def load_settings(path_to_file):\n    settings_by_name = read(path_to_file)\n    return settings_by_name, self, self\n"
STORY = "Scheherazade met Shahryar. The King, old Shahryar, asked Scheherazade for a tale.\n"
NAMES = ("window_manager", "buffer_length", "parse_header", "find_offset", "close_stream", "update_counter", "previous_value")


def long_source():
    """A document that defines its names after some 350 tokens in which none of them occurs."""
    before = "def shared_function_name(a, b):\n    pass\n\n"
    before += "".join(f"def f(a, b):\n    total = a + b\n    return total * {n}\n\n" for n in range(30))
    return before + "".join(f"def {name}(self):\n    return self.{name}\n\n" for name in ("shared_function_name", *NAMES))


@pytest.fixture(scope="module")
def tokenizer(course):
    return course[1]


def stream_of(tokenizer, **documents):
    return text.tokenize(tokenizer, [text.Document(name.replace("_", "."), content) for name, content in documents.items()], "test")


class Oracle(nn.Module):
    """Ranks first what really follows, but for the tokens `missed`, in whose place it says 0."""

    def __init__(self, missed=()):
        super().__init__()
        self.embedding, self.missed = nn.Embedding(4096, 1), missed

    def get_input_embeddings(self):
        return self.embedding

    def get_output_embeddings(self):
        return None

    def forward(self, input_ids, use_cache=False):
        following = torch.cat([input_ids[:, 1:], torch.zeros_like(input_ids[:, :1])], dim=1)
        for token in self.missed:
            following = following.masked_fill(following == token, 0)
        return SimpleNamespace(logits=F.one_hot(following, 4096).float())


def first_tokens(tokenizer, context, name):
    return tokenizer(context + name, add_special_tokens=False)["input_ids"][len(tokenizer(context)["input_ids"]) :]


def test_identifiers_are_names_that_occur_again(tokenizer):
    stream = stream_of(tokenizer, x_py=SHORT, story_txt=STORY, old_py="print 'a_long_name', a_long_name\n" * 3)
    length = len(stream) - 1
    task = Tasks(tokenizer, stream, length, 1)
    places = {tokenizer.decode(stream.ids[start:end]).strip(" ("): (document, start) for document, _, start, end in task._repeated}
    # `read` occurs once; `self` is one token; Python that cannot be parsed has no names; "King" and "The" occur once.
    assert {name: document for name, (document, _) in places.items()} == {
        "path_to_file": 0, "settings_by_name": 0, "Shahryar": 1, "Scheherazade": 1,
    }  # fmt: skip
    assert task.documents["identifiers"] == [0, 0, 1, 1]
    oracle = Oracle()
    assert task.identifiers(Reference(oracle, stream, length, 1).own) == [True] * 4
    order = sorted(places, key=lambda name: places[name])
    _, _, start, end = task._repeated[order.index("settings_by_name")]
    for place in (start - 1, start, end - 1, end):  # the token before the name, its first and its last, the one after it
        token = int(stream.ids[place])
        done = task.identifiers(Reference(Oracle([token]), stream, length, 1).own)
        assert done == [token not in stream.ids[first:after] for _, _, first, after in task._repeated]
        assert done[order.index("settings_by_name")] is not (start <= place < end)


def test_names_are_not_looked_for_across_windows_or_documents(tokenizer):
    stream = stream_of(tokenizer, x_py=SHORT, y_py=SHORT)
    half = len(stream) // 2
    assert len(stream) == 2 * half
    whole = Tasks(tokenizer, stream, len(stream), None)._repeated
    assert [document for document, *_ in whole] == [0, 0, 1, 1]
    assert len(Tasks(tokenizer, stream, half, None)._repeated) == 4
    part = 3 * half // 4
    fewer = Tasks(tokenizer, stream, part, None)._repeated
    assert 0 < len(fewer) < 4
    for _, window, start, end in fewer:
        assert 1 <= start < end <= part
        assert 0 <= window < len(stream) // part


def test_copies_are_of_names_from_far_back(tokenizer):
    stream = stream_of(tokenizer, long_py=long_source())
    task = Tasks(tokenizer, stream, 512, None)
    assert len(task._contexts) == 1
    _, ids, places = task._contexts[0]
    asked = tokenizer.decode(ids)
    shown, filler = asked.index("def close(self)"), len(ids) - 1
    for start, end in places:
        name = next(name for name in NAMES if name.endswith(tokenizer.decode(ids[start:end])))
        assert asked[:shown].count(name) == 2  # defined and returned
        whole = first_tokens(tokenizer, "        self.", name)
        assert ids[start:end] == whole[-(end - start) :]
        assert end - start in (len(whole) - 1, len(whole) - 2)  # all but its first token, and a dot before it
        used = max(place for place in range(start - tasks.FAR) if ids[place : place + end - start] == ids[start:end])
        assert start - used > tasks.FAR
        filler = min(filler, start)
    assert stream.ids[: tasks.FAR].tolist() in [ids[place : place + tasks.FAR] for place in range(filler)]
    assert task.copies(Oracle()) == [True] * tasks.NAMES
    token = ids[places[1][1] - 1]
    assert task.copies(Oracle([token])) == [token not in ids[start:end] for start, end in places]
    assert not task.copies(Oracle([token]))[1]
    assert task.documents["copies"] == [0] * tasks.NAMES


class Scripted(nn.Module):
    """Writes a given text after each prompt, whatever that is."""

    def __init__(self, tokenizer, written):
        super().__init__()
        self.embedding = nn.Embedding(4096, 1)
        self.script = [tokenizer(part, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for part in written]

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, use_cache, past_key_values=0, logits_to_keep=0):
        following = torch.tensor([script[min(past_key_values, len(script) - 1)] for script in self.script])
        return SimpleNamespace(logits=F.one_hot(following, 4096)[:, None].float(), past_key_values=past_key_values + 1)


def test_parses_judges_what_a_model_writes(tokenizer, monkeypatch):
    monkeypatch.setattr(tasks, "FUNCTIONS", 3)
    stream = stream_of(tokenizer, long_py=long_source())
    task = Tasks(tokenizer, stream, 512, None)
    assert task.documents["parses"] == [0, 0, 0]
    for _, ids, header in task._prompts:
        assert len(ids) == tasks.PROMPT
        assert tokenizer.decode(ids).endswith(header)
        assert header.startswith("def ")
        assert header.endswith("):")
    written = ["\n    return 1\n", "\n    return (1\n", "\n    return 1\n\ndef broken(:\n"]
    assert task.parses(Scripted(tokenizer, written)) == [True, False, True]


@pytest.mark.parametrize(
    ("header", "written", "accepted"),
    [
        ("def f():", "\n    x = 1\n    y", True),  # the last line is cut off
        ("def f():", "\n    x = 1", False),  # and then nothing is left
        ("def f():", "\n    x = (1,\n         2", False),
        ("def f():", "\n    x = 1\n    if x:\n        y = (1,\n", True),  # what is unfinished is cut off
        ("def f():", "\n    try:\n        x = 1\n", False),
        ("def f():", '\n    """Say', False),
        ("def f():", '\n    """Say."""\n    ret', True),
        ("def f():", "\n    x = 1\n    y = = 2\n    z = 3\n", False),
        ("def f():", "\n    x = 1]\n    z = 3\n", False),
        ("def f():", "\n    x = 'open\n    y = 2\n", False),
        ("def f():", "\n    x = 1\n      y = 2\n", False),
        ("def f():", "\n    x = 1\ndef g(:\n", True),  # what follows the function is not looked at
        ("def f():", "\nx = 1\n", False),  # no body
        ("def f():", "\n    x = (\n1)\n    return x\n", True),  # a line that is not indented, inside brackets
        ("    def f(self):", "\n        return 1\n    def g(:\n", True),
        ("    def f(self):", "\n      return 1\n        return 2\n    x\n", False),
        ("    def f(self,\n          a):", "\n        return a\n", True),
        ("def f():", "\n    # a comment\n", False),
        ("def f():", "\n    x = '\0'\n", False),
    ],
)
def test_what_python_accepts(header, written, accepted):
    assert parses(header, written) is accepted


def test_a_text_that_the_model_ended_is_judged_to_its_end():
    assert parses("def f():", "\n    return 1", whole=True)
    assert not parses("def f():", "\n    return 1", whole=False)


def test_greedy_is_what_transformers_generates(tiny):
    prompts = torch.randint(1, 300, (3, 10), generator=torch.Generator().manual_seed(1))
    found = tasks.greedy(tiny, prompts, 8)
    whole = tiny.generate(prompts, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert found == whole[:, 10:].tolist()
    end = found[1][3]
    assert tasks.greedy(tiny, prompts, 8, end)[1] == found[1][: found[1].index(end)]


def test_headers_are_first_lines_of_functions():
    content = (
        "class A:\n    def f(self, a={1: 2}):\n        def g(): return 1\n    async def h(): pass\n\n"
        "def k(\n    x,\n) -> dict:\n    ...\n"
    )
    source = tasks.Source(content, [], [], True)
    assert [content[begin:end] for begin, end in source.headers()] == [
        "    def f(self, a={1: 2}):",
        "def k(\n    x,\n) -> dict:",
    ]


def test_a_text_that_is_not_read_back_has_no_items(stream, tokenizer):
    task = Tasks(tokenizer, stream, LENGTH, None)
    assert task.documents == {"identifiers": [], "copies": [], "parses": []}
    assert task.parses(Oracle()) == []


# Intervals. Sizes of documents are those of the held-out code in the windows of the sweep "qat".


def covered(tokens, number, between, within, skewed, levels, trials=2000):
    """How often the interval of paired_bootstrap at each of these levels of percentiles holds the change of the population.

    Of each trial `number` documents are drawn from the population of sizes. between: standard deviation of the change, in nats a
    token, between documents; within: of one token. The draws of documents are those that paired_bootstrap makes.
    """
    generator = torch.Generator().manual_seed(7)
    truth = 0.02
    sizes = tokens[torch.randint(len(tokens), (trials, number), generator=generator)]
    noise = torch.randn(trials, number, generator=generator, dtype=torch.float64)
    if skewed:
        noise = torch.empty_like(noise).exponential_(generator=generator) - 1
    own = torch.randn(trials, number, generator=generator, dtype=torch.float64)
    extra = sizes * (truth + between * noise) + within * sizes.sqrt() * own
    draws = torch.randint(0, number, (2000, number), generator=torch.Generator().manual_seed(0))
    times = torch.zeros(2000, number, dtype=torch.float64).scatter_add_(1, draws, torch.ones(2000, number, dtype=torch.float64))
    change = torch.expm1((extra @ times.T) / (sizes @ times.T)).sort(dim=1).values
    one = evaluate.Evaluation(torch.zeros(number), sizes[0].long(), 1, 2, 1.0, "s")
    other = evaluate.Evaluation(extra[0], sizes[0].long(), 1, 2, 1.0, "s")
    target, shares = math.expm1(truth), []
    for level in levels:
        tails = torch.tensor([(1 - level(row)) / 2 for row in sizes], dtype=torch.float64)
        low, high = at(change, tails), at(change, 1 - tails)
        pair = evaluate.paired_bootstrap(one, other, level=level(sizes[0]))
        assert (pair.low, pair.high) == (pytest.approx(low[0].item(), abs=1e-9), pytest.approx(high[0].item(), abs=1e-9))
        shares.append(((low <= target) & (target <= high)).double().mean().item())
    return shares


def at(ordered, share):
    """Quantiles of ordered rows, as torch.quantile takes them, a share for each row."""
    place = share * (ordered.shape[1] - 1)
    below = place.floor().long()
    above = (below + 1).clamp(max=ordered.shape[1] - 1)
    return torch.lerp(ordered.gather(1, below[:, None])[:, 0], ordered.gather(1, above[:, None])[:, 0], place - below)


# As measured: changes of documents of a few hundred tokens spread by 0.03 nats a token, those of a few thousand by 0.012.
CASES = {
    "as measured": (46, 0.011, 0.36, False),
    "between documents alone": (46, 0.03, 0.0, False),
    "within documents alone": (46, 0.0, 0.12, False),
    "skewed": (46, 0.011, 0.36, True),
    "half as many": (23, 0.011, 0.36, False),
}


@pytest.mark.parametrize("case", CASES)
def test_intervals_cover_the_truth_as_often_as_they_say(case):
    tokens = torch.tensor(sweep.load("qat").about["tokens"], dtype=torch.float64)
    tokens = tokens[tokens > 0]
    widened, plain = covered(tokens, *CASES[case], [evaluate.covering_level, lambda sizes: 0.95])
    assert 0.93 <= widened <= 0.97
    assert 0.89 <= plain <= 0.94  # of the percentiles at 0.95, which the other sweeps give


def test_the_level_of_percentiles_is_that_of_students_t():
    # Quantiles of t with 9, 19 and 45 degrees of freedom from a table, to its four decimals; the series is for few a little off.
    for count, t in ((10, 2.2622), (20, 2.0930), (46, 2.0141)):
        level = evaluate.covering_level(torch.full((count,), 500))
        normal = math.sqrt(count / (count - 1)) * t
        assert level == pytest.approx(math.erf(normal / math.sqrt(2)), abs=1e-4)
    uneven = evaluate.covering_level(torch.tensor([1000] * 10 + [1] * 1000))
    assert uneven == pytest.approx(evaluate.covering_level(torch.full((12,), 1)), abs=2e-3)  # (11000)^2 / 10001000 = 12.1
    assert evaluate.covering_level(torch.tensor([5])) == 1.0


def test_a_difference_of_shares_is_paired_by_document():
    counts = torch.tensor([10, 0, 20, 30, 5])
    right, other = torch.tensor([5.0, 0, 10, 20, 1]), torch.tensor([4.0, 0, 12, 20, 1])
    found = evaluate.paired_difference(right, other, counts)
    assert found.change == pytest.approx(1 / 65)
    assert found.low < found.change < found.high
    assert evaluate.paired_difference(right, right, counts) == evaluate.Difference(0.0, 0.0, 0.0)
    # Each document gains 0.1: no draw can give anything else.
    steady = evaluate.paired_difference(right, right + 0.1 * counts, counts)
    assert (steady.low, steady.high) == (pytest.approx(0.1), pytest.approx(0.1))


def test_the_course_model_has_items_of_every_task(course, held_out):
    task = Tasks(course[1], held_out, 512, 24)
    assert len(task.documents["identifiers"]) > 100
    assert len(task.documents["copies"]) % tasks.NAMES == 0
    assert len(task.documents["copies"]) >= 4 * tasks.NAMES
    assert len(task.documents["parses"]) == tasks.FUNCTIONS
    for documents in task.documents.values():
        assert documents == sorted(documents)
        assert len(set(documents)) > 3
    assert models.vocabulary(course[0]) > max(max(ids) for _, ids, _ in task._contexts)
