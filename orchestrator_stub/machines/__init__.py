"""Starts, finds and ends the machines that agents run in: local processes, containers, Fly. `driver` is the protocol
of all three, and one test suite holds them to it. May import `config` alone. Promises that making a machine twice
under one name makes one.
"""
