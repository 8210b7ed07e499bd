"""Flower's own strategies one after another, and a ClientApp that writes into what it received."""
