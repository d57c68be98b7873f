"""`posttrain doctor` finds faults that were planted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from posttrain.cli import doctor, doctor_data, doctor_model, doctor_template
from posttrain.cli.check import Check
from posttrain.core import Sampling, assistant, user
from posttrain.grade import Function, right, wrong
from posttrain.render import CHATML, Rendered, Renderer, Tokenizer

HEALTHY = [
    "weights",
    "finite weights",
    "vocabulary",
    "end of sequence",
    "padding",
    "chat template",
    "end of turn",
    "assistant mask",
    "stable turns",
    "beginning of sequence",
    "sampler and trainer",
    "seeded sampling",
]
ENVIRONMENT = ["python", "torch", "bfloat16", "optional packages", "sandbox"]
NO_END = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}\n{% endfor %}"
PLAIN_END = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }} [END]\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
REWRITES = CHATML.replace("{{- message.content or '' }}", "{{- message.content if loop.last else '(said)' }}")
DROPS_REASONING = CHATML.replace("if message.reasoning_content", "if message.reasoning_content and loop.last")


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def diagnosed(posttrain: Callable[..., Any], *words: object) -> tuple[int, dict[str, Check]]:
    said = posttrain("doctor", *words, "--json")
    return said.code, by_name([Check.from_dict(each) for each in said.json()])


def test_a_healthy_model_has_no_complaint(posttrain: Callable[..., Any], tiny_model: Path) -> None:
    code, checks = diagnosed(posttrain, "--model", tiny_model)
    assert code == 0
    assert list(checks) == ENVIRONMENT + HEALTHY
    assert {name for name, check in checks.items() if check.status != "ok"} <= {"torch"}
    assert "296 ids, 304 rows" in checks["vocabulary"].detail
    text = posttrain("doctor", "--model", tiny_model).out
    assert "ok       end of turn: turns end with '<|im_end|>'" in text
    assert text.endswith("0 problems\n")


def test_a_tokenizer_with_more_ids_than_the_embedding(posttrain: Callable[..., Any], own_model: Path) -> None:
    tokenizer = json.loads((own_model / "tokenizer.json").read_text())
    extra = dict(tokenizer["added_tokens"][0], id=304, content="<|extra|>")
    tokenizer["added_tokens"].append(extra)
    tokenizer["model"]["vocab"] |= {f"filler{number}": number for number in range(300, 304)} | {"<|extra|>": 304}
    (own_model / "tokenizer.json").write_text(json.dumps(tokenizer))
    code, checks = diagnosed(posttrain, "--model", own_model)
    assert code == 1
    assert checks["vocabulary"].status == "problem"
    assert "ids up to 304, the embedding has 304 rows; among them <|extra|>" in checks["vocabulary"].detail
    assert "sampler and trainer" not in checks  # it could only crash


def test_no_end_of_sequence_anywhere(
    posttrain: Callable[..., Any], own_model: Path, edit_json: Callable[..., None]
) -> None:
    (own_model / "generation_config.json").unlink()
    edit_json(own_model / "config.json", eos_token_id=None)
    edit_json(own_model / "tokenizer_config.json", eos_token=None)
    edit_json(own_model / "special_tokens_map.json", eos_token=None)
    code, checks = diagnosed(posttrain, "--model", own_model)
    assert code == 1
    assert checks["end of sequence"].status == "problem"
    assert "would never stop" in checks["end of sequence"].detail


def test_ends_of_sequence_that_disagree(tiny_model: Path) -> None:
    tokenizer = Tokenizer.from_folder(tiny_model)
    (own,) = {tokenizer.eos_id}
    assert own is not None

    def status(config: list[int], generation: list[int], rows: int = 304) -> tuple[str, str]:
        declared = {"config.json": config, "generation_config.json": generation}
        (check,) = doctor_model.check_eos(tokenizer, declared, rows)
        return check.status, check.detail

    assert status([own], [own, 0])[0] == "ok"
    assert status([], [])[0] == "ok"  # the tokenizer's own is enough
    assert status([0], [0])[0] == "warning"
    assert status([own], [0])[0] == "warning"
    assert status([own], [9999]) == ("problem", "eos ids [9999] are not in the vocabulary")
    assert status([own], [], rows=2) == ("problem", f"eos ids [{own}] have no embedding")


def test_padding_that_is_the_end_is_told(tiny_model: Path) -> None:
    definition = (tiny_model / "tokenizer.json").read_text()
    special = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    check = doctor_model.check_pad(Tokenizer(definition, special_tokens=special))
    assert (check.status, "the pad token is the eos token" in check.detail) == ("ok", True)
    assert "never teach" in check.advice


def test_weights_that_cannot_be_read_or_do_not_fit(
    posttrain: Callable[..., Any], own_model: Path, edit_json: Callable[..., None], tmp_path: Path
) -> None:
    weights = own_model / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    code, checks = diagnosed(posttrain, "--model", own_model)
    assert code == 1
    assert (checks["weights"].status, "not readable as safetensors" in checks["weights"].detail) == ("problem", True)
    assert checks["end of turn"].status == "ok"  # the rest is looked at all the same
    weights.write_bytes(whole)
    edit_json(own_model / "config.json", num_hidden_layers=3, layer_types=None)
    assert "missing model.layers.2." in doctor_model.check_model(str(own_model)).checks[0].detail
    (absent,) = doctor_model.check_model(str(tmp_path / "absent")).checks
    assert (absent.name, absent.status) == ("model folder", "problem")


def test_weights_that_hold_nan_or_nothing(posttrain: Callable[..., Any], own_model: Path) -> None:
    path = own_model / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    code, checks = diagnosed(posttrain, "--model", own_model)
    assert code == 1
    assert checks["finite weights"].status == "problem"
    assert "layers.1.mlp.down.weight" in checks["finite weights"].detail
    assert "sampler and trainer" not in checks
    tensors["model.layers.1.mlp.down_proj.weight"].zero_()
    save_file(tensors, path, metadata={"format": "pt"})
    empty = by_name(doctor_model.check_model(str(own_model)).checks)["finite weights"]
    assert (empty.status, "all zeros" in empty.detail) == ("warning", True)


@pytest.mark.parametrize(
    ("template", "name", "status", "told"),
    [
        (NO_END, "end of turn", "problem", "writes nothing after"),
        (PLAIN_END, "end of turn", "problem", ""),
        ("{{ messages[0].nothing.at.all }}", "chat template", "problem", "cannot be rendered"),
        ("{{ messages[-1].content }}", "chat template", "problem", "leaves out what was said"),
        (REWRITES, "chat template", "problem", "leaves out what was said"),
        (DROPS_REASONING, "stable turns", "warning", "a turn with reasoning"),
    ],
)
def test_faulty_templates(
    tiny_model: Path, template: str, name: str, status: str, told: str, posttrain: Callable[..., Any], tmp_path: Path
) -> None:
    renderer = Renderer(Tokenizer.from_folder(tiny_model), template)
    found = by_name(doctor_template.check_template(renderer, renderer.tokenizer.eos_ids))[name]
    assert found.status == status
    assert told in found.detail


def test_an_end_of_turn_that_other_tools_do_not_know(tiny_model: Path) -> None:
    renderer = Renderer(Tokenizer.from_folder(tiny_model))
    check = doctor_template.check_end_of_turn(renderer, frozenset({0}))
    assert check.status == "warning"
    assert "generation_config.json" in check.advice


def test_a_template_that_begins_twice_and_one_that_is_absent(tiny_model: Path) -> None:
    definition = (tiny_model / "tokenizer.json").read_text()
    special = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    tokenizer = Tokenizer(definition, special_tokens=special)
    twice = Renderer(tokenizer, "<|endoftext|><|endoftext|>" + CHATML)
    assert doctor_template.check_bos(twice).status == "problem"
    once = doctor_template.check_bos(Renderer(tokenizer, "<|endoftext|>" + CHATML))
    assert (once.status, "once" in once.detail) == ("ok", True)
    (absent,) = doctor_template.check_template(Renderer(tokenizer), frozenset())
    assert (absent.name, absent.status) == ("chat template", "warning")


class OffByALittle:
    """An engine whose logprobs are 0.001 nats off, and whose samples ignore the seed."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.calls = engine, 0

    def generate(self, prompts: Any, sampling: Sampling) -> Any:
        self.calls += 1
        completions = self.engine.generate(prompts, sampling.replace(seed=self.calls))
        return [each.replace(policy_logprobs=tuple(p - 1e-3 for p in each.policy_logprobs)) for each in completions]


