// engine.c: the receivers: an inference engine that gets its weights from a running trainer.
//
// The trainer's ranks own whole experts and repeat everything else. Receivers hold the same model
// as serving programs do, with tensor parallelism: each of N has 1/N of the heads, of the output
// groups and of every expert's columns, and computes, for all tokens,
//
//     attention   a_n = wo_b[:,n] wo_a[n] heads_n(x)             its groups of heads
//     experts     f_n = sum_k w2_k[:,n] swiglu(gate_k[n] x, up_k[n] x)   its columns of every one
//
// whose sums over n are the sublayers' outputs; all else is computed by everyone alike. They read
// the very bytes that refit.c delivers, in its layout. So a half in the wrong place, a
// scale that did not come or an adapter added twice shows in what they compute. After each refit
// they run the validation rows and compare with the trainer, token by token:
//
//     KL = mean over labels of  q/p - 1 - log(q/p),    p, q: the trainer's, the receivers'
//                                                      probability of the label
//
// which is zero only if all are equal, and whose mean over tokens drawn from p is KL(p || q).
// Source: Schulman 2020, "Approximating KL divergence", k3.
//
// What it refuses to do: keep a cache of keys, run matrices that could not be cut evenly (but for
// the shared expert, which small models have too narrow: it then arrives whole).
//
// Contents
//   1 where the weights lie        3 memory
//   2 forward                      4 a refit, on both sides
#ifndef TRAIN_C
#include "../train.c"       // compiled alone, this is train.c, which includes it where it is used
#elif !defined(ENGINE_C)
#define ENGINE_C

// -------------------------------------------------------------------------------------------------
// 1 Where the weights lie
//
// Two plans: the base, which is sent once, and the adapters, which are sent again and again into
// two buffers that take turns. The model's own struct is used, with fewer heads and groups: most
// matrices have their names and places in it. Not so the experts' first matrices: w13 (E,2F,C) is
// the gates' rows over the ups', which is 2E matrices of F rows, where F is this receiver's share
// of the columns. moe.w1, s1 and e1 lead to them.

typedef struct {
    Refit base, adapters;
    uint8_t *weights;           // (base.bytes); of receivers, like all below
    EngineAdapters sets;
    Model model;
    int F, shared_F;            // columns of the experts and of the shared one, on this receiver
    real *sum;                  // (T*K,C) what is added up over the receivers
    double *losses_h;           // (trainers,T) of one micro-batch: -log p of each token's label
    float *trainer_h;           // (steps,trainers,T) the trainer's, of the last refit
} Engine;

static Engine engine;

// Bytes that a move of r takes on this rank while it lasts. What refit.c's wave_begin will ask for,
// two layers' transfers, of which every other one goes to the same place, and move_broadcast: all
// that is sent whole by one rank, in the first of the two.
static double engine_staging(const Refit *r) {
    size_t most[2] = { 0, 0 }, bytes = 0;
    for (size_t i = 0, at = 1; i < r->n_transfers && r->transfer[i].param < r->bulk; i++) {
        const Transfer *t = &r->transfer[i];
        const int layer = r->param[t->param].layer / r->stage_layers;
        if (i == 0 || layer != r->param[t[-1].param].layer / r->stage_layers) {
            at = !at;
            bytes = 0;
        }
        const int mine = t->from == this_rank || t->to == this_rank;
        if (mine && t->from != t->to) { bytes += staged_bytes(&t->box); }
        if (bytes > most[at]) { most[at] = bytes; }
    }
    for (int root = 0; root < comm_size(COMM_ALL); root++) {
        Region box;
        bytes = 0;
        for (int i = r->bulk; i < r->n; i++) {
            if (root_region(&box, r, &r->param[i], root)) { bytes += staged_bytes(&box); }
        }
        if (bytes > most[0]) { most[0] = bytes; }
    }
    return (double)(most[0] + most[1]);
}

