"""labs quantize on what it cannot do: one clear line, exit code not 0, nothing half written, and nothing of the user's removed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import test_checkpoint
import torch
from safetensors.torch import load_file, save_file
from test_checkpoint import GROUP, WORDS, Stop, change_config, make, run, shards
from typer.testing import CliRunner

from labsupport import checkpoint
from labsupport.checkpoint import CheckpointError, parts
from labsupport.checkpoint.recipe import Recipe
from labsupport.cli import app
from labsupport.cli import checkpoint as commands
from labsupport.model import files, hub, models, text

NAME = "model.layers.1.mlp.up_proj.weight"


source, copy, words = test_checkpoint.source, test_checkpoint.copy, test_checkpoint.words


def command(source, out, words, *more):
    """What `labs quantize` says and with which exit code. An exception that it lets through is raised here."""
    given = ["quantize", source, "--out", out, "--group-size", GROUP, "--samples", 3, "--length", 48, "--windows", 0]
    return CliRunner().invoke(app, [str(word) for word in (*given, "--calibration", words, *more)], catch_exceptions=False)


# Files that lie ------------------------------------------------------------------------------------------------------


def header(change):
    """Put another header in front of a shard's data."""

    def spoil(directory):
        path = shards(directory)[1]
        content = path.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        entries = json.loads(content[8:end])
        change({name: entry for name, entry in entries.items() if name != "__metadata__"})
        text = json.dumps(entries).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])

    return spoil


@header
def past_the_end(entries):
    entry = list(entries.values())[-1]
    entry["data_offsets"] = [offset + 10**6 for offset in entry["data_offsets"]]


@header
def overlapping(entries):
    one, two = list(entries.values())[:2]
    one.update(two)


@header
def another_shape(entries):
    next(iter(entries.values()))["shape"] = [7]


@header
def unknown_dtype(entries):
    next(iter(entries.values()))["dtype"] = "F17"


def endless_header(directory):
    shards(directory)[1].write_bytes((2**62).to_bytes(8, "little") + b"{}")


def nothing_in_it(directory):
    shards(directory)[1].write_bytes(b"")


def put(name, value):
    def spoil(directory):
        for path in shards(directory):
            tensors = load_file(path)
            if name in tensors:
                tensors[name].view(-1)[3] = value
                save_file(tensors, path)

    return spoil


DAMAGED = "model-00002-of-.*.safetensors is damaged or not safetensors"
LIES = [
    (past_the_end, DAMAGED),
    (overlapping, DAMAGED),
    (another_shape, DAMAGED),
    (unknown_dtype, DAMAGED),
    (endless_header, DAMAGED),
    (nothing_in_it, DAMAGED),
    (lambda d: (d / "config.json").write_bytes(b"\xff\xfe\0"), "config.json is not JSON"),
    (lambda d: (d / "config.json").write_text("[" * 10**5), "config.json is not JSON: maximum recursion depth"),
    (lambda d: change_config(d, model_type=["llama"]), "of which no model can be made"),
    (lambda d: change_config(d, hidden_size=-64), "of which no model can be made"),
    (lambda d: change_config(d, num_key_value_heads=0), "of which no model can be made"),
    (lambda d: change_config(d, num_hidden_layers=-1), "found no list of -1 blocks"),
    (lambda d: change_config(d, tie_word_embeddings=False), "lacks lm_head.weight, which its config asks for"),
    (put(NAME, float("nan")), f"{NAME} holds NaN or infinity in .*copy"),
    (put(NAME, float("inf")), f"{NAME} holds NaN or infinity in .*copy"),
    (put("model.embed_tokens.weight", float("nan")), "model.embed_tokens.weight holds NaN or infinity"),
]


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize(("spoil", "message"), LIES, ids=[f"{number}-{message[:30]}" for number, (_, message) in enumerate(LIES)])
def test_a_model_that_lies_is_refused_and_nothing_left(copy, words, tmp_path, spoil, message, method):
    spoil(copy)
    with pytest.raises(CheckpointError, match=message):
        run(copy, tmp_path / "out", method, words)
    assert {path.name for path in tmp_path.iterdir()} == {"copy", "words.txt"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_weights_in_any_float_are_read(copy, tmp_path, dtype):
    for path in shards(copy):
        save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path)
    model, _ = models.load_model(str(copy), device="cpu")
    found, _ = checkpoint.load(run(copy, tmp_path / "out", "rtn"))
    for name, layer in models.linears(model).items():
        step = layer.weight.abs().max() / 7
        assert (found.get_submodule(name).weight - layer.weight).abs().max() <= step


