#!/usr/bin/env bash
# test_house.sh: tests of the text itself: line budgets (lines.awk), GPU() lines (twins.awk), the
# top level, and of the sum that run.sh prints. Each tool is first tried on examples it must refuse.
set -u
cd "$(dirname "$0")/.." || exit 1
dir=$(mktemp -d) || exit 1
trap 'rm -rf "$dir"' EXIT
. test/check.sh

# Writes a module with two twins, and the kernels.cu that belongs to it, both right.
example() {
    cat > "$dir/x.c" << 'END'
#define WIDE(a) do { \
    x(a); } while (0)
static inline float ld_x(const float *p) { return *p; }
typedef struct { int C, E; } Dims;

// out (T,C) = a - b (comments may hold parentheses, and GPU(lines))
void subtract_forward(float *out /* (T,C) */, const float *a, const float b[4],
                      int T, int C) {
    // the same function, in kernels.cu
    GPU(subtract_forward_gpu(out, a, b,
                             T, C))     // two lines
    for (int i = 0; i < T * C; i++) { out[i] = a[i] - b[i]; }
}
TWIN(subtract_forward)
void reset(float *out) {
    GPU(reset_gpu(out))
    *out = 0;
}
TWIN(reset)
END
    cat > "$dir/kernels.cu" << 'END'
__global__ void subtract_kernel(float *y, const float *u, const float *v, int n) {
    y[0] = u[0] - v[0];
}
extern "C" void subtract_forward_gpu(float *out, const float *a, const float b[4], int T, int C) {
    subtract_kernel<<<1, 1>>>(out, a, b, T * C);
}
END
}

# drift MESSAGE WANTED SED FILE: the example with one edit must be refused, with a line that holds
# WANTED.
drift() {
    local message=$1 wanted=$2
    example
    sed -i "$3" "$dir/$4"
    if awk -f test/twins.awk "$dir/x.c" "$dir/kernels.cu" > "$dir/said"; then
        check "twins.awk accepts $message" false
    else
        check "twins.awk on $message does not say '$wanted'" grep -q "^FAIL.*$wanted" "$dir/said"
    fi
}