// Collective over all ranks. m: the model or, on a receiver, its lists. ep: of the trainers.
// Returns what a refit takes in passing, on the rank of this kind that needs most.
static double engine_plan(Engine *e, const Model *m, int ep) {
    const int receivers = comm_receivers(), trainers = comm_size(COMM_ALL) - receivers;
    Refit *const both[2] = { &e->base, &e->adapters };
    for (int k = 0; k < 2; k++) {
        *both[k] = (Refit){ .layers = m->config.layers, .stage_layers = 1 };
        both[k]->mesh[SOURCE][0] = (Mesh){ 0, { trainers, 1, 1 } };
        both[k]->mesh[SOURCE][1] = (Mesh){ 0, { trainers / ep, ep, 1 } };
        both[k]->mesh[ENGINE][0] = (Mesh){ trainers, { 1, 1, receivers } };
        both[k]->mesh[ENGINE][1] = both[k]->mesh[ENGINE][0];
    }
    refit_offer_base(&e->base, m->tensors, m->n_tensors, m->config.E);
    refit_offer_adapters(&e->adapters, &m->adapters, m->config.E);
    refit_plan(&e->base);
    refit_plan(&e->adapters);
    for (int i = e->base.bulk; i < e->base.n; i++) {
        const Param *p = &e->base.param[i];
        if (p->rule >= 0 && strstr(p->name, ".shared_experts.") == NULL) {
            refuse("%s for %d receivers: %s HINT: fewer --gen-gpus", p->name, receivers, p->misc);
        }
    }
    double staging = fmax(engine_staging(&e->base), engine_staging(&e->adapters));
    comm_max_double(COMM_WORLD, &staging, 1, "refit: plan");
    return staging;
}

// The place of tensor "layers.<layer>.<module><end>" in memory, NULL if it is not of the plan.
// layer -1: its name is without "layers.".
static uint8_t *engine_find(const Refit *r, uint8_t *memory, int layer, const char *module,
                            const char *end) {
    char name[128], prefix[24] = "";
    if (layer >= 0) { snprintf(prefix, sizeof prefix, "layers.%d.", layer); }
    snprintf(name, sizeof name, "%s%s%s", prefix, module, end);
    for (int i = 0; i < r->n_tensors; i++) {
        if (strcmp(r->tensor[i].name, name) == 0) { return memory + r->tensor[i].at; }
    }
    return NULL;
}

// A matrix of the base, codes and scales.
static void engine_matrix(const uint8_t **codes, const uint8_t **scales, const Engine *e, int layer,
                          const char *module) {
    *codes = engine_find(&e->base, e->weights, layer, module, ".weight");
    *scales = engine_find(&e->base, e->weights, layer, module, ".scale");
    require(*codes && *scales);
}

// Points the shared expert's matrices at what came: gate's rows over up's, or both whole.
static void engine_shared(Engine *e, int i) {
    MoeWeights *w = &e->model.layer[i].moe;
    const size_t F = (size_t)e->F, C = (size_t)e->model.config.C;
    e->shared_F = e->F;
    if (engine_find(&e->base, e->weights, i, "ffn.shared_experts.w2", ".weight")) {
        e->shared_F = e->model.config.F;
        engine_matrix(&w->sh_w1, &w->sh_s1, e, i, "ffn.shared_experts.w1");
        engine_matrix(&w->sh_w2, &w->sh_s2, e, i, "ffn.shared_experts.w2");
        engine_matrix(&w->sh_w3, &w->sh_s3, e, i, "ffn.shared_experts.w3");
        return;
    }
    engine_matrix(&w->sh_w1, &w->sh_s1, e, i, "ffn.shared_experts.gate_up_proj");
    engine_matrix(&w->sh_w2, &w->sh_s2, e, i, "ffn.shared_experts.down_proj");
    w->sh_w3 = w->sh_w1 + F * C;
    w->sh_s3 = w->sh_s1 + (F + FP8_BLOCK - 1) / FP8_BLOCK * ((C + FP8_BLOCK - 1) / FP8_BLOCK);
}

