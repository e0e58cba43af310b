# SPDX-License-Identifier: GPL-2.0-only
# C types for node.py, where it is compiled.

from bcachectl.engine.search cimport bisect_right
