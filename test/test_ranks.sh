#!/usr/bin/env bash
# test_ranks.sh: ./train on several GPUs, from the outside, on the built-in tiny model: ranks change
# no gradient, whatever starts them; a rank that dies or hangs ends the run with one line; what was
# interrupted goes on bit for bit. With one GPU test_one alone runs, without any all is skipped.
#   test/test_ranks.sh [path of the program [test...]]
set -um                                 # -m: a background run has a process group of its own
root=$(realpath "$(dirname "$0")/..")
. "$root/test/check.sh"
train=$(realpath "${1:-$root/train}")
shift
if [ ! -x "$train" ]; then echo "test_ranks: no ./train"; exit 1; fi
dir=$(mktemp -d) && cd "$dir" || exit 1
trap 'rm -rf "$dir"' EXIT
export OMP_NUM_THREADS=2
small=(-b 1 -t 64 -d 512 -v 0 -n 0 -s 0 --seed 3)

# run CODE ARGUMENTS...: runs the program to its end, output in ./log, and checks its exit code.
run() {
    local want=$1 got
    shift
    timeout -k 1 60 "$train" "$@" > log 2>&1
    got=$?
    check "exit code $got, expected $want: ./train $*" [ $got = "$want" ]
}

# close_values LIMIT A B: two lists of as many numbers agree, relative to the first.
close_values() {
    printf '%s\n%s\n' "$2" "$3" | awk -v limit="$1" '
        NR == 1 { n = split($0, a) }
        NR == 2 { if (NF != n || n == 0) { exit 1 }
                  for (i = 1; i <= n; i++) {
                      d = ($i - a[i]) / a[i]
                      if (d < 0) { d = -d }
                      if (d > most) { most = d } }
                  printf "  most %.2e of %s\n", most, limit > "/dev/stderr"
                  exit !(most <= limit) }'
}

# numbers FILE: all elements of a safetensors file, of fp32.
numbers() { tail -c +$((9 + $(header_size "$1"))) "$1" | od -An -v -t f4 -w4; }

# close_tensors LIMIT SUFFIX A B: all tensors of two files whose names end so differ by at most that
# much of their norm; what is all zero in A is so in B. Prints the worst.
close_tensors() {
    check "$3 and $4: other tensors" same "$(header "$3")" "$(header "$4")"
    tensors "$3" > names
    paste <(numbers "$3") <(numbers "$4") | awk -v limit="$1" -v suffix="$2\$" '
        function done_with() {
            if (name ~ suffix && want + diff > 0) {
                d = want > 0 ? sqrt(diff / want) : 1e9; n++
                if (d > most) { most = d; where = name } }
            diff = want = 0 }
        BEGIN { while ((getline line < "names") > 0) {
            split(line, p, " "); count++; names[count] = p[1]; end[count] = p[3] / 4 }
            at = 1; name = names[1] }
        { while (NR > end[at] && at < count) { done_with(); at++; name = names[at] }
          diff += ($1 - $2) ^ 2; want += $1 ^ 2 }
        END { done_with()
              printf "  %d tensors, worst %.2e of %s: %s\n", n, most, limit, where > "/dev/stderr"
              exit !(n > 0 && most <= limit) }'
}

# held LIMIT: what the last run held after a step is within so many percent of the plan.
held() {
    local off
    off=$(sed -nE 's/^plan +held .*\(([-+0-9.]+) %\)/\1/p' log)
    check "memory is $off % off the plan, $1 allowed" awk -v off="$off" -v limit="$1" \
        'BEGIN { exit !(off != "" && off < limit && off > -limit) }'
}

# A model of two layers at full width with the tiny one's 8 experts, in ./wide: 5 GiB, of which a
# context is little.
wide_model() {
    local wide='s/("vocab_size": )264/\1129280/; s/("hidden_size": )128/\14096/
        s/("num_hidden_layers": )5/\12/; s/("num_attention_heads": )4/\164/; s/("o_groups": )2/\18/
        s/("head_dim": )128/\1512/; s/("(q|o)_lora_rank": )128/\11024/; s/("index_topk": )16/\1512/
        s/("moe_intermediate_size": )128/\12048/; s/("sliding_window": )32/\1128/
        s/("index_n_heads": )2/\164/'
    mkdir -p wide && sed -E "$wide" "$root/dev/data/tiny/config.json" > wide/config.json
}