def test_a_head_of_its_own_is_kept_and_stays_what_it_was(tmp_path):
    source = make(tmp_path / "untied", tie_word_embeddings=False, num_hidden_layers=1)
    before = {name: tensor for path in shards(source) for name, tensor in load_file(path).items()}
    out = run(source, tmp_path / "out", "rtn")
    after = checkpoint.read(out).weights
    for name in ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(after[name], before[name])
    model, _ = checkpoint.load(out)
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_a_tied_head_is_stored_once(source, tmp_path):
    found = checkpoint.read(run(source, tmp_path / "out", "rtn")).weights
    assert "lm_head.weight" not in found
    assert "model.embed_tokens.weight" in found


def test_an_architecture_without_linears_is_refused():
    with pytest.raises(CheckpointError, match="the blocks of the model hold no linear layers"):
        Recipe.of("rtn").for_model({})


def test_a_config_that_says_not_quantized(copy, tmp_path):
    change_config(copy, quantization_config=None)
    assert checkpoint.read(run(copy, tmp_path / "out", "rtn")).layout == "gptq"


def test_what_was_quantized_is_not_quantized_again(source, words, tmp_path):
    run(source, tmp_path / "once", "rtn")
    done = command(tmp_path / "once", tmp_path / "twice", words)
    assert done.exit_code == 1
    assert "once is quantized already: config.json has a quantization_config" in done.stderr.replace("\n", "")
    assert not list(tmp_path.glob("twice*"))


@pytest.mark.slow
def test_a_layer_that_cannot_be_quantized_is_named_and_its_run_dropped(copy, words, tmp_path):
    """The second block's: the first is finished by then, and no other run could use it."""
    for path in shards(copy):
        tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
        if NAME in tensors:
            tensors[NAME] *= 1e12
        save_file(tensors, path)
    for method in ("rtn", "gptq", "awq"):
        with pytest.raises(
            CheckpointError, match=f"{NAME.removesuffix('.weight')}: a scale of .* is more than torch.float16 holds"
        ):
            run(copy, tmp_path / "out", method, words)
        assert {path.name for path in tmp_path.iterdir()} == {"copy", "words.txt"}


# Settings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 0}, "samples is 0, wanted 1 or more"),
        ({"samples": -3}, "samples is -3, wanted 1 or more"),
        ({"windows": -1}, "windows is -1, wanted 0 or more"),
        ({"length": -5}, "length is -5, wanted 2 to 64"),
        ({"length": 1}, "length is 1, wanted 2 to 64"),
        ({"length": 65}, "length is 65, wanted 2 to 64"),
        ({"bits": -4}, "bits is -4, the gptq layout has 2, 3, 4, 8"),
        ({"group_size": -2}, "group_size is -2, wanted a positive whole number, or -1"),
        ({"damping": float("nan")}, "damping is nan, wanted 0 or more"),
        ({"method": "awq", "damping": 0.5}, "damping is given, but awq has no such choice"),
        ({"double_quant": False}, "double_quant is given, but gptq has no such choice"),
        ({"device": "toaster"}, "device is 'toaster', which cannot be used here: Expected one of"),
        ({"device": "meta"}, "device is 'meta', which cannot be used here"),
    ],
)
def test_settings_that_do_not_fit(source, words, tmp_path, settings, message):
    with pytest.raises(CheckpointError, match=message):
        run(source, tmp_path / "out", **{"method": "gptq", "words": words, **settings})
    assert {path.name for path in tmp_path.iterdir()} == {"words.txt"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(source, words, tmp_path):
    done = command(source, tmp_path / "out", words, "--device", "cuda")
    assert done.exit_code == 1
    assert done.stderr.startswith("labs quantize: device is 'cuda', which cannot be used here")


TEXTS = [
    (b"", "has 1 tokens, fewer than one window of 48"),
    (b" \n", "fewer than one window of 48"),
    (b"hello hello", "fewer than one window of 48"),
    (WORDS[:600].encode(), "has . windows of 48 tokens, fewer than the 30 asked for"),
    (bytes(range(256)) * 40, "is not UTF-8 text"),
]


@pytest.mark.parametrize(("content", "message"), TEXTS, ids=[message[:30] for _, message in TEXTS])
def test_a_calibration_file_that_is_no_text_or_too_short(source, tmp_path, content, message):
    path = tmp_path / "given.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        run(source, tmp_path / "out", "gptq", path, samples=30)
    assert {path.name for path in tmp_path.iterdir()} == {"given.txt"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "missing.txt",
            "the calibration text 'missing.txt' does not exist: wanted a file, a directory, code, prose, numpy, wiki or a dataset",
        ),
        ("", "the calibration text '' does not exist"),
        ("someone/dataset", "no text 'someone/dataset': neither a directory nor a dataset that can be read"),
        ("x" * 5000, "neither a directory nor a dataset that can be read"),
    ],
)
@pytest.mark.slow
def test_a_calibration_text_that_is_not_there(source, tmp_path, name, message):
    done = command(source, tmp_path / "out", name)
    assert done.exit_code == 1
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_an_empty_directory_of_texts(source, tmp_path):
    (tmp_path / "texts").mkdir()
    with pytest.raises(ValueError, match="texts' holds no text: wanted files ending in"):
        run(source, tmp_path / "out", "gptq", tmp_path / "texts")


