"""What hostile code tries, and what comes of it. Each attack says what it reached; nothing may be reached."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from posttrain.core import ConfigError
from posttrain.grade import Sandbox, SandboxLimits, SandboxUnavailable
from posttrain.grade import sandbox_kernel as kernel

LIMITS = SandboxLimits(cpu_s=2, wall_s=10.0, memory_bytes=400_000_000, output_bytes=100_000)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    made = Sandbox(LIMITS)
    try:
        made.start()
    except SandboxUnavailable as error:
        pytest.skip(f"this kernel or container refuses a layer: {error}")
    yield made
    made.close()


def _tried(sandbox: Sandbox, body: str) -> str:
    """What an attack printed: `reached …`, or `stopped: <exception>`."""
    lines = "".join(f"    {line}\n" for line in body.strip().splitlines())
    run = sandbox.run_now(f"try:\n{lines}except BaseException as error:\n    print('stopped:', type(error).__name__)\n")
    return run.stdout.strip()


def test_a_program_runs(sandbox: Sandbox) -> None:
    run = sandbox.run_now(
        "import sys\nname = input()\nprint('hello', name, open('a/b.txt').read())\n"
        "print('oh', file=sys.stderr)\nexit(3)",
        stdin="you\n",
        files={"a/b.txt": "text"},
    )
    assert (run.stdout, run.stderr, run.exit_status) == ("hello you text\n", "oh\n", 3)
    assert not run.timed_out
    assert 0 < run.cpu_s < 1
    assert run.memory_bytes > 1_000_000


def test_an_exception_is_shown_and_exits_1(sandbox: Sandbox) -> None:
    run = sandbox.run_now("1 / 0")
    assert run.exit_status == 1
    assert "ZeroDivisionError" in run.stderr
    assert sandbox.run_now("x = (").exit_status == 1
    assert sandbox.run_now("raise SystemExit('bye')").stderr == "bye\n"


def test_runs_share_nothing(sandbox: Sandbox) -> None:
    assert sandbox.run_now("open('left', 'w').write('x'); import math; math.pi = 3").exit_status == 0
    seen = sandbox.run_now("import os, math; print(os.listdir('.'), os.listdir('/tmp'), math.pi > 3.1)")
    assert seen.stdout == "[] ['work', '.stdin'] True\n" or seen.stdout == "[] ['.stdin', 'work'] True\n"


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "/etc/shadow", "/proc/1/environ", "/proc/self/environ", "/root/.bashrc", "/home", "/var", "/sys"],
)
def test_host_files_are_not_there(sandbox: Sandbox, path: str) -> None:
    reached = _tried(sandbox, f"import os\nprint('reached', os.listdir({path!r}) or open({path!r}).read(10))")
    assert reached in ("stopped: FileNotFoundError", "stopped: PermissionError", "stopped: NotADirectoryError")


def test_a_file_of_this_project_is_not_there(sandbox: Sandbox) -> None:
    assert _tried(sandbox, f"print('reached', open({__file__!r}).read(10))") == "stopped: FileNotFoundError"


def test_a_symbolic_link_or_dots_lead_nowhere(sandbox: Sandbox) -> None:
    body = "import os\nos.symlink('/etc/passwd', 'link')\nprint('reached', open('link').read(10))"
    assert _tried(sandbox, body) == "stopped: FileNotFoundError"
    assert _tried(sandbox, "print('reached', open('../../../../etc/passwd').read(10))") == "stopped: FileNotFoundError"
    chroot = "import os\nos.mkdir('a')\nos.chroot('a')\nprint('reached')"
    assert _tried(sandbox, chroot) == "stopped: PermissionError"


@pytest.mark.parametrize("path", ["/evil", "/lib/evil", "/usr/lib/evil", "/dev/evil", os.__file__])
def test_nothing_is_written_outside(sandbox: Sandbox, path: str) -> None:
    before = Path(path).exists() and Path(path).stat().st_mtime_ns
    assert _tried(sandbox, f"open({path!r}, 'a').write('#')\nprint('reached')").startswith("stopped: ")
    assert (Path(path).exists() and Path(path).stat().st_mtime_ns) == before


def test_the_library_cannot_be_made_writable(sandbox: Sandbox) -> None:
    body = (
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "done = libc.mount(None, b'/lib', None, 32, None), libc.umount2(b'/lib', 2), libc.unshare(0x10000000)\n"
        "print('reached' if 0 in done else 'stopped', ctypes.get_errno())"
    )
    assert _tried(sandbox, body) == "stopped 1"


def test_no_secret_of_the_caller_is_there(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "swordfish-" + str(os.getpid())
    monkeypatch.setenv("POSTTRAIN_TEST_SECRET", secret)
    fresh = Sandbox(LIMITS)
    body = """
