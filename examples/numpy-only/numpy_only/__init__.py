"""Softmax regression with numpy alone, by devices that remember their momentum."""
