"""A Flower app: found, loaded, either half run in a process of its own, and what became of it written down."""