// Points the model at the base, once it has arrived.
static void engine_bind(Engine *e) {
    Model *m = &e->model;
    const Config *c = &m->config;
    for (int k = 0; k < TENSOR_KINDS * (c->layers + 1); k++) {
        const TensorKind *kind = &tensor_kinds[k / (c->layers + 1)];
        const int layer = k % (c->layers + 1) - 1;
        char *place = layer < 0 ? (char *)&m->globals : (char *)&m->layer[layer];
        const int named = kind->where != EXPERT && strstr(kind->name, "shared_experts") == NULL;
        char module[64];
        if (!named || (kind->where == GLOBAL) != (layer < 0) ||
            (layer >= 0 && !layer_has(c, layer, kind))) { continue; }
        if (kind->type == DT_FP8) {
            snprintf(module, sizeof module, "%.*s", (int)strlen(kind->name) - 7, kind->name);
            engine_matrix((const uint8_t **)(place + kind->field),
                          (const uint8_t **)(place + kind->scale), e, layer, module);
            continue;
        }
        void *found = engine_find(&e->base, e->weights, layer, kind->name, "");
        require(found != NULL);
        memcpy(place + kind->field, &found, sizeof found);
    }
    for (int i = 0; i < c->layers; i++) {
        MoeWeights *w = &m->layer[i].moe;
        m->layer[i].sink += comm_rank() * c->H;     // all heads' came
        engine_matrix(&w->w1, &w->s1, e, i, "ffn.experts.w13");
        engine_matrix(&w->w2, &w->s2, e, i, "ffn.experts.w2");
        engine_shared(e, i);
    }
}

// The adapter of a module; NULL pointers where nothing of it is trained.
static Lora engine_lora(const Engine *e, int layer, const char *module) {
    uint8_t *memory = e->sets.memory[e->sets.active];
    return (Lora){ .a = (real *)engine_find(&e->adapters, memory, layer, module, ".lora_A"),
                   .b = (real *)engine_find(&e->adapters, memory, layer, module, ".lora_B") };
}

// Points the model at the adapters that serve now.
static void engine_bind_adapters(Engine *e) {
    const size_t R = (size_t)e->model.options.R, C = (size_t)e->model.config.C;
    for (int i = 0; i < e->model.config.layers; i++) {
        Layer *l = &e->model.layer[i];
        MoeWeights *w = &l->moe;
        l->lq_a = engine_lora(e, i, "attn.wq_a");
        l->lq_b = engine_lora(e, i, "attn.wq_b");
        l->lkv = engine_lora(e, i, "attn.wkv");
        l->lo_b = engine_lora(e, i, "attn.wo_b");
        w->e1 = engine_lora(e, i, "ffn.experts.w13");
        w->e2 = engine_lora(e, i, "ffn.experts.w2");
        if (e->shared_F > e->F) {
            w->l1 = engine_lora(e, i, "ffn.shared_experts.w1");
            w->l2 = engine_lora(e, i, "ffn.shared_experts.w2");
            w->l3 = engine_lora(e, i, "ffn.shared_experts.w3");
            continue;
        }
        w->l1 = w->l3 = engine_lora(e, i, "ffn.shared_experts.gate_up_proj");
        w->l2 = engine_lora(e, i, "ffn.shared_experts.down_proj");
        if (w->l3.a) { w->l3.a += R * C; w->l3.b += (size_t)e->F * R; }
    }
}

// -------------------------------------------------------------------------------------------------
// 2 Forward
//
// model_forward is the trainer's own, with fewer heads. Two products, wo_b and the experts', have
// an input that is cut, and come here (Model.join, Model.experts): each receiver has some of the
// terms. These are added up in fp32, in the order of ranks, and only the sum is rounded, at the
// same places as in the trainer. (Rounding the parts instead, as engines that are after speed do,
// cost a KL of 0.02 on a random base.) All receivers go on with the same bits, so they choose the
// same experts and entries.

