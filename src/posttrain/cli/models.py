"""`posttrain evaluate`, `generate` and `serve`: what one does with a model."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.cli.printing import print_json, print_table
from posttrain.core import Completion, Message, SampleRequest, Sampling, UsageError, derive_seed, user

if TYPE_CHECKING:
    from posttrain.engine import LocalEngine
    from posttrain.recipes.policy import Policy

DEFAULT_TOKENS = 256
DTYPES = ("float32", "bfloat16", "float16")
Prompt = str | tuple[Message, ...]


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands of this file."""
    # `evaluate` is a recipe: its words go to `posttrain run evaluate` unread.
    commands.add_parser("evaluate", help="evaluate a model on a file of tasks, with intervals", add_help=False)
    _add_generate(commands)
    from posttrain.cli import serve

    serve.add_commands(commands)


def _add_generate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "generate",
        help="sample from a model",
        description="Sample from a model. Prompts come from --prompt, --file, or standard input (one prompt).",
    )
    parser.add_argument("--model", required=True, help="folder of the model, or a Hugging Face name")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", nargs="+", action="extend", metavar="TEXT", help="one or more prompts")
    source.add_argument("--file", type=Path, help="prompts: JSONL, parquet, CSV … with a prompt column or messages")
    parser.add_argument("--columns", help="of --file: which columns to read, as prompt=question")
    parser.add_argument("--limit", type=int, help="of --file: the first so many rows")
    parser.add_argument("--chat", action="store_true", help="make text prompts a user's turn of the chat template")
    parser.add_argument("--template", type=Path, help="a chat template file that replaces the model's own")
    parser.add_argument("--max-tokens", type=int, help=f"new tokens (default: {DEFAULT_TOKENS}, or what fits)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (default: 1)")
    parser.add_argument("--top-p", type=float, default=1.0, help="keep the likeliest tokens up to this probability")
    parser.add_argument("--top-k", type=int, default=0, help="keep the k likeliest tokens; 0: all")
    parser.add_argument("--min-p", type=float, default=0.0, help="drop tokens less likely than this share of the best")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends the answer; repeatable")
    parser.add_argument("--n", type=int, default=1, help="answers per prompt (default: 1)")
    parser.add_argument("--seed", type=int, help="the same seed gives the same answers")
    parser.add_argument("--logprobs", action="store_true", help="also tokens and their logprobs")
    parser.add_argument("--stream", action="store_true", help="print a single answer as it comes")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:0 … (default: cpu)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default: float32)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(action=generate)


def generate(chosen: argparse.Namespace) -> int:
    """`posttrain generate`."""
    prompts = _read_prompts(chosen)
    if chosen.stream and (chosen.json or chosen.logprobs or chosen.n != 1 or len(prompts) != 1):
        raise UsageError("--stream prints one answer to one prompt as text: leave out --json, --logprobs and --n")
    from posttrain.recipes.policy import load_policy

    policy = load_policy(chosen.model, device=chosen.device, dtype=chosen.dtype, template=chosen.template)
    tokens = [policy.renderer.prompt(prompt) for prompt in prompts]
    with policy.engine(slots=64) as engine:
        sampling = _sampling(chosen, policy, engine.max_length - max(map(len, tokens)))
        if chosen.stream:
            seed = None if chosen.seed is None else derive_seed(chosen.seed, "prompt", 0)  # as `engine.generate`
            asyncio.run(_print_stream(engine, SampleRequest(prompt=tokens[0], sampling=sampling.replace(seed=seed))))
            return 0
        completions = engine.generate(tokens, sampling)
    if chosen.json:
        print_json([_plain(prompts[place // chosen.n], each, chosen) for place, each in enumerate(completions)])
        return 0
    for place, completion in enumerate(completions):
        if len(completions) > 1:
            print(f"--- prompt {place // chosen.n + 1}, answer {completion.index + 1} ({completion.stop_reason})")
        print(completion.text)
        if chosen.logprobs:
            pairs = zip(completion.tokens, completion.policy_logprobs, strict=True)
            rows = [(token, json.dumps(policy.tokenizer.token(token)), f"{logprob:.4f}") for token, logprob in pairs]
            print_table(("id", "token", "logprob"), rows)
    return 0


def _read_prompts(chosen: argparse.Namespace) -> list[Prompt]:
    from posttrain import data

    prompts: Sequence[Any]
    if chosen.file is None and (chosen.columns or chosen.limit):
        raise UsageError("--columns and --limit speak of --file")
    if chosen.file is not None:
        rows = data.load(chosen.file, kind="prompt", columns=chosen.columns, limit=chosen.limit)
        prompts = [row.prompt for row in rows]
    elif chosen.prompt:
        prompts = chosen.prompt
    elif sys.stdin.isatty():
        raise UsageError("give --prompt TEXT, --file FILE, or the prompt on standard input")
    else:
        prompts = [sys.stdin.read().removesuffix("\n")]
    return [(user(prompt),) if chosen.chat and isinstance(prompt, str) else prompt for prompt in prompts]


def _sampling(chosen: argparse.Namespace, policy: Policy, room: int) -> Sampling:
    """What the options say; without --max-tokens the answer may fill what the context leaves."""
    return Sampling(
        max_tokens=max(1, min(DEFAULT_TOKENS, room)) if chosen.max_tokens is None else chosen.max_tokens,
        temperature=chosen.temperature,
        top_p=chosen.top_p,
        top_k=chosen.top_k,
        min_p=chosen.min_p,
        stop=tuple(chosen.stop),
        stop_tokens=tuple(sorted(policy.renderer.stop_tokens)),
        seed=chosen.seed,
        n=chosen.n,
    )


async def _print_stream(engine: LocalEngine, request: SampleRequest) -> None:
    async with aclosing(engine.stream(request)) as events:
        async for event in events:
            print(event.text, end="", flush=True)
    print()


def _plain(prompt: Prompt, completion: Completion, chosen: argparse.Namespace) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "prompt": prompt,
        "index": completion.index,
        "text": completion.text,
        "stop_reason": completion.stop_reason,
        "num_prompt_tokens": completion.num_prompt_tokens,
        "num_tokens": len(completion.tokens),
    }
    if chosen.logprobs:
        plain |= {
            "tokens": completion.tokens,
            "logprobs": completion.logprobs,
            "policy_logprobs": completion.policy_logprobs,
        }
    return plain
