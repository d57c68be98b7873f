"""What a decoding step, a read prompt and a training step cost, in counts: `make bench-quick`.

    python benchmarks/quick.py             # compare with benchmarks/baseline.json; status 1 where a count rose
    python benchmarks/quick.py --update    # make what is now the baseline
    python benchmarks/quick.py --ops       # also which operators there are

Counted on small models of fixed shapes, in about a minute: operators, bytes of new tensors, oneDNN primitives and
Python calls per step. Seconds are printed beside them and judged by nobody. A count may rise by its tolerance; one that
falls by more is reported, so that the baseline can follow.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from op_counts import Counts, count

from posttrain import models, objectives
from posttrain.core import Example, Sampling, TokenSequence, generator
from posttrain.engine import LocalEngine
from posttrain.train import Objective, TrainConfig, Trainer, nll_objective, policy_objective, preference_objective

BASELINE = Path(__file__).resolve().parent / "baseline.json"
TOLERANCE = {
    "ops": 0.01,
    "new_bytes": 0.05,
    "onednn": 0.01,
    "onednn_created": 0.1,
    "python_calls": 0.03,
    "modules": 0.02,
}
CONFIG = models.DecoderConfig(
    family="qwen2",
    vocab_size=1024,
    width=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    mlp_width=352,
    max_positions=1024,
    qkv_bias=True,
    tie_embeddings=True,
    eos_ids=(0,),
)

Measured = dict[str, float]


class Ids:
    """A tokenizer that has nothing to say."""

    vocab_size = CONFIG.vocab_size
    eos_ids = frozenset({0})

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Never asked."""
        raise NotImplementedError

    def decode(self, tokens: Any, *, skip_special_tokens: bool = True) -> str:
        """No text."""
        return ""


def decode_steps(show: Callable[[str, Counter[str]], None]) -> dict[str, Measured]:
    """One step of 64 running rows, and reading 64 prompts, in bf16 and fp32.

    A step is the difference between completions of 48 and of 16 tokens, over 32.
    """
    found = {}
    draw = generator(0, "quick")
    prompts = [[draw.randrange(1, CONFIG.vocab_size) for _ in range(24)] for _ in range(64)]
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", None)):
        model = models.Decoder.random(CONFIG, 0)
        engine = LocalEngine(model, Ids(), max_batch=64, max_length=96, dtype=dtype, inline=True)

        def write(tokens: int) -> None:
            engine.generate(prompts, Sampling(max_tokens=tokens, ignore_eos=True, seed=0))

        write(48)
        (short, _), (long, ops) = count(lambda: write(16)), count(lambda: write(48))
        seconds = [_seconds(lambda: write(tokens)) for tokens in (16, 48)]
        show(f"sampling {name}, 48 tokens", ops)
        found[f"decode step, 64 rows, {name}"] = _measured((long - short) / 32, (seconds[1] - seconds[0]) / 32)
        found[f"read 64 prompts and 16 tokens, {name}"] = _measured(short, seconds[0])
    return found


