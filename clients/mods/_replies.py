"""What mods add to replies."""

from __future__ import annotations

from flwr.app import MetricRecord, RecordDict


def metric_record(content: RecordDict) -> MetricRecord:
    """The reply's metric record, its first if there are several; a new one, "metrics", where there is none."""
    for record in content.metric_records.values():
        return record
    content["metrics"] = made = MetricRecord()
    return made
