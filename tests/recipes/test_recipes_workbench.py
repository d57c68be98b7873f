"""Where recipes work: runs that begin, end, are interrupted and gone on with; graders and policies by name."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest

from posttrain.core import ConfigError, GradeCase, ModelError, UsageError
from posttrain.grade import Exact, Maths, Number, SqlResult, prove
from posttrain.recipes.grading import grader_from
from posttrain.recipes.policy import Policy, load_policy
from posttrain.recipes.workbench import Progress, open_stage, open_workbench
from posttrain.registry import RunFolder

OPTIONS = {"model": "base", "data": Path("rows.jsonl"), "lr": 1e-3, "tags": ("a", "b"), "limit": None}


def begun(runs: Path) -> Path:
    with open_workbench("sft", {**OPTIONS, "runs": runs, "resume": None}, runs=runs) as bench:
        return bench.run.path


def state(path: Path) -> str:
    return RunFolder.open(path, read_only=True).state.status


def test_a_run_keeps_its_options_and_finishes(tmp_path: Path) -> None:
    path = begun(tmp_path)
    run = RunFolder.open(path, read_only=True)
    assert run.config == {"model": "base", "data": "rows.jsonl", "lr": 1e-3, "tags": ["a", "b"]}
    assert run.state.status == "finished"
    assert (tmp_path / "registry.db").is_file()


def test_resume_takes_the_same_options(tmp_path: Path) -> None:
    path = begun(tmp_path)
    with open_workbench("sft", OPTIONS, resume=path) as bench:
        assert bench.run.path == path
        assert bench.registry.path == tmp_path / "registry.db", "the registry is the one beside the run"
        assert bench.run.state.resumed == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lr": 2e-3}, "began with lr = 0.001, now it is 0.002"),
        ({"limit": 5}, "began with limit = None, now it is 5"),
        ({"tags": ("a",)}, r"began with tags = \['a', 'b'\], now it is \['a'\]"),
        ({"tags": None}, r"began with tags = \['a', 'b'\], now it is None"),
    ],
)
def test_resume_refuses_other_options(tmp_path: Path, changes: dict[str, object], said: str) -> None:
    path = begun(tmp_path)
    with (
        pytest.raises(ConfigError, match=f"{said}.*posttrain run --resume"),
        open_workbench("sft", {**OPTIONS, **changes}, resume=path),
    ):
        raise AssertionError("was let in")
    assert state(path) == "interrupted"
    with open_workbench("sft", OPTIONS, resume=path):  # the refusal let go of the run
        pass


def test_resume_refuses_another_recipe(tmp_path: Path) -> None:
    path = begun(tmp_path)
    with pytest.raises(UsageError, match="is a run of 'sft', not of 'grpo'"), open_workbench("grpo", {}, resume=path):
        raise AssertionError("was let in")


def test_an_error_and_an_interrupt_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = []
    for error in (ValueError("broken"), KeyboardInterrupt()):
        with pytest.raises(type(error)), open_workbench("sft", OPTIONS, runs=tmp_path) as bench:  # noqa: PT012
            paths.append(bench.run.path)
            raise error
    assert [state(path) for path in paths] == ["failed", "interrupted"]
    assert RunFolder.open(paths[0], read_only=True).state.error == "ValueError: broken"
    assert f"interrupted; go on with: posttrain run --resume {paths[1]}" in capsys.readouterr().err


def test_sigterm_interrupts_as_ctrl_c_does(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), open_workbench("sft", OPTIONS, runs=tmp_path) as bench:  # noqa: PT012
        path = bench.run.path
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert state(path) == "interrupted"
    assert signal.getsignal(signal.SIGTERM) == before


def test_stages_are_runs_of_their_own_and_gone_on_with(tmp_path: Path) -> None:
    with open_workbench("flywheel", {}, runs=tmp_path) as bench:
        with open_stage(bench, "base", {"steps": 3}) as stage:
            assert stage.run.path == tmp_path / f"{bench.run.id}-base"
            assert stage.registry is bench.registry
        with open_stage(bench, "base", {"steps": 3}) as stage:
            assert stage.run.state.resumed == 1
        with pytest.raises(ConfigError, match="steps = 3, now it is 4"), open_stage(bench, "base", {"steps": 4}):
            raise AssertionError("was let in")
        assert bench.registry.run(f"{bench.run.id}-base").status == "finished"


def test_say_goes_to_the_person_and_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_workbench("sft", OPTIONS, runs=tmp_path) as bench:
        bench.say('two "words"\nand a line')
        notes = [event.fields["text"] for event in bench.run.events() if event.kind == "note"]
    assert notes == ['two "words"\nand a line']
    assert 'two "words"' in capsys.readouterr().out


def test_progress_without_a_terminal_is_a_line_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("sft", 3, start=1) as progress:
        progress.advance({"loss": 1.5})
        assert capsys.readouterr().err == ""
        progress.advance({"loss": 1.25})
    line = capsys.readouterr().err
    assert line.startswith("sft: 3/3")
    assert "loss 1.25" in line


# Graders


def test_graders_by_word(tmp_path: Path) -> None:
    assert isinstance(grader_from("exact"), Exact)
    assert isinstance(grader_from("number"), Number)
    assert isinstance(grader_from("maths"), Maths)
    databases = [tmp_path / "a.db", tmp_path / "b.db"]
    for path in databases:
        path.touch()
    assert isinstance(grader_from(f"sql:{databases[0]}, {databases[1]}"), SqlResult)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("exactly", "no grader 'exactly'; give exact, number, maths, sql:"),
        ("sql:", "no such database .none named."),
        ("sql:absent.db", "no such database absent.db"),
        ("absent.py:polite", "absent.py: no such file"),
        ("grader.py", "no grader 'grader.py'"),
    ],
)
def test_graders_that_are_not_there(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        grader_from(text)


GRADER_FILE = """
from posttrain.core import Grade
from posttrain.grade import Function, right, wrong
from posttrain.core import Task

