"""What a deployer sees, and what is left, when the server's disk has no room for a bundle."""

import asyncio
import io
import os
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockyard_api.bundles.archive import BundleRefused, unpack


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KB."""
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k,nr_inodes=64", "tmpfs", str(place)], check=True)
    yield place
    subprocess.run(["umount", str(place)], check=True)


def archive(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as packed:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            packed.addfile(member, io.BytesIO(data))
    return path


@pytest.mark.parametrize(
    "files",
    [{"app.R": b"", "data": os.urandom(100_000)}, {"app.R": b""} | {f"f{number}": b"" for number in range(100)}],
    ids=["no blocks", "no inodes"],
)
def test_a_full_disk_is_named_as_the_reason_and_nothing_is_left(
    tmp_path: Path, small_disk: Path, files: dict[str, bytes]
) -> None:
    with pytest.raises(BundleRefused) as refused:
        asyncio.run(unpack(archive(tmp_path / "in.tar.gz", files), small_disk / "bundle"))
    assert refused.value.code == "disk_full"
    assert "operator" in refused.value.message
    assert list(small_disk.iterdir()) == []
