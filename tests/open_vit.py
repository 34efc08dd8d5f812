"""Vision transformers and text towers whose sizes are open, with the shape arithmetic that exporters write for them, as ONNX text."""

from __future__ import annotations

import numpy as np
import onnx

from tests.builders import Array, model_of

WIDTH, HEADS, PATCH, GRID, CLASSES, WORDS, LENGTH = 8, 2, 4, 4, 5, 30, 12
SIDE = GRID * PATCH  # of the pictures that the positions are made for
IMAGES = {  # axes of the picture -> how it gets to the patch embedding
    "B, 3, 16, 16": "i = Identity(image)",
    "B, 3, H, W": "i = Identity(image)",
    "batch, num_channels, height, width": "i = Identity(image)",
    "B, H, W, 3": "i = Transpose <perm = [0, 3, 1, 2]> (image)",
    "n, a, b, c": "i = Transpose <perm = [0, 3, 1, 2]> (image)",
}
POSITIONS = {
    "table": "pos = Identity(table)",
    "resized": """hw = Shape <start = 2, end = 4> (conv) to = Concat <axis = 0> (front, hw) big = Resize <mode = "linear"> (plane, , , to)
        lines = Reshape(big, plane_rows) rows = Transpose <perm = [0, 2, 1]> (lines) pos = Concat <axis = 1> (class_position, rows)""",
}
BLOCK = """
    n{i} = LayerNormalization(x{i}, gamma{i}, beta{i})
    q{i} = MatMul(n{i}, wq{i})  k{i} = MatMul(n{i}, wk{i})  v{i} = MatMul(n{i}, wv{i})
    sizes{i} = Shape(n{i})  bs{i} = Gather <axis = 0> (sizes{i}, zero)  ts{i} = Gather <axis = 0> (sizes{i}, one)
    b{i} = Unsqueeze(bs{i}, axis)  t{i} = Unsqueeze(ts{i}, axis)  split{i} = Concat <axis = 0> (b{i}, t{i}, heads)
    qs{i} = Reshape(q{i}, split{i})  ks{i} = Reshape(k{i}, split{i})  vs{i} = Reshape(v{i}, split{i})
    qh{i} = Transpose <perm = [0, 2, 1, 3]> (qs{i})  kh{i} = Transpose <perm = [0, 2, 1, 3]> (ks{i})
    vh{i} = Transpose <perm = [0, 2, 1, 3]> (vs{i})
    {keys}
    dim{i} = Shape <start = 3, end = 4> (qh{i})  fdim{i} = Cast <to = 1> (dim{i})  root{i} = Sqrt(fdim{i})
    sc{i} = MatMul(qh{i}, kt{i})  ss{i} = Div(sc{i}, root{i})  p{i} = Softmax <axis = -1> (ss{i})  h{i} = MatMul(p{i}, vh{i})
    back{i} = Transpose <perm = [0, 2, 1, 3]> (h{i})  join{i} = Concat <axis = 0> (b{i}, t{i}, features)  m{i} = Reshape(back{i}, join{i})
    o{i} = MatMul(m{i}, wo{i})  y{i} = Add(o{i}, x{i})
    l{i} = LayerNormalization(y{i}, gamma{i}, beta{i})  f{i} = MatMul(l{i}, w1{i})  fb{i} = Add(f{i}, b1{i})  r{i} = Relu(fb{i})
    s{i} = MatMul(r{i}, w2{i})  x{j} = Add(s{i}, y{i})
"""
KEYS = {  # how keys are transposed
    "plain": "kt{i} = Transpose <perm = [0, 1, 3, 2]> (kh{i})",
    "flattened": """three{i} = Concat <axis = 0> (minus, t{i}, head_dim)  kf{i} = Reshape(kh{i}, three{i})
    ka{i} = Transpose <perm = [0, 2, 1]> (kf{i})  four{i} = Concat <axis = 0> (b{i}, head_count, head_dim, t{i})
    kt{i} = Reshape(ka{i}, four{i})""",
}


