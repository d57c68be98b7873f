"""A run on disk: one folder that holds everything a run wrote, and that only one process at a time may write.

runs/20261120-143205-grpo-3f2a/
    config.toml     the recipe's options, as run
    run.json        RunState: status, times, process, code version
    metrics.jsonl   {"step": 1, "reward": 0.4, …}
    samples.jsonl   what the model wrote, as the recipe chose to keep it
    events.log      one line per event
    checkpoints/    the trainer's
    report.html     written at the end
"""

from __future__ import annotations

import os
import re
import secrets
import socket
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import msgspec

from posttrain.core import (
    Config,
    ConfigError,
    DataError,
    JsonlTracker,
    Record,
    RegistryError,
    content_hash,
    read_toml,
    write_toml,
)
from posttrain.registry.code_version import code_version
from posttrain.registry.durable import sync_folder, trim_torn_line, write_atomic
from posttrain.registry.events import Event
from posttrain.registry.lock import FileLock

Status = Literal["running", "finished", "failed", "interrupted"]

RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")


class RunState(Record, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="record", tag="run/1"):
    """What `run.json` says."""

    id: str
    recipe: str
    status: Status
    started: float  # Unix time
    ended: float | None = None
    pid: int = 0
    host: str = ""
    fingerprint: str = ""  # of recipe and configuration
    code: dict[str, str] = {}  # package version and git commit
    resumed: int = 0  # how many times it was opened again to go on
    error: str | None = None

    def seconds(self) -> float:
        """Wall time from start to end, or to now."""
        return (self.ended or time.time()) - self.started


class RunTracker(JsonlTracker):
    """The tracker of a run: survives the replacement of its file."""

    def reopen(self) -> None:
        """Go on at the end of the file that now bears the name."""
        self.close()
        self._file = self.path.open("ab")


