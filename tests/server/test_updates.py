"""A stored update: its arrays as they lie and its content as Flower has it are the same numbers."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedpace.errors import PayloadError
from fedpace.protocol import fleet_pb2 as pb
from fedpace.protocol.blobs import BlobStore, inline_blob
from fedpace.protocol.payloads import payload_bytes
from fedpace.protocol.records import encode
from fedpace.server.updates import StoredUpdate
from tests.generators import bits, keep_inline, law, records


@law
@given(records, st.booleans())
def test_views_are_the_content(content: RecordDict, inline: bool) -> None:
    with TemporaryDirectory() as folder:
        directory = Path(folder) / "7"
        payload = encode(content, keep_inline if inline else BlobStore(directory).put)
        update = StoredUpdate(directory, pb.Payload.FromString(payload.SerializeToString()))
        assert bits(update.content()) == bits(content)
        assert update.nbytes == payload_bytes(payload)
        expected = {
            name: array.numpy()
            for record in content.array_records.values()
            for name, array in record.items()
            if array.stype == "numpy.ndarray"
        }
        views = update.arrays()
        assert set(views) == set(expected)
        for name, array in expected.items():
            view = views[name]
            assert (view.dtype, view.shape, view.tobytes()) == (array.dtype, array.shape, array.tobytes())
            assert view.flags.f_contiguous == array.flags.f_contiguous
            assert not view.flags.writeable


def stored(directory: Path, *, size: int = 100_000) -> StoredUpdate:
    """An update whose model is large enough to lie in a file of its own."""
    arrays = {"w": np.asfortranarray(np.arange(size, dtype=np.float32).reshape(-1, 10)), "b": np.array(2.0)}
    content = RecordDict(
        {
            "arrays": ArrayRecord({name: Array(array) for name, array in arrays.items()}),
            "metrics": MetricRecord({"num-examples": 3}),
            "config": ConfigRecord({"note": "x"}),
        }
    )
    store = BlobStore(directory)
    return StoredUpdate(directory, encode(content, lambda buffers: inline_blob(buffers) or store.put(buffers)))


def test_arrays_are_mapped_aligned_and_in_their_order(tmp_path: Path) -> None:
    update = stored(tmp_path / "7")
    weights = update.arrays()["w"]
    assert weights.flags.f_contiguous and weights.flags.aligned and not weights.flags.owndata
    assert np.array_equal(weights, update.content().array_records["arrays"]["w"].numpy())
    with pytest.raises(ValueError, match="read-only"):
        weights[0, 0] = 1


def test_release_removes_the_folder_and_views_stay_readable(tmp_path: Path) -> None:
    update = stored(tmp_path / "7")
    views = update.arrays()
    assert (tmp_path / "7").is_dir()
    update.release()
    update.release()
    assert not (tmp_path / "7").exists() and tmp_path.is_dir()
    assert float(np.asarray(views["w"]).sum()) == float(np.arange(100_000, dtype=np.float32).sum())
    with pytest.raises(PayloadError, match="cannot be read"):
        update.content()


def test_what_lies_in_the_message_has_no_folder_to_remove(tmp_path: Path) -> None:
    update = stored(tmp_path / "7", size=10)
    neighbour = tmp_path / "7" / "of-another"
    neighbour.touch()
    update.release()
    assert neighbour.exists() and update.arrays()["b"] == 2


def test_of_arrays_of_one_name_the_later_record_wins() -> None:
    content = RecordDict({"one": ArrayRecord([np.zeros(1)]), "two": ArrayRecord([np.ones(2)])})
    update = StoredUpdate(Path("nowhere"), encode(content, keep_inline))
    assert np.array_equal(update.arrays()["0"], np.ones(2))