# What one GPU can show: it trains as the CPU does, goes on bit for bit, holds what was planned,
# keeps inputs on the host, works in fp8, and says how fast it was.
test_one() {
    local n shown options=("${small[@]}" -b 4 -d 4096 -l 1e-4)
    run 0 "${options[@]}" -x 20 -n 10 --gpus 1 -o one
    held 20
    shown=$(grep -cE '^step .* \| [0-9]+\.[0-9] % MFU \|' log)
    check "MFU is in $shown of 20 lines" [ "$shown" = 20 ]
    check "not 20 positive mfu: $(value mfu one)" awk '
        BEGIN { for (i = 1; i < ARGC; i++) { n += ARGV[i] > 0 && ARGV[i] < 100 }; exit n != 20 }
        ' $(value mfu one)
    OMP_NUM_THREADS=$(nproc) run 0 "${options[@]}" -x 20 --cpu -o onecpu
    check "the CPU has an mfu" same "$(grep -c '"mfu": null' onecpu/training.jsonl)" 20
    check "20 losses of the CPU and a GPU: $(value loss onecpu) | $(value loss one)" \
        close_values 3e-3 "$(value loss onecpu)" "$(value loss one)"
    cp -r one onagain                   # gone on with from step 10: the same bits
    echo checkpoint-000010 > onagain/latest
    run 0 "${options[@]}" -x 20 -n 10 --gpus 1 -o onagain --resume
    check "a GPU resumed: not from step 10" grep -q '^load .*checkpoint-000010 .* step 10 ' log
    check "a GPU resumed: other losses" same "$(value loss one)" "$(value loss onagain)"
    check "a GPU resumed: other adapter" cmp {one,onagain}/adapter/adapter_model.safetensors
    run 0 "${options[@]}" -x 5 --gpus 1 --precision fp8 -o onefp8
    check "5 losses in bf16 and fp8: $(value loss one) | $(value loss onefp8)" \
        close_values 2.5e-3 "$(value loss one | cut -d ' ' -f -5)" "$(value loss onefp8)"
    check "fp8 does nothing" [ "$(value loss one | cut -d ' ' -f -5)" != "$(value loss onefp8)" ]
    for n in 0 4; do
        run 0 "${small[@]}" --gpus 1 -x 3 --offload $n --recompute full -o "off$n"
    done
    check "one GPU, --offload 4: other bits" cmp {off0,off4}/adapter/adapter_model.safetensors
    wide_model
    run 0 -m wide --random-base --gpus 1 --bench 2 -t 4096
    held 3
    for n in experts projections 'attention core' head host step; do
        check "--bench has no $n" grep -qE "^bench  $n .* [0-9]+\.[0-9]+ ms +-?[0-9.]+ %$" log
    done
}

# With beta1 = 0 the first moment of one step is its gradient. The adapter it begins with is not
# zero, or the gradient of every A would be.
test_gradients() {
    local ranks rows one=("${small[@]}" -x 1 -n 1 --clip 0 --beta1 0 --init-adapter begin/adapter)
    run 0 "${small[@]}" --gpus 1 -x 5 -o begin
    for ranks in $counts; do
        run 0 "${one[@]}" --gpus "$ranks" -o "g$ranks"
        if [ "$ranks" = 1 ]; then continue; fi
        check "gradients of 1 and $ranks GPUs" close_tensors 1e-5 '[.]m' \
            {g1,"g$ranks"}/checkpoint-000001/optimizer.safetensors
        check "loss of 1 and $ranks GPUs" close_values 1e-5 "$(value loss g1)" \
            "$(value loss "g$ranks")"
    done
    run 0 "${one[@]}" --gpus 2 --ep 1 -o replicas
    check "gradients of 2 replicas" close_tensors 1e-5 '[.]m' \
        {g1,replicas}/checkpoint-000001/optimizer.safetensors
    run 0 "${one[@]}" --cpu --ranks 2 -o cpu
    check "loss of 2 CPU ranks and 2 GPUs" close_values 1e-3 "$(value loss cpu)" "$(value loss g2)"
    # Where a token goes to another expert, that one's gradient is another: only their norm agrees.
    check "norm of 2 CPU ranks and 2 GPUs" close_values 1e-2 "$(value grad_norm cpu)" \
        "$(value grad_norm g2)"
    # Products of other sizes may round otherwise, so here too it is the norm that agrees.
    for rows in 2 4; do
        run 0 "${one[@]}" --gpus 2 -b $rows -o "rows$rows"
        check "loss of 2 GPUs x $rows rows" close_values 1e-3 "$(value loss g1)" \
            "$(value loss "rows$rows")"
        check "norm of 2 GPUs x $rows rows" close_values 1e-2 "$(value grad_norm g1)" \
            "$(value grad_norm "rows$rows")"
    done
    if [ "$gpus" -lt 4 ]; then skip "2 groups of 2: needs 4 GPUs"; return; fi
    run 0 "${one[@]}" --gpus 4 --ep 2 -o groups
    check "gradients of 2 groups of 2" close_tensors 1e-5 '[.]m' \
        {g1,groups}/checkpoint-000001/optimizer.safetensors
}

