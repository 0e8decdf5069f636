"""The door: the proxy through which a browser, and nobody else, reaches its preview.

It parses every head, authorizes every request, copies bodies by their framing, and splices only after a 101.
"""
