"""The commands of `preview-agent` besides `run`: each parses its arguments, calls a room and prints for a person.

Imported by `__main__` alone.
"""
