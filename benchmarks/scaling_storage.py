"""How the registry and the interaction log scale with rows, and the memory of a data mixture with its file."""

from __future__ import annotations

import json
import sqlite3
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from posttrain.core import Feedback, Interaction, Message, Sampling, StopReason, generator
from posttrain.feedback import FeedbackStore
from posttrain.registry import Registry

Point = tuple[float, float]
Series = dict[str, list[Point]]
BATCH = 1000  # interactions per transaction while filling


def interaction_log(folder: Path, sizes: Sequence[int]) -> tuple[Series, Series]:
    """Rows stored per second, and milliseconds of queries, at each number of rows."""
    rates: Series = {"log_many, 1,000 a transaction": [], "log, one by one": []}
    latencies: Series = {"interaction": [], "newest page of 100": [], "page of a model": [], "add feedback": []}
    with FeedbackStore(folder / "feedback.db") as store:
        held = 0
        for size in sorted(sizes):
            started_s, before = time.perf_counter(), held
            while held < size:
                count = min(BATCH, size - held)
                store.log_many([_interaction(held + place) for place in range(count)])
                held += count
            rates["log_many, 1,000 a transaction"].append((size, (held - before) / (time.perf_counter() - started_s)))
            draw = generator(size, "scaling")
            started_s = time.perf_counter()
            for place in range(20):
                store.log(_interaction(held + place))
            held += 20
            rates["log, one by one"].append((size, 20 / (time.perf_counter() - started_s)))
            chosen = [f"chatcmpl-{draw.randrange(size)}" for _ in range(20)]
            ids = iter(chosen)
            latencies["interaction"].append((size, _ms(lambda: store.interaction(next(ids)))))
            since_s = float(size - 100)
            latencies["newest page of 100"].append((size, _ms(lambda: store.interactions(since_s=since_s, limit=100))))
            latencies["page of a model"].append((size, _ms(lambda: store.interactions("model-3", limit=100))))
            names = iter(range(20))
            latencies["add feedback"].append(
                (
                    size,
                    _ms(
                        lambda: store.add(
                            Feedback(
                                id=f"{size}-{(place := next(names))}",
                                completion_id=chosen[place],
                                kind="thumb",
                                value=True,
                            )
                        )
                    ),
                )
            )
    return rates, latencies


def registry(folder: Path, sizes: Sequence[int]) -> Series:
    """Milliseconds of the registry's calls at each number of artifacts.

    It is filled behind its back, in its own schema: registering one artifact after the other, each safely on disk,
    would take hours and says nothing more.
    """
    path = folder / "registry.db"
    latencies: Series = {"add_artifact": [], "artifact by id": [], "artifact by prefix": [], "artifact by name": []}
    latencies["lineage"] = []
    with Registry(path):
        pass  # makes the tables
    held = 0
    for size in sorted(sizes):
        _fill(path, held, size)
        held = size
        draw = generator(size, "scaling")
        places = [draw.randrange(size) for _ in range(20)]
        with Registry(path) as kept:
            for name, ask in (
                ("add_artifact", lambda place: kept.add_artifact(f"{size} {place}".encode(), kind="note", name="note")),
                ("artifact by id", lambda place: kept.artifact(_artifact_id(place))),
                ("artifact by prefix", lambda place: kept.artifact(_artifact_id(place)[:20])),
                ("artifact by name", lambda place: kept.artifact(f"name-{place}")),
                ("lineage", lambda place: kept.lineage(_artifact_id(place))),
            ):
                rest: Iterator[int] = iter(places)
                latencies[name].append((size, _ms(lambda: ask(next(rest)))))
    return latencies


def mixture_memory(folder: Path, sizes: Sequence[int]) -> list[Point]:
    """Peak memory in MB of a process that draws every row of a file of so many bytes, mixed with a small one."""
    small, large = folder / "small.jsonl", folder / "large.jsonl"
    small.write_text("".join(_row(place) for place in range(1000)), encoding="utf-8")
    found = []
    for size in sorted(sizes):
        rows = _grow(large, size)
        done = subprocess.run(
            [sys.executable, "-c", _DRAW, str(large), str(small), str(rows * 4 // 3)],
            check=True,
            capture_output=True,
            text=True,
        )
        found.append((size / 1e6, float(done.stdout.split()[-1]) / 1e6))
    large.unlink()
    return found


_DRAW = """
import sys
from posttrain.data import Mixture, stream
large, small, draws = sys.argv[1], sys.argv[2], int(sys.argv[3])
mixture = Mixture([(stream(large, kind="completion"), 3), (stream(small, kind="completion"), 1)], seed=0)
for _ in range(draws):
    next(mixture)
lines = open("/proc/self/status").read().splitlines()
print(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")))
"""


def _row(place: int) -> str:
    draw = generator(place % 97, "row")
    words = " ".join(f"word{draw.randrange(1000)}" for _ in range(120))
    return json.dumps({"prompt": f"{place}: {words[:200]}", "completion": words}) + "\n"


def _grow(path: Path, size: int) -> int:
    """Append rows until the file has `size` bytes; how many rows it has then."""
    block = "".join(_row(place) for place in range(100)).encode()
    with path.open("ab") as file:
        while file.tell() < size:
            file.write(block)
        return file.tell() // len(block) * 100


def _interaction(place: int) -> Interaction:
    return Interaction(
        id=f"chatcmpl-{place}",
        choice=0,
        model=f"model-{place % 7}",
        model_name=f"shop-{place % 7}",
        messages=(Message(role="user", content=f"How many orders of customer {place} are open?"),),
        prompt=f"How many orders of customer {place} are open?",
        prompt_tokens=tuple(range(40)),
        tokens=tuple(range(place % 50, place % 50 + 60)),
        logprobs=tuple(-0.01 * step for step in range(60)),
        text="SELECT count(*) FROM orders WHERE open",
        stop_reason=StopReason.EOS,
        sampling=Sampling(max_tokens=64),
        created_s=float(place),
    )


def _artifact_id(place: int) -> str:
    return f"{place * 2654435761 % (1 << 64):016x}" + f"{place:048x}"


def _fill(path: Path, held: int, size: int) -> None:
    """Artifacts with names; each was made from the one at half its number."""
    connection = sqlite3.connect(path)
    with connection:
        connection.executemany(
            "INSERT INTO artifacts (id, kind, name, path, storage, num_bytes, files, meta, code, run, created_s)"
            " VALUES (?, 'model', ?, ?, 'reference', 1, '{}', '{}', '{}', NULL, ?)",
            ((_artifact_id(place), f"name-{place}", f"nowhere/{place}", float(place)) for place in range(held, size)),
        )
        connection.executemany(
            "INSERT INTO names (name, artifact) VALUES (?, ?)",
            ((f"name-{place}", _artifact_id(place)) for place in range(held, size)),
        )
        connection.executemany(
            "INSERT INTO parents (child, parent, seq) VALUES (?, ?, 0)",
            ((_artifact_id(place), _artifact_id(place // 2)) for place in range(max(1, held), size)),
        )
    connection.close()


def _ms(ask: Callable[[], object], times: int = 20) -> float:
    """Milliseconds of a call, the median."""
    seconds = []
    for _ in range(times):
        started_s = time.perf_counter()
        ask()
        seconds.append(time.perf_counter() - started_s)
    return 1000 * statistics.median(seconds)
