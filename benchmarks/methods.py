"""Every method of the project from the same start on the same small tasks: what each gains, how surely, at what cost.

    python benchmarks/methods.py                      # all, four minutes on one quiet core
    python benchmarks/methods.py --only sft dpo grpo  # some (whole names, or families such as distillation)
    python benchmarks/methods.py --list

Each method runs as a user would run it, by its recipe. The tuned model answers 600 held-out questions greedily and is
compared with the start question by question (paired bootstrap, McNemar's exact test); it also samples, whose accuracy
is what reinforcement learning raises. The KL to the start is measured on the tuned model's own answers to a fixed set
of prompts. Writes a table to benchmarks/results/methods.md and all numbers to methods.json. One small world: it
shows that methods work and what they cost, not which is best for a model of yours.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from methods_entries import BETA, Entry, entries
from methods_world import MAX_TOKENS, World, make_world

from posttrain.cli.run import find_recipe
from posttrain.core import EvalReport, Sampling, read_metrics
from posttrain.evaluate import Suite, compare, run_suite_sync
from posttrain.grade import Exact
from posttrain.recipes.kl_spent import fixed_prompts, kl_spent_sync
from posttrain.recipes.policy import Policy, load_policy

HERE = Path(__file__).resolve().parent
COMPARED = "comparison.json"  # what the recipes of reward models write


def evaluated(policy: Policy, world: World, name: str) -> tuple[EvalReport, EvalReport]:
    """Greedy answers, and four samples to each held-out question."""
    stops = tuple(sorted(policy.renderer.stop_tokens))
    greedy = Sampling(max_tokens=MAX_TOKENS, temperature=0.0, stop_tokens=stops)
    drawn = Sampling(max_tokens=MAX_TOKENS, n=4, seed=0, stop_tokens=stops)
    with policy.engine(slots=128, length=32, inline=True) as engine:
        reports = [
            run_suite_sync(
                Suite("held-out", world.held_out, sampling, Exact()), engine, policy.renderer.prompt, model=name
            )
            for sampling in (greedy, drawn)
        ]
    return reports[0], reports[1]


def run_entry(entry: Entry, world: World, models: Mapping[str, Path], runs: Path, log: Path, seed: int) -> Path:
    """Run the recipe of one entry; what it says goes to the log. The run's folder."""
    recipe = find_recipe(entry.recipe)
    known = {option.name for option in recipe.options}
    options = {"runs": str(runs), "seed": seed, "kl_prompts": 0, **entry.options(world, models)}
    values = {
        name: value for name, value in options.items() if name in known or name not in ("dtype", "seed", "kl_prompts")
    }
    with log.open("w", encoding="utf-8") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        found: Path = recipe.run_with(values)
    return found