import os, ctypes, gc
found = [k for k in os.environ if 'SECRET' in k]
found += [o for o in gc.get_objects() if isinstance(o, str) and 'swordfish' in o]
libc = ctypes.CDLL(None)
libc.getenv.restype = ctypes.c_char_p
print('reached' if found or libc.getenv(b'POSTTRAIN_TEST_SECRET') else 'stopped', sorted(os.environ))
"""
    assert _tried(fresh, body) == "stopped ['HOME', 'LANG', 'PATH', 'TMPDIR']"
    fresh.close()


def test_no_network(sandbox: Sandbox) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        body = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)\nprint('reached')"
        assert _tried(sandbox, body) == "stopped: PermissionError"  # no socket can be made
        weak = Sandbox(LIMITS, without=["seccomp"])
        assert _tried(weak, body) == "stopped: OSError"  # and if one could: there is no way out
        weak.close()
    unix = "import socket\nsocket.socket(socket.AF_UNIX).connect('/run/docker.sock')\nprint('reached')"
    assert _tried(sandbox, unix) == "stopped: PermissionError"


def test_an_endless_loop_ends(sandbox: Sandbox) -> None:
    started_s = time.monotonic()
    run = sandbox.run_now("while True: pass")
    assert run.timed_out
    assert run.exit_status in (None, -9, -24)
    assert time.monotonic() - started_s < 12


def test_sleeping_ends_by_the_clock() -> None:
    patient = Sandbox(LIMITS.replace(wall_s=0.5))
    started_s = time.monotonic()
    run = patient.run_now("print('a', flush=True)\nimport time; time.sleep(60)")
    assert run.timed_out
    assert run.stdout == "a\n"
    assert run.exit_status is None
    assert time.monotonic() - started_s < 5
    patient.close()


def test_a_memory_bomb_ends(sandbox: Sandbox) -> None:
    assert _tried(sandbox, "x = bytearray(10**10)\nprint('reached')") == "stopped: MemoryError"
    slow = "parts = []\nwhile True: parts.append(bytearray(10**7))"
    assert _tried(sandbox, slow) == "stopped: MemoryError"


def test_a_fork_bomb_does_not_start(sandbox: Sandbox) -> None:
    assert _tried(sandbox, "import os\nwhile True: os.fork()") == "stopped: PermissionError"
    assert _tried(sandbox, "import subprocess\nsubprocess.run(['/bin/sh'])\nprint('reached')").startswith("stopped: ")
    assert _tried(sandbox, "import os\nos.execv('/bin/sh', ['sh'])\nprint('reached')") == "stopped: PermissionError"


def test_a_fork_bomb_that_may_fork_is_held_down() -> None:
    generous = Sandbox(LIMITS.replace(spawn=True, tasks=16, wall_s=3.0))
    run = generous.run_now("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass")
    assert run.timed_out
    generous.run_now("print(1)")
    time.sleep(0.2)
    assert _num_processes("sandbox_worker") <= 3
    counted = generous.run_now(
        "import os, time\nn = 0\ntry:\n    while n < 500:\n        if os.fork() == 0:\n"
        "            time.sleep(2); os._exit(0)\n        n += 1\nexcept OSError:\n    print(n)"
    )
    assert 0 < int(counted.stdout) <= 18
    generous.close()


def test_too_many_threads_are_refused(sandbox: Sandbox) -> None:
    body = "import threading, time\nfor n in range(1000): threading.Thread(target=time.sleep, args=(9,)).start()"
    assert _tried(sandbox, body) == "stopped: RuntimeError"


def test_a_thread_or_process_left_behind_is_gone() -> None:
    before = _num_processes("sandbox_worker")
    generous = Sandbox(LIMITS.replace(spawn=True))
    body = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for fd in (0, 1, 2): os.close(fd)
        time.sleep(60)
    os._exit(0)
print('done')
"""
    started_s = time.monotonic()
    assert generous.run_now(body).stdout == "done\n"
    assert time.monotonic() - started_s < 5
    time.sleep(0.2)
    until_s = time.monotonic() + 5  # the kernel takes its time on a busy machine
    while _num_processes("sandbox_worker") > before + 2 and time.monotonic() < until_s:
        time.sleep(0.05)
    assert _num_processes("sandbox_worker") <= before + 2
    generous.close()


