"""`posttrain doctor`: looks for what goes wrong silently, in the environment, a model, a data file and the graders."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.cli.check import Check, ok, problem, warning
from posttrain.cli.printing import print_json
from posttrain.core import UsageError

if TYPE_CHECKING:
    from posttrain.core import Grader

KINDS = ("text", "prompt", "completion", "preference", "unpaired")
EXTRAS = {
    "data": ("pyarrow",),
    "hub": ("huggingface_hub",),
    "instructions": ("langdetect",),
    "math": ("math_verify",),
    "postgres": ("psycopg",),
    "schema": ("jsonschema",),
    "serve": ("httpx", "starlette", "uvicorn"),
}
BF16_TOLERANCE = 0.1  # of the spread of the product; rounding the factors costs about 0.01
MARKS = {"ok": "ok     ", "warning": "warning", "problem": "PROBLEM"}


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `doctor`."""
    parser = commands.add_parser(
        "doctor",
        help="check the environment, a model, data and graders for what goes wrong silently",
        description="Check the environment and, where named, a model folder, a data file and the graders. "
        "Exit code 1: there is a problem.",
    )
    parser.add_argument("--model", help="folder of a model, or a Hugging Face name")
    parser.add_argument("--template", type=Path, help="a chat template file that replaces the model's own")
    parser.add_argument(
        "--data", type=Path, help="training or evaluation rows; with --model also what is trained of them"
    )
    parser.add_argument("--columns", help="of --data: which columns to read, as prompt=question,completion=answer")
    parser.add_argument("--kind", choices=KINDS, help="of --data: what to make of the rows")
    parser.add_argument("--chat", action="store_true", help="of --data: make text a conversation, as recipes do")
    parser.add_argument("--limit", type=int, default=1000, help="of --data: rows to look at (default: 1000)")
    parser.add_argument("--graders", action="store_true", help="have every built-in grader prove itself")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(action=doctor)


def doctor(chosen: argparse.Namespace) -> int:
    """Run the checks that were asked for; 1 if there is a problem."""
    if chosen.data is None and (chosen.columns or chosen.kind or chosen.chat):
        raise UsageError("--columns, --kind and --chat speak of --data")
    checks = check_environment()
    renderer = None
    max_positions = None
    if chosen.model is not None:
        from posttrain.cli.doctor_model import check_model

        found = check_model(chosen.model, chosen.template)
        checks += found.checks
        renderer, max_positions = found.renderer, found.max_positions
    if chosen.data is not None:
        from posttrain.cli.doctor_data import check_data

        checks += check_data(
            chosen.data,
            renderer=renderer,
            max_positions=max_positions,
            columns=chosen.columns,
            kind=chosen.kind,
            chat=chosen.chat,
            limit=chosen.limit,
        )
    if chosen.graders:
        checks += check_graders()
    _print(checks, as_json=chosen.json)
    return int(any(check.status == "problem" for check in checks))


def _print(checks: Sequence[Check], *, as_json: bool) -> None:
    if as_json:
        print_json(checks)
        return
    for check in checks:
        first, *rest = check.detail.split("\n")
        print(f"{MARKS[check.status]}  {check.name}: {first}")
        for line in rest:
            print(f"           {line}")
        if check.advice:
            print(f"         → {check.advice}")
    counts = {status: sum(check.status == status for check in checks) for status in MARKS}
    print(f"\n{counts['ok']} ok, {counts['warning']} warnings, {counts['problem']} problems")


def check_environment() -> list[Check]:
    """Python, torch, matrix products in bfloat16, optional packages, the sandbox."""
    return [check_python(), check_torch(), check_bfloat16(), check_extras(), check_sandbox()]


def check_python() -> Check:
    """Versions of the interpreter and of the package."""
    version = platform.python_version()
    return ok("python", f"{version}, posttrain {importlib.metadata.version('posttrain')}, {platform.machine()}")


def check_torch() -> Check:
    """PyTorch, its threads and devices."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    detail = f"{torch.__version__}, {threads} threads on {cores} cores, GPUs: {', '.join(devices) or 'none'}"
    if threads > cores:
        return warning("torch", detail, f"more threads than cores slow each other down: set OMP_NUM_THREADS={cores}")
    return ok("torch", detail)


def check_bfloat16() -> Check:
    """Whether products in bfloat16 are right, and whether the processor has instructions for them."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    left, right = (torch.randn(64, 64, generator=torch.Generator().manual_seed(seed)).to(device) for seed in (0, 1))
    product = (left.bfloat16() @ right.bfloat16()).float()
    error = float((product - left @ right).abs().max() / (left @ right).std())
    if not error < BF16_TOLERANCE:
        detail = f"a product in bfloat16 is off by {error:.2g} of its spread on {device}"
        return problem("bfloat16", detail, "train and sample with --dtype float32")
    if device == "cuda":
        return ok("bfloat16", f"products are right on {device}")
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text(encoding="utf-8", errors="replace").split()) if info.exists() else set()
    quick = sorted(flags & {"avx512_bf16", "amx_bf16", "bf16"})
    if quick:
        return ok("bfloat16", f"products are right on {device}; the processor has {', '.join(quick)}")
    return ok(
        "bfloat16", f"products are right on {device}", "no instructions for it were seen; float32 may be as quick"
    )


def check_extras() -> Check:
    """Which optional packages are there."""
    missing = {
        extra: absent
        for extra, packages in EXTRAS.items()
        if (absent := [package for package in packages if importlib.util.find_spec(package) is None])
    }
    there = [extra for extra in EXTRAS if extra not in missing]
    detail = f"installed: {', '.join(there) or 'none'}"
    if not missing:
        return ok("optional packages", detail)
    lacking = ", ".join(f"{extra} ({', '.join(packages)})" for extra, packages in missing.items())
    return ok(
        "optional packages", f"{detail}; not installed: {lacking}", f"pip install 'posttrain[{','.join(missing)}]'"
    )


def check_sandbox() -> Check:
    """Whether what a model wrote can be run where it does no harm."""
    from posttrain.grade import Sandbox, SandboxUnavailable

    sandbox = Sandbox()
    try:
        sandbox.start()
    except SandboxUnavailable as error:
        return warning("sandbox", str(error), "without it graders that run programs refuse to work")
    finally:
        sandbox.close()
    return ok("sandbox", f"model-written programs run with all layers: {', '.join(sandbox.layers)}")


def check_graders() -> list[Check]:
    """Every built-in grader on its own cases."""
    from posttrain.grade import all_graders

    return [check_grader(grader) for grader in all_graders()]


def check_grader(grader: Grader) -> Check:
    """One grader on its own cases: gold answers score, near misses do not."""
    from posttrain.grade import ProofReport, prove

    def num_cases(report: ProofReport) -> int:
        return len(report.cases) + sum(map(num_cases, report.parts))

    report = prove(grader)
    name = f"grader {grader.name}"
    if report.problems:
        detail = "\n".join([f"{len(report.problems)} problems in {num_cases(report)} cases", *report.problems])
        return problem(name, detail, "correct the grader or its cases before training with it")
    return ok(name, f"{num_cases(report)} of {num_cases(report)} cases hold")