def test_a_file_called_code_does_not_hide_the_text_of_that_name(source, tmp_path, monkeypatch):
    """A short text stands for the standard library's, which takes ten seconds to cut into tokens."""
    monkeypatch.setattr(text, "documents", lambda domain="code", split="heldout": [text.Document("words", WORDS)])
    (tmp_path / "code").write_text("x")
    monkeypatch.chdir(tmp_path)
    run(source, tmp_path / "out", "gptq", "code")
    assert json.loads((tmp_path / "out" / "quantization_report.json").read_text())["calibration"]["calibration"] == "code"


# Where it is written -------------------------------------------------------------------------------------------------


def test_inside_the_models_directory_nothing_is_written(copy, tmp_path):
    before = sorted(path.name for path in copy.iterdir())
    for out in (copy / "out", copy / "deep" / "out", copy / ".." / "copy" / "out"):
        with pytest.raises(CheckpointError, match=r"out is inside the model's directory .*copy: choose another"):
            run(copy, out, "rtn")
    with pytest.raises(CheckpointError, match="copy exists: choose another directory or remove it"):
        run(copy, copy, "rtn")
    assert sorted(path.name for path in copy.iterdir()) == before


@pytest.mark.parametrize("kind", ["folder", "folder with the names of ours", "file"])
def test_what_stands_where_the_run_is_kept_is_not_removed(source, tmp_path, kind):
    partial = tmp_path / "out.partial"
    kept = partial if kind == "file" else partial / ("mine.txt" if kind == "folder" else "model/mine.txt")
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text("mine")
    for restart in (False, True):
        with pytest.raises(CheckpointError, match=r"out.partial exists and is no unfinished run of labs quantize: move it"):
            run(source, tmp_path / "out", "rtn", restart=restart)
    assert kept.read_text() == "mine"


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_no_permission_to_write(source, words, tmp_path, monkeypatch, number):
    """The system's refusal is made up: whoever runs tests as root would be allowed."""
    real = os.mkdir

    def refusing(path, *more, **others):
        if "out.partial" in str(path):
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *more, **others)

    monkeypatch.setattr(os, "mkdir", refusing)
    done = command(source, tmp_path / "out", words, "--method", "rtn")
    assert done.exit_code == 1
    assert done.stderr.replace("\n", "").endswith(f"out.partial cannot be written: {os.strerror(number)}")
    assert {path.name for path in tmp_path.iterdir()} == {"words.txt"}


def test_a_file_in_the_way_and_a_name_too_long(source, words, tmp_path):
    for out, reason in ((words / "out", "Not a directory"), (tmp_path / ("x" * 300), "File name too long")):
        done = command(source, out, words, "--method", "rtn")
        assert done.exit_code == 1
        assert done.stderr.startswith("labs quantize: ")
        assert done.stderr.strip().endswith(f"cannot be written: {reason}")
    assert {path.name for path in tmp_path.iterdir()} == {"words.txt"}


