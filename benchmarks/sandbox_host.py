"""The host that hostile programs are let loose beside: what they may look for, and what shows that they got it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
_WATCHED = (
    "/proc/mounts", "/proc/sys/kernel/hostname", "/proc/sys/kernel/core_pattern", "/proc/sys/kernel/modprobe",
    "/proc/swaps", "/etc/passwd", "/etc/hosts",
)  # fmt: skip

_LEFT = ("big", "evil", "link", "copied", "f0")  # names that the attacks give to files
_NOBODY = 65534


class Host:
    """Canary files, a secret in the environment, listening sockets and a process, each of which tells when touched.

    `targets` are what the attacks are told of them: everything that an attacker could know.
    """

    def __init__(self) -> None:
        self.secret = f"swordfish-{secrets.token_hex(8)}"
        self.hits: list[str] = []
        self.folder = Path(tempfile.mkdtemp(prefix="posttrain-canary-"))
        self.folder.chmod(0o777)
        self._home = Path.home() if os.access(Path.home(), os.W_OK) else self.folder
        self._canaries = [self.folder / "canary", self._home / f".canary-{os.getpid()}"]
        for path in self._canaries:
            path.write_text(self.secret)
            path.chmod(0o666)  # whoever gets there can read and change it
        self._secret_name = f"HOST_SECRET_{os.getpid()}"
        os.environ[self._secret_name] = self.secret
        self._victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
        self._sockets: list[socket.socket] = []
        abstract = f"host-{secrets.token_hex(4)}"
        addresses: list[tuple[socket.AddressFamily, socket.SocketKind, object]] = [
            (socket.AF_INET, socket.SOCK_STREAM, ("0.0.0.0", 0)),
            (socket.AF_INET, socket.SOCK_DGRAM, ("0.0.0.0", 0)),
            (socket.AF_UNIX, socket.SOCK_STREAM, str(self.folder / "stream.sock")),
            (socket.AF_UNIX, socket.SOCK_DGRAM, str(self.folder / "datagram.sock")),
            (socket.AF_UNIX, socket.SOCK_STREAM, f"\0{abstract}"),
        ]
        for family, kind, address in addresses:
            self._listen(family, kind, address)
        with contextlib.suppress(OSError):  # a machine without IPv6
            self._listen(socket.AF_INET6, socket.SOCK_STREAM, ("::1", self._sockets[0].getsockname()[1]))
        self.targets = {
            "canary": str(self._canaries[0]),
            "home_canary": str(self._canaries[1]),
            "canary_folder": str(self.folder),
            "repository": str(REPOSITORY),
            "stdlib": str(Path(os.__file__).parent),
            "port": str(self._sockets[0].getsockname()[1]),
            "udp_port": str(self._sockets[1].getsockname()[1]),
            "unix": str(self.folder / "stream.sock"),
            "unix_dgram": str(self.folder / "datagram.sock"),
            "abstract": abstract,
            "victim": str(self._victim.pid),
            "host": str(os.getpid()),
            "hostname": socket.gethostname(),
            "secret_name": self._secret_name,
        }
        self._started_ticks = _start_ticks(os.getpid())
        self._before = self._state()

    def _listen(self, family: socket.AddressFamily, kind: socket.SocketKind, address: object) -> None:
        made = socket.socket(family, kind)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.bind(address)
        if isinstance(address, str) and not address.startswith("\0"):
            Path(address).chmod(0o777)
        self._sockets.append(made)
        if kind == socket.SOCK_STREAM:
            made.listen()
        threading.Thread(target=self._answer, args=(made, kind), daemon=True).start()

    def _answer(self, listening: socket.socket, kind: socket.SocketKind) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                if kind == socket.SOCK_STREAM:
                    connection, peer = listening.accept()
                    connection.sendall(self.secret.encode())
                    connection.close()
                else:
                    _, peer = listening.recvfrom(100)
                self.hits.append(f"{listening.family.name} {kind.name} from {peer!r}")

    def _state(self) -> dict[str, str]:
        """What no program may change, by name."""
        found = {}
        for path in (*_WATCHED, *map(str, self._canaries), os.__file__):
            with contextlib.suppress(OSError):
                data, mode = Path(path).read_bytes(), Path(path).stat()
                timed = "" if path.startswith("/proc") else f" {mode.st_mode:o} {mode.st_uid} {mode.st_mtime_ns}"
                found[path] = hashlib.sha256(data).hexdigest()[:16] + timed
        for kind in ("shm", "msg", "sem"):  # others come and go with the work of others
            with contextlib.suppress(OSError):
                lines = Path(f"/proc/sysvipc/{kind}").read_text().splitlines()
                found[f"shared {kind}"] = " ".join(
                    sorted(line for line in lines if f" {_NOBODY} " in line or " 1777 " in line)
                )
        left = ("/dev/shm", "/var/tmp", "/run", "/run/lock", "/dev", "/mnt", "/home", "/tmp")
        found["left"] = " ".join(f"{folder}/{name}" for folder in left for name in _LEFT if Path(folder, name).exists())
        for folder in ("/", "/lib", "/usr/lib", str(self.folder), str(Path(os.__file__).parent)):
            with contextlib.suppress(OSError):
                found[f"names in {folder}"] = " ".join(sorted(path.name for path in Path(folder).iterdir()))
        found["clock"] = str(round((time.time() - time.monotonic()) / 60))
        found["nice"] = f"{os.getpriority(os.PRIO_PROCESS, self._victim.pid)} {os.sched_getscheduler(self._victim.pid)}"
        return found

    def changes(self) -> list[str]:
        """What is no longer as it was, what was connected to, and whether the process was ended."""
        now = self._state()
        found = [f"changed: {name}" for name, value in self._before.items() if now.get(name) != value]
        if self._victim.poll() is not None:
            found.append(f"the process beside it ended with {self._victim.returncode}")
        return [*found, *(f"reached: {hit}" for hit in self.hits)]

    def survivors(self, makers: set[int], patience_s: float = 5.0) -> list[str]:
        """Processes that programs left behind: below the makers of sandboxes, or cut loose from them."""
        until_s = time.monotonic() + patience_s  # the kernel takes its time to clear up on a busy machine
        while found := self._census(makers):
            if time.monotonic() > until_s:
                return found
            time.sleep(0.05)
        return []

    def _census(self, makers: set[int]) -> list[str]:
        found = []
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit() or int(folder.name) in makers:
                continue
            with contextlib.suppress(OSError, ValueError, IndexError):
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                state, parent, ticks = fields[0], int(fields[1]), int(fields[19])
                words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
                loose = parent == 1 and ticks >= self._started_ticks and ("sandbox_worker" in words or "sleep" in words)
                if state != "X" and (parent in makers or loose):
                    found.append(f"{folder.name} {state} {words[:80]}")
        return found

    def close(self) -> None:
        """Take everything away."""
        for made in self._sockets:
            made.close()
        self._victim.kill()
        self._victim.wait()
        for path in self._canaries:
            path.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        os.environ.pop(self._secret_name, None)


@contextlib.contextmanager
def host() -> Iterator[Host]:
    """A host for the time of a `with`."""
    made = Host()
    try:
        yield made
    finally:
        made.close()


def _start_ticks(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
