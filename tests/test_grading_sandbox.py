"""The sandbox keeps its promises: what is tried inside, fails, and what is left in /out is plain files of bounded size."""

import errno
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest

pytest.importorskip("pydantic")

from labsupport.grading import docker, sandbox, seccomp, watch
from labsupport.grading.records import GradingError
from labsupport.grading.sandbox import Limits
from labsupport.grading.unsafe import Unsafe

REPOSITORY = Path(__file__).resolve().parents[1]
QUICK = Limits(notebook_seconds=60, memory_bytes=2**29, file_bytes=2**20, output_bytes=4 * 2**20, output_files=50, processes=20)


@pytest.fixture(scope="module")
def box():
    return bubblewrap_or_skip()


def bubblewrap_or_skip():
    """Skips where this machine has no bubblewrap that works; where it has, ours must start."""
    program = shutil.which("bwrap")
    plain = ["--ro-bind", "/", "/", "--unshare-net", "--unshare-pid", "true"]
    if program is None or subprocess.run([program, *plain], capture_output=True, check=False).returncode:
        pytest.skip("bubblewrap is not installed, or may not make namespaces here")
    return sandbox.find("bubblewrap")


def inside(box, folder, code, limits=QUICK, **folders):
    """Runs `code`; returns how it ended and the directory that holds what it left in /out."""
    out = folder / "out"
    out.mkdir()
    code = textwrap.dedent(code)
    return box.run(
        ["python", "-c", code], folders={f"/{name}": path for name, path in folders.items()}, out=out, limits=limits
    ), out


# What one look around finds; each thing found has a test of its own below.
LOOK = """
import ctypes, importlib.util, json, os, socket, sys
from pathlib import Path
given = json.loads(Path("/given/given.json").read_text())
libc = ctypes.CDLL(None, use_errno=True)

def tried(action):
    try:
        return repr(action() or "done")
    except BaseException as error:
        return type(error).__name__

def write(path):
    with open(path, "w") as stream:
        stream.write("x")

def call(name, *arguments):
    return ctypes.get_errno() if getattr(libc, name)(*arguments) == -1 else "done"

def connect(family, address):
    with socket.socket(family) as ours:
        ours.settimeout(2)
        ours.connect(address)

status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
links = []
for link in Path("/proc").glob("[0-9]*/fd/*"):
    try:
        links.append([link.parts[2], os.readlink(link)])
    except OSError:
        pass
mounts = [line.split()[1:4] for line in Path("/proc/self/mounts").read_text().splitlines()]
devices = ("devtmpfs", "devpts")
found = {
    "namespaces shared": [name for name, link in given["namespaces"].items() if os.readlink(f"/proc/self/ns/{name}") == link],
    "mounts to write to": sorted(place for place, kind, how in mounts if "rw" in how.split(",") and kind not in devices),
    "mounts with devices": [place for place, kind, how in mounts if "nodev" not in how.split(",") and kind not in devices],
    "interfaces": [line.split(":")[0].strip() for line in Path("/proc/net/dev").read_text().splitlines()[2:]],
    "loopback": tried(lambda: connect(socket.AF_INET, ("127.0.0.1", given["port"]))),
    "local socket": tried(lambda: connect(socket.AF_UNIX, "\\0" + given["local"])),
    "vsock": tried(lambda: socket.socket(40, socket.SOCK_STREAM)),
    "processes": sorted(Path(f"/proc/{number}/comm").read_text().strip() for number in os.listdir("/proc") if number.isdecimal()),
    "seen": [path for path in given["hidden"] if os.path.exists(path)],
    "seen through another's root": [path for path in given["hidden"] for root in ("/proc/1/root", "/proc/1/cwd", "/proc/self/root")
                                    if os.path.exists(root + path)],
    "packages": [name for name in given["packages"] if importlib.util.find_spec(name)],
    "packages elsewhere": [name for folder in given["elsewhere"] if os.path.isdir(folder) for name in os.listdir(folder)],
    "needed": [name for name in ("torch", "numpy", "safetensors") if not importlib.util.find_spec(name)],
    "written": [path for path in ["/x", "/usr/x", "/etc/x", "/env/x", "/given/x", "/given/given.json", "/dev/x", "/proc/x",
                                  "/launch.py", os.path.dirname(os.__file__) + "/x",
                                  os.path.dirname(importlib.util.find_spec("torch").origin) + "/x",
                                  "/proc/sys/kernel/hostname", "/proc/sys/kernel/core_pattern", "/proc/1/oom_score_adj"]
                if tried(lambda: write(path)) == "'done'"],
    "writable": [tried(lambda: write(path)) for path in ("/out/x", "/tmp/x", "/dev/shm/x")],
    "environment": sorted(os.environ),
    "environments": "".join(tried(path.read_text) for path in Path("/proc").glob("[0-9]*/environ")),
    "rights": [int(status[name], 16) for name in ("CapEff", "CapPrm", "CapAmb")] + [status["NoNewPrivs"].strip()],
    "user": os.getuid(),
    "descriptors": sorted({target for number, target in links if number == str(os.getpid())}),
    "own group": os.getpgid(0) != 0,
    "trace": call("ptrace", 16, os.getppid(), 0, 0),
    "memory of the first": tried(lambda: open("/proc/1/mem", "r+b").write(b"x")),
    "limits": Path("/proc/self/limits").read_text(),
    "limits of the first": Path("/proc/1/limits").read_text(),
    "kill the first": tried(lambda: os.kill(1, 9)),
    "namespace": call("unshare", 0x10000000),
    "namespace by clone": call("syscall", given["clone"], 0x10000000 | 17, 0, 0, 0, 0),
    "mount": call("mount", b"none", b"/tmp", b"tmpfs", 0, None),
    "anonymous file": tried(lambda: os.memfd_create("x")),
    "shared memory": call("shmget", 0, 2**20, 0o1666),
    "becomes root": tried(lambda: os.setuid(0)),
    "priority": Path("/proc/self/oom_score_adj").read_text().strip(),
    "host": os.uname().nodename,
}
with open("/out/found.json", "w") as stream:
    json.dump(found, stream)
"""


