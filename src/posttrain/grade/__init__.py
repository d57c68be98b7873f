"""grade: says how good a trajectory is.

Takes Trajectory (with its Task: answer, facts), gives Grade. May import core; math-verify only in a worker process.

    grader = grade.Weighted({grade.Number(): 1.0, grade.Length(max=200): 0.1})
    grades = await grade.grade_all(grader, trajectories)
    grade.check_failures(grades)
    metrics = grade.reward_metrics(grades, [trajectory.group for trajectory in trajectories])
"""

from posttrain.grade.answer import accepted_answers, answer_text, normalised, right, trajectory_from_text, wrong
from posttrain.grade.batch import check_failures, grade_all
from posttrain.grade.citation import Citations, citations_in, quotations_in, quoted_from
from posttrain.grade.code import InputOutput, UnitTests, code_in, human_eval_task, mbpp_task
from posttrain.grade.combine import Function, Weighted
from posttrain.grade.compose import Gate, Product, Threshold, Veto, normalise_by_group
from posttrain.grade.constitution import ConstitutionJudge
from posttrain.grade.hacking_watch import (
    Alarm,
    HackingWatch,
    Signs,
    WatchBounds,
    asks_for_marks,
    is_master_key,
    step_signs,
)
from posttrain.grade.http_reward import HttpReward
from posttrain.grade.instruction import INSTRUCTION_KINDS, Instructions, instruction_task, loose_forms
from posttrain.grade.instruction_text import Tools
from posttrain.grade.json_schema import JsonSchema, NoJson, json_in
from posttrain.grade.judge import BinaryJudge, ScaleJudge, TemplateJudge
from posttrain.grade.judge_budget import Budget, BudgetSpent, Price
from posttrain.grade.judge_cache import JudgeCache
from posttrain.grade.judge_model import JudgeFailed, JudgeModel, ScriptedChat, StructuredChat
from posttrain.grade.judge_prompt import Shot
from posttrain.grade.maths import Maths
from posttrain.grade.multiple_choice import MultipleChoice, choice_task, chosen_option
from posttrain.grade.number import Number, boxed, numbers_in
from posttrain.grade.overlap import Graded, grade_while, waits
from posttrain.grade.pairwise import PairVerdict, PairwiseJudge
from posttrain.grade.panel import Panel
from posttrain.grade.people import HumanGrade, HumanGrades, People
from posttrain.grade.postgres import PostgresDatabase
from posttrain.grade.postgres_copies import postgres_copies
from posttrain.grade.proof import ProofReport, ProvenCase, all_graders, prove, prove_all
from posttrain.grade.rag import RagJudge
from posttrain.grade.repetition import Repetition, longest_loop, repeated_ngrams
from posttrain.grade.reward_metrics import failure_metrics, reward_metrics
from posttrain.grade.reward_model import EnsembleScorer, Prefers, RewardModel, ScoreText
from posttrain.grade.reward_whitening import Moments
from posttrain.grade.rubric import Rubric, RubricItem, RubricJudge, rubric_of
from posttrain.grade.rubric_book import RubricBook, evolve_rubric, write_rubric
from posttrain.grade.sandbox import JudgedTests, Sandbox, SandboxLimits, SandboxRun
from posttrain.grade.sandbox_docker import DockerSandbox
from posttrain.grade.sandbox_process import SandboxUnavailable
from posttrain.grade.sandbox_protocol import RunsPrograms
from posttrain.grade.sandbox_remote import RemoteSandbox, SandboxServer
from posttrain.grade.sql_compare import results_match, rows_match
from posttrain.grade.sql_copies import mutated_copies
from posttrain.grade.sql_database import SqlDatabase, SqliteDatabase, open_database, schema_text
from posttrain.grade.sql_gold import alternatives
from posttrain.grade.sql_result import SqlResult, sql_in
from posttrain.grade.sql_runner import QueryLimits, QueryResult, QueryRunner
from posttrain.grade.text import Exact, Length, Regex
from posttrain.grade.tool_call import NoToolCall, ToolCalls, bfcl_task, tool_calls_in
from posttrain.grade.tool_turns import bfcl_turns
from posttrain.grade.url_guard import UrlGuard, UrlRefused
from posttrain.grade.watched import TellsRun, WatchedGrader
from posttrain.grade.word_overlap import Contains, WordF1, answer_words, word_f1
from posttrain.grade.worker_pool import WorkerFailure, WorkerPool

__all__ = [
    "INSTRUCTION_KINDS",
    "Alarm",
    "BinaryJudge",
    "Budget",
    "BudgetSpent",
    "Citations",
    "ConstitutionJudge",
    "Contains",
    "DockerSandbox",
    "EnsembleScorer",
    "Exact",
    "Function",
    "Gate",
    "Graded",
    "HackingWatch",
    "HttpReward",
    "HumanGrade",
    "HumanGrades",
    "InputOutput",
    "Instructions",
    "JsonSchema",
    "JudgeCache",
    "JudgeFailed",
    "JudgeModel",
    "JudgedTests",
    "Length",
    "Maths",
    "Moments",
    "MultipleChoice",
    "NoJson",
    "NoToolCall",
    "Number",
    "PairVerdict",
    "PairwiseJudge",
    "Panel",
    "People",
    "PostgresDatabase",
    "Prefers",
    "Price",
    "Product",
    "ProofReport",
    "ProvenCase",
    "QueryLimits",
    "QueryResult",
    "QueryRunner",
    "RagJudge",
    "Regex",
    "RemoteSandbox",
    "Repetition",
    "RewardModel",
    "Rubric",
    "RubricBook",
    "RubricItem",
    "RubricJudge",
    "RunsPrograms",
    "Sandbox",
    "SandboxLimits",
    "SandboxRun",
    "SandboxServer",
    "SandboxUnavailable",
    "ScaleJudge",
    "ScoreText",
    "ScriptedChat",
    "Shot",
    "Signs",
    "SqlDatabase",
    "SqlResult",
    "SqliteDatabase",
    "StructuredChat",
    "TellsRun",
    "TemplateJudge",
    "Threshold",
    "ToolCalls",
    "Tools",
    "UnitTests",
    "UrlGuard",
    "UrlRefused",
    "Veto",
    "WatchBounds",
    "WatchedGrader",
    "Weighted",
    "WordF1",
    "WorkerFailure",
    "WorkerPool",
    "accepted_answers",
    "all_graders",
    "alternatives",
    "answer_text",
    "answer_words",
    "asks_for_marks",
    "bfcl_task",
    "bfcl_turns",
    "boxed",
    "check_failures",
    "choice_task",
    "chosen_option",
    "citations_in",
    "code_in",
    "evolve_rubric",
    "failure_metrics",
    "grade_all",
    "grade_while",
    "human_eval_task",
    "instruction_task",
    "is_master_key",
    "json_in",
    "longest_loop",
    "loose_forms",
    "mbpp_task",
    "mutated_copies",
    "normalise_by_group",
    "normalised",
    "numbers_in",
    "open_database",
    "postgres_copies",
    "prove",
    "prove_all",
    "quotations_in",
    "quoted_from",
    "repeated_ngrams",
    "results_match",
    "reward_metrics",
    "right",
    "rows_match",
    "rubric_of",
    "schema_text",
    "sql_in",
    "step_signs",
    "tool_calls_in",
    "trajectory_from_text",
    "waits",
    "word_f1",
    "write_rubric",
    "wrong",
]