class RunFolder:
    """One run. `create` a new one, `open` one to go on or (`read_only`) to look at.

    As a context manager it finishes the run: "finished", or "interrupted" (Ctrl-C), or "failed" with the error.
    """

    def __init__(self, path: Path, *, read_only: bool) -> None:
        self.path = path
        self.read_only = read_only
        self._lock = FileLock(path / ".lock")
        self._tracker: RunTracker | None = None

    @classmethod
    def create(
        cls, root: Path, recipe: str, config: Mapping[str, Any] | Config, *, run_id: str | None = None
    ) -> RunFolder:
        """Make a new run's folder and take its lock.

        Args:
            root: folder of all runs, usually `runs`; made if absent.
            recipe: name of the recipe; part of the id.
            config: the options as run; kept as TOML.
            run_id: the folder's name; by default time (UTC), recipe and four random hex digits.

        Raises:
            RegistryError: the id is taken or is no plain file name.
            ConfigError: an option's value cannot be written as TOML.
        """
        plain = _plain(config.to_dict() if isinstance(config, Config) else dict(config))
        text = _toml(plain, recipe)
        root.mkdir(parents=True, exist_ok=True)
        run = cls(_new_folder(root, recipe, run_id), read_only=False)
        run._take_lock()
        (run.path / "checkpoints").mkdir()
        write_atomic(run.path / "config.toml", text.encode())
        state = RunState(
            id=run.id,
            recipe=recipe,
            status="running",
            started=time.time(),
            pid=os.getpid(),
            host=socket.gethostname(),
            fingerprint=content_hash({"recipe": recipe, "config": plain})[:12],
            code=code_version(),
        )
        run._write_state(state)
        sync_folder(root)
        run.event("started", recipe=recipe, pid=state.pid, code=state.code)
        return run

    @classmethod
    def open(cls, path: Path, *, read_only: bool = False) -> RunFolder:
        """Open a run again: to go on (takes the lock, sets the status to running), or only to read.

        Raises:
            RegistryError: there is no run there, or another process is writing it.
        """
        if not (path / "run.json").is_file():
            raise RegistryError(f"{path}: no run here (run.json is missing){_near_runs(path)}")
        run = cls(path, read_only=read_only)
        state = run.state
        if read_only:
            return run
        run._take_lock()
        for name in ("metrics.jsonl", "samples.jsonl", "events.log"):
            trim_torn_line(path / name)
        (path / "checkpoints").mkdir(exist_ok=True)
        run._write_state(
            state.replace(
                status="running",
                ended=None,
                error=None,
                pid=os.getpid(),
                host=socket.gethostname(),
                code=code_version(),
                resumed=state.resumed + 1,
            )
        )
        run.event("resumed", pid=os.getpid(), before=state.status, code=code_version())
        return run

    @property
    def id(self) -> str:
        """The folder's name."""
        return self.path.name

    @property
    def config(self) -> dict[str, Any]:
        """The options as run, from `config.toml`. An option that was None is absent."""
        return read_toml(self.path / "config.toml")

    @property
    def checkpoints(self) -> Path:
        """Folder of the trainer's checkpoints."""
        return self.path / "checkpoints"

    @property
    def report(self) -> Path:
        """Where the run's HTML report goes."""
        return self.path / "report.html"

    @property
    def state(self) -> RunState:
        """What `run.json` says; a run that claims to be running but whose writer is gone reads as interrupted."""
        where = self.path / "run.json"
        state = RunState.from_json(where.read_bytes(), str(where))
        if state.status == "running" and not self._lock.held() and not FileLock.taken(self._lock.path):
            return state.replace(status="interrupted")
        return state

    @property
    def tracker(self) -> JsonlTracker:
        """Writes `metrics.jsonl`."""
        self._check_writable()
        if self._tracker is None:
            self._tracker = RunTracker(self.path / "metrics.jsonl")
        return self._tracker

    def event(self, kind: str, **fields: Any) -> None:
        """Append one line to `events.log`: the time, `kind`, and the fields as `name=<JSON>`."""
        self._append("events.log", Event(time_s=time.time(), kind=kind, fields=fields).to_line())

    def events(self) -> list[Event]:
        """All events so far; a last line cut short by a crash is left out."""
        where = self.path / "events.log"
        text = where.read_text(encoding="utf-8", errors="replace") if where.exists() else ""
        lines = text[: text.rfind("\n") + 1].split("\n")[:-1]
        return [Event.from_line(line, f"{where}:{number}") for number, line in enumerate(lines, 1)]

    def sample(self, record: Record | Mapping[str, Any], *, step: int | None = None) -> None:
        """Append one JSON line to `samples.jsonl`; with `step`, the line carries it (see `truncate_after`)."""
        plain = msgspec.to_builtins(record)
        if step is not None:
            plain = {"step": step, **plain}
        self._append("samples.jsonl", msgspec.json.encode(plain) + b"\n")

    def samples(self) -> list[dict[str, Any]]:
        """All samples so far, as plain values; a last line cut short by a crash is left out."""
        where = self.path / "samples.jsonl"
        return [row for _, row in _rows(where)] if where.exists() else []

    def truncate_after(self, step: int) -> int:
        """Drop metrics and samples of steps later than `step`: what a resumed run is about to do again.

        Each file is replaced in one step. Lines of samples that carry no step stay.

        Returns:
            How many lines were dropped.
        """
        self._check_writable()
        dropped = 0
        for name in ("metrics.jsonl", "samples.jsonl"):
            where = self.path / name
            if not where.exists():
                continue
            rows = _rows(where)
            kept = [line for line, row in rows if not _later(row, step)]
            if len(kept) < len(rows):
                write_atomic(where, b"".join(line + b"\n" for line in kept))
                dropped += len(rows) - len(kept)
        if self._tracker is not None:
            self._tracker.reopen()
        if dropped:
            self.event("truncated", after_step=step, lines=dropped)
        return dropped

    def finish(self, status: Status = "finished", error: str | None = None) -> None:
        """Write how the run ended and let go of it. Only the first call counts."""
        if self.read_only or not self._lock.held():
            return
        if status == "running":
            raise RegistryError("a run finishes as finished, failed or interrupted")
        self.event(status, **({"error": error} if error else {}))
        self._write_state(self.state.replace(status=status, ended=time.time(), error=error))
        self.close()

    def close(self) -> None:
        """Let go of the files and the lock without saying how the run ended."""
        if self._tracker is not None:
            self._tracker.close()
            self._tracker = None
        self._lock.release()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish("finished")
        elif issubclass(kind, KeyboardInterrupt | SystemExit):
            self.finish("interrupted")
        else:
            self.finish("failed", error=f"{kind.__name__}: {error}")
        self.close()

    def _take_lock(self) -> None:
        if not self._lock.acquire():
            raise RegistryError(
                f"run {self.id}: another process is writing it (pid in {self.path / 'run.json'}). "
                "Wait for it, stop it, or start a new run"
            )

    def _check_writable(self) -> None:
        if not self._lock.held():
            why = "opened read-only" if self.read_only else "already finished or closed"
            raise RegistryError(f"run {self.id}: {why}, so it cannot be written. Open it with RunFolder.open(path)")

    def _append(self, name: str, line: bytes) -> None:
        self._check_writable()
        with (self.path / name).open("ab", buffering=0) as file:
            file.write(line)

    def _write_state(self, state: RunState) -> None:
        write_atomic(self.path / "run.json", msgspec.json.format(state.to_json(), indent=2) + b"\n")


