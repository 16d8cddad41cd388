#!/usr/bin/env bash
# test_cli.sh: ./train from the outside, on the built-in tiny model: what it prints and writes, what
# it refuses, that a broken run can be continued bit for bit, that ranks change nothing.
# Runs in a folder of its own, with steps of 128 tokens.
#   test/test_cli.sh [path of the program]
set -um                                 # -m: a background run has a process group of its own
root=$(realpath "$(dirname "$0")/..")
. "$root/test/check.sh"
train=$(realpath "${1:-$root/train}")
if [ ! -x "$train" ]; then echo "test_cli: no ./train"; exit 1; fi
dir=$(mktemp -d) && cd "$dir" || exit 1
trap 'rm -rf "$dir"' EXIT
export OMP_NUM_THREADS=1                # tiny steps; waiting threads are slow on a busy machine
given=(--cpu -b 1 -t 32 -d 128 -v 0 -n 0 -s 0)
small=("${given[@]}" --random-base)

# run CODE ARGUMENTS...: runs the program to its end, output in ./log, and checks its exit code.
run() {
    local want=$1 got
    shift
    "$train" "$@" > log 2>&1
    got=$?
    check "exit code $got, expected $want: ./train $*" [ $got = "$want" ]
}

# start ARGUMENTS...: runs the program in the background, as $pid.
start() {
    "$train" "$@" > log 2>&1 &
    pid=$!
}

# until_true COMMAND...: waits until it succeeds; fails when the program ends first.
until_true() {
    until "$@"; do kill -0 "$pid" 2> /dev/null || return 1; done
}

# finish CODE: waits for that program, 15 seconds at most, and checks its exit code.
finish() {
    local tries=0 got=none
    while kill -0 "$pid" 2> /dev/null && [ $((++tries)) -lt 300 ]; do sleep 0.05; done
    if [ $tries -lt 300 ]; then { wait "$pid"; } 2> /dev/null; got=$?; fi
    check "exit code $got within 15 s, expected $1" [ $got = "$1" ]
}

# lines FILE N: it has at least so many.
lines() { sleep 0.02; [ -e "$1" ] && [ "$(wc -l < "$1")" -ge "$2" ]; }

# equal_runs MESSAGE OUT OUT: the same steps and the same adapter, bit for bit.
equal_runs() {
    local key
    for key in step epoch loss grad_norm lr num_tokens_per_step num_label_tokens; do
        check "$1: $key differs" same "$(value $key "$2")" "$(value $key "$3")"
    done
    check "$1: the adapters differ" cmp {"$2","$3"}/adapter/adapter_model.safetensors
}

# One whole run: what is printed, and what lies in OUT.
test_fresh() {
    run 0 --cpu --random-base -b 1 -t 64 -d 256 -x 16 -l 3e-3 -u 2 -v 8 --val-steps 2 -n 8 -s 8 \
        -g 4 -o fresh
    local word
    for word in plan load data 'step +16/16' 'val +16' moe 'save +8' 'done'; do
        check "no line begins with $word" grep -qE "^$word" log
    done
    check "scales: not the first of each of 12 kinds, 0.8 times 1/2, 1 or 2: $(grep ^scales log)" \
        awk '/^scales/ { n++; bad += !($2 ~ /^layers[.][01][.]/ && $NF > 0.38 && $NF < 1.7)
            sub(/^layers[.][0-9]+[.]/, "", $2); kinds += !seen[$2]++ }
        END { exit !(n == 12 && kinds == 12 && bad == 0) }' log
    check "the first lines do not say which path runs" grep -q CPU <(head -n 5 log)
    check "training.jsonl: not one line per step" same "$(value step fresh)" "$(echo {1..16})"
    check "training.jsonl: keys" same "$(sed -E 's/: *("[^"]*"|[^,}"]*)//g; s/[^a-z_]+/ /g' \
        fresh/training.jsonl | sort -u | xargs)" "step epoch timestamp loss grad_norm lr mem tps$(
        ) tps_per_gpu mfu num_tokens_per_step num_label_tokens"
    check "validation.jsonl" grep -qE '"step": *16,.*"val_loss": *[0-9.]+' fresh/validation.jsonl
    check "the loss does not begin above log(264) = 5.58 and fall by 1: $(value loss fresh)" awk '{
        for (i = 1; i <= 4; i++) { first += $i / 4; last += $(12 + i) / 4 }
        exit !(NF == 16 && $1 > 5.58 && $1 < 8 && last < first - 1) }' <(value loss fresh)
    check "adapter_config.json" grep -q '"r": *8' fresh/adapter/adapter_config.json
    check "adapter_model.safetensors" grep -q lora_A fresh/adapter/adapter_model.safetensors
    check "latest names no checkpoint" [ -f "fresh/$(cat fresh/latest)/state.json" ]
    if [ -e fresh/loss.png ] || ! grep -q libstb-dev log; then
        check "loss.png is no PNG" same "$(head -c 4 fresh/loss.png | tail -c 3)" PNG
    else
        skip "loss.png: built without libstb-dev"
    fi

    run 0 "${small[@]}" -x 1 -o fresh
    check "the old run is not in previous-1" lines fresh/previous-1/training.jsonl 16
    check "nothing says that the old run was moved" grep -q previous-1 log
    run 0 "${small[@]}" -x 1 -o fresh
    check "the second run is not in previous-2" lines fresh/previous-2/training.jsonl 1
    check "previous-1 is gone" lines fresh/previous-1/training.jsonl 16
}

# refused WANTED ARGUMENTS...: exit code 1, and one line on stderr, which holds WANTED.
refused() {
    local want=$1 got
    shift
    "$train" "$@" > log 2> err
    got=$?
    check "exit code $got, expected 1: ./train $*" [ $got = 1 ]
    check "stderr has not one line: ./train $*" same "$(wc -l < err)" 1
    check "no '$want' in: $(cat err)" grep -qE -- "$want" err
}

