# SPDX-License-Identifier: GPL-2.0-only
# fish completion: the program itself knows its verbs, options, values and the devices here; files are left to the shell.

function __bcachectl_answer
    _BCACHECTL_COMPLETE=complete_fish _TYPER_COMPLETE_FISH_ACTION=get-args _TYPER_COMPLETE_ARGS=(commandline -cp) \
        bcachectl 2>/dev/null
end

complete --command bcachectl --arguments '(__bcachectl_answer)'
