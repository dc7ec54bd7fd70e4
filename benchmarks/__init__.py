"""Suites, peers and recorded results of the comparisons, installed as `decoupled.benchmarks`."""
