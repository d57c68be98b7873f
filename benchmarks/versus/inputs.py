"""The data of a workload, made once and read by both sides: prompts, lengths, rows, and the operations they cost.

Runs on our side alone (it tokenises). Rows are real where the data folder is there, else made from a word list; the
result says which.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from versus.catalogue import Workload
from versus.lengths import mixed_lengths, prompt_lengths

from posttrain.models import DecoderConfig, flops_per_token
from posttrain.render import Tokenizer

SFT_FILE = "sft/dolly_hhrlhf_train_small.jsonl.gz"
DPO_FILE = "preference/dpo_en_demo.jsonl.gz"
WORDS = "the a of and to in is on for with table order city model price count name value year list open data".split()


def texts_of(data: Path | None) -> list[str]:
    """Texts to train a small tokenizer on and to cut prompts from."""
    return [row["prompt"] + row["response"] for row in sft_rows(data)]


def sft_rows(data: Path | None) -> list[dict[str, str]]:
    """Rows of prompt and response."""
    if data is not None:
        return list(_read(data / SFT_FILE))
    draw = random.Random(0)
    return [{"prompt": _words(draw, 80), "response": _words(draw, 120)} for _ in range(1000)]


def dpo_rows(data: Path | None) -> list[dict[str, str]]:
    """Rows of prompt, chosen and rejected answer."""
    if data is None:
        draw = random.Random(1)
        return [
            {"prompt": _words(draw, 80), "chosen": _words(draw, 160), "rejected": _words(draw, 120)} for _ in range(300)
        ]
    rows = []
    for row in _read(data / DPO_FILE):
        prompt = "\n\n".join(turn["value"] for turn in row["conversations"]) + "\n\n"
        rows.append({"prompt": prompt, "chosen": row["chosen"]["value"], "rejected": row["rejected"]["value"]})
    return rows


def make_inputs(workload: Workload, folder: Path, data: Path | None, seed: int = 0) -> dict[str, Any]:
    """What a worker needs besides the workload, and `work`, how much of it there is, in the workload's unit."""
    config = DecoderConfig.from_hf(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    tokenizer = Tokenizer.from_folder(folder)
    sizes = workload.sizes
    inputs: dict[str, Any] = {"folder": str(folder), "seed": seed, "rows": "real" if data is not None else "made"}
    if workload.kind in ("sft", "dpo"):
        make = _sft if workload.kind == "sft" else _dpo
        return inputs | make(sizes, tokenizer, config, data, seed)
    low, high = sizes["prompt_tokens"]
    lengths = prompt_lengths(sizes["prompts"], low, high, seed)
    stream = _stream(tokenizer, data, sum(lengths))
    prompts = _cut(stream, lengths)
    inputs |= {"prompts": prompts, "texts": [tokenizer.decode(prompt) for prompt in prompts]}
    if workload.kind == "first_token":
        return inputs | {"work": len(prompts), "flops": _flops(config, [(len(p), 1) for p in prompts])}
    rows = sizes["prompts"] * sizes.get("siblings", 1)
    new = sizes["new_tokens"]
    written = mixed_lengths(rows, new, seed) if sizes.get("mixed") else [new] * rows
    if workload.kind == "turns":
        count = (sizes["turns"] - 1) * sizes["user_tokens"]
        inputs["user"] = _cut(stream[::-1], [count] * len(prompts))
        return inputs | {"work": rows * new * sizes["turns"], "flops": None}
    siblings = sizes["siblings"]
    spent = [(len(prompts[row // siblings]), length) for row, length in enumerate(written)]
    return inputs | {
        "lengths": written,
        "work": sum(written),
        "flops": _flops(config, spent, siblings) if workload.kind == "sampling" else None,
    }


def _sft(
    sizes: dict[str, Any], tokenizer: Tokenizer, config: DecoderConfig, data: Path | None, seed: int
) -> dict[str, Any]:
    """Rows of token ids and mask. `whole`: rows of exactly `longest` tokens, all of them targets."""
    longest, wanted = sizes["longest"], sizes["rows"]
    rows: list[dict[str, list[int]]] = []
    if sizes.get("whole"):
        cut = _cut(_stream(tokenizer, data, longest * wanted), [longest] * wanted)
        rows = [{"tokens": tokens, "mask": [0] + [1] * (len(tokens) - 1)} for tokens in cut]
    else:
        end = _end(tokenizer)
        for row in _shuffled(sft_rows(data), seed):
            prompt, answer = tokenizer.encode(row["prompt"]), [*tokenizer.encode(row["response"]), end]
            if len(prompt) + len(answer) <= longest:
                rows.append({"tokens": prompt + answer, "mask": [0] * len(prompt) + [1] * len(answer)})
            if len(rows) == wanted:
                break
    flops = 3 * sum(_sequence_flops(config, len(row["tokens"]), sum(row["mask"])) for row in rows)
    return {"sft": rows, "work": sum(len(row["tokens"]) for row in rows), "flops": flops}


def _dpo(
    sizes: dict[str, Any], tokenizer: Tokenizer, config: DecoderConfig, data: Path | None, seed: int
) -> dict[str, Any]:
    end = _end(tokenizer)
    pairs: list[dict[str, list[int]]] = []
    for row in _shuffled(dpo_rows(data), seed):
        prompt = tokenizer.encode(row["prompt"])
        sides = {side: [*tokenizer.encode(row[side]), end] for side in ("chosen", "rejected")}
        if len(prompt) + max(map(len, sides.values())) <= sizes["longest"]:
            pairs.append({"prompt": prompt, **sides})
        if len(pairs) == sizes["rows"]:
            break
    flops = 3 * sum(
        _sequence_flops(config, len(pair["prompt"]) + len(pair[side]), len(pair[side]))
        for pair in pairs
        for side in ("chosen", "rejected")
    )
    return {"dpo": pairs, "work": len(pairs), "flops": flops}


def _sequence_flops(config: DecoderConfig, length: int, targets: int) -> int:
    """Operations of one forward pass over a sequence, with logits at its targets only."""
    head = 2 * config.vocab_size * config.width
    return length * (flops_per_token(config, (length + 1) // 2) - head) + targets * head


def _flops(config: DecoderConfig, spent: Sequence[tuple[int, int]], siblings: int = 1) -> int:
    """Operations of reading each prompt once per group and writing its completions; logits for what is written."""
    total = 0
    for row, (prompt, new) in enumerate(spent):
        if row % siblings == 0:
            total += _sequence_flops(config, prompt, 1)
        total += (new - 1) * flops_per_token(config, prompt + (new + 1) // 2)
    return total


def _end(tokenizer: Tokenizer) -> int:
    """The token that ends a sequence."""
    assert tokenizer.eos_id is not None, "shapes.make_folder saw to it"
    return tokenizer.eos_id


def _stream(tokenizer: Tokenizer, data: Path | None, wanted: int) -> list[int]:
    """Tokens of the texts, end to end: so many, or all there are."""
    stream: list[int] = []
    for text in texts_of(data):
        stream += tokenizer.encode(text)
        if len(stream) >= wanted:
            break
    return stream


def _cut(stream: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Consecutive pieces of a stream of tokens, from its beginning again where it ends."""
    pieces, at = [], 0
    for length in lengths:
        piece = [stream[(at + place) % len(stream)] for place in range(length)]
        pieces.append(piece)
        at += length
    return pieces


def _shuffled(rows: list[dict[str, str]], seed: int) -> list[dict[str, str]]:
    mixed = list(rows)
    random.Random(seed).shuffle(mixed)
    return mixed


def _words(draw: random.Random, mean: int) -> str:
    count = max(2, min(6 * mean, round(mean * draw.lognormvariate(-0.5, 1.0))))
    return " ".join(draw.choice(WORDS) for _ in range(count)) + "\n"


def _read(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)
