"""Archives: what is unpacked, what is refused, and that nothing an archive says can hurt."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
import tempfile
import tracemalloc
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.errors import AdapterRejected
from slipstream.importing.archives import unpacked

MAX = 100_000
Files = dict[str, bytes]
FLAT: Files = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights" * 100}


def zip_of(files: Files) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return out.getvalue()


def tar_of(files: Files, zipped: bool = False) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz" if zipped else "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def gz_of(files: Files) -> bytes:
    return tar_of(files, zipped=True)


KINDS: list[tuple[str, Callable[[Files], bytes]]] = [("a.zip", zip_of), ("a.tar", tar_of), ("a.tar.gz", gz_of)]
each_kind = pytest.mark.parametrize(("name", "pack"), KINDS)


def unpack(folder: Path, name: str, data: bytes, most: int = MAX) -> Files:
    (folder / name).write_bytes(data)
    return {path.name: path.read_bytes() for path in unpacked(folder, most).iterdir()}


def refusal(folder: Path, name: str, data: bytes, most: int = MAX) -> str:
    with pytest.raises(AdapterRejected) as refused:
        unpack(folder, name, data, most)
    assert "Traceback" not in str(refused.value)
    return refused.value.code


@each_kind
def test_a_folder_s_files_flat_or_in_one_folder(tmp_path: Path, name: str, pack: Callable[[Files], bytes]) -> None:
    for i, prefix in enumerate(("", "./", "my-lora/", "./my-lora/")):
        (tmp_path / str(i)).mkdir()
        junk = {"__MACOSX/._adapter_config.json": b"x"} if prefix != "" else {}
        packed = pack({prefix + file: data for file, data in FLAT.items()} | junk)
        assert unpack(tmp_path / str(i), name, packed) == FLAT


def test_what_is_no_archive_alone_is_left_as_it_is(tmp_path: Path) -> None:
    assert unpack(tmp_path, "adapter_config.json", b"{}") == {"adapter_config.json": b"{}"}
    assert set(unpack(tmp_path, "a.zip", zip_of(FLAT))) == {"adapter_config.json", "a.zip"}


@each_kind
@pytest.mark.parametrize(
    ("files", "code"),
    [
        ({"../evil.json": b""}, "nested_folder"),
        ({"a/../../evil.json": b"", "b.json": b""}, "nested_folder"),
        ({"/etc/evil.json": b""}, "nested_folder"),
        ({"checkpoint-1/a.json": b"", "checkpoint-2/a.json": b""}, "nested_folder"),
        ({"a/b/c.json": b""}, "nested_folder"),
        ({"with space.json": b""}, "bad_file_name"),
        ({".hidden": b""}, "bad_file_name"),
        ({"big.safetensors": bytes(MAX + 1)}, "adapter_too_large"),
        ({f"{i}.safetensors": bytes(MAX // 3) for i in range(4)}, "adapter_too_large"),
        ({f"{i}.json": b"" for i in range(300)}, "adapter_too_large"),
    ],
)
def test_what_is_no_flat_folder_is_refused(
    tmp_path: Path, name: str, pack: Callable[[Files], bytes], files: Files, code: str
) -> None:
    inner = tmp_path / "in"
    inner.mkdir()
    assert refusal(inner, name, pack(files)) == code
    assert [path.name for path in tmp_path.iterdir()] == ["in"], "nothing outside"


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_a_tar(tmp_path: Path, kind: bytes) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        info = tarfile.TarInfo("adapter_config.json")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    assert refusal(tmp_path, "a.tar", out.getvalue()) == "symlink"


def test_links_and_passwords_in_a_zip(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("adapter_config.json")
    link.external_attr = 0o120777 << 16
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(link, "/etc/passwd")
    assert refusal(tmp_path, "a.zip", out.getvalue()) == "symlink"
    (tmp_path / "locked").mkdir()
    locked = bytearray(zip_of(FLAT))
    for at in [i for i in range(len(locked)) if locked[i : i + 4] == b"PK\1\2"]:
        locked[at + 8] |= 1
    assert refusal(tmp_path / "locked", "a.zip", bytes(locked)) == "bad_archive"


def test_the_same_name_twice(tmp_path: Path) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for _ in range(2):
            archive.addfile(tarfile.TarInfo("a.json"))
    assert refusal(tmp_path, "a.tar", out.getvalue()) == "bad_archive"


@each_kind
def test_what_unpacks_to_a_thousand_times_its_size(tmp_path: Path, name: str, pack: Callable[[Files], bytes]) -> None:
    bomb = pack({"adapter_model.safetensors": bytes(50 << 20)})
    (tmp_path / name).write_bytes(bomb)
    tracemalloc.start()
    try:
        with pytest.raises(AdapterRejected) as refused:
            unpacked(tmp_path, MAX)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
    assert refused.value.code == "adapter_too_large"
    assert sum(path.stat().st_size for path in (tmp_path / ".unpacked").iterdir()) <= MAX


def test_headers_larger_than_the_memory(tmp_path: Path) -> None:
    """`tarfile` reads an extended header at once; `zipfile` a directory. Both say themselves how large they are."""
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, 8 << 30
    bomb = gzip.compress(info.tobuf() + bytes(40 << 20))
    assert refusal(tmp_path, "a.tgz", bomb) == "bad_archive"
    (tmp_path / "zip").mkdir()
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, 200 << 20, 0, 0)
    with (tmp_path / "zip" / "a.zip").open("wb") as file:
        file.truncate(200 << 20)
        file.seek(0, 2)
        file.write(end)
    tracemalloc.start()
    try:
        with pytest.raises(AdapterRejected, match="more in it"):
            unpacked(tmp_path / "zip", MAX)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    (tmp_path / "zip64").mkdir()
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, 0, 1)
    assert refusal(tmp_path / "zip64", "a.zip", locator + end) == "bad_archive"


@each_kind
def test_an_archive_that_was_cut_short_or_is_something_else(
    tmp_path: Path, name: str, pack: Callable[[Files], bytes]
) -> None:
    whole = pack(FLAT | {"more.json": bytes(range(256)) * 50})
    for i, data in enumerate((whole[: len(whole) // 2], b"", b"hello", b"\x1f\x8b" + bytes(100))):
        (tmp_path / str(i)).mkdir()
        if data or name.endswith(".zip"):
            assert refusal(tmp_path / str(i), name, data) == "bad_archive"


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    edits=st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=0, max_size=8), st.integers(0, 20)), max_size=6),
    names=st.lists(st.text(min_size=1, max_size=20), max_size=5),
)
def test_whatever_the_bytes_are_nothing_breaks_out(
    kind: tuple[str, Callable[[Files], bytes]], edits: list[tuple[float, bytes, int]], names: list[str]
) -> None:
    name, pack = kind
    try:
        data = bytearray(pack(FLAT | dict.fromkeys(names, b"x")))
    except (ValueError, IndexError, UnicodeError, UserWarning):  # a name that cannot be packed, or not once more
        data = bytearray(pack(FLAT))
    for where, new, cut in edits:
        at = round(where * len(data))
        data[at : at + cut] = new
    with tempfile.TemporaryDirectory() as root:
        inner = Path(root) / "in"
        inner.mkdir()
        with suppress(AdapterRejected):
            assert sum(map(len, unpack(inner, name, bytes(data)).values())) <= MAX
        assert [path.name for path in Path(root).iterdir()] == ["in"]


def test_a_map_of_holes_larger_than_the_memory(tmp_path: Path) -> None:
    """GNU's sparse files: `tarfile` parses their maps before anybody can ask whether they are sparse."""
    holes = b"200000\n" + b"0\n" * 400_000
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        info = tarfile.TarInfo("a.safetensors")
        info.size = len(holes) + 512
        info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "10"}
        archive.addfile(info, io.BytesIO(holes + bytes(512)))
    (tmp_path / "a.tar.gz").write_bytes(out.getvalue())
    tracemalloc.start()
    try:
        with pytest.raises(AdapterRejected):
            unpacked(tmp_path, 1 << 30)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    old = bytearray(tarfile.TarInfo("a.safetensors").tobuf(tarfile.GNU_FORMAT))
    old[156:157] = tarfile.GNUTYPE_SPARSE
    old[482] = 1  # another header of holes follows, and does not come
    old[148:156] = b" " * 8
    old[148:156] = b"%06o\0 " % sum(old)
    (tmp_path / "old").mkdir()
    assert refusal(tmp_path / "old", "a.tar", bytes(old)) == "bad_archive"


def test_what_is_left_out_counts_as_well(tmp_path: Path) -> None:
    junk = gz_of({f"__MACOSX/._{i}": bytes(MAX // 2) for i in range(3)} | FLAT)
    assert refusal(tmp_path, "a.tar.gz", junk) == "adapter_too_large"


def test_a_zip_whose_end_is_not_its_end(tmp_path: Path) -> None:
    whole = zip_of({f"{i}.json": b"" for i in range(10)})
    at = whole.rindex(b"PK\5\6")
    assert refusal(tmp_path, "a.zip", whole[: at + 4] + b"PK\5\6" + whole[at + 8 :]) == "bad_archive"
    (tmp_path / "more").mkdir()
    assert refusal(tmp_path / "more", "a.zip", whole + b"more") == "bad_archive"
