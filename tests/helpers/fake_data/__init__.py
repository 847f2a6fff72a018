"""Benchmarks in small: their real folders and files, with few and tiny pictures."""
