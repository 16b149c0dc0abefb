"""The metrics log, progress and the HTML report; imports none of its callers, no plotting before a report is made."""

from perilune.report.compare import (
    comparison_tables,
    sweep_results,
    write_any_report,
    write_comparison,
    write_sweep_index,
)
from perilune.report.metrics import MetricRecord, MetricsLog, MetricValue, read_metrics, series
from perilune.report.progress import (
    LineProgress,
    NullProgress,
    Progress,
    ProgressTask,
    TerminalProgress,
    logs_as_notes,
    make_progress,
)
from perilune.report.recommender import (
    ConflictRow,
    GroupRow,
    MethodRow,
    between,
    conflict_table,
    group_table,
    write_evaluation,
)
from perilune.report.report import write_report
from perilune.report.results import (
    Sample,
    StageResult,
    TaskScore,
    read_result,
    read_samples,
    write_result,
    write_samples,
)
from perilune.report.routing import (
    BlockLoad,
    LayerReads,
    block_load,
    load_table,
    recall_table,
    routing_page,
    routing_picture,
)
from perilune.report.tables import summary_rows, summary_table, task_table

__all__ = [
    "BlockLoad",
    "ConflictRow",
    "GroupRow",
    "LayerReads",
    "LineProgress",
    "MethodRow",
    "MetricRecord",
    "MetricValue",
    "MetricsLog",
    "NullProgress",
    "Progress",
    "ProgressTask",
    "Sample",
    "StageResult",
    "TaskScore",
    "TerminalProgress",
    "between",
    "block_load",
    "comparison_tables",
    "conflict_table",
    "group_table",
    "load_table",
    "logs_as_notes",
    "make_progress",
    "read_metrics",
    "read_result",
    "read_samples",
    "recall_table",
    "routing_page",
    "routing_picture",
    "series",
    "summary_rows",
    "summary_table",
    "sweep_results",
    "task_table",
    "write_any_report",
    "write_comparison",
    "write_evaluation",
    "write_report",
    "write_result",
    "write_samples",
    "write_sweep_index",
]