test_refused() {
    refused '--steps' --stesp 3
    refused '--lora-alpha' --lora-alhpa=3
    refused 'lora-alpha' "${small[@]}" --lora-alpha 0
    refused 'eps' "${small[@]}" --eps 0
    refused 'loss-on.*marked' "${small[@]}" -i tokens.bin --loss-on all
    refused 'muon takes --lora-r up to 64' "${small[@]}" --optimizer muon --lora-r 65
    refused 'steps' -x
    refused 'steps.*many' -x many
    refused 'lora-r' "${small[@]}" --lora-r 0
    refused 'router' "${small[@]}" --lora-targets attn,router
    refused '100' --cpu -b 1 -t 64 -d 100
    refused 'one at a time' "${small[@]}" --bench 2 --eval
    printf 'steps = 1\nprompt = %05000d# and more\n' 7 > long.cfg
    refused 'long.cfg:2: a line has at most 4094 bytes' --config long.cfg
    touch file
    refused 'file is no folder' "${small[@]}" -x 1 -o file
    refused 'no-such' "${small[@]}" -m no-such-folder -i text.txt
    refused 'no-such' "${small[@]}" -i no-such-file.txt
    echo '{"messages": [{"role": "wizard", "content": "?"}]}' > chat.jsonl
    refused 'chat.jsonl:1.*wizard|libjsmn-dev' "${small[@]}" -i chat.jsonl
    refused 'nothing|libjsmn-dev' "${small[@]}" -o nothing --resume
    RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 run 0 "${small[@]}" --ranks 2 --dry-run
    check "a launcher of one process overrides --ranks" grep -q '2 ranks x' log
    run 0 --help
    check "--help does not name --lora-targets" grep -q -- --lora-targets log
    run 0 --version
}

# --eval appends one line and trains nothing; --dry-run writes nothing; --config sets options.
test_modes() {
    run 0 "${small[@]}" -j text.txt --eval -o eval
    run 0 "${small[@]}" -j text.txt --eval -o eval
    check "--eval: not two equal lines for two runs" same 2 "$(grep -o '"val_loss".*' \
        eval/validation.jsonl | uniq -c | awk '{ print $1 }')"
    run 0 "${small[@]}" --dry-run -o dry
    check "--dry-run prints no plan" grep -q '^plan' log
    check "--eval or --dry-run trained" same "$(ls {eval,dry}/training.jsonl 2> /dev/null)" ""
    printf '# comment\nsteps = 2\nlora-r = 4\n' > options
    run 0 "${small[@]}" --config options -o config
    check "--config: steps" same "$(value step config)" "1 2"
    check "--config: r" grep -q '"r": *4' config/adapter/adapter_config.json
}

# norms FILE: what --check-adapter should say of it, from its bytes alone; names as vllm's.
norms() {
    tensors "$1" > names
    od -An -v -t f4 -w4 -j $((8 + $(header_size "$1"))) "$1" | awk '
        BEGIN { while ((getline line < "names") > 0) {
            split(line, p, " "); count++; name[count] = p[1]; end[count] = p[3] / 4 }
            at = 1 }
        { while (NR > end[at]) { at++ }
          sum[name[at]] += $1 * $1 }
        END { for (at in name) {
            if (name[at] !~ /lora_B/) { continue }
            a = kind = name[at]
            sub(/lora_B/, "lora_A", a)
            sub(/.*layers[.][0-9]+[.]/, "", kind)
            sub(/[.]lora_B.weight/, "", kind)
            sub(/experts[.][0-9]+/, "experts", kind)
            norm = sqrt(sum[name[at]])
            if (!n[kind]++) { least[kind] = norm }
            if (norm < least[kind]) { least[kind] = norm }
            if (norm > most[kind]) { most[kind] = norm }
            mean[kind] += norm
            idle[kind] += sum[name[at]] == 0 || sum[a] == 0 }
        for (kind in n) {
            printf "check  %-21s %6d matrices | norm of B %.3g .. %.3g, mean %.3g | %d unchanged\n",
                kind, n[kind], least[kind], most[kind], mean[kind] / n[kind], idle[kind] } }' | sort
}

# An adapter that fits: its norms, from its bytes, on any number of ranks and under either naming.
# One that does not: what is wrong is named and counted. One that does nothing is called that.
test_check_adapter() {
    local ranks names file from
    run 0 "${small[@]}" -x 3 -l 1e-2 -u 0 --lora-alpha 0.1 -o checked
    run 0 --cpu --lora-alpha 0.1 --check-adapter checked/adapter
    refused 'lora-alpha 0.2, but' --cpu --lora-alpha 0.2 --check-adapter checked/adapter
    for names in vllm hf; do
        run 0 "${small[@]}" --init-adapter checked/adapter --adapter-names $names -l 0 -x 1 \
            -o $names
    done
    file=vllm/adapter/adapter_model.safetensors
    for names in attn.wq_a.lora_A ffn.experts.3.w2.lora_B; do           # zeros, 4096 bytes each
        from=$(tensors $file | awk -v name="layers.1.$names" 'index($0, name) { print $2 }')
        dd if=/dev/zero of=$file bs=1 seek=$((8 + $(header_size $file) + from)) count=4096 \
            conv=notrunc 2> /dev/null
    done
    run 0 "${small[@]}" --init-adapter vllm/adapter --adapter-names hf -l 0 -x 1 -n 1 -o hf
    check "a checkpoint is not the adapter it will be" cmp \
        hf/{checkpoint-000001,adapter}/adapter_model.safetensors
    for names in vllm hf; do
        for ranks in 1 2 4; do
            run 0 --cpu --check-adapter $names/adapter --ranks $ranks
            check "norms of B, $names, $ranks ranks: $(diff <(norms $file) <(grep \
                'norm of B' log | sort))" cmp -s <(norms $file) <(grep 'norm of B' log | sort)
            check "no count of what fits" grep -q '^done .*fits: 155 matrices, r=8 alpha=0.1$' log
        done
    done
    for names in attn.wq_a ffn.experts.w2; do
        check "$names: none is unchanged" grep -qE "$names .*[1-9] unchanged" <(norms $file)
    done

    LC_ALL=C sed -i 's/layers.1.attn.wkv.lora_A/layers.9.attn.wkv.lora_A/' $file
    refused 'fit this model: of its 310 tensors 309 do' --cpu --check-adapter vllm/adapter
    check "what is missing" grep -q 'layers.1.attn.wkv.lora_A.weight is missing, exp.*\[8,128\]' log
    check "what is unknown" grep -q 'layers.9.attn.wkv.lora_A.weight is of no matrix' log
    check "the counts" grep -q '^check  309 tensors match, 1 are missing, 0 have.* 1 are of no' log
    run 0 "${small[@]}" -l 0 -x 1 -o idle
    run 0 --cpu --check-adapter idle/adapter
    check "an adapter that does nothing" grep -q '^done .*it does nothing' log
}

