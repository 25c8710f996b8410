#!/usr/bin/env bash
# Sets up .venv: the pinned environment of constraints.txt and the project itself, editable.
# Does nothing when that is done already; starts from nothing when an earlier set-up broke off. PYTHON chooses the
# interpreter. Exit status 2: the machine lacks something, named with its remedy; nothing was installed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
root=$PWD
venv=$root/.venv
stamp=$venv/complete

lacks() {
    printf 'error: %s\n' "$@" >&2
    exit 2
}

# A pyenv shim on PATH may exist and fail, so a candidate counts only once it has run.
supported() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' >/dev/null 2>&1
}

choose_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.12 python3.11}; do
        if supported "$candidate"; then
            python=$(command -v "$candidate")
            return
        fi
    done
    if [ -n "${PYTHON:-}" ]; then
        lacks "PYTHON=$PYTHON is not a working Python 3.11 or 3.12 ($("$PYTHON" --version 2>&1 | head -n 1))." \
            "Give the path of one, or leave PYTHON out to use the first that is on PATH."
    fi
    lacks "no working Python 3.11 or 3.12 on PATH (python3 is: $(python3 --version 2>&1 | head -n 1))." \
        "Install one (Debian, Ubuntu: apt-get install python3 python3-venv; conda: environment.yml)" \
        "or name it: make PYTHON=/path/to/python3.12 …"
}

# All that is missing is said in one go, before anything is installed.
check_machine() {
    local missing=() version compiler=${CXX:-c++}
    [ "$(uname -sm)" = "Linux x86_64" ] || missing+=("this is $(uname -sm); only Linux x86_64 is supported.")
    version=$("$python" -c 'import sys; print("{}.{}".format(*sys.version_info))')
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        missing+=("$python has no venv module. Debian, Ubuntu: apt-get install python$version-venv")
    if ! command -v $compiler >/dev/null; then
        missing+=("no C++ compiler ($compiler), which DeepSpeed and torch.compile need. Debian, Ubuntu: apt-get install g++")
    elif ! printf '#include <vector>\nint main() { return std::vector<int>{1}[0] - 1; }\n' |
        $compiler -std=c++20 -x c++ - -o /dev/null 2>/dev/null; then
        missing+=("the C++ compiler ($compiler) cannot build C++20 (GCC: 10 or newer). Debian, Ubuntu: apt-get install g++")
    fi
    [ ${#missing[@]} -eq 0 ] || lacks "${missing[@]}"
}

# What the environment is made of.
fingerprint() {
    echo "$root" # its path is written into the environment's scripts
    cat pyproject.toml constraints.txt setup-venv.sh | sha256sum
}

is_complete() {
    [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(fingerprint)" ] && serves
}

# Without PYTHON any interpreter serves, with it only the one that was asked for.
serves() {
    "$venv/bin/python" -c '' 2>/dev/null || return 1
    [ -z "${PYTHON:-}" ] && return
    local base='import os, sys; print(os.path.realpath(sys.base_prefix), sys.version)'
    [ "$("$PYTHON" -c "$base" 2>/dev/null)" = "$("$venv/bin/python" -c "$base")" ]
}

install_packages() {
    echo "== packages into .venv (3 GB; 6 GB with the CUDA build of torch)"
    show_growth 9<&- &
    trap "kill $! 2>/dev/null || true" EXIT
    "$venv/bin/python" -m pip install --disable-pip-version-check -c constraints.txt -e '.[test]'
    kill $! || true
    trap - EXIT
}

# pip is silent for a minute while it unpacks.
show_growth() {
    local size before=0
    trap 'kill $!; exit' TERM
    while sleep 10 & wait $!; do
        size=$(du -sm "$venv" 2>/dev/null | cut -f 1) || true
        [ "$size" = "$before" ] || echo "   .venv holds $size MB"
        before=$size
    done
}

exec 9<"${BASH_SOURCE[0]}"
flock -n 9 || { echo "another process is setting up .venv: waiting for it" && flock 9; }

! is_complete || exit 0
choose_python
check_machine
if [ "$(head -n 1 "$stamp" 2>/dev/null)" = "$root" ] && serves; then
    rm "$stamp" # pins or settings changed: an update is enough
else
    rm -rf "$venv"
    echo "== new .venv of $python"
    "$python" -m venv "$venv"
fi
install_packages
fingerprint >"$stamp.new"
mv "$stamp.new" "$stamp"
echo "== .venv is ready"
