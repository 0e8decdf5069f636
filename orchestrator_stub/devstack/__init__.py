"""Runs everything on one machine for `preview-orchestrator dev`: database, stand-in, control plane, agent, and an
editor that sends what is saved in a directory. Stands on every other room; only `__main__` imports it. Promises that
what it started it stops, however it ends.
"""
