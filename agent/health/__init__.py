"""Answers `/livez`, `/readyz`, `/status` and `/metrics`, and tells the orchestrator the same by heartbeat.
Looks at every other room and changes none.
"""
