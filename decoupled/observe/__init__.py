"""Observation: statistics, traces for Perfetto, and the HTML report."""
