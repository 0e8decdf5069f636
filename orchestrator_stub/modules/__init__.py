"""Dependency layers: which archive of node_modules a session may read, and which it may send. Keys come from agents and
mean nothing here. Above `platform`, below `sessions`. Promises that a session reads its own project's and the shared
ones, and writes its own project's alone.
"""
