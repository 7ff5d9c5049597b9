"""Documents, the split, and the stream of tokens."""

import copy
import hashlib

import pytest
import torch
from safetensors.torch import save_file

from labsupport.model import models, text


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(models.course_model_dir())


@pytest.mark.parametrize("domain", text.DOMAINS)
def test_split_follows_the_hash_of_the_name_alone(domain):
    held_out, train = text.documents(domain, "heldout"), text.documents(domain, "train")
    limit = {"code": 26, "prose": 64, "numpy": 64}[domain]
    for document in held_out:
        assert hashlib.sha256(document.name.encode()).digest()[0] < limit
    for document in train:
        assert hashlib.sha256(document.name.encode()).digest()[0] >= limit
    assert held_out
    assert train


def test_no_tests_of_the_library_and_no_tables():
    names = [d.name for s in text.SPLITS for d in text.documents("code", s)]
    parts = {p for n in names for p in n.split("/")}
    assert not parts & {"test", "tests", "idle_test", "encodings", "site-packages"}
    assert "pydoc_data/topics.py" not in names
    assert "subprocess.py" in names


@pytest.mark.slow
def test_stream_remembers_its_documents(tokenizer):
    documents = [text.Document("a", "one two"), text.Document("b", "three\n" * 30)]
    stream = text.tokenize(tokenizer, documents, "made up")
    assert stream.ids.shape == stream.document.shape
    for number, document in enumerate(documents):
        ids = stream.ids[stream.document == number].tolist()
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids[:-1]) == document.text
    assert stream.bytes == sum(len(d.text.encode()) for d in documents)
    other = text.tokenize(tokenizer, [text.Document("a", "one twO"), documents[1]], "made up")
    assert other.sha256 != stream.sha256


