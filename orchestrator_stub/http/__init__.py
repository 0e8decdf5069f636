"""Serves the session API, the control plane's routes, health and metrics: parses, checks who asks, renders. May
import `sessions` and what is below. Promises to decide nothing: what a request may do is said by `sessions` and the
database.
"""
