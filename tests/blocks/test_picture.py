"""What graphs do to pictures, in the many ways there are to write it."""

import numpy as np
import pytest

from tests.builders import graph_of
from vitq_compiler.blocks.picture import Picture, find_pictures
from vitq_compiler.graph import Layout

MEAN, STD = (np.array(x, np.float32) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
COLUMN = (3, 1, 1)
CONV = "c = Conv <strides = [4, 4]> (p, w) y = Relu(c)"
HELD = {
    "w": np.ones((5, 3, 4, 4), np.float32),
    "mean": MEAN.reshape(COLUMN),
    "std": STD.reshape(COLUMN),
    "row_mean": MEAN,
    "row_std": STD,
    "top": np.float32(255),
    "one": np.float32(1),
    "flipped": np.array([2, 1, 0]),
    "rows": np.array([[2], [1], [0]]),
    "ones": np.ones(3, np.float32),
    "zeros": np.zeros(3, np.float32),
    "zero": np.array([0]),
    "first": np.array([0]),
    "third": np.array([3]),
    "axis": np.array([1]),
    "singles": np.array([1, 1, 1]),
    "size": np.array([1, 3, 8, 8]),
    "many": np.random.default_rng(0).random((3, 8, 8)).astype(np.float32),
}


def found(text: str, kind: str = "float[B, 3, 8, 8]", **changes: np.ndarray) -> Picture:
    (picture,) = find_pictures(graph_of(f"g ({kind} x) => (float y) {{ {text} }}", **{**HELD, **changes}))
    return picture


def check(picture: Picture, scale: np.ndarray | float, offset: np.ndarray | float) -> None:
    for got, wanted in ((picture.affine.scale, scale), (picture.affine.offset, offset)):
        np.testing.assert_allclose(np.broadcast_to(got, 3), np.broadcast_to(wanted, 3), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "text",
    [
        "a = Sub(x, mean) p = Div(a, std)",
        "k = Neg(mean) a = Add(k, x) r = Reciprocal(std) p = Mul(r, a)",  # constants are computed, operands turned round
        "a = Identity(x) b = Cast <to = 1> (a) c1 = Clip(b, one) d = Sub(c1, mean) p = Div(d, std)",
        "t = Transpose <perm = [0, 2, 3, 1]> (x) a = Sub(t, row_mean) b = Div(a, row_std) p = Transpose <perm = [0, 3, 1, 2]> (b)",
        "v = Mul(row_std, row_std) p = BatchNormalization <epsilon = 0.0> (x, ones, zeros, row_mean, v)",
        "c0, c1, c2 = Split <axis = 1> (x, singles) u = Concat <axis = 1> (c0, c1, c2) a = Sub(u, mean) p = Div(a, std)",
        "a = Sub(x, mean) r = Reshape(a, size) p = Div(r, std)",
    ],
)
def test_mean_and_deviation(text: str) -> None:
    kind = "float[1, 3, 8, 8]" if "Reshape" in text else "float[B, 3, 8, 8]"
    picture = found(f"{text} {CONV}", kind)
    assert (picture.name, picture.layout, picture.resized) == ("x", Layout(batched=True, channels=1), False)
    check(picture, 1 / STD, -MEAN / STD)


def test_a_scale_before_and_after() -> None:
    check(found(f"s = Div(x, top) a = Sub(s, mean) p = Div(a, std) {CONV}"), 1 / (255 * STD), -MEAN / STD)
    check(found(f"a = Sub(x, mean) s = Mul(a, top) p = Sub(one, s) {CONV}"), -255, 1 + 255 * MEAN)


def test_integers_and_resizes() -> None:
    resized = 'r = Resize <mode = "linear"> (f, , , size)'
    picture = found(f"f = Cast <to = 1> (x) {resized} s = Div(r, top) a = Sub(s, mean) p = Div(a, std) {CONV}", "uint8[1, 3, H, W]")
    assert (picture.layout, picture.resized) == (Layout(batched=True, channels=1), True)
    check(picture, 1 / (255 * STD), -MEAN / STD)


@pytest.mark.parametrize(
    ("text", "kind", "channels"),
    [
        ("u = Unsqueeze(x, zero) p = Identity(u)", "float[3, 8, 8]", 0),
        ("r = Reshape(x, size) p = Identity(r)", "float[3, 8, 8]", 0),
        ("t = Transpose <perm = [2, 0, 1]> (x) u = Unsqueeze(t, zero) p = Cast <to = 1> (u)", "uint8[H, W, 3]", 2),
        ("u = Unsqueeze(x, zero) p = Transpose <perm = [0, 3, 1, 2]> (u)", "float[8, 8, 3]", 2),
    ],
)
def test_inputs_without_a_batch(text: str, kind: str, channels: int) -> None:
    assert found(f"{text} {CONV}", kind).layout == Layout(batched=False, channels=channels)


def test_channels_in_another_order_keep_their_own_numbers() -> None:
    for turned in ("Gather <axis = 1> (x, flipped)", "Slice(x, last, before, axis, back)"):
        steps = {"last": np.array([-1]), "before": np.array([-9]), "back": np.array([-1])}
        check(found(f"g1 = {turned} a = Sub(g1, mean) p = Div(a, std) {CONV}", **steps), 1 / STD[::-1], -(MEAN / STD)[::-1])
    text = "t = Transpose <perm = [1, 0, 2, 3]> (x) g1 = GatherND(t, rows) b = Transpose <perm = [1, 0, 2, 3]> (g1) p = Div(b, std)"
    check(found(f"{text} {CONV}"), 1 / STD[::-1], 0)


def test_channels_normalized_one_by_one() -> None:
    one = " ".join(
        f"i{n} = Constant <value = int64 {{{n}}}> () g{n} = Gather <axis = 1> (x, i{n}) u{n} = Unsqueeze(g{n}, axis) "
        f"k{n} = Constant <value = float {{{n + 2}.0}}> () s{n} = Mul(u{n}, k{n})"
        for n in range(3)
    )
    check(found(f"{one} p = Concat <axis = 1> (s0, s1, s2) {CONV}"), np.array([2, 3, 4]), 0)


def test_a_channel_that_is_not_read_is_left_as_it_is() -> None:
    picture = found(f"s = Slice(x, first, third, axis) p = Div(s, std) {CONV}", "float[B, 4, 8, 8]")
    np.testing.assert_allclose(picture.affine.scale, [*(1 / STD), 1], rtol=1e-6)


def test_patches_cut_by_reshape_show_the_affine_but_no_layout() -> None:
    cells = np.array([-1, 3, 2, 4, 2, 4])
    picture = found("a = Sub(x, mean) p = Div(a, std) c = Reshape(p, cells) y = Relu(c)", cells=cells)
    assert picture.layout is None
    check(picture, 1 / STD, -MEAN / STD)


def test_what_is_no_affine_of_channels_ends_the_trace() -> None:
    for text in ("n = Sub(x, many) p = Div(n, std)", "n = Relu(x) p = Div(n, std)", "n = Mul(x, x) p = Div(n, std)", "p = Div(one, x)"):
        assert find_pictures(graph_of(f"g (float[B, 3, 8, 8] x) => (float y) {{ {text} {CONV} }}", **HELD)) == []


@pytest.mark.parametrize("kind", ["float[B, 3, 8]", "int64[B, 3, 8, 8]", "float[B, 3, 2, 8, 8]"])
def test_other_inputs_are_no_pictures(kind: str) -> None:
    assert find_pictures(graph_of(f"g ({kind} x) => (float y) {{ f = Cast <to = 1> (x) y = Relu(f) }}")) == []


def test_a_convolution_over_many_channels_shows_no_picture() -> None:
    graph = graph_of("g (float[B, 16, 8, 8] x) => (float y) { y = Conv(x, k) }", k=np.ones((4, 16, 2, 2), np.float32))
    assert all(picture.layout is None for picture in find_pictures(graph))


def test_two_pictures() -> None:
    text = "g (float[B, 3, 8, 8] a, float[B, 8, 8, 3] b) => (float y) { p = Div(a, std) c = Conv(p, w) "
    text += "t = Transpose <perm = [0, 3, 1, 2]> (b) d = Conv(t, w) y = Add(c, d) }"
    one, two = find_pictures(graph_of(text, **HELD))
    assert (one.name, one.layout, two.name, two.layout) == ("a", Layout(True, 1), "b", Layout(True, 3))
    assert (one.affine.is_identity, two.affine.is_identity) == (False, True)