LIMITED = """
import resource, sys
from labsupport.cli import app

resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)
app()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="resource limits")
@pytest.mark.slow
def test_a_disk_that_really_takes_no_more(source, words, tmp_path):
    """Files may not grow beyond 300 KB here, so the embedding's cannot be written: what a disk says that is full, nearly."""
    given = ["--out", tmp_path / "out", "--method", "rtn", "--group-size", GROUP, "--windows", 0]
    arguments = [sys.executable, "-c", LIMITED, "300000", "quantize", source, *given]
    done = subprocess.run([str(word) for word in arguments], capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1].rpartition("\r")[2]
    assert last.startswith("labs quantize: ")
    assert "model-00004-of-00004.safetensors cannot be written: " in last
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("*.tmp"))
    checkpoint.load(run(source, tmp_path / "out", "rtn"))  # the finished blocks are taken over


# Stopped, and started again -------------------------------------------------------------------------------------------


def stopping(monkeypatch, at, error):
    real = files.replace

    def replace(path, *more, **named):
        if path.name == at:
            raise error
        real(path, *more, **named)

    monkeypatch.setattr(files, "replace", replace)
    return lambda: monkeypatch.setattr(files, "replace", real)


@pytest.mark.slow
def test_a_key_that_was_pressed(source, words, tmp_path, monkeypatch):
    mend = stopping(monkeypatch, "block-001.json", KeyboardInterrupt())
    done = command(source, tmp_path / "out", words)
    assert done.exit_code == 130
    assert done.stderr.splitlines()[-1] == "labs quantize: stopped. The same command continues after the last finished block"
    assert (tmp_path / "out.partial" / "run" / "block-000.json").exists()
    assert not (tmp_path / "out").exists()
    mend()
    assert command(source, tmp_path / "out", words).exit_code == 0
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")]
)
def test_memory_that_runs_out(source, words, tmp_path, monkeypatch, error):
    stopping(monkeypatch, "block-001.json", error)
    done = command(source, tmp_path / "out", words)
    assert done.exit_code == 1
    assert "labs quantize: not enough memory. Finished blocks are kept" in done.stderr
    assert (tmp_path / "out.partial" / "run" / "block-000.json").exists()


