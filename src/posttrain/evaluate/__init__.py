"""evaluate: Checkpoint → EvalReport.

Takes a suite (tasks, sampling, grader) and a sampler; gives reports in which every score has an interval, paired
comparisons, and a page to look at. May import: rollout, grade, engine, data, render, models, registry, core.
"""

from posttrain.evaluate.calibration import Calibration, ReliabilityBin, calibration
from posttrain.evaluate.compare import compare
from posttrain.evaluate.intervals import bootstrap_mean, clustered, clustered_standard_error, paired_bootstrap, wilson
from posttrain.evaluate.judge_agreement import (
    bootstrap_tables,
    cohen_kappa,
    krippendorff_alpha,
    pair_agreement,
)
from posttrain.evaluate.judge_bias import JudgeErrors, bias_corrected
from posttrain.evaluate.judge_calibration import (
    JudgeCalibration,
    JudgedAnswer,
    JudgedPair,
    calibrate_answers,
    calibrate_pairs,
)
from posttrain.evaluate.line_chart import Curve, curves_from_metrics
from posttrain.evaluate.page import report_html, report_json
from posttrain.evaluate.reward_report import LengthWatch, RewardReport, ScoredPair, as_eval_report, reward_report
from posttrain.evaluate.reward_report_steps import ScoredSteps, StepReport, step_report
from posttrain.evaluate.run_report import Answer, RunReport, ShownTask, Stage, build_run_report, shown_tasks
from posttrain.evaluate.run_suite import run_suite, run_suite_sync
from posttrain.evaluate.scores import is_right, report_metrics
from posttrain.evaluate.statistics import mcnemar, minimum_detectable_difference, pass_at_k, tasks_needed
from posttrain.evaluate.suite import Suite, suite_from_file

__all__ = [
    "Answer",
    "Calibration",
    "Curve",
    "JudgeCalibration",
    "JudgeErrors",
    "JudgedAnswer",
    "JudgedPair",
    "LengthWatch",
    "ReliabilityBin",
    "RewardReport",
    "RunReport",
    "ScoredPair",
    "ScoredSteps",
    "ShownTask",
    "Stage",
    "StepReport",
    "Suite",
    "as_eval_report",
    "bias_corrected",
    "bootstrap_mean",
    "bootstrap_tables",
    "build_run_report",
    "calibrate_answers",
    "calibrate_pairs",
    "calibration",
    "clustered",
    "clustered_standard_error",
    "cohen_kappa",
    "compare",
    "curves_from_metrics",
    "is_right",
    "krippendorff_alpha",
    "mcnemar",
    "minimum_detectable_difference",
    "pair_agreement",
    "paired_bootstrap",
    "pass_at_k",
    "report_html",
    "report_json",
    "report_metrics",
    "reward_report",
    "run_suite",
    "run_suite_sync",
    "shown_tasks",
    "step_report",
    "suite_from_file",
    "tasks_needed",
    "wilson",
]