# Seven rows of 3 to 64 tokens in one step, so that in the last micro-batch ranks run empty, of two
# letters, so that experts do. The moment after one step of Muon is 0.05 times the gradient.
test_uneven() {
    local letters split ranks ep
    local one=("${small[@]}" --epochs 1 --optimizer muon -n 1 --clip 0 --init-adapter begin/adapter)
    if [ ! -e begin/adapter ]; then run 0 "${small[@]}" --gpus 1 -x 5 -o begin; fi
    for letters in 1 62 30 9 45 14 22; do
        awk -v n=$letters 'BEGIN { while (n--) { printf "%c", 97 + n * n % 2 } }' > part$letters.txt
    done
    for split in '1 1' '2 2' '2 1' '4 4' '4 2'; do
        read -r ranks ep <<< "$split"
        if [ "$ranks" -gt "$gpus" ]; then skip "uneven rows on $ranks GPUs"; continue; fi
        run 0 "${one[@]}" -i 'part*.txt' --pack off --gpus "$ranks" --ep "$ep" -o "u$ranks$ep"
        check "uneven: not 197 tokens" same "$(value num_tokens_per_step "u$ranks$ep")" 197
        if [ "$split" = '1 1' ]; then continue; fi
        check "uneven gradients of $ranks GPUs in groups of $ep" close_tensors 1e-5 '[.]m' \
            {u11,"u$ranks$ep"}/checkpoint-000001/optimizer.safetensors
        check "uneven norm of $ranks GPUs in groups of $ep" close_values 1e-5 \
            "$(value grad_norm u11)" "$(value grad_norm "u$ranks$ep")"
    done
}

# A step that makes the adapters infinite: the next one stops all ranks with one line, and what was
# saved before stays.
test_numerics() {
    run 3 "${small[@]}" --gpus "$gpus" -x 9 -n 0 -l 1e39 --clip 0 -o nan
    check "numerics: not one error line" same "$(grep -c '^error' log)" 1
    check "numerics: no name" grep -qE '^error.*non-finite loss in .* at step 2 ' log
    check "numerics: the step is logged" same "$(steps nan)" 1
    run 3 "${small[@]}" --gpus "$gpus" -x 9 -n 1 -l 1e39 --clip 0 -o unsaved
    check "numerics: no name before a save" grep -qE \
        '^error.*non-finite numbers in the adapters at step 1 ' log
    check "numerics: saved" [ ! -e unsaved/latest ]
}

# After some steps a last bit lets a token meet another expert, and then its loss is another one: of
# 4,096 tokens a step that is too little to be seen.
test_losses() {
    local ranks options=("${small[@]}" -b 4 -d 4096 -x 20 -l 1e-4)
    for ranks in $counts; do
        run 0 "${options[@]}" --gpus "$ranks" -n 10 -o "t$ranks"
        check "20 losses of 1 and $ranks GPUs: $(value loss t1) | $(value loss "t$ranks")" \
            close_values 1e-3 "$(value loss t1)" "$(value loss "t$ranks")"
    done
    run 0 "${options[@]}" --cpu --ranks 2 -o tcpu
    check "20 losses of CPU ranks and 2 GPUs: $(value loss tcpu) | $(value loss t2)" \
        close_values 3e-3 "$(value loss tcpu)" "$(value loss t2)"
    cp -r t2 again                      # gone on with from step 10: the same bits
    echo checkpoint-000010 > again/latest
    run 0 "${options[@]}" --gpus 2 -n 10 -o again --resume
    check "2 GPUs resumed: other losses" same "$(value loss t2)" "$(value loss again)"
    check "2 GPUs resumed: other adapter" cmp {t2,again}/adapter/adapter_model.safetensors
    cp -r t2 fewer
    echo checkpoint-000010 > fewer/latest
    run 0 "${options[@]}" --gpus 1 -n 10 -o fewer --resume
    check "resumed on 1 GPU of 2: $(value loss fewer)" close_values 1e-3 "$(value loss t2)" \
        "$(value loss fewer)"
}

# 37 rows of 32 tokens in steps of 8: in the last step, and in validation, ranks run empty.
test_empty() {
    awk 'BEGIN { while (n++ < 36 * 32 + 14) { printf "%c", 97 + n * n % 26 } }' > text.txt
    run 0 -b 1 -t 32 -d $((32 * 2 * gpus)) -v 2 --val-steps 9 -n 0 -s 3 -g 3 -i text.txt \
        -j text.txt --epochs 1 --gpus "$gpus" -o empty
}

