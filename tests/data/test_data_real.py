"""Every suitable real file loads, with the number of rows that its table says."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from posttrain import data
from posttrain.core import DataError

MC = "multiple_choice"
FILES: dict[str, tuple[str, int]] = {  # file → kind it stands for, rows that are truly unfit
    "sft/self_instruct_seed_tasks.jsonl.gz": ("completion", 0),
    "sft/self_instruct_user_oriented_instructions.jsonl.gz": ("completion", 0),
    "sft/dolly_hhrlhf_train_small.jsonl.gz": ("completion", 0),
    "sft/glaive_toolcall_en_demo.jsonl.gz": ("completion", 0),
    "sft/reason_tool_use_demo_50.jsonl.gz": ("completion", 0),
    "sft/identity.jsonl.gz": ("completion", 0),
    "sft/gpteacher_codegen.jsonl.gz": ("completion", 0),
    "sft/gpteacher_roleplay.jsonl.gz": ("completion", 0),
    "sft/gpteacher_toolformer.jsonl.gz": ("completion", 0),
    "sft/fastchat_dummy_conversation.jsonl.gz": ("completion", 0),
    "preference/dpo_en_demo.jsonl.gz": ("preference", 0),
    "preference/kto_en_demo.jsonl.gz": ("unpaired", 0),
    "preference/hh_rlhf_harmless_base_test.jsonl.gz": ("preference", 10),  # 3 empty answers, 7 with one role twice
    "preference/llmbar.jsonl.gz": ("preference", 0),
    "preference/mt_bench_human_200.jsonl.gz": ("preference", 0),
    "math/gsm8k_train.jsonl.gz": ("prompt", 0),
    "math/gsm8k_test.jsonl.gz": ("prompt", 0),
    "math/math500.jsonl.gz": ("prompt", 0),
    "math/svamp.jsonl.gz": ("prompt", 0),
    "math/agieval_aqua-rat.jsonl.gz": ("prompt", 0),
    "math/agieval_sat-math.jsonl.gz": ("prompt", 0),
    "math/agieval_gaokao-mathqa.jsonl.gz": ("prompt", 7),  # labels that name no single choice
    "math/simple_arithmetic.jsonl.gz": ("completion", 0),
    "math/math_qa.jsonl.gz": ("prompt", 0),
    f"{MC}/agieval_lsat-ar.jsonl.gz": ("prompt", 0),
    f"{MC}/mmlu_stem.jsonl.gz": ("prompt", 0),
    f"{MC}/arc_challenge.jsonl.gz": ("prompt", 0),
    f"{MC}/boolq.jsonl.gz": ("prompt", 0),
    f"{MC}/pubmed_qa_labeled.jsonl.gz": ("completion", 0),
    "qa/triviaqa_3k.jsonl.gz": ("prompt", 0),
    "bbh/date_understanding.json.gz": ("prompt", 0),
    "code/humaneval.jsonl.gz": ("prompt", 0),
    "code/mbpp_test.jsonl.gz": ("prompt", 0),
    "instruction_following/ifeval_input_data.jsonl.gz": ("prompt", 0),
    "corpora/c4_demo.jsonl.gz": ("text", 0),
}
Shared = Callable[[str], Path]


def stated_rows(readme: Path, name: str) -> int:
    """The number of rows that the table in the folder's README gives for a file."""
    line = next(line for line in readme.read_text().splitlines() if line.startswith(f"| `{name}`"))
    found = re.match(r"(\d+)", line.split(" | ")[2])
    assert found is not None
    return int(found.group(1))


