"""Serves `/livez`, `/readyz`, `/status` and `/metrics`, and reports the same to the orchestrator by heartbeat.

Reads every other room and changes none but the sync, which it tells of the database's head.
"""