// out (T,O) = this receiver's terms of W x + s B (A x), as in lora_forward, but not rounded. type:
// DT_FP4, w and scale are E matrices, or DT_FP8, one. a (E,R,C) and b (E,O,R), or NULL.
static void partial_forward(real *out, real *u, const act *inp, const int *offset, const uint8_t *w,
                            const uint8_t *scale, int type, const real *a, const real *b, float s,
                            int E, int C, int O, int R) {
    GPU(partial_forward_gpu(out, u, inp, offset, w, scale, type, a, b, s, E, C, O, R))
    const Frozen m = { w, scale, type == DT_FP8 ? widen_fp8 : widen_fp4 };
    int count;
    ExpertTile *list = expert_tiles(&count, offset, E, tile_rows(offset[E], C + O));
    #pragma omp parallel for schedule(dynamic)
    for (int i = 0; i < count; i++) {
        size_t e = list[i].expert, row = list[i].row, n = list[i].n;
        real *x = tile_alloc(n * C), *y = out + row * O;
        load_rows(x, inp + row * C, n * C);
        frozen_forward(y, x, m, e * O, (int)n, C, O);
        if (a != NULL) {
            lora_down_forward(u + row * R, x, a + e * R * C, (int)n, C, R);
            lora_up_forward(y, u + row * R, b + e * O * R, s, (int)n, O, R);
        }
        free(x);
    }
    free(list);
}
TWIN(partial_forward)

// out (n) = the sum of all receivers' e->sum, rounded once.
static void engine_sum(act *out, Engine *e, size_t n) {
    comm_sum_real(COMM_WORLD, e->sum, n, "engine");
    narrow(out, e->sum, n);
}

// scratch.h (n,F) = weight silu(gate x) (up x), of the rows (n,C) that the trip has sorted by
// expert: of each expert gate's F rows of w13, then up's.
static void engine_hidden(Engine *e, const MoeWeights *w, const act *rows, const real *weight) {
    const MoeDims *d = &e->model.moe;
    MoeScratch *x = &e->model.moe_scratch;
    const size_t C = (size_t)d->C, F = (size_t)e->F, R = (size_t)d->R;
    for (int k = 0; k < 2 * d->E; k++) {
        const size_t at = (size_t)x->offset[k / 2], matrix = (size_t)k * F;
        const int all[2] = { 0, x->offset[k / 2 + 1] - (int)at };
        act *out = (k % 2 ? x->hidden.v : x->hidden.g) + at * F;
        if (all[1] == 0) { continue; }
        lora_experts_forward(out, x->hidden.u1 + at * R, rows + at * C, all,
                             w->w1 + matrix * C / 2, w->s1 + matrix * C / FP4_BLOCK,
                             w->e1.a ? w->e1.a + (size_t)k * R * C : NULL,
                             w->e1.b ? w->e1.b + matrix * R : NULL, d->lora_scale, 1, d->C, e->F,
                             d->R);
    }
    swiglu_forward(x->h, x->hidden.g, x->hidden.v, weight, d->limit, x->offset[d->E], e->F);
}

// Model.join: a->a (T,C) from a->v, of which this receiver has its groups.
static void engine_join(Model *m, const Layer *l, LayerActs *a) {
    const Config *c = &m->config;
    const int T = m->documents.T, all[2] = { 0, T };
    partial_forward(engine.sum, a->uo_b, a->v, all, l->wo_b, l->so_b, DT_FP8, l->lo_b.a, l->lo_b.b,
                    m->adapters.scale, 1, c->G * c->O, c->C, m->options.R);
    engine_sum(a->a, &engine, (size_t)T * c->C);
}

