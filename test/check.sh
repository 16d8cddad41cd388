# check.sh: what the test scripts share, as check.h is for the C tests. A script sources it and ends
# with `closing NAME`.
passed=0 failed=0 skipped=0

# check MESSAGE COMMAND...: counts one check. A failure shows the end of ./log, if there is one.
check() {
    local message=$1
    shift
    if "$@"; then passed=$((passed + 1)); return; fi
    echo "FAIL $message"
    failed=$((failed + 1))
    if [ -f log ]; then tail -n 4 log | sed 's/^/    /'; fi
}

# skip MESSAGE: counts one thing that could not be tested here, and says why.
skip() { echo "skip $*"; skipped=$((skipped + 1)); }

same() { [ "$1" = "$2" ]; }

# value KEY OUT: that key of every step of training.jsonl, on one line.
value() { sed -nE "s/.*\"$1\": *([-+0-9.e]+).*/\1/p" "$2/training.jsonl" | xargs; }

# header FILE: of a safetensors file; its length is the first 8 bytes.
header_size() { od -An -t u8 -N 8 "$1" | tr -d ' '; }
header() { tail -c +9 "$1" | head -c "$(header_size "$1")"; }

# tensors FILE: its tensors, one per line: name, first byte, end, in the order of the data.
tensors() {
    header "$1" | grep -oE '"[^"]*":\{[^}]*"data_offsets":\[[0-9]+,[0-9]+\]' |
        sed -E 's/"([^"]*)".*\[([0-9]+),([0-9]+)\]/\1 \2 \3/' | sort -n -k 2
}

# children PID: the processes whose parent it is.
children() {
    local file parent
    for file in /proc/[0-9]*/stat; do
        { parent=; read -r _ _ _ parent _ < "$file"; } 2> /dev/null
        if [ "$parent" = "$1" ]; then basename "${file%/stat}"; fi
    done
}

# closing NAME: prints the closing line; its exit code is the script's.
closing() {
    echo "$1: $passed passed, $failed failed, $skipped skipped"
    [ $failed = 0 ]
}
