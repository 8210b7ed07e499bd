"""The blobs of messages a ServerApp has out: each written once, kept while somebody may need it."""

from __future__ import annotations

import gc
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from fedpace.protocol import fleet_pb2 as pb
from fedpace.protocol.blobs import BlobStore
from fedpace.protocol.spares import SpareFiles

_KEPT_BLOBS = 4
_LARGE_BYTES = 16 << 20


class SentBlobs:
    """The blobs of messages that are out. One is written when first sent and removed when nobody needs it any more."""

    def __init__(self, store: BlobStore) -> None:
        self._store = store
        store.spares = SpareFiles(store.directory.with_name("spares-out"), _KEPT_BLOBS + 1)
        self._known: OrderedDict[tuple[int, ...], tuple[Sequence[bytes | memoryview], pb.Blob]] = OrderedDict()
        self._uses: dict[bytes, int] = {}

    def put(self, buffers: Sequence[bytes | memoryview]) -> pb.Blob:
        """Bytes never change, so the same objects are the same blob: they need no second look."""
        key = tuple(map(id, buffers))
        if key in self._known:
            self._known.move_to_end(key)
        else:
            self._known[key] = (buffers, self._store.put(buffers))
            if self._known[key][1].size >= _LARGE_BYTES:
                gc.collect()  # Flower's records refer to themselves: the last round's replies would stay mapped
        return self._known[key][1]

    def take(self, blobs: Iterable[bytes]) -> None:
        for name in blobs:
            self._uses[name] = self._uses.get(name, 0) + 1

    def give_back(self, blobs: Iterable[bytes]) -> None:
        for name in blobs:
            self._uses[name] -= 1
        self.forget_old()

    def forget_old(self) -> None:
        """Keeps the last few, which the next messages may carry again; of older ones, those still in use."""
        for key in list(self._known)[:-_KEPT_BLOBS]:
            name = self._known[key][1].name
            if not self._uses.get(name):
                del self._known[key]
                self._uses.pop(name, None)
                if all(blob.name != name for _, blob in self._known.values()):
                    self._store.remove(name)
