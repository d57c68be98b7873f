"""The supervised loop, and how rows become what it learns from."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from posttrain import data as rows
from posttrain.core import DataError, Message, UsageError, assistant, read_metrics, user
from posttrain.data import CompletionRow
from posttrain.recipes.policy import Policy
from posttrain.recipes.pretrain import _text_of, documents, new_policy
from posttrain.recipes.sft import completion_examples
from posttrain.recipes.supervised import (
    Supervised,
    batch_at,
    split_held_out,
    steps_of,
    supervised_loop,
    text_example,
)
from posttrain.recipes.workbench import Workbench
from posttrain.render import Renderer, Tokenizer
from posttrain.train import TIMING_METRICS, TrainConfig, list_checkpoints


def copy_of(policy: Policy) -> Policy:
    """The same model with weights of its own."""
    return new_policy(
        ["to be or not to be"],
        vocab_size=262,
        width=32,
        num_layers=1,
        num_heads=2,
        max_positions=64,
        seed=0,
        path=policy.path,
    )


# Batches


@pytest.mark.parametrize(("num", "size"), [(10, 3), (12, 4), (5, 8), (1, 1)])
def test_every_example_comes_once_per_epoch(num: int, size: int) -> None:
    per_epoch = -(-num // size)
    for epoch in range(3):
        steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        seen = Counter(index for step in steps for index in batch_at(num, size, step, seed=7))
        assert seen == Counter(range(num))


def test_batches_depend_on_step_and_seed_alone() -> None:
    assert batch_at(100, 8, 20, seed=1) == batch_at(100, 8, 20, seed=1)
    assert batch_at(100, 8, 20, seed=1) != batch_at(100, 8, 20, seed=2)
    first, second = ([i for s in range(e * 13, e * 13 + 13) for i in batch_at(100, 8, s, 1)] for e in (0, 1))
    assert first != second, "each epoch has an order of its own"


@pytest.mark.parametrize(
    ("num", "size", "epochs", "steps"), [(64, 32, 2.0, 4), (65, 32, 2.0, 6), (10, 32, 0.1, 1), (100, 10, 0.5, 5)]
)
def test_steps_by_hand(num: int, size: int, epochs: float, steps: int) -> None:
    assert steps_of(num, size, epochs) == steps


def test_held_out_is_a_partition_that_the_seed_decides() -> None:
    examples = [text_example(str(number), (1, 2, 3)) for number in range(20)]
    kept, apart = split_held_out(examples, 5, seed=3)
    assert len(apart) == 5
    assert sorted(e.id for e in (*kept, *apart)) == sorted(e.id for e in examples)
    assert split_held_out(examples, 5, seed=3) == (kept, apart)
    assert split_held_out(examples, 5, seed=4) != (kept, apart)
    assert split_held_out(examples, 0, seed=3) == (examples, [])
    with pytest.raises(DataError, match="20 examples to hold out of 20: nothing is left"):
        split_held_out(examples, 20, seed=3)


def test_a_document_teaches_all_but_its_first_token() -> None:
    sequence = text_example("a", (4, 5, 6)).sequences[0]
    assert sequence.tokens == (4, 5, 6)
    assert sequence.mask == (False, True, True)


# Rows to examples


def pair(number: int, completion: str = "not to be") -> CompletionRow:
    return CompletionRow(id=f"row-{number}", prompt="to be or ", completion=completion)


def test_the_mask_covers_the_completion_and_its_end(bench: Workbench, tiny_policy: Policy) -> None:
    (example,) = completion_examples(bench, tiny_policy.renderer, [pair(0)], 64)
    (sequence,) = example.sequences
    wrote = [token for token, trained in zip(sequence.tokens, sequence.mask, strict=True) if trained]
    assert wrote[-1] == tiny_policy.tokenizer.eos_id
    assert tiny_policy.tokenizer.decode(wrote) == "not to be"
    assert sequence.tokens[: sequence.mask.index(True)] == tiny_policy.renderer.prompt("to be or ")


def test_chat_wraps_plain_text_in_turns(bench: Workbench, tiny_policy: Policy) -> None:
    (example,) = completion_examples(bench, tiny_policy.renderer, [pair(0)], 64, chat=True)
    text = tiny_policy.tokenizer.decode(example.sequences[0].tokens, skip_special_tokens=False)
    assert text.startswith("<|im_start|>user\nto be or ")
    wrote = [t for t, trained in zip(example.sequences[0].tokens, example.sequences[0].mask, strict=True) if trained]
    assert tiny_policy.tokenizer.decode(wrote, skip_special_tokens=False).startswith("not to be<|im_end|>")


def test_long_rows_are_left_out_and_said(
    bench: Workbench, tiny_policy: Policy, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = completion_examples(bench, tiny_policy.renderer, [pair(0), pair(1, "to be " * 30)], 32)
    assert [example.id for example in kept] == ["row-0"]
    assert "1 of 2 rows are longer than 32 tokens and left out" in capsys.readouterr().out
    with pytest.raises(DataError, match="1 too long, 0 left"):
        completion_examples(bench, tiny_policy.renderer, [pair(1, "to be " * 30)], 32)


REFUSING = (
    "{%- for message in messages %}"
    "{%- if 'forbidden' in message['content'] %}{{ raise_exception('no such word here') }}{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{%- endfor %}{%- if add_generation_prompt %}<|im_start|>assistant\n{%- endif %}"
)


def chat_row(number: int, word: str) -> CompletionRow:
    return CompletionRow(id=f"chat-{number}", prompt=(user(word),), completion=(assistant("be"),))


def test_refusals_are_counted_and_too_many_stop_the_run(bench: Workbench, tiny_policy: Policy) -> None:
    renderer = Renderer(tiny_policy.tokenizer, REFUSING)
    good = [chat_row(number, "to be") for number in range(24)]
    bad = [chat_row(100, "forbidden"), chat_row(101, "forbidden too")]
    assert len(completion_examples(bench, renderer, [*good, bad[0]], 64)) == 24  # 4 % is let pass
    (event,) = [event for event in bench.run.events() if event.kind == "refused_rows"]
    assert event.fields["count"] == 1
    assert "chat-100" in event.fields["first"][0]
    assert "no such word here" in event.fields["first"][0]
    with pytest.raises(DataError, match="2 of 26 rows refused by the chat template, 0 too long, 24 left"):
        completion_examples(bench, renderer, [*good, *bad], 64)
    with pytest.raises(UsageError, match=r"refuses every row.*no such word here"):
        completion_examples(bench, renderer, bad, 64)


def test_conversations_need_a_template(bench: Workbench) -> None:
    bare = Renderer(Tokenizer.train_bpe(["to be"], 262, chat_template=None))
    with pytest.raises(UsageError, match="no chat template"):
        completion_examples(bench, bare, [chat_row(0, "to be")], 64)


# Documents


def test_documents_are_cut_and_end_once(tiny_policy: Policy) -> None:
    tokenizer = tiny_policy.tokenizer
    text = "to be or not to be, that is"
    examples = documents(tokenizer, [text], 8)
    pieces = [example.sequences[0].tokens for example in examples]
    assert max(map(len, pieces)) <= 8
    whole = [token for piece in pieces for token in piece]
    assert whole.count(tokenizer.eos_id) == 1
    assert tokenizer.decode(whole) == text
    with pytest.raises(DataError, match="no text to train on"):
        documents(tokenizer, [], 8)


def test_text_of_each_kind_of_row() -> None:
    assert _text_of(rows.TextRow(id="a", text="once")) == "once"
    assert _text_of(CompletionRow(id="a", prompt="once ", completion="upon")) == "once upon"
    assert _text_of(rows.PromptRow(id="a", prompt="1+1", answer="2")) == "1+1\n2"
    assert _text_of(rows.PromptRow(id="a", prompt="1+1", answer="2", facts={"solution": "so 2"})) == "1+1\nso 2"
    with pytest.raises(DataError, match="name the column with --columns"):
        _text_of(rows.PromptRow(id="a", prompt=(Message(role="user", content="hi"),)))


def test_a_new_policy_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    def make(seed: int, **changes: int) -> Policy:
        sizes = {"vocab_size": 270, "width": 32, "num_layers": 1, "num_heads": 2, "max_positions": 32, **changes}
        return new_policy(["to be or not to be"] * 3, seed=seed, path=tmp_path, **sizes)

    one, same, other = make(0), make(0), make(1)
    weights = dict(one.model.state_dict())
    assert all(tensor.equal(weights[name]) for name, tensor in same.model.state_dict().items())
    assert not all(tensor.equal(weights[name]) for name, tensor in other.model.state_dict().items())
    assert one.tokenizer.vocab_size == one.model.config.vocab_size <= 270
    assert set(one.model.config.eos_ids) == set(one.tokenizer.eos_ids)
    assert one.renderer.stop_tokens >= one.tokenizer.eos_ids, "ChatML's end of turn ends a sample too"
    with pytest.raises(UsageError, match="width 33 is no multiple of 2 heads"):
        make(0, width=33)


# The loop


def settings(steps: int, **changes: int) -> Supervised:
    return Supervised(train=TrainConfig(lr=1e-2), batch_size=4, steps=steps, **changes)


def test_the_loop_learns_measures_and_resumes_where_it_was(
    bench: Workbench, tiny_policy: Policy, tmp_path: Path
) -> None:
    texts = [f"to be or not to be {number}" for number in range(12)]
    kept, apart = split_held_out(documents(tiny_policy.tokenizer, texts, 64), 4, seed=0)
    policy = copy_of(tiny_policy)
    summary = supervised_loop(bench, policy.model, kept, apart, settings(6, evaluate_every=2), title="toy")
    assert summary["nll_after"] < summary["nll_before"] - 0.5
    logged = read_metrics(bench.run.path / "metrics.jsonl")
    assert [row["step"] for row in logged] == [0, 1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in logged if "eval/nll" in row] == [0, 2, 4, 6]
    assert summary["num_tokens"] == logged[-1]["num_tokens"]

    again = copy_of(tiny_policy)  # all done: nothing is trained a second time, nothing is logged twice
    assert supervised_loop(bench, again.model, kept, apart, settings(6, evaluate_every=2), title="toy") == summary
    assert read_metrics(bench.run.path / "metrics.jsonl") == logged
    weights = policy.model.state_dict()
    assert all(tensor.equal(weights[name]) for name, tensor in again.model.state_dict().items())


def test_a_run_cut_before_its_first_checkpoint_logs_every_step_once(bench: Workbench, tiny_policy: Policy) -> None:
    kept, apart = split_held_out(
        documents(tiny_policy.tokenizer, [f"to be {number}" for number in range(8)], 64), 2, seed=0
    )

    class Cut(Exception):
        pass

    original = bench.run.tracker.log

    def cut_at_two(metrics: dict[str, float], step: int) -> None:
        original(metrics, step)
        if step == 2:
            raise Cut

    bench.run.tracker.log = cut_at_two  # type: ignore[method-assign]
    with pytest.raises(Cut):
        supervised_loop(bench, copy_of(tiny_policy).model, kept, apart, settings(4), title="toy")
    assert not list_checkpoints(bench.run.checkpoints)
    bench.run.tracker.log = original  # type: ignore[method-assign]
    supervised_loop(bench, copy_of(tiny_policy).model, kept, apart, settings(4), title="toy")
    logged = read_metrics(bench.run.path / "metrics.jsonl")
    assert [row["step"] for row in logged] == [0, 1, 2, 3, 4]
    assert {"step_s", "tokens_per_second"} == set(TIMING_METRICS)