test_twins() {
    example
    check "twins.awk refuses the right example" \
        awk -f test/twins.awk "$dir/x.c" "$dir/kernels.cu" > "$dir/said"
    check "twins.awk does not see both twins" grep -q '2 functions with a GPU line, 0' "$dir/said"
    drift "swapped arguments" "passes (out, b, a, T, C)" 's/gpu(out, a, b,/gpu(out, b, a,/' x.c
    drift "swapped dimensions" "passes (out, a, b, C, T)" 's/  T, C))/  C, T))/' x.c
    drift "a renamed parameter" "its parameters are (out, x, b, T, C)" 's/float \*a,/float *x,/' x.c
    drift "a missing argument" "passes (out, a, b, T)" 's/  T, C))/  T))/' x.c
    drift "another function's twin" "calls reset_gpu" \
        's/GPU(subtract_forward_gpu/GPU(reset_gpu/' x.c
    drift "a late GPU line" "not its first" 's/    GPU(reset/    *out = 1;\n    GPU(reset/' x.c
    drift "a forgotten TWIN" "TWIN(reset) is missing" '/^TWIN(reset)/d' x.c
    drift "a function with a result" "does not return void" 's/^void reset/int reset/' x.c
    drift "a drifted launcher" "subtract_forward_gpu has (out, b, a, T, C)" \
        '/_gpu/s/float \*a, const float b\[4\]/float b[4], const float *a/' kernels.cu
    check "GPU() lines of the tree" awk -f test/twins.awk ./*.c dev/*.c dev/data/*.c \
        dev/launchers.h kernels.cu dev/device.cu
}

# A file or a function one line over its limit is refused; at the limit it passes.
test_lines() {
    local over file
    for over in 0 1; do
        file=$dir/mxfp4.c
        { printf 'static void f(int a,\n    int b) {\n'; yes '    a += b;' | head -n $((117 + over))
          echo '}'; } > "$file"
        check "lines.awk on a function of $((120 + over)) lines" \
            [ "$(awk -f test/lines.awk "$file" | grep -c '^FAIL.*: f has 121')" = $over ]
        yes '// text' | head -n $((600 + over)) > "$file"
        check "lines.awk on a file of $((600 + over)) lines" \
            [ "$(awk -f test/lines.awk "$file" | grep -c '^FAIL mxfp4.c has 601')" = $over ]
    done
    shopt -s nullglob
    check "line budgets of the tree" awk -f test/lines.awk Makefile README*.md ./*.c kernels.cu \
        dev/*.c dev/device.cu dev/data/*.c dev/cuda/*.cu dev/cuda/common.h test/*.c test/*.h
}

# No line of the text is longer than 100 characters: not bytes, it may hold others than ASCII.
test_columns() {
    local LC_ALL=C.UTF-8 long='^.{101}' files
    export LC_ALL
    printf '%0100d\n' 0 > "$dir/fits"
    printf '%0101d\n' 0 > "$dir/long"
    check "a line of 100 characters is refused" [ "$(grep -cE "$long" "$dir/fits")" = 0 ]
    check "a line of 101 passes" [ "$(grep -cE "$long" "$dir/long")" = 1 ]
    shopt -s nullglob
    files=$(grep -nE "$long" ./*.c ./*.cu Makefile dev/*.[ch]* dev/data/*.[ch] \
        dev/cuda/*.* dev/ref/*.py test/*.[ch] test/*.sh test/*.awk | grep -v '^dev/data/unicode.c')
    check "lines over 100 characters: $files" [ -z "$files" ]
}

# run.sh adds up, and counts a crash, a missing program and a wrong exit code as failures.
test_run() {
    printf 'echo "good: 3 passed, 0 failed, 1 skipped"\n' > "$dir/good.sh"
    printf 'echo "FAIL x"; echo "bad: 1 passed, 2 failed, 0 skipped"; exit 1\n' > "$dir/bad.sh"
    printf 'echo "liar: 5 passed, 0 failed, 0 skipped"; exit 3\n' > "$dir/liar.sh"
    printf 'kill -SEGV $$\n' > "$dir/crash.sh"
    printf 'sleep 30\n' > "$dir/hang.sh"
    ( mkdir -p "$dir/run" && cp test/run.sh "$dir/run" && cd "$dir/run" || exit 1
      bash run.sh ../good.sh > good
      echo $? > good.code
      LIMIT=1 bash run.sh ../good.sh ../bad.sh ../liar.sh ../crash.sh ../hang.sh ../none > all
      echo $? > all.code ) 2> /dev/null
    check "run.sh, one good program" same "3 passed, 0 failed, 1 skipped 0" \
        "$(tail -n 1 "$dir/run/good") $(cat "$dir/run/good.code")"
    check "run.sh, all kinds of failure" same "9 passed, 6 failed, 1 skipped 1" \
        "$(tail -n 1 "$dir/run/all") $(cat "$dir/run/all.code")"
    check "run.sh does not show a FAIL line" grep -q '^FAIL x' "$dir/run/all"
}

# The top level is fixed by the user: design.md section 2.
test_top_level() {
    if ! git rev-parse --is-inside-work-tree > /dev/null 2>&1; then
        skip "top level: not a git checkout"
        return
    fi
    local extra
    extra=$(git ls-files | sed 's,/.*,,' | sort -u | grep -vxE \
        '\..*|(fp8|mxfp4|lora|moe|refit|train)\.c|kernels\.cu|Makefile|README\.md|LICENSE|dev|test')
    check "not on the user's top level: $extra" [ -z "$extra" ]
}

test_twins
test_lines
test_columns
test_run
test_top_level
closing test_house
