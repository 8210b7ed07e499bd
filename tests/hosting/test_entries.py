"""Entries of the decision log that are written by hand are what `to_json` writes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fedpace.hosting.entries import CHOICE, REPLIED_ENTRY, SEND_ENTRY, choice_text, quoted
from fedpace.hosting.outputs import to_json
from fedpace.strategies.events import Send, TaskOrder

numbers = st.integers(0, 2**63 - 1)


@given(numbers, numbers, st.text())
def test_tasks_that_are_sent_and_come_back(task: int, node: int, kind: str) -> None:
    sent = {"what": "send", "task": task, "node": node, "type": kind}
    assert "{" + SEND_ENTRY % (task, node, quoted(kind)) + "}" == to_json(sent)
    replied = {"what": "replied", "task": task, "node": node}
    assert "{" + REPLIED_ENTRY % (task, node) + "}" == to_json(replied)


@given(st.text(), st.text(), numbers, numbers, st.lists(st.tuples(numbers, numbers, st.none() | numbers)))
def test_choices_of_devices(
    kind: str, cause: str, version: int, number: int, chosen: list[tuple[int, int, int | None]]
) -> None:
    orders = [TaskOrder(node, {} if steps is None else {"local-steps": steps}, task) for task, node, steps in chosen]
    entry = Send(cause, kind, version, number, orders).entry()
    assert entry.keys() == CHOICE
    assert "{" + choice_text(entry) + "}" == to_json(entry)
