#!/bin/sh
# As the official image does it: a data directory at the first start, then the server as its own user.
set -eu
data=/var/lib/postgresql/data
programs=/usr/lib/postgresql/17/bin
as_postgres="setpriv --reuid postgres --regid postgres --clear-groups"
chown postgres "$data" /var/run/postgresql && chmod 700 "$data"
if [ ! -e "$data/PG_VERSION" ]; then
  $as_postgres "$programs/initdb" -D "$data" -U postgres --auth="$POSTGRES_HOST_AUTH_METHOD" --encoding=UTF8 --locale=C.UTF-8 --no-sync
fi
exec $as_postgres "$programs/postgres" -D "$data" "$@"
