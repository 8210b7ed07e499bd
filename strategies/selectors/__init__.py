"""Selectors: which idle devices get the next tasks."""

from fedpace.strategies.selectors.gain import GainPerSecond
from fedpace.strategies.selectors.learned import QLearning, Sarsa
from fedpace.strategies.selectors.order import LongestJobFirst, Priority, RoundRobin, ShortestJobFirst
from fedpace.strategies.selectors.resources import Resources
from fedpace.strategies.selectors.tiers import Tiers
from fedpace.strategies.selectors.uniform import Uniform
from fedpace.strategies.selectors.utility import Utility

__all__ = [
    "GainPerSecond",
    "LongestJobFirst",
    "Priority",
    "QLearning",
    "Resources",
    "RoundRobin",
    "Sarsa",
    "ShortestJobFirst",
    "Tiers",
    "Uniform",
    "Utility",
]