# The plan in the log, without what depends on the moment.
plan() { sed -nE '/^plan/ { s/of [0-9.]+ .iB free( in .*)?/of FREE/; p }' log; }

# --dry-run tells the figures that the run then has, and they are what the process then holds: with
# longer rows the one grows as the other does (a tenth of the plan may never be touched, and the
# sanitizers hold an eighth more).
test_plan() {
    local ranks mode options dry total planned=() held=()
    for ranks in "1" "8 --ep 8"; do
        for mode in full moe none; do
            read -r -a options <<< "--ranks $ranks --recompute $mode -x 1 -d 256"
            options=("${small[@]}" "${options[@]}" -o plan)
            run 0 "${options[@]}" --dry-run
            check "--dry-run has no plan of $mode" grep -qE "^plan +total.*recompute $mode" log
            total=$(sed -nE 's/^plan +total +([0-9.]+ .iB) per rank.*/\1/p' log)
            dry=$(plan)
            run 0 "${options[@]}"
            check "--dry-run and the run, ranks $ranks, $mode: $(diff <(echo "$dry") <(plan))" \
                same "$dry" "$(plan)"
            check "not the memory of the step: $total" grep -qE "^step .* mem $total " log
        done
    done
    total=$(sed -nE 's/^plan +disk.*adapter of ([0-9.]+) MiB.*/\1/p' log)
    check "an adapter of $total MiB" awk "{
        mib = \$1 / 1048576; exit !($total > mib - 0.06 && $total < mib + 0.3) }" \
        <(wc -c < plan/adapter/adapter_model.safetensors)
    run 2 "${small[@]}" -b 8 -t 1048576 -d 8388608 --recompute moe --dry-run
    check "no hint what to change" grep -q '^error.*HINT: --recompute full, a smaller -b, -t' log
    for mode in 128 2048; do
        ASAN_OPTIONS=${ASAN_OPTIONS:-}:quarantine_size_mb=0 \
            start "${small[@]}" -t $mode -d $mode -x 100000 --recompute none -o "held$mode"
        until_true lines "held$mode/training.jsonl" 2
        planned+=("$(sed -nE 's/^plan +total +([0-9.]+) MiB per rank.*/\1/p' log)")
        held+=("$(awk '/^VmHWM/ { print $2 / 1024 }' "/proc/$pid/status")")
        kill -KILL "$pid"
        { wait "$pid"; } 2> /dev/null
    done
    check "${planned[*]} MiB planned for rows of 128 and 2048, ${held[*]} held" awk '
        { more = ($4 - $3) / ($2 - $1); exit !($2 - $1 > 100 && more > 0.85 && more < 1.2) }' \
        <(echo "${planned[*]} ${held[*]}")
}

# Inputs of layers that wait elsewhere change no bit. 4 of 5 layers: places are used again.
test_offload() {
    run 0 "${small[@]}" -x 3 -v 2 --val-steps 1 -o near
    run 0 "${small[@]}" -x 3 -v 2 --val-steps 1 --offload 4 -o far
    check "--offload is not in the plan" grep -q '^plan   offload' log
    equal_runs "--offload 4" near far
    refused 'offload 6.*5 layers' "${small[@]}" --offload 6
}

# within SHARE A B: as many losses in A as in B, and each within that share of the other.
within() {
    echo "$1 $2 $3" | awk '{
        for (i = 2; i <= (NF + 1) / 2; i++) {
            d = ($i - $(i + (NF - 1) / 2)) / $i
            bad += !(d <= $1 && d >= -$1)
        }
        exit !(NF > 1 && NF % 2 == 1 && bad == 0) }'
}

# Experts in fp8, on the base that has read English: close to bf16, and not the same; the same bytes
# whatever is computed again; with ranks; with a rank that no tile divides; with a forward alone.
test_fp8() {
    local options=("${given[@]}" -i text.txt -d 64 -x 3) how kept
    local big=("${given[@]}" -i text.txt -b 64 -d 4096 -x 3 --dry-run)
    run 0 "${options[@]}" -o bf16
    for how in full moe none; do
        run 0 "${options[@]}" --precision fp8 --recompute $how -o fp8-$how
        check "--precision fp8 does not say what its experts are like" grep -qE \
            '^fp8 .*: [0-9]+, more: 0 \| 0 of 5 layers stay in bf16' log
        equal_runs "fp8, --recompute $how" fp8-full fp8-$how
        run 0 "${big[@]}" --recompute $how --precision fp8
        kept=$(awk '/^plan +activations/ { print $3 }' log)
        run 0 "${big[@]}" --recompute $how
        check "fp8 keeps $kept MiB, --recompute $how" awk -v kept="$kept" '
            /^plan +activations/ { n++; fits = kept <= $3 } END { exit !(n == 1 && fits) }' log
    done
    check "losses in fp8 and bf16: $(value loss fp8-full) | $(value loss bf16)" \
        within 0.01 "$(value loss fp8-full)" "$(value loss bf16)"
    check "--precision fp8 does nothing" [ "$(value loss fp8-full)" != "$(value loss bf16)" ]
    run 0 "${options[@]}" -x 1 --precision fp8 --ranks 2 -o fp8-ranks
    check "first loss in fp8 on 1 and 2 ranks: $(value loss fp8-full) | $(value loss fp8-ranks)" \
        within 1e-6 "$(value loss fp8-full | cut -d ' ' -f 1)" \
        "$(value loss fp8-ranks | cut -d ' ' -f 1)"
    run 0 "${options[@]}" -x 1 --precision fp8 --lora-r 3 -o fp8-r3
    check "first loss in fp8 with --lora-r 3" within 1e-6 "$(value loss fp8-r3)" \
        "$(value loss fp8-full | cut -d ' ' -f 1)"
    run 0 "${given[@]}" --precision fp8 -j text.txt --eval --val-steps 1 -o fp8-eval
}

