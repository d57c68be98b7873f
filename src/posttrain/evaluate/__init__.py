"""evaluate: Checkpoint → EvalReport.

Takes a suite (tasks, sampling, grader) and a sampler; gives reports in which every score has an interval, paired
comparisons, and a page to look at. May import: rollout, grade, engine, data, render, models, registry, core.
"""

from posttrain.evaluate.compare import compare
from posttrain.evaluate.intervals import bootstrap_mean, clustered, clustered_standard_error, paired_bootstrap, wilson
from posttrain.evaluate.run_suite import run_suite, run_suite_sync
from posttrain.evaluate.scores import is_right, report_metrics
from posttrain.evaluate.statistics import mcnemar, minimum_detectable_difference, pass_at_k, tasks_needed
from posttrain.evaluate.suite import Suite, suite_from_file

__all__ = [
    "Suite",
    "bootstrap_mean",
    "clustered",
    "clustered_standard_error",
    "compare",
    "is_right",
    "mcnemar",
    "minimum_detectable_difference",
    "paired_bootstrap",
    "pass_at_k",
    "report_metrics",
    "run_suite",
    "run_suite_sync",
    "suite_from_file",
    "tasks_needed",
    "wilson",
]
