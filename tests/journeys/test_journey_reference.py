"""The reference can be made, and has every public name with what its docstring says."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from pathlib import Path
from types import ModuleType

import pytest

import posttrain
from posttrain.recipes import BUILT_IN

SCRIPT = Path(__file__).resolve().parents[2] / "docs" / "build_reference.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_reference", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_public_name_has_its_entry(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "gone.md").write_text("a room that is no more")
    pages = {path.stem: path.read_text(encoding="utf-8") for path in script.build(tmp_path)}
    assert set(pages) == {*script.ROOMS, "README"}
    assert not (tmp_path / "gone.md").exists()
    assert set(script.ROOMS) >= {"core", "data", "train", "serve", "recipes", "cli"}
    for room in script.ROOMS:
        module = importlib.import_module(f"posttrain.{room}")
        assert f"[`{room}`]({room}.md)" in pages["README"]
        for name in module.__all__:
            assert f"\n## {name}\n" in pages[room], f"{room}.{name}"
            value = getattr(module, name)
            if inspect.isfunction(value) and value.__doc__:
                assert value.__doc__.split("\n")[0].strip() in pages[room], f"{room}.{name}"
    for recipe in BUILT_IN:
        assert f"\n## posttrain run {recipe}\n" in pages["recipes"]
    everything = "".join(pages.values())
    assert str(Path(posttrain.__file__).parent) not in everything
    assert " at 0x" not in everything, "an address in memory, other on every run"


def test_signatures_fields_and_sections(script: ModuleType) -> None:
    page = script.page_of("core")
    assert "derive_seed(seed: int, *names: str | int) -> int" in page
    assert "parse_value(text: str, kind: Any, where: str = 'value') -> Any" in page
    assert "| `temperature` | `float` | `1.0` | 0 is greedy |" in page
    assert "| `EOS` | `eos` | the model wrote an end-of-sequence or stop token |" in page
    assert "- `ConfigError`: the text does not fit the type." in page
    assert "path: Path" in script.page_of("registry"), "a property is not written as a call"
    assert "| `lr` | `float` | `1e-05` | peak learning rate |" in script.page_of("train")


@pytest.mark.parametrize(
    ("docstring", "markdown"),
    [
        ("One line.", "One line."),
        ("Head.\n\nArgs:\n    a: first,\n        and more.\n    b, c: others.",
         "Head.\n\n**Args**\n\n- `a`: first, and more.\n- `b`, `c`: others."),
        ("Head.\n\nReturns:\n    a number\n    or two.", "Head.\n\n**Returns**\n\na number or two."),
        ("Head.\n\n    x = 1\n    y = 2", "Head.\n\n```python\nx = 1\ny = 2\n```"),
    ],
)  # fmt: skip
def test_docstrings_by_hand(script: ModuleType, docstring: str, markdown: str) -> None:
    assert script.prose(docstring) == markdown
