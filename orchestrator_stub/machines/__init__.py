"""Starts, finds and ends the machines that agents run in: local processes, containers, Fly. `driver` is the
protocol that all three fit, held by one suite. May import `config` alone.
"""