# A run that is interrupted, or whose disk is full, goes on to the same adapter, and so does one
# with other threads.
test_resume() {
    local options=("${small[@]}" -n 2 -x 30) out
    OMP_NUM_THREADS=3 run 0 "${options[@]}" -o whole
    start "${options[@]}" -o cut
    until_true lines cut/training.jsonl 3
    kill -INT "$pid"
    finish 130
    check "interrupted too late" [ "$(wc -l < cut/training.jsonl)" -lt 30 ]
    refused 'seq' --cpu -t 16 -o cut --resume

    cp -r cut full                      # files end at 100 KiB there: the save fails
    ( trap '' XFSZ; ulimit -f 100; exec "$train" "${options[@]}" -o full --resume > log 2>&1 )
    check "a failed save goes unnoticed" [ $? != 0 ]
    check "a failed save prints not one error" same "$(grep -c '^error' log)" 1
    check "a failed save leaves something" same "$(echo full/*tmp*)" 'full/*tmp*'
    for out in cut full; do
        run 0 "${options[@]}" -o $out --resume
        equal_runs "resumed in $out" whole $out
    done
}

# A run may go on in another folder, where it begins logs of its own and leaves an earlier run's
# alone; what a user has copied stays; --eval looks with the run's settings.
test_resume_elsewhere() {
    local options=("${small[@]}" -n 2 -x 6 -v 2 --val-steps 1) lines
    run 0 "${options[@]}" --keep 2 -o here
    run 0 "${small[@]}" -x 3 -o other
    cp -r here/checkpoint-000004 here/checkpoint-000004.best
    cp -r here/checkpoint-000004 here/checkpoint-000004-good
    run 0 "${options[@]}" --resume here/checkpoint-000004 -o new/place
    check "in a new folder: not steps 5 and 6" same "$(value step new/place)" "5 6"
    check "in a new folder: other adapter" cmp {here,new/place}/adapter/adapter_model.safetensors
    lines=$(md5sum < other/training.jsonl)
    run 0 "${options[@]}" --resume here/checkpoint-000004 -o other
    check "an earlier run's log changed" same "$lines" "$(md5sum < other/previous-1/training.jsonl)"
    echo checkpoint-000004 > here/latest
    run 0 "${options[@]}" --resume -o here --keep 1
    check "validations are logged twice, or lost" same "0 2 4 6" \
        "$(sed -nE 's/^.*"step": ([0-9]+),.*/\1/p' here/validation.jsonl | xargs)"
    check "logs were not gone on with" same "$(value step here)" "1 2 3 4 5 6"
    check "kept: $(cd here && echo checkpoint*)" same "$(cd here && echo checkpoint*)" \
        "checkpoint-000004-good checkpoint-000004.best checkpoint-000006"
    run 0 "${options[@]}" --keep 1 --resume here/checkpoint-000006 -o new/place -l 1e-4
    check "a new --lr is not said" grep -q '^plan   --lr 3e-3 -> 1e-4' log
    for lines in '"step": 9' '"step": -1' '"moments": 7' '"moments": 2147483647' '"step": 1e300'; do
        rm -rf edited && mkdir edited && cp -r here/checkpoint-000006 edited/
        sed -i "s/${lines% *} [0-9]*/$lines/" edited/checkpoint-000006/state.json
        refused 'state.json: step .* of a run of 6 steps' --cpu --resume edited/checkpoint-000006
    done
    sed -i '/"sample-len"/d' edited/checkpoint-000006/state.json
    refused '000006/state.json: the key sample-len' --cpu --resume edited/checkpoint-000006
    refused 'resume.*no folder' "${small[@]}" --resume= -o here
    refused 'init-adapter.*no folder' "${small[@]}" --init-adapter '' -o here
    refused 'bench' --cpu --resume -o here --bench 3
    run 0 "${given[@]}" --random-base --resume here --eval -t 64 -d 0
    run 0 --cpu --resume here --eval -i text.txt
    check "--eval forgets the run's -t" grep -qE '^\| seq +\| 32 ' log
}

# kill -9 while a checkpoint is being written: its temporary is still there, and harms no one.
test_killed_save() {
    local options=("${small[@]}" -n 1 -x 30 -o killed) try
    for try in 1 2 3 4 5; do
        rm -rf killed
        start "${options[@]}"
        until_true lines killed/training.jsonl 2
        until_true compgen -G 'killed/*tmp*' > /dev/null
        kill -KILL "$pid" 2> /dev/null
        { wait "$pid"; } 2> /dev/null
        if compgen -G 'killed/*tmp*' > /dev/null; then break; fi
    done
    if [ "$(echo killed/*tmp*)" = 'killed/*tmp*' ]; then
        skip "no save was hit by kill -9 in $try tries"
        return
    fi
    check "latest names no checkpoint" [ -f "killed/$(cat killed/latest)/state.json" ]
    run 0 "${options[@]}" --resume
    equal_runs "killed while saving, resumed" whole killed
    check "the temporary is still there" same "$(echo killed/*tmp*)" 'killed/*tmp*'
}

# Muon, with either method: the second half of a run is the same after --resume, and the checkpoint
# knows which optimizer it is of.
test_resume_muon() {
    local options=("${small[@]}" --optimizer muon --ns standard --ranks 2 -n 3)
    run 0 "${options[@]}" -x 6 -o muon
    check "no ledger" grep -qE '^plan +muon .*1 moment \|.*\(standard\) a step' log
    cp -r muon muon2 && rm -r muon2/checkpoint-000006 && echo checkpoint-000003 > muon2/latest
    run 0 "${small[@]}" --ranks 2 -n 3 -o muon2 --resume
    equal_runs "muon, resumed" muon muon2
    check "a second moment is stored" [ "$(grep -c 'weight\.v"' \
        muon/checkpoint-000003/optimizer.safetensors)" = 0 ]
    refused 'optimizer adamw, but .* has muon' "${small[@]}" -o muon --resume --optimizer adamw
    refused 'ns gram, but .* has standard' "${small[@]}" -o muon --resume --ns gram
    run 0 "${small[@]}" --optimizer muon --ranks 2 -x 6 -o gram
    check "--ns does nothing" [ "$(value loss gram)" != "$(value loss muon)" ]
}

# close_runs N OUT OUT: the first N of ten losses agree, the first within 1e-6 and all within 1e-5.
close_runs() {
    echo "$1 $(value loss "$2") $(value loss "$3")" | awk '{
        for (i = 1; i <= $1; i++) {
            d = ($(1 + i) - $(11 + i)) / $(1 + i)
            if (d < 0) { d = -d }
            if (!(d <= (i == 1 ? 1e-6 : 1e-5))) { exit 1 }
        }
        exit NF != 21 }'
}