# Several threads read a checkpoint's files: none of them begins a context of its own on another
# GPU, which would be a gigabyte that no plan knows of.
test_loaded() {
    awk 'BEGIN { while (n++ < 999) { printf "%c", 97 + n * n % 26 } }' > text.txt
    run 0 "${small[@]}" -m "$root/dev/data/tiny" -i text.txt -x 2 --gpus "$gpus" -o loaded
    held 20
}

# Processes that a launcher would have started, on one node or on two: NCCL takes ranks whose hosts
# have different names for far apart, and goes over the loopback.
launched() {
    local nodes=$1 locals=$2 rank code pids=() name="l$1$2" f="f$1$2" ranks=$(($1 * $2))
    for ((rank = 0; rank < ranks; rank++)); do
        ( export MASTER_ADDR=127.0.0.1 MASTER_PORT=29511 RANK=$rank WORLD_SIZE=$ranks
          export LOCAL_RANK=$((rank % locals)) LOCAL_WORLD_SIZE=$locals
          if [ "$nodes" -gt 1 ]; then
              CUDA_VISIBLE_DEVICES=$(seq -s , $((rank / locals * locals)) \
                  $((rank / locals * locals + locals - 1)))
              export CUDA_VISIBLE_DEVICES NCCL_HOSTID=$((rank / locals)) NCCL_IB_DISABLE=1 \
                  NCCL_SOCKET_IFNAME=lo
          fi
          exec timeout -k 1 60 "$train" "${small[@]}" --timeout 30 -x 5 -l 1e-4 -o "$name" ) \
            > "log$rank" 2>&1 &
        pids+=($!)
    done
    for ((rank = 0; rank < ranks; rank++)); do
        { wait "${pids[$rank]}"; } 2> /dev/null
        code=$?
        cp "log$rank" log
        check "launched, $nodes x $locals, rank $rank: exit code $code" [ $code = 0 ]
    done
    run 0 "${small[@]}" --gpus "$ranks" --ep "$locals" -x 5 -l 1e-4 -o "$f"
    check "launched, $nodes x $locals, and forked: $(value loss "$name") | $(value loss "$f")" \
        close_values 1e-4 "$(value loss "$f")" "$(value loss "$name")"
}

test_launched() {
    launched 1 2
    launched 2 1
    if [ "$gpus" -ge 4 ]; then launched 2 2; else skip "2 nodes of 2: needs 4 GPUs"; fi
}

# refits LOG FIELD: that number of every receivers' line, on one line.
refits() { sed -nE "s/^refit +[0-9]+ .*\| $2 ([-+0-9.e]+) .*/\1/p" "$1" | xargs; }