def test_a_disk_bomb_ends(sandbox: Sandbox) -> None:
    one = "f = open('big', 'wb')\nfor _ in range(10_000): f.write(bytes(10**5))\nprint('reached')"
    assert "reached" not in _tried(sandbox, one)
    many = "for n in range(100_000): open(f'f{n}', 'wb').write(bytes(10**6))\nprint('reached')"
    assert _tried(sandbox, many) == "stopped: OSError"
    assert (
        _tried(sandbox, "for n in range(100_000): open(f'f{n}', 'wb').close()\nprint('reached')") == "stopped: OSError"
    )


def test_too_much_output_ends(sandbox: Sandbox) -> None:
    run = sandbox.run_now("while True: print('x' * 1000)")
    assert run.too_much_output
    assert len(run.stdout) == LIMITS.output_bytes
    assert run.exit_status is None


@pytest.mark.parametrize(
    "call",
    [
        "libc.ptrace(16, os.getppid(), 0, 0)",
        "libc.syscall(310, os.getppid(), 0, 0, 0, 0, 0)",  # process_vm_readv
        "libc.syscall(321, 0, 0, 0)",  # bpf
        "libc.syscall(425, 1, 0)",  # io_uring_setup
        "libc.syscall(298, 0, 0, -1, -1, 0)",  # perf_event_open
        "libc.syscall(323, 0)",  # userfaultfd
        "libc.syscall(319, b'x', 0)",  # memfd_create
        "libc.syscall(0x40000000 + 39)",  # the x32 interface
        "libc.mount(b'none', b'/tmp', b'tmpfs', 0, None)",
        "libc.setuid(0)",
        "libc.reboot(0)",
    ],
)
def test_calls_that_are_not_listed_fail(sandbox: Sandbox, call: str) -> None:
    if "syscall" in call and os.uname().machine != "x86_64":
        pytest.skip("numbers of another processor")
    body = f"import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\nprint({call}, ctypes.get_errno())"
    assert _tried(sandbox, body) == "-1 1"


def test_nobody_can_be_killed(sandbox: Sandbox) -> None:
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"])
    try:
        body = f"import os, signal\nos.kill({victim.pid}, signal.SIGKILL)\nprint('reached')"
        assert _tried(sandbox, body) == "stopped: ProcessLookupError"
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()
    # Process 1 inside cannot be killed from inside; ending it would end the run.
    assert _tried(sandbox, "import os\nos.kill(1, 9)\nos.kill(0, 0)\nprint('alive')") == "alive"


def test_code_runs_as_nobody(sandbox: Sandbox) -> None:
    run = sandbox.run_now("import os; print(os.getresuid(), os.getgroups(), os.getpid() < 10)")
    nobody = kernel.NOBODY
    assert run.stdout.startswith(f"({nobody}, {nobody}, {nobody}) [")
    assert run.stdout.rstrip().endswith("True")
    outside = sandbox.run_now("import os; os.setuid(0)")
    assert "PermissionError" in outside.stderr


