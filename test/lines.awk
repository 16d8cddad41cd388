# lines.awk: how long the files and their functions are, against the budgets of design.md section 9.
#   awk -f test/lines.awk Makefile README.md *.c kernels.cu ...
# Prints a table of the files that have a budget; a file past its ceiling, or a function of more
# than 120 lines (200 in a .cu file), is a line that begins with FAIL, and the exit code is 1.
BEGIN {
    rows = split("fp8.c 750 1000,mxfp4.c 450 600,lora.c 800 1000,moe.c 900 1200," \
                 "refit.c 1100 1400,train.c 3000 3300,kernels.cu 5000 6000,README.md 300 400," \
                 "Makefile 150 200", row, ",")
}
FNR == 1 { file = FILENAME; sub(/^.*\//, "", file); start = 0; inside = 0 }
{ lines[file] = FNR }
/[^ \t]/ { text[file]++ }
/\/\/|\/\*|^[ \t]*\*/ || (file == "Makefile" && /^#|[ \t]#/) { comments[file]++ }
FILENAME !~ /\.(c|h|cu)$/ { next }

# A function begins at a line that starts in the first column and has a parenthesis, opens with a {
# at the end of that line or of a later one, and ends at a } in the first column.
!inside && /^[A-Za-z_].*\(/ { start = FNR; signature = $0 }
!inside && start && /[;}][ \t]*(\/\/.*)?$/ { start = 0 }
!inside && start && /\{[ \t]*(\/\/.*)?$/ { inside = 1 }
inside && /^\}/ {
    length_ = FNR - start + 1
    if (length_ > longest[file]) { longest[file] = length_ }
    limit = FILENAME ~ /\.cu$/ ? 200 : 120
    sub(/\(.*/, "", signature)
    sub(/^.*[ *]/, "", signature)
    if (length_ > limit) {
        printf "FAIL %s:%d: %s has %d lines, %d at most\n", FILENAME, start, signature, length_,
               limit
        failed = 1
    }
    inside = start = 0
}

END {
    print "| file       | lines | target | ceiling | longest function | comments |"
    for (i = 1; i <= rows; i++) {
        split(row[i], budget, " ")
        file = budget[1]
        if (!(file in lines)) { continue }
        printf "| %-10s | %5d | %6d | %7d | %16s | %6d %% |\n", file, lines[file], budget[2],
               budget[3], longest[file] ? longest[file] : "-", 100 * comments[file] / text[file]
        if (lines[file] > budget[3]) {
            printf "FAIL %s has %d lines, its ceiling is %d\n", file, lines[file], budget[3]
            failed = 1
        }
    }
    exit failed
}
