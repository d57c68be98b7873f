"""Pre-training, small: text in, a tokenizer and a decoder out; or more text for a model that exists.

Documents are packed and never see one another. Without `--model` a byte-level BPE is trained on the text and a
Qwen3-shaped decoder starts from random weights. With it this is continued pre-training: the learning rate is warmed and
decayed anew, and `--replay` mixes in some of what the model has learned before, against forgetting (Ibrahim et al.,
arXiv 2403.08763).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from posttrain import data as rows
from posttrain.core import DataError, Example, UsageError, generator, recipe
from posttrain.models import Decoder, DecoderConfig, num_parameters
from posttrain.recipes.policy import Policy, load_policy
from posttrain.recipes.supervised import Supervised, split_held_out, steps_of, supervised_loop, text_example
from posttrain.recipes.workbench import RUNS, Workbench, open_workbench
from posttrain.render import CHATML, Renderer, Tokenizer
from posttrain.train import TrainConfig, Trainer, nll_objective


def new_policy(
    texts: Sequence[str],
    *,
    vocab_size: int,
    width: int,
    num_layers: int,
    num_heads: int,
    max_positions: int,
    seed: int,
    path: Path,
) -> Policy:
    """A tokenizer trained on the texts and a decoder with random weights: tied embeddings, ChatML turns."""
    tokenizer = Tokenizer.train_bpe(texts, vocab_size, chat_template=CHATML)
    if width % num_heads:
        raise UsageError(f"width {width} is no multiple of {num_heads} heads")
    config = DecoderConfig(
        family="qwen3",
        qk_norm="head",
        vocab_size=tokenizer.vocab_size,
        width=width,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=width // num_heads,
        mlp_width=-(-width * 8 // 3 // 64) * 64,
        max_positions=max_positions,
        tie_embeddings=True,
        eos_ids=tuple(sorted(tokenizer.eos_ids)),
    )
    return Policy(Decoder.random(config, seed=seed), tokenizer, Renderer(tokenizer), path)


def documents(tokenizer: Tokenizer, texts: Sequence[str], max_length: int) -> list[Example]:
    """Each text with an end-of-sequence token; longer ones are cut into pieces of `max_length` tokens.

    Raises:
        DataError: no text has a token.
    """
    if tokenizer.eos_id is None:
        raise UsageError("the tokenizer names no end-of-sequence token; set eos_token in tokenizer_config.json")
    examples = []
    for number, tokens in enumerate(tokenizer.encode_batch(texts)):
        whole = [*tokens, tokenizer.eos_id]
        for start in range(0, len(whole), max_length):
            piece = whole[start : start + max_length]
            if len(piece) > 1:
                examples.append(text_example(f"text-{number}-{start}", piece))
    if not examples:
        raise DataError("no text to train on")
    return examples


def with_replay(examples: Sequence[Example], replay: Sequence[Example], share: float, seed: int) -> list[Example]:
    """The examples and so many tokens of replayed ones, drawn by the seed, that these are `share` of all.

    Raises:
        DataError: there is less to replay than that; says how much there is.
    """
    wanted = share / (1 - share) * sum(example.num_tokens() for example in examples)
    order = list(replay)
    generator(seed, "replay").shuffle(order)
    drawn: list[Example] = []
    taken = 0
    for example in order:
        if taken >= wanted:
            break
        drawn.append(example.replace(id=f"replay/{example.id}"))
        taken += example.num_tokens()
    if taken < wanted:
        raise DataError(
            f"{taken} tokens to replay are less than {share:.0%} of all; give more documents or a lower --replay-share"
        )
    return [*examples, *drawn]


@recipe
def pretrain(
    *,
    data: Path,
    model: str | None = None,
    replay: Path | None = None,
    replay_share: float = 0.05,
    columns: str | None = None,
    limit: int | None = None,
    held_out: int = 32,
    vocab_size: int = 4096,
    width: int = 256,
    num_layers: int = 4,
    num_heads: int = 4,
    max_length: int = 512,
    epochs: float = 1.0,
    batch_size: int = 32,
    lr: float = 2e-3,
    warmup: float = 0.03,
    weight_decay: float = 0.01,
    micro_tokens: int = 8192,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    device: str = "cpu",
    seed: int = 0,
    name: str = "base",
    runs: Path = RUNS,
    resume: Path | None = None,
) -> Path:
    """Make a base model: train a tokenizer and a decoder on text, or go on with one.

    Args:
        data: rows with text (`text` column, or prompts and completions, which are joined).
        model: folder or name of a model to go on with; without it one is made from nothing.
        replay: rows like those the model has learned from before, mixed in against forgetting.
        replay_share: of the tokens trained on, the share that is replayed.
        columns: which columns to read, as `text=body`.
        limit: read at most this many rows.
        held_out: documents kept apart to measure the loss on.
        vocab_size: tokens of a new tokenizer.
        width: of a new decoder.
        num_layers: of a new decoder.
        num_heads: of a new decoder.
        max_length: tokens per document; longer ones are cut into pieces.
        epochs: how often each document is seen.
        batch_size: documents per step.
        lr: peak learning rate, cosine schedule.
        warmup: fraction of the steps.
        weight_decay: of matrices.
        micro_tokens: tokens per packed micro-batch.
        dtype: of matrix products.
        device: cpu, cuda, cuda:0 …
        seed: decides weights and order.
        name: of the model in the registry.
        runs: folder of runs.
        resume: run folder to go on with.
    """
    options = dict(locals())
    if replay is not None and (model is None or not 0 < replay_share < 1):
        raise UsageError(f"--replay needs --model, and a share between 0 and 1, not {replay_share}")
    with open_workbench("pretrain", options, runs=runs, resume=resume) as bench:
        parents = [bench.registry.add_artifact(data, kind="dataset", name=data.name, storage="reference").id]
        loaded = rows.load(data, columns=columns, limit=limit, quarantine=bench.run.path / "bad_rows.jsonl")
        bench.say(loaded.report.summary())
        texts = [_text_of(row) for row in loaded.rows]
        if model is None:
            policy = new_policy(
                texts,
                vocab_size=vocab_size,
                width=width,
                num_layers=num_layers,
                num_heads=num_heads,
                max_positions=max_length * 2,
                seed=seed,
                path=bench.run.path / "model",
            )
            policy.model.to(device)
        else:
            policy = load_policy(model, device=device)
            parent = bench.registry.add_artifact(policy.path, kind="model", name=model, storage="reference")
            parents.append(parent.id)
        bench.say(f"{num_parameters(policy.model.config):,} parameters, {policy.tokenizer.vocab_size} tokens")
        longest = min(max_length, policy.model.config.max_positions)
        kept, apart = split_held_out(documents(policy.tokenizer, texts, longest), held_out, seed)
        old_apart: list[Example] = []
        if replay is not None:
            old, replayed = old_documents(bench, replay, policy, longest)
            parents.append(replayed)
            old, old_apart = split_held_out(old, held_out, seed)
            kept = with_replay(kept, old, replay_share, seed)
        steps = steps_of(len(kept), batch_size, epochs)
        train = TrainConfig(
            lr=lr,
            schedule="cosine",
            warmup=warmup,
            weight_decay=weight_decay,
            betas=(0.9, 0.95),
            total_steps=steps,
            micro_tokens=micro_tokens,
            dtype=dtype,
            seed=seed,
        )
        config = Supervised(
            train=train, batch_size=batch_size, steps=steps, evaluate_every=max(1, steps // 10), seed=seed
        )
        known = Trainer(policy.model, train, nll_objective).evaluate(old_apart)["nll"] if old_apart else 0.0
        summary = supervised_loop(bench, policy.model, kept, apart, config, title="pretrain")
        if old_apart:
            after = Trainer(policy.model, train, nll_objective).evaluate(old_apart)["nll"]
            bench.say(f"held-out loss on what is replayed {known:.4f} → {after:.4f} nats per token")
        made = policy.save(bench.run.path / "model")
        bench.registry.add_run(bench.run)
        card = bench.registry.add_artifact(
            made, kind="model", name=name, parents=parents, run=bench.run.id, storage="reference"
        )
        if apart:
            bench.say(f"held-out loss {summary['nll_before']:.4f} → {summary['nll_after']:.4f} nats per token")
        bench.say(f"model {card.short()} in {made}")
        return bench.run.path


def old_documents(bench: Workbench, replay: Path, policy: Policy, max_length: int) -> tuple[list[Example], str]:
    """The documents to replay, and the id of their artifact."""
    source = bench.registry.add_artifact(replay, kind="dataset", name=replay.name, storage="reference")
    loaded = rows.load(replay, quarantine=bench.run.path / "bad_replay_rows.jsonl")
    bench.say(f"replay: {loaded.report.summary()}")
    return documents(policy.tokenizer, [_text_of(row) for row in loaded.rows], max_length), source.id


def _text_of(row: rows.TypedRow) -> str:
    if isinstance(row, rows.TextRow):
        return row.text
    if isinstance(row, rows.CompletionRow) and isinstance(row.prompt, str) and isinstance(row.completion, str):
        return row.prompt + row.completion
    if isinstance(row, rows.PromptRow) and isinstance(row.prompt, str):
        return "\n".join([row.prompt, str(row.facts.get("solution") or row.answer or "")]).strip()
    raise DataError(f"{row.id}: pre-training needs plain text; name the column with --columns text=COLUMN")