// Model.experts: the sublayer's output from inp (T,C). A receiver has all experts: no row travels.
static void engine_moe(Model *m, int layer, const act *inp, const int *token) {
    Engine *e = &engine;
    const MoeWeights *w = &m->layer[layer].moe;
    const MoeDims *d = &m->moe;
    MoeSaved *s = &m->saved[layer].moe;
    MoeScratch *x = &m->moe_scratch;
    MoeDims shared = *d;
    comm_note("experts", "refit: validation");      // trainers may be waiting: this one gets on
    act *out = m->saved[layer].f;
    const int C = d->C, R = d->R, T = m->documents.T, all[2] = { 0, T };
    linear_bf16_forward(x->logits, inp, w->gate, T, C, d->E);
    route_forward(s->ids, s->weights, s->logits, x->logits, w->bias, w->tid2eid, token, d->how,
                  d->route_scale, d->norm_topk, T, d->E, d->K);
    trip_begin(x, d, s, T, 0);
    pack_weights(x->home_w, s->weights, s->row_slot, T * d->K);
    for (int round = 0; round < x->rounds; round++) {
        trip_round(x, d, round);
        pack_rows(x->home_x, inp, s->row_slot + x->home_at, x->home_rows, d->K,
                  C * sizeof(act));
        engine_hidden(e, w, x->home_x, x->home_w + x->home_at);
        partial_forward(e->sum, x->u2, x->h, x->offset, w->w2, w->s2, DT_FP4, w->e2.a, w->e2.b,
                        d->lora_scale, d->E, e->F, C, R);
        engine_sum(x->home_y + (size_t)x->home_at * C, e, (size_t)x->home_rows * C);
    }
    shared.F = e->shared_F;
    shared_hidden(&x->hidden, x, inp, w, &shared, T, 0);
    partial_forward(e->sum, x->u2, x->h, all, w->sh_w2, w->sh_s2, DT_FP8, w->l2.a, w->l2.b,
                    d->lora_scale, 1, shared.F, C, R);
    // A shared expert that came whole is computed by all alike: a sum would count it N times.
    if (shared.F == e->F) { engine_sum(out, e, (size_t)T * C); }
    else { narrow(out, e->sum, (size_t)T * C); }
    combine_forward(out, x->home_y, s->slot_row, T, d->K, C);
}

// -------------------------------------------------------------------------------------------------
// 3 Memory
//
// What the plans say, and the activations of a forward pass with this receiver's share of heads.
// The arenas are filled in two passes as the trainer's are, and closed before the first refit:
// however many follow, they take turns in the same bytes.

static void engine_alloc(Engine *e) {
    const Model *m = &e->model;
    e->weights = MEM(uint8_t, MEM_WEIGHTS, e->base.bytes);
    for (int k = 0; k < 2; k++) {
        e->sets.memory[k] = MEM(uint8_t, MEM_ADAPTERS, e->adapters.bytes);
    }
    e->sum = MEM(real, MEM_ACTIVATIONS, (size_t)m->options.max_tokens * m->config.K * m->config.C);
    activations_alloc(&e->model);
}

// Collective over all ranks; trainers call engine_plan. Makes this rank a receiver of the model.
static void engine_open(Engine *e, const Config *c, const ModelOptions *o, int ep) {
    const int receivers = comm_receivers();
    Config *own = &e->model.config;
    mem_count();
    model_alloc(&e->model, c, o);       // the lists only: names and shapes
    const double staging = engine_plan(e, &e->model, ep);
    own->H /= receivers;
    own->G /= receivers;
    e->F = c->F / receivers;
    refuse_if(ON_GPU && e->F % 64, "--gen-gpus %d: kernels take 64 columns of an expert, a rank "
              "would have %d HINT: fewer --gen-gpus", receivers, e->F);
    e->model.join = engine_join;
    e->model.experts = engine_moe;
    mem_count();
    engine_alloc(e);
    if (comm_rank() == 0) {
        printf("plan   %-11s %s of weights, %s twice of adapters, %s to work, %s while weights "
               "travel, on each of %d\n", "receivers", bytes_text((double)e->base.bytes),
               bytes_text((double)e->adapters.bytes), bytes_text((double)
               (mem.arena[MEM_ACTIVATIONS].peak + mem.arena[MEM_SCRATCH].peak)),
               bytes_text(staging), receivers);
        fflush(stdout);
    }
    const double need = (memory_planned() + staging) * (ON_GPU ? 1 : receivers);
    const double available = memory_free();
    if (need > available) {
        die(EXIT_FIT, "%s of memory are needed by receivers, %s are free HINT: more --gen-gpus, a "
            "smaller -t", bytes_text(need), bytes_text(available));
    }
    mem_open();
    engine_alloc(e);
    for (int k = 0; k < 2; k++) { rope_table(e->model.rope[k], own, k, o->max_tokens); }
}

