"""Decides what a message, an answer or a manifest means for the tree, and when it is acted on. Pure: imports no
asyncio, os, socket, time or logging, and nothing else of the agent; time is passed in. Promises that the same
inputs give the same decisions, which is why the property tests and the state machine are held against this
room.
"""
