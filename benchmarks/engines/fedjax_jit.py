"""FedJAX's federated averaging, on its compiled backend: a jitted step a batch, in one process.

Tuned: images in memory, and XLA told to keep to one thread, where more only cost. The norm of each update, which its
algorithm computes beside, is left in.
"""

from __future__ import annotations

import functools
import os
from importlib.metadata import version
from typing import Any

os.environ["NPROC"] = "1"  # the threads of XLA

import jax

jax.tree_map = jax.tree.map  # the name that FedJAX knows, which JAX has since taken away

import fedjax
import jax.numpy as jnp
import numpy as np
from fedjax.algorithms import fed_avg

from benchmarks.engines.arrays import BATCH_SIZE, DEVICES_A_ROUND, LEARNING_RATE, SEED, Floats, load
from benchmarks.engines.meter import Meter, RoundMeter, arguments

Params = dict[str, Any]
"""The weights as in Work.weights, with torch's names and layouts."""


def main() -> None:
    options = arguments(__doc__).parse_args()
    work = load(options.work)
    apply = {"M": perceptron, "C": convolutional}[work.name]
    data = fedjax.InMemoryFederatedData(
        {b"%07d" % index: dict(zip("xy", work.device(index), strict=True)) for index in range(work.devices)}
    )
    algorithm = fed_avg.federated_averaging(
        jax.jit(jax.grad(functools.partial(loss, apply))),
        fedjax.optimizers.sgd(LEARNING_RATE),
        fedjax.optimizers.sgd(1.0),
        fedjax.ShuffleRepeatBatchHParams(batch_size=BATCH_SIZE, num_epochs=1, seed=SEED),
    )
    sampler = fedjax.client_samplers.UniformGetClientSampler(data, DEVICES_A_ROUND, seed=SEED)
    state = algorithm.init({name: jnp.asarray(array) for name, array in work.weights.items()})
    rounds = RoundMeter(meter := Meter(), options.warm_up, options.rounds)
    for done in range(1, rounds.last + 1):
        state, _ = algorithm.apply(state, sampler.sample())
        jax.block_until_ready(state.params)  # JAX computes behind one's back
        rounds.after(done)
    weights: dict[str, Floats] = {name: np.asarray(array) for name, array in state.params.items()}
    settings = {"fedjax": version("fedjax"), "jax": jax.__version__, "processes": 1}
    meter.report(options.rounds * DEVICES_A_ROUND, weights, options.model, **settings)


def loss(apply: Any, params: Params, batch: dict[str, Any], rng: Any) -> Any:
    """Mean cross-entropy of a batch."""
    chances = jax.nn.log_softmax(apply(params, batch["x"]))
    return -jnp.take_along_axis(chances, batch["y"][:, None], axis=1).mean()


def perceptron(params: Params, images: Any) -> Any:
    hidden = jax.nn.relu(dense(params, "0", images))
    return dense(params, "2", hidden)


def convolutional(params: Params, images: Any) -> Any:
    x = pool(jax.nn.relu(convolve(params, "0", images)))
    x = pool(jax.nn.relu(convolve(params, "3", x)))
    x = jax.nn.relu(dense(params, "7", x.reshape(len(x), -1)))
    return dense(params, "9", x)


def dense(params: Params, layer: str, x: Any) -> Any:
    return x @ params[f"{layer}.weight"].T + params[f"{layer}.bias"]


def convolve(params: Params, layer: str, x: Any) -> Any:
    y = jax.lax.conv_general_dilated(
        x, params[f"{layer}.weight"], (1, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW")
    )
    return y + params[f"{layer}.bias"][:, None, None]


def pool(x: Any) -> Any:
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")


if __name__ == "__main__":
    main()
