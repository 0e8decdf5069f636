# The preview container: the agent, Node, and the template's dependencies, ready to run.
#
#   make image                       BASE is any Debian with Node >= 20.19 and npm
#   docker run -p 5173:5173 -e PROJECT_ID=… -e SESSION_ID=… -e SNAPSHOT_URL=… -e REALTIME_TOKEN=… … preview-agent
ARG BASE=docker.io/library/node:22-trixie-slim

# --- the agent, from its lock, in a directory of its own
FROM ${BASE} AS agent
# Behind a proxy that signs for itself: mount its bundle and name it. Known to the build alone, not to the image.
ARG NODE_EXTRA_CA_CERTS
ARG PIP_CERT
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates python3 python3-venv \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /build
COPY requirements/agent.lock ./
RUN python3 -m venv /opt/preview-agent \
 && /opt/preview-agent/bin/pip install --disable-pip-version-check --no-cache-dir --require-hashes --only-binary :all: -r agent.lock \
 && /opt/preview-agent/bin/pip uninstall --disable-pip-version-check -y pip
COPY agent agent
RUN cp -r agent "$(/opt/preview-agent/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
 && printf '#!/opt/preview-agent/bin/python\nimport sys\nfrom agent.__main__ import main\nsys.exit(main())\n' >/opt/preview-agent/bin/preview-agent \
 && chmod 755 /opt/preview-agent/bin/preview-agent \
 && /opt/preview-agent/bin/python -m compileall -q /opt/preview-agent

# --- the template's node_modules; the key it was installed for is written inside (.preview-install.json), and a
# project that wants the same is started without an install
FROM agent AS template
ARG TEMPLATE=examples/react-app
ARG NODE_EXTRA_CA_CERTS
WORKDIR /app/project
COPY ${TEMPLATE}/package.json ${TEMPLATE}/package-lock.json ./
RUN /opt/preview-agent/bin/python -m agent.devserver.install /app/project \
 && rm package.json package-lock.json

# --- what is deployed
FROM ${BASE}
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates python3 \
 && rm -rf /var/lib/apt/lists/* /var/log/apt /var/log/dpkg.log \
 && useradd --uid 10001 --create-home --shell /usr/sbin/nologin preview \
 && install -d -m 0755 /app \
 && install -d -m 0700 /var/lib/preview-agent
COPY --from=agent /opt/preview-agent /opt/preview-agent
COPY --from=template --chown=10001:10001 /app/project /app/project
COPY --chmod=755 entrypoint.sh /usr/local/bin/entrypoint.sh
ENV PATH=/opt/preview-agent/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    PROJECT_DIR=/app/project \
    STATE_DIR=/var/lib/preview-agent \
    DEV_USER=preview
EXPOSE 5173 9464
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=90s --retries=3 \
  CMD ["/opt/preview-agent/bin/python", "-I", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:%s/readyz' % os.environ.get('HEALTH_PORT', '9464'), timeout=4)"]
ENTRYPOINT ["/usr/local/bin/entrypoint.sh"]
