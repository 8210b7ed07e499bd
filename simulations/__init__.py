"""A fleet in virtual time on one machine: clock, fleet models, executors."""
