"""The command line in this process, and tiny models on disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from posttrain import cli

TEXTS = ["two and two is four", "three and three is six", "hello there, how are you today?"] * 3


class Said(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def posttrain(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """Run one command: `posttrain("runs", "--runs", folder)`."""

    def run(*words: object) -> Said:
        capsys.readouterr()
        code = cli.main([str(word) for word in words])
        return Said(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder of 2 layers with random weights, a tokenizer of 300 ids, ChatML."""
    from posttrain import models
    from posttrain.render import Tokenizer

    tokenizer = Tokenizer.train_bpe(TEXTS, 300)
    config = models.DecoderConfig(
        family="qwen3",
        qk_norm="head",
        vocab_size=304,
        width=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        mlp_width=64,
        max_positions=128,
        tie_embeddings=True,
        init_std=0.25,
        eos_ids=tuple(sorted(tokenizer.eos_ids)),
    )
    folder = tmp_path_factory.mktemp("models") / "tiny"
    models.save(models.Decoder.random(config, seed=0), folder, tokenizer=tokenizer)
    return folder


@pytest.fixture
def own_model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture
def edit_json() -> Callable[..., None]:
    """Change some keys of a JSON file; None takes one out."""

    def edit(path: Path, **changes: Any) -> None:
        values = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))

    return edit


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """Write a JSON lines file; text is written as it stands."""

    def write(name: str, rows: list[Any]) -> Path:
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return path

    return write
