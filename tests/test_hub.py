"""Models of a hub that is a small server on this machine: downloaded, gated, missing, converted, too large, of another kind."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import architectures
import pytest
import torch

from labsupport import checkpoint
from labsupport.model import hub as hub_module
from labsupport.model import memory, models, source

COMMIT = "0" * 40
ASKED = "You are asking without a token; please set a HF_TOKEN."


class Hub:
    """What the server answers. repos: files by path, by id. gated: ids whose files it keeps. asked: the paths so far."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.converted: dict[str, int] = {}  # the pull request with safetensors, whose files are in repos under "ID@refs/pr/N"
        self.sizes: dict[str, int] = {}  # of files, where another one is told than is true
        self.asked: list[str] = []

    def info(self, repo: str) -> dict:
        siblings = [{"rfilename": file, "size": self.sizes.get(file, len(data))} for file, data in self.repos[repo].items()]
        return {"id": repo.partition("@")[0], "sha": COMMIT, "siblings": siblings, "private": False, "tags": [], "downloads": 0}


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, code: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        self.send_header("X-HF-Warning", f"unauthenticated; {ASKED}")
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, code: int, kind: str) -> None:
        self.answer(code, json.dumps({"error": kind}).encode(), X_Error_Code=kind, X_Error_Message=kind)

    def do_GET(self) -> None:
        path, hub = self.path.partition("?")[0], self.hub
        hub.asked.append(path)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            repo, revision = found[1], (found[2] or "main").replace("%2F", "/")
            key = f"{repo}@{revision}" if revision.startswith("refs/") else repo
            if key not in hub.repos:
                return self.refuse(404 if repo != "private/model" else 401, "RepoNotFound")
            return self.answer(200, json.dumps(hub.info(key)).encode(), Content_Type="application/json")
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/(.+)", path):
            revision = found[2].replace("%2F", "/")
            key = f"{found[1]}@{revision}" if revision.startswith("refs/") else self.of_commit(found[1])
            entries = [
                {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for file, data in hub.repos[key].items()
            ]
            return self.answer(200, json.dumps(entries).encode(), Content_Type="application/json")
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/discussions", path):
            number = hub.converted.get(found[1])
            one = {
                "num": number, "title": hub_module.CONVERTED, "isPullRequest": True, "status": "open",
                "author": {"name": "SFconvertbot"}, "createdAt": "2023-01-01T00:00:00.000Z",
                "repo": {"name": found[1], "type": "model"},
            }  # fmt: skip
            some = [] if number is None else [one]
            body = json.dumps({"discussions": some, "count": len(some), "start": 0}).encode()
            return self.answer(200, body, Content_Type="application/json")
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+(?:/pr/\d+)?)/(.+)", path.replace("%2F", "/")):
            repo, file = found[1], found[3]
            if repo in hub.gated:
                return self.refuse(401, "GatedRepo")
            data = hub.repos[self.of_commit(repo)].get(file)
            if data is None:
                return self.refuse(404, "EntryNotFound")
            etag = hashlib.sha256(data).hexdigest()
            return self.answer(200, data, ETag=f'"{etag}"', X_Repo_Commit=COMMIT)
        self.refuse(404, "EntryNotFound")

    do_HEAD = do_GET

    def of_commit(self, repo: str) -> str:
        number = self.hub.converted.get(repo)
        return repo if number is None else f"{repo}@refs/pr/{number}"


