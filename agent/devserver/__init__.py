"""Runs the project's own programs: its dev server and its installs, as another user, in a process group of
their own, without a credential. `state` is pure and decides; `guard` runs under a bare interpreter and imports
nothing of the agent. Promises that nothing the project started outlives the agent.

What the project's files say is `agent.project`'s to know.
"""
