"""The HTTP surface: parses, checks who asks, renders. Decides nothing. May import `sessions` and what is below."""
