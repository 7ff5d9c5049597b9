"""A model on the Hugging Face hub: found, looked at before anything large is downloaded, kept where the hub's own library keeps it.

Only safetensors, JSON and the files of a tokenizer are fetched. What goes wrong is said in one line: no network, no such id, terms
that have to be accepted, weights in no safetensors.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labsupport.model.source import WEIGHT_FILES

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo

PATTERNS = ("*.safetensors", "*.json")
TOKENIZERS = ("merges.txt", "vocab.txt", "tokenizer.model", "sentencepiece.bpe.model", "chat_template.jinja")
SECONDS = 10.0  # to wait for the hub's first answer
# Who converts a model to safetensors when transformers is asked to, and what its pull requests are called.
CONVERTER, CONVERTED = "SFconvertbot", "Adding `safetensors` variant of this model"
# Called with config.json and how many bytes of weights there are, before they are downloaded; raises for one that is not wanted.
Look = Callable[[dict[str, Any], int], object]


class HubError(ValueError):
    """A model cannot be had from the hub. The message is one line."""


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, the hub's library does not say that it would be quicker with a token; that is no failure, and reads like one."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def snapshot(name: str, others: Iterable[str] = TOKENIZERS, look: Look = lambda config, nbytes: None) -> Path:
    """The directory of a model of the hub: what was downloaded before, or downloaded now, with a bar for each file.

    others: files to fetch beside PATTERNS. look: see Look; it is not called for what is there already. With HF_HUB_OFFLINE=1 no
    network is used. Raises HubError, and what `look` raises.
    """
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError
    from huggingface_hub.utils import validate_repo_id

    endpoint, patterns = os.environ.get("HF_ENDPOINT"), [*PATTERNS, *others]
    api = HfApi(endpoint=endpoint)
    try:
        with quiet():
            validate_repo_id(name)
            if _is_offline():
                raise OfflineModeIsEnabled("HF_HUB_OFFLINE=1 is set")
            info = api.model_info(name, files_metadata=True, timeout=SECONDS)
            info, revision = _with_safetensors(api, info)
            config = hf_hub_download(name, "config.json", revision=revision, endpoint=endpoint)
            weights = sum(file.size or 0 for file in info.siblings or () if file.rfilename.endswith(".safetensors"))
            look(json.loads(Path(config).read_text("utf-8")), weights)
            return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, endpoint=endpoint))
    except HubError:
        raise
    except HFValidationError as error:
        raise HubError(f"no model {name!r}: neither a directory, nor an id as the hub has them, OWNER/NAME") from error
    except GatedRepoError as error:
        raise HubError(
            f"the model {name!r} is gated: accept its terms on https://huggingface.co/{name}, then run `hf auth login` "
            "or set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise HubError(
            f"no model {name!r}: neither a directory, nor downloaded before, nor an id that the hub answers for (a private one it "
            "shows to those alone who set HF_TOKEN)"
        ) from error
    except Exception as error:  # of a network, a proxy, a server: each has its own
        if _is_of_this_package(error):
            raise
        return _downloaded_before(name, patterns, error)


def check_reached(dataset: str) -> None:
    """Raise HubError where the hub does not answer for a dataset: what reads one tries for long. Not with HF_HUB_OFFLINE=1."""
    from huggingface_hub import HfApi

    if _is_offline():
        return
    try:
        with quiet():
            HfApi(endpoint=os.environ.get("HF_ENDPOINT")).dataset_info(dataset, timeout=SECONDS)
    except Exception as error:  # of a network, a proxy, a server: each has its own
        raise HubError(f"the hub does not answer for {dataset} ({type(error).__name__}: {error})".splitlines()[0][:240]) from error


def _is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _is_of_this_package(error: Exception) -> bool:
    """Whether `look` raised it."""
    return type(error).__module__.startswith("labsupport.")


def _downloaded_before(name: str, patterns: list[str], why: Exception) -> Path:
    """What is in the hub's cache. Raises HubError where there is nothing, or no weights: of a download that broke off."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.file_download import repo_folder_name

    reason = f"{type(why).__name__}: {why}".splitlines()[0]
    message = f"no model {name!r}: neither a directory, nor downloaded before, nor an id that the hub answers for ({reason[:160]})"
    refs = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model") / "refs"
    for ref in sorted(path for path in refs.rglob("*") if path.is_file()):  # main, and the pull request of a converted model
        with suppress(FileNotFoundError):  # LocalEntryNotFoundError is one
            revision = ref.relative_to(refs).as_posix()
            found = Path(snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=True))
            if any(found.glob("*.safetensors")):
                return found
            message = f"the directory {found} holds no weights: wanted {' or '.join(WEIGHT_FILES)} ({reason[:160]})"
    raise HubError(message) from why


def _with_safetensors(api: HfApi, info: ModelInfo) -> tuple[ModelInfo, str | None]:
    """The model as its main branch has it, or as converted to safetensors in an open pull request, with that one's name.

    Older models, as OPT's, hold their weights as pickles, which can run code when they are read: those are never fetched.
    """
    files = [file.rfilename for file in info.siblings or ()]
    if any(file.endswith(".safetensors") for file in files):
        return info, None
    if "config.json" in files:
        for discussion in api.get_repo_discussions(info.id):
            named = discussion.is_pull_request and discussion.title == CONVERTED and discussion.author == CONVERTER
            if named and discussion.status == "open":
                revision = f"refs/pr/{discussion.num}"
                return api.model_info(info.id, revision=revision, files_metadata=True, timeout=SECONDS), revision
    there = ", ".join(file for file in files if file.endswith((".bin", ".h5", ".msgpack", ".pt", ".gguf"))) or "no weights"
    raise HubError(f"the model {info.id!r} has no safetensors, which alone are read; it has {there}")
