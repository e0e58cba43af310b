# SPDX-License-Identifier: GPL-2.0-only
"""Write the manual pages, section 8, one a verb, from the program's own help: ``python man/generate.py [DIRECTORY]``.

What the help cannot know is here: examples, and what to read next.  `make docs` runs this; a test asks whether the
pages are fresh.
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any

import typer

from bcachectl import __version__, cli

EXIT_STATUS = (("0", "All went well."), ("1", "It failed, or what was looked at is damaged."),
               ("2", "The command line is wrong."), ("3", "A safety check refused."),
               ("4", "The state of the device, set or engine does not allow it."),
               ("130", "Interrupted, by SIGINT, SIGTERM or SIGHUP."))

FSCK_STATUS = (("0", "Nothing is wrong."), ("1", "What was wrong is corrected."),
               ("4", "Something is left uncorrected."), ("8", "The check itself failed."),
               ("16", "The command line is wrong."), ("32", "Interrupted, by SIGINT, SIGTERM or SIGHUP."))

# Verb -> the pages to read next, beside the overview and those of its group.
NEXT = {
    **dict.fromkeys(("list", "show", "dump", "where", "image create"), ("bcachectl-fsck",)),
    "fsck": ("bcachectl-undo", "bcachectl-writeback", "bcachectl-image-create", "bcachectl-recovery(7)"),
    "writeback": ("bcachectl-fsck", "bcachectl-resolve", "bcachectl-forget-backing", "bcachectl-recovery(7)",
                  "ddrescue(1)"),
    "forget-backing": ("bcachectl-writeback", "bcachectl-undo", "bcachectl-recovery(7)"),
    "resolve": ("bcachectl-writeback", "bcachectl-undo", "bcachectl-recovery(7)"),
    "undo": ("bcachectl-fsck", "bcachectl-wipe", "bcachectl-format", "bcachectl-recovery(7)"),
    "wipe": ("bcachectl-undo",),
    "format": ("bcachectl-register", "bcachectl-engine-run", "bcachectl-undo"),
    "get": ("bcachectl-set", "bcachectl-tunables(5)"),
    "set": ("bcachectl-get", "bcachectl-tunables(5)"),
    "status": ("bcachectl-monitor", "bcachectl-get"),
    "monitor": ("bcachectl-status",),
    "run": ("bcachectl-resolve", "bcachectl-recovery(7)"),
    "register": ("bcachectl-unregister", "bcachectl-fsck", "bcachectl-recovery(7)"),
    "unregister": ("bcachectl-register", "bcachectl-stop"),
    "engine run": ("bcachectl-tunables(5)", "bcachectl(7)"),
}

# Verb -> (command line, what it does).
EXAMPLES: dict[str, list[tuple[str, str]]] = {
    "list": [("bcachectl list", "Every bcache device here."),
             ("bcachectl list --json cache.img back.img", "The same for programs, with two images besides."),
             ("bcachectl list --watch", "Go on, and tell what is plugged in.")],
    "format": [("bcachectl format --cache /dev/nvme0n1p3 --backing /dev/sdb /dev/sdc --writeback --dry-run",
                "Show what would be written to make one set of three devices."),
               ("bcachectl format --cache /dev/nvme0n1p3 --bucket-size 2M --replacement fifo", "A cache device alone."),
               ("bcachectl format --backing /dev/sdd --set-uuid 0167b536-3fc7-421f-8835-52e021c7e66f --label photos",
                "A backing device that attaches to an existing set when it is registered.")],
    "wipe": [("bcachectl wipe /dev/sdb", "No longer a bcache device; the superblock is kept in an undo file."),
             ("bcachectl wipe --backup /root/sdb.undo /dev/sdb", "The same, with a place for the undo file.")],
    "writeback": [
        ("bcachectl writeback --dry-run /dev/nvme0n1p3 /dev/sdb", "List each write that it takes."),
        ("bcachectl writeback --map sdb.map --retries 3 /dev/nvme0n1p3 /dev/sdb",
         "Save all dirty data from a failing cache device; the same line goes on after an interruption."),
        ("bcachectl writeback --orphans cache.img", "Dirty data that a forced detach left behind."),
        ("bcachectl writeback --slot 0 --to saved.img cache.img", "Write that of one device number to a new image.")],
    "forget-backing": [
        ("bcachectl forget-backing /dev/nvme0n1p3 bcache1 --export saved.img",
         "Save what the cache has for a disk that died, and free its space."),
        ("bcachectl forget-backing cache.img 0 --accept-loss",
         "Give up what slot 0 has, as an old forced detach left it.")],
    "resolve": [
        ("bcachectl resolve /dev/sdb", "Why does it not come up? Nothing is written."),
        ("bcachectl resolve /dev/sdb --cache /dev/nvme0n1p3", "What each choice loses, in bytes and ranges."),
        ("bcachectl resolve /dev/sdb --cache /dev/nvme0n1p3 --keep-dirty --force=inconsistent",
         "Go on with what the cache has."),
        ("bcachectl resolve /dev/sdb --use-backing-alone --force=dirty",
         "The cache is gone for good; go on with what the device holds.")],
    "undo": [("bcachectl undo /var/lib/bcachectl/undo/wipe-sdb-1795200755.undo", "Put a wiped superblock back.")],
    "fsck": [("bcachectl fsck /dev/nvme0n1p3 /dev/sdb", "Check a set that does not run; nothing is written."),
             ("bcachectl fsck -p cache.img", "Repair what costs nothing."),
             ("bcachectl fsck -y --output repaired.img cache.img", "Repair a copy, and leave the device alone.")],
    "image create": [
        ("bcachectl image create --anonymise /dev/nvme0n1p3 cache.bcimg",
         "A file of some MiB for a bug report, without data, labels and uuids."),
        ("bcachectl image create --anonymise /dev/sdb back.bcimg",
         "The superblock of its backing device; `bcachectl fsck cache.bcimg back.bcimg` then checks both.")],
    "image extract": [("bcachectl image extract cache.bcimg cache.img",
                       "A sparse file as large as the device, to try a repair on.")],
    "show": [("bcachectl show /dev/sdb", "The superblock, and whether the kernel would take it."),
             ("bcachectl show --format=bcache-super-show /dev/sdb", "As bcache-super-show prints it.")],
    "dump": [("bcachectl dump btree --format=kernel cache.img", "Every live key, as the kernel's debugfs file has it."),
             ("bcachectl dump extents cache.img", "What is cached of each volume, and what of it is dirty."),
             ("bcachectl dump journal --json cache.img", "The journal with its keys, for programs.")],
    "where": [("bcachectl where /dev/sdb 0 2048 --cache /dev/nvme0n1p3", "The first MiB of a volume."),
              ("bcachectl where bcache1 100 --cache cache.img", "One sector of the second volume of an image.")],
    "status": [("bcachectl status", "The only set that runs."), ("bcachectl status bcache0 --json", "For programs.")],
    "monitor": [("bcachectl monitor", "The live view of the only set that runs."),
                ("bcachectl monitor bcache0 --kernel", "Of the kernel's bcache0, if an engine has one, too."),
                ("bcachectl monitor --once cache.img", "A page about a cache device that no set uses."),
                ("bcachectl monitor --json --interval 10", "A line of JSON every ten seconds.")],
    "register": [("bcachectl register /dev/nvme0n1p3 /dev/sdb", "The kernel runs the set; the volume is printed."),
                 ("bcachectl register --dry-run /dev/sdb", "Would the kernel take it?")],
    "unregister": [("bcachectl unregister 0167b536 --dry-run", "What that does to each device of the set."),
                   ("bcachectl unregister bcache1", "End one volume; it stays attached to its set.")],
    "run": [("bcachectl run /dev/sdb", "Start a clean device whose cache is not here."),
            ("bcachectl run /dev/sdb --force=dirty", "Give up what only the lost cache had.")],
    "attach": [("bcachectl attach /dev/sdc 0167b536", "Attach a backing device to the set with this uuid.")],
    "detach": [("bcachectl detach bcache0 --wait", "Write all dirty data back, then detach; show how far it is.")],
    "stop": [("bcachectl stop 0167b536", "Stop the set; it stays attached for the next start."),
             ("bcachectl stop bcache0 --kernel", "Stop one volume of the kernel's.")],
    "get": [("bcachectl get bcache0", "All tunables of a volume."),
            ("bcachectl get bcache0 cache_mode", "One value, bare, as cat on sysfs prints it.")],
    "set": [("bcachectl set bcache0 cache_mode=writeback writeback_percent=20", "Two tunables, both or none.")],
    "volume create": [("bcachectl volume create 0167b536 20G", "A volume of 20 GiB on the cache alone.")],
    "volume remove": [("bcachectl volume remove bcache1", "Remove it.")],
    "gc": [("bcachectl gc 0167b536", "Collect garbage now.")],
    "flush": [("bcachectl flush bcache0", "Write everything dirty back, and wait for it.")],
    "engine run": [
        ("bcachectl engine run --cache cache.img --backing back.img --export nbd",
         "Serve a set of images over NBD; nbd-client or qemu connects to the URI that is printed."),
        ("bcachectl engine run --cache /dev/nvme0n1p3 --backing /dev/sdb --read-only",
         "Read a set, dirty as it may be, and change nothing."),
        ("bcachectl engine run --cache /dev/nvme0n1p3 --backing /dev/sdb --export ublk --recover",
         "Serve as /dev/ublkb0, and take that device back if an engine was killed: for a service that is restarted."),
        ("bcachectl engine run --cache cache.img --backing back.img --overlay try.img",
         "Try something out: all writes go to a file of their own."),
        ("bcachectl engine run --cache /ssd/cache.img --backing /disks/back.img --direct",
         "Serve a set of large images without filling the page cache with them.")],
    "engine list": [("bcachectl engine list", "What runs here.")],
    "engine stop": [("bcachectl engine stop", "Stop the only engine that runs.")],
    "demo": [("bcachectl demo", "Twelve seconds of it."),
             ("bcachectl demo --seconds 60 --seed 7", "Longer, and another load.")],
}


def main(directory: Path) -> None:
    """Write every page into ``directory``."""
    for name, text in pages().items():
        (directory / name).write_text(text, encoding="utf-8")


def pages() -> dict[str, str]:
    """File name -> text of each page."""
    words = [word for verb in cli.COMMANDS for word in verb.split()]
    app: Any = typer.main.get_command(cli.build_app(words))
    made = {f"{cli.PROGRAM}.8": _overview(app)}
    for verb in cli.COMMANDS:
        command = app
        for word in verb.split():
            command = command.commands[word]
        made[f"{cli.PROGRAM}-{verb.replace(' ', '-')}.8"] = _page(verb, command)
    return made


def _overview(app: Any) -> str:
    lines = [*_head(cli.PROGRAM, "administer Linux bcache, and run cache sets in user space"),
             ".SH SYNOPSIS", f".B {cli.PROGRAM}", "[\\fIOPTION\\fR]... \\fIVERB\\fR [\\fIARGUMENT\\fR]...",
             ".SH DESCRIPTION", *_paragraphs(cli.OVERVIEW), ".SH VERBS"]
    for verb, command in cli.COMMANDS.items():
        lines += [".TP", f"\\fB{_text(verb)}\\fR", _text(command.summary)]
    lines += _options(app, "OPTIONS")
    lines += [".SH EXIT STATUS"]
    for status, meaning in EXIT_STATUS:
        lines += [".TP", f".B {status}", meaning]
    lines += [".SH ENVIRONMENT", ".TP", ".BR NO_COLOR ,", ".B FORCE_COLOR",
              "Never print colors; print them even into a pipe.", ".TP", ".B XDG_STATE_HOME",
              "Undo files go below it; by default to /var/lib/bcachectl for root, ~/.local/state for others.",
              ".TP", ".B XDG_RUNTIME_DIR", "The engines' control sockets are below it.",
              ".SH EXAMPLES", *_examples("demo"), *_examples("list")]
    names = [f"{cli.PROGRAM}-{verb.replace(' ', '-')}" for verb in cli.COMMANDS]
    return "\n".join([*lines, *_see_also(names)]) + "\n"


def _page(verb: str, command: Any) -> str:
    name = f"{cli.PROGRAM}-{verb.replace(' ', '-')}"
    summary = cli.COMMANDS[verb].summary.rstrip(".")
    context = typer.Context(command, info_name=verb)
    usage = " ".join(command.collect_usage_pieces(context))
    arguments = [param for param in command.params if param.param_type_name == "argument"]
    lines = [*_head(name, summary[0].lower() + summary[1:]), ".SH SYNOPSIS", f".B {cli.PROGRAM} {_text(verb)}",
             _text(usage), ".SH DESCRIPTION", *_paragraphs(inspect.cleandoc(command.help or ""))]
    if arguments:
        lines.append(".SH ARGUMENTS")
        for argument in arguments:
            name_shown = _text(argument.metavar or argument.name.upper())
            lines += [".TP", f"\\fI{name_shown}\\fR", _sentence(argument.help or "")]
    lines += _options(command, "OPTIONS")
    lines += [".SH EXIT STATUS"]
    for status, meaning in FSCK_STATUS if verb == "fsck" else EXIT_STATUS:
        lines += [".TP", f".B {status}", meaning]
    lines += [".SH EXAMPLES", *_examples(verb)]
    group = verb.split()[0]
    near = [f"{cli.PROGRAM}-{other.replace(' ', '-')}" for other in cli.COMMANDS
            if other != verb and other.split()[0] == group]
    return "\n".join([*lines, *_see_also([cli.PROGRAM, *near, *NEXT.get(verb, ())])]) + "\n"


def _head(name: str, summary: str) -> list[str]:
    return [".\\\" SPDX-License-Identifier: GPL-2.0-only", ".\\\" Made by man/generate.py; do not edit.",
            f'.TH {name.upper()} 8 "" "bcachectl {__version__}" "bcachectl"',
            ".SH NAME", f"{name} \\- {_text(summary)}"]


def _options(command: Any, title: str) -> list[str]:
    lines = [f".SH {title}"]
    for option in command.params:
        if option.param_type_name != "option":
            continue
        spelled = ", ".join(f"\\fB{_text(word)}\\fR" for word in [*option.opts, *option.secondary_opts])
        value = "" if option.is_flag else f" \\fI{_text(option.metavar or _type_name(command, option))}\\fR"
        default = (f" Default: {option.default}." if option.show_default and not option.is_flag
                   and option.default not in (None, "", []) else "")
        lines += [".TP", spelled + value, _sentence(option.help or "") + _text(default)]
    return [*lines, ".TP", "\\fB\\-h\\fR, \\fB\\-\\-help\\fR", "Show the help and end."]


def _type_name(command: Any, option: Any) -> str:
    shown = option.display_type(typer.Context(command))
    return str(shown).strip("<>")


def _examples(verb: str) -> list[str]:
    lines: list[str] = []
    for command, meaning in EXAMPLES[verb]:
        lines += [".TP", f"\\fB{_text(command)}\\fR", _sentence(meaning)]
    return lines


def _see_also(names: list[str]) -> list[str]:
    parts = [name.partition("(") for name in names]
    return [".SH SEE ALSO", ",\n".join(f".BR {_text(name)} ({section or '8)'}" for name, _, section in parts)]


def _paragraphs(text: str) -> list[str]:
    lines: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        lines += [".PP", _text(" ".join(paragraph.split()))]
    return lines[1:]


def _sentence(text: str) -> str:
    return _text(" ".join(text.split()))


def _text(text: str) -> str:
    # A leading dot or quote would be a request; a plain hyphen may be broken at.
    escaped = text.replace("\\", "\\e").replace("-", "\\-").replace("`", "\\(ga")
    return f"\\&{escaped}" if escaped[:1] in (".", "'") else escaped


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
