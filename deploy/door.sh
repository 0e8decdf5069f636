#!/bin/sh
# Runs the door of deploy/compose.yaml: once it is up, and again after a change of deploy/.env or a new image.
# It is beside the compose file, since it is on the machine's own network, where machines publish their previews, and
# Debian 12's podman-compose cannot say so.
#
#   sh deploy/door.sh                 with Docker: ENGINE=docker sh deploy/door.sh
set -eu
cd "$(dirname "$0")"
set -a
. ./.env
set +a
engine=${ENGINE:-podman}
"$engine" rm -f preview-door > /dev/null 2>&1 || true
# The image's own health check asks `serve`.
exec "$engine" run --detach --name preview-door --restart unless-stopped --network host --no-healthcheck \
  --env PREVIEW_DOMAIN --env DOOR_KEYS --env DOOR_PORT --env LOG_FORMAT=json \
  --env DATABASE_URL='postgresql://postgres@/postgres?host=/var/run/postgresql' \
  --volume preview-database-socket:/var/run/postgresql "$ORCHESTRATOR_IMAGE" door