// -------------------------------------------------------------------------------------------------
// 4 A refit, on both sides
//
// The trainer says when: every so many steps, and at the end. It sends the adapters, runs the
// validation rows and sends each label's probability; then it goes on training, while the receivers
// run the same rows. Nothing of this touches what a step reads: a run with receivers leaves the
// same adapter, bit for bit, as one without.

// Adds to sums {KL, receiver's loss, trainer's loss, labels} what the labels of b say. trainer_h
// (T): its -log p.
static void engine_compare(double *sums, const Engine *e, const Batch *b, const float *trainer_h) {
    for (int t = 0; t < b->T; t++) {
        if (b->target[t] < 0) { continue; }
        const double p = (double)trainer_h[t], q = (double)e->model.loss_h[t];
        sums[0] += expm1(p - q) - (p - q);      // log(q/p) = p - q: losses are negative logarithms
        sums[1] += q;
        sums[2] += p;
        sums[3] += 1;
    }
}

// Checks the options, and returns the number of receivers. by_launcher: torchrun or the like.
static int engine_options(const Config *c, int by_launcher) {
    const int n = opt.gen_gpus;
    const int idle = opt.bench || opt.eval || opt.inspect || opt.show_data || *opt.check_adapter;
    if (n == 0) { return 0; }
    refuse_if(idle || by_launcher, "--gen-gpus is for training, with ranks of ./train's own");
    refuse_if(n >= opt.ranks, "--gen-gpus %d leaves none of %d ranks to train HINT: --ranks N", n,
              opt.ranks);
    refuse_if(c->H % n || c->G % n || c->F % n, "--gen-gpus %d does not divide %d heads, %d groups "
              "and %d columns of an expert", n, c->H, c->G, c->F);
    refuse_if((*opt.model || *opt.train) && !*opt.val, "--gen-gpus compares validation rows, and "
              "there are none HINT: -j FILE");
    comm_reserve(n);
    return n;
}

// The trainers and the tokens of one of their micro-batches.
static int engine_trainers(void) { return comm_size(COMM_ALL) - comm_receivers(); }
static size_t engine_tokens(void) { return (size_t)opt.batch * (size_t)opt.seq; }

static void engine_alloc_losses(Engine *e, const Data *val) {
    const size_t n = (size_t)engine_trainers() * engine_tokens();
    const int most = micro_batches((int)val->rows, opt.batch, engine_trainers());
    const size_t steps = (size_t)min_int(opt.val_steps, most);
    e->losses_h = host_calloc(sizeof(double) * n);
    if (comm_is_receiver()) { e->trainer_h = host_calloc(sizeof(float) * n * steps); }
}

// The next rows of all trainers; 0: there are no more.
static int engine_take(Trainer *r) {
    data_take(&r->val, &r->rows, opt.batch * engine_trainers(), 0);
    return r->rows.rows > 0;
}

// Collective over all ranks. What the trainers make of the validation rows reaches the receivers.
static void engine_exchange(Engine *e, Trainer *r) {
    const int trainers = engine_trainers();
    const size_t tokens = engine_tokens(), n = (size_t)trainers * tokens;
    data_seek(&r->val, 0);
    for (int i = 0; i < opt.val_steps && engine_take(r); i++) {
        memset(e->losses_h, 0, sizeof(double) * n);
        if (!comm_is_receiver()) {
            batch_fill(&r->batch, &r->rows, 0, opt.batch, comm_rank(), trainers);
            model_forward(&r->model, &r->batch, 0);
            for (int t = 0; t < r->batch.T; t++) {
                e->losses_h[(size_t)comm_rank() * tokens + (size_t)t] = (double)r->model.loss_h[t];
            }
        }
        // Each place is written by one rank, and zero on the others.
        comm_sum_double(COMM_ALL, e->losses_h, (int)n, "refit: losses");
        for (size_t t = 0; t < n && comm_is_receiver(); t++) {
            e->trainer_h[(size_t)i * n + t] = (float)e->losses_h[t];
        }
    }
}

