# SPDX-License-Identifier: GPL-2.0-only
"""`Tunables`: what can be set and read on a running set, under the kernel's names, with its units, ranges and parsing.

`TUNABLES` states each tunable once: name, object, how its text is parsed, its range, and where in the engine it lives.
Parsing is the kernel's (sysfs.h), class by class:

====  ===========================================================================================================
U     a plain decimal number, clamped into its range without complaint; whoever sets it is told what was stored
B     as U; 1 if it is not 0
L     exactly one word of a list
T     text
====  ===========================================================================================================

What is shown is what a ``cat`` of the kernel's file shows: sizes as `hprint` rounds them down, lists with the current
word in brackets.  Only ``cache_mode``, ``label``, ``cache_replacement_policy`` and ``discard`` are kept on disk;
everything else is the default again at the next start.

Kernel: sysfs.c.  Names may carry their directory (``internal/copy_gc_enabled``, ``cache0/discard``), or not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from bcachectl.engine.attributes import DEVICE_ATTRIBUTES, FLASH_ATTRIBUTES, SET_ATTRIBUTES, window_attributes
from bcachectl.engine.cached_dev import CachedDev
from bcachectl.errors import DeviceError, Refused, UsageError, WrongState
from bcachectl.ondisk.superblock import CacheMode, Replacement
from bcachectl.units import hprint, parse_unsigned

if TYPE_CHECKING:
    from bcachectl.engine.cache_set import CacheSet

U32_MAX = (1 << 32) - 1
S32_MAX = (1 << 31) - 1
LABEL_BYTES = 32
HALFLIFE_UNIT = 88
"""io_error_halflife is stored in units of so many I/Os (sysfs.c)."""

_DEFAULT_CUTOFF, _CUTOFF_MAX = 40, 70
_DEFAULT_CUTOFF_SYNC, _CUTOFF_SYNC_MAX = 70, 90

Bound = int | tuple[str, int]
"""A limit, or the value of another attribute plus an offset."""


class Tunable(NamedTuple):
    """One tunable: ``where`` is the path of attributes from its object, a set or (``volume``) a cached device."""

    name: str
    scope: str
    kind: str
    where: str
    low: Bound = 0
    high: Bound = U32_MAX
    words: tuple[str, ...] = ()
    unit: str = ""


_RATE = "writeback.rate."

_ROWS = (
    Tunable("congested_read_threshold_us", "set", "U", "congestion.read_threshold_us", unit="us"),
    Tunable("congested_write_threshold_us", "set", "U", "congestion.write_threshold_us", unit="us"),
    Tunable("io_error_limit", "set", "U", "io_error_limit"),
    Tunable("io_error_halflife", "set", "U", "io_error_halflife", unit="halflife"),
    Tunable("journal_delay_ms", "set", "U", "journal.delay_ms", high=65535, unit="ms"),
    Tunable("errors", "set", "L", "errors", words=("unregister", "panic")),
    Tunable("synchronous", "set", "B", "sync"),
    Tunable("copy_gc_enabled", "set", "B", "movinggc.enabled"),
    Tunable("gc_always_rewrite", "set", "B", "gc.always_rewrite"),
    Tunable("gc_after_writeback", "set", "U", "gc.after_writeback", high=1),
    Tunable("idle_max_writeback_rate", "set", "B", "idle_max_writeback_rate"),
    Tunable("cutoff_writeback", "set", "U", "cutoff_writeback", high=_CUTOFF_MAX),
    Tunable("cutoff_writeback_sync", "set", "U", "cutoff_writeback_sync", high=_CUTOFF_SYNC_MAX),
    Tunable("cache_replacement_policy", "set", "L", "alloc.replacement", words=("lru", "fifo", "random")),
    Tunable("discard", "set", "B", "alloc.discard"),
    Tunable("cache_mode", "volume", "L", "cache_mode", words=("writethrough", "writeback", "writearound", "none")),
    Tunable("readahead_cache_policy", "volume", "L", "readahead_cache_policy", words=("all", "meta-only")),
    Tunable("stop_when_cache_set_failed", "volume", "L", "stop_when_cache_set_failed", words=("auto", "always")),
    Tunable("label", "volume", "T", "label"),
    Tunable("sequential_cutoff", "volume", "U", "sequential_cutoff", unit="bytes"),
    Tunable("io_error_limit", "volume", "U", "io_error_limit", high=S32_MAX),
    Tunable("io_disable", "volume", "B", "io_disable"),
    Tunable("writeback_running", "volume", "B", "writeback.writeback_running"),
    Tunable("writeback_percent", "volume", "U", "writeback.writeback_percent", high=("cset.cutoff_writeback", 0)),
    Tunable("writeback_delay", "volume", "U", "writeback.writeback_delay", unit="s"),
    Tunable("writeback_metadata", "volume", "B", "writeback.writeback_metadata"),
    Tunable("writeback_consider_fragment", "volume", "B", _RATE + "writeback_consider_fragment"),
    Tunable("writeback_rate", "volume", "U", _RATE + "rate", low=1, high=S32_MAX, unit="sectors"),
    Tunable("writeback_rate_update_seconds", "volume", "U", _RATE + "writeback_rate_update_seconds", low=1, high=60,
            unit="s"),
    Tunable("writeback_rate_i_term_inverse", "volume", "U", _RATE + "writeback_rate_i_term_inverse", low=1),
    Tunable("writeback_rate_p_term_inverse", "volume", "U", _RATE + "writeback_rate_p_term_inverse", low=1),
    Tunable("writeback_rate_fp_term_low", "volume", "U", _RATE + "writeback_rate_fp_term_low", low=1,
            high=(_RATE + "writeback_rate_fp_term_mid", -1)),
    Tunable("writeback_rate_fp_term_mid", "volume", "U", _RATE + "writeback_rate_fp_term_mid",
            low=(_RATE + "writeback_rate_fp_term_low", 1), high=(_RATE + "writeback_rate_fp_term_high", -1)),
    Tunable("writeback_rate_fp_term_high", "volume", "U", _RATE + "writeback_rate_fp_term_high",
            low=(_RATE + "writeback_rate_fp_term_mid", 1)),
    Tunable("writeback_rate_minimum", "volume", "U", _RATE + "writeback_rate_minimum", low=1, unit="sectors plain"),
)

TUNABLES: dict[str, dict[str, Tunable]] = {
    scope: {row.name: row for row in _ROWS if row.scope == scope} for scope in ("set", "volume", "flash")}
"""Every tunable by object and name."""

ATTRIBUTES: dict[str, dict[str, Callable[[Any], str]]] = {
    "set": SET_ATTRIBUTES, "volume": DEVICE_ATTRIBUTES, "flash": FLASH_ATTRIBUTES}
"""What can only be read, by object and name."""

TRIGGERS = {"set": ("clear_stats", "trigger_gc"), "volume": ("clear_stats",), "flash": ("clear_stats",)}
"""Names that do something when anything is written to them."""

VERBS = {"attach": "attach", "detach": "detach", "stop": "stop", "unregister": "detach", "running": "engine run",
         "flash_vol_create": "volume create", "size": "volume create"}
"""Names of the kernel's files that are verbs here."""

