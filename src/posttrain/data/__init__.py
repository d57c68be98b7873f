"""data: files to records, and what has to be done to data before training.

Takes files (JSON lines, JSON, CSV, Parquet, Arrow, saved Hugging Face datasets) and gives typed rows, tasks, mixtures,
and reports on bad rows, duplicates and contamination. May import core only, and never torch; pyarrow is optional.
"""

from posttrain.data.contamination import ContaminationMatch, ContaminationReport, SetShare, check_contamination
from posttrain.data.dataset import Dataset, load, stream
from posttrain.data.dedup import Deduplicated, Duplicate, dedup_exact, dedup_near
from posttrain.data.formats import ColumnMap, DatasetType, Format, detect
from posttrain.data.mixture import Mixture
from posttrain.data.pairs import unpair
from posttrain.data.questions import final_answer
from posttrain.data.read import Row, read_rows
from posttrain.data.rows import (
    BadRow,
    CompletionRow,
    Content,
    Kind,
    LabelRow,
    LoadReport,
    PreferenceRow,
    PromptRow,
    StepsRow,
    TextRow,
    TypedRow,
)
from posttrain.data.streaming import Stream
from posttrain.data.tasks import as_chat, to_task

__all__ = [
    "BadRow",
    "ColumnMap",
    "CompletionRow",
    "ContaminationMatch",
    "ContaminationReport",
    "Content",
    "Dataset",
    "DatasetType",
    "Deduplicated",
    "Duplicate",
    "Format",
    "Kind",
    "LabelRow",
    "LoadReport",
    "Mixture",
    "PreferenceRow",
    "PromptRow",
    "Row",
    "SetShare",
    "StepsRow",
    "Stream",
    "TextRow",
    "TypedRow",
    "as_chat",
    "check_contamination",
    "dedup_exact",
    "dedup_near",
    "detect",
    "final_answer",
    "load",
    "read_rows",
    "stream",
    "to_task",
    "unpair",
]
