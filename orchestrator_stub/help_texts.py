"""Holds the texts of `--help` around the options."""

from __future__ import annotations

from typing import Final

ABOUT: Final = """\
Keep preview containers equal to the files in PostgreSQL: run it all on this machine (`dev`), or run and operate the
control plane of a deployment (the others)."""

EXIT_CODES: Final = """\
`preview-orchestrator COMMAND --help` says more of each. Exit codes: 0 done, or ended by Ctrl-C where it serves until
then; 1 failed, in one sentence; 2 the command line is wrong; 64 a setting is missing or wrong; 130 Ctrl-C."""

DEV: Final = """\
Run the whole loop on this machine: PostgreSQL, a stand-in for Supabase, the orchestrator, an agent and the project's
dev server. What you save in DIR goes into the database and comes out in the preview, as in a deployment. It needs
Node.js on the PATH and no account. Ctrl-C ends it and keeps the data in STATE; delete that to begin anew."""

SERVE: Final = """\
Run the control plane: the session API under /v1, the sweeps that begin and end machines, and, where PREVIEW_DOMAIN is
set, a door. All its state is in the database, so several may run at once.

It reads the environment. Needed: DATABASE_URL, SUPABASE_URL, SUPABASE_ANON_KEY, SUPABASE_SERVICE_ROLE_KEY, a key that
signs tokens (SUPABASE_JWT_SECRET or JWT_KEYS_FILE), and what the MACHINE_DRIVER needs. docs/settings.md has all;
`preview-orchestrator doctor` tries them."""

DOOR: Final = """\
Run a door by itself: the proxy through which browsers reach previews, each at its own name below PREVIEW_DOMAIN.
`serve` opens one too; run more where that is not enough.

It reads the environment: DATABASE_URL, PREVIEW_DOMAIN, DOOR_KEYS (the same as of `serve`), DOOR_HOST, DOOR_PORT.
docs/door.md says how to set it up."""

RELAY: Final = """\
Take events from the database's outbox to NATS, where `preview.settings.transport` says so. `serve` does so too; run
more where that is not enough, or apart from it. Any number share the work.

It reads the environment: DATABASE_URL, NATS_URL, NATS_KEYS_FILE (the same as of `serve`). docs/transports.md says how
to set it up."""

NATS_KEYS: Final = """\
Make the keys of a NATS deployment, once. Three files: accounts.conf is included by the servers' configuration and holds
no secret; nats-keys.json is NATS_KEYS_FILE; operator.json signs accounts, and belongs in a safe."""

NATS_REGION: Final = """\
Make what the NATS servers of a region need beside the hub's accounts.conf. Two files: leaf.conf, which they include,
and leaf.creds, a secret, which they show the hub.

It reads the environment of `relay`. docs/scale/README.md says how to set up regions."""

NATS_MIRROR: Final = """\
Make the mirror of the stream in a region whose servers are connected to the hub, or give it the configuration of this
release; then say how far it is behind.

It reads the environment of `relay`. docs/scale/README.md says how to set up regions."""

STAND_IN: Final = """\
Serve Supabase's URLs (RPC, Storage, Realtime) over a PostgreSQL of yours, for a deployment on one machine. It
applies the migrations first.

It reads the environment: DATABASE_URL, of a superuser, and SUPABASE_JWT_SECRET; PORT, HOST and STORAGE_DIR if others
than the defaults. docs/stand-in.md says what it does and what it lacks."""

SECRETS: Final = """\
Fill in the empty secrets of an environment file: it reads the file from standard input and writes it to standard output
with random values after the `=`. What has a value stays as it is.

example:
  preview-orchestrator secrets < deploy/.env.example > deploy/.env"""

DOCTOR: Final = """\
Try, with the settings of `serve`, each part that previews need: database, keys, Realtime, Storage, the machines'
platform and the address that agents are told. It prints a line for each, and below what is not right what to do
about it. It leaves nothing behind. Exit code: 0 previews can work from here, 1 something is to be put right."""

MODULES: Final = """\
Build, list and drop dependency layers: archives of node_modules that previews unpack in place of an install. Previews
make their own; `build` makes one that all projects may use. It reads the settings of `serve` (docs/start.md)."""

HISTORY: Final = """\
A commit is one save, one bulk or one turn; each has the project's next revision. `log` shows them, `show` one of them,
`diff` what lies between two, `restore` goes back to one. Nothing is lost by going back: it is a commit itself, and what
was written since stays in the history. How long that is kept, and how checkpoints keep it, is in docs/history.md."""

ROLLOUT: Final = """\
Give sessions a new agent image, or the former one again.

First a session of its own tries the image, beside a project that is being previewed. If that becomes ready, new
sessions get the image, and running ones are given a new machine as soon as nobody has their page open and nothing
was saved for a while, a few at a time. The first that does not become ready stops it: that session gets its former
image back, nobody is given the new one any more, and this says which session it was and why.

Without IMAGE it says what is rolled out, and how many sessions have which image."""

ROLLOUT_EXAMPLES: Final = """\
examples:
  preview-orchestrator rollout registry.fly.io/previews:v42 --share 10%    a tenth of the sessions
  preview-orchestrator rollout registry.fly.io/previews:v42                then all of them
  preview-orchestrator rollout registry.fly.io/previews:v41                and back again: without a trial
  preview-orchestrator rollout                                             where it stands

All of it is in the database. Ctrl-C ends this command and not the rollout: new sessions go on getting the image, and
the same command goes on with the running ones. Give each build a name of its own (a tag that is never used again, or a
digest): a session whose image has the same name is taken to be up to date.

exit codes: 0 all of the share have the image, 1 it stopped, 64 bad settings, 130 Ctrl-C"""