def test_a_sampler_that_differs_from_the_trainer(tiny_model: Path) -> None:
    from posttrain.recipes.policy import load_policy

    policy = load_policy(str(tiny_model))
    with policy.engine(slots=4) as engine:
        good = doctor_model.check_parity(policy.model, engine, (5, 6, 7), 16)
        assert good.status == "ok"
        off = OffByALittle(engine)
        bad = doctor_model.check_parity(policy.model, off, (5, 6, 7), 16)
        assert (bad.status, "0.001 nats" in bad.detail) == ("problem", True)
        assert doctor_model.check_seed(engine, (5, 6, 7), 16).status == "ok"
        assert doctor_model.check_seed(off, (5, 6, 7), 16).status == "problem"


def test_healthy_data(posttrain: Callable[..., Any], tiny_model: Path, write_rows: Callable[..., Path]) -> None:
    rows = [{"prompt": f"how much is {number}?", "completion": f"it is {number}"} for number in range(10)]
    path = write_rows("rows.jsonl", rows)
    code, checks = diagnosed(posttrain, "--model", tiny_model, "--data", path, "--chat")
    assert code == 0
    names = ["rows", "duplicates", "rendering", "lengths", "trained tokens", "trained ends", "examples"]
    assert [(name, checks[name].status) for name in names] == [(name, "ok") for name in names]
    assert "<|im_start|>assistant\n⟦it is 0<|im_end|>⟧" in checks["examples"].detail
    assert "10 of 10 sequences" in checks["trained ends"].detail
    rows_alone = diagnosed(posttrain, "--data", path)[1]
    assert list(rows_alone) == [*ENVIRONMENT, "rows", "duplicates"]


