"""The commands of `preview-agent` besides `run`: parses arguments, calls a room, prints for a person. Nothing
imports it but `__main__`.
"""
