"""Ours against the peers, in one run, taking turns: `make bench`.

    python benchmarks/bench.py                          # everything, about an hour on two quiet cores
    python benchmarks/bench.py --only uniform-3m sft    # some: names, or what they begin with
    python benchmarks/bench.py --tiny                   # proves the harness in minutes; its figures mean nothing

Installs the peers (`benchmarks/peers.txt`) into `benchmarks/.venv` unless told of another interpreter that has them.
Each workload gets one process per side, which load the same model folder and the same inputs; the peers' side first
searches its best setting; then the two take turns, at least five times each, the idle one asleep. Writes
`benchmarks/results/<date>.json` with every number and `<date>.md` with the table. Nothing passes or fails here: the
table says which bars hold.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from versus.catalogue import Workload, catalogue, chosen, tiny_catalogue
from versus.inputs import make_inputs, texts_of
from versus.peers import peers_python, versions
from versus.protocol import Worker, WorkerFailed
from versus.results import Result, StartUp, markdown
from versus.shapes import SHAPES, make_folder

HERE = Path(__file__).resolve().parent
SIDES = ("ours", "theirs")
PREPARE_S, RUN_S = 3600.0, 1200.0  # the longest that a side may take
MEMORY_SETTINGS: tuple[dict[str, Any], ...] = (
    {"dtype": "autocast", "rows": "padded", "checkpointing": False},
    {"dtype": "autocast", "rows": "padded", "checkpointing": True},
    {"dtype": "float32", "rows": "padded", "checkpointing": True},
)


def main() -> None:
    """Parse, measure, write."""
    args = _arguments()
    words = [word for word in args.only if word != "start"]
    workloads = chosen(words, tiny_catalogue() if args.tiny else catalogue()) if words or not args.only else []
    data = args.data if args.data and args.data.is_dir() else None
    python = peers_python(HERE, args.peers_python)
    pythons = {"ours": Path(sys.executable), "theirs": python}
    results: list[Result] = []
    failures: dict[str, str] = {}
    facts = {**_facts(args), **versions(pythons)}
    start_ups = [] if args.only and "start" not in args.only else measure_start_ups(args.reps)
    with tempfile.TemporaryDirectory(prefix="versus-") as name:
        root = args.models or Path(name)
        root.mkdir(parents=True, exist_ok=True)
        texts = texts_of(data)
        for workload in workloads:
            print(f"{workload.name} …", file=sys.stderr, flush=True)
            folder = make_folder(SHAPES[workload.shape], root, data, texts)
            try:
                results.append(measure(workload, folder, data, pythons, args))
            except WorkerFailed as failure:
                failures[workload.name] = str(failure)
                print(f"  {failure}", file=sys.stderr)
            else:
                print(markdown(results[-1:], [], {}, {"date": ""}).splitlines()[5], file=sys.stderr, flush=True)
            write(args.out, results, start_ups, failures, facts)
    write(args.out, results, start_ups, failures, facts)
    print((args.out / f"{facts['date']}.md").read_text(encoding="utf-8"))


def measure(
    workload: Workload, folder: Path, data: Path | None, pythons: dict[str, Path], args: argparse.Namespace
) -> Result:
    """One workload: both sides made ready, then turn by turn.

    Raises:
        WorkerFailed: a side cannot do it.
    """
    inputs = make_inputs(workload, folder, data, args.seed)
    if args.dtype:
        inputs["dtype"] = args.dtype
    if workload.measure == "memory":
        return measure_memory(workload, inputs, pythons, args)
    with workers(pythons, workload.to_dict(), inputs, args) as (sides, ready):
        measured: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        peak: dict[str, float] = {}
        before = _processor_times()
        for repetition in range(args.reps):
            for dtype, rate in sides["ours"].ask({"do": "peak"}, timeout_s=RUN_S).items():
                peak[dtype] = max(peak.get(dtype, 0.0), rate)
            for side in SIDES if repetition % 2 == 0 else SIDES[::-1]:
                measured[side].append(_checked(side, sides[side].ask({"do": "run"}, timeout_s=RUN_S), inputs["work"]))
        load = _others_share(before, _processor_times(), [one["cpu_s"] for side in SIDES for one in measured[side]])
    return Result(
        workload=workload,
        ours=measured["ours"],
        theirs=measured["theirs"],
        peak=peak,
        flops=inputs["flops"],
        settings={side: ready[side]["setting"] for side in SIDES},
        tried=ready["theirs"]["tried"],
        load=load,
    )


def measure_memory(
    workload: Workload, inputs: dict[str, Any], pythons: dict[str, Path], args: argparse.Namespace
) -> Result:
    """Peak memory of a fresh process per repetition; the peers' best of a few settings, each in its own processes."""

    def peaks(side: str, candidate: dict[str, Any], reps: int) -> tuple[list[dict[str, float]], dict[str, Any]]:
        found, setting = [], {}
        spec = workload.to_dict()
        spec["sizes"] = {**spec["sizes"], "candidates": candidate}
        for _ in range(reps):
            with workers({side: pythons[side]}, spec, inputs, args) as (sides, ready):
                found.append(_checked(side, sides[side].ask({"do": "run"}, timeout_s=RUN_S), inputs["work"]))
                setting = ready[side]["setting"]
        return found, setting

    tried = []
    for candidate in MEMORY_SETTINGS:
        try:
            tried.append({**candidate, "peak_rss": peaks("theirs", candidate, 1)[0][0]["peak_rss"]})
        except WorkerFailed as failure:
            tried.append({**candidate, "error": str(failure)})
    works = [one for one in tried if "peak_rss" in one]
    if not works:
        raise WorkerFailed(f"no setting works: {tried}")
    least = min(works, key=lambda one: one["peak_rss"])
    candidate = {name: least[name] for name in MEMORY_SETTINGS[0]}
    reps = max(2, args.reps // 2)  # memory hardly varies
    ours, our_setting = peaks("ours", {}, reps)
    theirs, their_setting = peaks("theirs", candidate, reps)
    return Result(
        workload=workload,
        ours=ours,
        theirs=theirs,
        peak={},
        flops=None,
        settings={"ours": our_setting, "theirs": their_setting},
        tried=tried,
    )


@contextmanager
def workers(
    pythons: dict[str, Path], workload: dict[str, Any], inputs: dict[str, Any], args: argparse.Namespace
) -> Iterator[tuple[dict[str, Worker], dict[str, dict[str, Any]]]]:
    """A process per side, both ready."""
    sides: dict[str, Worker] = {}
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
        json.dump(inputs, file)
        file.flush()
        try:
            ready = {}
            for side, python in pythons.items():
                script = HERE / "versus" / f"{side}.py"
                search = not args.no_search
                sides[side] = Worker(
                    python, script, threads=args.threads, log=args.log, search=search, clock=args.clock
                )
                command = {"do": "prepare", "workload": workload, "inputs": file.name}
                ready[side] = sides[side].ask(command, timeout_s=PREPARE_S)
            yield sides, ready
        finally:
            for worker in sides.values():
                worker.close()


def measure_start_ups(reps: int) -> list[StartUp]:
    """`import posttrain` and `posttrain --help`, as a shell sees them."""
    commands = {
        "import posttrain": ([sys.executable, "-c", "import posttrain"], 0.5, 0.2),
        "posttrain --help": ([str(Path(sys.executable).with_name("posttrain")), "--help"], 0.7, 0.3),
    }
    found = []
    for name, (command, bar, aim) in commands.items():
        seconds = []
        for _ in range(reps + 1):
            started_s = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds.append(time.perf_counter() - started_s)
        found.append(StartUp(name=name, seconds=seconds[1:], bar=bar, aim=aim))  # the first fills the disk's cache
    return found


def write(
    out: Path,
    results: Sequence[Result],
    start_ups: Sequence[StartUp],
    failures: dict[str, str],
    facts: dict[str, Any],
) -> None:
    """Both files, rewritten after every workload, so that an interrupted run leaves what it has."""
    out.mkdir(parents=True, exist_ok=True)
    found = {
        "facts": facts,
        "results": [result.to_dict() for result in results],
        "start_ups": [start.to_dict() for start in start_ups],
        "failures": failures,
    }
    (out / f"{facts['date']}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (out / f"{facts['date']}.md").write_text(markdown(results, start_ups, failures, facts), encoding="utf-8")


def _checked(side: str, answer: dict[str, Any], work: float) -> dict[str, float]:
    if answer["work"] != work:
        raise WorkerFailed(f"{side}: did {answer['work']:g} units of work, not {work:g}")
    return answer


def _facts(args: argparse.Namespace) -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    return {
        "date": args.name or datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "machine": f"{model}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}",
        "threads": args.threads,
        "repetitions": args.reps,
        "load average at the start": round(os.getloadavg()[0], 2),
        "commit": _commit(),
    }


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def _processor_times() -> tuple[float, float]:
    """Seconds since boot that all processors were busy, and in all."""
    fields = [int(field) for field in Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]]
    tick = os.sysconf("SC_CLK_TCK")
    return (sum(fields) - fields[3] - fields[4]) / tick, sum(fields) / tick


def _others_share(before: tuple[float, float], after: tuple[float, float], own: Sequence[float]) -> float:
    """Which part of the processors others had; what is left of `busy` without the runs themselves."""
    busy, whole = after[0] - before[0], after[1] - before[1]
    return max(0.0, busy - sum(own)) / max(whole, 1e-9)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], help="workloads, or what their names begin with; start")
    parser.add_argument("--reps", type=int, default=5, help="repetitions of each side")
    parser.add_argument("--tiny", action="store_true", help="the same kinds in a size of seconds")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each side's products")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="one precision on both sides")
    parser.add_argument("--no-search", action="store_true", help="the peers take their first setting")
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="of the search: cpu on a machine that others use too"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peers-python", type=Path, help="an interpreter that has the peers; none is installed")
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data", help="folder of real rows")
    parser.add_argument("--models", type=Path, help="folder to keep the models in between runs")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--name", help="of the files; default today's date")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    args.log = args.out / "workers.log"
    return args


if __name__ == "__main__":
    main()