def test_another_fault_of_ours_is_not_called_a_lack_of_memory():
    assert not commands._is_memory(RuntimeError("shapes differ"))
    assert commands._is_memory(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"))


def unfinished(source, words, out, monkeypatch, at="block-002.json", method="gptq", **settings):
    mend = stopping(monkeypatch, at, Stop())
    with pytest.raises(Stop):
        run(source, out, method, words, **settings)
    mend()


def test_a_run_at_work_is_not_swept_away_by_another_that_restarts(source, words, tmp_path, monkeypatch):
    unfinished(source, words, tmp_path / "out", monkeypatch)
    at_work = parts.Parts(tmp_path / "out", {"a": "b"}, "gptq", ["model.layers.0"], 4, torch.float16, restart=True)
    save_file({"a": torch.zeros(1)}, at_work.shard(0))
    for restart in (False, True):
        with pytest.raises(CheckpointError, match=r"another run is writing to .*out.partial"):
            run(source, tmp_path / "out", "gptq", words, restart=restart)
    assert at_work.shard(0).exists()
    at_work.release()


@pytest.mark.slow
def test_a_refused_run_does_not_stay_in_the_way(source, words, tmp_path, monkeypatch):
    unfinished(source, words, tmp_path / "out", monkeypatch)
    errors = []
    for _ in range(2):  # the second says the same, not that the first is still at work; its error is held meanwhile
        with pytest.raises(CheckpointError, match="an unfinished run with bits 4, asked for is 8") as error:
            run(source, tmp_path / "out", "gptq", words, bits=8)
        errors.append(error)
    assert (tmp_path / "out.partial" / "run" / "block-001.json").exists()


@pytest.mark.slow
def test_after_a_kill_at_the_very_end_nothing_stale_is_taken(source, words, tmp_path, monkeypatch):
    """The directory has appeared, what the run kept is still there. Then somebody removes the directory and asks again."""
    with monkeypatch.context() as killed:
        killed.setattr(parts, "remove", lambda folder: None)
        run(source, tmp_path / "out", "gptq", words)
    assert (tmp_path / "out.partial" / "run" / "block-002.json").exists()
    whole = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.safetensors")}
    with pytest.raises(CheckpointError, match="out exists: choose another"):
        run(source, tmp_path / "out", "gptq", words)
    shutil.rmtree(tmp_path / "out")
    run(source, tmp_path / "out", "gptq", words)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.safetensors")} == whole
    assert not (tmp_path / "out.partial").exists()


def change_file(path):
    """Another number in a file, whose name, size, header and time stay what they were: a shard of another model."""
    times = path.stat()
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize(
    ("method", "kept", "spoil"),
    [
        ("gptq", "model/model-00001-of-00004.safetensors", change_file),
        ("gptq", "run/block-000.safetensors", change_file),
        ("rtn", "model/model-00001-of-00004.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-5])),
        ("rtn", "run/block-000.json", lambda path: path.write_text("{")),
    ],
)
@pytest.mark.slow
def test_a_damaged_block_of_an_unfinished_run_is_made_again(source, words, tmp_path, monkeypatch, method, kept, spoil):
    unfinished(source, words, tmp_path / "out", monkeypatch, method=method)
    path = tmp_path / "out.partial" / kept
    spoil(path)
    made = []
    real = parts.Parts.save
    monkeypatch.setattr(parts.Parts, "save", lambda self, block, tensors: (made.append(block.index), real(self, block, tensors)))
    run(source, tmp_path / "out", method, words)
    assert made == [0, 2]  # the damaged one, and the one at which the run was stopped
    run(source, tmp_path / "undisturbed", method, words)
    for file in (tmp_path / "out").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "undisturbed" / file.name).read_bytes()


def test_what_a_killed_writer_left_is_removed_when_the_run_goes_on(source, words, tmp_path, monkeypatch):
    unfinished(source, words, tmp_path / "out", monkeypatch)
    left = [files.temporary_name(path) for path in (tmp_path / "out.partial").glob("*/*.safetensors")]
    for path in left:
        path.write_text("half")
    seen = []
    real = parts.Parts.begin
    monkeypatch.setattr(parts.Parts, "begin", lambda self: (seen.append([path.exists() for path in left]), real(self)))
    run(source, tmp_path / "out", "gptq", words)
    assert seen[0] == [False] * len(left)
    assert len(left) == 6  # three blocks, each as it will be stored and as the next ones need it


@pytest.mark.slow
def test_a_time_of_a_file_says_nothing(copy, words, tmp_path, monkeypatch):
    unfinished(copy, words, tmp_path / "out", monkeypatch)
    os.utime(shards(copy)[0], (1, 1))
    made = []
    real = parts.Parts.save
    monkeypatch.setattr(parts.Parts, "save", lambda self, block, tensors: (made.append(block.index), real(self, block, tensors)))
    run(copy, tmp_path / "out", "gptq", words)
    assert made == [2]


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (lambda model, words: change_file(shards(model)[0]), "in which model.layers.0 was made of other weights than the model's"),
        (lambda model, words: change_config(model, rms_norm_eps=1e-3), "of another config.json"),
        (lambda model, words: words.write_text(WORDS[::-1]), "of another calibration text"),
    ],
)
@pytest.mark.slow
def test_an_unfinished_run_of_something_else(copy, words, tmp_path, monkeypatch, change, difference):
    unfinished(copy, words, tmp_path / "out", monkeypatch)
    change(copy, words)
    for _ in range(2):  # nothing is lost by asking
        with pytest.raises(CheckpointError, match=f"holds an unfinished run {difference}.* or start over with --restart"):
            run(copy, tmp_path / "out", "gptq", words)
    assert (tmp_path / "out.partial" / "run" / "block-001.json").exists()
    run(copy, tmp_path / "out", "gptq", words, restart=True)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc")
def test_a_file_is_on_the_disk_before_it_has_its_name(source, tmp_path, monkeypatch):
    done, fsync, replace, rename = [], os.fsync, os.replace, os.rename

    def synced(number):
        done.append(("fsync", Path(os.readlink(f"/proc/self/fd/{number}")).name))
        fsync(number)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda old, new: (done.append(("replace", Path(old).name)), replace(old, new)))
    monkeypatch.setattr(os, "rename", lambda old, new: (done.append(("rename", Path(new).name)), rename(old, new)))
    run(source, tmp_path / "out", "rtn")
    assert done[-1] == ("rename", "out")
    assert [kind for kind, _ in done[:-1]] == ["fsync", "replace"] * (len(done) // 2)
    assert [name for kind, name in done if kind == "fsync"] == [name for kind, name in done if kind == "replace"]
    # Temporary files are called .NAME.something.tmp.
    order = [name[1:].rpartition(".")[0].rpartition(".")[0] for kind, name in done if kind == "replace"]
    for index in range(3):  # a report says that the rest is whole
        assert order.index(f"block-00{index}.json") > order.index(f"model-0000{index + 1}-of-00004.safetensors")
        assert order.index(f"block-00{index}.json") > order.index(f"block-00{index}.safetensors")


@pytest.mark.skipif(sys.platform == "win32", reason="file modes")
def test_what_is_written_may_be_read_by_others(source, tmp_path):
    """safetensors makes files for their owner alone; a server often runs as somebody else."""
    out = run(source, tmp_path / "out", "rtn")
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o644}


