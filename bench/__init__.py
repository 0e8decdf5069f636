"""Measures the product against peers, side by side on one machine, and publishes the ratios: `cases` are the
measurements, `harness` is what they share. Of the product nothing imports it; `soak` draws with `harness.svg`.
"""
