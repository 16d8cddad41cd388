// plan.c: what a run will take, said before anything is allocated: memory by class, and disk. The
// model is allocated twice by the same code, the first time only to be counted, so the plan cannot
// forget anything; what it cannot count (CUDA's context, kernels) is measured, and the first step
// says how far the plan was off. A run that does not fit ends here, with what would make it fit.
// And the operations of a step, by which its speed is judged.
#ifndef TRAIN_C
#include "../train.c"       // compiled alone, this is train.c, which includes it where it is used
#elif !defined(PLAN_C)
#define PLAN_C

// A GPU's memory beside the arenas: CUDA's context and other programs, known when the plan is made,
// and the kernels, which load when they are first used (measured; the first step says if it holds).
#define GPU_KERNELS (0.1 * 1073741824)
static double memory_beside;

// Bytes of the arenas; and what the card says is in use by everyone, where there is one.
static inline double memory_planned(void) {
    double bytes = 0;
    for (int c = 0; c < MEM_CLASSES; c++) { bytes += (double)mem.arena[c].peak; }
    return bytes;
}
static inline double memory_used(void) {
#ifdef USE_CUDA
    size_t used, total;
    if (on_gpu) {
        gpu_memory(&used, &total);
        return (double)used;
    }
#endif
    return memory_planned();
}

// A number from a file of the system; otherwise `none`, if it is not there or is a word.
static inline double system_number(const char *path, const char *format, double none) {
    char line[256];
    double value;
    int found = 0;
    FILE *file = fopen(path, "r");
    while (file && !found && fgets(line, sizeof line, file)) {
        found = sscanf(line, format, &value) == 1;
    }
    if (file) { fclose(file); }
    return found ? value : none;
}

// Bytes of host memory that may still be used here, by all processes; INFINITY where the system
// does not say. A container may have less than the machine, of which files in memory take nothing.
static inline double host_free(void) {
    double machine = 1024 * system_number("/proc/meminfo", "MemAvailable: %lf", INFINITY);
    double container = system_number("/sys/fs/cgroup/memory.max", "%lf", INFINITY);
    return fmin(machine, container - system_number("/sys/fs/cgroup/memory.stat", "anon %lf", 0));
}

// Bytes that this process and its ranks may still use. On GPUs what the fullest of them has left,
// so that all ranks decide alike.
static inline double memory_free(void) {
#ifdef USE_CUDA
    size_t used, total;
    if (on_gpu) {
        gpu_memory(&used, &total);
        double least = -(double)(total - used);
        comm_max_double(COMM_WORLD, &least, 1, "free memory");
        return -least;
    }
#endif
    return host_free();
}

// What the model is asked for, but for what is recomputed. Refuses what there are no kernels for.
static inline ModelOptions plan_options(Trainer *r) {
    const Config *c = &r->config;
    int rows = opt.batch * opt.seq, sample = sample_tokens(r);
    ModelOptions o = { .R = opt.r, .alpha = (float)opt.alpha, .targets = targets_parse(opt.targets),
                       .max_tokens = rows > sample ? rows : sample, .seed = (uint64_t)opt.seed,
                       .training = !opt.eval && !*opt.check_adapter };
    o.offload = o.training ? opt.offload : 0;
    o.fp8 = *opt.precision == 'f';
    if (*opt.optimizer == 'm') { o.muon = *opt.ns == 'g' ? NS_GRAM : NS_STANDARD; }
    refuse_if(o.fp8 && (c->C % FP8_BLOCK || c->F % FP8_BLOCK), "--precision fp8 needs experts of "
              "whole blocks of 128 x 128, not of %d x %d", c->F, c->C);
    refuse_if(ON_GPU && (c->K > 16 || c->V % 4 || c->how.groups > 32 || c->E / comm_ep() > 256 ||
                         (c->D != 128 && c->D != 512) ||
                         (c->index_dim != 128 && c->index_dim != 512)),
              "no kernels for this model: on a GPU num_experts_per_tok is at most 16, n_group at "
              "most 32, vocab_size a multiple of 4, head_dim and index_head_dim are 128 or 512, "
              "and a rank has at most 256 experts HINT: --cpu");
    return o;
}

