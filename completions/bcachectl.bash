# SPDX-License-Identifier: GPL-2.0-only
# bash completion: the program itself knows its verbs, options, values and the devices here; files are left to the shell.

_bcachectl() {
    local IFS=$'\n'
    COMPREPLY=($(COMP_WORDS="${COMP_WORDS[*]}" COMP_CWORD=$COMP_CWORD _BCACHECTL_COMPLETE=complete_bash \
        bcachectl 2>/dev/null))
}

complete -o default -F _bcachectl bcachectl
