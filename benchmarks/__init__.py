"""Measurements of attention: python benchmarks/run.py --help."""
