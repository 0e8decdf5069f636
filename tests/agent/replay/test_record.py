"""What a recording leaves out. That it records rightly is `tests/system/test_record.py`."""

from agent.replay.record import unsigned


def test_a_recording_holds_no_signature() -> None:
    offered = {"snapshot_url": "https://x/object/sign/a.zip?token=SECRET", "manifest": None}
    assert unsigned(offered) == {"snapshot_url": "https://x/object/sign/a.zip", "manifest": None}
    assert unsigned({"file_path": "a?b", "content": "?"}) == {"file_path": "a?b", "content": "?"}
