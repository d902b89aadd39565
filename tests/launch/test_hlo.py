"""Compiled programs read back: texts written by hand, two of the TPU compiler's, one compiled here.

The texts of compilers are `program()` for a slice, two slices and two nodes of GPUs, without source lines.
"""

import functools
import gzip

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grain_jax.launch import chips, cost, hlo, hlo_collectives, hlo_work
from grain_jax.train import flops
from tests import paths

GOLDENS = paths.GOLDENS / "hlo"
LAYERS, WIDTH, ROWS = 4, 512, 1024  # of the program below; rows of one chip
MIB = 2**20


def program(devices, dtype=jnp.bfloat16):
    """A scanned MLP cut over (data, fsdp), then a ring of products over all chips; step and arguments."""
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
    """FLOPs of one chip: 2 products per layer forward, 4 backward; 1 per turn of the ring each way."""
    layers = LAYERS * 6 * (2 * ROWS * WIDTH * 4 * WIDTH)
    return layers + chips * 2 * (2 * ROWS * ROWS * WIDTH)


@functools.cache
def golden(name):
    return hlo.parse(gzip.decompress((GOLDENS / f"{name}.txt.gz").read_bytes()).decode())


def entry(body, before=""):
    """A module for 8 chips: an entry computation, and what stands before it."""
    return hlo.parse(
        f"HloModule m, is_scheduled=true, num_partitions=8\n\n{before}\n"
        f"ENTRY %main (p: f32[4]) -> f32[4] {{\n{body}\n}}\n"
    )


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
    """From start, step and limit; the compiler's note wins; without a known end it counts once, by name."""
    module = entry(LOOP_ENTRY, LOOP.format(direction="LT"))
    assert module.times["body"] == 4  # 1, 3, 5, 7
    assert module.in_loop == {"body"} and module.trips == {"loop": 4}
    assert hlo_work.dot_flops(module) == 4 * 2 * 4**3
    noted = LOOP_ENTRY.replace("body=%body", 'body=%body, x={"known_trip_count":{"n":"11"}}')
    assert entry(noted, LOOP.format(direction="LT")).times["body"] == 11
    module = entry(LOOP_ENTRY, LOOP.format(direction="NE"))
    assert module.times["body"] == 1 and module.trips == {"loop": None}


def test_metadata_on_lines_of_its_own():
    """JAX's splash attention has such; a computation with one instruction only looks like it."""
    metadata = 'frontend_attributes={kernel_metadata={\n"block_q": 256\n}}, backend_config={"body":"b"}'
    kernel = '  %k = f32[4]{0} custom-call(%p), custom_call_target="tpu_custom_call", ' + metadata
    one = "%one () -> s32[] {\n  ROOT %i = s32[] iota(), iota_dimension=0\n}\n"
    module = entry(f"  %p = f32[4]{{0}} parameter(0)\n{kernel}\n  ROOT %c = f32[4]{{0}} copy(%k)", one)
    assert module.computations["one"].root.name == "i"
    assert list(module.computations["main"].instructions) == ["p", "k", "c"]
    assert module.computations["main"].instructions["k"].find(r'"body":"([^"]*)"') == "b"


