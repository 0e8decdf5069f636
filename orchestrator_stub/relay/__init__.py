"""The relay: takes events from the outbox of the database to NATS, and says who may hear what there.

`keys` writes keys and tokens as NATS reads them, `accounts` says which accounts there are and who may do what,
`outbox` reads what waits, `publisher` publishes it in order, `service` runs both, `regions` makes mirrors of the stream
elsewhere, `command` is of operators, `embedded` starts a server for `dev` and tests.
May import `platform`, `config` and `help_texts`.
"""
