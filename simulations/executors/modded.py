"""`fused` for apps with mods that act on what training has made: training is still done for many devices at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import Mod

from fedpace.hosting.config import Config
from fedpace.simulations.executors.fused import FusedExecutor
from fedpace.simulations.executors.inline import InlineExecutor
from fedpace.simulations.work import Answer, Computation


class ModdedExecutor:
    """Has `fused` train, and gives each model to the mods one after the other, with the device's message and context.

    For mods that hand on the message as it came, and say so by `after_training`: those of a `LocalTraining`'s ClientApp.
    """

    keeps_state = True

    def __init__(
        self, fused: FusedExecutor, mods: Sequence[Mod], run_id: int, devices: int, run_config: Config
    ) -> None:
        self._fused = fused
        self._trained: dict[str, RecordDict] = {}
        app = ClientApp(mods=list(mods))
        app.train()(self._reply)
        self._inline = InlineExecutor(app, run_id, devices, run_config)
        codecs = [str(mod.codec) for mod in mods if hasattr(mod, "codec")]
        self.codec = codecs[0] if codecs else None
        """Of the devices' updates, as text: the virtual grid reckons with its bytes."""

    @property
    def cohort(self) -> int:
        return self._fused.cohort

    def steps(self, device: int, message_type: str, config: Mapping[str, Any]) -> float | None:
        return self._fused.steps(device, message_type, config)

    def run(self, computations: Sequence[Computation]) -> list[Answer]:
        """As the contract says; a Ctrl-C passes through."""
        answers = self._fused.run(computations)
        places = [place for place, each in enumerate(computations) if _trains(each, answers[place])]
        for place in places:
            update = answers[place].update
            assert update is not None  # or `_trains` would have said no
            self._trained[str(computations[place].task)] = update.content()
            update.release()
        try:
            modded = self._inline.run([computations[place] for place in places])
        finally:
            self._trained.clear()
        for place, answer in zip(places, modded, strict=True):
            answers[place] = answer
        return answers

    def close(self) -> None:
        self._fused.close()

    def _reply(self, message: Message, context: Context) -> Message:
        return Message(self._trained[message.metadata.message_id], reply_to=message)


def _trains(computation: Computation, answer: Answer) -> bool:
    return answer.update is not None and computation.message_type.partition(".")[0] == "train"
