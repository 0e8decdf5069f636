"""A project that searches for the agent's credentials wherever a process can, under the real Vite."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.agent.conftest import EXAMPLE
from tests.agent.processes import until
from tests.ports import free_port

ROOT = Path(__file__).parents[3]
needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("npm") is None or shutil.which("setpriv") is None,
    reason="needs root, Node and setpriv",
)

SNOOP = """
import fs from 'node:fs'

const wanted = Buffer.from(fs.readFileSync('needle', 'utf8').trim().split('').reverse().join(''))
const found = [], tried = {}
const note = (where, content) => { if (content && content.includes(wanted)) found.push(where) }
const attempt = (kind, where, read) => {
  tried[kind] ??= [0, 0]
  tried[kind][0]++
  try { note(where, read()); tried[kind][1]++ } catch {}
}
attempt('environment', 'process.env', () => Buffer.from(JSON.stringify(process.env)))
for (const pid of fs.readdirSync('/proc').filter((name) => /^[0-9]+$/.test(name) && +name !== process.pid)) {
  let name = ''
  try { name = fs.readFileSync(`/proc/${pid}/cmdline`, 'utf8') } catch {}
  if (!name.includes('agent')) continue
  for (const file of ['environ', 'cmdline'])
    attempt(file, `${pid}/${file}`, () => fs.readFileSync(`/proc/${pid}/${file}`))
  attempt('mem', `${pid}/mem`, () => {
    const mem = fs.openSync(`/proc/${pid}/mem`, 'r')
    const parts = []
    for (const line of fs.readFileSync(`/proc/${pid}/maps`, 'utf8').split('\\n')) {
      const [, from, to, flags] = /^([0-9a-f]+)-([0-9a-f]+) (....)/.exec(line) ?? []
      if (!flags?.startsWith('rw')) continue
      const size = Number(BigInt('0x' + to) - BigInt('0x' + from))
      const part = Buffer.alloc(Math.min(size, 1 << 26))
      try { fs.readSync(mem, part, 0, part.length, BigInt('0x' + from)); note(`${pid}/mem`, part) } catch {}
    }
  })
}
const walk = (at) => {
  attempt('state', at, () => Buffer.from(fs.readdirSync(at).join()))
  for (const name of fs.readdirSync(at)) attempt('state', at, () => fs.readFileSync(`${at}/${name}`))
}
try { walk(process.env.VITE_STATE) } catch {}
fs.writeFileSync('findings.new', JSON.stringify({ found, tried, uid: process.getuid() }))
fs.renameSync('findings.new', 'findings.json')
export default {}
"""

AGENT = """
import asyncio, os, sys
from agent.config import read_settings
from agent.devserver.reaper import Reaper
from agent.devserver.supervisor import Supervisor

async def main():
    token = os.environ["REALTIME_TOKEN"]  # in memory too
    reaper = Reaper()
    reaper.adopt()
    supervisor = Supervisor(read_settings(os.environ), reaper=reaper)
    supervisor.project_ready()
    await supervisor.run()

asyncio.run(main())
"""


@needs_root
@pytest.mark.parametrize("user", ["nobody", None], ids=["own-user", "same-user-as-in-a-container"])
async def test_a_hostile_vite_config_finds_no_credential(
    open_path: Path, installed: Path, user: str | None
) -> None:
    """With a DEV_USER nothing can be read. Without one, the same user still reads neither environ nor memory, so
    long as it has none of the capabilities that a container's root lacks too."""
    project, state = open_path / "project", open_path / "state"
    shutil.copytree(EXAMPLE, project, ignore=shutil.ignore_patterns("node_modules", "dist"))
    secret = secrets.token_hex(24)
    (project / "needle").write_text(secret[::-1])
    (project / "vite.config.ts").unlink()
    (project / "vite.config.js").write_text(SNOOP)
    state.mkdir(mode=0o700)
    (state / "token").write_text(secret)
    if user:
        await asyncio.to_thread(subprocess.run, ["chown", "-R", user, project], check=True)
    port = free_port()
    environ = {
        **os.environ, "REALTIME_TOKEN": secret, "PROJECT_ID": str(secrets.token_hex(16)), "SESSION_ID": "0" * 32,
        "PROJECT_DIR": str(project), "STATE_DIR": str(state), "DEV_PORT": str(port), "DEV_HOST": "127.0.0.1",
        "DEV_ENV_VITE_STATE": str(state), **({"DEV_USER": user} if user else {"MODULES_DIR": str(installed)}),
    }  # fmt: skip
    agent = await asyncio.create_subprocess_exec(
        "setpriv", "--bounding-set", "-sys_ptrace,-perfmon,-sys_admin", sys.executable, "-c", AGENT,
        cwd=ROOT, env=environ, stdout=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        await until(lambda: (project / "findings.json").exists() or agent.returncode is not None, 120)
        findings = json.loads((project / "findings.json").read_text())
    finally:
        agent.kill()
        await agent.wait()
    if not user:
        findings["found"] = [where for where in findings["found"] if str(state) not in where]
        assert findings["uid"] == 0
    else:
        assert findings["uid"] != 0
        assert findings["tried"]["state"][1] == 0
    assert findings["found"] == []
    assert findings["tried"]["environ"][0] >= 2, "it found the agent and its guard"
    assert findings["tried"]["cmdline"][1] >= 2, "and could name them"
    assert findings["tried"]["mem"][0] >= 2
