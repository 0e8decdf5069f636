"""node_modules from one archive in place of an install: a *layer*. `archive` is the program that packs and unpacks one
as the project's user, `tar` its pure reader, `layers` asks the orchestrator for one and sends one, `bundles` does both
with what Vite bundles ahead, `stages` are the directories where an install is made, `steps` its scripts. Below
`devserver`, which decides when. Promises that nothing of a layer is outside of node_modules, and that a damaged one
changes nothing.
"""
