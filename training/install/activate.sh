# Source this file in bash: the programs then run under this machine's own Python and torch.
if [[ "${BASH_SOURCE[0]:-}" == "$0" ]]; then
    echo "error: $0 only sets variables; run: source $0" >&2
    exit 2
fi
_maskmix_root="$(cd "$(dirname "${BASH_SOURCE[0]:-$0}")" && pwd -P)"
_maskmix_python="$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || echo absent)"
if [[ "$_maskmix_python" != "@PYTHON@" ]]; then
    echo "error: the pack is for Python @PYTHON@, and python3 here is $_maskmix_python; activate an" \
        "environment with Python @PYTHON@ and torch, or write another pack: make pack PYTHON=VERSION" >&2
    unset _maskmix_root _maskmix_python
    return 2
fi
_maskmix_lines="$(python3 -P "$_maskmix_root/training/install/activate.py")" || {
    unset _maskmix_root _maskmix_python _maskmix_lines
    return 2
}
eval "$_maskmix_lines"
unset _maskmix_root _maskmix_python _maskmix_lines
