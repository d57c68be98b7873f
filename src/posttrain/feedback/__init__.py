"""feedback: from served answers and what people say about them to the next data set.

Takes interactions and feedback records; gives TRL data sets (JSONL) with their provenance.
May import: core, data, render, registry, engine. Never torch, never serve: the store is handed to a server as an
argument.
"""

from posttrain.feedback.agreement import Agreement, agreement
from posttrain.feedback.export import ExportReport, export
from posttrain.feedback.redact import redact
from posttrain.feedback.signals import Rules
from posttrain.feedback.store import FeedbackStore, InteractionPage, StoreCounts, check_feedback

__all__ = [
    "Agreement",
    "ExportReport",
    "FeedbackStore",
    "InteractionPage",
    "Rules",
    "StoreCounts",
    "agreement",
    "check_feedback",
    "export",
    "redact",
]
