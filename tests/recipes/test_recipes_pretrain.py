"""Continued pre-training: no document sees another, replay, and lengths that the model has positions for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from posttrain.core import DataError, UsageError
from posttrain.recipes.policy import Policy, load_policy
from posttrain.recipes.pretrain import documents, new_policy, pretrain, with_replay
from posttrain.recipes.supervised import text_example
from posttrain.train import TrainConfig, Trainer, nll_objective

TEXTS = ["to be or not to be", "that is the question", "whether it is nobler in the mind to suffer", "or to take arms"]


def fresh(path: Path, max_positions: int = 64) -> Policy:
    return new_policy(
        TEXTS, vocab_size=270, width=32, num_layers=2, num_heads=2, max_positions=max_positions, seed=0, path=path
    )


def test_packed_documents_do_not_see_each_other(tmp_path: Path) -> None:
    """Whatever stands beside a document in its packed row, its tokens' logprobs are those it has alone."""
    policy = fresh(tmp_path / "m")
    examples = documents(policy.tokenizer, TEXTS, 64)
    trainer = Trainer(policy.model, TrainConfig(micro_tokens=4096), nll_objective)
    together = trainer.logprobs(examples)
    for example, (packed,) in zip(examples, together, strict=True):
        ((alone,),) = trainer.logprobs([example])
        assert packed == pytest.approx(alone, abs=1e-5)
    # other neighbours, the same first document: nothing moves
    others = [text_example("x", list(range(100, 140))), text_example("y", list(range(60, 70)))]
    ((again,), *_) = trainer.logprobs([examples[0], *others])
    assert again == pytest.approx(together[0][0], abs=1e-5)


def test_no_gradient_crosses_between_packed_documents(tmp_path: Path) -> None:
    """The loss on one document has no derivative in the embedded tokens of its neighbours in the row."""
    from posttrain.models import CausalAttend, packed_positions

    policy = fresh(tmp_path / "m")
    first, second = (policy.tokenizer.encode(text) for text in TEXTS[:2])
    lengths = (len(first), len(second))
    seen: list[torch.Tensor] = []
    handle = policy.model.embed.register_forward_hook(lambda module, args, out: seen.append(out) or out.retain_grad())
    hidden = policy.model.hidden(
        torch.tensor([first + second]),
        positions_BT=packed_positions(lengths),
        attend=CausalAttend(lengths),
    )
    handle.remove()
    policy.model.logits(hidden)[0, lengths[0] :].square().sum().backward()  # the second document's
    grad = seen[0].grad
    assert grad is not None
    assert grad[0, : lengths[0]].abs().max().item() == 0.0
    assert grad[0, lengths[0] :].abs().max().item() > 0.0


def test_long_documents_are_cut_and_nothing_is_lost(tmp_path: Path) -> None:
    policy = fresh(tmp_path / "m")
    examples = documents(policy.tokenizer, TEXTS, 7)
    joined: dict[str, list[int]] = {}
    for example in examples:
        _, number, _ = example.id.split("-")
        joined.setdefault(number, []).extend(example.sequences[0].tokens)
    for number, text in enumerate(TEXTS):
        whole = [*policy.tokenizer.encode(text), policy.tokenizer.eos_id]
        assert joined[str(number)] == whole[: len(joined[str(number)])]
        assert len(whole) - len(joined[str(number)]) <= 1, "only a piece of a single token, with nothing to predict"


def test_replay_by_hand() -> None:
    new = [text_example(f"new-{number}", list(range(10))) for number in range(19)]  # 190 tokens
    old = [text_example(f"old-{number}", list(range(5))) for number in range(10)]
    mixed = with_replay(new, old, 0.05, seed=0)  # 10 of 200 tokens
    assert [example.id for example in mixed[:19]] == [example.id for example in new]
    assert len(mixed) == 21
    assert all(example.id.startswith("replay/old-") for example in mixed[19:])
    assert mixed == with_replay(new, old, 0.05, seed=0)
    assert mixed != with_replay(new, old, 0.05, seed=1)
    with pytest.raises(DataError, match="50 tokens to replay are less than 50%"):
        with_replay(new, old, 0.5, seed=0)


def test_continue_with_replay_forgets_less(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = fresh(tmp_path / "start")
    old = [f"{number} comes before {number + 1}" for number in range(40)]
    trainer = Trainer(policy.model, TrainConfig(lr=5e-3), nll_objective)
    for _ in range(30):
        trainer.step(documents(policy.tokenizer, old, 64))
    policy.save(tmp_path / "start")
    for name, lines in {"old": old, "new": [f"the cat of {number} sat" for number in range(40)]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    held = documents(policy.tokenizer, old, 64)

    def go_on(**changes: object) -> float:
        run = pretrain.run_with(
            {
                "data": str(tmp_path / "new.jsonl"),
                "model": str(tmp_path / "start"),
                "held_out": 4,
                "epochs": 8,
                "batch_size": 16,
                "lr": 3e-3,
                "dtype": "float32",
                "max_length": 4096,  # more than the model has positions for
                "runs": str(tmp_path / "runs"),
                **changes,
            }
        )
        tuned = load_policy(str(run / "model"))
        return Trainer(tuned.model, TrainConfig(), nll_objective).evaluate(held)["nll"]

    without, with_some = go_on(), go_on(replay=str(tmp_path / "old.jsonl"), replay_share=0.3)
    assert "held-out loss on what is replayed" in capsys.readouterr().out
    assert with_some < without - 0.1
    with pytest.raises(UsageError, match="--replay needs --model"):
        go_on(replay=str(tmp_path / "old.jsonl"), replay_share=1.0)