def measured(entry: Entry, run: Path, world: World, start: Policy, before: Sequence[EvalReport]) -> dict[str, Any]:
    """What one run gained and spent."""
    if entry.report:  # a reward model: its held-out pairs or answers, against its head as it was drawn
        report, against = (json.loads((run / name).read_text(encoding="utf-8")) for name in (entry.report, COMPARED))
        paired = {name: against[name] for name in ("difference", "wins", "losses", "p_value", "better")}
        return {"report": report, "accuracy": report["accuracy"], **paired}
    policy = load_policy(str(run / "model"))
    greedy, drawn = evaluated(policy, world, entry.name)
    against = compare(greedy, before[0])
    spent = kl_spent_sync(policy, start.model, fixed_prompts(world.held_out, 64), samples=4, max_tokens=MAX_TOKENS)
    metrics = read_metrics(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else []
    return {
        "accuracy": greedy.metrics["accuracy"].to_dict(),
        "sampled_mean": _share(drawn),
        "difference": against.difference.to_dict(),
        "wins": against.wins,
        "losses": against.losses,
        "p_value": against.p_value,
        "better": against.better,
        "kl": spent.metrics(),
        "steps": metrics[-1].get("step") if metrics else None,
    }


def _share(report: EvalReport) -> float:
    return sum((sample.grade.score or 0.0) >= 1 for sample in report.samples) / len(report.samples)


def holm(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Each method's p-value, corrected for all that are in the table (Holm, 1979); 1 where the tuned model is worse."""
    tested = [row for row in rows if "p_value" in row]
    raw = {row["name"]: row["p_value"] if row["wins"] > row["losses"] else 1.0 for row in tested}
    found: dict[str, float] = {}
    for place, name in enumerate(sorted(raw, key=lambda name: raw[name])):
        before = max(found.values(), default=0.0)
        found[name] = max(before, min(1.0, (len(raw) - place) * raw[name]))
    return found


def table(rows: Sequence[Mapping[str, Any]], before: Mapping[str, Any]) -> str:
    """The rows as Markdown."""
    head = "| method | family | learns from | greedy accuracy | difference to the start | p | sampled | KL/answer | s |"
    lines = [head, "|---|---|---|---|---|---|---|---|---|"]
    for name, found in before.items():
        cells = f"{_interval(found['accuracy'])} | – | – | {found['sampled_mean']:.1%}"
        lines.append(f"| {name} | – | – | {cells} | {'0' if name == 'start' else '–'} | – |")
    for row in rows:
        cells = [row["name"], row["family"], row["learns_from"]]
        if "error" in row:
            cells += [f"failed: {row['error'].splitlines()[0][:100]}", "", "", "", ""]
        else:
            cells += [
                _interval(row["accuracy"]) + (" †" if "report" in row else ""),
                _interval(row["difference"], sign=True) + (" ✓" if row["better"] else ""),
                f"{row['p_value']:.2g}",
                f"{row['sampled_mean']:.1%}" if "sampled_mean" in row else "–",
                f"{row['kl']['kl_spent/per_answer']:.2f}" if "kl" in row else "–",
            ]
        lines.append("| " + " | ".join([*cells, f"{row['seconds']:.0f}"]) + " |")
    return "\n".join(lines) + "\n"


def _interval(found: Mapping[str, Any], sign: bool = False) -> str:
    form = "+.1%" if sign else ".1%"
    return f"{found['value']:{form}} [{found['low']:{form}}, {found['high']:{form}}]"


def chosen(only: Sequence[str]) -> list[Entry]:
    """The entries that are asked for, and those that they need."""
    known = entries()
    odd = set(only) - {entry.name for entry in known} - {entry.family for entry in known}
    if odd:
        sys.exit(f"no method or family {', '.join(sorted(odd))}; there are: {', '.join(e.name for e in known)}")
    wanted = {entry.name for entry in known if not only or entry.name in only or entry.family in only}
    wanted |= {need for entry in known if entry.name in wanted for need in entry.needs}
    return sorted((entry for entry in known if entry.name in wanted), key=lambda entry: bool(entry.needs))


def main() -> int:
    """Run what is asked for; 1 where a method failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="names or families")
    parser.add_argument("--list", action="store_true", help="say what there is, and do nothing")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--work", type=Path, help="folder of the world and the runs; kept. Default: in --out")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.list:
        print("\n".join(f"{entry.family:<13} {entry.name}" for entry in entries()))
        return 0
    work = options.work or options.out / "work"
    runs = work / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    world = make_world(work / f"world-{options.seed}", seed=options.seed)
    start = load_policy(str(world.start))
    before = evaluated(start, world, "start")
    both = {"start": before, "teacher": evaluated(load_policy(str(world.teacher)), world, "teacher")}
    summary = {
        name: {"accuracy": reports[0].metrics["accuracy"].to_dict(), "sampled_mean": _share(reports[1])}
        for name, reports in both.items()
    }
    print(table([], summary), end="", flush=True)
    models: dict[str, Path] = {"start": world.start}
    rows: list[dict[str, Any]] = []
    for number, entry in enumerate(chosen(options.only)):
        row: dict[str, Any] = {"name": entry.name, "family": entry.family, "learns_from": entry.learns_from}
        row |= {"note": entry.note} if entry.note else {}
        started = time.monotonic()
        try:
            run = run_entry(entry, world, models, runs, work / f"{number:02d}.log", options.seed)
            row["seconds"] = time.monotonic() - started
            models[entry.name] = run / "model"
            row |= measured(entry, run, world, start, before)
        except Exception as error:  # noqa: BLE001  one method's failure is a row, and the others go on
            row |= {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
            row.setdefault("seconds", time.monotonic() - started)
        rows.append(row)
        print(table([row], summary).splitlines()[-1], flush=True)
        facts = {"seed": options.seed, "threads": torch.get_num_threads(), "cpus": os.cpu_count()}
        facts |= {"load": os.getloadavg(), "seconds": time.monotonic() - begun}
        write_results(options.out, facts, summary, rows)
    print(f"{time.monotonic() - begun:.0f} s; {options.out / 'methods.md'}")
    return int(any("error" in row for row in rows))


def write_results(
    out: Path, facts: Mapping[str, Any], summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> None:
    """The table and all numbers, of the methods that have run so far."""
    whole = {**facts, "start": summary, "methods": rows}
    (out / "methods.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    tests = sum("p_value" in row for row in rows)
    open_rows = [name for name, p_value in holm(rows).items() if p_value >= 0.05]
    note = (
        f"Seed {facts['seed']}, {facts['threads']} threads, load {facts['load'][0]:.1f}, {facts['seconds']:.0f} s in "
        "all. Intervals are 95 %, Wilson's for accuracies and a paired bootstrap's for differences; p is McNemar's "
        f"for one comparison. Corrected over the {tests} of this table (Holm), it is below 0.05 for all gains"
        + (f" but {', '.join(open_rows)}" if open_rows else "")
        + ". KL "
        "to the start in nats per answer of five tokens. Seconds are of the recipe, its start-up included. Preference "
        f"methods with a reference and a published β below {BETA:g} have β {BETA:g} here where no note says otherwise: "
        "answers are short. † Of reward models the share of held-out pairs, or steps, told rightly, against the head "
        "as it was drawn; pairs, or answers with their steps, are compared one by one.\n"
    )
    note += "".join(f"\n- {row['name']}: {row['note']}" for row in rows if row.get("note")) + "\n"
    (out / "methods.md").write_text(f"{table(rows, summary)}\n{note}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