# Hub ids -------------------------------------------------------------------------------------------------------------

COMMANDS = """
import json, sys
from typer.testing import CliRunner
from labsupport.cli import app

for arguments in json.loads(sys.argv[1]):
    done = CliRunner().invoke(app, arguments)
    print(json.dumps([done.exit_code, done.stderr]))
"""


@pytest.fixture(scope="module")
def hub_ids(source, tmp_path_factory):
    """What `labs quantize` does with three hub ids without a network: exit code, standard error, and the directory to write to.

    In one process of its own: where the hub's files are is read once, when its library is imported.
    """
    folder = tmp_path_factory.mktemp("hub")
    kept, broken = (folder / "home" / "hub" / f"models--some--{name}" for name in ("kept", "broken"))
    for cached in (kept, broken):
        (cached / "refs").mkdir(parents=True)
        (cached / "refs" / "main").write_text("0123abcd")
        (cached / "snapshots" / "0123abcd").mkdir(parents=True)
    shutil.copytree(source, kept / "blobs")  # the hub keeps files here and links to them
    for path in (kept / "blobs").iterdir():
        (kept / "snapshots" / "0123abcd" / path.name).symlink_to(f"../../blobs/{path.name}")
    shutil.copy(source / "config.json", broken / "snapshots" / "0123abcd")
    words = folder / "words.txt"
    words.write_text(WORDS)
    given = ["--group-size", GROUP, "--samples", 3, "--length", 48, "--windows", 0, "--calibration", words]
    names = ("unknown", "kept", "broken")
    commands = [["quantize", f"some/{name}", "--out", folder / name, *given] for name in names]
    text = json.dumps([[str(word) for word in command] for command in commands])
    environment = os.environ | {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run([sys.executable, "-c", COMMANDS, text], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    return {name: (*json.loads(line), folder / name) for name, line in zip(names, ran.stdout.splitlines(), strict=True)}


@pytest.mark.slow
def test_an_id_that_was_never_downloaded(hub_ids):
    code, error, out = hub_ids["unknown"]
    assert code == 1
    message = "no model 'some/unknown': neither a directory, nor downloaded before, nor an id that the hub answers for "
    message += "(OfflineModeIsEnabled: HF_HUB_OFFLINE=1 is set)"
    assert error == f"labs quantize: {message}\n"
    assert not list(out.parent.glob("unknown*"))


@pytest.mark.slow
def test_an_id_that_was_downloaded_works_without_a_network(hub_ids, source, words, tmp_path):
    code, error, out = hub_ids["kept"]
    assert code == 0, error
    wanted = run(source, tmp_path / "wanted", "gptq", words)
    for path in (*wanted.glob("*.safetensors"), wanted / "tokenizer.json"):
        assert (out / path.name).read_bytes() == path.read_bytes()
        assert not (out / path.name).is_symlink()
    assert "# some/kept, GPTQ at 4 bits" in (out / "README.md").read_text()
    assert json.loads((out / "quantization_report.json").read_text())["source"] == "some/kept"


@pytest.mark.slow
def test_of_a_download_that_broke_off_it_is_said_what_lacks(hub_ids):
    code, error, _ = hub_ids["broken"]
    assert code == 1
    assert "0123abcd holds no weights: wanted model.safetensors or model.safetensors.index.json" in error


def test_what_is_fetched_from_the_hub(source, tmp_path, monkeypatch):
    """Never a pickle, and every file that goes with a tokenizer."""
    asked = list(hub.PATTERNS)

    def download(name, others, look):
        asked.extend(others)
        return source

    monkeypatch.setattr(hub, "snapshot", download)
    run("some/model", tmp_path / "out", "rtn")

    def fetched(name):
        return any(fnmatch(name, pattern) for pattern in asked)

    assert all(fetched(name) for name in ("model-00001-of-00002.safetensors", "config.json", "tokenizer.model", "merges.txt"))
    assert not any(fetched(name) for name in ("pytorch_model.bin", "model.pt", "training_args.bin", "modeling_x.py", "x.pkl"))