@pytest.fixture(scope="module")
def found(box, tmp_path_factory):
    """What LOOK finds, while the machine holds a secret in every place that it must not see."""
    folder, given = tmp_path_factory.mktemp("class"), tmp_path_factory.mktemp("given")
    (folder / ".secret").write_text("secret")
    with (
        tempfile.TemporaryDirectory() as other,
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_UNIX) as local,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("LABS_SECRET", "geheim")
        name = f"labs-{os.getpid()}"
        local.bind("\0" + name)
        local.listen()
        hidden = [
            folder / ".secret",
            other,
            REPOSITORY,
            Path(sys.prefix, "pyvenv.cfg"),
            Path(__file__),
            "/etc/passwd",
            "/etc/shadow",
            "/var",
            "/run",
        ]
        hidden += [
            Path.home() / ".bashrc",
            Path.home() / ".profile",
        ]
        packages = ["labsupport", "bitsandbytes", "gguf", "peft", "nbgrader", "torchao", "pytest", "pip"]
        clone = seccomp.MACHINES.get(os.uname().machine, (0, {}, 0, -1))[3]
        elsewhere = [
            path for root in (sys.base_prefix, "/usr", "/usr/local") for path in Path(root, "lib").glob("python*/*-packages")
        ]
        kinds = ["cgroup", "ipc", "mnt", "net", "pid", "uts"] + ["user"] * (os.geteuid() != 0)
        namespaces = {kind: os.readlink(f"/proc/self/ns/{kind}") for kind in kinds}
        facts = {
            "elsewhere": list(map(str, elsewhere)),
            "namespaces": namespaces,
            "port": server.getsockname()[1],
            "local": name,
            "hidden": list(map(str, hidden)),
            "packages": packages,
            "clone": clone,
        }
        (given / "given.json").write_text(json.dumps(facts))
        (given / "given.json").chmod(0o600)  # as temporary files are
        given.chmod(0o700)
        ended, out = inside(box, folder, LOOK, given=given)
        assert ended.code == 0, ended.said
        assert (folder / ".secret").stat().st_mode & 0o777 == 0o644
        assert given.stat().st_mode & 0o777 == 0o700
        return json.loads((out / "found.json").read_text())


