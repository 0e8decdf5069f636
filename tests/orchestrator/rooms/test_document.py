"""Texts that meet: what is compared, what is merged, and what of a browser's messages is believed."""

from __future__ import annotations

import json
from contextlib import suppress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pycrdt import Doc, Text, create_sync_message, create_update_message, handle_sync_message, write_message

from orchestrator_stub.rooms.document import MOST_CURSOR_BYTES, BadMessage, Cursor, Document, cursor_of
from orchestrator_stub.rooms.merge import MOST_CHARACTERS, MOST_LINES, splices_of

TEXT = st.text(st.sampled_from("ab \nçé🎉x"), max_size=40)


def applied(before: str, after: str) -> str:
    text = before.encode()
    for at, size, come in reversed(splices_of(before, after)):
        text = text[:at] + come.encode() + text[at + size :]
    return text.decode()


@given(TEXT, TEXT)
@example("é", "è")
@example("🎉", "🎊")
@example("aa", "a")
def test_splices_make_the_one_of_the_other(before: str, after: str) -> None:
    assert applied(before, after) == after


def test_splices_of_large_texts_are_found_or_the_whole_is_replaced() -> None:
    lines = [f"line {number} of a file that is edited\n" for number in range(MOST_CHARACTERS // 20)]
    before, after = "".join(lines), "".join(["first\n", *lines[:50], *lines[60:], "last\n"])
    assert applied(before, after) == after
    assert sum(size + len(come) for _, size, come in splices_of(before, after)) < 500
    many = "".join(f"{number}\n" for number in range(MOST_LINES * 2))
    other = "".join(f"x{number}\n" for number in range(MOST_LINES * 2))
    assert applied(many, other) == other


@given(TEXT, TEXT, st.integers(0, 40), st.text(st.sampled_from("TYPED"), min_size=1, max_size=5))
def test_what_is_typed_beside_anothers_save_is_kept(base: str, theirs: str, at: int, typed: str) -> None:
    document = Document(1, base)
    browser: Doc[Text] = Doc()
    reply = document.handle(create_sync_message(browser)).reply
    assert reply is not None
    handle_sync_message(reply[1:], browser)
    text = browser.get(document.root, type=Text)
    before = browser.get_state()
    text.insert(len(base[: min(at, len(base))].encode()), typed)
    handled = document.handle(create_update_message(browser.get_update(before)))
    assert handled.changed
    assert handled.others is not None
    update = document.merge(splices_of(document.base, theirs))
    if update is not None:
        handle_sync_message(update[1:], browser)
    assert document.base == theirs
    assert document.text == str(text)
    rest = iter(document.text)
    assert all(key in rest for key in typed)  # its keys, in their order
    without = [each for each in document.text if each not in "TYPED"]
    assert without == list(theirs)  # and theirs


def test_nobody_typed_what_was_merged_and_a_second_merge_is_none() -> None:
    document = Document(1, "one\n")
    assert document.merge(splices_of("one\n", "two\n")) is not None
    assert document.text == document.base == "two\n"
    assert document.merge(splices_of("two\n", "two\n")) is None


def test_a_formatter_and_a_person_are_merged_as_text() -> None:
    """Which is not always a program: docs/rooms.md says so."""
    document = Document(1, "function a() {\n return 1\n}\n")
    browser: Doc[Text] = Doc()
    handle_sync_message(document.handle(create_sync_message(browser)).reply[1:], browser)  # type: ignore[index]
    text = browser.get(document.root, type=Text)
    before = browser.get_state()
    text.insert(len("function a() {\n return 1"), " + 2")
    document.handle(create_update_message(browser.get_update(before)))
    document.merge(splices_of(document.base, "function a() {\n  return 1;\n}\n"))
    assert document.text in ("function a() {\n  return 1; + 2\n}\n", "function a() {\n  return 1 + 2;\n}\n")


@given(
    st.binary(max_size=60),
    st.sampled_from([b"", b"\x00", b"\x00\x00", b"\x00\x01", b"\x00\x02"]),
    st.booleans(),
)
def test_no_message_breaks_the_document(body: bytes, head: bytes, framed: bool) -> None:
    document = Document(1, "text\n")
    with suppress(BadMessage):
        document.handle(head + (write_message(body) if framed else body))
    assert document.text == "text\n"
    with suppress(BadMessage):
        cursor_of(b"\x01" + body, {})


def test_whose_a_cursor_is_and_what_it_looks_like_is_not_a_browsers_to_say() -> None:
    said = {
        "user": {"id": "somebody else", "name": "n" * 100, "color": "url(//evil)", "colorLight": "#00ff0033", "x": 1},
        "cursor": {"anchor": 1}, "more": "x",
    }  # fmt: skip
    cursor = cursor_of(Cursor(5, 2, said).message(), {"id": "me"})
    assert (cursor.client_id, cursor.clock) == (5, 2)
    assert cursor.state == {
        "user": {"id": "me", "name": "n" * 64, "colorLight": "#00ff0033"},
        "cursor": {"anchor": 1},
    }
    assert cursor_of(Cursor(5, 3).message(), {"id": "me"}).state is None
    large = Cursor(5, 2, {"cursor": "x" * MOST_CURSOR_BYTES}).message()
    for bad in (large, b"\x01", Cursor(5, 2, []).message()):  # type: ignore[arg-type]
        with pytest.raises(BadMessage):
            cursor_of(bad, {})
    assert json.loads(json.dumps(cursor.state)) == cursor.state
