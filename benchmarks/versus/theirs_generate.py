"""`transformers` generate in its best setting: precision, cache, rows at a time, continuous batching.

B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import torch
import transformers
from torch import Tensor
from versus.search import Best, Setting, find_best, timed

transformers.logging.disable_progress_bar()

PAGE = 32  # tokens of a page of the continuous batcher's cache
SHORT = 16  # tokens of the runs that choose precision and cache


class EndAt(transformers.LogitsProcessor):
    """Ends row i at its own length by writing the end-of-sequence token there and nowhere before."""

    def __init__(self, lengths: Sequence[int], eos: int) -> None:
        self._eos = eos
        self._first: int | None = None  # tokens before the first new one
        self._rows: dict[int, list[int]] = {}
        for row, length in enumerate(lengths):
            self._rows.setdefault(length, []).append(row)

    def __call__(self, tokens_BT: Tensor, scores_BV: Tensor) -> Tensor:
        """Scores with the end forbidden, or forced."""
        if self._first is None:
            self._first = tokens_BT.shape[1]
        scores_BV[:, self._eos] = -float("inf")
        if ended := self._rows.get(tokens_BT.shape[1] - self._first + 1):
            scores_BV[ended] = -float("inf")
            scores_BV[ended, self._eos] = 0.0
        return scores_BV


def load(folder: str, dtype: str) -> Any:
    """The model, ready to sample."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    return model.eval()


def padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Tokens and mask BT, padded on the left."""
    longest = max(map(len, prompts))
    tokens_BT = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask_BT = torch.zeros_like(tokens_BT)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask_BT[row, longest - len(prompt) :] = 1
    return tokens_BT, mask_BT


def sampling_runner(sizes: Mapping[str, Any], inputs: Mapping[str, Any]) -> Best:
    """All rows once. First precision and cache are chosen on short completions, then how many rows at a time."""
    lengths: list[int] = inputs["lengths"]
    rows = [prompt for prompt in inputs["prompts"] for _ in range(sizes["siblings"])]
    models: dict[str, Any] = {}

    def model_of(dtype: str) -> Any:
        if dtype not in models:
            models[dtype] = load(inputs["folder"], dtype)
        return models[dtype]

    def make(setting: Setting, limit: int) -> Callable[[], Mapping[str, float]]:
        capped = [min(length, limit) for length in lengths]
        model = model_of(setting["dtype"])
        if setting.get("continuous"):
            return Continuous(model, rows, capped)
        return timed(lambda: generate_rows(model, rows, capped, setting))

    dtypes = [inputs["dtype"]] if "dtype" in inputs else ["bfloat16", "float32"]
    kinds = [{"dtype": dtype, "cache": cache} for dtype, cache in product(dtypes, ("dynamic", "static"))]
    first = find_best(
        [{**kind, "rows": len(rows)} for kind in kinds], lambda setting: make(setting, min(SHORT, max(lengths)))
    )
    best = dict(first.setting)
    for dtype in [name for name in models if name != best["dtype"]]:
        del models[dtype]
    stage = [{**entry, "stage": f"first {SHORT} tokens"} for entry in first.tried]
    return find_best(_row_settings(best, len(rows)), lambda setting: make(setting, 1 << 30), known=stage)


def _row_settings(best: Setting, rows: int) -> Iterator[Setting]:
    yield {**best, "rows": rows}
    yield from ({**best, "rows": size} for size in (128, 64, 32) if size < rows)
    yield {"dtype": best["dtype"], "continuous": True, "rows": rows}


def generate_rows(model: Any, rows: Sequence[Sequence[int]], lengths: Sequence[int], setting: Setting) -> float:
    """Rows in batches of like prompt length."""
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
    written = 0
    eos = model.config.eos_token_id
    uniform = len(set(lengths)) == 1
    for start in range(0, len(order), setting["rows"]):
        chosen = order[start : start + setting["rows"]]
        tokens_BT, mask_BT = padded([rows[row] for row in chosen])
        own = [lengths[row] for row in chosen]
        options: dict[str, Any] = {"min_new_tokens": max(own)} if uniform else {}
        if not uniform:
            options["logits_processor"] = transformers.LogitsProcessorList([EndAt(own, eos)])
        if setting["cache"] == "static":
            options["cache_implementation"] = "static"
        with torch.inference_mode():
            out_BT = model.generate(
                tokens_BT,
                attention_mask=mask_BT,
                do_sample=True,
                top_k=0,
                max_new_tokens=max(own),
                eos_token_id=eos,
                pad_token_id=eos,
                **options,
            )
        new_BT = out_BT[:, tokens_BT.shape[1] :]
        assert new_BT.shape[1] == max(own), "the longest row runs to its length"
        if not uniform:
            ends = (new_BT == eos).int().argmax(dim=1) + 1
            assert ends.tolist() == own, "each row ends at its length"
        written += sum(own)
    return float(written)


class Continuous:
    """`transformers`' continuous batching, which frees a row's place as soon as it ends; started once, for all runs."""

    def __init__(self, model: Any, rows: Sequence[Sequence[int]], lengths: Sequence[int]) -> None:
        self._rows, self._lengths = rows, lengths
        generation = transformers.GenerationConfig(
            do_sample=True, top_k=0, max_new_tokens=max(lengths), eos_token_id=-1, pad_token_id=0
        )
        batching = transformers.ContinuousBatchingConfig(**paged(rows, lengths))
        self._manager = model.init_continuous_batching(
            generation_config=generation, continuous_batching_config=batching
        )
        self._manager.start()

    def __call__(self) -> dict[str, float]:
        """One run."""
        return timed(self._run)()

    def _run(self) -> float:
        pairs = zip(self._rows, self._lengths, strict=True)
        wanted = {self._manager.add_request(list(row), max_new_tokens=length) for row, length in pairs}
        written = 0
        while wanted:
            result = self._manager.get_result(timeout=120)
            if result is None:
                raise RuntimeError("continuous batching gave no result for 120 s")
            if result.is_finished():
                if result.error:
                    raise RuntimeError(result.error)
                wanted.discard(result.request_id)
                written += len(result.generated_tokens)
        assert written == sum(self._lengths), f"{written} tokens, not {sum(self._lengths)}"
        return float(written)

    def close(self) -> None:
        """End its thread."""
        self._manager.stop(block=True)


def paged(prompts: Sequence[Sequence[int]], lengths: Sequence[int], siblings: int = 1) -> dict[str, int]:
    """Sizes of the continuous batcher's cache that hold all rows at once."""
    rows = [len(prompt) for prompt in prompts for _ in range(siblings)]
    pages = sum(-(-(prompt + length) // PAGE) + 1 for prompt, length in zip(rows, lengths, strict=True))
    return {"page_size": PAGE, "num_blocks": pages + 8, "max_batch_tokens": max(512, 2 * len(rows))}


def turns_runner(sizes: Mapping[str, Any], inputs: Mapping[str, Any]) -> Best:
    """Conversations that grow turn by turn; the cache is kept between turns, or not."""

    def make(setting: Setting) -> Callable[[], Mapping[str, float]]:
        model = load(inputs["folder"], setting["dtype"])

        def work() -> float:
            tokens_BT, mask_BT = padded(inputs["prompts"])
            user_BT = torch.tensor(inputs["user"])
            eos, new, user = model.config.eos_token_id, sizes["new_tokens"], sizes["user_tokens"]
            cache = transformers.DynamicCache(config=model.config) if setting["keeps_cache"] else None
            for turn in range(sizes["turns"]):
                with torch.inference_mode():
                    tokens_BT = model.generate(
                        tokens_BT,
                        attention_mask=mask_BT,
                        past_key_values=cache,
                        do_sample=True,
                        top_k=0,
                        max_new_tokens=new,
                        min_new_tokens=new,
                        eos_token_id=eos,
                        pad_token_id=eos,
                    )
                said_BT = user_BT[:, turn * user : (turn + 1) * user]
                tokens_BT = torch.cat([tokens_BT, said_BT], dim=1)
                grown = tokens_BT.shape[1] - mask_BT.shape[1]
                mask_BT = torch.nn.functional.pad(mask_BT, (0, grown), value=1)
            return float(len(inputs["prompts"]) * new * sizes["turns"])

        return timed(work)

    dtypes = [inputs["dtype"]] if "dtype" in inputs else ["bfloat16", "float32"]
    return find_best([{"dtype": d, "keeps_cache": k} for d, k in product(dtypes, (True, False))], make)


def first_token_runner(sizes: Mapping[str, Any], inputs: Mapping[str, Any]) -> Best:
    """One request after the other, each for its first token."""

    def make(setting: Setting) -> Callable[[], Mapping[str, float]]:
        model = load(inputs["folder"], setting["dtype"])
        eos = model.config.eos_token_id

        def work() -> float:
            for prompt in inputs["prompts"]:
                tokens_BT = torch.tensor([prompt])
                with torch.inference_mode():
                    model.generate(
                        tokens_BT,
                        attention_mask=torch.ones_like(tokens_BT),
                        do_sample=True,
                        top_k=0,
                        max_new_tokens=1,
                        eos_token_id=eos,
                        pad_token_id=eos,
                    )
            return float(len(inputs["prompts"]))

        return timed(work)

    dtypes = [inputs["dtype"]] if "dtype" in inputs else ["bfloat16", "float32"]
    return find_best([{"dtype": dtype} for dtype in dtypes], make)
