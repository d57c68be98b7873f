"""The kernel's part of the sandbox: namespaces, a root of its own, dropped rights, limits, a list of allowed calls.

Runs inside the sandbox's own processes, which load this file by its path: it imports the standard library only. Every
function either puts its layer in place or raises `LayerError`; nothing goes on without a layer that was asked for.

Sources: namespaces(7), user_namespaces(7), pivot_root(2), mount_setattr(2), seccomp(2).
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import resource
import stat
from pathlib import Path
from typing import Any

LAYERS = ("user", "pid", "mount", "network", "ipc", "uid", "capabilities", "seccomp", "limits")
NOBODY = 65534

_NEW = {"user": 0x10000000, "pid": 0x20000000, "mount": 0x00020000, "network": 0x40000000, "ipc": 0x0C000000}
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV = 1, 2, 4
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP = 1, 4, 24, 38, 22
_SIGKILL = 9
_NUMBERS = {  # pivot_root, mount_setattr, capset, and the audit name of the architecture
    "x86_64": (155, 442, 126, 0xC000003E),
    "aarch64": (41, 442, 91, 0xC00000B7),
}

libc = ctypes.CDLL(None, use_errno=True)


class LayerError(Exception):
    """A layer of the sandbox cannot be put in place; `args` are the layer's name and the reason."""


def call(layer: str, function: str, *arguments: Any) -> int:
    """A C library function that returns -1 on failure."""
    done: int = getattr(libc, function)(*arguments)
    if done == -1:
        raise LayerError(layer, f"{function}: {os.strerror(ctypes.get_errno())}")
    return done


def machine_numbers(layer: str) -> tuple[int, int, int, int]:
    """Numbers of the calls that the C library has no function for."""
    numbers = _NUMBERS.get(platform.machine())
    if numbers is None:
        raise LayerError(layer, f"not known for processors of the kind {platform.machine()}")
    return numbers


def enter_namespaces(layers: set[str]) -> None:
    """Leave the host's namespaces; processes forked after this are in a new one of their own."""
    for layer in _NEW:
        if layer in layers:
            call(layer, "unshare", _NEW[layer])
    if "ipc" in layers:
        call("ipc", "sethostname", b"sandbox", 7)  # the new one begins with the host's name


def map_users(pid: int, *, as_root: bool) -> None:
    """Say who the sandbox's users are outside. Called by a process outside, for one that has just entered.

    Where this process is root, root inside is root outside while the mounts are made, and nobody is nobody, as whom
    the code runs. Otherwise nobody inside is this user, who has no more rights than the kernel gives it there.
    """
    lines = f"0 0 1\n{NOBODY} {NOBODY} 1" if as_root else f"{NOBODY} {{}} 1"
    folder = Path("/proc") / str(pid)
    try:
        if not as_root:
            (folder / "setgroups").write_text("deny")
        (folder / "uid_map").write_text(lines.format(os.geteuid()))
        (folder / "gid_map").write_text(lines.format(os.getegid()))
    except OSError as error:
        raise LayerError("user", f"mapping users: {error}") from error


