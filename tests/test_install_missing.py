"""Where most of it is there already: only what is missing or too old is added to a Python, and all else stays as it is."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from labsupport import install
from labsupport.course import lock, missing

ROOT = Path(__file__).resolve().parents[1]
CORE = lock.lists_of(ROOT / "pyproject.toml")["core"]
HERE = {
    "torch": "2.11.0+cu128",
    "numpy": "2.0.2",
    "transformers": "5.9.0",
    "tokenizers": "0.22.2",
    "click": "8.4.1",
    "pandas": "2.2.2",
}
WANTED = ["torch>=2.8", "numpy>=1.26", "transformers>=5.21", "bitsandbytes>=0.45"]
LOCK = "bitsandbytes==0.50.2 \\\n    --hash=sha256:0\nnumpy==2.4.6\ntokenizers==0.23.3\ntransformers==5.23.0\n"
ASKS = {"transformers": ["tokenizers<=0.23", "numpy>=1.17", "typer", "jax>1; extra == 'flax'"], "typer": []}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """Stands for a Python with HERE: what pip was asked for, what it is to change, what it prints before it fails."""
    (tmp_path / "pyproject.toml").write_text(f"[project]\ndependencies = {WANTED}\n")
    (tmp_path / "requirements.lock").write_text(LOCK)
    done: dict = {"asked": [], "changes": {"bitsandbytes": "0.50.2", "transformers": "5.23.0"}, "prints": "", "there": dict(HERE)}

    def pip(python: Path, log: Path, *arguments: str) -> None:
        done["asked"].append((python, arguments, Path(arguments[1]).read_text(encoding="utf-8")))
        log.write_text(done["prints"], encoding="utf-8")
        if done["prints"]:
            raise install.InstallError(f"pip failed: {install.last_line(done['prints'])}")
        done["there"].update(done["changes"])

    monkeypatch.setattr(install, "ROOT", tmp_path)
    monkeypatch.setattr(install, "pip", pip)
    monkeypatch.setattr(missing, "_installed", lambda: (dict(done["there"]), ASKS))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    sys.modules.pop("transformers", None)
    return done


def test_the_course_is_installed_beside_what_is_there(place: dict, capsys: pytest.CaptureFixture) -> None:
    missing.install_missing()
    ((python, arguments, constraints),) = place["asked"]
    assert python == Path(sys.executable)
    assert arguments[::2] == ("--constraint", "-e", "--compile")
    assert arguments[3] == str(install.ROOT) == sys.path[0]  # this Python finds it without a restart
    # transformers is too old; what it asks for may move with it, but for numpy. What the course asks for comes as in the lock.
    stays = ["torch==2.11.0+cu128", "numpy==2.0.2", "click==8.4.1", "pandas==2.2.2"]
    assert constraints.splitlines() == [*stays, "transformers==5.23.0", "bitsandbytes==0.50.2"]
    said = capsys.readouterr().out
    assert "added bitsandbytes 0.50.2" in said
    assert "replaced, as too old: transformers 5.9.0 by 5.23.0" in said
    missing.install_missing()
    assert sys.path.count(str(install.ROOT)) == 1
    assert "added nothing" in capsys.readouterr().out


def test_what_a_too_old_package_asks_for_is_free_all_the_way() -> None:
    there = HERE | {"typer": "0.25", "jax": "0.7"}
    assert there.keys() - missing.stays(there, WANTED, ASKS) == {"transformers", "tokenizers", "typer"}


def test_what_is_new_enough_does_not_come_as_in_the_lock_though_it_may_move() -> None:
    wanted = [*WANTED, "tokenizers>=0.21"]
    assert missing.locked(HERE, wanted, LOCK) == {"transformers": "5.23.0", "bitsandbytes": "0.50.2"}
    assert missing.locked({}, wanted, LOCK).keys() == {"transformers", "bitsandbytes", "tokenizers"}  # torch and numpy are KEPT


def test_the_lock_has_all_that_may_be_missing() -> None:
    assert missing.locked({}, CORE, (ROOT / "requirements.lock").read_text("utf-8"))


def test_where_all_is_new_enough_all_stays() -> None:
    there = HERE | {"transformers": "5.21.0"}
    assert missing.stays(there, WANTED, ASKS) == there


def test_a_torch_that_is_too_old_is_not_replaced(place: dict) -> None:
    place["there"]["torch"] = "2.6.0+cu124"
    with pytest.raises(install.InstallError) as caught:
        missing.install_missing()
    said = str(caught.value)
    assert "torch 2.6.0+cu124 is installed here, the course needs torch>=2.8, and it is not replaced" in said
    assert "(Colab: Runtime, Change runtime type)" in said
    assert place["asked"] == []


def test_packages_that_do_not_go_together_are_named(place: dict) -> None:
    place["prints"] = (
        "ERROR: Cannot install labsupport because these package versions have conflicting dependencies.\n\n"
        "The conflict is caused by:\n    transformers 5.24.0 depends on safetensors>=0.8\n"
        "    The user requested (constraint) safetensors==0.7\n\nTo fix this you could try to:\n1. loosen\n"
        "ERROR: ResolutionImpossible: for help visit\n"
    )
    with pytest.raises(install.InstallError) as caught:
        missing.install_missing()
    assert str(caught.value) == (
        "what is installed here and what the course needs do not go together: transformers 5.24.0 depends on safetensors>=0.8; "
        "The user requested (constraint) safetensors==0.7"
    )


def test_another_failure_of_pip_says_what_pip_said(place: dict) -> None:
    place["prints"] = "ERROR: No matching distribution found for bitsandbytes>=0.45\n"
    with pytest.raises(install.InstallError, match=r"bitsandbytes>=0\.45"):
        missing.install_missing()
    assert str(install.ROOT) not in sys.path


def test_what_was_imported_before_it_was_replaced_asks_for_a_restart(place: dict) -> None:
    sys.modules["transformers"] = sys
    with pytest.raises(install.InstallError, match="transformers had been imported before: restart the runtime"):
        missing.install_missing()


VERSIONS = [
    "2.0",
    "2.0.2",
    "2.10",
    "2.11.0+cu128",
    "5.9.0",
    "5.21",
    "5.21.0",
    "7.7.1",
    "9.0",
    "10",
    "0.45.0",
    "2.9.0.post0",
    "24.1.2",
]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("wanted", ["", ">=2.8", ">=5.21", ">=7.7,<9", "!=2.0.2", "==5.21", "<=2.10", ">2.10", ">=24"])
def test_ranges_are_those_of_packaging(version: str, wanted: str) -> None:
    assert missing.satisfies(version, wanted) is SpecifierSet(wanted).contains(version, prereleases=True)


@pytest.mark.parametrize("requirement", CORE)
def test_every_requirement_of_the_course_can_be_read(requirement: str) -> None:
    known, (name, wanted) = Requirement(requirement), missing.parsed(requirement)
    assert name == canonicalize_name(known.name)
    assert (wanted is None) is bool(known.marker and not known.marker.evaluate())
    assert wanted is None or SpecifierSet(wanted) == known.specifier
    assert missing.satisfies("999", wanted or "") is known.specifier.contains("999") or wanted is None


def test_a_marker_of_another_system_and_unknown_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert missing.parsed("triton>=3.4; sys_platform == 'linux'") == ("triton", None)
    assert missing.parsed("PyYAML[x] (>=6)") == ("pyyaml", ">=6")
    with pytest.raises(install.InstallError, match="is not a requirement that"):
        missing.parsed("-e .")
    with pytest.raises(install.InstallError, match=r"'~=1.0' is not a range that"):
        missing.satisfies("1.0", "~=1.0")


def test_what_is_installed_is_found_once_and_as_pip_names_it() -> None:
    versions, asks = missing._installed()
    # The build for CUDA in the package index leaves the "+cu130" out that the module says.
    assert versions["torch"].partition("+")[0] == __import__("torch").__version__.partition("+")[0]
    assert "jupyterlab-widgets" in versions
    assert all(re.fullmatch(r"[a-z0-9-]+", name) for name in versions)
    assert any(requirement.startswith("safetensors") for requirement in asks["transformers"])