def test_bad_rows_duplicates_and_long_rows(
    posttrain: Callable[..., Any], tiny_model: Path, write_rows: Callable[..., Path]
) -> None:
    good = [{"prompt": f"how much is {number}?", "completion": "it is"} for number in range(30)]
    path = write_rows("rows.jsonl", [*good, good[0], {"prompt": "x", "completion": "y " * 400}, {"prompt": "alone"}])
    code, checks = diagnosed(posttrain, "--model", tiny_model, "--data", path)
    assert code == 0
    assert (checks["rows"].status, "completion: is missing" in checks["rows"].detail) == ("warning", True)
    assert (checks["duplicates"].status, "rows.jsonl:31 and rows.jsonl:1" in checks["duplicates"].detail) == (
        "warning",
        True,
    )
    assert (checks["lengths"].status, "1 (3.1%) are longer" in checks["lengths"].detail) == ("warning", True)
    worse = write_rows("worse.jsonl", [*good[:5], "{broken"])
    code, checks = diagnosed(posttrain, "--data", worse)
    assert (code, checks["rows"].status) == (1, "problem")
    unknown = write_rows("unknown.jsonl", [{"ask": "x", "say": "y"}])
    code, checks = diagnosed(posttrain, "--data", unknown)
    assert (code, checks["rows"].status) == (1, "problem")


def test_data_of_which_nothing_would_be_learned(
    posttrain: Callable[..., Any], tiny_model: Path, write_rows: Callable[..., Path]
) -> None:
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi", "train": False}]
    path = write_rows("masked.jsonl", [{"messages": turns}])
    code, checks = diagnosed(posttrain, "--model", tiny_model, "--data", path, "--kind", "completion")
    assert code == 1
    assert checks["rows"].status == "problem"  # the data room itself sets such rows aside
    assert "1 rows read, 0 used, 1 bad" in checks["rows"].detail
    renderer = Renderer(Tokenizer.from_folder(tiny_model))
    masked = renderer.render([user("hello"), assistant("hi").replace(train=False)])
    empty = doctor_data.check_trained_share([masked])
    assert (empty.status, "nothing would be learned" in empty.detail) == ("problem", True)
    assert doctor_data.check_ends([masked], renderer).status == "problem"


