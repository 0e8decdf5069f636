"""Says what a project's files say: what of it is previewed, by which command, with which packages.

Reads, and starts nothing: `devserver` runs what is decided here.
"""