# 37 rows of 32 tokens in steps of 4: ten steps, and in the last one all ranks but one are empty.
# Ranks change the order of sums. With activations in fp32 ten losses agree. In bf16 the last bits
# of the adapters soon round one activation the other way, and a token meets another expert.
test_ranks() {
    local ranks steps
    for steps in 1 10; do
        if [ $steps = 10 ]; then
            train=$root/build/train_float
            if [ ! -x "$train" ]; then skip "ten steps on 1, 2, 4 ranks: no $train"; break; fi
        fi
        for ranks in 1 2 4; do
            run 0 "${small[@]}" -l 1e-3 -u 2 -i text.txt --epochs 1 --ranks $ranks -o ranks$ranks
            check "not ten steps, the last of one row" awk '{ exit !($10 <= 32 && NF == 10) }' \
                <(value num_tokens_per_step ranks$ranks)
            check "$steps steps of 1 and $ranks ranks: $(value loss ranks1) | $(value loss \
                ranks$ranks)" close_runs $steps ranks1 ranks$ranks
        done
    done
    train=$root/train
}

# moments FOLDER: the numbers of its newest checkpoint's optimizer, one per line.
moments() {
    local file
    file=$1/$(cat "$1/latest")/optimizer.safetensors
    od -An -v -tf4 -w4 -j $((8 + $(header_size "$file"))) "$file"
}

# same_gradients A B N: in every 1,024 of two runs' moments (a factor or a part of one, an expert's
# too) they agree within 1e-5, or are zero in both; between N and 329 of the 330 are not.
same_gradients() {
    paste "$1" "$2" | awk -v least="$3" '
        { d += ($1 - $2) ^ 2; s += $1 ^ 2 }
        NR % 1024 == 0 {
            used += s > 0
            bad += !(d <= 1e-10 * s)
            if (d > worst * s && s > 0) { worst = d / s }
            d = s = 0 }
        END { printf "%d of %d differ, %d have a gradient, worst %.1e\n", bad, NR / 1024, used,
                  sqrt(worst)
              exit !(NR == 337920 && used >= least && used < 330 && bad == 0) }' >> log
}

# G1 to G6, G9, G12: a step as ranks x micro-batches x rows of each, on any number of expert groups.
# The moment after one step of Muon is 0.05 times the gradient, unclipped (Muon itself would hide a
# wrong scale). Eight equal rows; and seven of 3 to 64 tokens, so that ranks run empty, of two
# letters, so that experts do. Ten steps of the equal rows: losses within 2e-4; of Muon, whose steps
# do not shrink with the gradient, in three of the six.
test_splits() {
    local ranks rows ep split letters options one ten norm optimizer
    train=$root/build/train_float
    if [ ! -x "$train" ]; then skip "splits of a step: no $train"; train=$root/train; return; fi
    options=(--cpu --random-base -v 0 -s 0 --clip 0 -l 1e-3 -u 0)
    run 0 "${options[@]}" -i text.txt -t 16 -d 128 -b 8 -x 3 -n 0 -o start  # B is not zero any more
    for letters in 1 62 30 9 45 14 22; do
        awk -v n=$letters 'BEGIN { while (n--) { printf "%c", 97 + n * n % 2 } }' > part$letters.txt
    done
    one=("${options[@]}" --init-adapter start/adapter --optimizer muon -n 1 -o one)
    for split in '1 8' '1 1' '2 1' '4 1' '8 1' '2 2'; do
        read -r ranks rows <<< "$split"
        run 0 "${one[@]}" -x 1 -i text.txt -t 16 -d 128 --ranks "$ranks" -b "$rows"
        moments one > now
        if [ "$split" = '1 8' ]; then mv now equal; else
            check "the gradient of $split" same_gradients equal now 300; fi
        for optimizer in adamw muon; do
            if [ $optimizer = muon ] && ! [[ $split =~ ^(1 8|8 1|2 2)$ ]]; then continue; fi
            run 0 "${options[@]}" --init-adapter start/adapter --optimizer $optimizer -x 10 -n 0 \
                -i text.txt -t 16 -d 128 --ranks "$ranks" -b "$rows" -o ten
            ten=$(value loss ten)
            if [ "$split" = '1 8' ]; then echo "$ten" > $optimizer.ten; fi
            check "ten losses of $split, $optimizer: $ten, not $(cat $optimizer.ten)" awk '{
                for (i = 1; i <= 10; i++) { d = $i - $(10 + i); bad += !(d <= 2e-4 && d >= -2e-4) }
                exit !(NF == 20 && bad == 0) }' <(echo "$ten $(cat $optimizer.ten)")
        done
    done
    for split in '1 8 1' '1 1 1' '4 1 2' '8 1 1'; do
        read -r ranks rows ep <<< "$split"
        run 0 "${one[@]}" --epochs 1 -i 'part*.txt' --pack off -t 64 -d 512 --ranks "$ranks" \
            -b "$rows" --ep "$ep"
        check "not the tokens of the seven rows" same "$(value num_tokens_per_step one)" 197
        moments one > now
        if [ "$split" = '1 8 1' ]; then mv now uneven; norm=$(value grad_norm one); continue; fi
        check "the gradient of $split, uneven rows" same_gradients uneven now 200
        check "the norm of $split: $(value grad_norm one), not $norm" awk '{ d = $1 / $2 - 1
            exit !(NF == 2 && d <= 1e-5 && d >= -1e-5) }' <(echo "$(value grad_norm one) $norm")
    done
    train=$root/train
}