def open_vit(image: str = "B, 3, H, W", positions: str = "resized", keys: str = "plain", depth: int = 2) -> onnx.ModelProto:
    """A classifier that reads its class token; see `IMAGES`, `POSITIONS` and `KEYS`. Equal weights whatever is chosen."""
    start = f"""{IMAGES[image]} conv = Conv <strides = [{PATCH}, {PATCH}]> (i, wp, bp)
        cs = Shape(conv) cb = Gather <axis = 0> (cs, zero) bv = Unsqueeze(cb, axis) flat = Concat <axis = 0> (bv, features, minus)
        fl = Reshape(conv, flat) patches = Transpose <perm = [0, 2, 1]> (fl)
        whole = Concat <axis = 0> (bv, single) token = Expand(class_token, whole) tokens = Concat <axis = 1> (token, patches)
        {POSITIONS[positions]} x0 = Add(tokens, pos)"""
    end = f"""last = LayerNormalization(x{depth}, gamma0, beta0) cls = Gather <axis = 1> (last, zero)
        lo = MatMul(cls, head) logits = Add(lo, bh)"""
    body = "".join(BLOCK.format(i=i, j=i + 1, keys=KEYS[keys].format(i=i)) for i in range(depth))
    return model_of(f"g (float[{image}] image) => (float logits) {{ {start} {body} {end} }}", opset=17, **weights(depth))


def open_text(depth: int = 2, keys: str = "plain") -> onnx.ModelProto:
    """Token ids [B, L] with positions for `LENGTH` tokens -> [B, L, width]."""
    start = """length = Shape <start = 1, end = 2> (ids) where = Slice(numbers, zeros, length, zeros) pos = Gather(positions, where)
        words = Gather(table_of_words, ids) x0 = Add(words, pos)"""
    body = "".join(BLOCK.format(i=i, j=i + 1, keys=KEYS[keys].format(i=i)) for i in range(depth))
    end = f"y = LayerNormalization(x{depth}, gamma0, beta0)"
    return model_of(f"g (int64[B, L] ids) => (float y) {{ {start} {body} {end} }}", opset=17, **weights(depth))


def weights(depth: int) -> dict[str, Array]:
    """All initializers, by name."""
    random = np.random.default_rng(0)

    def normal(*shape: int) -> Array:
        return (random.standard_normal(shape) * 0.5).astype(np.float32)

    table = normal(1, GRID * GRID + 1, WIDTH)
    found: dict[str, Array] = {
        "wp": normal(WIDTH, 3, PATCH, PATCH),
        "bp": normal(WIDTH),
        "class_token": normal(1, 1, WIDTH),
        "table": table,
        "class_position": table[:, :1],
        "plane": np.ascontiguousarray(table[:, 1:].reshape(1, GRID, GRID, WIDTH).transpose(0, 3, 1, 2)),
        "plane_rows": np.array([1, WIDTH, -1]),
        "front": np.array([1, WIDTH]),
        "head": normal(WIDTH, CLASSES),
        "bh": normal(CLASSES),
        "zero": np.array(0),
        "one": np.array(1),
        "axis": np.array([0]),
        "minus": np.array([-1]),
        "single": np.array([1, WIDTH]),
        "features": np.array([WIDTH]),
        "heads": np.array([HEADS, WIDTH // HEADS]),
        "head_count": np.array([HEADS]),
        "head_dim": np.array([WIDTH // HEADS]),
        "numbers": np.arange(LENGTH),
        "zeros": np.array([0]),
        "positions": normal(LENGTH, WIDTH),
        "table_of_words": normal(WORDS, WIDTH),
    }
    for i in range(depth):
        found |= {f"{name}{i}": normal(WIDTH, WIDTH) for name in ("wq", "wk", "wv", "wo")}
        found |= {f"w1{i}": normal(WIDTH, 2 * WIDTH), f"b1{i}": normal(2 * WIDTH), f"w2{i}": normal(2 * WIDTH, WIDTH)}
        found |= {f"gamma{i}": 1 + normal(WIDTH) / 5, f"beta{i}": normal(WIDTH)}
    return found
