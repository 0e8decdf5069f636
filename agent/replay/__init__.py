"""Records a live channel as a scenario, and replays scenarios through the agent's own loop with faults injected.

`scenario`, `faults` and `result` are pure. Promises that the same scenario and seed give the same run.
"""
