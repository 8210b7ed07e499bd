"""Planners: how much work each device gets."""

from fedpace.strategies.planners.deadline import StepsForDeadline
from fedpace.strategies.planners.fixed import Fixed
from fedpace.strategies.planners.ratio import CodecByBandwidth
from fedpace.strategies.planners.split import Split
from fedpace.strategies.planners.together import Together

__all__ = ["CodecByBandwidth", "Fixed", "Split", "StepsForDeadline", "Together"]
