"""What a frozen embedding is worth: features, linear probes, the missing-organ grid, the statistics reference."""

from panfm.evaluate.balance import effective_rank, saliency_entropy
from panfm.evaluate.cohort import Task, evaluate_cohort
from panfm.evaluate.embed import embed_store, load_model
from panfm.evaluate.labels import LabelInfo, LabelledStore, read_label_info
from panfm.evaluate.result import ProbeResult, Score, read_result, write_result

__all__ = [
    "LabelInfo",
    "LabelledStore",
    "ProbeResult",
    "Score",
    "Task",
    "effective_rank",
    "embed_store",
    "evaluate_cohort",
    "load_model",
    "read_label_info",
    "read_result",
    "saliency_entropy",
    "write_result",
]
