"""What of the agent's environment a program of the project gets to see."""

from __future__ import annotations

from collections.abc import Mapping

from agent.config import PASSED_ON

INHERITED = frozenset({"PATH", "LANG", "LANGUAGE", "TZ", "TMPDIR", "NODE_EXTRA_CA_CERTS", "SSL_CERT_FILE",
                       "SSL_CERT_DIR"})  # fmt: skip
FOR_INSTALLS = frozenset({"HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy",
                          "npm_config_registry", "NPM_CONFIG_REGISTRY", "npm_config_cache"})  # fmt: skip


def environment(
    given: Mapping[str, str],
    *,
    user: str | None,
    home: str | None,
    more: Mapping[str, str],
    install: bool = False,
) -> dict[str, str]:
    """The program's whole environment: an allow-list of `given`, `DEV_ENV_*`, and `more`.

    `user` and `home` are those of the user it runs as; None where that is the agent's own.
    """
    allowed = INHERITED | FOR_INSTALLS if install else INHERITED
    env = {name: value for name, value in given.items() if name in allowed or name.startswith("LC_")}
    env["HOME"] = given.get("HOME", "/") if home is None else home
    if user is not None:
        env["USER"] = env["LOGNAME"] = user
    env["NO_COLOR"] = "1"
    env.update(more)
    for name, value in given.items():
        if name.startswith(PASSED_ON) and len(name) > len(PASSED_ON):
            env[name.removeprefix(PASSED_ON)] = value
    return env
