"""TRL's trainers in their best settings: precision, micro-batch, packing, padding-free rows, continuous batching.

A trainer runs in a thread of its own and stops at the end of every run, so that one trainer serves all repetitions.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

import datasets
import torch
import transformers
import trl
from versus.reward import reward_of
from versus.search import Best, Setting, find_best
from versus.theirs_generate import EndAt, paged

datasets.disable_progress_bars()

Make = Callable[[], tuple[Any, float]]  # a trainer, and how much one run of it does


class Stepped(transformers.TrainerCallback):
    """Lets a trainer that runs in another thread take `steps` optimiser steps at a time, and sleep in between.

    A run is timed from being asked to the end of its last step; its batches are fetched within.
    """

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._stop = False
        self._started_s = 0.0
        self.seconds = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        """Wait to be asked, before the very first step."""
        if state.global_step == 0:
            self._wait(control)

    def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        """At the last step of a run: report, and wait to be asked again."""
        if state.global_step % self._steps == 0:
            self.seconds = time.perf_counter() - self._started_s
            self._done.release()
            self._wait(control)

    def _wait(self, control: Any) -> None:
        if not self._stop:
            self._go.acquire()
        control.should_training_stop = self._stop
        self._started_s = time.perf_counter()

    def run(self) -> float:
        """One run; its seconds."""
        self._go.release()
        self._done.acquire()
        return self.seconds

    def failed(self) -> None:
        """Nobody will report any more."""
        self._done.release()

    def stop(self) -> None:
        """Let the trainer end."""
        self._stop = True
        self._go.release()


class Running:
    """A trainer in its thread."""

    def __init__(self, make: Make, steps: int) -> None:
        trainer, self._work = make()
        self._stepped = Stepped(steps)
        trainer.add_callback(self._stepped)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._train, args=(trainer,), daemon=True)
        self._thread.start()

    def _train(self, trainer: Any) -> None:
        try:
            trainer.train()
        except BaseException as error:  # noqa: BLE001  told to whoever waits for the run
            self._error = error
        self._stepped.failed()

    def close(self) -> None:
        """End the training, so that its memory is free."""
        self._stepped.stop()
        self._thread.join(timeout=60)

    def __call__(self) -> dict[str, float]:
        """One run."""
        seconds = self._stepped.run()
        if self._error is not None:
            raise RuntimeError(f"training failed: {self._error!r}") from self._error
        return {"seconds": seconds, "work": self._work}


def sft_runner(sizes: Mapping[str, Any], inputs: Mapping[str, Any]) -> Best:
    """All rows once, in about `steps` optimiser steps."""
    work = float(sum(len(row["tokens"]) for row in inputs["sft"]))
    steps = min(sizes["steps"], len(inputs["sft"]))
    size = -(-len(inputs["sft"]) // steps)

    def make(setting: Setting) -> Callable[[], Mapping[str, float]]:
        if setting["rows"] != "packed":
            return Running(lambda: (_sft_trainer(inputs, setting, size), work), steps)
        packs = len(_sft_trainer(inputs, {**setting, "micro": 1}, 1).train_dataset)
        setting["micro"] = -(-packs // steps)
        return Running(lambda: (_sft_trainer(inputs, setting, setting["micro"]), work), -(-packs // setting["micro"]))

    if sizes.get("candidates"):
        return find_best([{**sizes["candidates"], "micro": size}], make)
    kinds = [("padded", size), ("by length", size), ("padding-free", size), ("packed", 0)]
    kinds += [("by length", max(1, size // 4))] if size > 3 else []
    return find_best(
        [{"dtype": dtype, "rows": kind, "micro": micro} for (kind, micro), dtype in product(kinds, _dtypes(inputs))],
        make,
    )


def _sft_trainer(inputs: Mapping[str, Any], setting: Setting, size: int) -> Any:
    """`rows`: padded; by length (padded, rows of like length together); padding-free; packed."""
    rows, kind = inputs["sft"], setting["rows"]
    if kind == "by length":
        rows = sorted(rows, key=lambda row: len(row["tokens"]))
    longest = max(len(row["tokens"]) for row in rows)
    config = trl.SFTConfig(
        **_common(setting, inputs["seed"]),
        max_length=max(longest, 1024) if kind == "packed" else None,
        packing=kind == "packed",
        padding_free=kind == "padding-free",
        completion_only_loss=True,
        per_device_train_batch_size=setting["micro"],
        gradient_accumulation_steps=-(-size // setting["micro"]),
    )
    data = datasets.Dataset.from_dict(
        {"input_ids": [row["tokens"] for row in rows], "completion_mask": [row["mask"] for row in rows]}
    )
    return _in_order(trl.SFTTrainer)(_model(inputs, setting), config, train_dataset=data)


def dpo_runner(sizes: Mapping[str, Any], inputs: Mapping[str, Any]) -> Best:
    """All pairs once; the reference's logprobs are known beforehand."""
    pairs, steps = inputs["dpo"], min(sizes["steps"], len(inputs["dpo"]))
    size = -(-len(pairs) // steps)

    def make(setting: Setting) -> Callable[[], Mapping[str, float]]:
        def trainer() -> tuple[Any, float]:
            chosen = pairs
            if setting["rows"] == "by length":
                chosen = sorted(pairs, key=lambda pair: len(pair["prompt"]) + len(pair["chosen"]))
            data = datasets.Dataset.from_dict(
                {f"{name}_ids": [pair[name] for pair in chosen] for name in ("prompt", "chosen", "rejected")}
            )
            config = trl.DPOConfig(
                **_common(setting, inputs["seed"]),
                max_length=None,
                precompute_ref_log_probs=True,
                precompute_ref_batch_size=setting["micro"],
                per_device_train_batch_size=setting["micro"],
                gradient_accumulation_steps=-(-size // setting["micro"]),
                beta=0.1,
            )
            kind = _in_order(_tokenised(trl.DPOTrainer))
            return kind(_model(inputs, setting), args=config, train_dataset=data), float(len(pairs))

        return Running(trainer, steps)

    kinds = [("padded", size), ("by length", size)]  # TRL 1.16 has switched padding-free pairs off
    kinds += [("by length", max(1, size // 4))] if size > 3 else []
    return find_best(
        [{"dtype": dtype, "rows": kind, "micro": micro} for (kind, micro), dtype in product(kinds, _dtypes(inputs))],
        make,
    )


def grpo_runner(sizes: Mapping[str, Any], inputs: Mapping[str, Any]) -> Best:
    """One optimiser step: sample all siblings, reward, credit, update."""
    lengths, siblings = inputs["lengths"], sizes["siblings"]
    count = len(lengths)
    tokenizer = transformers.AutoTokenizer.from_pretrained(inputs["folder"])

    def reward(completions: Sequence[str], completion_ids: Sequence[Sequence[int]], **named: Any) -> list[float]:
        assert [len(ids) for ids in completion_ids] == lengths, "every sibling runs to its length"
        return [reward_of(text) for text in completions]

    def make(setting: Setting) -> Callable[[], Mapping[str, float]]:
        def trainer() -> tuple[Any, float]:
            config = trl.GRPOConfig(
                **_common(setting, inputs["seed"]),
                per_device_train_batch_size=setting["micro"],
                gradient_accumulation_steps=count // setting["micro"],
                num_generations=siblings,
                max_completion_length=sizes["new_tokens"],
                temperature=1.0,
                top_k=0,
                beta=0.0,
                shuffle_dataset=False,
                use_transformers_continuous_batching=setting["continuous"],
                # Unsaid, it takes nearly all memory of the machine for its cache.
                transformers_continuous_batching_config=paged(inputs["prompts"], lengths, siblings)
                if setting["continuous"]
                else None,
            )
            data = datasets.Dataset.from_dict({"prompt": inputs["texts"]})
            made = trl.GRPOTrainer(
                _model(inputs, setting), reward, args=config, train_dataset=data, processing_class=tokenizer
            )
            _end_at(made.model, lengths, tokenizer.eos_token_id)
            return made, float(sum(lengths))

        return Running(trainer, 1)

    settings = [
        {"dtype": dtype, "micro": micro, "continuous": continuous}
        for dtype, micro, continuous in [
            *product(_dtypes(inputs), (count, max(siblings, count // 4)), (False,)),
            ("bfloat16", count, True),
        ]
        if not (continuous and len(set(lengths)) > 1)  # it takes no length per row
    ]
    return find_best(settings, make)


def _end_at(model: Any, lengths: Sequence[int], eos: int) -> None:
    """Rows end at lengths of their own; see `EndAt`."""
    generate = model.generate

    def with_lengths(*rest: Any, **named: Any) -> Any:
        return generate(*rest, **named, logits_processor=transformers.LogitsProcessorList([EndAt(lengths, eos)]))

    model.generate = with_lengths


def _in_order(kind: type) -> type:
    """A trainer that takes rows in the order of the data, as the other side does."""

    class InOrder(kind):  # type: ignore[misc]
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset if dataset is None else dataset)

    return InOrder


def _tokenised(kind: type) -> type:
    """A trainer whose data are token ids already."""

    class Tokenised(kind):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *rest: Any, **named: Any) -> Any:
            return dataset

    return Tokenised


def _dtypes(inputs: Mapping[str, Any]) -> list[str]:
    """Precisions: products in bf16 over fp32 weights; everything in bf16; fp32."""
    return [inputs["dtype"]] if "dtype" in inputs else ["autocast", "bfloat16", "float32"]


def _model(inputs: Mapping[str, Any], setting: Setting) -> Any:
    dtype = torch.bfloat16 if setting["dtype"] == "bfloat16" else torch.float32
    return transformers.AutoModelForCausalLM.from_pretrained(inputs["folder"], dtype=dtype)


def _common(setting: Setting, seed: int) -> dict[str, Any]:
    return {
        "output_dir": tempfile.mkdtemp(prefix="versus-"),
        "use_cpu": True,
        "bf16": setting["dtype"] != "float32",
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "max_steps": 1_000_000,
        "activation_checkpointing": setting.get("checkpointing", False),
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "seed": seed,
    }
