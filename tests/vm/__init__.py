# SPDX-License-Identifier: GPL-2.0-only
"""The kernel's own driver as the judge: it runs in a virtual machine, on disks that are plain files here."""
