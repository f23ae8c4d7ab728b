"""The CUDA source of the scorer: what stands between the matrix products, fused.

It is text because the runtime's modules travel in the database as text; NVRTC compiles it for the GPU that is there and
the width of the latent space. It needs no header and no dynamic shared memory, so that the tests can compile the same
text for the CPU (tests/cuda_on_cpu.h). Formulas: docs/model.md.
"""

from __future__ import annotations

# Threads of a block. A warp pools a history; a block ranks the items of a user.
THREADS = 256
# Of a row's items so many can be sorted at the end; so many are the most that a user can be given.
CANDIDATES = 2048
MAX_K = 1024

# The bits of a token's kind: event type, age bucket, order bucket.
TYPE_SHIFT, AGE_SHIFT = 8, 4

KERNELS = (
    "pool_histories",
    "tanh_layer",
    "latent_mean",
    "gate_latent",
    "decode_direction",
    "to_halves",
    "rank_items",
)


def options(width: int) -> tuple[str, ...]:
    """Gives NVRTC's options for a latent space of that width."""
    return (
        "--std=c++14",
        f"-DWIDTH={width}",
        f"-DTHREADS={THREADS}",
        f"-DCANDIDATES={CANDIDATES}",
        f"-DTYPE_SHIFT={TYPE_SHIFT}",
        f"-DAGE_SHIFT={AGE_SHIFT}",
    )


