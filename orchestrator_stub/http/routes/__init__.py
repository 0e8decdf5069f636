"""Serves the routes of the control plane and of the session API, a group for each noun. A group is given what it
needs, and reads requests through `http.requests`; `server` puts the groups together. Promises to decide nothing: what
a request may do is said by `sessions` and the database.
"""
