"""Compiled programs read back: texts written by hand, two of the TPU compiler's, one compiled here.

The TPU texts are `program()` for a slice and for two slices; `python -m tests.launch.test_hlo` makes them anew.
"""

import dataclasses
import functools
import gzip
import os
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grain_jax.launch import chips, hlo, hlo_collectives, hlo_work
from grain_jax.train import flops
from tests import paths

GOLDENS = paths.GOLDENS / "hlo"
LAYERS, WIDTH, ROWS = 4, 512, 1024  # of the program below; rows of one chip
MIB = 2**20


def program(devices, dtype=jnp.bfloat16):
    """A scanned MLP cut over (data, fsdp), then a ring of products over all chips; the step and its arguments."""
    mesh = Mesh(np.asarray(devices).reshape(-1, 2, 1), ("data", "fsdp", "tensor"))
    axes, chips = ("data", "fsdp"), mesh.size
    cut = PartitionSpec(axes)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(cut, cut), out_specs=PartitionSpec())
    def ring(mine, theirs):
        def turn(carry, _):
            total, theirs = carry
            products = (mine @ theirs.T).astype(jnp.float32)
            total += jax.nn.logsumexp(products, axis=-1).sum()
            pairs = [(i, (i + 1) % chips) for i in range(chips)]
            return (total, jax.lax.ppermute(theirs, axes, pairs)), None

        zero = jax.lax.pcast(jnp.zeros(()), axes, to="varying")
        (total, _), _ = jax.lax.scan(turn, (zero, theirs), None, length=chips)
        return jax.lax.psum(total, axes)

    def loss(params, x, y):
        def layer(h, kernels):
            return h + jax.nn.gelu(h @ kernels["a"]) @ kernels["b"], None

        return ring(jax.lax.scan(layer, x, params)[0], y)

    weights = NamedSharding(mesh, PartitionSpec(None, "fsdp", None))
    out = ({"a": weights, "b": weights}, NamedSharding(mesh, PartitionSpec()))

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=out)
    def step(params, x, y):
        value, gradients = jax.value_and_grad(loss)(params, x, y)
        return jax.tree.map(lambda p, g: p - g.astype(p.dtype), params, gradients), value

    struct = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
    params = {
        "a": struct((LAYERS, WIDTH, 4 * WIDTH), sharding=weights),
        "b": struct((LAYERS, 4 * WIDTH, WIDTH), sharding=weights),
    }
    rows = struct((ROWS * chips, WIDTH), sharding=NamedSharding(mesh, cut))
    return step, (params, rows, rows)


def expected_flops(chips):
    """FLOPs of one chip: 2 products per layer forward, 4 backward; 1 per turn of the ring forward, 1 backward."""
    layers = LAYERS * 6 * (2 * ROWS * WIDTH * 4 * WIDTH)
    return layers + chips * 2 * (2 * ROWS * ROWS * WIDTH)


