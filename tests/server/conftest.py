"""A fleet under siege: the tests of hostile devices play those against a real server that also has an honest one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fleets import PuppetFleet

MAX_REPLY_BYTES = 6 << 20
SETTINGS = {
    "hello-seconds": 0.5,
    "heartbeat-seconds": 0.5,
    "lost-after-seconds": 8,
    "reconnect-grace-seconds": 0.5,
    "max-reply-bytes": MAX_REPLY_BYTES,
    "log-lines-per-second": 50,
}


@pytest.fixture(scope="session")
def besieged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PuppetFleet]:
    """A fleet with one honest device, in which all of these tests misbehave."""
    with PuppetFleet(tmp_path_factory.mktemp("besieged"), server=SETTINGS) as fleet:
        fleet.start().join("honest")
        yield fleet


@pytest.fixture
def fleet(besieged: PuppetFleet) -> Iterator[PuppetFleet]:
    """The same; afterwards the honest device works on, in the same process, over the same connection."""
    before = besieged.ask("honest")["metrics"]
    yield besieged
    after = besieged.ask("honest")["metrics"]
    assert (after["pid"], after["calls"]) == (before["pid"], before["calls"] + 1)
    log = besieged.log("server")
    assert log.count("honest joined") == 1 and "Traceback" not in log, log[-3000:]
