"""Benchmarks: the cost of an optimiser step and of a whole fit, and the time to certified recall."""