def make_root(readable: list[str], disk_bytes: int) -> None:
    """Put an empty root in place of the host's: the readable folders, read-only, and a small /tmp in memory."""
    pivot_root, mount_setattr, _, _ = machine_numbers("mount")
    root = "/proc"  # a folder that every machine has and nothing here is read from
    quiet = _MS_NOSUID | _MS_NODEV
    call("mount", "mount", b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
    call("mount", "mount", b"tmpfs", root.encode(), b"tmpfs", quiet, b"size=1m,nr_inodes=2k,mode=755")
    for name in ("tmp", "old"):
        (Path(root) / name).mkdir()
    options = f"size={disk_bytes},nr_inodes=4k,mode=1777".encode()
    call("mount", "mount", b"tmpfs", f"{root}/tmp".encode(), b"tmpfs", quiet, options)
    for path in [*readable, "/dev/null", "/dev/zero", "/dev/urandom"]:
        _show(path, root, mount_setattr)
    call("mount", "syscall", pivot_root, root.encode(), f"{root}/old".encode())
    os.chdir("/")
    call("mount", "umount2", b"/old", 2)
    Path("/old").rmdir()
    _set_attributes(mount_setattr, "/", _ATTR_RDONLY | _ATTR_NOSUID | _ATTR_NODEV, 0)
    Path("/tmp/work").mkdir()
    Path("/tmp/work").chmod(0o777)
    os.chdir("/tmp/work")


def _show(path: str, root: str, mount_setattr: int) -> None:
    """Bind one host path, read-only, at the same place under the new root; a symbolic link stays one."""
    target = root + path
    try:
        mode = os.lstat(path).st_mode
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        if stat.S_ISLNK(mode):
            Path(target).symlink_to(os.readlink(path))  # noqa: PTH115  the text of the link, not its target
            return
        if stat.S_ISDIR(mode):
            Path(target).mkdir(exist_ok=True)
        else:
            Path(target).touch()
    except OSError as error:
        raise LayerError("mount", f"{path}: {error}") from error
    call("mount", "mount", path.encode(), target.encode(), None, _MS_BIND | _MS_REC, None)
    devices = 0 if stat.S_ISCHR(mode) else _ATTR_NODEV
    _set_attributes(mount_setattr, target, _ATTR_RDONLY | _ATTR_NOSUID | devices, _AT_RECURSIVE)


def _set_attributes(number: int, path: str, attributes: int, flags: int) -> None:
    value = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)
    call("mount", "syscall", number, _AT_FDCWD, path.encode(), flags, ctypes.byref(value), ctypes.sizeof(value))


def become_nobody(layers: set[str], *, as_root: bool) -> None:
    """Give up every right for good: another user, no capabilities, none to be had by executing a file."""
    if "uid" in layers and as_root:
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        except OSError as error:
            raise LayerError("uid", f"becoming nobody: {error}") from error
    if "capabilities" in layers:
        call("capabilities", "prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        capability = 0
        while libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) == 0:
            capability += 1
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)
        nothing = (ctypes.c_uint32 * 6)()
        call("capabilities", "syscall", machine_numbers("capabilities")[2], header, nothing)


def die_with_parent() -> None:
    """Be killed when the process that made this one ends; and let nobody look into this one."""
    call("pid", "prctl", _PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0)
    call("pid", "prctl", _PR_SET_DUMPABLE, 0, 0, 0, 0)


def resident_bytes(pid: int, shared_bytes: int) -> int:
    """Memory that a process and all below it hold, each without what it shares with its maker. Called from outside.

    Raises:
        LayerError: this kernel does not say which processes are whose children.
    """
    total, waiting = 0, [pid]
    while waiting:
        folder = Path("/proc") / str(waiting.pop())
        try:
            pages = int((folder / "statm").read_text().split()[1])
            total += max(0, pages * resource.getpagesize() - shared_bytes)
            for thread in (folder / "task").iterdir():
                waiting += map(int, (thread / "children").read_text().split())
        except (ProcessLookupError, IndexError):
            continue  # it ended meanwhile
        except FileNotFoundError as error:  # the same, unless the kernel has no such file
            if not Path("/proc/thread-self/children").exists():
                raise LayerError("limits", "the kernel has no /proc/<pid>/task/<tid>/children") from error
    return total


def set_limits(limits: dict[str, int]) -> None:
    """Limits by `resource` name (`RLIMIT_AS` …), soft and hard."""
    try:
        for name, value in limits.items():
            resource.setrlimit(getattr(resource, name), (value, value))
    except (OSError, ValueError) as error:
        raise LayerError("limits", f"{name}: {error}") from error


