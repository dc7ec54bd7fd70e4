"""Runtimes: they know actors, edges and messages, and nothing about training."""
