# SPDX-License-Identifier: GPL-2.0-only
"""The options and arguments that several verbs share, as Typer annotations: one spelling and one help text for each.

    def show(device: DeviceArgument, as_json: Json = False) -> int | None: ...
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

JSON_SCHEMA = 1
"""The schema version in every ``--json`` output; raised when a field changes its meaning or goes away."""

ITEMS_AT_ONCE = 4096


def complete_device(incomplete: str) -> Iterator[str]:
    """Devices for the shell's completion; plain files are completed by the shell itself."""
    from bcachectl import discovery

    yield from (path for path in discovery.device_nodes() if path.startswith(incomplete))


def complete_set(incomplete: str) -> Iterator[str]:
    """The uuids of sets that run or whose devices are here, and the devices."""
    from bcachectl import control, discovery
    from bcachectl.units import format_uuid

    there = control.running()
    probes = [discovery.probe(node) for node in discovery.enumerate_devices()]
    uuids = [live.uuid for live in there] + [format_uuid(probe.superblock.set_uuid) for probe in probes
                                                   if probe.superblock is not None]
    for live in there:
        live.close()
    yield from (uuid for uuid in dict.fromkeys(uuids) if uuid.startswith(incomplete))
    yield from complete_device(incomplete)


def complete_volume(incomplete: str) -> Iterator[str]:
    """The volumes that run, by name, label and uuid, and the devices."""
    from bcachectl import control

    words: list[str | None] = []
    for live in [*control.running(), *control.alone()]:
        words += [word for volume in live.volumes() for word in (volume.name, volume.label, volume.uuid)]
        live.close()
    yield from (word for word in dict.fromkeys(words) if word and word.startswith(incomplete))
    yield from complete_device(incomplete)


def complete_target(incomplete: str) -> Iterator[str]:
    """What runs, sets and volumes, and the devices."""
    from bcachectl import control

    there = control.running()
    for live in there:
        live.close()
    yield from (live.uuid for live in there if live.uuid.startswith(incomplete))
    yield from complete_volume(incomplete)


def complete_name(incomplete: str) -> Iterator[str]:
    """The names of tunables."""
    from bcachectl.engine.tunables import TUNABLES

    names = dict.fromkeys(name for rows in TUNABLES.values() for name in rows)
    yield from (name for name in names if name.startswith(incomplete))


def complete_setting(incomplete: str) -> Iterator[str]:
    """The names of tunables, as `set` takes them."""
    yield from (f"{name}=" for name in complete_name(incomplete))


Json = Annotated[bool, typer.Option("--json", help="Print JSON; sizes are integers in the unit their name ends in.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print each write (device, byte offset, length, what it is) "
                                                        "and write nothing.")]
Force = Annotated[list[str] | None, typer.Option("--force", metavar="HAZARD",
                                                 help="Override one safety check, by the word that the refusal names.")]
Backup = Annotated[Path | None, typer.Option(
    "--backup", metavar="FILE", show_default=False,
    help="Where the undo file goes. Default: a new file below your state directory, for root /var/lib/bcachectl.")]
DeviceArgument = Annotated[str, typer.Argument(metavar="DEVICE", autocompletion=complete_device, show_default=False,
                                               help="A block device or a file that holds an image.")]
DevicesArgument = Annotated[list[str], typer.Argument(metavar="DEVICE", autocompletion=complete_device,
                                                      show_default=False,
                                                      help="Block devices or files that hold an image.")]
SetArgument = Annotated[str, typer.Argument(metavar="SET", autocompletion=complete_set, show_default=False,
                                            help="A set's uuid, a unique prefix of it, or a DEVICE of it.")]
Kernel = Annotated[bool | None, typer.Option("--kernel/--engine", show_default=False,
                                             help="Who runs what is meant, where both could: the kernel's driver, or "
                                                  "an engine.")]
VolumeArgument = Annotated[str, typer.Argument(metavar="VOLUME", autocompletion=complete_volume, show_default=False,
                                               help="bcache0, a uuid, a label, or the backing DEVICE.")]


def driver(kernel: bool | None) -> str | None:
    """What `Kernel` asks for, as `bcachectl.control.find` takes it."""
    from bcachectl import control

    return None if kernel is None else control.KERNEL if kernel else control.ENGINE


def print_json(kind: str, body: dict[str, Any]) -> None:
    """Print ``body`` as one JSON document that names its schema and its ``kind`` (the verb that made it)."""
    assert not {"schema", "kind"} & set(body)
    json.dump({"schema": JSON_SCHEMA, "kind": kind, **body}, sys.stdout, indent=2, ensure_ascii=False)
    print()


def json_line(kind: str, body: dict[str, Any]) -> None:
    """Print ``body`` as one line of JSON, for outputs that go on."""
    assert not {"schema", "kind"} & set(body)
    print(json.dumps({"schema": JSON_SCHEMA, "kind": kind, **body}, ensure_ascii=False))


def print_json_list(kind: str, head: dict[str, Any], name: str, items: Iterable[dict[str, Any]],
                    tail: Callable[[], dict[str, Any]]) -> None:
    """Print a document with one long list, an item a line, while it is made.

    ``tail`` gives the fields behind the list, once the list is through.
    """
    start = json.dumps({"schema": JSON_SCHEMA, "kind": kind, **head}, ensure_ascii=False)
    sys.stdout.write(f"{start[:-1]}, {json.dumps(name)}: [")
    every = (json.dumps(item, ensure_ascii=False) for item in items)
    separator = "\n"
    while batch := list(islice(every, ITEMS_AT_ONCE)):
        sys.stdout.write(separator + ",\n".join(batch))
        separator = ",\n"
    sys.stdout.write(f"\n], {json.dumps(tail(), ensure_ascii=False)[1:]}\n")