EXPECTED = {
    "namespaces shared": [],
    "mounts to write to": ["/dev/shm", "/out", "/proc", "/tmp"],
    "mounts with devices": [],
    "interfaces": ["lo"],
    "loopback": "ConnectionRefusedError",
    "local socket": "ConnectionRefusedError",
    "vsock": "OSError",
    "processes": ["bwrap", "python"],
    "seen": [],
    "seen through another's root": [],
    "packages": [],
    "packages elsewhere": [],
    "needed": [],
    "written": [],
    "writable": ["'done'"] * 3,
    "environment": sorted([*sandbox.ENVIRONMENT, "PWD"]),
    "rights": [0, 0, 0, "1"],
    "trace": 1,  # EPERM
    "namespace": 1,
    "namespace by clone": 1,
    "mount": 1,
    "anonymous file": "PermissionError",
    "shared memory": 1,
    "priority": "1000",
    "host": "sandbox",
}


@pytest.mark.parametrize("what", EXPECTED)
def test_a_look_around_finds_nothing(found, what):
    assert found[what] == EXPECTED[what]


def test_no_environment_inside_holds_a_secret_of_the_one_outside(found):
    assert "geheim" not in found["environments"]
    assert "LABS_SECRET" not in found["environments"]


def test_no_open_file_of_the_outside_is_inherited(found):
    assert all(target == "/dev/null" or target.startswith(("pipe:", "/proc/")) for target in found["descriptors"]), found[
        "descriptors"
    ]


def test_the_user_inside_is_not_root_and_cannot_become_it(found):
    assert found["user"] != 0
    assert found["becomes root"] in ("PermissionError", "OSError")  # it may not; there is no such user


def test_the_limits_are_those_of_the_system_and_cannot_be_raised(found):
    limits = {
        "Max core file size": 0, "Max cpu time": QUICK.cpu_seconds, "Max open files": 256, "Max file size": QUICK.file_bytes,
        "Max data size": QUICK.memory_bytes, "Max processes": QUICK.processes, "Max address space": QUICK.memory_bytes + 16 * 2**30,
    }  # fmt: skip
    for name, value in limits.items():
        assert re.search(rf"^{name} +{value} +{value} ", found["limits"], re.MULTILINE), name


def test_the_first_process_is_somebody_elses_or_has_the_same_limits(found):
    """Whoever can write to its memory can run code in it."""
    if found["memory of the first"] != "PermissionError":
        for name, value in (
            ("Max data size", QUICK.memory_bytes),
            ("Max processes", QUICK.processes),
            ("Max file size", QUICK.file_bytes),
        ):
            assert re.search(rf"{name} +{value} +{value} ", found["limits of the first"])


def test_processes_are_few_and_a_fork_fails_when_there_are_more(box, tmp_path):
    ended, out = inside(box, tmp_path, """
        import os, time
        count = 0
        try:
            while count < 1000:
                if not os.fork():
                    time.sleep(1000)
                count += 1
        except BlockingIOError:
            pass
        open("/out/count", "w").write(str(count))
    """)  # fmt: skip
    assert (ended.code, ended.why) == (0, "")
    itself = 1 if os.geteuid() == 0 else 2  # and bubblewrap's own, where the same user has it
    assert int((out / "count").read_text()) == QUICK.processes - itself


@pytest.mark.slow  # two processors for a second
def test_a_fork_bomb_ends_with_the_time(box, tmp_path):
    code = "import os\nwhile True:\n try:\n  os.fork()\n except OSError:\n  pass"
    ended, _ = inside(box, tmp_path, code, QUICK.model_copy(update={"notebook_seconds": 1.0}))
    assert ended.why == "time"


def test_one_process_cannot_have_more_memory_than_allowed(box, tmp_path):
    ended, _ = inside(box, tmp_path, "bytearray(2**30)")
    assert ended.code == 1
    assert "MemoryError" in ended.said


@pytest.mark.parametrize("form", ["bytearray", "shared"])
def test_processes_cannot_have_more_memory_together_than_allowed(box, tmp_path, form):
    one = {"bytearray": "bytearray(b'x') * 2**27", "shared": "mmap.mmap(-1, 2**27)"}[form]
    ended, _ = inside(box, tmp_path, f"""
        import mmap, os, time
        for _ in range(8):
            if not os.fork():
                kept = {one}
                for place in range(0, 2**27, 4096):
                    kept[place] = 1
                time.sleep(1000)
        time.sleep(1000)
    """)  # fmt: skip
    assert ended.why == "memory"


