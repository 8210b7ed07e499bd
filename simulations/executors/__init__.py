"""Who runs the computations of simulated devices."""
