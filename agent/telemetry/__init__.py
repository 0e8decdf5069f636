"""Holds log lines, metrics, spans, and the status that the other rooms write and `health` shows.

May import `core` and `config`. Promises that no secret is in a log line.
"""