def test_memory_that_children_share_counts_once(box, tmp_path):
    ended, _ = inside(box, tmp_path, """
        import os, time
        kept = bytearray(b"x") * 2**27
        children = [os.fork() for _ in range(3)]
        if 0 in children:
            time.sleep(0.5)
            os._exit(0)
        for child in children:
            os.waitpid(child, 0)
    """)  # fmt: skip
    assert (ended.code, ended.why) == (0, ""), ended.said


LONG = {
    "loop": "while True: pass",
    "sleep": "import time\ntime.sleep(1000)",
    "ignores signals": """import signal
for number in set(range(1, 65)) - {9, 19, 32, 33}:
    signal.signal(number, signal.SIG_IGN)
while True: pass""",
    "stopped": "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
    "another session": "import os, time\nif not os.fork():\n os.setsid()\n time.sleep(1000)\ntime.sleep(1000)",
    "floods stderr": "import os\nwhile True: os.write(2, b'x' * 65536)",
    "closes stderr": "import os, time\nos.close(2)\ntime.sleep(1000)",
}


@pytest.mark.parametrize("form", LONG)
def test_what_does_not_end_is_ended_and_what_it_left_is_kept(box, tmp_path, form):
    out = tmp_path / "out"
    out.mkdir()
    command = ["sh", "-c", 'echo here > /out/before; exec python -c "$0"', LONG[form]]
    ended = box.run(command, folders={}, out=out, limits=QUICK.model_copy(update={"notebook_seconds": 1.0}))
    assert (ended.code, ended.why) == (None, "time")
    assert ended.seconds >= 1
    assert len(ended.said) <= 2000
    assert (out / "before").read_text() == "here\n"


def test_no_process_outlives_the_command(box, tmp_path):
    """A daemon holds an inherited pipe open as long as it lives; the sandbox's stderr is such a pipe."""
    ended, _ = inside(box, tmp_path, """
        import os, signal, time
        if not os.fork():
            os.setsid()
            if os.fork():
                os._exit(0)
            for number in (1, 2, 3, 15):
                signal.signal(number, signal.SIG_IGN)
            time.sleep(1000)
        time.sleep(0.2)
    """)  # fmt: skip
    assert (ended.code, ended.why) == (0, "")
    assert not [line for number, line in _everything().items() if "setsid" in line and number != os.getpid()]


def _everything() -> dict[int, str]:
    """Command lines of all processes of this machine, by their numbers."""
    lines = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines[int(path.parent.name)] = path.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
        except OSError:  # it has just ended
            continue
    return lines


@pytest.mark.parametrize(
    ("code", "status"),
    [("import os; os._exit(3)", 3), ("import os; os.kill(os.getpid(), 9)", 137), ("import os; os.abort()", 134), ("exit()", 0),
     ("import ctypes; ctypes.string_at(0)", 139), ("import os; os.kill(-1, 9)", 137)],
)  # fmt: skip
def test_every_end_is_noticed(box, tmp_path, code, status):
    ended, _ = inside(box, tmp_path, code)
    assert (ended.code, ended.why) == (status, "") or ("-1" in code and ended.code is not None)


FLOODS = {
    "one file": ("with open('/out/big', 'wb') as stream:\n while True: stream.write(b'x' * 2**16)", ""),
    "many files": ("for n in range(10**6):\n open(f'/out/{n}', 'wb').write(b'x' * 2**19)", "output"),
    "without names": (
        """import os
kept = []
for _ in range(7):
    kept.append(open("/out/a", "wb"))
    kept[-1].write(b"x" * 2**19)
    os.unlink("/out/a")
kept.append(open("/out/a", "wb", buffering=0))
while True:
    try:
        kept[-1].write(b"x" * 4096)
    except OSError:
        pass""",
        "output",
    ),
    "empty files": ("for n in range(10**6): open(f'/out/{n}', 'w').close()", "output"),
    "folders": ("import os\nfor n in range(10**6): os.mkdir(f'/out/{n}')", "output"),
    "in /tmp": ("for n in range(10**6):\n open(f'/tmp/{n}', 'wb').write(b'x' * 2**19)", "output"),
    "sparse": ("import os\nfor n in range(10):\n open(f'/out/{n}', 'wb').truncate(2**20)", "output"),
    "one sparse file": ("import os\nopen('/out/big', 'wb').truncate(10 * 2**30)", ""),
}