def make_golden(name, platform, **options):
    """Compiles for these devices, and stores the program without the places in the source."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform=platform, **options).devices
    step, arguments = program(devices)
    text = re.sub(r" stack_frame_id=\d+", "", step.lower(*arguments).compile().as_text())
    text = re.sub(r"(?s)\nFileNames\n.*?\n\n\n", "\n", text)
    (GOLDENS / f"{name}.txt.gz").write_bytes(gzip.compress(text.encode(), mtime=0))


def make_goldens():
    """For v5e, 4x4 chips and two slices of 2x2, which needs libtpu; `gpu`: for two nodes of 4 H100s.

    The latter needs the extra cuda12, and compiler._GPU_FLAGS in XLA_FLAGS.
    """
    if "gpu" in sys.argv:
        h100 = chips.CHIPS["h100"]
        target = h100.gpu.description(h100.device_kind)
        make_golden("h100_4x2", "cuda", target_config=target, topology="1x2x4")
        return
    os.environ.update(TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost")
    os.environ.update(TPU_ACCELERATOR_TYPE="v5litepod-16", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    make_golden("v5e_4x4", "tpu", topology_name="v5e:4x4")
    make_golden("v5e_2x2_two_slices", "tpu", topology_name="v5e:2x2", num_slices=2)


@functools.cache
def golden(name):
    return hlo.parse(gzip.decompress((GOLDENS / f"{name}.txt.gz").read_bytes()).decode())


def entry(body, before=""):
    """A module for 8 chips: an entry computation, and what stands before it."""
    return hlo.parse(
        f"HloModule m, is_scheduled=true, num_partitions=8\n\n{before}\n"
        f"ENTRY %main (p: f32[4]) -> f32[4] {{\n{body}\n}}\n"
    )


# Shapes


@pytest.mark.parametrize(
    ("text", "values", "stored", "in_hbm"),
    [
        ("f32[]", 4, 4, True),
        ("bf16[3,5]{1,0}", 30, 30, True),
        ("pred[7]{0}", 7, 7, True),
        ("s4[8]{0}", 4, 4, True),
        ("f8e4m3fn[8]{0}", 8, 8, True),
        ("token[]", 0, 0, True),
        # heads of 12 and 64 fill up to whole tiles of 8 x 128
        ("bf16[200,12,64]{2,1,0:T(8,128)(2,1)}", 2 * 200 * 12 * 64, 2 * 200 * 16 * 128, True),
        # the minor axes are 0 and 2
        ("f32[5,7,130]{2,0,1:T(8,128)}", 4 * 5 * 7 * 130, 4 * 8 * 7 * 256, True),
        ("bf16[1024]{0:T(1024)(128)(2,1)S(1)}", 2048, 2048, False),
    ],
)
def test_shapes(text, values, stored, in_hbm):
    (shape,) = entry(f"  ROOT %p = {text} parameter(0)").computations["main"].root.shapes
    assert (shape.bytes, shape.stored_bytes, shape.in_hbm) == (values, stored, in_hbm)


# Loops

LOOP = """
%body (s: (f32[4,4], s32[])) -> (f32[4,4], s32[]) {{
  %s = (f32[4,4]{{1,0}}, s32[]) parameter(0)
  %x = f32[4,4]{{1,0}} get-tuple-element(%s), index=0
  %i = s32[] get-tuple-element(%s), index=1
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %dot = f32[4,4]{{1,0}} dot(%x, %x), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  ROOT %out = (f32[4,4]{{1,0}}, s32[]) tuple(%dot, /*index=1*/%next)
}}

%condition (s: (f32[4,4], s32[])) -> pred[] {{
  %s = (f32[4,4]{{1,0}}, s32[]) parameter(0)
  %limit = s32[] constant(8)
  %i = s32[] get-tuple-element(%s), index=1
  ROOT %less = pred[] compare(%i, %limit), direction={direction}
}}
"""
LOOP_ENTRY = """
  %p = f32[4,4]{1,0} parameter(0)
  %one = s32[] constant(1)
  %state = (f32[4,4]{1,0}, s32[]) tuple(%p, %one)
  %loop = (f32[4,4]{1,0}, s32[]) while(%state), condition=%condition, body=%body
  ROOT %x = f32[4,4]{1,0} get-tuple-element(%loop), index=0
"""


def test_trips_of_a_loop():
    """From start, step and limit; what the compiler noted wins; without a known end it counts once and is named."""
    module = entry(LOOP_ENTRY, LOOP.format(direction="LT"))
    assert module.times["body"] == 4  # 1, 3, 5, 7
    assert module.in_loop == {"body"} and module.unknown_loops == ()
    assert hlo_work.dot_flops(module) == 4 * 2 * 4**3
    noted = LOOP_ENTRY.replace("body=%body", 'body=%body, x={"known_trip_count":{"n":"11"}}')
    assert entry(noted, LOOP.format(direction="LT")).times["body"] == 11
    module = entry(LOOP_ENTRY, LOOP.format(direction="NE"))
    assert module.times["body"] == 1 and module.unknown_loops == ("loop",)


# Groups


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,2},{1,3}}", [[0, 2], [1, 3]]),
        ("replica_groups={}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("replica_groups=[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        (
            "replica_groups=mesh['a'=2,'b'=1,'c'=4], device_ids=([4,2]T(1,0)) {'a'}",
            [[0, 1], [2, 3], [4, 5], [6, 7]],
        ),
    ],
)
def test_replica_groups(text, groups):
    module = entry(
        f"  %p = f32[4]{{0}} parameter(0)\n"
        f"  ROOT %r = f32[4]{{0}} all-reduce(%p), channel_id=1, {text}, to_apply=%add"
    )
    root = module.computations["main"].root
    assert sorted(map(sorted, hlo_collectives._groups(root, 8))) == groups
    (row,) = hlo_collectives.collectives(module)
    assert (row.group_size, row.bytes) == (len(groups[0]), 16)


# Overlap

WORK = "  %w = f32[1024]{0} exponential(%p)\n"


@pytest.mark.parametrize("between", ["", "  %b = f32[1024]{0} bitcast(%p)\n", WORK])
@pytest.mark.parametrize(
    ("kind", "start", "done", "payload"),
    [
        (
            "all-gather",
            "(f32[1024]{0}, f32[8192]{0}) all-gather-start(%p), replica_groups={}, dimensions={0}",
            "f32[8192]{0} all-gather-done(%s)",
            8 * 4096,
        ),
        (
            "collective-permute",
            "(f32[1024]{0}, f32[1024]{0}, u32[], u32[]) collective-permute-start(%p),"
            " source_target_pairs={{0,1},{1,2},{2,3},{3,4},{4,5},{5,6},{6,7},{7,0}}",
            "f32[1024]{0} collective-permute-done(%s)",
            4096,
        ),
        (
            "reduce-scatter",
            "((f32[1024]{0}), f32[128]{0}) async-start(%p), calls=%wrapped",
            "f32[128]{0} async-done(%s)",
            4096,
        ),
    ],
)
def test_a_pair_counts_once_and_work_between_hides_it(kind, start, done, payload, between):
    wrapped = """
