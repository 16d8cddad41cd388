// launchers.h: part 1.4 of the contract in kernels.cu: one prototype per launcher of a kernel,
// grouped by the C file and the part of kernels.cu that hold its two halves; and the functions of
// dev/device.cu.
#ifdef __cplusplus
extern "C" {
#endif
// The device: start, memory, copies
void gpu_count(int *n_h, int *there_h);
void gpu_start(int device, char *name_h, size_t size);
void gpu_alloc(void **p, size_t bytes);
void gpu_free(void *p);
void gpu_workspace(void *base, size_t bytes);
void gpu_zero(void *p, size_t bytes);
void gpu_upload(void *to, const void *from_h, size_t bytes);
void gpu_download(void *to_h, const void *from, size_t bytes);
void gpu_sync(void);
void gpu_memory(size_t *used_h, size_t *total_h);
enum { GPU_MARKS = 4097 + 2048 };   // events that can stand between kernels (dev/phases.c)
void gpu_mark(int i);
void gpu_marks(double *at_h, int first, int n);
void gpu_aside(int step);
void gpu_pin(void *p, size_t bytes, int begins);
void gpu_copy_begin(int place, void *to, const void *from, size_t bytes);
void gpu_copy_end(int place);
// Ranks (moe.c, section 3): which is one of COMM_*
void gpu_make_id(void *id_h);
void gpu_connect(const void *id_h, int rank, int all, int receivers, int ep);
void gpu_waiting(double *seconds_h, char *error_h, size_t size);
void gpu_batch(int begin);
void gpu_sum_real(int which, real *values, size_t n);
void gpu_all_to_all(int which, void *recv, const size_t *recv_bytes_h, const void *send,
                    const size_t *send_bytes_h);
void gpu_trade(void **boxes_h, int which, size_t bytes);
void gpu_broadcast(int which, void *data, size_t bytes, int root);
// Bytes and numbers as they are copied, scaled and drawn (refit.c, train.c)
void copy_boxes_gpu(const BoxCopy *box_h, int n);
void scale_reals_gpu(real *x, double scale, size_t n);
void draw_elements_gpu(void *data, int type, uint64_t key, float mean, double unit, size_t n);
// Numbers and dense products (fp8.c)
void linear_fp8_forward_gpu(act *out, const act *inp, const uint8_t *w, const uint8_t *scale, int T,
                            int C, int O);
void linear_bf16_forward_gpu(real *out, const act *inp, const bf16 *w, int T, int C, int O);
void linear_bf16_backward_gpu(real *dinp, const real *dout, const bf16 *w, int T, int C, int O);
void narrow_gpu(act *out, const real *inp, size_t n);
void swiglu_forward_gpu(act *h, const act *g, const act *v, const real *weight, float limit, int T,
                        int F);
void swiglu_backward_gpu(act *dg, act *dv, real *dweight, const real *dh, const act *g, const act
                         *v, const real *weight, float limit, int T, int F);
void group_output_forward_gpu(act *v, const act *o, const uint8_t *w, const uint8_t *scale, int T,
                              int G, int N, int O);
void group_output_backward_gpu(act *do_, const real *dv, const uint8_t *w, const uint8_t *scale, int
                               T, int G, int N, int O);
void quantize_rows_fp8_gpu(uint8_t *codes, uint8_t *scales, const act *inp, float floor, int T, int
                           C);
void widen_rows_fp8_gpu(act *out, const uint8_t *codes, const uint8_t *scales, int T, int C);
void swiglu_quantize_forward_gpu(uint8_t *codes, uint8_t *scales, const act *gv, const real *weight,
                                 float limit, float floor, int T, int F);
void swiglu_quantize_backward_gpu(uint8_t *dcodes, uint8_t *dscales, real *dweight, const act *dh,
                                  const act *gv, const real *weight, float limit, int T, int F);
// Packed experts (mxfp4.c)
void recast_spread_gpu(int *blocks_h, const uint8_t *w, const uint8_t *scale, int E, int C, int O);
void recast_fp4_gpu(uint8_t *codes, uint8_t *scales, const uint8_t *w, const uint8_t *scale,
                    int turned, int at, int rows, const int *offset, int E, int C, int O);
void experts_fp8_product_gpu(act *out, const uint8_t *inp, const uint8_t *inp_scale, const int
                             *offset, const uint8_t *w, const uint8_t *scale, const real *u, const
                             real *v, int v_by_k, float s, int E, int C, int O, int R);
// Adapters and optimizers (lora.c)
void lora_linear_forward_gpu(act *out, real *u, const act *inp, const uint8_t *w, const uint8_t
                             *scale, const real *a, const real *b, float s, int T, int C, int O, int
                             R);
void lora_linear_backward_gpu(real *dinp, real *da, real *db, const act *dout, const act *inp, const
                              real *u, const uint8_t *w, const uint8_t *scale, const real *a, const
                              real *b, float s, int T, int C, int O, int R);
void lora_experts_forward_gpu(act *out, real *u, const act *inp, const int *offset, const uint8_t
                              *w, const uint8_t *scale, const real *a, const real *b, float s, int
                              E, int C, int O, int R);
void lora_experts_backward_gpu(real *dinp, real *da, real *db, const act *dout, const act *inp,
                               const real *u, const int *offset, const uint8_t *w, const uint8_t
                               *scale, const real *a, const real *b, float s, int E, int C, int O,
                               int R);
void lora_experts_down_gpu(real *u, const act *inp, const int *offset, const real *a, int E, int C,
                           int R);
void partial_forward_gpu(real *out, real *u, const act *inp, const int *offset, const uint8_t *w,
                         const uint8_t *scale, int type, const real *a, const real *b, float s,
                         int E, int C, int O, int R);
void lora_experts_gradients_gpu(real *du, real *da, real *db, const act *dout, const act *inp,
                                const real *u, const int *offset, const real *b, float s, int E,
                                int C, int O, int R);
void lora_stack_gpu(real *stack, real *a1, real *b1, real *a3, real *b3, int add, int E, int C,
                    int F, int R);
void sum_squares_gpu(double *sum_h, const real *x, size_t n);
void adamw_update_gpu(real *p, real *m, real *v, const real *g, size_t n, double grad_scale, double
                      lr, double beta1, double beta2, double eps, double weight_decay, int step);
void muon_update_gpu(real *p, real *m, real *g, const size_t *slices_h, int n, double grad_scale,
                     double lr, double beta, double weight_decay, int restarts);
// Routing, permutation, combine (moe.c)
void route_forward_gpu(int *ids, real *weights, real *logits, const real *all, const float *bias,
                       const int *tid2eid, const int *tokens, Routing how, float scale, int norm,
                       int T, int E, int K);
void route_backward_gpu(real *dinp, const real *dweights, const int *slot_row, const int *ids, const
                        real *weights, const real *logits, const real *all, const bf16 *gate,
                        Routing how, float scale, int norm, int T, int C, int E, int K);
void trip_count_gpu(int *counts, int *index, const int *ids, int slots, int E);
void trip_sort_gpu(int *row_slot, int *slot_row, const int *ids, const int *index, Runs runs, int
                   slots);
void regroup_rows_gpu(void *out, const void *inp, Runs runs, int order, size_t row_bytes);
void pack_rows_gpu(void *home, const void *inp, const int *row_slot, int n, int K,
                   size_t row_bytes);
void pack_weights_gpu(real *home, const real *weights, const int *row_slot, int n);
void combine_forward_gpu(act *out, const act *home_y, const int *slot_row, int T, int K, int C);
void dispatch_backward_gpu(real *dinp, const act *home_dx, const int *slot_row, int T, int K, int
                           C);
// Norms, RoPE, hyper-connections (train.c parts 3 and 4)
void rmsnorm_forward_gpu(act *out, real *rstd, const act *inp, const bf16 *w, float eps, int T, int
                         C);
void rmsnorm_backward_gpu(act *dinp, const real *dout, const act *inp, const real *rstd, const bf16
                          *w, int T, int C);
void embed_forward_gpu(act *X, const bf16 *embed, const int *token, int T, int C);
void rope_apply_gpu(act *x, const real *table, const int *position, int sign, int T, int H, int D,
                    int rope);
void norm_rope_forward_gpu(act *out, real *rstd, const act *inp, const bf16 *w, const real *table,
                           const int *position, float eps, int T, int H, int D, int rope);
void norm_rope_backward_gpu(act *dinp, const act *dout, const act *out, const real *rstd, const real
                            *table, const int *position, int T, int H, int D, int rope);
void key_norm_rope_backward_gpu(act *dinp, const real *dout, const act *inp, const real *rstd, const
                                bf16 *w, const real *table, const int *position, int n, int D, int
                                rope);
void hc_logits_forward_gpu(real *m, real *r, const act *X, const float *fn, float eps, int T, int C,
    int M);
void hc_weights_forward_gpu(real *pre, real *post, real *comb, const real *m, const float *base,
    const float *scale, float eps, int T, int M, int iters);
void hc_enter_forward_gpu(act *x, real *rstd, const act *X, const real *pre, const bf16 *w,
    float eps, int T, int C);
void hc_enter_backward_gpu(act *dX, const real *dx, const real *dpost, const real *dcomb,
    const act *X, const real *m, const real *r, const real *pre, const real *comb, const real *rstd,
    const float *fn, const float *base, const float *scale, const bf16 *w, float eps, int T, int C,
    int M, int iters);
void hc_deal_forward_gpu(act *Y, real *m, real *r, const act *o, const act *X, const real *post,
    const real *comb, const float *fn, float eps, int T, int C, int M);
void hc_deal_backward_gpu(act *do_, real *dpost, real *dcomb, const act *dY, const act *o, const act
    *X, const real *post, int T, int C);
// Compressors and indexer (train.c 5.2 and 5.3)
void pool_forward_gpu(act *out, const real *K, const real *Z, const float *ape, AttentionShape a,
                      const int *entry_position, int D);
void pool_backward_gpu(real *dK, real *dZ, const act *dout, const real *K, const real *Z, const
                       float *ape, AttentionShape a, const int *entry_position, int D);
void indexer_select_gpu(int *selected, const act *q, const act *k, const real *w, AttentionShape a,
                        int heads, int dim);
// Attention (train.c 5.4)
void attention_forward_gpu(act *out, real *lse, const act *q, const act *kv, const act *entries,
                           const float *sink, const int *selected, AttentionShape a);
void attention_delta_gpu(real *delta, const act *dout, const act *out, int T, int H, int D);
void attention_backward_query_gpu(act *dq, const act *dout, const real *delta, const real *lse,
                                  const act *q, const act *kv, const act *entries, const int
                                  *selected, AttentionShape a);
void attention_backward_key_gpu(real *dkv, real *dentries, const act *dout, const real *delta, const
                                real *lse, const act *q, const act *kv, const act *entries, const
                                int *selected, AttentionShape a);
// Head and cross-entropy (train.c part 7)
void head_loss_gpu(real *loss, real *dinp, const act *inp, const bf16 *head, const int *target, int
                   T, int C, int V);
#ifdef __cplusplus
}
#endif