// --offload, against the host memory of this node. What is needed of that besides: without GPUs
// cpu_need, with them room for the adapters and their moments when they are saved.
static inline void plan_host(const ModelOptions *o, const Config *c, const Adapters *a,
                             double cpu_need) {
    const int ranks = comm.place.locals ? comm.place.locals : opt.ranks;
    const double own = (double)o->offload * o->max_tokens * HC * c->C * sizeof(act);
    const size_t trained = (a->n_dense + a->n_expert) * sizeof(real);
    const double other = ON_GPU ? (a->muon ? 2.0 : 3.0) * (double)trained * ranks : cpu_need;
    const double need = own * ranks + other, available = host_free();
    say("plan   %-11s %s of host memory per rank, the inputs of %d layers; with %s for all else %s "
        "on this node of %s\n", "offload", bytes_text(own), o->offload, bytes_text(other),
        bytes_text(need), bytes_text(available));
    if (need > available) {
        die(EXIT_FIT, "%s of host memory are needed, %s are free HINT: a smaller --offload or -t",
            bytes_text(need), bytes_text(available));
    }
}

// Runs the allocation in counting mode and prints what it needs. Returns the options settled on.
static inline ModelOptions plan_memory(Trainer *r) {
    const Config *c = &r->config;
    ModelOptions o = plan_options(r);
    double need = 0, available = memory_free(), sharing = ON_GPU ? 1 : opt.ranks;
    // As little is computed again as there is room for, with a tenth to spare.
    static const char *const recompute[] = { "none", "moe", "full" };
    int fits = strcmp(opt.recompute, "fits") == 0;
    while (!fits && strcmp(opt.recompute, recompute[o.recompute])) { o.recompute++; }
    for (; ; o.recompute++) {
        mem_count();
        model_alloc(&r->model, &r->config, &o);
        need = (memory_planned() + GPU_KERNELS * ON_GPU) * sharing;
        if (!fits || need < 0.9 * available || o.recompute == RECOMPUTE_FULL) { break; }
    }
    if (opt.inspect || *opt.check_adapter) { return o; }    // they allocate nothing of it
    if (o.offload) { plan_host(&o, c, &r->model.adapters, need); }
    for (int k = 0; k < MEM_CLASSES; k++) {
        say("plan   %-11s %s\n", mem_names[k], bytes_text((double)mem.arena[k].peak));
    }
    if (ON_GPU) {
        memory_beside = memory_used() + GPU_KERNELS;
        say("plan   %-11s %s in use already, %s for kernels that load when first used\n", "context",
            bytes_text(memory_used()), bytes_text(GPU_KERNELS));
    }
    say("plan   %-11s %s per rank, %s on %d rank%s of %s free%s | recompute %s | %s\n", "total",
        bytes_text(memory_planned() + memory_beside), bytes_text(need * (ON_GPU ? opt.ranks : 1)),
        opt.ranks, plural(opt.ranks), bytes_text(available),
        ON_GPU && opt.ranks > 1 ? " on each GPU" : "", recompute[o.recompute],
        need > available ? "too much" : "OK");
    if (need > available) {
        die(EXIT_FIT, "%s of memory are needed, %s are free HINT: %sa smaller -b, -t or --lora-r, "
            "%s", bytes_text(need), bytes_text(available),
            o.recompute == RECOMPUTE_FULL ? "" : "--recompute full, ",
            ON_GPU ? "--offload, or more GPUs" : "fewer --ranks");
    }
    return o;
}

