#!/usr/bin/env bash
# run.sh: runs test programs, two at a time, and adds up what they counted.
#   test/run.sh program...
# A program prints `FAIL ...` and `skip ...` lines, ends with `name: N passed, N failed, N skipped`,
# and exits non-zero if it failed. A program that is missing, crashes, hangs or ends without that
# line counts as one failure. Everything it prints goes to build/NAME.log; lines that begin with
# FAIL, skip or | (a table) are shown. The last line is the sum, the exit code is 1 on any failure.
set -u
export OMP_WAIT_POLICY=passive         # spinning threads stall each other where cores are few
limit=${LIMIT:-900}                     # seconds; a deadlock must end too
jobs=2
case "$* " in *_gpu\ *) jobs=1 ;; esac  # a card is measured by one program at a time
sum='^[a-z0-9_]+: [0-9]+ passed, [0-9]+ failed, [0-9]+ skipped$'
passed=0 failed=0 skipped=0

# Runs a program and shows what it found. Leaves the three numbers in build/NAME.sum; the runner's
# own failures count there as well.
run() {
    local program=$1 name started=$SECONDS log command closing code p=0 f=0 s=0 text=
    name=$(basename "$program" .sh) log=build/$(basename "$program" .sh).log
    command=("$program")
    case $program in *.sh) command=(bash "$program") ;; esac
    if command -v timeout > /dev/null; then command=(timeout -k 5 "$limit" "${command[@]}"); fi
    if [ -e "$program" ]; then
        { "${command[@]}" > "$log" 2>&1 < /dev/null; } 2> /dev/null # not the shell's own "Aborted"
        code=$?
        closing=$(grep -aE "$sum" "$log" | tail -n 1)
        text=$(grep -aE '^(FAIL|skip) ' "$log" | head -n 30; grep -aE '^\|' "$log")
        read -r p f s <<< "$(tr -cd '0-9 \n' <<< "${closing#*: }" | tr -s ' ')"
        if [ -z "$closing" ]; then
            text+=$'\n'$(tail -n 5 "$log")
            text+=$'\n'"FAIL $name ended without its closing line, exit code $code; see $log"
            p=0 f=1 s=0
        elif [ $code -ne 0 ] && [ "$f" -eq 0 ]; then
            text+=$'\n'$(tail -n 5 "$log")
            text+=$'\n'"FAIL $name counted no failure, but its exit code is $code; see $log"
            f=1
        fi
        text+=$'\n'"$name: ${closing#*: } ($((SECONDS - started)) s)"
    else
        text="FAIL $name did not build" f=1
    fi
    sed '/^$/d' <<< "$text"             # at once, so that two programs' lines do not mix
    echo "$p $f $s" > "build/$name.sum"
}

mkdir -p build
for program; do
    while [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; do wait -n; done
    run "$program" &
done
wait
for program; do
    read -r p f s < "build/$(basename "$program" .sh).sum"
    passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + s))
done
echo "$passed passed, $failed failed, $skipped skipped"
[ $failed -eq 0 ]
