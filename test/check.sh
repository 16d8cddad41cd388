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

# closing NAME: prints the closing line; its exit code is the script's.
closing() {
    echo "$1: $passed passed, $failed failed, $skipped skipped"
    [ $failed = 0 ]
}
