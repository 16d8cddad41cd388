# twins.awk: compares each GPU(...) line with the function it stands in.
#   awk -f test/twins.awk fp8.c ... train.c dev/launchers.h kernels.cu dev/device.cu
# The compiler sees to it that f and f_gpu have one type (TWIN in kernels.cu), but not that two
# arguments of that type change places. So for every function with a GPU line:
#   - the line calls f_gpu and passes f's parameters, all of them, in their order;
#   - it is the first statement, f returns void, and TWIN(f) stands in the file;
#   - where launchers.h declares or kernels.cu defines f_gpu, its parameters have the same names.
# Every drift is a line that begins with FAIL; the last line says what was compared.

# Records a drift, with its place.
function drift(place, message) { print "FAIL " place ": " message; failed++ }

# The names of a parameter or argument list, "a, b, c": for each entry its last identifier, without
# array brackets. A call passes bare names, so the same rule reads both.
function names(list,    n, i, part, out) {
    if (list ~ /^[ \t]*(void)?[ \t]*$/) { return "" }
    n = split(list, part, ",")
    for (i = 1; i <= n; i++) {
        gsub(/\[[^]]*\]|[ \t]+$/, "", part[i])
        sub(/^.*[^A-Za-z0-9_]/, "", part[i])
        out = out (i > 1 ? ", " : "") part[i]
    }
    return out
}

# What stands between text's first parenthesis and its partner.
function inside(text,    i, depth, start, c) {
    for (i = 1; i <= length(text); i++) {
        c = substr(text, i, 1)
        if (c == "(" && depth++ == 0) { start = i + 1 }
        if (c == ")" && --depth == 0) { return substr(text, start, i - start) }
    }
    return ""
}

# The identifier before text's first parenthesis.
function called(text) {
    sub(/[ \t]*\(.*/, "", text)
    sub(/^.*[^A-Za-z0-9_]/, "", text)
    return text
}

FNR == 1 { head = body = gpu = ""; skip_macro = 0 }

# Comments go; macros (which may run over several lines) are not functions.
{
    line = $0
    sub(/\/\/.*/, "", line)
    gsub(/\/\*[^*]*\*\//, "", line)
    was_macro = skip_macro
    skip_macro = (line ~ /^#/ || was_macro) && line ~ /\\[ \t]*$/
    if (line ~ /^#/ || was_macro || line ~ /^[ \t]*$/) { next }
}
line ~ /^TWIN\(/ { twin[FILENAME, inside(line)] = 1; head = ""; next }

# Outside of functions: collect a signature until its { or ;.
!body {
    if (line ~ /^[A-Za-z_]/) { head = "" }
    head = head " " line
    if (line !~ /[{;}][ \t]*$/) { next }
    sub(/extern "C"/, "", head)
    if (head !~ /^[^=(]*[A-Za-z0-9_][ \t]*\(/ || head ~ /^ *typedef/) { head = ""; next }
    f = called(head)
    parameters = names(inside(head))
    if (f ~ /_gpu$/) {
        launcher[f] = launcher[f] SUBSEP FILENAME ":" FNR SUBSEP parameters
    }
    is_void = head ~ /(^|[ \t])void[ \t]+[A-Za-z0-9_]+[ \t]*\(/
    body = line ~ /\{[ \t]*$/
    first = 1
    head = ""
    next
}
line ~ /^\}/ { body = ""; next }

# Inside: a GPU line may run over several text lines.
gpu || line ~ /(^|[^A-Za-z0-9_])GPU\(/ {
    if (!gpu) { place = FILENAME ":" FNR; in_order = first }
    gpu = gpu line
    first = 0
    call = gpu
    sub(/^.*GPU\(/, "GPU(", call)
    call = inside(call)
    if (call == "") { next }
    gpu = ""
    if (called(call) ~ /^gpu_/) { next }        # the contract's own helpers: memory and copies
    functions++
    file_of[f] = FILENAME; place_of[f] = place; want[f] = parameters
    if (called(call) != f "_gpu") { drift(place, f " calls " called(call) ", not " f "_gpu") }
    got = names(inside(call))
    if (got != parameters) {
        drift(place, f "'s GPU line passes (" got "), its parameters are (" parameters ")")
    }
    if (!in_order) { drift(place, f "'s GPU line is not its first statement") }
    if (!is_void) { drift(place, f " has a twin and does not return void") }
    next
}
{ first = 0 }

END {
    for (f in want) {
        if (!((file_of[f], f) in twin)) { drift(place_of[f], "TWIN(" f ") is missing") }
        n = split(launcher[f "_gpu"], part, SUBSEP)
        for (i = 2; i < n; i += 2) {
            if (part[i + 1] != want[f]) {
                drift(part[i], f "_gpu has (" part[i + 1] "), " f " has (" want[f] ")")
            }
        }
    }
    printf "%s twins: %d functions with a GPU line, %d drifts\n", failed ? "✗" : "✓", functions,
           failed
    exit failed > 0
}
