"""The same model trained in one place on all training images: what federated training is measured against.

Run `python -m digits.central` in the app's folder; it prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
import tomllib
from pathlib import Path
from typing import Any

import torch

from digits.task import evaluate, initial_model, load_split, train

EPOCHS = 25


def train_centrally(config: dict[str, Any], epochs: int = EPOCHS) -> dict[str, float]:
    """Train with the batch size, learning rate, momentum and seed of `config`, the app's run config.

    Returns "accuracy" and "loss" on the test images, the "epochs" run, and the "seconds" that training took.
    Seeds torch's global generator.
    """
    samples, test_samples = load_split()
    model = initial_model(config["seed"])
    torch.manual_seed(config["seed"])
    began = time.monotonic()
    train(
        model,
        samples,
        epochs=epochs,
        batch_size=config["batch-size"],
        learning_rate=config["learning-rate"],
        momentum=config["momentum"],
    )
    seconds = time.monotonic() - began
    loss, accuracy = evaluate(model, test_samples)
    return {"accuracy": accuracy, "loss": loss, "epochs": epochs, "seconds": round(seconds, 3)}


def default_config() -> dict[str, Any]:
    """The run config that the app's pyproject.toml gives."""
    pyproject = Path(__file__).parents[1] / "pyproject.toml"
    config: dict[str, Any] = tomllib.loads(pyproject.read_text(encoding="utf-8"))["tool"]["flwr"]["app"]["config"]
    return config


def main() -> None:
    """Train and print what came of it."""
    parser = argparse.ArgumentParser(description="Train the digits model in one place.")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="passes over the training images (%(default)s)")
    parser.add_argument("--seed", type=int, help="of the model and the order of the images (the app's own)")
    arguments = parser.parse_args()
    config = default_config()
    if arguments.seed is not None:
        config["seed"] = arguments.seed
    print(json.dumps(train_centrally(config, arguments.epochs)))


if __name__ == "__main__":
    main()
