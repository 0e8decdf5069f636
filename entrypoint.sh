#!/bin/sh
# What the image starts. Everything is decided by `preview-agent`; this only hands over to it, so that signals
# and exit codes are the agent's own.
set -eu
exec preview-agent run "$@"
