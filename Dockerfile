# The preview container: the agent, Node, and the template's dependencies, ready to run.
#
#   make image                       BASE is any Debian with Node >= 20.19 and npm
#   docker run -p 5173:5173 -e PROJECT_ID=… -e SESSION_ID=… -e SNAPSHOT_URL=… -e REALTIME_TOKEN=… … preview-agent
ARG BASE=docker.io/library/node:22-trixie-slim

# --- the agent: the wheel that `make wheel` makes, on the versions of its lock
FROM ${BASE} AS agent
# Behind a proxy that signs for itself: mount its bundle and name it. Known to the build alone, not to the image.
ARG NODE_EXTRA_CA_CERTS
ARG PIP_CERT
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates python3 python3-venv \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /build
COPY requirements/agent.lock requirements/build.lock ./
RUN for made in preview-agent:agent.lock build:build.lock; do \
      python3 -m venv "/opt/${made%:*}" \
      && "/opt/${made%:*}/bin/pip" install --disable-pip-version-check --no-cache-dir \
           --require-hashes --only-binary :all: -r "${made#*:}" || exit 1; \
    done
COPY pyproject.toml README.md LICENSE ./
COPY supabase/migrations supabase/migrations
COPY orchestrator_stub orchestrator_stub
COPY agent agent
# The control plane is taken out again: no part of it runs in a preview machine (docs/decisions/README.md). Nor does
# anything there read type stubs.
RUN /opt/build/bin/pip wheel --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir dist . \
 && cd /opt/preview-agent \
 && bin/pip install --disable-pip-version-check --no-index --no-deps --no-compile /build/dist/*.whl \
 && bin/pip uninstall --disable-pip-version-check -y pip \
 && rm -r bin/preview-orchestrator lib/python3*/site-packages/orchestrator_stub \
 && find . -name '*.pyi' -delete \
 && bin/python -m compileall -q .

# --- the template's node_modules; the key it was installed for is written inside (.preview-install.json), and a
# project that wants the same is started without an install
FROM agent AS template
ARG TEMPLATE=examples/react-app
ARG NODE_EXTRA_CA_CERTS
WORKDIR /app/project
COPY ${TEMPLATE}/package.json ${TEMPLATE}/package-lock.json ./
RUN /opt/preview-agent/bin/python -m agent.devserver.install /app/project \
 && rm package.json package-lock.json \
 && find /app/project -exec touch --no-dereference --date=@0 {} +
# Made at the same moment each time: its layer is the same bytes, and does not move when a new agent installs it again.

# --- what is deployed
FROM ${BASE}
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates python3 \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/debconf/*-old /var/log/apt /var/log/dpkg.log \
    /usr/lib/python3*/pydoc_data /usr/lib/python3*/test /usr/lib/python3*/lib2to3 \
 && useradd --uid 10001 --create-home --shell /usr/sbin/nologin preview \
 && install -d -m 0755 /app \
 && install -d -m 0700 /var/lib/preview-agent
# In the order of how seldom they change: a new agent is a new layer of its own, on the same template.
COPY --from=template --chown=10001:10001 /app/project /app/project
COPY --chmod=755 entrypoint.sh /usr/local/bin/entrypoint.sh
COPY --from=agent /opt/preview-agent /opt/preview-agent
ENV PATH=/opt/preview-agent/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    PROJECT_DIR=/app/project \
    STATE_DIR=/var/lib/preview-agent \
    DEV_USER=preview
EXPOSE 5173 9464
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=90s --retries=3 \
  CMD ["/opt/preview-agent/bin/python", "-I", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:%s/readyz' % os.environ.get('HEALTH_PORT', '9464'), timeout=4)"]
ENTRYPOINT ["/usr/local/bin/entrypoint.sh"]
