"""Is a packed set that was brought to a node the one it was brought from, to the last byte?"""

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.cluster import copies

SIZE = 4 << 20  # its middle is in neither of the ends that `facts` looks at


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(copies, "CHUNK", 300_000)
    path = tmp_path / "packed.beton"
    path.write_bytes(b"".join(i.to_bytes(4) for i in range(SIZE // 4)))
    return path


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def reading(source: Path, starts: list[int]) -> Callable[[int], tuple[bytes, str]]:
    """What reads the source, and keeps where."""

    def part(start: int) -> tuple[bytes, str]:
        starts.append(start)
        return copies.read_part(str(source), start)

    return part


def test_a_copy_is_brought_once_and_whole(source: Path, tmp_path: Path) -> None:
    target, starts = tmp_path / "node" / "copy.beton", []
    for _ in range(2):
        copies.bring(target, copies.facts(str(source)), reading(source, starts))
    assert starts == list(range(0, SIZE, 300_000))
    assert target.read_bytes() == source.read_bytes()


def test_a_byte_that_changes_on_the_way_is_noticed_wherever_it_is(source: Path, tmp_path: Path) -> None:
    target, known = tmp_path / "copy.beton", copies.facts(str(source))
    for place in (0, SIZE // 2, SIZE - 1):

        def part(start: int, place: int = place) -> tuple[bytes, str]:
            content, digest = copies.read_part(str(source), start)
            return flipped(content, place - start) if start <= place < start + len(content) else content, digest

        with pytest.raises(OSError, match=r"copy\.beton: arrived damaged from the driver's node, at byte"):
            copies.bring(target, known, part)
        assert not target.exists()
    copies.bring(target, known, reading(source, []))
    assert target.read_bytes() == source.read_bytes()


def test_a_copy_that_was_changed_since_is_brought_anew_and_it_is_said(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, known = tmp_path / "copy.beton", copies.facts(str(source))
    copies.bring(target, known, reading(source, []))
    target.write_bytes(flipped(target.read_bytes(), SIZE // 2))
    assert copies.facts(str(target)) == known
    copies.bring(target, known, reading(source, []))
    assert target.read_bytes() == source.read_bytes()
    assert capsys.readouterr().out == f"{target}: is not as it was brought; it is brought anew\n"


def test_a_copy_of_before_copies_were_checked_whole_is_brought_anew(source: Path, tmp_path: Path) -> None:
    target, starts = tmp_path / "copy.beton", []
    target.write_bytes(source.read_bytes())
    copies.bring(target, copies.facts(str(source)), reading(source, starts))
    assert starts


def test_a_source_that_changes_or_a_disk_that_fills_up_leaves_no_copy(source: Path, tmp_path: Path) -> None:
    target, known = tmp_path / "copy.beton", copies.facts(str(source))

    def full(start: int) -> tuple[bytes, str]:
        if start:
            raise OSError(errno.ENOSPC, "No space left on device")
        return copies.read_part(str(source), start)

    with pytest.raises(OSError, match="No space left"):
        copies.bring(target, known, full)
    assert not target.exists()
    source.write_bytes(flipped(source.read_bytes(), SIZE - 1))
    with pytest.raises(OSError, match="changed on the driver's node while it was brought"):
        copies.bring(target, known, reading(source, []))
    assert not target.exists()
