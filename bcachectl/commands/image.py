# SPDX-License-Identifier: GPL-2.0-only
"""``bcachectl image``: the metadata of a device as a small file, to be looked at somewhere else."""

from __future__ import annotations

import os
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any, BinaryIO, NamedTuple

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from bcachectl import __version__, discovery, offline
from bcachectl.blockdev import BlockDevice, open_device
from bcachectl.commands import fsck_report
from bcachectl.commands.options import DeviceArgument, DryRun, Force, Json, print_json
from bcachectl.commands.superblock_options import check_given, parse_bucket_size, parse_set_uuid
from bcachectl.errors import BcachectlError, Refused, UsageError
from bcachectl.fsck import collect
from bcachectl.fsck.anonymise import Names
from bcachectl.fsck.check import Check
from bcachectl.fsck.collect import Region, Touched
from bcachectl.fsck.rescue import guess_superblock, superblock_problem
from bcachectl.fsck.walk import Read
from bcachectl.metaimage import Writer
from bcachectl.ondisk.magic import BCACHE_MAGIC
from bcachectl.units import counted, format_sectors, format_size

HAZARD_OVERWRITE = "overwrite"

FileArgument = Annotated[Path, typer.Argument(metavar="FILE", show_default=False, help="The file that is made.")]
ImageArgument = Annotated[str, typer.Argument(metavar="FILE", show_default=False,
                                              help="An image that `image create` made.")]
OutputArgument = Annotated[Path, typer.Argument(metavar="OUTPUT", show_default=False,
                                                help="The sparse file that is made, as large as the device was.")]
AnonymiseOption = Annotated[bool, typer.Option(
    "--anonymise", help="Replace every label and uuid, each by the same word everywhere, so that the image stays a "
                        "valid one and devices of one set still fit together.")]
BucketOption = Annotated[str | None, typer.Option("--bucket-size", metavar="SIZE", show_default=False,
                                                  help="Bucket size to go by if the superblock is damaged.")]
SetOption = Annotated[str | None, typer.Option("--set-uuid", metavar="UUID", show_default=False,
                                               help="Set uuid to go by if the superblock is damaged.")]


class Subject(NamedTuple):
    """What an image is made of: the device, what fsck says of it (None for a backing device), where its metadata is."""

    device: BlockDevice
    read: Read
    check: Check | None
    buckets: dict[int, list[tuple[str, int]]]
    set_uuid: bytes

    def regions(self, *, keep_all: bool) -> Iterator[Region]:
        """All that is kept."""
        if self.check is None:
            yield collect.superblock_region(self.read)
        else:
            yield from collect.collect(self.check, self.read, self.buckets, keep_all=keep_all)


def create(device: DeviceArgument, file: FileArgument, anonymise: AnonymiseOption = False,
           bucket_size: BucketOption = None, set_uuid: SetOption = None, force: Force = None, dry_run: DryRun = False,
           as_json: Json = False) -> None:
    """Copy the metadata of a cache or backing DEVICE, and no data, into a small FILE for a bug report.

    `show`, `dump`, `list`, `where`, `monitor` and `fsck` take the FILE as if it were the device. Damage is copied as
    it is, sectors that cannot be read stay unreadable. fsck runs on the device and on the FILE, and both must say the
    same. The device is only read.
    """
    _check_force(force)
    _check_output(file, device, is_forced=bool(force))
    with open_device(device) as opened:
        if opened.image is not None:
            raise UsageError(f"{device}: is a metadata image already")
        for user in discovery.users_of(device):
            print(f"bcachectl: {device}: is in use ({user}); the image may hold work under way", file=sys.stderr)
        subject = _examine(opened, bucket_size, set_uuid, show=sys.stderr.isatty() and not as_json)
        if dry_run:
            _show_plan(subject, file, as_json)
            return
        names = _names(subject) if anonymise else None
        with _new_file(file) as output:
            writer, is_same = _write(subject, output, names, show=sys.stderr.isatty() and not as_json)
            length_bytes = output.tell()
    if as_json:
        print_json("image", {"dry_run": False, "file": str(file), "device": device,
                             "role": "backing" if subject.check is None else "cache", "anonymous": anonymise,
                             "structures": _counts(subject), "stored_bytes": writer.stored_sectors << 9,
                             "unreadable_bytes": writer.unreadable_sectors << 9, "file_bytes": length_bytes,
                             "same_findings": is_same})
        return
    print(f"{file}: {format_size(length_bytes)} for {format_sectors(writer.stored_sectors)} of metadata of {device}"
          f"{', labels and uuids replaced' if anonymise else ''}.")
    if writer.unreadable_sectors:
        print(f"{counted(writer.unreadable_sectors, 'sector')} could not be read, as little as in the image.")
    if not is_same:
        print(f"bcachectl: {file}: fsck says something else of the image than of the device; does something write to "
              "the device?", file=sys.stderr)


