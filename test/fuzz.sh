#!/usr/bin/env bash
# fuzz.sh: every reader of files against mutated files, for so many seconds each.
#   test/fuzz.sh [SECONDS [TARGET...]]         (default: 60, all of them)
# Seeds are kept in test/seeds; what made a reader fail is left in build/fuzz: TARGET-crash-.. by
# libFuzzer, TARGET-input without it; what the sanitizers said is in log_TARGET.
set -u
cd "$(dirname "$0")/.." || exit 1
seconds=${1:-60}
shift
targets=${*:-json safetensors tokenizer jsonl bin adapter names}
flags="-std=gnu11 -g -O1 -fsanitize=address,undefined -fno-sanitize-recover=all -isystem
    .deps/usr/include -Wno-unknown-pragmas"
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1
mkdir -p build/fuzz
libfuzzer=
if clang $flags -fsanitize=fuzzer -DLIBFUZZER test/fuzz.c -o build/fuzz/fuzz -lm \
    2> build/fuzz/log; then
    libfuzzer=1
elif ! cc $flags test/fuzz.c -o build/fuzz/fuzz -lm; then
    exit 1
fi
failed=0
for target in $targets; do
    seeds=test/seeds/${target/names/adapter}
    cp build/fuzz/fuzz "build/fuzz/fuzz_$target"
    if [ $libfuzzer ]; then
        mkdir -p "build/fuzz/$target"
        "build/fuzz/fuzz_$target" -max_total_time="$seconds" -max_len=65536 -timeout=10 \
            -close_fd_mask=3 -print_final_stats=1 -artifact_prefix="build/fuzz/$target-" \
            "build/fuzz/$target" "$seeds" > "build/fuzz/log_$target" 2>&1
    else
        "build/fuzz/fuzz_$target" "$seconds" "$seeds"/* > "build/fuzz/log_$target" 2>&1
    fi
    code=$?
    if [ $code != 0 ] && [ ! $libfuzzer ]; then
        cp "$(ls -t /dev/shm/fuzz.??????/input | head -n 1)" "build/fuzz/$target-input"
    fi
    inputs=$(sed -n 's/.*number_of_executed_units: *\(.*\)/\1 inputs/p; s/^fuzz_[a-z]*: //p' \
        "build/fuzz/log_$target")
    echo "fuzz_$target: ${inputs:-?}, exit $code"
    if [ $code != 0 ]; then failed=1; tail -n 20 "build/fuzz/log_$target"; fi
    rm -rf /dev/shm/fuzz.??????
done
exit $failed
