"""A warm process of the pool: `python -m fedpace.simulations.executors.worker`, started by it. Runs one task after another.

Nothing of a task outlives it but what the app itself keeps; whatever the app does here costs this process, not the pool.
"""

from __future__ import annotations

import faulthandler
import functools
import gc
import os
import select
import signal
import socket
import struct
import sys
import threading
import traceback
from pathlib import Path

from fedpace.errors import FedpaceError
from fedpace.hosting.app import load_app_folder
from fedpace.hosting.flower import load_client_app
from fedpace.hosting.processes import log_to_stderr
from fedpace.protocol import fleet_pb2 as pb
from fedpace.protocol.mapped import MAPPED_BYTES
from fedpace.protocol.payloads import all_blobs, payload_bytes
from fedpace.protocol.records import Buffers
from fedpace.protocol.values import decode_values
from fedpace.simulations.executors.arrays import write_quickly
from fedpace.simulations.executors.device import Devices, Task
from fedpace.simulations.executors.peer import Parts, Peer
from fedpace.simulations.executors.segments import Arena

FIRST_SEGMENT = 1 << 63
"""A worker's segments are numbered from here, those of the pool from 0."""

SETUP = struct.Struct("<Q?")
"""Devices of the fleet, and whether updates are checked; then a pb.Setup with the app's folder, and a pb.Run."""

LOADED = b"loaded"
"""What a worker says first; then why the app cannot be run, empty if it can."""

TASK = struct.Struct("<QQQ")
"""Device, node id and seed; then a pb.Offer, and the Payload of the state. The answer is a pb.SlotRecord."""


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    log_to_stderr()
    faulthandler.enable()
    write_quickly()
    arena = Arena(FIRST_SEGMENT)
    peer = Peer(_connection(), arena)
    if (setup := peer.receive()) is None:
        return
    threading.Thread(target=_end_with, args=(peer.fileno(),), daemon=True).start()
    devices, error = _load(setup)
    peer.send((LOADED, error.encode(), b""))
    if devices is None:
        return
    gc.freeze()  # what is here now stays, and need not be looked through again
    while (parts := peer.receive()) is not None:
        _work(devices, parts, peer, arena)


def _connection() -> socket.socket:
    connection = socket.socket(fileno=int(sys.argv[1]))
    # A child that the app forks must not hold this end open: the pool would not see this process die.
    os.register_at_fork(after_in_child=functools.partial(os.close, connection.fileno()))
    return connection


def _end_with(descriptor: int) -> None:
    """Ends this process, in the middle of a task too, as soon as the other end of its socket is closed."""
    waiter = select.poll()
    waiter.register(descriptor, 0)  # only that nobody is there any more
    waiter.poll()
    os._exit(0)


def _load(parts: Parts) -> tuple[Devices | None, str]:
    """The app, ready to run, or why it is not."""
    devices, check_updates = SETUP.unpack(parts[0])
    setup, run = pb.Setup.FromString(parts[1]), pb.Run.FromString(parts[2])
    try:
        app = load_client_app(load_app_folder(Path(setup.app_directory)))
    except FedpaceError as error:
        return None, str(error)
    except BaseException as error:  # noqa: BLE001 - whatever importing user code raises
        traceback.print_exc()
        return None, f"{type(error).__name__}: {error}"
    config = decode_values(run.run_config)
    return Devices(app, run.run_id, devices, config, check_updates=check_updates), ""


def _work(devices: Devices, parts: Parts, peer: Peer, arena: Arena) -> None:
    device, node_id, seed = TASK.unpack(parts[0])
    task = Task(pb.Offer.FromString(parts[1]), device, node_id, seed, pb.Payload.FromString(parts[2]))
    written: list[pb.Blob] = []

    def put(buffers: Buffers) -> pb.Blob:
        written.append(arena.put(buffers))
        return written[-1]

    record = devices.work(task, lambda blob: (arena if blob in arena else peer.mapped).get(blob), put)
    sys.stdout.flush()
    sys.stderr.flush()
    peer.send((record.SerializeToString(), b"", b""), [*all_blobs(record.reply.payload), *all_blobs(record.state)])
    arena.release(written)
    if payload_bytes(task.offer.payload) > MAPPED_BYTES:
        gc.collect()  # Flower's records refer to themselves: model after model would stay


if __name__ == "__main__":
    main()
