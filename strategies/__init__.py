"""The mathematics of a federation: select, plan, weigh, compensate, fold. No sockets, files, clock or global randomness."""
