"""Mechanism: one graph → graph function a file."""
