# SPDX-License-Identifier: GPL-2.0-only
"""What stands for the module ``cython`` where that is not installed: nothing is compiled.

A few modules have a ``.pxd`` beside them, in which the C types of what they compute with are declared
(packaging/compile.py).  Their source is plain Python, and runs as such.  They ask ``cython.compiled`` where the
compiled form has something better of its own.
"""

compiled = False
