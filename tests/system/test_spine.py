"""One save reaches the screen: real PostgreSQL, realtime, agent and Vite, asked over HTTP as a browser asks."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.system.canary import shown_by
from tests.system.stack import Stack, until
from tests.trees import descendants_of

pytestmark = pytest.mark.system


def test_what_was_there_is_served(stack: Stack) -> None:
    assert stack.serves("", "/src/main.tsx")
    assert stack.serves("src/App.tsx", "App")
    report = stack.status()
    assert report["state"] == "serving"
    assert report["link"]["state"] == "live"
    assert httpx.get(f"{stack.info['health_url']}/readyz").status_code == 200
    assert httpx.get(f"{stack.info['health_url']}/livez").status_code == 200
    metrics = httpx.get(f"{stack.info['health_url']}/metrics").text
    (started,) = re.findall(r"^preview_agent_session_start_seconds (\S+)$", metrics, re.MULTILINE)
    assert 0 < float(started) < 120
    assert 'preview_agent_dev_server_state{state="ready"} 1.0' in metrics


def test_a_save_through_the_rpc_is_served_and_a_delete_is_gone(stack: Stack) -> None:
    stack.save("src/fresh.ts", "export const said = 'first words'\n")
    until("the new file is served", lambda: stack.serves("src/fresh.ts", "first words"))
    stack.save("src/fresh.ts", "export const said = 'second thoughts'\n")
    until("the change is served", lambda: stack.serves("src/fresh.ts", "second thoughts"))
    stack.rpc("delete_project_file", p_file_path="src/fresh.ts")
    until("the file is gone", lambda: stack.gone("src/fresh.ts"))


def test_a_save_in_an_editor_is_served(stack: Stack) -> None:
    app = stack.project / "src" / "App.tsx"
    app.write_text(app.read_text() + "\nexport const mark = 'saved in an editor'\n")
    until("the save is served", lambda: stack.serves("src/App.tsx", "saved in an editor"))
    note = stack.project / "src" / "note.ts"
    note.write_text("export const note = 1\n")
    until("the new file is served", lambda: stack.serves("src/note.ts", "note = 1"))
    note.unlink()
    until("the deleted file is gone", lambda: stack.gone("src/note.ts"))


def test_of_a_hundred_quick_saves_the_last_one_is_served(stack: Stack) -> None:
    for n in range(100):
        stack.save("src/quick.ts", f"export const n = 'save {n:03}'\n")
        if n % 10 == 0:
            stack.fetch("src/quick.ts")
    until("the last save is served", lambda: stack.serves("src/quick.ts", "save 099"))
    revision = stack.rpc("changes_since", epoch="none", revision=0)["revision"]
    until("the agent is at the head", lambda: stack.status()["revision"] == revision)
    assert stack.serves("src/quick.ts", "save 099")


def test_an_ai_turn_of_forty_files_lands_whole(stack: Stack) -> None:
    files = [
        {
            "action": "update",
            "file_path": f"src/turn/part{n}.ts",
            "content": f"export const part = 'turn part {n}'\n",
        }
        for n in range(40)
    ]
    answer = stack.rpc("apply_project_files", changes=files)
    until("the agent has the revision", lambda: stack.status()["revision"] >= answer["revision"])
    with ThreadPoolExecutor(4) as pool:
        served = pool.map(lambda n: stack.serves(f"src/turn/part{n}.ts", f"turn part {n}"), range(40))
    assert all(served)


def test_a_killed_agent_comes_back_with_what_was_saved_meanwhile(stack: Stack) -> None:
    before = stack.info["agent_pid"]
    os.kill(before, signal.SIGKILL)
    stack.save("src/meanwhile.ts", "export const said = 'while you were away'\n")

    def back() -> bool:
        try:
            stack.info = json.loads((stack.state / "dev.json").read_text())
            return stack.status()["ready"] and stack.serves("src/meanwhile.ts", "while you were away")
        except httpx.HTTPError:
            return False

    until("the agent is back with the change", back, 60)
    assert stack.status()["hydrate"]["mode"] == "resume"


def test_another_session_s_agent_is_not_taken_for_the_stack_s_own(stack: Stack) -> None:
    before, said = json.loads((stack.state / "dev.json").read_text()), stack.log()
    headers = {"Authorization": f"Bearer {stack.info['service_key']}"}
    with httpx.Client(
        base_url=stack.info["orchestrator_url"], headers=headers, timeout=60, trust_env=False
    ) as http:
        made = http.post("/v1/sessions", json={"project_id": stack.info["project_id"]}).json()
        path = f"/v1/sessions/{made['session_id']}"
        until("its preview is served", lambda: http.get(path).json()["state"] == "ready", 120)
        http.delete(path)
        until("it is over", lambda: http.get(path).json()["state"] == "gone", 60)
    assert json.loads((stack.state / "dev.json").read_text()) == before
    assert "the agent" not in stack.log().removeprefix(said)


def test_the_dev_server_does_not_get_our_secrets(stack: Stack) -> None:
    pid = stack.status()["dev_server"]["pid"]
    shown = [
        environ for each in (pid, *descendants_of(pid)) for environ in shown_by(each, "environ").values()
    ]
    assert len(shown) >= 2, "a guard and its dev server"
    for environ in shown:
        names = {line.partition(b"=")[0] for line in environ.split(b"\0")}
        assert not names & {b"REALTIME_TOKEN", b"SNAPSHOT_URL", b"REALTIME_API_KEY", b"SESSION_API_URL"}
        assert b"eyJ" not in environ


def test_no_secret_is_in_status_or_logs(stack: Stack) -> None:
    told = json.dumps(stack.status())
    logs = "".join(path.read_text() for path in stack.state.rglob("agent.log"))
    assert "agent.started" in logs
    for text in (told, logs):
        assert stack.info["service_key"] not in text
        assert stack.info["anon_key"] not in text
        assert "eyJ" not in text


def test_status_is_one_screen_and_its_exit_code_is_readiness(stack: Stack) -> None:
    command = [sys.executable, "-m", "agent", "status", "--url", stack.info["health_url"]]
    screen = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert screen.returncode == 0
    assert screen.stdout.startswith("serving")
    assert f"revision {stack.status()['revision']} (at the head)" in screen.stdout
    assert len(screen.stdout.splitlines()) <= 24
    whole = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=20)
    assert json.loads(whole.stdout)["session_id"] == stack.info["session_id"]
    nobody = subprocess.run([*command[:-1], "http://127.0.0.1:9"], capture_output=True, text=True, timeout=20)
    assert nobody.returncode == 69
    assert "is it running" in nobody.stderr