_DIRECTORIES = ("internal/", "cache0/")


class Tunables:
    """Tunables and attributes of one set; a target is "" for the set or the name of a volume."""

    __slots__ = ("cset",)

    def __init__(self, cset: CacheSet) -> None:
        self.cset = cset

    def names(self, target: str) -> list[str]:
        """Everything that can be read of the target."""
        scope, _owner = self._owner(target)
        return sorted({*TUNABLES[scope], *ATTRIBUTES[scope]}) + window_attributes()

    def get(self, target: str, name: str) -> str:
        """What a cat of the kernel's file shows, without the last newline."""
        scope, owner = self._owner(target)
        bare = _bare(name)
        row = TUNABLES[scope].get(bare)
        if row is not None:
            return _show(row, owner)
        if bare in ATTRIBUTES[scope]:
            return ATTRIBUTES[scope][bare](owner)
        if bare in window_attributes():
            return self._window(target, bare)
        raise UsageError(_why_unknown(name, scope))

    def check(self, target: str, name: str, text: str) -> None:
        """UsageError or Refused if `set` would not take it."""
        scope, owner = self._owner(target)
        bare = _bare(name)
        if bare in TRIGGERS[scope]:
            return
        row = TUNABLES[scope].get(bare)
        if row is None:
            if bare in ATTRIBUTES[scope] or bare in window_attributes():
                raise UsageError(f"{name} can only be read")
            raise UsageError(_why_unknown(name, scope))
        value = _parse(row, owner, text)
        if row.name == "synchronous" and not value:
            raise Refused("synchronous=0 would make the next start treat the cache as new and lose everything on it")
        if row.name == "errors" and value != "unregister":
            raise UsageError("errors: an engine only knows `unregister`; it cannot make the kernel panic")
        if row.name in ("cache_mode", "label", "cache_replacement_policy", "discard") and self.cset.read_only:
            raise WrongState(f"{name} is stored in a superblock, and this engine writes nothing (read-only)")

    async def set(self, target: str, name: str, text: str) -> str:
        """Set a tunable and give what was stored; writes superblocks where the kernel does."""
        self.check(target, name, text)
        scope, owner = self._owner(target)
        bare = _bare(name)
        if bare in TRIGGERS[scope]:
            await self._trigger(bare, owner)
            return text
        row = TUNABLES[scope][bare]
        value = _parse(row, owner, text)
        if scope == "set":
            await self._set_on_set(row, value)
        else:
            await self._set_on_device(row, owner, value)
        return stored_text(row, owner)

    async def _trigger(self, name: str, owner: Any) -> None:
        if name == "trigger_gc":
            self.cset.gc.forced = True
            self.cset.gc.wake()
        else:
            for volume in self.cset.volumes if owner is self.cset else [owner]:
                self.cset.accounting.clear(volume)

    async def _set_on_set(self, row: Tunable, value: Any) -> None:
        cset = self.cset
        match row.name:
            case "errors" | "synchronous":
                # The only value that `check` lets pass is the one in force.
                return
            case "cache_replacement_policy":
                await cset.set_replacement(Replacement[str(value).upper()])
                cset.alloc.alloc_wait.wake_all()
            case "discard":
                await cset.set_discard(bool(value))
            case "cutoff_writeback":
                # 0 is the default, and the other cutoff is never below this one (super.c, bcache_init).
                cset.cutoff_writeback = min(value or _DEFAULT_CUTOFF, cset.cutoff_writeback_sync)
            case "cutoff_writeback_sync":
                cset.cutoff_writeback_sync = value or _DEFAULT_CUTOFF_SYNC
                cset.cutoff_writeback = min(cset.cutoff_writeback, cset.cutoff_writeback_sync)
            case _:
                _put(cset, row.where, value)
        if cset.failed is not None:
            raise DeviceError(f"{cset.cache.name}: {row.name} could not be stored: {cset.failed}")
        cset.gc.wake()
        for dev in cset.cached_devices():
            dev.writeback.wake()

    async def _set_on_device(self, row: Tunable, dev: CachedDev, value: Any) -> None:
        error = 0
        match row.name:
            case "cache_mode":
                error = await dev.set_cache_mode(CacheMode[str(value).upper()])
            case "label":
                error = await dev.set_label(value)
            case "writeback_running":
                # Without a writeback thread the kernel falls back to 0, with success.
                dev.writeback.writeback_running = bool(value) and dev.attached
            case _:
                _put(dev, row.where, value)
        if error:
            raise DeviceError(f"{dev.backing.name}: its superblock could not be written (errno {error})", errno=error)
        dev.writeback.wake()

    def _owner(self, target: str) -> tuple[str, Any]:
        if not target:
            return "set", self.cset
        for volume in self.cset.volumes:
            if volume.name == target:
                return "volume" if isinstance(volume, CachedDev) else "flash", volume
        raise WrongState(f"{target} is no volume of this set")

    def _window(self, target: str, name: str) -> str:
        directory, _, counter = name.partition("/")
        accounting = self.cset.accounting
        windows = accounting.of_volume(self._owner(target)[1]) if target else accounting.of_set()
        window = next(one for one in windows if one.name == directory.removeprefix("stats_"))
        if counter == "bypassed":
            return hprint(window.bypassed_sectors << 9)
        return str({"cache_hits": window.hits, "cache_misses": window.misses, "cache_bypass_hits": window.bypass_hits,
                    "cache_bypass_misses": window.bypass_misses, "cache_hit_ratio": window.hit_ratio_percent,
                    "cache_miss_collisions": window.collisions}[counter])