SOURCE = r"""
#define WARPS (THREADS / 32)
#define PER_LANE ((WIDTH + 31) / 32)
#define ALL_LANES 0xffffffffu
#define TINY 1e-12f

typedef unsigned long long ranked;

#ifdef __CUDACC__
static __device__ __forceinline__ unsigned short half_of(float x)
{
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}

static __device__ __forceinline__ float float_of_half(unsigned short bits)
{
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}
#endif

static __device__ __forceinline__ float minus_infinity() { return __uint_as_float(0xff800000u); }

// 1 / (1 + exp(-x)), written with tanh, which does not overflow.
static __device__ __forceinline__ float sigmoid(float x) { return 0.5f * (1.0f + tanhf(0.5f * x)); }

static __device__ __forceinline__ float warp_sum(float x)
{
    for (int lanes = 16; lanes > 0; lanes /= 2)
        x += __shfl_xor_sync(ALL_LANES, x, lanes);
    return x;
}

static __device__ __forceinline__ float warp_max(float x)
{
    for (int lanes = 16; lanes > 0; lanes /= 2)
        x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, lanes));
    return x;
}

// The sum and the maximum over a block, in the same order whichever warp is first: a refresh gives the same again.
static __device__ float block_sum(float x, float* partial)
{
    x = warp_sum(x);
    if (threadIdx.x % 32 == 0)
        partial[threadIdx.x / 32] = x;
    __syncthreads();
    x = 0.0f;
    for (int warp = 0; warp < WARPS; ++warp)
        x += partial[warp];
    __syncthreads();
    return x;
}

static __device__ float block_max(float x, float* partial)
{
    x = warp_max(x);
    if (threadIdx.x % 32 == 0)
        partial[threadIdx.x / 32] = x;
    __syncthreads();
    for (int warp = 0; warp < WARPS; ++warp)
        x = fmaxf(x, partial[warp]);
    __syncthreads();
    return x;
}

// Unsigned numbers in the order of the floats; 0 is what must not be recommended.
static __device__ __forceinline__ unsigned rank_of(float x)
{
    unsigned bits = __float_as_uint(x);
    if (x == minus_infinity())
        return 0;
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

static __device__ __forceinline__ float float_of_rank(unsigned rank)
{
    return __uint_as_float(rank & 0x80000000u ? rank & 0x7fffffffu : ~rank);
}

// Among equal logits the lower column is the greater.
static __device__ __forceinline__ ranked ranked_item(unsigned rank, int column)
{
    return (ranked)rank << 32 | ~(unsigned)column;
}


// Steps 1 and 2: embeds the tokens, gates them, pools them; a warp for each user, one pass over its tokens.
extern "C" __global__ void __launch_bounds__(THREADS) pool_histories(
    int users, const int* token_start, const int* token_item, const int* token_kind, const int* feature_start,
    const int* feature, const float* item_embedding, const float* event_type_embedding, const float* age_embedding,
    const float* order_embedding, const float* user_feature_embedding, const float* gate_weight, const float* gate_bias,
    const float* event_type_gate, const float* age_gate, const float* order_gate, const float* gate_recency,
    float* pooled)
{
    const int user = blockIdx.x * WARPS + threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    if (user >= users)
        return;
    float weight[PER_LANE], sum[PER_LANE], own[PER_LANE];
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
        const int z = lane + 32 * i;
        weight[i] = z < WIDTH ? gate_weight[z] : 0.0f;
        sum[i] = own[i] = 0.0f;
    }
    float squares = 0.0f;
    for (int token = token_start[user]; token < token_start[user + 1]; ++token) {
        const size_t item = token_item[token];
        const int kind = token_kind[token];
        const int type = kind >> TYPE_SHIFT, age = kind >> AGE_SHIFT & 15, order = kind & 15;
        float h[PER_LANE], logit = 0.0f;
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i) {
            const int z = lane + 32 * i;
            h[i] = 0.0f;
            if (z < WIDTH)
                h[i] = item_embedding[item * WIDTH + z] + event_type_embedding[type * WIDTH + z]
                    + age_embedding[age * WIDTH + z] + order_embedding[order * WIDTH + z];
            logit += h[i] * weight[i];
        }
        const float gate = gate_recency[order] * sigmoid(
            warp_sum(logit) + gate_bias[0] + event_type_gate[type] + age_gate[age] + order_gate[order]);
        squares += gate * gate;
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i)
            sum[i] += gate * h[i];
    }
    const int first = feature_start[user], last = feature_start[user + 1];
    for (int f = first; f < last; ++f) {
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i) {
            const int z = lane + 32 * i;
            if (z < WIDTH)
                own[i] += user_feature_embedding[(size_t)feature[f] * WIDTH + z];
        }
    }
    const float norm = fmaxf(sqrtf(squares), TINY), count = last > first ? (float)(last - first) : 1.0f;
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
        const int z = lane + 32 * i;
        if (z < WIDTH)
            pooled[(size_t)user * WIDTH + z] = (sum[i] / norm + own[i] / count) * sqrtf((float)WIDTH);
    }
}


// Between the products of steps 3 and 5. x has `columns` numbers in a row.
extern "C" __global__ void __launch_bounds__(THREADS) tanh_layer(int size, int columns, float* x, const float* bias)
{
    const int i = blockIdx.x * THREADS + threadIdx.x;
    if (i < size)
        x[i] = tanhf(x[i] + bias[i % columns]);
}

extern "C" __global__ void __launch_bounds__(THREADS) latent_mean(
    int size, float* mean, const float* pooled, const float* bias)
{
    const int i = blockIdx.x * THREADS + threadIdx.x;
    if (i < size)
        mean[i] = pooled[i] + mean[i] + bias[i % WIDTH];
}

extern "C" __global__ void __launch_bounds__(THREADS) gate_latent(
    int size, float* gated, const float* z, const float* bias)
{
    const int i = blockIdx.x * THREADS + threadIdx.x;
    if (i < size)
        gated[i] = sigmoid(gated[i] + bias[i % WIDTH]) * z[i];
}

// The end of step 5: r = gated + what the hidden layer adds, and its direction; a warp for each user.
extern "C" __global__ void __launch_bounds__(THREADS) decode_direction(int users, float* direction, const float* gated)
{
    const int user = blockIdx.x * WARPS + threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    if (user >= users)
        return;
    float r[PER_LANE], squares = 0.0f;
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
        const int z = lane + 32 * i;
        const size_t place = (size_t)user * WIDTH + z;
        r[i] = z < WIDTH ? gated[place] + direction[place] : 0.0f;
        squares += r[i] * r[i];
    }
    const float norm = fmaxf(sqrtf(warp_sum(squares)), TINY);
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
        const int z = lane + 32 * i;
        if (z < WIDTH)
            direction[(size_t)user * WIDTH + z] = r[i] / norm;
    }
}


// Rows of floats, times a power of two that keeps small numbers out of FP16's subnormal range, as FP16. With three
// parts x is split into high + low, and a row becomes [high, high, low] or, for the other factor, [high, low, high]:
// their product is high*high + high*low + low*high, all of x*y but low*low.
extern "C" __global__ void __launch_bounds__(THREADS) to_halves(
    int rows, int parts, int low_part, float scale, const float* x, unsigned short* halves)
{
    for (int z = threadIdx.x; z < WIDTH; z += THREADS) {
        for (int row = blockIdx.x; row < rows; row += gridDim.x) {
            const float scaled = scale * x[(size_t)row * WIDTH + z];
            const unsigned short high = half_of(scaled);
            unsigned short* out = halves + (size_t)row * parts * WIDTH + z;
            for (int part = 0; part < parts; ++part)
                out[part * WIDTH] = part == low_part ? half_of(scaled - float_of_half(high)) : high;
        }
    }
}


// Steps 6 and 7 after the product, and the best k: a block for each user, whose row of logits stays in the L2 cache.
//
// Adds bias and shortcut, takes the denominator of the softmax over all items, leaves out what was seen, and writes the
// k best, best first, among equals the lower column; what was left out comes last, with the score -1. `stride` is the
// length of a row, a multiple of 4. A user's seen items are different ones. `counted` and `seen_logit` are scratch, one
// entry per token and per seen item.
extern "C" __global__ void __launch_bounds__(THREADS) rank_items(
    int items, int stride, int k, float* logits, const float* bias, const int* token_start, const int* token_item,
    const int* token_kind, float* counted, const int* link_start, const int* link_item, const float* link_weight,
    const float* link_recency, const int* seen_start, const int* seen_item, float* seen_logit, int* best_item,
    float* best_score)
{
    __shared__ ranked candidate[CANDIDATES];
    __shared__ int histogram[256];
    __shared__ float partial[WARPS];
    __shared__ int count, wanted;
    __shared__ ranked chosen;
    const int user = blockIdx.x, thread = threadIdx.x;
    float* row = logits + (size_t)user * stride;

    // The shortcut. One item after the other, so that no two threads add to the same logit in an order of chance.
    const int begin = token_start[user], end = token_start[user + 1];
    float squares = 0.0f;
    for (int token = begin + thread; token < end; token += THREADS) {
        int later = token + 1;
        while (later < end && token_item[later] != token_item[token])
            ++later;
        // An item counts once, by its latest event.
        const float recency = later == end ? link_recency[token_kind[token] & 15] : 0.0f;
        counted[token] = recency;
        squares += recency * recency;
    }
    const float norm = fmaxf(sqrtf(block_sum(squares, partial)), TINY);
    for (int token = begin; token < end; ++token) {
        if (counted[token] == 0.0f)
            continue;
        const int item = token_item[token];
        const float share = counted[token] / norm;
        for (int link = link_start[item] + thread; link < link_start[item + 1]; link += THREADS)
            // Atomic for a version whose links of one item name another one twice.
            atomicAdd(&row[link_item[link]], share * link_weight[link]);
        __syncthreads();
    }

    // What was seen counts in the denominator, and is not ranked.
    float peak = minus_infinity();
    for (int seen = seen_start[user] + thread; seen < seen_start[user + 1]; seen += THREADS) {
        const int column = seen_item[seen];
        const float logit = row[column] + bias[column];
        seen_logit[seen] = logit;
        peak = fmaxf(peak, logit);
        row[column] = minus_infinity();
    }
    __syncthreads();

    // First pass: the maximum of each of 4 * THREADS groups of columns.
    float greatest[4];
    for (int i = 0; i < 4; ++i)
        greatest[i] = minus_infinity();
    for (int base = 4 * thread; base < items; base += 4 * THREADS) {
        const float4 four = *(const float4*)(row + base), more = *(const float4*)(bias + base);
        const float logit[4] = {four.x + more.x, four.y + more.y, four.z + more.z, four.w + more.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (base + i >= items)
                continue;
            peak = fmaxf(peak, logit[i]);
            greatest[i] = fmaxf(greatest[i], logit[i]);
        }
    }
    peak = block_max(peak, partial);

    // If k groups have a maximum of at least `bound`, the k best items are not below it. Any such bound will do; one
    // that hardly more groups reach leaves few candidates.
    unsigned bound = 0;
    for (int bit = 31; bit >= 0; --bit) {
        const unsigned trial = bound | 1u << bit;
        int reached = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i)
            reached += __syncthreads_count(rank_of(greatest[i]) >= trial);
        if (reached < k)
            continue;
        bound = trial;
        if (reached <= k + k / 4)
            break;
    }

    // Second pass: the denominator, and the candidates.
    if (thread == 0)
        count = 0;
    __syncthreads();
    float sum = 0.0f;
    for (int seen = seen_start[user] + thread; seen < seen_start[user + 1]; seen += THREADS)
        sum += expf(seen_logit[seen] - peak);
    for (int base = 4 * thread; base < items; base += 4 * THREADS) {
        const float4 four = *(const float4*)(row + base), more = *(const float4*)(bias + base);
        const float logit[4] = {four.x + more.x, four.y + more.y, four.z + more.z, four.w + more.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (base + i >= items)
                continue;
            sum += expf(logit[i] - peak);
            const unsigned rank = rank_of(logit[i]);
            if (rank >= bound) {
                const int place = atomicAdd(&count, 1);
                if (place < CANDIDATES)
                    candidate[place] = ranked_item(rank, base + i);
            }
        }
    }
    sum = block_sum(sum, partial);
    int found = count;
    __syncthreads();

    // Too many of them, as where thousands of items have the same logit: radix selection of exactly k, a byte a pass.
    // No two items are equal, as the column is a part of what is compared.
    if (found > CANDIDATES) {
        ranked prefix = 0, known = 0;
        int missing = k;
        for (int shift = 56; shift >= 0; shift -= 8) {
            for (int digit = thread; digit < 256; digit += THREADS)
                histogram[digit] = 0;
            __syncthreads();
            for (int column = thread; column < items; column += THREADS) {
                const ranked each = ranked_item(rank_of(row[column] + bias[column]), column);
                if ((each & known) == prefix)
                    atomicAdd(&histogram[each >> shift & 255], 1);
            }
            __syncthreads();
            if (thread == 0) {
                int digit = 255;
                while (histogram[digit] < missing)
                    missing -= histogram[digit--];
                chosen = prefix | (ranked)digit << shift;
                wanted = missing;
                count = histogram[digit];
            }
            __syncthreads();
            prefix = chosen;
            missing = wanted;
            known |= (ranked)255 << shift;
            if (count == missing)
                break;
        }
        __syncthreads();
        if (thread == 0)
            count = 0;
        __syncthreads();
        for (int column = thread; column < items; column += THREADS) {
            const ranked each = ranked_item(rank_of(row[column] + bias[column]), column);
            if ((each & known) >= prefix)
                candidate[atomicAdd(&count, 1)] = each;
        }
        __syncthreads();
        found = k;
    }

    // Bitonic sort, greatest first; nothing is less than 0.
    int padded = 1;
    while (padded < found)
        padded *= 2;
    for (int i = found + thread; i < padded; i += THREADS)
        candidate[i] = 0;
    __syncthreads();
    for (int size = 2; size <= padded; size *= 2) {
        for (int distance = size / 2; distance > 0; distance /= 2) {
            for (int pair = thread; pair < padded / 2; pair += THREADS) {
                const int low = pair + (pair & ~(distance - 1)), high = low + distance;
                const ranked one = candidate[low], other = candidate[high];
                if ((one < other) == ((low & size) == 0)) {
                    candidate[low] = other;
                    candidate[high] = one;
                }
            }
            __syncthreads();
        }
    }
    for (int place = thread; place < k; place += THREADS) {
        const unsigned rank = (unsigned)(candidate[place] >> 32);
        best_item[(size_t)user * k + place] = (int)~(unsigned)candidate[place];
        best_score[(size_t)user * k + place] = rank ? expf(float_of_rank(rank) - peak) / sum : -1.0f;
    }
}
"""