# What is written with one seed and one text: after 30 steps on one row, it. A sample goes on from
# the prompt, with so many tokens, as the text does.
test_sample() {
    awk 'BEGIN { while (n++ < 31) { printf "%c", 97 + n * 7 % 26 } }' > row.txt
    run 0 "${small[@]}" -i row.txt -d 32 -x 30 --overfit -l 1e-2 -u 2 -s 30 -g 12 \
        --prompt "$(head -c 9 row.txt)" -o sample
    check "a sample of what is known by heart: $(grep -A 2 'at step 30' log | tail -n 1)" same \
        "$(grep -A 2 '^sample at step 30' log | tail -n 1)" "$(head -c 21 row.txt)"
    # A prompt can be a row of data: what stands before an answer is what chat.jsonl would have.
    run 0 "${small[@]}" -x 1 -s 1 -g 1 -o chat --prompt \
        '{"messages": [{"role": "user", "content": "Hi"}], "system": "Be brief."}'
    check "a chat prompt: $(grep -A 2 '^sample at step 0' log | tail -n 1)" grep -q \
        '^Be brief.<｜User｜>Hi<｜Assistant｜></think>' log
    refused 'this row is complete HINT' "${small[@]}" -x 1 -s 1 --prompt '{"text": "a"}'
    refused 'error  .*--prompt: not valid JSON' "${small[@]}" -x 1 -s 1 --prompt '{"text"'
    check "base loss is not the first step's" same \
        "$(sed -nE 's/^base +loss ([^ ]+) .*/\1/p' log)" \
        "$(sed -nE 's/^step +1\/.* loss ([^ ]+) .*/\1/p' log)"
}

# A second run in the same folder is refused, and the first goes on.
test_lock() {
    start "${small[@]}" -x 100000 -o busy
    until_true lines busy/training.jsonl 2
    refused 'another run is writing to busy' "${small[@]}" -x 1 -o busy
    check "the logs of a running run were moved" [ ! -e busy/previous-1 ]
    kill -INT "$pid"
    finish 130
}

# --timeout: a rank that stands still ends the run, within that time, with one line; none is left.
test_stopped_rank() {
    local ranks
    if [ ! -r /proc/self/stat ]; then skip "stopped rank: no /proc"; return; fi
    start "${small[@]}" -x 100000 --ranks 2 --timeout 5 -o stopped
    until_true lines stopped/training.jsonl 2
    read -r -a ranks <<< "$(children "$pid" | xargs)"
    kill -STOP "${ranks[1]}"
    finish 4
    check "the line does not name the rank" grep -qE '^error.*waited 5 s for rank 1 ' log
    check "not one error line" same "$(grep -c '^error' log)" 1
    check "a rank lives on" same "$(ls -d "${ranks[@]/#//proc/}" 2> /dev/null)" ""
    kill -KILL -- "-$pid" 2> /dev/null
}

# The lines of --bench add up to the step, and shares to 100 %.
test_bench() {
    run 0 "${small[@]}" --bench 3
    check "--bench: its lines do not add up" awk '/^bench/ && $(NF - 2) == "ms" {
            if ($2 == "step") { step = $(NF - 3); share = $(NF - 1) }
            else { sum += $(NF - 3); shares += $(NF - 1); n++ } }
        END { off = sum - step
            exit !(n == 13 && off < 0.2 && off > -0.2 && share == 100 && shares > 99 \
                   && shares < 101) }' log
    # x and dy are cast once per layer; without x8, which full does not keep, x is cast again.
    local recompute
    for recompute in none moe full; do
        run 0 "${small[@]}" --bench 1 --precision fp8 --recompute $recompute
        check "--bench, fp8, $recompute: casts per layer" same \
            "$(sed -nE 's/^bench  fp8 casts .*% \| //p' log)" \
            "$([ $recompute = full ] && echo 3.0 || echo 2.0) per layer and micro-batch"
    done
    # On the CPU nothing is hidden. For a sum each of 2 ranks sends half of the numbers, and then
    # the sums of the other half: 4 bytes for each number.
    run 0 "${small[@]}" --bench 1 --ranks 2
    check "--bench: collectives" same "dense gradients moe dx moe dy moe x moe x again moe y" \
        "$(sed -nE 's/^bench  (.*[a-z]) +[0-9]+ calls .* 0.0 % hidden$/\1/p' log | sort | xargs)"
    check "--bench: bytes of the gradients' sum" same \
        "$(sed -nE 's/^bench  dense gradients +1 calls +([0-9.]+) MB .*/\1/p' log)" \
        "$(awk '/numbers on all ranks/ { printf "%.3f", 4e-6 * $5 }' log)"
}