%wrapped (a: f32[1024]) -> f32[128] {
  %a = f32[1024]{0} parameter(0)
  ROOT %r = f32[128]{0} reduce-scatter(%a), replica_groups={}, dimensions={0}, to_apply=%add
}
"""
    module = entry(
        f"  %p = f32[1024]{{0}} parameter(0)\n  %s = {start}\n{between}  ROOT %d = {done}", wrapped
    )
    (row,) = hlo_collectives.collectives(module)
    assert row[:8] == (kind, between == WORK, False, 8, 1, (), 1, payload)
    assert row.ways == 1 and (row.work.bytes > 0) == (between == WORK)


def test_permutations_of_a_loop_go_over_different_links():
    there, back = "{{0,1},{1,2},{2,0}}", "{{1,0},{2,1},{0,2}}"
    start = "(f32[1024]{0}, f32[1024]{0}, u32[], u32[]) collective-permute-start(%p)"
    ends = "".join(f"  %e{n} = f32[1024]{{0}} collective-permute-done(%s{n})\n" for n in (0, 1))
    product = """  %x = f32[32,32]{1,0} bitcast(%p)
  %y = f32[32,32]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}, operand_precision={high,high}
"""
    for pairs, ways in (((there, back), 2), ((there, there), 1)):
        starts = "".join(
            f"  %s{n} = {start}, source_target_pairs={p}\n" for n, p in enumerate(pairs)
        )
        module = entry(f"  %p = f32[1024]{{0}} parameter(0)\n{starts}{product}{ends}")
        module = dataclasses.replace(module, in_loop=frozenset({module.entry}))
        (row,) = hlo_collectives.collectives(module)
        assert (row.count, row.bytes, row.ways) == (2, 2 * 4096, ways)
        # Both transfers have the same product beside them, of three passes: half of it hides each.
        assert row.work == (3 * 2 * 32**3, 2 * 4096 + 4096)


# What compilers wrote


def total(rows, **fields):
    """(count, bytes) of the rows with these fields."""
    chosen = [r for r in rows if all(getattr(r, k) == v for k, v in fields.items())]
    return sum(r.count for r in chosen), sum(r.bytes for r in chosen)


@pytest.mark.parametrize(
    "name,chips,slices,itemsize,gathers,scatters",
    [
        ("v5e_4x4", 16, 1, 2, 4 * LAYERS, 2 * LAYERS),
        # 2 nodes of 4 H100s, by JAX 0.10.2 with Triton's products off: all of them by cuBLAS.
        ("h100_4x2", 8, 2, 2, 8, 4),
        ("cpu", 8, 1, 4, 4 * LAYERS, None),  # compiled here, of float32
    ],
)
def test_compiled_programs(name, chips, slices, itemsize, gathers, scatters):
    if name == "cpu":
        step, arguments = program(jax.devices(), jnp.float32)
        module = hlo.parse(step.lower(*arguments).compile().as_text())
        assert chips * hlo_work.dot_flops(module) == flops.matmul_flops(step, *arguments)
    else:
        module = golden(name)
    assert module.partitions == chips and module.unknown_loops == ()
    assert hlo_work.dot_flops(module) == expected_flops(chips)
    mesh = {"data": chips // 2, "fsdp": 2, "tensor": 1}
    rows = hlo_collectives.collectives(module, mesh=mesh, slices=slices)
    kernel = itemsize * WIDTH * 4 * WIDTH  # bytes of one, whole
    # Both kernels of a layer are gathered forward and backward. Their gradients are scattered, then summed over data.
    # The ring turns as often as there are chips, and its permutations hide behind the products.
    gathered = total(rows, kind="all-gather", axes=("fsdp",), slices=1)
    assert gathered == (gathers, 4 * LAYERS * kernel)
    ring = dict(kind="collective-permute", axes=("data", "fsdp"), group_size=chips)
    hidden = name != "cpu"
    turns = total(rows, **ring, in_loop=True, overlapped=hidden)
    assert turns == (chips, chips * itemsize * ROWS * WIDTH)
    if not hidden:
        assert not any(row.overlapped for row in rows)
        return
    scattered = total(rows, kind="reduce-scatter", axes=("fsdp",))
    assert scattered == (scatters, 2 * LAYERS * kernel)
    summed = total(rows, kind="all-reduce", axes=("data",), slices=slices)[1]
    assert summed == LAYERS * kernel
    if slices == 1:
        assert total(rows, kind="all-gather", overlapped=True)[0] == 12
        assert all(row.slices == 1 for row in rows)


def test_arguments_of_the_tpu_program_are_stored_as_memory_analysis_says():
    module = golden("v5e_4x4")
    arguments = module.computations[module.entry].parameters.values()
    assert sum(s.stored_bytes for i in arguments for s in i.shapes) == 10485760


def test_tpu_program_of_two_slices():
    module = golden("v5e_2x2_two_slices")
    assert module.partitions == 4 and module.across_slices
    assert hlo_work.dot_flops(module) == expected_flops(8)
    rows = hlo_collectives.collectives(module, mesh={"data": 4, "fsdp": 2, "tensor": 1}, slices=2)
    across = [row for row in rows if row.slices == 2]
    assert total(across, kind="collective-permute") == (8, 8 * 2 * ROWS * WIDTH)
    # The gradients, cut over the 4 chips of a slice, and the loss (stored as a row of 128).
    gradients = LAYERS * 2 * (2 * WIDTH * 4 * WIDTH) / 4
    assert total(across, kind="all-reduce")[1] == gradients + 512
    within = {row.axes for row in rows if row.slices == 1}
    assert within == {("fsdp",), ("data",), ("data", "fsdp")}


GEMM = """
  %q = DTYPE[6,200,64]{2,1,0} parameter(0)
  %call = (f32[6,200,200]{2,1,0}, s8[4194304]{0}) custom-call(%q, %q), custom_call_target="__cublas$lt$matmul", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"]},\
"precision_config":{"operand_precision":["PRECISION","PRECISION"]}}}
  ROOT %x = f32[6,200,200]{2,1,0} get-tuple-element(%call), index=0
