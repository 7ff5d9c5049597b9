"""How much memory there is: the machine's, or what a container's cgroups leave of it; and who says that it is too little."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from typer.testing import CliRunner

from labsupport.cli import app
from labsupport.course import headless
from labsupport.exercises import session
from labsupport.model import memory

GIB = 2**30


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with 64 GiB, 60 of them free."""
    machine = psutil.virtual_memory()._replace(total=64 * GIB, available=60 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)


def group(folder: Path, names: tuple[str, str, str], limit: object, used: int, cached: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names[:2], (limit, used), strict=True):
        (folder / name).write_text(f"{value}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{names[2]} {cached}\n")


def cgroup_of_this(root: Path, text: str) -> None:
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "self" / "cgroup").write_text(text)


def test_without_cgroups_it_is_the_machines(tmp_path: Path, large: None) -> None:
    assert memory.here(tmp_path) == (64 * GIB, 60 * GIB, False)


def test_a_container_of_version_2_is_told_by_its_own_limit(tmp_path: Path, large: None) -> None:
    """As in Docker: the container sees its own group as the root. Cached files make room when they must."""
    cgroup_of_this(tmp_path, "0::/\n")
    group(tmp_path / "sys/fs/cgroup", memory.VERSION_2, 2 * GIB, 3 * GIB // 2, GIB)
    found = memory.here(tmp_path)
    assert found == (2 * GIB, 3 * GIB // 2, True)
    assert str(found) == "1.5 GiB free of the 2.0 that this container may take"


def test_the_closest_limit_of_all_groups_around_counts(tmp_path: Path, large: None) -> None:
    cgroup_of_this(tmp_path, "0::/pod/box\n")
    group(tmp_path / "sys/fs/cgroup/pod/box", memory.VERSION_2, "max", GIB)
    group(tmp_path / "sys/fs/cgroup/pod", memory.VERSION_2, 4 * GIB, GIB)
    assert memory.here(tmp_path) == (4 * GIB, 3 * GIB, True)
    group(tmp_path / "sys/fs/cgroup/pod/box", memory.VERSION_2, 3 * GIB, 5 * GIB // 2)
    assert memory.here(tmp_path) == (3 * GIB, GIB // 2, True)


@pytest.mark.parametrize("seen", ["", "docker/abc"], ids=["own group at the top", "the machine's groups"])
def test_version_1_has_other_names_and_a_tree_of_its_own(seen: str, tmp_path: Path, large: None) -> None:
    cgroup_of_this(tmp_path, "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/docker/abc\n")
    group(tmp_path / "sys/fs/cgroup/memory" / seen, memory.VERSION_1, GIB, GIB // 4)
    assert memory.here(tmp_path) == (GIB, 3 * GIB // 4, True)


def test_no_limit_of_version_1_is_a_huge_number(tmp_path: Path, large: None) -> None:
    cgroup_of_this(tmp_path, "4:memory:/\n")
    group(tmp_path / "sys/fs/cgroup/memory", memory.VERSION_1, 2**63 - 4096, GIB)
    assert memory.here(tmp_path) == (64 * GIB, 60 * GIB, False)


def test_what_a_process_holds_itself_counts_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """A notebook's kernel asks once it has loaded torch."""
    held = psutil.Process().memory_info().rss
    monkeypatch.setattr(memory, "A_NOTEBOOK", 2 * held)
    assert memory.Memory(4 * held, int(1.5 * held)).todo == ""
    assert memory.Memory(4 * held, held // 2).todo.endswith("close other programs")
    assert memory.Memory(4 * held, held // 2, limited=True).todo.endswith("give the container more memory")


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(memory, "here", lambda: memory.Memory(GIB, GIB // 4, True))
    monkeypatch.setattr(memory, "A_NOTEBOOK", 2**60)
    return "Memory is short: 0.2 GiB free of the 1.0 that this container may take. A notebook takes up to "


def test_lab_and_check_say_so_before_a_kernel_starts(short: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.execve", lambda *_: None)
    monkeypatch.setattr("subprocess.call", lambda *_, **__: 0)
    done = CliRunner().invoke(app, ["lab", "--no-browser", "--dir", str(tmp_path)])
    assert short in done.output
    assert done.output.index(short) < done.output.index("Your notebooks are in")

    def dies(*_: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(headless, "check_notebook", dies)
    done = CliRunner().invoke(app, ["check", "00", "--dir", str(tmp_path)])
    assert short in done.stderr
    assert done.stderr.index(short) < done.stderr.index("no memory")


@pytest.mark.parametrize("in_kernel", [True, False])
def test_the_set_up_cell_says_so_in_a_kernel_and_nowhere_else(
    in_kernel: bool, short: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    shell = SimpleNamespace(user_ns={}, events=SimpleNamespace(register=lambda *_: None))
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell if in_kernel else None))
    session.prepare_kernel()
    printed = capsys.readouterr()
    assert printed.out.startswith(short) if in_kernel else not printed.out
    assert not printed.err  # nbgrader gives 0 for anything there