@pytest.mark.parametrize(
    "layer", ["user", "pid", "mount", "network", "ipc", "uid", "capabilities", "seccomp", "limits"]
)
def test_a_layer_that_cannot_be_had_stops_everything(
    layer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker is made to fail in one layer; nothing may run, and the error names the layer."""
    folder = Path(kernel.__file__).parent
    for name in ("sandbox_worker", "sandbox_guest", "sandbox_judge"):
        (tmp_path / f"{name}.py").write_text((folder / f"{name}.py").read_text())
    entry = {
        "mount": "make_root", "uid": "become_nobody", "capabilities": "become_nobody", "seccomp": "filter_calls",
        "limits": "set_limits",
    }.get(layer, "enter_namespaces")  # fmt: skip
    broken = f"\n\ndef {entry}(*a, **k):\n    raise LayerError({layer!r}, 'Operation not permitted')\n"
    (tmp_path / "sandbox_kernel.py").write_text((folder / "sandbox_kernel.py").read_text() + broken)
    monkeypatch.setattr("posttrain.grade.sandbox_process.__file__", str(tmp_path / "sandbox_process.py"))
    refused = Sandbox(LIMITS)
    with pytest.raises(SandboxUnavailable, match=f"the layer '{layer}' is not to be had here.*nothing was run"):
        refused.run_now("print('ran')")
    refused.close()


def test_a_layer_is_given_up_only_by_name() -> None:
    with pytest.raises(ConfigError, match="no layers named firewall"):
        Sandbox(without=["firewall"])  # type: ignore[list-item]
    weaker = Sandbox(LIMITS, without=["network", "ipc"])
    assert "network" not in weaker.layers
    assert weaker.run_now("print(1)").stdout == "1\n"
    weaker.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can do without user namespaces")
def test_without_user_namespaces_code_is_nobody_all_the_same() -> None:
    weaker = Sandbox(LIMITS, without=["user"])
    run = weaker.run_now("import os; print(os.getresuid()); open('/lib/evil', 'w')")
    assert run.stdout == f"({kernel.NOBODY}, {kernel.NOBODY}, {kernel.NOBODY})\n"
    assert run.exit_status == 1
    weaker.close()


def test_readable_folders_and_commands(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("VALUE = 7\n")
    tmp_path.chmod(0o755)
    reading = Sandbox(LIMITS.replace(spawn=True), readable=[tmp_path, Path("/usr/bin")])
    assert reading.run_now("import mine; print(mine.VALUE)").stdout == "7\n"
    assert "Read-only" in reading.run_now(f"open({str(tmp_path / 'mine.py')!r}, 'w')").stderr
    assert reading.command_now(["sort"], stdin="b\na\n").stdout == "a\nb\n"
    reading.close()
    with pytest.raises(ConfigError, match="spawn=True"):
        Sandbox(LIMITS).command_now(["sort"])


def test_from_threads_and_event_loops(sandbox: Sandbox) -> None:
    async def several() -> list[str]:
        return [run.stdout for run in await asyncio.gather(*(sandbox.run(f"print({n})") for n in range(8)))]

    outputs: list[list[str]] = []
    threads = [threading.Thread(target=lambda: outputs.append(asyncio.run(several()))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outputs == [[f"{n}\n" for n in range(8)]] * 2


def test_a_dead_maker_is_replaced(sandbox: Sandbox) -> None:
    process = sandbox._maker._process
    assert process is not None
    process.kill()
    process.wait()
    assert sandbox.run_now("print(1)").stdout == "1\n"


def test_no_descriptor_is_left_open(sandbox: Sandbox) -> None:
    sandbox.run_now("print(1)")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        sandbox.run_now("print(1)")
        sandbox.judge_now("def f(): return 1", ["assert f() == 1"])
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    count = """
import os
def is_open(fd):
    try:
        return bool(os.fstat(fd))
    except OSError:
        return False
print([fd for fd in range(200) if is_open(fd)])
"""
    assert sandbox.run_now(count).stdout == "[0, 1, 2]\n"


def _num_processes(name: str) -> int:
    count = 0
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, ValueError):
                continue
            count += any(name.encode() in word for word in words) and parent != 0 and _descends_from_here(parent)
    return count


def _descends_from_here(pid: int) -> bool:
    while pid > 1:
        if pid == os.getpid():
            return True
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            return False
    return False
