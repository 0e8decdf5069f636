"""Reads requests and renders answers: who asks and what they say, problem documents, OpenAPI, health and metrics.
`http.routes` has the routes. May import `sessions` and what is below.
"""
