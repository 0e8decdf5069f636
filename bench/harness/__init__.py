"""Provides what every measurement needs: peers, a fresh file system, the machine's noise, rows with their intervals and
bounds, and how a run is published. Imports nothing of `bench.cases`.
"""
