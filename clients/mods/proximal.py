"""`proximal`: FedProx's proximal term for apps that know nothing of it.

Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith: "Federated Optimization in Heterogeneous Networks", MLSys 2020, equation 2:
a device minimises F_k(w) + mu/2 ||w - w_t||^2, so mu (w - w_t) is added to every gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flwr.app import Context, Message, RecordDict
from numpy.typing import NDArray

from fedpace.clients.mods._steps import GradientCorrection, NumpyArrays, Tensor, model_of, same, watch_steps
from fedpace.errors import ConfigError


def proximal(message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
    """Adds the proximal term where the message's config has a "proximal-mu" above 0 (as Flower's FedProx sends it).

    The term comes after whatever the app does to its gradients before a step, such as clipping. Apps that add the term
    to their loss themselves do without this mod. Raises ConfigError where the optimiser's parameters are not those
    received, and where the app trains without torch's optimisers.
    """
    mu = _mu(message.content)
    if not mu > 0:
        return call_next(message, context)
    model = model_of(message.content, "proximal")
    watcher = _ProximalTerm(model, mu)
    with watch_steps(watcher):
        reply = call_next(message, context)
    silent = not watcher.steps and not reply.has_error() and reply.content.array_records
    if silent and not same(model, model_of(reply.content, "proximal")):
        raise ConfigError(
            f"proximal: proximal-mu is {mu:g}, but the app trained without a step of torch's optimisers that could be "
            "seen: import torch at the top of the app's module, or add the term to the loss there"
        )
    return reply


def _mu(content: RecordDict) -> float:
    for record in content.config_records.values():
        value = record.get("proximal-mu")
        if isinstance(value, int | float):
            return float(value)
    return 0.0


class _ProximalTerm(GradientCorrection):
    def __init__(self, model: NumpyArrays, mu: float) -> None:
        super().__init__("proximal", model)
        self._model = model
        self._mu = mu

    def constant(self, name: str) -> NDArray[Any]:
        return self._model[name]

    def term(self, parameter: Tensor, constant: Tensor) -> Tensor:
        return self._mu * (parameter - constant)
