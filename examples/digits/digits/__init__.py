"""Handwritten digits, learned from devices that see different ones."""
