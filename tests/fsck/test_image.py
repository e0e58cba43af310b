# SPDX-License-Identifier: GPL-2.0-only
"""Metadata images: fsck and dump say of one what they say of the device, good or damaged, under any name."""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bcachectl import cli as program
from bcachectl import metaimage
from bcachectl.blockdev import open_device
from bcachectl.errors import DeviceError
from bcachectl.fsck.anonymise import pseudonym
from bcachectl.ondisk.magic import INVALID_UUID, bset_magic, jset_magic, prio_magic
from bcachectl.units import format_uuid
from tests.damage import Case, cases
from tests.faults import fail_reads
from tests.fsck.image import Image
from tests.fsck.test_damage import base_image

STORIES = ("attached_clean", "deep_crash", "dirty_crash", "fifo_discard", "flash_volume", "fresh", "gen_churn",
           "killed", "thrash_crash", "two_backing")
STRUCTURES = ("superblock", "uuids", "prio", "journal", "btree", "extents")
ALWAYS = ("sb_unreadable_deep_crash", "prio_unreadable_dirty_crash", "uuid_unreadable_two_backing",
              "child_into_journal_deep_crash", "uuids_in_prio", "sb_unusable")
UNTOLD = "; whether they differ, an image does not tell"
NOTHING_LEFT = "sb_unusable"
"""Its geometry and its set have to be told to every verb."""
EVERY = 1 if os.environ.get("BCACHECTL_IMAGES") == "all" else 6
"""Each so many cases are tried; ``make damage`` tries all."""
SAMPLE = [case for number, case in enumerate(cases())
          if number % EVERY == 0 or case.name in ALWAYS]


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    capsys.readouterr()
    status = program.run([str(word) for word in words])
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return status, said.out, said.err


def compare(capsys: pytest.CaptureFixture[str], devices: list[Path], images: list[Path], *words: str) -> None:
    """A verb ends alike on both, but for the devices' names."""
    first, second = run(capsys, *words, *devices), run(capsys, *words, *images)
    for device, image in zip(devices, images, strict=True):
        second = (second[0], second[1].replace(str(image), str(device)), second[2].replace(str(image), str(device)))
    # Data is compared on a device, and is not in an image; the finding says so.
    first = (first[0], re.sub(r"\d+ of (\d+ dirty sectors) differ", rf"\1{UNTOLD}", first[1]), first[2])
    assert first == second


def make_images(capsys: pytest.CaptureFixture[str], devices: list[Path], directory: Path, *options: str) -> list[Path]:
    images = []
    for device in devices:
        image = directory / f"{device.name}{len(options)}.bcimg"
        status, out, err = run(capsys, "image", "create", *options, "--json", device, image)
        assert (status, err) == (0, "")
        assert json.loads(out)["same_findings"]
        images.append(image)
    return images


@pytest.mark.parametrize("story", STORIES)
def test_golden(golden: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], story: str) -> None:
    directory = golden(story)
    devices = [directory / "cache.img", *sorted(directory.glob("back*.img"))]
    images = make_images(capsys, devices, tmp_path)
    compare(capsys, devices[:1], images[:1], "fsck", "--json")
    compare(capsys, devices, images, "fsck", "--json")
    for structure in STRUCTURES:
        compare(capsys, devices[:1], images[:1], "dump", structure, "--json")
    compare(capsys, devices[:1], images[:1], "dump", "btree", "--format=kernel")
    compare(capsys, devices[:1], images[:1], "show")
    compare(capsys, devices[:1], images[:1], "monitor", "--once")
    for device, image in zip(devices, images, strict=True):
        compare(capsys, [device], [image], "show", "--json")
        assert image.stat().st_size < 200_000
    if story == "dirty_crash":
        first = run(capsys, "where", devices[1], 0, 4096, "--json", "--cache", devices[0])
        assert first == run(capsys, "where", images[1], 0, 4096, "--json", "--cache", images[0])


@pytest.mark.parametrize("story", STORIES)
def test_anonymous(golden: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
                   story: str) -> None:
    directory = golden(story)
    devices = [directory / "cache.img", *sorted(directory.glob("back*.img"))]
    images = make_images(capsys, devices, tmp_path, "--anonymise")
    first, second = (json.loads(run(capsys, "fsck", "--json", *some)[1]) for some in (devices, images))
    assert codes(first) == codes(second)
    assert first["summary"] == second["summary"]
    for structure in ("prio", "journal", "btree", "extents"):
        compare(capsys, devices[:1], images[:1], "dump", structure)
    check_no_name_is_left(devices, images)


def codes(report: dict[str, Any]) -> list[tuple[object, ...]]:
    return [(each["code"], each["structure"], each["bucket"], each["sector"], each["key"], str(each["losses"]))
            for each in report["findings"]]


