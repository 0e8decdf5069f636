"""Makes and ends sessions, and answers what their agents missed. `lifecycle` is the pure table of states;
`controller` takes its steps in an order that survives a kill between any two, in any number of orchestrators. May
import `snapshots`, `machines`, `platform` and `config`.
"""
