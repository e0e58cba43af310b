# SPDX-License-Identifier: GPL-2.0-only
"""What is looked at before the kernel's driver is asked to stop something: who uses it.

The driver says yes to a stop of a device that is mounted, and then waits without a word until the last user is gone.
"""

from __future__ import annotations

from collections.abc import Iterable

from bcachectl import discovery
from bcachectl.errors import Refused
from bcachectl.snapshot import VolumeSnapshot


def refuse_users(volumes: Iterable[VolumeSnapshot]) -> None:
    """Refused if a volume's device node is mounted, held by another device, or swap."""
    for volume in volumes:
        users = discovery.users_of(volume.device_path) if volume.device_path else []
        if users:
            raise Refused(f"{volume.device_path}: is in use ({', '.join(users)}); end that first")
