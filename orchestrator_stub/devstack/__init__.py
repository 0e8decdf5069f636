"""`preview-orchestrator dev`: everything on one machine, an editor that turns saves in a directory into RPCs,
and what a person sees in the terminal. Nothing imports it but `__main__`.
"""