def extract(file: ImageArgument, output: OutputArgument, force: Force = None, dry_run: DryRun = False,
            as_json: Json = False) -> None:
    """Make a sparse raw file of a metadata image, to try a repair on; it holds no data either.

    Sectors that could not be read are zeros there.
    """
    _check_force(force)
    _check_output(output, file, is_forced=bool(force))
    with open_device(file) as opened:
        image = opened.image
        if image is None:
            raise UsageError(f"{file}: is no metadata image; `bcachectl image create` makes one")
        runs = [(sector, count) for sector, count, is_readable in image.runs() if is_readable]
        bad = [(sector, count) for sector, count, is_readable in image.runs() if not is_readable]
        if dry_run:
            writes = [{"device": str(output), "operation": "write", "offset_bytes": sector << 9,
                       "length_bytes": count << 9, "what": "metadata"} for sector, count in runs]
            _print_writes(writes, as_json)
            return
        with _new_file(output) as raw:
            for sector, count in runs:
                raw.seek(sector << 9)
                raw.write(opened.read(sector << 9, count << 9))
            raw.truncate(opened.size_bytes)
    unreadable = sum(count for _sector, count in bad)
    if as_json:
        print_json("image", {"dry_run": False, "file": str(output), "stored_bytes": sum(n for _at, n in runs) << 9,
                             "unreadable_bytes": unreadable << 9, "size_bytes": image.size_sectors << 9})
        return
    print(f"{output}: {format_sectors(sum(n for _at, n in runs))} of metadata, a sparse file of "
          f"{format_sectors(image.size_sectors)}.")
    if unreadable:
        print(f"{counted(unreadable, 'sector')} could not be read, zeros in it.")


def _check_force(force: list[str] | None) -> None:
    other = frozenset(force or ()) - {HAZARD_OVERWRITE}
    if other:
        raise UsageError(f"--force={min(other)} overrides nothing here; it takes {HAZARD_OVERWRITE}")


def _check_output(file: Path, source: str, *, is_forced: bool) -> None:
    if not file.exists():
        return
    if os.path.exists(source) and os.path.samefile(file, source):
        raise Refused(f"{file}: is what is to be read; name a new file")
    if not stat.S_ISREG(file.stat().st_mode):
        raise Refused(f"{file}: is no plain file; name a new file")
    if not is_forced:
        raise Refused(f"{file}: exists already", hazard=HAZARD_OVERWRITE)


def _examine(device: BlockDevice, bucket_size: str | None, set_uuid: str | None, *, show: bool) -> Subject:
    def read(sector: int, count: int) -> bytes:
        return device.read(sector << 9, count << 9)

    size_sectors = device.size_bytes >> 9
    touched = Touched(read)
    guess, sb = None, None
    sectors, uuid = parse_bucket_size(bucket_size), parse_set_uuid(set_uuid)
    if superblock_problem(read, size_sectors):
        with fsck_report.told(read, show=show) as looking:
            guess = guess_superblock(looking, size_sectors, bucket_size=sectors, set_uuid=uuid)
    try:
        found = offline.read_superblock(device)
        sb = found.superblock
        if guess is None:
            offline.require_magic(device, found)
    except BcachectlError as error:
        if guess is None:
            check_given(device.path, read, size_sectors, None, bucket_size=sectors, set_uuid=uuid)
            raise BcachectlError(f"{error}; of a cache device that has lost its superblock and its journal make one "
                                 "with --bucket-size and --set-uuid") from error
    if sb is not None and sb.is_backing and sb.magic == BCACHE_MAGIC and guess is None:
        return Subject(device, read, None, {}, sb.set_uuid if any(sb.set_uuid) else sb.uuid)
    check = Check(touched.read, size_sectors, instead=guess)
    fsck_report.watch(check, show=show)
    used = check.walk.superblock or sb
    assert used is not None
    with Console(stderr=True).status("looking for metadata") if show else nullcontext():
        buckets = collect.plan(check, touched)
    return Subject(device, read, check, buckets, used.set_uuid)