def names_of(devices: list[Path]) -> set[bytes]:
    """Uuids, labels and magics that the devices have in their superblocks and in the uuid array."""
    image = Image(devices[0].read_bytes(), [path.read_bytes() for path in devices[1:]])
    found: set[bytes] = set()
    for device in [image.cache, *image.backings]:
        raw = device.get(4096, 4096)
        found |= {raw[40:56], raw[56:72], raw[72:104].split(b"\0")[0]}
        set_uuid = raw[56:72]
    found |= {magic(set_uuid).to_bytes(8, "little") for magic in (bset_magic, jset_magic, prio_magic)}
    for entry in image.walk.uuids:
        found |= {entry.uuid, entry.label.split(b"\0")[0]}
    return {name for name in found if any(name) and name != INVALID_UUID}


def check_no_name_is_left(devices: list[Path], images: list[Path]) -> None:
    names = names_of(devices)
    assert len(names) >= 5
    for path in images:
        content = bytearray()
        with open_device(str(path)) as device:
            assert device.image is not None
            for sector, count, is_readable in device.image.runs():
                content += device.read(sector << 9, count << 9) if is_readable else b""
            content += json.dumps(device.image.header).encode()
        for name in names:
            assert name not in content, name


def test_a_name_in_another_place_is_replaced(golden: Callable[..., Path], tmp_path: Path,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    """Labels and uuids in free slots' padding, in keys' slack, and in the superblock's tail."""
    directory = golden("dirty_crash", writable=True)
    cache = directory / "cache.img"
    image = Image(cache.read_bytes(), [])
    assert image.walk.superblock is not None
    uuid = image.walk.superblock.uuid
    image.sb(72, "32s", b"a label of mine")
    image.cache.put(4096 + 3000, b"a label of mine" + uuid)
    image.uuid(7, 100, "15s", b"a label of mine")
    cache.write_bytes(image.cache.content())
    made = make_images(capsys, [cache], tmp_path, "--anonymise")
    check_no_name_is_left([cache], made)
    assert run(capsys, "fsck", made[0])[0] == 0


@contextmanager
def damaged(golden: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
            case: Case) -> Any:
    """The devices of a case as files; sectors that cannot be read fail as on a device."""
    image = base_image(golden(case.base)).fresh()
    case.edit(image)
    paths: list[Path] = []
    bad: dict[str, set[int]] = {}
    for device in [image.cache, *image.backings]:
        path = tmp_path / f"{device.name}.img"
        bad[str(path)] = set(device.unreadable)
        device.unreadable = set()
        path.write_bytes(device.content())
        paths.append(path)
    with monkeypatch.context() as patch:
        fail_reads(patch, lambda path, offset_bytes, nbytes: not bad.get(path, set()).isdisjoint(
            range(offset_bytes >> 9, (offset_bytes + nbytes + 511) >> 9)))
        yield paths


@pytest.mark.parametrize("case", SAMPLE, ids=lambda case: case.name)
def test_damaged(golden: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                 capsys: pytest.CaptureFixture[str], case: Case) -> None:
    told, told_hidden = (given(golden, case, anonymise=anonymise) for anonymise in (False, True))
    with damaged(golden, tmp_path, monkeypatch, case) as devices:
        images = make_images(capsys, devices[:1], tmp_path, *told)
        compare(capsys, devices[:1], images, "fsck", "--json", *told)
        status = run(capsys, "dump", "btree", devices[0])[0]
        if status != 1 or case.name.startswith("sb_") is False:
            compare(capsys, devices[:1], images, "dump", "journal", "--json")
            compare(capsys, devices[:1], images, "dump", "btree", "--json")
        hidden = make_images(capsys, devices[:1], tmp_path, "--anonymise", *told)
        first, second = (json.loads(run(capsys, "fsck", "--json", *words, path)[1])
                         for path, words in ((devices[0], told), (hidden[0], told_hidden)))
        assert codes(first) == codes(second)
        assert (case.name == NOTHING_LEFT) == any(each["code"] == "JOURNAL_EMPTY" for each in first["findings"]
                                                  if told)


def given(golden: Callable[..., Path], case: Case, *, anonymise: bool) -> list[str]:
    """What somebody knows of a device that does not tell it any more."""
    if case.name != NOTHING_LEFT:
        return []
    sb = base_image(golden(case.base)).walk.superblock
    assert sb is not None
    uuid = pseudonym(sb.set_uuid) if anonymise else sb.set_uuid
    return ["--bucket-size", f"{sb.bucket_size // 2}k", "--set-uuid", format_uuid(uuid)]


def test_data_is_left_out(golden: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing of the volume's content, not even behind the log of a node in a bucket that held data before."""
    directory = golden("thrash_crash", writable=True)
    cache = directory / "cache.img"
    image = Image(cache.read_bytes(), [])
    secret = b"a secret of a user, sector by sector".ljust(64) * 8
    node = image.nodes[0]
    behind = image.bucket(node.bucket) + node.written_blocks * image.walk.geometry.block_bytes
    image.cache.put(behind, secret * 8)
    assert image.walk.superblock is not None
    entries = [entry for entry in image.walk.journal if entry.index == image.walk.journal[-1].index]
    free = image.entry_at(entries[-1]) + (entries[-1].jset.blocks + 4) * image.walk.geometry.block_bytes
    image.cache.put(free, secret * 8)
    cache.write_bytes(image.cache.content())
    assert run(capsys, "fsck", cache)[0] == 0
    (made,) = make_images(capsys, [cache], tmp_path)
    with open_device(str(made)) as device:
        assert b"a secret" not in device.read(0, device.size_bytes)


def test_same_bytes_every_time(golden: Callable[..., Path], tmp_path: Path,
                               capsys: pytest.CaptureFixture[str]) -> None:
    cache = golden("deep_crash") / "cache.img"
    for name in ("a", "b"):
        assert run(capsys, "image", "create", cache, tmp_path / name)[0] == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_cut_or_damaged_image_is_one_sentence(golden: Callable[..., Path], tmp_path: Path,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    cache = golden("deep_crash") / "cache.img"
    (image,) = make_images(capsys, [cache], tmp_path)
    good = image.read_bytes()
    bad = tmp_path / "bad.bcimg"
    for length in (8, 9, 15, 16, 40, 200, len(good) // 2, len(good) - 1):
        bad.write_bytes(good[:length])
        status, out, err = run(capsys, "fsck", bad)
        assert (status, out, err.count("\n")) == (8, "", 1), length
    for at in [*range(8, 16), *range(16, len(good), 997), *range(len(good) - 40, len(good))]:
        bad.write_bytes(good[:at] + bytes([good[at] ^ 0x40]) + good[at + 1:])
        status, out, err = run(capsys, "fsck", "--json", bad)
        # A damaged chunk is as unreadable as a damaged sector.
        assert (status == 8 and err.count("\n") == 1) or (status == 4 and "metadata image is damaged" in out), at
    bad.write_bytes(good[:8] + b"\2" + good[9:])
    assert "format 2; this bcachectl knows 1" in run(capsys, "show", bad)[2]


def test_an_index_that_lies_is_refused(tmp_path: Path) -> None:
    def make(rows: list[tuple[int, int, int, int, int]], size_sectors: int = 100) -> Path:
        path = tmp_path / "lie"
        with path.open("wb") as file:
            writer = metaimage.Writer(file, {"size_sectors": size_sectors, "logical_block_bytes": 512,
                                             "anonymous": False})
            writer._rows = [metaimage._Row(*row) for row in rows]
            writer.finish()
        return path

    packed = zlib.compress(bytes(512))
    assert open_device(str(make([(8, 0, 1, 0, 0)]))).size_bytes == 51200
    for rows in ([(99, 0, 2, 0, 0)], [(8, 0, 2, 0, 0), (9, 0, 1, 0, 0)], [(8, 1 << 60, 1, len(packed), 0)],
                 [(8, 0, 1 << 20, 5, 0)], [(8, 0, 0, 0, 0)]):
        with pytest.raises(DeviceError, match="damaged or cut short"):
            open_device(str(make(rows)))


def test_writing_verbs_refuse(golden: Callable[..., Path], tmp_path: Path,
                              capsys: pytest.CaptureFixture[str]) -> None:
    directory = golden("dirty_crash")
    cache, backing = make_images(capsys, [directory / "cache.img", directory / "back0.img"], tmp_path)
    before = cache.read_bytes(), backing.read_bytes()
    for words in (["fsck", "-y", cache], ["wipe", cache], ["writeback", cache, backing],
                  ["format", "--cache", str(cache), "--force=bcache"], ["fsck", "-y", "--output", "x", cache],
                  ["engine", "run", "--cache", cache, "--backing", backing, "--read-only"],
                  ["image", "create", cache, tmp_path / "again"]):
        status, _out, err = run(capsys, *words)
        assert status
        assert "metadata image" in err, words
        assert err.count("\n") == 1
    assert before == (cache.read_bytes(), backing.read_bytes())


def test_files_are_not_overwritten(golden: Callable[..., Path], tmp_path: Path,
                                   capsys: pytest.CaptureFixture[str]) -> None:
    cache = golden("fresh", writable=True) / "cache.img"
    there = tmp_path / "there"
    there.write_text("mine")
    before = cache.read_bytes()
    assert run(capsys, "image", "create", cache, there)[0] == 3
    assert there.read_text() == "mine"
    assert run(capsys, "image", "create", cache, cache, "--force=overwrite")[0] == 3
    assert cache.read_bytes() == before
    assert run(capsys, "image", "create", cache, "/dev/null", "--force=overwrite")[0] == 3
    assert run(capsys, "image", "create", cache, there, "--dry-run", "--force=overwrite")[0] == 0
    assert there.read_text() == "mine"
    assert run(capsys, "image", "create", cache, there, "--force=overwrite")[0] == 0
    assert run(capsys, "image", "create", cache, tmp_path / "no" / "such")[0] == 1
    assert run(capsys, "image", "create", there, tmp_path / "b", "--force=dirty")[0] == 2
    assert not list(tmp_path.glob(".*"))


def test_a_block_device(golden: Callable[..., Path], tmp_path: Path, loop_device: Callable[..., str],
                        capsys: pytest.CaptureFixture[str]) -> None:
    """What the kernel would say about its sectors is the same of the image; so is all that resolve says."""
    story = golden("deep_crash", writable=True)
    devices = [Path(loop_device(story / name, sector_bytes=size, read_only=True))
               for name, size in (("cache.img", 4096), ("back0.img", 512))]
    images = make_images(capsys, devices, tmp_path)
    for verb in (["show"], ["show", "--json"], ["dump", "superblock"]):
        compare(capsys, devices[:1], images[:1], *verb)
    status, out, _err = run(capsys, "show", images[0])
    assert (status, "block size smaller than device block size" in out) == (1, True)
    compare(capsys, devices, images, "fsck", "--json")
    first = run(capsys, "resolve", "--json", devices[1], "--cache", devices[0])[1]
    second = run(capsys, "resolve", "--json", images[1], "--cache", images[0])[1]
    for device, image in zip(devices, images, strict=True):
        second = second.replace(str(image), str(device))
    assert first == second


def test_no_bcache_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blank = tmp_path / "blank"
    blank.write_bytes(bytes(1 << 20))
    status, _out, err = run(capsys, "image", "create", blank, tmp_path / "x")
    assert (status, "has no bcache superblock" in err) == (1, True)
    assert not (tmp_path / "x").exists()


def test_extract(golden: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is extracted can be repaired, and says then what the device would say."""
    case = next(case for case in cases() if case.name == "prio_csum_deep_crash")
    image = base_image(golden(case.base)).fresh()
    case.edit(image)
    cache, raw = tmp_path / "cache.img", tmp_path / "raw.img"
    cache.write_bytes(image.cache.content())
    (made,) = make_images(capsys, [cache], tmp_path)
    assert run(capsys, "image", "extract", made, raw, "--dry-run")[0] == 0
    assert not raw.exists()
    assert run(capsys, "image", "extract", made, raw)[0] == 0
    assert raw.stat().st_size == cache.stat().st_size
    assert raw.stat().st_blocks * 512 < 4 << 20
    compare(capsys, [cache], [raw], "fsck", "--json")
    assert run(capsys, "fsck", "-y", "--backup", tmp_path / "undo", raw)[0] == 1
    assert run(capsys, "fsck", raw)[0] == 0
    assert run(capsys, "image", "extract", cache, tmp_path / "y")[0] == 2


def test_pseudonyms() -> None:
    first = bytes(range(1, 17))
    assert pseudonym(first) == pseudonym(first) != first
    assert pseudonym(first)[:8] == pseudonym(first[:8] + bytes(8))[:8]
    assert pseudonym(bytes(16)) == bytes(16)
    assert pseudonym(INVALID_UUID) == INVALID_UUID


@pytest.mark.parametrize("options", [(), ("--anonymise",)])
def test_what_took_the_place_of_the_uuid_array_is_nobody_s_to_see(
        golden: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
        options: tuple[str, ...]) -> None:
    """A journal that went back in time names a bucket that holds a user's data now."""
    [case] = [case for case in cases() if case.name == "uuid_stale_dirty_crash"]
    image = base_image(golden(case.base)).fresh()
    case.edit(image)
    secret = b"Dear diary, "
    image.cache.put(image.uuid_at, secret * (image.walk.geometry.meta_bytes // len(secret)))
    device = tmp_path / "cache.img"
    device.write_bytes(image.cache.content())
    assert run(capsys, "image", "create", *options, device, tmp_path / "image")[0] == 0
    assert run(capsys, "image", "extract", tmp_path / "image", tmp_path / "raw")[0] == 0
    assert secret not in (tmp_path / "raw").read_bytes()