"""


@pytest.mark.parametrize(
    ("dtype", "precision", "as_bfloat16"),
    [("bf16", "DEFAULT", 1), ("f32", "DEFAULT", 2), ("f32", "HIGH", 2), ("f32", "HIGHEST", 16)],
)
def test_products_of_cublas(dtype, precision, as_bfloat16):
    text = GEMM.replace("DTYPE", dtype).replace("PRECISION", precision).replace("\\\n", "")
    module = entry(text)
    product = 2 * 6 * 200 * 200 * 64
    assert hlo_work.dot_flops(module) == product
    assert hlo_work.dot_flops(module, passes=True) == as_bfloat16 * product
    size = 2 if dtype == "bf16" else 4  # the scratch memory of 4 MiB is not counted
    assert hlo_work.bytes_accessed(module) == 2 * size * 6 * 200 * 64 + 4 * 6 * 200 * 200


def test_attention_of_cudnn():
    call = """
  %q = bf16[8,66,4,24]{3,2,1,0} parameter(0)
  ROOT %call = (bf16[8,4,66,24]{3,1,2,0}, u8[64]{0}) custom-call(%q, %q, %q), custom_call_target="__cudnn$TARGET", \
backend_config={"cudnn_fmha_backend_config": {"intermediate_tensor_shape": {"dimensions": ["8", "4", "66", "66"]}}}
""".replace("\\\n", "")
    product = 2 * 8 * 4 * 66 * 66 * 24
    for target, products in (("fmhaSoftmax", 2), ("fmhaScaleBiasSoftmaxBackward", 5)):
        assert hlo_work.dot_flops(entry(call.replace("TARGET", target))) == products * product


def test_batched_products_of_the_tpu_are_dilated_convolutions():
    """Attention logits of 8 images and 12 heads, 200 x 200 x 64, and a patch embedding, as compiled for v5e."""
    module = entry("""  %q = bf16[8,200,12,64]{3,1,2,0} parameter(0)
  %i = bf16[4,224,224,3]{3,2,1,0} parameter(1)
  %k = bf16[16,16,3,256]{3,2,1,0} parameter(2)
  %e = bf16[4,14,14,256]{3,2,1,0} convolution(%i, %k), window={size=16x16 stride=16x16}, \