def stored_text(row: Tunable, owner: Any) -> str:
    """What is stored now, as one would write it: exact, in the unit of the input."""
    value = _value(row, owner)
    return str(value) if row.kind in ("L", "T") else str(int(value))


def _show(row: Tunable, owner: Any) -> str:
    # As the kernel's file prints it.
    value = _value(row, owner)
    if row.kind == "L":
        return " ".join(f"[{word}]" if word == value else word for word in row.words)
    if row.unit == "bytes":
        return hprint(int(value))
    if row.unit == "sectors":
        return hprint(int(value) << 9)
    return stored_text(row, owner)


def _value(row: Tunable, owner: Any) -> Any:
    value = _take(owner, row.where)
    if row.name in ("cache_mode", "cache_replacement_policy"):
        return value.name.lower()
    if row.name == "io_error_halflife":
        return value * HALFLIFE_UNIT
    if row.name == "writeback_running":
        return value and owner.attached
    return value


def _parse(row: Tunable, owner: Any, text: str) -> Any:
    # The value to store; UsageError names the tunable.
    try:
        match row.kind:
            case "U":
                value = parse_unsigned(text, _bound(row.low, owner), _bound(row.high, owner))
                return value // HALFLIFE_UNIT if row.unit == "halflife" else value
            case "B":
                return parse_unsigned(text, 0, 1) != 0
            case "L":
                word = text.removesuffix("\n")
                if word not in row.words:
                    raise UsageError(f"{text!r} is none of {', '.join(row.words)}")
                return word
            case _:
                label = text.encode("utf-8", "surrogateescape")
                if len(label) > LABEL_BYTES:
                    raise UsageError(f"{text!r} has {len(label)} bytes; a label has at most {LABEL_BYTES}")
                return label.removesuffix(b"\n")
    except UsageError as error:
        raise UsageError(f"{row.name}: {error}") from None


def _bound(bound: Bound, owner: Any) -> int:
    if isinstance(bound, int):
        return bound
    where, offset = bound
    return int(_take(owner, where)) + offset


def _take(owner: Any, where: str) -> Any:
    for part in where.split("."):
        owner = getattr(owner, part)
    return owner


def _put(owner: Any, where: str, value: Any) -> None:
    path, _, name = where.rpartition(".")
    owner = _take(owner, path) if path else owner
    setattr(owner, name, type(getattr(owner, name))(value))


def _bare(name: str) -> str:
    for directory in _DIRECTORIES:
        name = name.removeprefix(directory)
    return name


def _why_unknown(name: str, scope: str) -> str:
    verb = VERBS.get(_bare(name))
    if verb is not None:
        return f"{name} is no tunable; `bcachectl {verb}` does that"
    other = {"set": "volume", "volume": "set"}.get(scope, "")
    if _bare(name) in TUNABLES.get(other, {}):
        return f"{name} belongs to a {other}, not to a {scope}"
    return f"{name} is no tunable or attribute of a {scope}; `bcachectl get` lists them all"