@pytest.mark.parametrize("form", FLOODS)
def test_output_is_bounded(box, tmp_path, form):
    code, why = FLOODS[form]
    ended, out = inside(box, tmp_path, "open('/out/before', 'w').write('here')\n" + code)
    assert ended.why == why
    assert ended.code != 0
    assert (out / "before").read_text() == "here"
    paths = list(out.rglob("*"))
    assert len(paths) <= QUICK.output_files
    assert sum(path.stat().st_size for path in paths) <= QUICK.output_bytes


def test_only_plain_files_come_out(box, tmp_path):
    (tmp_path / "secret").write_text("secret")
    ended, out = inside(box, tmp_path, f"""
        import os
        os.chdir("/out")
        os.symlink({str(tmp_path / "secret")!r}, "link")
        os.symlink("/etc", "folder")
        os.symlink("/proc/self/environ", "environment")
        os.mkfifo("pipe")
        os.makedirs("a/b")
        open("a/b/plain", "w").write("plain")
        os.makedirs("/".join("abcdefghijklmnop"))
        open(b"\\xff\\n<b>", "w").write("odd")
        os.link("a/b/plain", "again")
        open("closed", "w").write("closed")
        os.chmod("closed", 0)
        os.mkdir("locked", 0)
    """)  # fmt: skip
    assert ended.code == 0, ended.said
    assert (out / "a/b/plain").read_text() == (out / "again").read_text() == "plain"
    assert (Path(os.fsdecode(os.path.join(os.fsencode(out), b"\xff\n<b>")))).read_text(encoding="utf-8") == "odd"
    for path in out.rglob("*"):
        assert not path.is_symlink()
        assert path.is_file() or path.is_dir()
        assert path.stat().st_nlink == 1 or path.is_dir()
    assert not {"link", "folder", "environment", "pipe"} & set(os.listdir(out))


def test_the_end_of_what_is_said_is_kept(box, tmp_path):
    ended, _ = inside(box, tmp_path, "import sys\nsys.stderr.write('é' * 100_000 + '\\nthe end')\nprint('x' * 10**7)")
    assert ended.code == 0
    assert len(ended.said) == 2000
    assert ended.said.endswith("é\nthe end")


