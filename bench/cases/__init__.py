"""Measures: one module for each row or family of rows, whose first sentence says what is measured against what. Each
has a `run(quick) -> rows`. May import `bench.harness` and whatever it measures.
"""