# The plan of the disk is what then lies there: one checkpoint more than are kept, and the adapter.
# A disk that is too small for it is said before anything is loaded.
test_plan_disk() {
    local plan
    run 0 "${small[@]}" -x 3 -n 1 --keep 2 -o disk
    plan=$(sed -nE 's/^plan +disk +([0-9.]+) MiB for 2 \+ 1 check.*/\1/p' log)
    check "$plan MiB of disk for 2 + 1 checkpoints" awk -v plan="$plan" '
        { there = $1 / 1048576; exit !(plan > there - 0.1 && plan < 1.1 * there) }' <(
        cat disk/checkpoint-000003/* disk/checkpoint-000003/* disk/checkpoint-000002/* \
            disk/adapter/* | wc -c)
    run 0 "${small[@]}" -x 3 -n 4 -o disk2 --dry-run
    check "disk for checkpoints that are never due" grep -q '^plan   disk .* for 0 + 1 check' log
    mkdir -p little
    if ! mount -t tmpfs -o size=1m tmpfs little 2> /dev/null; then
        skip "a disk that is too small: mounting one needs root"
        return
    fi
    run 2 "${small[@]}" -x 3 -n 1 -o little/out --dry-run
    check "no word of the disk" grep -q '^error.*disk space are needed.*HINT: --keep 1' log
    umount little
}

# Ctrl-C in a terminal reaches every process of the group.
test_resume_ranks() {
    run 0 "${small[@]}" -x 30 --ranks 2 -o whole2
    start "${small[@]}" -x 30 --ranks 2 -o cut2
    until_true lines cut2/training.jsonl 3
    kill -INT -- "-$pid"
    finish 130
    run 0 "${small[@]}" -x 30 --ranks 2 -o cut2 --resume
    equal_runs "2 ranks, interrupted and resumed" whole2 cut2
}

test_killed_rank() {
    local ranks
    if [ ! -r /proc/self/stat ]; then skip "killed rank: no /proc"; return; fi
    start "${small[@]}" -x 1000 --ranks 2 -o dead
    until_true lines dead/training.jsonl 2
    read -r -a ranks <<< "$(children "$pid" | xargs)"
    check "not two ranks: ${ranks[*]}" same ${#ranks[@]} 2
    kill -KILL "${ranks[1]}"
    finish 137
    check "a rank lives on" same "$(ls -d "${ranks[@]/#//proc/}" 2> /dev/null)" ""
    kill -KILL -- "-$pid" 2> /dev/null
}

# What the first command of the README promises: the built-in model has read English, and adapts to
# source code. The validation loss falls by a quarter and by 0.7.
test_adapts() {
    local word
    run 0 --cpu -o adapts
    check "the validation loss does not fall by a quarter and 0.7: $(cat adapts/validation.jsonl)" \
        awk -F 'val_loss": ' 'NR == 1 { first = $2 + 0 } { last = $2 + 0 }
        END { exit !(NR > 2 && first < 5.5 && last < 0.75 * first && last < first - 0.7) }' \
        adapts/validation.jsonl
    check "not two samples" same 2 "$(grep -c '^sample at step' log)"
}

# Conversations train the same way. Green is what is learnt.
test_chat() {
    local why='{"messages": [{"role": "user", "content": "Why?"}'
    why+=', {"role": "assistant", "content": "Because."}]}'
    printf '%s\n' "$why" '{"prompt": "1+1=", "completion": "2"}' 'broken' > chat.jsonl
    refused 'chat.jsonl:3' "${given[@]}" -i chat.jsonl
    run 0 "${given[@]}" -i chat.jsonl --skip-bad-rows --show-data 1 --no-shuffle
    check "--show-data: $(cat log)" grep -qF "$(printf '</think>\033[32mBecause.<')" log
    check "no count of dropped rows" grep -q '1 bad row' log
    check "no name of a dropped row" grep -q 'chat.jsonl:3 is left out: not valid JSON' log
    run 0 "${given[@]}" -i chat.jsonl --skip-bad-rows -x 2 -o chat
    check "chat: labels" same "$(value num_label_tokens chat)" "44 44"

    # Two answers, of 8 and 3 bytes and EOS each. All: every token but the first.
    local row='{"messages": [{"role": "user", "content": "Why?"}, ' on want
    row+='{"role": "assistant", "content": "Because."}, {"role": "user", "content": "So?"}, '
    echo "$row"'{"role": "assistant", "content": "Yes"}]}' > two.jsonl
    for on in assistant last completion all; do
        run 0 "${given[@]}" -t 128 -i two.jsonl --loss-on $on --dry-run
        want=$(sed -nE 's/^data   train 1 document, ([0-9]+) tokens.*/\1/p' log)
        case $on in assistant) want=13 ;; all) want=$((want - 1)) ;; *) want=4 ;; esac
        check "--loss-on $on: $(grep ^data log)" grep -q "^data .* tokens, $want labels" log
    done
}

