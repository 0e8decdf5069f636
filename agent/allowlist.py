"""What of the agent's environment a program of the project gets to see.

Of the standard library alone and quick to import, because `agent.headstart` needs it before anything else.
"""

from __future__ import annotations

from collections.abc import Mapping

INHERITED = frozenset({"PATH", "LANG", "LANGUAGE", "TZ", "TMPDIR", "NODE_EXTRA_CA_CERTS", "SSL_CERT_FILE",
                       "SSL_CERT_DIR"})  # fmt: skip
FOR_INSTALLS = frozenset({"HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy",
                          "npm_config_registry", "NPM_CONFIG_REGISTRY", "npm_config_cache"})  # fmt: skip
PASSED_ON = "DEV_ENV_"
"""`DEV_ENV_NAME=value` in the agent's environment becomes `NAME=value` in the program's."""
LOADS_CODE = frozenset({"GCONV_PATH", "LOCPATH", "GLIBC_TUNABLES"})
LOADS_CODE_PREFIXES = ("LD_", "DYLD_")
"""What the dynamic linker and the C library of *every* program obey, that of a shell or of `id` too: glibc itself drops
these where a program has more rights than who starts it. What one language reads (NODE_OPTIONS, PYTHONPATH, BASH_ENV)
reaches the project's own programs alone, which run its code anyway."""


def loads_code(name: str) -> bool:
    """Whether a variable of that name has the dynamic linker or the C library load code."""
    return name in LOADS_CODE or name.startswith(LOADS_CODE_PREFIXES)


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