def training_steps(show: Callable[[str, Counter[str]], None]) -> dict[str, Measured]:
    """One optimiser step on 32 rows of SFT, on 16 pairs of DPO, on 32 samples of a policy gradient."""
    draw = generator(1, "quick")
    lengths = [16 + draw.randrange(112) for _ in range(32)]
    rows = [_sequence(draw, length) for length in lengths]
    supervised = [Example(id=str(place), sequences=(row,)) for place, row in enumerate(rows)]
    pairs = [
        Example(
            id=str(place), sequences=tuple(_with(row, ref_logprobs=-7.0) for row in rows[2 * place : 2 * place + 2])
        )
        for place in range(16)
    ]
    sampled = [
        Example(id=str(place), sequences=(_with(row, advantages=0.5, sampler_logprobs=-7.0),), group=str(place // 4))
        for place, row in enumerate(rows)
    ]
    cases: dict[str, tuple[Objective, list[Example], bool]] = {
        "SFT step, 32 rows": (nll_objective, supervised, False),
        "DPO step, 16 pairs": (preference_objective(partial(objectives.dpo_losses, beta=0.1), beta=0.1), pairs, False),
        "policy step, 32 samples": (policy_objective(importance_cap=2.0), sampled, True),
    }
    found = {}
    for name, (objective, examples, entropy) in cases.items():
        config = TrainConfig(lr=1e-6, dtype="bfloat16", micro_tokens=1024, entropy=entropy)
        trainer = Trainer(models.Decoder.random(CONFIG, 0), config, objective)
        for _ in range(2):
            trainer.step(examples)
        counts, ops = count(lambda: trainer.step(examples))
        show(name, ops)
        found[f"{name}, bf16"] = _measured(counts, _seconds(lambda: trainer.step(examples)))
    return found


def imports() -> dict[str, Measured]:
    """Modules that `import posttrain` and `posttrain --help` load."""
    found = {}
    for name, code in (
        ("import posttrain", "import posttrain"),
        ("posttrain --help", "import sys; sys.argv = ['posttrain', '--help']; from posttrain.cli import main; main()"),
    ):
        script = f"import sys, atexit; atexit.register(lambda: print(len(sys.modules), file=sys.stderr)); {code}"
        started_s = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
        seconds = time.perf_counter() - started_s
        found[name] = {"modules": float(done.stderr.split()[-1]), "seconds": seconds}
    return found


def compare(now: Mapping[str, Measured], before: Mapping[str, Measured]) -> tuple[list[str], list[str]]:
    """Counts that rose past their tolerance, and those that fell past it, as lines to read."""
    rose, fell = [], []
    for name, measured in now.items():
        for what, tolerance in TOLERANCE.items():
            if what not in measured or what not in before.get(name, {}):
                continue
            value, old = measured[what], before[name][what]
            line = f"{name}: {what} {old:,.1f} → {value:,.1f}"
            if value > old * (1 + tolerance) + 0.5:
                rose.append(line)
            elif value < old * (1 - tolerance) - 0.5:
                fell.append(line)
    return rose, fell


def main() -> int:
    """Count, print, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="make what is now the baseline")
    parser.add_argument("--ops", action="store_true", help="print which operators there are")
    parser.add_argument("--baseline", type=Path, default=BASELINE)
    args = parser.parse_args()
    torch.set_num_threads(1)  # some operators are split by threads

    def show(name: str, ops: Counter[str]) -> None:
        if args.ops:
            print(f"\n{name}:")
            print("\n".join(f"  {times:>6} {op}" for op, times in ops.most_common(25)))

    now = {**decode_steps(show), **training_steps(show), **imports()}
    print(f"\n{'per step':<42} {'ops':>8} {'new MB':>8} {'oneDNN':>8} {'compiled':>8} {'calls':>8} {'ms':>8}")
    for name, one in now.items():
        if "modules" in one:
            print(f"{name:<42} {one['modules']:,.0f} modules, {1000 * one['seconds']:,.0f} ms")
            continue
        cells = [one["ops"], one["new_bytes"] / 1e6, one["onednn"], one["onednn_created"], one["python_calls"]]
        texts = [f"{cell:,.1f}" for cell in cells]
        print(f"{name:<42} " + " ".join(f"{text:>8}" for text in texts) + f" {1000 * one['seconds']:>8.1f}")
    if args.update or not args.baseline.exists():
        counted = {name: {k: round(v, 3) for k, v in one.items() if k != "seconds"} for name, one in now.items()}
        args.baseline.write_text(json.dumps(counted, indent=1) + "\n", encoding="utf-8")
        print(f"\nwrote {args.baseline}")
        return 0
    rose, fell = compare(now, json.loads(args.baseline.read_text(encoding="utf-8")))
    print("\n" + "\n".join([*(f"rose: {line}" for line in rose), *(f"fell: {line}" for line in fell)]))
    if fell and not rose:
        print("fewer than the baseline: keep it with --update")
    return 1 if rose else 0


def _measured(counts: Counts, seconds: float) -> Measured:
    return {**asdict(counts), "seconds": seconds}


def _seconds(work: Callable[[], object]) -> float:
    """The least of three."""
    found = []
    for _ in range(3):
        started_s = time.perf_counter()
        work()
        found.append(time.perf_counter() - started_s)
    return min(found)


def _sequence(draw: Any, length: int) -> TokenSequence:
    prompt = length // 3
    tokens = tuple(draw.randrange(1, CONFIG.vocab_size) for _ in range(length))
    return TokenSequence(tokens=tokens, mask=tuple(place >= max(1, prompt) for place in range(length)))


def _with(sequence: TokenSequence, **columns: float) -> TokenSequence:
    filled = {name: (value,) * len(sequence.tokens) for name, value in columns.items()}
    return sequence.replace(columns=filled)


if __name__ == "__main__":
    raise SystemExit(main())
