"""Benchmarks: one file each, every one with its dataset as an argument."""