@pytest.mark.parametrize("name", FILES)
def test_rows_match_the_table(shared: Shared, name: str) -> None:
    kind, num_bad = FILES[name]
    loaded = data.load(shared(name))
    assert loaded.kind == kind
    assert loaded.report.num_read == stated_rows(shared("README.md"), name)
    assert loaded.report.num_bad == num_bad, loaded.report.summary()
    assert len(loaded) == loaded.report.num_read - num_bad
    assert len({row.id for row in loaded}) == len(loaded)
    if kind != "text":
        assert len([data.to_task(row) for row in loaded]) == len(loaded)


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("preference/pandalm_testset_v1.jsonl.gz", "prompt=instruction,completion=response1"),
        ("preference/fine_grained_rlhf_dev_feedback.jsonl.gz", "prompt=question,chosen=gold,rejected=prediction 1"),
        ("math/gsm8k_example_model_solutions.jsonl.gz", "prompt=question,completion=ground_truth"),
        (f"{MC}/winogrande.jsonl.gz", "prompt=context_options,answer=gold"),
    ],
)
def test_other_shapes_ask_for_columns(shared: Shared, name: str, columns: str) -> None:
    path = shared(name)
    with pytest.raises(DataError, match="no known data format has the columns"):
        data.load(path)
    loaded = data.load(path, columns=columns, max_bad=1)
    assert loaded.report.num_read == stated_rows(shared("README.md"), name)
    fits = "winogrande" not in name  # its contexts are lists of texts, which no column map can make a prompt of
    assert (len(loaded) > 0.7 * loaded.report.num_read) == fits, loaded.report.summary()


def tools_in(path: Path) -> list[list[str]]:
    """The names of the tools of each row, read without the code under test."""
    with gzip.open(path, "rt") as lines:
        listed = [json.loads(json.loads(line)["tools"]) for line in lines]
    return [[tool.get("function", tool)["name"] for tool in tools] for tools in listed]


def test_gsm8k_answers_are_numbers(shared: Shared) -> None:
    tasks = [data.to_task(row) for row in data.load(shared("math/gsm8k_train.jsonl.gz"), kind="prompt")]
    assert all(re.fullmatch(r"-?\d+(\.\d+)?", str(task.answer)) for task in tasks)
    assert tasks[0].answer == "72"
    assert tasks[0].facts["solution"].endswith("#### 72")


def test_glaive_calls_are_parsed_and_paired(shared: Shared) -> None:
    rows = data.load(shared("sft/glaive_toolcall_en_demo.jsonl.gz"), kind="completion")
    messages = [message for row in rows for message in (*row.prompt, *row.completion)]
    assert all(not isinstance(message, str) for message in messages)
    calls = [call for message in messages if not isinstance(message, str) for call in message.tool_calls]
    results = [message for message in messages if not isinstance(message, str) and message.role == "tool"]
    assert len(calls) == len(results) == 211
    assert calls[0].name == "search_recipes"
    assert calls[0].arguments == {"ingredients": ["chicken", "bell peppers", "rice"]}
    named = [[tool.name for tool in row.tools] for row in rows]
    assert named == tools_in(shared("sft/glaive_toolcall_en_demo.jsonl.gz"))


def test_reasoning_and_calls_come_from_typed_parts(shared: Shared) -> None:
    rows = data.load(shared("sft/reason_tool_use_demo_50.jsonl.gz"), kind="completion")
    turns = [turn for row in rows for turn in row.completion if not isinstance(turn, str) and turn.role == "assistant"]
    assert len(turns) == 59 + 41 + 9 + 3
    assert all(turn.reasoning for turn in turns)
    assert sum(len(turn.tool_calls) for turn in turns) == 41 + 2 * 9 + 3 * 3
    named = [[tool.name for tool in row.tools] for row in rows]
    assert named == tools_in(shared("sft/reason_tool_use_demo_50.jsonl.gz"))


def test_dialogues_become_pairs(shared: Shared) -> None:
    rows = data.load(shared("preference/hh_rlhf_harmless_base_test.jsonl.gz"), kind="preference")
    for row in rows:
        assert not isinstance(row.prompt, str)
        assert row.prompt[0].role == row.prompt[-1].role == "user"
        assert "Human:" not in row.prompt[-1].content or "\n\nHuman:" not in row.prompt[-1].content
        assert row.chosen != row.rejected
