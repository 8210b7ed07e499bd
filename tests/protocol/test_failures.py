"""The codes are Flower's."""

from __future__ import annotations

from flwr.common.constant import ErrorCode

from fedpace.protocol.failures import Code


def test_codes_are_those_of_flower() -> None:
    assert {code.name: int(code) for code in Code} == {code.name: getattr(ErrorCode, code.name) for code in Code}
