"""Makes and ends sessions and answers their agents. `lifecycle` is the pure table of states, `controller` takes
its steps in an order that survives a kill between any two. May import `snapshots`, `machines`, `platform`,
`config`.
"""