# Training does not notice receivers; what these compute from the weights that they got is what the
# trainer computes, on GPUs as on the CPU; as many bytes travel.
test_receivers() {
    local pair what options=("${small[@]}" -x 6 -l 3e-3 --val-steps 8)
    for pair in 1+1 2+2; do
        local trainers=${pair%+*} receivers=${pair#*+} out=r$pair
        if [ "$gpus" -lt $((trainers + receivers)) ]; then
            skip "receivers: $pair GPUs"
            continue
        fi
        local how=("${options[@]}" --gen-gpus "$receivers" --refit-every 2)
        run 0 "${how[@]}" --gpus $((trainers + receivers)) -o "$out"
        cp log "$out.log"
        run 0 "${how[@]}" --cpu --ranks $((trainers + receivers)) -o "cpu$out"
        cp log "cpu$out.log"
        run 0 "${options[@]}" --gpus "$trainers" -o "alone$out"
        check "receivers $pair: other losses" same "$(value loss "alone$out")" \
            "$(value loss "$out")"
        check "receivers $pair: other adapter" \
            cmp {"alone$out","$out"}/adapter/adapter_model.safetensors
        check "receivers $pair: not 4 refits" same "$(refits "$out.log" kl | wc -w)" 4
        check "receivers $pair: KL $(refits "$out.log" kl)" awk '
            BEGIN {
                for (i = 1; i < ARGC; i++) { if (!(ARGV[i] >= 0 && ARGV[i] < 1e-3)) { exit 1 } }
            }' $(refits "$out.log" kl)
        for what in 'receiver loss' 'trainer loss'; do
            check "receivers $pair: $what" close_values 3e-3 "$(refits "cpu$out.log" "$what")" \
                "$(refits "$out.log" "$what")"
        done
        check "receivers $pair: other bytes" same \
            "$(grep -oE '^refit .*(MB|transfers)' "cpu$out.log" | sed 's/ MB received.*//')" \
            "$(grep -oE '^refit .*(MB|transfers)' "$out.log" | sed 's/ MB received.*//')"
    done
}

# Inputs of layers that wait on the host change no bit.
test_offload() {
    local n
    for n in 0 4 5; do
        run 0 "${small[@]}" --gpus 2 -x 3 --offload $n --recompute full -o "o$n"
    done
    check "--offload 4: other bits" cmp {o0,o4}/adapter/adapter_model.safetensors
    check "--offload 5: other bits" cmp {o0,o5}/adapter/adapter_model.safetensors
}

# steps OUT: that its run has done so far.
steps() { { wc -l < "$1/training.jsonl"; } 2> /dev/null || echo 0; }

# broken NAME SIGNAL CODE SECONDS WORDS...: a rank gets the signal in the middle of a step: all are
# gone in time, with that exit code and one line that has the words.
broken() {
    local name=$1 signal=$2 want=$3 limit=$4 ranks tries=0 got=none started
    shift 4
    "$train" "${small[@]}" --gpus "$gpus" -x 100000 --timeout 3 -o "$name" > log 2>&1 &
    local pid=$!
    until [ "$(steps "$name")" -ge 5 ]; do
        kill -0 $pid 2> /dev/null && [ $((++tries)) -lt 300 ] || break
        sleep 0.1
    done
    read -r -a ranks <<< "$(children $pid | xargs)"
    check "not $gpus ranks: ${ranks[*]}" same ${#ranks[@]} "$gpus"
    kill "-$signal" "${ranks[1]}"
    started=$SECONDS tries=0
    while kill -0 $pid 2> /dev/null && [ $((++tries)) -lt 400 ]; do sleep 0.05; done
    if [ $tries -lt 400 ]; then { wait $pid; } 2> /dev/null; got=$?; fi
    check "$name: exit code $got, expected $want" [ $got = "$want" ]
    check "$name: took $((SECONDS - started)) s" [ $((SECONDS - started)) -le "$limit" ]
    check "$name: a rank lives on" same "$(ls -d "${ranks[@]/#//proc/}" 2> /dev/null)" ""
    check "$name: not one error line" same "$(grep -c '^error' log)" 1
    for want; do check "$name: no '$want'" grep -qE "^error.*$want" log; done
    grep '^error' log | sed 's/^/  /'
    kill -KILL "${ranks[@]}" 2> /dev/null
}

test_broken() {
    broken killed KILL 137 10 'rank 1: killed by signal 9' 'last seen in [a-z_]+ \([a-z ]+\)'
    broken stopped STOP 4 13 'rank 1' 'waited 3 s' '[a-z_]+ \([a-z ]+\)'
}

# Ctrl-C in a terminal reaches every process of the group: the step is finished and saved.
test_interrupted() {
    local options=("${small[@]}" --gpus "$gpus" -x 150 -l 1e-3) pid got tries=0
    run 0 "${options[@]}" -o whole
    "$train" "${options[@]}" -o cut > log 2>&1 &
    pid=$!
    until [ "$(steps cut)" -ge 5 ]; do
        kill -0 $pid 2> /dev/null && [ $((++tries)) -lt 300 ] || break
        sleep 0.05
    done
    kill -INT -- "-$pid"
    { wait $pid; } 2> /dev/null
    got=$?
    check "interrupted: exit code $got" [ $got = 130 ]
    check "interrupted too late" [ "$(steps cut)" -lt 150 ]
    run 0 "${options[@]}" -o cut --resume
    check "interrupted and resumed: other losses" same "$(value loss whole)" "$(value loss cut)"
    check "interrupted and resumed: other adapter" cmp {whole,cut}/adapter/adapter_model.safetensors
}

"$train" --dry-run > log 2>&1
gpus=$(sed -nE 's/^\| path +\| GPU \(([0-9]+) x .*/\1/p' log)
if [ "${gpus:-0}" = 0 ]; then
    skip "GPUs: this machine has none"
    closing test_ranks
    exit
fi
counts="1 2" && if [ "$gpus" -ge 4 ]; then counts="1 2 4"; fi
tests="one gradients uneven numerics losses receivers empty loaded launched offload broken
    interrupted"
if [ "$gpus" = 1 ]; then
    skip "several GPUs: this machine has 1"
    set -- one
fi
for name in "${@:-$tests}"; do
    for name in $name; do
        "test_$name"
        check "test_$name: a process lives on" same 0 \
            "$(readlink /proc/[0-9]*/exe 2> /dev/null | grep -cx "$train")"
    done
done
closing test_ranks
