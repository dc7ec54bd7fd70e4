"""Transports: how the messages of one edge get from one process to another."""
