"""Checks of a model folder: weights, tokenizer, end of sequence, and that sampler and trainer see the same model."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.cli.check import Check, ok, problem, warning
from posttrain.cli.doctor_template import check_template
from posttrain.core import PosttrainError, Sampling

if TYPE_CHECKING:
    from posttrain.models import Decoder
    from posttrain.render import Renderer, Tokenizer

PARITY_TOKENS = 16
PARITY_TOLERANCE = 1e-4  # nats, in float32
SOURCES = ("config.json", "generation_config.json")


@dataclass(frozen=True)
class CheckedModel:
    """What the checks found, and what the checks of data go on with."""

    checks: list[Check]
    renderer: Renderer | None  # None: no tokenizer could be read
    max_positions: int | None  # None: no model could be read


def check_model(name_or_path: str, template: Path | None = None) -> CheckedModel:
    """All checks of one model; a part that cannot be read costs only the checks that need it."""
    from posttrain import models
    from posttrain.render import Renderer, Tokenizer

    checks: list[Check] = []
    try:
        folder = models.resolve(name_or_path)
    except PosttrainError as error:
        return CheckedModel([problem("model folder", str(error), "give the path of a model folder")], None, None)
    model, tokenizer = None, None
    try:
        model = models.load(folder)
        checks += [_loaded(model, folder), check_finite(model)]
    except PosttrainError as error:
        checks.append(problem("weights", str(error), "fetch or save the folder again; nothing can be run with it"))
    try:
        tokenizer = Tokenizer.from_folder(folder)
    except PosttrainError as error:
        checks.append(problem("tokenizer", str(error), "save the tokenizer into the folder, as tokenizer.json"))
    rows = _embedding_rows(model, folder)
    if tokenizer is not None:
        checks += [check_vocabulary(tokenizer, rows), *check_eos(tokenizer, _declared_eos(folder), rows)]
        checks.append(check_pad(tokenizer))
    renderer = None
    if tokenizer is not None:
        renderer = Renderer(tokenizer, template.read_text(encoding="utf-8") if template else None)
        checks += check_template(renderer, _ids(_declared_eos(folder).values()))
    usable = tokenizer is not None and rows is not None and tokenizer.vocab_size <= rows
    if model is not None and renderer is not None and usable and not _has(checks, "finite weights"):
        checks += check_engine(model, renderer)
    return CheckedModel(checks, renderer, None if model is None else model.config.max_positions)


def _has(checks: Iterable[Check], name: str) -> bool:
    return any(check.name == name and check.status == "problem" for check in checks)


def _loaded(model: Decoder, folder: Path) -> Check:
    config = model.config
    count = sum(parameter.numel() for parameter in model.parameters())
    detail = (
        f"{folder}: {config.family}, {count / 1e6:.2f} M parameters, {config.num_layers} layers, "
        f"{config.max_positions} positions; none missing, none unexpected"
    )
    return ok("weights", detail)


def check_finite(model: Decoder) -> Check:
    """NaN, infinities, and matrices that hold nothing but zeros."""
    spoilt, empty = [], []
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            spoilt.append(name)
        elif parameter.dim() > 1 and not parameter.any():
            empty.append(name)
    if spoilt:
        detail = f"{len(spoilt)} weights hold NaN or infinity: {', '.join(spoilt[:5])}"
        return problem(
            "finite weights", detail, "the training that made them broke off earlier: take a checkpoint before"
        )
    if empty:
        detail = f"{len(empty)} matrices are all zeros: {', '.join(empty[:5])}"
        return warning("finite weights", detail, "make sure that the folder was saved whole")
    return ok("finite weights", "no NaN, no infinity")


def _embedding_rows(model: Decoder | None, folder: Path) -> int | None:
    if model is not None:
        return model.config.vocab_size
    value = _read_json(folder / "config.json").get("vocab_size")
    return value if isinstance(value, int) else None


def check_vocabulary(tokenizer: Tokenizer, rows: int | None) -> Check:
    """Whether every id that the tokenizer gives has a row in the embedding; more rows than ids are common padding."""
    size = tokenizer.vocab_size
    if rows is None:
        return warning("vocabulary", f"{size} ids; the model's size is not known", "repair config.json first")
    if size > rows:
        beyond = {text: number for text, number in tokenizer.added_tokens.items() if number >= rows}
        named = f"; among them {', '.join(list(beyond)[:5])}" if beyond else ""
        return problem(
            "vocabulary",
            f"the tokenizer gives ids up to {size - 1}, the embedding has {rows} rows{named}",
            "take the tokenizer that belongs to the model, or resize the embedding",
        )
    return ok("vocabulary", f"{size} ids, {rows} rows in the embedding")


def _declared_eos(folder: Path) -> dict[str, list[int]]:
    """Ids that end a sequence, by the file that says so."""
    declared = {}
    for name in SOURCES:
        value = _read_json(folder / name).get("eos_token_id")
        ids = value if isinstance(value, list) else [value]
        declared[name] = [number for number in ids if isinstance(number, int)]
    return declared


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _ids(lists: Iterable[Iterable[int]]) -> frozenset[int]:
    return frozenset(number for numbers in lists for number in numbers)


def check_eos(tokenizer: Tokenizer, declared: dict[str, list[int]], rows: int | None) -> list[Check]:
    """Whether sequences can end, and whether all files say the same.

    Args:
        tokenizer: with the eos token of tokenizer_config.json.
        declared: ids by file: config.json, generation_config.json.
        rows: of the embedding.
    """
    name = "end of sequence"
    in_files = _ids(declared.values())
    own = tokenizer.eos_id
    if own is None and not in_files:
        why = "no eos token in tokenizer_config.json, config.json or generation_config.json: the model would never stop"
        return [problem(name, why, "set eos_token in tokenizer_config.json and eos_token_id in config.json")]
    unknown = sorted(number for number in in_files if tokenizer.token(number) is None)
    every = in_files if own is None else in_files | {own}
    beyond = sorted(number for number in every if rows is not None and number >= rows)
    if unknown or beyond:
        why = f"eos ids {unknown} are not in the vocabulary" if unknown else f"eos ids {beyond} have no embedding"
        return [problem(name, why, "correct eos_token_id in config.json and generation_config.json")]
    said = [f"tokenizer: {_shown(tokenizer, [] if own is None else [own])}"]
    said += [f"{file}: {_shown(tokenizer, ids)}" for file, ids in declared.items() if ids]
    detail = "; ".join(said)
    if own is None:
        return [warning(name, detail, "completions of text end with the tokenizer's eos_token: set one")]
    if in_files and own not in in_files:
        advice = "posttrain stops at all of them, other tools at their own file's: make the files agree"
        return [warning(name, detail, advice)]
    first, second = (set(declared.get(file, ())) for file in SOURCES)
    if first and second and not first & second:
        return [warning(name, detail, "config.json and generation_config.json disagree: make them agree")]
    return [ok(name, detail)]


def _shown(tokenizer: Tokenizer, ids: list[int]) -> str:
    return ", ".join(f"{tokenizer.token(number)} ({number})" for number in ids) or "none"


def check_pad(tokenizer: Tokenizer) -> Check:
    """Padding that is also the end of a sequence: trainers that mask padding then never teach the end."""
    pad = tokenizer.pad_id
    if pad is None:
        return ok("padding", "no pad token; sequences are packed here, not padded")
    if pad in tokenizer.eos_ids and pad == tokenizer.eos_id:
        detail = f"the pad token is the eos token, {tokenizer.token(pad)}"
        return ok("padding", detail, "harmless here; trainers that mask every pad id never teach the model to stop")
    return ok("padding", f"pad token {tokenizer.token(pad)} ({pad})")


def check_engine(model: Decoder, renderer: Renderer) -> list[Check]:
    """Whether the sampler's logprobs are the trainer's, and whether a seed repeats its samples."""
    from posttrain.engine import LocalEngine

    prompt = _short_prompt(renderer, model.config.max_positions)
    room = min(model.config.max_positions, 2048) - len(prompt)
    if not prompt or room < 1:
        return [warning("sampler and trainer", "no prompt fits the model's positions", "look at max_positions")]
    num_tokens = min(PARITY_TOKENS, room)
    with LocalEngine(model, renderer.tokenizer, max_batch=4, max_length=len(prompt) + num_tokens) as engine:
        return [check_parity(model, engine, prompt, num_tokens), check_seed(engine, prompt, num_tokens)]


def _short_prompt(renderer: Renderer, max_positions: int) -> tuple[int, ...]:
    prompt = renderer.prompt("The quick brown fox")
    return prompt[: max(1, max_positions // 2)]


def check_parity(model: Decoder, engine: Any, prompt: tuple[int, ...], num_tokens: int) -> Check:
    """Greedy tokens with the sampler's logprobs against one forward pass over the whole sequence."""
    import torch

    greedy = Sampling(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    (completion,) = engine.generate([prompt], greedy)
    tokens_BT = torch.tensor([[*prompt, *completion.tokens]])
    with torch.no_grad():
        log_p_TV = model(tokens_BT)[0, :-1].double().log_softmax(-1)
    written_T = tokens_BT[0, len(prompt) :]
    trainer_T = log_p_TV[len(prompt) - 1 :].gather(1, written_T[:, None])[:, 0]
    sampler_T = torch.tensor(completion.policy_logprobs, dtype=torch.float64)
    gap = float((trainer_T - sampler_T).abs().max())
    detail = f"largest difference of {num_tokens} logprobs is {gap:.2g} nats, at most {PARITY_TOLERANCE:g} may be"
    if not gap <= PARITY_TOLERANCE:
        advice = "do not train a policy with this model: importance weights would be wrong. Please report the model"
        return problem("sampler and trainer", detail, advice)
    return ok("sampler and trainer", detail)


def check_seed(engine: Any, prompt: tuple[int, ...], num_tokens: int) -> Check:
    """The same seed twice."""
    sampling = Sampling(max_tokens=num_tokens, temperature=1.0, seed=7, n=2, ignore_eos=True)
    once, again = (
        [(completion.tokens, completion.logprobs) for completion in engine.generate([prompt], sampling)]
        for _ in range(2)
    )
    if once != again:
        advice = "runs with this model cannot be repeated exactly. Please report the model and the machine"
        return problem("seeded sampling", "one seed gave two different samples", advice)
    return ok("seeded sampling", f"{len(once)} answers of {num_tokens} tokens came out the same twice")
