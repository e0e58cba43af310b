# SPDX-License-Identifier: GPL-2.0-only
"""The rim's lower side: media, backends that perform Ios on them, and the loop."""