def _names(subject: Subject) -> Names:
    # All names first: a region may hold one that only a later one says is a name.
    names = Names(subject.set_uuid)
    with_names = {bucket: structures for bucket, structures in subject.buckets.items()
                  if any(kind in (collect.UUIDS, collect.UUIDS_V0) for kind, _nsectors in structures)}
    for region in subject._replace(buckets=with_names).regions(keep_all=False):
        names.learn_from(region)
    return names


@contextmanager
def _new_file(path: Path) -> Iterator[BinaryIO]:
    # A file that takes its name when it is complete and durable, and leaves nothing behind otherwise.
    draft: str | None = None
    try:
        fd, draft = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with open(fd, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(draft, 0o666 & ~mask)
        os.replace(draft, path)
        draft = None
    except OSError as error:
        raise BcachectlError(f"{path}: cannot be written ({error.strerror}); name another place") from error
    finally:
        if draft is not None:
            os.unlink(draft)


def _write(subject: Subject, file: BinaryIO, names: Names | None, *, show: bool) -> tuple[Writer, bool]:
    # Once without what may be anybody's data; where damage makes fsck see another picture then, with it.
    total = sum(max(nsectors for _kind, nsectors in structures) for structures in subject.buckets.values()) << 9
    header = {"program": f"bcachectl {__version__}", "role": "backing" if subject.check is None else "cache",
              "size_sectors": subject.device.size_bytes >> 9,
              "logical_block_bytes": subject.device.logical_block_bytes, "anonymous": names is not None}
    for keep_all in (False, True):
        file.seek(0)
        file.truncate()
        writer = Writer(file, header)
        with Progress(TextColumn("metadata"), BarColumn(), DownloadColumn(binary_units=True),
                      console=Console(stderr=True), transient=True, disable=not show) as bars:
            bar = bars.add_task("", total=total)
            for region in subject.regions(keep_all=keep_all):
                if names is not None:
                    names.replace(region)
                for start, end, is_readable in region.runs():
                    if is_readable:
                        writer.add(region.sector + start, region.buf[start << 9:end << 9])
                    else:
                        writer.add_unreadable(region.sector + start, end - start)
                bars.advance(bar, len(region.buf))
        writer.finish()
        file.flush()
        if _is_same(subject, f"/proc/self/fd/{file.fileno()}", show=show):
            return writer, True
    return writer, False


def _is_same(subject: Subject, path: str, *, show: bool) -> bool:
    if subject.check is None:
        return True
    with open_device(path) as opened:
        copy = _examine_copy(opened, subject.check, show=show)
    return _says(copy) == _says(subject.check)


def _examine_copy(device: BlockDevice, check: Check, *, show: bool) -> Check:
    def read(sector: int, count: int) -> bytes:
        return device.read(sector << 9, count << 9)

    size_sectors = device.size_bytes >> 9
    guess = None
    if superblock_problem(read, size_sectors):
        with fsck_report.told(read, show=show) as looking:
            guess = guess_superblock(looking, size_sectors)
    if check.instead is not None and guess is None:
        guess = check.instead
    copy = Check(read, size_sectors, instead=guess)
    fsck_report.watch(copy, show=show)
    return copy


def _says(check: Check) -> list[tuple[Any, ...]]:
    # All but the texts, which name devices and uuids.
    return [(finding.code, finding.structure, finding.bucket, finding.sector, finding.key, finding.losses,
             finding.unknown) for finding in check.findings] + [tuple(check.totals)]


def _counts(subject: Subject) -> dict[str, int]:
    kinds = [kind for structures in subject.buckets.values() for kind in {kind for kind, _nsectors in structures}]
    return {collect.SUPERBLOCK: 1, **{kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}}


def _show_plan(subject: Subject, file: Path, as_json: bool) -> None:
    if as_json:
        print_json("image", {"dry_run": True, "file": str(file), "structures": _counts(subject)})
        return
    what = ", ".join(f"{count} {kind}" for kind, count in _counts(subject).items())
    print(f"{file}: would be written with the metadata of {subject.device.path}: {what}")


def _print_writes(writes: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print_json("image", {"dry_run": True, "writes": writes})
        return
    for each in writes:
        print(f"{each['device']}: write {each['length_bytes']} bytes at byte {each['offset_bytes']}: {each['what']}")
