# SPDX-License-Identifier: GPL-2.0-only
"""bcachectl: administration of Linux bcache, and an engine that runs a cache set in user space."""

__version__ = "0.1.0"