def test_windows_follow_each_other_or_spread(tokenizer):
    stream = text.tokenize(tokenizer, [text.Document("a", "word " * 500)], "made up")
    starts = stream.windows(64)
    assert torch.equal(starts, torch.arange(len(stream) // 64) * 64)
    some = stream.windows(64, 3)
    assert len(some) == 3
    assert (some.diff() >= 64).all()
    assert set(some.tolist()) <= set(starts.tolist())
    assert torch.equal(stream.windows(64, 10**6), starts)
    positions = stream.positions(64, 3)
    assert positions.shape == (3, 64)
    assert torch.equal(positions[:, 0], some)
    assert (positions.diff(dim=1) == 1).all()


@pytest.fixture
def cutting(tokenizer, tmp_path, monkeypatch):
    """A text that is long enough to be kept, a cache of its own, and a list that grows each time the text is cut."""
    monkeypatch.setenv("LABS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(text, "CACHED_BYTES", 100)
    cuts, cut = [], text._cut
    monkeypatch.setattr(text, "_cut", lambda *given: cuts.append(given) or cut(*given))
    documents = [text.Document("a", "one two\n" * 20), text.Document("b", "x = 3\n" * 30)]
    return lambda by=tokenizer, of=documents: text.tokenize(by, of, "made up"), cuts, documents


def test_a_long_text_is_cut_once(cutting, tmp_path):
    tokenize, cuts, _ = cutting
    first, again = tokenize(), tokenize()
    assert len(cuts) == 1
    for name in ("ids", "document"):
        assert torch.equal(getattr(again, name), getattr(first, name))
        assert getattr(again, name).dtype == torch.int64
    assert (again.names, again.bytes, again.sha256) == (first.names, first.bytes, first.sha256)
    tokenize(of=[text.Document("a", "short")])
    assert len([*(tmp_path / "cache").rglob("*.safetensors")]) == 1


def test_another_text_or_tokenizer_is_cut_anew(cutting, tokenizer):
    tokenize, cuts, documents = cutting
    tokenize()
    tokenize(of=[text.Document("a", documents[0].text + "!"), documents[1]])
    other = copy.deepcopy(tokenizer)
    other.eos_token = tokenizer.convert_ids_to_tokens(5)
    assert tokenize(other).ids[-1] == 5
    more = copy.deepcopy(tokenizer)
    more.add_tokens(["one two"])
    assert len(tokenize(more)) < len(tokenize())
    assert len(cuts) == 4


@pytest.mark.parametrize("damage", [b"", b"\0" * 100, "half", "other"])
def test_a_damaged_cache_is_made_again(cutting, tmp_path, damage):
    tokenize, cuts, _ = cutting
    wanted = tokenize().ids
    (kept,) = (tmp_path / "cache").rglob("*.safetensors")
    whole = kept.read_bytes()
    if damage == "other":
        save_file({"ids": torch.zeros(3, dtype=torch.int32), "lengths": torch.tensor([1, 1], dtype=torch.int32)}, kept)
    else:
        kept.write_bytes(whole[: len(whole) // 2] if damage == "half" else damage)
    assert torch.equal(tokenize().ids, wanted)
    assert len(cuts) == 2
    assert kept.read_bytes() == whole


def test_where_nothing_can_be_kept_the_text_is_cut_each_time(cutting, tmp_path):
    tokenize, cuts, _ = cutting
    (tmp_path / "cache").write_text("a file where the folder would be")
    assert torch.equal(tokenize().ids, tokenize().ids)
    assert len(cuts) == 2


def test_text_shorter_than_a_window(tokenizer):
    stream = text.tokenize(tokenizer, [text.Document("a", "short")], "made up")
    with pytest.raises(text.TextError, match=r"'made up' has \d+ tokens, fewer than one window of 64"):
        stream.windows(64)


def test_labs_text_names_a_directory(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("alpha beta")
    (tmp_path / "sub" / "b.md").write_text("gamma")
    (tmp_path / "c.bin").write_bytes(b"\0\1")
    monkeypatch.setenv("LABS_TEXT", str(tmp_path))
    stream = text.load_text(tokenizer)
    assert stream.names == ("a.txt", "sub/b.md")


@pytest.mark.slow
def test_labs_text_names_a_dataset(tokenizer, tmp_path, monkeypatch):
    """A directory laid out like a dataset on the hub goes through the same loader as an id would."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "benchmark"
    data.mkdir()
    datasets.Dataset.from_dict({"text": ["first line", "second line"]}).to_parquet(data / "test-00000-of-00001.parquet")
    monkeypatch.setitem(text.HUB_DATASETS, "benchmark", (str(data), None, "test"))
    stream = text.load_text(tokenizer, "benchmark")
    assert tokenizer.decode(stream.ids[:-1]) == "first line\n\nsecond line"
    datasets.Dataset.from_dict({"line": ["x"]}).to_parquet(data / "test-00000-of-00001.parquet")
    with pytest.raises(text.TextError, match="has no column 'text'"):
        text.load_text(tokenizer, "benchmark")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda _: text.documents("poetry"),
            "domain is 'poetry', wanted one of code, prose, numpy, wiki, or a directory with train and heldout",
        ),
        (lambda _: text.documents("code", "dev"), "split is 'dev', wanted one of train, heldout"),
        (lambda t: text.tokenize(t, [], "nothing"), "the text 'nothing' is empty"),
        (lambda t: text.tokenize(t, [text.Document("a", "x\ud800")], "x"), r"the document 'a' holds '\\ud800', which has no form"),
        (lambda t: text.load_text(t, "/no/such/folder"), "source is '/no/such/folder', which is not there: wanted a directory"),
        (lambda t: text.load_text(t, "a/b/c"), "source is 'a/b/c', which is not there: wanted a directory"),
        (lambda t: text.load_text(t, __file__), r"source is '.*test_text\.py', a file: wanted a directory"),
    ],
)
def test_bad_input(tokenizer, call, message):
    with pytest.raises(text.TextError, match=message):
        call(tokenizer)


def test_what_is_no_text_and_no_tokenizer(tokenizer):
    for wrong in (["code"], 3):
        with pytest.raises(TypeError, match=r"^source is (list|int), wanted one of code, prose, numpy, wiki, a directory"):
            text.load_text(tokenizer, wrong)
    with pytest.raises(TypeError, match=r"^the document 'a' is NoneType, wanted text"):
        text.tokenize(tokenizer, [text.Document("a", None)], "x")
    with pytest.raises(TypeError, match=r"^tokenizer is NoneType, wanted a tokenizer"):
        text.load_text(None, "prose")


@pytest.mark.slow
def test_a_dataset_that_cannot_be_read_is_named_in_one_line(tokenizer, tmp_path, monkeypatch):
    """Whatever the hub's library raises: without a network it does for any id."""
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    with pytest.raises(
        text.TextError, match=r"^no text 'nobody/nothing': neither a directory nor a dataset that can be read \("
    ) as caught:
        text.load_text(tokenizer, "nobody/nothing")
    assert "\n" not in str(caught.value)


def test_directory_without_text(tokenizer, tmp_path):
    with pytest.raises(text.TextError, match="holds no text"):
        text.load_text(tokenizer, str(tmp_path))


def test_documentation_of_numpy_is_read_and_not_run(monkeypatch, tmp_path):
    package = tmp_path / "numpy"
    (package / "tests").mkdir(parents=True)
    (package / "__init__.py").write_text(f'raise SystemExit\nX = """{"Words.  " * 40}"""\nY = "short"\n')
    (package / "lib.py").write_text(f'def f():\n    """{"A sum. " * 40}\n\n    Indented.\n    """\n')
    (package / "tests" / "test_lib.py").write_text(f'"""{"A test. " * 40}"""\n')
    (package / "empty.py").write_text("x = 1\n")
    spec = type("Spec", (), {"origin": str(package / "__init__.py")})
    monkeypatch.setattr(text.importlib.util, "find_spec", lambda name: spec)
    found = {d.name: d.text for split in text.SPLITS for d in text.documents("numpy", split)}
    assert found.keys() == {"numpy/__init__.py", "numpy/lib.py"}
    assert found["numpy/lib.py"].endswith("\n\nIndented.")
    monkeypatch.setattr(text.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(text.TextError, match="NumPy is not installed: pip install numpy"):
        text.documents("numpy", "train")
