"""Many devices that join at once are the same as one after the other."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedpace.protocol.paced import DeviceProfile, census_of
from fedpace.strategies.fleet import COLUMNS, Fleet
from tests.generators import law


def _profile(node_id: int, cpus: int, load: float | None, free: int | None) -> DeviceProfile:
    return DeviceProfile(
        node_id=node_id,
        name=f"device-{node_id}",
        slots=1 + cpus % 3,
        cpu_count=cpus,
        cpu_model="",
        memory_bytes=8 * (free or 0),
        gpus=("gpu",) * (cpus % 2),
        gpu_memory_bytes=(1,) * (cpus % 2),
        load=load,
        free_memory_bytes=free,
    )


profiles = st.lists(
    st.builds(
        _profile,
        st.integers(1, 2**63),
        st.integers(0, 8),
        st.none() | st.floats(0, 1),
        st.none() | st.integers(0, 2**40),
    ),
    max_size=200,
    unique_by=lambda profile: profile.node_id,
)


@law
@given(profiles, st.data())
def test_joining_at_once_is_joining_one_by_one(found: list[DeviceProfile], data: st.DataObject) -> None:
    node_ids = [profile.node_id for profile in found]
    known = data.draw(st.lists(st.sampled_from(node_ids), unique=True)) if found else []
    together, apart = Fleet(), Fleet()
    for fleet in (together, apart):
        for node_id in known:
            row = fleet.know(node_id)
            if node_id % 2:
                fleet.join(node_id)
                fleet.begin(row)
    together.join_all(node_ids, census_of(found))
    for profile in found:
        apart.describe(apart.know(profile.node_id), profile)
        apart.join(profile.node_id)
    _equal(together, apart)


def _equal(one: Fleet, other: Fleet) -> None:
    for name in COLUMNS:
        left: Any = one[name]
        if name != "place":  # the order of the idle is the order of history
            np.testing.assert_array_equal(left, other[name], name)
    assert set(one.idle().tolist()) == set(other.idle().tolist())
    assert (one["place"] >= 0).tolist() == (other["place"] >= 0).tolist()
    assert one.idle()[one["place"][one.idle()]].tolist() == one.idle().tolist()
    assert (one.size, one.alive_count) == (other.size, other.alive_count)