task = Task(id="a", prompt="?")
ready = Function(lambda t: float("please" in t.text), name="ready", cases=[right(task, "please"), wrong(task, "no")])

class Made:
    name = "made"
    async def grade(self, trajectory):
        return Grade(score=1.0, grader=self.name)

def not_one():
    return 3
"""


def test_graders_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(GRADER_FILE)
    ready = grader_from(f"{path}:ready")
    cases: list[GradeCase] = list(ready.cases())  # type: ignore[attr-defined]
    assert len(cases) == 2
    prove(ready).raise_for_problems()
    assert grader_from(f"{path}:Made").name == "made"
    with pytest.raises(UsageError, match="has no 'absent'"):
        grader_from(f"{path}:absent")
    with pytest.raises(UsageError, match="is no grader: it needs a `name`"):
        grader_from(f"{path}:not_one")


# Policies


def test_a_policy_comes_back_as_it_was_saved(tiny_policy: Policy, tmp_path: Path) -> None:
    folder = tiny_policy.save(tmp_path / "model")
    again = load_policy(str(folder))
    weights = tiny_policy.model.state_dict()
    assert all(tensor.equal(weights[name]) for name, tensor in again.model.state_dict().items())
    assert again.renderer.prompt("to be") == tiny_policy.renderer.prompt("to be")
    assert again.renderer.stop_tokens == tiny_policy.renderer.stop_tokens


def test_a_template_file_replaces_the_models_own(tiny_policy: Policy, tmp_path: Path) -> None:
    from posttrain.core import Task, user

    folder = tiny_policy.save(tmp_path / "model")
    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    policy = load_policy(str(folder), template=template)
    prompt = policy.renderer.prompt(Task(id="a", prompt=(user("be"),)))
    assert policy.tokenizer.decode(prompt) == "[be]"


def test_a_name_without_a_network_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"no such folder here.*hf download nobody/no-such-model"):
        load_policy("nobody/no-such-model")
    with pytest.raises(ModelError, match="no such model folder"):
        load_policy("./no/such/folder")


def test_a_tokenizer_larger_than_the_model_is_refused(tiny_policy: Policy, tmp_path: Path) -> None:
    from posttrain.render import Tokenizer

    folder = tiny_policy.save(tmp_path / "model")
    Tokenizer.train_bpe(["to be or not to be " * 9, "that is the question"], 280).save(folder)
    with pytest.raises(ModelError, match=r"gives ids up to .* the model has embeddings for 262"):
        load_policy(str(folder))


def test_engines_in_another_dtype_leave_the_weights_alone(tiny_policy: Policy) -> None:
    from posttrain.core import Sampling

    before = {name: tensor.clone() for name, tensor in tiny_policy.model.state_dict().items()}
    prompts = [list(tiny_policy.renderer.prompt("to be"))]
    with tiny_policy.engine(slots=2, dtype="bfloat16") as engine:
        (answer,) = engine.generate(prompts, Sampling(max_tokens=4, temperature=0.0))
    assert 1 <= len(answer.tokens) <= 4
    assert all(tensor.equal(before[name]) for name, tensor in tiny_policy.model.state_dict().items())
    with pytest.raises(KeyError):
        tiny_policy.engine(dtype="int3")
    assert asyncio.iscoroutinefunction(engine.sample)