// Is the checkpoint that is gone on with one of OUT? Then its logs are there too.
static inline int is_of_out(const char *checkpoint) {
    struct stat here, out;
    char path[PATH_SIZE];
    return *checkpoint && stat(path_make(path, checkpoint, "/..", ""), &here) == 0 &&
           stat(opt.out, &out) == 0 && here.st_dev == out.st_dev && here.st_ino == out.st_ino;
}

// What the run will write, against the space there is: --keep checkpoints and one that is being
// written, each with its moments, and the final adapter. Those of a run that is gone on with make
// room for the new ones. Without --save-every only an interruption saves. steps: of the run; 0: not
// known.
static inline void plan_disk(const Adapters *a, const char *checkpoint, int steps) {
    double one = (double)training_bytes(a), adapter = one / (a->muon ? 2 : 3);
    int there = is_of_out(checkpoint) ? training_count(opt.out) : 0;
    int most = !opt.save_every ? 0 : steps ? min_int(steps / opt.save_every, opt.keep) : opt.keep;
    int more = most - min_int(there, most);
    double need = one * (more + 1) + adapter;
    char folder[PATH_SIZE];
    path_make(folder, opt.out, "", "");
    while (access(folder, F_OK) != 0) {         // OUT may not exist yet: its nearest ancestor does
        char *slash = strrchr(folder, '/');
        if (slash == NULL) { strcpy(folder, "."); } else { slash[slash == folder] = 0; }
    }
    struct stat info;
    refuse_if(stat(folder, &info) == 0 && !S_ISDIR(info.st_mode), "--out %s: %s is no folder",
              opt.out, folder);
    double available = (double)disk_free(folder);
    say("plan   %-11s %s for %d + 1 checkpoints and the adapter of %s, of %s free in %s\n", "disk",
        bytes_text(need), more, bytes_text(adapter), bytes_text(available), folder);
    if (need > available && comm_rank() < comm_ep()) {      // replicas write nothing
        die(EXIT_FIT, "%s of disk space are needed in %s, %s are free HINT: --keep 1, another -o",
            bytes_text(need), opt.out, bytes_text(available));
    }
}

// Additions and multiplications that a step on these rows takes by its formulas: nothing that is
// only computed again, no gradient of a frozen matrix. Per token 2 for each element of a matrix it
// meets, and 2 for the gradient of the matrix's input, which the indexer has not; 6 for each of an
// adapter; 4 H D for each key it attends to, and twice that backward; and where there are more
// entries than may be chosen, 2 per channel of the indexer's heads for each.
static inline double step_operations(const Model *m, const Rows *rows) {
    const Config *c = &m->config;
    const Adapters *a = &m->adapters;
    double token = 6 * ((double)a->n_dense + (double)a->n_expert * comm_ep() / c->E * c->K);
    double csa = 0, hca = 0, keys = 0, scored = 0;
    for (int i = -1; i < c->layers; i++) {
        for (int k = 0; k < TENSOR_KINDS; k++) {
            const TensorKind *kind = &tensor_kinds[k];
            const int met = kind->where == EXPERT ? c->K : kind->per_input;     // is it a matrix?
            if (i < 0 ? kind->where != GLOBAL : !layer_has(c, i, kind)) { continue; }
            token += (strstr(kind->name, "indexer") ? 2.0 : 4.0) * met *
                     dim_value(c, i, kind->dim[0]) * dim_value(c, i, kind->dim[1]);
        }
        csa += i >= 0 && c->ratio[i] == 4;
        hca += i >= 0 && c->ratio[i] == 128;
    }
    for (int d = 0; d < rows->first[rows->rows]; d++) {
        const int length = rows->piece[d].length;
        for (int t = 1; t <= length; t++) {
            keys += c->layers * (double)min_int(t, c->window) +
                    csa * min_int(t / 4, c->index_topk) + hca * (t / 128);
            scored += length / 4 > c->index_topk ? csa * (t / 4) : 0;
        }
    }
    return token * (double)rows->tokens + 12.0 * c->H * c->D * keys +
           2.0 * c->index_heads * c->index_dim * scored;
}
#endif // PLAN_C