@pytest.fixture
def server(monkeypatch, tmp_path) -> Iterator[Hub]:
    from huggingface_hub import constants

    there = Hub()
    running = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": there}))
    threading.Thread(target=running.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{running.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name, value in (("ENDPOINT", address), ("HF_HUB_OFFLINE", False), ("HF_HUB_CACHE", str(tmp_path / "cache"))):
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    yield there
    running.shutdown()
    running.server_close()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, bytes]:
    """The files of a tiny OPT with a tokenizer."""
    folder = architectures.write("opt", tmp_path_factory.mktemp("opt") / "opt", torch.float16)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_model_is_downloaded_and_found_again_without_a_network(server, files, monkeypatch, capfd, caplog):
    server.repos["some/opt"] = files | {"pytorch_model.bin": b"never fetched", "README.md": b"nor this"}
    with caplog.at_level(logging.WARNING):
        model, tokenizer = models.load_model("some/opt", "cpu")
    assert type(model).__name__ == "OPTForCausalLM"
    assert tokenizer("a").input_ids
    assert not [path for path in server.asked if path.endswith((".bin", ".md"))]
    assert ASKED not in capfd.readouterr().err + caplog.text
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    asked = len(server.asked)
    again, _ = models.load_model("some/opt", "cpu")
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert len(server.asked) == asked


def test_pickles_are_left_and_the_conversion_to_safetensors_is_taken(server, files, monkeypatch):
    """As facebook/opt-125m: pytorch_model.bin on the main branch, safetensors in the bot's pull request."""
    plain = {name: data for name, data in files.items() if not name.endswith(".safetensors")}
    server.repos |= {"some/opt": plain | {"pytorch_model.bin": b"pickle"}, "some/opt@refs/pr/7": files}
    with pytest.raises(models.ModelError, match=r"'some/opt' has no safetensors, which alone are read; it has pytorch_model.bin"):
        models.load_model("some/opt", "cpu")
    server.converted["some/opt"] = 7
    model, _ = models.load_model("some/opt", "cpu")
    assert model.num_parameters() > 0
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    models.load_model("some/opt", "cpu")


@pytest.mark.parametrize(
    ("repo", "message"),
    [
        ("meta/gated", r"'meta/gated' is gated: accept its terms on https://huggingface.co/meta/gated, then run `hf auth login`"),
        ("nobody/nothing", r"no model 'nobody/nothing': neither a directory, .* nor an id that the hub answers for"),
        ("private/model", r"no model 'private/model': .*HF_TOKEN"),
        ("a/b/c", r"no model 'a/b/c': neither a directory, nor an id"),
    ],
)
def test_what_the_hub_refuses_is_said_in_words(server, files, repo, message):
    server.repos["meta/gated"] = files
    server.gated.add("meta/gated")
    for error, load in ((models.ModelError, models.load_model), (checkpoint.CheckpointError, lambda name: _quantize(name))):
        with pytest.raises(error, match=message) as raised:
            load(repo)
        assert "\n" not in str(raised.value)


def _quantize(name: str) -> None:
    checkpoint.quantize(name, "never-written", "rtn", windows=0)


def test_a_refused_connection_is_one_line_and_not_a_long_wait(server, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the port of "discard": nothing answers
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(models.ModelError, match=r"no model 'some/opt': .* \(ConnectError: ") as raised:
        models.load_model("some/opt")
    assert "\n" not in str(raised.value)
    assert not server.asked


def test_another_kind_of_model_is_refused_before_its_weights_are_fetched(server, files, tmp_path):
    bert = {"model_type": "bert", "architectures": ["BertForMaskedLM"]}
    t5 = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}
    for name, config, said in (("some/bert", bert, "a BertForMaskedLM"), ("some/t5", t5, "a T5ForConditionalGeneration")):
        server.repos[name] = files | {"config.json": json.dumps(config).encode()}
        with pytest.raises(models.ModelError, match=f"the model '{name}' is {said}: wanted a causal language model"):
            models.load_model(name)
    assert not [path for path in server.asked if "safetensors" in path]


def test_a_model_that_the_memory_does_not_hold_is_refused_before_it_is_fetched(server, files, monkeypatch):
    server.repos["some/large"] = files
    server.sizes["model.safetensors"] = 26 * memory.GIB  # of float16: 13 Gi parameters, as large as OPT-13B
    monkeypatch.setattr(memory, "here", lambda: memory.Memory(16 * memory.GIB, 12 * memory.GIB))
    message = (
        r"'some/large' takes 52.0 GiB in float32, and 12.0 GiB of memory are free on cpu: take a smaller one, or `labs quantize`"
    )
    with pytest.raises(models.ModelError, match=message):
        models.load_model("some/large", "cpu")
    assert not [path for path in server.asked if "safetensors" in path]
    half = r"takes 26.0 GiB in float16"
    with pytest.raises(models.ModelError, match=half):
        models.load_model("some/large", "cpu", torch.float16)


def test_a_directory_too_large_for_the_memory(tmp_path, files, monkeypatch):
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    size = len(files["model.safetensors"])
    monkeypatch.setattr(memory, "here", lambda: memory.Memory(4 * size, 2 * size - 1))
    with pytest.raises(models.ModelError, match=r"GiB in float32, and"):
        models.load_model(str(tmp_path), "cpu")
    monkeypatch.setattr(memory, "here", lambda: memory.Memory(4 * size, 2 * size))
    models.load_model(str(tmp_path), "cpu")


def test_a_directory_without_a_tokenizer(tmp_path, files):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes(files[name])
    with pytest.raises(models.ModelError, match=r"holds no tokenizer: wanted tokenizer.json or vocab.json"):
        models.load_model(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(models.ModelError, match=r"the tokenizer in .* cannot be read"):
        models.load_model(str(tmp_path))


def test_a_directory_of_another_kind_of_model(tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    BertForMaskedLM(
        BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    ).save_pretrained(tmp_path)
    with pytest.raises(models.ModelError, match="is a BertForMaskedLM: wanted a causal language model"):
        models.load_model(str(tmp_path))


def test_every_architecture_of_the_tests_counts_as_causal(tmp_path):
    for name, (kind, _) in architectures.CONFIGS.items():
        source.check_causal(name, {"model_type": kind})


def test_a_file_is_no_model(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(models.ModelError, match="is a file, wanted a model's directory or a hub id"):
        models.load_model(str(tmp_path / "model.safetensors"))


def test_a_broken_config(tmp_path, files):
    (tmp_path / "model.safetensors").write_bytes(files["model.safetensors"])
    for content, message in (("{", "is no JSON"), ("[]", "holds a list, wanted an object")):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(models.ModelError, match=message):
            models.load_model(str(tmp_path))
