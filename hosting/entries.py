"""Entries of the decision log that are many, as text for `Outputs.decision_text`: what `to_json` makes of them, sooner."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

SEND_ENTRY = '"what": "send", "task": %s, "node": %s, "type": %s'
"""Takes a task, a node, and the `quoted` message type."""

REPLIED_ENTRY = '"what": "replied", "task": %s, "node": %s'
"""Takes a task and a node."""

CHOICE = frozenset({"what", "kind", "version", "round", "tasks", "nodes", "steps", "cause"})
"""What a strategy says of devices that it chose; asynchronous ones do for every task."""

quoted = functools.lru_cache(64)(json.dumps)
"""A text as JSON."""


def choice_text(choice: Mapping[str, Any]) -> str:
    """A decision whose keys are `CHOICE`."""
    steps = str(choice["steps"]).replace("None", "null")
    return (
        f'"what": "select", "kind": {quoted(choice["kind"])}, "version": {choice["version"]}, '
        f'"round": {choice["round"]}, "tasks": {choice["tasks"]}, "nodes": {choice["nodes"]}, "steps": {steps}, '
        f'"cause": {quoted(choice["cause"])}'
    )