# The programs beside the trainer, built and called as the README says.
test_tools() {
    local tool build=$root/build
    for tool in prep merge plot; do
        ( cd "$root" && eval "$(grep -E "^    cc .*-D${tool^^}_MAIN " README.md)" ) > log 2>&1
        check "the README does not build $tool" [ -x "$build/$tool" ]
    done
    printf '%s\n' '{"prompt": "Hi", "completion": "Hello."}' \
        '{"instruction": "Why?", "output": "Because."}' > rows.jsonl
    train=$build/prep run 0 "$root/dev/data/tiny" rows.jsonl rows.bin
    check "prep does not count" grep -q '^data   rows.bin: 2 documents, 27 tokens, 16 labels' log
    train=$build/prep refused "'assistent'.*completion" "$root/dev/data/tiny" rows.jsonl no.bin \
        assistent
    printf '\xef\xbb\xbf%s\n' '{"prompt": "Hi", "completion": "Hello."}' '{"prompt": 1}' > bad.jsonl
    train=$build/prep refused 'bad.jsonl:2: .*skip' "$root/dev/data/tiny" bad.jsonl no.bin all
    check "prep has written a file" [ ! -e no.bin ]
    train=$build/prep run 0 "$root/dev/data/tiny" bad.jsonl good.bin all skip
    check "prep skips" grep -q '^data   good.bin: 1 document.* left out: 1 bad row' log
    train=$build/prep refused 'good.bin would be its own input' "$root/dev/data/tiny" '*.bin' \
        good.bin
    check "prep empties what it reads" [ -s good.bin ]
    run 0 "${given[@]}" -i rows.jsonl -x 3 -l 1e-2 -u 0 -o jsonl
    run 0 "${given[@]}" -i rows.bin -x 3 -l 1e-2 -u 0 -o bin
    equal_runs "rows and their .bin" jsonl bin

    train=$build/merge run 0 names hf jsonl/adapter renamed
    check "no names of transformers" grep -q 'mlp.experts.base_layer.lora_A' renamed/*.safetensors
    train=$build/merge run 0 names vllm renamed back
    check "other names and back: config" cmp {jsonl/adapter,back}/adapter_config.json
    check "other names and back" cmp {jsonl/adapter,back}/adapter_model.safetensors
    train=$build/merge run 0 bf16 "$root/dev/data/tiny" jsonl/adapter merged
    check "no warning" grep -q '^merge  WARNING' log
    check "no merged checkpoint" [ -f merged/model-00001-of-00001.safetensors ]
    train=$build/merge refused 'merged is there already' names vllm jsonl/adapter merged/
    run 0 "${given[@]}" -l 0 -x 1 -o idle
    train=$build/merge refused 'adds nothing' bf16 "$root/dev/data/tiny" idle/adapter merged2
    train=$build/merge refused 'usage' names peft jsonl/adapter renamed2

    train=$build/plot run 0 jsonl bin
    check "no curves of two runs" same "$(head -c 4 loss.png | tail -c 3)" PNG
    "$build/plot" --csv bin > steps.csv
    check "the table" same "$(value loss bin)" "$(tail -n +2 steps.csv | cut -d , -f 4 | xargs)"
    check "the table's mfu, null on the CPU" grep -qE '^3,[0-9]+,2[^,]*Z(,[^,]+){6},(,[0-9]+){2}$' \
        steps.csv
    mv bin out
    check "--csv alone is not that of out" cmp steps.csv <("$build/plot" --csv)
    train=$build/plot refused '1 run at most' --csv jsonl out
}

# --inspect and --dry-run refuse what loading refuses, in the same words and on every rank, and read
# no weights. config.json alone is enough for both, as long as nothing else has begun to arrive.
test_inspect() {
    local tiny=$root/dev/data/tiny shard=model-00001-of-00001.safetensors
    local index=model.safetensors.index.json mib mode words word line header
    mib=$(sed -nE 's/^"total_size": ([0-9]+)$/\1/p' "$tiny/$index" | awk '{
        printf "%.1f", $1 / 1048576 }')
    run 0 --cpu --inspect
    check "--inspect: not 417 tensors, each with its file" \
        same 417 "$(grep -cE "^[a-z0-9_.]+ +[A-Z0-9_]+ \[[0-9,]+\]( fp4)? +$shard\$" log)"
    check "--inspect: an expert" grep -qE '^layers.4.ffn.experts.7.w2.weight +I8 \[128,64\] fp4' log
    check "--inspect: no sum of $mib MiB" grep -qxE "done   417 tensors of $mib MiB in 1 shard of $(
        ).*/dev/data/tiny" log
    run 0 "${given[@]}" -i text.txt -x 1 -o loads
    check "no speed of loading" grep -qE '^load +0.00 of 0.00 GB \| [0-9.]+ s \| [0-9.]+ GB/s$' log
    check "loading prints no scales" grep -qE '^scales layers.0.ffn.experts.0.w3.weight .*[0-9]' log

    mkdir lone
    cp "$tiny/config.json" lone
    for word in index shard tensor type short blind; do cp -r "$tiny" no-$word; done
    rm no-index/$index no-shard/$shard
    sed -i '/layers.3.attn.wkv.scale/d' no-tensor/$index
    LC_ALL=C sed -i 's/\("layers.0.attn.wkv.weight":{"dtype":"F8_E\)4M3/\15M2/' no-type/$shard
    truncate -s -1 no-short/$shard
    header=$((8 + $(header_size "$tiny/$shard")))
    { head -c $header "$tiny/$shard"; tail -c +$((header + 1)) "$tiny/$shard" |
        tr '\0-\376' '\377'; } > no-blind/$shard
    sed -i 's/^"weight_map": {/&"mtp.0.a": "gone", "mtp.1.b": "gone",/' no-blind/$index
    for word in "index:$index: No such file" "shard:$shard: No such file" \
        'tensor:layers.3.attn.wkv.scale is missing' 'short:is truncated' \
        'type:layers.0.attn.wkv.weight is F8_E5M2 .*expected F8_E4M3'; do
        line=no-${word%%:*}
        refused "${word#*:}" "${given[@]}" -m "$line" -i text.txt -x 1 -o loads
        sed 's/rank .:/rank/' err > loading
        for mode in --inspect --dry-run '--inspect --ranks 2' '--dry-run --ranks 2'; do
            read -r -a words <<< "$mode"
            refused "${word#*:}" --cpu -m "$line" "${words[@]}"
            check "$line: loading says $(cat loading)" cmp -s <(sed 's/rank .:/rank/' err) loading
            run 0 --cpu --random-base -m "$line" "${words[@]}"
        done
    done
    refused 'e8m0 byte 255' "${given[@]}" -m no-blind -i text.txt -x 1 -o loads
    for mode in --inspect --dry-run; do
        run 0 --cpu -m no-blind $mode
        check "$mode: $(tail -n 1 log)" grep -q '^done .*of no-blind | not used: 2 of mtp' log
        run 0 --cpu -m lone $mode
        check "$mode: $(tail -n 1 log)" grep -q '^done   417 .* config.json alone: lone has no' log
    done
}

# A checkpoint in the released layout, written by the oracle: the same bytes as --random-base draws.
test_checkpoint() {
    if ! python3 -c 'import numpy, torch' 2> /dev/null; then
        skip "-m: no python3 with numpy and torch to write a checkpoint"
        return
    fi
    python3 "$root/dev/ref/write_checkpoint.py" model --seed 5 --mtp > log 2>&1
    run 0 "${given[@]}" -m model -i text.txt -x 3 --seed 5 -o loaded
    check "no load line" grep -q '^load' log
    run 0 "${small[@]}" -m model -i text.txt -x 3 --seed 5 -o drawn
    equal_runs "loaded and drawn" loaded drawn
    run 0 "${given[@]}" -m model -i text.txt -x 3 --seed 5 -o loaded2 --ranks 2
    check "1 and 2 ranks from a checkpoint" same "$(value loss loaded | cut -d ' ' -f 1)" \
        "$(value loss loaded2 | cut -d ' ' -f 1)"
    run 0 -m model --inspect
    check "--inspect: $(tail -n 1 log)" grep -qE '^done .* shards of model . not used: [1-9]' log
    rm -r model/*00002-of*
    refused '00002-of' "${given[@]}" -m model -i text.txt -x 3
}

# One document of 36.5 rows of 32 tokens, with BOS and EOS.
awk 'BEGIN { while (n++ < 36 * 32 + 14) { printf "%c", 97 + n * n % 26 } }' > text.txt
test_fresh
test_refused
test_modes
test_plan
test_plan_disk
test_bench
test_offload
test_ranks
test_killed_rank
test_stopped_rank
test_lock
test_sample
if grep -q libjsmn-dev err; then skip "resume: built without libjsmn-dev"; else
    test_check_adapter
    test_resume
    test_resume_elsewhere
    test_killed_save
    test_resume_ranks
    test_resume_muon
    test_splits
    test_adapts
    test_fp8
    test_chat
    test_tools
    test_inspect
fi
test_checkpoint
closing test_cli
