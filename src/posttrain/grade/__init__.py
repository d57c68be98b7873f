"""grade: says how good a trajectory is.

Takes Trajectory (with its Task: answer, facts), gives Grade. May import core; math-verify only in a worker process.

    grader = grade.Weighted({grade.Number(): 1.0, grade.Length(max=200): 0.1})
    grades = await grade.grade_all(grader, trajectories)
    grade.check_failures(grades)
    metrics = grade.reward_metrics(grades, [trajectory.group for trajectory in trajectories])
"""

from posttrain.grade.answer import accepted_answers, answer_text, normalised, right, trajectory_from_text, wrong
from posttrain.grade.batch import check_failures, grade_all
from posttrain.grade.combine import Function, Weighted
from posttrain.grade.maths import Maths
from posttrain.grade.number import Number, boxed, numbers_in
from posttrain.grade.proof import ProofReport, ProvenCase, all_graders, prove
from posttrain.grade.reward_metrics import reward_metrics
from posttrain.grade.reward_model import EnsembleScorer, Prefers, RewardModel, ScoreText
from posttrain.grade.reward_whitening import Moments
from posttrain.grade.sandbox import JudgedTests, Sandbox, SandboxLimits, SandboxRun
from posttrain.grade.sandbox_process import SandboxUnavailable
from posttrain.grade.sql_compare import rows_match
from posttrain.grade.sql_result import SqlResult, sql_in
from posttrain.grade.sql_runner import QueryLimits, QueryResult, QueryRunner
from posttrain.grade.text import Exact, Length, Regex
from posttrain.grade.worker_pool import WorkerFailure, WorkerPool

__all__ = [
    "EnsembleScorer",
    "Exact",
    "Function",
    "JudgedTests",
    "Length",
    "Maths",
    "Moments",
    "Number",
    "Prefers",
    "ProofReport",
    "ProvenCase",
    "QueryLimits",
    "QueryResult",
    "QueryRunner",
    "Regex",
    "RewardModel",
    "Sandbox",
    "SandboxLimits",
    "SandboxRun",
    "SandboxUnavailable",
    "ScoreText",
    "SqlResult",
    "Weighted",
    "WorkerFailure",
    "WorkerPool",
    "accepted_answers",
    "all_graders",
    "answer_text",
    "boxed",
    "check_failures",
    "grade_all",
    "normalised",
    "numbers_in",
    "prove",
    "reward_metrics",
    "right",
    "rows_match",
    "sql_in",
    "trajectory_from_text",
    "wrong",
]