def rendered(tokens: list[int], mask: str) -> Rendered:
    return Rendered(tokens=tuple(tokens), text="", mask=tuple(each == "x" for each in mask))


def test_shares_and_ends_of_what_is_trained(tiny_model: Path) -> None:
    renderer = Renderer(Tokenizer.from_folder(tiny_model))
    (end,) = {renderer.tokenizer.eos_id}
    assert end is not None
    half, whole, nothing = rendered([9, 9, 9, end], "..xx"), rendered([9, end], "xx"), rendered([9, end], "..")
    assert doctor_data.check_trained_share([half]).detail == "2 of 4 tokens are trained (50.0%)"
    assert doctor_data.check_trained_share([whole]).status == "problem"
    assert doctor_data.check_trained_share([nothing]).status == "problem"
    assert doctor_data.check_trained_share([half, nothing]).status == "warning"
    unended = rendered([9, 9, 9], ".xx")
    assert doctor_data.check_ends([half, whole], renderer).status == "ok"
    assert doctor_data.check_ends([half, unended], renderer).status == "warning"
    assert doctor_data.check_ends([unended], renderer).status == "problem"
    assert doctor_data.marked_text(rendered([end, *renderer.tokenizer.encode("two")], ".xxx"), renderer).startswith(
        "<|im_end|>⟦"
    )
    lengths = doctor_data.check_lengths([*range(1, 101)], 95)
    assert "p50 51, p95 96, max 100; 5 (5.0%) are longer" in lengths.detail
    assert doctor_data.check_lengths([10, 20], 5).status == "problem"
    assert doctor_data.check_refused(["a: no"], 10).status == "problem"
    assert doctor_data.check_refused(["a: no"], 100).status == "warning"


def test_prompts_and_pairs(posttrain: Callable[..., Any], tiny_model: Path, write_rows: Callable[..., Path]) -> None:
    prompts = write_rows("prompts.jsonl", [{"prompt": "one", "answer": "1"}, {"prompt": "two"}])
    checks = diagnosed(posttrain, "--model", tiny_model, "--data", prompts)[1]
    assert (checks["answers"].status, "1 of 2 prompts" in checks["answers"].detail) == ("warning", True)
    assert "2 sequences" in checks["lengths"].detail
    pairs = write_rows(
        "pairs.jsonl",
        [{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "q", "chosen": "c", "rejected": "d"}],
    )
    checks = diagnosed(posttrain, "--model", tiny_model, "--data", pairs)[1]
    assert (checks["rows"].status, checks["trained ends"].status) == ("ok", "ok")
    assert "4 sequences" in checks["lengths"].detail


def test_a_grader_that_fails_its_own_cases(posttrain: Callable[..., Any]) -> None:
    from posttrain.core import Task

    task = Task(id="salt", prompt="Ask for the salt.")
    cases = [right(task, "please"), wrong(task, "now")]
    lenient = doctor.check_grader(Function(lambda trajectory: 1.0, name="lenient", cases=cases))
    assert lenient.status == "problem"
    assert "1 problems in 2 cases" in lenient.detail
    assert "'now'" in lenient.detail
    honest = doctor.check_grader(Function(lambda t: float("please" in t.text), name="honest", cases=cases))
    assert honest == Check(name="grader honest", status="ok", detail="2 of 2 cases hold")


def test_built_in_graders_hold_and_are_counted(posttrain: Callable[..., Any]) -> None:
    code, checks = diagnosed(posttrain, "--graders")
    graders = {name: check for name, check in checks.items() if name.startswith("grader ")}
    assert code == 0
    assert {"grader exact", "grader number", "grader sql_result"} <= set(graders)
    assert all(check.status == "ok" and "cases hold" in check.detail for check in graders.values())


def test_more_threads_than_cores_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4096)
    assert doctor.check_torch().status == "warning"


def test_options_that_speak_of_nothing(posttrain: Callable[..., Any]) -> None:
    said = posttrain("doctor", "--chat")
    assert (said.code, "speak of --data" in said.err) == (2, True)
