#!/usr/bin/env bash
# run.sh: runs test programs one after the other and adds up what they counted.
#   test/run.sh [-s "what is skipped as a whole"] program...
# A program prints `FAIL ...` and `skip ...` lines, ends with `name: N passed, N failed, N skipped`,
# and exits non-zero if it failed. A program that is missing, crashes, hangs or ends without that
# line counts as one failure. Everything it prints goes to build/NAME.log; lines that begin with
# FAIL, skip or | (a table) are shown. The last line is the sum, the exit code is 1 on any failure.
set -u
export OMP_WAIT_POLICY=passive         # spinning threads stall each other where cores are few
limit=${LIMIT:-900}                     # seconds; a deadlock must end too
sum='^[a-z0-9_]+: [0-9]+ passed, [0-9]+ failed, [0-9]+ skipped$'
passed=0 failed=0 skipped=0

# Counts one failure of the runner's own.
fail() { echo "FAIL $*"; failed=$((failed + 1)); }

if [ "${1:-}" = -s ]; then echo "skip $2"; skipped=1; shift 2; fi
mkdir -p build
for program; do
    name=$(basename "$program" .sh) log=build/$(basename "$program" .sh).log started=$SECONDS
    command=("$program")
    case $program in *.sh) command=(bash "$program") ;; esac
    if [ ! -e "$program" ]; then fail "$name did not build"; continue; fi
    if command -v timeout > /dev/null; then command=(timeout -k 5 "$limit" "${command[@]}"); fi
    { "${command[@]}" > "$log" 2>&1 < /dev/null; } 2> /dev/null     # not the shell's own "Aborted"
    code=$?
    grep -aE '^(FAIL|skip) ' "$log" | head -n 30
    grep -aE '^\|' "$log"
    closing=$(grep -aE "$sum" "$log" | tail -n 1)
    if [ -z "$closing" ]; then
        tail -n 5 "$log"
        fail "$name ended without its closing line, exit code $code; see $log"
        continue
    fi
    read -r p f s <<< "$(tr -cd '0-9 \n' <<< "${closing#*: }" | tr -s ' ')"
    echo "$name: ${closing#*: } ($((SECONDS - started)) s)"
    passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + s))
    if [ $code -ne 0 ] && [ "$f" -eq 0 ]; then
        tail -n 5 "$log"
        fail "$name counted no failure, but its exit code is $code; see $log"
    fi
done
echo "$passed passed, $failed failed, $skipped skipped"
[ $failed -eq 0 ]