dim_labels=b01f_01io->b01f
  ROOT %c = bf16[8,12,200,200]{2,3,1,0} convolution(%q, %q), \
window={size=8x12 stride=7x11 lhs_dilate=8x12}, dim_labels=0b1f_0o1i->01bf""")
    assert hlo_work.dot_flops(module) == 2 * 8 * 12 * 200 * 200 * 64 + 2 * 4 * 14 * 14 * 256 * 768


# Memory traffic

FUSED = """
%slice (a: f32[16,1024], i: s32[]) -> f32[1024] {
  %a = f32[16,1024]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %z = s32[] constant(0)
  %s = f32[1,1024]{1,0} dynamic-slice(%a, %i, %z), dynamic_slice_sizes={1,1024}
  ROOT %b = f32[1024]{0} bitcast(%s)
}

%update (a: f32[16,1024], u: f32[1024], i: s32[]) -> f32[16,1024] {
  %a = f32[16,1024]{1,0} parameter(0)
  %u = f32[1024]{0} parameter(1)
  %b = f32[1,1024]{1,0} bitcast(%u)
  %i = s32[] parameter(2)
  %z = s32[] constant(0)
  ROOT %d = f32[16,1024]{1,0} dynamic-update-slice(%a, %b, %i, %z)
}

%scale (a: f32[16,1024]) -> f32[16,1024] {
  %a = f32[16,1024]{1,0} parameter(0)
  ROOT %n = f32[16,1024]{1,0} negate(%a)
}
"""
ROW, ALL = 4 * 1024, 4 * 16 * 1024


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("f32[16,1024]{1,0} fusion(%p), kind=kLoop, calls=%scale", 2 * ALL),
        ("f32[16,1024]{1,0:S(1)} fusion(%p), kind=kLoop, calls=%scale", ALL),
        ("f32[1024]{0} fusion(%p, %i), kind=kLoop, calls=%slice", 2 * ROW + 4),
        ("f32[16,1024]{1,0} fusion(%p, %r, %i), kind=kLoop, calls=%update", 2 * ROW + 4),
        ("f32[16,1024]{1,0} negate(%p)", 2 * ALL),
        ("f32[16,1024]{1,0} bitcast(%p)", 0),
        ("(f32[16,1024]{1,0:S(1)}, f32[16,1024]{1,0}, u32[]{:S(2)}) copy-start(%p)", ALL),
        ("((f32[16,1024]{1,0}), f32[1,1024]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%p)", ROW),
        ('f32[16,1024]{1,0} custom-call(), custom_call_target="AllocateBuffer"', 0),
        (
            'f32[1024]{0} custom-call(%p, %p, %p), custom_call_target="tpu_custom_call"',
            ALL + ROW,  # the kernel reads a part of %p each time
        ),
        ("f32[16,1024]{1,0} all-reduce(%p), replica_groups={}, to_apply=%add", 2 * ALL),
    ],
)
def test_traffic_of_an_instruction(line, expected):
    module = entry(
        "  %p = f32[16,1024]{1,0} parameter(0)\n  %i = s32[] parameter(1)\n"
        f"  %r = f32[1024]{{0}} parameter(2)\n  ROOT %x = {line}",
        FUSED,
    )
    assert hlo_work.bytes_accessed(module) == expected


if __name__ == "__main__":
    make_goldens()
