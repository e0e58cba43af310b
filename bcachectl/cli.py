# SPDX-License-Identifier: GPL-2.0-only
"""The command line: which verbs there are, how one is loaded, and how everything that can go wrong ends.

`COMMANDS` names every verb, the function that does it and the line that the overview says about it.  A verb's module is
imported only if its name is on the command line, so that ``--help`` costs neither numpy nor construct:

1. `run` takes the words of the command line and the shell's completion words, if it asks for completions.
2. `build_app` makes the Typer application: the real function for a verb that is named, a stand-in for all others.
3. The function runs.  It returns an exit status, or None for success, or raises.
4. `run` turns what was raised into one sentence on stderr and an exit status; ``--debug`` adds the traceback.

A command module holds one function a verb, with Typer annotations; the options that several verbs share are in
`bcachectl.commands.options`.  It parses, calls and prints; it decides nothing.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple

import typer
from typer.completion import get_completion_inspect_parameters

from bcachectl import __version__
from bcachectl.errors import EXIT_CANCELLED, EXIT_INTERRUPTED, BcachectlError

PROGRAM = "bcachectl"

EXIT_FAILED = 1
EXIT_USAGE = 2

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a file system without room says.  Where a file was named the error has its name; what has none is stdout."""


class Command(NamedTuple):
    """One verb: where its function is, and what the overview says about it."""

    target: str
    summary: str


COMMANDS: dict[str, Command] = {
    "list": Command("list:list_devices", "Every bcache device, set and volume here."),
    "format": Command("format:format_devices", "Write superblocks that the kernel registers."),
    "fsck": Command("fsck:fsck", "Check a cache set offline, say what damage costs, repair it."),
    "wipe": Command("wipe:wipe", "Take the superblock away, after a backup of it."),
    "writeback": Command("writeback:writeback", "Copy dirty data to the backing devices without running the set."),
    "forget-backing": Command("forget:forget_backing", "Drop the data of a dead backing device from a cache."),
    "resolve": Command("resolve:resolve_volume", "Tell what each way out of an inconsistent state loses; take one."),
    "undo": Command("undo:undo", "Take back what a destructive verb did."),
    "image create": Command("image:create", "Copy a device's metadata into a small file for a bug report."),
    "image extract": Command("image:extract", "Make a sparse raw file of a metadata image."),
    "show": Command("show:show", "The superblock, every field, its checksum judged."),
    "dump": Command("dump:dump", "A structure of the device as a table, as JSON or as the kernel prints it."),
    "where": Command("where:where", "Where a sector of a volume lies."),
    "status": Command("status:status", "State, mode, dirty data, hit ratios and buckets, as one page."),
    "monitor": Command("monitor:monitor", "The live view of the allocator and of everything around it."),
    "register": Command("register:register", "Give devices to the kernel's driver."),
    "unregister": Command("unregister:unregister", "Take a set of the kernel's apart, all dirty data written back."),
    "run": Command("run:run", "Run a backing device without its cache set."),
    "attach": Command("attach:attach", "Attach a volume to a set."),
    "detach": Command("detach:detach", "Detach a volume, after writing its dirty data back."),
    "stop": Command("stop:stop", "Stop a volume or a set in good order."),
    "get": Command("get:get", "Read tunables."),
    "set": Command("set:set_tunables", "Change tunables."),
    "volume create": Command("volume:create", "Make a flash-only volume."),
    "volume remove": Command("volume:remove", "Remove a flash-only volume and its data."),
    "gc": Command("gc:gc", "Run garbage collection now and wait for it."),
    "flush": Command("flush:flush", "Write a volume's dirty data back now and wait for it."),
    "engine run": Command("engine_run:engine_run", "Run a cache set in the foreground."),
    "engine list": Command("engine_list:engine_list", "The engines that run here."),
    "engine stop": Command("engine_stop:engine_stop", "Stop an engine in good order."),
    "demo": Command("demo:demo", "See it work: files, an engine, a workload, the live view."),
}
"""Verb -> function, as ``module:function`` below `bcachectl.commands`.  The order is the overview's."""

GROUPS = {
    "image": "Metadata images: a device without its data, to be looked at elsewhere.",
    "volume": "Flash-only volumes.",
    "engine": "Run a cache set in user space.",
}
"""The first words of verbs of two words."""

SEVERAL = {
    "format": ("--cache", "-C", "--backing", "--bdev", "-B"),
    "engine run": ("--cache", "--backing"),
}
"""Options that take every word up to the next option, as in ``--backing A B``; their verbs have no arguments."""

OWN_STATUS = {"fsck": {EXIT_FAILED: 8, EXIT_USAGE: 16, EXIT_INTERRUPTED: EXIT_CANCELLED}}
"""Verbs with exit statuses of their own: what those of a command that raised are for them."""

