"""Which worker gets which test (`pytest -n 2`): what a module makes once, one worker makes.

Tests of a file that has a fixture of scope `module` stay together, large files first; all others are dealt out one by one.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling


@cache
def makes_for_all(file: Path) -> bool:
    return 'scope="module"' in file.read_text("utf-8")


class ByModule(LoadScopeScheduling):
    def _split_scope(self, nodeid: str) -> str:
        name = nodeid.partition("::")[0]
        return name if makes_for_all(self.config.rootpath / name) else nodeid


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByModule:
    return ByModule(config, log)