def new_run_id(recipe: str, now_s: float | None = None) -> str:
    """A readable id whose names sort by time: `20261120-143205-grpo-3f2a` (UTC)."""
    stamp = datetime.fromtimestamp(time.time() if now_s is None else now_s, UTC).strftime("%Y%m%d-%H%M%S")
    slug = re.sub(r"[^a-z0-9]+", "-", recipe.lower()).strip("-") or "run"
    return f"{stamp}-{slug[:40]}-{secrets.token_hex(2)}"


def list_runs(root: Path) -> list[RunFolder]:
    """All runs under a folder, oldest first, opened read-only."""
    if not root.is_dir():
        return []
    return [RunFolder(path.parent, read_only=True) for path in sorted(root.glob("*/run.json"))]


def _new_folder(root: Path, recipe: str, run_id: str | None) -> Path:
    if run_id is not None and not RUN_ID.match(run_id):
        raise RegistryError(f"run id {run_id!r}: use letters, digits, '.', '_' and '-' (it becomes a folder's name)")
    for _ in range(100):
        path = root / (run_id or new_run_id(recipe))
        try:
            path.mkdir()
        except FileExistsError:
            if run_id is not None:
                raise RegistryError(f"{path}: this run exists. Open it to resume, or choose another id") from None
            continue
        return path
    raise RegistryError(f"{root}: no free run id after 100 tries")


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.to_builtins(config, enc_hook=_encode, str_keys=True)
    return plain


def _encode(value: object) -> str:
    if isinstance(value, Path):
        return str(value)
    raise ConfigError(f"a configuration cannot hold a {type(value).__name__}: {value!r}")


def _toml(plain: dict[str, Any], recipe: str) -> str:
    try:
        return write_toml(plain)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"recipe {recipe!r}: its configuration cannot be written as TOML: {error}") from error


def _rows(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    content = path.read_bytes()
    rows = []
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].split(b"\n")[:-1], 1):
        try:
            rows.append((line, msgspec.json.decode(line, type=dict[str, Any])))
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            raise DataError(f"{path}:{number}: not a JSON object: {error}") from error
    return rows


def _later(row: dict[str, Any], step: int) -> bool:
    value = row.get("step")
    return isinstance(value, int | float) and value > step


def _near_runs(path: Path) -> str:
    names = sorted((entry.parent.name for entry in path.parent.glob("*/run.json")), reverse=True)[:5]
    return f". Runs there: {', '.join(names)}" if names else ""