# Calls that code may make; every other is answered EPERM (or ENOSYS). No sockets but connected pairs, no tracing, no
# mounting, no keys, no new namespaces. x86-64 numbers, then those of aarch64 (asm-generic/unistd.h).
_ALLOWED = {
    "x86_64": """0-15 17-28 32-40 44-48 51-55 60-63 72-91 95-100 102 104 107-112 115 118 120-121 124 127-128 130-132
        137-138 140 143 145 158 186 200-202 204 213 217-219 221-226 228-235 247 257-258 261-271 273-276 280-281
        283-287 289-293 295-296 302 309 316 318 324 326 332 334 436-437 439 449""",
    "aarch64": """17 19-25 32 34-38 43-50 52-53 56-57 59 61-74 76-80 82-83 85-88 93-96 98-103 107-111 113-115 120-121
        123-124 128-137 139 141 148 150 153-158 160 163 165-166 168-169 172-179 199 204-212 214-216 222-223 226-227
        232-233 260-261 276 278 283 285 291 293 436-437 439 449""",
}
# Numbers: clone, ioctl, prctl, clone3; then calls that start processes or programs.
_SPECIAL = {
    "x86_64": ((56, 16, 157, 435), (57, 58), (59, 322)),
    "aarch64": ((220, 29, 167, 435), (), (221, 281)),
}
_IOCTLS = (0x5401, 0x5413, 0x5421, 0x541B, 0x5450, 0x5451)  # terminal or not, its size, pending bytes, close-on-exec
_PRCTLS = (15, 16, 0x53564D41)  # this thread's name; a name for memory
_CLONE_THREAD = 0x00010000
_CLONE_NEW_ANY = 0x7E020080
_RET_ALLOW, _RET_EPERM, _RET_ENOSYS, _RET_KILL = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
_LOAD, _EQUAL, _GREATER, _GREATER_EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x25, 0x35, 0x45, 0x06


def filter_calls(*, spawn: bool) -> None:
    """Allow the listed system calls only.

    Args:
        spawn: whether processes and programs may be started, besides threads.
    """
    encoded = encoded_filter(platform.machine(), spawn)

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]

    call("seccomp", "prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    call("seccomp", "prctl", _PR_SET_SECCOMP, 2, ctypes.byref(Program(len(encoded) // 8, encoded)), 0, 0)


@functools.cache
def encoded_filter(machine: str, spawn: bool) -> bytes:
    """The filter as the kernel reads it; made once by the process that all others are forked from."""
    program = _filter(machine, machine_numbers("seccomp")[3], spawn)
    return b"".join(
        code.to_bytes(2, "little") + bytes((yes, no)) + value.to_bytes(4, "little") for code, yes, no, value in program
    )


def _filter(machine: str, audit: int, spawn: bool) -> list[tuple[int, int, int, int]]:
    """Instructions `(code, jump if true, jump if false, value)` of the Berkeley packet filter."""
    (clone, ioctl, prctl, clone3), forks, executes = _SPECIAL[machine]
    numbers: set[int] = set()
    for part in _ALLOWED[machine].split():
        low, _, high = part.partition("-")
        numbers |= set(range(int(low), int(high or low) + 1))
    numbers -= {clone, ioctl, prctl, clone3, *forks, *executes}
    numbers |= {*forks, *executes} if spawn else set()
    program = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, audit), (_RETURN, 0, 0, _RET_KILL), (_LOAD, 0, 0, 0)]
    program += [(_EQUAL, 0, 1, clone3), (_RETURN, 0, 0, _RET_ENOSYS)]  # its flags lie in memory; clone is tried next
    namespaces = [(_LOAD, 0, 0, 16), (_ANY_BIT, 0, 1, _CLONE_NEW_ANY), (_RETURN, 0, 0, _RET_EPERM)]
    thread = [] if spawn else [(_ANY_BIT, 1, 0, _CLONE_THREAD), (_RETURN, 0, 0, _RET_EPERM)]
    for number, body in (
        (clone, [*namespaces, *thread, (_RETURN, 0, 0, _RET_ALLOW)]),
        (ioctl, _one_of(24, _IOCTLS)),
        (prctl, _one_of(16, _PRCTLS)),
    ):
        program += [(_EQUAL, 0, len(body), number), *body]
    for first, last in _ranges(sorted(numbers)):
        program += [(_GREATER, 3, 0, last), (_GREATER_EQUAL, 1, 0, first)]
        program += [(_RETURN, 0, 0, _RET_EPERM), (_RETURN, 0, 0, _RET_ALLOW)]
    return [*program, (_RETURN, 0, 0, _RET_EPERM)]


def _one_of(offset: int, values: tuple[int, ...]) -> list[tuple[int, int, int, int]]:
    tests = [(_EQUAL, len(values) - index, 0, value) for index, value in enumerate(values)]
    return [(_LOAD, 0, 0, offset), *tests, (_RETURN, 0, 0, _RET_EPERM), (_RETURN, 0, 0, _RET_ALLOW)]


def _ranges(numbers: list[int]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and found[-1][1] == number - 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return found