def test_what_runs_dies_with_the_one_who_started_it(tmp_path):
    bubblewrap_or_skip()
    token, out = f"token-{os.getpid()}", tmp_path / "out"
    out.mkdir()
    code = f"""
from pathlib import Path
from labsupport.grading import sandbox
command = ["python", "-c", "import time; time.sleep(1000)", {token!r}]
sandbox.find("bubblewrap").run(command, folders={{}}, out=Path({str(out)!r}), limits=sandbox.Limits())
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *sys.path])}
    grader = subprocess.Popen([sys.executable, "-c", code], env=environment)
    try:
        _until(lambda: any("-c" in line and token in line and "launch" not in line for line in _others(grader.pid)))
    finally:
        grader.kill()
        grader.wait()
    _until(lambda: not any(token in line for line in _others(grader.pid)))


def _others(pid):
    return [line for number, line in _everything().items() if number not in (pid, os.getpid())]


def _until(holds):
    """Looks again and again; a machine that is very busy gets two minutes."""
    for _ in range(1200):
        if holds():
            return
        time.sleep(0.1)
    pytest.fail("it never came to hold")


def test_out_must_be_empty(box, tmp_path):
    (tmp_path / "left").touch()
    with pytest.raises(GradingError, match="must be empty"):
        box.run(["true"], folders={}, out=tmp_path, limits=QUICK)
    with pytest.raises(GradingError, match="must be empty"):
        Unsafe().run(["true"], folders={}, out=tmp_path, limits=QUICK)


def test_a_folder_that_is_not_there_is_the_machines_fault(box, tmp_path):
    with pytest.raises(GradingError, match=r"nothing-here, to be seen as /bench, is not a directory"):
        inside(box, tmp_path, "pass", bench=tmp_path / "nothing-here")


@pytest.mark.slow  # imports torch
def test_torch_works_under_the_usual_limits(box, tmp_path):
    ended, out = inside(box, tmp_path, """
        import torch
        from safetensors.torch import save_file
        a = torch.randn(512, 512)
        save_file({"a": a @ a}, "/out/a.safetensors")
    """, Limits())  # fmt: skip
    assert ended.code == 0, ended.said
    assert (out / "a.safetensors").stat().st_size > 2**20


@pytest.mark.slow  # this file once more
@pytest.mark.skipif(os.name != "posix" or not hasattr(os, "geteuid") or os.geteuid() != 0, reason="is itself run by a plain user")
def test_all_of_it_holds_for_a_plain_user(box, tmp_path):
    """As `nobody`, whom a namespace shows this Python under another path, for root's home is closed to them."""
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode or not shutil.which("setpriv"):
        pytest.skip("unshare and setpriv are needed, and may not be used here")
    paths = os.pathsep.join([str(REPOSITORY), *(path for path in sys.path if path.endswith("site-packages"))])
    script = (
        f"mount -t tmpfs -o mode=1777 none /mnt && mkdir /mnt/python && mount --bind {sys.base_prefix} /mnt/python && "
        f"exec setpriv --reuid 65534 --regid 65534 --clear-groups --inh-caps=-all --bounding-set=-all "
        f"env HOME=/nonexistent TMPDIR=/mnt PYTHONPATH={paths} PYTHONDONTWRITEBYTECODE=1 "
        f"/mnt/python/bin/python3 -m pytest -o addopts= -q -p no:cacheprovider --basetemp=/mnt/pytest -m 'not slow' {__file__}"
    )
    ended = subprocess.run(["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True, cwd="/", check=False)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-1000:]
    assert " passed" in ended.stdout
    assert " skipped" not in ended.stdout


def test_without_a_sandbox_the_clock_the_limits_and_the_paths_hold(tmp_path):
    bench = tmp_path / "bench"
    bench.mkdir()
    (bench / "run.py").write_text("import sys, pathlib; pathlib.Path(sys.argv[1]).write_text(sys.argv[2])")
    out = tmp_path / "out"
    out.mkdir()
    ended = Unsafe().run(["python", "/bench/run.py", "/out/a", "b"], folders={"/bench": bench}, out=out, limits=QUICK)
    assert (ended.code, ended.why) == (0, ""), ended.said
    assert (out / "a").read_text() == "b"
    (out / "a").unlink()
    ended = Unsafe().run(
        ["python", "-c", LONG["ignores signals"]], folders={}, out=out, limits=QUICK.model_copy(update={"notebook_seconds": 0.5})
    )
    assert (ended.code, ended.why) == (None, "time")
    ended = Unsafe().run(["python", "-c", "bytearray(2**30)"], folders={}, out=out, limits=QUICK)
    assert "MemoryError" in ended.said or sys.platform != "linux"


def test_without_a_sandbox_a_flood_is_seen(tmp_path):
    for number in range(QUICK.output_files + 1):
        (tmp_path / str(number)).touch()
    assert watch.too_much(tmp_path, QUICK) == "output"
    assert watch.too_much(tmp_path, QUICK.model_copy(update={"output_files": 1000})) == ""
    (tmp_path / "0").write_bytes(b"x" * (QUICK.output_bytes + 1))
    assert watch.too_much(tmp_path, QUICK.model_copy(update={"output_files": 1000})) == "output"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_too_many_processes_are_seen_also_where_a_fork_is_not_refused():
    processes = os.open("/proc", os.O_RDONLY)
    try:
        assert watch.memory(processes, Limits(processes=1, memory_bytes=2**62)) == ("killed" if len(_everything()) > 3 else "")
        assert watch.memory(processes, Limits(processes=10**6, memory_bytes=2**62)) == ""
        assert watch.memory(processes, Limits(processes=10**6, memory_bytes=1)) == "memory"
    finally:
        os.close(processes)


def test_a_file_that_was_left_is_read_only_if_it_is_plain(tmp_path):
    (tmp_path / "plain").write_bytes(b"12345")
    (tmp_path / "link").symlink_to(tmp_path / "plain")
    os.mkfifo(tmp_path / "pipe")
    assert sandbox.regular(tmp_path / "plain", 5) == b"12345"
    for name, message in (
        ("link", "cannot be read as a plain file"),
        ("pipe", "is not a plain file"),
        ("nothing", "cannot be read"),
    ):
        with pytest.raises(GradingError, match=message):
            sandbox.regular(tmp_path / name, 5)
    with pytest.raises(GradingError, match=r"is not a plain file|cannot be read"):
        sandbox.regular(tmp_path, 5)
    with pytest.raises(GradingError, match="more than 4 bytes"):
        sandbox.regular(tmp_path / "plain", 4)


def _verdict(program, architecture, number, argument=0):
    """What a filter returns, by the rules of classic BPF that it uses."""
    data = struct.pack("=iIQQ", number, architecture, 0, argument)  # struct seccomp_data, as far as it is read
    steps, place, value = list(struct.iter_unpack("=HBBI", program)), 0, 0
    while True:
        code, if_true, if_false, operand = steps[place]
        place += 1
        if code == 0x06:
            return operand
        if code == 0x20:
            value = struct.unpack_from("=I", data, operand)[0]
            continue
        holds = {0x15: value == operand, 0x35: value >= operand, 0x45: bool(value & operand)}[code]
        place += if_true if holds else if_false


@pytest.mark.parametrize("machine", seccomp.MACHINES)
def test_the_filter_refuses_what_it_says(machine):
    architecture, calls, sockets, clone = seccomp.MACHINES[machine]
    program = seccomp.program(machine)
    allow, kill = 0x7FFF0000, 0x80000000
    refuse, nothing_such, no_family = (0x50000 | number for number in (errno.EPERM, errno.ENOSYS, errno.EAFNOSUPPORT))
    for number in (*calls.values(), *seccomp.EVERYWHERE.values()):
        assert _verdict(program, architecture, number) == refuse
    assert _verdict(program, architecture, 435) == nothing_such  # clone3
    assert _verdict(program, architecture, clone, 0x11) == allow  # a fork
    assert _verdict(program, architecture, clone, 0x10000011) == refuse  # in a user namespace of its own
    assert [_verdict(program, architecture, sockets, family) for family in (1, 2, 10)] == [allow] * 3
    assert [_verdict(program, architecture, sockets, family) for family in (0, 16, 38, 40)] == [no_family] * 4
    assert _verdict(program, 0x40000003, 1) == kill  # the 32-bit calls of Intel
    assert all(_verdict(program, architecture, number) == allow for number in (0, 1, 3, 9, 12, 59, 60, 221, 222, 257))
    if machine == "x86_64":
        assert _verdict(program, architecture, 0x40000000 | 56) == kill


def test_a_processor_that_the_filter_does_not_know_has_none():
    assert seccomp.program("riscv64") is None


def test_dockers_command_line_says_every_limit(tmp_path):
    command = docker.arguments("labs-1", ["python", "/bench/run.py"], {"/bench": tmp_path / "bench"}, tmp_path / "out", QUICK)
    text = " ".join(command)
    for part in (
        "--network none", "--read-only", "--cap-drop ALL", "--security-opt no-new-privileges", "--user 65534:65534",
        f"--pids-limit {QUICK.processes}", f"--memory {QUICK.memory_bytes}", f"--memory-swap {QUICK.memory_bytes}",
        f"--ulimit fsize={QUICK.file_bytes}:{QUICK.file_bytes}", "--ulimit core=0:0", f"--ulimit cpu={QUICK.cpu_seconds}",
        f"size={QUICK.output_bytes},nr_inodes={QUICK.output_files}", f"source={tmp_path / 'bench'},target=/bench,readonly",
        f"type=bind,source={tmp_path / 'out'},target=/out",
    ):  # fmt: skip
        assert part in text, part
    assert command[-3:] == [docker.image(), "python", "/bench/run.py"]
    assert not any("labsupport" in part or "nbgrader" in part for part in [docker.dockerfile(), *command])


def test_where_nothing_works_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda *a, **k: None)
    with pytest.raises(GradingError, match=r"bwrap is not installed.*docker is not installed.*apt install bubblewrap") as raised:
        sandbox.find()
    assert "\n" not in str(raised.value)
    assert sandbox.find(unsafe=True).name == "none"
    with pytest.raises(GradingError, match="'qemu' is not known"):
        sandbox.find("qemu")


def test_only_the_end_of_what_is_said_is_in_memory():
    reads, writes = os.pipe()
    tail = watch.Tail(os.fdopen(reads, "rb"))
    with open(writes, "wb") as stream:
        stream.write(b"x" * 10**6 + b"end")
    assert tail.text().endswith("xend")
    assert len(tail.content) == 4 * watch.SAID
