"""The loop that all attention kernels share: one tile of rows over a run of keys.

Letters: M rows of a tile, N keys of a step, D head dim padded to a power of two. Prefixes: `p_`
pointer, `b_` value of a tile, `o_` offsets, `i_` index.
"""

import triton
import triton.language as tl


@triton.jit
def keys_of(p_kv, stride, num_keys, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
            TMA: tl.constexpr):  # fmt: skip
    """Where tiles of keys or values are loaded from: a tensor descriptor, or the pointer itself."""
    if TMA:
        return tl.make_tensor_descriptor(
            p_kv,
            shape=[num_keys.to(tl.int32), D],
            strides=[stride, 1],
            block_shape=[BLOCK_N, BLOCK_D],
        )
    else:
        return p_kv


@triton.jit
def load_keys(source, stride, i_key, stop, D: tl.constexpr, BLOCK_N: tl.constexpr,
              BLOCK_D: tl.constexpr, TMA: tl.constexpr, BOUNDARY: tl.constexpr):  # fmt: skip
    """Keys ``[N, D]`` from `i_key` on; 0 from `stop` on and beyond the head size."""
    if TMA:
        return source.load([i_key, 0])
    else:
        o_d = tl.arange(0, BLOCK_D)
        o_n = tl.arange(0, BLOCK_N)
        # 64 bits before the product: an element's offset within a tile may exceed 2^31.
        p_tile = source + tl.cast(i_key, tl.int64) * stride
        p_tile = p_tile + o_n.to(tl.int64)[:, None] * stride + o_d[None, :]
        if BOUNDARY:
            seen = i_key + o_n < stop
            return tl.load(p_tile, mask=seen[:, None] & (o_d < D)[None, :], other=0.0)
        elif D == BLOCK_D:
            return tl.load(p_tile)
        else:
            return tl.load(p_tile, mask=(o_d < D)[None, :], other=0.0)


@triton.jit
def attend_keys(b_acc, b_max, b_sum, b_q, k_source, v_source, stride_k, stride_v, first, stop,
                b_visible, scale_log2, D: tl.constexpr, BLOCK_N: tl.constexpr,
                BLOCK_D: tl.constexpr, TMA: tl.constexpr, BOUNDARY: tl.constexpr):  # fmt: skip
    """Online softmax over the keys ``[first, stop)``, in steps of N.

    With BOUNDARY a row sees only the first `b_visible` of all keys; without, every row sees every
    key of every step, and nothing is masked.

    Args:
        b_acc: weighted values so far ``[M, D]``, relative to `b_max`.
        b_max: largest score so far ``[M]``, in units of log 2.
        b_sum: weights so far ``[M]``, relative to `b_max`.
    """
    o_n = tl.arange(0, BLOCK_N)
    for i_key in tl.range(first, stop, BLOCK_N):
        b_k = load_keys(k_source, stride_k, i_key, stop, D, BLOCK_N, BLOCK_D, TMA, BOUNDARY)
        b_s = tl.dot(b_q, b_k.T, input_precision="tf32x3")
        if BOUNDARY:
            b_s = tl.where((i_key + o_n)[None, :] < b_visible[:, None], b_s, float("-inf"))
        b_peak = tl.maximum(b_max, tl.max(b_s, axis=1) * scale_log2)
        b_p = tl.exp2(b_s * scale_log2 - b_peak[:, None])
        b_decay = tl.exp2(b_max - b_peak)
        b_sum = b_sum * b_decay + tl.sum(b_p, axis=1)
        b_v = load_keys(v_source, stride_v, i_key, stop, D, BLOCK_N, BLOCK_D, TMA, BOUNDARY)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_decay[:, None], input_precision="tf32x3")
        b_max = b_peak
    return b_acc, b_max, b_sum