OVERVIEW = """Administer Linux bcache, and run cache sets in user space.

A DEVICE is a block device or a plain file that holds an image. A SET is a cache set's uuid, a unique prefix of it
(8 characters or more), or any DEVICE of it. A VOLUME is an exported device: bcache0, its uuid, its label, or its
backing DEVICE.
"""

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def run(words: Sequence[str]) -> int:
    """Run the command line ``words`` and return the exit status.  Nothing but a bug in here raises."""
    asked = [*words, *_completion_words()]
    debug = "--debug" in _before_dashes(words)
    arguments = spread([word for index, word in enumerate(words) if word != "--debug" or "--" in words[:index]])
    try:
        command = typer.main.get_command(build_app(asked))
        if f"_{PROGRAM.upper()}_COMPLETE" in os.environ:
            get_completion_inspect_parameters()  # Registers the shells; its answer is for Typer's own options.
        status = command.main(args=arguments, prog_name=PROGRAM, standalone_mode=False,
                              complete_var=f"_{PROGRAM.upper()}_COMPLETE")
        sys.stdout.flush()
        if status == EXIT_INTERRUPTED:
            # What Typer makes of a KeyboardInterrupt; no verb returns it.
            raise KeyboardInterrupt
        return status if isinstance(status, int) else 0
    except BrokenPipeError:
        # Nobody is left to read a message.
        _drop_output()
        return status_for(arguments, EXIT_FAILED)
    except SystemExit as leaving:
        # What Typer makes of a broken pipe.
        return status_for(arguments, leaving.code if isinstance(leaving.code, int) else EXIT_FAILED)
    except BaseException as error:
        status, sentence = judge(error)
        if isinstance(error, OSError) and error.filename is None and error.errno in FULL:
            _drop_output()
        status = status_for(arguments, status)
        if debug:
            traceback.print_exc()
        if sentence:
            print(f"{PROGRAM}: {sentence}", file=sys.stderr)
        return status


def status_for(words: Sequence[str], status: int) -> int:
    """What the verb that ``words`` begin with ends with where others end with ``status``."""
    return OWN_STATUS.get(next(iter(words), ""), {}).get(status, status)


def judge(error: BaseException) -> tuple[int, str]:
    """The exit status and the sentence for what a command raised."""
    match error:
        case BcachectlError():
            return error.exit_status, str(error)
        case typer.Exit():
            return error.exit_code, ""
        case KeyboardInterrupt() | typer.Abort():
            return EXIT_INTERRUPTED, "interrupted"
        case OSError():
            name = f"{error.filename}: " if error.filename is not None else ""
            if not name and error.errno in FULL:
                name = "the output cannot be written: "
            return EXIT_FAILED, f"{name}{error.strerror or error}"
        case _ if hasattr(error, "format_message"):
            # Typer's own complaint about the command line.
            context = getattr(error, "ctx", None)
            verb = context.command_path if context is not None else PROGRAM
            sentence = error.format_message().strip().rstrip(".").replace(": Value error, ", ": ")
            return EXIT_USAGE, f"{sentence[0].lower()}{sentence[1:]}; see `{verb} --help`"
        case _:
            return EXIT_FAILED, (f"a bug, please report it with what --debug prints: {type(error).__name__}: {error}"
                                 f" ({_place_of(error)})")


def _place_of(error: BaseException) -> str:
    # Where it was raised.  What happens once in a month is not waited for with --debug.
    frames = traceback.extract_tb(error.__traceback__)
    return f"{os.path.basename(frames[-1].filename)}, line {frames[-1].lineno}" if frames else "nobody knows where"


def build_app(asked: Sequence[str]) -> typer.Typer:
    """The Typer application, with the verbs that are among the words ``asked`` loaded."""
    app = typer.Typer(name=PROGRAM, help=OVERVIEW, add_completion=False, rich_markup_mode=None,
                      context_settings=CONTEXT, pretty_exceptions_enable=False)
    app.callback(help=OVERVIEW)(_global_options)
    groups: dict[str, typer.Typer] = {}
    for verb, command in COMMANDS.items():
        *group, name = verb.split()
        loaded = all(word in asked for word in verb.split())
        function = load(command) if loaded else _stand_in(command)
        parent = app
        if group:
            parent = groups.get(group[0]) or typer.Typer(rich_markup_mode=None, context_settings=CONTEXT)
            if group[0] not in groups:
                groups[group[0]] = parent
                app.add_typer(parent, name=group[0], help=GROUPS[group[0]])
        parent.command(name, help=None if loaded else command.summary, short_help=command.summary,
                       context_settings=CONTEXT)(function)
    return app


def spread(words: Sequence[str]) -> list[str]:
    """Give each word its option: ``--backing A B`` becomes ``--backing A --backing B`` for the verbs in `SEVERAL`."""
    options = next((options for verb, options in SEVERAL.items()
                    if list(words[:len(verb.split())]) == verb.split()), ())
    done: list[str] = []
    option = value_of = ""
    for word in words:
        if word.startswith("-"):
            name, _, value = word.partition("=")
            option = name if name in options else ""
            value_of = "" if value else word
        elif value_of:
            value_of = ""
        elif option:
            done.append(option)
        done.append(word)
    return done


def load(command: Command) -> Callable[..., Any]:
    """Import the module of ``command`` and return its function."""
    module_name, function_name = command.target.split(":")
    module = importlib.import_module(f"bcachectl.commands.{module_name}")
    function: Callable[..., Any] = getattr(module, function_name)
    return function


def _stand_in(command: Command) -> Callable[[], None]:
    # What the overview needs of a verb that is not on the command line.
    def stand_in() -> None:
        raise AssertionError(f"{command.target} was not loaded")

    return stand_in


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print(f"{PROGRAM} {__version__}")
        raise typer.Exit()


# Typer reads the options of the program from here; they are acted upon elsewhere.
def _global_options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True,
                                          callback=_print_version)] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with an error; works after a verb too.")]
    = False,
) -> None:
    pass


def _before_dashes(words: Sequence[str]) -> Sequence[str]:
    return words[:words.index("--")] if "--" in words else words


def _drop_output() -> None:
    # Python flushes stdout again when it exits: give it what takes the bytes.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _completion_words() -> list[str]:
    # bash hands over COMP_WORDS; zsh and fish hand over the line so far in Typer's own variable.
    return os.environ.get("COMP_WORDS", "").split() + os.environ.get("_TYPER_COMPLETE_ARGS", "").split()
