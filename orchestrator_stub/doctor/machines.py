"""Examines where machines run (Fly, a container engine, this machine), and whether agents will reach us."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import shutil
from typing import Final
from urllib.parse import urlsplit

import httpx

from orchestrator_stub.config import Settings
from orchestrator_stub.doctor.findings import Report

SECONDS: Final = 8.0
"""For one answer."""

MANIFESTS: Final = ", ".join(
    f"application/vnd.{kind}+json"
    for kind in (
        "oci.image.index.v1",
        "oci.image.manifest.v1",
        "docker.distribution.manifest.list.v2",
        "docker.distribution.manifest.v2",
    )
)


async def examine_machines(settings: Settings, http: httpx.AsyncClient, report: Report) -> None:
    """Examine the machine driver that the settings name."""
    match settings.machine_driver:
        case "fly":
            await _fly(settings, http, report)
        case "container":
            await _engine(settings, report)
        case "local":
            _local(settings, report)


async def examine_public_url(settings: Settings, http: httpx.AsyncClient, report: Report) -> None:
    """Whether agents are told an address at which they can reach us."""
    url = settings.agent_facing_url
    host = urlsplit(url).hostname or ""
    if settings.machine_driver != "local" and _is_here(host):
        report.bad(
            f"agents are told {url}, which is themselves",
            "set PUBLIC_URL to where machines reach this process",
        )
        return
    try:
        answer = await http.get(f"{url}/livez", timeout=SECONDS)
        ours = answer.status_code == 200 and answer.json() == {"alive": True}
    except (httpx.HTTPError, ValueError):
        report.skip(f"{url} does not answer", "it does once serve runs; ask again then")
        return
    if ours:
        report.ok(f"{url} is an orchestrator")
    else:
        report.bad(f"{url} answers, and is no orchestrator: HTTP {answer.status_code}", "see PUBLIC_URL")


async def _fly(settings: Settings, http: httpx.AsyncClient, report: Report) -> None:
    assert settings.fly_api_token is not None
    token = settings.fly_api_token.get_secret_value()
    headers = {"authorization": f"Bearer {token}"}
    api = str(settings.fly_api_url).rstrip("/")
    there = [await _app(app, api, headers, http, report) for app in settings.fly_app]
    if not all(there):
        return
    if settings.fly_region is not None:
        await _region(settings.fly_region, api, headers, http, report)
    await _image(settings.agent_image, token, http, report)


async def _app(app: str, api: str, headers: dict[str, str], http: httpx.AsyncClient, report: Report) -> bool:
    """Whether the app is there and the token reaches it."""
    try:
        machines = await http.get(f"{api}/apps/{app}/machines", headers=headers, timeout=SECONDS)
    except httpx.HTTPError as error:
        report.bad(
            f"{api} cannot be reached: {type(error).__name__}", "see FLY_API_URL, and the network from here"
        )
        return False
    match machines.status_code:
        case 200:
            report.ok(f"the app {app} is there, with {len(_listed(machines))} machines")
            return True
        case 401 | 403:
            report.bad("Fly refuses the token", f"FLY_API_TOKEN: fly tokens create deploy -a {app}")
        case 404:
            report.bad(f"there is no app {app}", "see FLY_APP, or fly apps create; the token must be its own")
        case status:
            report.bad(f"Fly answers HTTP {status}", "see status.flyio.net, then try again")
    return False


async def _region(
    region: str, api: str, headers: dict[str, str], http: httpx.AsyncClient, report: Report
) -> None:
    try:
        answer = await http.get(f"{api}/platform/regions", headers=headers, timeout=SECONDS)
        body = answer.json()
        listed = body.get("Regions", body.get("regions")) if isinstance(body, dict) else body
        known = {str(each.get("code", each.get("Code"))) for each in listed or ()}
    except (httpx.HTTPError, ValueError, TypeError, AttributeError):
        report.skip("Fly's regions cannot be read")
        return
    if region in known:
        report.ok(f"the region {region} is one of Fly's")
    else:
        report.bad(
            f"{region} is no region of Fly's",
            f"FLY_REGION: one of {', '.join(sorted(known)[:12])} …, or unset",
        )


async def _image(image: str, token: str, http: httpx.AsyncClient, report: Report) -> None:
    """Ask the image's registry for its manifest, with the token as Fly's registry takes it."""
    registry, _, rest = image.partition("/")
    if not rest or ("." not in registry and ":" not in registry):
        report.bad(
            f"{image} names no registry that Fly could pull from", "AGENT_IMAGE=registry.fly.io/APP:TAG"
        )
        return
    at = "@" if "@" in rest else ":"
    name, _, tag = rest.partition(at)
    scheme = "http" if _is_here(registry.partition(":")[0]) else "https"
    url = f"{scheme}://{registry}/v2/{name}/manifests/{tag or 'latest'}"
    auth = ("x", token) if registry == "registry.fly.io" or scheme == "http" else None
    headers = {"accept": MANIFESTS}
    try:
        answer = (
            await http.get(url, auth=auth, headers=headers, timeout=SECONDS)
            if auth
            else await http.get(url, headers=headers, timeout=SECONDS)
        )
    except httpx.HTTPError as error:
        report.skip(f"{registry} cannot be reached from here: {type(error).__name__}")
        return
    if answer.status_code == 200:
        report.ok(f"the image {image} is there")
    elif answer.status_code in (401, 403):
        report.skip(
            f"{registry} does not say whether {image} is there", "Fly pulls it with rights of its own"
        )
    else:
        report.bad(
            f"there is no image {image}", "push it: make image, docker tag, docker push; or see AGENT_IMAGE"
        )


async def _engine(settings: Settings, report: Report) -> None:
    cli = settings.container_cli or next((name for name in ("podman", "docker") if shutil.which(name)), None)
    if cli is None or shutil.which(cli) is None:
        report.bad(
            f"{cli or 'neither podman nor docker'} is not on the PATH",
            "install an engine, or set CONTAINER_CLI",
        )
        return
    code, said = await _run(cli, "version")
    if code != 0:
        report.bad(
            f"{cli} does not work: {said}", "see whether its daemon runs, and whether this user may use it"
        )
        return
    code, _ = await _run(cli, "image", "inspect", settings.agent_image)
    if code != 0:
        report.bad(f"{cli} has no image {settings.agent_image}", "make image, or pull it; or see AGENT_IMAGE")
    else:
        report.ok(f"{cli} has the image {settings.agent_image}")


async def _run(*argv: str) -> tuple[int, str]:
    """Its exit code and the last line of what it said."""
    process = await asyncio.create_subprocess_exec(
        *argv,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        _, err = await process.communicate()
    except asyncio.CancelledError:
        process.kill()
        await process.wait()
        raise
    last = err.decode(errors="replace").strip().splitlines()
    return process.returncode or 0, last[-1][:200] if last else ""


def _local(settings: Settings, report: Report) -> None:
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            report.bad(
                f"{program} is not on the PATH", "install Node 20.19 or newer: machines are processes here"
            )
            return
    above = next(
        (
            p
            for p in (settings.machines_dir.absolute(), *settings.machines_dir.absolute().parents)
            if p.exists()
        ),
        None,
    )
    if above is None or not os.access(above, os.W_OK):
        report.bad(
            f"{settings.machines_dir} cannot be written", "set MACHINES_DIR to a directory of this user's"
        )
        return
    report.ok("machines are processes of this machine")
    report.warn("the driver is local: for development alone", "MACHINE_DRIVER=fly or container")


def _is_here(host: str) -> bool:
    """Whether the name means, to whoever uses it, their own machine."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    return address.is_loopback or address.is_unspecified


def _listed(answer: httpx.Response) -> list[object]:
    try:
        listed = answer.json()
    except ValueError:
        return []
    return listed if isinstance(listed, list) else []