// Trainers, once the model is loaded: plans, and sends the base. Collective with engine_receive.
static void engine_begin(Trainer *r) {
    if (comm_receivers() == 0) { return; }
    const double staging = engine_plan(&engine, &r->model, comm_ep()), available = memory_free();
    say("plan   %-11s %s more per rank while weights travel\n", "refit", bytes_text(staging));
    if (staging > available) {
        die(EXIT_FIT, "%s of memory are needed while weights travel, %s are free HINT: a smaller "
            "-b or -t, --recompute full, --offload", bytes_text(staging), bytes_text(available));
    }
    engine_alloc_losses(&engine, &r->val);
    refit_move(&engine.base, NULL, REFIT_POINTS);
}

// Trainers: the adapters as they are now go to the receivers. last: they are to end instead.
static void engine_refit(Trainer *r, int last) {
    double order[2] = { comm_rank() == 0 && last, comm_rank() == 0 ? r->step : 0 };
    if (comm_receivers() == 0) { return; }
    comm_sum_double(COMM_ALL, order, 2, "refit: order");
    if (last) { return; }
    refit_adapters(&engine.adapters, &engine.sets);
    engine_exchange(&engine, r);
    fflush(stdout);
}

// Receivers: the whole of their life. Returns the exit code.
static int engine_receive(Trainer *r) {
    Engine *e = &engine;
    const int trainers = engine_trainers(), tokens = (int)engine_tokens(), text = sample_tokens(r);
    const ModelOptions o = { .R = opt.r, .alpha = (float)opt.alpha, .seed = (uint64_t)opt.seed,
                             .targets = targets_parse(opt.targets),
                             .max_tokens = tokens > text ? tokens : text };
    if (opt.dry_run) { return EXIT_OK; }
    comm.timeout_s = 0;         // trainers take their time; if one ends, the supervisor ends us
    catch_stop_signals();       // they decide when to stop
    engine_open(e, &r->config, &o, opt.ep);
    engine_alloc_losses(e, &r->val);
    r->context = (int *)host_alloc((size_t)o.max_tokens * sizeof *r->context);
    r->logits = (float *)host_alloc((size_t)r->config.V * sizeof *r->logits);
    refit_move(&e->base, e->weights, REFIT_POINTS);
    engine_bind(e);
    mem.closed = 1;
    for (;;) {
        double order[2] = { 0, 0 }, sums[4] = { 0 }, began;
        comm_sum_double(COMM_ALL, order, 2, "refit: order");
        if (order[0] > 0) { return EXIT_OK; }
        refit_adapters(&e->adapters, &e->sets);
        engine_bind_adapters(e);
        engine_exchange(e, r);
        began = clock_seconds();
        data_seek(&r->val, 0);
        for (int i = 0; i < opt.val_steps && engine_take(r); i++) {
            for (int k = 0; k < trainers; k++) {
                batch_fill(&r->batch, &r->rows, 0, opt.batch, k, trainers);
                model_forward(&e->model, &r->batch, 0);
                engine_compare(sums, e, &r->batch,
                               e->trainer_h + (size_t)(i * trainers + k) * engine_tokens());
            }
        }
        r->step = (int)order[1];
        if (opt.sample_every) { sample(r, &e->model, "receivers' "); }
        if (comm_rank() > 0) { continue; }
        printf("refit %5.0f | kl %.3e | receiver loss %.6f | trainer loss %.6f | version %d | "
               "%.1f s | mem %s\n", order[1], sums[0] / sums[3], sums[1] / sums[3],
               sums[2] / sums[3], e->sets.version, clock_seconds() - began,
               bytes_text(memory_used()));
        fflush(stdout);
    }
}
#endif // ENGINE_C
