"""Benchmarks, each side by side in one run: what a training step costs, and how good each method gets."""