# Groups


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,2},{1,3}}", [[0, 2], [1, 3]]),
        ("replica_groups={}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("replica_groups=[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
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
        counted = flops.by_module(jax.make_jaxpr(step)(*arguments).jaxpr)
        assert chips * hlo_work.dot_flops(module) == counted.total()
    else:
        module = golden(name)
    assert module.partitions == chips and None not in module.trips.values()
    assert hlo_work.dot_flops(module) == expected_flops(chips)
    mesh = {"data": chips // 2, "fsdp": 2, "tensor": 1}
    rows = hlo_collectives.collectives(module, mesh=mesh, slices=slices)
    kernel = itemsize * WIDTH * 4 * WIDTH  # bytes of one, whole
    # Both kernels of a layer are gathered forward and backward. Their gradients are scattered, then summed
    # over data. The ring turns as often as there are chips, and its permutations hide behind the products.
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


@pytest.mark.parametrize(
    "name, slices, chip, expected",
    [
        ("v5e_4x4", 1, "v5e", (232784950, 7.350032e-4, 0, 5.067490e-4, 9.427863e-4)),
        ("h100_4x2", 2, "h100", (1293280112, 7.556540e-5, 5.043165e-4, 5.190850e-4, 9.051388e-4)),
        (*("v5e_2x2_two_slices", 2, "v5e"), (188426829, 5.462595e-4, 4.027532e-3, 4.354872e-3, 4.703702e-3)),
    ],
)
def test_traffic_and_roofline_of_compiled_programs(name, slices, chip, expected):
    """(HBM bytes, interconnect, network, exposed, step), in seconds."""
    module = golden(name)
    rows = hlo_collectives.collectives(module, slices=slices)
    traffic = hlo_work.bytes_accessed(module)
    products = hlo_work.dot_flops(module, passes=True)
    roof = cost.roofline(products, traffic, rows, chips.CHIPS[chip])
    times = (roof.interconnect_s, roof.dcn_s, roof.exposed_s, roof.step_s)
    assert (traffic, *times) == pytest.approx(expected, rel=1e-6)


GEMM = """
  %q = f32[6,200,64]{2,1,0} parameter(0)
  %call = (f32[6,200,200]{2,1,0}, s8[4194304]{0}) custom-call(%q, %q), \
custom_call_target="__cublas$lt$matmul", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"]},\
"precision_config":{"operand_precision":["PRECISION","PRECISION"]}}}
  ROOT %x = f32[6,200,200]{2,1,0} get-tuple-element(%call), index=0
"""


@pytest.mark.parametrize(("precision", "as_bfloat16"), [("DEFAULT", 2), ("HIGHEST", 16)])
def test_products_of_cublas(precision, as_bfloat16):
    module = entry(GEMM.replace("PRECISION", precision))
    product = 2 * 6 * 200 * 200 * 64
    assert hlo_work.dot_flops(module, passes=True) == as_bfloat16 * product
    # the scratch memory of 4 MiB is not counted
    assert hlo_work.bytes_accessed(module) == 2 * 4 * 6 * 200 * 64 + 4 * 6 * 200 * 200


def test_attention_of_cudnn():
    call = """
  %q = bf16[8,66,4,24]{3,2,1,0} parameter(0)
  ROOT %call = (bf16[8,4,66,24]{3,1,2,0}, u8[64]{0}) custom-call(%q, %q, %q), \
custom_call_target="__cudnn$fmhaSoftmax", backend_config={"cudnn_fmha_backend_config": \
{"intermediate_tensor_shape": {"dimensions": ["8", "4", "66", "66"]}}}
"""
    assert hlo_work.dot_flops(entry(call)) == 2 * 2 * 8 * 4 * 66 * 66 * 24


def test_batched_products_of_the_tpu_are_dilated_convolutions():
    """Attention logits of 8 images and 12 heads, 200 x 200 x 64, and a patch embedding, compiled for v5e."""
    module = entry("""  %q = bf16[8,200,12,64]{3,1,2,0} parameter(0)
  %i = bf16[4,224,224,3]{3,2,1,0} parameter(1)
  %k = bf16[16,16,3,256]{3,2,1,0} parameter(2)
  %e = bf16[4,14,14,256]{3,2,1,0} convolution(%i, %k), window={size=16x16 stride=16x16}, \
dim_labels=b01f_01io->b01f
  ROOT %c = bf16[8,12,200,200]{2,3,1,0} convolution(%q, %q), \
window={size=8x12 stride=7x11 lhs_dilate=8x12}, dim_labels=0b1f_0o1i->01bf""")
    assert hlo_work.dot_flops(module) == 2 * 8 * 12 * 200 * 200 * 64 + 2 * 4 * 14 * 14 * 256 * 768
